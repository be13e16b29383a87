"""Who is computed when: the whole policy.

Invariant: first come, first served. At most `parallel` texts are computed at once, at most `queue` requests
wait for it, and one more is refused at once (429) with a guess at when to come back. A request that waits in
front is not overtaken by a smaller one. How prompts and answers share the machine once they are computed is
engine/pace.py's. Imports ask.py. For one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tinyllm.server.ask import Refusal

FIRST_GUESS_S = 1.0  # that a request takes, while none has ended
ENDING_S = 5  # after which a client may look for another server
NEWS = 0.2  # how much of what is known of that one that ends replaces


class Turns:
    """parallel: texts at once; a request for n of them takes n places. queue: requests that may wait."""

    def __init__(self, parallel: int, queue: int) -> None:
        self.parallel, self.queue = parallel, queue
        self.running = 0  # texts that are computed
        self.is_closed = False
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._usual_s = FIRST_GUESS_S

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, n: int = 1) -> AsyncIterator[None]:
        """Waits for n places and holds them. Raises Refusal: 400 for more than there are, 429 where too many
        wait, 503 once it is closed."""
        if self.is_closed:
            raise _ending()
        if n > self.parallel:
            raise Refusal(400, f"n is {n}, this server computes {self.parallel} texts at once", param="n")
        if self._waiting or self.running + n > self.parallel:
            await self._wait(n)
        else:
            self.running += n
        started = time.monotonic()
        try:
            yield
        finally:
            self.running -= n
            self._usual_s += NEWS * (time.monotonic() - started - self._usual_s)
            self._admit()

    async def _wait(self, n: int) -> None:
        if len(self._waiting) >= self.queue:
            raise Refusal(
                429,
                f"{self.running} texts are computed and {len(self._waiting)} requests wait: come back later",
                code="queue_full",
                retry_after=self._retry_after(),
            )
        place = (n, asyncio.get_running_loop().create_future())
        self._waiting.append(place)
        try:
            await place[1]
        except BaseException:
            if place in self._waiting:
                self._waiting.remove(place)
            elif _is_admitted(place[1]):
                self.running -= n  # and cancelled in the same moment
            self._admit()
            raise

    def close(self) -> None:
        """Lets nobody in any more; those that wait are refused, those that run go on."""
        self.is_closed = True
        while self._waiting:
            _, place = self._waiting.popleft()
            if not place.done():
                place.set_exception(_ending())

    def _admit(self) -> None:
        """Gives free places to those who wait, in their order. They count as running from here on."""
        while self._waiting and self.running + self._waiting[0][0] <= self.parallel:
            n, place = self._waiting.popleft()
            if not place.done():
                self.running += n
                place.set_result(None)

    def _retry_after(self) -> int:
        rounds = (len(self._waiting) + 1) / self.parallel
        return max(1, min(600, math.ceil(rounds * self._usual_s)))


def _is_admitted(place: asyncio.Future[None]) -> bool:
    return place.done() and not place.cancelled() and place.exception() is None


def _ending() -> Refusal:
    return Refusal(503, "the server is ending", code="closing", retry_after=ENDING_S)
