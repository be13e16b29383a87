"""Sliding windows in the KV cache: what is wholly behind them is freed, and no bit of an output changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_models import Spec, golden_spec, golden_specs, random_weights, write_hf_directory

import tinyllm
from tinyllm import backends
from tinyllm.backends import CacheGroup
from tinyllm.config import ModelConfig, config_from_json
from tinyllm.engine.engine import CHUNK
from tinyllm.engine.kvcache import PAGE, pages_held
from tinyllm.engine.needs import cache_pages
from tinyllm.measure.inspection import inspect_model

CONTEXT = 4096
WINDOWED = ("mistral_window", "ministral", "olmo3", "gemma2", "gemma3", "cohere2")


@pytest.fixture(scope="module", params=WINDOWED)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = spec_of(request.param)
    config = {**spec.config, "max_position_embeddings": CONTEXT}
    return write_hf_directory(tmp_path_factory.mktemp(spec.name), config, random_weights(config, spec.seed))


def spec_of(name: str) -> Spec:
    return next(spec for spec in golden_specs("families") if spec.name == name)


def one_group(config: ModelConfig) -> list[CacheGroup]:
    """All layers in one page, nothing ever freed."""
    return [CacheGroup(0, tuple(range(config.n_layers)))]


def ids_of(llm: tinyllm.LLM, n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, llm.config.vocab_size, n)]


def outputs(path: Path) -> list[object]:
    """What a model says: a long prompt's logits and text, a known prefix, siblings, a fork behind the window,
    a batch."""
    with tinyllm.load(path, device="cpu", threads=1, cache_type="f32") as llm:
        ids = ids_of(llm, 1100)
        found: list[object] = [llm.logits(ids)[-300:].tobytes()]
        found.append(llm(ids, max_tokens=150, seed=1, logprobs=True).logprobs)
        found.append(llm([*ids[:700], *ids_of(llm, 90, 1)], max_tokens=5, seed=1, logprobs=True).logprobs)
        found.append([c.logprobs for c in llm(ids[:900], n=3, max_tokens=80, seed=2, logprobs=True)])
        with llm.session(seed=3) as session:
            session.append(ids[:800])
            with session.fork() as other:
                found += [session.generate(max_tokens=70).tokens, other.generate(max_tokens=70).tokens]
                other.append(ids[:40])
                found.append(other.logits.tobytes())
        batch = llm([ids[:n] for n in (1000, 30, 400)], max_tokens=20, seed=4, logprobs=True)
        found += [c.logprobs for c in batch]
        llm._cache.collect()
        assert llm._cache.n_used == 0
    return found


def test_freeing_changes_no_bit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = outputs(path)
    monkeypatch.setattr(backends, "cache_groups", one_group)
    assert outputs(path) == freed


def test_a_long_text_holds_what_its_windows_need(path: Path) -> None:
    """In a pool that may have no more pages than the plan says."""
    with tinyllm.load(path, device="cpu", threads=1, speculate=None) as llm:
        groups = llm.model.cache_groups
        most = cache_pages(llm.config)
        whole = CONTEXT // PAGE
        assert most == sum(pages_held(CONTEXT, g.window, CHUNK) if g.window else whole for g in groups)
        assert most <= len(groups) * whole * (0.2 if all(g.window for g in groups) else 0.8)
        llm._cache.max_pages = most
        ids = ids_of(llm, CONTEXT - 200)
        for i, _ in enumerate(llm.stream(ids, max_tokens=190, seed=0)):
            n_tokens = len(ids) + i
            bound = sum((g.window // PAGE + 2) if g.window else -(-n_tokens // PAGE) for g in groups)
            assert llm._cache.n_used <= bound


def test_a_known_prompt_is_not_computed_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tinyllm.load(path, device="cpu", threads=1) as llm:
        n_computed: list[int] = []
        forward = llm.model.forward

        def counting(tokens, *args, **options):  # type: ignore[no-untyped-def]
            n_computed.append(len(tokens))
            return forward(tokens, *args, **options)

        monkeypatch.setattr(llm.model, "forward", counting)
        ids = ids_of(llm, 1300)
        answer = llm(ids, max_tokens=1).tokens
        assert sum(n_computed) == 1300
        n_computed.clear()
        llm([*ids, *answer, 1, 2, 3], max_tokens=1)
        assert sum(n_computed) == 1304 - 1300 // PAGE * PAGE


def test_the_plan_counts_the_windows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = inspect_model(path).memory
    with tinyllm.load(path, device="cpu", threads=1) as llm:
        assert plan.cache == cache_pages(llm.config) * llm._cache.pool.page_bytes
        page_bytes = llm._cache.pool.page_bytes
        needed = plan.total
    monkeypatch.setattr(backends, "cache_groups", one_group)
    assert plan.cache < 0.9 * inspect_model(path).memory.cache
    monkeypatch.undo()
    # What the plan says is enough is enough to load, one page less is not.
    monkeypatch.setattr(backends, "free_memory", lambda: needed)
    tinyllm.load(path, device="cpu", context=CONTEXT).close()
    monkeypatch.setattr(backends, "free_memory", lambda: needed - page_bytes)
    with pytest.raises(tinyllm.MemoryLimitError, match="a context of"):
        tinyllm.load(path, device="cpu", context=CONTEXT)


def test_groups_of_layers() -> None:
    def groups(*windows: int, context: int = 1000) -> list[tuple[int, int]]:
        spec = golden_spec("llama2")
        config = config_from_json({**spec.config, "num_hidden_layers": len(windows)})
        config = replace(config, context=context, windows=windows)
        found = backends.cache_groups(config)
        assert sorted(layer for group in found for layer in group.layers) == list(range(len(windows)))
        return [(group.window, len(group.layers)) for group in found]

    assert groups(0, 0, 0) == [(0, 3)]
    assert groups(100, 100) == [(100, 2)]
    assert groups(1000, 1000) == groups(1000, 0) == [(0, 2)], "a window of the whole context is none"
    assert groups(100, 0, 100, 0) == [(0, 2), (100, 2)]
    assert groups(*[100] * 5, 0, *[100] * 5, 0) == [(0, 2), *[(100, 2)] * 5]
    assert groups(100, 100, 100, 0, 100, 0) == [(0, 2), (100, 2), (100, 2)]
    assert groups(100, 100, 100, 0, 0) == [(0, 2), (100, 2), (100, 1)]
    assert groups(0, 100, 50, 50) == [(0, 1), (50, 1), (50, 1), (100, 1)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (1, 3, 1), (1, 1, 2, 1)])
def test_tables_of_another_number_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    spec = spec_of("gemma2")
    folder = write_hf_directory(tmp_path, spec.config, random_weights(spec.config, spec.seed))
    with tinyllm.load(folder, device="cpu", threads=1) as llm:
        pool = llm.model.cache("f16", 1)
        pool.grow(1)
        with pytest.raises(tinyllm.ArgumentError, match=r"\[n_sequences, 2, max_pages\]"):
            llm.model.forward([0], [0], [0], np.zeros(shape, np.int32), cache=pool)
        with pytest.raises(tinyllm.ArgumentError, match="page 0 of sequence 0 is 1"):
            llm.model.forward([0], [0], [0], [[[0], [1]]], cache=pool)
        pool.close()
