"""A model's hyperparameters and sampling defaults, read from GGUF metadata or Hugging Face's JSON files.

Every kind of rotary scaling becomes one vector of divisors (`rope_factors`), so nothing after this file knows
their names. A new family is a row in `FAMILIES`. A feature that a file asks for and that is not known here is
refused, never ignored. Imports only `errors`. Read next: loaders/names.py (the tensors such a config
expects).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from .errors import FormatError, UnsupportedError

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
    attention_bias: bool | None = None  # whether q, k, v and o have biases; None: the file's tensors decide
    ffn_bias: bool | None = None  # likewise gate, up and down
    # Beyond Llama. The defaults are Llama's.
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_place: Literal["before", "after", "both"] = "before"  # of attention and of the feed-forward part
    activation: Literal["silu", "gelu"] = "silu"  # of the gate; GELU in its tanh form
    # Queries and keys normed before RoPE: head by head, with the same or with its own weights, or as a whole
    qk_norm: Literal["head", "heads", "all"] | None = None
    parallel: bool = False  # attention and feed-forward read the same x
    attention_cap: float = 0.0  # scores become cap * tanh(score / cap); 0: none
    logit_cap: float = 0.0  # likewise the logits, after logit_scale
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add
    logit_scale: float = 1.0
    windows: tuple[
        int, ...
    ] = ()  # by layer: positions a token attends to, itself among them; 0: all. (): all 0
    ropes: tuple[Literal["usual", "local", "none"], ...] = ()  # by layer; (): all usual
    local_rope_theta: float | None = None  # of "local" layers, which have neither factors nor rope_scale

    def __post_init__(self) -> None:
        for name in _BOUNDS:
            _bounded(name, getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise FormatError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise FormatError(
                f"rope_dim is {self.rope_dim}; it must be even and at most head_dim, {self.head_dim}"
            )
        limits = {"norm_eps": 1.0, "rope_theta": 1e15, "rope_scale": 1e6, "attention_scale": 1e6}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0 < value <= limit:  # true for NaN as well
                raise FormatError(f"{name} is {value!r}; it must be above 0 and at most {limit:g}")
        caps = {"attention_cap": 1e6, "logit_cap": 1e6, "local_rope_theta": 1e15}
        scales = {"embedding_scale": 1e6, "residual_scale": 1e6, "logit_scale": 1e6}
        for name, limit in (caps | scales).items():
            value = getattr(self, name) or 0.0
            if not (0 if name in caps else 1e-9) <= value <= limit:
                raise FormatError(f"{name} is {value!r}; it must be from 0 to {limit:g}")
        for name, per_layer in (("windows", self.windows), ("ropes", self.ropes)):
            if per_layer and len(per_layer) != self.n_layers:
                raise FormatError(f"{name} are {len(per_layer)} for {self.n_layers} layers")
        if not all(0 <= window <= _BOUNDS["context"][1] for window in self.windows):
            raise FormatError(f"an attention window is out of range: {_brief(self.windows)}")
        factors = self.rope_factors
        if factors is not None and len(factors) != self.rope_dim // 2:
            raise FormatError(f"{len(factors)} RoPE factors for a rope_dim of {self.rope_dim}")
        if not all(1e-6 <= factor <= 1e30 for factor in factors or ()):
            raise FormatError("a RoPE factor is not a positive number between 1e-6 and 1e30")
        if self.original_context is not None and not 1 <= self.original_context <= _BOUNDS["context"][1]:
            raise FormatError(f"original_context is {self.original_context}")


@dataclass(frozen=True)
class Family:
    """What sets apart the families that share the Llama layer, as their files spell it."""

    gguf_interleaved: bool = False  # GGUF files hold q and k rows in interleaved (pair by pair) order
    json_defaults: Mapping[str, Any] = field(default_factory=dict)  # what config.json may leave out


# By GGUF's general.architecture and config.json's model_type. Defaults as in transformers' config classes.
FAMILIES: dict[str, Family] = {
    "llama": Family(True, {"max_position_embeddings": 2048}),
    "mistral": Family(
        True, {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
    ),
}


class Tensor(Protocol):
    """What `config_from_gguf` asks of a tensor; `loaders.TensorInfo` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_f32(self) -> npt.NDArray[np.float32]: ...


