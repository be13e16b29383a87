"""A model's hyperparameters and sampling defaults, read from GGUF metadata or Hugging Face's JSON files.

Every kind of rotary scaling becomes one vector of divisors (`rope_factors`), so nothing after this file
knows their names. A new family is a row in families.py. A feature that a file asks for and that is not known
is refused, never ignored. Imports `families` and `errors`. Read next: loaders/names.py (the tensors such a
config expects).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from .errors import FormatError, UnsupportedError
from .families import JSON_HARMLESS, Family, family

# Far above any real model, far below what would overflow or exhaust anything. {field: (least, most)}
_BOUNDS = {
    "n_layers": (1, 1024),
    "dim": (1, 1 << 20),
    "n_heads": (1, 1 << 14),
    "n_kv_heads": (1, 1 << 14),
    "head_dim": (1, 1 << 12),
    "ff_dim": (1, 1 << 22),
    "vocab_size": (1, 1 << 23),
    "context": (1, 1 << 28),
    "rope_dim": (2, 1 << 12),
}

# Likewise numbers, which the arithmetic has as float32: what is less than its least normal number is 0 there,
# or has a reciprocal past its largest. A field's default passes in any case.
_LEAST = float(np.finfo(np.float32).tiny)
_RANGES = {
    "norm_eps": (_LEAST, 1.0),
    "rope_theta": (1.0, 1e15),  # below 1, angles would grow with i, past all bounds
    "local_rope_theta": (1.0, 1e15),
    "rope_scale": (_LEAST, 1e6),
    "attention_scale": (_LEAST, 1e6),
    "attention_cap": (_LEAST, 1e6),
    "logit_cap": (_LEAST, 1e6),
    "query_growth": (_LEAST, 1e6),
    "embedding_scale": (1e-9, 1e6),
    "residual_scale": (1e-9, 1e6),
    "logit_scale": (1e-9, 1e6),
}

MAX_ANGLE = 1 << 30  # radians of RoPE, up to which the core's sine and cosine are as exact as they say

MAX_EXPERTS = 4096  # of a layer
MAX_EXPERTS_IN_ALL = 1 << 15  # however small, each takes time and memory of its own

# What sampling takes of the settings that a model may advise: lowest, highest, what a special value means.
ADVISED_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 1000, "0 is greedy"),
    "top_k": (0, 2**31 - 1, "0 turns it off"),
    "top_p": (0, 1, "1 turns it off"),
    "min_p": (0, 1, "0 turns it off"),
    "typical_p": (0, 1, "1 turns it off"),
    "repetition_penalty": (0.001, 1000, "1 turns it off"),
}


def _brief(value: Any) -> str:
    """A value from a file for a message: its start, quoted, unprintable characters escaped."""
    return repr(str(value)[:80])


def _bounded(name: str, value: int) -> int:
    least, most = _BOUNDS[name]
    if type(value) is not int or not least <= value <= most:
        raise FormatError(f"{name} is {value!r}; a model has {least} to {most}")
    return value


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know beside the weights.

    The angle of pair i (of `rope_dim` / 2) at position p is p * rope_theta^(-2i / rope_dim) /
    rope_factors[i]; cos and sin are multiplied by `rope_scale`. Pairs are (i, i + rope_dim / 2): half-split
    order. Raises FormatError for values that no model can have.
    """

    architecture: str
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ff_dim: int
    vocab_size: int
    context: int  # positions the model was trained for
    norm_eps: float
    rope_theta: float
    rope_dim: int  # the leading dimensions of a head that are rotated
    rope_factors: tuple[float, ...] | None  # float32 values; None: all 1
    rope_scale: float
    attention_scale: float  # scores are q.k times this
    tied: bool  # the output matrix is the embedding
    original_context: int | None = None  # positions before a scaling of RoPE extended them
    attention_bias: bool | None = None  # whether q, k and v have biases; None: the file's tensors decide
    output_bias: bool | None = None  # likewise o
    ffn_bias: bool | None = None  # likewise gate, up and down
    # Beyond Llama. The defaults are Llama's.
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_place: Literal["before", "after", "both"] = "before"  # of attention and of the feed-forward part
    activation: Literal["silu", "gelu", "clamped_swiglu"] = "silu"  # of the gate; GELU in its tanh form
    # Queries and keys normed before RoPE: head by head, with the same or with its own weights, or as a whole
    qk_norm: Literal["head", "heads", "all"] | None = None
    parallel: bool = False  # attention and feed-forward read the same x
    attention_cap: float = 0.0  # scores become cap * tanh(score / cap); 0: none
    logit_cap: float = 0.0  # likewise the logits, after logit_scale
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add
    logit_scale: float = 1.0
    # Queries at position p are multiplied by 1 + query_growth * ln(1 + floor(p / original_context)); 0: not
    query_growth: float = 0.0
    windows: tuple[
        int, ...
    ] = ()  # by layer: positions a token attends to, itself among them; 0: all. (): all 0
    ropes: tuple[Literal["usual", "local", "none"], ...] = ()  # by layer; (): all usual
    local_rope_theta: float | None = None  # of "local" layers, which have neither factors nor rope_scale
    long_rope_factors: tuple[float, ...] | None = None  # in place of rope_factors past original_context
    n_experts: int = 0  # of every layer's feed-forward, each of ff_dim; 0: it is one dense block
    n_experts_used: int = 0  # by a token: those its router scores highest
    norm_topk_prob: bool = True  # their weights, a softmax over all scores, are divided by their sum
    expert_bias: bool = False  # the router and the experts have biases
    sinks: bool = False  # a score more in each head's softmax, with no value

    def __post_init__(self) -> None:
        for name in _BOUNDS:
            _bounded(name, getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise FormatError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise FormatError(
                f"rope_dim is {self.rope_dim}; it must be even and at most head_dim, {self.head_dim}"
            )
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value != getattr(ModelConfig, name, least) and not least <= value <= most:  # or NaN
                raise FormatError(f"{name} is {value!r}; it must be from {least:.3g} to {most:g}")
        if self.query_growth and not self.original_context:
            raise FormatError("queries scaled by position need the original context of their RoPE scaling")
        for name, per_layer in (("windows", self.windows), ("ropes", self.ropes)):
            if per_layer and len(per_layer) != self.n_layers:
                raise FormatError(f"{name} are {len(per_layer)} for {self.n_layers} layers")
        if not all(0 <= window <= _BOUNDS["context"][1] for window in self.windows):
            raise FormatError(f"an attention window is out of range: {_brief(self.windows)}")
        for factors in (self.rope_factors, self.long_rope_factors):
            if factors is not None and len(factors) != self.rope_dim // 2:
                raise FormatError(f"{len(factors)} RoPE factors for a rope_dim of {self.rope_dim}")
            if not all(1e-6 <= factor <= 1e30 for factor in factors or ()):
                raise FormatError("a RoPE factor is not a positive number between 1e-6 and 1e30")
            if self.context > MAX_ANGLE * min(factors or (1.0,)):
                raise FormatError(
                    f"a RoPE factor of {min(factors or ()):g} turns pairs by more than {MAX_ANGLE} radians "
                    f"within the context of {self.context} tokens"
                )
        if self.original_context is not None and not 1 <= self.original_context <= _BOUNDS["context"][1]:
            raise FormatError(f"original_context is {self.original_context}")
        if (
            not 0 <= self.n_experts <= MAX_EXPERTS
            or not bool(self.n_experts) <= self.n_experts_used <= self.n_experts
        ):
            raise FormatError(
                f"{self.n_experts_used} experts used of {self.n_experts}; a model has up to {MAX_EXPERTS} "
                "and uses 1 or more of them"
            )
        if self.n_layers * self.n_experts > MAX_EXPERTS_IN_ALL:
            raise FormatError(
                f"{self.n_layers} layers of {self.n_experts} experts are {self.n_layers * self.n_experts}; a "
                f"model has up to {MAX_EXPERTS_IN_ALL} in all"
            )

    @property
    def default_context(self) -> int:
        """The context to use where none is asked for: what the model was trained for, or the original one
        where a longer one has other RoPE factors."""
        return (self.long_rope_factors and self.original_context) or self.context

    def with_context(self, context: int) -> ModelConfig:
        """The same model for sequences of at most `context` tokens, which choose between short and long RoPE
        factors."""
        long = self.long_rope_factors and context > (self.original_context or self.context)
        factors = self.long_rope_factors if long else self.rope_factors
        return replace(self, context=context, rope_factors=factors)


class Tensor(Protocol):
    """What `config_from_gguf` asks of a tensor; `loaders.TensorInfo` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_f32(self) -> npt.NDArray[np.float32]: ...


class _Fields:
    """Typed access to a table of hyperparameters that remembers which keys were asked for."""

    def __init__(self, table: Mapping[str, Any], prefix: str = "") -> None:
        """`prefix` opens every key, here and in messages."""
        self.table = table
        self.prefix = prefix
        self.seen: set[str] = set()

    def get(self, key: str) -> Any:
        """The value, or None where the key is absent."""
        self.seen.add(self.prefix + key)
        return self.table.get(self.prefix + key)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number. One value per layer is accepted where all are equal."""
        value = self.get(key)
        if isinstance(value, np.ndarray):
            if value.size == 0 or (value != value[0]).any():
                raise UnsupportedError(
                    f"{self.prefix}{key} differs from layer to layer, which is not supported"
                )
            value = value[0].item()
        if value is None:
            value = default
        if type(value) is not int:
            self.wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if type(value) not in (int, float) or not abs(value) < 1e300:
            self.wrong(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            value = default
        if type(value) is not bool:
            self.wrong(key, value, "true or false")
        return value

    def wrong(self, key: str, value: Any, kind: str) -> NoReturn:
        """Raises the FormatError for a value that is not of its kind."""
        if value is None:
            raise FormatError(f"the hyperparameter {self.prefix}{key} is missing")
        raise FormatError(f"the hyperparameter {self.prefix}{key} must be {kind}, not {_brief(value)}")

    def refuse_unknown(self, harmless: Iterable[str]) -> None:
        """Raise UnsupportedError for a key that nobody asked for and that switches something on."""
        known = self.seen | {self.prefix + key for key in harmless}
        for key, value in self.table.items():
            if key.startswith(self.prefix) and key not in known and _is_set(value):
                raise UnsupportedError(
                    f"{_brief(key)} is set ({_brief(value)}), a feature that is not supported"
                )


def _is_set(value: Any) -> bool:
    return bool(value.any()) if isinstance(value, np.ndarray) else bool(value)


_GGUF_HARMLESS = (
    "tensor_data_layout",
    "vocab_size",
    "expert_used_count",
    "pooling_type",
    "rope.scaling.finetuned",
)

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
}
GGUF_EXPERTS = {
    "n_experts": "expert_count",
    "n_experts_used": "expert_used_count",
    "ff_dim": "expert_feed_forward_length",
}


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
    fields = _Fields({**{prefix + k: v for k, v in row.gguf_defaults.items()}, **metadata}, prefix)
    dim = _bounded("dim", fields.whole(GGUF_KEYS["dim"]))
    n_layers = _bounded("n_layers", fields.whole(GGUF_KEYS["n_layers"]))
    n_heads = _bounded("n_heads", fields.whole(GGUF_KEYS["n_heads"]))
    context = _bounded("context", fields.whole(GGUF_KEYS["context"]))
    head_dim = _bounded("head_dim", fields.whole(GGUF_KEYS["head_dim"], _head_dim(dim, n_heads)))
    value_dim = fields.whole("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedError(
            f"values of {value_dim} beside keys of {head_dim} dimensions a head are not supported"
        )
    rope_dim = _bounded("rope_dim", fields.whole(GGUF_KEYS["rope_dim"], head_dim))
    theta = fields.number(GGUF_KEYS["rope_theta"], 10000.0)
    factors, rope_scale, original_context = _gguf_rope(fields, row, rope_dim, theta, context)
    if "rope_freqs.weight" in tensors:
        factors = _multiply(factors, "rope_freqs.weight", tensors, rope_dim)
    long_factors = None
    longrope = {"rope_factors_long.weight", "rope_factors_short.weight"} & set(tensors)
    if longrope or (tensors and fields.get("rope.scaling.type") == "longrope"):
        long_factors = _multiply(factors, "rope_factors_long.weight", tensors, rope_dim)
        factors = _multiply(factors, "rope_factors_short.weight", tensors, rope_dim)
        if original_context is None:
            raise FormatError(f"{prefix}rope.scaling.original_context_length is missing")
    if not fields.flag("attention.causal", True):
        raise UnsupportedError("attention that is not causal is not supported")

    def own(field: str, default: float) -> float:
        """A number that only some families know; elsewhere its key is unknown."""
        key = GGUF_OWN[field]
        return fields.number(key, default) if key in row.gguf_defaults else default

    logit_scale, local_theta = own("logit_scale", 1.0) or 1.0, own("local_rope_theta", theta)
    windows = _windows(
        n_layers,
        fields.whole("attention.sliding_window", 0),
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
        windows=windows,
        long_rope_factors=long_factors,
        **_gguf_feed_forward(fields, row),
        **{**_ropes(row, windows, n_layers, local_theta), **_no_ropes(row, n_layers), **row.features},
    )
    if row.optional_qk_norm and "blk.0.attn_q_norm.weight" in tensors:
        config = replace(config, qk_norm=row.optional_qk_norm)
    fields.refuse_unknown(_GGUF_HARMLESS)
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
        keys["attention.sliding_window"] = max(config.windows)
    return {
        **{key: value for key, value in keys.items() if value is not None},
        "attention.value_length": config.head_dim,
        _GGUF_EPS[config.norm_kind]: config.norm_eps,
        "vocab_size": config.vocab_size,
    }


def _no_ropes(row: Family, n_layers: int) -> dict[str, Any]:
    if not row.no_rope_interval:
        return {}
    skipped = [(layer + 1) % row.no_rope_interval == 0 for layer in range(n_layers)]
    return {"ropes": tuple("none" if none else "usual" for none in skipped)}


_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"  # transformers' mscale_all_dim, beside a mscale of 1
_GGUF_EPS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}


