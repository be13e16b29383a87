"""The application: what a dialect asks of the server, and the routes of all of them.

Invariant: a handler's every error comes out in its dialect's own shape, with a status, and never with a
traceback. Imports ask.py, models.py, turns.py, streams.py, guard.py and the dialects. cli/serve.py makes a
`Server` of the command line and hands `application(server)` to uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinyllm import LLM, Completion, SamplingParams
from tinyllm.results import AsyncStream
from tinyllm.server.ask import Ask, Fields, Refusal, read_json, refusal_of
from tinyllm.server.models import Models
from tinyllm.server.streams import Events, Gone, json_response, until_gone
from tinyllm.server.turns import Turns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused with its numbers. Bytes, tokens, seconds."""

    body_bytes: int = 16 << 20
    n: int = 128
    stop_strings: int = 64
    schema_bytes: int = 256 << 10
    time_s: float = 3600.0


@dataclass(frozen=True)
class Answer:
    """The texts that an `Ask` asked for, in the making. llm: the model that makes them, `name` as served."""

    ask: Ask
    name: str
    llm: LLM
    stream: AsyncStream

    async def whole(self) -> list[Completion]:
        """All n, at their end."""
        return await self.stream.rest()


@dataclass
class Server:
    """What is served, to whom, and how much at once. params: sampling fields that requests leave out."""

    models: Models
    turns: Turns
    limits: Limits = field(default_factory=Limits)
    allows_templates: bool = False

    @asynccontextmanager
    async def answer(self, ask: Ask) -> AsyncIterator[Answer]:
        """Waits for the request's turn and begins with it. Leaving frees everything."""
        self._check(ask)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.turns.turn(ask.n))
            llm = await stack.enter_async_context(self.models.use(ask.model))
            stream = await asyncio.to_thread(_begin, llm, ask)
            stack.push_async_callback(stream.aclose)
            yield Answer(ask, self.models.find(ask.model).name, llm, stream)

    def _check(self, ask: Ask) -> None:
        """Limits, before anything is waited for or computed."""
        self.models.find(ask.model)
        if not 1 <= ask.n <= self.limits.n:
            raise Refusal(400, f"n is {ask.n}, expected 1 to {self.limits.n}", param="n")
        stop = ask.sampling.get("stop") or ()
        if not isinstance(stop, str) and len(stop) > self.limits.stop_strings:
            raise Refusal(
                400, f"{len(stop)} stop strings, the most is {self.limits.stop_strings}", param="stop"
            )
        if ask.chat_template is not None and not self.allows_templates:
            raise Refusal(
                400, "templates of requests are refused here: start the server with --allow-templates"
            )


def _begin(llm: LLM, ask: Ask) -> AsyncStream:
    """Checks and prepares a request, in a thread: templates and long texts take a while."""
    params = SamplingParams(**ask.sampling)
    if ask.messages is None:
        return llm.astream(ask.prompt, params, n=ask.n, special=ask.special)
    stream: AsyncStream = llm.achat(
        ask.messages,
        stream=True,
        n=ask.n,
        params=params,
        tools=ask.tools or None,
        tool_choice=ask.tool_choice,
        strict=ask.strict,
        chat_template=ask.chat_template,
        template_args=ask.template_args or None,
    )
    return stream


Handler = Callable[["Call"], Awaitable[Response]]


@dataclass(frozen=True)
class Dialect:
    """A protocol that clients speak: a file each. routes: (method, path, handler). error: a refusal as its
    clients expect it, the body of an answer. failed: the same as the last part of a stream."""

    name: str
    routes: Sequence[tuple[str, str, Handler]]
    error: Callable[[Refusal], Any]
    failed: Callable[[Refusal], str]


class Call:
    """One HTTP request of a dialect: its body, and the ways to answer."""

    def __init__(self, server: Server, dialect: Dialect, request: Request) -> None:
        self.server, self.dialect, self.request = server, dialect, request

    async def fields(self) -> Fields:
        """The members of the body, which must be a JSON object."""
        return Fields(read_json(await self.request.body()))

    async def whole(self, ask: Ask, shape: Callable[[Answer, list[Completion]], Any]) -> Response:
        """Answers with all texts at once, as `shape` puts them."""

        async def work() -> Any:
            async with self.server.answer(ask) as answer:
                return shape(answer, await answer.whole())

        return json_response(await until_gone(self.request, work()))

    async def events(
        self,
        ask: Ask,
        parts: Callable[[Answer], AsyncIterator[str]],
        media_type: str = "text/event-stream",
    ) -> Response:
        """Answers with parts as they come. What is wrong with the request is still told by a status."""
        stack = AsyncExitStack()
        try:
            answer = await until_gone(self.request, stack.enter_async_context(self.server.answer(ask)))
        except BaseException:
            await stack.aclose()
            raise

        def failed(error: Exception) -> str:
            return self.dialect.failed(_told(error))

        return Events(parts(answer), stack, failed, media_type)


def _told(error: Exception) -> Refusal:
    """What the client is told of an error; what is our fault is logged by its kind alone."""
    refusal = refusal_of(error)
    if refusal.status >= 500:
        log.error("%s: %s", type(error).__name__, refusal.message)
    return refusal


def refused(dialect: Dialect, refusal: Refusal) -> Response:
    """A refusal as a response in the dialect's shape."""
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    return json_response(dialect.error(refusal), refusal.status, headers)


def _endpoint(server: Server, dialect: Dialect, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(Call(server, dialect, request))
        except Gone:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return refused(dialect, _told(error))

    return endpoint


def routes_of(server: Server, dialect: Dialect) -> list[Route]:
    return [
        Route(path, _endpoint(server, dialect, handler), methods=[method])
        for method, path, handler in dialect.routes
    ]


def application(server: Server, dialects: Sequence[Dialect]) -> Starlette:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        reaper = asyncio.create_task(server.models.reap())
        try:
            yield {}
        finally:
            reaper.cancel()
            await server.models.close()

    routes = [route for dialect in dialects for route in routes_of(server, dialect)]
    return Starlette(routes=routes, lifespan=lifespan)
