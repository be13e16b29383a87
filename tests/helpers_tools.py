"""Tools, calls and templates for the tests of tool calls, and what a model would have written."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinyllm.chat.reasoning import splitter
from tinyllm.chat.templates import ChatTemplate
from tinyllm.chat.tools import CallSplitter, Format, Part, ToolCall, format_of, render

OBJECT = {"type": "object", "additionalProperties": {"description": "Any."}}  # which one template asks for
PROPERTIES: dict[str, Any] = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "exact": {"type": "boolean"},
    "factor": {"type": "number"},
    "options": OBJECT,
    "tags": {"type": "array", "items": {"type": "string"}},
}
for _name, _schema in PROPERTIES.items():
    _schema["description"] = f"The {_name}."


def tool(name: str, properties: dict[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    function = {"name": name, "description": f"Does {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("get_weather", PROPERTIES, ["city"]), tool("now", {})]

ARGUMENTS: dict[str, Any] = {
    "plain": {"city": "Paris"},
    "typed": {"city": "5", "days": 5, "exact": True, "factor": 2.5, "tags": ["a", "5"]},
    "unicode": {"city": "Zürich 東京 🚀 ｜▁ \u200b", "tags": ["é"]},
    "quotes": {"city": "a \"b\" 'c' \\d\\n {e} [f] </g> <h>", "tags": ['"', "\\", "'"]},
    "nested": {"city": "x", "options": {"a": 1, "b": {"c": [1, {"d": 2}]}}, "tags": []},
    "lines": {"city": "a\n\tb\n\n  c", "days": -1},
    "spaces": {"city": "  a  ", "exact": False},
    "empty text": {"city": ""},
}
ENDS = (
    *(
        "<|im_end|>",
        "</s>",
        "<seed:eos>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|>",
        "[e~[",
        "<sep>",
    ),
    *(
        "<|message_sep|>",
        "<SPECIAL_12>",
        "<｜end▁of▁sentence｜>",
        "<|tool_response>",
        "<turn|>",
        "<|eom_id|>",
    ),
    *(
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|call|>",
        "<|calls|>",
        "<|end|>",
        "<|user|>",
        "<|observation|>",
        "<end_of_turn>",
    ),
)
TOKENS = {"LFM2.5-Instruct": ("<|tool_call_start|>", "<|tool_call_end|>")}  # of vocabularies, not templates
VARIABLES = {  # that one template wants
    "fireworks-ai-llama-3-firefunction-v2": {"functions": json.dumps(TOOLS), "datetime": "today"},
}


@functools.cache
def chat_template(path: Path) -> ChatTemplate:
    return ChatTemplate(path.read_text(encoding="utf-8"), bos_token="<s>", eos_token="</s>")


def call_dict(i: int, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": f"call0000{i}", "type": "function", "function": {"name": name, "arguments": arguments}}


def said(path: Path, calls: Sequence[tuple[str, dict[str, Any]]]) -> tuple[str, str]:
    """The prompt and what the model must have written after it, for the template to render these calls so.

    Where a template renders an answer's own turn otherwise than the prompt ends (without an empty block of
    reasoning, say), the prompt ends where they part. Raises TemplateError.
    """
    template, extra = chat_template(path), VARIABLES.get(path.stem, {})
    format = format_of(template.source, TOKENS.get(path.stem, ()))
    user = {"role": "user", "content": "Hi"}
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [call_dict(i, *call) for i, call in enumerate(calls)],
    }
    prompt = render(template, [user], TOOLS, format, **extra)
    whole = render(template, [user, answer], TOOLS, format, add_generation_prompt=False, **extra)
    return _parted(prompt, whole)


def common_length(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _parted(prompt: str, whole: str) -> tuple[str, str]:
    common = whole[: common_length(prompt, whole)]
    if common != prompt and common.rfind("<") > common.rfind(">"):
        common = common[: common.rfind("<")]  # within a token
    text = whole[len(common) :]
    if common != prompt:  # the start of a turn, and of an answer after no reasoning
        text = text.removeprefix("<|CHATBOT_TOKEN|>")
        if text.startswith("</think>"):
            common, text = common.removesuffix("<think>"), text.removeprefix("</think>")
    ends = [at for end in ENDS if (at := text.find(end, 1)) >= 0]
    return common, text[: min(ends, default=len(text))]


def read(format: Format, pieces: Iterable[str], tools: Any = TOOLS, **options: Any) -> CallSplitter:
    """A splitter that has read these pieces; `parts` has all it said."""
    machine = CallSplitter(format, tools, **options)
    machine.parts = [part for piece in pieces for part in machine.feed(piece)]  # type: ignore[attr-defined]
    machine.parts += machine.flush()  # type: ignore[attr-defined]
    return machine


def parts_of(machine: CallSplitter) -> list[Part]:
    parts: list[Part] = machine.parts  # type: ignore[attr-defined]
    return parts


def text_of(machine: CallSplitter) -> str:
    return "".join(part.text for part in parts_of(machine) if part.kind == "text")


def called(machine: CallSplitter) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in machine.calls]


def answer_of(format: Format, prompt: str, text: str) -> str:
    """What the reasoning splitter leaves of a model's text."""
    channels = ["<|channel|>", "<|message|>"] if "<|channel|>" in format.shape.opens else []
    reasoning = splitter(prompt, channels)
    parts = reasoning.feed(text) + reasoning.flush()
    return "".join(part for kind, part in parts if kind == "text")


def tool_call(name: str, arguments: dict[str, Any], i: int = 0) -> ToolCall:
    return ToolCall(f"call0000{i}", name, arguments)
