"""Rules of a grammar in llguidance's Lark, collected while a format describes its calls.

Special tokens are written by their ids, everything else as text. See docs/tools.md for what is enforced and
what is not. Imports nothing of ours and not llguidance: a grammar is a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

ANY = r"/(?s:.*)/"
# Between the parts of a document, as in constraints/forms.py: more would let a model write it for ever.
WHITE_SPACE = r"( |\n {0,32})?"


class Rules:
    """special_tokens: text -> id of those that are tokens of their own. strict: whether arguments must follow
    their schema, or only their notation. unwritten: tokens that end a turn, which is no matter of grammar."""

    def __init__(
        self, special_tokens: Mapping[str, int], strict: bool, unwritten: Collection[str] = ()
    ) -> None:
        self._unwritten = unwritten
        self.strict = strict
        self._ids = special_tokens
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._names: dict[str, str] = {}
        self._suffixes: dict[str, str] = {}  # rules that say more than a body
        self._n_forward = 0

    def mark(self, text: str) -> str:
        """A fixed text."""
        for token in self._unwritten:
            text = text.replace(token, "")
        parts, at = [], 0
        for found in self._special.finditer(text):
            parts += [quoted(text[at : found.start()]), f"<[{self._ids[found[0]]}]>"]
            at = found.end()
        parts.append(quoted(text[at:]))
        return " ".join(part for part in parts if part != '""')

    def text_before(self, marks: Collection[str]) -> str:
        """Any text without these marks, one of which may follow.

        A lexer takes the longest match, and would take the mark's beginning as the text's end. So the text
        comes in chunks, each from one character that begins a mark up to the next. No text holds special
        tokens, and a mark that has such a character inside is left out.
        """
        firsts, plain = "", []  # type: str, list[str]
        for mark in marks:
            chars = firsts + mark[0]
            if not self._special.search(mark) and not any(c in m[1:] for m in [*plain, mark] for c in chars):
                firsts, plain = chars, [*plain, mark]
        if not plain:
            return self.terminal(ANY)
        first = re.escape("".join(dict.fromkeys(firsts)))
        chunk = " & ".join([f"/[{first}][^{first}]*/", *(f"~/{regex(mark)}(?s:.*)/" for mark in plain)])
        return f"{self.terminal(f'/[^{first}]*/')} {self.terminal(chunk)}*"

    def optional_after_text(self, marks: Sequence[str], calls: str) -> str:
        """A text, and calls after it that begin with the first of the marks, or none."""
        special = self._special.search(marks[0])
        lead = quoted(marks[0][: special.start()]) if special else ""
        if lead in ("", '""'):
            return f"{self.text_before(marks)} ({calls})?"
        assert special is not None
        text = self.terminal(f"/(?s:.*){regex(marks[0][: special.start()])}/")
        return f"{self.terminal(ANY)} | {text} {calls.removeprefix(lead)}"

    def text_until(self, mark: str) -> str:
        """Any text up to the mark, and the mark. Space around the mark belongs to it."""
        stop = mark.strip()
        before, after = mark[: mark.index(stop)], mark[mark.index(stop) + len(stop) :]
        found = self._special.search(stop)
        if found is not None:
            lead = before + stop[: found.start()]
            return f"{self.terminal(f'/(?s:.*){regex(lead)}/')} {self.mark(mark[len(lead) :])}"
        body = f"/(?s:.*){regex(before)}/ & ~/(?s:.*){regex(stop)}(?s:.*)/"
        name = self._names.setdefault(f"suffix {stop} {body}", f"u{len(self._names)}")
        self._suffixes[name] = f"{name}[suffix={quoted(stop)}]: {body}"
        return " ".join(filter(None, [name, self.mark(after)]))

    def json(self, schema: Schema) -> str:
        """A value in JSON."""
        return self.rule(f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': WHITE_SPACE}})}")

    def rule(self, body: str) -> str:
        """The name of a rule."""
        return self._names.setdefault(body, f"r{len(self._names)}")

    def terminal(self, body: str) -> str:
        return self._names.setdefault(body, f"T{len(self._names)}")

    def forward(self) -> str:
        """A name to be used in the body that `define` will give it."""
        self._n_forward += 1
        return f"f{self._n_forward}"

    def define(self, name: str, body: str) -> None:
        self._names[body] = name

    def source(self, start: str) -> str:
        rules = [self._suffixes.get(name, f"{name}: {body}") for body, name in self._names.items()]
        return "\n".join([f"start: {start}", *rules, ""])


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def regex(text: str) -> str:
    """A pattern for exactly this text, between slashes. To a Rust regex, \\< is more than an escaped <."""
    return re.sub(r"[.^$*+?()\[\]{}|\\/&~-]", lambda c: "\\" + c[0], text).replace("\n", "\\n")


def either(*choices: str) -> str:
    return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"


def members(items: Sequence[tuple[str, bool]], separator: str) -> str:
    """Items in their order with a separator between those that are there. items: (text, is required)."""
    tails = [
        f"{'' if required else '('}{separator} {item}{'' if required else ')?'}" for item, required in items
    ]
    choices = []
    for i, (item, required) in enumerate(items):  # the first that is there
        choices.append(" ".join([item, *tails[i + 1 :]]))
        if required:
            break
    else:
        choices.append('""')
    return either(*choices)


def closed(schema: Schema) -> Schema:
    """The schema, without properties that it does not name where it says nothing of them."""
    if "properties" in schema and "additionalProperties" not in schema:
        return {**schema, "additionalProperties": False}
    return schema


def gathered(schemas: Sequence[Schema]) -> tuple[list[Schema], dict[str, Any]]:
    """Schemas as parts of one, and the definitions that it needs: each schema's own, renamed."""
    definitions: dict[str, Any] = {}

    def moved(value: Any, prefix: str) -> Any:
        if isinstance(value, Mapping):
            return {
                key: re.sub(r"^#/(\$defs|definitions)/", f"#/$defs/{prefix}", item)
                if key == "$ref" and isinstance(item, str)
                else moved(item, prefix)
                for key, item in value.items()
            }
        return [moved(item, prefix) for item in value] if isinstance(value, list) else value

    parts: list[Schema] = []
    for i, schema in enumerate(schemas):
        prefix = f"{i}_"
        for key in ("$defs", "definitions"):
            own = schema.get(key, {})
            definitions |= {prefix + name: moved(part, prefix) for name, part in own.items()}
        parts.append(moved({k: v for k, v in schema.items() if k not in ("$defs", "definitions")}, prefix))
    return parts, definitions
