"""What became slower: two runs of the suite, as ratios, beyond their noise.

    python benchmarks/regressions.py benchmarks/results/2026-11-21-suite.json new.json

A run is what `pytest benchmarks --results FILE` kept: quartiles of every benchmark's time. A benchmark counts
as slower (or faster) when its median moved by more than 5 % times how far the middle half of its rounds is
spread in both runs (upper over lower quartile): what a noisy minute says is not held against a change.
Exits with 1 where something is slower or no longer there, with 6 where the runs are of two machines (or
instruction sets, or numbers of threads) and their times say nothing; 2 is for a file that is no run. Imports
nothing of tinyllm's; conftest.py uses it for `--against`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 1.05
WORSE, NOT_COMPARABLE = 1, 6  # exit codes; those between are pytest's


class Change(NamedTuple):
    """ratio: new median time over old, above 1 is slower. noise: how far from 1 says nothing."""

    name: str
    ratio: float
    noise: float

    @property
    def is_slower(self) -> bool:
        return self.ratio > self.noise

    @property
    def is_faster(self) -> bool:
        return self.ratio < 1 / self.noise


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Of every benchmark that is in both runs, the slowest first."""
    found = []
    for name, now in new["benchmarks"].items():
        before = old["benchmarks"].get(name)
        if before is not None:
            noise = LIMIT * (before["q3_s"] / before["q1_s"]) * (now["q3_s"] / now["q1_s"])
            found.append(Change(name, now["median_s"] / before["median_s"], noise))
    return sorted(found, key=lambda change: -change.ratio)


def missing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Benchmarks of the old run that the new one lacks."""
    return [name for name in old["benchmarks"] if name not in new["benchmarks"]]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why times of the two runs say nothing of each other, if so."""
    keys = ("machine", "isa", "threads")
    return [f"{key} was {old[key]}, is {new[key]}" for key in keys if old[key] != new[key]]


def exit_code(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """0 where all that was measured is still there and not slower."""
    if differences(old, new):
        return NOT_COMPARABLE
    return WORSE if missing(old, new) or any(change.is_slower for change in changes(old, new)) else 0


def report(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The lines to print: what is gone, slower and faster, and how all of it moved."""
    found, gone = changes(old, new), missing(old, new)
    lines = [f"not comparable: {what}" for what in differences(old, new)]
    if gone:
        lines.append(f"missing: {len(gone)} of {len(old['benchmarks'])}")
        lines += [f"  {name}" for name in gone]
    if not found:
        return [*lines, "the two runs have no benchmark in common"]
    for title, chosen in (
        ("slower", [c for c in found if c.is_slower]),
        ("faster", [c for c in found if c.is_faster]),
    ):
        lines.append(f"{title}: {len(chosen)} of {len(found)}")
        lines += [f"  {c.name:<44} time x {c.ratio:.2f}  (noise to {c.noise:.2f})" for c in chosen]
    ratios = [c.ratio for c in found]
    lines.append(
        f"all: time x {statistics.median(ratios):.2f} (median), {min(ratios):.2f} to {max(ratios):.2f}"
    )
    return lines


def read(path: str | Path) -> dict[str, Any]:
    """A run. Raises ValueError for a file that is none."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("benchmarks"), dict):
        raise ValueError(f"{path} is not what `pytest benchmarks --results FILE` keeps")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="regressions.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("old", metavar="OLD.json")
    parser.add_argument("new", metavar="NEW.json")
    args = parser.parse_args(argv)
    try:
        old, new = read(args.old), read(args.new)
    except (OSError, ValueError) as error:
        print(f"regressions.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(report(old, new)))
    return exit_code(old, new)


if __name__ == "__main__":
    sys.exit(main())
