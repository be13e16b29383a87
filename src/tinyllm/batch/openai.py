"""Rows of OpenAI's batch format: each is a request to the server's own application, without a socket.

Invariant: what a row's body may say, and what is refused by name, is what the server's dialect decides; here
only the envelope is read (custom_id, method, url) and written (response, error). Imports `server` when the
first such row comes (the extra `serve`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tinyllm import LLM, UnsupportedError
from tinyllm.errors import ArgumentError, LostError, install_text

if TYPE_CHECKING:
    from starlette.applications import Starlette

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_SEEDED = URLS[:2]
_ENVELOPE = {"custom_id", "method", "url", "body"}


def is_openai(row: Any) -> bool:
    """Whether a row is in OpenAI's format."""
    return isinstance(row, Mapping) and "custom_id" in row


class OpenAIRows:
    """Answers such rows with one model."""

    def __init__(self, llm: LLM, name: str | None, at_once: int, options: Mapping[str, Any]) -> None:
        self._llm, self._name, self._at_once, self._options = llm, name or llm.name, at_once, options
        self._app: Starlette | None = None

    async def answer(self, key: str, row: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """The line of OpenAI's output file. Raises what is no row's fault: LostError, UnsupportedError where
        the server's packages are missing."""
        id = f"batch_req_{hashlib.blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=12).hexdigest()}"
        head = {"id": id, "custom_id": key}
        try:
            path, body = self._read(row, seed)
        except ArgumentError as error:
            return {**head, "response": None, "error": {"code": "invalid_request", "message": str(error)}}
        if self._app is None:
            self._app = self._application()
        status, content = await _post(self._app, path, json.dumps(body).encode("utf-8"))
        if status >= 500 and isinstance(content, dict) and content.get("error", {}).get("code") == "lost":
            raise LostError(str(content["error"]["message"]))
        response = {"status_code": status, "request_id": id, "body": content}
        return {**head, "response": response, "error": None}

    def _read(self, row: Mapping[str, Any], seed: int) -> tuple[str, dict[str, Any]]:
        if unknown := sorted(str(name) for name in row.keys() - _ENVELOPE):
            raise ArgumentError(f"{', '.join(unknown)}: no member of a line of OpenAI's batch format")
        if row.get("method", "POST") != "POST":
            raise ArgumentError(f"the method is {row['method']!r}, not POST")
        if row.get("url") not in URLS:
            raise ArgumentError(f"the url is {row.get('url')!r}; a batch takes {', '.join(URLS)}")
        body = row.get("body")
        if not isinstance(body, Mapping):
            raise ArgumentError("the body is no object")
        if body.get("stream"):
            raise ArgumentError("stream has no place in a batch: a line has its whole answer")
        asked = dict(body)
        if row["url"] in _SEEDED:
            for name, value in self._options.items():
                asked.setdefault(name, value)
            asked.setdefault("seed", seed)
        return str(row["url"]), asked

    def _application(self) -> Starlette:
        try:
            from tinyllm.server.app import Server, application
            from tinyllm.server.dialects.openai import OPENAI
            from tinyllm.server.models import Models
            from tinyllm.server.turns import Turns
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise UnsupportedError(
                f"rows in OpenAI's batch format need {package}: {install_text('serve')}. Rows with a prompt "
                "or messages of their own do not"
            ) from None
        models = Models({self._name: self._name}, lambda path, **more: self._llm)
        models.load_now(None)
        server = Server(models, Turns(self._at_once, self._at_once))
        return application(server, [OPENAI])


async def _post(app: Starlette, path: str, body: bytes) -> tuple[int, Any]:
    """(status, the JSON) of a request that a client on this machine might have sent."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("ascii"),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode("ascii")),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
    sent: list[bytes] = []
    status = 500
    waiting = _Once({"type": "http.request", "body": body, "more_body": False})

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            sent.append(message.get("body", b""))

    await app(scope, waiting.receive, send)
    return status, json.loads(b"".join(sent))


class _Once:
    """A client that sends its request and then stays."""

    def __init__(self, message: dict[str, Any]) -> None:
        self._message: dict[str, Any] | None = message

    async def receive(self) -> dict[str, Any]:
        if self._message is None:
            import asyncio

            await asyncio.Event().wait()
        message, self._message = self._message, None
        assert message is not None
        return message
