"""How answers go out: as one JSON body, or as events while they are made.

Invariant: whatever ends a response (its end, an error, a client that is gone, the server's own end), what it
holds is given back: its texts are ended within a layer of the model, their pages freed, its turn passed on.
Imports ask.py and starlette.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

Value = TypeVar("Value")


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


async def until_gone(request: Request, work: Coroutine[Any, Any, Value]) -> Value:
    """The result of `work`, which is cancelled when the client goes. Raises Gone then. The request's body
    must have been read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


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
    news: asyncio.Queue[tuple[int, Value] | None] = asyncio.Queue()

    async def read(i: int) -> None:
        async for value in streams[i]:
            news.put_nowait((i, value))

    reading = asyncio.ensure_future(gathered([partial(read, i) for i in range(len(streams))], at_once))
    reading.add_done_callback(lambda _: news.put_nowait(None))
    try:
        while (item := await news.get()) is not None:
            yield item
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


class Events(StreamingResponse):
    """A response whose parts are made while they are sent, and which holds `stack` until it is over. failed:
    the last part of one that an error ends, whose status is already out."""

    def __init__(
        self,
        parts: AsyncIterator[str],
        stack: AsyncExitStack,
        failed: Callable[[Exception], str],
        media_type: str = "text/event-stream",
    ) -> None:
        async def all_parts() -> AsyncIterator[str]:
            try:
                async for part in parts:
                    yield part
            except Exception as error:
                yield failed(error)

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(all_parts(), headers=headers, media_type=media_type)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await shielded(self._stack.aclose())


async def shielded(work: Awaitable[Value]) -> Value:
    """Finishes `work` even where this task is being cancelled."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
