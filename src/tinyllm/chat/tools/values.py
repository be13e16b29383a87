"""JSON values and the types that a tool's schema allows them. Imports scan (its errors)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tinyllm.chat.tools.grammar import Schema
from tinyllm.chat.tools.scan import MAX_NESTING, Malformed

_TYPES = {type(None): "null", bool: "boolean", str: "string", list: "array", dict: "object"}
WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


def loads(text: str) -> Any:
    """JSON's value, or Malformed. Keys that come twice, NaN and half surrogate pairs are malformed."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as e:
        what = "half a surrogate pair" if isinstance(e, UnicodeEncodeError) else str(e)[:200]
        raise Malformed(f"its arguments are no valid JSON: {what}") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"{key[:40]!r} comes twice")
        made[key] = value
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


ANY_TYPE = frozenset(["string", "integer", "number", "boolean", "null", "array", "object"])


def resolved(schema: Any, root: Schema, depth: int = 0) -> Schema:
    """The schema that a $ref leads to; an empty one where it leads nowhere."""
    if not isinstance(schema, Mapping) or depth > MAX_NESTING:
        return {}
    reference = schema.get("$ref")
    if not isinstance(reference, str):
        return schema
    target: Any = root
    for key in reference.removeprefix("#").strip("/").split("/"):
        target = target.get(key) if isinstance(target, Mapping) else None
    return resolved(target, root, depth + 1)


def property_of(schema: Schema, key: str) -> Any:
    properties = schema.get("properties")
    return properties.get(key) if isinstance(properties, Mapping) else None


def types_of(schema: Any, root: Schema, depth: int = 0) -> frozenset[str] | None:
    """The JSON types that a schema allows; None: it says nothing of them."""
    schema = resolved(schema, root)
    if depth > MAX_NESTING:
        return None
    named = schema.get("type")
    options = schema.get("anyOf", schema.get("oneOf"))
    types: frozenset[str] | None = None
    if isinstance(named, (str, list)):
        types = frozenset([named] if isinstance(named, str) else named)
    elif isinstance(options, list):
        parts = [types_of(option, root, depth + 1) for option in options]
        types = None if None in parts else frozenset().union(*(part or () for part in parts))
    elif isinstance(schema.get("allOf"), list):
        some = [part for option in schema["allOf"] if (part := types_of(option, root, depth + 1)) is not None]
        types = frozenset.intersection(*some) if some else None
    elif "enum" in schema or "const" in schema:
        types = frozenset(type_of(value) for value in schema.get("enum", [schema.get("const")]))
    return types | {"null"} if types is not None and schema.get("nullable") is True else types


def type_of(value: Any) -> str:
    return _TYPES.get(type(value), "integer" if isinstance(value, int) else "number")


def with_definitions(schema: Schema, root: Schema) -> Schema:
    """A part of a schema that stands alone, with the definitions it may refer to."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**shared, **schema}
