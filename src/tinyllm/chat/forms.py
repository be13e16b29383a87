"""From the messages that clients send to those that a template takes.

Clients write one thing in several ways: a content as a text or as a list of parts, the arguments of a tool
call as JSON or as an object, nothing as null. A template was written for some of them, and prints the others
as Python does, or loses them. Which it takes is seen from what it makes of small conversations (`Forms`),
never from a model's name. What it takes anyway reaches it as it came. Imports errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, Literal

from tinyllm.errors import ArgumentError, TemplateError, UnsupportedError

Messages = list[dict[str, Any]]
Render = Callable[[Messages, list[dict[str, Any]] | None], str]
"""The prompt for messages and tools; TemplateError where the template does not take them, StoppedError
where it does too much."""


class StoppedError(TemplateError):
    """A template went past its limits."""


# The field of an assistant's message that holds what it thought, by the names that clients give it. Templates
# read the first; those of gpt-oss read the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MAX_NESTING = 64  # of lists and dicts
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA_PARTS = (
    "image",
    "image_url",
    "input_image",
    "audio",
    "audio_url",
    "input_audio",
    "video",
    "video_url",
)

_QUESTION, _ANSWER, _NAME, _KEY, _VALUE, _FOUND = "Qwhat", "Qthat", "Qlook_up", "Qword", "Qtiny", "Qfound"
_CALL_ID = "abcdefghi"  # some templates want nine letters
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "The word."}},
            "required": [_KEY],
        },
    },
}


class Forms:
    """The forms that one template takes, each found when it is first asked for. Threads may share it.

    render: the template's own, without what this module does to messages. source: the template's.
    """

    def __init__(self, render: Render, source: str) -> None:
        self._knows_parts = re.search(r"\btext\b", source) is not None  # the key of a part's text
        self._render: Render | None = render
        self.content = cache(self._content)
        self.arguments = cache(self._arguments)
        self.without_content = cache(self._without_content)
        self.writes_calls = cache(self._writes_calls)

    def _content(self, role: str) -> Literal["text", "parts", "either"]:
        """What the content of a message of `role` is to be. "text" as well where it does not come out."""
        if not self._knows_parts:
            return "text"
        for conversation, tools in _conversations(role):
            by_text = self._try(conversation("Qone Qtwo"), tools) or ""
            by_parts = self._try(conversation(_parts("Qone", "Qtwo")), tools) or ""
            takes_text = "Qone Qtwo" in by_text
            if _has(by_parts, "Qone", "Qtwo") and not _shows_parts(by_parts, by_text):
                return "either" if takes_text else "parts"
            if takes_text:
                return "text"
        return "text"

    def _arguments(self) -> Literal["object", "text", "either"]:
        """What the arguments of a tool call are to be. "either": the prompt is the same, or neither comes
        out."""
        given = {_KEY: _VALUE}
        for content, tools in _ways_to_call():
            by_object, by_text = (
                self._try(_called(form, content), tools) for form in (given, json.dumps(given))
            )
            takes_object = by_object is not None and _has(by_object, _KEY, _VALUE)
            takes_text = by_text is not None and _has(by_text, _KEY, _VALUE)
            if takes_object and takes_text and by_object == by_text:
                return "either"
            if takes_object and (not takes_text or str(given) not in str(by_object)):
                return "object"
            if takes_text:
                return "text"
        return "either"

    def _without_content(self) -> dict[str, Any]:
        """The content of an assistant's message that has tool calls and no content: no such key, where the
        calls come out then, as transformers has it; else null or an empty text."""
        prompts = [(self._prompts_of_a_call(content), content) for content in _NOTHING]
        for wanted in ((_NAME, _VALUE), ()):
            for found, content in prompts:
                if any(_has(prompt, *wanted) and not re.search("None|null", prompt) for prompt in found):
                    return content
        return {}

    def _writes_calls(self, content: str | None) -> bool:
        """Whether tool calls come out in an assistant's message with this content; None: with none at all."""
        given = self.without_content() if content is None else {"content": content}
        return any(_has(prompt, _NAME, _VALUE) for prompt in self._prompts_of_a_call(given))

    def _prompts_of_a_call(self, content: dict[str, Any]) -> list[str]:
        """Prompts with a tool call, with and without the tool itself, where the template takes them."""
        arguments: Any = {_KEY: _VALUE}
        if self.arguments() == "text":
            arguments = json.dumps(arguments)
        prompts = [self._try(_called(arguments, content), tools) for tools in ([_TOOL], None)]
        return [prompt for prompt in prompts if prompt is not None]

    def _try(self, messages: Messages, tools: list[dict[str, Any]] | None) -> str | None:
        if self._render is None:
            return None
        try:
            return self._render(messages, tools)
        except StoppedError:
            self._render = None  # it would do so each time
        except TemplateError:
            pass
        return None


_NOTHING: list[dict[str, Any]] = [{}, {"content": None}, {"content": ""}]


def _has(prompt: str, *texts: str) -> bool:
    return all(text in prompt for text in texts)


