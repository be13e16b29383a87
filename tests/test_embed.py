"""`llm.embed`: texts as vectors as the files mean them, against transformers' hidden states and
sentence-transformers' vectors; the same bits alone and together."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import families_table
import numpy as np
import numpy.typing as npt
import pytest
from helpers_embed import EMBEDDERS, END, TEXTS, Embedder, write_embedder
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import (
    GOLDEN_DIR,
    Spec,
    golden_model,
    golden_spec,
    golden_specs,
    random_ids,
    random_weights,
)

import tinyllm
from tinyllm import backends
from tinyllm.engine.embedding import POOLED
from tinyllm.engine.engine import CHUNK
from tinyllm.errors import ArgumentError, FormatError, UnsupportedError
from tinyllm.files.gguf import read_gguf
from tinyllm.modelfiles import read_model

SPECS = [(file, spec) for file in families_table.FILES for spec in golden_specs(file)]


@pytest.mark.parametrize(("file", "spec"), SPECS, ids=[spec.name for _, spec in SPECS])
def test_the_mean_of_what_transformers_has(file: str, spec: Spec, tmp_path: Path) -> None:
    expected = np.load(GOLDEN_DIR / families_table.FILES[file])[spec.name + ".mean"]
    path = golden_model(spec, tmp_path)
    with tinyllm.load(path, device="cpu", cache_type="f32", context=spec.context) as llm:
        vector = llm.embed(random_ids(spec.config, spec.seed, spec.n_tokens))
    assert vector.dtype == np.float32
    assert vector.shape == expected.shape
    assert families_table.relative(vector, expected) < 1e-4


@pytest.fixture(scope="module")
def stories() -> Iterator[tinyllm.LLM]:
    with tinyllm.load("stories", device="cpu", context=2048) as llm:
        yield llm


@pytest.mark.parametrize("pooling", list(POOLED))
def test_together_and_alone(pooling: Any, stories: tinyllm.LLM) -> None:
    """Of lengths that share calls, fill one, and take several."""
    texts = [[5] * n for n in (3, 1, 200, CHUNK, 400, 2 * CHUNK + 30, 64, 65)]
    together = stories.embed(texts, pooling=pooling)
    assert together.shape == (len(texts), stories.config.dim)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_array_equal(stories.embed(text, pooling=pooling), vector)
    assert stories.embed([], pooling=pooling).shape == (0, stories.config.dim)


def test_poolings_are_of_the_same_activations(stories: tinyllm.LLM) -> None:
    """A token's do not depend on those behind it, so means of prefixes tell each one's; of a text in one call
    and in three."""
    for n in (1, 2, 70, 2 * CHUNK + 30):
        ids = random_ids({"vocab_size": stories.config.vocab_size}, 3, n)
        mean, last, cls = (stories.embed(ids, pooling=pooling) for pooling in ("mean", "last", "cls"))
        np.testing.assert_array_equal(stories.embed(ids), mean)
        np.testing.assert_array_equal(stories.embed(ids[:1]), cls)
        if n == 1:
            np.testing.assert_array_equal(mean, last)
            continue
        before = stories.embed(ids[:-1], pooling="mean").astype(np.float64)
        np.testing.assert_allclose(mean * float(n) - before * (n - 1), last, atol=2e-6 * n * abs(last).max())


def test_what_is_alike_is_near(stories: tinyllm.LLM) -> None:
    cat, dog, kitten = stories.embed(
        ["The cat sat on the mat.", "A dog ran to the park.", "The kitten sat on the rug."], normalize=True
    )
    assert np.linalg.norm(cat) == pytest.approx(1, abs=1e-6)
    assert cat @ kitten > cat @ dog + 0.2
    plain = stories.embed("The cat sat on the mat.")
    np.testing.assert_allclose(plain / np.linalg.norm(plain), cat, rtol=1e-6)


def test_errors(stories: tinyllm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tinyllm.ContextError, match="2049 tokens do not fit"):
        stories.embed([[5], [5] * 2049])
    with pytest.raises(tinyllm.ArgumentError, match="the prompt is empty"):
        stories.embed([[5], ()])
    stories.embed("Once")  # a call's buffers stay
    before = backends.live_allocations()
    monkeypatch.setattr(backends, "free_memory", lambda: 1000)
    with pytest.raises(tinyllm.MemoryLimitError, match=r"needs .* of KV cache, .* are free"):
        stories.embed("Once")
    assert backends.live_allocations() == before
    monkeypatch.undo()
    stories.embed("Once")
    assert backends.live_allocations() == before
    closed = tinyllm.load("stories", device="cpu")
    closed.close()
    with pytest.raises(tinyllm.ModelClosedError):
        closed.embed("Once")


def test_no_memory_for_vectors(stories: tinyllm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numpy finds none, which says so with an exception of its own."""

    def none_left(x: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(stories.model, "output_norm", none_left)
    with pytest.raises(tinyllm.MemoryLimitError, match="no memory left while computing vectors of 2 texts"):
        stories.embed(["Once", "Tom"])


# ---- as the files mean them


def cosines(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    cosine: npt.NDArray[Any] = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return cosine


@pytest.mark.parametrize("embedder", EMBEDDERS, ids=lambda embedder: embedder.name)
def test_vectors_are_those_of_sentence_transformers(embedder: Embedder, tmp_path: Path) -> None:
    """Not their direction alone: a Normalize step counts, as do END behind a text and a default prompt."""
    expected = np.load(GOLDEN_DIR / "embeddings.npz")[embedder.name]
    path = write_embedder(tmp_path, embedder)
    with tinyllm.load(path, device="cpu", cache_type="f32") as llm:
        assert llm.tokenizer is not None
        assert llm.tokenizer.encode("a")[-1] == llm.tokenizer.id_of(END)
        vectors = llm.embed(TEXTS)
        assert (cosines(vectors, expected) > 0.9999).all()
        assert families_table.relative(vectors, expected) < 1e-4
        for pooling in POOLED:
            others = llm.embed(TEXTS, pooling=pooling, normalize=False, instruction="")
            same = families_table.relative(others, expected) < 1e-4
            alike = pooling == llm.embedding.pooling and not embedder.normalize and not embedder.prompts
            assert same == alike, pooling


def test_instructions(tmp_path: Path) -> None:
    embedder = next(embedder for embedder in EMBEDDERS if embedder.prompts)
    with tinyllm.load(write_embedder(tmp_path, embedder), device="cpu") as llm:
        assert llm.embedding.prompts == {"query": "Find: ", "document": ""}
        np.testing.assert_array_equal(llm.embed("x"), llm.embed("Find: x", instruction=""))
        np.testing.assert_array_equal(llm.embed("x", instruction="No: "), llm.embed("No: x", instruction=""))
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode("x")  # taken as they are
        np.testing.assert_array_equal(llm.embed(ids), llm.embed("x", instruction=""))
        with pytest.raises(ArgumentError, match="an instruction goes before texts"):
            llm.embed(["x", ids], instruction="No: ")
        with pytest.raises(TypeError, match="instruction must be str, not int"):
            llm.embed("x", instruction=5)  # type: ignore[arg-type]


def test_a_text_past_what_the_makers_cut_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tinyllm.load(write_embedder(tmp_path, EMBEDDERS[0]), device="cpu") as llm:
        llm.embed("x" * 99)
        assert not caplog.records
        llm.embed(["x", "x" * 100])
        llm.embed("x" * 101)
    [record] = caplog.records
    assert "a text of 101 tokens is taken whole; its makers cut texts after 100" in record.getMessage()


def test_a_model_saved_without_its_head_gives_vectors_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = next(embedder for embedder in EMBEDDERS if embedder.name == "mean")
    path = write_embedder(tmp_path / "m", embedder)
    assert not read_model(path).has_output
    with tinyllm.load(path, device="cpu") as llm:
        for ask in (llm, llm.logits, llm.score):
            with pytest.raises(UnsupportedError, match=r"saved without its output matrix: .* \(embed\)"):
                ask("the cat")
        assert llm.embed("the cat").shape == (llm.config.dim,)


# ---- what embed does not make


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"1_Pooling/config.json": {"pooling_mode": "max"}}, r"1_Pooling/config\.json has the pooling 'max'"),
        ({"1_Pooling/config.json": {"pooling_mode": ["mean", "cls"]}}, "the pooling 'mean, cls'"),
        ({"1_Pooling/config.json": {"pooling_mode_weightedmean_tokens": True}}, "pooling 'weightedmean'"),
        ({"modules.json": [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]},
         r"a step 'sentence_transformers\.models\.Dense'"),
        ({"modules.json": [("Transformer", "")]}, "modules.json has the steps 'Transformer'"),
        ({"modules.json": [("Transformer", ""), ("Normalize", ""), ("Pooling", "1_Pooling")]}, "the steps"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "says do_lower_case"),
    ],
)  # fmt: skip
def test_other_steps_are_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Where `pooling` is not given: then the vectors are the ones asked for."""
    path = write_embedder(tmp_path, EMBEDDERS[0])
    for name, value in changes.items():
        if isinstance(value, list):
            value = [{"type": f"sentence_transformers.models.{kind}", "path": at} for kind, at in value]
        (path / name).write_text(json.dumps(value), encoding="utf-8")
    with tinyllm.load(path, device="cpu") as llm:
        with pytest.raises(UnsupportedError, match=words + r".*; pass pooling= \(mean, last, cls\)"):
            llm.embed("x")
        assert llm.embed("x", pooling="last").shape == (llm.config.dim,)


def test_an_instruction_outside_the_pooling_is_refused(tmp_path: Path) -> None:
    embedder = next(embedder for embedder in EMBEDDERS if embedder.prompts)
    path = write_embedder(tmp_path, embedder._replace(pooling=embedder.pooling | {"include_prompt": False}))
    with tinyllm.load(path, device="cpu") as llm:
        for options in ({}, {"pooling": "mean"}, {"instruction": "No: "}):
            with pytest.raises(UnsupportedError, match=r"out of the pooling \(include_prompt\)"):
                llm.embed("x", **options)  # type: ignore[arg-type]
        llm.embed("x", instruction="")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("modules.json", {}, "modules.json is no list"),
        ("modules.json", [1], "modules.json is no list"),
        (
            "modules.json",
            [{"type": "a.Pooling", "path": "../x"}],
            "is no module with a type and a plain path",
        ),
        ("modules.json", [{"type": 5}], "is no module with a type"),
        ("sentence_bert_config.json", {"max_seq_length": "many"}, "max_seq_length must be a whole number"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "must be texts by name"),
        ("config_sentence_transformers.json", {"default_prompt_name": "a"}, "one of the names"),
    ],
)
def test_broken_files_beside_a_model(name: str, value: Any, words: str, tmp_path: Path) -> None:
    path = write_embedder(tmp_path, EMBEDDERS[0])
    (path / name).write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(FormatError, match=words):
        read_model(path)


# ---- GGUF

CONFIG = {**golden_spec("llama3").config, "vocab_size": 400}


def gguf_file(path: Path, **metadata: Any) -> Path:
    write_gguf(
        path, CONFIG, random_weights(CONFIG, 3), tokenizer=small_tokenizer(400),
        metadata={key.replace("__", "."): value for key, value in metadata.items()},
    )  # fmt: skip
    return path


@pytest.mark.parametrize(("number", "pooling"), [(1, "mean"), (2, "cls"), (3, "last"), (None, "mean")])
def test_pooling_type_of_a_gguf_file(number: int | None, pooling: Any, tmp_path: Path) -> None:
    said = {} if number is None else {"llama__pooling_type": number}
    with tinyllm.load(gguf_file(tmp_path / "m.gguf", **said), device="cpu") as llm:
        np.testing.assert_array_equal(llm.embed(TEXTS), llm.embed(TEXTS, pooling=pooling))
        assert not np.array_equal(llm.embed("the cat", pooling="last"), llm.embed("the cat", pooling="cls"))
        with pytest.raises(ArgumentError, match="pooling is 'max', expected one of mean, last, cls"):
            llm.embed("x", pooling="max")  # type: ignore[arg-type]


def test_an_eos_that_the_file_asks_for_is_pooled(tmp_path: Path) -> None:
    """As Qwen 3's and gte-Qwen 2's embedding models have it: the last token is EOS."""
    said = {"llama__pooling_type": 3, "tokenizer__ggml__add_eos_token": True}
    with tinyllm.load(gguf_file(tmp_path / "m.gguf", **said), device="cpu") as llm:
        assert llm.tokenizer is not None
        ids = [1, *llm.tokenizer.encode("the cat", bos=False), 2]
        np.testing.assert_array_equal(llm.embed("the cat"), llm.embed(ids, pooling="last"))


@pytest.mark.parametrize(("number", "words"), [(0, "a vector a token"), (4, "a reranker")])
def test_poolings_of_other_kinds_are_refused(number: int, words: str, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf", llama__pooling_type=number)
    with tinyllm.load(path, device="cpu") as llm:
        with pytest.raises(UnsupportedError, match=f"m.gguf: its file says pooling_type {number}: {words}"):
            llm.embed("x")
        llm.embed("x", pooling="mean")
        llm("x", max_tokens=1)
    with pytest.raises(FormatError, match=r"llama\.pooling_type is 5; there are 0 to 4"):
        read_model(gguf_file(tmp_path / "m.gguf", llama__pooling_type=5))


def test_what_quantize_keeps_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_embedder(tmp_path / "m", EMBEDDERS[2])  # cls, normalized
    (path / "tokenizer.json").unlink()
    with caplog.at_level(logging.WARNING):
        tinyllm.quantize(path, tmp_path / "out.gguf", "f32")
    assert read_gguf(tmp_path / "out.gguf").metadata["qwen3.pooling_type"] == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: a GGUF file cannot say this of its vectors of texts: normalize, max_seq_length"
    ]
    with (
        tinyllm.load(path, device="cpu") as a,
        tinyllm.load(tmp_path / "out.gguf", device="cpu") as b,
    ):
        np.testing.assert_array_equal(a.embed([5, 6, 7]), b.embed([5, 6, 7], normalize=True))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_llama_cpp_makes_the_same_vectors(number: int, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = gguf_file(tmp_path / "m.gguf", llama__pooling_type=number)
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(str(path), embedding=True, n_ctx=256, type_k=f32, type_v=f32, verbose=False)
    theirs = np.array([model.embed(text) for text in TEXTS])
    with tinyllm.load(path, device="cpu", cache_type="f32") as llm:
        ours = llm.embed(TEXTS)
    assert (cosines(ours, theirs) > 0.9999).all()