def _gguf_scale(architecture: str, n_layers: int, dim: int, n_heads: int, head_dim: int) -> float:
    """What scores are multiplied by where the file does not say. GGUF files of Gemma leave out that the
    largest of Gemma 2 (46 layers) and of Gemma 3 (62) divide by the root of dim / n_heads instead."""
    largest = (architecture, n_layers) in (("gemma2", 46), ("gemma3", 62))
    return 1 / math.sqrt(dim / n_heads if largest else head_dim)


def _gguf_period(fields: _Fields, n_layers: int, default: int) -> int | list[bool]:
    """Every so-many-th layer has no window, or by layer whether it has one."""
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray) and pattern.size == n_layers:
        return [bool(windowed) for windowed in pattern]
    return fields.whole("attention.sliding_window_pattern", default)


def _windows(n_layers: int, window: int, period: int | list[bool]) -> tuple[int, ...]:
    """Windows by layer; () where there are none. With a period every period-th layer has none (period 1: all
    have one), as with a list of whether a layer has one."""
    if isinstance(period, int):
        if not 0 <= period <= 1024:
            raise FormatError(f"a sliding window pattern of {period} is absurd")
        period = [period <= 1 or (layer + 1) % period != 0 for layer in range(n_layers)]
    windows = tuple(window if windowed else 0 for windowed in period)
    return windows if any(windows) else ()


