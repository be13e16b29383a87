"""How formats write the arguments of a call: JSON, tags around each, Gemma's braces, Python's call.

A notation reads what a model writes and passes it on as JSON text while it comes, writes arguments, and
describes them in a grammar. Where the text does not say what a value is, the tool's schema does. Imports
grammar, literals, scan, values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tinyllm.chat.tools.grammar import Rules, Schema, closed, either, quoted
from tinyllm.chat.tools.literals import Python
from tinyllm.chat.tools.scan import Ended, Malformed, Scan, Sink, Steps, marks_of, run
from tinyllm.chat.tools.values import (
    ANY_TYPE,
    WORDS,
    loads,
    property_of,
    type_of,
    types_of,
    with_definitions,
)

_STRING = frozenset(["string"])


class Notation(Protocol):
    """begins: what arguments begin with, where that can tell where a name ends. closes_itself: whether the
    arguments tell where they end."""

    @property
    def begins(self) -> tuple[str, ...]: ...

    @property
    def closes_itself(self) -> bool: ...

    def read(self, scan: Scan, schema: Schema, sink: Sink) -> Steps[None]:
        """Takes the arguments, and nothing after them; the sink gets a JSON object's text."""

    def write(self, arguments: Mapping[str, Any]) -> str: ...

    def grammar(self, rules: Rules, schema: Schema) -> str: ...


@dataclass(frozen=True)
class Json:
    """{"city": "Paris", "days": 3}"""

    begins = ("{",)
    closes_itself = True

    def read(self, scan: Scan, schema: Schema, sink: Sink) -> Steps[None]:
        if (yield from scan.peek()) != '"':
            yield from scan.json(sink)
            return
        # the object's text as a JSON string, which is how it stands in OpenAI's messages
        text = yield from scan.json_text()
        sink(loads(text))

    def write(self, arguments: Mapping[str, Any]) -> str:
        return json.dumps(arguments, ensure_ascii=False)

    def grammar(self, rules: Rules, schema: Schema) -> str:
        return rules.json(closed(schema) if rules.strict else {"type": "object"})


class Tagged:
    """<parameter=city>Paris</parameter>, a text with {key} and {value}; {string} is "true" or "false".

    A value is its raw text, but for objects, lists and the like, which are JSON. A text on lines of its own
    loses the line ends that set it off.
    """

    closes_itself = False

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter
        self._opens, after_key, *more, self._closes = re.split(r"\{\w+\}", parameter)
        self._after_key, self._after_flag = after_key, more[0] if more else ""
        self.begins = (self._opens.strip(),)

    def read(self, scan: Scan, schema: Schema, sink: Sink) -> Steps[None]:
        separator = "{"
        while True:
            yield from scan.space()
            if (yield from scan.take(*self.begins)) is None:
                break
            key, types = yield from self._key(scan, schema)
            sink(f"{separator}{quoted(key)}: ")
            yield from self._value(scan, types, key, sink)
            separator = ", "
        sink("{}" if separator == "{" else "}")

    def _key(self, scan: Scan, schema: Schema) -> Steps[tuple[str, frozenset[str] | None]]:
        """The parameter's name and the types it may have."""
        first, *others = marks_of(self._after_key)
        key = yield from scan.word([first])
        for mark in others:
            yield from scan.space()
            yield from scan.expect(mark)
        types = types_of(property_of(schema, key), schema)
        if self._after_flag:
            is_text = (yield from scan.word([self._after_flag])) == "true"
            types = _STRING if is_text else (types or ANY_TYPE) - _STRING
        return key, types

    def _value(self, scan: Scan, types: frozenset[str] | None, key: str, sink: Sink) -> Steps[None]:
        close = self._closes.strip()
        closes = [close]
        if self._closes.startswith("\n"):
            closes.append("\n" + close)
            yield from scan.take("\n")
        if types == _STRING:
            sink('"')
            yield from scan.until(closes, lambda text: sink(quoted(text)[1:-1]))
            sink('"')
            return
        parts: list[str] = []
        yield from scan.until(closes, parts.append)
        try:
            sink(json.dumps(value_of("".join(parts), types), ensure_ascii=False))
        except Malformed as e:
            raise Malformed(f"{key!r}: {e}") from None

    def write(self, arguments: Mapping[str, Any]) -> str:
        return "".join(
            self.parameter.format(
                key=key,
                value=value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
                string=str(isinstance(value, str)).lower(),
            )
            for key, value in arguments.items()
        )

    def grammar(self, rules: Rules, schema: Schema) -> str:
        if not rules.strict or not schema.get("properties"):
            if rules.strict and schema.get("additionalProperties") is not True:
                return '""'
            key = rules.terminal(r'/[^<>"\n]+/')
            flag = [rules.terminal("/true|false/"), rules.mark(self._after_flag)] if self._after_flag else []
            head = [rules.mark(self._opens), key, rules.mark(self._after_key), *flag]
            return f"({' '.join([*head, rules.text_until(self._closes)])})*"
        parts = []
        for key, value in schema["properties"].items():
            types = types_of(value, schema)
            is_text = str(types == _STRING).lower()
            before = self.parameter.format(key=key, value="\0", string=is_text).split("\0")[0]
            optional = "" if key in schema.get("required", ()) else "?"
            parts.append(
                f"({rules.mark(before)} {self._value_grammar(rules, value, types, schema)}){optional}"
            )
        return " ".join(parts)

    def _value_grammar(self, rules: Rules, schema: Schema, types: frozenset[str] | None, root: Schema) -> str:
        """A value and what closes it."""
        close = rules.mark(self._closes)
        if types is None or types == _STRING or ("string" in types and not self._after_flag):
            choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
            texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in choices]
            return f"{either(*map(rules.mark, texts))} {close}" if texts else rules.text_until(self._closes)
        words = ['"True"', '"False"'] if "boolean" in types else []  # as Python's templates write them
        words += ['"None"'] if "null" in types else []
        return f"{either(rules.json(with_definitions(schema, root)), *words)} {close}"


def value_of(text: str, types: frozenset[str] | None) -> Any:
    """What raw text stands for, by the types it may have.

    A string if it can be nothing else; else the JSON value (or Python's True, False, None, or its lists and
    dicts), if its type is allowed; else the text, if that is. None: any type. Raises Malformed.
    """
    if types == _STRING:
        return text
    allowed = types or ANY_TYPE
    word = text.strip()
    try:
        value = WORDS[word] if word in WORDS else loads(word)
    except Malformed:
        value = _python(word) if word[:1] in ("{", "[", "(") else text
    kind = type_of(value)
    if isinstance(value, float) and "number" not in allowed and "integer" in allowed and value.is_integer():
        return int(value)
    if kind != "string" and (kind in allowed or (kind == "integer" and "number" in allowed)):
        return value
    if "string" in allowed:
        return text
    raise Malformed(f"{word[:40]!r} is not of type {' or '.join(sorted(allowed))}")


def _python(text: str) -> Any:
    """The value of Python's notation; the text where it is not that."""
    scan, parts = Scan(text, ended=True), []  # type: Scan, list[str]
    try:
        run(Python().value(scan, parts.append))
        return text if scan.rest().strip() else loads("".join(parts))
    except (Malformed, Ended):
        return text
