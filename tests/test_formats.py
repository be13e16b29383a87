"""Formats against the gguf package, bit for bit: panels give its floats. test_quantize.py: the way back."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from helpers_formats import Kind, Newer, dequantize, kind_of, set_d, size
from numpy.typing import NDArray

from tinyllm import _core
from tinyllm.files import FORMATS, OWN_FORMATS, are_finite

FLOATS = [Type.F32, Type.F16, Type.BF16]
# Where a block keeps its f16 numbers (byte offsets).
HALVES = {
    Type.Q8_0: [0], Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.IQ4_NL: [0],
    Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
    Type.IQ4_XS: [0], Type.MXFP4: [], Type.NVFP4: [], Type.TQ1_0: [52], Type.TQ2_0: [64], Type.Q1_0: [0],
    Newer.Q2_0: [0], Type.IQ3_XXS: [0], Type.IQ3_S: [0], Type.IQ2_XXS: [0], Type.IQ2_XS: [0], Type.IQ2_S: [0],
    Type.IQ1_S: [0], Type.IQ1_M: [],
}  # fmt: skip
# A panel keeps the file's bits; the scales of blocks of 256 are widened to bytes. Where codes are looked up
# before they are packed, or packed tighter in the file, it takes at most so many times the file's bytes
# (docs/quantization.md says so, too).
LARGER = {
    Type.TQ1_0: 1.23, Type.IQ3_XXS: 1.42, Type.IQ3_S: 1.27, Type.IQ2_XXS: 1.63, Type.IQ2_XS: 1.45,
    Type.IQ2_S: 1.31, Type.IQ1_S: 2.15, Type.IQ1_M: 1.92,
}  # fmt: skip
# Zeros, the smallest and largest subnormal and normal halves, one: both signs.
SPECIAL_HALVES = np.array([0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF], np.uint16)
SPECIAL_HALVES = np.concatenate([SPECIAL_HALVES, SPECIAL_HALVES | 0x8000])


def bits(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    return x.view(np.uint32)


def random_blocks(rng: np.random.Generator, kind: Kind, n: int, special: bool) -> NDArray[np.uint8]:
    """n random blocks [n, block_bytes]; their f16 numbers are finite, or all from SPECIAL_HALVES."""
    blocks = rng.integers(0, 256, (n, size(kind)[1]), np.uint8)
    for offset in [0] if kind == Type.IQ1_M else HALVES[kind]:
        halves = rng.choice(SPECIAL_HALVES, n)
        if not special:
            halves = (rng.integers(0, 0x7C00, n) | rng.integers(0, 2, n) << 15).astype(np.uint16)
        set_d(blocks, kind, halves.view(np.float16), offset)
    if kind == Type.MXFP4:
        blocks[:, 0] %= 255  # which is NaN (test_every_mxfp4_exponent)
    return blocks


def test_table() -> None:
    table = [row for row in _core.formats() if row[0] not in OWN_FORMATS]
    assert {row[0] for row in table} == {int(kind) for kind in [*HALVES, *FLOATS]}
    for id_, name, block, block_bytes, panel_bytes in table:
        kind = kind_of(name.upper())
        assert (id_, block, block_bytes) == (int(kind), *size(kind))
        in_file = 16 * block_bytes
        most = in_file * LARGER[kind] if kind in LARGER else in_file + (16 * 8 if block == 256 else 0)
        least = in_file * (LARGER[kind] - 0.02) if kind in LARGER else in_file
        assert least <= panel_bytes <= most


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 17, 65])
@pytest.mark.parametrize("kind", list(HALVES), ids=lambda kind: kind.name)
def test_unpack_equals_gguf(kind: Kind, rows: int, special: bool) -> None:
    block = size(kind)[0]
    k = 3 * 256
    blocks = random_blocks(np.random.default_rng(rows), kind, rows * k // block, special)
    with np.errstate(over="ignore"):  # MXFP4 reaches 12 * 2^127
        expected = dequantize(blocks, kind).reshape(rows, k)
    out = _core.pack_unpack(blocks.tobytes(), int(kind), rows, k)
    assert out.shape == (rows, k)
    assert out.dtype == np.float32
    assert np.array_equal(bits(out), bits(expected))


def test_every_mxfp4_exponent() -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (256, 17), np.uint8)
    blocks[:, 0] = np.arange(256)
    with np.errstate(over="ignore"):
        expected = dequantize(blocks, Type.MXFP4)
    unpacked = _core.pack_unpack(blocks.tobytes(), int(Type.MXFP4), 256, 32)
    assert np.array_equal(bits(unpacked[:255]), bits(expected[:255]))
    assert np.isnan(unpacked[255]).all()  # so the MX specification has it; gguf takes it for 2^128


def test_every_nvfp4_scale() -> None:
    """0x7f is no number in the format itself. gguf reads it as 0, and so do we; it
    is never written for a number."""
    blocks = np.random.default_rng(0).integers(0, 256, (256, 36), np.uint8)
    blocks[:, :4] = np.arange(256)[:, None] + [0, 1, 2, 3]
    unpacked = _core.pack_unpack(blocks.tobytes(), int(Type.NVFP4), 256, 64)
    assert np.array_equal(bits(unpacked), bits(dequantize(blocks, Type.NVFP4)))
    assert [are_finite(block, int(Type.NVFP4)) for block in blocks] == [
        0x7F not in row for row in blocks[:, :4].tolist()
    ]


@pytest.mark.parametrize("rows", [1, 17, 64])
def test_unpack_floats(rows: int) -> None:
    patterns = np.arange(65536, dtype=np.uint16)[: 65536 // rows * rows].reshape(rows, -1)
    k = patterns.shape[1]

    half = _core.pack_unpack(patterns.tobytes(), int(Type.F16), rows, k)
    np.testing.assert_array_equal(half, patterns.view(np.float16).astype(np.float32))
    brain = _core.pack_unpack(patterns.tobytes(), int(Type.BF16), rows, k)
    assert np.array_equal(bits(brain), patterns.astype(np.uint32) << 16)
    single = np.random.default_rng(0).integers(0, 2**32, (rows, k), np.uint32)
    assert np.array_equal(bits(_core.pack_unpack(single.tobytes(), int(Type.F32), rows, k)), single)


@pytest.mark.parametrize("kind", [k for k in [*HALVES, *FLOATS] if k != Type.NVFP4], ids=lambda k: k.name)
def test_blocks_that_are_not_finite_are_told_by_their_halves(kind: Kind) -> None:
    """In all the numbers that the gguf package reads of them."""
    rng = np.random.default_rng(kind)
    if kind in FLOATS:
        n_bytes = FORMATS[kind].block_bytes
        blocks = rng.integers(0, 256, (2000, n_bytes), np.uint8)
        blocks[::4, -2:] = [[0x80, 0x7F]] if kind == Type.BF16 else [[0x00, 0x7C]]
    else:
        assert list(FORMATS[kind].scales) == HALVES[kind]
        blocks = random_blocks(rng, kind, 60, special=False)
        if kind == Type.MXFP4:
            blocks[:, 0] %= 253  # the next reaches past float32
        assert are_finite(blocks.ravel(), kind)
        if kind == Type.MXFP4:
            blocks[:4, 0] = 255
            blocks[:4, 1] = 0x77  # read as 2^128 by the gguf package
        for i, offset in enumerate(([0] if kind == Type.IQ1_M else HALVES[kind]) * 4):
            half = np.array([rng.choice([0x7C00, 0xFC00, 0x7E01])], np.uint16)
            set_d(blocks[i : i + 1], kind, half.view(np.float16), offset)
    with np.errstate(all="ignore"):
        known = [bool(np.isfinite(dequantize(block, kind)).all()) for block in blocks]
    assert [are_finite(block, kind) for block in blocks] == known
    assert are_finite(blocks.ravel(), kind) == all(known)
