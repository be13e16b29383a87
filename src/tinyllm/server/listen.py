"""The socket, the connections on it, and the signals that end the server: uvicorn, as we run it.

Invariant: no client holds a connection for nothing: one whose request does not come on, or who takes nothing
of an answer, is cut off after a while, and the system does the same with one that has vanished. The first
SIGTERM or SIGINT ends the server in order, another SIGINT at once. Imports app.py (`Server`) and uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinyllm.errors import Error
from tinyllm.server.app import Server

ARRIVING_S = 60.0  # for a request's head, and for each ARRIVING_BYTES of its body
ARRIVING_BYTES = 64 << 10
STALLED_S = 30.0  # that a client may take nothing of an answer
KEEP_ALIVE_S = 75  # that a connection waits for its next request
FLUSH_S = 3  # for what is still on its way when all has ended
BACKLOG = 2048


class BindError(Error, OSError):
    """The address cannot be listened on."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises BindError."""
    where = f"{host} port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise BindError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_the_vanished(listener)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise BindError(f"{where}: {error.strerror}") from None
    return listener


def _notice_the_vanished(listener: socket.socket) -> None:
    """Connections inherit it: the system asks a silent peer for a sign of life, and waits for it, and for
    what it has to confirm, as long as for a stalled one."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 60),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", int(STALLED_S * 1000)),
    ):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def url_of(listener: socket.socket, host: str) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


class Connection(H11Protocol):
    """One client's. Its clocks are its own, and stop where the connection ends."""

    _arriving: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _n_bytes = 0  # since the clock was set

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.access_log = False  # whatever logging is set to: its lines would hold what clients write

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._n_bytes += len(data)
        state = self.conn.their_state
        if state is not h11.SEND_BODY and not (state is h11.IDLE and self.conn.trailing_data[0]):
            _stop(self._arriving)
            self._arriving = None
        elif self._arriving is None or self._n_bytes >= ARRIVING_BYTES:
            self._expect()

    def eof_received(self) -> None:
        super().eof_received()
        self.give_up()  # else asyncio would wait until what is buffered is read, and it may never be

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._stalled)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        _stop(self._arriving)
        _stop(self._stalled)

    def give_up(self) -> None:
        """Cuts off an answer that is not all sent: nobody takes it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()

    def _expect(self) -> None:
        _stop(self._arriving)
        self._n_bytes, self._arriving = 0, self.loop.call_later(ARRIVING_S, self.transport.abort)


def _stop(clock: asyncio.TimerHandle | None) -> None:
    if clock is not None:
        clock.cancel()


def _interrupt() -> None:
    raise KeyboardInterrupt


class Listener(uvicorn.Server):
    """uvicorn, which ends as `Server.end` says: grace_s is for answers that run. on_end: called when the end
    begins. `run(sockets=[...])` runs it; KeyboardInterrupt comes out of a second Ctrl-C."""

    def __init__(
        self, server: Server, app: ASGIApp, *, grace_s: float, on_end: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                loop="asyncio",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=FLUSH_S,
            )
        )
        self._server, self._grace_s, self._on_end = server, grace_s, on_end
        self._n_signals = 0
        self._ending: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what it says holds frames and texts

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def end(self) -> None:
        """Begins the end; from any thread, and from a signal's handler."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin_end)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._n_signals += 1
        if self._n_signals == 1:
            self.end()
        elif sig == signal.SIGINT:
            if self._n_signals > 2:  # the loop itself stands still
                raise KeyboardInterrupt
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_interrupt)  # between two steps of tasks

    def _begin_end(self) -> None:
        if self._ending is None:
            self._on_end()
            self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        try:
            await self._server.end(self._grace_s)
        finally:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.give_up()
            self.should_exit = True
