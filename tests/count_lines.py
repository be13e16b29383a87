"""Counts lines of code, blank lines and comments left out, of the C core and of the rest of csrc/ and cuda/.

`python tests/count_lines.py` prints the table that the README shows; test_boundary.py holds the core to its
limit. Standard library only."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ("model.c", "cache.c", "threads.c", "cpu/backend.c", "kernels/matmul.inc", "kernels/attention.inc")
CORE_LIMIT = 500
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


def core_lines() -> dict[str, int]:
    """The core's files and their lines of code, in reading order."""
    return {f"csrc/{name}": count((ROOT / "csrc" / name).read_text(encoding="utf-8")) for name in CORE}


def other_lines() -> dict[str, int]:
    """The same of every other source file in csrc/ and cuda/."""
    core = core_lines()
    files = sorted(path for folder in ("csrc", "cuda") for path in (ROOT / folder).rglob("*"))
    names = {str(path.relative_to(ROOT)): path for path in files if path.suffix in SUFFIXES}
    return {n: count(path.read_text(encoding="utf-8")) for n, path in names.items() if n not in core}


def table() -> str:
    """Both in Markdown, side by side."""
    columns = []
    for name, lines in (("the core", core_lines()), ("the rest of csrc/ and cuda/", other_lines())):
        rows = [f"{file} | {n}" for file, n in lines.items()]
        columns.append([f"{name} | lines", "--- | ---:", *rows, f"**together** | **{sum(lines.values())}**"])
    return "\n".join(f"| {a} | {b} |" for a, b in zip_longest(*columns, fillvalue=" | "))


if __name__ == "__main__":
    print(table())
