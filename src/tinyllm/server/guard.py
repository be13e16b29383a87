"""Who may ask, and how much may be sent: what every request passes before a dialect sees it.

Invariant: a request without the key, from another site's page, or to a name that is not this server's, is
answered before anything of it is read or done. A page that a browser shows can reach this machine, too: it
may bend its own name to 127.0.0.1, which the Host header tells, or ask across sites, which Origin tells. No
body is kept past the limit. The page's files need no key, they ask people for it. Imports ask.py, page/ and
starlette; app.py puts it around the routes.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyllm.server import page
from tinyllm.server.ask import Refusal

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/health", *page.FILES)  # what a supervisor and a browser ask without a key
SWALLOWED_BYTES = 64 << 20  # of a body that is too large, so that its client gets to read the answer


@dataclass(frozen=True)
class Access:
    """key: what clients must send, None for nothing. hosts: names of this server beside those of loopback.
    any_address: whether every IP address is one of its names; nobody can bend one. origins: whose pages may
    ask beside its own ("https://chat.example"), "*" for all."""

    key: str | None = None
    hosts: Sequence[str] = ()
    any_address: bool = False
    origins: Sequence[str] = ()


class Guard:
    """The middleware. body_bytes: of a request at most. refuse: the response to a path that a refusal is.
    is_ending: whether the server takes nothing more."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        body_bytes: int,
        refuse: Callable[[str, Refusal], Response],
        is_ending: Callable[[], bool],
    ) -> None:
        self._app, self._access, self._body_bytes = app, access, body_bytes
        self._refuse, self._is_ending = refuse, is_ending
        self._key = None if access.key is None else access.key.encode("utf-8")
        self._hosts = {_lower(name) for name in (*LOOPBACK_NAMES, *access.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope["path"], headers)
            if int(headers.get("content-length", "0")) > self._body_bytes:
                if "expect" not in headers:  # else its client waits for our word before it sends
                    await _swallow(receive)
                raise self._too_large()
        except Refusal as refusal:
            response = self._refuse(scope["path"], refusal)
            if refusal.status in (413, 503):
                response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _check(self, path: str, headers: Headers) -> None:
        """Raises Refusal."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(name_of(hosts[0])):
            raise Refusal(
                403,
                "the Host header names another server: start this one with --allowed-host NAME where that "
                "is one of its names",
                code="wrong_host",
            )
        for origin in headers.getlist("origin"):
            if not self._may_ask(origin, hosts[0]):
                raise Refusal(
                    403,
                    "pages of another site may not ask here: start the server with --cors ORIGIN to let them",
                    code="wrong_origin",
                )
        if self._key is not None and path not in OPEN_PATHS and not self._has_key(headers):
            raise Refusal(
                401,
                "the key is missing or wrong: send it as Authorization: Bearer KEY or as x-api-key: KEY",
                code="invalid_api_key",
            )
        if self._is_ending():
            raise Refusal(503, "the server is ending", code="closing", retry_after=5)

    def _is_ours(self, name: str) -> bool:
        return name in self._hosts or (self._access.any_address and _is_address(name))

    def _may_ask(self, origin: str, host: str) -> bool:
        own = (f"http://{host}", f"https://{host}")  # https: of a proxy before us
        return "*" in self._access.origins or origin in self._access.origins or origin in own

    def _has_key(self, headers: Headers) -> bool:
        sent = headers.getlist("x-api-key")
        for value in headers.getlist("authorization"):
            kind, _, key = value.partition(" ")
            sent += [key.strip()] if kind.lower() == "bearer" else []
        wanted = self._key or b""
        return any(hmac.compare_digest(key.encode("utf-8"), wanted) for key in sent)

    def _limited(self, receive: Receive) -> Receive:
        n = 0

        async def limited() -> Message:
            nonlocal n
            message = await receive()
            n += len(message.get("body", b""))
            if n > self._body_bytes:
                if message.get("more_body"):
                    await _swallow(receive)
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> Refusal:
        return Refusal(
            413, f"the body has more than {self._body_bytes} bytes, which is the most", code="body_too_large"
        )


def name_of(host: str) -> str:
    """The name in a Host header, without its port and without the brackets of an IPv6 address."""
    if host.startswith("["):
        return _lower(host[1:].partition("]")[0])
    return _lower(host.rpartition(":")[0] if host.count(":") == 1 else host)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _lower(name: str) -> str:
    return name.lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _swallow(receive: Receive) -> None:
    """Reads the rest of a body, or much of it."""
    left = SWALLOWED_BYTES
    while left > 0:
        message = await receive()
        if not message.get("more_body"):
            return
        left -= len(message["body"])
