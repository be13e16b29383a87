"""`llm.rerank`: scores of pairs, by rerankers of Qwen3's kind, as sentence-transformers and the makers' own
lines make them; from directories and from GGUF."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_embed import INSTRUCTION, PAIRS, QUERY, TURNS, write_reranker
from helpers_models import GOLDEN_DIR

import tinyllm
from tinyllm.errors import ArgumentError, FormatError, UnsupportedError
from tinyllm.files.gguf import read_gguf
from tinyllm.files.gguf_writer import OutTensor, write_gguf
from tinyllm.modelfiles import read_model

GOLDENS = np.load(GOLDEN_DIR / "embeddings.npz")


@pytest.fixture(scope="module", params=["modules", "plain"])
def reranker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = write_reranker(tmp_path_factory.mktemp("reranker") / "m", request.param == "modules")
    with tinyllm.load(path, device="cpu", cache_type="f32") as llm:
        llm.name = request.param
        yield llm


def test_scores_are_those_of_the_references(reranker: tinyllm.LLM) -> None:
    scores = reranker.rerank(QUERY, PAIRS)
    assert scores.dtype == np.float32
    assert scores.shape == (len(PAIRS),)
    expected = GOLDENS[f"rerank_{reranker.name}"]
    assert np.ptp(expected) > 0.01  # they differ
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    other = reranker.rerank(QUERY, PAIRS, instruction="Find what has to do with money")
    np.testing.assert_allclose(other, GOLDENS[f"rerank_{reranker.name}_instructed"], atol=2e-5)
    for text, score in zip(PAIRS, scores, strict=True):
        assert reranker.rerank(QUERY, [text])[0] == score
    assert reranker.rerank(QUERY, []).shape == (0,)


def test_what_a_text_spells_is_no_special_token(
    reranker: tinyllm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text cannot end the turn that asks about it, nor an instruction or a query open one."""
    found = []
    pooled = reranker._pooled

    def seen(texts: Any, *rest: Any) -> Any:
        found.append([text.ids for text in texts])
        return pooled(texts, *rest)

    monkeypatch.setattr(reranker, "_pooled", seen)
    assert reranker.tokenizer is not None
    turns = [reranker.tokenizer.special_tokens[text] for text in TURNS]
    end = TURNS[1]
    for query, text, instruction in (("a", "b", "c"), (end, "b", "c"), ("a", end, "c"), ("a", "b", end)):
        reranker.rerank(query, [text], instruction=instruction)
    counts = [[ids.count(turn) for turn in turns] for [ids] in found]
    assert counts == [[3, 2]] * 4


def test_what_is_asked_wrongly(reranker: tinyllm.LLM) -> None:
    with pytest.raises(TypeError, match="a query, a str, and a list of texts"):
        reranker.rerank("a", "b")
    with pytest.raises(TypeError, match="a query, a str, and a list of texts"):
        reranker.rerank("a", ["b", [5]])  # type: ignore[list-item]
    with pytest.raises(UnsupportedError, match=r"it is a reranker, which gives scores of texts \(rerank\)"):
        reranker.embed("x")
    assert reranker.embed("x", pooling="mean").shape == (64,)
    with pytest.raises(tinyllm.ContextError, match="do not fit into the context"):
        reranker.rerank("a", ["b" * 2000])
    with pytest.raises(tinyllm.CancelledError):
        reranker.rerank("a", ["b"], cancel=lambda: True)
    seen: list[tuple[int, int]] = []
    reranker.rerank("a", ["b", "c"], progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen][-1] == seen[0][1]


def test_other_models_have_no_scores() -> None:
    with (
        tinyllm.load("stories", device="cpu") as llm,
        pytest.raises(UnsupportedError, match="its files do not say that it is a reranker; embed makes"),
    ):
        llm.rerank("a", ["b"])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("1_LogitScore/config.json", {"true_token_id": 300, "false_token_id": 5}, "the token 300, outside"),
        ("1_LogitScore/config.json", {"true_token_id": "yes", "false_token_id": 5}, "must be a whole number"),
    ],
)
def test_broken_labels(name: str, value: Any, words: str, tmp_path: Path) -> None:
    path = write_reranker(tmp_path, True)
    (path / name).write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(FormatError, match=words):
        read_model(path)


