"""Runs sequences: builds the batches for the model, and continues texts token by token.

`Engine.step` makes one call of the model for everything that any thread waits for, whoever comes first
doing it for all, and choosing the next tokens of all (choosing.py). `Engine.generate` is the loop above it:
a sampler that runs Python code chooses there, in its caller's own thread. Imports `choosing`, `kvcache`,
`pace`, `sampling`, `speculation`, chat's reasoning and calls, and `errors`. Read next: llm.py, the interface.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Set
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tinyllm.chat.reasoning import Kind, Part, Plain, Splitter
from tinyllm.engine.choosing import Mask, Wish, choose, grant, only, taken
from tinyllm.engine.kvcache import NOTHING, PAGE, Applied, KVCache, Sequence
from tinyllm.engine.pace import SHORT, Pace
from tinyllm.engine.sampling import Candidates, Logits, Sampled, Sampler, StopStrings
from tinyllm.engine.speculation import Costs, Guessing
from tinyllm.engine.states import moves
from tinyllm.errors import (
    ArgumentError,
    CancelledError,
    ContextError,
    Error,
    MemoryLimitError,
    ModelClosedError,
)

if TYPE_CHECKING:  # only who offers tools needs them
    from tinyllm.chat.tools.answers import AnswerSplitter
    from tinyllm.chat.tools.calls import Part as CallPart
    from tinyllm.chat.tools.shapes import ToolCall

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

CHUNK = 512  # tokens of a call; more would only make it longer
CALL_S = 0.05  # that a call may take on a device that cannot stop within one
MAX_LOGITS_BYTES = 64 << 20  # of a call
MOST_CHOSEN = 64  # rows whose candidates a call finds on the device
MOST_GIVEN = 32  # tokens of a text that are taken in one call without a choice between them
ASK_S = 0.02  # after which a thread that waits asks its cancel=, or looks for pages again
LOOK_S = 0.1  # after which one without a cancel= looks whether somebody still calls the model
PATIENCE_S = 0.002  # that a call waits at most for texts of the last one, whose threads choose a token
PATIENCE = 0.1  # likewise as a share of what the last call took, where that is longer
RECENT_S = 0.5  # for so long after its last token a text counts as being written

log = logging.getLogger(__name__)


class Model(Protocol):
    """What the engine asks of a model; `backends.Model` is one."""

    def forward(
        self,
        tokens_or_x: npt.NDArray[Any],
        positions: I32,
        sequences: I32,
        page_tables: I32,
        *,
        rows: I32 | None = None,
        adapters: Any = None,
        states: Any = None,
        cache: Any,
        should_stop: Callable[[], bool] | None = None,
    ) -> F32: ...

    @property
    def most_candidates(self) -> int: ...

    def candidates(
        self,
        tokens: npt.NDArray[Any],
        positions: I32,
        sequences: I32,
        page_tables: I32,
        *,
        rows: I32,
        n: int,
        allowed: Mask | None = None,
        adapters: Any = None,
        states: Any = None,
        cache: Any,
        should_stop: Callable[[], bool] | None = None,
    ) -> Candidates: ...


class Constraint(Protocol):
    """Which tokens may come next in one text; `constraints.GrammarConstraint` is one."""

    def prepare(self) -> None:
        """`mask` will be asked for: it may be made meanwhile."""

    def mask(self) -> npt.NDArray[np.uint32]:
        """A bit a token, the lowest first: [vocab_size / 32, rounded up]."""

    def accept(self, token: int) -> None:
        """The next token is this one."""

    def mask_after(self, tokens: SequenceOf[int]) -> npt.NDArray[np.uint32] | None:
        """What `mask` would be if these were accepted, which they are not; None where they cannot come."""

    def forced(self) -> list[int]:
        """The tokens that must come next, whatever the model says; [] where it has a choice."""

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow."""


