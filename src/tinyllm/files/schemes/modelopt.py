"""NVIDIA ModelOpt: FP8 and NVFP4, whose scales multiply. Read next: bitsandbytes.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from tinyllm.config.fields import Fields, brief
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import BF16, F16, F32, TensorInfo, show
from tinyllm.files.safetensors import F8, U8
from tinyllm.files.schemes import blocks
from tinyllm.files.schemes.fp8 import blocked
from tinyllm.files.schemes.reading import Parts, expect, rows_of, scale_grid

_log = logging.getLogger(__name__)
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4")


def of_hf_quant_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What hf_quant_config.json says, as quantization_config says it; None where there is none."""
    said = config.get("quantization")
    if not said:
        return None
    if not isinstance(said, dict):
        raise FormatError(f"hf_quant_config.json: quantization must be an object, not {brief(said)}")
    return {"quant_method": "modelopt", **said}


def scheme(config: Mapping[str, Any]) -> Callable[[str, Parts], TensorInfo | None]:
    """From quantization_config. Raises UnsupportedError, FormatError."""
    fields = Fields(config)
    fields.get("quant_method")
    algorithm = fields.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        raise UnsupportedError(
            f"quantization_config: quant_algo {brief(algorithm)} is not supported; these are: "
            f"{', '.join(_ALGORITHMS)}"
        )
    if algorithm == "NVFP4" and fields.whole("group_size", 16) != 16:
        raise UnsupportedError(
            f"quantization_config: group_size {config['group_size']} of NVFP4 is not supported"
        )
    for key in ("kv_cache_quant_algo", "kv_cache_scheme"):
        if fields.get(key):
            _log.warning(
                "%s %s is not applied: cache_type says what the cache holds", key, brief(config[key])
            )
    # config_groups says the same in compressed-tensors' words.
    fields.refuse_unknown(("ignore", "exclude_modules", "producer", "config_groups", "group_size"))

    def weight(module: str, parts: Parts) -> TensorInfo | None:
        if "weight" not in parts or parts["weight"].format not in (F8, U8):
            return None
        if "pre_quant_scale" in parts:
            raise UnsupportedError(
                f"{show(module)}: pre_quant_scale, a factor on its input, is not supported"
            )
        info = parts.take("weight")
        scale = parts.take("weight_scale")
        if info.format == F8:
            return blocked(module, expect(info, (F8,), (None, None)), expect(scale, (F32, F16, BF16)), None)
        rows, k = expect(info, (U8,), (None, None)).shape[0], 2 * info.shape[1]
        expect(scale, (F8,), (rows, k // 16))
        factor = scale_grid(expect(parts.take("weight_scale_2"), (F32,)))
        return blocks.nvfp4(info, f"{module}.weight", rows_of(info), rows_of(scale), factor, False, (rows, k))

    return weight
