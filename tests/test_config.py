"""Configs from GGUF metadata and config.json: values, every RoPE scaling, refusals, sampling defaults."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers_models import golden_specs
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.config import (
    GenerationDefaults,
    ModelConfig,
    config_from_gguf,
    config_from_json,
    generation_from_gguf,
    generation_from_json,
)
from tinyllm.engine.sampling import SamplingParams
from tinyllm.errors import Error, FormatError, UnsupportedError, located
from tinyllm.files import read_json
from tinyllm.files.gguf import read_gguf

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


class Values:
    """A tensor for config_from_gguf."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values, np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read_f32(self) -> F32:
        return self.values


JSON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 172,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 10000.0,
    "llama.vocab_size": 512,
}
TENSORS = {"output.weight": Values(np.zeros((1, 1)))}
EXPECTED = ModelConfig(
    architecture="llama",
    n_layers=2,
    dim=64,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    ff_dim=172,
    vocab_size=512,
    context=4096,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_dim=16,
    rope_factors=None,
    rope_scale=1.0,
    attention_scale=0.25,
    tied=False,
)


def from_json(**changes: Any) -> ModelConfig:
    return config_from_json({**JSON, **changes})


def from_gguf(tensors: Mapping[str, Values] = TENSORS, **changes: Any) -> ModelConfig:
    """Keyword arguments are keys after "llama.", with __ for the dot."""
    return config_from_gguf(
        {**GGUF, **{"llama." + k.replace("__", "."): v for k, v in changes.items()}}, tensors
    )


def same(a: ModelConfig, b: ModelConfig, **changes: Any) -> None:
    """Equal but for `changes` and for what the source says of biases."""
    ignored = {"attention_bias": None, "output_bias": None, "ffn_bias": None}
    assert {**vars(a), **ignored} == {**vars(b), **ignored, **changes}


def test_both_sources() -> None:
    assert config_from_gguf(GGUF, TENSORS) == EXPECTED
    same(config_from_json(JSON), EXPECTED)
    same(from_gguf(tensors={}), EXPECTED, tied=True)
    same(from_json(tie_word_embeddings=True), EXPECTED, tied=True)


def test_defaults() -> None:
    small = {k: v for k, v in JSON.items() if k not in ("num_key_value_heads", "rms_norm_eps", "rope_theta")}
    same(config_from_json(small), EXPECTED, n_kv_heads=4, norm_eps=1e-6)
    same(from_json(head_dim=None, rope_scaling=None), EXPECTED)
    same(from_json(rope_scaling=False), EXPECTED)
    same(from_json(rope_parameters=False), EXPECTED)
    del small["max_position_embeddings"], small["architectures"]
    assert config_from_json(small).context == 2048
    few = {k: v for k, v in GGUF.items() if not k.endswith(("dimension_count", "freq_base", "head_count_kv"))}
    same(config_from_gguf(few, TENSORS), EXPECTED, n_kv_heads=4)


def test_mistral() -> None:
    mistral = {"model_type": "mistral"}
    same(from_json(**mistral, sliding_window=None), EXPECTED, architecture="mistral")
    assert from_json(**mistral, sliding_window=1024).windows == (1024, 1024)
    assert from_json(**mistral).windows == (4096, 4096)  # transformers' default
    same(from_gguf(attention__sliding_window=1024), EXPECTED, windows=(1024, 1024))
    renamed = {k.replace("llama.", "mistral."): v for k, v in GGUF.items()} | {
        "general.architecture": "mistral"
    }
    same(config_from_gguf(renamed, TENSORS), EXPECTED, architecture="mistral")


def test_head_size_apart_from_dim() -> None:
    scale = 1 / math.sqrt(32)
    same(from_json(head_dim=32), EXPECTED, head_dim=32, rope_dim=32, attention_scale=scale)
    config = from_gguf(attention__key_length=32, attention__value_length=32)
    same(config, EXPECTED, head_dim=32, attention_scale=scale)  # rope_dim stays as stated
    assert from_gguf(attention__scale=0.5).attention_scale == 0.5