class Job:
    """A sequence to bring up to date, and what came of it in the last step.

    first_row: the position of the first token whose logits are wanted; None: the sequence's last. is_watched:
    somebody reads along while it is written; None: as streams and sessions are. wishes: the choices that the
    last row is computed for, asked for when it is there. mask: what may come after a position, asked for
    before the call where candidates are enough; None: anything. guesses: what may follow the sequence's
    tokens, computed with the last of them as far as a call has room, each with its logits.
    """

    def __init__(
        self,
        sequence: Sequence,
        *,
        first_row: int | None = None,
        n_candidates: int | None = None,
        is_watched: bool | None = None,
        wishes: Callable[[F32], list[Wish]] = lambda row: [],
        mask: Callable[[int], Mask | None] = lambda position: None,
    ) -> None:
        self.sequence, self.n_candidates, self.wishes, self.mask = sequence, n_candidates, wishes, mask
        self.is_watched = sequence.runner is None if is_watched is None else is_watched
        self.news_at = -math.inf  # when it last came with logits, by time.perf_counter
        self.is_late = False  # its thread took long to come back after that
        self.logits: Any = None  # [rows, vocab_size], of the wanted tokens that the last step computed
        self.is_done = False  # all tokens are computed
        self.error: Exception | None = None  # why it cannot go on
        self.guesses: list[int] = []
        self._next_row = first_row
        self._advanced = False

    @property
    def next_row(self) -> int:
        """The position of the first token whose logits are wanted and not there yet."""
        return len(self.sequence.tokens) - 1 if self._next_row is None else self._next_row

    @property
    def has_news(self) -> bool:
        return self._advanced or self.error is not None

    @property
    def is_text(self) -> bool:
        """Whether it waits for the logits of all its last few tokens, as a text that is written does."""
        n = self.sequence.n_pending
        return n <= MOST_GIVEN and len(self.sequence.tokens) - n >= self.next_row

    def want(self, n_rows: int, guesses: SequenceOf[int] = ()) -> None:
        """The logits of the last n_rows tokens are wanted next, and those of guesses after them."""
        self._next_row = None if n_rows == 1 else len(self.sequence.tokens) - n_rows
        self.guesses = list(guesses)

    def start(self, patience_s: float = math.inf) -> None:
        """Forgets the last step."""
        self.logits, self.is_done, self._advanced = None, False, False
        self.is_late = time.perf_counter() - self.news_at > patience_s > 0 and self.news_at > 0

    def advance(self, logits: Logits) -> None:
        is_done, next_row = self.sequence.n_pending == 0, self._next_row
        if next_row is not None:
            next_row += len(logits)
        self._next_row, self.logits, self.is_done, self._advanced = next_row, logits, is_done, True
        self.news_at = time.perf_counter()


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Piece:
    """A part of a stream as it comes. `str(piece)` is its text, which can be empty: characters and what
    may become a stop string or a tag are held back until they are certain.

    Each token comes with one piece; token and logprob are None on further pieces that only bring held-back
    text. logprob is the model's own, a natural logarithm; top_logprobs: the most likely (id, log probability)
    in its place, where asked for. kind: "reasoning" for what a chat model thinks
    before it answers, "tool_call" for further text of a call's arguments, which is no part of the answer's
    text; else "text".

    index: of the call, from 0 in each answer. name and call_id: on the call's first piece, the id on none
    where the format writes it late; tool_call: all of it, on the last. A piece of kind "text" with an index
    takes that call back: it turned out malformed, and the text is as it was written.

    sample: whose it is, of the n that a stream was asked for, from 0.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    kind: Kind = "text"
    index: int | None = None
    name: str = ""
    call_id: str = ""
    tool_call: ToolCall | None = None
    sample: int = 0
    top_logprobs: SequenceOf[tuple[int, float]] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(eq=False)
class Generation:
    """One text in the making, and all that is known of it.

    sequence: its prompt, to be continued; None for one that forks the first of its group.
    text_of: the characters that a token completes; of None, what is left. split: tells reasoning and calls of
    tools from text, which alone is searched for stop strings. context: how many tokens the sequence may hold.
    constraint: what the answer has to be, from where reasoning ends. opening: tokens that may begin reasoning
    before it.
    """

    sequence: Sequence | None
    sampler: Any  # a `sampling.Sampler`, or what can be called as one
    stops: StopStrings
    text_of: Callable[[int | None], str]
    context: int
    n_candidates: int | None = (
        None  # of the largest logits, that are enough for the sampler; None: it needs all
    )
    max_tokens: int | None = None
    eos_ids: frozenset[int] = frozenset()
    split: Splitter | AnswerSplitter = field(default_factory=Plain)
    constraint: Constraint | None = None
    opening: frozenset[int] = frozenset()
    guessing: Guessing | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    call_errors: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the string or the id that ended the text
    started: float = field(default_factory=time.perf_counter)
    prompt_done: float | None = None  # when the prompt was computed
    ended: float | None = None
    guesses: list[int] = field(default_factory=list)  # what may come after the sequence's tokens
    _given: list[int] = field(default_factory=list)  # the sequence's last tokens, that were not chosen
    # Whether `mask_after` had a form's mask for the last token's row and those of the guesses.
    _is_masked: list[bool] = field(default_factory=list)
    # What another thread chose: after how many tokens, and the token, or why there is none.
    _granted: tuple[int, Sampled | Exception] | None = None

    @property
    def n_rows(self) -> int:
        """Of how many of the sequence's last tokens `accept` wants the logits."""
        return len(self._given) + 1

    def prepare(self) -> None:
        """Its next token will be chosen: what that takes may be made meanwhile."""
        if self.constraint is not None and self.split.is_answer and self._granted is None:
            self.constraint.prepare()

    def wish(self, row: F32, tokens: list[int]) -> Wish | None:
        """The choice that `accept` will make of this row, after `tokens`; None where it is to make it itself:
        it runs Python code, or what comes before it decides it."""
        sampler, constraint = self.sampler, self.constraint if self.split.is_answer else None
        if not isinstance(sampler, Sampler) or not sampler.is_of_core or self._given:
            return None
        if len(tokens) >= self.context or (constraint is not None and constraint.is_over):
            return None

        def give(found: Sampled | Exception) -> None:
            self._granted = len(tokens), found

        return Wish(sampler, row, tokens, None if constraint is None else self._mask(constraint), give)

    def guess(self) -> None:
        """Says what may come next, for the next call to compute beside what is certain."""
        assert self.sequence is not None
        if self.guessing is None:
            return
        room = self.context - len(self.sequence.tokens) - 1
        if self.max_tokens is not None:
            room = min(room, self.max_tokens - len(self.tokens) - len(self._given) - 1)
        guesses = self.guessing.propose(self.sequence.tokens, room)
        end = next((i for i, token in enumerate(guesses) if token in self.eos_ids), len(guesses))
        self.guesses = guesses[:end]

    def accept(self, rows: SequenceOf[Logits]) -> Iterator[list[Piece]]:
        """Chooses the next token, and the one after a guess for as long as that is what is chosen. Yields
        what there is to show of each before it chooses another.

        rows: the logits of the last n_rows tokens and of as many guesses as were computed, each as the
        sampler takes it.
        """
        assert self.sequence is not None
        if self.prompt_done is None:
            self.prompt_done = time.perf_counter()
        guesses, self.guesses = self.guesses, []
        n_given, n_right = len(self._given), 0
        for i, row in enumerate(rows):
            n_before = len(self.tokens)
            if (pieces := self._next(row, i - n_given)) is None:
                break
            is_guess = i >= n_given and guesses[i - n_given : i - n_given + 1] == self.tokens[n_before:]
            is_right = is_guess and len(self.tokens) > n_before
            n_right += is_right
            yield pieces
            if self.finish_reason is not None or (i >= n_given and not is_right):
                break
        if self.guessing is not None:
            self.guessing.learn(len(rows) - n_given - 1, n_right)

    def _next(self, row: Logits, n_right: int) -> list[Piece] | None:
        """One more token by the logits after n_right guesses that were right (negative before the last
        certain token); what there is to show, None where the row cannot tell and is to be computed again."""
        assert self.sequence is not None
        tokens, n_right = self.sequence.tokens, max(0, n_right)
        if self._given:
            if n_right and isinstance(row, Candidates):
                return None  # which are of what the form allowed, not of the one that it left
            self.sequence.n_right = n_right
            return self._take(taken(self.sampler, row, self._given.pop(0)))
        if len(tokens) >= self.context:  # a session that another stream took there
            return self.finish("length")
        constraint = self.constraint if self.split.is_answer else None
        if constraint is not None and constraint.is_over:
            return self.finish("stop")
        if isinstance(row, Candidates) and self._is_masked[n_right : n_right + 1] == [constraint is None]:
            return None  # a token since the call was planned opened reasoning, which is free, or ended it
        self.sequence.n_right = n_right
        sampled = self._chosen(row, tokens, constraint)
        if sampled.token in self.eos_ids:
            return self.finish("stop", sampled.token)
        tokens.append(sampled.token)
        pieces = self._take(sampled)
        if constraint is not None and self.finish_reason is None and self.split.is_answer:
            constraint.accept(sampled.token)
            if constraint.is_over:
                return pieces + self.finish("stop")
            self._force(constraint)
        return pieces

    def _chosen(self, row: Logits, tokens: list[int], constraint: Constraint | None) -> Sampled:
        granted, self._granted = self._granted, None
        if granted is None or granted[0] != len(tokens):
            mask = None
            if constraint is not None and not isinstance(row, Candidates):  # these are of `mask_after`'s
                mask = self._mask(constraint)
            return choose(self.sampler, row, tokens, mask)
        if isinstance(granted[1], Exception):
            raise granted[1]
        return granted[1]

    def mask_after(self, position: int) -> Mask | None:
        """Of which tokens `accept` wants the candidates in the row of the token, or guess, at this position:
        those that may follow, or the one that was given; None: all. Asked for in order."""
        assert self.sequence is not None
        tokens = self.sequence.tokens
        n_guesses = position - (len(tokens) - 1)
        if n_guesses < 0:
            return only(tokens[position + 1], self.sampler.vocab_size)
        constraint = self.constraint if self.split.is_answer else None
        if constraint is not None and constraint.is_over:
            constraint = None
        if n_guesses == 0:
            self._is_masked = [constraint is not None]
            return None if constraint is None else self._mask(constraint).copy()
        mask = None if constraint is None else constraint.mask_after(self.guesses[:n_guesses])
        self._is_masked.append(mask is not None)
        return mask

    def _mask(self, constraint: Constraint) -> Mask:
        mask = constraint.mask()
        if self.opening and not self.tokens:
            mask = mask.copy()
            for token in self.opening:
                mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def _force(self, constraint: Constraint) -> None:
        """Adds the tokens that must come, for the next call to compute at once."""
        assert self.sequence is not None
        room = min(MOST_GIVEN, self.context - len(self.sequence.tokens))
        if self.max_tokens is not None:
            room = min(room, self.max_tokens - len(self.tokens))
        self._given = constraint.forced()[: max(room - 1, 0)]
        for token in self._given:
            constraint.accept(token)
        self.sequence.tokens += self._given

    def _take(self, sampled: Sampled) -> list[Piece]:
        """A token that the sequence has now; the pieces that it brings."""
        assert self.sequence is not None
        self.tokens.append(sampled.token)
        self.logprobs.append(sampled.logprob)
        self.top_logprobs.append(sampled.top)
        pieces = self._keep(self.split.feed(self.text_of(sampled.token)))
        if self.stops.found is not None:
            self.finish("stop")
        elif len(self.tokens) == self.max_tokens or len(self.sequence.tokens) >= self.context:
            pieces += self.finish("length")
        first, *rest = pieces or [Piece("", kind=self.split.kind)]
        first = replace(first, token=sampled.token, logprob=sampled.logprob, top_logprobs=tuple(sampled.top))
        return [first, *rest]

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> list[Piece]:
        """Ends the text. Returns the held-back rest, if there is any."""
        pieces = self._keep([*self.split.feed(self.text_of(None)), *self.split.flush()])
        if rest := self.stops.flush():
            self.text += rest
            pieces.append(Piece(rest))
        if self.stops.found is not None:
            reason, stop_reason = "stop", self.stops.found
        self.finish_reason, self.stop_reason, self.ended = reason, stop_reason, time.perf_counter()
        self.guesses = []
        return pieces

    def _keep(self, parts: Iterable[Part | CallPart]) -> list[Piece]:
        """Adds parts to what there is, up to a stop string; the pieces to show."""
        pieces = []
        for part in parts:
            if self.stops.found is not None:
                break
            if not isinstance(part, tuple):
                pieces += self._keep_call(part)
                continue
            kind, text = part
            if kind == "reasoning":
                self.reasoning += text
            else:
                self.text += (text := self.stops.feed(text))
            if text:
                pieces.append(Piece(text, kind=kind))
        return pieces

    def _keep_call(self, part: CallPart) -> list[Piece]:
        """The same of text beside calls, and of a part of a call, across which no stop string goes on."""
        if part.kind == "text":
            self.text += (text := self.stops.feed(part.text))
            if part.error is not None:
                self.call_errors.append(part.error)
            return [Piece(text, index=part.index)] if text or part.index is not None else []
        self.text += (rest := self.stops.flush())
        if part.call is not None:
            self.tool_calls.append(part.call)
        call = Piece(part.text, None, None, "tool_call", part.index, part.name, part.id, part.call)
        return [Piece(rest), call] if rest else [call]

    def close(self) -> None:
        if self.sequence is not None:
            self.sequence.close()
        if self.guessing is not None:
            self.guessing.close()


