"""The engine with a mock model: whatever is batched, chunked, shared, taken away, cancelled or interrupted,
every text is the one that a plain loop over the model's formula gives."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers_engine import EOS, N_LAYERS, VOCAB, MockModel, MockPool, logits_after
from helpers_interrupts import handlers_exception_may_be_lost, raise_amid
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm.engine.engine import Batch, Engine, Generation, Job, Piece, _Call
from tinyllm.engine.kvcache import PAGE, KVCache, pages_held
from tinyllm.engine.pace import SHORT
from tinyllm.engine.sampling import Sampled, Sampler, SamplingParams, StopStrings
from tinyllm.errors import ConstraintError, ContextError, MemoryLimitError, ModelClosedError

pytestmark = pytest.mark.usefixtures("frozen_heap")
CONTEXT = 600


def sampler(seed: int) -> Callable[[Any, list[int], int], Sampled]:
    """One of the five most likely tokens, by (seed, position)."""

    def sample(logits: Any, history: list[int], position: int) -> Sampled:
        top = np.argsort(-logits, kind="stable")[:5]
        token = int(top[np.random.Philox(key=[seed, position]).random_raw() % 5])
        return Sampled(token, float(logits[token]), [])

    return sample


def text_of(token: int | None) -> str:
    return "" if token is None else chr(token)


def make_engine(max_pages: int = 64, windows: tuple[int, ...] = (0,), chunk: int = 512) -> Engine:
    cache = KVCache(MockPool(max_pages), max_pages, windows=windows, ahead=chunk)
    return Engine(MockModel(windows), cache, vocab_size=VOCAB, context=2000, chunk=chunk)


def generation(engine: Engine | None, prompt: list[int], seed: int = 0, **options: Any) -> Generation:
    options = {"max_tokens": 20, "context": CONTEXT, "eos_ids": frozenset({EOS}), **options}
    stops = StopStrings(options.pop("stop", ()))
    sequence = engine.sequence(prompt, options.pop("runner", None)) if engine else None
    return Generation(sequence, sampler(seed), stops, text_of, **options)


def run(engine: Engine, groups: Iterable[list[Generation]], **options: Any) -> list[tuple[Generation, Piece]]:
    return list(engine.generate(groups, **options))


def expected(
    prompt: list[int],
    seed: int = 0,
    max_tokens: int = 20,
    windows: tuple[int, ...] = (0,),
    context: int = CONTEXT,
    eos: int | None = EOS,
) -> list[int]:
    """The loop."""
    history, sample = list(prompt), sampler(seed)
    while len(history) < min(len(prompt) + max_tokens, context):
        token = sample(logits_after(history, windows), history, len(history)).token
        if token == eos:
            break
        history.append(token)
    return history[len(prompt) :]


def text(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 256, n)]


def pages_in_use(engine: Engine) -> int:
    gc.collect()
    with engine.cache.lock:
        engine.cache.collect()
    return engine.cache.n_used


def test_one_text() -> None:
    engine = make_engine()
    g = generation(engine, text(10), seed=3)
    pieces = run(engine, [[g]])
    assert g.tokens == expected(text(10), seed=3)
    assert [piece.token for _, piece in pieces] == g.tokens
    assert "".join(str(piece) for _, piece in pieces) == g.text == "".join(map(chr, g.tokens))
    assert (g.finish_reason, g.stop_reason) == ("length", None)
    assert pages_in_use(engine) == 0


def test_the_end_of_text_stops_and_is_no_token() -> None:
    engine = make_engine()
    seed = next(s for s in range(1000) if len(expected(text(10), s)) < 20)
    g = generation(engine, text(10), seed)
    run(engine, [[g]])
    assert g.tokens == expected(text(10), seed)
    assert (g.finish_reason, g.stop_reason) == ("stop", EOS)


def test_the_context_ends_a_text() -> None:
    engine = make_engine()
    g = generation(engine, text(10), context=25, max_tokens=None, eos_ids=frozenset())
    run(engine, [[g]])
    assert (len(g.tokens), g.finish_reason) == (15, "length")


def test_stop_string_over_a_token_border() -> None:
    engine = make_engine()
    whole = "".join(map(chr, expected(text(10))))
    stop = whole[7:10]
    g = generation(engine, text(10), stop=[stop])
    pieces = run(engine, [[g]])
    assert g.text == whole[: whole.index(stop)] == "".join(piece.text for _, piece in pieces)
    assert (g.finish_reason, g.stop_reason) == ("stop", stop)


def test_what_was_held_back_for_a_stop_string_comes_at_the_end() -> None:
    engine = make_engine()
    whole = "".join(map(chr, expected(text(10))))
    g = generation(engine, text(10), stop=[whole[-2:] + "never"])
    pieces = run(engine, [[g]])
    assert g.text == whole == "".join(piece.text for _, piece in pieces)


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 200), st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=6
    ),
    chunk=st.sampled_from([1, 3, 64, 100, 512]),
    max_pages=st.sampled_from([5, 9, 64]),
    windows=st.sampled_from([(0,), (30,), (0, 70), (0, 2, 2)]),
    n=st.integers(1, 3),
)
def test_batch_chunk_pool_and_siblings_change_nothing(
    prompts: list[tuple[int, int, int]], chunk: int, max_pages: int, windows: tuple[int, ...], n: int
) -> None:
    """With 5 pages a table, one text of 220 tokens fills the pool, so all others must wait or be computed
    again."""
    engine = make_engine(max_pages * len(windows), windows, chunk)
    groups = []
    for length, prefix, seed in prompts:
        first = generation(engine, text(length, prefix), seed)
        groups.append([first, *(generation(None, text(length, prefix), seed + 100 * i) for i in range(1, n))])
    run(engine, groups)
    for (length, prefix, seed), group in zip(prompts, groups, strict=True):
        for i, g in enumerate(group):
            assert g.tokens == expected(text(length, prefix), seed + 100 * i, windows=windows)
    assert max(engine.model.calls) <= chunk  # type: ignore[attr-defined]
    assert pages_in_use(engine) == 0


def test_a_shared_prompt_is_computed_once() -> None:
    engine = make_engine()
    prompt = text(150)
    run(engine, [[generation(engine, prompt), *(generation(None, prompt, seed) for seed in range(1, 8))]])
    model = engine.model
    assert isinstance(model, MockModel)
    assert model.calls[0] == 150
    assert max(model.calls[1:]) <= 8


def test_a_known_prefix_is_not_computed_again() -> None:
    engine = make_engine()
    run(engine, [[generation(engine, text(150))]])
    model = engine.model
    assert isinstance(model, MockModel)
    model.calls.clear()
    again = generation(engine, text(150), seed=5)
    run(engine, [[again]])
    assert model.calls[0] == 150 - 2 * PAGE
    assert again.tokens == expected(text(150), seed=5)


@pytest.mark.parametrize("windows", [(100,), (0, 100), (0, 100, 100)])
def test_windows_bound_the_pages(windows: tuple[int, ...]) -> None:
    """A prompt and a text far longer than the window, in a pool that holds what the window asks for."""
    prompt, chunk, n = text(1500), 64, 100
    most = sum(pages_held(1600, window, chunk) for window in windows)
    assert most == sum(4 if window else 25 for window in windows)
    engine = make_engine(most, windows, chunk)
    g = generation(engine, prompt, max_tokens=n, context=2000, eos_ids=frozenset())
    n_used = []
    for _ in engine.generate([[g]]):
        n_used.append(engine.cache.n_used)
    assert g.tokens[:20] == expected(prompt, windows=windows, context=2000, eos=None)
    assert max(n_used) <= most
    assert n_used[-2] <= sum(3 if window else 25 for window in windows)


def test_a_full_pool_is_known_before_a_long_prompt_is_computed() -> None:
    """Although its first chunk would still find room."""
    engine = make_engine(max_pages=6, windows=(200,), chunk=128)
    with pytest.raises(MemoryLimitError, match=r"7 more pages .* at most 6 may"):
        run(engine, [[generation(engine, text(1000), context=2000)]])
    assert engine.model.calls == []  # type: ignore[attr-defined]


def test_decoding_does_not_wait_for_an_older_long_prompt() -> None:
    engine = make_engine(chunk=64)
    long, short = engine.sequence(text(500)), engine.sequence(text(5, seed=1))
    list(engine.evaluate(Job(short)))
    short.tokens.append(1)
    jobs = [Job(long), Job(short)]
    engine.step(jobs)
    assert jobs[1].is_done
    assert (long.n_cached, short.n_pending) == (16, 0)  # what pace.py gives a prompt beside a text at first


def test_logits_of_every_token_in_order() -> None:
    engine = make_engine(chunk=100)
    tokens = text(230)
    run(engine, [[generation(engine, tokens)]])  # leaves its pages to be found, which must not swallow rows
    rows = np.concatenate(list(engine.evaluate(Job(engine.sequence(tokens), first_row=0))))
    np.testing.assert_array_equal(rows, [logits_after(tokens[: i + 1]) for i in range(230)])


def test_rows_of_a_call_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllm.engine.engine.MAX_LOGITS_BYTES", 7 * 4 * VOCAB)
    engine = make_engine()
    chunks = list(engine.evaluate(Job(engine.sequence(text(40)), first_row=0)))
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 7, 7, 5]
    texts = [generation(engine, text(20, seed), seed) for seed in range(12)]
    run(engine, [[g] for g in texts])
    assert [g.tokens for g in texts] == [expected(text(20, seed), seed) for seed in range(12)]


def test_cancel_within_one_layer() -> None:
    engine = make_engine()
    model = engine.model
    assert isinstance(model, MockModel)
    wanted = threading.Event()

    def before_layer() -> None:
        if len(model.calls) == 4 and model.n_layers_run % N_LAYERS == 2:
            wanted.set()

    model.before_layer = before_layer
    g = generation(engine, text(10))
    run(engine, [[g]], cancel=wanted.is_set)
    assert model.n_layers_run == 3 * N_LAYERS + 2
    assert (g.finish_reason, g.tokens) == ("cancelled", expected(text(10))[:3])
    assert pages_in_use(engine) == 0


def test_cancel_before_the_prompt_is_done_ends_all_samples() -> None:
    engine = make_engine()
    group = [generation(engine, text(10)), generation(None, text(10), 1)]
    run(engine, [group], cancel=lambda: True)
    assert [(g.finish_reason, g.tokens) for g in group] == [("cancelled", [])] * 2
    assert pages_in_use(engine) == 0


class Oops(Exception):
    pass


def raise_oops(*_: object) -> Any:
    raise Oops


def works(engine: Engine) -> None:
    g = generation(engine, text(150))
    run(engine, [[g]])
    assert g.tokens == expected(text(150))


@pytest.mark.parametrize("error", [Oops, MemoryError, KeyboardInterrupt])
def test_an_exception_in_the_model_leaves_the_pool_whole(error: type[BaseException]) -> None:
    engine = make_engine()
    model = engine.model
    assert isinstance(model, MockModel)

    def before_layer() -> None:
        if model.n_layers_run == 10:
            model.n_layers_run += 1
            raise error

    model.before_layer = before_layer
    with pytest.raises(error):
        run(engine, [[generation(engine, text(100, seed))] for seed in range(3)])
    assert pages_in_use(engine) == 0
    works(engine)


def test_an_exception_in_a_sampler_or_in_cancel() -> None:
    engine = make_engine()
    g = generation(engine, text(100))
    g.sampler = raise_oops
    with pytest.raises(Oops):
        run(engine, [[generation(engine, text(100))], [g]])
    with pytest.raises(Oops):
        run(engine, [[generation(engine, text(100))]], cancel=raise_oops)
    assert pages_in_use(engine) == 0
    works(engine)


def test_a_stream_left_early_frees_its_pages() -> None:
    engine = make_engine()
    left, dropped = generation(engine, text(100)), generation(engine, text(100, seed=1))
    stream, other = engine.generate([[left]]), engine.generate([[dropped]])
    next(stream)
    next(other)
    assert pages_in_use(engine) == 4
    stream.close()
    assert left.finish_reason == "cancelled"
    assert pages_in_use(engine) == 2
    del other
    assert pages_in_use(engine) == 0


def test_a_prompt_larger_than_the_pool_is_refused_before_anything_runs() -> None:
    engine = make_engine(max_pages=3)
    model = engine.model
    assert isinstance(model, MockModel)
    with pytest.raises(MemoryLimitError, match="4 more pages of 64 tokens"):
        run(engine, [[generation(engine, text(200))]])
    assert model.calls == []
    assert pages_in_use(engine) == 0
    works(engine)


def test_an_older_text_that_holds_the_pool_refuses_a_younger_one() -> None:
    engine = make_engine(max_pages=3)
    held = generation(engine, text(150))
    stream = engine.generate([[held]])
    next(stream)
    with pytest.raises(MemoryLimitError, match="3 are in use"):
        run(engine, [[generation(engine, text(5, seed=1))]])
    assert [piece.token for _, piece in stream] == expected(text(150))[1:]


def test_an_older_text_takes_the_pages_of_a_paused_younger_one() -> None:
    engine = make_engine(max_pages=4)
    old, young = generation(engine, text(60)), generation(engine, text(180, seed=1))
    first = next(engine_stream := engine.generate([[young]]))
    run(engine, [[old]])  # grows past its first page
    assert old.tokens == expected(text(60))
    assert [first[1].token, *(piece.token for _, piece in engine_stream)] == expected(text(180, seed=1))


def test_closed() -> None:
    engine = make_engine()
    stream = engine.generate([[generation(engine, text(10))]])
    next(stream)
    engine.close()
    with pytest.raises(ModelClosedError):
        next(stream)


def in_threads(n: int, work: Callable[[int], object]) -> None:
    """Runs work(0) ... work(n - 1), each in a thread, and raises what one of them raised."""
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,), daemon=True) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "deadlock"
    if errors:
        raise errors[0]


def test_threads_get_the_same_texts() -> None:
    engine = make_engine(max_pages=200)
    model = engine.model
    assert isinstance(model, MockModel)
    model.before_layer = lambda: time.sleep(0.0002)  # lets the other threads in, as a real call does

    def work(i: int) -> None:
        for j in range(3):
            seed = 10 * i + j
            g = generation(engine, text(50 + 20 * i, seed % 3), seed)
            run(engine, [[g]])
            assert g.tokens == expected(text(50 + 20 * i, seed % 3), seed)

    in_threads(6, work)
    assert pages_in_use(engine) == 0


def test_one_call_serves_all_threads_that_wait() -> None:
    engine = make_engine()
    model = engine.model
    assert isinstance(model, MockModel)
    texts = [generation(engine, text(10 + i), i) for i in range(5)]
    with engine.cache.lock:  # as if a call were running
        threads = [threading.Thread(target=run, args=(engine, [[g]]), daemon=True) for g in texts]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while len(engine._calls) < len(texts) and time.monotonic() < deadline:
            time.sleep(0.001)
    for thread in threads:
        thread.join(timeout=60)
    assert model.calls[0] == 10 + 11 + 12 + 13 + 14
    assert [g.tokens for g in texts] == [expected(text(10 + i), i) for i in range(5)]


def test_threads_that_cancel_close_and_fail_disturb_nobody() -> None:
    engine = make_engine(max_pages=200)

    def work(i: int) -> None:
        for j in range(8):
            seed = 10 * i + j
            prompt = text(30 + 25 * j, seed % 2)
            g = generation(engine, prompt, seed)
            kind = seed % 4
            if kind == 0:
                run(engine, [[g]])
                assert g.tokens == expected(prompt, seed)
            elif kind == 1:
                stream = engine.generate([[g]])
                for _ in range(3):
                    next(stream, None)
                stream.close()
                assert g.tokens == expected(prompt, seed)[:3]
            elif kind == 2:
                asked = iter(range(30))
                run(engine, [[g]], cancel=lambda asked=asked: next(asked, None) is None)
                assert g.tokens == expected(prompt, seed)[: len(g.tokens)]
            else:
                g.sampler = raise_oops
                with pytest.raises(Oops):
                    run(engine, [[g]])

    in_threads(6, work)
    assert pages_in_use(engine) == 0


class Slowly:
    """A thread whose text stands still in its second token until `go` is set, and holds its pages."""

    def __init__(self, engine: Engine, prompt: list[int], seed: int = 0, *, is_call: bool = True) -> None:
        self.stands, self.go = threading.Event(), threading.Event()
        self._sample, self._prompt = sampler(seed), prompt
        self._work = lambda: run(engine, [[self._text(engine, is_call)]])
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        assert self.stands.wait(60)

    def _text(self, engine: Engine, is_call: bool) -> Generation:
        self.text = generation(engine, self._prompt, runner=threading.get_ident() if is_call else None)
        self.text.sampler = self._wait
        return self.text

    def _wait(self, logits: Any, history: list[int], position: int) -> Sampled:
        if len(self.text.tokens) == 1:
            self.stands.set()
            assert self.go.wait(60)
        return self._sample(logits, history, position)

    def end(self) -> None:
        self.go.set()
        self.thread.join(60)
        assert not self.thread.is_alive(), "deadlock"
        assert self.text.tokens == expected(self._prompt)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """A thread at work, and what will come of it."""
    results: list[object] = []

    def guarded() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    return thread, results


def test_a_call_waits_for_the_pages_of_older_calls() -> None:
    """Although the thread of the older text is busy with something else; a call ends at once where a stream's
    pages are in its way, which may stay for ever."""
    for is_call in (True, False):
        engine = make_engine(max_pages=3)
        older = Slowly(engine, text(150), is_call=is_call)
        younger = generation(engine, text(100, seed=1))
        thread, results = in_thread(lambda engine=engine, younger=younger: run(engine, [[younger]]))  # type: ignore[misc]
        thread.join(0.1 if is_call else 60)
        assert thread.is_alive() == is_call
        older.end()
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
        if is_call:
            assert younger.tokens == expected(text(100, seed=1))
        else:
            assert isinstance(results[0], MemoryLimitError)
        assert pages_in_use(engine) == 0


def test_a_large_batch_in_a_small_pool_looks_for_pages_once_a_call() -> None:
    """Not once a text that waits."""
    engine = make_engine(max_pages=5)
    reserve, n = engine.cache.reserve, 0

    def counted(sequence: Any, n_guesses: int) -> None:
        nonlocal n
        n += 1
        reserve(sequence)

    engine.cache.reserve = counted  # type: ignore[method-assign]
    texts = [generation(engine, text(20, seed), seed, max_tokens=3) for seed in range(100)]
    run(engine, [[g] for g in texts])
    assert [g.tokens for g in texts] == [expected(text(20, i), i, 3) for i in range(100)]
    assert n <= 6 * len(engine.model.calls)  # type: ignore[attr-defined]


def test_cancel_ends_a_wait_for_pages() -> None:
    engine = make_engine(max_pages=3)
    older, wanted = Slowly(engine, text(150)), threading.Event()
    younger = generation(engine, text(100, seed=1))
    thread, _ = in_thread(lambda: run(engine, [[younger]], cancel=wanted.is_set))
    thread.join(0.05)
    assert thread.is_alive()
    wanted.set()
    thread.join(60)
    assert (thread.is_alive(), younger.finish_reason) == (False, "cancelled")
    older.end()


def test_a_call_within_a_processor_does_not_wait_for_the_text_around_it() -> None:
    engine, thread = make_engine(max_pages=3), threading.get_ident()
    outer, sample, errors = generation(engine, text(150), runner=thread), sampler(0), []

    def nested(logits: Any, history: list[int], position: int) -> Sampled:
        with pytest.raises(MemoryLimitError) as raised:
            run(engine, [[generation(engine, text(100, seed=1), runner=thread)]])
        errors.append(raised.value)
        return sample(logits, history, position)

    outer.sampler = nested
    run(engine, [[outer]])
    assert outer.tokens == expected(text(150))
    assert len(errors) == 20


def test_calls_of_many_threads_in_a_small_pool_all_end_well() -> None:
    """Batches, siblings and single texts that grow, where two of them fill the pool."""
    engine = make_engine(max_pages=6)

    def work(i: int) -> None:
        for j in range(4):
            groups = []
            for k in range(1 + i % 3):
                seed = 100 * i + 10 * j + k
                first = generation(engine, text(50 + 30 * j, seed % 3), seed, runner=threading.get_ident())
                groups.append([first, *(generation(None, [], seed + 1000) for _ in range(i % 2))])
                for g, s in zip(groups[-1], (seed, seed + 1000), strict=False):
                    plain = sampler(s)
                    g.sampler = lambda *given, plain=plain: (time.sleep(0.0005), plain(*given))[1]
            run(engine, groups)
            for k, group in enumerate(groups):
                seed = 100 * i + 10 * j + k
                for g, s in zip(group, (seed, seed + 1000), strict=False):
                    assert g.tokens == expected(text(50 + 30 * j, seed % 3), s)

    in_threads(6, work)
    assert pages_in_use(engine) == 0


def test_a_forked_process_has_no_use_for_the_pages_of_its_parents_threads() -> None:
    engine = make_engine(max_pages=3)
    older = Slowly(engine, text(150))
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        try:
            works(engine)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    older.end()


def test_cancel_is_asked_by_its_own_thread_alone() -> None:
    """Of several that share calls; and what it raises comes out there."""
    engine, asked = make_engine(), []
    model = engine.model
    assert isinstance(model, MockModel)
    model.before_layer = lambda: time.sleep(0.0005)

    def work(i: int) -> None:
        mine, n = threading.get_ident(), iter(range(3 + i))

        def cancel() -> bool:
            asked.append(i)
            assert threading.get_ident() == mine
            if i % 3 == 0 and next(n, None) is None:
                raise SystemExit(i)
            return False

        for j in range(3):
            g = generation(engine, text(60 + i, j), i)
            if i % 3 == 0:
                with pytest.raises(SystemExit, match=f"^{i}$"):
                    run(engine, [[g]], cancel=cancel)
                continue
            run(engine, [[g]], cancel=cancel if i % 3 == 1 else None)
            assert g.tokens == expected(text(60 + i, j), i)

    in_threads(6, work)
    assert set(asked) == {0, 1, 3, 4}
    assert pages_in_use(engine) == 0


def test_cancel_is_heard_while_another_thread_computes() -> None:
    """It does not wait for the end of that call, which goes on."""
    engine = make_engine()
    model = engine.model
    assert isinstance(model, MockModel)
    computes, go = threading.Event(), threading.Event()

    def before_layer() -> None:
        computes.set()
        assert go.wait(60)

    model.before_layer = before_layer
    other, mine = generation(engine, text(100)), generation(engine, text(100, seed=1))
    thread, _ = in_thread(lambda: run(engine, [[other]]))
    assert computes.wait(60)
    asked = iter(range(3))
    run(engine, [[mine]], cancel=lambda: next(asked, None) is None)
    assert (mine.finish_reason, mine.tokens) == ("cancelled", [])
    go.set()
    thread.join(60)
    assert other.tokens == expected(text(100))
    assert model.calls.count(100) == 1
    assert pages_in_use(engine) == 0


@handlers_exception_may_be_lost
@pytest.mark.parametrize("error", [TimeoutError, SystemExit, KeyboardInterrupt])
def test_a_handlers_exception_ends_the_call_of_the_main_thread(error: type[BaseException]) -> None:
    """Whether it waits or computes, for others as well; and no other thread's."""
    engine = make_engine()
    model = engine.model
    assert isinstance(model, MockModel)
    others: list[list[int]] = []
    done = threading.Event()

    def cancel() -> bool:
        time.sleep(0.002)
        return False

    def work() -> None:
        while not done.is_set():
            g = generation(engine, text(100, seed=1))
            run(engine, [[g]], cancel=cancel)
            others.append(g.tokens)

    def once(cancel: Callable[[], bool] | None) -> None:
        run(engine, [[generation(engine, text(100))]], cancel=cancel)

    model.before_layer = lambda: time.sleep(0.0005)
    thread, results = in_thread(work)
    try:
        for i in range(12):
            raise_amid(partial(once, cancel if i % 2 else None), 0.002 + 0.003 * i, error)
    finally:
        done.set()
        thread.join(60)
    assert results == [None]
    assert all(tokens == expected(text(100, seed=1)) for tokens in others)
    assert pages_in_use(engine) == 0


