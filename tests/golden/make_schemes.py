"""Makes schemes.npz and schemes.json: small weights as quantizing libraries write them, and what they stand
for.

Needs torch, transformers, compressed-tensors and bitsandbytes (the versions are written down); the tests need
none of them. A case is the tensors of one module, or of a whole small model with its logits. What a weight
stands for is what the library's own code makes of it in float32, kept as the SHA-256 of its bytes and its
first numbers. Where "writer" says numpy, the library does not run here: this script writes the layout by its
description, and reads it back by loops of its own.

    python tests/golden/make_schemes.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import compressed_tensors
import numpy as np
import torch
import transformers
from bitsandbytes import functional
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
MODULE = "model.layers.0.mlp.down_proj"
DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8",
    torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
Tensors = dict[str, torch.Tensor]
Case = dict[str, Any]


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


# ---- compressed-tensors

CT = f"compressed-tensors {compressed_tensors.__version__}"


def in_groups(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """[groups of rows, groups of columns, numbers of one]."""
    rows, k = weight.shape
    if args.strategy == "tensor":
        return weight.reshape(1, 1, -1)
    if args.strategy == "channel":
        return weight.reshape(rows, 1, k)
    if args.strategy == "block":
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -k % wide, 0, -rows % high))
        split = padded.reshape(-(-rows // high), high, -(-k // wide), wide).permute(0, 2, 1, 3)
        return split.reshape(*split.shape[:2], -1)
    return weight.reshape(rows, -1, args.group_size)


def compress(weight: torch.Tensor, format: str, args: QuantizationArgs) -> tuple[Tensors, torch.Tensor]:
    """(the file's tensors of a weight, the float32 numbers that they stand for)."""
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups, state = in_groups(weight, args), {"weight": weight}
    g = None
    if format == "nvfp4-pack-quantized":
        g = generate_gparam(weight.min(), weight.max())
        state["weight_global_scale"] = g
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, g)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress(state, scheme)
    exact = {n: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for n, t in packed.items()}
    if g is not None:  # decompress() would give BF16
        e2m1 = unpack_fp4_from_uint8(packed["weight_packed"], *weight.shape, dtype=torch.float32)
        scale = packed["weight_scale"].float()
        return packed, dequantize(e2m1, scale, args=args, global_scale=g, dtype=torch.float32)
    return packed, compressor.decompress(exact, scheme)["weight"].float()


def ct_config(format: str, args: QuantizationArgs, **more: Any) -> Case:
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
    groups = {"group_0": {**group, "output_activations": None, "format": format}}
    return {
        "quant_method": "compressed-tensors", "version": compressed_tensors.__version__, "format": format,
        "config_groups": groups, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {},
        "global_compression_ratio": None, **more,
    }  # fmt: skip


def ct_cases() -> Iterator[tuple[str, Case]]:
    bf16, f32 = torch.bfloat16, torch.float32
    fp8, nvfp4, mxfp4 = ("float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")

    def group(bits: int, size: int, symmetric: bool = True, **more: Any) -> Case:
        return {"num_bits": bits, "strategy": "group", "group_size": size, "symmetric": symmetric, **more}

    def floats(strategy: str, **more: Any) -> Case:
        return {"type": "float", "strategy": strategy, **more}

    in_16 = floats("tensor_group", num_bits=4, group_size=16, scale_dtype=torch.float8_e4m3fn)
    for name, format, args, shape, dtype in (
        ("ct_fp8_tensor", fp8, floats("tensor"), (24, 128), bf16),
        ("ct_fp8_channel", fp8, floats("channel"), (24, 128), bf16),
        ("ct_fp8_channel_f32", fp8, floats("channel"), (24, 128), f32),
        ("ct_fp8_block", fp8, floats("block", block_structure=[128, 128]), (130, 192), bf16),
        ("ct_int8_channel", "int-quantized", {"strategy": "channel"}, (24, 128), bf16),
        ("ct_int8_channel_f32", "int-quantized", {"strategy": "channel"}, (24, 128), f32),
        ("ct_int8_asym", "int-quantized", {"strategy": "channel", "symmetric": False}, (24, 128), bf16),
        ("ct_w4_group32", "pack-quantized", group(4, 32), (24, 128), bf16),
        ("ct_w4_group128", "pack-quantized", group(4, 128), (24, 256), bf16),
        ("ct_w4_channel", "pack-quantized", {"num_bits": 4, "strategy": "channel"}, (24, 256), bf16),
        ("ct_w4_asym32", "pack-quantized", group(4, 32, False), (30, 128), bf16),
        ("ct_w4_asym128", "pack-quantized", group(4, 128, False), (30, 256), f32),
        ("ct_w3_group64", "pack-quantized", group(3, 64), (24, 128), bf16),
        ("ct_w2_asym", "pack-quantized", group(2, 64, False), (24, 128), bf16),
        ("ct_w6_group64", "pack-quantized", group(6, 64), (24, 128), f32),
        ("ct_w8_group64", "pack-quantized", group(8, 64), (24, 128), f32),
        ("ct_nvfp4", nvfp4, in_16, (24, 128), bf16),
        ("ct_mxfp4", mxfp4, group(4, 32, type="float", scale_dtype=torch.uint8), (24, 128), bf16),
    ):
        how = QuantizationArgs(**args)
        tensors, expected = compress(random(*shape).to(dtype), format, how)
        config = ct_config(format, how)
        yield name, {"writer": CT, "config": config, "tensors": tensors, "expected": expected}


