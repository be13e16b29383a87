"""RLIMIT_AS under load, a generation and logits, with a little more left each time, until all of it works
three times: every failure is MemoryLimitError, nothing stays allocated, and the model that fits gives the
same text. Prints one JSON object."""

from __future__ import annotations

import argparse
import json
import resource
from collections import Counter

import tinyllm
from tinyllm import backends

INFINITE = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def used_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def attempt(n_bytes: int) -> tuple[str, str]:
    """How far it comes with n_bytes of address space more: (stage, error), of all of it ("done", text)."""
    stage, llm, limit = "load", None, used_bytes() + n_bytes
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        llm = tinyllm.load("stories", threads=2)
        stage = "generate"
        text = llm("Once upon a time", max_tokens=70, temperature=0).text
        stage = "logits"
        llm.logits([1] * 200)
        return "done", text
    except tinyllm.MemoryLimitError as error:
        return stage, type(error).__name__
    except MemoryError:  # of Python itself, outside of what we could turn into ours
        return stage, "MemoryError"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, INFINITE)
        if llm is not None:
            llm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-kb", type=int, default=256)
    step = parser.parse_args().step_kb * 1024
    stage, text = attempt(1 << 34)
    assert stage == "done", (stage, text)
    failures: Counter[str] = Counter()
    n_bytes = n_done = 0
    while n_done < 3:
        stage, what = attempt(n_bytes)
        if stage == "done":
            assert what == text, "another text after failures"
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
