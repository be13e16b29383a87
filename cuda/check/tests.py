"""The GPU tests of the pytest suite (tests.json), and with `sanitizer` one small model of each type of
weights under compute-sanitizer (the same file)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from common import EMULATE, ROOT, SCRATCH, read, seconds_left, write

TOOLS = ("memcheck", "racecheck")


def run(*command: str | Path) -> tuple[int, str]:
    """A command's exit code and all it printed, which is shown too; code 124 where time is up."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds_left() - 3,
            check=False,
        )
    except subprocess.TimeoutExpired as cut:
        said = cut.stdout.decode(errors="replace") if isinstance(cut.stdout, bytes) else cut.stdout or ""
        return 124, said
    print(done.stdout[-6000:], flush=True)
    return done.returncode, done.stdout


def pytest() -> bool:
    """Runs `pytest -m gpu`."""
    missing = [name for name in ("pytest", "hypothesis", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        write("tests", {"status": f"not run: there is no {', '.join(missing)} (carry the wheels)"})
        return False
    report = SCRATCH / "tests.xml"
    options = ("-m", "gpu", "-q", "-p", "no:cacheprovider", "-W", "default", f"--junitxml={report}")
    code, _ = run(sys.executable, "-m", "pytest", *options, ROOT / "tests" / "test_gpu.py")
    if not report.exists():
        write("tests", {"status": "cut" if code == 124 else f"failed with {code}"})
        return False
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = [child for child in case if child.tag == "skipped"]
        counts["failed" if bad else "skipped" if skipped else "passed"] += 1
        failures += [f"{case.get('name')}: {(child.get('message') or '')[:400]}" for child in bad]
        failures += [f"{case.get('name')}: skipped: {child.get('message')}" for child in skipped]
    write("tests", {"status": "ok" if code == 0 else f"failed with {code}", **counts, "said": failures})
    return code == 0 and not counts["skipped"]


def report(sanitizer: dict[str, str]) -> None:
    write("tests", read("tests", {}) | {"sanitizer": sanitizer})


def sanitizer() -> bool:
    """A tiny model of each type under compute-sanitizer's tools. One that does not work is no failure."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or EMULATE:
        report({"status": "not run: " + ("emulated" if EMULATE else "no compute-sanitizer")})
        return True
    results, fine = {}, True
    for name in TOOLS:
        if seconds_left() < 10:
            results[name] = "no time"
            continue
        command = (tool, "--tool", name, "--error-exitcode", "9", sys.executable)
        code, said = run(*command, Path(__file__).with_name("models.py"), "tiny")
        works = not re.search(r"Device not supported|Failed to initialize", said)
        fine &= code in (0, 124) or not works
        errors = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", said)
        results[name] = "cut" if code == 124 else "; ".join(errors) if works else "does not work here"
        report({"status": "ok" if fine else "errors", **results})
    return fine


if __name__ == "__main__":
    os.environ["TINYLLM_DEBUG"] = "1"
    sys.exit(0 if (sanitizer() if sys.argv[1:] == ["sanitizer"] else pytest()) else 1)