# ---- whole models: as neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8, W4A16 and nf4

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
IDS = [3, 17, 90, 4, 55, 21, 8, 8, 61, 2]


def model_case(quantize: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]) -> Case:
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    tensors: Tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 4 if parameter.ndim == 2 else 1
            parameter.copy_(parameter.to(torch.bfloat16).float())
            module = name.rpartition(".")[0]
            if parameter.ndim == 1 or "embed" in name or "lm_head" in name:
                tensors[name] = parameter.to(torch.bfloat16)
                continue
            made, numbers = quantize(parameter.to(torch.bfloat16))
            tensors |= {f"{module}.{key}": value for key, value in made.items()}
            parameter.copy_(numbers)
        logits = model(torch.tensor([IDS])).logits[0]
    return {"tensors": tensors, "logits": logits, "ids": IDS, "model": SMALL}


def model_cases() -> Iterator[tuple[str, Case]]:
    static = QuantizationArgs(num_bits=8, type="float", strategy="tensor")

    def with_input(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        tensors, numbers = compress(weight, "float-quantized", static)
        return {**tensors, "input_scale": torch.tensor([0.02], dtype=torch.bfloat16)}, numbers

    said = {
        "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8, "observer": "minmax",
        "observer_kwargs": {}, "strategy": "tensor", "symmetric": True, "type": "float",
    }  # fmt: skip
    group = {"input_activations": said, "output_activations": None, "targets": ["Linear"], "weights": said}
    old = {
        "config_groups": {"group_0": group}, "format": "float-quantized", "global_compression_ratio": 1.2463,
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
        "quantization_status": "frozen",
    }  # fmt: skip
    yield "model_fp8_static", {"writer": CT, "config": old, **model_case(with_input)}
    w4 = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    yield (
        "model_w4a16",
        {
            "writer": CT,
            "config": ct_config("pack-quantized", w4),
            **model_case(lambda w: compress(w, "pack-quantized", w4)),
        },
    )
    yield (
        "model_nf4",
        {"writer": BNB, "config": bnb_config("nf4"), **model_case(lambda w: bnb_4bit(w, "nf4", True))},
    )


# ---- bitsandbytes

BNB = f"bitsandbytes {bitsandbytes.__version__}"


def bnb_config(kind: str) -> Case:
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
        "_load_in_8bit": False, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": None, "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }  # fmt: skip


