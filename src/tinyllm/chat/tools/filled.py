"""Calls as a text with gaps for the name and the arguments. Imports grammar, notations, scan, shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tinyllm.chat.tools.grammar import ANY, Rules, Schema, either
from tinyllm.chat.tools.notations import Json, Notation
from tinyllm.chat.tools.scan import NotACall, Scan, Steps, marks_of
from tinyllm.chat.tools.shapes import Reader, ToolCall


@dataclass(frozen=True)
class Filled:
    """A text with gaps: <function={name}>{arguments}</function>.

    call: its gaps are {name}, {arguments}, and where a format has them {id} or {number}. open, close: around
    all calls; between: them. id: what the model's id is made of. notation: of the arguments. ids: what an
    {id} looks like, a regular expression.
    """

    call: str
    notation: Notation = field(default_factory=Json)
    open: str = ""
    close: str = ""
    between: str = ""
    id: str = "{id}"
    ids: str = "[a-zA-Z0-9_:.-]+"

    @property
    def opens(self) -> tuple[str, ...]:
        """Where the text around all calls is missing, a call alone counts too."""
        return tuple(dict.fromkeys([*marks_of(self.open), *marks_of(self._pieces[0])]))

    starts = ()
    has_late_ids = False

    @property
    def literals(self) -> tuple[str, ...]:
        parameter = getattr(self.notation, "parameter", "")
        quotes = getattr(self.notation, "quotes", ())
        return (self.open, self.close, *self._pieces[::2], *re.split(r"\{\w+\}", parameter), *quotes)

    @property
    def _pieces(self) -> list[str]:
        """Texts and gaps in turn; a text may be empty."""
        return re.split(r"\{(\w+)\}", self.call)

    def read(self, scan: Scan, reader: Reader, mark: str) -> Steps[None]:
        first = marks_of(self._pieces[0])
        for due in marks_of(self.open)[1:] if self.open and mark == marks_of(self.open)[0] else ():
            yield from scan.space()
            yield from scan.expect(due)
        inside = mark not in first  # the first mark of a call is still to come
        while True:
            reader.begin()
            for due in first if inside else first[first.index(mark) + 1 :]:
                yield from scan.space()
                yield from scan.expect(due)
            yield from self._gaps(scan, reader)
            if not self.close:
                return
            yield from scan.space()
            if self.between.strip():
                if (yield from scan.take(self.between.strip())) is None:
                    break
            elif (yield from scan.take(first[0])) is None:
                break
            else:
                inside, mark = False, first[0]
            yield from scan.space()
        yield from scan.take(self.close.strip())

    def _gaps(self, scan: Scan, reader: Reader) -> Steps[None]:
        """The gaps of one call and the texts between them, from after the first."""
        pieces, found = self._pieces, {}  # type: tuple[list[str], dict[str, str]]
        schema: Schema = {}
        for gap, text in zip(pieces[1::2], pieces[2::2], strict=True):
            marks = marks_of(text)
            if gap == "arguments":
                yield from scan.space()
                yield from self.notation.read(scan, schema, reader.argument)
                if self.notation.closes_itself:
                    reader.complete()
                for due in marks[:1]:
                    yield from scan.space()
                    yield from scan.expect(due)
                if not self.notation.closes_itself:
                    reader.complete()
                for due in marks[1:]:
                    yield from scan.space()
                    yield from scan.take(due)
                return
            if marks:
                found[gap] = yield from scan.word(marks[:1])
                for due in marks[1:]:
                    yield from scan.space()
                    yield from scan.expect(due)
            else:  # nothing but space until the arguments, or until what closes a call without any
                stops = (*self.notation.begins, *marks_of(pieces[-1])[:1])
                found[gap] = yield from scan.word(stops, keep=True)
            if pieces[1::2].index("arguments") == len(found):
                schema = reader.name(found["name"], self._id(found))

    def _id(self, found: Mapping[str, str]) -> str:
        given = {"id": "", **found}
        return self.id.format(**given)

    def write(self, calls: Sequence[ToolCall]) -> str:
        texts = [
            self.call.format(
                name=call.name,
                id=call.id,
                number=call.id.rpartition(":")[2] if ":" in call.id else i,
                arguments=self.notation.write(call.arguments),
            )
            for i, call in enumerate(calls)
        ]
        return self.open + (self.between or "\n" * (not self.open)).join(texts) + self.close

    def grammar(self, rules: Rules, tools: Mapping[str, Schema], single: bool) -> str:
        calls = []
        for name, schema in tools.items():
            body = []
            for i, piece in enumerate(self._pieces):
                if i % 2 == 0:
                    body.append(rules.mark(piece))
                elif piece == "name":
                    body.append(rules.mark(name))
                elif piece == "arguments":
                    body.append(self.notation.grammar(rules, schema))
                else:
                    body.append(rules.terminal("/[0-9]+/" if piece == "number" else f"/{self.ids}/"))
            calls.append(rules.rule(" ".join(filter(None, body))))
        call = either(*calls)
        between = (
            rules.mark(self.between) if self.between else ("" if self.open else rules.terminal(r"/\n?/"))
        )
        more = "" if single else f"({between} {call})*"
        return " ".join(filter(None, [rules.mark(self.open), call, more, rules.mark(self.close)]))

    def answer(self, rules: Rules, calls: str, with_text: bool) -> str:
        return rules.optional_after_text(self.opens, calls) if with_text else calls


class Harmony(Filled):
    """A message to a tool, as gpt-oss writes them: the header's parts come in more than one order."""

    _TO = re.compile(r"to=(?:functions\.)?([^\s<]+)")

    def read(self, scan: Scan, reader: Reader, mark: str) -> Steps[None]:
        header: list[str] = [mark]
        if (yield from scan.until(["\n", "<|message|>"], header.append, keep=True)) == "\n":
            raise NotACall
        yield from scan.expect("<|message|>")
        to = self._TO.search("".join(header))
        if to is None:
            raise NotACall
        reader.begin()
        schema = reader.name(to[1])
        yield from scan.space()
        yield from self.notation.read(scan, schema, reader.argument)
        reader.complete()

    @property
    def opens(self) -> tuple[str, ...]:
        return ("<|channel|>", "to=functions.")

    def answer(self, rules: Rules, calls: str, with_text: bool) -> str:
        """With the messages before the last, of which each has a channel."""
        text = rules.terminal(ANY)
        heads = {
            name: rules.mark(f"<|channel|>{name}<|message|>") for name in ("analysis", "commentary", "final")
        }
        next_message = rules.mark("<|end|><|start|>assistant")
        thoughts = f"({heads['analysis']} {text} {next_message})*"
        if not with_text:
            return f"{thoughts} {calls}"
        preamble = f"({heads['commentary']} {text} {next_message})?"
        return f"{thoughts} ({preamble} {calls} | {heads['final']} {text})"
