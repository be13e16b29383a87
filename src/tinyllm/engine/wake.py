"""How a thread wakes a task that waits in an event loop: asyncio's (anyio's and notebooks', too) or trio's.

Invariant: a `wake` between two `wait`s ends the second one; one whose event loop is over does nothing.
Imports neither library before somebody uses it.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any, Protocol


class Waker(Protocol):
    async def wait(self) -> None:
        """Until `wake` was called since the last wait. For one task."""

    def wake(self) -> None:
        """From any thread. Never blocks."""


def waker() -> Waker:
    """For the event loop that runs here; RuntimeError outside of one."""
    trio = sys.modules.get("trio")
    if trio is not None:
        try:
            return _Trio(trio)
        except RuntimeError:  # imported, and another library's loop runs
            pass
    return _Asyncio()


class _Asyncio:
    def __init__(self) -> None:
        import asyncio

        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()

    def wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # it is closed
            if not self._loop.is_closed():
                raise


class _Trio:
    def __init__(self, trio: Any) -> None:
        self._trio, self._token = trio, trio.lowlevel.current_trio_token()
        self._event = trio.Event()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = self._trio.Event()

    def wake(self) -> None:
        with suppress(self._trio.RunFinishedError):
            self._token.run_sync_soon(lambda: self._event.set())
