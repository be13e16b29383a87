"""Coverage-guided fuzzing of everything that reads a model's files, by atheris: a file works or is refused
with a tinyllm.Error, whatever is in it, and leaves nothing allocated. What loads must answer. Of some kinds
there are two targets: gguf changes a file's bytes, gguf-fields what its fields say (strategies.py). Prints
one JSON object with what it saw; ends with 1 where something crashes.

    python tests/long/fuzz_loaders.py [--seconds 60] [--target gguf] [--corpus DIRECTORY] [--json PATH]
    python tests/long/fuzz_loaders.py --keep            # writes tests/corpus anew from what was found

It needs `pip install atheris`. What crashes is kept in build/fuzz/crashes-TARGET as raw-HASH; put such a
file into tests/corpus/KIND, and the ordinary tests replay it. No file there may do harm in other packages
that read its kind (end the process, hang, take memory without end; errors that they raise are no harm): of
such a one keep a harmless sibling that comes as far in tinyllm, or lower a bound in a test of its own."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
BUILD = ROOT / "build" / "fuzz"
KEPT = ROOT / "tests" / "corpus"
NAMES = ("gguf", "gguf-fields", "safetensors", "directory", "directory-fields", "imatrix", "template")
MEMORY_MB = 2048
MAX_MB = 100  # for one input
MAX_SECONDS = 8  # of processor time for one input, with what counts its branches: a template may take 5
MOST_KEPT, MOST_BYTES = 60, 8192  # a target's files in tests/corpus, and their size


def fuzz(target: str, options: list[str]) -> None:
    """The process that fuzzes; atheris ends it."""
    import atheris

    folder = Path(tempfile.mkdtemp())
    with atheris.instrument_imports(include=["tinyllm", "jinja2"]):
        import helpers_hostile

        for name, _, raw in helpers_hostile.seeds():  # with which all is imported that is imported late
            helpers_hostile.try_out(name, raw, folder)
    import strategies
    from hypothesis import given, settings

    warnings.simplefilter("error")
    resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY_MB << 20,) * 2)
    kind, _, fields = target.partition("-")

    def one(data: bytes) -> None:
        start = time.process_time()
        try:
            with helpers_hostile.peak_below(MAX_MB):
                helpers_hostile.try_out(kind, data, folder)
            assert time.process_time() - start < MAX_SECONDS
        except BaseException:
            (BUILD / f"crashes-{target}" / f"raw-{hashlib.sha1(data).hexdigest()[:12]}").write_bytes(data)
            raise

    if fields:  # the fuzzer's bytes are the choices that a strategy makes
        files = {"gguf": strategies.gguf_files(), "directory": strategies.directories()}[kind]
        one = settings(database=None)(given(files)(one)).hypothesis.fuzz_one_input
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def run(target: str, seconds: int, corpus: Path) -> dict[str, Any]:
    import helpers_hostile

    crashes = BUILD / f"crashes-{target}"
    crashes.mkdir(parents=True, exist_ok=True)
    begin(corpus / target, KEPT / target)
    for name, seed, raw in helpers_hostile.seeds():
        if name == target:
            (corpus / target / seed).write_bytes(raw)
    if "-" in target:  # any bytes are choices, if there are enough of them
        for i in range(50):
            (corpus / target / f"random-{i}").write_bytes(random.Random(i).randbytes(400))
    before = set(crashes.iterdir())
    options = [f"-max_total_time={seconds}", "-max_len=8192", "-timeout=3600", "-report_slow_units=3600"]
    options += [f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={crashes}/", "-print_final_stats=1"]
    command = [sys.executable, __file__, "--child", target, *options, str(corpus / target)]
    log = BUILD / f"{target}.log"
    with log.open("wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT)
    text = log.read_text("utf-8", "replace")
    covered = re.findall(r"^#(\d+).* cov: (\d+) ft: (\d+)", text, re.MULTILINE) or [("0", "0", "0")]
    inputs = re.findall(r"stat::number_of_executed_units: (\d+)|Done (\d+) (?:runs )?in", text)
    new = len(set(crashes.iterdir()) - before)
    if new or done.returncode:
        sys.stderr.write(text[-3000:])
    return {
        "name": f"loaders: {target} (atheris)",
        "inputs": max([int(n) for pair in inputs for n in pair if n] or [int(covered[-1][0])]),
        "seconds": seconds,
        "edges": int(covered[-1][1]),
        "features": int(covered[-1][2]),
        "corpus": len(list((corpus / target).iterdir())),
        "crashes": new or int(done.returncode != 0),
    }


def begin(corpus: Path, kept: Path) -> None:
    """A corpus holds what was kept, so that what is kept of it next holds that, too."""
    corpus.mkdir(parents=True, exist_ok=True)
    if kept.is_dir():
        shutil.copytree(kept, corpus, dirs_exist_ok=True)


def keep(corpus: Path, to: Path) -> None:
    """Some files of a target's corpus for tests/corpus, evenly chosen by size. Each was kept by the fuzzer
    for something that no smaller one reached."""
    files = sorted(corpus.iterdir(), key=lambda path: (path.stat().st_size, path.name))
    files = [path for path in files if path.stat().st_size <= MOST_BYTES]
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for path in files[:: max(1, -(-len(files) // MOST_KEPT))]:
        shutil.copyfile(path, to / path.name[:12])


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz what reads a model's files")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", choices=NAMES, help="this one alone")
    parser.add_argument("--corpus", type=Path, default=BUILD / "corpus")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the figures; else standard output")
    args = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    targets = [args.target] if args.target else NAMES
    if args.keep:
        for target in targets:
            if "-" not in target:  # those choices mean other files with another version of Hypothesis
                keep(args.corpus / target, KEPT / target)
        return 0
    parts = [run(target, args.seconds, args.corpus) for target in targets]
    sums = {key: sum(part[key] for part in parts) for key in ("inputs", "seconds", "corpus", "crashes")}
    text = json.dumps({"name": "loaders (atheris)", **sums, "parts": parts})
    args.json.write_text(text + "\n") if args.json else print(text)
    return int(sums["crashes"] > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        fuzz(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
