"""OpenAI's dialect: models, chat completions, completions.

Invariant: every member of a body is translated, listed in HARMLESS, or refused by its name. Shapes are those
of the `openai` package's own types. Imports ask.py, app.py and streams.py.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from starlette.responses import Response

from tinyllm import Completion
from tinyllm.server.app import Answer, Call, Dialect
from tinyllm.server.ask import Ask, Fields, Refusal
from tinyllm.server.streams import event, json_response

SAMPLING = {  # of a body: the field of SamplingParams
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "min_tokens": "min_tokens",
}
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


async def models(call: Call) -> Response:
    served = call.server.models.served.values()
    data = [{"id": s.name, "object": "model", "created": s.created, "owned_by": "tinyllm"} for s in served]
    return json_response({"object": "list", "data": data})


async def chat_completions(call: Call) -> Response:
    fields = await call.fields()
    streams = fields.take("stream", bool, False)
    options = fields.object("stream_options")
    usage = options.take("include_usage", bool, False) if options else False
    ask = _chat_ask(fields)
    fields.finish()
    if not streams:
        return await call.whole(ask, _chat_completion)
    return await call.events(ask, lambda answer: _chat_chunks(answer, usage))


def _chat_ask(fields: Fields) -> Ask:
    sampling = fields.renamed(SAMPLING)
    fields.harmless(*HARMLESS)
    return Ask(
        model=fields.take("model", str),
        messages=fields.need("messages", list),
        n=fields.take("n", int, 1),
        sampling=sampling,
    )


def _chat_completion(answer: Answer, completions: list[Completion]) -> dict[str, Any]:
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": c.text},
            "logprobs": None,
            "finish_reason": c.finish_reason,
        }
        for i, c in enumerate(completions)
    ]
    return _head(answer, "chat.completion") | {
        "choices": choices,
        "usage": usage_of(completions),
        **extras(completions),
    }


async def _chat_chunks(answer: Answer, usage: bool) -> AsyncIterator[str]:
    head = _head(answer, "chat.completion.chunk")

    def chunk(i: int, delta: dict[str, Any], reason: str | None = None) -> str:
        return event({**head, "choices": [{"index": i, "delta": delta, "finish_reason": reason}]})

    for i in range(answer.ask.n):
        yield chunk(i, {"role": "assistant", "content": ""})
    async for piece in answer.stream:
        if piece.text:
            yield chunk(piece.sample, {"content": str(piece)})
    completions = answer.stream.completions
    for i, c in enumerate(completions):
        yield chunk(i, {}, c.finish_reason)
    if usage:
        yield event({**head, "choices": [], "usage": usage_of(completions), **extras(completions)})
    yield event("[DONE]")


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": f"{kind.split('.')[0]}cmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": answer.name,
    }


def usage_of(completions: list[Completion]) -> dict[str, int]:
    prompt, made = len(completions[0].prompt_tokens), sum(len(c.tokens) for c in completions)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def extras(completions: list[Completion]) -> dict[str, Any]:
    """What every answer of ours carries beside its dialect's members: it can be made again from the seed."""
    return {"seed": completions[0].seed, "timings": asdict(completions[0].timings)}


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
        ("POST", "/v1/chat/completions", chat_completions),
    ],
    error,
    lambda refusal: event(error(refusal)),
)
