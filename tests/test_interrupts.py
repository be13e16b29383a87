"""Ctrl-C between any two steps of the engine and of the books about pages: nothing is lost, nobody waits for
ever, and what comes after is right. With the mock model; tests/long/signals.py sends real signals."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
from helpers_engine import F32, VOCAB, MockModel, MockPool, logits_after
from helpers_interrupts import Interrupts
from test_engine import expected, generation, run, text

from tinyllm.engine import engine as engine_module
from tinyllm.engine import kvcache
from tinyllm.engine.engine import Engine, Job, _Call
from tinyllm.engine.kvcache import PAGE, KVCache

pytestmark = pytest.mark.usefixtures("frozen_heap")
FILES = {engine_module.__file__, kvcache.__file__}
EVERY = 97  # of the places; tests/long/interrupts.py tries them all


def make_engine(max_pages: int) -> Engine:
    cache = KVCache(MockPool(max_pages), max_pages, max_unused=4)
    return Engine(MockModel(), cache, vocab_size=VOCAB, context=2000, chunk=100)


def check_books(cache: KVCache) -> None:
    """Every page is somewhere, once."""
    everywhere = [*cache._free, *cache._unused, *cache._n_owners]
    assert sorted(everywhere) == list(range(cache.pool.n_pages))
    assert set(cache._unused) <= set(cache._key_of)
    assert {page: key for key, page in cache._page_of.items()} == cache._key_of


def check_after(engine: Engine) -> None:
    """What holds when all that was asked for is over."""
    gc.collect()
    assert not engine.cache.lock._is_owned()  # type: ignore[attr-defined]
    assert engine._calls == []
    with engine.cache.lock:
        engine.cache.collect()
    check_books(engine.cache)
    assert engine.cache.n_used == 0
    assert engine.cache._tables_of == {}
    again = generation(engine, text(PAGE + 9), max_tokens=3)
    run(engine, [[again]])
    assert again.tokens == expected(text(PAGE + 9), max_tokens=3)


def batch_of_groups(engine: Engine) -> None:
    """Groups that share prompts and pages in a pool that is too small for all at once."""
    groups = []
    for length, prefix in ((PAGE - 2, 0), (2 * PAGE, 1), (2 * PAGE, 1)):
        first = generation(engine, text(length, prefix), max_tokens=4)
        groups.append([first, generation(None, text(length, prefix), 1, max_tokens=4)])
    run(engine, groups)


def sessions_and_a_stream(engine: Engine) -> None:
    a = engine.sequence(text(PAGE + 5))
    list(engine.evaluate(Job(a)))
    b = engine.fork(a)
    for sequence in (a, b):
        sequence.tokens.append(7)
        list(engine.evaluate(Job(sequence)))
    a.close()
    stream = engine.generate([[generation(engine, text(10), max_tokens=5)]])
    next(stream)
    stream.close()


WORKS: tuple[Callable[[Engine], None], ...] = (batch_of_groups, sessions_and_a_stream)


@pytest.mark.parametrize("work", WORKS)
def test_an_interrupt_anywhere_loses_no_page(work: Callable[[Engine], None]) -> None:
    engine = make_engine(6)
    places = Interrupts(FILES)
    assert not places.run(lambda: work(engine))
    assert places.n > 500
    check_after(engine)
    for at in range(1, places.n + 1, EVERY):
        engine = make_engine(6)
        for _ in range(2):  # the second one meets pages of the first
            Interrupts(FILES, at).run(lambda engine=engine: work(engine))  # type: ignore[misc]
        check_after(engine)


def of_another_thread(at: int | None) -> int:
    """A thread that is interrupted at a place makes calls of the model for another, which goes on and gets
    all its logits. How many places there were.
    """
    prompt = text(150, seed=3)
    engine = make_engine(9)
    call = _Call([Job(engine.sequence(prompt), first_row=0)], thread=0)
    engine._calls.append(call)
    places = Interrupts(FILES, at)
    places.run(lambda: run(engine, [[generation(engine, text(PAGE - 2), max_tokens=6)]]))
    (job,), rows = call.jobs, []
    while True:  # what the other thread does when its turn comes
        for _ in range(9):
            if call.is_done:
                break
            with engine.cache.lock:
                engine._run(call)
        else:
            pytest.fail(f"interrupted at {at}: the other thread waits for ever")
        assert job.logits is not None
        rows.append(job.logits)
        if job.is_done:
            break
        job.start()
    np.testing.assert_array_equal(np.concatenate(rows), RIGHT)
    engine._calls.remove(call)
    del job, call
    check_after(engine)
    return places.n


RIGHT = np.array([logits_after(text(150, seed=3)[: i + 1]) for i in range(150)])


def test_an_interrupt_anywhere_harms_no_other_thread() -> None:
    n_places = of_another_thread(None)
    assert n_places > 500
    for at in range(1, n_places + 1, EVERY):
        of_another_thread(at)


@pytest.mark.parametrize("nth", [1, 2])
def test_results_that_an_interrupt_lost_are_computed_again(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes after the pages were counted as written, before the logits were handed over."""
    advance, calls = Job.advance, 0

    def interrupted(job: Job, logits: F32) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise KeyboardInterrupt
        advance(job, logits)

    engine = make_engine(9)
    prompt, job = text(150, seed=3), None
    session = engine.sequence(prompt)
    monkeypatch.setattr(Job, "advance", interrupted)
    rows = []
    while job is None or not job.is_done:
        job = job or Job(session, first_row=0)
        try:
            engine.step([job])
        except KeyboardInterrupt:
            continue
        assert job.logits is not None
        rows.append(job.logits)
    np.testing.assert_array_equal(np.concatenate(rows), RIGHT)
    session.tokens.append(5)
    calls = nth - 1  # the next one is lost, too
    last = Job(session)
    with pytest.raises(KeyboardInterrupt):
        engine.step([last])
    assert session.n_pending == 0
    *_, rows_again = engine.evaluate(last)  # in pieces, as somebody may read along
    np.testing.assert_array_equal(rows_again[-1], logits_after([*prompt, 5]))
