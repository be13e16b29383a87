"""Ctrl-C at every place where Python lets a handler run in the engine and its books about pages, one place a
run, in random order until the time is over: what tests/test_interrupts.py samples. Prints one JSON object."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers_interrupts import Interrupts
from test_interrupts import FILES, WORKS, check_after, make_engine, of_another_thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    places: list[tuple[int, int]] = []
    for kind, work in enumerate(WORKS):
        counter = Interrupts(FILES)
        engine = make_engine(6)
        counter.run(lambda work=work, engine=engine: work(engine))  # type: ignore[misc]
        places += [(kind, at) for at in range(1, counter.n + 1)]
    n_of_another = of_another_thread(None)
    places += [(len(WORKS), at) for at in range(1, n_of_another + 1)]
    random.Random(given.seed).shuffle(places)
    n_tried = 0
    for kind, at in places:
        if time.monotonic() > end:
            break
        if kind == len(WORKS):
            of_another_thread(at)
        else:
            engine = make_engine(6)
            for _ in range(2):
                Interrupts(FILES, at).run(lambda kind=kind, engine=engine: WORKS[kind](engine))  # type: ignore[misc]
            check_after(engine)
        n_tried += 1
    result = {"name": "an interrupt at every place", "places": len(places), "inputs": n_tried}
    print(json.dumps(result | {"faults": n_tried, "crashes": 0, "leaks": 0}))


if __name__ == "__main__":
    main()
