"""How the schemes read a file's tensors: rows or columns as numpy, packed bits, scales of blocks.

Nothing here trusts a shape: `expect` is asked first. Imports `errors` and this package's shared part. Read
next: blocks.py, what becomes of the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.errors import FormatError
from tinyllm.files import BF16, F16, F32, FileReader, TensorInfo, read_rows, show, to_f32
from tinyllm.files.safetensors import F8, F8_SCALE, I8, I32, I64, RAW_DTYPES, U8

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Rows = Callable[[int, int], Array]  # of a matrix: rows [first, last)

_DTYPES = {U8: "<u1", I8: "<i1", I32: "<i4", I64: "<i8", F8: "<u1", F8_SCALE: "<u1"}
FLOATS = (F32, F16, BF16)


class Parts(dict[str, TensorInfo]):
    """The tensors of a module that nothing took yet, by what their names have behind the module's: "weight",
    "weight_scale"..."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def take(self, part: str) -> TensorInfo:
        """One that must be there. Raises FormatError."""
        if part not in self:
            raise FormatError(
                f"{show(self.module)} is quantized, but {part} is missing beside its other tensors"
            )
        return self.pop(part)


def expect(
    info: TensorInfo, kinds: tuple[int, ...], shape: tuple[int | None, ...] | None = None
) -> TensorInfo:
    """The tensor, if it is of one of these formats and of this shape, None in it standing for any size.
    Raises FormatError."""
    names = {F32: "F32", F16: "F16", BF16: "BF16"} | RAW_DTYPES
    if info.format not in kinds:
        wanted = ", ".join(names[kind] for kind in kinds)
        raise FormatError(
            f"{info.path}: {show(info.name)} is {names.get(info.format, 'packed')}; the scheme has {wanted} "
            "there"
        )
    if shape is not None and (
        len(shape) != len(info.shape)
        or any(want not in (None, n) for want, n in zip(shape, info.shape, strict=True))
    ):
        raise FormatError(
            f"{info.path}: {show(info.name)} has shape {info.shape}; the scheme has "
            f"({', '.join('any' if n is None else str(n) for n in shape)}) there"
        )
    return info


def numbers(info: TensorInfo, data: Array) -> Array:
    """Rows of bytes as the tensor's numbers; 8-bit floats as their bytes."""
    if info.format in FLOATS:
        return to_f32(np.ascontiguousarray(data), info.format).reshape(len(data), -1)
    return np.ascontiguousarray(data).view(_DTYPES[info.format])


def rows_of(info: TensorInfo) -> Rows:
    """Rows of a matrix, [n, k] of its numbers."""
    return lambda first, last: numbers(info, read_rows(info, first, last))


def whole(info: TensorInfo) -> Array:
    """All numbers of a small tensor, in its shape."""
    n_rows = math.prod(info.shape[:-1]) if len(info.shape) > 1 else math.prod(info.shape)
    return numbers(info, read_rows(info, 0, n_rows)).reshape(info.shape)


def columns_of(info: TensorInfo) -> Rows:
    """Columns [first, last) of a matrix as rows."""
    n_rows, n = info.shape
    size = info.n_bytes // (n_rows * n)

    def read(first: int, last: int) -> Array:
        if (first, last) == (0, n):
            return np.transpose(numbers(info, read_rows(info, 0, n_rows)))
        with FileReader(info.path, info.identity) as file:
            parts = [
                file.read_at(info.offset + (row * n + first) * size, (last - first) * size)
                for row in range(n_rows)
            ]
        data = np.frombuffer(b"".join(parts), np.uint8).reshape(n_rows, -1)
        return np.transpose(numbers(info, data))

    return read


def unpacked(words: Array, bits: int, n: int) -> npt.NDArray[np.uint8]:
    """uint8 [rows, n] from 32-bit words [rows, ...], whose bits hold `bits` each, the lowest first and
    without a gap."""
    data = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    if bits == 8:
        return data[:, :n]
    if bits == 4:
        codes = np.empty((len(data), 2 * data.shape[1]), np.uint8)
        np.bitwise_and(data, 15, out=codes[:, ::2])
        np.right_shift(data, 4, out=codes[:, 1::2])
        return codes[:, :n]
    each = np.unpackbits(data, axis=1, count=n * bits, bitorder="little").reshape(len(data), n, bits)
    return np.packbits(each, axis=2, bitorder="little")[..., 0]


def powers(exponents: Array) -> Floats:
    """float32 2^(b - 127) of bytes, F8_E8M0. Raises FormatError for 255, which is no number."""
    if (exponents == 255).any():
        raise FormatError("a scale of 255 (F8_E8M0) is no number")
    bits = exponents.astype(np.uint32) << 23
    return np.where(exponents == 0, np.uint32(0x400000), bits).astype(np.uint32).view(np.float32)


def _e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa / 512
    return -size if code & 128 else size


_E4M3 = np.array([_e4m3(code) for code in range(256)], np.float32)


def e4m3(codes: Array, of: TensorInfo) -> Floats:
    """float32 of the tensor's bytes of F8_E4M3. Raises FormatError for NaN."""
    refuse_nan(codes, of)
    return _E4M3[codes]


def refuse_nan(codes: Array, of: TensorInfo) -> None:
    """Raises FormatError where one of the tensor's bytes of F8_E4M3 is NaN."""
    if ((codes & 0x7F) == 0x7F).any():
        raise FormatError(
            f"{of.path}: {show(of.name)} holds NaN; such a weight is of no use. Download the model again"
        )


def scale_grid(info: TensorInfo) -> Floats:
    """float32 of a tensor of scales, in its shape. Raises FormatError for one that is not finite."""
    raw = whole(info)
    values = powers(raw) if info.format in (U8, F8_SCALE) else raw.astype(np.float32)
    if not np.isfinite(values).all():
        raise FormatError(f"{info.path}: {show(info.name)} holds a scale that is not finite")
    return values
