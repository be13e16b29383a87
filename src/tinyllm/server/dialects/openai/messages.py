"""The messages of OpenAI's chat, checked member by member, as `LLM.chat` takes them.

Imports ask.py.
"""

from __future__ import annotations

from typing import Any

from tinyllm.server.ask import Fields

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXTS = ("text", "input_text", "output_text")


def messages_of(fields: Fields) -> list[dict[str, Any]]:
    messages = fields.objects("messages")
    if not messages:
        raise fields.refusal("messages", "must have a message", code="missing_required_parameter")
    return [_message(message) for message in messages]


def _message(fields: Fields) -> dict[str, Any]:
    role = role_of(fields)
    message: dict[str, Any] = {"role": role}
    if (content := content_of(fields, "content")) is not None:
        message["content"] = content
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking"):
        if (text := fields.take(name, str)) is not None:
            message[name] = text
    if calls := fields.objects("tool_calls"):
        message["tool_calls"] = [_call(call) for call in calls]
    if role != "assistant" and content is None:
        raise fields.refusal("content", "is missing", code="missing_required_parameter")
    fields.harmless("id", "annotations")  # of an answer that comes back
    for name in ("audio", "refusal", "function_call"):
        fields.only(name)
    fields.finish()
    return message


def role_of(fields: Fields) -> str:
    """A developer's messages are what other makers call the system's."""
    if "role" not in fields:
        raise fields.refusal("role", "is missing", code="missing_required_parameter")
    role = fields.word("role", *ROLES, default="")
    return "system" if role == "developer" else role


def content_of(fields: Fields, name: str) -> str | list[dict[str, Any]] | None:
    """A text, or the list of its parts; None where it is left out."""
    if not fields.is_list(name):
        return fields.take(name, str)
    return [{"type": "text", "text": _part(part)} for part in fields.objects(name) or ()]


def _part(fields: Fields) -> str:
    kind = fields.take("type", str, "text")
    if kind not in _TEXTS:
        raise fields.refusal(
            "type", f"is {kind[:64]!r}: this server reads text alone", code="unsupported_type"
        )
    text = fields.need("text", str)
    fields.harmless("annotations", "logprobs", "cache_control", "prompt_cache_breakpoint")
    fields.finish()
    return text


def _call(fields: Fields) -> dict[str, Any]:
    fields.word("type", "function")
    fields.harmless("index")
    function = fields.need_object("function")
    call = {
        "id": fields.take("id", str, ""),
        "type": "function",
        "function": {"name": function.need("name", str), "arguments": function.take("arguments", str, "")},
    }
    function.finish()
    fields.finish()
    return call
