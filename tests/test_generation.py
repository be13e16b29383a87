"""The model's own settings: generation_config.json beside what transformers' `generate` makes of it
(golden/generation.json), GGUF's general.sampling as llama.cpp reads it, and that every key is obeyed, warned
of by name, or known to be harmless."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import GOLDEN_DIR, golden_spec, random_weights
from hypothesis import given
from hypothesis import strategies as st

import tinyllm
from tinyllm.config import (
    GenerationDefaults,
    generation_from_gguf,
    generation_from_json,
    generation_to_gguf,
)
from tinyllm.config.generation import JSON_HARMLESS_BECAUSE, JSON_OBEYED, JSON_WARNED, LEGACY_KEYS
from tinyllm.engine.sampling import SamplingParams
from tinyllm.errors import ContextError, FormatError

GOLDEN = json.loads((GOLDEN_DIR / "generation.json").read_text(encoding="utf-8"))
PROMPT = GOLDEN["prompt"]
HARMLESS = [key for keys in JSON_HARMLESS_BECAUSE.values() for key in keys]


def stories(data_dir: Path, folder: Path, case: dict[str, Any]) -> tinyllm.LLM:
    """stories260K with what a case adds to its files."""
    folder.mkdir()
    source = data_dir / "models" / "stories260K-hf"
    for name in ("model.safetensors", "tokenizer.model"):
        (folder / name).symlink_to((source / name).resolve())
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | case.get("config", {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if case["generation_config"] is not None:
        text = json.dumps(case["generation_config"])
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return tinyllm.load(folder, threads=1)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_greedy_texts_are_transformers(
    name: str, data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = GOLDEN["cases"][name]
    options = {"temperature": 0} if case["generation_config"] is None else {}
    with stories(data_dir, tmp_path / "model", case) as llm:
        done = llm(PROMPT, max_tokens=case["max_new_tokens"], **options)
        ids = done.tokens + ([done.stop_reason] if isinstance(done.stop_reason, int) else [])
        assert ids == case["ids"]
        again = llm.session()
        again.append(PROMPT)
        assert again.generate(max_tokens=case["max_new_tokens"], **options).tokens == done.tokens
        again.close()
    assert not caplog.records


def test_a_request_goes_before_the_model(data_dir: Path, tmp_path: Path) -> None:
    plain = GOLDEN["cases"]["plain"]["ids"]
    own = {
        "do_sample": False,
        "suppress_tokens": [plain[3]],
        "begin_suppress_tokens": [plain[0]],
        "bad_words_ids": [[plain[4]]],
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 5,
        "max_new_tokens": 3,
        "stop_strings": ["a"],
        "repetition_penalty": 1.5,
        "eos_token_id": [2, plain[6]],
    }
    options: dict[str, Any] = {
        "suppress_tokens": (),
        "begin_suppress_tokens": (),
        "bad_words_ids": (),
        "no_repeat_ngram_size": 0,
        "min_tokens": 0,
        "max_tokens": 40,
        "stop": (),
        "repetition_penalty": 1.0,
    }
    with stories(data_dir, tmp_path / "model", {"generation_config": own}) as llm:
        assert llm(PROMPT).tokens != plain[:3]
        done = llm(PROMPT, **options)
        assert (done.tokens, done.stop_reason) == (plain[:6], plain[6])


def test_lengths_of_whole_texts(data_dir: Path, tmp_path: Path) -> None:
    plain = GOLDEN["cases"]["plain"]["ids"]
    own = {"do_sample": False, "max_length": 8, "min_length": 9, "eos_token_id": [2, plain[1]]}
    with stories(data_dir, tmp_path / "model", {"generation_config": own}) as llm:
        done = llm(PROMPT)
        assert (len(done.tokens), done.finish_reason) == (3, "length")
        assert len(llm(PROMPT, max_tokens=2).tokens) == 2
        assert llm(PROMPT, max_tokens=6, min_tokens=0).tokens == plain[:1]
        with pytest.raises(ContextError, match=r"has 8 tokens.*max_length ends texts at 8; pass max_tok"):
            llm(PROMPT + plain[:3])


# ---- every key of transformers


def test_every_key_of_transformers_is_known() -> None:
    known = [*JSON_OBEYED, *JSON_WARNED, *HARMLESS]
    assert len(known) == len(set(known))
    assert not set(GOLDEN["keys"]) - set(known)


SET = {  # a value that changes texts
    "num_beams": 4, "num_beam_groups": 2, "constraints": [[1]], "force_words_ids": [[1]], "max_time": 2.5,
    "dola_layers": "high", "guidance_scale": 1.5, "sequence_bias": [[[3], -1.0]], "top_h": 0.4,
    "penalty_alpha": 0.6, "encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 3,
    "forced_bos_token_id": 0, "forced_eos_token_id": 2, "exponential_decay_length_penalty": [5, 1.1],
    "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "watermarking_config": {"bias": 2.0}, "token_healing": True,
}  # fmt: skip


def warnings_of(caplog: pytest.LogCaptureFixture, table: dict[str, Any] | None, **config: Any) -> list[str]:
    caplog.clear()
    generation_from_json(config, table, 10)
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("key", JSON_WARNED)
def test_what_is_not_done_is_warned_of_by_name(key: str, caplog: pytest.LogCaptureFixture) -> None:
    (message,) = warnings_of(caplog, {key: SET[key]})
    assert message.startswith("generation_config.json asks for what is not done, so texts may differ")
    assert f": {key} (" in message
    for off in (None, *JSON_WARNED[key]):
        assert warnings_of(caplog, {key: off}) == []
    (message,) = warnings_of(caplog, None, **{key: SET[key]})
    assert message.startswith("config.json asks for what is not done")
    assert warnings_of(caplog, {}, **{key: SET[key]}) == []  # transformers does not look there either


def test_one_warning_names_all(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = warnings_of(caplog, SET)
    assert all(key in message for key in SET)


def test_harmless_keys_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(caplog, dict.fromkeys(HARMLESS, 1)) == []


def test_unknown_keys_are_named(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = warnings_of(caplog, {"chat_format": "chatml", "max_window_size": None})
    assert message.endswith("does not know, without effect: 'chat_format'")


@pytest.mark.parametrize("key", ["temperature", "top_k", "top_p", "min_p", "typical_p"])
def test_sampling_without_do_sample(key: str, caplog: pytest.LogCaptureFixture) -> None:
    value = 5 if key == "top_k" else 0.5
    (message,) = warnings_of(caplog, {key: value})
    assert message.startswith(f"generation_config.json sets {key} and not do_sample")
    assert vars(generation_from_json({}, {key: value}, 10))[key] == value
    for do_sample in (True, False):
        assert warnings_of(caplog, {key: value, "do_sample": do_sample}) == []


def test_config_json_in_place_of_a_generation_config() -> None:
    full = {  # as older files list transformers' defaults
        "max_length": 20, "min_length": 0, "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
        "typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None,
        "eos_token_id": 2, "num_beams": 1,
    }  # fmt: skip
    assert generation_from_json(full, None, 10) == GenerationDefaults(eos_ids=(2,))
    said = {"top_k": 7, "do_sample": True, "suppress_tokens": [3]}
    assert generation_from_json(full | said, None, 10) == GenerationDefaults(
        eos_ids=(2,), top_k=7, suppress_tokens=(3,)
    )
    assert generation_from_json(full | said, {}, 10) == GenerationDefaults(eos_ids=(2,))


@pytest.mark.parametrize("key", LEGACY_KEYS)
def test_such_keys_are_no_features_of_the_model(key: str) -> None:
    tinyllm.config.config_from_json({**golden_spec("llama3").config, key: [1]})


def test_the_penalty_of_a_directory_looks_at_the_whole_text() -> None:
    assert generation_from_json({}, {"repetition_penalty": 1.1}, 10).penalty_window == -1
    assert generation_from_json({}, {"repetition_penalty": 1.0}, 10).penalty_window is None
    assert generation_from_json({}, {}, 10).penalty_window is None


def test_ids_outside_the_vocabulary_cannot_come_anyway() -> None:
    found = generation_from_json(
        {},
        {
            "suppress_tokens": [-1, 9, 10, 9],
            "begin_suppress_tokens": [220],
            "bad_words_ids": [[1, 10], [1, 9]],
            "eos_token_id": 2,
        },
        10,
    )
    assert (found.suppress_tokens, found.begin_suppress_tokens, found.bad_words_ids) == ((9,), (), ((1, 9),))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"suppress_tokens": 3}, "suppress_tokens must be a list of token ids, not '3'"),
        ({"suppress_tokens": ["3"]}, "suppress_tokens must be a list of token ids"),
        ({"begin_suppress_tokens": [True]}, "begin_suppress_tokens must be a list of token ids"),
        ({"bad_words_ids": [3]}, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": {}}, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be a list of lists"),
        ({"stop_strings": [""]}, "stop_strings must be a string or a list"),
        ({"stop_strings": 3}, "stop_strings must be a string or a list"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, outside 1 to"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1, outside 0 to"),
        ({"max_length": 0}, "max_length is 0, outside 1 to"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size must be a whole number"),
        ({"do_sample": "no"}, "do_sample must be true or false"),
    ],
)
def test_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        generation_from_json({}, table, 10)


# ---- GGUF

S = "general.sampling."
OF_GGUF = (  # all that llama.cpp reads
    "sequence", "top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold", "temp", "penalty_last_n",
    "penalty_repeat", "mirostat", "mirostat_tau", "mirostat_eta",
)  # fmt: skip


def of_gguf(caplog: pytest.LogCaptureFixture, **keys: Any) -> tuple[GenerationDefaults, list[str]]:
    caplog.clear()
    found = generation_from_gguf({S + key: value for key, value in keys.items()}, 10)
    return found, [record.getMessage() for record in caplog.records]


def test_gguf_keys(caplog: pytest.LogCaptureFixture) -> None:
    found, messages = of_gguf(
        caplog, penalty_last_n=256, penalty_repeat=1.5, xtc_probability=0.5, xtc_threshold=0.25, mirostat=0,
        mirostat_tau=5.0, mirostat_eta=0.1,
    )  # fmt: skip
    assert found == GenerationDefaults(
        penalty_window=256, repetition_penalty=1.5, xtc_probability=0.5, xtc_threshold=0.25
    )
    assert messages == []
    assert of_gguf(caplog, penalty_last_n=-1)[0].penalty_window == -1
    suppressed = generation_from_gguf({"tokenizer.ggml.suppress_tokens": np.array([3, 12, 4], np.int32)}, 10)
    assert suppressed == GenerationDefaults(suppress_tokens=(3, 4))


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_is_warned_of(version: int, caplog: pytest.LogCaptureFixture) -> None:
    _, (message,) = of_gguf(caplog, mirostat=version, mirostat_tau=5.0)
    assert f"general.sampling.mirostat ('{version}'): tinyllm draws by the other settings" in message


def test_unknown_keys_of_gguf_are_named(caplog: pytest.LogCaptureFixture) -> None:
    _, (message,) = of_gguf(caplog, top_n_sigma=1.5, adaptive_target=0.2)
    assert "general.sampling.top_n_sigma ('1.5'): tinyllm does not know it" in message
    assert "general.sampling.adaptive_target ('0.2')" in message


ALL = "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature"


@pytest.mark.parametrize(
    ("sequence", "off", "warning"),
    [
        (ALL, {}, ""),
        ("", {}, ""),
        (ALL.replace("_", "-").upper(), {}, ""),
        ("penalties;dry;top_k;typ;nucleus;min-p;xtc;temp", {}, ""),
        ("dry;typ_p;penalties;top_k;top_p;min_p;xtc;temperature", {}, ""),  # dry and typ_p are off anyway
        ("temperature;top_k;penalties", {}, "own order"),
        ("top_k;temperature", {"top_p": 1, "min_p": 0, "repetition_penalty": 1, "xtc_probability": 0}, ""),
        ("temperature;top_k", {"top_p": 1, "min_p": 0}, ""),  # which comes first makes no difference
        ("top_p;min_p", {"top_k": 0, "temperature": 1, "repetition_penalty": 1}, ""),
        ("temperature;top_p", {"top_k": 0, "min_p": 0}, "own order"),
        ("top_k;top_k;temperature", {"top_p": 1}, "own order"),
        ("top_k;infill;temperature", {"top_p": 1}, "has no step 'infill'"),
    ],
)
def test_sequences(
    sequence: str, off: dict[str, float], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"temp": 0.5, "top_k": 7, "top_p": 0.5, "min_p": 0.25, "penalty_repeat": 1.5}
    own["xtc_probability"] = 0.75
    found, messages = of_gguf(caplog, sequence=sequence, **own)
    filled = SamplingParams(seed=1).resolve(vars(found))
    said = {"temperature": 0.5, "top_k": 7, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5}
    said["xtc_probability"] = 0.75
    for name, value in {**(said if not off and not warning else {}), **off}.items():
        assert getattr(filled, name) == value, name
    assert len(messages) == bool(warning)
    assert all(f"general.sampling.sequence ('{sequence}'): " in m and warning in m for m in messages)
    given = SamplingParams(seed=1, top_p=0.1).resolve(vars(found))
    assert given.top_p == 0.1  # whatever the file leaves out


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=2),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*GOLDEN["keys"], "x"]), values, max_size=5), st.booleans())
def test_any_json(table: dict[str, Any], is_config: bool) -> None:
    """An answer that sampling takes, or an error that can be printed."""
    try:
        found = generation_from_json(*((table, None) if is_config else ({}, table)), vocab_size=10)
    except tinyllm.Error as error:
        str(error).encode()
        return
    SamplingParams().resolve(vars(found))
    generation_to_gguf(found, 512)


arrays = st.lists(st.integers(-5, 12), max_size=3).map(lambda ids: np.array(ids, np.int32))
KEYS = ["tokenizer.ggml.suppress_tokens", *(S + k for k in OF_GGUF), S + "x"]


@given(st.dictionaries(st.sampled_from(KEYS), values | arrays, max_size=5))
def test_any_metadata(metadata: dict[str, Any]) -> None:
    try:
        found = generation_from_gguf(metadata, vocab_size=10)
    except tinyllm.Error as error:
        str(error).encode()
        return
    SamplingParams().resolve(vars(found))


def test_a_sequence_is_a_string() -> None:
    with pytest.raises(FormatError, match=r"general\.sampling\.sequence must be a string, not '3'"):
        generation_from_gguf({S + "sequence": 3}, 10)


def test_what_a_directory_says_goes_into_its_gguf(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = GOLDEN["cases"]["plain"]["ids"]
    said = {"do_sample": False, "repetition_penalty": 1.3, "suppress_tokens": plain[:2], "eos_token_id": 2}
    stories(data_dir, tmp_path / "model", {"generation_config": said}).close()
    tinyllm.quantize(tmp_path / "model", tmp_path / "model.gguf", "f32")
    assert not caplog.records
    with tinyllm.load(tmp_path / "model", threads=1) as a, tinyllm.load(tmp_path / "model.gguf") as b:
        assert a(PROMPT, max_tokens=150).tokens == b(PROMPT, max_tokens=150).tokens


def test_what_gguf_cannot_say_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    none = {"typical_p": 1.0, "min_new_tokens": 0, "stop_strings": [], "do_sample": True}
    generation_to_gguf(generation_from_json({}, none, 10), 512)
    assert not caplog.records
    lost = {
        "typical_p": 0.5, "no_repeat_ngram_size": 2, "min_new_tokens": 1, "max_new_tokens": 2,
        "min_length": 3, "max_length": 4, "stop_strings": ["a"], "bad_words_ids": [[1, 2]],
        "begin_suppress_tokens": [1],
    }  # fmt: skip
    found = generation_from_json({}, {**lost, "do_sample": True}, 10)
    assert generation_to_gguf(found, 512) == {}
    (record,) = caplog.records
    assert set(record.getMessage().split(": ")[1].split(", ")) == {
        name for name, value in vars(found).items() if value not in (None, ())
    }


CONFIG = {**golden_spec("llama3").config, "vocab_size": 400}


def test_a_gguf_files_settings_reach_its_texts(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, seed=3)

    def load(**metadata: Any) -> tinyllm.LLM:
        path = tmp_path / "model.gguf"
        write_gguf(path, CONFIG, weights, tokenizer=small_tokenizer(400), metadata=metadata)
        return tinyllm.load(path, threads=1)

    options: dict[str, Any] = {"seed": 3, "max_tokens": 150}
    with load() as plain:
        right = plain("a", **options).tokens
        banned = plain("a", **options, suppress_tokens=right[:2]).tokens
        excluded = plain("a", **options, xtc_probability=1.0, xtc_threshold=0.01).tokens
        short, long = (
            plain("a", **options, temperature=0, repetition_penalty=1.5, penalty_window=n).tokens
            for n in (64, 100)
        )
    assert len({tuple(tokens) for tokens in (right, banned, excluded, short, long)}) == 5
    with load(**{"tokenizer.ggml.suppress_tokens": right[:2]}) as llm:
        assert llm("a", **options).tokens == banned
    with load(**{S + "xtc_probability": 1.0, S + "xtc_threshold": 0.01}) as llm:
        assert llm("a", **options).tokens == excluded
    with load(**{S + "temp": 0.0, S + "penalty_repeat": 1.5}) as llm:
        assert llm("a", **options).tokens == short
    with load(**{S + "temp": 0.0, S + "penalty_repeat": 1.5, S + "penalty_last_n": 100}) as llm:
        assert llm("a", **options).tokens == long


# ---- docs/keys.md


def test_the_page_of_keys_has_them_all() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "keys.md").read_text(encoding="utf-8")
    section = page.split("## Sampling and generation", 1)[1].split("\n## ", 1)[0]
    fates: dict[str, str] = {}
    for names, fate in re.findall(r"^\| (`[^|]*) \| (\w+)", section, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in fates, f"{name} is there twice"
            fates[name] = fate
    ours = dict.fromkeys(JSON_OBEYED, "obeyed") | dict.fromkeys(JSON_WARNED, "warned")
    ours |= dict.fromkeys(HARMLESS, "harmless")
    assert {name for name in fates if name not in ours} == {
        "tokenizer.ggml.suppress_tokens",
        *(S + name for name in OF_GGUF),
    }
    assert {name: fates.get(name) for name in ours} == ours
