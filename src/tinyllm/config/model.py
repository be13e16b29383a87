"""What the forward pass has to know of a model beside its weights, and the bounds of what any model can have.

Every kind of rotary scaling is one vector of divisors here (`rope_factors`), so nothing above knows their
names. Imports `fields` (how a value is shown) and `errors`. Read next: from_json.py and from_gguf.py, which
make one of a file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tinyllm.config.families import Mixer
from tinyllm.config.fields import brief
from tinyllm.errors import FormatError, UnsupportedError

# Far above any real model, far below what would overflow or exhaust anything. {field: (least, most)}
BOUNDS = {
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

RANGES = {
    "norm_eps": (_LEAST, 1.0),
    "rope_theta": (1.0, 1e15),  # below 1, angles would grow with i, past all bounds
    "local_rope_theta": (1.0, 1e15),
    "rope_scale": (_LEAST, 1e6),
    "attention_scale": (_LEAST, 1e6),
    "attention_cap": (_LEAST, 1e6),
    "logit_cap": (_LEAST, 1e6),
    "query_growth": (_LEAST, 1e6),
    "qkv_limit": (_LEAST, 1e6),
    "ntk_factor": (1.0, 1e6),
    "embedding_scale": (1e-9, 1e6),
    "residual_scale": (1e-9, 1e6),
    "logit_scale": (1e-9, 1e6),
}

MAX_ANGLE = 1 << 30  # radians of RoPE, up to which the core's sine and cosine are as exact as they say

MAX_EXPERTS = 4096  # of a layer

MAX_EXPERTS_IN_ALL = 1 << 15  # however small, each takes time and memory of its own


def bounded(name: str, value: int) -> int:
    least, most = BOUNDS[name]
    if type(value) is not int or not least <= value <= most:
        raise FormatError(f"{name} is {value!r}; a model has {least} to {most}")
    return value


@dataclass(frozen=True)
class DeltaSizes:
    """The sizes of layers of Gated DeltaNet (arXiv 2412.06464): k_heads of k_dim numbers for queries and for
    keys, v_heads of v_dim for values, behind a convolution of `kernel` tokens. tiled: v head h goes with k
    head h % k_heads, as GGUF files have it; else with h // (v_heads / k_heads). Raises FormatError for sizes
    that no model can have."""

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    kernel: int
    tiled: bool = False

    def __post_init__(self) -> None:
        sizes = (self.k_heads, self.v_heads, self.k_dim, self.v_dim, self.kernel)
        if not all(type(n) is int and 1 <= n <= 1 << 14 for n in sizes):
            raise FormatError(f"linear attention of {brief(sizes)}: no sizes that a model can have")
        if self.v_heads % self.k_heads:
            raise FormatError(f"{self.v_heads} value heads cannot share {self.k_heads} key heads evenly")
        if self.k_dim % 16 or self.v_dim % 16 or max(self.k_dim, self.v_dim) > 256:
            raise UnsupportedError(
                f"linear attention with heads of {self.k_dim} and {self.v_dim} is not supported, only "
                "multiples of 16 up to 256"
            )
        if not 2 <= self.kernel <= 8:
            raise UnsupportedError(f"a convolution of {self.kernel} tokens is not supported, only 2 to 8")

    @property
    def v_width(self) -> int:
        """Numbers of a token's values."""
        return self.v_heads * self.v_dim

    @property
    def channels(self) -> int:
        """Numbers of a token's queries, keys and values, which the convolution goes over."""
        return 2 * self.k_heads * self.k_dim + self.v_width

    @property
    def state_floats(self) -> int:
        """Numbers that a layer keeps of a sequence."""
        return (self.kernel - 1) * self.channels + self.v_width * self.k_dim


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
    norm_kind: Literal["rms", "layer", "plain"] = "rms"  # plain: LayerNorm without weights
    norm_bias: bool = False  # of those of x
    norm_place: Literal["before", "after", "both"] = "before"  # of attention and of the feed-forward part
    # Of the gate; GELU in its tanh form. relu_squared and xielu: of up, there is no gate
    activation: Literal["silu", "gelu", "clamped_swiglu", "relu_squared", "xielu"] = "silu"
    # By layer xIELU's parameters as files hold them: alpha_p, alpha_n, beta, eps; (): the tensors say
    xielu: tuple[tuple[float, float, float, float], ...] = ()
    # Queries and keys normed before RoPE: head by head, with the same or with its own weights, or as a whole
    qk_norm: Literal["head", "heads", "all"] | None = None
    qk_norm_late: bool = False  # after RoPE instead
    qkv_limit: float = 0.0  # q, k and v are kept within it; 0: they are not
    parallel: bool = False  # attention and feed-forward read the same x
    bidirectional: bool = False  # tokens attend to those behind them, too: a text is computed in one call
    attention_cap: float = 0.0  # scores become cap * tanh(score / cap); 0: none
    logit_cap: float = 0.0  # likewise the logits, after logit_scale
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add
    logit_scale: float = 1.0
    # Queries at position p are multiplied by 1 + query_growth * ln(1 + floor(p / original_context)); 0: not
    query_growth: float = 0.0
    windows: tuple[
        int, ...
    ] = ()  # by layer: positions a token attends to (to either side), itself among them; 0: all. (): all 0
    ropes: tuple[Literal["usual", "local", "none"], ...] = ()  # by layer; (): all usual
    local_rope_theta: float | None = None  # of "local" layers, which have neither factors nor rope_scale
    long_rope_factors: tuple[float, ...] | None = None  # in place of rope_factors past original_context
    # Past original_context theta is stretched with the context by this factor (dynamic NTK); 0: it is not
    ntk_factor: float = 0.0
    n_experts: int = 0  # of every layer's feed-forward, each of ff_dim; 0: it is one dense block
    n_experts_used: int = 0  # by a token: those its router scores highest
    norm_topk_prob: bool = True  # their weights, a softmax over all scores, are divided by their sum
    expert_bias: bool = False  # the router and the experts have biases
    sinks: bool = False  # a score more in each head's softmax, with no value
    gated_attention: bool = False  # what attention gives is multiplied by the sigmoid of a product of its own
    mixers: tuple[Mixer, ...] = ()  # by layer, what mixes positions; (): all attention
    delta: DeltaSizes | None = None  # of "delta" layers
    guessing_layers: int = 0  # that the file has behind the last, to guess further tokens: not read

    def __post_init__(self) -> None:
        for name in BOUNDS:
            bounded(name, getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise FormatError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise FormatError(
                f"rope_dim is {self.rope_dim}; it must be even and at most head_dim, {self.head_dim}"
            )
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value != getattr(ModelConfig, name, least) and not least <= value <= most:  # or NaN
                raise FormatError(f"{name} is {value!r}; it must be from {least:.3g} to {most:g}")
        if self.xielu and (
            len(self.xielu) != self.n_layers
            or not all(a[3] <= 0 and max(map(abs, a)) < 1e3 for a in self.xielu)  # or NaN
        ):
            raise FormatError(f"xIELU's parameters are out of range: {brief(self.xielu)}")
        if self.query_growth and not self.original_context:
            raise FormatError("queries scaled by position need the original context of their RoPE scaling")
        layers = (("windows", self.windows), ("ropes", self.ropes), ("mixers", self.mixers))
        for name, per_layer in layers:
            if per_layer and len(per_layer) != self.n_layers:
                raise FormatError(f"{name} are {len(per_layer)} for {self.n_layers} layers")
        if self.mixers and "attention" not in self.mixers:
            raise UnsupportedError("a model without a layer of full attention is not supported")
        if ("delta" in self.mixers) != (self.delta is not None):
            raise FormatError("the layers and sizes of linear attention do not fit together")
        if not all(0 <= window <= BOUNDS["context"][1] for window in self.windows):
            raise FormatError(f"an attention window is out of range: {brief(self.windows)}")
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
        if self.original_context is not None and not 1 <= self.original_context <= BOUNDS["context"][1]:
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

    def mixer(self, layer: int) -> Mixer:
        """What mixes the positions of a layer."""
        return self.mixers[layer] if self.mixers else "attention"

    @property
    def state_floats(self) -> int:
        """Float32 numbers that a sequence keeps beside its pages, whatever its length."""
        return self.mixers.count("delta") * self.delta.state_floats if self.delta else 0

    @property
    def xielu_numbers(self) -> tuple[tuple[float, float, float, float], ...]:
        """By layer what the formula has (arXiv 2411.13010): alpha above 0, alpha below, beta, epsilon."""
        return tuple(
            (float(np.logaddexp(0.0, alpha_p)), beta + float(np.logaddexp(0.0, alpha_n)), beta, epsilon)
            for alpha_p, alpha_n, beta, epsilon in self.xielu
        )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate."""
        return self.activation not in ("relu_squared", "xielu")

    @property
    def default_context(self) -> int:
        """The context to use where none is asked for: what the model was trained for, or the original one
        where a longer one has other RoPE factors."""
        return ((self.long_rope_factors or self.ntk_factor) and self.original_context) or self.context

    @property
    def covered_context(self) -> int:
        """The longest text that the model was trained for, or that a scaling of RoPE stretches it to: some
        files have the length before it as their context, as Qwen 2.5's with YaRN and Vicuna's for 16k."""
        factors = self.rope_factors or (1.0,)
        if self.long_rope_factors or self.local_rope_theta is not None:  # theirs is the length after it
            return self.context
        if self.original_context:
            return max(self.context, int(self.original_context * max(factors)))
        return int(self.context * max(factors[0], 1.0)) if min(factors) == max(factors) else self.context

    def with_context(self, context: int) -> ModelConfig:
        """The same model for sequences of at most `context` tokens, which choose between short and long RoPE
        factors, or stretch a dynamic RoPE's theta: once, for all of the context, so that a text's numbers do
        not change while it grows."""
        if self.ntk_factor and self.original_context and context > self.original_context:
            # Of theta times longer^(d / (d - 2)), pair i turns longer^(2i / (d - 2)) times as slowly
            longer = self.ntk_factor * context / self.original_context - (self.ntk_factor - 1)
            slower = longer ** (np.arange(0, self.rope_dim, 2) / (self.rope_dim - 2))
            divisors = tuple(float(divisor) for divisor in slower.astype(np.float32))
            return replace(self, context=context, rope_factors=divisors)
        long = self.long_rope_factors and context > (self.original_context or self.context)
        factors = self.long_rope_factors if long else self.rope_factors
        return replace(self, context=context, rope_factors=factors)
