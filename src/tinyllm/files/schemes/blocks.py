"""What a quantized weight becomes: blocks of one of FORMATS that hold the same numbers, made row by row.

Formats that GGUF files have, too, are taken where they hold them exactly (4 and 8 bits with scales that are
halves), then those of csrc/formats/pack_schemes.c; what fits none is kept as F32, which takes more memory
and is warned of. A scale times a code is rounded once, in float32, as the libraries themselves do. Imports
`errors` and this package's shared part. Read next: compressed_tensors.py, the first scheme."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tinyllm.errors import FormatError
from tinyllm.files import (
    BNB4,
    BNB8,
    F8_E4M3,
    F32,
    FORMATS,
    I4_32,
    I4_128,
    I8_64,
    MXFP4,
    NVFP4_64,
    Q4_0,
    Q8_0,
    TensorInfo,
    show,
)
from tinyllm.files.schemes.reading import Array, Floats, Rows, e4m3, refuse_nan

Bytes = npt.NDArray[np.uint8]
_CHUNK = 1 << 22  # numbers looked at together


def made(
    of: TensorInfo, name: str, shape: tuple[int, int], format: int, rows: Callable[[int, int], Bytes]
) -> TensorInfo:
    """The tensor `name` [rows, k], whose blocks `rows` makes from `of` and others beside it."""
    n_bytes = shape[0] * shape[1] // FORMATS[format].block * FORMATS[format].block_bytes
    return TensorInfo(name, shape, format, of.path, 0, n_bytes, identity=of.identity, made=rows)


def _empty(n: int, k: int, format: int) -> Bytes:
    return np.empty((n, k // FORMATS[format].block, FORMATS[format].block_bytes), np.uint8)


def _f32_bytes(values: Floats) -> Bytes:
    return np.ascontiguousarray(values, np.float32)[..., None].view(np.uint8)


def in_float32(
    of: TensorInfo, name: str, shape: tuple[int, int], rows: Callable[[int, int], Floats]
) -> TensorInfo:
    """Numbers that no format of fewer bits holds as they are."""
    return made(
        of,
        name,
        shape,
        F32,
        lambda first, last: np.ascontiguousarray(rows(first, last), np.float32).view(np.uint8),
    )


# ---- whole numbers times a scale


@dataclass(frozen=True)
class Integers:
    """scale * (code - zero): codes uint8 [n, k] of `bits` bits, scales float32 and zeros uint8 [n, groups] of
    rows [first, last). zeros None: all are 2^(bits - 1). group_of int [k]: the group of each column, where
    they are not all of one size and in order."""

    of: TensorInfo
    name: str
    shape: tuple[int, int]
    bits: int
    n_groups: int
    codes: Rows
    scales: Rows
    zeros: Rows | None = None
    group_of: Array | None = None
    of_halves: bool = False  # scales are F16 in the file

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.n_groups


def integers(w: Integers) -> TensorInfo:
    """Raises FormatError where the groups do not fit the columns."""
    k = w.shape[1]
    in_order = w.group_of is None or np.array_equal(w.group_of, np.arange(k) // max(1, w.group))
    if w.group_of is None and k % w.n_groups:
        raise FormatError(
            f"{w.of.path}: {show(w.name)} has {w.n_groups} groups of {k} columns, which do not fit"
        )
    if not in_order or k % w.n_groups or w.group % 32:
        return in_float32(w.of, w.name, w.shape, lambda first, last: _dequantized(w, first, last))
    if w.bits < 4:
        w = _as_4_bits(w)
    return _four_bits(w) if w.bits == 4 else _eight_bits(w)


def _dequantized(w: Integers, first: int, last: int) -> Floats:
    group_of = w.group_of if w.group_of is not None else np.arange(w.shape[1]) // w.group
    zeros = w.zeros(first, last).astype(np.int32)[:, group_of] if w.zeros else 1 << (w.bits - 1)
    codes = w.codes(first, last).astype(np.int32) - zeros
    return codes.astype(np.float32) * w.scales(first, last)[:, group_of]


def _as_4_bits(w: Integers) -> Integers:
    """Fewer bits in 4: with a zero point of their own the codes as they are, else moved to where 8 is 0."""
    if w.zeros:
        return replace(w, bits=4)
    move = np.uint8(8 - (1 << (w.bits - 1)))
    return replace(w, bits=4, codes=lambda first, last: w.codes(first, last) + move)


def _as_8_bits(w: Integers) -> Integers:
    """4 bits in 8, their zero points taken off."""

    def codes(first: int, last: int) -> Bytes:
        zeros = w.zeros(first, last) if w.zeros else np.full((last - first, w.n_groups), 8, np.uint8)
        moved: Bytes = w.codes(first, last) + np.uint8(128) - np.repeat(zeros, w.group, axis=1)
        return moved

    return replace(w, bits=8, codes=codes, zeros=None)


def _are_halves(w: Integers) -> bool:
    """Whether all scales are numbers of 16 bits, too."""
    if w.of_halves:
        return True
    step = max(1, _CHUNK // w.n_groups)
    for first in range(0, w.shape[0], step):
        scales = w.scales(first, min(first + step, w.shape[0]))
        with np.errstate(over="ignore"):
            if not np.array_equal(scales.astype(np.float16).astype(np.float32), scales):
                return False
    return True


def _four_bits(w: Integers) -> TensorInfo:
    k = w.shape[1]
    halves = ((w.zeros is None and w.group <= 128) or w.group % 128 != 0) and _are_halves(w)
    if w.zeros is None and w.group <= 128 and halves:
        return made(w.of, w.name, w.shape, Q4_0, lambda first, last: _q4_0(w, first, last))
    if w.group % 128 and not halves:
        return _eight_bits(_as_8_bits(w))
    format = I4_32 if w.group % 128 else I4_128
    block, at = FORMATS[format].block, 2 if w.group % 128 else 4
    group_of = np.arange(k // block) * block // w.group

    def rows(first: int, last: int) -> Bytes:
        out, codes = _empty(last - first, k, format), w.codes(first, last)
        out[..., :at] = _halves(w, first, last) if at == 2 else _f32_bytes(w.scales(first, last)[:, group_of])
        out[..., at] = w.zeros(first, last)[:, group_of] if w.zeros else 8
        out[..., at + 1 :] = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(*out.shape[:2], -1)
        return out.reshape(last - first, -1)

    return made(w.of, w.name, w.shape, format, rows)


def _halves(w: Integers, first: int, last: int) -> Bytes:
    """The scale of each 32 numbers as a half, [n, k / 32, 2]."""
    scales = w.scales(first, last)[:, np.arange(w.shape[1] // 32) * 32 // w.group]
    return np.ascontiguousarray(scales.astype("<f2"))[..., None].view(np.uint8)


def _q4_0(w: Integers, first: int, last: int) -> Bytes:
    out = _empty(last - first, w.shape[1], Q4_0)
    codes = w.codes(first, last).reshape(*out.shape[:2], 32)
    out[..., :2] = _halves(w, first, last)
    out[..., 2:] = codes[..., :16] | codes[..., 16:] << 4
    return out.reshape(last - first, -1)


def _eight_bits(w: Integers) -> TensorInfo:
    k, middle = w.shape[1], 1 << (w.bits - 1)
    halves = w.zeros is None and _are_halves(w)
    if w.zeros is not None or (not halves and w.group % 64):
        return in_float32(w.of, w.name, w.shape, lambda first, last: _dequantized(w, first, last))

    def signed(first: int, last: int) -> Bytes:
        moved: Bytes = w.codes(first, last) - np.uint8(middle)
        return moved

    def q8_0(first: int, last: int) -> Bytes:
        out = _empty(last - first, k, Q8_0)
        out[..., :2] = _halves(w, first, last)
        out[..., 2:] = signed(first, last).reshape(*out.shape[:2], 32)
        return out.reshape(last - first, -1)

    def i8_64(first: int, last: int) -> Bytes:
        out = _empty(last - first, k, I8_64)
        out[..., :4] = _f32_bytes(w.scales(first, last)[:, np.arange(k // 64) * 64 // w.group])
        out[..., 4:] = signed(first, last).reshape(*out.shape[:2], 64)
        return out.reshape(last - first, -1)

    return made(w.of, w.name, w.shape, Q8_0 if halves else I8_64, q8_0 if halves else i8_64)


# ---- floats of 8 and 4 bits


def float8(
    of: TensorInfo, name: str, shape: tuple[int, int], codes: Rows, scales: Rows, n_groups: int, group: int
) -> TensorInfo:
    """F8_E4M3 times a scale: codes uint8 [n, k], scales float32 [n, n_groups], each of `group` columns (the
    last of what is left)."""
    k = shape[1]
    group_of = np.arange(k) // group
    if k % 64 or (group % 64 and n_groups > 1):
        return in_float32(
            of,
            name,
            shape,
            lambda first, last: e4m3(codes(first, last), of) * scales(first, last)[:, group_of],
        )
    starts = group_of[::64]

    def rows(first: int, last: int) -> Bytes:
        out, numbers = _empty(last - first, k, F8_E4M3), codes(first, last)
        refuse_nan(numbers, of)
        out[..., :4] = _f32_bytes(scales(first, last)[:, starts])
        out[..., 4:] = numbers.reshape(*out.shape[:2], 64)
        return out.reshape(last - first, -1)

    return made(of, name, shape, F8_E4M3, rows)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def nvfp4(
    of: TensorInfo,
    name: str,
    pairs: Rows,
    scales: Rows,
    factor: Floats,
    divides: bool,
    shape: tuple[int, int],
) -> TensorInfo:
    """E2M1 times what each 16 numbers have, a scale in F8_E4M3 times `factor` or divided by it. pairs uint8
    [n, k / 2], the low half first; scales uint8 [n, k / 16]; factor float32 > 0, of the matrix ([1]) or of
    each row."""
    rows, k = shape
    if not (np.isfinite(factor).all() and (factor > 0).all()) or factor.size not in (1, rows):
        raise FormatError(
            f"{of.path}: the global scale of {show(name)} must be one number, finite and above 0"
        )
    factors = np.broadcast_to(factor.ravel(), (rows,))

    def each16(first: int, last: int) -> Floats:
        own = factors[first:last, None]
        values = e4m3(scales(first, last), of)
        return values / own if divides else values * own

    if k % 64:

        def numbers(first: int, last: int) -> Floats:
            both = pairs(first, last)
            codes = np.stack([both & 15, both >> 4], axis=-1).reshape(len(both), k)
            return _E2M1[codes] * np.repeat(each16(first, last), 16, axis=1)

        return in_float32(of, name, shape, numbers)

    def blocks(first: int, last: int) -> Bytes:
        out, bytes_of_scale = _empty(last - first, k, NVFP4_64), scales(first, last)
        refuse_nan(bytes_of_scale, of)
        out[..., :4] = _f32_bytes(-factors[first:last, None] if divides else factors[first:last, None])
        out[..., 4:8] = bytes_of_scale.reshape(*out.shape[:2], 4)
        out[..., 8:] = pairs(first, last).reshape(*out.shape[:2], 32)
        return out.reshape(last - first, -1)

    return made(of, name, shape, NVFP4_64, blocks)


def mxfp4(of: TensorInfo, name: str, pairs: Rows, scales: Rows, shape: tuple[int, int]) -> TensorInfo:
    """E2M1 times 2^(scale - 127): pairs as above, scales uint8 [n, k / 32]."""
    k = shape[1]
    if k % 32:
        raise FormatError(f"{of.path}: {show(name)} has {k} columns, no multiple of MXFP4's 32")

    def rows(first: int, last: int) -> Bytes:
        out, bytes_of_scale = _empty(last - first, k, MXFP4), scales(first, last)
        if (bytes_of_scale == 255).any():
            raise FormatError(f"{of.path}: {show(name)} holds a scale that is no number")
        both = pairs(first, last).reshape(*out.shape[:2], 16)
        out[..., 0] = bytes_of_scale
        out[..., 1::2] = both[..., :8] & 15 | both[..., 8:] << 4
        out[..., 2::2] = both[..., :8] >> 4 | both[..., 8:] & 0xF0
        return out.reshape(last - first, -1)

    return made(of, name, shape, MXFP4, rows)


def bnb4(
    of: TensorInfo, name: str, table: int, pairs: Rows, scales: Rows, shape: tuple[int, int]
) -> TensorInfo:
    """A table's numbers (0: nf4, 1: fp4) times a scale: pairs uint8 [n, k / 2], the high half first; scales
    float32 [n, k / 64]."""

    def rows(first: int, last: int) -> Bytes:
        out = _empty(last - first, shape[1], BNB4)
        out[..., 0] = table
        out[..., 1:5] = _f32_bytes(scales(first, last))
        out[..., 5:] = pairs(first, last).reshape(*out.shape[:2], 32)
        return out.reshape(last - first, -1)

    return made(of, name, shape, BNB4, rows)


def bnb8(of: TensorInfo, name: str, codes: Rows, scales: Rows, shape: tuple[int, int]) -> TensorInfo:
    """(code * scale) / 127, rounded twice: codes int8 [n, k], scales float32 [n, 1]."""
    k = shape[1]
    if k % 64:
        return in_float32(
            of,
            name,
            shape,
            lambda first, last: (
                codes(first, last).astype(np.float32) * scales(first, last) * np.float32(1 / 127)
            ),
        )

    def rows(first: int, last: int) -> Bytes:
        out = _empty(last - first, k, BNB8)
        out[..., :4] = _f32_bytes(scales(first, last))
        out[..., 4:] = codes(first, last).view(np.uint8).reshape(*out.shape[:2], 64)
        return out.reshape(last - first, -1)

    return made(of, name, shape, BNB8, rows)


def kept_wide(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Those that no format of fewer bits holds."""
    return [info for info in tensors if info.made and info.format == F32]
