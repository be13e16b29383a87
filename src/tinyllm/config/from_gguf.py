"""A ModelConfig from the metadata of a GGUF file, and back.

Imports the files beside it and `errors`. Read next: files/names.py (the tensors that such a config expects).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tinyllm.config.families import (
    Family,
    family,
    head_dim_of,
    is_bidirectional,
    layer_mixers,
    layer_ropes,
    layer_windows,
)
from tinyllm.config.fields import Fields, brief
from tinyllm.config.model import DeltaSizes, ModelConfig, bounded
from tinyllm.config.rope import as_float32, linear, yarn, yarn_scale
from tinyllm.errors import FormatError, UnsupportedError

_FINETUNED = "rope.scaling.finetuned"

# What says nothing about logits, and why.
GGUF_HARMLESS: dict[str, str] = {
    "tensor_data_layout": "names the layout that a converter found, not the one it wrote",
    "vocab_size": "where there are tokens, they are counted; without, it is obeyed",
    "pooling_type": "how embeddings are made of the hidden states",
    "classifier.output_labels": "what the rows of a reranker's head stand for",
    **dict.fromkeys(
        ("dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out"),
        "sizes of what stands behind the pooling, which its tensors have",
    ),
    _FINETUNED: "llama.cpp shows it and does no more; a Granite is asked for its RoPE by it, which is obeyed",
}

# The keys of GGUF metadata, behind the architecture's name, that hold a field of ModelConfig as it is. Some
# families alone know those of GGUF_OWN: the keys among their row's gguf_defaults.
GGUF_KEYS = {
    "n_layers": "block_count",
    "dim": "embedding_length",
    "context": "context_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "ff_dim": "feed_forward_length",
    "rope_dim": "rope.dimension_count",
    "rope_theta": "rope.freq_base",
}

GGUF_OWN = {
    "attention_scale": "attention.scale",
    "attention_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
    "embedding_scale": "embedding_scale",
    "residual_scale": "residual_scale",
    "logit_scale": "logit_scale",
    "local_rope_theta": "rope.freq_base_swa",
    "query_growth": "attention.temperature_scale",
    "qkv_limit": "attention.clamp_kqv",
}

GGUF_EXPERTS = {
    "n_experts": "expert_count",
    "n_experts_used": "expert_used_count",
    "ff_dim": "expert_feed_forward_length",
}

_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"  # transformers' mscale_all_dim, beside a mscale of 1

_LAYER_EPS = "attention.layer_norm_epsilon"
_GGUF_EPS = {"rms": "attention.layer_norm_rms_epsilon", "layer": _LAYER_EPS, "plain": _LAYER_EPS}
_XIELU = ("xielu.alpha_p", "xielu.alpha_n", "xielu.beta", "xielu.eps")
_ROPE_PATTERN = "attention.rope_pattern"


class Tensor(Protocol):
    """What `config_from_gguf` asks of a tensor; `loaders.TensorInfo` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_f32(self) -> npt.NDArray[np.float32]: ...


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The config of a GGUF model; `tensors` tell whether the output is tied and hold factors of RoPE.

    With no tensors (a file that holds only a vocabulary) the config describes the model the vocabulary is
    for. Raises UnsupportedError (an unknown architecture or feature) or FormatError (missing or absurd
    values).
    """
    architecture = metadata.get("general.architecture")
    if architecture is None:
        raise FormatError("general.architecture is missing")
    row = family(architecture, "gguf")
    prefix = f"{architecture}."
    fields = Fields({**{prefix + k: v for k, v in row.gguf_defaults.items()}, **metadata}, prefix)
    dim = bounded("dim", fields.whole(GGUF_KEYS["dim"]))
    n_layers = bounded("n_layers", fields.whole(GGUF_KEYS["n_layers"]))
    guessing_layers = fields.whole("nextn_predict_layers", 0) if row.guessing else 0
    n_layers = bounded("n_layers", n_layers - max(guessing_layers, 0))
    n_heads = bounded("n_heads", fields.whole(GGUF_KEYS["n_heads"]))
    context = bounded("context", fields.whole(GGUF_KEYS["context"]))
    head_dim = bounded("head_dim", fields.whole(GGUF_KEYS["head_dim"], head_dim_of(dim, n_heads)))
    value_dim = fields.whole("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedError(
            f"values of {value_dim} beside keys of {head_dim} dimensions a head are not supported"
        )
    rope_dim = bounded("rope_dim", fields.whole(GGUF_KEYS["rope_dim"], head_dim))
    theta = fields.number(GGUF_KEYS["rope_theta"], 10000.0)
    factors, rope_scale, original_context = _gguf_rope(fields, row, rope_dim, theta, context)
    if "rope_freqs.weight" in tensors:
        factors = multiplied(factors, "rope_freqs.weight", tensors, rope_dim)
    long_factors = None
    longrope = {"rope_factors_long.weight", "rope_factors_short.weight"} & set(tensors)
    if longrope or (tensors and fields.get("rope.scaling.type") == "longrope"):
        long_factors = multiplied(factors, "rope_factors_long.weight", tensors, rope_dim)
        factors = multiplied(factors, "rope_factors_short.weight", tensors, rope_dim)
        if original_context is None and "rope.scaling.original_context_length" in row.gguf_defaults:
            original_context = context  # as a MiniCPM's
        if original_context is None:
            raise FormatError(f"{prefix}rope.scaling.original_context_length is missing")
    bidirectional = not fields.flag("attention.causal", not is_bidirectional(architecture))

    def own(field: str, default: float) -> float:
        """A number that only some families know; elsewhere its key is unknown."""
        key = GGUF_OWN[field]
        return fields.number(key, default) if key in row.gguf_defaults else default

    logit_scale, local_theta = own("logit_scale", 1.0) or 1.0, own("local_rope_theta", theta)
    if not row.local_rope and fields.number(GGUF_OWN["local_rope_theta"], theta) != theta:
        raise UnsupportedError(
            f"{prefix}{GGUF_OWN['local_rope_theta']}, a RoPE of windowed layers, is not supported for this "
            "architecture"
        )
    windows = layer_windows(
        n_layers,
        _gguf_window(fields, row, bidirectional),
        _gguf_period(fields, n_layers, row.window_period),
    )
    config = ModelConfig(
        architecture=architecture,
        n_layers=n_layers,
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=fields.whole(GGUF_KEYS["n_kv_heads"], n_heads),
        head_dim=head_dim,
        vocab_size=_gguf_vocab_size(fields, metadata, tensors),
        context=context,
        norm_eps=fields.number(_GGUF_EPS[row.features.get("norm_kind", "rms")]),
        rope_theta=theta,
        rope_dim=rope_dim,
        rope_factors=factors,
        rope_scale=rope_scale,
        attention_scale=fields.number(GGUF_OWN["attention_scale"], 0.0)
        or _gguf_scale(architecture, n_layers, dim, n_heads, head_dim),
        tied="output.weight" not in tensors,
        original_context=original_context,
        attention_cap=own("attention_cap", 0.0),
        logit_cap=own("logit_cap", 0.0),
        embedding_scale=math.sqrt(dim) if row.scaled_embedding else own("embedding_scale", 1.0) or 1.0,
        residual_scale=own("residual_scale", 1.0) or 1.0,
        logit_scale=1 / logit_scale if row.divides_logits else logit_scale,
        query_growth=own("query_growth", 0.0),
        qkv_limit=own("qkv_limit", 0.0),
        xielu=_gguf_xielu(fields, n_layers) if row.features.get("activation") == "xielu" else (),
        bidirectional=bidirectional,
        windows=windows,
        long_rope_factors=long_factors,
        **_gguf_feed_forward(fields, row),
        **{
            **layer_ropes(
                row, windows, n_layers, local_theta, fields.whole("attention.sliding_window", 0) > 0
            ),
            **_no_ropes(fields, row, n_layers),
            **row.features,
        },
    )
    if "ssm.state_size" in row.gguf_defaults:
        config = replace(config, **_gguf_linear(fields, n_layers), guessing_layers=guessing_layers)
    if row.optional_qk_norm and "blk.0.attn_q_norm.weight" in tensors:
        config = replace(config, qk_norm=row.optional_qk_norm)
    if "num_loops" in row.gguf_defaults:
        fields.get("skip_loop_final_norm")  # between loops
        if fields.whole("num_loops") != 1 or fields.whole("attention.head_dim", head_dim) != head_dim:
            raise UnsupportedError(
                f"{prefix}num_loops {fields.whole('num_loops')} is not supported, only 1: its layers would "
                "be gone through again"
            )
    fields.refuse_unknown(GGUF_HARMLESS)
    return config


def config_to_gguf(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The keys that say a model in GGUF, without the architecture that opens each: what `config_from_gguf`
    reads as `config` again, but for the scaling of RoPE.

    What the keys cannot say is left out, so read them back and compare.
    """
    row = family(architecture, "gguf")
    own = {field: key for field, key in GGUF_OWN.items() if key in row.gguf_defaults}
    experts = GGUF_EXPERTS if config.n_experts else {}
    keys = {
        key: getattr(config, field) for table in (GGUF_KEYS, own, experts) for field, key in table.items()
    }
    if row.divides_logits:
        keys[GGUF_OWN["logit_scale"]] = 1 / config.logit_scale
    if any(config.windows):
        window = max(config.windows)
        keys["attention.sliding_window"] = 2 * (window - 1) if config.bidirectional else window
    if config.bidirectional:
        keys["attention.causal"] = False
    if config.xielu:
        columns = zip(*config.xielu, strict=True)
        keys |= {key: np.array(column, np.float32) for key, column in zip(_XIELU, columns, strict=True)}
    if row.rope_switch:
        keys[_FINETUNED] = "usual" in (config.ropes or ("usual",))
    if _ROPE_PATTERN in row.gguf_defaults:
        keys["attention.sliding_window_pattern"] = np.array(config.windows) > 0
        keys[_ROPE_PATTERN] = np.array(config.ropes or ("usual",) * config.n_layers) != "none"
    return {
        **{key: value for key, value in keys.items() if value is not None},
        "attention.value_length": config.head_dim,
        _GGUF_EPS[config.norm_kind]: config.norm_eps,
        "vocab_size": config.vocab_size,
    }


