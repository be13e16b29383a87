"""A ModelConfig from the object in a Hugging Face directory's config.json.

Imports the files beside it and `errors`. Read next: files/names.py (the tensors that such a config expects).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinyllm.config.families import JSON_HARMLESS, Family, family, head_dim_of, layer_ropes, layer_windows
from tinyllm.config.fields import Fields, brief
from tinyllm.config.generation import LEGACY_KEYS
from tinyllm.config.model import ModelConfig, bounded
from tinyllm.config.rope import as_float32, check_scaling, linear, llama3, yarn, yarn_scale
from tinyllm.errors import FormatError, UnsupportedError


def config_from_json(config: Mapping[str, Any]) -> ModelConfig:
    """The config of a Hugging Face model, from the object in config.json; of a model that also reads images,
    its language model's.

    Raises UnsupportedError (an unknown model_type or feature) or FormatError (missing or absurd values).
    """
    architecture = config.get("model_type")
    if architecture is None:
        raise FormatError("config.json has no model_type")
    row = family(architecture, "hf")
    if row.text_of:
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise FormatError(f"config.json of {brief(architecture)} has no text_config")
        return config_from_json({"model_type": row.text_of, **text, "architectures": None})
    names = config.get("architectures") or []
    if not isinstance(names, list) or (
        names and not any(str(name).endswith("ForCausalLM") for name in names)
    ):
        raise UnsupportedError(f"architectures {brief(names)} is no language model (...ForCausalLM)")
    fields = Fields({**row.json_defaults, **config})
    dim = bounded("dim", fields.whole("hidden_size"))
    n_layers = bounded("n_layers", fields.whole("num_hidden_layers"))
    n_heads = bounded("n_heads", fields.whole("num_attention_heads"))
    context = bounded("context", fields.whole("max_position_embeddings"))
    head_dim = bounded("head_dim", fields.whole("head_dim", head_dim_of(dim, n_heads)))
    gelu = row.features.get("activation") == "gelu"
    activation = fields.get("hidden_activation") if gelu else None
    activation = activation or fields.get("hidden_act") or "silu"
    if activation not in (("gelu_pytorch_tanh",) if gelu else ("silu", "swish")):
        only = "gelu_pytorch_tanh" if gelu else "silu"
        raise UnsupportedError(f"hidden_act {brief(activation)} is not supported, only {only}")

    def own(key: str, default: float) -> float:
        """A number that only some families know; elsewhere its key is unknown."""
        return fields.number(key, default) if key in row.json_defaults else default

    rope = _json_rope(fields, row, head_dim, context)
    windows = _json_windows(fields, row, n_layers) if "sliding_window" in row.json_defaults else ()
    attention_bias = fields.flag("attention_bias", False)
    divisor = max(own("query_pre_attn_scalar", head_dim), 0.0)
    logits_scaling = own("logits_scaling", 1.0)
    if not (divisor > 0 and logits_scaling > 0):
        raise FormatError("query_pre_attn_scalar and logits_scaling must be above 0")
    result = ModelConfig(
        architecture=architecture,
        n_layers=n_layers,
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=fields.whole("num_key_value_heads", n_heads),
        head_dim=head_dim,
        vocab_size=fields.whole("vocab_size"),
        context=context,
        norm_eps=fields.number(
            "layer_norm_eps" if "layer_norm_eps" in row.json_defaults else "rms_norm_eps", 1e-6
        ),
        rope_theta=rope.theta,
        rope_dim=rope.dim,
        rope_factors=rope.factors,
        rope_scale=rope.scale,
        attention_scale=own("attention_multiplier", 1 / math.sqrt(divisor)),
        tied=fields.flag("tie_word_embeddings", False),
        original_context=rope.original_context,
        attention_bias=row.qkv_bias or attention_bias,
        output_bias=attention_bias,
        ffn_bias=fields.flag("mlp_bias", False),
        attention_cap=own("attn_logit_softcapping", 0.0),
        logit_cap=own("final_logit_softcapping", 0.0),
        embedding_scale=math.sqrt(dim) if row.scaled_embedding else own("embedding_multiplier", 1.0),
        residual_scale=own("residual_multiplier", 1.0),
        logit_scale=own("logit_scale", 1.0) / logits_scaling,
        query_growth=rope.query_growth,
        windows=windows,
        long_rope_factors=rope.long_factors,
        **_json_feed_forward(fields, row),
        **{**layer_ropes(row, windows, n_layers, rope.local_theta), **row.features},
    )
    if row.no_rope_interval:
        result = replace(result, ropes=_json_no_ropes(fields, n_layers))
    if row.optional_qk_norm and fields.flag("use_qk_norm", False):
        result = replace(result, qk_norm=row.optional_qk_norm)
    fields.refuse_unknown((*JSON_HARMLESS, *LEGACY_KEYS, *row.json_known))
    return result


def _json_feed_forward(fields: Fields, row: Family) -> dict[str, Any]:
    """The width of the feed-forward or of an expert's, and the fields of a mixture of experts."""
    own = row.json_defaults
    ff_dim = fields.whole("moe_intermediate_size" if "moe_intermediate_size" in own else "intermediate_size")
    if "hf" not in row.experts_in:
        return {"ff_dim": ff_dim}
    if "decoder_sparse_step" in own and (
        fields.whole("decoder_sparse_step") != 1 or fields.get("mlp_only_layers")
    ):
        raise UnsupportedError("dense layers between layers of experts are not supported")
    fields.get("intermediate_size")  # the width of such a dense layer
    for key, only in {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}.items():
        if key in own and fields.number(key) != only:
            raise UnsupportedError(f"{key} {fields.number(key):g} is not supported, only {only:g}")
    n_experts = fields.get("num_local_experts")  # two names of one thing
    return {
        "ff_dim": ff_dim,
        "n_experts": fields.whole("num_local_experts" if n_experts is not None else "num_experts"),
        "n_experts_used": fields.whole("num_experts_per_tok"),
        "norm_topk_prob": fields.flag("norm_topk_prob", True),
    }


