"""LlamaGrammar: what an answer has to look like, in GBNF or as a JSON schema.

It is read when a text is asked for, by tinyllm's own forms (docs/structured.md), which need llguidance.
Imports errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinyllm.errors import ArgumentError


class LlamaGrammar:
    """Made by `from_string`, `from_file` or `from_json_schema`."""

    def __init__(self, *, _grammar: str | None = None, _schema: Any = None) -> None:
        self._grammar, self._schema = _grammar, _schema

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """A grammar in GBNF; its first rule is `root`."""
        return cls(_grammar=grammar)

    @classmethod
    def from_file(cls, file: str | Path, verbose: bool = True) -> LlamaGrammar:
        """The same, of a file. Raises OSError, and ArgumentError (a ValueError) for an empty one."""
        text = Path(file).read_text(encoding="utf-8")
        if not text.strip():
            raise ArgumentError(f"{file}: the grammar is empty")
        return cls(_grammar=text)

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> LlamaGrammar:
        """A JSON schema, as JSON text. Raises ArgumentError (a ValueError) for text that is no JSON."""
        try:
            return cls(_schema=json.loads(json_schema))
        except ValueError as error:
            raise ArgumentError(f"json_schema is no JSON: {error}") from None

    @classmethod
    def json_object(cls) -> LlamaGrammar:
        """Any JSON object."""
        return cls(_schema=True)

    @property
    def form(self) -> dict[str, Any]:
        """The fields of SamplingParams that ask for it."""
        return {"grammar": self._grammar} if self._grammar is not None else {"json_schema": self._schema}


def grammar_of_format(response_format: dict[str, Any] | None) -> LlamaGrammar | None:
    """What `response_format` asks for: {"type": "json_object"}, which may hold a "schema", or OpenAI's
    {"type": "json_schema", "json_schema": {"schema": ...}}; None for "text". Raises ArgumentError."""
    kind = (response_format or {"type": "text"}).get("type")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return LlamaGrammar(_schema=response_format.get("schema", True))
    if kind == "json_schema":
        inner = response_format.get("json_schema") or {}
        return LlamaGrammar(_schema=inner.get("schema", response_format.get("schema", True)))
    raise ArgumentError(
        f"response_format has the type {kind!r}, expected 'text', 'json_object' or 'json_schema'"
    )
