"""OpenAI's /v1/chat/completions.

Imports common.py, messages.py and the server's rooms.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from tinyllm import Completion, Piece
from tinyllm.server.answers import extras
from tinyllm.server.app import Answer, Call
from tinyllm.server.ask import Ask, Fields
from tinyllm.server.dialects.openai.common import (
    EFFORTS,
    HARMLESS,
    MOST_TOP,
    SAMPLING,
    chat_logprobs,
    form_of,
    function_of,
    own_form_of,
    sampling_of,
    tool_choice_of,
    usage_of,
    with_tops,
)
from tinyllm.server.dialects.openai.messages import messages_of
from tinyllm.server.streams import event

_SAMPLING = {**SAMPLING, "max_completion_tokens": "max_tokens"}
_UNSUPPORTED = ("audio", "prediction", "web_search_options", "moderation", "functions", "function_call")


async def chat_completions(call: Call) -> Response:
    fields = await call.fields()
    streams = fields.take("stream", bool, False)
    has_usage = stream_options(fields, streams)
    ask = _ask(fields)
    fields.finish()
    if streams:
        return await call.events(ask, lambda answer: _chunks(answer, has_usage))
    return await call.whole(ask, _whole)


def stream_options(fields: Fields, streams: bool) -> bool:
    """Whether a stream is to end with its usage."""
    if "stream_options" in fields and not streams:
        raise fields.refusal("stream_options", "is for streams: it needs stream to be true")
    options = fields.object("stream_options")
    if options is None:
        return False
    has_usage = options.take("include_usage", bool, False)
    options.harmless("include_obfuscation")
    options.finish()
    return has_usage


def _ask(fields: Fields) -> Ask:
    fields.harmless(*HARMLESS)
    fields.only("store", False, why="is not supported: chat completions are not kept")
    fields.only("verbosity", "medium")
    fields.only("modalities", ["text"], why="must be ['text']: this server writes text alone")
    for name in _UNSUPPORTED:
        fields.only(name)
    logprobs, top = fields.take("logprobs", bool, False), fields.take("top_logprobs", int, 0)
    if not 0 <= top <= MOST_TOP:
        raise fields.refusal("top_logprobs", f"is {top}, expected 0 to {MOST_TOP}")
    if top and not logprobs:
        raise fields.refusal("top_logprobs", "needs logprobs to be true")
    tools = [_tool(one) for one in fields.objects("tools") or ()]
    return Ask(
        model=fields.take("model", str),
        messages=messages_of(fields),
        n=fields.take("n", int, 1),
        sampling={
            **sampling_of(fields, _SAMPLING),
            **form_of(fields.object("response_format")),
            **own_form_of(fields),
            "logprobs": logprobs,
            "top_logprobs": top,
        },
        tools=[tool for tool, _ in tools],
        strict=any(strict for _, strict in tools),
        tool_choice=tool_choice_of(fields, _named),
        one_call=not fields.take("parallel_tool_calls", bool, True),
        chat_template=fields.take("chat_template", str),
        template_args=fields.take("chat_template_kwargs", dict, {}),
        effort=fields.word("reasoning_effort", *EFFORTS),
        replay=fields.take("replay", bool, False),
    )


def _tool(fields: Fields) -> tuple[dict[str, Any], bool]:
    fields.word("type", "function")
    function = function_of(fields.need_object("function"))
    fields.finish()
    return function


def _named(choice: Fields) -> str:
    function = choice.need_object("function")
    name = function.need("name", str)
    function.finish()
    return name


def _whole(answer: Answer, completions: list[Completion]) -> dict[str, Any]:
    choices = [
        {
            "index": i,
            "message": _message(c),
            "logprobs": _logprobs(answer, with_tops(c)) if answer.ask.sampling["logprobs"] else None,
            "finish_reason": _reason(c),
        }
        for i, c in enumerate(completions)
    ]
    return {
        **_head("chat.completion", answer),
        "choices": choices,
        "usage": usage_of([completions]),
        **extras(answer, completions),
    }


def _message(completion: Completion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
    if completion.reasoning is not None:
        message["reasoning_content"] = completion.reasoning
    if completion.tool_calls:
        message["content"] = completion.text or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for call in completion.tool_calls
        ]
    return message


def _reason(completion: Completion) -> str:
    if completion.finish_reason == "stop" and completion.tool_calls:
        return "tool_calls"
    return completion.finish_reason


async def _chunks(answer: Answer, has_usage: bool) -> AsyncIterator[str]:
    head = _head("chat.completion.chunk", answer) | ({"usage": None} if has_usage else {})
    has_logprobs = answer.ask.sampling["logprobs"]

    def chunk(
        i: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    late: set[tuple[int, int | None]] = set()  # calls whose id is not out yet
    for i in range(answer.ask.n):
        yield event(chunk(i, {"role": "assistant", "content": ""}))
    async for piece in answer.pieces():
        delta, logprobs = _delta(piece, late), None
        if has_logprobs and piece.token is not None:
            token = (piece.token, piece.logprob or 0.0, piece.top_logprobs)
            logprobs = _logprobs(answer, [token])
        if delta or logprobs:
            yield event(chunk(piece.sample, delta, logprobs))
    completions = answer.completions
    for i, c in enumerate(completions):
        last = extras(answer, completions) if i == answer.ask.n - 1 else {}
        yield event({**chunk(i, {}, None, _reason(c)), **last})
    if has_usage:
        yield event({**head, "choices": [], "usage": usage_of([completions])})
    yield event("[DONE]")


def _delta(piece: Piece, late: set[tuple[int, int | None]]) -> dict[str, Any]:
    if piece.kind == "reasoning":
        return {"reasoning_content": piece.text} if piece.text else {}
    if piece.kind == "tool_call":
        call = _call_delta(piece, late)
        return {"tool_calls": [{"index": piece.index, **call}]} if call else {}
    taken_back = {} if piece.index is None else {"retracted_tool_call": piece.index}
    return {**({"content": piece.text} if piece.text else {}), **taken_back}


def _call_delta(piece: Piece, late: set[tuple[int, int | None]]) -> dict[str, Any]:
    """The id and the name come first, then the arguments piece by piece. An id that the model writes after
    them comes last."""
    key = piece.sample, piece.index
    if piece.name:
        if not piece.call_id:
            late.add(key)
        function = {"name": piece.name, "arguments": piece.text}
        return {"id": piece.call_id or None, "type": "function", "function": function}
    call: dict[str, Any] = {"function": {"arguments": piece.text}} if piece.text else {}
    if piece.tool_call is not None and key in late:
        call["id"] = piece.tool_call.id
    return call


def _logprobs(answer: Answer, tokens: Any) -> dict[str, Any]:
    return {"content": chat_logprobs(answer.llm, tokens), "refusal": None}


def _head(kind: str, answer: Answer) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": answer.name,
    }
