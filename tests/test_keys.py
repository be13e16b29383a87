"""Keys of config.json and of GGUF metadata: what transformers reads is obeyed, what it ignores is not applied
but said, and nothing else passes in silence (golden/config_keys.npz, golden/keys.json, docs/keys.md).

helpers_keys.py has the cases, golden/sweep_keys.py makes keys.json, keys_table.py makes docs/keys.md."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import keys_table
import numpy as np
import pytest
from families_table import relative
from helpers_gguf import ARCHITECTURES, write_gguf
from helpers_keys import BASES, N_TOKENS, NOT_IN_TRANSFORMERS, found_cases
from helpers_models import GOLDEN_DIR, Spec, golden_specs, random_ids, random_weights, write_hf_directory

import tinyllm
from tinyllm import loading
from tinyllm.config import config_from_gguf, config_from_json
from tinyllm.config.families import FAMILIES, JSON_HARMLESS
from tinyllm.config.from_gguf import GGUF_HARMLESS
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import read_json
from tinyllm.files.gguf import read_gguf
from tinyllm.measure.inspection import inspect_model
from tinyllm.modelfiles import read_model

TOLERANCE = 1e-4  # of the largest logit: the promise for float32 models with a float32 cache
SPECS = {spec.name: spec for file in ("specs", "families") for spec in golden_specs(file)}
ODD = {spec.name: spec for spec in golden_specs("config_keys")}


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="tinyllm"):
        yield caplog


def config_of(name: str, *without: str, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**SPECS[name].config, **changes}.items() if k not in without}


# ---- what transformers does is done

# The key that a model of config_keys.json warns of; the others say nothing that is ignored.
WARNED = {
    "olmo3_flat": "rope_parameters",
    "olmo3_truncate": "truncate",
    "olmo3_pattern": "sliding_window_pattern",
    "gemma3_flat": "rope_parameters",
    "gemma3_softcap": "attn_logit_softcapping",
    "gemma2_pattern": "sliding_window_pattern",
    "qwen3_moe_window": "max_window_layers",
    "mixtral_norm_topk_prob": "norm_topk_prob",
    "ministral3_theta_alone": "rope_theta",
    "mistral_use_sliding_window": "use_sliding_window",
}


@pytest.mark.parametrize("spec", ODD.values(), ids=lambda spec: spec.name)
def test_logits_are_those_of_transformers(
    spec: Spec, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    weights = random_weights(spec.config, spec.seed)
    if spec.config["model_type"] == "qwen2":  # which has no such biases, whatever attention_bias says
        weights = {name: w for name, w in weights.items() if "o_proj.bias" not in name}
    path = write_hf_directory(tmp_path, spec.config, weights)
    with tinyllm.load(path, device="cpu", cache_type="f32") as llm:
        logits = llm.logits(random_ids(spec.config, spec.seed, spec.n_tokens))
    goldens = np.load(GOLDEN_DIR / "config_keys.npz")
    positions, expected = goldens[spec.name + ".positions"], goldens[spec.name + ".logits"]
    assert relative(logits[positions], expected) < TOLERANCE
    said = [record.getMessage() for record in warnings.records]
    assert len(said) == (spec.name in WARNED), said
    assert all(f"config.json: {WARNED[spec.name]} is " in line for line in said)


@pytest.mark.parametrize("kind", BASES)
def test_every_key_of_every_family(kind: str, warnings: pytest.LogCaptureFixture) -> None:
    """As transformers' logits have shown it (golden/keys.json): obeyed, warned of, refused or harmless."""
    n = 0
    for case in found_cases(kind):
        warnings.clear()
        where = f"{case.base.name}: {case.key} = {case.value!r}: {case.verdict}"
        try:
            config = config_from_json(case.config)
        except tinyllm.Error:
            assert case.verdict == "refused", where
            continue
        assert case.verdict != "refused", where
        said = [r for r in warnings.records if f" {case.key} is " in r.getMessage()]
        if case.verdict != "only ours":
            assert len(said) == (case.verdict == "warned"), where
            assert (arithmetic(config) != arithmetic(config_from_json(case.base.config))) == (
                case.verdict == "obeyed"
            ), where
        n += case.verdict in ("obeyed", "harmless", "warned")
    assert n > 50


