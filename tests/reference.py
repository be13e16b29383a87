"""Llama's forward pass in plain float64 numpy: the truth that the C core is compared with.

Written from the papers, not from any implementation: RMSNorm (arXiv 1910.07467), rotary embeddings
(2104.09864), grouped queries (2305.13245), SwiGLU (2002.05202), YaRN (2309.00071), the Llama 3.1 frequency
rule (2407.21783), mixtures of experts (1701.06538, 2401.04088). Imports numpy alone. Weights come under
Hugging Face's names, as do the config's keys;
`helpers_models.py` makes some."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
Config = Mapping[str, Any]


def head_dim(config: Config) -> int:
    """Width of one attention head; hidden_size / n_heads unless the config says otherwise."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_settings(config: Config) -> dict[str, Any]:
    """The rotary settings as one dict, from the spellings in use: `rope_parameters` (with its own
    rope_theta), or `rope_theta` beside `rope_scaling`, whose kind is called `rope_type` or, in older files,
    `type`."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    settings.setdefault("rope_type", settings.pop("type", "default"))
    settings.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return settings


def rope_frequencies(config: Config) -> tuple[F64, float]:
    """Angle per position, float64 [head_dim / 2] in radians, and the factor on cos and sin."""
    settings = rope_settings(config)
    d = head_dim(config)
    theta = float(settings["rope_theta"])
    freqs = theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    kind = settings["rope_type"]
    if kind == "default":
        return freqs, 1.0
    factor = float(settings["factor"])
    if kind == "linear":
        return freqs / factor, 1.0
    original = float(settings["original_max_position_embeddings"])
    if kind == "llama3":
        # How often a wave turns within the original context decides: rarely, it is slowed down by `factor`;
        # often, it is kept; in between, the two are mixed in proportion.
        turns = original * freqs / (2 * np.pi)
        low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return freqs * (keep + (1 - keep) / factor), 1.0
    if kind == "yarn":
        # The same mix, but in proportion to the pair's index, between the (whole) indices where a wave turns
        # beta_fast and beta_slow times within the original context.
        def index_at(turns: float) -> float:
            return d / 2 * math.log(original / (2 * math.pi * turns), theta)

        first = max(math.floor(index_at(settings.get("beta_fast", 32))), 0)
        last = min(math.ceil(index_at(settings.get("beta_slow", 1))), d - 1)
        slow = np.clip((np.arange(d // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
        return freqs * (1 - slow + slow / factor), _yarn_magnitude(settings, factor)
    raise ValueError(f"no such rotary scaling: {kind!r}")


def _yarn_magnitude(settings: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor on cos and sin: as given, or 0.1 ln(factor) + 1, or the ratio of two of those with
    multipliers."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])

    def magnitude(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return magnitude(settings["mscale"]) / magnitude(settings["mscale_all_dim"])
    return magnitude(1.0)


def rms_norm(x: F64, weight: Array, eps: float) -> F64:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    scaled: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return scaled


def int8_activations(x: F64) -> F64:
    """What a quantized matrix sees of x [n, k]: in groups of 32, whole multiples in [-127, 127] of max |x| /
    127."""
    groups = x.reshape(x.shape[0], -1, 32)
    step = np.abs(groups).max(axis=-1, keepdims=True) / 127
    whole = np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step > 0))
    seen: F64 = (whole * step).reshape(x.shape)
    return seen


def rotate(x: F64, cos: F64, sin: F64) -> F64:
    """Turns pair (i, i + d/2) of every head by its angle. x [n, heads, d]; cos, sin [n, d / 2]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q: F64, k: F64, v: F64) -> F64:
    """Causal attention. q [n, heads, d], k and v [n, kv_heads, d] -> [n, heads, d]; query head h reads
    key-value head h // (heads / kv_heads)."""
    n, n_heads, d = q.shape
    group = n_heads // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(d)
    scores[:, np.triu(np.ones((n, n), dtype=bool), k=1)] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    out: F64 = np.einsum("hij,jhd->ihd", p, v)
    return out


