"""GGUF's tensor types for the tests: what the `gguf` package knows, and what it lacks by llama.cpp's
definition.

`Kind` numbers a type; `size` and `dequantize` take every one. Imports gguf only."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Newer(IntEnum):
    """Types that the package has no number for."""

    Q2_0 = 42


Kind = gguf.GGMLQuantizationType | Newer
SIZES: dict[Any, tuple[int, int]] = gguf.GGML_QUANT_SIZES  # type: ignore[assignment]
SIZES[Newer.Q2_0] = (64, 18)  # its writer asks there, too


def kind_of(name: str) -> Kind:
    return Newer[name] if name in Newer.__members__ else gguf.GGMLQuantizationType[name]


def size(kind: Kind) -> tuple[int, int]:
    """Numbers and bytes in one block."""
    return SIZES[kind]


def dequantize(blocks: npt.NDArray[Any], kind: Kind) -> F32:
    """float32 [..., k] that blocks [..., bytes] stand for: gguf's numbers, and by llama.cpp's definition
    those of Q1_0 (a float16 d, then a bit a number: d or -d) and Q2_0 (d, then two bits: d times them less
    1), which gguf does not dequantize."""
    if kind not in (gguf.GGMLQuantizationType.Q1_0, Newer.Q2_0):
        values: F32 = gguf.quants.dequantize(blocks, kind)
        return values
    _, n_bytes = size(kind)
    of = np.ascontiguousarray(blocks).reshape(-1, n_bytes)
    d = np.ascontiguousarray(of[:, :2]).view("<f2").astype(np.float32)
    bits = np.unpackbits(of[:, 2:], axis=1, bitorder="little")
    if kind == Newer.Q2_0:
        codes = (bits[:, ::2] + 2 * bits[:, 1::2]).astype(np.float32) - 1
    else:
        codes = 2 * bits.astype(np.float32) - 1
    return (d * codes).reshape(*blocks.shape[:-1], -1)


def set_d(blocks: Bytes, kind: Kind, d: npt.NDArray[np.floating[Any]], offset: int = 0) -> None:
    """Gives blocks [n, bytes] the scales d [n], as float16 at `offset`; of IQ1_M, which has it in four
    pieces, and of NVFP4, which has four of 8 bits, wherever they are."""
    if kind == gguf.GGMLQuantizationType.NVFP4:
        scales = gguf.quants.NVFP4.fp32_to_ue4m3(np.abs(d)[:, None].repeat(4, 1))
        blocks[:, :4] = scales
        return
    half = d.astype("<f2")
    if kind != gguf.GGMLQuantizationType.IQ1_M:
        blocks[:, offset : offset + 2] = half.view(np.uint8).reshape(-1, 2)
        return
    words = np.ascontiguousarray(blocks[:, 48:56]).view("<u2")
    pieces = half.view("<u2")[:, None] >> np.array([0, 4, 8, 12], np.uint16) << 12
    blocks[:, 48:56] = (words & 0x0FFF | pieces).astype("<u2").view(np.uint8)
