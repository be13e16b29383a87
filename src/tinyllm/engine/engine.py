"""Runs sequences: builds the batches for the model, and continues texts token by token.

`Engine.step` makes one call of the model for everything that any thread waits for, whoever comes first
doing it for all. `Engine.generate` is the loop above it: it samples in the caller's own thread, so a
sampler may be any Python code. Imports `kvcache`, `sampling`, chat's reasoning and `errors`. Read next:
llm.py, the interface.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tinyllm.chat.reasoning import Kind, Part, Plain, Splitter
from tinyllm.engine.kvcache import PAGE, KVCache, Sequence
from tinyllm.engine.sampling import Candidates, Logits, Sampled, StopStrings
from tinyllm.errors import (
    ArgumentError,
    CancelledError,
    ContextError,
    FormatError,
    MemoryLimitError,
    ModelClosedError,
)

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

CHUNK = 512  # tokens of a call; more would only make it longer
CALL_S = 0.05  # that a call may take on a device that cannot stop within one
LEAST_CHUNK = 64  # tokens of a call there
MAX_LOGITS_BYTES = 64 << 20  # of a call
MOST_CHOSEN = 64  # rows whose candidates a call finds on the device
ASK_S = 0.02  # after which a thread that waits asks its cancel=, or looks for pages again

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
        cache: Any,
        should_stop: Callable[[], bool] | None = None,
    ) -> Candidates: ...


class Job:
    """A sequence to bring up to date, and what came of it in the last step.

    first_row: the position of the first token whose logits are wanted; None: the sequence's last.
    """

    def __init__(
        self, sequence: Sequence, *, first_row: int | None = None, n_candidates: int | None = None
    ) -> None:
        self.sequence, self.n_candidates = sequence, n_candidates
        self.logits: Any = None  # [rows, vocab_size], of the wanted tokens that the last step computed
        self.is_done = False  # all tokens are computed
        self.error: Exception | None = None  # why it cannot go on
        self._next_row = first_row
        self._advanced = False

    @property
    def next_row(self) -> int:
        """The position of the first token whose logits are wanted and not there yet."""
        return len(self.sequence.tokens) - 1 if self._next_row is None else self._next_row

    @property
    def has_news(self) -> bool:
        return self._advanced or self.error is not None

    def start(self) -> None:
        """Forgets the last step."""
        self.logits, self.is_done, self._advanced = None, False, False

    def advance(self, logits: Logits) -> None:
        is_done, next_row = self.sequence.n_pending == 0, self._next_row
        if next_row is not None:
            next_row += len(logits)
        self._next_row, self.logits, self.is_done, self._advanced = next_row, logits, is_done, True


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Piece:
    """A part of a stream as it comes. `str(piece)` is its text, which can be empty: characters and what
    may become a stop string or a tag are held back until they are certain.

    Each token comes with one piece; token and logprob are None on further pieces that only bring held-back
    text. logprob is the model's own, a natural logarithm. kind: "reasoning" for what a chat model thinks
    before it answers, else "text".
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    kind: Kind = "text"

    def __str__(self) -> str:
        return self.text


@dataclass(eq=False)
class Generation:
    """One text in the making, and all that is known of it.

    sequence: its prompt, to be continued; None for one that forks the first of its group.
    text_of: the characters that a token completes; of None, what is left. split: tells reasoning from text,
    which alone is searched for stop strings. context: how many tokens the sequence may hold.
    """

    sequence: Sequence | None
    sampler: Callable[[Any, list[int], int], Sampled]
    stops: StopStrings
    text_of: Callable[[int | None], str]
    context: int
    n_candidates: int | None = (
        None  # of the largest logits, that are enough for the sampler; None: it needs all
    )
    max_tokens: int | None = None
    eos_ids: frozenset[int] = frozenset()
    split: Splitter = field(default_factory=Plain)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the string or the id that ended the text
    started: float = field(default_factory=time.perf_counter)
    prompt_done: float | None = None  # when the prompt was computed
    ended: float | None = None

    def accept(self, logits: Logits) -> list[Piece]:
        """Chooses the next token. logits: a row, as the sampler takes it. Returns what there is to show."""
        assert self.sequence is not None
        if self.prompt_done is None:
            self.prompt_done = time.perf_counter()
        tokens = self.sequence.tokens
        if len(tokens) >= self.context:  # a session that another stream took there
            return self.finish("length")
        sampled = choose(self.sampler, logits, tokens)
        if sampled.token in self.eos_ids:
            return self.finish("stop", sampled.token)
        tokens.append(sampled.token)
        self.tokens.append(sampled.token)
        self.logprobs.append(sampled.logprob)
        self.top_logprobs.append(sampled.top)
        pieces = self._keep(self.split.feed(self.text_of(sampled.token)))
        if self.stops.found is not None:
            self.finish("stop")
        elif len(self.tokens) == self.max_tokens or len(tokens) >= self.context:
            pieces += self.finish("length")
        first, *rest = pieces or [Piece("", kind=self.split.kind)]
        return [replace(first, token=sampled.token, logprob=sampled.logprob), *rest]

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> list[Piece]:
        """Ends the text. Returns the held-back rest, if there is any."""
        pieces = self._keep([*self.split.feed(self.text_of(None)), *self.split.flush()])
        if rest := self.stops.flush():
            self.text += rest
            pieces.append(Piece(rest))
        if self.stops.found is not None:
            reason, stop_reason = "stop", self.stops.found
        self.finish_reason, self.stop_reason, self.ended = reason, stop_reason, time.perf_counter()
        return pieces

    def _keep(self, parts: list[Part]) -> list[Piece]:
        """Adds parts to what there is, up to a stop string; the pieces to show."""
        pieces = []
        for kind, text in parts:
            if self.stops.found is not None:
                break
            if kind == "reasoning":
                self.reasoning += text
            else:
                self.text += (text := self.stops.feed(text))
            if text:
                pieces.append(Piece(text, kind=kind))
        return pieces

    def close(self) -> None:
        if self.sequence is not None:
            self.sequence.close()


