"""A model in stages: the bits of one process wherever it is cut, each stage with its own weights alone, and
clear words where one goes; it comes back, and what it held is computed again."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers_models import Spec as Golden
from helpers_models import golden_spec, golden_specs, random_weights, write_hf_directory
from helpers_stages import Cluster

import tinyllm
from tinyllm.errors import ArgumentError, CancelledError, LostError, MemoryLimitError, UnsupportedError
from tinyllm.loading import kept_formats
from tinyllm.modelfiles import open_model
from tinyllm.pipeline import PipelineModel, balanced, load_stages
from tinyllm.pipeline.cut import bytes_of, cuts_of, digest, weights_of
from tinyllm.pipeline.wire import connected

PROMPT = "Once upon a time there was a little dog who lived in a house. " * 12


@contextmanager
def stages(
    path: object = "stories", layers: tuple[int, ...] | None = None, n: int = 2, **settings: object
) -> Iterator[tuple[tinyllm.LLM, Cluster]]:
    cluster = Cluster()
    given: dict[str, object] = {"threads": 1, "patience_s": 20.0, **settings}
    llm = load_stages(path, cluster, layers=layers, stages=n, **given)  # type: ignore[arg-type]
    try:
        yield llm, cluster
    finally:
        llm.close()


@pytest.fixture(scope="module")
def whole() -> tinyllm.LLM:
    return tinyllm.load("stories", device="cpu", threads=1)


def model_of(llm: tinyllm.LLM) -> PipelineModel:
    assert isinstance(llm.model, PipelineModel)
    return llm.model


@pytest.mark.parametrize("layers", [(4,), (1, 3), (3, 1), (2, 2), (1, 1, 1, 1)])
def test_every_cut_gives_the_same_bits(whole: tinyllm.LLM, layers: tuple[int, ...]) -> None:
    with stages(layers=layers) as (llm, _):
        for seed in (1, 2):
            one = whole(PROMPT, seed=seed, max_tokens=30, logprobs=True, top_logprobs=3)
            other = llm(PROMPT, seed=seed, max_tokens=30, logprobs=True, top_logprobs=3)
            assert (one.text, one.logprobs) == (other.text, other.logprobs)
            assert one.top_logprobs == other.top_logprobs
        assert whole.score(PROMPT).logprobs == llm.score(PROMPT).logprobs
        prompts = ["Tom", PROMPT, "Lily had", PROMPT[:300]]
        texts = [c.tokens for c in whole(prompts, n=2, seed=3, max_tokens=12)[1]]
        assert texts == [c.tokens for c in llm(prompts, n=2, seed=3, max_tokens=12)[1]]
        assert np.array_equal(whole.embed([PROMPT, "x"]), llm.embed([PROMPT, "x"]))


@pytest.mark.parametrize("spec", golden_specs("families"), ids=lambda spec: spec.name)
def test_every_family(spec: Golden, tmp_path: Path) -> None:
    config = {**spec.config, "max_position_embeddings": max(512, spec.config["max_position_embeddings"])}
    path = write_hf_directory(tmp_path, config, random_weights(config, spec.seed))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], 200).tolist()
    with tinyllm.load(path, device="cpu", threads=1, context=256) as llm:
        n_layers, has_states = llm.config.n_layers, bool(llm.config.mixers)
        expected = (llm.embed([ids]) if llm.config.bidirectional else llm.logits(ids)).tobytes()
    if has_states:
        with pytest.raises(tinyllm.UnsupportedError, match="linear attention"):
            stages(path, (1,) * n_layers, context=256).__enter__()
        return
    with stages(path, (1,) * n_layers, context=256) as (llm, _):
        found = llm.embed([ids]) if llm.config.bidirectional else llm.logits(ids)
        assert found.tobytes() == expected


def test_windows_free_pages_on_every_stage(tmp_path: Path) -> None:
    """Layers that look back differently far, cut so that the stages have different groups of them."""
    spec = next(spec for spec in golden_specs("families") if spec.name == "gemma3")
    config = {**spec.config, "max_position_embeddings": 2048}
    path = write_hf_directory(tmp_path, config, random_weights(config, spec.seed))
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], 900).tolist()
    with tinyllm.load(path, device="cpu", threads=1) as llm:
        n = llm.config.n_layers
        expected = llm(ids, max_tokens=150, seed=1, logprobs=True).logprobs
    for layers in {(1, n - 1), (n - 1, 1), (1,) * n}:
        with stages(path, layers) as (llm, _):
            assert llm(ids, max_tokens=150, seed=1, logprobs=True).logprobs == expected
            held = llm.cache_pages
            assert held.used < -(-1050 // 64) * len(llm.model.cache_groups)


def test_experts_and_quantizing_while_loading(tmp_path: Path) -> None:
    spec = golden_spec("mixtral")
    assert spec.config["num_local_experts"] > 1
    path = write_hf_directory(tmp_path, spec.config, random_weights(spec.config, spec.seed))
    ids = list(range(20))
    with tinyllm.load(path, device="cpu", threads=1, weights="q8_0") as llm:
        expected, n = llm.logits(ids).tobytes(), llm.config.n_layers
    with stages(path, (1,) * n, weights="q8_0") as (llm, _):
        assert llm.logits(ids).tobytes() == expected


# What a stage holds


def test_a_stage_has_its_own_weights_alone(whole: tinyllm.LLM) -> None:
    files = open_model("stories")
    formats = kept_formats(files.weights, None, "")
    cuts = cuts_of([1, 2, 1], 4)
    held = [weights_of(files.weights, formats, cut) for cut in cuts]
    for cut, own in zip(cuts, held, strict=True):
        layers = {w.layer for w in own} - {None}
        assert layers == set(range(cut.last - cut.first))
        expected = {i.name for (_, layer), i in files.weights.items() if layer in range(cut.first, cut.last)}
        assert {w.info.name for w in own if w.layer is not None} == expected
    in_layers = sum(bytes_of([w for w in own if w.layer is not None]) for own in held)
    with stages(layers=(1, 2, 1)) as (llm, cluster):
        facts = model_of(llm).facts
        embedding = bytes_of([w for w in held[0] if w.name == "embedding"])
        small = 1 << 15  # norms, and a vocabulary of one token in the middle
        assert abs(sum(f["weight_bytes"] for f in facts) - in_layers - 2 * embedding) < small
        assert abs(llm.model.token_bytes - whole.model.token_bytes) < small
        assert facts[1]["weight_bytes"] < whole.model.weight_bytes / 2
        assert len(cluster.workers) == 3


def test_balanced_cuts() -> None:
    files = open_model("stories")
    formats = kept_formats(files.weights, None, "")
    for n in (1, 2, 3, 4):
        cuts = balanced(files.config, files.weights, formats, n)
        assert [cut.first for cut in cuts] == [0, *(cut.last for cut in cuts[:-1])]
        assert cuts[-1].last == 4
        assert len(cuts) == n
    assert balanced(files.config, files.weights, formats, 2)[1].first >= 2  # the output is on the last
    with pytest.raises(ArgumentError, match="4 layers"):
        balanced(files.config, files.weights, formats, 5)
    with pytest.raises(ArgumentError, match=r"1 \+ 2 layers, the model 4"):
        cuts_of([1, 2], 4)


def test_memory_is_checked_on_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllm.backends.Cpu.free_memory", lambda self: 3_000_000)
    with pytest.raises(MemoryLimitError, match=r"stage 0 of 2 .*layers 0 to 1.* does not fit"), stages():
        pass


# Faults


def test_a_stage_that_goes_is_told_and_comes_back(whole: tinyllm.LLM) -> None:
    with stages(n=2, patience_s=60.0) as (llm, cluster):
        session, other = llm.session(seed=5), whole.session(seed=5)
        session.append(PROMPT)
        other.append(PROMPT)
        assert session.generate(max_tokens=10).tokens == other.generate(max_tokens=10).tokens
        stream = llm.stream(PROMPT, max_tokens=250, seed=1)
        for _ in range(5):
            next(stream)
        cluster.workers[1].kill()
        started = time.monotonic()
        with pytest.raises(LostError, match=r"stage 1 of 2 \(layers 2 to 3\) is gone"):
            list(stream)
        assert time.monotonic() - started < 15
        threading.Timer(0.5, cluster.workers[1].start_again).start()
        expected = whole(PROMPT, max_tokens=20, seed=1, logprobs=True)
        assert llm(PROMPT, max_tokens=20, seed=1, logprobs=True).logprobs == expected.logprobs
        assert session.generate(max_tokens=10).tokens == other.generate(max_tokens=10).tokens


def test_a_loss_while_nobody_asks_is_not_noticed(whole: tinyllm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllm.pipeline.model.IDLE_S", 0.0)
    with stages(n=2) as (llm, cluster):
        expected = whole(PROMPT, max_tokens=20, seed=1, logprobs=True).logprobs
        assert llm(PROMPT, max_tokens=20, seed=1, logprobs=True).logprobs == expected
        for worker in cluster.workers:
            worker.kill()
            worker.start_again()
        assert llm(PROMPT, max_tokens=20, seed=1, logprobs=True).logprobs == expected


def test_a_stage_that_stays_away_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllm.pipeline.model.IDLE_S", 0.0)
    with stages(n=2, patience_s=0.5) as (llm, cluster):
        cluster.workers[0].kill()
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(
                LostError, match=r"stage 0 of 2 .* did not come back within 0.5 s: it is away"
            ):
                llm("Tom", max_tokens=3)
            assert time.monotonic() - started < 10
        cluster.workers[0].start_again()
        assert llm("Tom", max_tokens=3).tokens


def test_waiting_for_a_stage_can_be_cancelled() -> None:
    with stages(n=2, patience_s=60.0) as (llm, cluster):
        llm("Tom", max_tokens=3)
        cluster.workers[0].kill()
        asked = iter(range(1000))
        started = time.monotonic()
        try:
            completion = llm("Lily", max_tokens=3, cancel=lambda: next(asked) > 3)
            assert completion.finish_reason == "cancelled"
        except (CancelledError, LostError):
            pass
        assert time.monotonic() - started < 20
        cluster.workers[0].start_again()


def test_a_cancelled_call_leaves_everything_as_it_was(whole: tinyllm.LLM) -> None:
    with stages(n=2) as (llm, _):
        expected = whole(PROMPT, max_tokens=10, seed=1, logprobs=True).logprobs
        for after in (0, 1, 2, 5):
            asked = iter(range(10**6))
            done = llm(PROMPT, max_tokens=200, seed=2, cancel=lambda asked=asked, n=after: next(asked) > n)
            assert done.finish_reason == "cancelled"
            assert llm(PROMPT, max_tokens=10, seed=1, logprobs=True).logprobs == expected


def test_an_interrupt_in_the_middle_of_a_call(whole: tinyllm.LLM) -> None:
    with stages(n=2) as (llm, _):
        expected = whole(PROMPT, max_tokens=10, seed=1, logprobs=True).logprobs

        def interrupt() -> bool:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            llm(PROMPT, max_tokens=10, seed=1, cancel=interrupt)
        model = model_of(llm)
        with pytest.raises(KeyboardInterrupt), model._whole():
            raise KeyboardInterrupt
        assert llm(PROMPT, max_tokens=10, seed=1, logprobs=True).logprobs == expected


def test_strangers_are_not_let_in(whole: tinyllm.LLM) -> None:
    with stages(n=2) as (llm, cluster):
        stage = cluster.workers[0].stage
        assert stage is not None
        host, port = stage.serve(llm.context)
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64):
            with socket.create_connection((host, port)) as stranger:
                stranger.sendall(words)
        with pytest.raises(OSError, match="the connection ended"):
            connected(host, port, b"another secret")
        expected = whole("Tom", max_tokens=5, seed=1).tokens
        assert llm("Tom", max_tokens=5, seed=1).tokens == expected


def test_stages_of_other_weights_are_refused(tmp_path: Path) -> None:
    spec = golden_specs()[0]
    paths = [
        write_hf_directory(tmp_path / str(seed), spec.config, random_weights(spec.config, seed))
        for seed in (1, 2)
    ]
    for path in paths:
        files = open_model(path)
        assert digest(files.weights, kept_formats(files.weights, None, "")) == digest(
            open_model(path).weights, kept_formats(files.weights, None, "")
        )

    class Mixed(Cluster):
        def __call__(self, spec):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            return super().__call__(replace(spec, path=str(paths[spec.number])))

    n = open_model(paths[0]).config.n_layers
    with pytest.raises(UnsupportedError, match=r"stage 1 of 2 .* has other weights"):
        load_stages(paths[0], Mixed(), layers=[1, n - 1], threads=1)


# The rest of the interface


def test_a_session_is_saved_and_restored(whole: tinyllm.LLM, tmp_path: Path) -> None:
    with stages(n=2) as (llm, _):
        session = llm.session(seed=3)
        session.append(PROMPT)
        session.generate(max_tokens=5)
        session.save(tmp_path / "session")
        expected = session.generate(max_tokens=8).tokens
        assert llm.restore(tmp_path / "session").generate(max_tokens=8).tokens == expected


def test_what_is_not_there_is_refused_by_name() -> None:
    with stages(n=2) as (llm, _):
        model = model_of(llm)
        for call in (
            lambda: model.adapter([]),
            lambda: model.observe("wq", 0),
            lambda: model.unpack("wq", 0),
        ):
            with pytest.raises(UnsupportedError, match="in one process"):
                call()
        with pytest.raises(TypeError, match="pickled"):
            model.__reduce__()
        assert "layers 0 to" in repr(model)
    with pytest.raises(tinyllm.ModelClosedError):
        llm("Tom")


def test_parts_of_the_forward_pass(whole: tinyllm.LLM) -> None:
    """Layers [first, last), activations in and out, rows in any order: as one process has it."""
    ids, n = np.arange(3, 150, dtype=np.int32), 4
    at, sequence = np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32)
    rows = np.array([140, 3, 70, 70], np.int32)
    with stages(layers=(1, 2, 1)) as (llm, _):
        results = []
        for model in (whole.model, llm.model):
            pool = model.cache("f32", 8)
            pool.grow(8)
            tables = np.arange(3, dtype=np.int32)[None, None]
            call = {"cache": pool}
            x = model.forward(ids, at, sequence, tables, layers=(0, 2), **call)
            y = model.forward(x, at, sequence, tables, layers=(2, n), logits=False, **call)
            logits = model.forward(y, at, sequence, tables, layers=(n, n), rows=rows, **call)
            again = model.forward(ids, at, sequence, tables, rows=rows, **call)
            e = model.forward(ids, at, sequence, tables, layers=(0, 0), logits=False, **call)
            norm = model.output_norm(y)
            results.append([a.tobytes() for a in (x, y, logits, again, e, norm)])
            pool.close()
        assert results[0] == results[1]
        with pytest.raises(ArgumentError, match="layers 2 to 9"):
            llm.model.forward(ids, at, sequence, tables, layers=(2, 9), cache=pool)
