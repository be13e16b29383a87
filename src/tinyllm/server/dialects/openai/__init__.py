"""OpenAI's dialect: the routes, the models, and how errors are told.

Invariant of the folder: every member of a body is translated, listed as harmless (common.py), or refused by
its name; shapes are those of the `openai` package's own types. A file an endpoint: chat.py, completions.py,
responses.py (with input.py and output.py), embeddings.py. Imports ask.py, app.py and streams.py.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from tinyllm.server.app import Call, Dialect
from tinyllm.server.ask import Refusal
from tinyllm.server.dialects.openai.chat import chat_completions
from tinyllm.server.dialects.openai.completions import completions
from tinyllm.server.dialects.openai.embeddings import embeddings, rerank
from tinyllm.server.dialects.openai.responses import create, delete, retrieve
from tinyllm.server.models import Served
from tinyllm.server.streams import event, json_response


async def models(call: Call) -> Response:
    served = call.server.models.served.values()
    return json_response({"object": "list", "data": [_model(one) for one in served]})


async def model(call: Call) -> Response:
    return json_response(_model(call.server.models.find(call.request.path_params["name"])))


def _model(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "tinyllm"}


def error(refusal: Refusal) -> dict[str, Any]:
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {
        "error": {
            "message": refusal.message,
            "type": kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


OPENAI = Dialect(
    "openai",
    [
        ("GET", "/v1/models", models),
        ("GET", "/v1/models/{name:path}", model),
        ("POST", "/v1/chat/completions", chat_completions),
        ("POST", "/v1/completions", completions),
        ("POST", "/v1/responses", create),
        ("GET", "/v1/responses/{id}", retrieve),
        ("DELETE", "/v1/responses/{id}", delete),
        ("POST", "/v1/embeddings", embeddings),
        ("POST", "/v1/rerank", rerank),
    ],
    error,
    lambda refusal: event(error(refusal)),
)
