"""The application: what a dialect asks of the server, and the routes of all of them.

Invariant: a handler's every error comes out in its dialect's own shape, with a status, and never with a
traceback. Imports ask.py, models.py, turns.py, streams.py, kept.py and thinking.py. cli/serve.py makes a
`Server` of the command line and hands `application(server)` to uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinyllm import LLM, Completion, Piece, SamplingParams
from tinyllm.results import AsyncStream
from tinyllm.server.ask import Ask, Fields, Refusal, read_json, refusal_of
from tinyllm.server.kept import Kept
from tinyllm.server.models import Models
from tinyllm.server.streams import Events, Gone, dumps, json_response, shielded, until_gone
from tinyllm.server.thinking import template_args
from tinyllm.server.turns import Turns

log = logging.getLogger(__name__)

Value = TypeVar("Value")


FORMS = ("json_schema", "regex", "choices", "grammar")  # of an answer: fields of SamplingParams


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused with its numbers. Bytes, tokens, seconds."""

    body_bytes: int = 16 << 20
    n: int = 128
    prompts: int = 2048
    stop_strings: int = 64
    schema_bytes: int = 256 << 10
    time_s: float = 3600.0


@dataclass(frozen=True)
class Answer:
    """The texts that an `Ask` asked for, in the making. llm: the model that makes them, `name` as served, its
    weights loaded as `weights` says."""

    ask: Ask
    name: str
    llm: LLM
    stream: AsyncStream
    weights: str | None = None

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
    """What is served, to whom, and how much at once. weights: the quantization that float models are loaded
    with, for those who make an answer again. kept: answers that a later request may name."""

    models: Models
    turns: Turns
    limits: Limits = field(default_factory=Limits)
    allows_templates: bool = False
    weights: str | None = None
    kept: Kept = field(default_factory=Kept)

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
        places = max(ask.n for ask in asks) * self.at_once(asks)
        async with AsyncExitStack() as stack:
            llm = await stack.enter_async_context(self.model(asks[0].model, places))
            name, answers = self.models.find(asks[0].model).name, []
            for ask in asks:
                stream = await asyncio.to_thread(_begin, llm, ask)
                stack.push_async_callback(stream.aclose)
                answers.append(Answer(ask, name, llm, stream, self.weights))
            yield answers

    def at_once(self, asks: Sequence[Ask]) -> int:
        """How many of them may be computed at once."""
        return max(1, min(len(asks), self.turns.parallel // max(ask.n for ask in asks)))

    @asynccontextmanager
    async def model(self, name: str | None, places: int = 1) -> AsyncIterator[LLM]:
        """Waits for a turn, and for the model to be loaded."""
        self.models.find(name)
        async with self.turns.turn(places), self.models.use(name) as llm:
            yield llm

    def _check(self, ask: Ask) -> None:
        """Limits, before anything is waited for or computed."""
        if not 1 <= ask.n <= self.limits.n:
            raise Refusal(400, f"n is {ask.n}, expected 1 to {self.limits.n}", param="n")
        stop = ask.sampling.get("stop") or ()
        if not isinstance(stop, str) and len(stop) > self.limits.stop_strings:
            raise Refusal(
                400, f"{len(stop)} stop strings, the most is {self.limits.stop_strings}", param="stop"
            )
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

        return await self.json(work())

    async def json(self, work: Coroutine[Any, Any, Any]) -> Response:
        """Answers with what `work` makes, which ends when the client goes."""
        return json_response(await until_gone(self.request, work))

    async def compute(self, model: str | None, work: Callable[[LLM], Value]) -> Value:
        """The result of `work` with a model, in a thread, when it is its turn. Nothing is given back before
        it has ended."""
        async with self.server.model(model) as llm:
            return await shielded(asyncio.to_thread(work, llm))

    async def events(
        self,
        ask: Ask,
        parts: Callable[[Answer], AsyncIterator[str]],
        media_type: str = "text/event-stream",
    ) -> Response:
        """Answers with parts as they come. What is wrong with the request is still told by a status."""
        return await self.parts(self.server.answer(ask), parts, media_type)

    async def parts(
        self,
        held: AbstractAsyncContextManager[Value],
        parts: Callable[[Value], AsyncIterator[str]],
        media_type: str = "text/event-stream",
    ) -> Response:
        """The same with whatever the parts are made of, which is held until they are sent."""
        stack = AsyncExitStack()
        try:
            value = await until_gone(self.request, stack.enter_async_context(held))
        except BaseException:
            await stack.aclose()
            raise

        def failed(error: Exception) -> str:
            return self.dialect.failed(told(error))

        return Events(parts(value), stack, failed, media_type)


def told(error: Exception) -> Refusal:
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
            return refused(dialect, told(error))

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
