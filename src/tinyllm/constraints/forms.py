"""What users ask of an answer's form: exactly one of a JSON schema, a regex, choices and a grammar.

Invariant: a form never weakens. A keyword of a schema that would not be enforced is a ConstraintError with
its name, before anything is computed. Imports `errors`, and llguidance when a form is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllm.errors import ConstraintError, UnsupportedError, install_text

ANY_OBJECT = {"type": "object"}
# Between the parts of a document: nothing, a space, or a line break and an indent. More would let a model
# write white space for ever.
WHITE_SPACE = r"( |\n {0,32})?"


@dataclass(frozen=True)
class Form:
    """What a text has to match. grammar: in llguidance's own notation. kind: how it was asked for. model: a
    pydantic model's class, which `parse` makes an instance of.
    """

    kind: str
    grammar: str
    model: Any = None

    def parse(self, text: str) -> Any:
        """The value of a finished text: what its JSON says (of a pydantic model: the instance), else itself.
        Raises ConstraintError with the text where it is no whole document."""
        if self.kind != "json_schema":
            return text
        try:
            return json.loads(text) if self.model is None else self.model.model_validate_json(text)
        except ValueError as error:
            raise ConstraintError(
                f"the answer is no whole document: {error}. It ends too early where finish_reason is "
                f"'length': raise max_tokens. The text: {text!r}"
            ) from None


def form_of(
    *, json_schema: Any = None, regex: Any = None, choices: Any = None, grammar: Any = None
) -> Form | None:
    """The form that a call asks for; None where it asks for none.

    json_schema: a dict, JSON text, True (any object) or a pydantic model's class. regex: in the notation of
    Rust's regex crate, for the whole text. choices: strings. grammar: Lark, or llama.cpp's GBNF. Raises
    ConstraintError for one that is wrong or that cannot be enforced, TypeError, UnsupportedError without
    llguidance.
    """
    given = {"json_schema": json_schema, "regex": regex, "choices": choices, "grammar": grammar}
    asked = [name for name, value in given.items() if value is not None and value is not False]
    if not asked:
        return None
    if len(asked) > 1:
        raise ConstraintError(f"{' and '.join(asked)} cannot be used together: an answer has one form")
    matcher = guidance().LLMatcher
    (kind,) = asked
    if kind == "json_schema":
        schema, model = _schema(json_schema)
        form = Form(kind, _from_schema(matcher, schema), model)
    elif kind == "regex":
        form = Form(kind, matcher.grammar_from_regex(_text("regex", regex)))
    elif kind == "choices":
        form = Form(kind, matcher.grammar_from_lark(f"start: {_alternatives(choices)}"))
    else:
        form = Form(kind, matcher.grammar_from_lark(_lark(_text("grammar", grammar))))
    return _checked(form)


def form_of_calls(lark: str, tokens: Any) -> Form:
    """Of calls of tools, in llguidance's Lark, which names special tokens by their ids in `tokens`, an
    LLTokenizer. Raises as `form_of`."""
    return _checked(Form("tool_choice", guidance().LLMatcher.grammar_from_lark(lark)), tokens)


def _checked(form: Form, tokens: Any = None) -> Form:
    is_wrong, messages = guidance().LLMatcher.validate_grammar_with_warnings(form.grammar, tokens)
    if is_wrong or messages:  # a warning is of something that is not enforced
        raise ConstraintError(f"{form.kind} cannot be enforced: {_brief('; '.join(messages))}")
    return form


def guidance() -> Any:
    """The package llguidance; UnsupportedError says how to get it."""
    try:
        import llguidance
    except ImportError:
        raise UnsupportedError(
            "json_schema, regex, choices, grammar and tool_choice need the package llguidance: "
            + install_text("structured")
        ) from None
    return llguidance


def _schema(asked: Any) -> tuple[dict[str, Any] | bool, Any]:
    """A schema as a dict (or true), and the pydantic model it is of."""
    if asked is True:
        return ANY_OBJECT, None
    if isinstance(asked, Mapping):
        return dict(asked), None
    if isinstance(asked, str):
        try:
            schema = json.loads(asked)
        except ValueError as error:
            raise ConstraintError(f"json_schema is no JSON: {error}") from None
        if not isinstance(schema, (dict, bool)):
            raise ConstraintError(f"a JSON schema is an object, not {_brief(asked)}")
        return schema, None
    if isinstance(asked, type) and hasattr(asked, "model_json_schema"):
        return _closed(asked.model_json_schema()), asked
    raise TypeError(
        "json_schema must be a dict, JSON text, True or the class of a pydantic model, "
        f"not {type(asked).__name__}"
    )


def _closed(schema: Any) -> Any:
    """A pydantic model's schema without properties that no field is there for."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def _from_schema(matcher: Any, schema: dict[str, Any] | bool) -> str:
    try:
        options = {"whitespace_pattern": WHITE_SPACE}  # what the schema's own "x-guidance" may replace
        grammar: str = matcher.grammar_from_json_schema(json.dumps(schema), options)
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"json_schema is no JSON: {error}") from None
    return grammar


def _alternatives(choices: Any) -> str:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise TypeError(f"choices must be a sequence of strings, not {type(choices).__name__}")
    if not choices:
        raise ConstraintError("choices is empty: give at least one")
    for choice in choices:
        if not isinstance(choice, str):
            raise TypeError(f"choices must be strings, not {type(choice).__name__}")
        if not choice:
            raise ConstraintError("a choice is empty: give text that an answer can have")
    return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices))


def _lark(grammar: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark: str = any_to_lark(grammar)
    except Exception as error:  # of classes of its own
        raise ConstraintError(f"the grammar is neither Lark nor GBNF: {_brief(str(error))}") from None
    return lark


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    if not value.strip():
        raise ConstraintError(f"{name} is empty")
    return value


def _brief(text: str) -> str:
    return text if len(text) <= 500 else f"{text[:500]} ..."
