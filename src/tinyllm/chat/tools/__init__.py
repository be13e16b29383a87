"""Calls of tools as data: which format a model writes them in, how it is told of tools, its calls read while
they stream, and a grammar that lets it write nothing else.

    tools = as_tools([get_weather])                        # functions, or OpenAI's dicts
    format = format_of(template.source, special_tokens)    # a row of the table in formats.py
    prompt = render(template, messages, tools, format)     # nothing of tools, calls and results left out
    split = CallSplitter(format, tools, n_before=count_calls(messages))
    for piece in ...:                                      # what the reasoning splitter calls text, with
        for part in split.feed(piece): ...                 # the special tokens format.visible_ids(...)
    split.flush(); split.calls; split.errors
    grammar = call_grammar(format, tools, "required", special_tokens=...)   # for llguidance

Ids: the model's own where its format writes one, else one that counts the calls of the conversation
(call_0, call_1; call00000 for Mistral, functions.NAME:0 for Kimi). Turns also end at format.end_ids(...).
GENERIC is the format of a template that has none; `render` warns once where it shows no tools. docs/tools.md
has the rules in words. Imports chat's templates and reasoning, errors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinyllm.chat.tools.answers import AnswerSplitter, Calling
from tinyllm.chat.tools.calls import CallSplitter, Part
from tinyllm.chat.tools.formats import FORMATS, GENERIC, Format, format_of
from tinyllm.chat.tools.grammar import Rules
from tinyllm.chat.tools.notations import Json, Tagged
from tinyllm.chat.tools.prompt import arranged, as_message_call, count_calls, instructions, render
from tinyllm.chat.tools.schema import Tool, as_tools, schema_of
from tinyllm.chat.tools.shapes import ToolCall
from tinyllm.chat.tools.values import types_of
from tinyllm.errors import ArgumentError

__all__ = [
    "FORMATS",
    "GENERIC",
    "AnswerSplitter",
    "CallSplitter",
    "Calling",
    "Format",
    "Part",
    "Tool",
    "ToolCall",
    "arranged",
    "as_message_call",
    "as_tools",
    "call_grammar",
    "calling_of",
    "count_calls",
    "format_of",
    "instructions",
    "render",
    "schema_of",
]

log = logging.getLogger(__name__)

_warned: set[str] = set()
_BOUNDS = {"pattern", "format", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum"}
_BOUNDS |= {"exclusiveMaximum", "multipleOf", "minItems", "maxItems", "uniqueItems", "prefixItems"}


def call_grammar(
    format: Format,
    tools: Sequence[Mapping[str, Any]],
    choice: str = "auto",
    *,
    strict: bool = False,
    special_tokens: Mapping[str, int],
) -> str | None:
    """The grammar, in llguidance's Lark, of what a model may write after its reasoning (gpt-oss: with it,
    from its first channel on); None: anything.

    choice: "auto" (a text, or a text and calls), "none", "required" (calls alone) or a tool's name. strict:
    whether arguments have to follow their schema, properties in its order, and none that it does not name
    unless it allows them; without it, "auto" leaves everything free and the others only the arguments. A call
    ends with the model's own end of turn, which must be among llguidance's, as format.end_ids. Raises
    ArgumentError for a choice that is none of these. What a format's notation cannot enforce is warned of.
    """
    by_name = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if choice not in ("auto", "none", "required", *by_name):
        raise ArgumentError(
            f"tool_choice is {choice[:80]!r}, expected 'auto', 'none', 'required' or the name of a tool "
            f"({', '.join(by_name)})"
        )
    if choice == "none" or (choice == "auto" and not strict):
        return None
    if not by_name:
        raise ArgumentError(f"tool_choice is {choice!r}, but there are no tools")
    if strict:
        _warn_of_bounds(format, by_name)
    rules = Rules(special_tokens, strict, unwritten=format.end_tokens)
    if choice in by_name:
        by_name = {choice: by_name[choice]}
    calls = format.shape.grammar(rules, by_name, format.is_single or choice in by_name)
    return rules.source(format.shape.answer(rules, calls, with_text=choice == "auto"))


def calling_of(
    source: str,
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    *,
    strict: bool,
    n_before: int,
    special_tokens: Mapping[str, int],
) -> Calling | None:
    """What an answer may call; None where choice is "none". source: of the chat template. The rest, and the
    errors, as of `call_grammar` and `Calling`."""
    format = format_of(source, special_tokens)
    grammar = call_grammar(format, tools, choice, strict=strict, special_tokens=special_tokens)
    if choice == "none":
        return None
    visible, ends = format.visible_ids(special_tokens), format.end_ids(special_tokens)
    return Calling(format, tools, n_before, visible, ends, grammar)


def _warn_of_bounds(format: Format, by_name: Mapping[str, Mapping[str, Any]]) -> None:
    notation = getattr(format.shape, "notation", Json())
    if isinstance(notation, Json):
        return
    for name, schema in by_name.items():
        for key, value in (schema.get("properties") or {}).items():
            is_text = types_of(value, schema) in (None, frozenset(["string"]))
            if isinstance(notation, Tagged) and not is_text:
                continue
            if missed := sorted(_BOUNDS & set(re.findall(r"'(\w+)':", str(value)))):
                what = f"{name}({key}): {', '.join(missed)}"
                if what not in _warned:
                    _warned.add(what)
                    log.warning(
                        "strict: the format %s cannot enforce %s; check it in the call", format.name, what
                    )
