"""The application: what a dialect asks of the server, and the routes of all of them.

Invariant: a handler's every error comes out in its dialect's own shape, with a status, and never with a
traceback. Imports ask.py, models.py, turns.py, streams.py, guard.py, metrics.py, kept.py, thinking.py
and page/. cli/serve.py makes a `Server` of the command line; listen.py runs `application(server, dialects)`
under uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from tinyllm import LLM, ArgumentError, Completion, Piece, SamplingParams
from tinyllm.results import AsyncStream
from tinyllm.server import page
from tinyllm.server.ask import Ask, Fields, Refusal, read_json, refusal_of
from tinyllm.server.guard import Access, Guard
from tinyllm.server.kept import Kept
from tinyllm.server.metrics import MEDIA_TYPE, ROUTE, Counted, Metrics
from tinyllm.server.models import Models
from tinyllm.server.streams import Events, Gone, dumps, json_response, out_of_time, shielded, until_gone
from tinyllm.server.thinking import template_args
from tinyllm.server.turns import Turns

CUT_S = 5.0  # for the last words of what was cut off
LOOKS_S = 0.02

log = logging.getLogger(__name__)

Value = TypeVar("Value")


FORMS = ("json_schema", "regex", "choices", "grammar")  # of an answer: fields of SamplingParams


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused with its numbers. time_s: until its answer is all sent.
    unread_pieces: of a stream, that wait for a client that reads slower than they are made."""

    body_bytes: int = 8 << 20
    n: int = 128
    prompts: int = 2048
    stop_strings: int = 64
    stop_chars: int = 1024  # of each
    schema_bytes: int = 256 << 10
    time_s: float = 3600.0
    unread_pieces: int = 16 << 10


@dataclass(frozen=True)
class Answer:
    """The texts that an `Ask` asked for, in the making. llm: the model that makes them, `name` as served, its
    weights loaded as `weights` says, with one of its adapters or None."""

    ask: Ask
    name: str
    llm: LLM
    stream: AsyncStream
    weights: str | None = None
    adapter: str | None = None

    async def whole(self) -> list[Completion]:
        """All n, at their end."""
        await self.stream.rest()
        return self.completions

    @property
    def completions(self) -> list[Completion]:
        """What there is so far of each, with no more calls of tools than may be."""
        made = self.stream.completions
        return [replace(one, tool_calls=one.tool_calls[:1]) for one in made] if self.ask.one_call else made

    async def pieces(self) -> AsyncIterator[Piece]:
        """The same while it is made. What would be a call too many comes as pieces without text."""
        over: set[int] = set()  # samples that have their call
        async for piece in self.stream:
            if self.ask.one_call and piece.index is not None and piece.sample in over:
                is_text = piece.kind == "text"
                piece = replace(
                    piece, kind="text", text=piece.text if is_text else "", index=None, name="", call_id="",
                    tool_call=None,
                )  # fmt: skip
            elif piece.tool_call is not None:
                over.add(piece.sample)
            yield piece


