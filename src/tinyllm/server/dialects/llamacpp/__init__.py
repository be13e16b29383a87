"""llama.cpp's own dialect: completion, tokens, templates, vectors, and what the server is.

Invariant of the folder: every member of a body is obeyed, listed as harmless, or refused by its name; shapes
are those of llama-server's README. Imports ask.py, app.py and streams.py.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

import tinyllm
from tinyllm.server.app import Call, Dialect
from tinyllm.server.ask import Refusal
from tinyllm.server.dialects.llamacpp.completion import completion, settings_of
from tinyllm.server.dialects.llamacpp.tokens import apply_template, detokenize, embedding, text_of, tokenize
from tinyllm.server.streams import event, json_response

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


async def health(call: Call) -> Response:
    return json_response({"status": "ok"})


async def props(call: Call) -> Response:
    model = call.request.query_params.get("model")
    async with call.server.models.use(model) as llm:
        template, tokenizer = llm.chat_template, llm.tokenizer
        bos, eos = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
        name = call.server.models.find(model).name
        return json_response(
            {
                "default_generation_settings": {
                    "n_ctx": llm.context,
                    "params": settings_of(llm, {}, None, None),
                },
                "total_slots": call.server.turns.parallel,
                "model_alias": name,
                "model_path": name,  # no path goes to a client
                "modalities": {"vision": False, "audio": False},
                "chat_template": template.source if template else "",
                "bos_token": "" if bos is None else text_of(llm, [bos]),
                "eos_token": "" if eos is None else text_of(llm, [eos]),
                "build_info": f"tinyllm {tinyllm.__version__}",
            }
        )


async def refused(call: Call) -> Response:
    raise Refusal(501, f"{call.request.method} {call.request.url.path} is not supported")


def error(refusal: Refusal) -> dict[str, Any]:
    kind = TYPES.get(refusal.status) or ("server_error" if refusal.status >= 500 else TYPES[400])
    if refusal.code == "context_length_exceeded":
        kind = "exceed_context_size_error"
    return {"error": {"code": refusal.status, "message": refusal.message, "type": kind}}


LLAMACPP = Dialect(
    "llamacpp",
    [
        ("POST", "/completion", completion),
        ("POST", "/completions", completion),
        ("POST", "/tokenize", tokenize),
        ("POST", "/detokenize", detokenize),
        ("POST", "/apply-template", apply_template),
        ("POST", "/embedding", embedding),
        ("POST", "/embeddings", embedding),
        ("GET", "/health", health),
        ("GET", "/v1/health", health),
        ("GET", "/props", props),
        ("POST", "/props", refused),
        ("GET", "/slots", refused),
        ("POST", "/slots/{id}", refused),
        ("POST", "/infill", refused),
        ("POST", "/rerank", refused),
        ("POST", "/reranking", refused),
        ("GET", "/lora-adapters", refused),
        ("POST", "/lora-adapters", refused),
    ],
    error,
    lambda refusal: event(error(refusal)),
)
