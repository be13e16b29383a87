"""A ModelConfig from the object in a Hugging Face directory's config.json.

What transformers' class of the family reads is obeyed as it does; what it does not read is not applied, and
a warning names it unless it says what is computed anyway; what the family's row does not know is refused.
Imports the files beside it and `errors`. Read next: json_rope.py, its part on RoPE; files/names.py (the
tensors that such a config expects).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tinyllm.config.families import (
    JSON_HARMLESS,
    MAMBA_KEYS,
    OUTER_HARMLESS,
    Family,
    family,
    head_dim_of,
    layer_mixers,
    layer_ropes,
    layer_windows,
)
from tinyllm.config.fields import Fields, agree, brief, ignored
from tinyllm.config.generation import LEGACY_KEYS
from tinyllm.config.json_rope import json_rope
from tinyllm.config.model import DeltaSizes, ModelConfig, bounded
from tinyllm.errors import FormatError, UnsupportedError


def config_from_json(config: Mapping[str, Any]) -> ModelConfig:
    """The config of a Hugging Face model, from the object in config.json; of a model that also reads images,
    its language model's.

    Raises UnsupportedError (an unknown model_type or feature) or FormatError (missing or absurd values).
    Warns of each key that transformers would not read either, where it asks for something else.
    """
    architecture = config.get("model_type")
    if architecture is None:
        raise FormatError("config.json has no model_type")
    if family(architecture, "hf").text_of:
        return _language_model(_text_config(architecture, config))
    names = config.get("architectures") or []
    if not isinstance(names, list) or (
        names and not any(str(name).endswith("ForCausalLM") for name in names)
    ):
        raise UnsupportedError(f"architectures {brief(names)} is no language model (...ForCausalLM)")
    if architecture == "mistral" and "layer_types" in config:  # transformers' AutoConfig takes it so
        config = {**config, "model_type": "ministral"}
    return _language_model(config)


def _text_config(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's config inside that of a model which also reads images. Whether the output is tied
    is said outside of it: the head is not part of the inner model."""
    text, fields = config.get("text_config"), Fields(config)
    if not isinstance(text, dict):
        raise FormatError(f"config.json of {brief(architecture)} has no text_config")
    tied = fields.flag("tie_word_embeddings", True)
    fields.refuse_unknown((*JSON_HARMLESS, *OUTER_HARMLESS))
    if text.get("tie_word_embeddings") not in (None, tied):
        ignored("tie_word_embeddings", text["tie_word_embeddings"], f"text_config of a {architecture}")
    return {
        "model_type": family(architecture, "hf").text_of,
        **text,
        "tie_word_embeddings": tied,
    }