class Batch:
    """Texts that go on together: each step makes one token of every one whose prompt is computed. Those of a
    group share a prompt, which is computed once.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watched: dict[Generation, bool | None] = {}
        self._siblings: dict[Generation, list[Generation]] = {}  # that wait for the first of their group
        self._open: set[Generation] = set()
        self._rows: dict[Job, list[Any]] = {}  # the logits so far, of a job that is not done
        self.jobs: dict[Generation, Job] = {}

    def add(self, group: list[Generation], *, is_watched: bool | None = None) -> None:
        """Texts with the same prompt; the first has the sequence. is_watched: as a Job's."""
        first, *rest = group
        self._open |= {first, *rest}
        self._watched |= dict.fromkeys(group, is_watched)
        self._siblings[first] = rest
        self._start(first)
        first.prepare()

    def step(
        self,
        cancel: Callable[[], bool] | None = None,
        failed: list[tuple[Generation, Exception]] | None = None,
    ) -> Iterator[tuple[Generation, Piece]]:
        """One step of the engine, and what comes of it. Frees a text's pages at its end. All texts end where
        `cancel` says True. Raises what the model does, and a text's own error, where there is no list
        `failed` for those; the others can go on."""
        is_cancelled = not self._engine.step(list(self.jobs.values()), cancel)
        for first, job in list(self.jobs.items()):
            try:
                yield from self._go_on(first, job, is_cancelled)
            except Exception as error:
                if failed is None:
                    raise
                failed.append((first, error))

    def _go_on(self, first: Generation, job: Job, is_cancelled: bool) -> Iterator[tuple[Generation, Piece]]:
        """The next tokens of a text, or the first ones of its group."""
        if job.error is not None:
            raise job.error
        rows = self._rows.setdefault(job, [])
        rows += [] if job.logits is None else [job.logits[i] for i in range(len(job.logits))]
        if not is_cancelled and not job.is_done:
            return
        del self._rows[job]
        texts = [first, *self._siblings.pop(first, ())]
        if not is_cancelled:
            for generation in texts[1:]:
                generation.sequence = self._engine.fork(job.sequence)
                self._start(generation)
        for generation in texts:
            steps = iter([generation.finish("cancelled")]) if is_cancelled else generation.accept(rows)
            for pieces in steps:
                if generation.finish_reason is not None:
                    self.end(generation)
                for piece in pieces:
                    yield generation, piece
            if generation in self.jobs:
                generation.guess()
                generation.prepare()
                self.jobs[generation].want(generation.n_rows, generation.guesses)

    def end(self, generation: Generation) -> None:
        """Takes a text out, with its pages; one that is not over is cancelled."""
        if generation.finish_reason is None:
            generation.finish("cancelled")
        generation.close()
        if job := self.jobs.pop(generation, None):
            self._rows.pop(job, None)
        self._siblings.pop(generation, None)
        self._open.discard(generation)
        self._watched.pop(generation, None)

    def close(self) -> None:
        """Ends all texts."""
        for generation in list(self._open):
            self.end(generation)

    def _start(self, generation: Generation) -> None:
        assert generation.sequence is not None
        wanted = [g.n_candidates for g in (generation, *self._siblings.get(generation, ()))]
        n = None if None in wanted else max(n for n in wanted if n is not None)
        tokens = generation.sequence.tokens

        def wishes(row: F32) -> list[Wish]:
            texts = (generation, *self._siblings.get(generation, ()))
            return [wish for text in texts if (wish := text.wish(row, tokens)) is not None]

        watched = self._watched[generation]
        # The texts of a group have one form, and at its beginning one mask.
        self.jobs[generation] = Job(
            generation.sequence,
            n_candidates=n,
            is_watched=watched,
            wishes=wishes,
            mask=generation.mask_after,
        )


