"""What a chat's answer may call, and the splitter that tells reasoning, text and calls apart.

A `Calling` is made once a chat, `Calling.splitter` once an answer: the reasoning splitter first, then
`CallSplitter` for what that calls text. So the engine knows one splitter. Hidden tokens stand between texts,
never within a call. Imports calls, filled, formats, chat's reasoning, errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllm.chat.reasoning import HIDDEN_FROM, HIDDEN_TO, Kind, Part, Splitter
from tinyllm.chat.tools.calls import CallSplitter
from tinyllm.chat.tools.calls import Part as CallPart
from tinyllm.chat.tools.filled import Harmony
from tinyllm.chat.tools.formats import Format
from tinyllm.errors import UnsupportedError

_FRAMED = re.compile(f"({HIDDEN_FROM}[^{HIDDEN_TO}]*{HIDDEN_TO})")


@dataclass(frozen=True)
class Calling:
    """tools: OpenAI's dicts. n_before: how many calls the conversation has. visible_ids: the special tokens
    that a splitter has to see for calls; end_ids: those that end a turn of calls. grammar: what the answer
    has to be, in llguidance's Lark; None: anything."""

    format: Format
    tools: Sequence[Mapping[str, Any]]
    n_before: int
    visible_ids: frozenset[int]
    end_ids: frozenset[int]
    grammar: str | None = None

    def splitter(self, reasoning: Splitter, prompt: str) -> AnswerSplitter:
        """For one answer. prompt: its end. Raises UnsupportedError where it has opened a call, and a grammar
        would open it again."""
        if self.grammar is not None and prompt.rstrip().endswith(tuple(self.format.shape.opens)):
            raise UnsupportedError(
                "the prompt ends with the mark that opens a call: leave out tool_choice and strict, or pass "
                "a chat_template that ends before it"
            )
        calls = CallSplitter(self.format, self.tools, n_before=self.n_before, prompt=prompt)
        return AnswerSplitter(reasoning, calls, covers_reasoning=isinstance(self.format.shape, Harmony))


class AnswerSplitter:
    """A `Splitter` whose parts of text and of calls are those of `CallSplitter`. covers_reasoning:
    whether a grammar of calls has the reasoning in it, and so counts from the first token on."""

    def __init__(self, reasoning: Splitter, calls: CallSplitter, *, covers_reasoning: bool) -> None:
        self._reasoning, self._calls, self._covers_reasoning = reasoning, calls, covers_reasoning

    @property
    def kind(self) -> Kind:
        return "tool_call" if self._calls.is_in_call else self._reasoning.kind

    @property
    def has_reasoning(self) -> bool:
        return self._reasoning.has_reasoning

    @property
    def is_answer(self) -> bool:
        return self._covers_reasoning or self._reasoning.is_answer

    def feed(self, piece: str) -> list[Part | CallPart]:
        return self._split(self._reasoning.feed(piece))

    def flush(self) -> list[Part | CallPart]:
        return [*self._split(self._reasoning.flush()), *self._calls.flush()]

    def _split(self, parts: Sequence[Part]) -> list[Part | CallPart]:
        split: list[Part | CallPart] = []
        for part in parts:
            kind, text = part
            if kind != "text":
                split.append(part)
                continue
            for piece in _FRAMED.split(text) if HIDDEN_FROM in text else [text]:
                if not (piece.startswith(HIDDEN_FROM) and self._calls.is_in_call):
                    split += self._calls.feed(piece)
        return split
