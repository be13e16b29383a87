"""Writes miniature models as GGUF, under llama.cpp's names, keys and row order, in any format that tinyllm
reads.

Uses the `gguf` package (the reference writer, quantizer and dequantizer), `reference.py` for rotary
frequencies. `helpers_models.py` makes the configs and weights; `test_golden.py` shows how the three are used
together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import reference
from helpers_formats import dequantize as dequantize_kind
from helpers_formats import kind_of, set_d, size
from helpers_linear import linear_in_gguf, sizes
from helpers_models import is_norm, norm_mean

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Scales(NamedTuple):
    """Where a block of a format keeps its float16 scales, for formats that gguf reads but cannot quantize
    to."""

    d: int  # byte offset of the scale
    dmin: int | None = None  # byte offset of the scale of the minimums
    ratio: float = 0.0  # dmin / d at which uniformly random bits have mean zero: the mean of a quant


# Every other byte of these blocks may hold anything.
RANDOM_BLOCKS = {
    "Q2_K": Scales(d=80, dmin=82, ratio=1.5),
    "Q3_K": Scales(d=108),
    "Q4_K": Scales(d=0, dmin=2, ratio=7.5),
    "Q5_K": Scales(d=0, dmin=2, ratio=15.5),
    "Q6_K": Scales(d=208),
    "IQ4_NL": Scales(d=0),
    "IQ4_XS": Scales(d=0),
    "NVFP4": Scales(d=0),
    "TQ1_0": Scales(d=52),
    "TQ2_0": Scales(d=64),
    "Q1_0": Scales(d=0),
    "Q2_0": Scales(d=0),
    "IQ3_XXS": Scales(d=0),
    "IQ3_S": Scales(d=0),
    "IQ2_XXS": Scales(d=0),
    "IQ2_XS": Scales(d=0),
    "IQ2_S": Scales(d=0),
    "IQ1_S": Scales(d=0),
    "IQ1_M": Scales(d=0),
}
METADATA_TYPES = {
    str: gguf.GGUFValueType.STRING,
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
}
FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", *RANDOM_BLOCKS)


def block_size(format: str) -> tuple[int, int]:
    """Numbers and bytes in one block."""
    return size(kind_of(format))


def dequantize(blocks: Array, format: str) -> F32:
    """float32 [rows, k] that the blocks [rows, bytes] stand for, by gguf."""
    return dequantize_kind(blocks, kind_of(format))


def random_blocks(format: str, shape: tuple[int, int], std: float, seed: int) -> Bytes:
    """Random valid blocks of one of RANDOM_BLOCKS, uint8 [rows, bytes], whose values have about mean 0 and
    deviation `std`.

    `shape` is (rows, k), k a multiple of the block size. Scales differ from block to block by up to a factor
    of 3, and are negative in half the blocks of formats without a minimum."""
    rng = np.random.default_rng([seed, *format.encode()])
    n, n_bytes = block_size(format)
    rows, k = shape
    scales = RANDOM_BLOCKS[format]
    blocks = rng.integers(0, 256, size=(rows * (k // n), n_bytes), dtype=np.uint8)

    def set_scales(d: Array) -> None:
        set_d(blocks, kind_of(format), d, scales.d)
        if scales.dmin is not None:
            set_d(blocks, kind_of(format), d * scales.ratio, scales.dmin)

    set_scales(np.ones(len(blocks)))
    unit = float(dequantize(blocks, format).std())
    d = std / unit * rng.uniform(0.5, 1.5, len(blocks))
    if scales.dmin is None:
        d *= rng.choice([-1.0, 1.0], len(blocks))
    set_scales(d)
    return blocks.reshape(rows, -1)


def quantize(w: F32, format: str, seed: int = 0) -> Array:
    """A matrix [rows, k] as `format` stores it: float32, float16, or blocks uint8 [rows, bytes].

    Formats of RANDOM_BLOCKS keep only the deviation of `w`. Raises ValueError where k is no multiple of the
    block size."""
    if w.shape[-1] % block_size(format)[0]:
        raise ValueError(
            f"rows of {w.shape[-1]} are not blocks of {block_size(format)[0]}, as {format} needs"
        )
    if format == "F16":
        return w.astype(np.float16)
    if format in RANDOM_BLOCKS:
        return random_blocks(format, (w.shape[0], w.shape[1]), float(w.std()), seed)
    stored: Array = gguf.quants.quantize(w, kind_of(format))
    return stored


def interleaved_rows(n_rows: int, n_heads: int) -> npt.NDArray[np.intp]:
    """Row order of q and k in a GGUF of a Llama: row j of the file is row order[j] of Hugging Face's matrix.

    Hugging Face rotates (i, i + d/2) of a head, llama.cpp (2i, 2i + 1), so the halves of every head are
    interleaved."""
    d = n_rows // n_heads
    within = np.arange(d).reshape(2, d // 2).T.ravel()
    order: npt.NDArray[np.intp] = (np.arange(n_heads)[:, None] * d + within).ravel()
    return order


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "self_attn": "attn_sinks",  # its only part without a kind of its own: sinks
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "shared_mlp.output_linear": "ffn_down",
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
    "attention_layernorm": "attn_norm",
    "feedforward_layernorm": "ffn_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
}
_NORMS_AFTER = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


class Architecture(NamedTuple):
    """How llama.cpp's files hold a family."""

    name: str
    interleaved: bool = False  # rows of q and k pair by pair, where Hugging Face has half-split ones
    norms_after: bool = False
    ffn_norm: str = "ffn_norm"