class FfnNames(NamedTuple):
    """What a family calls the parts of a layer's feed-forward, after "model.layers.N."."""

    router: str  # empty: one block, no mixture of experts
    block: str  # with {} for an expert's number
    gate: str
    up: str
    down: str


def ffn_names(config: Config) -> FfnNames:
    if config["model_type"] == "mixtral":
        return FfnNames("block_sparse_moe.gate", "block_sparse_moe.experts.{}.", "w1", "w3", "w2")
    if config["model_type"] == "qwen3_moe":
        return FfnNames("mlp.gate", "mlp.experts.{}.", "gate_proj", "up_proj", "down_proj")
    return FfnNames("", "mlp.", "gate_proj", "up_proj", "down_proj")


def routes(config: Config, scores: F64) -> tuple[npt.NDArray[np.intp], F64]:
    """The experts that tokens go to, [n, used], and their weights, from the router's scores [n, experts]."""
    used = int(config["num_experts_per_tok"])
    chosen = np.argsort(-scores, axis=-1, kind="stable")[:, :used]
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = np.take_along_axis(p / p.sum(axis=-1, keepdims=True), chosen, axis=-1)
    if config.get("norm_topk_prob", config["model_type"] == "mixtral"):
        weights /= weights.sum(axis=-1, keepdims=True)
    return chosen, weights


def logits(
    config: Config, weights: Mapping[str, Array], ids: Sequence[int], *, quantized: Container[str] = ()
) -> F64:
    """Logits after every one of the n tokens `ids`, float64 [n, vocab_size].

    `weights` holds `model.embed_tokens.weight` [vocab_size, hidden_size], ..., any float dtype, as a
    model.safetensors does; a missing `lm_head.weight` means tied embeddings. A bias is used where there is
    one. `quantized` names the matrices whose products take `int8_activations`, as tinyllm's do where a file's
    matrix is quantized."""
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    n, d = len(ids), head_dim(config)
    n_heads = int(config["num_attention_heads"])
    n_kv_heads = int(config.get("num_key_value_heads") or n_heads)
    eps = float(config["rms_norm_eps"])

    def linear(x: F64, name: str) -> F64:
        weight = name + ".weight"
        seen = int8_activations(x) if weight in quantized else x
        out: F64 = seen @ w[weight].T + w.get(name + ".bias", 0.0)
        return out

    names = ffn_names(config)
    freqs, magnitude = rope_frequencies(config)
    angles = np.outer(np.arange(n), freqs)
    cos, sin = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    x = w["model.embed_tokens.weight"][np.asarray(ids)]
    for layer in range(int(config["num_hidden_layers"])):
        at = f"model.layers.{layer}."
        h = rms_norm(x, w[at + "input_layernorm.weight"], eps)
        q = linear(h, at + "self_attn.q_proj").reshape(n, n_heads, d)
        k = linear(h, at + "self_attn.k_proj").reshape(n, n_kv_heads, d)
        v = linear(h, at + "self_attn.v_proj").reshape(n, n_kv_heads, d)
        mixed = attention(rotate(q, cos, sin), rotate(k, cos, sin), v).reshape(n, n_heads * d)
        x = x + linear(mixed, at + "self_attn.o_proj")
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"], eps)
        chosen, shares = np.zeros((n, 1), np.intp), np.ones((n, 1))
        if names.router:
            chosen, shares = routes(config, linear(h, at + names.router))
        for expert in np.unique(chosen):
            tokens, place = np.nonzero(chosen == expert)
            block = at + names.block.format(expert)
            gate, up = linear(h[tokens], block + names.gate), linear(h[tokens], block + names.up)
            out = linear(gate / (1 + np.exp(-gate)) * up, block + names.down)
            x[tokens] += shares[tokens, place][:, None] * out
    h = rms_norm(x, w["model.norm.weight"], eps)
    return linear(h, "lm_head" if "lm_head.weight" in w else "model.embed_tokens")
