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
from helpers_embed import EMBEDDERS, END, LONG, TEXTS, Embedder, write_embedder
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
from tinyllm.config import POOLINGS
from tinyllm.engine.embedding import EMBED, planned
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


@pytest.mark.parametrize("pooling", POOLINGS)
def test_together_and_alone(pooling: Any, stories: tinyllm.LLM) -> None:
    """Of lengths that share calls, fill one, and take several; calls cut them anywhere."""
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
        vectors = llm.embed(embedder.texts)
        assert vectors.shape == (len(embedder.texts), llm.embedding_dim)
        assert (cosines(vectors, expected) > 0.9999).all()
        assert families_table.relative(vectors, expected) < 1e-4
        has_default = "default_prompt_name" in (embedder.prompts or {})
        for pooling in POOLINGS:
            others = llm.embed(embedder.texts, pooling=pooling, normalize=False, instruction="")
            same = families_table.relative(others, expected) < 1e-4
            alike = pooling == llm.embedding.pooling and not embedder.normalize and not has_default
            assert same == alike, pooling


# ---- attention to both sides

BOTH_SIDES = [embedder for embedder in EMBEDDERS if embedder.name in ("gemma", "bidirectional_window")]


@pytest.mark.parametrize("embedder", BOTH_SIDES, ids=lambda embedder: embedder.name)
def test_both_sides_together_and_alone(embedder: Embedder, tmp_path: Path) -> None:
    """And on every instruction set, and with other numbers of threads, which cut segments otherwise."""
    texts, before = [*embedder.texts, LONG[:290], "y"], backends.isa_name()
    path = write_embedder(tmp_path, embedder)
    with tinyllm.load(path, device="cpu", threads=1) as llm:
        vectors = llm.embed(texts)
        for text, vector in zip(texts, vectors, strict=True):
            np.testing.assert_array_equal(llm.embed(text), vector)
        try:
            for isa in backends.isa_names():
                backends.select_isa(isa)
                np.testing.assert_array_equal(llm.embed(texts[3:]), vectors[3:])
        finally:
            backends.select_isa(before)
    with tinyllm.load(path, device="cpu", threads=3) as llm:
        np.testing.assert_array_equal(llm.embed(texts), vectors)


def test_what_lies_behind_a_token_matters_to_it(tmp_path: Path) -> None:
    for name, differs in (("bidirectional", True), ("mean", False)):
        embedder = next(embedder for embedder in EMBEDDERS if embedder.name == name)
        with tinyllm.load(write_embedder(tmp_path / name, embedder), device="cpu") as llm:
            a, b = llm.embed([[5, 6, 7, 8], [5, 6, 7, 9]], pooling="cls")
        assert np.array_equal(a, b) != differs


def test_both_sides_need_a_text_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_embedder(tmp_path, next(e for e in EMBEDDERS if e.name == "bidirectional"))
    with tinyllm.load(path, device="cpu") as llm:
        assert llm.chunk == llm.context
        for ask in (llm, llm.logits, llm.score, llm.session().append):
            with pytest.raises(UnsupportedError, match=r"attends to both sides: .* \(embed\), no logits"):
                ask("the cat")
        pool = llm.model.cache("f16", 1)
        pool.grow(1)
        with pytest.raises(ArgumentError, match="begins at position 3: a bidirectional model takes it whole"):
            llm.model.forward([5], [3], [0], [[0]], logits=False, cache=pool)
        pool.close()
        llm.chunk = 50  # as where a call of more would take more memory than the weights
        llm.embed("x" * 49)  # and END
        with pytest.raises(tinyllm.ContextError, match="a text of 51 tokens is more than the 50 that a call"):
            llm.embed(["x", "x" * 50])


@pytest.mark.parametrize(
    ("name", "changes", "windows"),
    [
        ("gemma", {}, {0, 11}),
        ("gemma", {"use_bidirectional_attention": None}, {0, 21}),
        ("gemma", {"use_bidirectional_attention": None, "is_causal": False}, {0, 22}),
        ("bidirectional_window", {}, {31}),
    ],
)
def test_windows_to_both_sides(name: str, changes: dict[str, Any], windows: set[int], tmp_path: Path) -> None:
    """As transformers masks them: a Gemma halves what its config says, others see one token more."""
    embedder = next(embedder for embedder in EMBEDDERS if embedder.name == name)
    config = {**(embedder.config or {}), **changes}
    assert (
        set(read_model(write_embedder(tmp_path, embedder._replace(config=config))).config.windows) == windows
    )


# ---- calls


