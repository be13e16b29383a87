"""Ollama's dialect: chat, generate, vectors, and the models there are.

Invariant of the folder: every member of a body and every option is obeyed, listed as harmless (asked.py), or
refused by its name. Shapes are those of Ollama's API and the `ollama` package's own types: durations in
nanoseconds, arguments of calls as objects, streams of lines. Imports ask.py, app.py and streams.py.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from tinyllm.server.app import Call, Dialect
from tinyllm.server.ask import Refusal
from tinyllm.server.dialects.ollama.models import ps, show, tags
from tinyllm.server.dialects.ollama.texts import chat, generate
from tinyllm.server.dialects.ollama.vectors import embed, embeddings
from tinyllm.server.streams import json_response, line

# Whose API this is, not which tinyllm: clients such as Codex ask whether an Ollama is new enough for them.
VERSION = "0.13.4"


async def version(call: Call) -> Response:
    return json_response({"version": VERSION})


async def refused(call: Call) -> Response:
    raise Refusal(
        501, f"{call.request.url.path} is not supported: the models are those of the server's command line"
    )


def error(refusal: Refusal) -> dict[str, Any]:
    return {"error": refusal.message}


OLLAMA = Dialect(
    "ollama",
    [
        ("POST", "/api/chat", chat),
        ("POST", "/api/generate", generate),
        ("POST", "/api/embed", embed),
        ("POST", "/api/embeddings", embeddings),
        ("GET", "/api/tags", tags),
        ("GET", "/api/ps", ps),
        ("POST", "/api/show", show),
        ("GET", "/api/version", version),
        ("POST", "/api/pull", refused),
        ("POST", "/api/push", refused),
        ("POST", "/api/create", refused),
        ("POST", "/api/copy", refused),
        ("DELETE", "/api/delete", refused),
        ("HEAD", "/api/blobs/{digest}", refused),
        ("POST", "/api/blobs/{digest}", refused),
    ],
    error,
    lambda refusal: line(error(refusal)),
)
