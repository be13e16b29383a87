"""From a conversation to the ids of its prompt.

Two rules of the house, both in words in docs/chat.md. The prompt begins with what the model's files put in
front of every text (BOS), exactly once, whether the template writes it or not. Only what the template wrote
is read as special tokens; their texts in messages, tools and documents are text (origins.py). Whatever was
asked for and cannot be had is said, once a template. Imports templates, origins, reasoning and errors;
llm.py and the inspection call `prompt_ids`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol

from tinyllm.chat.origins import Origins, texts, told_apart
from tinyllm.chat.reasoning import visible_ids
from tinyllm.chat.templates import ChatTemplate, Given, Message
from tinyllm.errors import TemplateError
from tinyllm.files import show_some, show_words

log = logging.getLogger(__name__)

_DATA = ("messages", "tools", "documents")  # of others, or from them


class Vocabulary(Protocol):
    """What this asks of a tokenizer; `Tokenizer` is one."""

    special_tokens: dict[str, int]

    @property
    def prefix(self) -> list[int]: ...

    def encode(
        self, text: str, bos: bool | None = None, special: bool | Mapping[int, str] = False
    ) -> list[int]: ...

    def find_special(self, text: str, start: int = 0) -> tuple[int, str] | None: ...


def prompt_ids(
    template: ChatTemplate,
    vocabulary: Vocabulary,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    special_in_messages: bool = False,
    template_args: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids of the prompt that `template` makes of a conversation. Raises what `ChatTemplate.render` does,
    and TemplateError where there is no prompt.

    special_in_messages: whether the texts of special tokens in messages, tools and documents are these
    tokens.
    """
    given = template.prepare(messages, tools=tools, **(template_args or {}))
    prompt = template.run(given)
    _say_what_is_ignored(template, given, prompt, template_args or {})
    special: bool | Mapping[int, str] = True
    if not special_in_messages:
        special = _of_template(template, vocabulary, given, prompt)
    ids = vocabulary.encode(prompt, bos=False, special=special)
    if not ids:
        raise TemplateError("the chat template renders nothing for these messages: there is no prompt")
    prefix = vocabulary.prefix
    return ids if ids[:1] == prefix[:1] else [*prefix, *ids]


def _of_template(
    template: ChatTemplate, vocabulary: Vocabulary, given: Given, prompt: str
) -> bool | Mapping[int, str]:
    """The special tokens of a prompt that the template wrote: offset -> text, or True for all there are."""
    origins = Origins(vocabulary.special_tokens, vocabulary.find_special)
    data = {name: given.variables[name] for name in _DATA}
    spans = origins.in_texts(data)
    if not spans:
        return True

    def render(data: dict[str, Any]) -> str | None:
        try:
            return template.run(given.with_(**data))
        except TemplateError:
            return None

    every = origins.of_template(prompt)
    told = told_apart(origins, data, spans, prompt, render)
    if told is None:
        unsure = {token for token in every.values() if any(token in text for text in spans)}
        _say(
            template,
            "the %s does not let it be seen which %s in a prompt it wrote, and which stood in the messages: "
            "all are taken for special tokens",
            unsure,
        )
        return True
    said = [m.get("content") for m in given.variables["messages"] if m["role"] == "assistant"]
    marks = visible_ids(vocabulary.special_tokens)
    found = {token for text in texts(said) for token in origins.of_template(text).values()}
    _say(
        template,
        "in the prompt of the %s, %s in an assistant's message is text and no special token: give tool calls "
        "as tool_calls and reasoning as reasoning_content, or pass special_in_messages=True",
        {token for token in found if vocabulary.special_tokens[token] in marks},
    )
    return True if told == every else told


def _say_what_is_ignored(
    template: ChatTemplate, given: Given, prompt: str, template_args: Mapping[str, Any]
) -> None:
    known = _listed(template.free_variables()) or "no such variable"
    _say(
        template,
        f"the %s does not read %s, which template_args gives; it reads {known}",
        template_args.keys() - template.names(given.source),
    )
    forms = template.forms(given.source)
    for message in given.variables["messages"]:
        if message.get("tool_calls"):
            content = message.get("content")
            kind = "text" if content else "" if content == "" else None
            if not forms.writes_calls(kind):
                what = {"text": "a content", "": "an empty content"}.get(kind or "", "no content")
                _say(template, f"the %s writes nothing of %s into the prompt, beside {what}", {"tool_calls"})
    if given.variables["tools"] and not template.reads_tools:
        try:
            template.reads_tools = template.run(given.with_(tools=None)) != prompt
        except TemplateError:
            template.reads_tools = True
        if not template.reads_tools:
            _say(
                template,
                "the %s writes nothing of %s into the prompt: the model does not know them",
                {"tools="},
            )


def _say(template: ChatTemplate, message: str, names: Set[str]) -> None:
    """Warns of `names`, of each once a template."""
    new = sorted(name for name in names if (message[:40], name) not in template.said)
    if new:
        template.said.update((message[:40], name) for name in new)
        log.warning(message, template.name, _listed(new))


def _listed(names: Sequence[str]) -> str:
    return show_some([show_words(name, 100) for name in names])