def _ropes(row: Family, windows: tuple[int, ...], n_layers: int, local_theta: float) -> dict[str, Any]:
    """The fields `ropes` and `local_rope_theta`."""
    if row.local_rope and windows:
        ropes = ["local" if window else "usual" for window in windows]
        return {"ropes": tuple(ropes), "local_rope_theta": local_theta}
    if row.rope_in_windows:
        return {"ropes": tuple("usual" if window else "none" for window in windows or (0,) * n_layers)}
    return {}


def _gguf_feed_forward(fields: _Fields, row: Family) -> dict[str, Any]:
    """The width of the feed-forward or of an expert's, and the fields of a mixture of experts."""
    ff_dim, n_experts = fields.whole(GGUF_KEYS["ff_dim"]), fields.whole(GGUF_EXPERTS["n_experts"], 0)
    if not n_experts:
        return {"ff_dim": ff_dim}
    if "gguf" not in row.experts_in:
        raise UnsupportedError("a mixture of experts is not supported for this architecture")
    return {
        "ff_dim": fields.whole(GGUF_EXPERTS["ff_dim"], ff_dim),
        "n_experts": n_experts,
        "n_experts_used": fields.whole(GGUF_EXPERTS["n_experts_used"]),
        "norm_topk_prob": fields.flag("expert_weights_norm", True),
    }


