"""The items of /v1/responses as the messages of a conversation.

What the assistant thought, said and called comes as an item each, and is one message here. Imports
messages.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tinyllm.server.ask import Fields
from tinyllm.server.dialects.openai.messages import content_of, role_of

_OF_ANSWERS = ("id", "status", "phase")  # of an item that comes back


def input_of(fields: Fields) -> list[dict[str, Any]]:
    """The messages of `input`: a text, or items."""
    if not fields.is_list("input"):
        return [{"role": "user", "content": fields.need("input", str)}]
    return messages_of_items(fields.objects("input") or [])


def output_messages(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of an answer's own items."""
    return messages_of_items(Fields(dict(item)) for item in items)


def messages_of_items(items: Iterable[Fields]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item.word("type", *_READERS, default="message")
        made = _READERS[kind](item)
        item.harmless(*_OF_ANSWERS)
        item.finish()
        last = messages[-1] if messages else {}
        if made["role"] == last.get("role") == "assistant" and _goes_on(last, made):
            calls = last.get("tool_calls", []) + made.get("tool_calls", [])
            last.update(made, **({"tool_calls": calls} if calls else {}))
        else:
            messages.append(made)
    return messages


def _goes_on(last: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    """Whether an assistant's item belongs to the message before: thoughts, words and calls, in this order."""
    if "tool_calls" in made:
        return True
    return "tool_calls" not in last and "content" not in last and "content" in made


def _message(item: Fields) -> dict[str, Any]:
    role, content = role_of(item), content_of(item, "content")
    if content is None:
        raise item.refusal("content", "is missing", code="missing_required_parameter")
    if role == "tool":
        raise item.refusal("role", "is 'tool': results are items of the type 'function_call_output'")
    return {"role": role, "content": content}


def _call(item: Fields) -> dict[str, Any]:
    function = {"name": item.need("name", str), "arguments": item.need("arguments", str)}
    call = {"id": item.need("call_id", str), "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}


def _result(item: Fields) -> dict[str, Any]:
    message = {"role": "tool", "tool_call_id": item.need("call_id", str)}
    if (content := content_of(item, "output")) is None:
        raise item.refusal("output", "is missing", code="missing_required_parameter")
    if name := item.take("name", str):
        message["name"] = name
    return {**message, "content": content}


def _reasoning(item: Fields) -> dict[str, Any]:
    """Its text; a summary stands in where there is none."""
    item.only("encrypted_content", why="cannot be read here: send the item with its content")
    texts = {"content": "", "summary": ""}
    for name in texts:
        for part in item.objects(name) or ():
            part.word("type", "reasoning_text", "summary_text")
            texts[name] += part.need("text", str)
            part.finish()
    return {"role": "assistant", "reasoning_content": texts["content"] or texts["summary"]}


_READERS = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _result,
    "reasoning": _reasoning,
}