def _language_model(config: Mapping[str, Any]) -> ModelConfig:
    architecture = config["model_type"]
    row = family(architecture, "hf")
    if row.text_of:
        raise FormatError(f"config.json has no text_config of a language model, but of {brief(architecture)}")
    fields = Fields({**row.json_defaults, **config})
    dim = bounded("dim", fields.whole("hidden_size"))
    n_layers = bounded("n_layers", fields.whole("num_hidden_layers"))
    n_heads = bounded("n_heads", fields.whole("num_attention_heads"))
    context = bounded("context", fields.whole("max_position_embeddings"))
    head_dim = bounded("head_dim", fields.whole("head_dim", head_dim_of(dim, n_heads)))
    _check_activation(fields, row)

    def own(key: str, default: float) -> float:
        """A number that only some families know; elsewhere its key is unknown."""
        return fields.number(key, default) if key in row.json_defaults else default

    def own_flag(key: str) -> bool:
        return key in row.json_defaults and fields.flag(key, False)

    rope = json_rope(fields, config, row, head_dim, context)
    ropes = _json_ropes(fields, row, n_layers)
    has_window = "sliding_window" in row.json_defaults and _window_size(fields, row) > 0
    windows = _json_windows(fields, row, n_layers, ropes) if "sliding_window" in row.json_defaults else ()
    _check_layer_kinds(fields, row, n_layers)
    _check_loops(fields, row)
    bidirectional = not fields.flag("is_causal", True) or own_flag("use_bidirectional_attention")
    attention_bias, output_bias, ffn_bias = map(own_flag, row.bias_keys)
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
        norm_eps=row.norm_eps
        or fields.number("layer_norm_eps" if "layer_norm_eps" in row.json_defaults else "rms_norm_eps", 1e-6),
        rope_theta=rope.theta,
        rope_dim=rope.dim,
        rope_factors=rope.factors,
        rope_scale=rope.scale,
        attention_scale=own("attention_multiplier", 1 / math.sqrt(divisor)),
        tied=fields.flag("tie_word_embeddings", False),
        original_context=rope.original_context,
        attention_bias=row.qkv_bias or attention_bias,
        output_bias=output_bias,
        ffn_bias=ffn_bias,
        qkv_limit=own("clip_qkv", 0.0),
        attention_cap=own("attn_logit_softcapping", 0.0),
        logit_cap=own("final_logit_softcapping", 0.0),
        embedding_scale=math.sqrt(dim)
        if row.scaled_embedding
        else own("embedding_multiplier", 1.0) * own("scale_emb", 1.0),
        residual_scale=own("residual_multiplier", 1.0) * _residual_scale(fields, row, n_layers),
        logit_scale=own("logit_scale", 1.0)
        * (logits_scaling if row.multiplies_logits else 1 / logits_scaling)
        * (own("dim_model_base", dim) / dim),
        query_growth=rope.query_growth,
        bidirectional=bidirectional,
        windows=windows,
        long_rope_factors=rope.long_factors,
        ntk_factor=rope.ntk_factor,
        **_json_feed_forward(fields, row),
        **{**layer_ropes(row, windows, n_layers, rope.local_theta, has_window), **row.features},
    )
    if ropes:
        result = replace(result, ropes=ropes)
    if "linear_num_value_heads" in row.json_defaults:
        result = replace(result, **_json_linear(fields, n_layers))
    if row.optional_qk_norm and own_flag("use_qk_norm"):
        result = replace(result, qk_norm=row.optional_qk_norm)
    if own_flag("use_post_norm"):
        result = replace(result, norm_place="both")
    _warn_of_ignored(fields, row)
    fields.refuse_unknown((*JSON_HARMLESS, *LEGACY_KEYS))
    return result


def _warn_of_ignored(fields: Fields, row: Family) -> None:
    """Of what transformers' class does not read, where it differs from what is computed."""
    kind = fields.table["model_type"]
    for key, agreeing in row.json_ignored.items():
        value = fields.get(key)
        if value is not None and value not in agreeing:
            ignored(key, value, kind)
    rope = fields.table.get("rope_scaling") or fields.table.get("rope_parameters") or {}
    for key, other in row.json_twice.items():
        value, said = fields.get(key), fields.table.get(other, rope.get(other))
        if value is not None and said is not None and value != said:
            ignored(key, value, f"{kind} (but {other}: {brief(said)})")


def _check_activation(fields: Fields, row: Family) -> None:
    """Raises UnsupportedError for an activation other than the family's. "gelu" is what Gemma's first files
    call the tanh form."""
    name = "hidden_activation" if "hidden_activation" in row.json_defaults else "hidden_act"
    ungated = {"relu_squared": ("relu2",), "xielu": ("xielu",)}
    allowed: tuple[str, ...] = ungated.get(row.features.get("activation", ""), ("silu", "swish"))
    if row.features.get("activation") == "gelu":
        allowed = ("gelu_pytorch_tanh",) if name == "hidden_activation" else ("gelu_pytorch_tanh", "gelu")
    activation = fields.get(name) or allowed[0]
    if activation not in allowed:
        raise UnsupportedError(f"{name} {brief(activation)} is not supported, only {allowed[0]}")


