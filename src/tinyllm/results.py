"""What users hold of a generated text: a completion, its timings, a score, a stream of pieces.

Data that outlives the model. Imports `engine` (what a piece is). llm.py makes them.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tinyllm.engine.engine import FinishReason, Generation, Piece
from tinyllm.engine.loop import Inbox
from tinyllm.errors import ConstraintError

if TYPE_CHECKING:
    from tinyllm.chat.tools import ToolCall
    from tinyllm.constraints import Form


@dataclass(frozen=True)
class Timings:
    """Where the time went. `generate_s` runs from the end of the prompt; in a batch, each text has its own
    clock. cached_tokens: how many of the prompt's were there already, of an earlier text that began so.
    drafted_tokens: guesses that were computed beside the text's own tokens; accepted_tokens: those that were
    right. gain: how many times as fast the text came for it, by the measured times of calls.
    """

    load_s: float
    prompt_tokens: int
    prompt_s: float
    generated_tokens: int
    generate_s: float
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    gain: float = 1.0


@dataclass(frozen=True)
class CachePages:
    """Pages of a model's cache: those that texts hold, those that exist, the most that may, the bytes of one.
    What texts that are over have left counts as used until the next call."""

    used: int
    allocated: int
    most: int
    page_bytes: int


@dataclass(frozen=True, repr=False)
class Completion:
    """A generated text. `str(completion)` is its text.

    text: the new text only, without the prompt and without the stop string. tokens: its ids, a stop
    string's included, an end-of-text token not. logprobs: the model's own log probability (natural) of each
    token, where asked for; top_logprobs: for each the most likely (id, log probability). finish_reason:
    "stop" (stop_reason is the string or the id), "length" (max_tokens or the context's end) or "cancelled".
    seed: alone with it, the same prompt gives the same text. reasoning: what a chat model thought before it
    answered, without its tags; None where there was no such block. tokens and logprobs cover both. form: what
    `json_schema`, `regex`, `choices` or `grammar` asked for; see `parsed`. tool_calls: what a chat with tools
    called, in order; they are no part of the text. tool_call_error: what was wrong with a call that is
    malformed, and so stayed in the text.
    """

    text: str
    tokens: list[int]
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    seed: int
    prompt_tokens: list[int]
    timings: Timings
    device: str
    reasoning: str | None = None
    form: Form | None = field(default=None, compare=False)
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_call_error: str | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def parsed(self) -> Any:
        """The value of a text that was asked for in a form: what its JSON says (of a pydantic model the
        instance), else the text. Raises ConstraintError where it ended early, or no form was asked for."""
        if self.form is None:
            raise ConstraintError("no form was asked of this text: pass json_schema=, for example")
        if self.finish_reason != "stop":
            raise ConstraintError(
                f"the answer is not finished ({self.finish_reason}), so it has no value; raise max_tokens. "
                f"The text: {self.text!r}"
            )
        return self.form.parse(self.text)

    def __repr__(self) -> str:
        why = self.finish_reason + (f" at {self.stop_reason!r}" if self.stop_reason is not None else "")
        counts = f"{len(self.prompt_tokens)} + {len(self.tokens)} tokens"
        return f"<Completion {brief(self.text)}: {counts}, {why}, seed {self.seed}>"


@dataclass(frozen=True)
class Score:
    """How likely a text is. logprobs[i] is the natural log probability of tokens[i + 1] after those before
    it; the first token has none. top_logprobs[i]: the most likely (id, log probability) there, where asked
    for.
    """

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]] | None = None

    @property
    def total(self) -> float:
        """The sum of the log probabilities, in nats."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of minus their mean, infinite past what float64 holds; NaN for a single token."""
        return perplexity_of(-self.total / len(self.logprobs)) if self.logprobs else math.nan


def perplexity_of(nll: float) -> float:
    """exp(nll), of nats a token; infinite past what float64 holds."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


class Stream(Iterator[Piece]):
    """A text while it is made: iterate over its pieces. Leaving early, or `close`, frees what it holds."""

    def __init__(
        self, pieces: Generator[Piece, None, None], completions: Callable[[], list[Completion]]
    ) -> None:
        self._pieces, self._completions = pieces, completions

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the text here."""
        self._pieces.close()

    def __repr__(self) -> str:
        made = self.completion
        return f"<Stream: {len(made.tokens)} tokens so far, {brief(made.text)}>"

    @property
    def completion(self) -> Completion:
        """What there is so far, at the end all of it; a text that was left early counts as cancelled."""
        return self.completions[0]

    @property
    def completions(self) -> list[Completion]:
        """The same of each sample."""
        return self._completions()


class AsyncStream(AsyncIterator[Piece]):
    """A text while it is made, for `async for`. It begins with the first piece that is asked for. Leaving
    early, `aclose` or cancelling the task ends the computation and frees what it holds.
    """

    def __init__(self, start: Callable[[bool], Inbox], completions: Callable[[], list[Completion]]) -> None:
        """start: submits the texts, with or without their pieces."""
        self._start, self._completions = start, completions
        self._inbox: Inbox | None = None
        self._is_over = False

    async def __anext__(self) -> Piece:
        piece = await self._next(keeps_pieces=True)
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def begin(self) -> None:
        """Waits for the first piece, which stays to be read, or the end. Raises what goes wrong before."""
        if self._is_over:
            return
        try:
            if self._inbox is None:
                self._inbox = self._start(True)
            await self._inbox.ready()
        except BaseException:
            self._end()
            raise

    @property
    def n_unread(self) -> int:
        """Pieces that are made and nobody has asked for."""
        return 0 if self._inbox is None else self._inbox.n_unread

    async def rest(self) -> list[Completion]:
        """Waits for the end; of a stream that nobody began to read, without waking for every piece."""
        while await self._next(keeps_pieces=False) is not None:
            pass
        return self.completions

    async def _next(self, *, keeps_pieces: bool) -> Piece | None:
        if self._is_over:
            return None
        try:
            if self._inbox is None:
                self._inbox = self._start(keeps_pieces)
            piece = await self._inbox.next()
        except BaseException:
            self._end()
            raise
        self._is_over = piece is None
        return piece

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    async def aclose(self) -> None:
        """Ends the text here."""
        self._end()

    def _end(self) -> None:
        self._is_over = True
        if self._inbox is not None:
            self._inbox.request.cancel()

    def __del__(self) -> None:
        self._end()

    def __repr__(self) -> str:
        made = self.completion
        return f"<AsyncStream: {len(made.tokens)} tokens so far, {brief(made.text)}>"

    @property
    def completion(self) -> Completion:
        """What there is so far, at the end all of it; a text that was left early counts as cancelled."""
        return self.completions[0]

    @property
    def completions(self) -> list[Completion]:
        """The same of each sample."""
        return self._completions()


def of_samples(
    generations: list[Generation], pieces: Iterable[tuple[Generation, Piece]]
) -> Generator[Piece, None, None]:
    """The pieces of texts that are made together; each says which sample it is of."""
    sample = {generation: i for i, generation in enumerate(generations)}
    for generation, piece in pieces:
        i = sample[generation]
        yield replace(piece, sample=i) if i else piece


def brief(text: str, length: int = 60) -> str:
    """A text for people, quoted, its middle left out where it is longer."""
    if len(text) > length:
        text = f"{text[: length - length // 3]} ... {text[-(length // 3) :]}"
    return repr(text)
