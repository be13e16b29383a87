"""Makes a tinyllm that imports: from a carried wheel, or built here for the card present. Writes build.json.

The later stages' environment gets the CUDA library's name, where that is not the one in the package (env.json
in the scratch folder).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import EMULATE, OUT, ROOT, SCRATCH, write

SITE = SCRATCH / "site"
CSRC = ROOT / "csrc"
LOADER = "import json, tinyllm; print(json.dumps(tinyllm.info()))"


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Its stdout; ends the stage, with all it said, where it fails."""
    print("$", shlex.join(map(str, command)), flush=True)
    done = subprocess.run(
        command, env=os.environ | (env or {}), capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nbuild: the command above failed with {done.returncode}")
    return done.stdout


def first_line(*command: str) -> str:
    """Of what it prints; "" where it is not there."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return (done.stdout.strip().splitlines() or [""])[0] if done.returncode == 0 else ""


def install_wheels(folder: Path) -> list[str]:
    """Those there are, into SITE, without looking for others."""
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if wheels:
        options = ("-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", SITE)
        run(sys.executable, "-m", "pip", "install", *options, *wheels)
    return [wheel.name for wheel in wheels]


def build_core() -> None:
    """The package from this checkout, with CMake and nvcc, into SITE."""
    pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    build = SCRATCH / "cmake"
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    options += ["-DSKBUILD_PROJECT_VERSION=check", f"-DTINYLLM_CUDA={'OFF' if EMULATE else 'ON'}"]
    options += ["-DTINYLLM_SCALAR_ONLY=ON"] if EMULATE else []
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    print(run("cmake", "-S", ROOT, "-B", build, *ninja, *options))
    run("cmake", "--build", build, "--parallel", str(len(os.sched_getaffinity(0))))
    shutil.copytree(ROOT / "src" / "tinyllm", SITE / "tinyllm", ignore=shutil.ignore_patterns("*.so"))
    for library in [*build.glob("_core*.so"), *build.glob("cuda/libtinyllm_cuda.so")]:
        shutil.copy(library, SITE / "tinyllm")


def build_emulated() -> Path:
    """The kernels as C++ for the CPU (docs/cuda.md)."""
    flags = ("-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-pthread")
    objects = [SCRATCH / f"{name}.o" for name in ("memory", "source")]
    for path in objects:
        run("cc", "-std=c11", *flags, "-c", CSRC / f"{path.stem}.c", "-o", path)
    library = SCRATCH / "libtinyllm_cuda_host.so"
    source = ("-x", "c++", ROOT / "cuda" / "backend_cuda.cu", "-x", "none")
    run("c++", "-std=c++17", *flags, "-shared", "-o", library, *source, *objects)
    return library


def main() -> None:
    start = time.monotonic()
    result: dict[str, Any] = {
        "emulated": EMULATE,
        "commit": first_line("git", "rev-parse", "HEAD"),
        "changed": bool(first_line("git", "status", "--porcelain")),
        "python": sys.version.split()[0],
        "gpu": first_line(
            "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
        ),
        "nvcc": next((s for s in run_or_nothing("nvcc", "--version") if "release" in s), ""),
        "wheels": install_wheels(Path(os.environ["CHECK_WHEELS"])),
    }
    carried = any(name.startswith("tinyllm") for name in result["wheels"])
    builds = not carried and not os.environ["CHECK_INSTALLED"]
    importlib.invalidate_caches()
    missing = [
        name
        for name in ("numpy", "cffi", "jinja2", *(("pybind11",) if builds else ()))
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        folder = os.environ["CHECK_WHEELS"]
        sys.exit(f"build: {sys.executable} lacks {', '.join(missing)}: put their wheels into {folder}")
    if builds:
        build_core()
    env = {}
    if os.environ["CHECK_LIBRARY"]:
        env["TINYLLM_CUDA_LIBRARY"] = os.environ["CHECK_LIBRARY"]
    elif EMULATE:
        env["TINYLLM_CUDA_LIBRARY"] = str(build_emulated())
    info = json.loads(run(sys.executable, "-c", LOADER, env=env))
    result |= {"seconds": round(time.monotonic() - start, 1), "info": info}
    (SCRATCH / "env.json").write_text(json.dumps(env))
    write("build", result)
    print(f"built in {result['seconds']} s: {', '.join(info['cuda_devices']) or info['cuda_reason']}; {OUT}")
    if not info["cuda"]:
        sys.exit(f"build: no GPU can be used: {info['cuda_reason']}")


def run_or_nothing(*command: str) -> list[str]:
    """The lines that a command prints, none where it is not there."""
    return run(*command).splitlines() if shutil.which(command[0]) else []


if __name__ == "__main__":
    main()