@dataclass(eq=False)
class _Call:
    """One thread's wait for news about its jobs. cancel: asked by that thread alone, so that what it raises
    ends nobody else's wait."""

    jobs: list[Job]
    cancel: Callable[[], bool] | None = None
    is_cancelled: bool = False
    is_abandoned: bool = False
    thread: int = field(default_factory=threading.get_ident)

    @property
    def is_done(self) -> bool:
        return any(job.has_news for job in self.jobs)

    def ask(self) -> bool:
        """Whether `cancel` says that it is to end."""
        self.is_cancelled = self.is_cancelled or (self.cancel is not None and bool(self.cancel()))
        return self.is_cancelled


@dataclass
class _Part:
    """A job's share of a call of the model: its next n tokens, of which the last n_rows leave logits."""

    job: Job
    n: int
    n_rows: int


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
    ) -> None:
        """context: tokens of a sequence at most. chunk: tokens of a call at most. call_s: seconds that a call
        should take at most; where given, prompts go in chunks from LEAST_CHUNK up, as large as the last
        call's speed allows."""
        assert chunk <= cache.ahead
        self.model, self.cache, self._context = model, cache, context
        self._most, self._call_s = chunk, call_s
        chunk = min(chunk, LEAST_CHUNK) if call_s < math.inf else chunk
        self.is_closed = False
        self._chunk = chunk
        self._max_rows = max(1, MAX_LOGITS_BYTES // (4 * vocab_size))
        self._calls: list[_Call] = []
        _engines.add(self)

    def sequence(self, tokens: Iterable[int] = (), runner: int | None = None) -> Sequence:
        """A new sequence, nothing of it computed yet. The tokens must be ids of the vocabulary. runner: the
        thread whose call closes it without waiting for anybody's wish; None for a stream's or a session's.
        """
        return self.cache.sequence(tokens, runner)

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
                return self.cache.sequence(sequence.tokens, sequence.runner)

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
            job.start()
        call = _Call(jobs, cancel)
        try:
            self._calls.append(call)
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
        siblings = {group[0]: group[1:] for group in groups}
        everything = [generation for first, rest in siblings.items() for generation in (first, *rest)]
        jobs: dict[Generation, Job] = {}

        def start(generation: Generation) -> None:
            assert generation.sequence is not None
            wanted = [g.n_candidates for g in (generation, *siblings.get(generation, ()))]
            n = None if None in wanted else max(n for n in wanted if n is not None)
            jobs[generation] = Job(generation.sequence, n_candidates=n)

        try:
            for first in siblings:
                start(first)
            while jobs:
                is_cancelled = not self.step(list(jobs.values()), cancel)
                for first, job in list(jobs.items()):
                    if job.error is not None:
                        raise job.error
                    if not is_cancelled and not job.is_done:
                        continue
                    texts = [first, *siblings.pop(first, ())]
                    if not is_cancelled:
                        for generation in texts[1:]:
                            generation.sequence = self.fork(job.sequence)
                            start(generation)
                    for generation in texts:
                        if is_cancelled:
                            pieces = generation.finish("cancelled")
                        else:
                            pieces = generation.accept(job.logits[-1])
                        if generation.finish_reason is not None:
                            jobs.pop(generation, None)
                            generation.close()
                        for piece in pieces:
                            yield generation, piece
        finally:
            for generation in everything:
                if generation.finish_reason is None:
                    generation.finish("cancelled")
                generation.close()

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
        """Waits until no other thread calls the model, then calls it until there is news about `call`. A
        wait with a `cancel` ends after ASK_S, for that to be asked. False where there is nothing to do but to
        wait for pages.
        """
        try:
            if self.cache.lock.acquire(timeout=-1 if call.cancel is None else ASK_S):
                while not call.is_done and not call.is_cancelled:
                    if not self._run(call):
                        return call.is_done
            return True
        finally:
            # `with` cannot wait for a time. Only the lock knows whether an interrupt came before or after it
            # was acquired, and there must be no other call before this one, where the next would come.
            try:  # noqa: SIM105
                self.cache.lock.release()
            except RuntimeError:  # it was not
                pass

    def _run(self, own: _Call) -> bool:
        """One call of the model for all who wait, in the thread of `own`; False where all of them wait for
        pages. The lock is held."""
        self._check_open()
        self.cache.collect()
        calls = [call for call in list(self._calls) if not call.is_done and not call.is_abandoned]
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
        self._keep_short(sum(part.n for part in parts), time.perf_counter() - started)
        end = 0
        for part in parts:
            start, end = end, end + part.n_rows
            self.cache.commit(part.job.sequence, part.n)
            part.job.advance(logits[start:end])
        return True

    def _keep_short(self, n_tokens: int, seconds: float) -> None:
        """Learns from a call how many tokens the next may have."""
        if n_tokens >= LEAST_CHUNK and self._call_s < math.inf:
            fitting = int(n_tokens * self._call_s / max(seconds, 1e-9)) // LEAST_CHUNK * LEAST_CHUNK
            self._chunk = min(self._most, max(LEAST_CHUNK, fitting))

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
            if len(sequence.tokens) > self._context:
                n = len(sequence.tokens)
                job.error = ContextError(f"the session's {n} tokens are past the context of {self._context}")
                continue
            if sequence.n_cached > job.next_row:  # logits were computed, and an interrupt lost them
                self.cache.drop(sequence)
            try:
                self.cache.adopt(sequence, job.next_row)
                self.cache.reserve(sequence)
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
        n_tokens, n_rows = self._chunk, self._max_rows
        for job in sorted(jobs, key=lambda job: job.sequence.n_pending > 1):
            sequence = job.sequence
            # A thread that wrongly shares a session may add tokens meanwhile, for which there are no pages.
            room = PAGE * min(map(len, sequence.tables)) - sequence.n_cached
            n = min(sequence.n_pending, room, n_tokens)
            n_unwanted = max(0, job.next_row - sequence.n_cached)  # leading tokens whose logits nobody needs
            n = min(n, n_unwanted + n_rows)
            if n > 0:
                parts.append(_Part(job, n, max(0, n - n_unwanted)))
                n_tokens -= n
                n_rows -= parts[-1].n_rows
        return parts

    def _n_candidates(self, parts: list[_Part]) -> int:
        """How many of each row's logits are enough for all, where the device finds them by itself; else 0."""
        wanted = [part.job.n_candidates for part in parts if part.n_rows]
        n = max((n or 0 for n in wanted), default=0)
        rows = sum(part.n_rows for part in parts)
        return n if None not in wanted and n <= self.model.most_candidates and rows <= MOST_CHOSEN else 0

    def _forward(self, parts: list[_Part], should_stop: Callable[[], bool] | None) -> Logits:
        """The logits of the wanted tokens, in the order of `parts`: float32 [rows, vocab_size], or those that
        are enough."""
        sequences = [part.job.sequence for part in parts]
        n = np.array([part.n for part in parts])
        starts = np.cumsum(n) - n
        tokens = np.empty(n.sum(), dtype=np.int32)
        positions = np.empty_like(tokens)
        n_pages = max(len(table) for s in sequences for table in s.tables)
        tables = np.zeros((len(parts), len(self.cache.windows), n_pages), dtype=np.int32)
        rows: list[int] = []
        for i, (part, s) in enumerate(zip(parts, sequences, strict=True)):
            here = slice(starts[i], starts[i] + part.n)
            tokens[here] = s.tokens[s.n_cached : s.n_cached + part.n]
            positions[here] = np.arange(s.n_cached, s.n_cached + part.n)
            for k, table in enumerate(s.tables):
                tables[i, k, : len(table)] = table
            rows.extend(range(here.stop - part.n_rows, here.stop))
        np.maximum(tables, 0, out=tables)  # what is GONE is not read, but must be a page
        given = (tokens, positions, np.repeat(np.arange(len(parts), dtype=np.int32), n), tables)
        options: dict[str, Any] = {
            "rows": np.array(rows, dtype=np.int32),
            "cache": self.cache.pool,
            "should_stop": should_stop,
        }
        if n_candidates := self._n_candidates(parts):
            return self.model.candidates(*given, n=n_candidates, **options)
        return self.model.forward(*given, **options)


def choose(
    sampler: Callable[[Logits, list[int], int], Sampled], logits: Logits, tokens: list[int]
) -> Sampled:
    """The token after `tokens`. Raises ArgumentError, and FormatError where the model computes logits that
    are NaN or infinite: to the sampler -inf is a token that must not come, which is for its user to say."""
    require_finite(logits.totals if isinstance(logits, Candidates) else logits)
    return sampler(logits, tokens, len(tokens))


def require_finite(computed: npt.NDArray[np.floating[Any]]) -> None:
    """Raises FormatError where what a model computed is NaN or infinite."""
    if not np.isfinite(computed).all():
        raise FormatError(
            "the model computes numbers that are NaN or infinite: its weights hold such numbers or are "
            "damaged; get or convert its files again"
        ) from None


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_engines):
        engine.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
