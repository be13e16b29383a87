"""The stages of cuda/check.sh, each in a process of its own with its share of the time, each writing its JSON
as it goes, so that a run that is cut keeps what it has.

    bash cuda/check.sh                      everything, on this machine's GPU
    bash cuda/check.sh --emulate            the same stages on the CPU, with tiny shapes: do the scripts work?
    bash cuda/check.sh --only build,models  some of it

Standard library only. The stages need numpy, cffi and pytest, and nvcc, cmake and pybind11 to build; wheels
of what is missing can lie in --wheels.
Exit codes: 0 all stages ended well, 1 one did not, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CHECK = Path(__file__).resolve().parent
ROOT = CHECK.parents[1]
TOTAL_S = 570.0
# (name, most seconds it may take, what it runs). What matters most comes first; what a stage leaves is the
# next one's.
STAGES: list[tuple[str, float, list[str]]] = [
    ("build", 150, ["build.py"]),
    ("bandwidth", 30, ["models.py", "bandwidth"]),
    ("tests", 100, ["tests.py"]),
    ("models", 150, ["models.py", "first"]),
    ("peer", 120, ["peer.py"]),
    ("sanitizer", 60, ["tests.py", "sanitizer"]),
    ("more", 250, ["models.py", "more"]),
]


def main() -> int:
    args = parse()
    start = time.monotonic()
    if not args.emulate and not args.library and (reason := no_gpu()):
        print(f"check.sh: no GPU: {reason}. --emulate runs the same stages on the CPU.", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").write_text("")
    with tempfile.TemporaryDirectory(prefix="tinyllm-check-") as scratch:
        env = os.environ | {
            "CHECK_OUT": str(args.out),
            "CHECK_SCRATCH": scratch,
            "CHECK_EMULATE": "1" if args.emulate else "",
            "CHECK_WHEELS": str(args.wheels),
            "CHECK_LIBRARY": str(args.library or ""),
            "CHECK_INSTALLED": "1" if args.installed else "",
            "PYTHONPATH": os.pathsep.join([f"{scratch}/site", str(ROOT / "benchmarks"), *python_path()]),
            "PYTHONUNBUFFERED": "1",
            "TINYLLM_TEST_DATA": str(args.data),
        }
        ended: list[dict[str, Any]] = []

        def wrap_up() -> bool:
            """What there is so far, in files that outlive a cut; few of them."""
            for part in args.out.glob("*.part"):  # of a stage that was killed while it wrote
                part.unlink()
            (args.out / "stages.json").write_text(json.dumps(ended, indent=1))
            summary = subprocess.run(
                [sys.executable, CHECK / "summary.py", args.out], capture_output=True, text=True, check=False
            )
            (args.out / "summary.md").write_text(summary.stdout + summary.stderr)
            return summary.returncode == 0

        for name, most, command in STAGES:
            if args.only and name not in args.only:
                continue
            left = args.seconds - (time.monotonic() - start)
            most *= max(1, args.seconds / TOTAL_S)
            ended.append(run_stage(name, command, min(most, left), env, args.out))
            fine = wrap_up()
            if name == "build" and ended[-1]["status"] != "ok":
                break
            if name == "build":
                env |= json.loads(Path(scratch, "env.json").read_text())
    print((args.out / "summary.md").read_text())
    return 0 if fine and all(stage["status"] == "ok" for stage in ended) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name, *_ in STAGES]
    out = os.environ.get("OUT") or ROOT / "build" / "check"
    parser.add_argument(
        "--out", type=Path, default=Path(out), metavar="DIR", help=f"for the results ($OUT, else {out})"
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=CHECK / "wheels",
        metavar="DIR",
        help="wheels to install first: a tinyllm built elsewhere, or packages that are missing here",
    )
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", metavar="DIR", help="the tests' models"
    )
    parser.add_argument("--emulate", action="store_true", help="tiny shapes, the kernels on the CPU")
    parser.add_argument(
        "--library", type=Path, metavar="FILE", help="this library in place of the one built here"
    )
    parser.add_argument(
        "--only", type=lambda text: text.split(","), metavar="STAGE,...", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--seconds", type=float, default=TOTAL_S, metavar="S", help=f"for everything ({TOTAL_S:.0f})"
    )
    parser.add_argument(
        "--installed", action="store_true", help="build nothing: test the tinyllm that is there"
    )
    args = parser.parse_args()
    if unknown := set(args.only or []) - set(names):
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if args.only and "build" not in args.only:
        args.only.insert(0, "build")
    for name in ("out", "wheels", "data", "library"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    return args


def python_path() -> list[str]:
    """What the caller's has."""
    return [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []


def no_gpu() -> str:
    """Why there is none, or ""."""
    if Path("/dev/nvidia0").exists():
        return ""
    if not shutil.which("nvidia-smi"):
        return "there is no nvidia-smi, so no driver"
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 and "GPU 0" in done.stdout else "nvidia-smi lists none"


def run_stage(name: str, command: list[str], most: float, env: dict[str, str], out: Path) -> dict[str, Any]:
    """Runs a stage and says how it ended. Its output goes to this process's, and to log.txt."""
    start = time.monotonic()
    if most < 5:
        print(f"== {name}: left out, no time", flush=True)
        return {"stage": name, "status": "no time", "seconds": 0}
    print(f"== {name}: at most {most:.0f} s", flush=True)
    script, *rest = command
    process = subprocess.Popen(
        [sys.executable, CHECK / script, *rest],
        env=env | {"CHECK_SECONDS": str(most)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    status = "ok"
    timer = threading.Timer(most, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    with (out / "log.txt").open("ab") as log:
        log.write(f"== {name}\n".encode())
        for line in process.stdout:
            log.write(line)
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
    code = process.wait()
    timer.cancel()
    if code:
        status = "cut at its time limit" if code == -signal.SIGKILL else f"failed with {code}"
    seconds = time.monotonic() - start
    print(f"== {name}: {status}, {seconds:.0f} s\n", flush=True)
    return {"stage": name, "status": status, "seconds": round(seconds, 1)}


if __name__ == "__main__":
    sys.exit(main())