def test_vocabulary_size() -> None:
    metadata = {k: v for k, v in GGUF.items() if k != "llama.vocab_size"}
    assert config_from_gguf({**metadata, "tokenizer.ggml.tokens": ["a"] * 7}, TENSORS).vocab_size == 7
    assert config_from_gguf(metadata, {"token_embd.weight": Values(np.zeros((9, 64)))}).vocab_size == 9
    with pytest.raises(FormatError, match=r"llama\.vocab_size is missing"):
        config_from_gguf(metadata, TENSORS)


def test_biases() -> None:
    config = from_json(attention_bias=True)
    assert (config.attention_bias, config.ffn_bias) == (True, False)
    assert (EXPECTED.attention_bias, EXPECTED.ffn_bias) == (None, None)


def test_values_per_layer() -> None:
    assert from_gguf(attention__head_count_kv=np.array([2, 2], np.int32)) == EXPECTED
    with pytest.raises(UnsupportedError, match="differs from layer to layer"):
        from_gguf(attention__head_count_kv=np.array([2, 1], np.int32))


def test_real_models(data_dir: Path) -> None:
    file = read_gguf(data_dir / "models/stories260K/stories260K.gguf")
    a = config_from_gguf(file.metadata, file.tensors)
    b = config_from_json(read_json(data_dir / "models/stories260K-hf/config.json"))
    # The same weights; the .gguf has its own output matrix, more positions, and eps rounded to float32.
    same(a, b, tied=False, context=2048, norm_eps=float(np.float32(1e-5)))
    assert config_from_json(read_json(data_dir / "models/babyllama-tok105-hf/config.json")).vocab_size == 105


# RoPE

# Made by transformers 5.23.0, in float32: ROPE_INIT_FUNCTIONS[rope_type] on LlamaConfig(hidden_size=64,
# num_attention_heads=4, max_position_embeddings=4096, rope_theta=..., rope_scaling=...).
ROPE_GOLDENS: list[tuple[float, dict[str, Any], list[float], float]] = [
    (
        10000.0,
        {"rope_type": "linear", "factor": 4.0},
        [0.25, 0.07905694097280502, 0.02500000037252903, 0.007905694656074047,
         0.0024999999441206455, 0.0007905694656074047, 0.0002500000118743628, 7.905694656074047e-05],
        1.0,
    ),
    (
        500000.0,
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 256},
        [1.0, 0.193922758102417, 0.010538230650126934, 0.0009115831344388425,
         0.00017677668074611574, 3.428102354519069e-05, 6.647869668086059e-06, 1.289173155782919e-06],
        1.0,
    ),
    (
        10000.0,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        [1.0, 0.3162277638912201, 0.08125000447034836, 0.019764237105846405,
         0.0043750000186264515, 0.0007905694656074047, 0.0002500000118743628, 7.905694656074047e-05],
        1.138629436111989,
    ),
    (
        10000.0,
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 2048, "beta_fast": 16,
         "beta_slow": 2, "truncate": False},
        [1.0, 0.3162277638912201, 0.10000000149011612, 0.02510291337966919,
         0.002540104789659381, 7.905694656074047e-05, 2.499999936844688e-05, 7.905694474175107e-06],
        1.3688879454113936,
    ),
    (
        10000.0,
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 512, "mscale": 0.707,
         "mscale_all_dim": 1.0},
        [1.0, 0.23914724588394165, 0.051249999552965164, 0.008498622104525566,
         0.0002500000118743628, 7.905694656074047e-05, 2.499999936844688e-05, 7.905694474175107e-06],
        0.9210423553163399,
    ),
    (
        10000.0,
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256,
         "attention_factor": 1.5},
        [1.0, 0.24211187660694122, 0.05312500149011612, 0.009388012811541557,
         0.0006249999860301614, 0.00019764236640185118, 6.25000029685907e-05, 1.9764236640185118e-05],
        1.5,
    ),
]  # fmt: skip


