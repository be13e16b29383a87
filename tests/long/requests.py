"""Short requests one after another, of several kinds: pages go back to zero and the memory stays flat. Prints
one JSON object."""

from __future__ import annotations

import argparse
import gc
import json
import resource

import tinyllm
from tinyllm import backends


def used_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def request(llm: tinyllm.LLM, i: int) -> None:
    prompt = [1, 3 + i % 200, 3 + i // 200 % 200, 7, 9] * (1 + i % 17)
    if i % 3 == 0:
        llm(prompt, max_tokens=2, seed=i)
    elif i % 3 == 1:
        next(llm.stream(prompt, seed=i))
    else:
        session = llm.session(seed=i)
        session.append(prompt)
        session.fork().sample()  # neither is closed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    n = parser.parse_args().n
    with tinyllm.load("stories", threads=2) as llm:
        sizes = []
        for i in range(n):
            request(llm, i)
            if i % (n // 10) == n // 10 - 1:
                gc.collect()
                with llm._cache.lock:
                    llm._cache.collect()
                assert llm._cache.n_used == 0, f"{llm._cache.n_used} pages in use after {i + 1} requests"
                assert not llm._cache._tables_of
                sizes.append(used_bytes())
        growth = sizes[-1] - sizes[len(sizes) // 2]
        assert growth < 3e6, f"{growth} bytes more in the second half: {sizes}"
    assert backends.live_allocations() == (0, 0)
    result = {"name": "short requests one after another", "inputs": n, "crashes": 0, "leaks": 0}
    print(json.dumps(result | {"bytes more in the second half": growth}))


if __name__ == "__main__":
    main()