def arithmetic(config: Any) -> dict[str, Any]:
    """A config without what says nothing of logits: lengths of texts where nothing is counted from them, a
    window that none of the texts fills, a base that no layer has, layers that guess, and the name."""
    found = dict(vars(config))
    found["windows"] = [w if w < N_TOKENS else 0 for w in config.windows or [0] * config.n_layers]
    if not config.query_growth and config.long_rope_factors is None:
        del found["original_context"]
    if config.ropes and "usual" not in config.ropes:
        del found["rope_theta"], found["rope_factors"], found["rope_scale"]
    if (config.original_context or config.context) >= N_TOKENS:  # up to which a dynamic RoPE is a usual one
        del found["ntk_factor"]
    del found["context"], found["architecture"], found["guessing_layers"]
    return found


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("gemma", {"hidden_act": "silu"}, UnsupportedError, "hidden_act 'silu' is not supported"),
        ("llama2", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e4},
                    "sliding_attention": {"rope_type": "default"}}}, UnsupportedError, "by kind of layer"),
        ("llama2", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"beta_fast": 3.0}},
         FormatError, "'beta_fast' is in rope_parameters, but not in rope_scaling"),
        ("gemma3", {"rope_scaling": {"type": "linear", "factor": 8.0}}, UnsupportedError, "call it rope_t"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedError, "'linear' is not s"),
        ("mixtral", {"num_experts": 4}, FormatError, "num_experts, also called num_local_experts, is both"),
        ("mistral_nemo", {"attention_bias": True}, UnsupportedError, "'attention_bias' is set"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, UnsupportedError, "'fp8' is not supp"),
        ("qwen3", {"mlp_bias": True}, UnsupportedError, "'mlp_bias' is set"),
    ],
)  # fmt: skip
def test_what_was_read_otherwise_is_refused(
    name: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        config_from_json(config_of(name, **changes))


def test_defaults_are_those_of_the_classes() -> None:
    assert config_from_json(config_of("phi3", "rms_norm_eps")).norm_eps == 1e-5
    assert config_from_json(config_of("gemma2", "num_key_value_heads", num_attention_heads=8)).n_kv_heads == 4
    assert (
        config_from_json(config_of("qwen3", "num_key_value_heads", num_attention_heads=64)).n_kv_heads == 32
    )


def test_a_mistral_with_layer_types_is_a_ministral(warnings: pytest.LogCaptureFixture) -> None:
    """As AutoConfig takes it; inside a model that also reads images nobody does."""
    types = ["sliding_attention", "full_attention"]
    changes = {"sliding_window": 40, "layer_types": types}
    config = config_of("mistral_nemo", **changes)
    assert config_from_json(config).windows == (40, 0)
    inner = config_from_json({"model_type": "mistral3", "text_config": config, "tie_word_embeddings": False})
    assert inner.windows == (40, 40)
    assert [r.getMessage().split(" is ")[0] for r in warnings.records] == ["config.json: layer_types"]


@pytest.mark.parametrize(
    ("name", "key", "agreeing", "other"),
    [
        ("cohere2", "rotary_pct", 1.0, 0.5),
        ("cohere2", "use_parallel_block", True, False),
        ("cohere2", "layer_switch", 4, 2),
        ("phi3", "full_attn_mod", 1, 2),
        ("gemma2", "sliding_window_size", 60, 4096),
        ("gemma2", "hidden_act", "gelu_pytorch_tanh", "silu"),
        ("gpt_oss", "experts_per_token", 3, 1),
        ("gpt_oss", "initial_context_length", 64, 4096),
        ("qwen2", "use_mrope", False, True),
    ],
)
def test_keys_that_only_some_files_have(
    name: str, key: str, agreeing: Any, other: Any, warnings: pytest.LogCaptureFixture
) -> None:
    """They say what is computed anyway, or are warned of."""
    expected = config_from_json(config_of(name, key))
    assert config_from_json(config_of(name, **{key: agreeing})) == expected
    assert not warnings.records
    assert config_from_json(config_of(name, **{key: other})) == expected
    assert [key in record.getMessage() for record in warnings.records] == [True]


# ---- models that also read images


@pytest.mark.parametrize(("name", "outer"), [("gemma3", "gemma3"), ("mistral_nemo", "mistral3")])
def test_the_outer_config_says_whether_the_head_is_tied(
    name: str, outer: str, warnings: pytest.LogCaptureFixture
) -> None:
    """transformers' ...ForConditionalGeneration have their head outside of the inner model and do not ask the
    text_config; theirs is tied where nothing is said."""

    def tied(said: bool | None, inside: bool | None) -> bool:
        text = config_of(name, "tie_word_embeddings")
        text |= {} if inside is None else {"tie_word_embeddings": inside}
        config = {"model_type": outer, "text_config": text}
        return config_from_json(config | ({} if said is None else {"tie_word_embeddings": said})).tied

    assert [tied(said, None) for said in (True, False, None)] == [True, False, True]
    assert (tied(True, True), tied(False, False), tied(None, True)) == (True, False, True)
    assert not warnings.records
    assert (tied(True, False), tied(False, True), tied(None, False)) == (True, False, True)
    assert ["tie_word_embeddings" in record.getMessage() for record in warnings.records] == [True] * 3


def test_a_mistral_3_that_is_tied_at_the_outer_level_loads(tmp_path: Path) -> None:
    spec = SPECS["mistral_nemo"]
    tied = {**spec.config, "tie_word_embeddings": True}
    weights = random_weights(tied, spec.seed)
    ids = random_ids(tied, spec.seed, 40)
    with tinyllm.load(write_hf_directory(tmp_path / "text", tied, weights), cache_type="f32") as llm:
        expected = llm.logits(ids)
    config = {
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {k: v for k, v in spec.config.items() if k != "tie_word_embeddings"},
        "vision_config": {"hidden_size": 8},
    }
    weights = {name.replace("model.", "model.language_model.", 1): w for name, w in weights.items()}
    with tinyllm.load(write_hf_directory(tmp_path / "outer", config, weights), cache_type="f32") as llm:
        np.testing.assert_array_equal(llm.logits(ids), expected)


def test_what_the_outer_config_asks_for_is_not_passed_over() -> None:
    config = {
        "model_type": "gemma3", "text_config": SPECS["gemma3"].config, "vision_config": {"hidden_size": 8},
        "mm_tokens_per_image": 256, "boi_token_index": 255999, "initializer_range": 0.02, "use_cache": True,
    }  # fmt: skip
    config_from_json(config)
    with pytest.raises(UnsupportedError, match=r"'quantization_config' is set \(.*bitsandbytes"):
        config_from_json(config | {"quantization_config": {"quant_method": "bitsandbytes"}})


# ---- GGUF


def gguf_of(name: str, path: Path, **metadata: Any) -> Path:
    """A golden model as GGUF. Keyword arguments are keys after the architecture's name, with __ for a dot."""
    spec = SPECS[name]
    prefix = ARCHITECTURES[spec.config["model_type"]].name
    keys = {f"{prefix}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    path.mkdir()
    write_gguf(path / "m.gguf", spec.config, random_weights(spec.config, spec.seed), metadata=keys)
    return path / "m.gguf"


def logits(path: Path, name: str) -> Any:
    spec = SPECS[name]
    with tinyllm.load(path, cache_type="f32", threads=1) as llm:
        return llm.logits(random_ids(spec.config, spec.seed, 90))


def test_olmo_3_in_gguf_has_a_base_for_its_windows(tmp_path: Path) -> None:
    """Converters write it since transformers has OLMo 3's RoPE by kind of layer. Logits: transformers'."""
    spec = ODD["olmo3_by_kind"]
    table = spec.config["rope_parameters"]["full_attention"]
    rest = {k: v for k, v in spec.config.items() if k != "rope_parameters"}
    config = {**rest, "rope_theta": table["rope_theta"], "rope_scaling": table}
    metadata = {"olmo2.rope.freq_base_swa": 12345.0}
    path = tmp_path / "m.gguf"
    write_gguf(path, config, random_weights(spec.config, spec.seed), metadata=metadata)
    with tinyllm.load(path, cache_type="f32", threads=1) as llm:
        found = llm.logits(random_ids(spec.config, spec.seed, spec.n_tokens))
    goldens = np.load(GOLDEN_DIR / "config_keys.npz")
    expected = goldens[spec.name + ".logits"]
    assert relative(found[goldens[spec.name + ".positions"]], expected) < TOLERANCE


def test_a_base_of_windows_that_is_not_supported(tmp_path: Path) -> None:
    """llama.cpp obeys it in a Gemma 2 and in gpt-oss; no converter writes another than of all layers."""
    expected = logits(gguf_of("gemma2", tmp_path / "a"), "gemma2")
    same = gguf_of("gemma2", tmp_path / "b", rope__freq_base_swa=10000.0)
    np.testing.assert_array_equal(logits(same, "gemma2"), expected)
    with pytest.raises(UnsupportedError, match=r"gemma2\.rope\.freq_base_swa, a RoPE of windowed layers"):
        read_model(gguf_of("gemma2", tmp_path / "c", rope__freq_base_swa=5000.0))


def test_a_granite_without_rope(tmp_path: Path) -> None:
    """`rope.scaling.finetuned` false, as converters write it of Granite 4. Divisors so large that no pair
    turns say the same."""
    path = gguf_of("granite", tmp_path / "a", rope__scaling__finetuned=False)
    still = gguf_of("granite", tmp_path / "b", rope__scaling__factor=1e6)
    usual = gguf_of("granite", tmp_path / "c", rope__scaling__finetuned=True)
    assert relative(logits(path, "granite"), logits(usual, "granite")) > 0.01
    assert relative(logits(path, "granite"), logits(still, "granite")) < TOLERANCE  # turned by < 1e-4 radians
    elsewhere = gguf_of("llama2", tmp_path / "d", rope__scaling__finetuned=False)
    assert read_model(elsewhere).config.ropes == ()


def test_the_factor_on_cos_and_sin_holds_without_a_scaling(tmp_path: Path) -> None:
    """Command R's files have the type none, and llama.cpp multiplies whatever the type."""
    none: dict[str, Any] = {"rope__scaling__type": "none", "rope__scaling__attn_factor": 1.5}
    path = gguf_of("cohere2", tmp_path / "a", **none)
    linear = gguf_of("cohere2", tmp_path / "b", rope__scaling__attn_factor=1.5)
    assert relative(logits(path, "cohere2"), logits(gguf_of("cohere2", tmp_path / "c"), "cohere2")) > 0.01
    np.testing.assert_array_equal(logits(path, "cohere2"), logits(linear, "cohere2"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama2", {"expert_used_count": 2}, r"'llama\.expert_used_count' is set"),
        ("llama2", {"expert_weights_norm": True}, r"'llama\.expert_weights_norm' is set"),
        (
            "llama2",
            {"rope__scaling__yarn_attn_factor": 1.5},
            r"'llama\.rope\.scaling\.yarn_attn_factor' is set",
        ),
        ("llama2", {"rope__scaling__yarn_beta_fast": 8.0}, r"'llama\.rope\.scaling\.yarn_beta_fast' is set"),
        ("gemma3", {"attn_logit_softcapping": 2.0}, r"'gemma3\.attn_logit_softcapping' is set"),
    ],
)
def test_gguf_keys_that_nothing_would_obey(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read_model(gguf_of(name, tmp_path / "m", **changes))


def test_a_window_pattern_of_1_is_no_window(tmp_path: Path) -> None:
    """In both kinds of file: every first layer attends to everything."""
    path = gguf_of("gemma3", tmp_path / "a", attention__sliding_window_pattern=1)
    assert read_model(path).config.windows == ()
    path = gguf_of("gemma3", tmp_path / "b", attention__sliding_window_pattern=0)
    assert read_model(path).config.windows == (60,) * 7


def names_in_gguf() -> list[str]:
    """Every key of hyperparameters that the `gguf` package can write, after the architecture's name."""
    found = set()
    for group in vars(gguf.Keys).values():
        for value in vars(group).values() if isinstance(group, type) else ():
            if isinstance(value, str) and value.startswith("{arch}."):
                found.add(value.removeprefix("{arch}."))
    return sorted(found)


@pytest.mark.parametrize("name", ["llama2", "gemma3", "granite", "cohere2", "olmo3", "ministral3"])
def test_no_gguf_key_passes_in_silence(name: str, tmp_path: Path) -> None:
    """Set to odd values, each makes another config or an error, but for those with a reason: a pattern
    without a window is one."""
    file = read_gguf(gguf_of(name, tmp_path / "m"))
    prefix = ARCHITECTURES[SPECS[name].config["model_type"]].name
    expected = config_from_gguf(file.metadata, file.tensors)
    silent, names = set(), names_in_gguf()
    assert len(names) > 80
    for key in names:
        for value in (3, 0.7):
            try:
                config = config_from_gguf({**file.metadata, f"{prefix}.{key}": value}, file.tensors)
            except tinyllm.Error:
                break
            if config != expected:
                break
        else:
            silent.add(key)
    reasons = {*GGUF_HARMLESS, *["attention.sliding_window_pattern"] * (not expected.windows)}
    assert silent <= reasons


# ---- reasons, and the page


def test_what_is_harmless_has_a_reason() -> None:
    for reasons in (JSON_HARMLESS, GGUF_HARMLESS):
        assert all(len(why) > 10 for why in reasons.values())
    for kind, row in FAMILIES.items():
        assert not JSON_HARMLESS.keys() & (row.json_defaults.keys() | row.json_ignored.keys()), kind


def test_the_page_of_keys_is_up_to_date() -> None:
    page = (Path(__file__).parents[1] / "docs" / "keys.md").read_text(encoding="utf-8")
    for title, text in keys_table.sections().items():
        assert f"{title}\n\n{text}" in page, "run `python tests/keys_table.py` to write docs/keys.md anew"


# ---- contexts past the trained one


def test_a_context_past_the_trained_one_is_said_once(
    tmp_path: Path, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS["qwen2"]
    path = write_hf_directory(tmp_path, spec.config, random_weights(spec.config, spec.seed))
    tinyllm.load(path, context=512).close()
    assert not warnings.records
    tinyllm.load(path, context=513).close()
    assert [r.getMessage() for r in warnings.records] == [
        "context 513 is more than the 512 the model was trained for"
    ]
    warnings.clear()
    with monkeypatch.context() as patch:  # a GPU that cannot compute it, so that the CPU is asked
        patch.setattr(loading, "_refusal", lambda model, cache_type: "no")
        tinyllm.load(path, context=513).close()
    assert len(warnings.records) == 1
    assert (
        "a context of 513 is more than the 512 it was trained for"
        in inspect_model(path, context=513).warnings
    )
    assert not any("trained" in line for line in inspect_model(path, context=512).warnings)


@pytest.mark.parametrize(
    ("scaling", "context", "covered"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 512, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, 512),
        ({"type": "linear", "factor": 4.0}, 512, 2048),
        (None, 512, 512),
    ],
)
def test_a_scaling_of_rope_covers_longer_texts(
    scaling: dict[str, Any] | None, context: int, covered: int, tmp_path: Path, warnings: Any
) -> None:
    """As Qwen's notes on YaRN have it, and Vicuna's 16k: the config's length is the one before."""
    spec = SPECS["qwen2"]
    config = {**spec.config, "rope_scaling": scaling, "max_position_embeddings": context}
    assert config_from_json(config).covered_context == covered
    path = write_hf_directory(tmp_path, config, random_weights(config, spec.seed))
    tinyllm.load(path, context=covered).close()
    assert not warnings.records
    tinyllm.load(path, context=covered + 1).close()
    assert len(warnings.records) == 1


def test_the_length_of_long_factors_and_windows_is_the_one_after() -> None:
    assert config_from_json(SPECS["phi3_long"].config).covered_context == 512
    assert config_from_json(SPECS["gemma3"].config).covered_context == 512


def test_keys_json_is_of_all_families() -> None:
    swept = {k for k, row in FAMILIES.items() if not row.text_of} - set(NOT_IN_TRANSFORMERS)
    assert set(read_json(GOLDEN_DIR / "keys.json")) == swept
