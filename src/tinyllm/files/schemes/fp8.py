"""Fine-grained FP8 (transformers, DeepSeek, Qwen): 8-bit floats with a scale for each block, each row or all.

The weight's own type says whether it is quantized: files that transformers saved again have scales beside
weights that are not. Read next: gptq.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tinyllm.config.fields import Fields, brief
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import BF16, F16, F32, TensorInfo, show
from tinyllm.files.safetensors import F8, F8_SCALE, U8
from tinyllm.files.schemes import blocks
from tinyllm.files.schemes.reading import Floats, Parts, expect, rows_of, scale_grid


def scheme(config: Mapping[str, Any]) -> Callable[[str, Parts], TensorInfo | None]:
    """From quantization_config. Raises UnsupportedError, FormatError."""
    fields = Fields(config)
    fields.get("quant_method")
    size = fields.get("weight_block_size")
    if size is not None and (
        not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size)
    ):
        raise FormatError(f"quantization_config: weight_block_size must be two numbers, not {brief(size)}")
    for key, known in {
        "activation_scheme": (None, "dynamic", "static"),
        "scale_fmt": (None, "float", "ue8m0"),
        "fmt": (None, "e4m3"),
    }.items():
        if fields.get(key) not in known:
            raise UnsupportedError(f"quantization_config: {key} {brief(config[key])} is not supported")
    fields.refuse_unknown(("modules_to_not_convert", "ignored_layers", "dequantize"))

    def weight(module: str, parts: Parts) -> TensorInfo | None:
        if "weight" not in parts or parts["weight"].format != F8:
            parts.pop("weight_scale_inv", None)
            return None
        info = expect(parts.take("weight"), (F8,), (None, None))
        scale = expect(parts.take("weight_scale_inv"), (F32, F16, BF16, F8_SCALE, U8))
        return blocked(module, info, scale, (size[0], size[1]) if size else None)

    return weight


_STACKED = re.compile(r"(.*\.experts)\.(gate_up|down)_proj_scale_inv")


def with_own_scales(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What transformers saved again has the scales of all experts in one tensor [experts, gate's blocks and
    then up's, blocks of columns], beside a weight for each: those scales beside their weights."""
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        match = _STACKED.fullmatch(name)
        names = ("down",) if match and match[2] == "down" else ("gate", "up")
        if not match or f"{match[1]}.0.{names[0]}_proj.weight" not in tensors:
            found[name] = info
            continue
        if len(info.shape) != 3 or info.shape[1] % len(names):
            raise FormatError(f"{show(name)} has shape {info.shape}, which is none of scales of experts")
        for expert, of_both in enumerate(info.parts()):
            high = of_both.shape[0] // len(names)
            size = of_both.n_bytes // len(names)
            for i, own in enumerate(names):
                scale = f"{match[1]}.{expert}.{own}_proj.weight_scale_inv"
                shape, offset = (high, of_both.shape[1]), of_both.offset + i * size
                found[scale] = replace(of_both, name=scale, shape=shape, offset=offset, n_bytes=size)
    return found


def blocked(module: str, weight: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None) -> TensorInfo:
    """F8_E4M3 [out, in] times its scales: one ([], [1], [1, 1]), one a row ([out], [out, 1]), or one for each
    block, of which the last are cut off."""
    rows, k = weight.shape
    high, wide = rows, k
    shape = tuple(n for n in scale.shape if n != 1) if block is None else scale.shape
    if block is not None and scale.shape == (-(-rows // block[0]), -(-k // block[1])):
        high, wide = block
    elif block is None and shape == (rows,):
        high = 1
    elif shape != () and not (rows == 1 and shape == ()):
        raise FormatError(
            f"{show(scale.name)} has shape {scale.shape}, which does not fit a weight {weight.shape}"
            + (f" in blocks of {block}" if block else "")
        )
    grid: list[Floats] = []

    def scales(first: int, last: int) -> Floats:
        if not grid:
            grid.append(scale_grid(scale).reshape(-(-rows // high), -(-k // wide)))
        return grid[0][np.arange(first, last) // high]

    return blocks.float8(weight, f"{module}.weight", (rows, k), rows_of(weight), scales, -(-k // wide), wide)
