"""tinyllm's logits against Hugging Face transformers (golden/) and against the numpy reference, for every
shape of Llama.

The reference itself is held to transformers in test_reference.py; the models come from helpers_models.py and
helpers_gguf.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
from helpers_gguf import FORMATS, small_tokenizer, write_gguf
from helpers_models import (
    GOLDEN_DIR,
    Spec,
    golden_model,
    golden_spec,
    golden_specs,
    random_ids,
    random_weights,
    rounded,
    write_hf_directory,
)

import tinyllm

# The promise for float32 models with a float32 cache: 1e-4 of the largest logit, for positions below 1000.
TOLERANCE = 1e-4


def tinyllm_logits(path: Path, ids: list[int], **options: Any) -> npt.NDArray[np.float32]:
    with tinyllm.load(path, device="cpu", cache_type="f32", **options) as llm:
        logits = llm.logits(ids)
    assert logits.dtype == np.float32
    return logits


def relative_error(logits: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Largest difference, relative to the largest expected logit."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def prompt(spec: Spec) -> list[int]:
    return random_ids(spec.config, spec.seed, spec.n_tokens)


@pytest.mark.parametrize("spec", golden_specs(), ids=lambda spec: spec.name)
def test_safetensors_equals_transformers(spec: Spec, tmp_path: Path) -> None:
    goldens = np.load(GOLDEN_DIR / "logits.npz")
    logits = tinyllm_logits(golden_model(spec, tmp_path), prompt(spec))
    assert logits.shape == (spec.n_tokens, spec.config["vocab_size"])
    assert (
        relative_error(logits[goldens[spec.name + ".positions"]], goldens[spec.name + ".logits"]) < TOLERANCE
    )


def gguf_rounds(spec: Spec) -> bool:
    """Whether a GGUF holds float32 roundings of what config.json says exactly: llama3's factors, YaRN's
    magnitude."""
    rope = reference.rope_settings(spec.config)
    return rope["rope_type"] == "llama3" or "attention_factor" in rope or "mscale" in rope


@pytest.mark.parametrize("spec", golden_specs(), ids=lambda spec: spec.name)
def test_gguf_equals_safetensors(spec: Spec, tmp_path: Path) -> None:
    """The same weights from both kinds of file give the same bits, unless the GGUF's rotary settings are
    rounded."""
    weights = random_weights(spec.config, spec.seed)
    write_gguf(tmp_path / "model.gguf", spec.config, weights)
    from_gguf = tinyllm_logits(tmp_path / "model.gguf", prompt(spec))
    from_directory = tinyllm_logits(write_hf_directory(tmp_path / "hf", spec.config, weights), prompt(spec))
    if gguf_rounds(spec):
        assert relative_error(from_gguf, reference.logits(spec.config, weights, prompt(spec))) < TOLERANCE
    else:
        np.testing.assert_array_equal(from_gguf, from_directory)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_safetensors(dtype: str, tmp_path: Path) -> None:
    """Weights are taken as stored, and only the weights are rounded."""
    spec = golden_spec("llama3")
    weights = random_weights(spec.config, spec.seed)
    logits = tinyllm_logits(golden_model(spec, tmp_path, dtype=dtype), prompt(spec))
    assert (
        relative_error(logits, reference.logits(spec.config, rounded(weights, dtype), prompt(spec)))
        < TOLERANCE
    )
    assert relative_error(logits, reference.logits(spec.config, weights, prompt(spec))) > TOLERANCE


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_gguf_equals_safetensors(dtype: str, tmp_path: Path) -> None:
    spec = golden_spec("head_dim")
    weights = rounded(random_weights(spec.config, spec.seed), dtype)
    directory = golden_model(spec, tmp_path / "hf", dtype=dtype)
    write_gguf(tmp_path / "model.gguf", spec.config, weights, format=dtype)
    np.testing.assert_array_equal(
        tinyllm_logits(tmp_path / "model.gguf", prompt(spec)), tinyllm_logits(directory, prompt(spec))
    )


def test_shards_equal_one_file(tmp_path: Path) -> None:
    spec = golden_spec("attention_bias")
    one = tinyllm_logits(golden_model(spec, tmp_path / "one"), prompt(spec))
    np.testing.assert_array_equal(
        one, tinyllm_logits(golden_model(spec, tmp_path / "three", n_shards=3), prompt(spec))
    )


def test_threads_change_nothing(tmp_path: Path) -> None:
    spec = golden_spec("llama3")
    path = golden_model(spec, tmp_path)
    one = tinyllm_logits(path, prompt(spec), threads=1)
    np.testing.assert_array_equal(one, tinyllm_logits(path, prompt(spec), threads=2))


def test_a_gguf_with_a_vocabulary_has_the_same_logits(tmp_path: Path) -> None:
    spec = golden_spec("llama2")
    config = {**spec.config, "vocab_size": 400}
    weights = random_weights(config, spec.seed)
    write_gguf(tmp_path / "ids.gguf", config, weights)
    write_gguf(tmp_path / "text.gguf", config, weights, tokenizer=small_tokenizer(400))
    np.testing.assert_array_equal(
        tinyllm_logits(tmp_path / "text.gguf", prompt(spec)),
        tinyllm_logits(tmp_path / "ids.gguf", prompt(spec)),
    )


def quantizable_config() -> dict[str, Any]:
    """One layer whose rows are multiples of 256, as K-quants need, with a vocabulary that fills no whole
    panel."""
    return {
        **golden_spec("llama3").config,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 105,
    }


@pytest.mark.parametrize("format", FORMATS)
def test_formats_equal_the_reference_on_dequantized_weights(format: str, tmp_path: Path) -> None:
    """32 prompts of two tokens. Quantized weights meet int8 activations, in the reference too. Beside
    float32's roundings (hundreds of 2^-24 at most: 1e-5) only one thing can differ: an activation so near the
    middle between two integers that it rounds the other way. With about 3000 activations a prompt, each
    within 1e-5 of a middle with a probability of 1e-5 times a few, that is one prompt in ten or so; three in
    four must be free of it, and the others stay below what rounding all activations to int8 costs."""
    config = quantizable_config()
    held = write_gguf(tmp_path / "model.gguf", config, random_weights(config, seed=7), format=format)
    quantized = () if format in ("F32", "F16", "BF16") else held
    errors, int8_errors = [], []
    with tinyllm.load(tmp_path / "model.gguf", device="cpu", cache_type="f32") as llm:
        for seed in range(32):
            ids = random_ids(config, seed, 2)
            expected = reference.logits(config, held, ids, quantized=quantized)
            errors.append(relative_error(llm.logits(ids), expected))
            int8_errors.append(relative_error(reference.logits(config, held, ids), expected))
    assert np.quantile(errors, 0.75) < 1e-5
    assert max(errors) < max(*int8_errors, 1e-5)


def test_formats_may_differ_from_matrix_to_matrix(tmp_path: Path) -> None:
    """As in the mixtures people have (Q4_K_M and the like), with matrices that cannot be quantized left at
    F16."""
    config = {**quantizable_config(), "intermediate_size": 172}
    weights = random_weights(config, seed=8)
    formats = {
        "model.embed_tokens.weight": "Q5_0",
        "model.layers.0.self_attn.v_proj.weight": "Q6_K",
        "lm_head.weight": "Q8_0",
    }
    held = write_gguf(tmp_path / "model.gguf", config, weights, format="Q4_K", formats=formats)
    quantized = set(held) - {"model.layers.0.mlp.down_proj.weight"}
    errors = []
    with tinyllm.load(tmp_path / "model.gguf", device="cpu", cache_type="f32") as llm:
        for seed in range(16):
            ids = random_ids(config, seed, 2)
            errors.append(
                relative_error(llm.logits(ids), reference.logits(config, held, ids, quantized=quantized))
            )
    assert np.quantile(errors, 0.75) < 1e-5
