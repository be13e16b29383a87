"""The page at /, for people: its files, served from the package as they are.

Invariant: a request's path is looked up in a table of what was read when the server began; it opens no file.
The page asks for nothing outside its own server, and the browser is told to refuse it (HEADERS). app.js is
where its code begins. Imports starlette.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

HTML, CSS, JS, SVG = "text/html", "text/css", "text/javascript", "image/svg+xml"
FILES = {  # path: (file, media type)
    "/": ("index.html", HTML),
    "/page/style.css": ("style.css", CSS),
    "/page/icon.svg": ("icon.svg", SVG),
    **{
        f"/page/{name}.js": (f"{name}.js", JS)
        for name in (
            *("app", "api", "store", "words", "dom", "markdown", "models"),
            *("answers", "talk", "list", "panel", "settings", "tokens", "next"),
        )
    },
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked about each time: a new version is there at once
}


def routes() -> list[Route]:
    """A route for each file."""
    return [_route(path, *file) for path, file in FILES.items()]


def _route(path: str, name: str, media_type: str) -> Route:
    content = files(__package__).joinpath(name).read_bytes()
    headers = {**HEADERS, "ETag": f'"{hashlib.blake2b(content, digest_size=16).hexdigest()}"'}

    async def endpoint(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if headers["ETag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return Route(path, endpoint, methods=["GET"])