def _json_feed_forward(fields: Fields, row: Family) -> dict[str, Any]:
    """The width of the feed-forward or of an expert's, and the fields of a mixture of experts."""
    own = row.json_defaults
    names = ("moe_intermediate_size", "shared_intermediate_size", "intermediate_size")
    ff_dim = fields.whole(next(name for name in names if name in own or name == names[-1]))
    if "shared_intermediate_size" in own:
        fields.get("intermediate_size")  # the width of an expert
        if fields.whole("num_local_experts"):
            raise UnsupportedError("experts beside a shared one (num_local_experts) are not supported")
    if "hf" not in row.experts_in:
        return {"ff_dim": ff_dim}
    if "decoder_sparse_step" in own and (
        fields.whole("decoder_sparse_step") != 1 or fields.get("mlp_only_layers")
    ):
        raise UnsupportedError(
            "dense layers between layers of experts (decoder_sparse_step, mlp_only_layers) are not supported"
        )
    fields.get("intermediate_size")  # the width of such a dense layer
    for key, only in {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}.items():
        if key in own and fields.number(key) != only:
            raise UnsupportedError(f"{key} {fields.number(key):g} is not supported, only {only:g}")
    quantized = fields.get("quantization_config") if "quantization_config" in own else None
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if method not in (None, "mxfp4"):
        raise UnsupportedError(f"quantization_config with {brief(method)} is not supported, only mxfp4")
    one, other = fields.get("num_local_experts"), fields.get("num_experts")  # two names of one thing
    agree("num_experts, also called num_local_experts,", one, other)
    return {
        "ff_dim": ff_dim,
        "n_experts": fields.whole("num_local_experts" if one is not None else "num_experts"),
        "n_experts_used": fields.whole("num_experts_per_tok"),
        "norm_topk_prob": fields.flag("norm_topk_prob", True) if "norm_topk_prob" in own else True,
    }


def _window_size(fields: Fields, row: Family) -> int:
    """The positions that a window reaches to one side, the token itself among them. transformers halves
    what a Gemma 3 says that looks to both; of other models it lets both sides see one more."""
    size = fields.whole("sliding_window", 0)
    if size and "use_bidirectional_attention" in row.json_defaults:
        size = size // 2 + 1 if fields.flag("use_bidirectional_attention", False) else size
    return size + 1 if size and not fields.flag("is_causal", True) else size


_WINDOW_KEYS = (
    "use_sliding_window", "layer_types", "max_window_layers", "sliding_window_pattern",
    "_sliding_window_pattern",
)  # fmt: skip


def _json_windows(fields: Fields, row: Family, n_layers: int, ropes: tuple[Any, ...]) -> tuple[int, ...]:
    """Windows by layer, by those of the keys that the family's class reads. Of the others it warns where they
    would make a difference."""
    size = _window_size(fields, row)
    said = {key: fields.get(key) for key in _WINDOW_KEYS if fields.get(key) is not None}
    read = {key: value for key, value in said.items() if key in row.json_defaults}
    windows = _windows(Fields(read), row, size, n_layers, ropes)
    for key in said.keys() - read.keys():
        if _windows(Fields({**read, key: said[key]}), row, size, n_layers, ropes) != windows:
            ignored(key, said[key], fields.table["model_type"])
    return windows


def _windows(
    fields: Fields, row: Family, size: int, n_layers: int, ropes: tuple[Any, ...]
) -> tuple[int, ...]:
    """By a list, else by the family's rule."""
    switch, types = fields.get("use_sliding_window"), fields.get("layer_types")
    kinds = ("full_attention", "sliding_attention")
    if types is not None and (
        not isinstance(types, list) or len(types) != n_layers or any(kind not in kinds for kind in types)
    ):
        raise UnsupportedError(f"layer_types {brief(types)} is not supported, only a list of {kinds}")
    if types is not None and (switch is not False or row.windows_without_rope):
        return layer_windows(n_layers, size, [kind == "sliding_attention" for kind in types])
    if switch is False:
        return ()
    if row.windows_without_rope:
        return layer_windows(n_layers, size, [rope == "none" for rope in ropes])
    if not size:
        return ()
    pattern = fields.whole("_sliding_window_pattern", row.window_period)
    pattern = fields.whole("sliding_window_pattern", pattern)
    windows = layer_windows(n_layers, size, pattern, row.full_first)
    first = fields.whole("max_window_layers", 0)
    windows = tuple(0 if layer < first else window for layer, window in enumerate(windows))
    return windows if any(windows) else ()


def _check_loops(fields: Fields, row: Family) -> None:
    if "num_loops" in row.json_defaults and fields.whole("num_loops") != 1:
        raise UnsupportedError(
            f"num_loops {fields.whole('num_loops')} is not supported, only 1: its layers would be gone "
            "through again"
        )


