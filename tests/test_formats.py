"""Formats against the gguf package, bit for bit: panels give its floats. test_quantize.py: the way back."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from numpy.typing import NDArray

from tinyllm import _core
from tinyllm.files import FORMATS, are_finite

FLOATS = [Type.F32, Type.F16, Type.BF16]
# Where a block keeps its f16 numbers (byte offsets).
HALVES = {
    Type.Q8_0: [0], Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.IQ4_NL: [0],
    Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
    Type.IQ4_XS: [0], Type.MXFP4: [],
}  # fmt: skip
# Zeros, the smallest and largest subnormal and normal halves, one: both signs.
SPECIAL_HALVES = np.array([0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF], np.uint16)
SPECIAL_HALVES = np.concatenate([SPECIAL_HALVES, SPECIAL_HALVES | 0x8000])


def bits(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    return x.view(np.uint32)


def random_blocks(rng: np.random.Generator, kind: Type, n: int, special: bool) -> NDArray[np.uint8]:
    """n random blocks [n, block_bytes]; their f16 numbers are finite, or all from SPECIAL_HALVES."""
    blocks = rng.integers(0, 256, (n, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    for offset in HALVES[kind]:
        halves = rng.choice(SPECIAL_HALVES, n)
        if not special:
            halves = (rng.integers(0, 0x7C00, n) | rng.integers(0, 2, n) << 15).astype(np.uint16)
        blocks[:, offset : offset + 2] = halves[:, None].view(np.uint8)
    if kind == Type.MXFP4:
        blocks[:, 0] %= 255  # which is NaN (test_every_mxfp4_exponent)
    return blocks


def test_table() -> None:
    table = _core.formats()
    assert {row[0] for row in table} == {int(kind) for kind in [*HALVES, *FLOATS]}
    for id_, name, block, block_bytes, panel_bytes in table:
        assert Type(id_).name.lower() == name
        assert gguf.GGML_QUANT_SIZES[Type(id_)] == (block, block_bytes)
        # A panel keeps the file's bits; blocks of 256 have 6-bit scales widened to bytes: 8 more a row.
        assert 0 <= panel_bytes - 16 * block_bytes <= (16 * 8 if block == 256 else 0)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 17, 65])
@pytest.mark.parametrize("kind", list(HALVES), ids=lambda kind: kind.name)
def test_unpack_equals_gguf(kind: Type, rows: int, special: bool) -> None:
    block = gguf.GGML_QUANT_SIZES[kind][0]
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


@pytest.mark.parametrize("kind", [*HALVES, *FLOATS], ids=lambda kind: kind.name)
def test_blocks_that_are_not_finite_are_told_by_their_halves(kind: Type) -> None:
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
        for i, offset in enumerate(HALVES[kind] * 4):
            blocks[i, offset : offset + 2] = np.array([rng.choice([0x7C00, 0xFC00, 0x7E01])], "<u2").view(
                np.uint8
            )
    with np.errstate(all="ignore"):
        known = [bool(np.isfinite(dequantize(block, kind)).all()) for block in blocks]
    assert [are_finite(block, kind) for block in blocks] == known
    assert are_finite(blocks.ravel(), kind) == all(known)
