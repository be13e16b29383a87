"""Miniature random models as Hugging Face directories: specs, weights from a seed, safetensors files.

Imports numpy and `reference.py`, which computes their logits, so that `golden/make_goldens.py` can run it
beside torch. `helpers_gguf.py` writes the same weights as GGUF."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from helpers_linear import is_linear, linear_shapes
from reference import ffn_names

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
BF16 = npt.NDArray[np.uint16]  # the upper halves of float32 numbers

GOLDEN_DIR = Path(__file__).parent / "golden"


class Spec(NamedTuple):
    """One golden model: what golden/specs.json or families.json says of it."""

    name: str
    seed: int
    n_tokens: int  # length of the prompt whose logits are stored
    config: dict[str, Any]  # Hugging Face's config.json
    context: int | None = None  # to load it with, where that matters
    in_gguf: bool = True  # whether llama.cpp's files can say all of it
    # The config of what transformers computes the same with, where it has no class of the model's own
    as_transformers: dict[str, Any] | None = None


def golden_specs(file: str = "specs") -> list[Spec]:
    """specs: Llamas of every kind. families: the other families."""
    text = (GOLDEN_DIR / f"{file}.json").read_text(encoding="utf-8")
    return [Spec(**entry) for entry in json.loads(text)]


def golden_spec(name: str) -> Spec:
    return next(spec for spec in golden_specs() if spec.name == name)


def _uniform(seed: int, stream: int, n: int) -> npt.NDArray[np.float64]:
    """n numbers in [-1, 1), multiples of 2^-23. From raw Philox words, which numpy promises never to change
    (it does not promise that of its distributions), so a seed means the same weights everywhere."""
    words = np.random.Philox(key=[seed, stream]).random_raw(n)
    numbers: npt.NDArray[np.float64] = (words >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
    return numbers


# The norms of x in a layer, in the order of their shapes below, which is that of their random numbers.
LAYER_NORMS: dict[str, tuple[str, ...]] = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "cohere": ("input_layernorm",),
    "cohere2": ("input_layernorm",),
    "gemma2": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "vaultgemma": ("input_layernorm", "pre_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4": (
        "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm",
    ),
    "hyperclovax": ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
    "apertus": ("attention_layernorm", "feedforward_layernorm"),
    "olmo": (),
}  # fmt: skip
LAYER_NORMS |= {
    "gemma3_text": LAYER_NORMS["gemma2"],
    "olmo3": LAYER_NORMS["olmo2"],
    "exaone4": LAYER_NORMS["olmo2"],
}
FIRST_NORMS = ("input_layernorm", "attention_layernorm")
UNGATED = ("arcee", "apertus", "jais2")
# The layers' norms, whatever a family calls them.
_NORM = re.compile(r".*(norm\d?|layernorm)\.weight")


def is_norm(name: str) -> bool:
    return _NORM.fullmatch(name) is not None


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model under Hugging Face's name."""
    kind = config["model_type"]
    dim, ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_heads = config["num_attention_heads"]
    n_kv_heads = config.get("num_key_value_heads", n_heads)
    head_dim = config.get("head_dim") or dim // n_heads
    q_dim, kv_dim = n_heads * head_dim, n_kv_heads * head_dim
    bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    qkv_bias = bias or kind == "qwen2"
    bias = config.get("attention_out_bias", bias) if kind != "glm4" else False
    if config.get("use_bias"):
        qkv_bias = bias = mlp_bias = True
    norms = LAYER_NORMS.get(kind, LAYER_NORMS["llama"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, dim)}

    def linear(name: str, n_out: int, n_in: int, bias: bool) -> None:
        shapes[name + ".weight"] = (n_out, n_in)
        if bias:
            shapes[name + ".bias"] = (n_out,)

    def add_norms(at: str, names: Iterable[str]) -> None:
        for name in names:
            shapes[f"{at}{name}.weight"] = (dim,)
            if kind == "jais2":
                shapes[f"{at}{name}.bias"] = (dim,)

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        add_norms(at, [name for name in norms if name in FIRST_NORMS])
        if is_linear(config, layer):
            shapes |= linear_shapes(config, at)
            add_norms(at, [name for name in norms if name not in FIRST_NORMS])
            for part, rows, k in (("gate", ff, dim), ("up", ff, dim), ("down", dim, ff)):
                linear(f"{at}mlp.{part}_proj", rows, k, False)
            continue
        if kind == "phi3":
            linear(at + "self_attn.qkv_proj", q_dim + 2 * kv_dim, dim, False)
        else:  # Qwen 3.5 has a gate beside each head's queries
            linear(at + "self_attn.q_proj", q_dim * (1 + (kind == "qwen3_5_text")), dim, qkv_bias)
            linear(at + "self_attn.k_proj", kv_dim, dim, qkv_bias)
            linear(at + "self_attn.v_proj", kv_dim, dim, qkv_bias)
        for of, n in (("q", n_heads), ("k", n_kv_heads)):
            norm = f"{at}self_attn.{of}_norm.weight"
            if kind == "hunyuan_v1_dense":
                shapes[f"{at}self_attn.{'query' if of == 'q' else 'key'}_layernorm.weight"] = (head_dim,)
            elif kind in ("qwen3", "qwen3_moe", "gemma3_text", "exaone4", "apertus", "qwen3_5_text"):
                shapes[norm] = (head_dim,)
            elif kind in ("olmo2", "olmo3"):
                shapes[norm] = (n * head_dim,)
            elif config.get("use_qk_norm"):
                shapes[norm] = (n, head_dim)
        linear(at + "self_attn.o_proj", dim, q_dim, bias)
        add_norms(at, [name for name in norms if name not in FIRST_NORMS])
        if kind == "granite_swa":
            shapes[at + "self_attn.sinks"] = (n_heads,)
        if kind == "apertus":
            for part in ("alpha_p", "alpha_n", "beta", "eps"):
                shapes[f"{at}mlp.act_fn.{part}"] = () if part in ("beta", "eps") else (1,)
        if kind == "granitemoehybrid":
            shared = config["shared_intermediate_size"]
            linear(at + "shared_mlp.input_linear", 2 * shared, dim, False)
            linear(at + "shared_mlp.output_linear", dim, shared, False)
            continue
        if kind == "gpt_oss":  # what transformers keeps in memory; files hold the experts as MXFP4
            n_experts = config["num_local_experts"]
            shapes[at + "self_attn.sinks"] = (n_heads,)
            linear(at + "mlp.router", n_experts, dim, True)
            shapes[at + "mlp.experts.gate_up_proj"] = (n_experts, dim, 2 * ff)
            shapes[at + "mlp.experts.gate_up_proj_bias"] = (n_experts, 2 * ff)
            shapes[at + "mlp.experts.down_proj"] = (n_experts, ff, dim)
            shapes[at + "mlp.experts.down_proj_bias"] = (n_experts, dim)
            continue
        names, ff = ffn_names(config), config.get("moe_intermediate_size", config["intermediate_size"])
        n_experts = config.get("num_local_experts") or config.get("num_experts") or 1
        if names.router:
            linear(at + names.router, n_experts, dim, False)
        for i in range(n_experts):
            block = at + names.block.format(i)
            if kind in ("phi3", "glm4"):
                linear(block + "gate_up_proj", 2 * ff, dim, False)
            else:
                if kind not in UNGATED:
                    linear(block + names.gate, ff, dim, mlp_bias)
                linear(block + names.up, ff, dim, mlp_bias)
            linear(block + names.down, dim, ff, mlp_bias)
    if kind != "olmo":
        shapes["model.norm.weight"] = (dim,)
    if kind == "jais2":
        shapes["model.norm.bias"] = (dim,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, dim)
    return shapes


