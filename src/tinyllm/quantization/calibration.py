"""Importance matrices: how much each input of each matrix matters, seen on a text, and the file for it.

A weight's rounding error reaches the output times its input, so a quantizer that knows the mean square of
every input puts the error where it does least. The file is llama.cpp's (a GGUF with, for each matrix, the
sums `NAME.in_sum2` [k] and how many rows they are of, `NAME.counts`; for a stack of experts [experts, k] and
[experts]), so that its tools read it too. Imports engine, imatrix, llm and files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tinyllm.engine.choosing import require_finite
from tinyllm.files.names import TABLE, fused_in_gguf
from tinyllm.llm import LLM
from tinyllm.quantization.imatrix import Imatrix, write_imatrix

F64 = npt.NDArray[np.float64]


def observe(llm: LLM) -> dict[str, list[F64]]:
    """Starts watching the inputs of all matrices, by the name of their tensor in a GGUF: of each matrix in it
    (one, or one an expert) float64 [k + 1].

    Every later call of the model adds to them (`Model.observe`): sums of squares by column, then the number
    of rows. A tied output matrix counts for the embedding's tensor. Raises UnsupportedError on a device other
    than the CPU.
    """
    config = llm.config
    seen: dict[str, list[F64]] = {}
    for row in TABLE:
        if row.canonical == "output":
            seen["token_embd.weight" if config.tied else row.gguf] = [llm.model.observe("output")]
        elif row.canonical.startswith("w") and row.present(config):
            for name, keys in row.tensors(config, "gguf"):
                seen[name] = [llm.model.observe(*key) for key in keys]
    for name, parts in fused_in_gguf(config):  # which all meet the same
        seen[name], *_ = [seen.pop(part) for part in parts]
    return seen


def require_sums(seen: Mapping[str, Sequence[F64]]) -> None:
    """Raises FormatError where what `observe` gathered so far is NaN or more than a file's float32 holds:
    such a model is broken."""
    for of in seen.values():
        for values in of:
            with np.errstate(over="ignore"):
                require_finite(values.max(initial=0).astype(np.float32))  # sums of squares: NaN, or >= 0


def write(
    path: str | os.PathLike[str],
    seen: Mapping[str, Sequence[F64]],
    *,
    texts: Sequence[str] = (),
    n_windows: int = 0,
    n_ctx: int = 0,
) -> None:
    """Writes what `observe` gathered as llama.cpp's importance matrix.

    texts: names of what was read. n_windows, n_ctx: how it was cut. The file appears under its name once it
    is complete; matrices that met no row are left out. Raises WriteError, ArgumentError where all are, and
    FormatError as `require_sums` does.
    """
    require_sums(seen)
    found = {name: np.stack(of).astype(np.float32) for name, of in sorted(seen.items())}
    known = {name: values for name, values in found.items() if values[:, -1].any()}
    sums = {name: values[:, :-1] for name, values in known.items()}
    counts = {name: values[:, -1] for name, values in known.items()}
    write_imatrix(path, Imatrix(sums, counts, tuple(texts), n_windows, n_ctx))