def _json_windows(fields: Fields, row: Family, n_layers: int) -> tuple[int, ...]:
    """Windows by layer: from `layer_types` where they are listed, else by the family's rule."""
    window, switch = fields.whole("sliding_window", 0), fields.get("use_sliding_window")
    first = fields.whole("max_window_layers", 0) if "max_window_layers" in row.json_defaults else 0
    period = fields.whole(
        "sliding_window_pattern", fields.whole("_sliding_window_pattern", row.window_period)
    )
    types = fields.get("layer_types")
    if switch is False:
        return ()
    if types is None:
        windows = layer_windows(n_layers, window, period)
        return tuple(0 if layer < first else w for layer, w in enumerate(windows))
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != n_layers or any(kind not in kinds for kind in types):
        raise UnsupportedError(f"layer_types {brief(types)} is not supported, only a list of {kinds}")
    return layer_windows(n_layers, window, [kind == "sliding_attention" for kind in types])


def _json_no_ropes(fields: Fields, n_layers: int) -> tuple[Any, ...]:
    """SmolLM3's list of layers with RoPE (1) and without (0); without a list, every so-many-th has none."""
    interval, listed = fields.whole("no_rope_layer_interval"), fields.get("no_rope_layers")
    if listed is None:
        listed = [int((layer + 1) % max(interval, 1) != 0) for layer in range(n_layers)]
    if not isinstance(listed, list) or len(listed) != n_layers or any(flag not in (0, 1) for flag in listed):
        raise FormatError(f"no_rope_layers {brief(listed)} is no list of 0 and 1 for {n_layers} layers")
    return tuple("usual" if flag else "none" for flag in listed)


@dataclass(frozen=True)
class _Rope:
    """What config.json says of rotary positions, as ModelConfig's fields have it."""

    theta: float
    dim: int
    factors: tuple[float, ...] | None = None
    scale: float = 1.0
    original_context: int | None = None
    local_theta: float = 10000.0
    long_factors: tuple[float, ...] | None = None
    query_growth: float = 0.0


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": (
        "factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor",
    ),
}  # fmt: skip


