"""Tells the reasoning in a chat model's output from its answer, while it streams.

Models mark it in two ways: between two tags at the start of the answer, the first of which the template may
have written already, or with a header before each message (the "channels" of gpt-oss). `splitter` chooses by
the vocabulary. Every splitter is a small state machine over text that comes in pieces, and what it says does
not depend on where the pieces are cut. Special tokens that are not shown stand in that text as well, framed
(`hidden`): stop strings may name them, nothing goes on across them, and nobody gets to see them. Imports
nothing of the package. engine/engine.py feeds it; docs/chat.md has the rules in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Literal, Protocol

Kind = Literal["text", "reasoning", "tool_call"]  # the last: chat/tools/
Part = tuple[Kind, str]

TAGS: dict[str, str] = {  # what opens a block: what closes it
    "<think>": "</think>",  # DeepSeek-R1, Qwen3, SmolLM3, Granite 3.3, GLM and most others
    "<thinking>": "</thinking>",
    "[THINK]": "[/THINK]",  # Magistral, Ministral 3
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command R7B, Command A
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
    "<|channel>thought": "<channel|>",  # Gemma 4
    "◁think▷": "◁/think▷",  # Kimi-VL
}
CHANNEL, MESSAGE, START, END = "<|channel|>", "<|message|>", "<|start|>", "<|end|>"
_ROLE = re.compile(r"<\|start\|>\s*assistant")
_TOOLS = re.compile(r"tool|function|python_tag|ACTION|\[ARGS\]|\[CALL_ID\]|constrain", re.IGNORECASE)

# Halves of surrogate pairs, which no decoded text holds.
HIDDEN_FROM, HIDDEN_TO = "\ud800", "\udfff"
_HIDDEN = re.compile(f"{HIDDEN_FROM}[^{HIDDEN_TO}]*{HIDDEN_TO}")
_LEAD = re.compile(rf"(?:\s|{_HIDDEN.pattern})*")


def hidden(token: str) -> str:
    """A special token, by its text, in a text that does not show it."""
    return HIDDEN_FROM + token + HIDDEN_TO


def shown(text: str) -> str:
    """A text without its hidden tokens."""
    return _HIDDEN.sub("", text) if HIDDEN_FROM in text else text


def visible_ids(special_tokens: Mapping[str, int]) -> frozenset[int]:
    """The special tokens (text -> id) that a splitter has to see, and those that mark tool calls, which stay
    in the text; all others are hidden."""
    marks = {*TAGS, *TAGS.values()}
    if CHANNEL in special_tokens:
        marks |= {CHANNEL, MESSAGE, START, END}
    return frozenset(i for text, i in special_tokens.items() if text in marks or _TOOLS.search(text))


def opening_ids(id_of: Callable[[str], int | None]) -> frozenset[int]:
    """The tokens that open a block of reasoning, in a vocabulary that has them as one token each."""
    return frozenset(i for tag in TAGS if (i := id_of(tag)) is not None)


def splitter(prompt: str, special_tokens: Collection[str]) -> Splitter:
    """What splits the answer to `prompt` (its end is enough, special tokens in full), for a vocabulary with
    these special tokens."""
    if {CHANNEL, MESSAGE} <= set(special_tokens):
        channels = Channels()
        _, *begun = _ROLE.split(prompt)
        channels.feed(begun[-1] if begun else "")
        return channels
    opened = next((tag for tag in TAGS if prompt.rstrip().endswith(tag)), None)
    return Tagged([mark for mark in (*TAGS, *TAGS.values()) if mark in special_tokens], opened)


class Splitter(Protocol):
    """kind: what comes next, as far as known. has_reasoning: whether there was a block, even an empty one."""

    kind: Kind
    has_reasoning: bool

    @property
    def is_answer(self) -> bool:
        """Whether what comes next is the answer itself: no reasoning, and no header."""

    def feed(self, piece: str) -> list[Part]:
        """What is certain after this piece, in order; neighbours differ in kind, and no text is empty. The
        text keeps its hidden tokens, for stop strings to see; reasoning does not."""

    def flush(self) -> list[Part]:
        """The output ends here: what was held back."""


class Plain:
    """All of it is text."""

    kind: Kind = "text"
    has_reasoning = False
    is_answer = True

    def feed(self, piece: str) -> list[Part]:
        return [("text", piece)] if piece else []

    def flush(self) -> list[Part]:
        return []


class _Machine:
    """What the two ways share. `_state` looks at `_held`, the text that no one has decided on yet, and says
    whether it could take something from it.

    Space around a block of reasoning is dropped; blocks of a kind are joined with an empty line.
    """

    def __init__(self) -> None:
        self.kind: Kind = "text"
        self.has_reasoning = False
        self._held = ""
        self._parts: list[Part] = []
        self._state: Callable[[], bool] = self._begin
        self._strips = False  # the block has just begun: space is dropped
        self._space = ""  # at the end of the reasoning so far
        self._seen: set[Kind] = set()

    @property
    def is_answer(self) -> bool:
        return self.kind == "text"

    def feed(self, piece: str) -> list[Part]:
        self._held += piece
        while self._state():
            pass
        parts, self._parts = self._parts, []
        return parts

    def flush(self) -> list[Part]:
        held, self._held = self._held, ""
        self._emit(held)
        return self.feed("")

    def _begin(self) -> bool:
        raise NotImplementedError

    def _enter(self, kind: Kind, state: Callable[[], bool]) -> None:
        self.kind, self._state, self._strips, self._space = kind, state, True, ""
        self.has_reasoning |= kind == "reasoning"

    def _emit(self, text: str) -> None:
        if self.kind == "reasoning":
            text = shown(text)
        if self._strips:
            lead, text = _lead(text)
            if text and self.kind in self._seen:
                text = "\n\n" + text
            self._strips = not text
            text = "".join(_HIDDEN.findall(lead)) + text
        if self.kind == "reasoning":
            spaced = self._space + text
            text = spaced.rstrip()
            self._space = spaced[len(text) :]
        if not text:
            return
        if shown(text):
            self._seen.add(self.kind)
        if self._parts and self._parts[-1][0] == self.kind:
            text = self._parts.pop()[1] + text
        self._parts.append((self.kind, text))

    def _begins_with(self, marks: Collection[str]) -> str | None:
        """The mark that the held text begins with, after space; "" where one may still come."""
        _, text = _lead(self._held)
        for mark in marks:
            if text.startswith(mark):
                return mark
        return "" if any(mark.startswith(text) for mark in marks) else None

    def _emit_until(self, marks: Collection[str]) -> str | None:
        """Passes on what stands before the first mark, and takes the mark away. None: there is none yet."""
        held = self._held
        found = min(((held.index(mark), mark) for mark in marks if mark in held), default=None)
        if found is None:
            end = len(held) - max((overlap(held, mark) for mark in marks), default=0)
            self._emit(held[:end])
            self._held = held[end:]
            return None
        start, mark = found
        self._emit(held[:start])
        self._held = held[start + len(mark) :]
        return mark


class Tagged(_Machine):
    """One block between two tags, before the answer. Marks that are special tokens, which no text can
    contain, count at any place.

    marks: those. opened: the tag that the prompt ends with.
    """

    def __init__(self, marks: Collection[str] = (), opened: str | None = None) -> None:
        super().__init__()
        self._marks = marks
        self._close = ""
        if opened is not None:
            self._open(opened)

    def _open(self, tag: str) -> None:
        self._close = TAGS[tag]
        self._enter("reasoning", self._reason)

    def _begin(self) -> bool:
        tag = self._begins_with(TAGS)
        if tag == "":
            return False
        if tag is None:
            self._state = self._answer
        else:
            lead, text = _lead(self._held)
            self._emit("".join(_HIDDEN.findall(lead)))
            self._held = text[len(tag) :]
            self._open(tag)
        return True

    def _reason(self) -> bool:
        if self._emit_until([self._close]) is None:
            return False
        self._enter("text", self._answer)
        return True

    def _answer(self) -> bool:
        mark = self._emit_until(self._marks)
        if mark in TAGS:
            self._open(mark)
        return mark is not None


class Channels(_Machine):
    """Messages with a header, as gpt-oss writes them: <|channel|>analysis<|message|>...<|end|>, then
    <|start|>assistant<|channel|>final<|message|>... The channel "analysis" is reasoning. A message to a tool
    is text and keeps its header."""

    @property
    def is_answer(self) -> bool:
        return self.kind == "text" and self._state == self._body

    def _begin(self) -> bool:
        mark = self._begins_with([CHANNEL, START, MESSAGE, "to="])
        self._state = self._header if mark else self._body
        if mark == "":
            self._state = self._begin
        return mark != ""

    def _header(self) -> bool:
        header, message, rest = self._held.partition(MESSAGE)
        if not message:
            return False
        self._held = rest
        header = _ROLE.sub("", shown(header)).strip()
        if "to=" in header:
            self._enter("text", self._body)
            self._emit(header + MESSAGE)
        else:
            is_reasoning = header.partition(CHANNEL)[2].strip().startswith("analysis")
            self._enter("reasoning" if is_reasoning else "text", self._body)
        return True

    def _body(self) -> bool:
        mark = self._emit_until([END, START, CHANNEL])
        if mark is None:
            return False
        self._enter("text", self._begin)
        if mark != END:
            self._held = mark + self._held
        return True

    def flush(self) -> list[Part]:
        if self._state == self._header:
            self._held = ""  # a header without its message says nothing
        return super().flush()


def _lead(text: str) -> tuple[str, str]:
    """The space and the hidden tokens that a text begins with, and the rest."""
    end = _LEAD.match(text).end()  # type: ignore[union-attr]  # it matches nothing, too
    return text[:end], text[end:]


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of text that begins stop, short of all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