def _shows_parts(prompt: str, one: str) -> bool:
    """Whether a prompt shows a list as such, in Python's form or in JSON, unlike the prompt of one text."""
    return any(prompt.count(sign) > one.count(sign) for sign in ("'type'", '"type"', "'text'", '"text"'))


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _user(content: Any = _QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _called(arguments: Any, content: dict[str, Any], found: Any = _FOUND) -> Messages:
    call = {"id": _CALL_ID, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": _CALL_ID, "name": _NAME, "content": found}
    return [_user(), {"role": "assistant", **content, "tool_calls": [call]}, result]


def _ways_to_call() -> Iterator[tuple[dict[str, Any], list[dict[str, Any]] | None]]:
    for tools in ([_TOOL], None):
        for content in reversed(_NOTHING):
            yield content, tools


_Conversation = Callable[[Any], Messages]  # of the content of one message in it


def _conversations(role: str) -> Iterator[tuple[_Conversation, list[dict[str, Any]] | None]]:
    """Conversations with a message of `role`, and the tools given with them."""

    def said(content: Any) -> dict[str, Any]:
        return {"role": role, "content": content}

    if role == "tool":
        for content, tools in _ways_to_call():
            for arguments in ({_KEY: _VALUE}, json.dumps({_KEY: _VALUE})):
                yield partial(_called, arguments, content), tools
    for question in (_QUESTION, _parts(_QUESTION)):
        user = _user(question)
        yield lambda content: [said(content)], None
        yield partial(lambda content, user: [said(content), user], user=user), None
        yield partial(lambda content, user: [user, said(content)], user=user), None
        yield partial(lambda content, user: [user, said(content), user], user=user), None


def as_taken(messages: Messages, forms: Forms) -> Messages:
    """`messages` in the forms that a template takes; others' are not changed.

    Null counts as not given. Reasoning is there under the names that templates read, as in transformers 5.
    Raises ArgumentError for arguments that are no JSON object where one is needed, UnsupportedError for
    parts that are no text.
    """
    return [_message(message, forms, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: dict[str, Any], forms: Forms, where: str) -> dict[str, Any]:
    taken = {key: value for key, value in message.items() if value is not None}
    thought = next((taken[name] for name in _REASONING if name in taken), None)
    if thought is not None:
        taken = {"thinking": thought, **taken, "reasoning_content": thought}
    content = taken.get("content")
    if isinstance(content, list):
        taken["content"] = _content(content, taken["role"], forms, f"{where}['content']")
    elif isinstance(content, str) and content and forms.content(taken["role"]) == "parts":
        taken["content"] = _parts(content)
    calls = taken.get("tool_calls")
    if isinstance(calls, list) and calls:
        taken["tool_calls"] = [
            _call(call, forms, f"{where}['tool_calls'][{i}]") for i, call in enumerate(calls)
        ]
        if "content" not in taken:
            taken |= forms.without_content()
    return taken


def _content(parts: list[Any], role: str, forms: Forms, where: str) -> Any:
    for i, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type") in _MEDIA_PARTS:
            raise UnsupportedError(
                f"{where}[{i}] is of type {part['type']!r}; tinyllm reads text: leave it out, or describe it"
            )
    if forms.content(role) != "text":
        return parts
    texts = [_text_of(part) for part in parts]
    if None in texts:
        i = texts.index(None)
        kind = parts[i].get("type") if isinstance(parts[i], dict) else type(parts[i]).__name__
        raise UnsupportedError(
            f"{where}[{i}] is of type {kind!r}, and this model's chat template takes texts in a message of "
            f"role {role!r}"
        )
    return "".join(text for text in texts if text is not None)


def _text_of(part: Any) -> str | None:
    if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS:
        part = part.get("text")
    return part if isinstance(part, str) else None


def _call(call: Any, forms: Forms, where: str) -> Any:
    """A tool call with its arguments in the form that the template takes."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _call(call["function"], forms, f"{where}['function']")}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and forms.arguments() == "object":
        return call | {"arguments": _parsed(arguments, f"{where}['arguments']")}
    if isinstance(arguments, dict) and forms.arguments() == "text":
        return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    return call


def _parsed(arguments: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ArgumentError(
            f"{where} is the text {arguments[:60]!r}, which is no JSON object, and the model's chat template "
            "needs one"
        )
    return value


def check_unicode(text: str) -> None:
    """Raises UnicodeEncodeError for half a surrogate pair, which no tokenizer takes."""
    if not text.isascii():
        text.encode()


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of dict, list, str, int, float, bool and None: all that a template can get at."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        try:
            check_unicode(value)
        except UnicodeEncodeError as e:
            raise ArgumentError(f"{where} is no valid text: {e}") from None
        return str.__str__(value)
    if depth < _MAX_NESTING and isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if depth < _MAX_NESTING and isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if depth >= _MAX_NESTING:
        raise TypeError(f"{where.partition('[')[0]} is nested deeper than {_MAX_NESTING} levels")
    raise TypeError(
        f"{where} is a {type(value).__name__}; templates take plain data (dict, list, str, numbers)"
    )
