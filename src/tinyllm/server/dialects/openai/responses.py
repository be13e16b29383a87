"""OpenAI's /v1/responses: an answer as items, which a later request may go on from.

Conversations are kept in memory (server/kept.py) unless a request says store: false. Imports items.py,
output.py, common.py and the server's rooms.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from tinyllm import Completion, SamplingParams
from tinyllm.server.answers import extras
from tinyllm.server.app import Answer, Call, Server, told
from tinyllm.server.ask import Ask, Fields, Refusal
from tinyllm.server.dialects.openai.common import (
    EFFORTS,
    HARMLESS,
    MOST_TOP,
    SAMPLING,
    form_of,
    function_of,
    own_form_of,
    sampling_of,
    tool_choice_of,
)
from tinyllm.server.dialects.openai.items import input_of, output_messages
from tinyllm.server.dialects.openai.output import Output
from tinyllm.server.streams import event, json_response

_SAMPLING = {**SAMPLING, "max_output_tokens": "max_tokens"}
_LOGPROBS, _ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
_UNSUPPORTED = ("conversation", "prompt", "max_tool_calls", "context_management", "moderation", "image")


@dataclass(frozen=True)
class _Wishes:
    """What a request says beside its `Ask`. messages: the conversation that is kept with the answer, without
    instructions. shown: members that the answer repeats."""

    messages: Sequence[Mapping[str, Any]]
    stores: bool
    has_logprobs: bool
    shown: Mapping[str, Any]


async def create(call: Call) -> Response:
    fields = await call.fields()
    streams = fields.take("stream", bool, False)
    options = fields.object("stream_options")
    if options is not None:
        options.harmless("include_obfuscation")
        options.finish()
    ask, wishes = _ask(fields, call.server)
    fields.finish()
    if streams:
        return await call.events(ask, lambda answer: _events(call.server, answer, wishes))

    async def work() -> dict[str, Any]:
        async with call.server.answer(ask) as answer:
            output = Output(answer.llm, wishes.has_logprobs)
            async for piece in answer.pieces():
                for _ in output.take(piece):
                    pass
            for _ in output.end(_status(answer)):
                pass
            return _finished(call.server, answer, wishes, _head(answer, wishes), output)

    return await call.json(work())


async def retrieve(call: Call) -> Response:
    for name in call.request.query_params:
        raise Refusal(400, f"{name} is not supported here", param=name, code="unsupported_parameter")
    return json_response(_kept(call)["response"])


async def delete(call: Call) -> Response:
    response = _kept(call)["response"]
    call.server.kept.remove(response["id"])
    return json_response({"id": response["id"], "object": "response", "deleted": True})


def _kept(call: Call) -> Any:
    id = call.request.path_params["id"]
    kept = call.server.kept.get(id)
    if kept is None:
        raise Refusal(404, f"there is no response {id[:100]!r} here, or no longer", code="not_found")
    return kept


def _ask(fields: Fields, server: Server) -> tuple[Ask, _Wishes]:
    metadata, user = fields.take("metadata", dict, {}), fields.take("user", str)
    fields.harmless(*HARMLESS, "client_metadata")  # Codex says by it who it is
    fields.only("background", False)
    fields.only("truncation", "disabled", why="is not supported: a conversation that is too long is refused")
    for name in _UNSUPPORTED:
        fields.only(name)
    previous = fields.take("previous_response_id", str)
    messages = [*_history(server, previous), *input_of(fields)]
    instructions = fields.take("instructions", str)
    said = [] if instructions is None else [{"role": "system", "content": instructions}]
    include = _include(fields)
    top = fields.take("top_logprobs", int, 0)
    if not 0 <= top <= MOST_TOP:
        raise fields.refusal("top_logprobs", f"is {top}, expected 0 to {MOST_TOP}")
    has_logprobs = bool(top) or _LOGPROBS in include
    reasoning = fields.object("reasoning")
    effort = None if reasoning is None else _effort(reasoning)
    text = fields.object("text")
    given, form = ({"type": "text"}, {}) if text is None else _form(text)
    tools = [_tool(one) for one in fields.objects("tools") or ()]
    choice = tool_choice_of(fields, lambda named: named.need("name", str))
    one_call = not fields.take("parallel_tool_calls", bool, True)
    stores = fields.take("store", bool, True)
    sampling = sampling_of(fields, _SAMPLING)
    ask = Ask(
        model=fields.take("model", str),
        messages=[*said, *messages],
        sampling={
            **sampling,
            **form,
            **own_form_of(fields),
            "logprobs": has_logprobs,
            "top_logprobs": top,
        },
        tools=[tool for tool, _ in tools],
        strict=any(strict for _, strict in tools),
        tool_choice=choice,
        one_call=one_call,
        chat_template=fields.take("chat_template", str),
        template_args=fields.take("chat_template_kwargs", dict, {}),
        effort=effort,
        replay=fields.take("replay", bool, False),
    )
    is_word = choice in ("auto", "none", "required")
    shown = {
        "instructions": instructions,
        "max_output_tokens": sampling.get("max_tokens"),
        "max_tool_calls": None,
        "metadata": metadata,
        "parallel_tool_calls": not one_call,
        "previous_response_id": previous,
        "reasoning": {"effort": effort, "summary": None},
        "store": stores,
        "text": {"format": given},
        "tool_choice": choice if is_word else {"type": "function", "name": choice},
        "tools": [{"type": "function", **tool["function"], "strict": strict} for tool, strict in tools],
        "top_logprobs": top,
        "truncation": "disabled",
        "user": user,
    }
    return ask, _Wishes(messages, stores, has_logprobs, shown)


def _history(server: Server, previous: str | None) -> Sequence[Mapping[str, Any]]:
    if previous is None:
        return []
    kept = server.kept.get(previous)
    if kept is None:
        raise Refusal(
            400,
            f"there is no response {previous[:100]!r} here, or no longer: send the whole conversation",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    messages: list[Mapping[str, Any]] = kept["messages"]
    return messages


def _include(fields: Fields) -> list[Any]:
    """Reasoning comes in the clear, so that nothing of it has to be encrypted to be sent back."""
    include = fields.take("include", list, [])
    for one in include:
        if one not in (_LOGPROBS, _ENCRYPTED):
            raise fields.refusal("include", f"has {str(one)[:64]!r}, which is not supported")
    return include


def _effort(fields: Fields) -> str | None:
    """Reasoning comes whole, as the item's content; nobody makes a summary."""
    fields.only("summary", "auto")
    fields.only("generate_summary", "auto")
    effort = fields.word("effort", *EFFORTS)
    fields.finish()
    return effort