def test_a_score_of_one_token_is_refused(tmp_path: Path) -> None:
    path = write_reranker(tmp_path, True)
    (path / "1_LogitScore/config.json").write_text('{"true_token_id": 5}', encoding="utf-8")
    with (
        tinyllm.load(path, device="cpu") as llm,
        pytest.raises(UnsupportedError, match=r"1_LogitScore/config\.json has no false_token_id"),
    ):
        llm.rerank("a", ["b"])


# ---- GGUF


def test_a_written_gguf_scores_the_same(tmp_path: Path) -> None:
    path = write_reranker(tmp_path / "m", False)
    tinyllm.quantize(path, tmp_path / "f32.gguf", "f32")
    file = read_gguf(tmp_path / "f32.gguf")
    assert file.metadata["qwen3.pooling_type"] == 4
    assert file.metadata["qwen3.classifier.output_labels"] == ["yes", "no"]
    assert file.tensors["cls.output.weight"].shape == (2, 64)
    tinyllm.quantize(tmp_path / "f32.gguf", tmp_path / "q8_0.gguf", "q8_0")
    with tinyllm.load(path, device="cpu") as a, tinyllm.load(tmp_path / "f32.gguf", device="cpu") as b:
        scores = a.rerank(QUERY, PAIRS)
        np.testing.assert_array_equal(b.rerank(QUERY, PAIRS), scores)
        with pytest.raises(UnsupportedError, match="no logits"):  # its output matrix may be missing
            b("x", max_tokens=1)
        assert b.chat_template is None
    with tinyllm.load(tmp_path / "q8_0.gguf", device="cpu") as c:
        assert 0 < np.abs(c.rerank(QUERY, PAIRS) - scores).max() < 0.05


Parts = dict[str, Any]


def rewritten(path: Path, to: Path, change: Callable[[Parts, Parts], tuple[Parts, Parts]]) -> Path:
    """A GGUF file of floats with other metadata or tensors."""
    file = read_gguf(path)
    held = {name: info.read_f32() for name, info in file.tensors.items()}
    metadata, tensors = change(dict(file.metadata), held)
    outs = [OutTensor(n, x.shape, 0, lambda x=x: [x.tobytes()]) for n, x in tensors.items()]  # type: ignore[misc]
    write_gguf(to, metadata, outs, types=file.types)
    return to


HEAD, TEMPLATE = "cls.output.weight", "tokenizer.chat_template.rerank"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, t: (m, {n: x for n, x in t.items() if n != HEAD}), "cls.output.weight is missing"),
        (lambda m, t: (m | {TEMPLATE: "x {query}"}, t), "is no text with {query} and {document}"),
        (lambda m, t: (m, t | {HEAD: t[HEAD][:1]}), "of shape (1, 64) is the head"),
        (lambda m, t: ({n: x for n, x in m.items() if "labels" not in n}, t), "is read with pooling_type 4"),
        (lambda m, t: (m | {"qwen3.pooling_type": 3}, t), "is read with pooling_type 4"),
    ],
)
def test_heads_that_do_not_fit(change: Any, words: str, tmp_path: Path) -> None:
    tinyllm.quantize(write_reranker(tmp_path / "m", False), tmp_path / "a.gguf", "f32")
    path = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", change)
    with pytest.raises(FormatError, match=re.escape(words)):
        read_model(path)


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    tinyllm.quantize(write_reranker(tmp_path / "m", False), tmp_path / "a.gguf", "f32")
    own = {TEMPLATE: "<|im_start|>{document}|{query}<|im_end|>"}
    path = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda m, t: (m | own, t))
    with tinyllm.load(path, device="cpu") as llm:
        assert llm.rerank(QUERY, ["x"])[0] != pytest.approx(llm.rerank("x", [QUERY])[0], abs=1e-4)
        with pytest.raises(ArgumentError, match="no place for an instruction"):
            llm.rerank(QUERY, ["x"], instruction=INSTRUCTION)