def test_calls_are_full(stories: tinyllm.LLM) -> None:
    """A call computes as many tokens as that of a long prompt, whatever the texts' lengths."""
    lengths = [100, 300, 7, 512, 513, 1, 1200, 64] * 3
    sizes = [call.n_tokens for call in planned(lengths, CHUNK, whole=False)]
    assert sizes[:-1] == [CHUNK] * (sum(lengths) // CHUNK)
    assert sum(sizes) == sum(lengths)
    short = planned([3] * 200, CHUNK, whole=False)
    assert [len(call.parts) for call in short] == [EMBED] * 3 + [200 - 3 * EMBED]
    parts = [part for call in planned(lengths, 1200, whole=True) for part in call.parts]
    assert parts == [(i, 0, n) for i, n in enumerate(lengths)]
    assert planned([], CHUNK, whole=False) == []


def test_progress_and_cancel(stories: tinyllm.LLM) -> None:
    seen: list[tuple[int, int]] = []
    texts = [[5] * 300] * 5
    stories.embed(texts, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(512, 1500), (1024, 1500), (1500, 1500)]
    with pytest.raises(tinyllm.CancelledError):
        stories.embed(texts, cancel=lambda: True)


def test_instructions(tmp_path: Path) -> None:
    embedder = next(embedder for embedder in EMBEDDERS if embedder.prompts)
    with tinyllm.load(write_embedder(tmp_path, embedder), device="cpu") as llm:
        assert llm.embedding.prompts == {"query": "Find: ", "document": ""}
        np.testing.assert_array_equal(llm.embed("x"), llm.embed("Find: x", instruction=""))
        np.testing.assert_array_equal(llm.embed("x", instruction="No: "), llm.embed("No: x", instruction=""))
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode("x")  # taken as they are
        np.testing.assert_array_equal(llm.embed(ids), llm.embed("x", instruction=""))
        np.testing.assert_array_equal(llm.embed("x", prompt="document"), llm.embed("x", instruction=""))
        np.testing.assert_array_equal(llm.embed("x", prompt="query"), llm.embed("x"))
        with pytest.raises(
            ArgumentError, match=r"prompt is 'passage'; the prompts of .* are: 'query', 'documen"
        ):
            llm.embed("x", prompt="passage")
        with pytest.raises(ArgumentError, match="give one of them"):
            llm.embed("x", prompt="query", instruction="No: ")
        with pytest.raises(ArgumentError, match="an instruction goes before texts"):
            llm.embed(["x", ids], prompt="query")
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
        ({"1_Pooling/config.json": {"pooling_mode": "min"}}, r"1_Pooling/config\.json has the pooling 'min'"),
        ({"1_Pooling/config.json": {"pooling_mode": ["mean", "cls"]}}, "the pooling 'mean, cls'"),
        ({"modules.json": [("Transformer", ""), ("Pooling", "1_Pooling"), ("WordWeights", "2")]},
         r"a step 'sentence_transformers\.models\.WordWeights'"),
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
        with pytest.raises(UnsupportedError, match=words + r".*; pass pooling= \(mean, last, cls, max"):
            llm.embed("x")
        assert llm.embed("x", pooling="last").shape == (llm.config.dim,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_function": "torch.nn.modules.activation.GELU"}, "has activation_function '.*GELU'"),
        ({"use_residual": True}, "asks for use_residual"),
        ({"module_input_name": "token_embeddings"}, "asks for use_residual, or another input"),
    ],
)
def test_other_dense_layers_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_embedder(tmp_path, DENSE)
    config = path / "3_Dense" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **changes}))
    with tinyllm.load(path, device="cpu") as llm:
        with pytest.raises(UnsupportedError, match=rf"3_Dense/config\.json {words}"):
            llm.embed("x")
        assert llm.embed("x", pooling="mean").shape == (64,)  # without any of them


DENSE = next(embedder for embedder in EMBEDDERS if embedder.name == "dense")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out_features": 21}, r"linear\.weight has shape \(20, 48\), its config\.json says \(21, 48\)"),
        ({"bias": True}, r"holds 'linear\.weight', expected linear\.bias, linear\.weight"),
        ({"in_features": None}, "in_features is missing"),
    ],
)
def test_dense_layers_that_do_not_fit(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_embedder(tmp_path, DENSE)
    config = path / "3_Dense" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **changes}))
    with pytest.raises(FormatError, match=words):
        read_model(path)


def test_dense_layers_behind_another_width(tmp_path: Path) -> None:
    path = write_embedder(tmp_path, DENSE._replace(dense=DENSE.dense[1:]))
    modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
    (path / "modules.json").write_text(json.dumps([*modules, modules[-1]]))
    with pytest.raises(FormatError, match=r"'linear.weight' of shape \(20, 64\) does not fit behind .* 20"):
        read_model(path)


