"""bitsandbytes: nf4 and fp4 in blocks of a flat weight, and int8 with a scale a row.

weight holds nibbles, the high one first, absmax a scale for each `blocksize` numbers (itself quantized where
there are nested_absmax and nested_quant_map), quant_map the numbers that nibbles stand for, and quant_state a
JSON that says the shape. Read next: torchao.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinyllm.config.fields import Fields, brief
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import BF16, F16, F32, FileReader, TensorInfo, parse_json, show
from tinyllm.files.safetensors import I8, U8
from tinyllm.files.schemes import blocks
from tinyllm.files.schemes.reading import Array, Floats, Parts, expect, rows_of, whole

# The numbers of the two tables, which the core has as well (csrc/formats/pack_schemes.c).
_TABLES: dict[str, Floats] = {
    "nf4": np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
         0.7229568362236023, 1.0], np.float32),
    "fp4": np.array(
        [0.0, 0.005208333488553762, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204,
         0.25, 0.0, -0.005208333488553762, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5,
         -0.1666666716337204, -0.25], np.float32),
}  # fmt: skip


def scheme(config: Mapping[str, Any]) -> Callable[[str, Parts], TensorInfo | None]:
    """From quantization_config. Raises UnsupportedError."""
    fields = Fields(config)
    for key in ("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"):
        fields.get(key)
    for key in config:  # the tensors say all of it; the rest is how other programs compute
        if key.startswith(("bnb_4bit_", "llm_int8_")):
            fields.get(key)
    fields.refuse_unknown(("modules_to_not_convert",))
    return _weight


def _weight(module: str, parts: Parts) -> TensorInfo | None:
    states = [part for part in parts if part.startswith("weight.quant_state.")]
    if states:
        return _of_4_bits(module, parts, states[0])
    if "SCB" not in parts or "weight" not in parts:
        return None
    weight = expect(parts.take("weight"), (I8,), (None, None))
    scale = expect(parts.take("SCB"), (F32,), (weight.shape[0],))
    kind = whole(expect(parts.take("weight_format"), (U8,))) if "weight_format" in parts else np.zeros(1)
    if kind.any():
        raise UnsupportedError(
            f"{show(module)}: weight_format {kind.ravel()[0]}, an order of a GPU's, is not supported"
        )
    rows, k = weight.shape
    return blocks.bnb8(weight, f"{module}.weight", rows_of(weight), rows_of(scale), (rows, k))


def _of_4_bits(module: str, parts: Parts, state_name: str) -> TensorInfo:
    info = expect(parts.take(state_name), (U8,), (None,))
    where = f"{show(module)}: quant_state"
    state = parse_json(whole(info).tobytes(), where)
    if not isinstance(state, dict):
        raise FormatError(f"{where} is no object")
    kind, size, shape = state.get("quant_type"), state.get("blocksize"), state.get("shape")
    if kind not in _TABLES:
        raise UnsupportedError(f"{where}: quant_type {brief(kind)} is not supported; nf4 and fp4 are")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise FormatError(f"{where}: shape {brief(shape)} is no matrix's")
    rows, k = shape
    if type(size) is not int or size < 1 or size % 64 or k % 64:
        raise UnsupportedError(
            f"{where}: blocks of {brief(size)} in rows of {k} are not supported; both must be multiples of 64"
        )
    weight = expect(parts.take("weight"), (U8, BF16, F16, F32))
    n = rows * k
    if 2 * weight.n_bytes != n:
        raise FormatError(f"{where}: shape {shape} does not fit a weight of {weight.n_bytes} bytes")
    table = whole(expect(parts.take("weight.quant_map"), (F32,), (16,)))
    if not np.array_equal(table, _TABLES[kind]):
        raise UnsupportedError(f"{show(module)}: quant_map is not {kind}'s own table")
    scale = _scales(where, parts, state, -(-n // size))
    in_rows = k // 64

    def pairs(first: int, last: int) -> Array:
        with FileReader(weight.path, weight.identity) as file:
            data = file.read_at(weight.offset + first * k // 2, (last - first) * k // 2)
        return np.frombuffer(data, np.uint8).reshape(last - first, k // 2)

    def scales(first: int, last: int) -> Floats:
        own: Floats = scale()[np.arange(first * in_rows, last * in_rows) * 64 // size]
        return own.reshape(last - first, in_rows)

    return blocks.bnb4(weight, f"{module}.weight", list(_TABLES).index(kind), pairs, scales, (rows, k))


def _scales(where: str, parts: Parts, state: Mapping[str, Any], n: int) -> Callable[[], Floats]:
    """float32 [n], made when asked for."""
    absmax = parts.take("weight.absmax")
    if "weight.nested_absmax" not in parts:
        expect(absmax, (F32,), (n,))
        return lambda: whole(absmax)
    expect(absmax, (U8,), (n,))
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(size) is not int or size < 1 or not isinstance(offset, float) or not math.isfinite(offset):
        raise FormatError(f"{where}: nested_blocksize {brief(size)}, nested_offset {brief(offset)}")
    outer = expect(parts.take("weight.nested_absmax"), (F32,), (-(-n // size),))
    table = expect(parts.take("weight.nested_quant_map"), (F32,), (256,))

    def scales() -> Floats:
        own: Floats = whole(table)[whole(absmax)] * whole(outer)[np.arange(n) // size] + np.float32(offset)
        return own

    return scales
