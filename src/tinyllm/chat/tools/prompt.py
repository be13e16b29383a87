"""Conversations with tools and calls, rendered so that nothing of them is lost.

Templates differ in how they want calls, and what one does not know it leaves out without a word. So the
conversation is rendered with marks in place of names and results first: the first way of putting it in which
every mark is seen is the one that is used. Imports formats, shapes, values, chat's templates, errors.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tinyllm.chat.templates import ChatTemplate, Message
from tinyllm.chat.tools.formats import GENERIC, Format
from tinyllm.chat.tools.scan import Malformed
from tinyllm.chat.tools.shapes import ToolCall
from tinyllm.chat.tools.values import loads
from tinyllm.errors import ArgumentError, TemplateError

log = logging.getLogger(__name__)

_warned: weakref.WeakSet[ChatTemplate] = weakref.WeakSet()

Messages = list[dict[str, Any]]


def render(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    format: Format,
    **variables: Any,
) -> str:
    """The prompt, as `ChatTemplate.render` makes it, that shows all tools, calls and results.

    messages: as OpenAI writes them; the calls of an assistant may be `ToolCall`s. tools: of `as_tools`. What
    the template does not show is put into texts: tools into the system message, or the first user's where
    there can be none, which is warned of once; calls into the assistant's content, results into a user's
    message. A template that takes one call a message gets each with its result. Raises ArgumentError for a
    call that is none, and what `ChatTemplate.render` raises.
    """
    messages, told = arranged(template, messages, tools, format, **variables)
    return template.render(messages, tools=told, **variables)


def arranged(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    format: Format,
    **variables: Any,
) -> tuple[Sequence[Message], Sequence[Mapping[str, Any]] | None]:
    """The messages and the tools to render, so that nothing of them is lost; see `render`. The tools are None
    where the template shows none."""
    if not messages or isinstance(messages, str) or not all(isinstance(m, Mapping) for m in messages):
        return messages, tools  # rendering them says what is wrong
    plain = _plain(messages, format)
    marked, marks = _marked(plain)
    marked_tools = [_renamed(tool, f"zqt{i}zq") for i, tool in enumerate(tools)]
    error: TemplateError | None = None
    for real, probe in zip(_ways(plain, format), _ways(marked, format), strict=True):
        try:
            shown = template.render(probe, tools=marked_tools, **variables)
            if not all(mark in shown for mark in marks):
                continue
            shows_tools = all(f"zqt{i}zq" in shown for i in range(len(tools)))
            if not tools or (shows_tools and format is not GENERIC):
                return real, tools
            return _told(template, real, tools, format, variables, shows_tools)
        except TemplateError as e:
            error = error or e
    raise error or TemplateError(
        f"the {template.name} leaves out calls of tools or their results, in whatever way they are put; pass "
        "another one as chat_template="
    )


def instructions(format: Format, tools: Sequence[Mapping[str, Any]]) -> str:
    """The text that tells a model of tools where its template does not."""
    example = format.shape.write([ToolCall(format.id_of(0, "NAME"), "NAME", {"PARAMETER": "VALUE"})])
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions, given as JSON schemas:\n{described}\n"
        f"To call one, answer with nothing but this, the parts in capitals filled in:\n{example}\n"
        "Call a function only where it helps; else answer as usual."
    )


def as_message_call(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI's messages hold it, but for its arguments, which they write as a text."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def count_calls(messages: Sequence[Message]) -> int:
    """How many calls a conversation has."""
    return sum(len(message.get("tool_calls") or ()) for message in messages)


def _told(
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]],
    format: Format,
    variables: Mapping[str, Any],
    shows_tools: bool,
) -> tuple[Messages, Sequence[Mapping[str, Any]] | None]:
    """The messages with the tools in one of them, for a template that does not show them or says in no known
    format how to call them."""
    if template not in _warned:
        _warned.add(template)
        what = "calls tools in no format that is known" if format is GENERIC else "shows no tools"
        log.warning(
            "the %s %s: a message tells the model of them, and to call them by %s; it may not have been "
            "trained for that",
            template.name,
            what,
            format.name,
        )
    text = instructions(format, tools)
    told = tools if shows_tools else None
    first = messages[0]
    if first.get("role") == "system":
        given = [{**first, "content": f"{first.get('content') or ''}\n\n{text}"}, *messages[1:]]
    else:
        given = [{"role": "system", "content": text}, *messages]
    try:
        shown = template.render(given, tools=told, **variables)
        if text.splitlines()[0] in shown:
            return given, told
    except TemplateError:  # some have no system message
        if first.get("role") == "system":
            raise
    if first.get("role") != "user" or not isinstance(first.get("content"), str):
        raise TemplateError(
            f"the {template.name} shows no tools and takes no system message that could tell of them"
        )
    given = [{**first, "content": f"{text}\n\n{first['content']}"}, *messages[1:]]
    return given, told


def _plain(messages: Sequence[Message], format: Format) -> Messages:
    """Copies in which calls are dicts with an id and arguments that are dicts, and results have the id of
    their call. A result that came without is that of the first call before it that has none, of its name if
    it says one."""
    made, n = [], 0
    open_calls: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        one = dict(message)
        if one.get("tool_calls"):
            calls = [_call(call, f"messages[{i}]") for call in one["tool_calls"]]
            one["tool_calls"] = [
                as_message_call(ToolCall(c.id or format.id_of(n + k, c.name), c.name, c.arguments))
                for k, c in enumerate(calls)
            ]
            n += len(calls)
            open_calls = list(one["tool_calls"])
        if one.get("role") == "tool":
            id, name = one.get("tool_call_id"), one.get("name")
            is_own = [id == c["id"] if id else name in (None, c["function"]["name"]) for c in open_calls]
            if True in is_own:
                one["tool_call_id"] = open_calls.pop(is_own.index(True))["id"]
        made.append(one)
    return made


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


def _marked(messages: Messages) -> tuple[Messages, list[str]]:
    """The messages with a mark for each call's name and each result, and the marks."""
    marks: list[str] = []

    def mark() -> str:
        marks.append(f"zq{len(marks)}zq")
        return marks[-1]

    made = []
    for message in messages:
        one = dict(message)
        if one.get("tool_calls"):
            one["tool_calls"] = [_renamed(call, mark()) for call in one["tool_calls"]]
        if one.get("role") == "tool" and isinstance(one.get("content"), str):
            one["content"] = mark()
        made.append(one)
    return made, marks


