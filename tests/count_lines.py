"""Counts lines of code, blank lines and comments left out, of the C core and of the rest of csrc/ and cuda/.

`python tests/count_lines.py` prints what docs/size.md shows, a table and the sentence that is the README's,
too; test_boundary.py holds the core to its limit. Standard library only."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ("model.c", "cache.c", "threads.c", "cpu/backend.c", "kernels/matmul.inc", "kernels/attention.inc")
CORE_LIMIT = 500
# What else a token passes on the CPU between tl_forward and its logits, from the ground up (FLOORS in
# test_boundary.py). Every file counts whole.
BESIDE = (
    *("tinyllm.h", "check.c", "memory.c", "numeric.h", "numeric.c"),
    *("formats/formats.h", "formats/formats.inc", "formats/formats_small.inc", "formats/panel.h"),
    *("formats/pack.c", "formats/pack_small.c", "kernels/rows.inc", "kernels/kv.inc", "kernels/sums.inc"),
    *("formats/formats_schemes.inc", "formats/pack_schemes.c"),
    *("isa/isa.h", "isa/select.c", "isa/target.inc", "isa/avx512.h", "isa/avx512vnni.c", "isa/cpuid.h"),
    *("cpu/cpu.h", "cpu/run.c", "cpu/load.c", "cpu/products.c", "cpu/rows.c", "cpu/attend.c"),
    *("cpu/experts.c", "cpu/delta.c", "kernels/delta.inc", "states.c"),
)
SUFFIXES = (".c", ".cpp", ".h", ".inc", ".cu", ".cuh")

# Literals come before comments, so that a "//" in a string is none.
_TOKEN = re.compile(
    r"""(?P<literal>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|//(?:\\\n|[^\n])*|/\*.*?\*/""", re.DOTALL
)


def count(text: str) -> int:
    """Lines of C, C++ or CUDA source that hold more than blanks and comments."""

    def without_comment(match: re.Match[str]) -> str:
        return match["literal"] or "\n" * match[0].count("\n") or " "

    return sum(bool(line.strip()) for line in _TOKEN.sub(without_comment, text).splitlines())


def _lines(names: tuple[str, ...]) -> dict[str, int]:
    return {f"csrc/{name}": count((ROOT / "csrc" / name).read_text(encoding="utf-8")) for name in names}


def core_lines() -> dict[str, int]:
    """The core's files and their lines of code, in reading order."""
    return _lines(CORE)


def path_lines() -> dict[str, int]:
    """The same of all files that a token passes on the CPU, with one instruction set: the core's first."""
    return _lines(CORE + BESIDE)


def other_lines() -> dict[str, int]:
    """The same of every source file in csrc/ and cuda/ that is not the core's."""
    core = core_lines()
    files = sorted(path for folder in ("csrc", "cuda") for path in (ROOT / folder).rglob("*"))
    names = {str(path.relative_to(ROOT)): path for path in files if path.suffix in SUFFIXES}
    return {n: count(path.read_text(encoding="utf-8")) for n, path in names.items() if n not in core}


def table() -> str:
    """All of them in Markdown, side by side: the core, what a token passes beside it, the rest."""
    path, other = path_lines(), other_lines()
    parts = {
        "the core": core_lines(),
        "a token's path beside the core": {n: path[n] for n in path if n in other},
        "the rest of csrc/ and cuda/": {n: other[n] for n in other if n not in path},
    }
    columns = []
    for name, lines in parts.items():
        rows = [f"{file} | {n}" for file, n in lines.items()]
        columns.append([f"{name} | lines", "--- | ---:", *rows, f"**together** | **{sum(lines.values())}**"])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip_longest(*columns, fillvalue=" | "))


def sentence() -> str:
    """The README's."""
    core, path = core_lines(), path_lines()
    return (
        f"The core is {sum(core.values())} lines of code in {len(core)} files, and a token's whole path on "
        f"the CPU, from its id to its logits with one instruction set, is {sum(path.values())} lines in "
        f"{len(path)} files, the core's among them"
    )


if __name__ == "__main__":
    print(f"{table()}\n\n{sentence()}.")