def waiting(engine: Engine, *jobs: Job) -> list[_Call]:
    """Calls of other threads, as if they waited for this one."""
    calls = [_Call([job], thread=0) for job in jobs]
    engine._calls += calls
    return calls


def test_a_call_that_is_too_large_for_the_memory_fails_in_the_thread_that_asked_for_it() -> None:
    """A thread that computes for another goes on with its own."""
    engine = make_engine()
    model = engine.model
    assert isinstance(model, MockModel)

    def before_layer() -> None:
        if model.calls[-1] > 200:
            raise MemoryLimitError

    model.before_layer = before_layer
    large = Job(engine.sequence(text(300)))
    waiting(engine, large)
    mine = generation(engine, text(100, seed=1))
    assert mine.sequence is not None
    mine.sequence.runner = threading.get_ident()  # nobody reads along, for whom large would be cut to pieces
    run(engine, [[mine]])
    assert mine.tokens == expected(text(100, seed=1))
    assert not large.has_news
    engine._calls.clear()
    with pytest.raises(MemoryLimitError):
        engine.step([large])


def test_a_sequence_past_the_context_fails_alone() -> None:
    """As does one that grows while it waits: what it holds pages for is computed."""
    engine = make_engine()
    too_long, grows = Job(engine.sequence(text(2001))), Job(engine.sequence(text(PAGE)))
    waiting(engine, too_long, grows)
    reserve = engine.cache.reserve

    def reserve_and_grow(sequence: Any, n_guesses: int) -> None:
        reserve(sequence)
        if sequence is grows.sequence:
            sequence.tokens += [1] * 2000

    engine.cache.reserve = reserve_and_grow  # type: ignore[method-assign]
    mine = generation(engine, text(100, seed=1))
    run(engine, [[mine]])
    assert mine.tokens == expected(text(100, seed=1))
    assert isinstance(too_long.error, ContextError)
    assert grows.sequence.n_cached == PAGE