@dataclass
class Server:
    """What is served, to whom, and how much at once. logs_prompts: whether what clients ask is in the log.
    weights: the quantization that float models are loaded with, for those who make an answer again. kept:
    answers that a later request may name."""

    models: Models
    turns: Turns
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    allows_templates: bool = False
    logs_prompts: bool = False
    weights: str | None = None
    kept: Kept = field(default_factory=Kept)
    is_ending: bool = field(default=False, init=False)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.turns, self.models)

    @asynccontextmanager
    async def answer(self, ask: Ask) -> AsyncIterator[Answer]:
        """Waits for the request's turn and begins with it. Leaving frees everything."""
        async with self.answers([ask]) as (answer,):
            yield answer

    @asynccontextmanager
    async def answers(self, asks: Sequence[Ask]) -> AsyncIterator[list[Answer]]:
        """The same of several that one request asks of one model. They wait for one turn, of as many places
        as there are at most; who reads them keeps to these (`at_once`)."""
        for ask in asks:
            self._check(ask)
            if self.logs_prompts:
                log.info("asked: %s", dumps(ask.prompt if ask.messages is None else ask.messages))
        places, asked_at = max(ask.n for ask in asks) * self.at_once(asks), time.monotonic()
        async with AsyncExitStack() as stack:
            llm = await stack.enter_async_context(self.model(asks[0].model, places))
            waited_s = time.monotonic() - asked_at
            served, answers = self.models.find(asks[0].model), []
            for ask in asks:
                stream = await shielded(asyncio.to_thread(_begun, llm, ask))
                stack.callback(self._ended, waited_s, stream)
                stack.push_async_callback(stream.aclose)
                answers.append(Answer(ask, served.name, llm, stream, self.weights, served.adapter))
            yield answers

    def _ended(self, waited_s: float, stream: AsyncStream) -> None:
        self.metrics.ended(waited_s, stream.completions)

    def at_once(self, asks: Sequence[Ask]) -> int:
        """How many of them may be computed at once."""
        return max(1, min(len(asks), self.turns.parallel // max(ask.n for ask in asks)))

    @asynccontextmanager
    async def model(self, name: str | None, places: int = 1) -> AsyncIterator[LLM]:
        """Waits for a turn, and for the model to be loaded."""
        self.models.find(name)
        async with self.turns.turn(places), self.models.use(name) as llm:
            yield llm

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
        form = next((name for name in FORMS if ask.sampling.get(name) is not None), None)
        if form and ask.tools and ask.tool_choice != "none":
            raise Refusal(400, f"tools and {form} cannot be used together: an answer has one form")
        n_bytes = len(dumps([ask.tools, form and ask.sampling[form]]))
        if n_bytes > self.limits.schema_bytes:
            raise Refusal(
                400, f"schemas and tools have {n_bytes} bytes, the most is {self.limits.schema_bytes}"
            )
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
        template_args=template_args(llm, ask) or None,
    )
    return stream


Handler = Callable[["Call"], Awaitable[Response]]


@dataclass(frozen=True)
class Dialect:
    """A protocol that clients speak: a file each. routes: (method, path, handler). error: a refusal as its
    clients expect it, the body of an answer. failed: the same as the last part of a stream. header: what only
    its clients send; routes that another dialect has as well are its own where that is there."""

    name: str
    routes: Sequence[tuple[str, str, Handler]]
    error: Callable[[Refusal], Any]
    failed: Callable[[Refusal], str]
    header: str | None = None


class Call:
    """One HTTP request of a dialect: its body, and the ways to answer."""

    def __init__(self, server: Server, dialect: Dialect, request: Request) -> None:
        self.server, self.dialect, self.request = server, dialect, request
        self.gone = threading.Event()  # set when the client goes while something is computed for it

    async def fields(self) -> Fields:
        """The members of the body, which must be a JSON object."""
        return Fields(read_json(await self.request.body()))

    async def whole(self, ask: Ask, shape: Callable[[Answer, list[Completion]], Any]) -> Response:
        """Answers with all texts at once, as `shape` puts them."""

        async def work() -> Any:
            async with self.server.answer(ask) as answer:
                return shape(answer, await answer.whole())

        return await self.json(work())

    async def json(self, work: Coroutine[Any, Any, Any]) -> Response:
        """Answers with what `work` makes, which ends when the client goes, or its time is over."""
        return json_response(await until_gone(self.request, work, self.server.limits.time_s))

    async def of_model(self, model: str | None, work: Callable[[LLM], Value]) -> Value:
        """The result of `work`, which computes nothing with the model, in a thread and at once."""
        async with self.server.models.use(model) as llm:
            return await shielded(asyncio.to_thread(work, llm))

    async def compute(self, model: str | None, work: Callable[[LLM], Value]) -> Value:
        """The result of `work` with a model, in a thread, when it is its turn. Nothing is given back before
        it has ended; what asks `gone.is_set` ends early where nobody waits for it."""
        async with self.server.model(model) as llm:
            task = asyncio.ensure_future(asyncio.to_thread(work, llm))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                self.gone.set()
                await asyncio.gather(task, return_exceptions=True)
                raise

    async def events(
        self,
        ask: Ask,
        parts: Callable[[Answer], AsyncIterator[str]],
        media_type: str = "text/event-stream",
    ) -> Response:
        """Answers with parts as they come. What is wrong with the request is still told by a status."""
        return await self.parts([ask], lambda answers: parts(answers[0]), media_type)

    async def parts(
        self,
        asks: Sequence[Ask],
        parts: Callable[[list[Answer]], AsyncIterator[str]],
        media_type: str = "text/event-stream",
    ) -> Response:
        """The same of several texts that one request asks for."""
        stack, limits, started = AsyncExitStack(), self.server.limits, time.monotonic()

        async def begin() -> list[Answer]:
            answers = await stack.enter_async_context(self.server.answers(asks))
            await answers[0].stream.begin()
            return answers

        try:
            answers = await until_gone(self.request, begin(), limits.time_s)
        except BaseException:
            await stack.aclose()
            raise

        def failed(error: Exception) -> str:
            return self.dialect.failed(told(error))

        def check() -> None:
            if time.monotonic() - started > limits.time_s:
                raise out_of_time(limits.time_s)
            if (n := sum(answer.stream.n_unread for answer in answers)) > limits.unread_pieces:
                why = f"{n} pieces wait to be read, the most is {limits.unread_pieces}: read faster"
                raise Refusal(408, why, code="slow_reader")

        return Events(parts(answers), stack, failed, media_type, check)


def told(error: Exception) -> Refusal:
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
            return refused(dialect, told(error))

    return endpoint


class _Route(Route):
    """Of requests that have the dialect's header, where it has one."""

    def __init__(self, path: str, endpoint: Callable[..., Any], method: str, header: str | None) -> None:
        super().__init__(path, endpoint, methods=[method])
        self._header = header.encode() if header else None

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if self._header and all(name != self._header for name, _ in scope.get("headers", ())):
            return Match.NONE, {}
        return super().matches(scope)


def routes_of(server: Server, dialect: Dialect) -> list[Route]:
    return [
        _Route(path, _endpoint(server, dialect, path, handler), method, dialect.header)
        for method, path, handler in dialect.routes
    ]


def dialect_of(path: str, dialects: Sequence[Dialect]) -> Dialect:
    """Whose clients ask for such a path: the one with the route that begins most like it."""

    def alike(route: str) -> int:
        pairs = zip(path[1:].split("/"), route[1:].split("/"), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1] != "", pairs))

    anybodys = [dialect for dialect in dialects if dialect.header is None]
    return max(anybodys, key=lambda d: max(alike(route) for _, route, _ in d.routes))


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
        return refuse(request.url.path, told(error))

    async def metrics(request: Request) -> Response:
        return Response(server.metrics.text(), media_type=MEDIA_TYPE)

    ordered = sorted(dialects, key=lambda dialect: dialect.header is None)  # the first that fits is taken
    origins = server.access.origins
    middleware = [
        Middleware(Counted, server.metrics),
        *([Middleware(CORSMiddleware, origins, ["*"], ["*"])] if origins else []),
        Middleware(Guard, server.access, server.limits.body_bytes, refuse, lambda: server.is_ending),
    ]
    app = Starlette(
        routes=[
            *(route for dialect in ordered for route in routes_of(server, dialect)),
            *page.routes(),
            Route("/metrics", metrics),
        ],
        middleware=middleware,
        exception_handlers={404: no_route, 405: no_route, Exception: broken},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # it would send clients to what their Host header says
    return app
