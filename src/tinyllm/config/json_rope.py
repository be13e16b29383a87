"""What config.json says of rotary positions, in its old and new places, read as transformers reads it.

A file says RoPE's parameters in `rope_parameters`, or in `rope_scaling` and `rope_theta`; OLMo 3 and Gemma 3
have them by kind of layer. What is said twice and differently is refused. Imports the files beside it and
`errors`. Read next: rope.py, the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinyllm.config.families import Family
from tinyllm.config.fields import Fields, agree, brief, ignored
from tinyllm.config.model import bounded
from tinyllm.config.rope import as_float32, check_scaling, linear, llama3, yarn, yarn_scale
from tinyllm.errors import FormatError, UnsupportedError


@dataclass(frozen=True)
class Rope:
    """What config.json says of rotary positions, as ModelConfig's fields have it."""

    theta: float
    dim: int
    factors: tuple[float, ...] | None = None
    scale: float = 1.0
    original_context: int | None = None
    local_theta: float = 10000.0
    long_factors: tuple[float, ...] | None = None
    query_growth: float = 0.0
    ntk_factor: float = 0.0


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": (
        "factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor",
    ),
}  # fmt: skip


def json_rope(fields: Fields, config: Mapping[str, Any], row: Family, head_dim: int, context: int) -> Rope:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` as older files spell it. Formulas and
    defaults are those of transformers. `fields` has the family's defaults beside the file's `config`."""
    said, local = _rope_by_kind(fields, config, row) if row.rope_by_kind else _rope(fields, config, row)
    table = Fields(said)
    default = fields.number("rope_theta", 10000.0)
    theta = _theta_of_layers(fields, row, table.number("rope_theta", default))
    _agree_on_theta(config, table, theta, fields.table["model_type"])
    kind, older = table.get("rope_type"), table.get("type")
    if row.rope_kinds and (older in ("su", "yarn") or kind in ("su", "yarn")):
        kind = "longrope"  # as Phi-3's older files call it
    else:
        agree("rope_type", kind, older)
        kind = kind or older or "default"
    if not isinstance(kind, str) or kind not in (row.rope_kinds or _ROPE_KEYS):
        raise UnsupportedError(
            f"RoPE type {brief(kind)} is not supported; supported: " + ", ".join(row.rope_kinds or _ROPE_KEYS)
        )
    partial = table.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if partial != 1 and "partial_rotary_factor" not in row.json_defaults:
        raise UnsupportedError("partial_rotary_factor is not supported for this architecture")
    rope_dim = int(head_dim * partial) if 0 < partial <= 1 else 0
    growth = table.number("llama_4_scaling_beta", 0.0) if row.growing_queries else 0.0
    if row.alpha_theta and kind == "dynamic" and table.get("alpha"):
        theta, kind = as_theta(theta * _alpha(table, rope_dim)), "default"
    sections = ("mrope_section", "mrope_interleaved") if row.rope_sections else ()
    table.refuse_unknown((*_ROPE_KEYS[kind], *sections, "finetuned", "max_position_embeddings"))
    local_theta = theta if local is None else local
    rope = Rope(theta, bounded("rope_dim", rope_dim), local_theta=local_theta, query_growth=growth)
    original = table.whole("original_max_position_embeddings", context)
    if not row.rope_by_kind and fields.get("original_max_position_embeddings") is not None:
        original = fields.whole("original_max_position_embeddings")
    if kind == "default":
        return rope
    if kind == "dynamic":
        check_scaling(table.number("factor"))
        if rope_dim < 4:
            raise UnsupportedError(f"a dynamic RoPE of {rope_dim} dimensions is not supported")
        return replace(rope, ntk_factor=table.number("factor"), original_context=context)
    if kind == "linear":
        return replace(rope, factors=linear(table.number("factor"), rope_dim))
    if kind == "longrope":
        return _longrope(rope, table, original, context)
    if kind == "llama3":
        low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
        factors = llama3(table.number("factor"), rope_dim, theta, original, low, high)
        return replace(rope, factors=factors, original_context=original)
    factor = table.number("factor", context / max(original, 1))
    beta_fast, beta_slow = table.number("beta_fast", 0.0) or 32.0, table.number("beta_slow", 0.0) or 1.0
    truncate = table.flag("truncate", True)
    if row.rope_by_kind and not truncate:
        ignored("truncate", truncate, f"{fields.table['model_type']}, whose RoPE goes by the kind of layer")
        truncate = True
    factors = yarn(factor, rope_dim, theta, original, beta_fast, beta_slow, truncate)
    scale = yarn_scale(factor, table.number("mscale", 0.0), table.number("mscale_all_dim", 0.0))
    return replace(
        rope, factors=factors, scale=table.number("attention_factor", scale), original_context=original
    )


def _alpha(table: Fields, rope_dim: int) -> float:
    """What Hunyuan's fixed alpha multiplies theta by. Keys of other scalings beside it mean nothing."""
    for key in _ROPE_KEYS["yarn"]:
        table.get(key)
    if not 1e-3 <= table.number("alpha") <= 1e6 or rope_dim < 4:
        raise FormatError(f"RoPE's alpha {table.number('alpha'):g} for {rope_dim} dimensions")
    return float(table.number("alpha") ** (rope_dim / (rope_dim - 2)))


def as_theta(theta: float) -> float:
    """As a GGUF file would hold it, so that both kinds of file mean the same bits."""
    return float(np.float32(theta))


def _theta_of_layers(fields: Fields, row: Family, theta: float) -> float:
    """The one theta of Granite's layer_rope_theta, whose zeros are layers without RoPE."""
    listed = fields.get("layer_rope_theta") if "layer_rope_theta" in row.json_defaults else None
    thetas = {value for value in listed if value} if isinstance(listed, list) else set()
    if not thetas:
        return theta
    if len(thetas) > 1 or type(one := thetas.pop()) not in (int, float):
        raise UnsupportedError(
            f"layer_rope_theta {brief(listed)} is not supported, only one number and zeros"
        )
    return float(one)


def _rope(fields: Fields, config: Mapping[str, Any], row: Family) -> tuple[dict[str, Any], None]:
    """RoPE's parameters where all layers have the same: rope_scaling, else rope_parameters, else the
    family's."""
    scaling, parameters = _tables(fields, config)
    table = scaling or parameters
    if table is None:
        table = row.json_defaults.get("rope_parameters", {})
    if any(isinstance(value, dict) for value in table.values()):
        raise UnsupportedError("RoPE parameters that differ by kind of layer are not supported")
    if scaling and parameters:
        for key, value in parameters.items():
            agree(f"{brief(key)} of RoPE", scaling.get(key), value)
            if key not in scaling and key not in ("type", "rope_type", "rope_theta"):
                raise FormatError(
                    f"{brief(key)} is in rope_parameters, but not in rope_scaling, which transformers reads; "
                    "delete one of the two"
                )
    return table, None


def _rope_by_kind(fields: Fields, config: Mapping[str, Any], row: Family) -> tuple[dict[str, Any], float]:
    """RoPE's parameters of layers that attend to everything, and theta of those that have a window:
    `rope_parameters` by kind of layer; rope_scaling and a rope_theta of the file's go to the first kind."""
    scaling, parameters = _tables(fields, config)
    kind = fields.table["model_type"]
    full: dict[str, Any] = {"rope_type": "default"}
    local: dict[str, Any] = {"rope_type": "default"}
    kinds = {"full_attention", "sliding_attention"}
    if parameters and not kinds & parameters.keys():
        if scaling:
            raise FormatError(f"rope_parameters beside rope_scaling need full_attention in a {kind}")
        ignored("rope_parameters", parameters, f"{kind} where it is not by kind of layer")
    elif parameters:
        full = parameters.get("full_attention") or full
        local = parameters.get("sliding_attention") or local
        if not isinstance(full, dict) or not isinstance(local, dict) or parameters.keys() - kinds:
            raise FormatError(f"rope_parameters must be an object by kind of layer, not {brief(parameters)}")
    if scaling and "type" in scaling and "rope_type" not in scaling:
        raise UnsupportedError(
            f"rope_scaling's type {brief(scaling['type'])}: transformers does not read that old name in a "
            f"{kind}; call it rope_type"
        )
    rest = Fields(local)
    if (rest.get("rope_type") or rest.get("type") or "default") != "default":
        raise UnsupportedError("RoPE parameters that differ by kind of layer are not supported")
    theta = float(row.json_defaults["rope_theta"])
    if "rope_local_base_freq" in row.json_defaults:
        theta = fields.number("rope_local_base_freq", row.json_defaults["rope_local_base_freq"])
        agree("rope_local_base_freq", config.get("rope_local_base_freq"), rest.get("rope_theta"))
    theta = rest.number("rope_theta", theta)
    rest.refuse_unknown(("finetuned", "max_position_embeddings"))
    return {**full, **(scaling or {})}, theta


def _tables(fields: Fields, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the file has as rope_scaling and as rope_parameters."""
    for key in ("rope_scaling", "rope_parameters"):
        fields.get(key)
        if not isinstance(config.get(key) or {}, dict):
            raise FormatError(f"{key} must be an object, not {brief(config[key])}")
    said = (config.get("rope_scaling"), config.get("rope_parameters"))
    return tuple(table if isinstance(table, dict) else None for table in said)  # false says as much as null


def _agree_on_theta(config: Mapping[str, Any], table: Fields, theta: float, kind: str) -> None:
    """rope_theta beside RoPE's parameters: refused where the file says both, warned of where it is the
    family's own parameters that go first."""
    stated = config.get("rope_theta")
    if stated is None or stated == theta:
        return
    if config.get("rope_scaling") or config.get("rope_parameters"):
        agree("rope_theta", stated, table.get("rope_theta"))
    ignored("rope_theta", stated, f"{kind} without rope_parameters")


def _longrope(rope: Rope, fields: Fields, original: int, context: int) -> Rope:
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