def _gguf_vocab_size(fields: _Fields, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        return len(tokens)
    embedding = tensors.get("token_embd.weight")
    return fields.whole("vocab_size", embedding.shape[0] if embedding is not None else None)


def _gguf_rope(
    fields: _Fields, row: Family, rope_dim: int, theta: float, context: int
) -> tuple[tuple[float, ...] | None, float, int | None]:
    """(rope_factors, rope_scale, original_context) from the rope.scaling keys."""
    kind = fields.get("rope.scaling.type")
    if kind is None:
        kind = "linear"
    factor = fields.number("rope.scaling.factor", 0.0) or fields.number("rope.scale_linear", 0.0) or 1.0
    given = fields.get("rope.scaling.original_context_length") is not None
    original = fields.whole("rope.scaling.original_context_length", context)
    # The complete factor on cos and sin where given; converters write transformers' attention_factor here.
    attention_factor = fields.number("rope.scaling.yarn_attn_factor", 0.0) or None
    multiplier = fields.number("rope.scaling.attn_factor", 0.0) or 1.0
    beta_fast = fields.number("rope.scaling.yarn_beta_fast", 0.0) or 32.0
    beta_slow = fields.number("rope.scaling.yarn_beta_slow", 0.0) or 1.0
    extrapolation = fields.number("rope.scaling.yarn_ext_factor", -1.0)
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedError(
            f"rope.scaling.type {_brief(kind)} is not supported; supported: none, linear, yarn, longrope"
        )
    if kind == "none":
        return None, 1.0, None
    if kind == "longrope":  # its factors are two tensors
        return None, multiplier, original
    if kind == "linear":
        return _linear(factor, rope_dim), multiplier, original if given else None
    if extrapolation >= 0 and extrapolation != 1:
        raise UnsupportedError(f"YaRN with yarn_ext_factor {extrapolation:g} is not supported, only 1")
    factors = _yarn(factor, rope_dim, theta, original, beta_fast, beta_slow, row.yarn_truncate)
    m_all = fields.number(_LOG_MULTIPLIER) if _LOG_MULTIPLIER in row.gguf_defaults else 0.0
    usual = _yarn_scale(factor, 1.0, m_all)
    return factors, (attention_factor or usual) * multiplier, original


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
            raise FormatError(f"config.json of {_brief(architecture)} has no text_config")
        return config_from_json({"model_type": row.text_of, **text, "architectures": None})
    names = config.get("architectures") or []
    if not isinstance(names, list) or (
        names and not any(str(name).endswith("ForCausalLM") for name in names)
    ):
        raise UnsupportedError(f"architectures {_brief(names)} is no language model (...ForCausalLM)")
    fields = _Fields({**row.json_defaults, **config})
    dim = _bounded("dim", fields.whole("hidden_size"))
    n_layers = _bounded("n_layers", fields.whole("num_hidden_layers"))
    n_heads = _bounded("n_heads", fields.whole("num_attention_heads"))
    context = _bounded("context", fields.whole("max_position_embeddings"))
    head_dim = _bounded("head_dim", fields.whole("head_dim", _head_dim(dim, n_heads)))
    gelu = row.features.get("activation") == "gelu"
    activation = fields.get("hidden_activation") if gelu else None
    activation = activation or fields.get("hidden_act") or "silu"
    if activation not in (("gelu_pytorch_tanh",) if gelu else ("silu", "swish")):
        only = "gelu_pytorch_tanh" if gelu else "silu"
        raise UnsupportedError(f"hidden_act {_brief(activation)} is not supported, only {only}")

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
        **{**_ropes(row, windows, n_layers, rope.local_theta), **row.features},
    )
    if row.no_rope_interval:
        result = replace(result, ropes=_json_no_ropes(fields, n_layers))
    if row.optional_qk_norm and fields.flag("use_qk_norm", False):
        result = replace(result, qk_norm=row.optional_qk_norm)
    fields.refuse_unknown((*JSON_HARMLESS, *row.json_known))
    return result


