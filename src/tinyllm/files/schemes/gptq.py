"""GPTQ, as AutoGPTQ, GPTQModel and auto-round write it: whole numbers packed along the columns' side.

qweight I32 [in * bits / 32, out], qzeros I32 [groups, out * bits / 32], scales [groups, out], g_idx I32 [in]:
the group of each column. The first version of the format holds zero points less one. Read next: awq.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinyllm.config.fields import Fields, brief
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import BF16, F16, F32, TensorInfo, show
from tinyllm.files.safetensors import I32
from tinyllm.files.schemes import blocks
from tinyllm.files.schemes.blocks import Integers
from tinyllm.files.schemes.reading import FLOATS, Array, Parts, columns_of, expect, unpacked, whole

# What a word of zero points lacks in the first version: one in each field, and a carry is the next one's.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_HARMLESS = (
    "damp_percent", "damp_auto_increment", "desc_act", "static_groups", "true_sequential", "lm_head", "meta",
    "model_name_or_path", "model_file_base_name", "pack_dtype", "dynamic", "use_cuda_fp16", "use_exllama",
    "max_input_length", "batch_size", "dataset", "tokenizer", "block_name_to_quantize", "exllama_config",
    "module_name_preceding_first_block", "modules_in_block_to_quantize", "cache_block_outputs", "backend",
    "disable_exllama", "model_seqlen", "gc_mode", "vram_strategy", "parallel_packing", "device",
    "compute_device_filter", "wait_for_submodule_finalizers", "auto_forward_data_parallel", "pack_impl",
    "is_marlin_format", "act_group_aware", "hessian", "mse", "gptaq", "fallback",
    "offload_to_disk", "method", "pad_token_id", "quantizer",
)  # fmt: skip


def scheme(config: Mapping[str, Any]) -> Callable[[str, Parts], TensorInfo | None]:
    """From quantization_config. Raises UnsupportedError, FormatError."""
    fields = Fields(config)
    fields.get("quant_method")
    bits, symmetric = fields.whole("bits"), fields.flag("sym", True)
    version = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    fields.get("format")
    if bits not in (2, 3, 4, 8) or version not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        raise UnsupportedError(
            f"quantization_config: GPTQ of {bits} bits with checkpoint_format {brief(version)} is not "
            "supported; bits 2, 3, 4 and 8 in gptq and gptq_v2 are"
        )
    fields.whole("group_size", -1)
    varies = bool(config.get("dynamic")) or config.get("lm_head") is True
    fields.refuse_unknown(_HARMLESS)

    def weight(module: str, parts: Parts) -> TensorInfo | None:
        if "qweight" not in parts:
            return None
        words = expect(parts.take("qweight"), (I32,), (None, None))
        scale = expect(parts.take("scales"), (F16, BF16, F32), (None, words.shape[1]))
        k = 32 * words.shape[0] // bits
        order = None
        if "g_idx" in parts or config.get("desc_act"):
            info = expect(parts.take("g_idx"), (I32,), (None,))
            k, order = info.shape[0], whole(info)
        own = 32 * words.shape[0] // k  # bits of this module
        n_groups, rows = scale.shape
        if own * k != 32 * words.shape[0] or own not in (2, 3, 4, 8) or (own != bits and not varies):
            raise FormatError(f"{show(module)}: qweight {words.shape} holds no {k} columns of {bits} bits")
        if order is not None and (order.min() < 0 or order.max() >= n_groups):
            raise FormatError(f"{show(module)}: g_idx names a group that is not there")
        if "bias" in parts and not whole(expect(parts["bias"], FLOATS, (rows,))).any():
            del parts["bias"]  # AutoGPTQ writes one of zeros beside every matrix
        zeros = _zeros(
            expect(parts.take("qzeros"), (I32,), (n_groups, -(-rows * own // 32))), own, rows, version
        )
        middle = 1 << (own - 1)
        if symmetric and not (zeros == middle).all():
            # Some files mislabel their version; symmetric weights have one zero point, whichever it is.
            if not (zeros == zeros.flat[0]).all() or abs(int(zeros.flat[0]) - middle) > 1:
                raise FormatError(f"{show(module)}: qzeros differ, but quantization_config says sym")
            zeros = np.full_like(zeros, middle)
        columns, scales = columns_of(words), columns_of(scale)
        return blocks.integers(
            Integers(
                words,
                f"{module}.weight",
                (rows, k),
                own,
                n_groups,
                lambda first, last: unpacked(columns(first, last), own, k),
                lambda first, last: np.ascontiguousarray(scales(first, last)),
                None if (zeros == middle).all() else lambda first, last: zeros[:, first:last].T,
                order,
                scale.format == F16,
            )
        )

    return weight


def _zeros(info: TensorInfo, bits: int, rows: int, version: str) -> Array:
    """uint8 [groups, rows]."""
    words = whole(info).view(np.uint32)
    if version == "gptq" and bits != 3:
        words = words + np.uint32(_ONES[bits])
    zeros = unpacked(words, bits, rows)
    return (zeros + np.uint8(1)) & np.uint8(7) if version == "gptq" and bits == 3 else zeros