def test_a_text_that_is_all_instruction(tmp_path: Path) -> None:
    """END, which the tokenizer puts behind it, is pooled; nothing else is."""
    embedder = next(embedder for embedder in EMBEDDERS if embedder.name == "apart")
    path = write_embedder(tmp_path, embedder)
    with tinyllm.load(path, device="cpu") as llm:
        last = llm.embed("", pooling="last")
        np.testing.assert_array_equal(llm.embed(""), last)
        np.testing.assert_array_equal(llm.embed("", pooling="cls"), last)
        np.testing.assert_allclose(llm.embed("", pooling="mean"), last, rtol=1e-6)
    backend = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    (path / "tokenizer.json").write_text(json.dumps({**backend, "post_processor": None}), encoding="utf-8")
    with (
        tinyllm.load(path, device="cpu") as llm,
        pytest.raises(ArgumentError, match="no token behind the instruction 'Find: '"),
    ):
        llm.embed("")


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
        with pytest.raises(ArgumentError, match="pooling is 'min', expected one of mean, last, cls, max"):
            llm.embed("x", pooling="min")  # type: ignore[arg-type]


def test_an_eos_that_the_file_asks_for_is_pooled(tmp_path: Path) -> None:
    """As Qwen 3's and gte-Qwen 2's embedding models have it: the last token is EOS."""
    said = {"llama__pooling_type": 3, "tokenizer__ggml__add_eos_token": True}
    with tinyllm.load(gguf_file(tmp_path / "m.gguf", **said), device="cpu") as llm:
        assert llm.tokenizer is not None
        ids = [1, *llm.tokenizer.encode("the cat", bos=False), 2]
        np.testing.assert_array_equal(llm.embed("the cat"), llm.embed(ids, pooling="last"))


@pytest.mark.parametrize(("number", "words"), [(0, ": a vector a token"), (4, ", a reranker, without")])
def test_poolings_of_other_kinds_are_refused(number: int, words: str, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf", llama__pooling_type=number)
    with tinyllm.load(path, device="cpu") as llm:
        with pytest.raises(UnsupportedError, match=f"m.gguf: its file says pooling_type {number}{words}"):
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


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_a_written_gguf_of_embedding_gemma(
    type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under the architecture that says by its name that both sides are seen, with its dense layers."""
    embedder = next(embedder for embedder in EMBEDDERS if embedder.name == "gemma")
    path = write_embedder(tmp_path / "m", embedder)
    (path / "tokenizer.json").unlink()
    with caplog.at_level(logging.WARNING):
        tinyllm.quantize(path, tmp_path / "out.gguf", type)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "normalize, max_seq_length"
    ]
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["general.architecture"] == "gemma-embedding"
    assert metadata["gemma-embedding.attention.sliding_window"] == 20
    assert metadata["gemma-embedding.attention.causal"] is False
    assert metadata["gemma-embedding.dense_2_feat_out"] == 96
    assert metadata["gemma-embedding.pooling_type"] == 1
    ids = [[5, 6, 7], list(range(200)) * 2]
    with tinyllm.load(path, device="cpu") as a, tinyllm.load(tmp_path / "out.gguf", device="cpu") as b:
        assert a.config.windows == b.config.windows
        ours, theirs = a.embed(ids), b.embed(ids, normalize=True)
    if type == "f32":
        np.testing.assert_array_equal(ours, theirs)
    assert (cosines(ours, theirs) > (0.999999 if type == "f32" else 0.995)).all()


@pytest.mark.parametrize(
    ("name", "architecture"), [("bidirectional", "llama-embed"), ("max", "qwen2"), ("dense", "qwen2")]
)
def test_what_a_gguf_says_of_other_models(
    name: str, architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_embedder(tmp_path / "m", next(e for e in EMBEDDERS if e.name == name))
    (path / "tokenizer.json").unlink()
    with caplog.at_level(logging.WARNING):
        tinyllm.quantize(path, tmp_path / "out.gguf", "f32")
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["general.architecture"] == architecture
    said = caplog.records[0].getMessage()
    assert ("dense layers" in said, "its pooling" in said) == (name == "dense", name == "max")
    with tinyllm.load(path, device="cpu") as a, tinyllm.load(tmp_path / "out.gguf", device="cpu") as b:
        assert a.config.bidirectional == b.config.bidirectional == (name == "bidirectional")
        if name == "bidirectional":
            np.testing.assert_array_equal(a.embed([5, 6, 7]), b.embed([5, 6, 7]))


def test_a_window_of_other_models_in_gguf_is_refused(tmp_path: Path) -> None:
    path = write_embedder(tmp_path / "m", next(e for e in EMBEDDERS if e.name == "bidirectional_window"))
    with pytest.raises(UnsupportedError, match=r"a window .* is supported for Gemma 3 alone"):
        tinyllm.quantize(path, tmp_path / "out.gguf", "f32")


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
