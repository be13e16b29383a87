"""Conversations with calls of tools, made fit for a template that may not know them.

Some templates show no tools, some write no calls, and say nothing about it. What a template leaves out is put
into its messages: the tools into a system message, calls and results into texts. Imports formats, shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tinyllm.chat.tools.formats import GENERIC, Format
from tinyllm.chat.tools.scan import Malformed
from tinyllm.chat.tools.shapes import ToolCall
from tinyllm.chat.tools.values import loads
from tinyllm.errors import ArgumentError

Message = Mapping[str, Any]


def instructions(format: Format, tools: Sequence[Mapping[str, Any]]) -> str:
    """The text that tells a model of tools, for a template that does not."""
    example = format.shape.write([ToolCall(format.id_of(0, "NAME"), "NAME", {"PARAMETER": "VALUE"})])
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions, given as JSON schemas:\n{described}\n"
        f"To call one, answer with nothing but this, the parts in capitals filled in:\n{example}\n"
        "Call a function only where it helps; else answer as usual."
    )


def conversation(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    format: Format,
    template: str,
    *,
    shows_tools: bool,
) -> list[dict[str, Any]]:
    """The messages as a template can take them.

    Calls (OpenAI's dicts, or `ToolCall`) get their arguments as dicts, which templates write, and an
    assistant's content of None becomes "". template: its text, to see whether it writes calls and results.
    shows_tools: whether it shows the tools it is given; if not, `instructions` join the system message.
    Raises ArgumentError for a call that is none.
    """
    writes_calls = "tool_calls" in template
    knows_results = format is not GENERIC and (
        "'tool'" in template or '"tool"' in template or not writes_calls
    )
    made: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        one = dict(message)
        if one.get("tool_calls"):
            calls = [_call(call, f"messages[{i}]") for call in one.pop("tool_calls")]
            one["content"] = one.get("content") or ""
            if writes_calls:
                one["tool_calls"] = [as_message_call(call) for call in calls]
            else:
                one["content"] += ("\n" if one["content"] else "") + format.shape.write(calls)
        if one.get("role") == "tool" and not knows_results:
            one = {"role": "user", "content": f"The function returned: {one.get('content')}"}
        made.append(one)
    if tools and not shows_tools:
        text = instructions(format, tools)
        if made and made[0].get("role") == "system":
            made[0]["content"] = f"{made[0]['content']}\n\n{text}"
        else:
            made.insert(0, {"role": "system", "content": text})
    return made


def as_message_call(call: ToolCall) -> dict[str, Any]:
    """A call as templates know it. OpenAI's own has the arguments as a text."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def count_calls(messages: Sequence[Message]) -> int:
    """How many calls a conversation has."""
    return sum(len(message.get("tool_calls") or ()) for message in messages)


def _call(call: Any, where: str) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ArgumentError(f"{where}: {str(call)[:80]!r} is no call of a tool; append those of a completion")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = loads(arguments)
        except Malformed as e:
            raise ArgumentError(f"{where}: the call of {function['name']}: {e}") from None
    if not isinstance(arguments, Mapping):
        raise ArgumentError(f"{where}: the arguments of {function['name']} are no dict")
    return ToolCall(str(call.get("id") or ""), function["name"], dict(arguments))