def _gguf_linear(fields: Fields, n_layers: int) -> dict[str, Any]:
    """Which layers are Gated DeltaNet, and its sizes, under the names of a state space model."""
    fields.get("rope.dimension_sections")  # cut for pictures; the positions of text are all alike
    listed, period = fields.get("attention.recurrent_layers"), fields.whole("full_attention_interval")
    if isinstance(listed, np.ndarray) and listed.size >= n_layers:
        mixers = layer_mixers(n_layers, [bool(linear) for linear in listed[:n_layers]])
    else:
        mixers = layer_mixers(n_layers, period)
    if "delta" not in mixers:
        return {"mixers": mixers}
    inner, v_heads = fields.whole("ssm.inner_size"), fields.whole("ssm.time_step_rank")
    if v_heads < 1 or inner % v_heads:
        raise FormatError(f"ssm.inner_size {inner} is no multiple of ssm.time_step_rank {v_heads}")
    k_heads, k_dim = fields.whole("ssm.group_count"), fields.whole("ssm.state_size")
    delta = DeltaSizes(k_heads, v_heads, k_dim, inner // v_heads, fields.whole("ssm.conv_kernel"), tiled=True)
    return {"mixers": mixers, "delta": delta}


def _no_ropes(fields: Fields, row: Family, n_layers: int) -> dict[str, Any]:
    pattern = fields.get(_ROPE_PATTERN) if _ROPE_PATTERN in row.gguf_defaults else None
    if pattern is not None:
        if not isinstance(pattern, np.ndarray) or pattern.shape != (n_layers,):
            raise FormatError(f"{fields.prefix}{_ROPE_PATTERN} is no list of {n_layers}")
        return (
            {} if pattern.all() else {"ropes": tuple("usual" if rotated else "none" for rotated in pattern)}
        )
    if row.rope_switch and not fields.flag(_FINETUNED, True):
        return {"ropes": ("none",) * n_layers}
    if not row.no_rope_interval:
        return {}
    skipped = [(layer + 1) % row.no_rope_interval == 0 for layer in range(n_layers)]
    return {"ropes": tuple("none" if none else "usual" for none in skipped)}


def _gguf_xielu(fields: Fields, n_layers: int) -> tuple[tuple[float, float, float, float], ...]:
    columns = []
    for key in _XIELU:
        values = fields.get(key)
        if values is None:
            fields.wrong(key, None, "")
        if not isinstance(values, np.ndarray) or values.shape != (n_layers,) or values.dtype.kind != "f":
            raise FormatError(f"{fields.prefix}{key} must be {n_layers} numbers, not {brief(values)}")
        columns.append(values.tolist())
    return tuple((a, b, c, d) for a, b, c, d in zip(*columns, strict=True))


def _gguf_scale(architecture: str, n_layers: int, dim: int, n_heads: int, head_dim: int) -> float:
    """What scores are multiplied by where the file does not say. GGUF files of Gemma leave out that the
    largest of Gemma 2 (46 layers) and of Gemma 3 (62) divide by the root of dim / n_heads instead."""
    largest = (architecture, n_layers) in (("gemma2", 46), ("gemma3", 62))
    return 1 / math.sqrt(dim / n_heads if largest else head_dim)


def _gguf_window(fields: Fields, row: Family, bidirectional: bool) -> int:
    """The positions that a window reaches to one side, the token itself among them: of models that look to
    both, files of Gemma state the whole."""
    size = fields.whole("attention.sliding_window", 0)
    if not size or not bidirectional:
        return size
    if "use_bidirectional_attention" not in row.json_defaults:
        raise UnsupportedError(
            f"a window ({fields.prefix}attention.sliding_window) beside attention to both sides is supported "
            "for Gemma 3 alone"
        )
    return size // 2 + 1


def _gguf_period(fields: Fields, n_layers: int, default: int) -> int | list[bool]:
    """Every so-many-th layer has no window, or by layer whether it has one."""
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray) and pattern.size == n_layers:
        return [bool(windowed) for windowed in pattern]
    return fields.whole("attention.sliding_window_pattern", default)


