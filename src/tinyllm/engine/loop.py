"""Runs texts for callers that must not block: one thread for all of them, started by the first.

Invariant: each request that `submit` took has `done` called exactly once, in that thread, whatever ends it:
its texts are over, it was cancelled, its own error, the model's, the end of the process. No request waits for
another's reader. Imports `engine` and `errors`. async calls stand on it.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from tinyllm.engine.engine import Batch, Engine, Generation, Piece
from tinyllm.engine.wake import waker
from tinyllm.errors import ModelClosedError

IDLE_S = 1.0  # after which the thread ends, lest it keep a model alive that nobody uses
COMPANY_S = (
    0.001  # after the last of several requests that come at once, until the first call is made for them
)
MOST_COMPANY_S = 0.005  # that one waits for others in all


class Request:
    """Texts that somebody waits for: groups as of `Engine.generate`. take: gets their pieces; done: is told
    their end, and the error that was it, or None. Both are called in the loop's thread and must not block.
    is_watched: somebody reads along, for whom other texts' prompts are cut short.
    """

    def __init__(
        self,
        groups: Sequence[list[Generation]],
        take: Callable[[Generation, Piece], None],
        done: Callable[[BaseException | None], None],
        *,
        is_watched: bool = True,
    ) -> None:
        self.groups, self.take, self.done, self.is_watched = groups, take, done, is_watched
        self.is_cancelled = False
        self.texts = {generation for group in groups for generation in group}  # that are not over

    def cancel(self) -> None:
        """Ends it, from any thread: within a layer of the model where no other request is computed with it,
        else after the call. Its texts keep what they have."""
        self.is_cancelled = True


class Loop:
    """The thread, and the requests it runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._new: deque[Request] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        _loops.add(self)

    def submit(self, request: Request) -> None:
        """Raises ModelClosedError after `close`."""
        with self._wake:
            if self._is_closed:
                raise ModelClosedError("the model is closed")
            self._new.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tinyllm", daemon=True)
                self._thread.start()
            self._wake.notify()

    def close(self) -> None:
        """Cancels every request and waits for the thread's end."""
        with self._wake:
            self._is_closed, thread = True, self._thread
            self._wake.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def after_fork(self) -> None:
        """In a new process there is no thread, and nobody who waits for its requests."""
        self._wake, self._thread = threading.Condition(), None
        self._new.clear()

    def _run(self) -> None:
        live: list[Request] = []
        batch = Batch(self._engine)
        end: Exception = ModelClosedError("the model is closed")
        try:
            while not self._is_closed:
                with self._wake:
                    while not (live or self._new or self._is_closed):
                        if not self._wake.wait(IDLE_S) and not self._new:
                            self._thread = None  # from here on `submit` starts another
                            return
                if not live:
                    self._await_company()
                while self._new:
                    self._begin(batch, live, self._new.popleft())
                self._drop_cancelled(batch, live)
                if batch.jobs:
                    self._step(batch, live)
                if not self._is_closed:  # else the step was broken off
                    self._end_what_is_over(live)
        except Exception as error:  # a fault of ours: all who wait hear of it; a later request starts anew
            end = error
        finally:
            with self._wake:
                left = live
                if self._thread is threading.current_thread():
                    self._thread = None
                    left = [*live, *self._new]
                    self._new.clear()
            try:
                batch.close()
            finally:
                for request in left:
                    request.done(end)

    def _await_company(self) -> None:
        """Tasks that begin together ask one after the other; the first is not computed alone for that."""
        end = time.monotonic() + MOST_COMPANY_S
        n = 0
        while n < len(self._new) and time.monotonic() < end and not self._is_closed:
            n = len(self._new)
            time.sleep(COMPANY_S)

    def _begin(self, batch: Batch, live: list[Request], request: Request) -> None:
        live.append(request)
        try:
            for group in request.groups:
                for generation in group:
                    if generation.sequence is not None:
                        generation.sequence.runner = threading.get_ident()
                batch.add(group, is_watched=request.is_watched)
        except Exception as error:
            self._fail(batch, live, request, error)

    def _drop_cancelled(self, batch: Batch, live: list[Request]) -> None:
        for request in live:
            if request.is_cancelled:
                self._end(batch, request)

    def _step(self, batch: Batch, live: list[Request]) -> None:
        """One step for all. A text's own error ends its request, the model's ends all."""

        def nobody_waits() -> bool:
            return self._is_closed or all(request.is_cancelled for request in live)

        owner = {generation: request for request in live for generation in request.texts}
        failed: list[tuple[Generation, Exception]] = []
        try:
            for generation, piece in batch.step(nobody_waits, failed):
                owner[generation].take(generation, piece)
        except Exception as error:
            failed = [(generation, error) for generation in owner]
        for generation, reason in failed:
            if (request := owner[generation]) in live:
                self._fail(batch, live, request, reason)

    def _fail(self, batch: Batch, live: list[Request], request: Request, error: Exception) -> None:
        live.remove(request)
        self._end(batch, request)
        request.done(error)

    def _end(self, batch: Batch, request: Request) -> None:
        for generation in request.texts:
            batch.end(generation)

    def _end_what_is_over(self, live: list[Request]) -> None:
        for request in list(live):
            if all(generation.finish_reason is not None for generation in request.texts):
                live.remove(request)
                request.done(None)


class Inbox:
    """What a task gets of its request: the pieces, in order, and its end. Made within an event loop."""

    def __init__(self, loop: Loop, groups: Sequence[list[Generation]], *, keeps_pieces: bool) -> None:
        """Submits the request."""
        self._pieces: deque[Piece] = deque()
        self._waker = waker()
        self._is_done = False
        self._error: BaseException | None = None
        self._keeps_pieces = keeps_pieces
        self._sample = {text: i for group in groups for i, text in enumerate(group)}
        self.request = Request(groups, self._take, self._done, is_watched=keeps_pieces)
        loop.submit(self.request)

    async def next(self) -> Piece | None:
        """The next piece, None after the last. Raises what the request's error is."""
        await self.ready()
        return self._pieces.popleft() if self._pieces else None

    async def ready(self) -> None:
        """Until `next` need not wait. Raises what it would."""
        while not self._pieces:
            if self._is_done:
                if self._error is not None:
                    raise self._error
                return
            await self._waker.wait()

    @property
    def n_unread(self) -> int:
        return len(self._pieces)

    def _take(self, generation: Generation, piece: Piece) -> None:
        if self._keeps_pieces:
            sample = self._sample[generation]
            self._pieces.append(replace(piece, sample=sample) if sample else piece)
            self._waker.wake()

    def _done(self, error: BaseException | None) -> None:
        self._error, self._is_done = error, True
        self._waker.wake()


_loops: weakref.WeakSet[Loop] = weakref.WeakSet()


def _close_all() -> None:
    for loop in list(_loops):
        loop.close()


def _after_fork() -> None:
    for loop in list(_loops):
        loop.after_fork()


atexit.register(_close_all)  # a thread amid a call of the core must not outlive the interpreter
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