def _json_feed_forward(fields: _Fields, row: Family) -> dict[str, Any]:
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


def _json_windows(fields: _Fields, row: Family, n_layers: int) -> tuple[int, ...]:
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
        windows = _windows(n_layers, window, period)
        return tuple(0 if layer < first else w for layer, w in enumerate(windows))
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != n_layers or any(kind not in kinds for kind in types):
        raise UnsupportedError(f"layer_types {_brief(types)} is not supported, only a list of {kinds}")
    return _windows(n_layers, window, [kind == "sliding_attention" for kind in types])


def _json_no_ropes(fields: _Fields, n_layers: int) -> tuple[Any, ...]:
    """SmolLM3's list of layers with RoPE (1) and without (0); without a list, every so-many-th has none."""
    interval, listed = fields.whole("no_rope_layer_interval"), fields.get("no_rope_layers")
    if listed is None:
        listed = [int((layer + 1) % max(interval, 1) != 0) for layer in range(n_layers)]
    if not isinstance(listed, list) or len(listed) != n_layers or any(flag not in (0, 1) for flag in listed):
        raise FormatError(f"no_rope_layers {_brief(listed)} is no list of 0 and 1 for {n_layers} layers")
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


def _json_rope(config: _Fields, row: Family, head_dim: int, context: int) -> _Rope:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` as older files spell it. Formulas and
    defaults are those of transformers."""
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    table = scaling or parameters or {}
    if not isinstance(table, dict):
        raise FormatError(f"rope_scaling must be an object, not {_brief(table)}")
    said = {key: value for key, value in config.table.items() if value is not row.json_defaults.get(key)}
    if scaling and isinstance(parameters := said.get("rope_parameters"), dict):
        for key, value in table.items():
            _agree(f"{_brief(key)} of RoPE", value, parameters.get(key))
    theta = config.number("rope_theta", 10000.0)
    local_theta = None  # as the others
    if "rope_local_base_freq" in row.json_defaults and config.get("rope_local_base_freq") is not None:
        local_theta = config.number("rope_local_base_freq")
    if any(isinstance(value, dict) for value in table.values()):  # by kind of layer
        local = table.get("sliding_attention", {})
        table = table.get("full_attention", {})
        if not isinstance(local, dict) or not isinstance(table, dict) or local.get("rope_type") != "default":
            raise UnsupportedError("RoPE parameters that differ by kind of layer are not supported")
        local_theta = _Fields(local).number("rope_theta", theta if local_theta is None else local_theta)
    fields = _Fields(table)
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
            f"RoPE type {_brief(kind)} is not supported{why}; supported: {', '.join(_ROPE_KEYS)}"
        )
    growth = fields.number("llama_4_scaling_beta", 0.0) if row.growing_queries else 0.0
    fields.refuse_unknown((*_ROPE_KEYS[kind], "finetuned", "max_position_embeddings"))
    local_theta = theta if local_theta is None else local_theta
    rope = _Rope(theta, _bounded("rope_dim", rope_dim), local_theta=local_theta, query_growth=growth)
    stated = config.get("original_max_position_embeddings")
    original = fields.whole("original_max_position_embeddings", context)
    if stated is not None:
        original = config.whole("original_max_position_embeddings")
    if kind == "default":
        return rope
    if kind == "linear":
        return replace(rope, factors=_linear(fields.number("factor"), rope_dim))
    if kind == "longrope":
        return _longrope(rope, fields, original, context)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        factors = _llama3(fields.number("factor"), rope_dim, theta, original, low, high)
        return replace(rope, factors=factors, original_context=original)
    factor = fields.number("factor", context / max(original, 1))
    beta_fast, beta_slow = fields.number("beta_fast", 0.0) or 32.0, fields.number("beta_slow", 0.0) or 1.0
    factors = _yarn(factor, rope_dim, theta, original, beta_fast, beta_slow, fields.flag("truncate", True))
    scale = _yarn_scale(factor, fields.number("mscale", 0.0), fields.number("mscale_all_dim", 0.0))
    return replace(
        rope, factors=factors, scale=fields.number("attention_factor", scale), original_context=original
    )


def _agree(what: str, one: Any, other: Any) -> None:
    """Refuses what a config.json says twice, in an old and a new place, and says differently."""
    if one is not None and other is not None and one != other:
        raise FormatError(f"{what} is both {_brief(one)} and {_brief(other)}; delete the one that is wrong")


def _longrope(rope: _Rope, fields: _Fields, original: int, context: int) -> _Rope:
    """LongRoPE (arXiv 2402.13753): a divisor a pair, one set up to the original context, one past it."""
    short, long = (_factors(fields, key, rope.dim) for key in ("short_factor", "long_factor"))
    factor = fields.number("factor", context / max(original, 1))
    _check_scaling(factor, original=original)
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return replace(
        rope,
        factors=short,
        long_factors=long,
        scale=fields.number("attention_factor", scale),
        original_context=original,
    )


def _factors(fields: _Fields, key: str, rope_dim: int) -> tuple[float, ...]:
    values = fields.get(key)
    if not isinstance(values, list) or len(values) != rope_dim // 2:
        raise FormatError(f"{key} must be a list of {rope_dim // 2} numbers, not {_brief(values)}")
    if any(type(value) not in (int, float) or not abs(value) < 1e30 for value in values):
        raise FormatError(f"{key} holds what is no number: {_brief(values)}")
    return _float32(np.array(values, np.float64))


def _head_dim(dim: int, n_heads: int) -> int | None:
    """The head size where nothing states it; None where dim / n_heads is no whole number."""
    return dim // n_heads if dim % n_heads == 0 else None


def _float32(factors: npt.NDArray[np.float64]) -> tuple[float, ...]:
    with np.errstate(over="ignore"):  # the config refuses infinity
        return tuple(float(factor) for factor in factors.astype(np.float32))


def _check_scaling(factor: float, theta: float = 2.0, original: int = 1) -> None:
    if not (1e-3 <= factor <= 1e6 and 1 < theta <= 1e15 and 1 <= original <= _BOUNDS["context"][1]):
        raise FormatError(f"RoPE scaling: factor {factor:g}, theta {theta:g}, original context {original}")


def _linear(factor: float, rope_dim: int) -> tuple[float, ...] | None:
    """Position interpolation (arXiv 2306.15595): every angle divided by `factor`."""
    _check_scaling(factor)
    return None if factor == 1 else _float32(np.full(rope_dim // 2, factor))


def _multiply(
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
    return _float32(more * np.array(factors or (1.0,)))


def _llama3(
    factor: float, rope_dim: int, theta: float, original: int, low: float, high: float
) -> tuple[float, ...]:
    """Llama 3.1's rule: pairs that turn less than `low` times in the original context are slowed by `factor`,
    those that turn more than `high` times are kept, and in between the two frequencies are mixed linearly in
    the turns."""
    _check_scaling(factor, theta, original)
    if not 1e-3 <= low < high <= 1e6:
        raise FormatError(
            f"low_freq_factor {low:g} and high_freq_factor {high:g} must ascend within 0.001 to 1e6"
        )
    frequency = theta ** (-np.arange(0, rope_dim, 2) / rope_dim)
    kept = np.clip((original * frequency / (2 * math.pi) - low) / (high - low), 0, 1)
    return _float32(1 / ((1 - kept) / factor + kept))


def _yarn(
    factor: float, rope_dim: int, theta: float, original: int, fast: float, slow: float, truncate: bool
) -> tuple[float, ...]:
    """YaRN (arXiv 2309.00071, section 3.2): the mix of `_llama3`, but linear in the pair's index, between the
    pairs that turn `fast` and `slow` times in the original context; `truncate` rounds those two outwards."""
    _check_scaling(factor, theta, original)
    if not 1e-3 <= slow <= fast <= 1e6:
        raise FormatError(f"YaRN's beta_slow {slow:g} and beta_fast {fast:g} must ascend within 0.001 to 1e6")

    def pair_that_turns(times: float) -> float:
        return rope_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope_dim - 1)
    scaled = np.clip((np.arange(rope_dim // 2) - first) / max(last - first, 0.001), 0, 1)
    return _float32(1 / (scaled / factor + (1 - scaled)))


def _yarn_scale(factor: float, m: float, m_all: float) -> float:
    """YaRN's factor on cos and sin: by arXiv 2309.00071, equation 22, or where both `mscale` and
    `mscale_all_dim` are given, the ratio of what they make of it."""
    if m < 0 or m_all < 0:
        raise FormatError(f"YaRN's mscale {m:g} and mscale_all_dim {m_all:g} must not be negative")

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    return scale(m) / scale(m_all) if m and m_all else scale(1.0)


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model's makers advise: the ids that end a text, and sampling settings (None: nothing said)."""

    eos_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None  # 0: off
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None


def generation_from_gguf(metadata: Mapping[str, Any], vocab_size: int) -> GenerationDefaults:
    """From the tokenizer's eos, eot and eom ids and the `general.sampling.*` keys."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    fields = _Fields(metadata, "general.sampling.")
    return GenerationDefaults(
        eos_ids=_eos_ids(ids, vocab_size),
        temperature=_setting(fields, "temp", "temperature", negative_is_0=True),  # greedy
        top_k=_top_k(fields, negative_is_0=True),  # off
        top_p=_setting(fields, "top_p"),
        min_p=_setting(fields, "min_p"),
        repetition_penalty=_setting(fields, "penalty_repeat", "repetition_penalty"),
    )


def generation_from_json(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None, vocab_size: int
) -> GenerationDefaults:
    """From config.json and, where there is one, generation_config.json; ids of both count."""
    table = generation_config or {}
    ids: list[Any] = []
    for source in (table, config):
        value = source.get("eos_token_id")
        ids.extend(value if isinstance(value, list) else [value])
    fields = _Fields(table)
    return GenerationDefaults(
        eos_ids=_eos_ids(ids, vocab_size),
        temperature=0.0 if table.get("do_sample") is False else _setting(fields, "temperature"),
        top_k=_top_k(fields),
        top_p=_setting(fields, "top_p"),
        min_p=_setting(fields, "min_p"),
        typical_p=_setting(fields, "typical_p"),
        repetition_penalty=_setting(fields, "repetition_penalty"),
    )


def _setting(
    fields: _Fields, key: str, name: str | None = None, *, negative_is_0: bool = False
) -> float | None:
    """The file's `key`, as SamplingParams takes it in the field `name` (None: of the same name); None where
    it is absent."""
    if fields.get(key) is None:
        return None
    value = max(fields.number(key), 0.0) if negative_is_0 else fields.number(key)
    least, most, _ = ADVISED_RANGES[name or key]
    if not least <= value <= most:
        raise FormatError(
            f"the sampling default {fields.prefix}{key} is {value:g}, outside {least:g} to {most:g}"
        )
    return value


def _top_k(fields: _Fields, *, negative_is_0: bool = False) -> int | None:
    """Files spell it 5 and 5.0."""
    value = fields.get("top_k")
    if isinstance(value, float) and not value.is_integer():
        fields.wrong("top_k", value, "a whole number")
    setting = _setting(fields, "top_k", negative_is_0=negative_is_0)
    return None if setting is None else int(setting)


def _eos_ids(ids: Iterable[Any], vocab_size: int) -> tuple[int, ...]:
    found: list[int] = []
    for value in ids:
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < vocab_size:
            raise FormatError(
                f"{_brief(value)} is not the id of a token that ends a text (vocabulary {vocab_size})"
            )
        found.append(value)
    return tuple(dict.fromkeys(found))
