"""Importance matrices: how much each input of each matrix matters, seen on a text, and the file for it.

A weight's rounding error reaches the output times its input, so a quantizer that knows the mean square of
every input puts the error where it does least. The file is llama.cpp's (a GGUF with, for each matrix, the
sums `NAME.in_sum2` [k] and how many rows they are of, `NAME.counts`), so that its tools read it too. Imports
errors, families, imatrix, llm and loaders.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .errors import UnsupportedError
from .families import FAMILIES
from .imatrix import Imatrix, write_imatrix
from .llm import LLM
from .loaders.names import TABLE

F64 = npt.NDArray[np.float64]


def observe(llm: LLM) -> dict[str, F64]:
    """Starts watching the inputs of all matrices: float64 [k + 1] by the name of the tensor in a GGUF.

    Every later call of the model adds to them (`Model.observe`): sums of squares by column, then the number
    of rows. A tied output matrix counts for the embedding's tensor. Raises UnsupportedError on a device other
    than the CPU, and for a mixture of experts.
    """
    config = llm.config
    if config.n_experts:
        raise UnsupportedError(
            f"{llm.name} is a mixture of experts, whose matrices' inputs are not observed; use llama.cpp's "
            "llama-imatrix"
        )
    seen: dict[str, F64] = {}
    for row in TABLE:
        if row.canonical == "output":
            seen["token_embd.weight" if config.tied else row.gguf] = llm.model.observe("output")
        elif row.canonical.startswith("w") and row.present(config):
            for layer in range(config.n_layers):
                seen[row.gguf.format(layer)] = llm.model.observe(row.canonical, layer)
    if (
        config.architecture in FAMILIES and FAMILIES[config.architecture].fused
    ):  # q, k and v in one tensor, which all meet the same
        for layer in range(config.n_layers):
            seen[f"blk.{layer}.attn_qkv.weight"] = seen[f"blk.{layer}.attn_q.weight"]
    return seen


def write(
    path: str | os.PathLike[str],
    seen: Mapping[str, F64],
    *,
    texts: Sequence[str] = (),
    n_windows: int = 0,
    n_ctx: int = 0,
) -> None:
    """Writes what `observe` gathered as llama.cpp's importance matrix.

    texts: names of what was read. n_windows, n_ctx: how it was cut. The file appears under its name once it
    is complete; matrices that met no row are left out. Raises WriteError.
    """
    known = {name: sums for name, sums in sorted(seen.items()) if sums[-1] > 0}
    sums = {name: values[None, :-1].astype(np.float32) for name, values in known.items()}
    counts = {name: values[-1:].astype(np.float32) for name, values in known.items()}
    write_imatrix(path, Imatrix(sums, counts, tuple(texts), n_windows, n_ctx))