def _form(fields: Fields) -> tuple[Mapping[str, Any], dict[str, Any]]:
    fields.only("verbosity", "medium")
    given = fields.take("format", dict, {"type": "text"})
    fields.finish()
    return given, form_of(Fields(given, "text.format."))


def _tool(fields: Fields) -> tuple[dict[str, Any], bool]:
    if fields.word("type", "function") is None:
        raise fields.refusal("type", "is missing", code="missing_required_parameter")
    return function_of(fields)


def _head(answer: Answer, wishes: _Wishes) -> dict[str, Any]:
    """A response that has begun."""
    params = SamplingParams(**answer.ask.sampling).resolve(answer.llm.defaults)
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": answer.name,
        "output": [],
        "temperature": params.temperature,
        "top_p": params.top_p,
        "usage": None,
        **wishes.shown,
    }


def _status(answer: Answer) -> str:
    return "incomplete" if answer.completions[0].finish_reason == "length" else "completed"


def _finished(
    server: Server, answer: Answer, wishes: _Wishes, head: dict[str, Any], output: Output
) -> dict[str, Any]:
    """The whole response, which is kept."""
    status, completion = _status(answer), answer.completions[0]
    response = {
        **head,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": output.items,
        "usage": _usage(completion, output),
        **extras(answer, [completion]),
    }
    if wishes.stores:
        messages = [*wishes.messages, *output_messages(output.items)]
        server.kept.put(head["id"], {"response": response, "messages": messages})
    return response


def _usage(completion: Completion, output: Output) -> dict[str, Any]:
    n_in, n_out = len(completion.prompt_tokens), len(completion.tokens)
    return {
        "input_tokens": n_in,
        "input_tokens_details": {"cached_tokens": completion.timings.cached_tokens},
        "output_tokens": n_out,
        "output_tokens_details": {"reasoning_tokens": output.reasoning_tokens},
        "total_tokens": n_in + n_out,
    }


async def _events(server: Server, answer: Answer, wishes: _Wishes) -> AsyncIterator[str]:
    n = 0

    def numbered(part: dict[str, Any]) -> str:
        nonlocal n
        n += 1
        return event({**part, "sequence_number": n - 1}, part["type"])

    head, output = _head(answer, wishes), Output(answer.llm, wishes.has_logprobs)
    yield numbered({"type": "response.created", "response": head})
    yield numbered({"type": "response.in_progress", "response": head})
    try:
        async for piece in answer.pieces():
            for part in output.take(piece):
                yield numbered(part)
    except Exception as error:
        refusal = told(error)
        failed = {"code": "server_error", "message": refusal.message}
        response = {**head, "status": "failed", "error": failed, "output": output.items}
        yield numbered({"type": "response.failed", "response": response})
        return
    status = _status(answer)
    for part in output.end(status):
        yield numbered(part)
    response = _finished(server, answer, wishes, head, output)
    yield numbered({"type": f"response.{status}", "response": response})
