"""Sessions in files: the same bits afterwards, and nothing of a file that is not quite right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_models import golden_model, golden_spec, golden_specs

import tinyllm
from tinyllm.engine.saved import DIGEST, MAGIC

TEXT = "Once upon a time there was a little girl who had a red ball and a blue ball. " * 5


@pytest.fixture(scope="module")
def llm() -> Iterator[tinyllm.LLM]:
    with tinyllm.load("stories") as llm:
        yield llm


def saved(llm: tinyllm.LLM, path: Path, text: str = TEXT) -> tinyllm.Session:
    session = llm.session(seed=7)
    session.append(text)
    session.save(path)
    return session


@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0"])
def test_it_goes_on_with_the_same_bits(tmp_path: Path, cache_type: Any) -> None:
    """In another model object, where nothing of it was computed before."""
    path = tmp_path / "a.session"
    with tinyllm.load("stories", cache_type=cache_type) as llm:
        session = saved(llm, path)
        fork = session.fork()
        logits, text = session.logits, session.generate(max_tokens=30)
    with tinyllm.load("stories", cache_type=cache_type, threads=1) as other:
        other._facts()
        calls: list[int] = []
        forward = other.model.forward

        def counted(tokens: Any, *rest: Any, **options: Any) -> Any:
            calls.append(len(tokens))
            return forward(tokens, *rest, **options)

        other.model.forward = counted  # type: ignore[method-assign]
        restored = other.restore(path, speculate=None)
        np.testing.assert_array_equal(restored.logits, logits)
        assert restored.tokens == other.tokenizer.encode(TEXT)  # type: ignore[union-attr]
        again = restored.generate(max_tokens=30)
        assert (again.tokens, again.seed) == (text.tokens, text.seed)
        assert set(calls) == {1}, "nothing of it was computed again"
        assert restored.fork().seed == fork.seed


def test_its_pages_are_shared_as_prefixes(llm: tinyllm.LLM, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    saved(llm, path).close()
    with tinyllm.load("stories") as other:
        first, second = other.restore(path), other.restore(path)
        assert other._cache.n_used == len(first.tokens) // 64 + 2
        assert first.generate(max_tokens=5, seed=1).tokens == second.generate(max_tokens=5, seed=1).tokens


@pytest.mark.parametrize("name", ["gemma3_text", "cohere2", "mistral"])
def test_models_with_windows(name: str, tmp_path: Path) -> None:
    specs = [*golden_specs(), *golden_specs("families")]
    spec = next(spec for spec in specs if spec.name == name or spec.config["model_type"] == name)
    with tinyllm.load(golden_model(spec, tmp_path)) as llm:
        session = llm.session(seed=1)
        session.append([i * 7 % 90 for i in range(150)])
        session.save(tmp_path / "a.session")
        expected = session.generate(max_tokens=20).tokens
        assert llm.restore(tmp_path / "a.session").generate(max_tokens=20).tokens == expected


def test_an_empty_session(llm: tinyllm.LLM, tmp_path: Path) -> None:
    llm.session(seed=3).save(tmp_path / "empty")
    assert llm.restore(tmp_path / "empty").tokens == []


def test_it_belongs_to_its_cache_and_must_fit(llm: tinyllm.LLM, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    saved(llm, path)
    other = tinyllm.load("stories", cache_type="f32")
    with pytest.raises(tinyllm.FormatError, match="another cache type: f16, here it is f32"):
        other.restore(path)
    other.close()
    with tinyllm.load("stories", context=64) as short:
        with pytest.raises(tinyllm.Error):
            short.restore(path)
        assert short._cache.holders() == []


def test_weights_that_differ_in_one_number_are_another_model(tmp_path: Path) -> None:
    """The config is the same; a model is told by what it computes."""
    spec = golden_spec("llama3")
    with tinyllm.load(golden_model(spec, tmp_path / "a")) as llm:
        session = llm.session()
        session.append([1, 2, 3])
        session.save(tmp_path / "a.session")
    folder = golden_model(spec, tmp_path / "b")
    weights = next(Path(folder).glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 0x40
    weights.write_bytes(content)
    with tinyllm.load(folder) as other, pytest.raises(tinyllm.FormatError, match="another model"):
        other.restore(tmp_path / "a.session")


def test_every_cut_and_every_flipped_bit_is_seen(llm: tinyllm.LLM, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    saved(llm, path, "Tom").close()
    whole = path.read_bytes()
    words = len(MAGIC) + 8
    n_words = int.from_bytes(whole[len(MAGIC) : words], "little")
    for cut in (0, 1, len(MAGIC), words - 1, words, words + n_words, len(whole) - DIGEST, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(tinyllm.FormatError):
            llm.restore(path)
    for at in [*range(0, words + n_words, 11), len(whole) // 2, len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(tinyllm.FormatError):
            llm.restore(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(tinyllm.FormatError):
        llm.restore(path)


CHANGES: list[dict[str, Any]] = [
    {"tokens": [1, -1]},
    {"tokens": "no"},
    {"pages": [[1, 1]]},
    {"pages": [[2]]},
    {"pages": []},
    {"logits": 5},
    {"page_bytes": 64},
    {"seed": "x"},
]


@pytest.mark.parametrize("change", CHANGES, ids=json.dumps)
def test_a_header_that_contradicts_itself(llm: tinyllm.LLM, tmp_path: Path, change: dict[str, Any]) -> None:
    """With a hash that is right, as somebody could make one."""
    path = tmp_path / "a.session"
    saved(llm, path, "Tom").close()
    whole, words = path.read_bytes(), len(MAGIC) + 8
    n_words = int.from_bytes(whole[len(MAGIC) : words], "little")
    header = json.dumps({**json.loads(whole[words : words + n_words]), **change}).encode()
    body = MAGIC + len(header).to_bytes(8, "little") + header + whole[words + n_words : -DIGEST]
    path.write_bytes(body + blake2b(body, digest_size=DIGEST).digest())
    with pytest.raises(tinyllm.FormatError, match=r"damaged|saved with another"):
        llm.restore(path)


def test_nothing_half_written_has_the_name(llm: tinyllm.LLM, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "a.session"):
        with pytest.raises(tinyllm.WriteError):
            llm.session().save(path)
    with pytest.raises(tinyllm.NotFoundError):
        llm.restore(tmp_path / "none")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
