"""Calls as JSON objects that hold name and arguments. Imports grammar, notations, scan, shapes, values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllm.chat.tools.grammar import Rules, Schema, closed, gathered, quoted
from tinyllm.chat.tools.notations import Json
from tinyllm.chat.tools.scan import Malformed, NotACall, Scan, Steps, marks_of
from tinyllm.chat.tools.shapes import Reader, ToolCall
from tinyllm.chat.tools.values import loads

_NESTED = "function"  # the key under which OpenAI's notation has name and arguments


@dataclass(frozen=True)
class Enveloped:
    """A JSON object with name and arguments, {"name": ..., "arguments": {...}}, or a list of them.

    open, close: around each object, or around the list. listed: calls are written as a list; both are read.
    keys: of a call, in order; the arguments' last but for an id after them. keyed: {NAME: arguments} instead.
    also: other marks that calls may begin with. starts: marks of calls, kept as part of them, that count
    where the answer begins.
    """

    open: str = ""
    close: str = ""
    listed: bool = False
    keys: tuple[str, ...] = ("name", "arguments")
    keyed: bool = False
    also: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    ids: str = "[a-zA-Z0-9_:.-]+"

    NAMES = ("name", "tool_name", _NESTED)
    ARGUMENTS = ("arguments", "parameters")
    IDS = ("id", "tool_call_id")

    @property
    def opens(self) -> tuple[str, ...]:
        return (*marks_of(self.open)[:1], *self.also)

    @property
    def literals(self) -> tuple[str, ...]:
        return (self.open, self.close, *self.also, *self.starts)

    @property
    def has_late_ids(self) -> bool:
        return self.keys[-1] in self.IDS

    def read(self, scan: Scan, reader: Reader, mark: str) -> Steps[None]:
        bare = mark in self.starts
        closes = marks_of(self.close)
        if bare and mark.startswith("`"):
            closes = ["```"]
        for due in marks_of(self.open)[1:] if mark not in self.also and not bare else ():
            yield from scan.space()
            yield from scan.expect(due)
        if mark not in ("{", "["):
            yield from scan.space()
            mark = yield from scan.expect("{", "[")
        listed = mark == "["
        if listed:
            yield from scan.space()
            yield from scan.expect("{")
        while True:
            reader.begin()
            yield from self._object(scan, reader, bare)
            yield from scan.space()
            if (yield from scan.take("," if listed else ";")) is None:
                break
            yield from scan.space()
            yield from scan.expect("{")
        for due in (["]"] if listed else []) + closes:
            yield from scan.space()
            yield from scan.expect(due)

    def _object(self, scan: Scan, reader: Reader, bare: bool) -> Steps[None]:
        """An object, from after its brace."""
        found = _Found(reader)
        depth, is_first = 1, True
        while depth:
            yield from scan.space()
            if (yield from scan.take("}")):
                depth -= 1
                continue
            if not is_first:
                yield from scan.expect(",")
                yield from scan.space()
            if (yield from scan.peek()) != '"':
                raise Malformed("a key is missing in its object")
            key = loads((yield from scan.json_text()))
            yield from scan.space()
            yield from scan.expect(":")
            yield from scan.space()
            is_first = key == _NESTED and depth == 1 and bool((yield from scan.take("{")))
            if is_first:
                depth += 1
            elif self.keyed:
                found.named(key)
                yield from found.arguments(scan)
            elif key in self.ARGUMENTS:
                yield from found.arguments(scan)
            elif key in self.NAMES:
                found.named(loads((yield from scan.json_text())))
            elif key in self.IDS:
                found.id = str(loads((yield from scan.json_text())))
            elif bare and key != "type" and not found.name:
                raise NotACall
            else:
                yield from scan.json_text()
        found.end()

    def _ordered(self, call: ToolCall) -> dict[str, Any]:
        if self.keyed:
            return {call.name: call.arguments}
        values = {**dict.fromkeys(self.NAMES, call.name), **dict.fromkeys(self.ARGUMENTS, call.arguments)}
        values |= dict.fromkeys(self.IDS, call.id)
        return {key: values[key] for key in self.keys}

    def write(self, calls: Sequence[ToolCall]) -> str:
        objects = [self._ordered(call) for call in calls]
        if self.listed:
            return f"{self.open}{json.dumps(objects, ensure_ascii=False)}{self.close}"
        separator = "\n" if self.close else "; "
        return separator.join(f"{self.open}{json.dumps(o, ensure_ascii=False)}{self.close}" for o in objects)

    def grammar(self, rules: Rules, tools: Mapping[str, Schema], single: bool) -> str:
        parts, definitions = gathered(list(tools.values()))
        calls: list[Schema] = []
        for name, schema in zip(tools, parts, strict=True):
            arguments = closed(schema) if rules.strict else {"type": "object"}
            values: dict[str, Any] = {name: arguments}
            if not self.keyed:
                every: dict[str, Any] = {key: {"const": name} for key in self.NAMES}
                every |= {key: {"type": "string", "pattern": f"^{self.ids}$"} for key in self.IDS}
                every |= dict.fromkeys(self.ARGUMENTS, arguments)
                values = {key: every[key] for key in self.keys}
            calls.append(
                {
                    "type": "object",
                    "properties": values,
                    "required": list(values),
                    "additionalProperties": False,
                }
            )
        one: dict[str, Any] = dict(calls[0]) if len(calls) == 1 else {"anyOf": calls}
        if self.listed:
            one = {"type": "array", "items": one, "minItems": 1, **({"maxItems": 1} if single else {})}
        if definitions and rules.strict:
            one["$defs"] = definitions
        call = " ".join(filter(None, [rules.mark(self.open), rules.json(one), rules.mark(self.close)]))
        if single or self.listed:
            return call
        call, between = rules.rule(call), rules.terminal(r"/\n?/") if self.close else quoted("; ")
        return f"{call} ({between} {call})*"

    def answer(self, rules: Rules, calls: str, with_text: bool) -> str:
        if not with_text:
            return calls
        if not self.starts:
            return rules.optional_after_text(self.opens, calls)
        first = re.escape("".join(dict.fromkeys(mark[0] for mark in self.starts)))
        return f"({calls} | {rules.terminal(rf'/[^{first}[:space:]](?s:.*)/')})?"


class _Found:
    """What the object of a call has said so far; tells the reader in the order it wants to hear it."""

    def __init__(self, reader: Reader) -> None:
        self.id, self.name = "", ""
        self._reader, self._early = reader, []  # type: Reader, list[str]
        self._has_arguments = False

    def named(self, name: Any) -> None:
        if not isinstance(name, str):
            raise Malformed("its name is no text")
        if self.name:
            raise Malformed("it has two names")
        self._reader.name(name, self.id)
        self.name = name
        for text in self._early:
            self._reader.argument(text)

    def arguments(self, scan: Scan) -> Steps[None]:
        self._has_arguments = True
        yield from Json().read(scan, {}, self._reader.argument if self.name else self._early.append)

    def end(self) -> None:
        if not self.name:
            raise Malformed("it has no name")
        if not self._has_arguments:
            self._reader.argument("{}")
        self._reader.complete(self.id)