def frequencies(config: ModelConfig) -> F64:
    """Radians a position, float64 [rope_dim / 2], by ModelConfig's docstring."""
    plain: F64 = config.rope_theta ** (-2.0 * np.arange(config.rope_dim // 2) / config.rope_dim)
    divided: F64 = plain / np.array(config.rope_factors or (1.0,))
    return divided


@pytest.mark.parametrize("case", range(len(ROPE_GOLDENS)))
def test_rope_goldens(case: int) -> None:
    theta, scaling, expected, scale = ROPE_GOLDENS[case]
    config = from_json(rope_theta=theta, rope_scaling=scaling)
    # transformers in float32 (u = 2^-24): the rounding of the exponent is a relative error of ln(theta) u,
    # power and division 4 u; mixing two frequencies `factor` apart with weights that carry 2 u each amplifies
    # that by at most 2 factor (llama3: turns / (high - low) <= 4/3). Ours: the factor rounded to float32, u.
    tolerance = 2.0**-24 * (math.log(theta) + 8) * 2 * scaling["factor"]
    np.testing.assert_allclose(frequencies(config), expected, rtol=tolerance)
    assert config.rope_scale == pytest.approx(scale, rel=1e-14)
    assert config.original_context == scaling.get("original_max_position_embeddings")
    spelt_new = {k: v for k, v in JSON.items() if k != "rope_theta"}
    assert config_from_json({**spelt_new, "rope_parameters": {**scaling, "rope_theta": theta}}) == config
    spelt_old = {("type" if k == "rope_type" else k): v for k, v in scaling.items()}
    assert from_json(rope_theta=theta, rope_scaling=spelt_old) == config


def yarn_by_the_paper(d: int, base: float, factor: float, length: int, slow: float, fast: float) -> F64:
    """YaRN's frequencies, arXiv 2309.00071 section 3.2, with its gamma as a ramp in the pair's index (whole
    borders), as the authors' code has it: alpha = slow, beta = fast, s = factor, L = length."""
    low = math.floor(d * math.log(length / (fast * 2 * math.pi)) / (2 * math.log(base)))
    high = math.ceil(d * math.log(length / (slow * 2 * math.pi)) / (2 * math.log(base)))
    low, high = max(low, 0), min(high, d - 1)
    h = []
    for i in range(d // 2):
        theta = base ** (-2 * i / d)
        if i <= low:
            h.append(theta)
        elif i >= high:
            h.append(theta / factor)
        else:
            gamma = 1 - (i - low) / (high - low)
            h.append((1 - gamma) * theta / factor + gamma * theta)
    return np.array(h)


@pytest.mark.parametrize("factor", [1.5, 4.0, 32.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_yarn_from_both_sources(factor: float, head_dim: int, theta: float) -> None:
    expected = yarn_by_the_paper(head_dim, theta, factor, 2048, 1, 32)
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 2048}
    a = from_json(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    b = from_gguf(
        attention__key_length=head_dim,
        attention__value_length=head_dim,
        rope__dimension_count=head_dim,
        rope__freq_base=theta,
        rope__scaling__type="yarn",
        rope__scaling__factor=factor,
        rope__scaling__original_context_length=2048,
    )
    same(a, b)
    np.testing.assert_allclose(frequencies(a), expected, rtol=2.0**-24 + 1e-13)  # factors round to float32
    assert a.rope_scale == pytest.approx(0.1 * math.log(factor) + 1, rel=1e-15)


def test_yarn_attention_factor_from_gguf() -> None:
    yarn: dict[str, Any] = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    assert from_gguf(**yarn).original_context == 4096
    assert from_gguf(**yarn, rope__scaling__yarn_attn_factor=1.25).rope_scale == 1.25
    doubled = from_gguf(**yarn, rope__scaling__attn_factor=2.0).rope_scale
    assert doubled == pytest.approx(2 * from_gguf(**yarn).rope_scale, rel=1e-15)
    assert from_gguf(**yarn, rope__scaling__yarn_ext_factor=1.0) == from_gguf(**yarn)
    with pytest.raises(UnsupportedError, match=r"yarn_ext_factor 0\.5"):
        from_gguf(**yarn, rope__scaling__yarn_ext_factor=0.5)
    with pytest.raises(UnsupportedError, match="yarn_log_multiplier"):
        from_gguf(**yarn, rope__scaling__yarn_log_multiplier=0.1)


def test_yarn_of_a_negative_multiplier_from_gguf() -> None:
    """One whose factor on cos and sin is 0 as well."""
    changes: dict[str, Any] = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
    for multiplier in (-1.0, -10 / math.log(2.0)):
        changes["rope.scaling.yarn_log_multiplier"] = multiplier
        gguf = {**GGUF, **{f"llama.{key}": value for key, value in changes.items()}}
        gguf = {key.replace("llama.", "mistral3."): value for key, value in gguf.items()}
        with pytest.raises(FormatError, match=r"mscale_all_dim -\d.* must not be negative"):
            config_from_gguf(gguf | {"general.architecture": "mistral3"}, TENSORS)


def test_linear_from_gguf() -> None:
    expected = (4.0,) * 8
    assert from_gguf(rope__scaling__type="linear", rope__scaling__factor=4.0).rope_factors == expected
    assert from_gguf(rope__scaling__factor=4.0).rope_factors == expected  # linear is the default
    assert from_gguf(rope__scale_linear=4.0).rope_factors == expected  # the key of early files
    assert from_gguf(rope__scaling__type="none", rope__scaling__factor=4.0) == EXPECTED
    assert from_gguf(rope__scaling__type="linear", rope__scaling__factor=1.0) == EXPECTED


def test_rope_freqs_tensor() -> None:
    divisors = [1.0, 1.0, 1.25, 2.0, 3.5, 8.0, 8.0, 8.0]
    tensors = {**TENSORS, "rope_freqs.weight": Values(divisors)}
    assert from_gguf(tensors).rope_factors == tuple(divisors)
    both = from_gguf(tensors, rope__scaling__factor=2.0).rope_factors
    assert both == tuple(2 * d for d in divisors)
    for wrong in ([1.0] * 7, [[1.0] * 8]):
        with pytest.raises(FormatError, match=r"rope_freqs\.weight has shape"):
            from_gguf({**TENSORS, "rope_freqs.weight": Values(wrong)})
    for absurd in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(FormatError, match="RoPE factor"):
            from_gguf({**TENSORS, "rope_freqs.weight": Values([absurd] * 8)})
    longrope = {f"rope_factors_{length}.weight": Values([1e30] * 8) for length in ("long", "short")}
    with pytest.raises(FormatError, match="RoPE factor"):  # their product is past float32
        from_gguf(
            {**TENSORS, **longrope, "rope_freqs.weight": Values([1e30] * 8)},
            rope__scaling__original_context_length=1024,
        )


def test_longrope_of_gguf() -> None:
    short, long = [1.0, 1.0, 1.25, 2.0, 3.5, 8.0, 8.0, 8.0], [2.0] * 8
    tensors = {"rope_factors_short.weight": Values(short), "rope_factors_long.weight": Values(long)}
    stated = {"rope__scaling__original_context_length": 1024, "rope__scaling__attn_factor": 1.25}
    config = from_gguf({**TENSORS, **tensors}, **stated)
    assert (config.rope_factors, config.long_rope_factors) == (tuple(short), tuple(long))
    assert (config.context, config.default_context, config.rope_scale) == (4096, 1024, 1.25)
    assert config.with_context(1024).rope_factors == tuple(short)
    assert config.with_context(1025).rope_factors == tuple(long)
    assert from_gguf({**TENSORS, **tensors}, **stated, rope__scaling__type="longrope") == config
    with pytest.raises(FormatError, match=r"original_context_length is missing"):
        from_gguf({**TENSORS, **tensors})
    for name in tensors:
        with pytest.raises(FormatError, match=rf"{name} is missing"):
            from_gguf({**TENSORS, **{k: v for k, v in tensors.items() if k != name}}, **stated)
    with pytest.raises(FormatError, match=r"rope_factors_long\.weight is missing"):
        from_gguf(rope__scaling__type="longrope")


ROPE_REFUSED: list[tuple[dict[str, Any], type[Error], str]] = [
    ({"rope_type": "dynamic"}, FormatError, "factor is missing"),
    ({"rope_type": "dynamic", "factor": 0.5}, FormatError, "ntk_factor is 0.5"),
    ({"rope_type": "ntk", "factor": 2.0}, UnsupportedError, "'ntk' is not supported; supported: default"),
    ({"rope_type": "longrope", "short_factor": []}, FormatError, "short_factor must be a list of 8"),
    ({"rope_type": "mystery"}, UnsupportedError, "'mystery' is not supported"),
    ({"rope_type": 7}, UnsupportedError, "'7' is not supported"),
    ({"rope_type": ["yarn"]}, UnsupportedError, "is not supported"),
    ({"rope_type": "linear", "factor": 2.0, "extra": 1}, UnsupportedError, "'extra' is set"),
    ({"rope_type": "default", "mrope_section": [2, 3, 3]}, UnsupportedError, "'mrope_section' is set"),
    ({"full_attention": {"rope_type": "default"}}, UnsupportedError, "differ by kind of layer"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
    ({"rope_type": "linear"}, FormatError, "factor is missing"),
    ({"rope_type": "linear", "factor": 0}, FormatError, "factor 0"),
    ({"rope_type": "linear", "factor": -1.0}, FormatError, "factor -1"),
    ({"rope_type": "linear", "factor": 1e400}, FormatError, "must be a number"),
    ({"rope_type": "linear", "factor": "2"}, FormatError, "must be a number"),
    (
        {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4},
        FormatError,
        "ascend",
    ),
    ({"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}, FormatError, "must ascend"),
    ({"rope_type": "yarn", "factor": 2, "beta_slow": 1e-320}, FormatError, "must ascend"),
    ({"rope_type": "yarn", "factor": 2, "mscale": -9, "mscale_all_dim": 1}, FormatError, "not be negative"),
    ({"rope_type": "yarn", "factor": 2, "attention_factor": -1.0}, FormatError, "rope_scale is -1"),
    ({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0}, FormatError, "context 0"),
    ({"rope_type": "yarn", "factor": 2, "rope_theta": 1.0}, FormatError, "rope_theta is both"),
    (
        {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 10**400},
        FormatError,
        "context 1000",
    ),
]


@pytest.mark.parametrize("case", range(len(ROPE_REFUSED)))
def test_rope_refused(case: int) -> None:
    scaling, kind, message = ROPE_REFUSED[case]
    with pytest.raises(kind, match=message):
        from_json(rope_scaling=scaling)


def test_rope_scaling_of_gguf_refused() -> None:
    with pytest.raises(
        UnsupportedError, match="'dynamic' is not supported; supported: none, linear, yarn, lon"
    ):
        from_gguf(rope__scaling__type="dynamic")


# Refusals


def test_unknown_architectures() -> None:
    with pytest.raises(
        UnsupportedError, match="architecture 'mamba' is not supported; supported: llama, mis"
    ):
        config_from_gguf({"general.architecture": "mamba"}, {})
    with pytest.raises(UnsupportedError, match="architecture 'bert' is not supported; supported: llama, mis"):
        config_from_json({"model_type": "bert"})
    with pytest.raises(UnsupportedError, match="no language model"):
        from_json(architectures=["LlamaForSequenceClassification"])
    with pytest.raises(FormatError, match=r"general\.architecture is missing"):
        config_from_gguf({}, {})
    with pytest.raises(FormatError, match="no model_type"):
        config_from_json({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "'quantization_config' is set"),
        ({"num_local_experts": 8}, "'num_local_experts' is set"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is set"),
    ],
)
def test_unknown_features_of_json(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        from_json(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_shared_count": 1}, "expert_shared_count"),
        ({"attention__causal": False, "attention__sliding_window": 8}, "for Gemma 3 alone"),
        ({"logit_scale": 0.5}, r"'llama\.logit_scale' is set \('0\.5'\)"),
        ({"some_new_feature": "on"}, r"'llama\.some_new_feature' is set"),
        ({"rope__dimension_sections": np.array([1, 2])}, "dimension_sections"),
        ({"attention__value_length": 8}, "values of 8 beside keys of 16"),
    ],
)
def test_unknown_features_of_gguf(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        from_gguf(**changes)


def test_features_switched_off() -> None:
    assert from_gguf(expert_count=0, logit_scale=0.0, some_new_feature=False, more=np.zeros(2)) == EXPECTED
    same(from_json(quantization_config=None, num_local_experts=0, sliding_window=None), EXPECTED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "n_layers is 0"),
        ({"num_hidden_layers": 2**31}, "n_layers is 2147483648"),
        ({"num_hidden_layers": -1}, "n_layers is -1"),
        ({"num_hidden_layers": 2.0}, "must be a whole number"),
        ({"num_hidden_layers": True}, "must be a whole number"),
        ({"num_hidden_layers": "2"}, "must be a whole number"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": 0}, "dim is 0"),
        ({"hidden_size": 2**40}, "dim is"),
        ({"hidden_size": 66}, "head_dim is missing"),
        ({"num_attention_heads": 0}, "n_heads is 0"),
        ({"num_key_value_heads": 0}, "n_kv_heads is 0"),
        ({"num_key_value_heads": 3}, "no multiple of n_kv_heads"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": -16}, "head_dim is -16"),
        ({"head_dim": 15}, "rope_dim is 15; it must be even"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 2**32}, "vocab_size is"),
        ({"intermediate_size": 0}, "ff_dim is 0"),
        ({"max_position_embeddings": 0}, "context is 0"),
        ({"rms_norm_eps": 0.0}, r"norm_eps is 0\.0"),
        ({"rms_norm_eps": -1e-5}, "norm_eps is"),
        ({"rms_norm_eps": math.nan}, "must be a number"),
        ({"rope_theta": 0.0}, r"rope_theta is 0\.0"),
        ({"rope_theta": math.inf}, "must be a number"),
        ({"rope_theta": 0.999}, r"rope_theta is 0\.999; it must be from 1 to 1e\+15"),
        ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2}}, "theta 1"),
        ({"rope_theta": 2e15}, "rope_theta is 2000000000000000"),
        ({"rms_norm_eps": 1e-320}, "norm_eps is 1e-320; it must be from 1.18e-38 to 1"),
        ({"rms_norm_eps": 1e-39}, "norm_eps is 1e-39"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 1 << 28}, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.125}, "max_position_embeddings": 1 << 28},
            "RoPE factor of 0.125 turns pairs by more than 1073741824 radians within the context of 2684",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 8.0}},
            "'factor' of RoPE is both '2.0' and '8.0'; delete the one that is wrong",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
            "rope_type is both 'dynamic' and 'linear'",
        ),
        ({"rope_parameters": {"rope_theta": 5e5}}, r"rope_theta is both '10000\.0' and '500000\.0'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 2.0}}, None),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"architectures": "Llama"}, "no language model"),
    ],
)
def test_absurd_hyperparameters(changes: dict[str, Any], message: str | None) -> None:
    """None: taken."""
    if message is None:
        from_json(**changes)
        return
    with pytest.raises((FormatError, UnsupportedError), match=message):
        from_json(**changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "field"),
    [
        ("granite", {"attention_multiplier": 1e-320}, "attention_scale"),
        ("gemma2", {"attn_logit_softcapping": 1e-320}, "attention_cap"),
        ("gemma2", {"final_logit_softcapping": 1e-39}, "logit_cap"),
        ("granite", {"embedding_multiplier": 1e-320}, "embedding_scale"),
        ("granite", {"logits_scaling": 1e299}, "logit_scale"),
        ("cohere", {"layer_norm_eps": 1e-320}, "norm_eps"),
        ("gemma3_text", {"rope_local_base_freq": 0.5, "sliding_window": 8}, "local_rope_theta"),
        ("gemma3_text", {"rope_local_base_freq": 0, "sliding_window": 8}, "local_rope_theta"),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 0.5},
                },
                "sliding_window": 8,
            },
            "local_rope_theta",
        ),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": 1e-40}}, "rope_sc"),
    ],
)
def test_numbers_that_float32_has_no_room_for(model_type: str, changes: dict[str, Any], field: str) -> None:
    """Above 0 in Python, 0 for the arithmetic, or infinite once they divide; and angles that grow."""
    changes = {"model_type": model_type, "architectures": None, "hidden_act": None, **changes}
    with pytest.raises(FormatError, match=f"{field}.* is .*; it must be from"):
        from_json(**changes)


