"""What Anthropic's clients ask, as an `Ask`: messages in OpenAI's form, tools, thinking, the answer's form.

Imports ask.py and thinking.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from tinyllm.server.ask import Ask, Fields
from tinyllm.server.thinking import ENABLED

SAMPLING = {  # of a body: the field of SamplingParams. Those after stop_sequences are ours.
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "stop_sequences": "stop",
    "seed": "seed",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "min_tokens": "min_tokens",
}
HARMLESS = ("metadata", "cache_control", "service_tier", "inference_geo", "user_profile_id", "workspace_id")
EFFORTS = ("low", "medium", "high", "xhigh", "max")
USUAL_EFFORT = "high"  # what leaving it out means to Anthropic's clients, some of which always say it


@dataclass(frozen=True)
class Wanted:
    """A request. shows_thinking: whether its answer has blocks of it. eager: tools whose arguments go out
    while they are written."""

    ask: Ask
    shows_thinking: bool = True
    eager: frozenset[str] = field(default_factory=frozenset)


def wanted_of(fields: Fields) -> Wanted:
    model = fields.need("model", str)
    fields.harmless(*HARMLESS)
    fields.only("speed", "standard")
    _context_management(fields)
    effort, shows_thinking = _thinking(fields)
    asked_effort, form = _output(fields)
    tools, eager, strict = _tools(fields)
    choice, one_call = _tool_choice(fields)
    ask = Ask(
        model=model,
        messages=[*_system(fields), *_messages(fields)],
        sampling=fields.renamed(SAMPLING) | form,
        tools=tools,
        tool_choice=choice,
        strict=strict,
        one_call=one_call,
        effort=asked_effort if asked_effort and effort != "none" else effort,
        usual_effort=USUAL_EFFORT,
        replay=fields.take("replay", bool, False),
    )
    return Wanted(ask, shows_thinking, eager)


def _system(fields: Fields) -> list[dict[str, Any]]:
    if "system" not in fields:
        return []
    return [{"role": "system", "content": _text_of(_blocks(fields, "system"))}]


def _messages(fields: Fields) -> Iterator[dict[str, Any]]:
    """OpenAI's messages. Turns of one role in a row are one turn."""
    given = fields.objects("messages")
    if not given:
        raise fields.refusal("messages", "must have a message", code="missing_required_parameter")
    turns: list[tuple[str, list[Fields]]] = []
    for message in given:
        role = message.word("role", "user", "assistant", "system", default="user")
        turns.append((role, _blocks(message, "content")))
        message.finish()
    if turns[-1][0] == "assistant":
        raise fields.refusal(
            "messages", "end with the assistant's, whose words are not continued here: end with the user's"
        )
    names: dict[str, str] = {}  # of the calls so far, by id
    for role, group in groupby(turns, key=lambda turn: turn[0]):
        blocks = [block for _, content in group for block in content]
        if role == "assistant":
            yield _assistant(blocks, names)
        elif role == "system":
            yield {"role": "system", "content": _text_of(blocks)}
        else:
            yield from _user(blocks, names)


def _blocks(fields: Fields, name: str) -> list[Fields]:
    """The blocks of a content, which a text is one of."""
    if fields.is_list(name):
        return fields.objects(name) or []
    return [Fields({"type": "text", "text": fields.need(name, str)})]


def _text_of(blocks: list[Fields]) -> str | list[dict[str, str]]:
    """Of blocks that may be texts only."""
    texts = []
    for block in blocks:
        _expect(block, "text")
        texts.append(_text(block))
    return _content(texts)


def _content(texts: list[str]) -> str | list[dict[str, str]]:
    if len(texts) == 1:
        return texts[0]
    return [_part(text) for text in texts]


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _expect(block: Fields, *kinds: str) -> str:
    kind = block.need("type", str)
    if kind not in kinds:
        raise block.refusal("type", f"is {kind[:64]!r}, and this server takes {', '.join(kinds)} here")
    return kind


def _text(block: Fields) -> str:
    text = block.need("text", str)
    block.harmless("cache_control")
    block.only("citations", [])
    block.finish()
    return text


