"""Ctrl-C at random ones of all places in tinyllm's Python where a handler can run, while a model is loaded,
quantized, used in every way and measured. After each: nothing of the core's memory is left, no page in use,
no file open, no half-written file, and the model answers as before. Prints one JSON object."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers_interrupts import Interrupts

import tinyllm
from tinyllm import backends
from tinyllm.measure import quality

FILES = {str(path) for path in Path(tinyllm.__file__).parent.rglob("*.py")}
PROMPT = "One day, Lily and Tom went to the park."
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def works(llm: tinyllm.LLM, folder: Path) -> dict[str, Callable[[], object]]:
    def session() -> None:
        with llm.session(seed=1) as session:
            session.append(PROMPT)
            with session.fork() as other:
                other.generate(max_tokens=2)
            with session.stream(max_tokens=3) as stream:
                next(stream)

    return {
        "load": lambda: tinyllm.load("stories", threads=2).close(),
        "quantize": lambda: tinyllm.quantize("stories", folder / "out", "q8_0", allow_requantize=True),
        "call": lambda: llm([PROMPT, "Tom"], n=2, max_tokens=4, seed=1),
        "session": session,
        "chat": lambda: llm.chat([{"role": "user", "content": "Tom"}], chat_template=TEMPLATE, max_tokens=2),
        "score": lambda: llm.score(PROMPT),
        "embed": lambda: llm.embed([PROMPT, "Tom"]),
        "measure": lambda: quality.measure([llm], quality.windows([5] * 130, 64)),
    }


def state(folder: Path) -> tuple[tuple[int, int], int, set[str]]:
    gc.collect()
    (folder / "out").unlink(missing_ok=True)  # is whole, where it is there
    return backends.live_allocations(), len(os.listdir("/proc/self/fd")), set(os.listdir(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, unraisable, n_interrupted, places = random.Random(given.seed), [], 0, {}
    sys.unraisablehook = unraisable.append
    with tempfile.TemporaryDirectory() as name, tinyllm.load("stories", threads=2) as llm:
        folder = Path(name)
        right = llm(PROMPT, max_tokens=5, seed=1).tokens
        todo = works(llm, folder)
        for kind, work in todo.items():
            work()  # imports what is imported late
            counter = Interrupts(FILES)
            counter.run(work)
            places[kind] = counter.n
        before, end, n = state(folder), time.monotonic() + given.seconds, 0
        while time.monotonic() < end or n < len(todo):
            kind = list(todo)[n % len(todo)]
            at = rng.randrange(1, places[kind] + 1)
            n_interrupted += Interrupts(FILES, at).run(todo[kind])
            n += 1
            after = state(folder)
            assert after == before, f"place {at} of {kind}: {before}, {after}"
            with llm._cache.lock:
                llm._cache.collect()
            assert llm._cache.n_used == 0, f"place {at} of {kind}: {llm._cache.n_used} pages in use"
            assert llm(PROMPT, max_tokens=5, seed=1).tokens == right, f"place {at} of {kind}: another text"
    assert backends.live_allocations() == (0, 0)
    # What Python calls by itself cannot raise it: a place in a __del__ or a callback of the interpreter's.
    n_lost = sum("KeyboardInterrupt" in str(entry) for entry in unraisable)
    assert n_interrupted > n / 2, (n_interrupted, n)
    result = {"name": "an interrupt anywhere in the package", "places": sum(places.values()), "inputs": n}
    result |= {"faults": n_interrupted, "interrupts lost by Python": n_lost, "crashes": 0, "leaks": 0}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