def norm_mean(config: Mapping[str, Any]) -> float:
    """Of a norm's weights as safetensors hold them: Gemma's are what is added to 1."""
    return 0.0 if "gemma" in config["model_type"] or config["model_type"].startswith("qwen3_5") else 1.0


ROUTERS = ("block_sparse_moe.gate.weight", "mlp.gate.weight", "mlp.router.weight")


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, F32]:
    """Weights at which every part of the model matters: norms around 1, biases of about half an output,
    attention scores with a standard deviation of about 2 (far from uniform), logits of about 1.5. float32,
    the same for a seed everywhere."""
    weights: dict[str, F32] = {}
    for stream, (name, shape) in enumerate(weight_shapes(config).items()):
        u = _uniform(seed, stream, math.prod(shape)).reshape(shape)
        if is_norm(name):
            value = (1.0 if "linear_attn" in name else norm_mean(config)) + 0.5 * u
        elif ".act_fn." in name:  # xIELU's: of eps something that shows
            usual = {"alpha_p": 0.5, "alpha_n": -0.4, "beta": 0.5, "eps": -0.3}
            value = usual[name.rsplit(".", 1)[1]] + 0.2 * u
        elif name.endswith("A_log"):  # what is remembered for about 1 to 50 tokens
            value = 2.0 * u - 2.0
        elif name.endswith(("bias", "sinks")):
            value = 0.8 * u
        elif "experts." in name and len(shape) == 3:  # transposed; gates so large that they reach the clamp
            value = u * math.sqrt(3.0) * (5.0 if "gate_up" in name else 0.3) / math.sqrt(shape[1])
        elif name.endswith(ROUTERS):
            value = u * math.sqrt(3.0) * 3.0 / math.sqrt(shape[-1])
        else:
            gain = (
                1.5
                if any(
                    part in name for part in ("q_proj", "k_proj", "qkv_proj", "lm_head", "embed", "conv1d")
                )
                else 1.0
            )
            value = u * math.sqrt(3.0) * gain / math.sqrt(shape[-1])
        weights[name] = value.astype(np.float32)
    return weights


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, F32]:
    """Other tensors whose every number matters: an output of about 1 for inputs of about 1."""
    return {
        name: (_uniform(seed, i, math.prod(shape)).reshape(shape) * 1.7 / math.sqrt(shape[-1])).astype("f4")
        for i, (name, shape) in enumerate(shapes.items())
    }


