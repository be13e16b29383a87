"""Importance matrices: how large the inputs of each matrix are, column by column, on a text that a model
read.

Quantizing weighs squared errors with them: a column whose input is mostly near zero may be wrong. Two files
are read, llama.cpp's GGUF form (general.type "imatrix"; of each tensor NAME.in_sum2, sums of squares
[matrices, k], and NAME.counts, rows added up [matrices, 1]) and its older .dat; the first is written.
Tensors go by their GGUF names. Imports `errors` and `files`. Used by `quantize` and by the
calibration run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyllm.errors import ArgumentError, FormatError
from tinyllm.files import F32, FileReader, show, user_path
from tinyllm.files.gguf import read_gguf
from tinyllm.files.gguf_writer import OutTensor, write_gguf

Array = npt.NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LEAST = 2.0**-48  # of a matrix's largest importance: squares of less leave float32 where blocks are rounded
_FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
_MOST = 1 << 24  # entries, columns, bytes of a name in a .dat file: far above any model's


@dataclass(frozen=True)
class Imatrix:
    """sums: of squared inputs, float32 [matrices, k] by GGUF tensor name (one matrix, or one an expert).
    counts: how many inputs were added up, float32 [matrices]. datasets: the texts' names. chunks of
    chunk_size tokens. Raises FormatError for the numbers of a file (`path`), ArgumentError for others: those
    that are negative or not finite, and of other shapes.
    """

    sums: Mapping[str, Array]
    counts: Mapping[str, Array]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        refused, where = (FormatError, f"{self.path}: ") if self.path else (ArgumentError, "imatrix: ")
        if not self.sums:
            raise refused(f"{where}no entries")
        for name, sums in self.sums.items():
            counts = self.counts.get(name)
            if counts is None:
                raise refused(f"{where}{show(name)} has sums and no counts")
            for values in (sums, counts):
                if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
                    raise TypeError(f"{where}sums and counts of {show(name)} must be arrays of numbers")
                if not (values >= 0).all() or not np.isfinite(values).all():
                    raise refused(f"{where}{show(name)} has a number that is negative or not finite")
            if sums.ndim != 2 or counts.shape != sums.shape[:1] or not sums.size:
                raise refused(
                    f"{where}sums of {show(name)} have the shape {sums.shape}, counts {counts.shape}; "
                    "expected numbers of [matrices, k] and [matrices]"
                )

    def importance(self, name: str, n_matrices: int, k: int) -> Array | None:
        """float32 [n_matrices, k]: the mean squared input, scaled to a mean of 1 in each matrix, and where it
        is not 0 no less than 2^-48 of the largest; 1 where an expert was never asked. None where nothing is
        known of the tensor. Raises FormatError where it has another shape.
        """
        known_as = next((known for known in _met_by(name) if known in self.sums), None)
        if known_as is None:
            return None
        sums, counts = self.sums[known_as].astype(np.float64), self.counts[known_as].astype(np.float64)
        if sums.shape == (1, n_matrices * k):  # a stack of experts in a .dat file
            sums, counts = sums.reshape(n_matrices, k), np.repeat(counts, n_matrices)
        if sums.shape != (n_matrices, k):
            raise FormatError(
                f"{self.path or 'imatrix'}: {show(name)} is {sums.shape}, but the model's is "
                f"{(n_matrices, k)}: it was made from another model"
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = sums / counts[:, None]
            scaled = mean / mean.mean(axis=1, keepdims=True)
            raised = np.maximum(scaled, _LEAST * scaled.max(axis=1, keepdims=True))
        known = np.isfinite(scaled).all(axis=1, keepdims=True)
        return np.where(known, np.where(scaled == 0, 0, raised), 1.0).astype(np.float32)


def _met_by(name: str) -> Iterator[str]:
    """The tensor, and those that meet the same where one file has several in one and the other has not."""
    yield name
    stem, part, kind = ["", "", *name.rsplit(".", 2)][-3:]
    for whole, parts in _FUSED.items():
        for other in parts if part == whole else (whole,) if part in parts else ():
            yield f"{stem}.{other}.{kind}"


def write_imatrix(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Writes llama.cpp's GGUF form. Raises WriteError."""
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(imatrix.datasets),
        "imatrix.chunk_count": imatrix.chunks,
        "imatrix.chunk_size": imatrix.chunk_size,
    }
    tensors = []
    for name, sums in imatrix.sums.items():
        for suffix, values in ((_COUNTS, imatrix.counts[name].reshape(-1, 1)), (_SUMS, sums)):
            raw = np.ascontiguousarray(values, "<f4").tobytes()
            tensors.append(OutTensor(name + suffix, values.shape, F32, lambda raw=raw: [raw]))  # type: ignore[misc]
    write_gguf(path, metadata, tensors)


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Reads either form, told apart by content. Raises NotFoundError, ReadError, FormatError."""
    path = user_path(path)
    with FileReader(path) as file:
        if file.read_at(0, min(4, file.size)) != b"GGUF":
            return _read_dat(path, file)
    return _read_gguf(path)


def _read_gguf(path: Path) -> Imatrix:
    file = read_gguf(path)
    if file.metadata.get("general.type") != "imatrix":
        raise FormatError(f"{path}: a GGUF file, but no imatrix (general.type is not 'imatrix')")
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    for name, tensor in file.tensors.items():
        if not name.endswith(_SUMS):
            continue
        base = name[: -len(_SUMS)]
        other = file.tensors.get(base + _COUNTS)
        if other is None:
            raise FormatError(f"{path}: {show(name)} has no {_COUNTS[1:]} beside it")
        values, n = tensor.read_f32(), other.read_f32().ravel()
        sums[base] = values.reshape(-1, values.shape[-1])
        counts[base] = n
    datasets = file.metadata.get("imatrix.datasets", [])
    numbers = [file.metadata.get(f"imatrix.chunk_{what}", 0) for what in ("count", "size")]
    chunks, size = (n if type(n) is int else 0 for n in numbers)
    return Imatrix(sums, counts, tuple(datasets) if isinstance(datasets, list) else (), chunks, size, path)


def _read_dat(path: Path, file: FileReader) -> Imatrix:
    """int32 entries, then of each: int32 length and name, int32 calls, int32 n, float32 [n] means times
    calls; at the end, in newer ones, int32 chunks and the text's name."""
    at = 0

    def whole(what: str, most: int = _MOST) -> int:
        nonlocal at
        if at + 4 > file.size:
            raise FormatError(f"{path}: ends in {what} at byte {at}: no imatrix, or a truncated one")
        value = int.from_bytes(file.read_at(at, 4), "little", signed=True)
        at += 4
        if not 0 <= value <= most:
            raise FormatError(f"{path}: {what} is {value} at byte {at - 4}: no imatrix")
        return value

    def take(n_bytes: int, what: str) -> bytes:
        nonlocal at
        if at + n_bytes > file.size:
            raise FormatError(f"{path}: {what} at byte {at} needs {n_bytes} bytes, {file.size - at} are left")
        at += n_bytes
        return file.read_at(at - n_bytes, n_bytes)

    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    for i in range(whole("the number of entries")):
        name = take(whole(f"the length of name {i}"), f"name {i}").decode("utf-8", "replace")
        calls = whole(f"the calls of {show(name)}", (1 << 31) - 1)
        n = whole(f"the size of {show(name)}")
        sums[name] = np.frombuffer(take(4 * n, show(name)), "<f4").reshape(1, n)
        counts[name] = np.array([max(calls, 1)], np.float32)
    chunks, datasets = 0, ()
    if at < file.size:
        chunks = whole("the number of chunks", (1 << 31) - 1)
        text = take(whole("the length of the text's name"), "the text's name").decode("utf-8", "replace")
        return Imatrix(sums, counts, (text,), chunks, 0, path)
    return Imatrix(sums, counts, datasets, chunks, 0, path)