def _renamed(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tool or a call under another name."""
    return {**value, "function": {**value["function"], "name": name}}


def _ways(messages: Messages, format: Format) -> Iterator[Messages]:
    """The ways to put calls and results, the most usual first."""
    if not any(message.get("tool_calls") or message.get("role") == "tool" for message in messages):
        yield messages
        return
    if format is not GENERIC:
        has_several = any(len(message.get("tool_calls") or ()) > 1 for message in messages)
        for way in [messages, _one_each(messages)] if has_several else [messages]:
            for empty in ("", None):
                for as_text in (False, True):
                    yield [_native(message, empty, as_text) for message in way]
        yield [_written(message, format) for message in messages]
    yield _told_by_user([_written(message, format) for message in messages])


def _native(message: dict[str, Any], empty: str | None, as_text: bool) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = message["tool_calls"]
    if as_text:
        texts = [json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in calls]
        calls = [
            {**call, "function": {**call["function"], "arguments": text}}
            for call, text in zip(calls, texts, strict=True)
        ]
    return {**message, "content": message.get("content") or empty, "tool_calls": calls}


def _told_by_user(messages: Messages) -> Messages:
    """Results as the user's words, those that come together in one message."""
    made: Messages = []
    after_result = False
    for message in messages:
        is_result = message.get("role") == "tool"
        if is_result:
            text = f"The function returned: {message.get('content')}"
            if after_result:
                text = f"{made.pop()['content']}\n\n{text}"
            message = {"role": "user", "content": text}
        made.append(message)
        after_result = is_result
    return made


def _written(message: dict[str, Any], format: Format) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [
        ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]
    ]
    content = message.get("content") or ""
    text = f"{content}\n{format.shape.write(calls)}" if content else format.shape.write(calls)
    return {"role": "assistant", "content": text}


def _one_each(messages: Messages) -> Messages:
    """Messages with several calls as one for each, followed by its result."""
    made: Messages = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls") or []
        results = []
        while calls and rest and rest[0].get("role") == "tool":
            results.append(rest.pop(0))
        for i, call in enumerate(calls):
            made.append(
                {**message, "content": message.get("content") if i == 0 else "", "tool_calls": [call]}
            )
            own = [r for r in results if r.get("tool_call_id") == call["id"]] or results[:1]
            made += own[:1]
            results = [r for r in results if r is not own[0]] if own else results
        made += results if calls else [message]
    return made