def random_ids(config: Mapping[str, Any], seed: int, n: int) -> list[int]:
    """A prompt of n ids, uniform over the vocabulary."""
    u = (_uniform(seed, 10_000, n) + 1.0) / 2.0
    return [int(i) for i in np.floor(u * config["vocab_size"])]


def to_bf16(x: F32) -> BF16:
    """bfloat16 bits of finite float32 numbers, rounded half to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    halves: BF16 = (nearest >> np.uint32(16)).astype(np.uint16)
    return halves


def from_bf16(bits: BF16) -> F32:
    x: F32 = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x


def rounded(weights: Mapping[str, F32], dtype: str) -> dict[str, F32]:
    """The numbers that a file of `dtype` ("F32", "F16" or "BF16") holds, as float32."""
    if dtype == "F16":
        return {name: w.astype(np.float16).astype(np.float32) for name, w in weights.items()}
    if dtype == "BF16":
        return {name: from_bf16(to_bf16(w)) for name, w in weights.items()}
    return dict(weights)


def write_safetensors(path: Path, weights: Mapping[str, F32], dtype: str = "F32") -> None:
    """A safetensors file: the header's length as a little-endian uint64, the header in JSON, then the
    data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    end = 0
    for name, w in weights.items():
        blob = (to_bf16(w) if dtype == "BF16" else w.astype({"F32": "<f4", "F16": "<f2"}[dtype])).tobytes()
        header[name] = {"dtype": dtype, "shape": list(w.shape), "data_offsets": [end, end + len(blob)]}
        end += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def write_hf_directory(
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, F32],
    *,
    dtype: str = "F32",
    n_shards: int = 1,
) -> Path:
    """Writes config.json and the weights as `dtype`, in one file or in shards with their index. Returns
    `path`."""
    path.mkdir(parents=True, exist_ok=True)
    torch_dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    text = json.dumps({**config, "torch_dtype": torch_dtype}, indent=2)
    (path / "config.json").write_text(text, encoding="utf-8")
    if n_shards == 1:
        write_safetensors(path / "model.safetensors", weights, dtype)
        return path
    names = list(weights)
    weight_map: dict[str, str] = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        shard = names[i * len(names) // n_shards : (i + 1) * len(names) // n_shards]
        write_safetensors(path / file, {name: weights[name] for name in shard}, dtype)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


def golden_model(spec: Spec, path: Path, *, dtype: str = "F32", n_shards: int = 1) -> Path:
    """Writes a golden model as a directory without a tokenizer. Returns `path`."""
    weights = random_weights(spec.config, spec.seed)
    return write_hf_directory(path, spec.config, weights, dtype=dtype, n_shards=n_shards)
