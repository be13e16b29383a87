"""torchao: whole numbers or 8-bit floats with a scale a row. The last scheme; __init__.py has the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinyllm.config.fields import Fields
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import BF16, F16, F32, TensorInfo, show
from tinyllm.files.safetensors import F8, I8, I64
from tinyllm.files.schemes import blocks
from tinyllm.files.schemes.blocks import Integers
from tinyllm.files.schemes.fp8 import blocked
from tinyllm.files.schemes.reading import Parts, expect, rows_of, whole


def scheme(config: Mapping[str, Any]) -> Callable[[str, Parts], TensorInfo | None]:
    """From quantization_config. Raises UnsupportedError."""
    fields = Fields(config)
    fields.get("quant_method")
    # quant_type says how other programs compute; the tensors say what the numbers are.
    fields.refuse_unknown(("quant_type", "modules_to_not_convert", "include_input_output_embeddings",
                           "untie_embedding_weights", "quant_type_kwargs"))  # fmt: skip
    return _weight


def _weight(module: str, parts: Parts) -> TensorInfo | None:
    if "_weight_qdata" not in parts:
        return None
    weight = expect(parts.take("_weight_qdata"), (I8, F8), (None, None))
    rows, k = weight.shape
    scale = expect(parts.take("_weight_scale"), (F32, F16, BF16))
    if weight.format == F8:
        return blocked(module, weight, scale, None)
    if scale.shape not in ((rows,), (rows, 1)):
        raise UnsupportedError(
            f"{show(module)}: scales of shape {scale.shape} for {rows} rows are not supported"
        )
    if "_weight_zero_point" in parts:
        zero = whole(expect(parts.take("_weight_zero_point"), (I8, I64, F32)))
        if zero.any():
            raise UnsupportedError(f"{show(module)}: zero points other than 0 are not supported")
    if rows < 1 or k % 32:
        raise FormatError(f"{show(module)}: rows of {k} numbers are no multiple of 32")
    codes, scales = rows_of(weight), rows_of(scale)
    return blocks.integers(
        Integers(
            weight,
            f"{module}.weight",
            (rows, k),
            8,
            1,
            lambda first, last: codes(first, last).view(np.uint8) ^ 0x80,
            lambda first, last: scales(first, last).reshape(-1, 1),
        )
    )
