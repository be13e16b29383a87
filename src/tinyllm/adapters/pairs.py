"""What an adapter is, once it is read: pairs of thin matrices, each beside one matrix of the model.

Invariant: the numbers are the file's own, in the file's format (F32, F16 or BF16; what was Q8_0 is F32), and
rows stand in the model's order. Imports errors and files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import BF16, F16, F32, FORMATS, TensorInfo, read_rows, show, to_f32

Q8_0 = 8
MAX_BYTES = 1 << 33  # of one tensor of an adapter
_DTYPES = {F32: "<f4", F16: "<f2", BF16: "<u2"}  # BF16 as its bits


@dataclass(frozen=True)
class Numbers:
    """A matrix of floats as a file holds it: float32, float16, or the bits of BF16 as uint16."""

    values: npt.NDArray[Any]
    format: int

    def f32(self) -> npt.NDArray[np.float32]:
        """Exactly these numbers."""
        if self.format != BF16:
            return self.values.astype(np.float32)
        return to_f32(np.ascontiguousarray(self.values).view(np.uint8), BF16).reshape(self.values.shape)

    def bytes(self) -> npt.NDArray[np.uint8]:
        """Row after row, as files hold them."""
        return np.ascontiguousarray(self.values).view(np.uint8).ravel()

    def take(self, values: npt.NDArray[Any]) -> Numbers:
        return Numbers(values, self.format)


@dataclass(frozen=True)
class Pair:
    """Beside the matrix `name` [rows, k] of `layer` (None: outside the layers; of expert i the name ends with
    .i): out += scale * (in @ a.T) @ b.T.

    a: [rank, k]; of the embedding [vocabulary, rank], whose rows tokens have. b: [rows, rank], or [rows, rank
    + 1] where its last column is a bias: what is added, times scale, whatever comes in.
    """

    name: str
    layer: int | None
    scale: float
    a: Numbers
    b: Numbers
    has_bias: bool = False

    @property
    def rank(self) -> int:
        return int(self.b.values.shape[1]) - self.has_bias

    def delta(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """What it adds to the matrix's rows [first, last): float32, summed in float64. Not for a bias."""
        a, b = self.a.f32(), self.b.f32()[:, : self.rank]
        if self.name == "embedding":
            product = a[first:last].astype(np.float64) @ b.T.astype(np.float64)
        else:
            product = b[first:last].astype(np.float64) @ a.astype(np.float64)
        return np.asarray(self.scale * product, np.float32)


@dataclass(frozen=True)
class Adapter:
    """All pairs of one adapter, at most one a matrix."""

    path: Path
    pairs: tuple[Pair, ...]

    @cached_property
    def key(self) -> bytes:
        """A hash of all that its results depend on."""
        hashed = blake2b(digest_size=16)
        for pair in self.pairs:
            facts = (pair.name, pair.layer, pair.scale, pair.has_bias, pair.a.format, pair.a.values.shape)
            hashed.update(repr((*facts, pair.b.format, pair.b.values.shape)).encode())
            hashed.update(pair.a.bytes().tobytes())
            hashed.update(pair.b.bytes().tobytes())
        return hashed.digest()

    @property
    def n_numbers(self) -> int:
        return sum(pair.a.values.size + pair.b.values.size for pair in self.pairs)


def read_numbers(info: TensorInfo) -> Numbers:
    """A whole tensor of an adapter, of any dimensions. Raises UnsupportedError for formats that adapters do
    not come in; FormatError for numbers that are not finite."""
    if info.n_bytes > MAX_BYTES:
        raise FormatError(f"{info.path}: tensor {show(info.name)} has {info.n_bytes} bytes: no adapter's")
    n_rows = int(np.prod(info.shape[:-1])) if len(info.shape) > 1 else info.shape[0]
    if info.format in _DTYPES:
        rows = np.ascontiguousarray(read_rows(info, 0, n_rows))
        numbers = Numbers(rows.view(_DTYPES[info.format]).reshape(info.shape), info.format)
    elif info.format == Q8_0:
        blocks = np.ascontiguousarray(read_rows(info, 0, n_rows)).reshape(-1, 34)
        scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
        numbers = Numbers((scales * blocks[:, 2:].view(np.int8)).reshape(info.shape), F32)
    else:
        name = FORMATS[info.format].name if info.format in FORMATS else f"format {info.format}"
        raise UnsupportedError(
            f"{info.path}: tensor {show(info.name)} is {name}; an adapter's are F32, F16, BF16 or Q8_0"
        )
    if not np.isfinite(numbers.f32()).all():
        raise FormatError(f"{info.path}: tensor {show(info.name)} holds a NaN or an infinity")
    return numbers