def _gguf_feed_forward(fields: Fields, row: Family) -> dict[str, Any]:
    """The width of the feed-forward or of an expert's, and the fields of a mixture of experts."""
    ff_dim, n_experts = fields.whole(GGUF_KEYS["ff_dim"]), fields.whole(GGUF_EXPERTS["n_experts"], 0)
    if not n_experts:
        return {"ff_dim": ff_dim}
    if "gguf" not in row.experts_in:
        raise UnsupportedError("a mixture of experts (expert_count) is not supported for this architecture")
    return {
        "ff_dim": fields.whole(GGUF_EXPERTS["ff_dim"], ff_dim),
        "n_experts": n_experts,
        "n_experts_used": fields.whole(GGUF_EXPERTS["n_experts_used"]),
        "norm_topk_prob": fields.flag("expert_weights_norm", True),
    }


def _gguf_vocab_size(fields: Fields, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        return len(tokens)
    embedding = tensors.get("token_embd.weight")
    return fields.whole("vocab_size", embedding.shape[0] if embedding is not None else None)


def _gguf_rope(
    fields: Fields, row: Family, rope_dim: int, theta: float, context: int
) -> tuple[tuple[float, ...] | None, float, int | None]:
    """(rope_factors, rope_scale, original_context) from the rope.scaling keys."""
    kind = fields.get("rope.scaling.type")
    if kind is None:
        kind = "linear"
    factor = fields.number("rope.scaling.factor", 0.0) or fields.number("rope.scale_linear", 0.0) or 1.0
    given = fields.get("rope.scaling.original_context_length") is not None
    original = fields.whole("rope.scaling.original_context_length", context)
    multiplier = fields.number("rope.scaling.attn_factor", 0.0) or 1.0
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedError(
            f"rope.scaling.type {brief(kind)} is not supported; supported: none, linear, yarn, longrope"
        )
    if kind == "none":
        return None, multiplier, None
    if kind == "longrope":  # its factors are two tensors
        return None, multiplier, original
    if kind == "linear":
        return linear(factor, rope_dim), multiplier, original if given else None
    # The complete factor on cos and sin where given: converters write transformers' attention_factor here.
    attention_factor = fields.number("rope.scaling.yarn_attn_factor", 0.0) or None
    beta_fast = fields.number("rope.scaling.yarn_beta_fast", 0.0) or 32.0
    beta_slow = fields.number("rope.scaling.yarn_beta_slow", 0.0) or 1.0
    extrapolation = fields.number("rope.scaling.yarn_ext_factor", -1.0)
    if extrapolation >= 0 and extrapolation != 1:
        raise UnsupportedError(f"YaRN with yarn_ext_factor {extrapolation:g} is not supported, only 1")
    factors = yarn(factor, rope_dim, theta, original, beta_fast, beta_slow, row.yarn_truncate)
    m_all = fields.number(_LOG_MULTIPLIER) if _LOG_MULTIPLIER in row.gguf_defaults else 0.0
    usual = yarn_scale(factor, 1.0, m_all)
    return factors, (attention_factor or usual) * multiplier, original


def multiplied(
    factors: tuple[float, ...] | None, name: str, tensors: Mapping[str, Tensor], rope_dim: int
) -> tuple[float, ...]:
    """GGUF's rope_freqs.weight and its like: one more divisor for each pair."""
    tensor = tensors.get(name)
    if tensor is None:
        raise FormatError(f"{name} is missing")
    if tensor.shape != (rope_dim // 2,):
        raise FormatError(f"{name} has shape {tensor.shape}, expected ({rope_dim // 2},)")
    more = tensor.read_f32()
    if not ((more >= 1e-6) & (more <= 1e30)).all():
        raise FormatError(f"{name}: a RoPE factor is not a positive number between 1e-6 and 1e30")
    return as_float32(more * np.array(factors or (1.0,)))
