"""Calls for tasks: the same texts as other calls, shared with other threads, ended within a layer."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tinyllm
from tinyllm.engine.loop import IDLE_S

PROMPT = "Once upon a time"
TEXTS = [("Tom", 11), ("Lily saw a", 5), (PROMPT, 30), ("The", 1), ("A dog", 22), ("Ben and", 17)]


@pytest.fixture(scope="module")
def llm() -> Iterator[tinyllm.LLM]:
    with tinyllm.load("stories") as llm:
        yield llm


def in_trio(main: Callable[[], Any]) -> None:
    trio = pytest.importorskip("trio")
    trio.run(main)


def in_asyncio(main: Callable[[], Any]) -> None:
    asyncio.run(main())


def in_anyio(main: Callable[[], Any]) -> None:
    anyio = pytest.importorskip("anyio")
    anyio.run(main, backend="asyncio")
    anyio.run(main, backend="trio")


RUNNERS = pytest.mark.parametrize("run", [in_asyncio, in_trio, in_anyio])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    assert condition()


@RUNNERS
def test_the_same_results_as_calls(llm: tinyllm.LLM, run: Callable[[Any], None]) -> None:
    async def main() -> None:
        one = await llm.acall(PROMPT, max_tokens=20, seed=1, logprobs=True)
        same = llm(PROMPT, max_tokens=20, seed=1, logprobs=True)
        assert (one.tokens, one.logprobs, one.text) == (same.tokens, same.logprobs, same.text)
        lists = await llm.acall(["Tom", "Lily"], n=2, max_tokens=5, seed=2)
        assert [[c.tokens for c in group] for group in lists] == [
            [c.tokens for c in group] for group in llm(["Tom", "Lily"], n=2, max_tokens=5, seed=2)
        ]
        stream = llm.astream(PROMPT, max_tokens=20, seed=1)
        pieces = [piece async for piece in stream]
        assert "".join(map(str, pieces)) == same.text == stream.completion.text
        assert [piece.token for piece in pieces if piece.token is not None] == same.tokens
        assert stream.completion.finish_reason == "length"

    run(main)


@RUNNERS
def test_a_stream_of_several_samples(llm: tinyllm.LLM, run: Callable[[Any], None]) -> None:
    """Each piece says whose it is; together they are what a call with n gives."""
    want = llm(PROMPT, n=3, max_tokens=12, seed=4)

    def joined(pieces: list[tinyllm.Piece]) -> list[str]:
        return ["".join(str(p) for p in pieces if p.sample == i) for i in range(3)]

    with llm.stream(PROMPT, n=3, max_tokens=12, seed=4) as stream:
        assert joined(list(stream)) == [c.text for c in want] == [c.text for c in stream.completions]

    async def main() -> None:
        stream = llm.astream(PROMPT, n=3, max_tokens=12, seed=4)
        assert joined([piece async for piece in stream]) == [c.text for c in want]
        assert [c.tokens for c in stream.completions] == [c.tokens for c in want]
        rest = await llm.astream(PROMPT, n=3, max_tokens=12, seed=4).rest()
        assert [c.tokens for c in rest] == [c.tokens for c in want]
        assert await stream.rest() == stream.completions  # of one that is over

    run(main)


@RUNNERS
def test_leaving_a_stream_frees_its_pages(llm: tinyllm.LLM, run: Callable[[Any], None]) -> None:
    async def main() -> None:
        async with llm.astream(PROMPT, max_tokens=400, temperature=0, seed=1) as stream:
            async for _ in stream:
                if len(stream.completion.tokens) >= 3:
                    break
        await stream.aclose()
        assert [piece async for piece in stream] == []
        await llm.acall("Tom", max_tokens=1)  # the loop has come round
        assert stream.completion.finish_reason == "cancelled"

    run(main)
    llm("Tom", max_tokens=1)
    assert len(llm._cache.holders()) == 0


def test_many_tasks_and_threads_at_once(llm: tinyllm.LLM) -> None:
    """Each gets what it gets alone, and they share calls of the model."""
    alone = {(prompt, seed): llm(prompt, max_tokens=25, seed=seed).tokens for prompt, seed in TEXTS}
    made: dict[tuple[str, int], list[int]] = {}

    def work(prompt: str, seed: int) -> None:
        made[prompt, seed] = llm(prompt, max_tokens=25, seed=seed).tokens

    async def main() -> None:
        calls = (llm.acall(prompt, max_tokens=25, seed=seed) for prompt, seed in TEXTS[:3])
        results = await asyncio.gather(*calls)
        made.update({text: c.tokens for text, c in zip(TEXTS[:3], results, strict=True)})

    threads = [threading.Thread(target=work, args=text) for text in TEXTS[3:]]
    for thread in threads:
        thread.start()
    asyncio.run(main())
    for thread in threads:
        thread.join(60)
    assert made == alone


def test_a_cancelled_task_ends_the_computation(llm: tinyllm.LLM) -> None:
    async def main() -> None:
        task = asyncio.create_task(llm.acall(PROMPT, max_tokens=450, temperature=0))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await llm.acall("Tom", max_tokens=1)

    asyncio.run(main())
    llm("Tom", max_tokens=1)
    assert len(llm._cache.holders()) == 0


def test_an_error_is_its_own_tasks(llm: tinyllm.LLM) -> None:
    def fails(logits: Any, tokens: Any) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        good = asyncio.create_task(llm.acall("Tom", max_tokens=30, seed=3))
        with pytest.raises(ZeroDivisionError):
            await llm.acall("Lily", max_tokens=30, processors=[fails])
        assert (await good).tokens == llm("Tom", max_tokens=30, seed=3).tokens
        with pytest.raises(tinyllm.ContextError):
            await llm.acall([1] * 600)
        with pytest.raises(tinyllm.ArgumentError, match="n is 0"):
            llm.achat([{"role": "user", "content": "Hi"}], stream=True, n=0, chat_template="{{ messages }}")

    asyncio.run(main())


def test_one_thread_for_all_which_ends_when_idle(llm: tinyllm.LLM) -> None:
    before = threading.active_count()

    async def main() -> None:
        many = [asyncio.create_task(llm.acall("Tom", max_tokens=20, seed=i)) for i in range(30)]
        await asyncio.sleep(0.01)
        assert threading.active_count() <= before + 1
        await asyncio.gather(*many)

    asyncio.run(main())
    until(lambda: not any(thread.name == "tinyllm" for thread in threading.enumerate()))
    assert IDLE_S < 60


def test_closing_the_model_ends_waiting_tasks() -> None:
    llm = tinyllm.load("stories")

    async def main() -> None:
        task = asyncio.create_task(llm.acall(PROMPT, max_tokens=450, temperature=0))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(llm.close)
        with pytest.raises(tinyllm.ModelClosedError):
            await task
        with pytest.raises(tinyllm.ModelClosedError):
            await llm.acall("Tom")

    asyncio.run(main())


def test_an_event_loop_that_is_over_harms_nobody(llm: tinyllm.LLM) -> None:
    async def main() -> None:
        stream = llm.astream(PROMPT, max_tokens=400, temperature=0)
        await stream.__anext__()
        del stream
        asyncio.create_task(llm.acall("Lily", max_tokens=400))  # noqa: RUF006
        await asyncio.sleep(0.01)

    asyncio.run(main())
    gc.collect()
    until(lambda: not llm._loop._new)
    assert llm("Tom", max_tokens=5, seed=1).tokens == llm("Tom", max_tokens=5, seed=1).tokens