def _json_rope(config: Fields, row: Family, head_dim: int, context: int) -> _Rope:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` as older files spell it. Formulas and
    defaults are those of transformers."""
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    table = scaling or parameters or {}
    if not isinstance(table, dict):
        raise FormatError(f"rope_scaling must be an object, not {brief(table)}")
    said = {key: value for key, value in config.table.items() if value is not row.json_defaults.get(key)}
    if scaling and isinstance(parameters := said.get("rope_parameters"), dict):
        for key, value in table.items():
            _agree(f"{brief(key)} of RoPE", value, parameters.get(key))
    theta = config.number("rope_theta", 10000.0)
    local_theta = None  # as the others
    if "rope_local_base_freq" in row.json_defaults and config.get("rope_local_base_freq") is not None:
        local_theta = config.number("rope_local_base_freq")
    if any(isinstance(value, dict) for value in table.values()):  # by kind of layer
        local = table.get("sliding_attention", {})
        table = table.get("full_attention", {})
        if not isinstance(local, dict) or not isinstance(table, dict) or local.get("rope_type") != "default":
            raise UnsupportedError("RoPE parameters that differ by kind of layer are not supported")
        local_theta = Fields(local).number("rope_theta", theta if local_theta is None else local_theta)
    fields = Fields(table)
    if scaling or "rope_parameters" in said:
        _agree("rope_theta", said.get("rope_theta"), fields.get("rope_theta"))
    base = fields.number("rope_theta", theta)
    theta = theta if said.get("rope_theta") is not None else base
    kind, older = fields.get("rope_type"), fields.get("type")
    partial = fields.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if partial != 1 and "partial_rotary_factor" not in row.json_defaults:
        raise UnsupportedError("partial_rotary_factor is not supported for this architecture")
    rope_dim = int(head_dim * partial) if 0 < partial <= 1 else 0
    if fields.get("short_factor") is not None:  # Phi-3 calls it "su" or "yarn" in older files
        kind = "longrope"
    else:
        _agree("rope_type", kind, older)
        kind = kind or older or "default"
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        why = " (its frequencies change with the length of the text)" if kind == "dynamic" else ""
        raise UnsupportedError(
            f"RoPE type {brief(kind)} is not supported{why}; supported: {', '.join(_ROPE_KEYS)}"
        )
    growth = fields.number("llama_4_scaling_beta", 0.0) if row.growing_queries else 0.0
    fields.refuse_unknown((*_ROPE_KEYS[kind], "finetuned", "max_position_embeddings"))
    local_theta = theta if local_theta is None else local_theta
    rope = _Rope(theta, bounded("rope_dim", rope_dim), local_theta=local_theta, query_growth=growth)
    stated = config.get("original_max_position_embeddings")
    original = fields.whole("original_max_position_embeddings", context)
    if stated is not None:
        original = config.whole("original_max_position_embeddings")
    if kind == "default":
        return rope
    if kind == "linear":
        return replace(rope, factors=linear(fields.number("factor"), rope_dim))
    if kind == "longrope":
        return _longrope(rope, fields, original, context)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        factors = llama3(fields.number("factor"), rope_dim, theta, original, low, high)
        return replace(rope, factors=factors, original_context=original)
    factor = fields.number("factor", context / max(original, 1))
    beta_fast, beta_slow = fields.number("beta_fast", 0.0) or 32.0, fields.number("beta_slow", 0.0) or 1.0
    factors = yarn(factor, rope_dim, theta, original, beta_fast, beta_slow, fields.flag("truncate", True))
    scale = yarn_scale(factor, fields.number("mscale", 0.0), fields.number("mscale_all_dim", 0.0))
    return replace(
        rope, factors=factors, scale=fields.number("attention_factor", scale), original_context=original
    )


def _agree(what: str, one: Any, other: Any) -> None:
    """Refuses what a config.json says twice, in an old and a new place, and says differently."""
    if one is not None and other is not None and one != other:
        raise FormatError(f"{what} is both {brief(one)} and {brief(other)}; delete the one that is wrong")


def _longrope(rope: _Rope, fields: Fields, original: int, context: int) -> _Rope:
    """LongRoPE (arXiv 2402.13753): a divisor a pair, one set up to the original context, one past it."""
    short, long = (_factors(fields, key, rope.dim) for key in ("short_factor", "long_factor"))
    factor = fields.number("factor", context / max(original, 1))
    check_scaling(factor, original=original)
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return replace(
        rope,
        factors=short,
        long_factors=long,
        scale=fields.number("attention_factor", scale),
        original_context=original,
    )


def _factors(fields: Fields, key: str, rope_dim: int) -> tuple[float, ...]:
    values = fields.get(key)
    if not isinstance(values, list) or len(values) != rope_dim // 2:
        raise FormatError(f"{key} must be a list of {rope_dim // 2} numbers, not {brief(values)}")
    if any(type(value) not in (int, float) or not abs(value) < 1e30 for value in values):
        raise FormatError(f"{key} holds what is no number: {brief(values)}")
    return as_float32(np.array(values, np.float64))
