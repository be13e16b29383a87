"""What a call is, and what the ways to write calls have in common.

A shape reads calls after the mark that opens them and tells a `Reader` what it finds, writes calls, and
describes them in a grammar. There are two: filled.py, a text with gaps, and enveloped.py, a JSON object.
formats.py has the table of all formats, each a shape with its texts. Imports grammar, scan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tinyllm.chat.tools.grammar import Rules, Schema
from tinyllm.chat.tools.scan import Scan, Steps


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that a model wrote.

    id: the model's own where its format has ids, else one that counts. arguments: a dict of plain data, each
    value of the type its notation or the tool's schema gives it. raw: the text it was written as.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    raw: str = ""


class Reader(Protocol):
    """What a shape tells of the calls it reads, in this order for each."""

    def begin(self) -> None:
        """A call begins here; the one before, if any, is over."""

    def name(self, name: str, id: str = "") -> Schema:
        """Its name, and its id if that is known already. Returns the schema of its parameters. Raises
        Malformed where no tool has this name."""

    def argument(self, text: str) -> None:
        """Further text of its arguments, as JSON."""

    def complete(self, id: str = "") -> None:
        """Nothing of it is missing but what closes it. Raises Malformed where its arguments are wrong."""


class Shape(Protocol):
    """opens: the marks that calls begin with, anywhere in a text. starts: those that count only where the
    answer begins; what follows may be an answer as well, and is text unless it names a tool. literals: all
    fixed texts. has_late_ids: an id comes after the arguments."""

    @property
    def opens(self) -> tuple[str, ...]: ...

    @property
    def starts(self) -> tuple[str, ...]: ...

    @property
    def literals(self) -> tuple[str, ...]: ...

    @property
    def has_late_ids(self) -> bool: ...

    def read(self, scan: Scan, reader: Reader, mark: str) -> Steps[None]:
        """Reads calls after the mark. Raises Malformed, NotACall, Ended."""

    def write(self, calls: Sequence[ToolCall]) -> str: ...

    def grammar(self, rules: Rules, tools: Mapping[str, Schema], single: bool) -> str:
        """What matches one or more calls of these tools: name -> schema of the parameters."""

    def answer(self, rules: Rules, calls: str, with_text: bool) -> str:
        """What matches an answer of such calls, or with_text also one of text, or of text and calls."""
