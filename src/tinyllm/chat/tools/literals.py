"""Arguments as a language's literals: Gemma's braces, Python's call. Imports grammar, scan, values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from tinyllm.chat.tools.grammar import Rules, Schema, either, members, quoted
from tinyllm.chat.tools.scan import MAX_NESTING, Malformed, Scan, Sink, Steps
from tinyllm.chat.tools.values import WORDS, loads, resolved, types_of

_LITERAL = re.compile(r"[-+.\w]*")


class Literals:
    """What Gemma's braces and Python's calls share: names, strings, lists, objects, True and true."""

    quotes: tuple[str, ...]

    def string(self, scan: Scan, quote: str, sink: Sink) -> Steps[None]:
        raise NotImplementedError

    def members(self, scan: Scan, equals: str, end: str, sink: Sink, depth: int = 0) -> Steps[None]:
        """Up to `end`, which is left where it is."""
        sink("{")
        first = True
        while True:
            yield from scan.space()
            if (yield from scan.peek()) == end:
                break
            if not first:
                yield from scan.expect(",")
                yield from scan.space()
                if (yield from scan.peek()) == end:
                    break
                sink(", ")
            quote = yield from scan.take(*self.quotes)
            if quote is None:
                key = yield from scan.word([equals, ",", end], keep=True)
                sink(quoted(key))
            else:
                yield from self.string(scan, quote, sink)
                yield from scan.space()
            yield from scan.expect(equals)
            sink(": ")
            yield from self.value(scan, sink, depth + 1)
            first = False
        sink("}")

    def value(self, scan: Scan, sink: Sink, depth: int = 0) -> Steps[None]:
        if depth > MAX_NESTING:
            raise Malformed(f"it is nested deeper than {MAX_NESTING} levels")
        yield from scan.space()
        quote = yield from scan.take(*self.quotes, "{", "[", "(")
        if quote == "{":
            yield from self.members(scan, ":", "}", sink, depth)
            yield from scan.expect("}")
        elif quote in ("[", "("):
            yield from self._items(scan, "]" if quote == "[" else ")", sink, depth)
        elif quote is not None:
            yield from self.string(scan, quote, sink)
        else:
            word: list[str] = []
            yield from scan.match(_LITERAL, word.append)
            sink(json.dumps(_literal("".join(word))))

    def _items(self, scan: Scan, end: str, sink: Sink, depth: int) -> Steps[None]:
        sink("[")
        separator = ""
        while True:
            yield from scan.space()
            if (yield from scan.take(end)):
                break
            if separator:
                yield from scan.expect(",")
                yield from scan.space()
                if (yield from scan.take(end)):
                    break
            sink(separator)
            yield from self.value(scan, sink, depth + 1)
            separator = ", "
        sink("]")

    def written(self, value: Any) -> str:
        raise NotImplementedError

    def string_grammar(self, rules: Rules) -> str:
        raise NotImplementedError

    def key_grammar(self, rules: Rules, key: str | None) -> str:
        """Of an object within; None: any."""
        raise NotImplementedError

    def any_grammar(self, rules: Rules) -> str:
        value = rules.forward()
        key = self.key_grammar(rules, None)
        pair = f'{key} ":" SPACE {value}'
        rules.define(
            value,
            f"{self.string_grammar(rules)} | NUMBER | WORD"
            f' | "[" ({value} ("," SPACE {value})*)? "]" | "{{" ({pair} ("," SPACE {pair})*)? "}}"',
        )
        self._tokens(rules)
        return value

    def _tokens(self, rules: Rules) -> None:
        rules.define("SPACE", "/ ?/")
        rules.define("NUMBER", r"/-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?/")
        rules.define("WORD", "/true|false|null|True|False|None/")

    def value_grammar(self, rules: Rules, schema: Any, root: Schema, depth: int = 0) -> str:
        """Types, enums, properties and items are enforced; ranges, lengths and patterns are not."""
        schema = resolved(schema, root)
        if not schema or depth > MAX_NESTING:
            return self.any_grammar(rules)
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if choices is not None:
            return either(*(rules.mark(self.written(choice)) for choice in choices))
        options = schema.get("anyOf", schema.get("oneOf"))
        if options:
            return either(*(self.value_grammar(rules, option, root, depth + 1) for option in options))
        types = types_of(schema, root)
        if types is None:
            return self.any_grammar(rules)
        self._tokens(rules)
        return either(*(self._type_grammar(rules, name, schema, root, depth) for name in sorted(types)))

    def _type_grammar(self, rules: Rules, name: str, schema: Schema, root: Schema, depth: int) -> str:
        if name == "string":
            return self.string_grammar(rules)
        if name == "array":
            item = self.value_grammar(rules, schema.get("items"), root, depth + 1)
            return f'"[" ({item} ("," SPACE {item})*)? "]"'
        if name == "object":
            if not schema.get("properties"):
                pair = f'{self.key_grammar(rules, None)} ":" SPACE {self.any_grammar(rules)}'
                return f'"{{" ({pair} ("," SPACE {pair})*)? "}}"'
            return f'"{{" {self._pairs(rules, schema, root, ":", depth)} "}}"'
        if name in ("integer", "number"):
            return rules.terminal("/-?[0-9]+/") if name == "integer" else "NUMBER"
        return rules.terminal("/true|false|True|False/" if name == "boolean" else "/null|None/")

    def _pairs(self, rules: Rules, schema: Schema, root: Schema, equals: str, depth: int = 0) -> str:
        required = schema.get("required", ())
        pairs = []
        for key, value in schema["properties"].items():
            name = quoted(key) if equals == "=" or depth == 0 else self.key_grammar(rules, key)
            gap = " SPACE" if equals == ":" else ""
            pair = f'{name} "{equals}"{gap} {self.value_grammar(rules, value, root, depth + 1)}'
            pairs.append((pair, key in required))
        return members(pairs, '"," SPACE')


class Braces(Literals):
    """{city:<|"|>Paris<|"|>,days:3}, with a quote that is a token of its own."""

    begins = ("{",)
    closes_itself = True

    def __init__(self, quote: str) -> None:
        self.quotes = (quote,)

    def read(self, scan: Scan, schema: Schema, sink: Sink) -> Steps[None]:
        yield from scan.expect("{")
        yield from self.members(scan, ":", "}", sink)
        yield from scan.expect("}")

    def string(self, scan: Scan, quote: str, sink: Sink) -> Steps[None]:
        sink('"')
        yield from scan.until([quote], lambda text: sink(quoted(text)[1:-1]))
        sink('"')

    def written(self, value: Any) -> str:
        (quote,) = self.quotes
        if isinstance(value, str):
            return quote + value + quote
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{key}:{self.written(item)}" for key, item in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(map(self.written, value)) + "]"
        return json.dumps(value)

    def write(self, arguments: Mapping[str, Any]) -> str:
        return self.written(arguments)

    def string_grammar(self, rules: Rules) -> str:
        (quote,) = self.quotes
        return rules.rule(f"{rules.mark(quote)} {rules.text_until(quote)}")

    def key_grammar(self, rules: Rules, key: str | None) -> str:
        return rules.terminal(r"/[^:,{}\[\]\s]+/") if key is None else quoted(key)

    def grammar(self, rules: Rules, schema: Schema) -> str:
        """Keys may come in the schema's order; Google's templates sort them."""
        self._tokens(rules)
        if rules.strict and schema.get("properties"):
            ordered = {**schema, "properties": dict(sorted(schema["properties"].items()))}
            return f'"{{" {self._pairs(rules, ordered, schema, ":")} "}}"'
        if rules.strict and schema.get("additionalProperties") is not True:
            return '"{}"'
        pair = f'{self.key_grammar(rules, None)} ":" SPACE {self.any_grammar(rules)}'
        return f'"{{" ({pair} ("," SPACE {pair})*)? "}}"'


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": "", "0": "\0"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U000[0-9a-fA-F]{5}|U0010[0-9a-fA-F]{4}|[\s\S])")
_STRING = re.compile(r"[^\\'\"]*")


class Python(Literals):
    """city="Paris", days=3: between the parentheses of a call."""

    begins = ()
    closes_itself = False
    quotes = ("'''", '"""', "'", '"')

    def read(self, scan: Scan, schema: Schema, sink: Sink) -> Steps[None]:
        yield from self.members(scan, "=", ")", sink)

    def string(self, scan: Scan, quote: str, sink: Sink) -> Steps[None]:
        parts: list[str] = []
        while not (yield from scan.take(quote)):
            escaped = yield from scan.take("\\")
            if escaped:
                parts += [escaped, (yield from scan.char())]
                continue
            some: list[str] = []
            yield from scan.match(_STRING, some.append)
            parts.append("".join(some) if some else (yield from scan.char()))
        sink(quoted(_ESCAPE.sub(_unescaped, "".join(parts))))

    def written(self, value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{quoted(key)}: {self.written(v)}" for key, v in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(self.written, value)) + "]"
        return quoted(value) if isinstance(value, str) else repr(value)

    def write(self, arguments: Mapping[str, Any]) -> str:
        return ", ".join(f"{key}={self.written(value)}" for key, value in arguments.items())

    def string_grammar(self, rules: Rules) -> str:
        return rules.terminal(r"""/"([^"\\\n]|\\[^\n])*"|'([^'\\\n]|\\[^\n])*'/""")

    def key_grammar(self, rules: Rules, key: str | None) -> str:
        return self.string_grammar(rules) if key is None else either(quoted(quoted(key)), quoted(f"'{key}'"))

    def grammar(self, rules: Rules, schema: Schema) -> str:
        self._tokens(rules)
        if rules.strict:
            return self._pairs(rules, schema, schema, "=") if schema.get("properties") else '""'
        pair = f'/[A-Za-z_][A-Za-z_0-9]*/ "=" {self.any_grammar(rules)}'
        return f'({pair} ("," SPACE {pair})*)?'


def _unescaped(found: re.Match[str]) -> str:
    code = found[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return _ESCAPES.get(code, code if code in "\\'\"" else found[0])


def _literal(word: str) -> Any:
    """Raises Malformed for what is no number and no word of JSON or Python."""
    if word in WORDS:
        return WORDS[word]
    try:
        return loads(word)
    except Malformed:
        pass
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise Malformed(f"{word[:40]!r} is no value") from None
    return number
