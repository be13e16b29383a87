"""Coverage-guided fuzzing of the C core: builds fuzz_core.c with clang's libFuzzer, AddressSanitizer and
UndefinedBehaviorSanitizer, runs it, and prints one JSON object with what it saw.

    python tests/long/fuzz_core.py [--seconds 60] [--corpus DIRECTORY] [--json PATH]
    python tests/long/fuzz_core.py --keep               # writes tests/corpus/core anew from what was found

It begins with the files of tests/corpus/core, and ends with 1 where something crashes. What crashes is kept
in build/fuzz/crashes; give such a file to build/fuzz/fuzz_core to see it again."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from fuzz_loaders import begin, keep

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "fuzz"
KEPT = ROOT / "tests" / "corpus" / "core"
FLAGS = ["-g1", "-O1", "-std=c11", "-DTL_SCALAR_ONLY", "-ffp-contract=off", "-fno-math-errno"]
ALL = ["-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=all"]
# The kernels of every format in one file: with coverage and checks of every addition clang takes an hour.
KERNELS = ["-O0", "-fsanitize=address"]


def build() -> Path:
    """The fuzzer, in plain C: vector instructions are compared with it bit by bit in the ordinary tests."""
    BUILD.mkdir(parents=True, exist_ok=True)
    csrc = ROOT / "csrc"
    kernels = csrc / "isa" / "scalar.c"
    others = [c for c in sorted(csrc.rglob("*.c")) if c.parent != kernels.parent or c.name == "select.c"]

    def compiled(source: Path) -> Path:
        to = BUILD / f"{source.parent.name}_{source.stem}.o"
        checks = KERNELS if source == kernels else ALL
        subprocess.run(["clang", *FLAGS, *checks, "-I", csrc, "-c", source, "-o", to], check=True)
        return to

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # the kernels take as long as all others
        objects = list(pool.map(compiled, [kernels, *others, Path(__file__).with_suffix(".c")]))
    fuzzer = BUILD / "fuzz_core"
    link = ["clang", "-fsanitize=fuzzer,address,undefined", *objects, "-lm", "-lpthread", "-o", fuzzer]
    subprocess.run(link, check=True)
    return fuzzer


def run(fuzzer: Path, seconds: int, corpus: Path) -> dict[str, Any]:
    begin(corpus, KEPT)
    crashes = BUILD / "crashes"
    crashes.mkdir(exist_ok=True)
    before = set(crashes.iterdir())
    command = [fuzzer, f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=4096", "-timeout=3600"]
    command += ["-rss_limit_mb=2048", "-report_slow_units=3600", f"-artifact_prefix={crashes}/", corpus]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "ASAN_OPTIONS": "abort_on_error=0"}
    )
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    covered = re.findall(r"cov: (\d+) ft: (\d+)", done.stderr)
    new = len(set(crashes.iterdir()) - before)
    if new or done.returncode:
        sys.stderr.write(done.stderr[-4000:])
    return {
        "name": "C core (libFuzzer)",
        "inputs": int(stats.get("number_of_executed_units", 0)),
        "seconds": seconds,
        "edges": int(covered[-1][0]) if covered else 0,
        "features": int(covered[-1][1]) if covered else 0,
        "corpus": len(list(corpus.iterdir())),
        "peak_rss_mb": int(stats.get("peak_rss_mb", 0)),
        "crashes": new or int(done.returncode != 0),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz the C core")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=BUILD / "corpus-core")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the figures; else standard output")
    args = parser.parse_args()
    if args.keep:
        keep(args.corpus, KEPT)
        return 0
    result = run(build(), args.seconds, args.corpus)
    text = json.dumps(result)
    args.json.write_text(text + "\n") if args.json else print(text)
    return int(result["crashes"] > 0)


if __name__ == "__main__":
    sys.exit(main())