def test_calls_are_kept_short_where_a_device_cannot_stop_within_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt begins with a small call; its speed decides about the next, slower ones make it smaller."""
    clock = [0.0]
    monkeypatch.setattr("tinyllm.engine.engine.time.perf_counter", lambda: clock[0])
    engine = make_engine()
    engine = Engine(engine.model, engine.cache, vocab_size=VOCAB, context=2000, call_s=0.05)
    model: Any = engine.model
    seconds_a_token = 0.0002

    def before_layer() -> None:
        clock[0] += model.calls[-1] * seconds_a_token / N_LAYERS

    model.before_layer = before_layer
    job = Job(engine.sequence(text(550)))
    engine.step([job])
    seconds_a_token = 0.01
    while not job.is_done:
        engine.step([job])
    assert model.calls == [64, 192, 64, 64, 64, 64, 38]


def prompts_beside_a_text(monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]) -> list[int]:
    """Tokens of each call from when these prompts come beside a text that is read along until they are read,
    on a machine that takes 50 ms for a call and 5 ms for a token of it more."""
    clock = [0.0]
    monkeypatch.setattr("tinyllm.engine.engine.time.perf_counter", lambda: clock[0])
    engine = make_engine(max_pages=200)
    model: Any = engine.model

    def before_layer() -> None:
        clock[0] += (0.05 + model.calls[-1] * 0.005) / N_LAYERS

    model.before_layer = before_layer
    reading = Job(engine.sequence(text(300, seed=99)))
    list(engine.evaluate(reading))
    jobs: list[Job] = []
    for i in range(500):
        if i == 5:
            model.calls.clear()
            jobs = [Job(engine.sequence(prompt)) for prompt in prompts]
        reading.sequence.tokens.append(1)
        engine.step([reading, *jobs])
        for job in jobs:
            if job.is_done:
                job.sequence.close()  # nobody goes on with it, so that no call waits for that
        if i >= 5 and not (jobs := [job for job in jobs if not job.is_done]):
            return list(model.calls)
    raise AssertionError("the prompts are never read")


def test_a_text_does_not_stand_still_beside_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are half as long again, from 55 to 82 ms: 5 tokens more; what is short at last comes at once."""
    calls = prompts_beside_a_text(monkeypatch, [text(600)])
    assert sum(calls) == 600 + len(calls)
    assert max(calls[:-1]) <= 1 + 6
    assert calls[-1] <= 1 + SHORT
    assert len(calls) < (600 - SHORT) / 4


