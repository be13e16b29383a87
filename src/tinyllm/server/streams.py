"""How answers go out: as one JSON body, or as events while they are made.

Invariant: whatever ends a response (its end, an error, a client that is gone, the server's own end), what it
holds is given back: its texts are ended within a layer of the model, their pages freed, its turn passed on.
Imports ask.py and starlette.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tinyllm.server.ask import Refusal

Value = TypeVar("Value")
AT_ONCE = 4  # parts, where many are ready; then others' turn comes, and the news that the client has gone


class Gone(Exception):
    """The client is no longer there; nobody reads an answer."""


def dumps(value: Any) -> str:
    """JSON in UTF-8, on one line. A lone half of a character, of which UTF-8 has none, stays an escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")


def event(value: Any, name: str | None = None) -> str:
    """One server-sent event. value: a str as it is, else as JSON."""
    data = value if isinstance(value, str) else dumps(value)
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


def line(value: Any) -> str:
    """One line of JSON, as Ollama streams."""
    return dumps(value) + "\n"


def rfc3339(seconds: float) -> str:
    """A time, in seconds since 1970, as JSON mostly has it."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


async def until_gone(
    request: Request, work: Coroutine[Any, Any, Value], time_s: float | None = None
) -> Value:
    """The result of `work`, which is cancelled when the client goes, or after time_s. Raises Gone, or Refusal
    (504). The request's body must have been read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(request))
    try:
        done, _ = await asyncio.wait({task, watch}, timeout=time_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone if done else out_of_time(time_s or 0.0)
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def out_of_time(time_s: float) -> Refusal:
    return Refusal(504, f"not finished within {time_s:g} s, the most that a request may take", code="timeout")


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def gathered(works: Sequence[Callable[[], Coroutine[Any, Any, Value]]], at_once: int) -> list[Value]:
    """What all of them give, in their order. The first error ends the others."""
    places = asyncio.Semaphore(at_once)

    async def one(work: Callable[[], Coroutine[Any, Any, Value]]) -> Value:
        async with places:
            return await work()

    tasks = [asyncio.ensure_future(one(work)) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merged(streams: Sequence[AsyncIterator[Value]], at_once: int) -> AsyncIterator[tuple[int, Value]]:
    """What comes of all of them as it comes, with the number of its stream."""
    news: asyncio.Queue[tuple[int, Value] | None] = asyncio.Queue(1)  # who reads slowly is waited for

    async def read(i: int) -> None:
        async for value in streams[i]:
            await news.put((i, value))

    async def read_all() -> None:
        try:
            await gathered([partial(read, i) for i in range(len(streams))], at_once)
        except Exception:
            await news.put(None)
            raise
        await news.put(None)

    reading = asyncio.ensure_future(read_all())
    try:
        while (item := await news.get()) is not None:
            yield item
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


class Events(StreamingResponse):
    """A response whose parts are made while they are sent, and which holds `stack` until it is over. failed:
    the last part of one that an error ends, whose status is already out. check: called after each part;
    raises where the response has to end."""

    def __init__(
        self,
        parts: AsyncIterator[str],
        stack: AsyncExitStack,
        failed: Callable[[Exception], str],
        media_type: str = "text/event-stream",
        check: Callable[[], None] = lambda: None,
    ) -> None:
        async def all_parts() -> AsyncIterator[str]:
            n = 0
            try:
                async for part in parts:
                    yield part
                    check()
                    n += 1
                    if n % AT_ONCE == 0:
                        await asyncio.sleep(0)
            except Exception as error:
                yield failed(error)

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(all_parts(), headers=headers, media_type=media_type)
        self._stack, self._parts = stack, parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await shielded(self._end())

    async def _end(self) -> None:
        try:
            for generator in (self.body_iterator, self._parts):  # Python would close them at its leisure
                if isinstance(generator, AsyncGenerator):
                    await generator.aclose()
        finally:
            await self._stack.aclose()


async def shielded(work: Awaitable[Value]) -> Value:
    """Finishes `work` even where this task is being cancelled, however often."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # else asyncio says that nobody has looked at it
        raise cancelled
    return task.result()