@dataclass(eq=False)
class _Call:
    """One thread's wait for news about its jobs. cancel: asked by that thread alone, so that what it raises
    ends nobody else's wait. wake: set when there is news, or nobody who calls the model."""

    jobs: list[Job]
    cancel: Callable[[], bool] | None = None
    is_cancelled: bool = False
    is_abandoned: bool = False
    thread: int = field(default_factory=threading.get_ident)
    wake: threading.Event = field(default_factory=threading.Event)

    @property
    def is_done(self) -> bool:
        return any(job.has_news for job in self.jobs)

    def ask(self) -> bool:
        """Whether `cancel` says that it is to end."""
        self.is_cancelled = self.is_cancelled or (self.cancel is not None and bool(self.cancel()))
        return self.is_cancelled


@dataclass
class _Part:
    """A job's share of a call of the model: its next n tokens, of which the last n_rows leave logits, and
    guesses after them, which all do."""

    job: Job
    n: int
    n_rows: int
    guesses: SequenceOf[int] = ()

    @property
    def n_tokens(self) -> int:
        return self.n + len(self.guesses)

    @property
    def n_logits(self) -> int:
        return self.n_rows + len(self.guesses)


class Engine:
    """One model with its cache, shared by any number of threads."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        *,
        vocab_size: int,
        context: int,
        chunk: int = CHUNK,
        call_s: float = math.inf,
        threads: int = 1,
    ) -> None:
        """context: tokens of a sequence at most. chunk: tokens of a call at most. call_s: seconds that a call
        should take at most, on a device that cannot stop within one. threads: that choose tokens."""
        assert chunk <= cache.ahead
        self.model, self.cache, self._context = model, cache, context
        self._most, self._pace, self._threads = chunk, Pace(chunk, call_s), threads
        self.costs, self.is_closed = Costs(), False
        self._max_rows = max(1, MAX_LOGITS_BYTES // (4 * vocab_size))
        self._calls: list[_Call] = []
        self._arrived = threading.Event()  # somebody joined _calls
        self._written: list[weakref.ref[Job]] = []  # the texts of the calls so far that may go on
        self._last_s, self._last_end = 0.0, 0.0  # of the last call
        _engines.add(self)

    def sequence(
        self, tokens: Iterable[int] = (), runner: int | None = None, applied: Applied = NOTHING
    ) -> Sequence:
        """A new sequence, nothing of it computed yet. The tokens must be ids of the vocabulary. runner: the
        thread whose call closes it without waiting for anybody's wish; None for a stream's or a session's.
        """
        return self.cache.sequence(tokens, runner, applied)

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens, sharing what is computed. Where there is no page left for
        the copy of the last one, it starts with nothing and is computed again once there is room.
        """
        self._refuse_nesting()
        with self.cache.lock:
            self._check_open()
            self.cache.collect()
            try:
                return self.cache.fork(sequence)
            except MemoryLimitError:
                return self.cache.sequence(sequence.tokens, sequence.runner, sequence.applied)

    def step(self, jobs: list[Job], cancel: Callable[[], bool] | None = None) -> bool:
        """Calls the model until there is news about one of `jobs`, logits or an error; False where `cancel`
        ended it, which is asked about every ASK_S, by this thread alone.

        Decoding sequences go first, then prompts in chunks, the oldest first; a call takes what other
        threads wait for as well. An exception of `cancel`, of a signal handler or from the model is raised
        and leaves every sequence as it was; the others' threads go on. A sequence of which everything is
        computed is computed again. Jobs wait for the pages of older texts whose calls will give them back.
        Raises ModelClosedError; ArgumentError within a call that the same thread makes, in `cancel` or a
        signal handler.
        """
        self._refuse_nesting()
        for job in jobs:
            job.start(self._patience_s)
        call = _Call(jobs, cancel)
        try:
            self._calls.append(call)
            self._arrived.set()
            while not call.ask() and not call.is_done:
                if not self._take_turn(call):
                    time.sleep(ASK_S)
        finally:
            call.is_abandoned = True  # what another thread's call of the model still computes for it is lost
            if call in self._calls:
                self._calls.remove(call)
        return not call.is_cancelled

    def evaluate(self, job: Job, cancel: Callable[[], bool] | None = None) -> Iterator[F32]:
        """Steps until the job is done, or `cancel` says True. Yields the wanted logits, [rows, vocab_size] at
        a time, in order."""
        while not job.is_done and self.step([job], cancel):
            if job.error is not None:
                raise job.error
            if job.logits is not None and len(job.logits):
                yield job.logits

    def generate(
        self, groups: Iterable[list[Generation]], cancel: Callable[[], bool] | None = None
    ) -> Generator[tuple[Generation, Piece], None, None]:
        """Continues texts until each has its finish reason, in one batch. Those of a group share a prompt,
        which is computed once. Yields every piece with the text it belongs to, and frees a text's pages at
        its end; all of them when it is closed early or something raises.
        """
        batch = Batch(self)
        try:
            for group in groups:
                batch.add(group)
            while batch.jobs:
                yield from batch.step(cancel)
        finally:
            batch.close()

    def close(self) -> None:
        """Waits for the running call, if another thread makes it, and refuses all others."""
        with self.cache.lock:
            self.is_closed = True

    def after_fork(self) -> None:
        """In a new process: what other threads were doing has ended with them."""
        cache, this_thread = self.cache, threading.get_ident()
        if cache.lock.acquire(blocking=False):
            cache.lock.release()
        else:
            cache.lock, cache.is_torn = threading.RLock(), True
        self._calls = [call for call in self._calls if call.thread == this_thread]
        for call in self._calls:
            call.wake = threading.Event()  # whose own lock another thread may have held
        for sequence in cache.holders():
            if sequence.runner not in (None, this_thread):
                sequence.close()

    def _check_open(self) -> None:
        if self.is_closed:
            raise ModelClosedError("the model is closed")

    def _refuse_nesting(self) -> None:
        thread = threading.get_ident()
        if any(call.thread == thread and not call.is_abandoned for call in list(self._calls)):
            raise ArgumentError(
                "the model is in the middle of a call that this thread makes: cancel= and signal handlers "
                "cannot use it, only end the call or close the model"
            )

    def _take_turn(self, call: _Call) -> bool:
        """Calls the model until there is news about `call`; where another thread does, waits for that news or
        for the end of its turn. A wait with a `cancel` ends after ASK_S, for that to be asked. False where
        there is nothing to do but to wait for pages.
        """
        try:
            if self.cache.lock.acquire(blocking=False):
                while not call.is_done and not call.is_cancelled:
                    if not self._run(call):
                        return call.is_done
                return True
        finally:
            # `with` cannot wait for a time. Only the lock knows whether an interrupt came before or after it
            # was acquired, and there must be no other call before this one, where the next would come.
            try:
                self.cache.lock.release()
            except RuntimeError:  # it was not
                pass
            else:
                self._pass_on(call)
        # Not for the lock: who comes first would take it from those who only want to learn their news, and
        # wait in `_gather` for their next tokens in vain.
        call.wake.wait(LOOK_S if call.cancel is None else ASK_S)
        call.wake.clear()
        return True

    def _pass_on(self, own: _Call) -> None:
        """Wakes a thread to call the model next."""
        for call in self._waiting():
            if call is not own:
                call.wake.set()
                return

    def _run(self, own: _Call) -> bool:
        """One call of the model for all who wait, in the thread of `own`; False where all of them wait for
        pages. The lock is held."""
        self._check_open()
        self._gather()
        self.cache.collect()
        calls = self._waiting()
        parts = self._plan(self._admit(calls))
        try:
            return self._compute(parts, own)
        except MemoryLimitError:
            alone = [part for part in parts if part.job in own.jobs]
            if len(alone) == len(parts):
                raise
            return self._compute(alone, own)  # which the others' threads will find out in their turn

    def _compute(self, parts: list[_Part], own: _Call) -> bool:
        """Whether there was anything to do."""
        if not parts:
            return False
        started = time.perf_counter()
        try:
            # Asking costs a layer its pause for the interpreter, so only where somebody could answer.
            logits = self._forward(parts, None if own.cancel is None else own.ask)
        except CancelledError:
            if not own.is_cancelled:
                raise
            return True
        self._last_end = time.perf_counter()
        self._last_s = self._last_end - started
        n_texts = sum(part.job.is_text for part in parts)
        if not any(part.guesses for part in parts):
            self._pace.learn(n_texts, sum(part.n for part in parts) - n_texts, self._last_s)
        if n_texts == len(parts):
            self.costs.learn(n_texts, sum(part.n_tokens for part in parts), self._last_s)
        ends = np.cumsum([part.n_logits for part in parts])
        of_parts = [(part, logits[end - part.n_logits : end]) for part, end in zip(parts, ends, strict=True)]
        for part in parts:
            self.cache.commit(part.job.sequence, part.n, len(part.guesses))
        self._grant([(part.job, rows) for part, rows in of_parts if not part.guesses])
        for part, rows in of_parts:  # last: its thread may see this before it is woken, and go on
            part.job.advance(rows)
        for call in list(self._calls):
            if call.is_done:
                call.wake.set()
        here = {part.job for part in parts if part.job.is_done}
        self._written = [weakref.ref(job) for job in here | {*self._missing(here)}]
        return True

    def _grant(self, computed: list[tuple[Job, Any]]) -> None:
        """Makes the choices that the jobs are computed for, as far as they are the core's alone: the threads
        that wait for them have one thing less to do, one after the other, before the next call."""
        wishes: list[Wish] = []
        for job, rows in computed:
            if job.sequence.n_pending == 0 and len(rows) and not isinstance(rows, Candidates):
                try:
                    wishes += job.wishes(rows[-1])
                except (Error, MemoryError):  # the text's own, which its thread meets again
                    log.debug("a choice is left to its thread", exc_info=True)
        grant(wishes, self._threads)

    @property
    def _patience_s(self) -> float:
        """How long a call waits for the texts of the last one at most."""
        return max(PATIENCE_S, PATIENCE * self._last_s)

    def _waiting(self) -> list[_Call]:
        return [call for call in list(self._calls) if not call.is_done and not call.is_abandoned]

    def _missing(self, here: Set[Job]) -> list[Job]:
        """The texts that were written a moment ago, are not over and are not `here`."""
        now = time.perf_counter()
        jobs = (ref() for ref in self._written)
        return [
            job
            for job in jobs
            if job is not None
            and job not in here
            and not job.sequence.is_closed
            and now - job.news_at < max(RECENT_S, 4 * self._last_s)
        ]

    def _gather(self) -> None:
        """Waits for the threads that choose the next tokens of the last call's texts, so that these go on in
        one call; not for those that took long the last time."""
        while True:
            self._arrived.clear()
            here = {job for call in self._waiting() for job in call.jobs}
            left_s = self._last_end + self._patience_s - time.perf_counter()
            if left_s <= 0 or all(job.is_late for job in self._missing(here)):
                return
            self._arrived.wait(left_s)

    def _admit(self, calls: list[_Call]) -> list[Job]:
        """The jobs that have all the pages they need, the oldest first. Raises nothing: a job that can never
        have them has an error, one that has to wait is left out, and what its call has after it.
        """
        admitted: list[Job] = []
        seen: set[Sequence] = set()
        full: set[_Call] = set()  # that have to wait
        waiting = [(job, call) for call in calls for job in call.jobs]
        for job, call in sorted(waiting, key=lambda pair: pair[0].sequence.order):
            sequence = job.sequence
            if call in full:
                continue
            if sequence in seen:
                job.error = ArgumentError("a session is for one thread at a time; fork it for another")
                continue
            seen.add(sequence)
            self.cache.settle(sequence)
            if len(sequence.tokens) > self._context:
                n = len(sequence.tokens)
                job.error = ContextError(f"the session's {n} tokens are past the context of {self._context}")
                continue
            if sequence.n_cached > job.next_row:  # logits were computed, and an interrupt lost them
                self.cache.drop(sequence)
            try:
                self.cache.adopt(sequence, job.next_row)
                self.cache.reserve(sequence, len(job.guesses))
            except MemoryLimitError as error:
                full.add(call)
                if not self._will_have_room(job, call):
                    job.error = error
                continue
            admitted.append(job)
        return admitted

    def _will_have_room(self, job: Job, call: _Call) -> bool:
        """Whether older texts hold pages that their calls will give back: not those of streams and sessions,
        which last for as long as somebody likes. Nor does a call wait that stands in a processor of a text
        that holds pages. So all others wait for older ones only, the oldest goes on, and nobody waits for
        ever.
        """
        own = {other.sequence for other in call.jobs}
        older = [s for s in self.cache.holders() if s.order < job.sequence.order]
        is_nested = any(s.runner == call.thread and s not in own for s in older)
        return not is_nested and any(s.runner is not None or s in own for s in older)

    def _plan(self, jobs: list[Job]) -> list[_Part]:
        """Which tokens the next call computes."""
        parts = []
        texts, here = [job for job in jobs if job.is_text], set(jobs)
        n_tokens = min(self._most, len(texts) + self._pace.room(0))
        n_long = n_tokens  # of prompts for which others would wait
        if any(job.is_watched for job in (*texts, *self._missing(here))):
            n_long = self._pace.room(max(1, len(texts)), len(jobs) - len(texts))
        n_rows = self._max_rows
        for job in sorted(jobs, key=lambda job: (not job.is_text, job.sequence.n_pending <= SHORT)):
            sequence = job.sequence
            is_long = sequence.n_pending > SHORT
            # A thread that wrongly shares a session may add tokens meanwhile, for which there are no pages.
            room = PAGE * min(map(len, sequence.tables)) - sequence.n_cached
            n = min(sequence.n_pending, room, n_tokens, n_long if is_long else n_tokens)
            n_unwanted = max(0, job.next_row - sequence.n_cached)  # leading tokens whose logits nobody needs
            n = min(n, n_unwanted + n_rows)
            if n > 0:
                parts.append(_Part(job, n, max(0, n - n_unwanted)))
                n_tokens -= n
                n_long -= n if is_long else 0
                n_rows -= parts[-1].n_rows
        if all(part.job.is_text for part in parts):  # beside prompts a token costs what a prompt's does
            self._add_guesses(parts, self._most - sum(part.n for part in parts), n_rows)
        return parts

    def _add_guesses(self, parts: list[_Part], n_tokens: int, n_rows: int) -> None:
        """As many as there is room for, of texts whose tokens are all in the call."""
        if all(part.job.n_candidates is not None for part in parts):
            n_rows = min(n_rows, MOST_CHOSEN - sum(part.n_rows for part in parts))
        for part in parts:
            sequence = part.job.sequence
            if part.job.guesses and part.n == sequence.n_pending:
                room = PAGE * min(map(len, sequence.tables)) - sequence.n_cached - part.n
                n = max(0, min(room, n_tokens, n_rows))
                part.guesses = part.job.guesses[:n]
                n_tokens -= n
                n_rows -= n

    def _n_candidates(self, parts: list[_Part]) -> int:
        """How many of each row's logits are enough for all, where the device finds them by itself; else 0."""
        wanted = [part.job.n_candidates for part in parts if part.n_logits]
        n = max((n or 0 for n in wanted), default=0)
        rows = sum(part.n_logits for part in parts)
        return n if None not in wanted and n <= self.model.most_candidates and rows <= MOST_CHOSEN else 0

    def _forward(self, parts: list[_Part], should_stop: Callable[[], bool] | None) -> Logits:
        """The logits of the wanted tokens, in the order of `parts`: float32 [rows, vocab_size], or those that
        are enough."""
        sequences = [part.job.sequence for part in parts]
        n = np.array([part.n_tokens for part in parts])
        starts = np.cumsum(n) - n
        tokens = np.empty(n.sum(), dtype=np.int32)
        positions = np.empty_like(tokens)
        n_pages = max(len(table) for s in sequences for table in s.tables)
        tables = np.zeros((len(parts), len(self.cache.windows), n_pages), dtype=np.int32)
        rows: list[int] = []
        for i, (part, s) in enumerate(zip(parts, sequences, strict=True)):
            here = slice(starts[i], starts[i] + part.n_tokens)
            tokens[here] = [*s.tokens[s.n_cached : s.n_cached + part.n], *part.guesses]
            positions[here] = np.arange(s.n_cached, s.n_cached + part.n_tokens)
            for k, table in enumerate(s.tables):
                tables[i, k, : len(table)] = table
            rows.extend(range(here.stop - part.n_logits, here.stop))
        np.maximum(tables, 0, out=tables)  # what is GONE is not read, but must be a page
        given = (tokens, positions, np.repeat(np.arange(len(parts), dtype=np.int32), n), tables)
        options: dict[str, Any] = {
            "rows": np.array(rows, dtype=np.int32),
            "cache": self.cache.pool,
            "should_stop": should_stop,
        }
        if self.cache.slots is not None:
            for part, s in zip(parts, sequences, strict=True):
                self.cache.plan(s, part.n, len(part.guesses))
            kept, first = [s.kept for s in sequences], [s.n_cached for s in sequences]
            options["states"] = moves(kept, starts.tolist(), first)
        if any(s.applied.uses for s in sequences):
            options["adapters"] = [s.applied.uses for s in sequences]
        if n_candidates := self._n_candidates(parts):
            return self.model.candidates(*given, n=n_candidates, allowed=self._allowed(parts), **options)
        return self.model.forward(*given, **options)

    def _allowed(self, parts: list[_Part]) -> Mask | None:
        """What the candidates of each row are of, as bits [rows, words]; None: of all tokens.

        Whole rows meet their masks after the call, which are made meanwhile; the device needs them before it.
        So the call waits for what `prepare` began after the last token, 50 us a text.
        """
        masks: list[Mask | None] = []
        for part in parts:
            end = part.job.sequence.n_cached + part.n_tokens
            for position in range(end - part.n_logits, end):
                try:
                    masks.append(part.job.mask(position))
                except Exception as error:  # the text's own, which its thread raises
                    part.job.error = error
                    masks.append(None)
        some = [mask for mask in masks if mask is not None]
        if not some:
            return None
        everything = np.full_like(some[0], 0xFFFFFFFF)
        return np.stack([everything if mask is None else mask for mask in masks])


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_engines):
        engine.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
