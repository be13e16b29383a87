"""Text that comes in pieces, read by straight code as if it were all there.

Whoever reads is a generator, and waits by `yield from`. What a method takes or says depends on the text
alone, never on where its pieces are cut: it waits until no further text could change its mind. Each character
is looked at a bounded number of times, so reading is linear. Imports chat's reasoning (`overlap`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator
from typing import TypeVar

from tinyllm.chat.reasoning import overlap

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], object]

MAX_NESTING = 64  # of lists and objects, as in messages (templates.py)
SPACE = re.compile(r"\s*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # of a JSON string, up to what needs a look
_OUTSIDE = re.compile(r'[^"{}\[\]]*')  # of a JSON list or object, up to the next string or bracket
_SCALAR = re.compile(r"[-+.\w]*")


class Malformed(Exception):
    """What is written is no call; the message says why."""


class NotACall(Exception):
    """It only began like one."""


class Ended(Exception):
    """There is no more text."""


class Scan:
    """The text; `taken` collects what was taken of it since `start`."""

    def __init__(self, text: str = "", ended: bool = False) -> None:
        self._text, self._at, self._ended = text, 0, ended
        self.taken: list[str] | None = None

    def feed(self, piece: str) -> None:
        self._text, self._at = self._text[self._at :] + piece, 0

    def end(self) -> None:
        self._ended = True

    def start(self, taken: str) -> None:
        self.taken = [taken]

    def stop(self) -> str:
        """What was taken since `start`; from here on it is not collected."""
        taken, self.taken = "".join(self.taken or ()), None
        return taken

    def rest(self) -> str:
        return self._take(len(self._text) - self._at)

    def _take(self, n: int) -> str:
        text = self._text[self._at : self._at + n]
        self._at += n
        if self.taken is not None and text:
            self.taken.append(text)
        return text

    def more(self) -> Steps[None]:
        if self._ended:
            raise Ended
        yield

    def peek(self) -> Steps[str]:
        """The next character. Raises Ended."""
        while self._at == len(self._text):
            yield from self.more()
        return self._text[self._at]

    def char(self) -> Steps[str]:
        yield from self.peek()
        return self._take(1)

    def match(self, pattern: re.Pattern[str], sink: Sink | None = None) -> Steps[None]:
        """Takes what `pattern` matches, which may be nothing and must go on however it is cut."""
        while True:
            found = pattern.match(self._text, self._at)
            assert found is not None
            text = self._take(found.end() - self._at)
            if sink is not None and text:
                sink(text)
            if self._at < len(self._text):
                return
            yield from self.more()

    def space(self) -> Steps[None]:
        yield from self.match(SPACE)

    def take(self, *marks: str) -> Steps[str | None]:
        """Takes the mark that comes next, the first of these; None: something else comes. Raises Ended where
        it cannot be told."""
        while True:
            there = self._text[self._at : self._at + max(map(len, marks))]
            undecided = False
            for mark in marks:
                if there.startswith(mark) and (self._ended or not undecided):
                    return self._take(len(mark))
                undecided = undecided or (len(there) < len(mark) and mark.startswith(there))
            if there and not undecided:
                return None
            yield from self.more()

    def expect(self, *marks: str) -> Steps[str]:
        """One of these, or Malformed."""
        mark = yield from self.take(*marks)
        if mark is None:
            raise Malformed(f"{' or '.join(map(repr, marks))} is missing before {self._text[self._at]!r}")
        return mark

    def until(
        self, marks: Collection[str], sink: Sink, *, keep: bool = False, limit: int | None = None
    ) -> Steps[str]:
        """Passes on what stands before the first mark, and takes the mark too unless it is to be kept.

        limit: how many characters may stand before it, else Malformed. Raises Ended.
        """
        n = 0
        while True:
            found = min(
                ((at, -len(mark), mark) for mark in marks if (at := self._text.find(mark, self._at)) >= 0),
                default=None,
            )
            if found is not None:
                end = found[0]
            else:
                held = self._text[max(self._at, len(self._text) - max(map(len, marks), default=0)) :]
                end = len(self._text) - max((overlap(held, mark) for mark in marks), default=0)
            if limit is not None and n + end - self._at > limit:
                self._take(limit - n)
                raise Malformed(f"none of {', '.join(map(repr, marks))} within {limit} characters")
            n += end - self._at
            if text := self._take(end - self._at):
                sink(text)
            if found is not None:
                if not keep:
                    self._take(len(found[2]))
                return found[2]
            yield from self.more()

    def word(self, marks: Collection[str], *, keep: bool = False, limit: int = 256) -> Steps[str]:
        """What stands before the first mark, without space around it."""
        parts: list[str] = []
        yield from self.until(marks, parts.append, keep=keep, limit=limit)
        return "".join(parts).strip()

    def json(self, sink: Sink) -> Steps[None]:
        """Passes on a JSON value's text, with control characters in strings escaped. Looks at strings and
        brackets only: json.loads must be asked whether it is right."""
        first = yield from self.peek()
        if first == '"':
            yield from self._string(sink)
        elif first in "{[":
            yield from self._nested(sink)
        else:
            some: list[str] = []
            yield from self.match(_SCALAR, some.append)
            if not some:
                raise Malformed(f"{first!r} begins no JSON value")
            sink("".join(some))

    def _nested(self, sink: Sink) -> Steps[None]:
        due: list[str] = []
        while True:
            yield from self.match(_OUTSIDE, sink)
            char = yield from self.peek()
            if char == '"':
                yield from self._string(sink)
                continue
            sink(self._take(1))
            if char in "{[":
                due.append("}" if char == "{" else "]")
                if len(due) > MAX_NESTING:
                    raise Malformed(f"it is nested deeper than {MAX_NESTING} levels")
            elif due.pop() != char:
                raise Malformed(f"{char!r} closes nothing")
            if not due:
                return

    def _string(self, sink: Sink) -> Steps[None]:
        sink(self._take(1))
        while True:
            yield from self.match(_PLAIN, sink)
            char = yield from self.peek()
            if char == '"':
                sink(self._take(1))
                return
            if char == "\\":
                while len(self._text) - self._at < 2:
                    yield from self.more()
                sink(self._take(2))
            else:
                self._take(1)
                sink(f"\\u{ord(char):04x}")

    def json_text(self) -> Steps[str]:
        parts: list[str] = []
        yield from self.json(parts.append)
        return "".join(parts)


def marks_of(text: str) -> list[str]:
    """A fixed text as marks between which space is free: its lines."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def run(steps: Steps[T]) -> T:
    """What a reader of text that is all there returns. Raises Ended where it wants more."""
    try:
        next(steps)
    except StopIteration as done:
        value: T = done.value
        return value
    raise AssertionError("the text had not ended")
