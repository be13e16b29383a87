"""Many threads on one model: texts, streams left early, sessions with forks, cancelled and failing calls,
`cancel=` that raises whatever there is, processors that damage what they are given, a cache that is full.
Every text is the one it is alone, each thread gets its turn, and at the end no page is in use. Prints one
JSON object."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import threading
import time
from typing import Any

import tinyllm
from tinyllm import backends
from tinyllm.llm import LLM

PROMPTS = ["Once upon a time", "The dog saw a cat.", "Lily found a box. " * 12, "Tom", "One day, " * 30]
N_TOKENS = 12


class Oops(Exception):
    pass


def oops(*_: object) -> Any:
    raise Oops


def damage(logits: Any, tokens: Any) -> None:
    tokens[-1] = 10**6
    tokens.append("x")
    del tokens[:2]
    logits.shape = (1, -1)


def one(llm: tinyllm.LLM, small: tinyllm.LLM, i: int, alone: list[list[int]]) -> None:
    """small: the same with a cache that few of the threads fill."""
    prompt, expected = PROMPTS[i % len(PROMPTS)], alone[i % len(PROMPTS)]
    kind = i // len(PROMPTS) % 8
    options: dict[str, Any] = {"seed": 1, "max_tokens": N_TOKENS}
    if kind == 0:
        assert llm(prompt, **options).tokens == expected
    elif kind == 1:
        with llm.stream(prompt, **options) as stream:
            assert [next(stream).token for _ in range(3)] == expected[:3]
    elif kind == 2:
        with llm.session(seed=1) as session:
            session.append(prompt)
            with session.fork() as other:
                other.append(" And then")
            assert session.generate(**options).tokens == expected
    elif kind == 3:
        asked = iter(range(i % 7))
        tokens = llm(prompt, **options, cancel=lambda: next(asked, None) is None).tokens
        assert tokens == expected[: len(tokens)]
    elif kind == 4:
        error = (SystemExit, KeyboardInterrupt, GeneratorExit, Oops)[i % 4]
        asked = iter(range(i % 7))

        def cancel() -> bool:
            if next(asked, None) is None:
                raise error(i)
            return False

        try:
            assert llm(prompt, **options, cancel=cancel).tokens == expected
        except error as raised:
            if raised.args != (i,):
                raise AssertionError("another thread's") from raised
    elif kind == 5:
        assert llm(prompt, **options, processors=[damage, damage]).tokens == expected
    elif kind == 6:
        for group in small([prompt, prompt], n=2, **options):
            assert group[0].tokens == expected
    else:
        try:
            llm([prompt, "Tom"], **options, processors=[oops])
        except Oops:
            return
        raise AssertionError("nothing was raised")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    given = parser.parse_args()
    faulthandler.dump_traceback_later(given.seconds + 200, exit=True)
    raised: list[BaseException] = []
    counts = [0] * given.threads
    with tinyllm.load("stories", threads=2) as llm, LLM(llm.model, llm.tokenizer, max_pages=9) as small:
        alone = [llm(prompt, seed=1, max_tokens=N_TOKENS).tokens for prompt in PROMPTS]
        end = time.monotonic() + given.seconds

        def work(thread: int) -> None:
            try:
                i = thread
                while (time.monotonic() < end or min(counts) == 0) and not raised:
                    one(llm, small, i, alone)
                    counts[thread] += 1
                    i += 7
            except BaseException as error:
                raised.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(given.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if raised:
            raise raised[0]
        del threads
        gc.collect()
        for cache in (llm._cache, small._cache):
            with cache.lock:
                cache.collect()
            assert cache.n_used == 0, f"{cache.n_used} pages in use"
            assert not cache._tables_of
    assert backends.live_allocations() == (0, 0)
    result = {
        "name": f"{given.threads} threads on one model",
        "inputs": sum(counts),
        "crashes": 0,
        "leaks": 0,
    }
    print(json.dumps(result | {"seconds": given.seconds}))


if __name__ == "__main__":
    main()
