"""What a client asks, in one form whichever dialect it speaks, and what is said to one that is refused.

Invariant: nothing that a request says is ignored in silence. `Fields` hands out the members of a body; each
is taken, or is one of those that a dialect lists as harmless, or the request is refused by its name. Imports
`errors` and SamplingParams; every dialect stands on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from tinyllm import SamplingParams
from tinyllm.errors import (
    ArgumentError,
    ContextError,
    Error,
    LostError,
    MemoryLimitError,
    ModelClosedError,
    TemplateError,
    UnsupportedError,
)

Value = TypeVar("Value")


class Refusal(Exception):
    """Why a request is not answered: an HTTP status and a sentence for its author.

    param: the member of the body that it is about. code: a word for programs. retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after


def refusal_of(error: Exception) -> Refusal:
    """What is said of an error. One of ours is told as it is; any other is ours to mend and tells nothing."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ContextError):
        return Refusal(400, str(error), code="context_length_exceeded")
    if isinstance(error, (ArgumentError, TemplateError, UnsupportedError)):
        return Refusal(400, str(error), code="invalid_value")
    if isinstance(error, RecursionError):
        return Refusal(400, "the body is nested too deeply", code="invalid_value")
    if isinstance(error, MemoryLimitError):
        return Refusal(503, str(error), code="out_of_memory", retry_after=1)
    if isinstance(error, LostError):
        return Refusal(503, str(error), code="lost", retry_after=5)
    if isinstance(error, ModelClosedError):
        return Refusal(503, "the server is ending", code="closing", retry_after=1)
    if isinstance(error, Error):
        return Refusal(500, str(error), code="model_error")
    return Refusal(500, "an internal error: the server's log names it", code="internal_error")


@dataclass(frozen=True)
class Ask:
    """One request for text: of a conversation (`messages`) or after a prompt (a text or ids), never both.

    model: a name, None for the first one served. sampling: the fields of SamplingParams that the client gave.
    n: how many answers. one_call: at most one call of a tool in each. effort: how much a model is to think,
    in OpenAI's words ("none", "low"...). usual_effort: the one that means the same as none given, in its
    dialect; a model that cannot think takes it, too. replay: whether the answer is to carry what
    `tinyllm-run --replay` reads. The rest are arguments of `LLM.achat` and `LLM.astream`.
    """

    model: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] = ""
    n: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    strict: bool = False
    chat_template: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    special: bool = False
    one_call: bool = False
    effort: str | None = None
    usual_effort: str | None = None
    replay: bool = False


def read_json(body: bytes) -> Any:
    """The value of a request's body. Refuses what is no JSON in UTF-8, NaN, and what is nested past Python's
    depth."""

    def no_number(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=no_number)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start}", code="invalid_json") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON: {error}", code="invalid_json") from None


_WORDS = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class Fields:
    """The members of a JSON object, handed out by name. null counts as left out.

    fields = Fields(body); seed = fields.take("seed", int); fields.harmless("user"); fields.finish()
    """

    def __init__(self, value: Any, where: str = "") -> None:
        """where: what the object is called in messages, with a dot; "" for the body."""
        if not isinstance(value, dict):
            name = where.rstrip(".") or "the body"
            raise Refusal(
                400, f"{name} must be an object", param=where.rstrip(".") or None, code="invalid_type"
            )
        self._left = {key: item for key, item in value.items() if item is not None}
        self._known = {key for key, item in value.items() if item is None}
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    @overload
    def take(self, name: str, kind: type[Value]) -> Value | None: ...

    @overload
    def take(self, name: str, kind: type[Value], default: Value) -> Value: ...

    def take(self, name: str, kind: type[Any], default: Any = None) -> Any:
        """The member, None or the default where it is left out. kind: str, bool, int, float (whole numbers,
        too), list, dict, or object for any. Refuses another kind."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind in (int, float)):
            raise self.refusal(name, f"must be {_WORDS[kind]}", code="invalid_type")
        return value

    def need(self, name: str, kind: type[Value]) -> Value:
        """The same of a member that has to be there."""
        value = self.take(name, kind)
        if value is None:
            raise self.refusal(name, "is missing", code="missing_required_parameter")
        return value

    def is_list(self, name: str) -> bool:
        return isinstance(self._left.get(name), list)

    def objects(self, name: str) -> list[Fields] | None:
        """A list of objects."""
        items = self.take(name, list)
        if items is None:
            return None
        return [Fields(item, f"{self._where}{name}[{i}].") for i, item in enumerate(items)]

    def object(self, name: str) -> Fields | None:
        value = self.take(name, dict)
        return None if value is None else Fields(value, f"{self._where}{name}.")

    def need_object(self, name: str) -> Fields:
        """One that has to be there."""
        return Fields(self.need(name, dict), f"{self._where}{name}.")

    @overload
    def word(self, name: str, *words: str) -> str | None: ...

    @overload
    def word(self, name: str, *words: str, default: str) -> str: ...

    def word(self, name: str, *words: str, default: str | None = None) -> str | None:
        """A member that is one of these."""
        value = self.take(name, str)
        if value is not None and value not in words:
            shown = value if len(value) <= 64 else value[:61] + "..."
            raise self.refusal(name, f"is {shown!r}, expected {' or '.join(map(repr, words))}")
        return default if value is None else value

    def renamed(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Members that mean fields of SamplingParams: {field: value} of {member: field}. Refuses a value that
        the field does not take, in the client's word for it, and two members that mean one field otherwise.
        """
        found: dict[str, Any] = {}
        given: dict[str, str] = {}
        for member in [name for name in names if name in self._left]:
            value, field = self._left.pop(member), names[member]
            if field in found and found[field] != value:
                raise self.refusal(member, f"means the same as {given[field]}: give one of them")
            try:
                SamplingParams(**{field: value})
            except (ArgumentError, TypeError) as error:
                code = "invalid_type" if isinstance(error, TypeError) else "invalid_value"
                where = f"{self._where}{member}"
                raise Refusal(400, str(error).replace(field, where), param=where, code=code) from None
            found[field], given[field] = value, member
        return found

    def harmless(self, *names: str) -> None:
        """Known, and without a meaning here: an answer is the same with and without."""
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, *values: Any, why: str = "is not supported") -> None:
        """Refuses every value of a member but these, which ask for what happens anyway."""
        value = self._left.pop(name, None)
        if value is not None and not any(value == v and type(value) is type(v) for v in values):
            raise self.refusal(name, why, code="unsupported_parameter")

    def drop(self, name: str, value: Any) -> bool:
        """Takes a member where it is just this value; whether it was."""
        found = type(self._left.get(name)) is type(value) and self._left[name] == value
        if found:
            del self._left[name]
        return found

    def finish(self) -> None:
        """Refuses what nobody has taken."""
        for name in self._left:
            raise self.refusal(name, "is not known here", code="unknown_parameter")

    def rest(self) -> dict[str, Any]:
        """What nobody has taken, as it came."""
        left, self._left = self._left, {}
        return left

    def refusal(self, name: str, why: str, code: str = "invalid_value") -> Refusal:
        """A 400 about a member."""
        shown = name if len(name) <= 64 else name[:61] + "..."
        return Refusal(400, f"{self._where}{shown} {why}", param=f"{self._where}{shown}", code=code)