def bnb_4bit(weight: torch.Tensor, kind: str, nested: bool) -> tuple[Tensors, torch.Tensor]:
    packed, state = functional.quantize_4bit(
        weight, quant_type=kind, blocksize=64, compress_statistics=nested
    )
    tensors = {"weight": packed} | {f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    return tensors, functional.dequantize_4bit(packed, state).float()


def bnb_cases() -> Iterator[tuple[str, Case]]:
    weight = random(24, 128).to(torch.bfloat16)
    for kind, nested in (("nf4", False), ("nf4", True), ("fp4", False)):
        tensors, expected = bnb_4bit(weight, kind, nested)
        name = f"bnb_{kind}" + "_nested" * nested
        yield name, {"writer": BNB, "config": bnb_config(kind), "tensors": tensors, "expected": expected}
    q, scale, _ = functional.int8_vectorwise_quant(weight.half())
    tensors = {"weight": q, "SCB": scale, "weight_format": torch.zeros((), dtype=torch.uint8)}
    config = {**bnb_config("nf4"), "load_in_4bit": False, "load_in_8bit": True, "_load_in_4bit": False}
    expected = functional.int8_vectorwise_dequant(q, scale)
    yield "bnb_int8", {"writer": BNB, "config": config, "tensors": tensors, "expected": expected}


# ---- layouts written by hand


def words_along(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n * bits / 32, m] of codes [n, m]: the lowest bits first, without a gap."""
    n, m = codes.shape
    out = np.zeros((n * bits // 32, m), np.uint64)
    for i in range(n):
        for b in range(bits):
            at = i * bits + b
            out[at // 32] |= (codes[i].astype(np.uint64) >> b & 1) << (at % 32)
    return out.astype(np.uint32).view(np.int32)


def gptq_cases() -> Iterator[tuple[str, Case]]:
    rng = np.random.default_rng(3)
    rows, k = 32, 128
    for name, bits, group, sym, version, shuffled in (
        ("gptq_4_v1", 4, 64, False, "gptq", False),
        ("gptq_4_sym", 4, 32, True, "gptq", False),
        ("gptq_4_v2", 4, 128, False, "gptq_v2", False),
        ("gptq_4_act_order", 4, 32, False, "gptq", True),
        ("gptq_8_sym", 8, 128, True, "gptq", False),
        ("gptq_8_asym", 8, 64, False, "gptq", False),
        ("gptq_3", 3, 32, False, "gptq", False),
        ("gptq_2", 2, 64, True, "gptq", False),
    ):
        n_groups, most = k // group, (1 << bits) - 1
        codes = rng.integers(0, most + 1, (k, rows))
        scales = torch.from_numpy(rng.uniform(0.001, 0.01, (n_groups, rows))).half()
        # One zero point is 0, whose field borrows from the next one's in the first version.
        zeros = rng.integers(0, most + 1, (n_groups, rows))
        zeros[0, 0] = 0
        if sym:
            zeros[:] = 1 << (bits - 1)
        order = np.arange(k) // group
        if shuffled:
            rng.shuffle(order)
        qzeros = words_along(zeros.T, bits)
        if version == "gptq":
            fields = (zeros.T - 1) & most
            if bits == 3:
                qzeros = words_along(fields, bits)
            else:
                ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
                qzeros = (qzeros.view(np.uint32) - np.uint32(ones)).view(np.int32)
        s = scales.float().numpy()
        expected = np.empty((rows, k), np.float32)
        for r in range(rows):
            for c in range(k):
                g = order[c]
                expected[r, c] = np.float32(int(codes[c, r]) - int(zeros[g, r])) * s[g, r]
        yield name, {
            "writer": "numpy",
            "config": {
                "quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": shuffled,
                "checkpoint_format": version, "damp_percent": 0.1, "lm_head": False, "true_sequential": True,
            },
            "tensors": {
                "qweight": torch.from_numpy(words_along(codes, bits)),
                "qzeros": torch.from_numpy(np.ascontiguousarray(qzeros.T)),
                "scales": scales,
                "g_idx": torch.from_numpy(order.astype(np.int32)),
            },
            "expected": torch.from_numpy(expected),
        }  # fmt: skip


def awq_cases() -> Iterator[tuple[str, Case]]:
    rng = np.random.default_rng(5)
    rows, k, place = 32, 128, [0, 4, 1, 5, 2, 6, 3, 7]

    def pack(codes: np.ndarray) -> torch.Tensor:  # [n, rows] -> [n, rows / 8]
        out = np.zeros((len(codes), rows // 8), np.uint32)
        for c in range(rows):
            out[:, c // 8] |= codes[:, c].astype(np.uint32) << np.uint32(4 * place[c % 8])
        return torch.from_numpy(out.view(np.int32))

    for name, group, zero_point in (("awq_gemm", 64, True), ("awq_gemm_sym", 128, False)):
        codes = rng.integers(0, 16, (k, rows))
        zeros = rng.integers(0, 16, (k // group, rows)) if zero_point else np.full((k // group, rows), 8)
        scales = torch.from_numpy(rng.uniform(0.001, 0.01, (k // group, rows))).half()
        expected = np.empty((rows, k), np.float32)
        for r in range(rows):
            for c in range(k):
                expected[r, c] = np.float32(codes[c, r] - zeros[c // group, r]) * np.float32(
                    scales[c // group, r]
                )
        yield name, {
            "writer": "numpy",
            "config": {
                "quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
                "zero_point": zero_point, "modules_to_not_convert": None,
            },
            "tensors": {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales},
            "expected": torch.from_numpy(expected),
        }  # fmt: skip


def fp8_cases() -> Iterator[tuple[str, Case]]:
    weight = random(130, 192)
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": None,
    }
    for name, size, dtype in (
        ("fp8_blocks", [128, 128], torch.float32),
        ("fp8_blocks_bf16", [128, 128], torch.bfloat16),
        ("fp8_ue8m0", [128, 128], torch.float8_e8m0fnu),
        ("fp8_tensor", None, torch.float32),
    ):
        high, wide = size or weight.shape
        scale = torch.empty(-(-130 // high), -(-192 // wide))
        for i in range(len(scale)):
            for j in range(scale.shape[1]):
                block = weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                scale[i, j] = block.abs().max() / 448
        if dtype == torch.float8_e8m0fnu:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        stored = scale.to(dtype)
        used = stored.float()
        each = used.repeat_interleave(high, 0)[:130].repeat_interleave(wide, 1)[:, :192]
        codes = (weight / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        yield (
            name,
            {
                "writer": "torch",
                "config": {**config, "weight_block_size": size},
                "tensors": {"weight": codes, "weight_scale_inv": stored if size else stored.reshape(())},
                "expected": codes.float() * each,
            },
        )


def modelopt_cases() -> Iterator[tuple[str, Case]]:
    weight = random(24, 128)
    config = {
        "quant_method": "modelopt",
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }
    scale = (weight.abs().max() / 448).reshape(())
    codes = (weight / scale).to(torch.float8_e4m3fn)
    yield (
        "modelopt_fp8",
        {
            "writer": "torch",
            "config": {**config, "quant_algo": "FP8"},
            "tensors": {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.01)},
            "expected": codes.float() * scale,
        },
    )
    rng = np.random.default_rng(11)
    second = torch.tensor(0.00037)
    first = torch.from_numpy(rng.uniform(1, 400, (24, 8))).float().to(torch.float8_e4m3fn)
    packed = torch.from_numpy(rng.integers(0, 256, (24, 64)).astype(np.uint8))
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    numbers = e2m1[torch.stack([packed & 15, packed >> 4], -1).long()].reshape(24, 128)
    yield (
        "modelopt_nvfp4",
        {
            "writer": "torch",
            "config": {**config, "quant_algo": "NVFP4", "group_size": 16},
            "tensors": {"weight": packed, "weight_scale": first, "weight_scale_2": second},
            "expected": numbers * (first.float() * second).repeat_interleave(16, 1),
        },
    )


def torchao_cases() -> Iterator[tuple[str, Case]]:
    weight = random(24, 128)
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = torch.round(weight / scale).to(torch.int8)
    zero = torch.zeros(24, 1, dtype=torch.int8)
    yield (
        "torchao_int8",
        {
            "writer": "torch",
            "config": {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}},
            },
            "tensors": {"_weight_qdata": codes, "_weight_scale": scale, "_weight_zero_point": zero},
            "expected": codes.float() * scale,
        },
    )
    scale = weight.abs().amax(1, keepdim=True) / 448
    floats = (weight / scale).to(torch.float8_e4m3fn)
    yield (
        "torchao_float8",
        {
            "writer": "torch",
            "config": {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}},
            },
            "tensors": {"_weight_qdata": floats, "_weight_scale": scale},
            "expected": floats.float() * scale,
        },
    )


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    sources = (
        ct_cases,
        fp8_cases,
        gptq_cases,
        awq_cases,
        modelopt_cases,
        bnb_cases,
        torchao_cases,
        model_cases,
    )
    for name, case in (found for source in sources for found in source()):
        prefix = "" if "model" in case else f"{MODULE}."
        listed = {}
        for key, tensor in case.pop("tensors").items():
            raw = tensor.detach().contiguous()
            listed[prefix + key] = [DTYPES[raw.dtype], list(raw.shape)]
            arrays[f"{name}/{prefix}{key}"] = raw.reshape(-1).view(torch.uint8).numpy()
        if (expected := case.pop("expected", None)) is not None:
            numbers = np.ascontiguousarray(expected.detach().numpy(), np.float32)
            case["shape"], case["first"] = list(numbers.shape), [float(x) for x in numbers.ravel()[:8]]
            case["sha256"] = hashlib.sha256((numbers + 0).tobytes()).hexdigest()  # of zeros without a sign
        if "logits" in case:
            arrays[f"{name}/logits"] = case.pop("logits").detach().numpy()
        described[name] = {**case, "tensors": listed}
    described["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    np.savez_compressed(HERE / "schemes.npz", **arrays)
    (HERE / "schemes.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