def _user(blocks: list[Fields], names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    texts: list[str] = []
    for block in blocks:
        if _expect(block, "text", "tool_result") == "text":
            texts.append(_text(block))
            continue
        if texts:
            yield {"role": "user", "content": _content(texts)}
            texts = []
        yield _result(block, names)
    if texts:
        yield {"role": "user", "content": _content(texts)}


def _result(block: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """The result of a call, as a message of its own."""
    id = block.need("tool_use_id", str)
    if id not in names:
        raise block.refusal("tool_use_id", f"is {id[:64]!r}, which no tool_use before it has")
    content = _text_of(_blocks(block, "content")) if "content" in block else ""
    if block.take("is_error", bool, False):
        content = f"Error: {content}" if isinstance(content, str) else [_part("Error: "), *content]
    block.harmless("cache_control")
    block.finish()
    return {"role": "tool", "tool_call_id": id, "name": names[id], "content": content}


def _assistant(blocks: list[Fields], names: dict[str, str]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        kind = _expect(block, "text", "thinking", "tool_use")
        if kind == "text":
            texts.append(_text(block))
            continue
        if kind == "thinking":
            thoughts.append(block.need("thinking", str))
            block.harmless("signature")
        else:
            id, name = block.need("id", str), block.need("name", str)
            names[id] = name
            arguments = block.need("input", dict)
            block.only("caller", {"type": "direct"})
            calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
        block.harmless("cache_control")
        block.finish()
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or None}
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    elif not texts:
        message["content"] = ""
    return message


def _tools(fields: Fields) -> tuple[list[dict[str, Any]], frozenset[str], bool]:
    """OpenAI's tools, the names of the eager ones, and whether arguments have to follow their schema, which
    one tool asks for all."""
    tools, eager, is_strict = [], set(), False
    for tool in fields.objects("tools") or ():
        kind = tool.take("type", str, "custom")
        if kind != "custom":
            raise tool.refusal("type", f"is {kind[:64]!r}, a tool that this server has not: give your own")
        name = tool.need("name", str)
        function = {
            "name": name,
            "description": tool.take("description", str, ""),
            "parameters": tool.need("input_schema", dict),
        }
        is_strict |= tool.take("strict", bool, False)
        if tool.take("eager_input_streaming", bool, False):
            eager.add(name)
        tool.harmless("cache_control")
        tool.only("defer_loading", False)
        tool.only("allowed_callers", ["direct"])
        tool.finish()
        tools.append({"type": "function", "function": function})
    return tools, frozenset(eager), is_strict


def _tool_choice(fields: Fields) -> tuple[str, bool]:
    """In OpenAI's words, and whether there may be one call at most."""
    choice = fields.object("tool_choice")
    if choice is None:
        return "auto", False
    kind = choice.word("type", "auto", "any", "tool", "none", default="auto")
    one_call = choice.take("disable_parallel_tool_use", bool, False)
    name = choice.need("name", str) if kind == "tool" else {"any": "required"}.get(kind, kind)
    if kind == "tool" and name in ("auto", "none", "required"):
        raise choice.refusal("name", f"is {name!r}, which means something else here")
    choice.finish()
    return name, one_call


def _thinking(fields: Fields) -> tuple[str | None, bool]:
    """How much to think, and whether that is shown."""
    thinking = fields.object("thinking")
    if thinking is None:
        return None, True
    kind = thinking.word("type", "enabled", "adaptive", "disabled", default="enabled")
    budget = thinking.take("budget_tokens", int)
    if budget is not None and budget < 1:
        raise thinking.refusal("budget_tokens", f"is {budget}, expected 1 or more")
    display = thinking.word("display", "summarized", "omitted", default="summarized")
    thinking.finish()
    is_enabled = kind != "disabled"
    return ENABLED if is_enabled else "none", is_enabled and display == "summarized"


def _context_management(fields: Fields) -> None:
    """A conversation is read as it is: of the edits, only the one that keeps everything may be asked for."""
    management = fields.object("context_management")
    for edit in (management and management.objects("edits")) or ():
        _expect(edit, "clear_thinking_20251015")
        if edit.need("keep", object) not in ("all", {"type": "all"}):
            raise edit.refusal("keep", "must be 'all': nothing is left out here", "unsupported_parameter")
        edit.finish()
    if management is not None:
        management.finish()


def _output(fields: Fields) -> tuple[str | None, dict[str, Any]]:
    """How much to think, and the form of the answer."""
    output = fields.object("output_config")
    if output is None:
        return None, {}
    effort, form = output.word("effort", *EFFORTS), output.object("format")
    schema = None
    if form is not None:
        form.word("type", "json_schema")
        schema = form.need("schema", dict)
        form.finish()
    output.finish()
    return effort, {} if schema is None else {"json_schema": schema}