WITH_WINDOWS = (
    "phi3", "gemma2", "gemma3_text", "cohere2", "olmo3", "gpt_oss", "exaone4", "granite_swa",
)  # fmt: skip
# By Hugging Face's model_type. Command R's rows are pair by pair in both kinds of file.
ARCHITECTURES = {
    "llama": Architecture("llama", True),
    "mistral": Architecture("llama", True),
    "ministral3": Architecture("mistral3", True),
    "mixtral": Architecture("llama", True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gpt_oss": Architecture("gpt-oss", ffn_norm="post_attention_norm"),
    "qwen3_5_text": Architecture("qwen35", ffn_norm="post_attention_norm"),
    "phi3": Architecture("phi3"),
    "smollm3": Architecture("smollm3", True),
    "granite": Architecture("granite", True),
    "olmo2": Architecture("olmo2", norms_after=True),
    "olmo3": Architecture("olmo2", norms_after=True),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", norms_after=True),
    "gemma3_text": Architecture("gemma3", norms_after=True),
    "cohere": Architecture("command-r"),
    "cohere2": Architecture("cohere2"),
    "granitemoehybrid": Architecture("granite", True),
    "granite_swa": Architecture("granite-swa", True),
    "minicpm": Architecture("minicpm", True),
    "nanbeige": Architecture("nanbeige", True),
    "iquestcoder": Architecture("llama", True),
    "arcee": Architecture("arcee", True),
    "olmo": Architecture("olmo", True),
    "seed_oss": Architecture("seed_oss", ffn_norm="post_attention_norm"),
    "ernie4_5": Architecture("ernie4_5"),
    "exaone4": Architecture("exaone4", norms_after=True),
    "glm4": Architecture("glm4"),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
    "apertus": Architecture("apertus"),
    "jais2": Architecture("jais2"),
}


def gguf_name(name: str, architecture: Architecture = ARCHITECTURES["llama"]) -> str:
    """llama.cpp's name of a tensor that Hugging Face calls `name`; experts' are parts of one tensor."""
    stem, kind = re.sub(r"\.experts\.\d+\.", ".experts.", name).rsplit(".", 1)
    if kind == "sinks":
        kind = "weight"
    names = {**_NAMES, "post_attention_layernorm": architecture.ffn_norm}
    names |= _NORMS_AFTER if architecture.norms_after else {}
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{names[part]}.{kind}"
    return f"{names[stem]}.{kind}"


def expert_parts(name: str, w: F32) -> dict[str, F32]:
    """gpt-oss's stacks of experts as a matrix [rows, k] or a bias an expert; other weights as they are."""
    if name.endswith("shared_mlp.input_linear.weight"):
        mlp = name.replace("shared_mlp.input_linear", "mlp.{}_proj")
        return {mlp.format(part): rows for part, rows in zip(("gate", "up"), np.split(w, 2), strict=True)}
    match = re.fullmatch(r"(.*\.experts\.)(gate_up|down)_proj(_bias)?", name)
    if not match:
        return {name: w}
    kind = "bias" if match[3] else "weight"
    rows = w if match[3] else w.transpose(0, 2, 1)
    if match[2] == "down":
        return {f"{match[1]}{i}.down_proj.{kind}": part for i, part in enumerate(rows)}
    return {
        f"{match[1]}{i}.{which}_proj.{kind}": part[first::2]
        for i, part in enumerate(rows)
        for first, which in enumerate(("gate", "up"))
    }


def small_tokenizer(vocab_size: int = 512) -> dict[str, Any]:
    """A SentencePiece-like vocabulary: <unk>, <s>, </s>, the 256 bytes, characters, then pairs; the earlier,
    the better.

    `vocab_size` from 350 to 1000. Any text has ids, since bytes stand in for characters it lacks."""
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    characters = ["\u2581", *letters, *letters.upper(), *"0123456789", *".,!?'\"-:;()"]
    pairs = ["\u2581" + c for c in letters] + [a + b for a in letters for b in letters]
    pieces = (characters + pairs)[: vocab_size - 259]
    kind = gguf.TokenType
    return {
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces],
        "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "types": [kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256 + [kind.NORMAL] * len(pieces),
        "bos": 1,
        "eos": 2,
        "unk": 0,
    }


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any] | None) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("none")  # llama.cpp's word for "ids in, ids out"
        return
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokenizer["tokens"])
    writer.add_token_scores(tokenizer["scores"])
    writer.add_token_types(tokenizer["types"])
    writer.add_bos_token_id(tokenizer["bos"])
    writer.add_eos_token_id(tokenizer["eos"])
    writer.add_unk_token_id(tokenizer["unk"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    if "chat_template" in tokenizer:
        writer.add_chat_template(tokenizer["chat_template"])


def _write_rope(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    settings = reference.rope_settings(config)
    usual = 0.5 if config["model_type"] == "glm4" else 1.0
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", usual))
    rope_dim = int(reference.head_dim(config) * partial)
    writer.add_rope_dimension_count(rope_dim)
    theta = settings["rope_theta"]
    if config["model_type"] == "hunyuan_v1_dense" and settings.get("alpha"):
        theta *= settings["alpha"] ** (rope_dim / (rope_dim - 2))
    writer.add_rope_freq_base(theta)
    kind = settings["rope_type"]
    if kind == "longrope":
        original = config["original_max_position_embeddings"]
        factor = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
        for length in ("long", "short"):
            factors = np.array(settings[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    if kind == "llama3":  # no key of its own: the factors are a tensor, by which frequencies are divided
        unscaled = {**config, "rope_parameters": {"rope_theta": settings["rope_theta"]}}
        plain, _ = reference.rope_frequencies(unscaled)
        scaled, _ = reference.rope_frequencies(config)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    elif kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(settings["factor"])
        writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
        if "beta_fast" in settings:
            writer.add_rope_scaling_yarn_beta_fast(settings["beta_fast"])
        if "beta_slow" in settings:
            writer.add_rope_scaling_yarn_beta_slow(settings["beta_slow"])
        # llama.cpp's converter writes transformers' attention_factor as it is; attn_factor multiplies the
        # usual magnitude, 0.1 ln(factor) + 1, and so expresses any other.
        if "attention_factor" in settings:
            writer.add_rope_scaling_yarn_attn_factor(settings["attention_factor"])
        elif "llama_4_scaling_beta" in settings:
            writer.add_rope_scaling_yarn_log_mul(settings["mscale_all_dim"])
            writer.add_attn_temperature_scale(settings["llama_4_scaling_beta"])
        elif "mscale_all_dim" in settings:
            _, magnitude = reference.rope_frequencies(config)
            writer.add_rope_scaling_attn_factors(magnitude / (0.1 * math.log(settings["factor"]) + 1.0))


def _write_family(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """The keys that only some families have."""
    kind, window = config["model_type"], config.get("sliding_window")
    if "layer_norm_eps" in config or kind == "olmo":
        writer.add_layer_norm_eps(config.get("layer_norm_eps", 1e-5))
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if window and kind in WITH_WINDOWS:
        writer.add_sliding_window(window)
    if window and kind in ("olmo3", "exaone4", "granite_swa"):
        usual = ["sliding_attention" if i % 4 else "full" for i in range(config["num_hidden_layers"])]
        types = config.get("layer_types") or usual
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in types])
    if kind == "granite_swa" and config.get("layer_rope_theta"):
        writer.add_array("granite-swa.attention.rope_pattern", [bool(x) for x in config["layer_rope_theta"]])
    if kind == "granitemoehybrid":
        writer.add_rope_scaling_finetuned(config["position_embedding_type"] == "rope")
    if kind == "nanbeige":
        writer.add_uint32("nanbeige.num_loops", config["num_loops"])
        writer.add_bool("nanbeige.skip_loop_final_norm", config["skip_loop_final_norm"])
    if kind == "olmo" and config.get("clip_qkv"):
        writer.add_clamp_kqv(config["clip_qkv"])
    if kind == "minicpm":
        writer.add_embedding_scale(float(config["scale_emb"]))
        writer.add_residual_scale(config["scale_depth"] / config["num_hidden_layers"] ** 0.5)
        writer.add_logit_scale(config["hidden_size"] / config["dim_model_base"])
    if kind in ("granite", "granitemoehybrid", "granite_swa"):
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if kind == "qwen3_5_text":
        k_heads, v_heads, k_dim, v_dim, kernel = sizes(config)
        writer.add_ssm_conv_kernel(kernel)
        writer.add_ssm_state_size(k_dim)
        writer.add_ssm_group_count(k_heads)
        writer.add_ssm_time_step_rank(v_heads)
        writer.add_ssm_inner_size(v_heads * v_dim)
        writer.add_full_attention_interval(config["full_attention_interval"])
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    if "logit_scale" in config:
        writer.add_logit_scale(config["logit_scale"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, F32],
    *,
    format: str = "F32",
    formats: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, F32]:
    """Writes a model (Hugging Face's config and weights) as a GGUF file.

    path       the file, overwritten
    format     of every matrix, one of FORMATS; norms and biases are F32, and a matrix whose rows are no
               multiple of the block size is F16, as llama.cpp falls back
    formats    exceptions, by Hugging Face's tensor name (a Q4_K_M file has Q6_K matrices); no fallback here
    tokenizer  see `small_tokenizer` (a "chat_template" may be added), None for ids in, ids out
    metadata   further keys with strings, bools, ints, floats or lists, such as {"general.sampling.temp": 0.5}

    Returns float32 weights under Hugging Face's names, in Hugging Face's row order: exactly the numbers that
    the file holds, for `reference.logits`. Formats of RANDOM_BLOCKS take nothing but its deviation from a
    matrix."""
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_name("miniature")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config.get("shared_intermediate_size") or config["intermediate_size"])
    n_heads = int(config["num_attention_heads"])
    n_kv_heads = int(config.get("num_key_value_heads") or n_heads)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config.get("num_experts_per_tok"):
        writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config or config["model_type"] == "gpt_oss":
        width = config.get("moe_intermediate_size", config["intermediate_size"])
        writer.add_expert_feed_forward_length(width)
    _write_family(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    _write_rope(writer, config)
    _write_tokenizer(writer, tokenizer)
    for key, value in (metadata or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, METADATA_TYPES[type(value)])

    held: dict[str, F32] = {}
    stacks: dict[str, list[Array]] = {}  # a tensor's parts: one, or one an expert
    stored_as: dict[str, str] = {}
    weights = {part: w for name, whole in weights.items() for part, w in expert_parts(name, whole).items()}
    for key in ("alpha_p", "alpha_n", "beta", "eps"):
        column = [float(w.ravel()[0]) for name, w in weights.items() if name.endswith(f".act_fn.{key}")]
        if column:
            writer.add_array(f"{architecture.name}.xielu.{key}", column)
    weights = {name: w for name, w in weights.items() if ".act_fn." not in name}
    for i, (name, w) in enumerate(weights.items()):
        order: npt.NDArray[np.intp] | None = None
        if architecture.interleaved and ".q_proj." in name:
            order = interleaved_rows(len(w), n_heads)
        elif architecture.interleaved and ".k_proj." in name:
            order = interleaved_rows(len(w), n_kv_heads)
        rows = w if order is None else w[order]
        if ".linear_attn." in name:
            to, rows = linear_in_gguf(config, name, w)
        else:
            to = gguf_name(name, architecture)
        if name.endswith(("conv1d.weight", "linear_attn.norm.weight")):
            writer.add_tensor(to, rows)
            held[name] = w
            continue
        if w.ndim == 1 or is_norm(name) or to.endswith("ffn_gate_inp.weight"):
            plus = np.float32(1.0 - norm_mean(config)) if is_norm(name) else np.float32(0)
            if "_exps." in to:
                stacks.setdefault(to, []).append(rows)
            else:
                writer.add_tensor(to, np.ascontiguousarray(rows + plus))
            held[name] = w
            continue
        kind = format if w.shape[1] % block_size(format)[0] == 0 else "F16"
        stored_as[to] = kind = (formats or {}).get(name, kind)
        stored = quantize(rows, kind, seed=i)
        values = dequantize(stored, kind)
        stacks.setdefault(to, []).append(stored)
        held[name] = values if order is None else values[np.argsort(order)]
    for to, parts in stacks.items():
        data = np.stack(parts) if "_exps." in to else parts[0]
        writer.add_tensor(to, data, raw_dtype=kind_of(stored_as.get(to, "F32")))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a GGUF file with other tensors. They come to `change` by name as gguf's arrays (of blocks:
    uint8), with their types in `types`."""
    reader = gguf.GGUFReader(path)
    tensors: dict[str, Any] = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    change(tensors)
    copy = path.with_name("rewritten.gguf")
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[0] if inner else None)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy
