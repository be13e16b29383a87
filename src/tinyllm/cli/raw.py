"""What any file of tensors says, as lines or JSON: for tinyllm-inspect --raw, and of models that are not run.

Imports common.py, what inspect.py lays out its lines with, and files/raw.py, which reads.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from tinyllm.cli.common import BOLD, DIM, EXIT_OK, counted, json_text, put, size, styled, table
from tinyllm.cli.inspect import shape_text, wrapped

MOST_CHARACTERS, MOST_ELEMENTS = 200, 8  # of a value, in text; JSON has all of it


def is_readable(model: str) -> bool:
    """Whether `print_raw` can list it."""
    from tinyllm.errors import Error
    from tinyllm.files.raw import read_raw
    from tinyllm.modelfiles import model_path

    try:
        read_raw(model_path(model))
    except Error:
        return False
    return True


def print_raw(model: str, output: str, why: str = "") -> int:
    """output: text or json. why: tinyllm does not run it; "" where that is not known."""
    from tinyllm.files.raw import read_raw
    from tinyllm.modelfiles import model_path

    found = read_raw(model_path(model))
    if output == "json":
        keys = {key: _plain(value) for key, value in found.keys.items()}
        tensors = [asdict(tensor) for tensor in found.tensors]
        record = {**asdict(found), "path": str(found.path), "keys": keys, "tensors": tensors}
        put(json_text(record | {"unsupported": why or None}, indent=1))
        return EXIT_OK
    put(styled(str(found.path), BOLD, sys.stdout))
    files = "1 file" if found.n_files == 1 else f"{found.n_files} files"
    put(f"{found.kind}, {files}, {size(found.file_bytes)}, {counted(len(found.tensors), 'tensor')}\n")
    width = min(44, max(map(len, found.keys), default=0)) + 2
    for key, value in found.keys.items():
        for line in wrapped(styled(f"{key:<{width}}", DIM, sys.stdout), width, _brief(value)):
            put(line)
    rows = [
        (t.name, shape_text(t.shape), t.type, "?" if t.n_bytes is None else size(t.n_bytes), str(t.offset))
        for t in found.tensors
    ]
    if rows:
        put()
        put(table(("tensor", "shape", "type", "size", "offset"), rows, left=("tensor", "shape", "type")))
    if why:
        put()
        for line in wrapped(styled("warning: ", BOLD, sys.stdout), 9, f"tinyllm does not run this: {why}"):
            put(line)
    return EXIT_OK


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _brief(value: Any) -> str:
    value = _plain(value)
    if isinstance(value, list) and len(value) > MOST_ELEMENTS:
        first = ", ".join(_brief(each) for each in value[:MOST_ELEMENTS])
        return f"[{first}, ...] ({len(value)} of them)"
    text = json_text(value)
    if len(text) > MOST_CHARACTERS:
        return f"{text[:MOST_CHARACTERS]}... ({len(text)} characters)"
    return text
