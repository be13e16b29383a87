"""Every family of models against Hugging Face transformers (golden/families.npz), from both kinds of file,
and against llama.cpp where its Python package is installed; the table in docs/families.md; what is refused.

The models come from helpers_models.py and helpers_gguf.py, the table from families_table.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import families_table
import numpy as np
import pytest
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import Spec, golden_model, golden_specs, random_ids, random_weights, write_hf_directory

import tinyllm
from tinyllm import loading
from tinyllm.config import config_from_gguf, config_from_json
from tinyllm.config.families import FAMILIES, SUPPORTED
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.modelfiles import ModelFiles, read_model

TOLERANCE = 1e-4  # of the largest logit: the promise for float32 models with a float32 cache
SPECS = golden_specs("families")
IN_GGUF = [spec for spec in SPECS if spec.in_gguf]


def by_name(spec: Spec) -> str:
    return spec.name


def spec_of(name: str) -> Spec:
    return next(spec for spec in SPECS if spec.name == name)


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_safetensors_equal_transformers(spec: Spec, tmp_path: Path) -> None:
    assert families_table.error(spec, golden_model(spec, tmp_path)) < TOLERANCE


@pytest.mark.parametrize("spec", IN_GGUF, ids=by_name)
def test_gguf_equals_transformers(spec: Spec, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, spec.config, random_weights(spec.config, spec.seed))
    assert families_table.error(spec, path) < TOLERANCE


# What a golden model must have beyond Llama, with Llama's value. A golden that does not notice the feature's
# absence would not prove it.
LLAMAS: dict[str, Any] = {
    "windows": (), "ropes": (), "attention_cap": 0.0, "logit_cap": 0.0, "embedding_scale": 1.0,
    "residual_scale": 1.0, "logit_scale": 1.0, "parallel": False, "norm_kind": "rms", "activation": "silu",
    "local_rope_theta": 77.0, "rope_dim": None, "query_growth": 0.0, "qk_norm_late": False, "qkv_limit": 0.0,
    "ntk_factor": 0.0,
}  # fmt: skip
# What a feature's absence cannot be where Llama's value needs tensors that such a model does not have.
INSTEAD: dict[tuple[str, Any], dict[str, Any] | None] = {
    ("activation", "relu_squared"): {"activation": "xielu", "xielu": ((0.5, 0.1, 0.3, -0.1),) * 2},
    ("activation", "xielu"): {"activation": "relu_squared"},
    ("norm_kind", "plain"): None,
}


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_goldens_notice_each_feature(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = golden_model(spec, tmp_path)
    config = config_from_json(spec.config)
    for name, llamas in LLAMAS.items():
        value = getattr(config, name)
        changed = {name: config.head_dim if name == "rope_dim" else llamas}
        if value == changed[name] or (name == "local_rope_theta" and value is None):
            continue
        if name == "ntk_factor" and spec.context is None:  # nothing is stretched
            continue
        instead = INSTEAD.get((name, value), changed)
        if instead is None:
            continue
        changed = instead
        if name == "rope_dim":
            changed |= {"rope_factors": None, "long_rope_factors": None}

        def read(where: Path, changed: dict[str, Any] = changed) -> ModelFiles:
            files = read_model(where)
            return replace(files, config=replace(files.config, **changed))

        with monkeypatch.context() as patch:
            patch.setattr(loading, "open_model", read)
            assert families_table.error(spec, path) > 3 * TOLERANCE, name


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_the_same_bits_however_the_prompt_is_cut(spec: Spec, tmp_path: Path) -> None:
    path = golden_model(spec, tmp_path)
    ids = random_ids(spec.config, spec.seed, spec.n_tokens)
    with tinyllm.load(path, context=spec.context, threads=2) as llm:
        whole = llm.logits(ids)
    with tinyllm.load(path, context=spec.context, threads=1) as llm, llm.session() as session:
        for first, last in ((0, 1), (1, 39), (39, 40), (40, 41), (41, spec.n_tokens - 1)):
            session.append(ids[first:last])
            np.testing.assert_array_equal(session.logits, whole[last - 1])
        with session.fork() as other:
            other.append(ids[-1:])
            np.testing.assert_array_equal(other.logits, whole[-1])


def test_the_page_has_the_table_of_families() -> None:
    text = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    _, rest = text.split("<!-- families -->")
    assert rest.split("<!-- /families -->")[0].strip() == families_table.table(), (
        "run `python tests/families_table.py` and put what it prints into docs/families.md"
    )


def test_every_family_has_a_golden() -> None:
    proven = {spec.config["model_type"] for file in families_table.FILES for spec in golden_specs(file)}
    for kind, row in FAMILIES.items():
        assert (row.text_of or kind) in proven, kind


# Long texts


def test_context_chooses_the_long_factors(tmp_path: Path) -> None:
    """With LongRoPE the context is the original one unless a longer one is asked for."""
    spec = spec_of("phi3_short")
    path, ids = golden_model(spec, tmp_path), random_ids(spec.config, spec.seed, spec.n_tokens)
    with tinyllm.load(path) as llm:
        assert llm.context == 64
        short = llm.logits(ids)
    with tinyllm.load(path, context=64) as llm:
        np.testing.assert_array_equal(llm.logits(ids), short)
    with tinyllm.load(path, context=65) as llm:
        assert families_table.relative(llm.logits(ids), short) > TOLERANCE


# Language models in models that also read images


@pytest.mark.parametrize("style", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize(
    ("name", "outer"), [("gemma3", "gemma3"), ("mistral_nemo", "mistral3"), ("ministral3", "mistral3")]
)
def test_the_language_model_of_a_larger_one(style: str, name: str, outer: str, tmp_path: Path) -> None:
    spec = spec_of(name)
    weights = {
        key.replace("model.", style, 1).replace(
            "lm_head", "language_model.lm_head" if style[0] == "l" else "lm_head"
        ): w
        for key, w in random_weights(spec.config, spec.seed).items()
    }
    image = np.zeros((2, 2), np.float32)
    weights |= {"vision_tower.a.weight": image, "multi_modal_projector.b.weight": image}
    config = {"model_type": outer, "architectures": ["XForConditionalGeneration"], "text_config": spec.config,
              "vision_config": {"hidden_size": 8}, "tie_word_embeddings": name == "gemma3"}  # fmt: skip
    assert families_table.error(spec, write_hf_directory(tmp_path, config, weights)) < TOLERANCE


# Refusals


def test_unknown_architectures_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="'mamba' is not supported; supported: llama, mistral"):
        config_from_json({"model_type": "mamba"})
    with pytest.raises(UnsupportedError, match=r"'rwkv7' is not supported; supported: .*command-r"):
        config_from_gguf({"general.architecture": "rwkv7"}, {})
    assert {"gemma3", "command-r", "qwen3", "phi3"} <= set(SUPPORTED)


@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_unknown_keys_are_refused(spec: Spec) -> None:
    """Whatever a config.json says beyond what its family knows is refused when it is set."""
    config_from_json({**spec.config, "use_cache": True, "mystery": None, "other": 0, "more": False})
    with pytest.raises(UnsupportedError, match="'mystery' is set \\('7'\\)"):
        config_from_json({**spec.config, "mystery": 7})


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("yi", {"pretraining_tp": 1, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"},
                "unsloth_fixed": True, "rope_interleaved": False, "eos_token_id": [1, 2]}),
        ("qwen2", {"use_mrope": False, "_name_or_path": "x", "_attn_implementation_autoset": True}),
        ("phi3_long", {"full_attn_mod": 1, "interpolate_factor": 1, "embd_pdrop": 0.1, "lm_head_bias": False,
                       "auto_map": {"AutoConfig": "x"}}),
        ("smollm3", {"max_window_layers": 28, "pretraining_tp": 2}),
        ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4096}),
        ("gemma3", {"cache_implementation": "hybrid", "attn_logit_softcapping": None}),
        ("cohere", {"model_max_length": 131072}),
        ("cohere2", {"layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "rotary_pct": 1.0,
                     "position_embedding_type": "rope_gptj", "use_parallel_block": True, "use_qk_norm": False,
                     "use_gated_activation": True, "use_embedding_sharing": True,
                     "use_parallel_embedding": True}),
    ],
)  # fmt: skip
def test_keys_that_change_nothing(name: str, keys: dict[str, Any]) -> None:
    """As the files of well-known models have them."""
    assert config_from_json({**spec_of(name).config, **keys}) == config_from_json(spec_of(name).config)


def test_the_little_that_gemma3s_text_config_says() -> None:
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    config = config_from_json({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.windows[4:7], config.local_rope_theta, config.tied) == ((1024, 0, 1024), 10000.0, True)


def test_an_unknown_text_config_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="'ministral9' is not supported"):
        config_from_json({"model_type": "mistral3", "text_config": {"model_type": "ministral9"}})


@pytest.mark.parametrize(
    "key",
    ["attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale",
     "use_qk_norm", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
     "no_rope_layers", "sliding_window", "sliding_window_pattern", "rope_local_base_freq",
     "partial_rotary_factor"],
)  # fmt: skip
def test_one_familys_features_are_unknown_to_another(key: str) -> None:
    """transformers would ignore such a key in a Llama; here nobody guesses what was meant."""
    with pytest.raises(UnsupportedError, match=key):
        config_from_json({**spec_of("yi").config, key: 0.5})


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("gemma2", {"hidden_activation": "gelu"}, UnsupportedError, "'gelu' is not supported"),
        ("qwen3", {"hidden_act": "relu"}, UnsupportedError, "'relu' is not supported, only silu"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, UnsupportedError, "layer_types"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, UnsupportedError, "layer_types"),
        ("gemma2", {"query_pre_attn_scalar": 0}, FormatError, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, FormatError, "attention_cap is -1"),
        ("gemma2", {"use_bidirectional_attention": True}, UnsupportedError, "use_bidirectional_attention"),
        ("granite", {"logits_scaling": 0}, FormatError, "logits_scaling"),
        ("smollm3", {"no_rope_layers": [1, 0]}, FormatError, "no_rope_layers"),
        ("mistral_window", {"sliding_window": -5}, FormatError, "window"),
        ("phi3_long", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, FormatError, "short_factor"),
        ("phi3_long", {"rope_scaling": {"type": "su", "short_factor": [1] * 6, "long_factor": [0] * 6}},
         FormatError, "RoPE factor"),
        ("gemma3", {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}},
                    "rope_scaling": None}, UnsupportedError, "differ by kind of layer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name: str, changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        config_from_json({**spec_of(name).config, **changes})


def test_new_spellings_of_gemma3() -> None:
    old = spec_of("gemma3").config
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    del new["sliding_window_pattern"]
    new["layer_types"] = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert config_from_json(new) == config_from_json(old)


# llama.cpp

# Both compute in float32 with a float32 cache; llama.cpp looks GELU up in a table of float16.
LLAMA_CPP_TOLERANCE = {"gelu_pytorch_tanh": 5e-3, None: 1e-4}
LLAMA_CPP_DIFFERS = {
    "gpt_oss": "llama.cpp rounds the first and last pair that YaRN mixes, gpt-oss does not",
    "phi3": "llama.cpp leaves out Phi-3's window",
    "phi3_short": "llama.cpp rounds contexts up to 256 tokens, past this model's original context",
    "cohere_plus": "llama.cpp expects q/k norms in Command R+ only from 64 layers on",
    "yarn_attention_factor": "llama.cpp does not take YaRN's betas and attention factor as transformers does",
}


@pytest.mark.parametrize("spec", [*IN_GGUF, *golden_specs()], ids=by_name)
def test_llama_cpp_agrees(spec: Spec, tmp_path: Path) -> None:
    """The logits of a whole prompt, which is given and so the same for both."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if spec.name in LLAMA_CPP_DIFFERS:
        pytest.skip(LLAMA_CPP_DIFFERS[spec.name])
    path = tmp_path / "model.gguf"
    config = {**spec.config, "vocab_size": 400}  # it loads no file without a vocabulary
    spec = spec._replace(config=config)
    write_gguf(path, config, random_weights(config, spec.seed), tokenizer=small_tokenizer(400))
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(path), n_ctx=spec.context or spec.n_tokens, n_batch=512, logits_all=True, type_k=f32, type_v=f32,
        verbose=False,
    )  # fmt: skip
    model.eval(random_ids(config, spec.seed, spec.n_tokens))
    theirs = np.array(model.scores[: spec.n_tokens])
    tolerance = LLAMA_CPP_TOLERANCE[config.get("hidden_activation")]
    assert families_table.relative(families_table.logits(spec, path), theirs) < tolerance
