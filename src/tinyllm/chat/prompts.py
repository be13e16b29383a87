"""From a conversation to the ids of its prompt.

Two rules of the house, both in words in docs/chat.md. The prompt begins with what the model's files put in
front of every text (BOS), exactly once, whether the template writes it or not. Only what the template wrote
is read as special tokens; their texts in messages, tools and documents are text (origins.py). Whatever was
asked for and cannot be had is said, once. Imports templates, origins, reasoning, files and errors; llm.py and
the inspection make a `Prompts`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
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


class Prompts:
    """Makes the ids of prompts, for one template and one vocabulary. Threads may share it."""

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary) -> None:
        self.template = template
        self._vocabulary = vocabulary
        self._reads_tools = False  # as far as is known
        self._said: set[tuple[str, str]] = set()  # what was warned of, and of which name

    def ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        special_in_messages: bool = False,
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a conversation's prompt. Raises what `ChatTemplate.render` does, and TemplateError where
        there is no prompt.

        special_in_messages: whether the texts of special tokens in messages, tools and documents are these
        tokens.
        """
        given = self.template.prepare(messages, tools=tools, **(template_args or {}))
        prompt = self.template.run(given)
        self._say_what_is_ignored(given, prompt, template_args or {})
        special = special_in_messages or self._of_template(given, prompt)
        ids = self._vocabulary.encode(prompt, bos=False, special=special)
        if not ids:
            raise TemplateError("the chat template renders nothing for these messages: there is no prompt")
        prefix = self._vocabulary.prefix
        return ids if ids[:1] == prefix[:1] else [*prefix, *ids]

    @cached_property
    def _origins(self) -> Origins:
        return Origins(self._vocabulary.special_tokens, self._vocabulary.find_special)

    def _of_template(self, given: Given, prompt: str) -> bool | Mapping[int, str]:
        """The special tokens of a prompt that the template wrote: offset -> text, or True for all there
        are."""
        data = {name: given.variables[name] for name in _DATA}
        spans = self._origins.in_texts(data)
        if not spans:
            return True

        def render(data: dict[str, Any]) -> str | None:
            try:
                return self.template.run(given.with_(**data))
            except TemplateError:
                return None

        every = self._origins.of_template(prompt)
        told, unsure = told_apart(self._origins, data, spans, prompt, render)
        self._say(
            "the %s does not let it be seen which %s in a prompt it wrote, and which stood in the messages: "
            "all are taken for special tokens",
            unsure,
        )
        said = [m.get("content") for m in given.variables["messages"] if m["role"] == "assistant"]
        found = {token for text in texts(said) for token in self._origins.of_template(text).values()}
        self._say(
            "in the prompt of the %s, %s in an assistant's message is text and no special token: give tool "
            "calls as tool_calls and reasoning as reasoning_content, or pass special_in_messages=True",
            found & self._marks if found else found,
        )
        return True if told == every else told

    @cached_property
    def _marks(self) -> set[str]:
        """The special tokens that `chat` leaves in its texts."""
        tokens = self._vocabulary.special_tokens
        shown = visible_ids(tokens)
        return {text for text, i in tokens.items() if i in shown}

    def _say_what_is_ignored(self, given: Given, prompt: str, template_args: Mapping[str, Any]) -> None:
        if template_args and (unread := template_args.keys() - self.template.names(given.source)):
            known = _listed(self.template.free_variables()) or "no such variable"
            self._say(f"the %s does not read %s, which template_args gives; it reads {known}", unread)
        forms = self.template.forms(given.source)
        for message in given.variables["messages"]:
            if message.get("tool_calls"):
                content = message.get("content")
                kind = "text" if content else "" if content == "" else None
                if not forms.writes_calls(kind):
                    beside = "a content" if content else "no content" if kind is None else "an empty content"
                    self._say(f"the %s writes nothing of %s into the prompt, beside {beside}", {"tool_calls"})
        if given.variables["tools"] and not self._reads_tools:
            try:
                self._reads_tools = self.template.run(given.with_(tools=None)) != prompt
            except TemplateError:
                self._reads_tools = True
            if not self._reads_tools:
                self._say("the %s writes nothing of %s into the prompt", {"tools"})

    def _say(self, message: str, names: Set[str]) -> None:
        """Warns of `names`, of each once."""
        new = sorted(name for name in names if (message, name) not in self._said)
        if new:
            self._said.update((message, name) for name in new)
            log.warning(message, self.template.name, _listed(new))


def _listed(names: Sequence[str]) -> str:
    return show_some([show_words(name, 100) for name in names])
