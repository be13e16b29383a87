"""The application: what a dialect asks of the server, and the routes of all of them.

Invariant: a handler's every error comes out in its dialect's own shape, with a status, and never with a
traceback. Imports ask.py, models.py, turns.py, streams.py, guard.py, metrics.py. cli/serve.py makes a
`Server` of the command line; listen.py runs `application(server, dialects)` under uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tinyllm import LLM, ArgumentError, Completion, SamplingParams
from tinyllm.results import AsyncStream
from tinyllm.server.ask import Ask, Fields, Refusal, read_json, refusal_of
from tinyllm.server.guard import Access, Guard
from tinyllm.server.metrics import MEDIA_TYPE, ROUTE, Counted, Metrics
from tinyllm.server.models import Models
from tinyllm.server.streams import Events, Gone, dumps, json_response, out_of_time, shielded, until_gone
from tinyllm.server.turns import Turns

CUT_S = 5.0  # for the last words of what was cut off
LOOKS_S = 0.02

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused with its numbers. time_s: until its answer is all sent.
    unread_pieces: of a stream, that wait for a client that reads slower than they are made."""

    body_bytes: int = 8 << 20
    n: int = 128
    stop_strings: int = 64
    stop_chars: int = 1024  # of each
    schema_bytes: int = 256 << 10
    time_s: float = 3600.0
    unread_pieces: int = 16 << 10


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
    """What is served, to whom, and how much at once. logs_prompts: whether what clients ask is in the log."""

    models: Models
    turns: Turns
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    allows_templates: bool = False
    logs_prompts: bool = False
    is_ending: bool = field(default=False, init=False)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.turns, self.models)

    @asynccontextmanager
    async def answer(self, ask: Ask) -> AsyncIterator[Answer]:
        """Waits for the request's turn and begins with it. Leaving frees everything."""
        self._check(ask)
        if self.logs_prompts:
            log.info("asked: %s", dumps(ask.prompt if ask.messages is None else ask.messages))
        asked_at = time.monotonic()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.turns.turn(ask.n))
            llm = await stack.enter_async_context(self.models.use(ask.model))
            waited_s = time.monotonic() - asked_at
            stream = await shielded(asyncio.to_thread(_begun, llm, ask))
            stack.callback(lambda: self.metrics.ended(waited_s, stream.completions))
            stack.push_async_callback(stream.aclose)
            yield Answer(ask, self.models.find(ask.model).name, llm, stream)

    async def end(self, grace_s: float) -> None:
        """Takes nothing more, lets what runs finish in grace_s seconds, ends the rest, frees the models."""
        self.is_ending = True
        self.turns.close()
        await self._quiet(grace_s)
        await self.models.close()  # texts that still run end here, with an error in their dialect's words
        await self._quiet(CUT_S)

    async def _quiet(self, most_s: float) -> None:
        end = time.monotonic() + most_s
        while self.metrics.open_requests and time.monotonic() < end:
            await asyncio.sleep(LOOKS_S)

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
        texts = [stop] if isinstance(stop, str) else [s for s in stop if isinstance(s, str)]
        longest, most = max(map(len, texts), default=0), self.limits.stop_chars
        if longest > most:
            raise Refusal(400, f"a stop string has {longest} characters, the most is {most}", param="stop")
        if ask.chat_template is not None and not self.allows_templates:
            raise Refusal(
                400, "templates of requests are refused here: start the server with --allow-templates"
            )


def _begun(llm: LLM, ask: Ask) -> AsyncStream:
    """`_begin`, whose complaints about types are about what the client wrote."""
    try:
        return _begin(llm, ask)
    except TypeError as error:
        raise ArgumentError(str(error)) from error


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

        return json_response(await until_gone(self.request, work(), self.server.limits.time_s))

    async def events(
        self,
        ask: Ask,
        parts: Callable[[Answer], AsyncIterator[str]],
        media_type: str = "text/event-stream",
    ) -> Response:
        """Answers with parts as they come. What is wrong with the request is still told by a status."""
        stack, limits, started = AsyncExitStack(), self.server.limits, time.monotonic()

        async def begin() -> Answer:
            answer = await stack.enter_async_context(self.server.answer(ask))
            await answer.stream.begin()
            return answer

        try:
            answer = await until_gone(self.request, begin(), limits.time_s)
        except BaseException:
            await stack.aclose()
            raise

        def failed(error: Exception) -> str:
            return self.dialect.failed(_told(error))

        def check() -> None:
            if time.monotonic() - started > limits.time_s:
                raise out_of_time(limits.time_s)
            if (n := answer.stream.n_unread) > limits.unread_pieces:
                why = f"{n} pieces wait to be read, the most is {limits.unread_pieces}: read faster"
                raise Refusal(408, why, code="slow_reader")

        return Events(parts(answer), stack, failed, media_type, check)


def _told(error: Exception) -> Refusal:
    """What the client is told of an error; what is our fault is logged by its kind alone."""
    refusal = refusal_of(error)
    if refusal.status == 500:
        frame = traceback.extract_tb(error.__traceback__)[-1]  # its text may hold a prompt
        log.error("%s at %s:%d: %s", type(error).__name__, frame.filename, frame.lineno, refusal.message)
    return refusal


def refused(dialect: Dialect, refusal: Refusal) -> Response:
    """A refusal as a response in the dialect's shape."""
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    return json_response(dialect.error(refusal), refusal.status, headers)


def _endpoint(
    server: Server, dialect: Dialect, path: str, handler: Handler
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        request.scope[ROUTE] = (dialect.name, path)
        try:
            return await handler(Call(server, dialect, request))
        except (Gone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return refused(dialect, _told(error))

    return endpoint


def routes_of(server: Server, dialect: Dialect) -> list[Route]:
    return [
        Route(path, _endpoint(server, dialect, path, handler), methods=[method])
        for method, path, handler in dialect.routes
    ]


def dialect_of(path: str, dialects: Sequence[Dialect]) -> Dialect:
    """Whose clients ask for such a path: the one with the route that begins most like it."""

    def alike(route: str) -> int:
        pairs = zip(path.split("/"), route.split("/"), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    return max(dialects, key=lambda d: max(alike(route) for _, route, _ in d.routes))


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

    def refuse(path: str, refusal: Refusal) -> Response:
        return refused(dialect_of(path, dialects), refusal)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        shown = path if len(path) <= 100 else path[:97] + "..."
        why = "there is no" if error.status_code == 404 else "this server knows another method than"
        response = refuse(
            path, Refusal(error.status_code, f"{why} {request.method} {shown}", code="not_found")
        )
        response.headers.update(error.headers or {})
        return response

    async def broken(request: Request, error: Exception) -> Response:
        return refuse(request.url.path, _told(error))

    async def metrics(request: Request) -> Response:
        return Response(server.metrics.text(), media_type=MEDIA_TYPE)

    origins = server.access.origins
    middleware = [
        Middleware(Counted, server.metrics),
        *([Middleware(CORSMiddleware, origins, ["*"], ["*"])] if origins else []),
        Middleware(Guard, server.access, server.limits.body_bytes, refuse, lambda: server.is_ending),
    ]
    app = Starlette(
        routes=[
            *(route for dialect in dialects for route in routes_of(server, dialect)),
            Route("/metrics", metrics),
        ],
        middleware=middleware,
        exception_handlers={404: no_route, 405: no_route, Exception: broken},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # it would send clients to what their Host header says
    return app
