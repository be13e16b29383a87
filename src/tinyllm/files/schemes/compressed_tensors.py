"""compressed-tensors, which llm-compressor writes: 8-bit floats, whole numbers of 2 to 8 bits, NVFP4, MXFP4.

Each group of config_groups has a format and what its weights are; which group a module belongs to is asked
only where there are several. Read next: fp8.py."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinyllm.config.fields import Fields, brief
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import BF16, F16, F32, TensorInfo, show
from tinyllm.files.safetensors import F8, F8_SCALE, I8, I32, I64, U8
from tinyllm.files.schemes import blocks
from tinyllm.files.schemes.blocks import Integers
from tinyllm.files.schemes.fp8 import blocked
from tinyllm.files.schemes.patterns import safe_pattern
from tinyllm.files.schemes.reading import Parts, Rows, expect, rows_of, scale_grid, unpacked, whole

_log = logging.getLogger(__name__)
_FLOATS = (F32, F16, BF16)


def scheme(config: Mapping[str, Any]) -> Callable[[str, Parts], TensorInfo | None]:
    """From quantization_config. Raises UnsupportedError, FormatError."""
    fields = Fields(config)
    if fields.get("quant_method") != "compressed-tensors":
        raise UnsupportedError("no compressed-tensors")
    usual = fields.get("format")
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise FormatError("quantization_config: config_groups must be an object of objects")
    sparsity = fields.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(f"quantization_config: sparsity_config {brief(sparsity)} is not supported")
    if fields.get("kv_cache_scheme"):
        _log.warning(
            "kv_cache_scheme %s is not applied: cache_type says what the cache holds",
            brief(config["kv_cache_scheme"]),
        )
    fields.refuse_unknown(("ignore", "quantization_status", "global_compression_ratio", "version"))
    known = [_Group(f"config_groups.{name}", group, usual) for name, group in groups.items()]
    rounded = [group.where for group in known if group.rounds_inputs]
    if rounded:
        _log.warning(
            "%s: inputs are not rounded as other programs do it with this scheme; see docs/files.md",
            ", ".join(rounded),
        )
    known = [group for group in known if group.read]

    def weight(module: str, parts: Parts) -> TensorInfo | None:
        if not parts.keys() & {"weight_scale", "weight_packed"}:
            return None
        fitting = known if len(known) == 1 else [group for group in known if group.targets(module)]
        if not fitting:
            raise FormatError(
                f"{show(module)} is quantized, but no group of config_groups has it as a target"
            )
        read = fitting[0].read
        assert read is not None
        return read(module, parts)

    return weight


class _Group:
    """One of config_groups: how its weights are read (None: they are not quantized) and whose they are."""

    def __init__(self, where: str, group: Mapping[str, Any], usual: Any) -> None:
        self.where = where
        fields = Fields(group)
        format, weights = fields.get("format") or usual, fields.get("weights")
        self._targets = fields.get("targets") or []
        self.rounds_inputs = any(fields.get(key) for key in ("input_activations", "output_activations"))
        fields.refuse_unknown(())
        if not isinstance(self._targets, list) or not all(isinstance(t, str) for t in self._targets):
            raise FormatError(f"{where}.targets must be a list of strings")
        self.read = None if weights is None else self._reader(format, weights)

    def _reader(self, format: Any, weights: Any) -> Callable[[str, Parts], TensorInfo]:
        if not isinstance(weights, dict):
            raise FormatError(f"{self.where}.weights must be an object")
        if format not in _FORMATS:
            raise UnsupportedError(
                f"{self.where}: format {brief(format)} is not supported; these are: {', '.join(_FORMATS)}"
            )
        fields = Fields(weights)
        how = _Weights(
            bits=fields.whole("num_bits", 8),
            strategy=str(fields.get("strategy") or ("group" if weights.get("group_size") else "tensor")),
            group=fields.whole("group_size", 0) if fields.get("group_size") else 0,
            block=fields.get("block_structure"),
            symmetric=fields.flag("symmetric", True),
        )
        fields.get("type")  # the tensors say it
        if how.strategy not in ("tensor", "channel", "group", "block", "tensor_group"):
            raise UnsupportedError(f"{self.where}.weights: strategy {brief(how.strategy)} is not supported")
        fields.refuse_unknown(
            ("dynamic", "observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype")
        )
        reader = _FORMATS[format]
        return lambda module, parts: reader(module, parts, how)

    def targets(self, module: str) -> bool:
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        return any(
            bool(safe_pattern(t[3:]).match(module)) if t.startswith("re:") else t in (module, kind)
            for t in self._targets
        )


class _Weights:
    """What a group says of its weights."""

    def __init__(self, bits: int, strategy: str, group: int, block: Any, symmetric: bool) -> None:
        self.bits, self.strategy, self.group, self.symmetric = bits, strategy, group, symmetric
        if isinstance(block, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", block):  # as older files have it
            block = [int(n) for n in block.split("x")]
        self.block: tuple[int, int] | None = None
        if strategy == "block":
            if (
                not isinstance(block, list)
                or len(block) != 2
                or any(type(n) is not int or n < 1 for n in block)
            ):
                raise FormatError(f"block_structure must be two numbers, not {brief(block)}")
            self.block = (block[0], block[1])


def _float(module: str, parts: Parts, how: _Weights) -> TensorInfo:
    """weight F8_E4M3, weight_scale [1], [out, 1], or one for each block or group."""
    weight = expect(parts.take("weight"), (F8,), (None, None))
    scale = expect(parts.take("weight_scale"), (*_FLOATS, U8, F8_SCALE))
    block = how.block or ((1, how.group) if how.strategy == "group" or how.group else None)
    return blocked(module, weight, scale, block)


def _integer(module: str, parts: Parts, how: _Weights) -> TensorInfo:
    """weight I8, also of fewer bits; weight_scale [out, groups]; weight_zero_point I8."""
    weight = expect(parts.take("weight"), (I8,), (None, None))
    codes = rows_of(weight)
    return _whole_numbers(
        module,
        parts,
        how,
        weight,
        weight.shape,
        lambda first, last: codes(first, last).view(np.uint8) ^ 0x80,
        8,
        128,
    )


def _packed(module: str, parts: Parts, how: _Weights) -> TensorInfo:
    """weight_packed I32, the lowest bits first, without a gap; weight_shape I64 [2]."""
    if not 2 <= how.bits <= 8:
        raise UnsupportedError(f"{show(module)}: packed weights of {how.bits} bits are not supported")
    packed = expect(parts.take("weight_packed"), (I32,), (None, None))
    rows, k = (int(n) for n in whole(expect(parts.take("weight_shape"), (I64,), (2,))))
    if rows != packed.shape[0] or k < 1 or -(-k * how.bits // 32) != packed.shape[1]:
        raise FormatError(
            f"{show(module)}: weight_shape {(rows, k)} does not fit weight_packed {packed.shape}"
        )
    words = rows_of(packed)
    return _whole_numbers(
        module,
        parts,
        how,
        packed,
        (rows, k),
        lambda first, last: unpacked(words(first, last), how.bits, k),
        how.bits,
        0,
    )


def _whole_numbers(
    module: str,
    parts: Parts,
    how: _Weights,
    of: TensorInfo,
    shape: tuple[int, ...],
    codes: Rows,
    bits: int,
    zero_is: int,
) -> TensorInfo:
    rows, k = shape
    scale = expect(parts.take("weight_scale"), _FLOATS)
    n_groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if scale.shape not in ((1,), (rows,), (1, 1), (rows, n_groups)) or n_groups > k:
        raise FormatError(f"{show(module)}: weight_scale {scale.shape} does not fit a weight {(rows, k)}")
    scales = _each_row(scale, rows)
    group_of = None
    if "weight_g_idx" in parts:
        order = whole(expect(parts.take("weight_g_idx"), (I32,), (k,)))
        if (order >= 0).all():  # -1: in order
            if order.max() >= n_groups:
                raise FormatError(f"{show(module)}: weight_g_idx names a group that is not there")
            group_of = order
    zeros = None
    if "weight_zero_point" in parts or not how.symmetric:
        zeros = _zeros(parts.take("weight_zero_point"), rows, n_groups, bits, zero_is)
    return blocks.integers(
        Integers(of, f"{module}.weight", (rows, k), bits, n_groups, codes, scales, zeros, group_of)
    )


def _each_row(scale: TensorInfo, rows: int) -> Rows:
    """Scales [n, groups] of rows, of a tensor that may have one for all."""
    if scale.shape in ((1,), (1, 1)):
        return lambda first, last: np.broadcast_to(whole(scale).reshape(1, 1), (last - first, 1))
    own = rows_of(scale)
    return lambda first, last: own(first, last).reshape(last - first, -1)


def _zeros(info: TensorInfo, rows: int, n_groups: int, bits: int, zero_is: int) -> Rows | None:
    """Zero points as codes; None where all are those of symmetric weights."""
    if info.format == I32:
        packed = whole(expect(info, (I32,), (-(-rows * bits // 32), n_groups)))
        values = unpacked(np.ascontiguousarray(packed.T), bits, rows).T
    else:
        expect(info, (I8,))
        if info.shape not in ((1,), (1, 1), (rows,), (rows, n_groups)):
            raise FormatError(f"{show(info.name)} has shape {info.shape}, which fits no {rows} rows")
        values = whole(info).view(np.uint8) + np.uint8(zero_is or 1 << (bits - 1))
        values = np.broadcast_to(
            values.reshape(-1, n_groups if values.size == rows * n_groups else 1), (rows, n_groups)
        )
    if (values == 1 << (bits - 1)).all():
        return None
    return lambda first, last: values[first:last]


def _nvfp4(module: str, parts: Parts, how: _Weights) -> TensorInfo:
    """weight_packed U8 [out, in / 2], weight_scale F8_E4M3 [out, in / 16], weight_global_scale F32 that
    divides."""
    packed = expect(parts.take("weight_packed"), (U8,), (None, None))
    rows, k = packed.shape[0], 2 * packed.shape[1]
    scale = expect(parts.take("weight_scale"), (F8,), (rows, k // 16))
    factor = scale_grid(expect(parts.take("weight_global_scale"), (F32,)))
    return blocks.nvfp4(packed, f"{module}.weight", rows_of(packed), rows_of(scale), factor, True, (rows, k))


def _mxfp4(module: str, parts: Parts, how: _Weights) -> TensorInfo:
    """weight_packed U8 [out, in / 2], weight_scale U8 [out, in / 32]."""
    packed = expect(parts.take("weight_packed"), (U8,), (None, None))
    rows, k = packed.shape[0], 2 * packed.shape[1]
    scale = expect(parts.take("weight_scale"), (U8, F8_SCALE), (rows, k // 32))
    return blocks.mxfp4(packed, f"{module}.weight", rows_of(packed), rows_of(scale), (rows, k))


def _naive(module: str, parts: Parts, how: _Weights) -> TensorInfo:
    """Nothing is packed: 8-bit floats or whole numbers."""
    return (_float if parts["weight"].format == F8 else _integer)(module, parts, how)


_FORMATS: dict[str, Callable[[str, Parts, _Weights], TensorInfo]] = {
    "float-quantized": _float,
    "int-quantized": _integer,
    "naive-quantized": _naive,
    "pack-quantized": _packed,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
    "mxfp8-quantized": _float,
}
