"""A server as tinyllm-serve runs it, in a thread, and clients that do what no client should."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tinyllm
from tinyllm.server.app import Dialect, Server, application
from tinyllm.server.dialects import DIALECTS
from tinyllm.server.listen import Listener, bind
from tinyllm.server.models import Models
from tinyllm.server.turns import Turns


class Listening:
    """A server that runs. server and listener: to look into."""

    def __init__(self, server: Server, listener: Listener, port: int) -> None:
        self.server, self.listener, self.port = server, listener, port
        self.url = f"http://127.0.0.1:{port}"

    def connect(self) -> socket.socket:
        """A client's socket, whose own buffers are small."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(("127.0.0.1", self.port))
        return client

    def llm(self, name: str | None = None) -> tinyllm.LLM:
        """A model that is loaded."""
        llm = self.server.models.find(name).llm
        assert llm is not None
        return llm


@contextmanager
def listening(
    paths: Mapping[str, Path | str],
    load: Callable[..., tinyllm.LLM] = tinyllm.load,
    *,
    dialects: Sequence[Dialect] = tuple(DIALECTS),
    parallel: int = 8,
    queue: int = 64,
    grace_s: float = 5.0,
    of_models: Mapping[str, Any] | None = None,
    send_buffer: int | None = None,
    **options: Any,
) -> Iterator[Listening]:
    """Runs a server. options: of `Server`. send_buffer: bytes that the system keeps for a client that does
    not read; None: as many as it likes."""
    models = Models({name: str(path) for name, path in paths.items()}, load, **(of_models or {}))
    server = Server(models, Turns(parallel, queue), **options)
    listener = Listener(server, application(server, dialects), grace_s=grace_s)
    with bind("127.0.0.1", 0) as where:
        if send_buffer is not None:
            where.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        running = Listening(server, listener, where.getsockname()[1])
        thread = threading.Thread(target=listener.run, args=([where],), name="server")
        thread.start()
        try:
            yield running
        finally:
            listener.end()
            thread.join(60)
            assert not thread.is_alive(), "the server did not end"


def post(path: str, body: bytes, *more: str, length: int | None = None) -> bytes:
    """A request as bytes. length: what it says that the body has."""
    n = len(body) if length is None else length
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {n}",
    ]
    return "\r\n".join([*lines, *more, "", ""]).encode("latin-1") + body


def read_all(client: socket.socket) -> bytes:
    """Until the server closes or resets the connection."""
    data = b""
    with suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            data += part
    return data
