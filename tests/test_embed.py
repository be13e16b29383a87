"""`llm.embed`: texts as vectors, against transformers' hidden states, the same bits alone and together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import families_table
import numpy as np
import pytest
from helpers_models import GOLDEN_DIR, Spec, golden_model, golden_specs, random_ids

import tinyllm
from tinyllm import backends
from tinyllm.engine.engine import CHUNK

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


def test_together_and_alone(stories: tinyllm.LLM) -> None:
    """Of lengths that share calls, fill one, and take several."""
    texts = [[5] * n for n in (3, 1, 200, CHUNK, 400, 2 * CHUNK + 30, 64, 65)]
    together = stories.embed(texts)
    assert together.shape == (len(texts), stories.config.dim)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_array_equal(stories.embed(text), vector)
    assert stories.embed([]).shape == (0, stories.config.dim)


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