def test_short_prompts_beside_a_text_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prompts_beside_a_text(monkeypatch, [text(100, seed=i) for i in range(8)]) == [512, 290]


def test_calls_are_longer_where_more_wait_than_read(monkeypatch: pytest.MonkeyPatch) -> None:
    one = prompts_beside_a_text(monkeypatch, [text(600)])
    eight = prompts_beside_a_text(monkeypatch, [text(600, seed=i) for i in range(8)])
    assert eight[0] > 6 * one[0]
    assert len(eight) < 3 * len(one)


# ---- forms on a device that finds the largest logits by itself


class Form:
    """Any tenth token may come, which ones depends on those so far; every fifth has n_forced after it."""

    def __init__(self, n_forced: int = 3, fails_at: int | None = None) -> None:
        self.tokens: list[int] = []
        self.asked: list[int] = []  # after how many tokens each mask was
        self._n_forced, self._fails_at, self._is_forced = n_forced, fails_at, False

    def _random(self) -> np.random.Generator:
        return np.random.default_rng([len(self.tokens), *self.tokens])

    def prepare(self) -> None:
        pass

    def mask(self) -> Any:
        self.asked.append(len(self.tokens))
        if len(self.tokens) == self._fails_at:
            raise ConstraintError("too large")
        allowed = self._random().random(VOCAB) < 0.1
        return np.pad(np.packbits(allowed, bitorder="little"), (0, 3)).view(np.uint32)

    def mask_after(self, tokens: list[int]) -> Any:
        asked, self.tokens = self.asked, [*self.tokens, *tokens]
        self.asked = []
        try:
            return None if self.is_over else self.mask()
        finally:
            self.asked = asked
            del self.tokens[len(self.tokens) - len(tokens) :]

    def accept(self, token: int) -> None:
        self.tokens.append(token)

    def forced(self) -> list[int]:
        n = self._n_forced if len(self.tokens) % 5 == 0 else 0
        return [int(token) for token in self._random().integers(0, 256, n)]

    @property
    def is_over(self) -> bool:
        return len(self.tokens) > 70