def family(architecture: Any) -> Family:
    """The family of that name; raises UnsupportedError with the list of those there are."""
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UnsupportedError(
            f"architecture {_brief(architecture)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture]


class _Fields:
    """Typed access to a table of hyperparameters that remembers which keys were asked for."""

    def __init__(self, table: Mapping[str, Any], prefix: str = "") -> None:
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
            self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if type(value) not in (int, float) or not abs(value) < 1e300:
            self._wrong(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            value = default
        if type(value) is not bool:
            self._wrong(key, value, "true or false")
        return value

    def _wrong(self, key: str, value: Any, kind: str) -> NoReturn:
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


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The config of a GGUF model; `tensors` tell whether the output is tied and hold rope_freqs.weight.

    With no tensors (a file that holds only a vocabulary) the config describes the model the vocabulary is
    for. Raises UnsupportedError (an unknown architecture or feature) or FormatError (missing or absurd
    values).
    """
    architecture = metadata.get("general.architecture")
    if architecture is None:
        raise FormatError("general.architecture is missing")
    family(architecture)
    fields = _Fields(metadata, f"{architecture}.")
    dim = _bounded("dim", fields.whole("embedding_length"))
    n_heads = _bounded("n_heads", fields.whole("attention.head_count"))
    context = _bounded("context", fields.whole("context_length"))
    head_dim = _bounded("head_dim", fields.whole("attention.key_length", _head_dim(dim, n_heads)))
    value_dim = fields.whole("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedError(
            f"values of {value_dim} beside keys of {head_dim} dimensions a head are not supported"
        )
    rope_dim = _bounded("rope_dim", fields.whole("rope.dimension_count", head_dim))
    theta = fields.number("rope.freq_base", 10000.0)
    factors, rope_scale, original_context = _gguf_rope(fields, rope_dim, theta, context)
    if "rope_freqs.weight" in tensors:
        factors = _multiply(factors, tensors["rope_freqs.weight"], rope_dim)
    if "rope_factors_long.weight" in tensors or "rope_factors_short.weight" in tensors:
        raise UnsupportedError(f"long-rope factors are not supported for {architecture}")
    scale = fields.number("attention.scale", 0.0)
    if fields.whole("expert_count", 0):
        raise UnsupportedError(f"a mixture of experts is not supported for {architecture}")
    if not fields.flag("attention.causal", True):
        raise UnsupportedError("attention that is not causal is not supported")
    _refuse_window(fields.whole("attention.sliding_window", 0), context)
    config = ModelConfig(
        architecture=architecture,
        n_layers=fields.whole("block_count"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=fields.whole("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ff_dim=fields.whole("feed_forward_length"),
        vocab_size=_gguf_vocab_size(fields, metadata, tensors),
        context=context,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_dim=rope_dim,
        rope_factors=factors,
        rope_scale=rope_scale,
        attention_scale=scale or 1 / math.sqrt(head_dim),
        tied="output.weight" not in tensors,
        original_context=original_context,
    )
    fields.refuse_unknown(_GGUF_HARMLESS)
    return config


def _gguf_vocab_size(fields: _Fields, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        return len(tokens)
    embedding = tensors.get("token_embd.weight")
    return fields.whole("vocab_size", embedding.shape[0] if embedding is not None else None)


def _gguf_rope(
    fields: _Fields, rope_dim: int, theta: float, context: int
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
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(
            f"rope.scaling.type {_brief(kind)} is not supported; supported: none, linear, yarn"
        )
    if kind == "none":
        return None, 1.0, None
    if kind == "linear":
        return _linear(factor, rope_dim), multiplier, original if given else None
    if extrapolation >= 0 and extrapolation != 1:
        raise UnsupportedError(f"YaRN with yarn_ext_factor {extrapolation:g} is not supported, only 1")
    factors = _yarn(factor, rope_dim, theta, original, beta_fast, beta_slow, True)
    return factors, (attention_factor or _mscale(factor, 1.0)) * multiplier, original


# What other families and remodelled Llamas use. transformers ignores keys it does not know, so most are
# harmless; these say that the model computes something else.
_JSON_FEATURES = (
    "quantization_config", "num_local_experts", "num_experts", "n_routed_experts", "attention_multiplier",
    "residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale", "final_logit_softcapping",
    "attn_logit_softcapping", "use_qk_norm", "qk_layernorm", "no_rope_layers", "layer_types", "alibi",
)  # fmt: skip


def config_from_json(config: Mapping[str, Any]) -> ModelConfig:
    """The config of a Hugging Face model, from the object in config.json.

    Raises UnsupportedError (an unknown model_type or feature) or FormatError (missing or absurd values).
    """
    architecture = config.get("model_type")
    if architecture is None:
        raise FormatError("config.json has no model_type")
    defaults = family(architecture).json_defaults
    names = config.get("architectures") or []
    if not isinstance(names, list) or (
        names and not any(str(name).endswith("ForCausalLM") for name in names)
    ):
        raise UnsupportedError(f"architectures {_brief(names)} is no language model (...ForCausalLM)")
    for key in _JSON_FEATURES:
        if config.get(key):
            raise UnsupportedError(
                f"{key} is set ({_brief(config[key])}), a feature that is not supported here"
            )
    fields = _Fields({**defaults, **config})
    dim = _bounded("dim", fields.whole("hidden_size"))
    n_heads = _bounded("n_heads", fields.whole("num_attention_heads"))
    context = _bounded("context", fields.whole("max_position_embeddings"))
    head_dim = _bounded("head_dim", fields.whole("head_dim", _head_dim(dim, n_heads)))
    if fields.get("hidden_act") not in (None, "silu", "swish"):
        raise UnsupportedError(f"hidden_act {_brief(fields.get('hidden_act'))} is not supported, only silu")
    if fields.number("partial_rotary_factor", 1.0) != 1:
        raise UnsupportedError(f"partial_rotary_factor is not supported for {architecture}")
    _refuse_window(fields.whole("sliding_window", 0), context)
    theta, factors, rope_scale, original_context = _json_rope(config, head_dim, context)
    return ModelConfig(
        architecture=architecture,
        n_layers=fields.whole("num_hidden_layers"),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=fields.whole("num_key_value_heads", n_heads),
        head_dim=head_dim,
        ff_dim=fields.whole("intermediate_size"),
        vocab_size=fields.whole("vocab_size"),
        context=context,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_dim=head_dim,
        rope_factors=factors,
        rope_scale=rope_scale,
        attention_scale=1 / math.sqrt(head_dim),
        tied=fields.flag("tie_word_embeddings", False),
        original_context=original_context,
        attention_bias=fields.flag("attention_bias", False),
        ffn_bias=fields.flag("mlp_bias", False),
    )


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
}  # fmt: skip


def _json_rope(
    config: Mapping[str, Any], rope_dim: int, context: int
) -> tuple[float, tuple[float, ...] | None, float, int | None]:
    """(rope_theta, rope_factors, rope_scale, original_context) from `rope_parameters`, or from `rope_theta`
    and `rope_scaling` as older files spell it. Formulas and defaults are those of transformers."""
    table = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(table, dict):
        raise FormatError(f"rope_scaling must be an object, not {_brief(table)}")
    if any(isinstance(value, dict) for value in table.values()):
        raise UnsupportedError("RoPE parameters that differ by kind of layer are not supported")
    fields = _Fields(table)
    theta = fields.number("rope_theta", _Fields(config).number("rope_theta", 10000.0))
    kind = fields.get("rope_type") or fields.get("type") or "default"
    fields.get("type")
    if fields.number("partial_rotary_factor", 1.0) != 1:
        raise UnsupportedError("partial_rotary_factor is not supported for this architecture")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        why = " (its frequencies change with the length of the text)" if kind == "dynamic" else ""
        raise UnsupportedError(
            f"RoPE type {_brief(kind)} is not supported{why}; supported: {', '.join(_ROPE_KEYS)}"
        )
    fields.refuse_unknown((*_ROPE_KEYS[kind], "finetuned"))
    if kind == "default":
        return theta, None, 1.0, None
    if kind == "linear":
        return theta, _linear(fields.number("factor"), rope_dim), 1.0, None
    original = _Fields(config).whole(
        "original_max_position_embeddings", fields.whole("original_max_position_embeddings", context)
    )
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        return theta, _llama3(fields.number("factor"), rope_dim, theta, original, low, high), 1.0, original
    factor = fields.number("factor", context / max(original, 1))
    beta_fast, beta_slow = fields.number("beta_fast", 0.0) or 32.0, fields.number("beta_slow", 0.0) or 1.0
    factors = _yarn(factor, rope_dim, theta, original, beta_fast, beta_slow, fields.flag("truncate", True))
    m, m_all = fields.number("mscale", 0.0), fields.number("mscale_all_dim", 0.0)
    if m < 0 or m_all < 0:
        raise FormatError(f"YaRN's mscale {m:g} and mscale_all_dim {m_all:g} must not be negative")
    scale = _mscale(factor, m) / _mscale(factor, m_all) if m and m_all else _mscale(factor, 1.0)
    return theta, factors, fields.number("attention_factor", scale), original


def _head_dim(dim: int, n_heads: int) -> int | None:
    """The head size where nothing states it; None where dim / n_heads is no whole number."""
    return dim // n_heads if dim % n_heads == 0 else None


def _refuse_window(window: int, context: int) -> None:
    if 0 < window < context:
        raise UnsupportedError(f"a sliding window of {window} in a context of {context} is not supported")


def _float32(factors: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(factor) for factor in factors.astype(np.float32))


def _check_scaling(factor: float, theta: float = 2.0, original: int = 1) -> None:
    if not (1e-3 <= factor <= 1e6 and 1 < theta <= 1e15 and 1 <= original <= _BOUNDS["context"][1]):
        raise FormatError(f"RoPE scaling: factor {factor:g}, theta {theta:g}, original context {original}")


def _linear(factor: float, rope_dim: int) -> tuple[float, ...] | None:
    """Position interpolation (arXiv 2306.15595): every angle divided by `factor`."""
    _check_scaling(factor)
    return None if factor == 1 else _float32(np.full(rope_dim // 2, factor))


def _multiply(factors: tuple[float, ...] | None, tensor: Tensor, rope_dim: int) -> tuple[float, ...]:
    """GGUF's rope_freqs.weight: one more divisor for each pair."""
    if tensor.shape != (rope_dim // 2,):
        raise FormatError(f"rope_freqs.weight has shape {tensor.shape}, expected ({rope_dim // 2},)")
    more = tensor.read_f32()
    if not ((more >= 1e-6) & (more <= 1e30)).all():
        raise FormatError("rope_freqs.weight: a RoPE factor is not a positive number between 1e-6 and 1e30")
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


def _mscale(factor: float, m: float) -> float:
    """YaRN's factor on queries and keys (arXiv 2309.00071, equation 22)."""
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


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
    temperature = _setting(fields, "temp", -math.inf, math.inf)
    top_k = _setting(fields, "top_k", -(2**31), 2**31)
    return GenerationDefaults(
        eos_ids=_eos_ids(ids, vocab_size),
        temperature=None if temperature is None else max(temperature, 0.0),  # a negative one means greedy
        top_k=None if top_k is None else max(int(top_k), 0),  # a negative one means off
        top_p=_setting(fields, "top_p", 0, 1),
        min_p=_setting(fields, "min_p", 0, 1),
        repetition_penalty=_setting(fields, "penalty_repeat", 0, 1e6),
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
    top_k = _setting(fields, "top_k", 0, 2**31)
    return GenerationDefaults(
        eos_ids=_eos_ids(ids, vocab_size),
        temperature=0.0 if table.get("do_sample") is False else _setting(fields, "temperature", 0, 1e6),
        top_k=None if top_k is None else int(top_k),
        top_p=_setting(fields, "top_p", 0, 1),
        min_p=_setting(fields, "min_p", 0, 1),
        typical_p=_setting(fields, "typical_p", 0, 1),
        repetition_penalty=_setting(fields, "repetition_penalty", 0, 1e6),
    )


def _setting(fields: _Fields, key: str, least: float, most: float) -> float | None:
    if fields.get(key) is None:
        return None
    value = fields.number(key)
    if not least <= value <= most:
        raise FormatError(
            f"the sampling default {fields.prefix}{key} is {value:g}, outside {least:g} to {most:g}"
        )
    return value


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
