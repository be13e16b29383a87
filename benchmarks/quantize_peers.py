"""How long tinyllm and llama.cpp take to quantize a file, and how large what they write is.

    python benchmarks/quantize_peers.py model-f16.gguf q4_0 q4_k_m

Both write the same types with the same number of threads, in alternating turns; printed are medians. Needs
llama-cpp-python (PYTHONPATH may say where its modules are). Imports tinyllm.quantization.mixes.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from kl_peers import quiet

import tinyllm
from tinyllm import backends
from tinyllm.quantization.mixes import MIXES, key_of


def theirs(model: str, out: Path, type: str, threads: int) -> None:
    import llama_cpp

    llama_cpp.llama_log_set(quiet(llama_cpp), None)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.allow_requantize = MIXES[type].file_type, threads, True
    if llama_cpp.llama_model_quantize(model.encode(), str(out).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp cannot make {type} of {model}")


def ours(model: str, out: Path, type: str, threads: int) -> None:
    tinyllm.quantize(model, out, type, threads=threads, allow_requantize=True)


def seconds(write: Callable[[str, Path, str, int], None], model: str, out: Path, type: str, n: int) -> float:
    start = time.perf_counter()
    write(model, out, type, n)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quantize_peers.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="FILE.gguf")
    parser.add_argument("types", nargs="+", type=key_of, metavar="TYPE", help="as tinyllm-quantize has them")
    parser.add_argument("-r", "--repetitions", type=int, default=3, metavar="N", help="turns of each (3)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="of both (the physical cores)")
    args = parser.parse_args(argv)
    threads = args.threads or backends.default_threads()
    print("| type | tinyllm, s | llama.cpp, s | llama.cpp / tinyllm | tinyllm, MB | llama.cpp, MB |")
    print("| --- |" + " ---: |" * 5)
    with TemporaryDirectory(dir=Path(args.model).resolve().parent) as folder:
        for type in args.types:
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(args.repetitions):
                for name, write in (("ours", ours), ("theirs", theirs)):
                    out = Path(folder) / f"{name}.gguf"
                    times[name].append(seconds(write, args.model, out, type, threads))
            us, them = (statistics.median(times[name]) for name in times)
            mb = [f"{(Path(folder) / f'{name}.gguf').stat().st_size / 1e6:.1f}" for name in times]
            print(f"| {type} | {us:.2f} | {them:.2f} | {them / us:.2f} | {mb[0]} | {mb[1]} |", flush=True)
    print(f"\n{threads} threads, medians of {args.repetitions} turns.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
