"""AWQ in its "gemm" layout, as AutoAWQ and GPTQModel write it: 4 bits, eight columns of the output a word.

qweight I32 [in, out / 8], qzeros I32 [groups, out / 8], scales [groups, out]. Read next: modelopt.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinyllm.config.fields import Fields, brief
from tinyllm.errors import UnsupportedError
from tinyllm.files import BF16, F16, F32, TensorInfo
from tinyllm.files.safetensors import I32
from tinyllm.files.schemes import blocks
from tinyllm.files.schemes.blocks import Integers
from tinyllm.files.schemes.reading import Array, Parts, columns_of, expect, whole

_PLACE = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)  # of each of eight columns: its nibble in the word


def scheme(config: Mapping[str, Any]) -> Callable[[str, Parts], TensorInfo | None]:
    """From quantization_config. Raises UnsupportedError, FormatError."""
    fields = Fields(config)
    fields.get("quant_method")
    bits, version = fields.whole("bits", 4), fields.get("version") or fields.get("format") or "gemm"
    fields.get("format")
    if bits != 4 or str(version).lower() != "gemm":
        raise UnsupportedError(
            f"quantization_config: AWQ of {bits} bits, version {brief(version)}, is not supported; "
            "4 bits in gemm are"
        )
    fields.whole("group_size", 128)
    fields.refuse_unknown(
        ("zero_point", "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse",
         "exllama_config", "sym", "desc_act", "lm_head", "meta", "pack_dtype", "method", "checkpoint_format",
         "true_sequential", "static_groups", "damp_percent", "duo_scaling", "n_parallel_calib_samples"),
    )  # fmt: skip

    def weight(module: str, parts: Parts) -> TensorInfo | None:
        if "qweight" not in parts:
            return None
        words = expect(parts.take("qweight"), (I32,), (None, None))
        k, rows = words.shape[0], 8 * words.shape[1]
        scale = expect(parts.take("scales"), (F16, BF16, F32), (None, rows))
        n_groups = scale.shape[0]
        zeros = _nibbles(
            whole(expect(parts.take("qzeros"), (I32,), (n_groups, rows // 8))).T
        )  # [rows, groups]
        columns, scales = columns_of(words), columns_of(scale)

        def codes(first: int, last: int) -> Array:
            start = first // 8
            return _nibbles(columns(start, -(-last // 8)))[first - 8 * start : last - 8 * start]

        return blocks.integers(
            Integers(
                words,
                f"{module}.weight",
                (rows, k),
                4,
                n_groups,
                codes,
                lambda first, last: np.ascontiguousarray(scales(first, last)),
                None if (zeros == 8).all() else lambda first, last: zeros[first:last],
                of_halves=scale.format == F16,
            )
        )

    return weight


def _nibbles(words: Array) -> Array:
    """uint8 [8 n, m] of words [n, m]: the rows that each row of words holds."""
    values = words.view(np.uint32)[:, None, :] >> (4 * _PLACE)[None, :, None]
    return (values & 15).astype(np.uint8).reshape(8 * len(words), -1)