def test_rope_base_of_gguf() -> None:
    with pytest.raises(FormatError, match=r"rope_theta is 0\.5; it must be from 1"):
        from_gguf(rope__freq_base=0.5)


def test_rope_dim_past_the_head() -> None:
    with pytest.raises(FormatError, match="rope_dim is 32; it must be even and at most head_dim, 16"):
        from_gguf(rope__dimension_count=32)
    assert from_gguf(rope__dimension_count=8).rope_dim == 8


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**64, 10**400]),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)
rope_types = st.sampled_from(["linear", "llama3", "yarn", "default", "dynamic"])
rope_fields = st.dictionaries(
    st.sampled_from([
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast",
        "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate", "rope_theta",
    ]), st.one_of(odd, st.floats(0, 100), st.integers(1, 9999)),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(JSON)), odd, max_size=2), rope_types, rope_fields)
def test_random_json(changes: dict[str, Any], kind: str, scaling: dict[str, Any]) -> None:
    try:
        config = from_json(**changes, rope_scaling={"rope_type": kind, **scaling})
    except Error as error:
        str(error).encode()  # fit to be printed
        return
    assert np.isfinite(frequencies(config)).all()


arrays = st.lists(st.integers(0, 3), max_size=3).map(np.array)
GGUF_KEYS = [*GGUF, *("llama.rope.scaling." + k for k in ("type", "factor", "yarn_beta_slow", "attn_factor"))]


