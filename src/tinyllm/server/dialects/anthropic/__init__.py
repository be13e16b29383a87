"""Anthropic's dialect: messages, how many tokens they are, and its form of the list of models.

Invariant of the folder: every member of a body is translated, listed in HARMLESS (asked.py), or refused by
its name; shapes are those of the `anthropic` package's own types. Imports ask.py, app.py and streams.py.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from tinyllm import LLM
from tinyllm.server.app import Call, Dialect
from tinyllm.server.ask import Refusal
from tinyllm.server.dialects.anthropic.answered import events_of, message_of
from tinyllm.server.dialects.anthropic.asked import wanted_of
from tinyllm.server.streams import event, json_response, rfc3339
from tinyllm.server.thinking import template_args

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


async def messages(call: Call) -> Response:
    fields = await call.fields()
    streams = fields.take("stream", bool, False)
    if "max_tokens" not in fields:
        raise fields.refusal("max_tokens", "is missing", code="missing_required_parameter")
    wanted = wanted_of(fields)
    fields.finish()
    if not streams:
        return await call.whole(wanted.ask, lambda answer, made: message_of(answer, made[0], wanted))
    return await call.events(wanted.ask, lambda answer: events_of(answer, wanted))


async def count_tokens(call: Call) -> Response:
    fields = await call.fields()
    ask = wanted_of(fields).ask
    fields.finish()

    def count(llm: LLM) -> int:
        variables = template_args(llm, ask) or None
        return len(llm.chat_ids(ask.messages or (), tools=ask.tools or None, template_args=variables))

    return json_response({"input_tokens": await call.of_model(ask.model, count)})


async def models(call: Call) -> Response:
    data = [_model(s.name, s.created) for s in call.server.models.served.values()]
    first, last = data[0]["id"], data[-1]["id"]
    return json_response({"data": data, "has_more": False, "first_id": first, "last_id": last})


async def model(call: Call) -> Response:
    served = call.server.models.find(call.request.path_params["name"])
    return json_response(_model(served.name, served.created))


def _model(name: str, created: int) -> dict[str, Any]:
    head = {"type": "model", "id": name, "display_name": name, "created_at": rfc3339(created)}
    return head | {"lifecycle": "active"}


def error(refusal: Refusal) -> dict[str, Any]:
    kind = TYPES.get(refusal.status) or ("api_error" if refusal.status >= 500 else TYPES[400])
    message = refusal.message
    if refusal.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # the words by which Claude Code knows it
    return {"type": "error", "error": {"type": kind, "message": message}}


def failed(refusal: Refusal) -> str:
    return event(error(refusal), "error")


ANTHROPIC = Dialect(
    "anthropic",
    [("POST", "/v1/messages", messages), ("POST", "/v1/messages/count_tokens", count_tokens)],
    error,
    failed,
)
# Under paths that OpenAI's clients ask as well, without this header.
ANTHROPIC_MODELS = Dialect(
    "anthropic",
    [("GET", "/v1/models", models), ("GET", "/v1/models/{name:path}", model)],
    error,
    failed,
    header="anthropic-version",
)
