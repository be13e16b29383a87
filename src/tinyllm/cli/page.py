"""Text as it comes, laid out for a terminal: lines end between words, and Markdown is lightly coloured.

Invariant: every character is shown, in its order. Laying out adds styles, and puts a line end in the place of
spaces. What is no terminal gets the text as it is. Imports common.py, whose `put` writes.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from itertools import groupby, pairwise
from typing import TextIO

from tinyllm.cli.common import BOLD, CYAN, DIM, has_styles, put, shown, styled

SPARE = 24  # columns: an unfinished word is shown at once where so many are left behind it
_WIDE = (
    "[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\U00020000-\U0003fffd]"
)
# A line end, spaces, a run of marks, one character of a script without spaces, or what is none of these.
# Its first use compiles it, in 4 ms, which a pipe does without.
_UNIT = rf"\n|[^\S\n]+|`+|\*+|#+|{_WIDE}|[^\s`*#{_WIDE[1:]}+"


class Page:
    """One stream's text. wraps: whether lines end between words; markdown: whether it is coloured."""

    def __init__(self, stream: TextIO, *, wraps: bool = True, markdown: bool = False) -> None:
        self._stream, self.wraps = stream, wraps
        self._wraps = wraps and stream.isatty()
        self._colours = markdown and has_styles(stream)
        self._held = ""  # marks whose run may go on
        self._space, self._word = "", list[tuple[str, str]]()  # not shown yet: pieces with their styles
        self._may_break = False  # before the word
        self._column = 0
        self._in_fence = False
        self._ready: list[tuple[str, str]] = []  # to be written, with their styles
        self._new_line()

    def _new_line(self) -> None:
        self._is_start, self._is_fence_line = True, False
        self._of_line = self._inline = ""  # styles: of the whole line, and within it
        self._closes = ""  # the marks that end the inline style

    def write(self, text: str, style: str = "") -> None:
        """Shows `text`, but for what the next characters may change. style: of what has no other."""
        if self._wraps or self._colours:
            units = re.findall(_UNIT, self._held + shown(text, self._stream))
            self._held = units[-1] if units and units[-1][0] in "`*#" else ""
            for unit, after in pairwise(units if self._held else [*units, ""]):
                self._add(unit, after, style)
            if not self._wraps or self._column + self._width() + SPARE <= _most():
                self._show()
        else:
            self._ready.append((text, style))
        self._put()

    def end(self) -> None:
        """Shows what is left."""
        if self._held:
            self._add(self._held, "", "")
        self._show()
        self._ready.append((self._space, ""))
        self._held = self._space = ""
        self._put()

    def _put(self) -> None:
        for style, pieces in groupby(self._ready, lambda piece: piece[1]):
            text = "".join(text for text, _ in pieces)
            put(styled(text, style, self._stream), to=self._stream, end="", flush=True)
        self._ready = []

    def _add(self, unit: str, after: str, style: str) -> None:
        """after: what follows, where that is known, and behind marks it is."""
        if unit == "\n":
            self._show()
            self._ready.append((self._space + "\n", style))
            self._space, self._column, self._may_break = "", 0, False
            self._in_fence ^= self._is_fence_line
            self._new_line()
        elif unit.isspace():
            self._show()
            self._space += unit
            self._may_break = True
        else:
            if re.match(_WIDE, unit):
                self._show()
                self._may_break = True
            own = self._styled_as(unit, after) if self._colours else ""
            self._word.append((unit, own or style))
            self._is_start = False

    def _styled_as(self, unit: str, after: str) -> str:
        """The style that Markdown gives a piece; what marks begin or end is noted."""
        if self._is_start and unit.startswith("```"):
            self._is_fence_line = True
        if self._is_start and unit[0] == "#" and len(unit) <= 6 and after.isspace():
            self._of_line = BOLD
        if self._is_fence_line or self._in_fence:
            return DIM if self._is_fence_line else CYAN
        if self._closes == unit:
            style, self._inline, self._closes = self._inline, "", ""
            return style
        if not self._closes and (unit[0] == "`" or (unit == "**" and after and not after.isspace())):
            self._inline, self._closes = CYAN if unit[0] == "`" else BOLD, unit
        return self._inline or self._of_line

    def _width(self) -> int:
        return columns(self._space) + sum(columns(text) for text, _ in self._word)

    def _show(self) -> None:
        """The word, on a new line where it does not fit on this one."""
        if not self._word:
            return
        width, most = self._width(), _most()
        may_break = self._wraps and self._may_break and self._column and not self._in_fence
        if may_break and self._column + width > most:
            self._ready.append(("\n", self._word[0][1]))
            width -= columns(self._space)
            self._space, self._column = "", 0
        (first, style), *others = self._word
        self._ready += [(self._space + first, style), *others]
        self._column += width
        if self._column > most:  # the terminal itself has begun a new line
            self._column %= most
        self._space, self._word, self._may_break = "", [], False


def _most() -> int:
    """Columns of the terminal now: it may be another size with every word."""
    return max(1, shutil.get_terminal_size((80, 24)).columns)


def columns(text: str) -> int:
    """How many columns a terminal gives a text: two to wide characters, none to marks on others."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )
