"""Tools as models are told of them: OpenAI's dicts, and Python functions turned into such.

A function's name, annotations and docstring become name, JSON schema and descriptions. What cannot be
described is an ArgumentError that says which parameter and what to do. Imports errors.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Annotated, Any, Literal, Union

from tinyllm.errors import ArgumentError

Tool = Mapping[str, Any] | Callable[..., Any]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LISTS = (list, tuple, set, frozenset, Sequence, Iterable, Collection, Set)
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def as_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """OpenAI's dicts: {"type": "function", "function": {"name", "description", "parameters"}}.

    tools: such dicts, or functions, of which `schema_of` makes them. Raises ArgumentError for a tool that is
    neither, a name that is no identifier of at most 64 letters, digits, "_", "-" and ".", or comes twice.
    """
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise TypeError(f"tools is a list of functions or dicts, not {type(tools).__name__}")
    made: list[dict[str, Any]] = []
    names: set[str] = set()
    for i, tool in enumerate(tools):
        one = _checked(tool, f"tools[{i}]") if isinstance(tool, Mapping) else schema_of(tool)
        name = one["function"]["name"]
        if name in names:
            raise ArgumentError(f"tools[{i}]: there are two tools named {name!r}; names tell calls apart")
        names.add(name)
        made.append(one)
    return made


def _checked(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise ArgumentError(
            f"{where} is no tool: expected a function, or a dict {{'type': 'function', 'function': "
            "{'name': ..., 'description': ..., 'parameters': {...}}}"
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArgumentError(
            f"{where}: the name {str(name)[:80]!r} is not made of letters, digits, '_', '-', '.'"
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ArgumentError(
            f"{where} ({name}): parameters is a {type(parameters).__name__}, not a JSON schema"
        )
    if parameters and parameters.get("type", "object") != "object":
        raise ArgumentError(f"{where} ({name}): the schema of parameters must have the type 'object'")
    whole = dict(parameters or {})  # in the order given, which templates write
    whole.setdefault("type", "object")
    whole.setdefault("properties", {})
    made = {**function, "parameters": whole}
    made.setdefault("description", "")
    return {"type": "function", "function": made}


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """A function as a tool. `arguments` of a call fit it: function(**call.arguments).

    Annotations: str, int, float, bool, None, list[T] and the like, dict[str, T], Literal, Enum (its values),
    T | None, dataclasses, TypedDict, pydantic models, Any, and Annotated[T, "description"]. A parameter with
    a default is not required. Dataclasses, Enum members and models arrive as plain data.
    The docstring's first part describes the function, its parameters are found in Google's, numpy's and
    reST's style. Raises ArgumentError.

        def get_weather(city: str, days: int = 1) -> str:
            '''The weather forecast.

            Args:
                city: Name of the city, in English.
            '''
    """
    if not callable(function):
        raise ArgumentError(f"a tool is a function or a dict, not {type(function).__name__}")
    name = getattr(function, "__name__", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArgumentError(f"{function!r:.80} has no name that a model could call; use def, or set __name__")
    try:
        signature = inspect.signature(function)
        is_object = not (inspect.isroutine(function) or inspect.isclass(function))
        source = type(function).__call__ if is_object else function
        hints = typing.get_type_hints(
            source.__init__ if inspect.isclass(source) else source, include_extras=True
        )
    except (TypeError, ValueError, NameError, AttributeError) as e:
        raise ArgumentError(f"{name}: its signature cannot be read: {e}") from None
    description, described = parse_docstring(inspect.getdoc(function) or "")
    properties, required = {}, []
    for key, parameter in signature.parameters.items():
        where = f"{name}: parameter {key}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ArgumentError(
                f"{where}: models call by names, one for each value; wrap it in a function that does"
            )
        if key not in hints:
            raise ArgumentError(f"{where} has no annotation; write its type, as in {key}: str")
        schema = _schema(hints[key], where, ())
        if "description" not in schema and key in described:
            schema = {**schema, "description": described[key]}
        if parameter.default is parameter.empty:
            required.append(key)
        elif parameter.default is not None and _is_plain(parameter.default):
            schema = {**schema, "default": parameter.default}
        properties[key] = schema
    parameters: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def _is_plain(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def _schema(hint: Any, where: str, within: tuple[Any, ...]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _PLAIN if isinstance(hint, type) else hint is None:
        return {"type": _PLAIN[hint] if hint is not None else "null"}
    if origin is Annotated:
        schema = _schema(arguments[0], where, within)
        text = next((extra for extra in arguments[1:] if isinstance(extra, str)), None)
        return schema if text is None else {**schema, "description": text}
    if origin is Literal:
        return _enumerated(arguments, where)
    if origin in (Union, types.UnionType):
        return _union([_schema(argument, where, within) for argument in arguments])
    if hint in within:
        raise ArgumentError(f"{where}: {hint.__name__} holds itself, which cannot be written out; use dict")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enumerated([member.value for member in hint], where)
    if hint in _LISTS or origin in _LISTS:
        return _array(origin or hint, arguments, where, within)
    if hint in (dict, Mapping) or origin in (dict, Mapping):
        if arguments and arguments[0] is not str:
            raise ArgumentError(f"{where}: the keys of a JSON object are texts; use dict[str, ...]")
        value = _schema(arguments[1], where, within) if arguments else {}
        return {"type": "object", **({"additionalProperties": value} if value else {})}
    if isinstance(hint, type):
        return _fields(hint, where, (*within, hint))
    raise ArgumentError(f"{where} has the type {_shown(hint)}, which JSON schema cannot say; {_HINT}")


_HINT = "use str, int, float, bool, list, dict, Literal, an Enum, a dataclass or a pydantic model"


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)[:80]


def _array(kind: Any, arguments: tuple[Any, ...], where: str, within: tuple[Any, ...]) -> dict[str, Any]:
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        items = [_schema(argument, where, within) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    schema = _schema(arguments[0], where, within) if arguments else {}
    return {"type": "array", **({"items": schema} if schema else {})}


def _enumerated(values: Sequence[Any], where: str) -> dict[str, Any]:
    if not all(value is None or isinstance(value, (str, int, float, bool)) for value in values):
        raise ArgumentError(f"{where}: its values are no texts or numbers: {list(values)!r:.80}")
    kinds = list(dict.fromkeys(_PLAIN[type(value)] for value in values if type(value) in _PLAIN))
    return {**({"type": kinds[0]} if len(kinds) == 1 else {}), "enum": list(values)}


def _union(options: list[dict[str, Any]]) -> dict[str, Any]:
    """The types' names in one list where nothing else is said of them, as in ["integer", "null"]."""
    if all(option.keys() == {"type"} and isinstance(option["type"], str) for option in options):
        return {"type": list(dict.fromkeys(option["type"] for option in options))}
    return {"anyOf": options}


def _fields(kind: type, where: str, within: tuple[Any, ...]) -> dict[str, Any]:
    """The schema of a class whose attributes are known."""
    if hasattr(kind, "model_json_schema"):  # pydantic, without importing it
        return _inlined(kind.model_json_schema(), where)
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        required = [key for key in hints if key in kind.__required_keys__]  # type: ignore[attr-defined]
        hints = {key: _unwrapped(hint) for key, hint in hints.items()}
    elif dataclasses.is_dataclass(kind):
        all_hints = typing.get_type_hints(kind, include_extras=True)
        own = [f for f in dataclasses.fields(kind) if f.init]
        hints = {f.name: all_hints[f.name] for f in own}
        missing = dataclasses.MISSING
        required = [f.name for f in own if f.default is missing and f.default_factory is missing]
    else:
        raise ArgumentError(f"{where} has the type {kind.__name__}, which JSON schema cannot say; {_HINT}")
    _, described = parse_docstring(kind.__doc__ or "")
    properties = {}
    for key, hint in hints.items():
        schema = _schema(hint, f"{where}.{key}", within)
        text = {"description": described[key]} if key in described and "description" not in schema else {}
        properties[key] = {**schema, **text}
    return {"type": "object", "properties": properties, "required": required}


def _unwrapped(hint: Any) -> Any:
    """Without Required and NotRequired, which Python 3.10 has not."""
    wrappers = {getattr(typing, name, None) for name in ("Required", "NotRequired")}
    return typing.get_args(hint)[0] if typing.get_origin(hint) in wrappers - {None} else hint


def _inlined(schema: dict[str, Any], where: str) -> dict[str, Any]:
    """The schema with its definitions where they are used, as most templates know no references."""
    definitions = schema.get("$defs", {})

    def without_references(value: Any, within: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [without_references(item, within) for item in value]
        if not isinstance(value, dict):
            return value
        reference = value.get("$ref")
        if reference is None:
            return {k: without_references(v, within) for k, v in value.items() if k != "$defs"}
        if reference in within:
            raise ArgumentError(f"{where}: {reference} holds itself, which cannot be written out; use dict")
        target = definitions[reference.rpartition("/")[2]]
        rest = {k: v for k, v in value.items() if k != "$ref"}
        return {**without_references(target, (*within, reference)), **rest}

    made: dict[str, Any] = without_references(schema, ())
    return made


# ---- docstrings

_PARAMETERS = {"Args", "Arguments", "Params", "Parameters", "Keyword Args", "Other Parameters", "Attributes"}
_OTHERS = {"Return", "Returns", "Yield", "Yields", "Raises", "Warns", "Example", "Examples", "Note", "Notes"}
_OTHERS |= {"See Also", "References", "Warning", "Warnings", "Todo"}
_REST = re.compile(r":(\w+)(?:\s+([^:]*?))?:\s*(.*)")  # :param city: text
_GOOGLE = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")  # city (str): text
_NUMPY = re.compile(r"([\w*, ]+?)\s*(?::.*)?")  # city : str, with the text on lines of its own below


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function, and of its parameters by name."""
    found: dict[str, list[str]] = {}
    about: list[str] = []
    for title, is_numpy, lines in _sections(inspect.cleandoc(text).splitlines()):
        if not title:
            about = lines
        elif title == ":":
            _rest(lines, found)
        elif title in _PARAMETERS:
            _entries(lines, _NUMPY if is_numpy else _GOOGLE, found)
    texts = {name: " ".join(" ".join(lines).split()) for name, lines in found.items()}
    return "\n".join(about).strip(), {name: text for name, text in texts.items() if text}


def _sections(lines: list[str]) -> list[tuple[str, bool, list[str]]]:
    """(title, whether it is underlined as numpy does, lines); what stands first has no title, and a list of
    reST's fields the title ":"."""
    sections: list[tuple[str, bool, list[str]]] = [("", False, [])]
    for i, line in enumerate(lines):
        below = lines[i + 1] if i + 1 < len(lines) else ""
        is_numpy = bool(re.fullmatch(r"-{3,}\s*", below))
        title = line.rstrip().removesuffix(":")
        if _REST.fullmatch(line) and sections[-1][0] != ":":
            sections.append((":", False, [line]))
        elif title in _PARAMETERS | _OTHERS and (is_numpy or line.rstrip().endswith(":")):
            sections.append((title, is_numpy, []))
        else:
            sections[-1][2].append(line)
    return sections


def _rest(lines: list[str], found: dict[str, list[str]]) -> None:
    name = ""
    for line in lines:
        if field := _REST.fullmatch(line):
            is_parameter = field[1] in ("param", "parameter", "arg", "argument", "key", "keyword")
            name = field[2].split()[-1].lstrip("*") if is_parameter and field[2] else ""
            found.update({name: [field[3]]} if name else {})
        elif name:
            found[name].append(line)


def _entries(lines: list[str], pattern: re.Pattern[str], found: dict[str, list[str]]) -> None:
    """Names at the section's own indentation, texts beside them or further in."""
    filled = [line for line in lines if line.strip() and not re.fullmatch(r"-{3,}\s*", line)]
    outer = min((len(line) - len(line.lstrip()) for line in filled), default=0)
    names: list[str] = []
    for line in filled:
        entry = pattern.fullmatch(line.strip()) if len(line) - len(line.lstrip()) == outer else None
        if entry is not None:
            names = [name.strip().lstrip("*") for name in entry[1].split(",")]
            found.update({name: [entry[2]] if pattern is _GOOGLE else [] for name in names})
        else:
            for name in names:
                found[name].append(line)
