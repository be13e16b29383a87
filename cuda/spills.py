#!/usr/bin/env python3
"""Compiles the kernels with nvcc and fails where a hot one keeps variables in local memory: a spill, or an
array that is indexed by more than constants.

`spills.py`: sm_80; `spills.py 86 90a`: these architectures; `spills.py --all`: every one that tinyllm is
built for. Standard library only."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CUDA = Path(__file__).resolve().parent
ALL = ("80", "86", "89", "90a", "120")
COLD = ("pack_matrix", "unpack_rows", "embed")  # run once a matrix or a call


def resources(arch: str) -> dict[str, tuple[int, int]]:
    """Of every kernel: registers, bytes of local memory a thread."""
    flags = (CUDA / "nvcc_flags.txt").read_text().split()
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *flags, f"-arch=sm_{arch}", "-Xptxas", "-v", "-c", "-o", f"{folder}/out.o"]
        done = subprocess.run(
            [*command, CUDA / "backend_cuda.cu"], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"sm_{arch} does not compile:\n{done.stderr}")
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return {name: (int(registers), int(local)) for name, local, registers in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", nargs="*", default=["80"])
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    failed = False
    for arch in ALL if arguments.all else arguments.arch:
        kernels = resources(arch)
        if not kernels:
            sys.exit(f"sm_{arch}: nvcc named no kernel")
        for name, (registers, local) in kernels.items():
            bad = local > 0 and not any(cold in name for cold in COLD)
            failed |= bad
            print(
                f"sm_{arch} {name}: {registers} registers, {local} bytes of local memory{' - TOO MANY' * bad}"
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
