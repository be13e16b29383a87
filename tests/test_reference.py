"""The numpy reference against Hugging Face transformers' logits in golden/: two implementations that share no
line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from helpers_models import GOLDEN_DIR, Spec, golden_spec, golden_specs, random_ids, random_weights


def tolerance(spec: Spec) -> float:
    """What transformers' own float32 steps may add, relative to the largest logit: rotary angles are products
    of a frequency and a position, each product off by up to 2 roundings of its size, at most 2 * n_tokens *
    2^-24; norms and the softmax are off by a few roundings at each of about 8 places a layer, with room for 8
    each."""
    n_layers = int(spec.config["num_hidden_layers"])
    return (2 * spec.n_tokens + 64 * n_layers) * 2.0**-24


def error(spec: Spec, config: dict[str, Any], weights: dict[str, Any]) -> float:
    """Largest difference between reference and golden, relative to the largest logit."""
    goldens = np.load(GOLDEN_DIR / "logits.npz")
    golden = goldens[spec.name + ".logits"]
    logits = reference.logits(config, weights, random_ids(spec.config, spec.seed, spec.n_tokens))
    difference = np.abs(logits[goldens[spec.name + ".positions"]] - golden)
    return float(difference.max() / np.abs(golden).max())


@pytest.mark.parametrize("spec", golden_specs(), ids=lambda spec: spec.name)
def test_reference_equals_transformers(spec: Spec) -> None:
    assert error(spec, spec.config, random_weights(spec.config, spec.seed)) < tolerance(spec)


@pytest.mark.parametrize("spec", golden_specs(), ids=lambda spec: spec.name)
def test_goldens_notice_what_each_model_is_there_for(spec: Spec) -> None:
    """With a model's special part left out or slightly wrong, its logits are off by far more than any
    tolerance."""
    weights = random_weights(spec.config, spec.seed)
    config = dict(spec.config)
    rope = reference.rope_settings(config)
    if rope["rope_type"] != "default":
        rope["factor"] *= 1.01
        config["rope_parameters"] = rope
    elif any(name.endswith(".bias") for name in weights):
        left_out = ("v_proj.bias", "down_proj.bias")
        weights = {name: w for name, w in weights.items() if not name.endswith(left_out)}
    else:
        config["rope_parameters"] = {"rope_theta": rope["rope_theta"] * 1.01}
    assert error(spec, config, weights) > 1e-3


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("yarn", "beta_fast", 4.0),
        ("yarn", "beta_slow", 0.5),
        ("yarn", "attention_factor", 1.0),
        ("yarn_attention_factor", "beta_fast", 32.0),
        ("yarn_attention_factor", "beta_slow", 1.0),
        ("yarn_attention_factor", "attention_factor", 1.31),
        ("yarn_mscale", "mscale_all_dim", 0.0),
        ("llama31", "low_freq_factor", 1.1),
        ("llama31", "high_freq_factor", 4.1),
        ("llama31", "original_max_position_embeddings", 65),
    ],
)
def test_goldens_notice_every_rotary_setting(name: str, key: str, value: float) -> None:
    spec = golden_spec(name)
    rope = reference.rope_settings(spec.config)
    assert rope.get(key) != value
    config = {**spec.config, "rope_parameters": {**rope, key: value}}
    assert error(spec, config, random_weights(spec.config, spec.seed)) > 1e-3