def _residual_scale(fields: Fields, row: Family, n_layers: int) -> float:
    """MiniCPM's, which goes with the root of the depth."""
    if "scale_depth" not in row.json_defaults:
        return 1.0
    return fields.number("scale_depth") / math.sqrt(n_layers)


def _check_layer_kinds(fields: Fields, row: Family, n_layers: int) -> None:
    """Of a family that mixes attention with other layers: they must be attention, all of them."""
    if "shared_intermediate_size" not in row.json_defaults:
        return
    listed, other = fields.get("layer_types"), fields.get("layers_block_type")
    agree("layer_types, also called layers_block_type,", listed, other)
    kinds = listed if listed is not None else other
    known = isinstance(kinds, list) and len(kinds) == n_layers
    if not known or any(kind not in ("attention", "full_attention") for kind in kinds or ()):
        raise UnsupportedError(
            f"layer_types {brief(kinds)} is not supported, only attention in each of {n_layers} layers: "
            "Mamba layers are not"
        )
    for key in MAMBA_KEYS:
        fields.get(key)


def _json_ropes(fields: Fields, row: Family, n_layers: int) -> tuple[Any, ...]:
    """Which layers have RoPE, where a list or a switch says so; (): all, or the windows decide."""
    if row.no_rope_interval:
        return _json_no_ropes(fields, n_layers)
    if "position_embedding_type" in row.json_defaults:
        kind = fields.get("position_embedding_type")
        if kind not in (None, "rope", "nope"):
            raise UnsupportedError(
                f"position_embedding_type {brief(kind)} is not supported, only rope and nope"
            )
        return () if kind == "rope" else ("none",) * n_layers
    thetas = fields.get("layer_rope_theta") if "layer_rope_theta" in row.json_defaults else None
    if thetas is None:
        return ()
    if not isinstance(thetas, list) or len(thetas) != n_layers:
        raise FormatError(f"layer_rope_theta {brief(thetas)} is no list of {n_layers} numbers")
    return () if all(thetas) else tuple("usual" if theta else "none" for theta in thetas)


def _json_linear(fields: Fields, n_layers: int) -> dict[str, Any]:
    """Which layers are Gated DeltaNet, its sizes, and how many layers guess further tokens."""
    types, period = fields.get("layer_types"), fields.whole("full_attention_interval")
    kinds = ("full_attention", "linear_attention")
    if types is not None and (
        not isinstance(types, list) or len(types) != n_layers or any(kind not in kinds for kind in types)
    ):
        raise UnsupportedError(f"layer_types {brief(types)} is not supported, only a list of {kinds}")
    mixers = layer_mixers(n_layers, period if types is None else [kind == kinds[1] for kind in types])
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    k_heads, v_heads, k_dim, v_dim, kernel = (fields.whole(f"linear_{name}") for name in names)
    try:
        sizes = DeltaSizes(k_heads, v_heads, k_dim, v_dim, kernel)
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"{', '.join(f'linear_{name}' for name in names)}: {error}") from None
    for key, only in (("attention_bias", False), ("is_causal", True)):
        if fields.flag(key, only) != only:
            raise UnsupportedError(f"{key} {not only} is not supported beside linear attention")
    return {
        "mixers": mixers,
        "delta": sizes if "delta" in mixers else None,
        "guessing_layers": fields.whole("mtp_num_hidden_layers", 0),
    }


def _json_no_ropes(fields: Fields, n_layers: int) -> tuple[Any, ...]:
    """SmolLM3's list of layers with RoPE (1) and without (0); without a list, every so-many-th has none."""
    interval, listed = fields.whole("no_rope_layer_interval"), fields.get("no_rope_layers")
    if listed is None:
        listed = [int((layer + 1) % max(interval, 1) != 0) for layer in range(n_layers)]
    if not isinstance(listed, list) or len(listed) != n_layers or any(flag not in (0, 1) for flag in listed):
        raise FormatError(f"no_rope_layers {brief(listed)} is no list of 0 and 1 for {n_layers} layers")
    return tuple("usual" if flag else "none" for flag in listed)
