"""The tables of docs/files.md about quantized safetensors. `python tests/schemes_table.py` prints them;
test_schemes.py compares, and holds each row to what its file stands for."""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path

from helpers_schemes import CASES, MODULE, WEIGHTS, tensors_of, write_case

from tinyllm.files import FORMATS, MEET_FLOATS, TensorInfo, read_json
from tinyllm.files.safetensors import read_safetensors
from tinyllm.files.schemes import find_scheme, join


def tensors_in(folder: Path) -> dict[str, TensorInfo]:
    """A directory's tensors, quantized weights joined."""
    scheme = find_scheme(read_json(folder / "config.json"), folder)
    assert scheme is not None
    return read_safetensors(folder, partial(join, scheme=scheme)).tensors


def weight_of(folder: Path) -> TensorInfo:
    """The one weight of a case's directory."""
    return tensors_in(folder)[f"{MODULE}.weight"]


def row(name: str) -> str:
    """What opens, who wrote it, what it is kept as, bits a weight here and in the file, what it meets."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        info = weight_of(write_case(Path(folder) / name, name))
    form, n = FORMATS[info.format], math.prod(info.shape)
    in_file = sum(len(data) for part, (_, _, data) in tensors_of(name).items() if not part.endswith("g_idx"))
    meets = "float32" if info.format in MEET_FLOATS else "int8"
    method = case["config"]["quant_method"]
    return (
        f"| {method} | `{name}` | {case['writer']} | {form.name} | {8 * info.n_bytes / n:.2f} "
        f"({8 * in_file / n:.2f}) | {meets} |"
    )


def table() -> str:
    head = "| quant_method | case | writer | kept as | bits a weight (in the file) | meets activations in |"
    return "\n".join([head, "|---|---|---|---|---|---|", *(row(name) for name in WEIGHTS)])


if __name__ == "__main__":
    print(table())
