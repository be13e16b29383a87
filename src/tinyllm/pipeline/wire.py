"""Messages between the driver and a stage: a JSON object and arrays, over a TCP connection that both know.

Invariant: nothing that a stranger sends is interpreted before he proves that he has the secret, and nothing
is ever unpickled; every length is bounded before memory is taken for it. What travels is not encrypted: the
network between machines is one's own, or a tunnel. Imports `errors`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.errors import FormatError

Arrays = Sequence[npt.NDArray[Any]]
HANDSHAKE_S = 5.0
MOST_HEADER_BYTES = 1 << 24
MOST_ARRAY_BYTES = 1 << 32
_DTYPES = {"i4": np.int32, "f4": np.float32, "u1": np.uint8}
_LENGTH = struct.Struct("<I")


class Wire:
    """One end. `send` may be called by several threads, `receive` by one."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._lock = connection, threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):  # a machine without power is noticed in some 10 s
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any], arrays: Arrays = ()) -> None:
        """Raises OSError."""
        arrays = [np.ascontiguousarray(array) for array in arrays]
        shapes = [[array.dtype.str[1:], list(array.shape)] for array in arrays]
        header = json.dumps({**message, "arrays": shapes}).encode("utf-8")
        with self._lock:
            self._socket.sendall(_LENGTH.pack(len(header)) + header)
            for array in arrays:
                if array.size:
                    self._socket.sendall(array.reshape(-1).view(np.uint8).data)

    def receive(self) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
        """Raises OSError (ConnectionError at the connection's end), FormatError."""
        (n,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if n > MOST_HEADER_BYTES:
            raise FormatError(f"a message of {n} bytes came from a stage: more than any has")
        message = json.loads(self._read(n))
        arrays = []
        for kind, shape in message.pop("arrays"):
            dtype = np.dtype(_DTYPES[kind])
            n_bytes = math.prod(shape) * dtype.itemsize
            if n_bytes > MOST_ARRAY_BYTES or min(shape, default=0) < 0:
                raise FormatError(f"an array of {shape} came from a stage: larger than any is")
            arrays.append(np.frombuffer(self._read(n_bytes), dtype).reshape(shape))
        return message, arrays

    def _read(self, n: int) -> bytearray:
        found = bytearray(n)
        view, at = memoryview(found), 0
        while at < n:
            got = self._socket.recv_into(view[at:])
            if not got:
                raise ConnectionError("the connection ended")
            at += got
        return found

    def close(self) -> None:
        """Ends the connection; a thread in `receive` gets a ConnectionError."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def accepted(connection: socket.socket, secret: bytes) -> Wire | None:
    """A connection whose other end has proved that it has the secret, else None: closed."""
    connection.settimeout(HANDSHAKE_S)
    try:
        ours = secrets.token_bytes(32)
        connection.sendall(ours)
        answer = _exactly(connection, 64)
        theirs, proof = answer[:32], answer[32:]
        if not hmac.compare_digest(proof, _proof(secret, b"driver", ours, theirs)):
            raise ConnectionError("another secret")
        connection.sendall(_proof(secret, b"stage", ours, theirs))
    except OSError:
        connection.close()
        return None
    connection.settimeout(None)
    return Wire(connection)


def connected(host: str, port: int, secret: bytes) -> Wire:
    """A connection to a stage that has the secret. Raises OSError."""
    connection = socket.create_connection((host, port), HANDSHAKE_S)
    try:
        theirs, ours = _exactly(connection, 32), secrets.token_bytes(32)
        connection.sendall(ours + _proof(secret, b"driver", theirs, ours))
        if not hmac.compare_digest(_exactly(connection, 32), _proof(secret, b"stage", theirs, ours)):
            raise ConnectionError(f"what answers at {host}:{port} is no stage of this model")
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return Wire(connection)


def _proof(secret: bytes, role: bytes, of_stage: bytes, of_driver: bytes) -> bytes:
    return hmac.digest(secret, role + of_stage + of_driver, hashlib.sha256)


def _exactly(connection: socket.socket, n: int) -> bytes:
    found = b""
    while len(found) < n:
        part = connection.recv(n - len(found))
        if not part:
            raise ConnectionError("the connection ended")
        found += part
    return found
