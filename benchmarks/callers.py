"""How well callers who come at once share the machine, and how long a stream waits for another's long prompt.

    python benchmarks/callers.py MODEL.gguf [-n 24] [--callers 8,32] [--turns 3] [--only stream,forms]

In alternating turns: N prompts as one batch, the same from N threads, the same from N tasks of asyncio. Then
the time between two tokens of a stream, alone and while another thread's long prompt is computed; answers of
a form beside free ones; a JSON of mostly keys with tokens that are taken without a choice, and with none.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import tinyllm
from tinyllm.constraints import Grammar, Vocabulary, form_of

KEYS = [f"a_property_with_a_long_name_{i}" for i in range(8)]
MOSTLY_KEYS = {
    "type": "object",
    "properties": {key: {"type": "boolean"} for key in KEYS},
    "required": KEYS,
    "additionalProperties": False,
}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def from_threads(llm: tinyllm.LLM, prompts: list[list[int]], options: dict[str, Any]) -> None:
    threads = [threading.Thread(target=llm, args=(prompt,), kwargs=options) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def from_tasks(llm: tinyllm.LLM, prompts: list[list[int]], options: dict[str, Any]) -> None:
    await asyncio.gather(*(llm.acall(prompt, **options) for prompt in prompts))


def gaps(llm: tinyllm.LLM, n: int, options: dict[str, Any]) -> list[float]:
    """Seconds between the tokens of a stream."""
    times = []
    for _ in llm.stream([1, 5, 9, 13], **{**options, "max_tokens": n}):
        times.append(time.perf_counter())
    return [b - a for a, b in pairwise(times)]


def share(llm: tinyllm.LLM, args: argparse.Namespace, free: dict[str, Any]) -> None:
    """Callers beside one batch."""
    for n in map(int, args.callers.split(",")):
        prompts = [[1, *(7 * i + j + 3 for j in range(15))] for i in range(n)]
        ways: dict[str, Callable[[], object]] = {
            "batch": lambda p=prompts: llm(p, **free),
            "threads": lambda p=prompts: from_threads(llm, p, free),
            "tasks": lambda p=prompts: asyncio.run(from_tasks(llm, p, free)),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.turns + 1):
            for name, work in ways.items():
                s = seconds(work)
                if turn:  # the first warms up
                    taken[name].append(s)
        rates = {name: n * args.n / statistics.median(s) for name, s in taken.items()}
        told = ", ".join(f"{name} {rate:.1f} tok/s" for name, rate in rates.items())
        shares = ", ".join(f"{rates[name] / rates['batch']:.3f} ({name})" for name in ("threads", "tasks"))
        print(f"{n} callers: {told}; of the batch's: {shares}", flush=True)


def stream(llm: tinyllm.LLM, args: argparse.Namespace, free: dict[str, Any]) -> None:
    """The pauses of a stream, alone and beside a long prompt."""
    alone = gaps(llm, 40, free)
    prompt = [1, *(i % 1000 + 3 for i in range(args.long - 1))]
    thread = threading.Thread(target=llm, args=(prompt,), kwargs={**free, "max_tokens": 1})
    start = time.perf_counter()
    thread.start()
    beside: list[float] = []
    while thread.is_alive():
        beside += gaps(llm, 40, free)
    took, beside = time.perf_counter() - start, sorted(beside)
    most, nearly, nearest = (1e3 * beside[int(at * (len(beside) - 1))] for at in (1, 0.95, 0.99))
    print(
        f"a stream: {1e3 * statistics.median(alone):.1f} ms a token; beside a prompt of {args.long} tokens, "
        f"which took {took:.1f} s: median {1e3 * statistics.median(beside):.1f}, 95 % below {nearly:.1f}, "
        f"99 % below {nearest:.1f}, most {most:.1f} ms"
    )


def forms(llm: tinyllm.LLM, args: argparse.Namespace, free: dict[str, Any]) -> None:
    """Texts of a form beside free ones, in one batch each."""
    prompts = [[1, 7 * i + 3] for i in range(8)]
    words = {**free, "regex": "[a-z ]{2000}", "suppress_tokens": None}
    llm(prompts, **words)
    pairs = [
        (seconds(lambda: llm(prompts, **free)), seconds(lambda: llm(prompts, **words)))
        for _ in range(args.turns)
    ]
    print(f"8 texts of a form: {statistics.median(a / b for a, b in pairs):.3f} of the speed without one")


def keys(llm: tinyllm.LLM, args: argparse.Namespace, free: dict[str, Any]) -> None:
    """A JSON of mostly keys, its forced tokens at once and one by one."""
    start_of = Grammar.start
    asked = {"json_schema": MOSTLY_KEYS, "max_tokens": 400, "temperature": 0}

    def one_by_one() -> None:
        Grammar.start = lambda self, *, forces=True: start_of(self, forces=False)  # type: ignore[method-assign]
        try:
            llm([1, 5, 9], **asked)
        finally:
            Grammar.start = start_of  # type: ignore[method-assign]

    one_by_one()
    pairs = [(seconds(one_by_one), seconds(lambda: llm([1, 5, 9], **asked))) for _ in range(args.turns)]
    faster = statistics.median(a / b for a, b in pairs)
    print(f"a JSON of mostly keys: {faster:.2f} times as fast with tokens taken at once")


def first(llm: tinyllm.LLM, args: argparse.Namespace, free: dict[str, Any]) -> None:
    """The first mask of a schema that was not seen before, the vocabulary being known."""
    assert llm.tokenizer is not None
    vocabulary = Vocabulary(llm.tokenizer, llm.config.vocab_size, llm.eos_ids)
    taken = []
    for turn in range(args.turns):
        names = [f"key_{turn}_{i}" for i in range(100)]
        kinds: list[dict[str, Any]] = [{"type": "string"}, {"type": "integer"}, {"enum": ["a", "b"]}]
        properties = {name: kinds[i % 3] for i, name in enumerate(names)}
        schema = {"type": "object", "properties": properties, "required": names}
        form = form_of(json_schema=schema)
        assert form is not None
        taken.append(seconds(lambda form=form: Grammar(form, vocabulary).start().mask()))  # type: ignore[misc]
    print(f"the first mask of a schema of 100 keys: {1e3 * statistics.median(taken):.1f} ms")


PARTS = {"share": share, "stream": stream, "forms": forms, "keys": keys, "first": first}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("-n", type=int, default=24, help="tokens of each text")
    parser.add_argument("--callers", default="8,32")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--long", type=int, default=2048, help="tokens of the long prompt")
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    args = parser.parse_args()
    llm = tinyllm.load(args.model, context=args.long + 512)
    free = {"max_tokens": args.n, "temperature": 0.8, "seed": 1, "suppress_tokens": sorted(llm.eos_ids)}
    for part in args.only.split(","):
        PARTS[part](llm, args, free)


if __name__ == "__main__":
    main()