@given(st.dictionaries(st.sampled_from(GGUF_KEYS), odd | arrays, max_size=3), st.booleans())
def test_random_metadata(changes: dict[str, Any], yarn: bool) -> None:
    base = {**GGUF, "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0} if yarn else GGUF
    try:
        config = config_from_gguf({**base, **changes}, TENSORS)
    except Error as error:
        str(error).encode()
        return
    assert np.isfinite(frequencies(config)).all()


def test_located() -> None:
    with pytest.raises(UnsupportedError, match=r"^some/config\.json: arch"), located("some/config.json"):
        config_from_json({"model_type": "bert"})


# Sampling defaults


def test_generation_from_json() -> None:
    generation_config = {
        "eos_token_id": [7, 9, 2],
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": None,
        "repetition_penalty": 1.1,
        "do_sample": True,
        "transformers_version": "5",
    }
    assert generation_from_json({"eos_token_id": 2}, generation_config, 10) == GenerationDefaults(
        eos_ids=(7, 9, 2), temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1, penalty_window=-1
    )
    assert generation_from_json({"eos_token_id": [1, 2]}, None, 10) == GenerationDefaults(eos_ids=(1, 2))
    assert generation_from_json({}, {"do_sample": False, "temperature": 0.6}, 10).temperature == 0.0
    assert generation_from_json({}, {}, 10) == GenerationDefaults()


def test_generation_from_gguf() -> None:
    metadata = {
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6,
        "tokenizer.ggml.eom_token_id": 5,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": -1,
        "general.sampling.top_p": 0.75,
        "general.sampling.min_p": 0.25,
        "general.sampling.penalty_repeat": 1.5,
    }
    assert generation_from_gguf(metadata, 10) == GenerationDefaults(
        eos_ids=(5, 6), temperature=0.5, top_k=0, top_p=0.75, min_p=0.25, repetition_penalty=1.5
    )
    assert generation_from_gguf({"general.sampling.temp": -1.0}, 10).temperature == 0.0
    assert generation_from_gguf({}, 10) == GenerationDefaults()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"eos_token_id": 10}, "'10' is not the id .*vocabulary 10"),
        ({"eos_token_id": -1}, "'-1' is not the id"),
        ({"eos_token_id": [True]}, "'True' is not the id"),
        ({"eos_token_id": "2"}, "'2' is not the id"),
        ({"temperature": -0.5}, r"temperature is -0\.5"),
        ({"temperature": "hot"}, "must be a number"),
        ({"top_p": 1.5}, r"top_p is 1\.5, outside 0 to 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, r"top_k must be a whole number, not '1\.5'"),
        ({"top_k": 0.9}, r"top_k must be a whole number, not '0\.9'"),
        ({"repetition_penalty": math.nan}, "must be a number"),
        ({"temperature": 1001.0}, "temperature is 1001, outside 0 to 1000"),
        ({"top_k": 2**31}, "top_k is 2.*outside 0 to 2"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0, outside 0\.001 to 1000"),
    ],
)
def test_generation_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        generation_from_json({}, table, 10)


