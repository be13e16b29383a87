"""Runs the checks that take minutes to hours, and writes docs/reliability.md from what they saw.

    python tests/long/run.py [--minutes 60] [--only NAME ...] [--list] [--report]

Each script beside this one, and each sanitizer, is a stage. The minutes are shared out among the stages that
run; building and what has a fixed size (a sweep, 10 000 requests) take what they take. Results are kept in
results.json, those of earlier runs with their own dates; found.json lists what the checks found. Needs what
the tests need, cmake, ninja, GCC, and clang for fuzz_core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "long"
RESULTS, FOUND, PAGE = HERE / "results.json", HERE / "found.json", ROOT / "docs" / "reliability.md"
REPORTS = re.compile(r"ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|runtime error:")
# Of the Python tests those that reach the core, the nearest first.
PYTHON_TESTS = (
    *(
        "misuse",
        "threads_python",
        "pressure",
        "llm",
        "kvcache",
        "interrupts",
        "numbers",
        "formats",
        "experts",
    ),
    *("families", "windows", "golden", "sampling", "quantize", "safetensors", "gguf", "stories"),
    *("hostile", "engine", "calibration", "quality", "quantize_files", "embed"),
)
THREADED_TESTS = ("threads_python", "llm", "kvcache", "misuse")
# A sanitizer's own memory leaves no room under RLIMIT_AS and grows by what is freed; its shutdown is
# another one.
NOT_UNDER_ASAN = "not address_space and not interpreter_ends and not leave_nothing"
NOT_UNDER_TSAN = f"{NOT_UNDER_ASAN} and not fork and not may_encode"  # no new threads after fork()


@dataclass(frozen=True)
class Stage:
    """share: of the minutes; 0: its size is fixed. run: takes its seconds, returns what it saw."""

    kind: str
    share: float
    run: Callable[[float], dict[str, Any]]


def script(name: str, parts: int = 1) -> Callable[[float], dict[str, Any]]:
    """parts: how often the script takes its --seconds; 0: it has a size and no time."""

    def run(seconds: float) -> dict[str, Any]:
        time_options = ["--seconds", str(max(1, round(seconds / parts)))] if parts else []
        command = [sys.executable, HERE / f"{name}.py", *time_options]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds * 3 + 3600
        )
        try:
            result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):  # it ended before it could say
            result = {"name": name, "crashes": 1}
        if done.returncode:
            result["failed"] = f"{done.returncode}: {done.stderr.strip()[-2000:]}"
        return result

    return run


def built(kind: str, sanitizers: str) -> Path:
    folder = BUILD / kind
    if "--built" in sys.argv:
        return folder
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    options = ["-DTINYLLM_C_TESTS=ON", "-DTINYLLM_MODULE=ON", "-DTINYLLM_CUDA=OFF"]
    options += [f"-DTINYLLM_SANITIZERS={sanitizers}", f"-Dpybind11_DIR={pybind11}"]
    options += [f"-DPython_EXECUTABLE={sys.executable}", "-DSKBUILD_PROJECT_VERSION=0.1.0"]
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options], check=True, capture_output=True
    )
    subprocess.run(["nice", "-n", "19", "ninja", "-C", folder, "-j1"], check=True, capture_output=True)
    return folder


def c_tests(kind: str, sanitizers: str, name: str) -> Callable[[float], dict[str, Any]]:
    def run(_: float) -> dict[str, Any]:
        folder, faults, output, failed = built(kind, sanitizers), 0, "", []
        programs = sorted(
            path for path in folder.glob("test_*") if os.access(path, os.X_OK) and path.is_file()
        )
        runs = [[str(program)] for program in programs]
        if kind == "thread":  # it knows no new threads after fork()
            runs = [[program, *(["without-fork"] if program.endswith("pool") else [])] for (program,) in runs]
        for command in runs:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
            output += done.stdout + done.stderr
            if done.returncode:
                failed.append(f"{Path(command[0]).name}: {(done.stdout + done.stderr)[-1500:]}")
            faults += sum(map(int, re.findall(r"(\d+) faults injected", done.stdout)))
        leaks = len(re.findall("ERROR: LeakSanitizer", output))
        result = {"name": name, "inputs": len(runs), "faults": faults, "leaks": leaks, "unit": "programs"}
        result["crashes"] = len(REPORTS.findall(output)) - leaks
        return result | ({"failed": "\n".join(failed)} if failed else {})

    return run


def library(name: str) -> str:
    return subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()


def python_tests(
    kind: str, sanitizers: str, tests: Sequence[str], but: str, options: Mapping[str, str], name: str
) -> Callable[[float], dict[str, Any]]:
    """Files of Python tests over a module under sanitizers, one after another until the time is over."""

    def run(seconds: float) -> dict[str, Any]:
        folder, package = built(kind, sanitizers), BUILD / f"package-{kind}"
        shutil.rmtree(package, ignore_errors=True)
        kept = shutil.ignore_patterns("_core*.so", "libtinyllm_cuda.so", "__pycache__")
        shutil.copytree(ROOT / "src" / "tinyllm", package / "tinyllm", ignore=kept)
        for module in folder.glob("_core*.so"):
            shutil.copy(module, package / "tinyllm")
        libraries = ["libasan.so", "libubsan.so"] if kind == "address" else ["libtsan.so"]
        env = os.environ | options
        env |= {"PYTHONPATH": str(package), "LD_PRELOAD": ":".join(map(library, libraries))}
        end, passed, files, failed, output = time.monotonic() + seconds, 0, 0, [], ""
        for test in tests:
            if time.monotonic() > end:
                break
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", but]
            command += ["-m", "not slow and not gpu", ROOT / "tests" / f"test_{test}.py"]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                env=env,
                cwd=ROOT,
                timeout=seconds + 3600,
            )
            output += done.stdout + done.stderr
            passed += sum(map(int, re.findall(r"(\d+) passed", done.stdout)))
            files += 1
            if done.returncode:
                failed.append(f"test_{test}.py: {(done.stdout + done.stderr)[-1500:]}")
        result: dict[str, Any] = {"name": name, "inputs": passed, "unit": f"tests of {files} files"}
        result["crashes"] = len(REPORTS.findall(output))
        return result | ({"failed": "\n".join(failed)} if failed else {})

    return run


STAGES: dict[str, Stage] = {
    "interrupts": Stage("misuse", 2, script("interrupts")),
    "anywhere": Stage("misuse", 2, script("anywhere")),
    "signals": Stage("pressure", 2, script("signals")),
    "threads": Stage("pressure", 1, script("threads")),
    "requests": Stage("pressure", 0, script("requests", parts=0)),
    "memory": Stage("pressure", 0, script("memory", parts=0)),
    "serve_faults": Stage("pressure", 0, script("serve_faults", parts=0)),
    "c-address": Stage(
        "sanitizers",
        0,
        c_tests(
            "address",
            "address,undefined",
            "C tests under AddressSanitizer, UBSan and LeakSanitizer",
        ),
    ),
    "c-thread": Stage("sanitizers", 0, c_tests("thread", "thread", "C tests under ThreadSanitizer")),
    "python-address": Stage(
        "sanitizers",
        2,
        python_tests(
            "address",
            "address,undefined",
            PYTHON_TESTS,
            NOT_UNDER_ASAN,
            # Leaks: the interpreter's own would drown ours; these tests count the core's blocks instead.
            {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_segv=0"},
            "Python tests under AddressSanitizer and UBSan",
        ),
    ),
    "python-thread": Stage(
        "sanitizers",
        1,
        python_tests(
            "thread",
            "thread",
            THREADED_TESTS,
            NOT_UNDER_TSAN,
            {"TSAN_OPTIONS": f"report_signal_unsafe=0:suppressions={HERE / 'tsan.supp'}"},
            "Python tests with threads under ThreadSanitizer",
        ),
    ),
    "fuzz_core": Stage("files", 2, script("fuzz_core")),
    "fuzz_loaders": Stage("files", 4, script("fuzz_loaders", parts=7)),
}
ABOUT = """\
What was done to tinyllm to make it crash, hang, leak or answer wrongly, and what came of it. Made by
`python tests/long/run.py`; the figures are those of its last runs. A leak is a page of the cache, a block of
the core's memory or an open file that is left when all that used it is closed. LeakSanitizer looks for them
in the C tests alone, as Python keeps much until its end; under Python the core counts its own blocks
(`backends.live_allocations`), which must be none after each load, refusal and close. Crashes are ends of the
process, hangs, reports of sanitizers and whatever else a check did not expect: it ends there.""".splitlines()
KINDS = {
    "misuse": "Wrong use and interrupts",
    "pressure": "Pressure",
    "files": "Hostile files",
    "sanitizers": "Sanitizers",
}


def kept_results() -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results


def added(earlier: Mapping[str, float], result: Mapping[str, Any]) -> dict[str, float]:
    """Inputs and seconds of all runs of a stage."""
    now = {"inputs": result.get("inputs", 0), "seconds": result["took_s"]}
    return {key: round(earlier.get(key, 0) + value, 1) for key, value in now.items()}


def machine() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    models = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{models[0] if models else os.uname().machine}, {os.cpu_count()} cores"


def number(value: Any) -> str:
    return "" if value is None else f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def page(results: dict[str, dict[str, Any]], found: list[dict[str, str]]) -> str:
    """docs/reliability.md. Its figures come from the runs alone."""
    lines = ["# Reliability", "", *ABOUT]
    for kind, title in KINDS.items():
        rows = {name: r for name, r in results.items() if r["kind"] == kind}
        faults_found = [entry for entry in found if entry["kind"] == kind]
        if not rows and not faults_found:
            continue
        lines += ["", f"## {title}", ""]
        if rows:
            lines += ["| check | tried | faults injected | crashes | leaks | seconds | date |"]
            lines += ["| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
        for name, r in rows.items():
            tried = number(r.get("inputs")) + (f" {r['unit']}" if r.get("unit") else "")
            cells = [
                f"{r['name']} (`{name}`)",
                tried,
                *(number(r.get(key)) for key in ("faults", "crashes", "leaks")),
            ]
            lines += [f"| {' | '.join([*cells, number(round(r['took_s'])), r['date']])} |"]
        bad = {
            name: r["failed"].strip().splitlines()[-1][:150] for name, r in rows.items() if r.get("failed")
        }
        failures = [f"`{name}` **failed**: {what}" for name, what in bad.items()]
        lines += ["", *failures] if failures else []
        totals = [
            f"`{name}` {number(round(r['in_all']['inputs']))} inputs in {r['in_all']['seconds'] / 3600:.1f} h"
            for name, r in rows.items()
            if "in_all" in r
        ]
        lines += ["", f"In all runs together: {', '.join(totals)}."] if totals else []
        lines += [""] if rows else []
        if faults_found:
            lines += ["Found and mended, each with a test:", ""]
            lines += [f"- {entry['fault']} ({entry['test']})" for entry in faults_found]
        else:
            lines += ["These checks found no fault."]
        clean = sorted(name for name in rows if name not in {entry.get("by") for entry in found})
        if faults_found and clean:
            lines += ["", f"No fault was found by: {', '.join(f'`{name}`' for name in clean)}."]
    machines = sorted({r["machine"] for r in results.values()})
    lines += ["", f"Machine: {'; '.join(machines)}." if machines else "Nothing has been run yet."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="for all stages together (60)")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=STAGES, help="these stages alone")
    parser.add_argument("--built", action="store_true", help="take the sanitizers' builds as they are")
    parser.add_argument("--list", action="store_true", help="the stages, and no more")
    parser.add_argument(
        "--report", action="store_true", help="write docs/reliability.md from the results there are"
    )
    given = parser.parse_args()
    if given.list:
        print("\n".join(STAGES))
        return 0
    names = [] if given.report else given.only or list(STAGES)
    shares = sum(STAGES[name].share for name in names) or 1
    failed = False
    for name in names:
        stage, start = STAGES[name], time.monotonic()
        print(f"{name}: ", end="", flush=True)
        try:
            result = stage.run(given.minutes * 60 * stage.share / shares)
        except subprocess.TimeoutExpired as error:
            result = {"name": name, "crashes": 1, "failed": f"it hung for {error.timeout:.0f} s"}
        took_s = round(time.monotonic() - start, 1)
        date = datetime.date.today().isoformat()
        results = kept_results()  # afresh: another run may have added to it
        result |= {"took_s": took_s, "date": date, "machine": machine()}
        if stage.kind == "files":  # a fuzzer goes on from where the last one ended
            result["in_all"] = added(results.get(name, {}).get("in_all", {}), result)
        results[name] = {"kind": stage.kind, **result}
        failed |= bool(result.get("failed") or result.get("crashes") or result.get("leaks"))
        print(json.dumps(results[name]), flush=True)
        ordered = {key: results[key] for key in STAGES if key in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    PAGE.write_text(page(kept_results(), found), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