def formed(
    engine: Engine | None, prompt: list[int], form: Form | None, seed: int, **params: Any
) -> Generation:
    chooses = Sampler(SamplingParams(**{"temperature": 1, "top_k": 12, "seed": seed, **params}), VOCAB)
    options: dict[str, Any] = {
        "constraint": form,
        "opening": frozenset({7}) if form else frozenset(),
        "max_tokens": 40,
    }
    if engine:
        options["runner"] = threading.get_ident()  # nobody reads along, so its tokens are not cut into calls
    made = generation(engine, prompt, n_candidates=chooses.n_candidates, **options)
    made.sampler = chooses
    return made


def assert_alike(some: list[Generation], others: list[Generation]) -> None:
    for a, b in zip(some, others, strict=True):
        assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)  # the mock adds up in another order


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 1}], ids=str)
def test_a_form_is_the_same_whether_the_device_finds_the_largest_logits_or_not(
    params: dict[str, Any],
) -> None:
    """With samples of one prompt, and beside a text that is free. No row leaves the device whole, and each
    mask is made once."""
    made = []
    for most_candidates in (0, 64):
        engine = make_engine()
        engine.model.most_candidates = most_candidates  # type: ignore[misc]
        forms = [Form(), Form(), Form()]
        group = [
            formed(engine if i == 0 else None, text(9), form, i, **params) for i, form in enumerate(forms)
        ]
        free = formed(engine, text(70, seed=1), None, 5, **params)
        run(engine, [group, [free]])
        model: Any = engine.model
        assert all(len(set(form.asked)) == len(form.asked) > 3 for form in forms)
        assert len(model.n_asked) == (len(model.calls) if most_candidates else 0)
        made.append([*group, free])
        assert any(len(g.tokens) > 10 for g in group)
    assert_alike(*made)


def test_more_rows_than_a_device_takes_masks_for_come_whole() -> None:
    made = []
    for most_candidates in (0, 64):
        engine = make_engine()
        engine.model.most_candidates = most_candidates  # type: ignore[misc]
        texts = [formed(engine, text(9, seed=i), Form(n_forced=25), seed=i) for i in range(4)]
        run(engine, [[g] for g in texts])
        made.append(texts)
    model: Any = engine.model
    assert 0 < len(model.n_asked) < len(model.calls)
    assert_alike(*made)


def test_a_mask_that_cannot_be_made_ends_its_own_text_alone() -> None:
    engine = make_engine()
    engine.model.most_candidates = 64  # type: ignore[misc]
    good, bad = formed(engine, text(9), Form(), 1), formed(engine, text(8), Form(fails_at=4), 1)
    batch, failed = Batch(engine), []
    batch.add([bad])
    batch.add([good])
    while batch.jobs:
        list(batch.step(None, failed))
        for broken, _ in failed:
            batch.end(broken)
    assert [(broken, str(error)) for broken, error in failed] == [(bad, "too large")]
    assert len(bad.tokens) == 4
    assert len(good.tokens) > 10
    assert pages_in_use(engine) == 0