@pytest.mark.parametrize(
    ("key", "value", "is_taken"),
    [
        ("temp", 1e299, False),
        ("temp", 1000.0, True),
        ("top_k", 2**31, False),
        ("top_k", 2**31 - 1, True),
        ("top_k", 5.0, True),
        ("penalty_repeat", 0.0, False),
        ("penalty_repeat", 1000.0, True),
        ("min_p", 1.5, False),
    ],
)
def test_defaults_of_gguf_are_what_sampling_takes(key: str, value: float, is_taken: bool) -> None:
    metadata = {f"general.sampling.{key}": value}
    if not is_taken:
        with pytest.raises(FormatError, match=rf"general\.sampling\.{key} is .*, outside"):
            generation_from_gguf(metadata, 10)
        return
    defaults = {name: value for name, value in vars(generation_from_gguf(metadata, 10)).items() if value}
    assert value in vars(SamplingParams().resolve(defaults)).values()


@pytest.mark.parametrize("value", [1.5, 0.9, -0.5, math.nan])
def test_a_part_of_a_token_is_no_top_k(value: float) -> None:
    with pytest.raises(FormatError, match=r"general\.sampling\.top_k must be a whole number, not"):
        generation_from_gguf({"general.sampling.top_k": value}, 10)


def test_json_file_to_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(JSON))
    same(config_from_json(read_json(path)), EXPECTED)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_longrope_may_say_its_type_twice(key: str) -> None:
    """As newer writers save Phi-3's and Phi-4's."""
    spec = next(spec for spec in golden_specs("families") if spec.name == "phi3_long")
    expected = config_from_json(spec.config)
    table = spec.config["rope_scaling"]
    rest = {name: value for name, value in spec.config.items() if name != "rope_scaling"}
    for types in ({"type": "longrope", "rope_type": "longrope"}, {"type": "su", "rope_type": "longrope"}):
        assert config_from_json({**rest, key: {**table, **types}}) == expected


def test_a_familys_own_parameters_go_before_a_base_of_the_file() -> None:
    """As in transformers, whose defaults have a base in them; test_keys.py has its logits."""
    spec = next(spec for spec in golden_specs("families") if spec.name == "ministral3")
    rest = {name: v for name, v in spec.config.items() if name != "rope_parameters"}
    assert config_from_json({**rest, "rope_theta": 2e8}).rope_theta == 1e6
