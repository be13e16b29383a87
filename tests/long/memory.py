"""RLIMIT_AS under load, a generation and logits, and under the tokenizers alone, with a little more left each
time, until all of it works three times: every failure is MemoryLimitError, nothing stays allocated, and what
fits gives the same text and ids. Prints one JSON object."""

from __future__ import annotations

import argparse
import json
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tinyllm
from tinyllm import backends
from tinyllm.modelfiles import BUNDLED
from tinyllm.tokenizer import tokenizer_from_gguf

INFINITE = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def used_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


Work = Callable[[ExitStack], Iterator[Any]]  # yields the name of each stage, and at the end a result


def of_a_model(stack: ExitStack) -> Iterator[Any]:
    yield "load"
    llm = stack.enter_context(tinyllm.load("stories", threads=2))
    yield "generate"
    text = llm("Once upon a time", max_tokens=70, temperature=0).text
    yield "logits"
    llm.logits([1] * 200)
    yield text


def of_sentencepiece(stack: ExitStack) -> Iterator[Any]:
    yield "load a SentencePiece tokenizer"
    tokenizer = tinyllm.load_tokenizer(BUNDLED["stories"])
    yield "encode by SentencePiece"
    yield tokenizer.encode("Once upon a time. " * 10000)


def byte_level(n_merges: int) -> dict[str, Any]:
    """A GGUF's entries of a vocabulary of byte-level BPE, whose package takes no failure of an allocation."""
    letters = [chr(i) for i in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
    pairs = [(a, b) for a in letters for b in letters][:n_merges]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*letters, *(a + b for a, b in pairs)],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairs],
    }


def of_bpe(stack: ExitStack) -> Iterator[Any]:
    yield "build a BPE tokenizer"
    tokenizer = tokenizer_from_gguf(VOCABULARY)
    yield "encode by BPE"
    yield tokenizer.encode("1\n" * 60000)


def of_json(stack: ExitStack) -> Iterator[Any]:
    folder = stack.enter_context(tokenizer_json())
    yield "read a tokenizer.json"
    yield tinyllm.load_tokenizer(folder).encode("1\n")


@contextmanager
def tokenizer_json() -> Iterator[str]:
    """A directory with such a vocabulary."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(JSON)
        yield folder


def as_json(entries: dict[str, Any]) -> bytes:
    ids = {text: i for i, text in enumerate(entries["tokenizer.ggml.tokens"])}
    model = {"type": "BPE", "vocab": ids, "merges": entries["tokenizer.ggml.merges"]}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return json.dumps({"model": model, "pre_tokenizer": step, "decoder": step}).encode()


VOCABULARY = byte_level(40000)
JSON = as_json(byte_level(1 << 16))


def attempt(work: Work, n_bytes: int) -> tuple[str, Any]:
    """How far it comes with n_bytes of address space more: (stage, error), of all of it ("done", result)."""
    stage, limit = "start", used_bytes() + n_bytes
    with ExitStack() as stack:
        inner = stack.enter_context(ExitStack())
        stack.callback(resource.setrlimit, resource.RLIMIT_AS, INFINITE)  # before what is in `inner` closes
        try:
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            for stage in work(inner):  # noqa: B007
                pass
        except tinyllm.MemoryLimitError as error:
            return stage, type(error).__name__
        except MemoryError:  # of Python itself, outside of what we could turn into ours
            return stage, "MemoryError"
    return "done", stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-kb", type=int, default=256)
    step = parser.parse_args().step_kb * 1024
    failures: Counter[str] = Counter()
    for work in (of_a_model, of_sentencepiece, of_bpe, of_json):
        stage, result = attempt(work, 1 << 34)
        assert stage == "done", (stage, result)
        n_bytes = n_done = 0
        while n_done < 3:
            stage, what = attempt(work, n_bytes)
            if stage == "done":
                assert what == result, "another result after failures"
                n_done += 1
            else:
                failures[f"{stage}: {what}"] += 1
            assert backends.live_allocations() == (0, 0), f"{backends.live_allocations()} left after {stage}"
            n_bytes += step
    assert failures, "nothing failed"
    plain = sum(n for what, n in failures.items() if what.endswith(": MemoryError"))
    assert plain == 0, failures
    result = {
        "name": "address space that runs out",
        "faults": sum(failures.values()),
        "crashes": 0,
        "leaks": 0,
    }
    print(json.dumps(result | {"by stage": dict(failures)}))


if __name__ == "__main__":
    main()
