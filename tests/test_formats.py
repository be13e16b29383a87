"""Formats against the gguf package, bit for bit: panels give its floats, floats give its blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from tinyllm import _core

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
# Below this the quantizers' 1 / d overflows and ggml casts an infinity to an integer: undefined in C.
SMALLEST_D = 2.0**-128


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
    return blocks


def test_table() -> None:
    table = _core.formats()
    assert {row[0] for row in table} == {int(kind) for kind in [*HALVES, *FLOATS]}
    for id_, name, block, block_bytes, writable, panel_bytes in table:
        assert Type(id_).name.lower() == name
        assert gguf.GGML_QUANT_SIZES[Type(id_)] == (block, block_bytes)
        # A panel keeps the file's bits; blocks of 256 have 6-bit scales widened to bytes: 8 more a row.
        assert 0 <= panel_bytes - 16 * block_bytes <= (16 * 8 if block == 256 else 0)
        assert writable == (name in {"f32", "f16", "bf16", "q8_0", "q4_0"})


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
    assert np.array_equal(bits(_core.pack_unpack(blocks.tobytes(), int(Type.MXFP4), 256, 32)), bits(expected))


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


def hard_rows(rng: np.random.Generator) -> NDArray[np.float32]:
    """Rows [n, 256] of zeros, of every magnitude a float32 has, and of numbers half way between two codes."""
    normal = rng.standard_normal((40, 256), np.float32)
    codes = rng.integers(-254, 255, (20, 256)).astype(np.float32) / 2  # with 127 among them, d of Q8_0 is 1
    codes[:, ::32] = 127
    nibbles = rng.integers(-16, 17, (20, 256)).astype(np.float32) / 2  # with -8 among them, d of Q4_0 is 1
    nibbles[:, 5::32] = -8
    equal = rng.choice([1.5, -1.5], (20, 256))  # the first is the farthest
    sparse = np.where(rng.random((20, 256)) < 0.02, normal[:20], np.float32(0))
    patterns = rng.integers(0x38800000, 0x47000000, (20, 256), np.uint32)
    between_halves = (patterns >> 13 << 13 | 1 << 12).view(np.float32)
    between_bf16 = (patterns >> 16 << 16 | 1 << 15).view(np.float32)
    zeros = np.array([[0.0] * 256, [-0.0] * 256])
    rows: list[NDArray[np.floating]] = [normal, codes, -codes, nibbles, -nibbles, equal, sparse, zeros]
    rows += [between_halves, between_bf16]
    rows += [normal[:4] * np.float32(2.0) ** e for e in range(-149, 124, 3)]
    return np.concatenate(rows).astype(np.float32)


@pytest.mark.parametrize("kind", [*FLOATS, Type.Q8_0, Type.Q4_0], ids=lambda kind: kind.name)
def test_quantize_equals_gguf(kind: Type) -> None:
    x = hard_rows(np.random.default_rng(7))
    out = np.frombuffer(_core.quantize(x, int(kind)), np.uint8).reshape(len(x), -1)
    with np.errstate(all="ignore"):  # overflow to an infinite half is part of the format
        expected = np.ascontiguousarray(quantize(x, kind)).view(np.uint8)

    steps = {Type.Q8_0: 127, Type.Q4_0: 8}
    if kind in steps:
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        out, expected = out.reshape(-1, block_bytes), expected.reshape(-1, block_bytes)
        d = np.abs(x.reshape(-1, 32)).max(axis=1) / np.float32(steps[kind])
        tiny = (d > 0) & (d <= SMALLEST_D)
        assert tiny.any()
        assert not dequantize(out[tiny].copy(), kind).any()
        out, expected = out[~tiny], expected[~tiny]
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_shows_what_is_not_finite(kind: Type, bad: float) -> None:
    x = np.ones((1, 64), np.float32)
    x[0, 40] = bad
    out = _core.pack_unpack(_core.quantize(x, int(kind)), int(kind), 1, 64)
    assert np.isfinite(out[0, :32]).all()
    assert not np.isfinite(out[0, 32:]).any()
