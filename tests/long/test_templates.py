"""The makers' chat templates on 22 conversations: the very prompts of transformers' `apply_chat_template`.

Wants transformers 5 and the templates, tests/data.md says from where: those of an unpacked llama.cpp that
TINYLLM_LLAMA_CPP names, else those of the test data. Skipped without.

Where a client's form is one that a template was not written for (a list of parts, arguments as JSON, null),
transformers prints it as Python does, or fails. So there the prompt is to be transformers' for one of the
forms that say the same, and it must not show the form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tinyllm.chat.templates import ChatTemplate
from tinyllm.errors import Error

pytestmark = pytest.mark.filterwarnings("default")  # transformers has its own
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather & <b>of</b> a place: 'été'",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where", "enum": ["Paris", "Zürich"]},
                "days": {"type": "integer", "default": 3},
                "options": {
                    "type": "object",
                    "properties": {"unit": {"type": "string"}},
                    "required": ["unit"],
                },
                "hours": {"type": "array", "items": {"type": "string"}},
                "note": {"type": ["string", "null"]},
            },
            "required": ["city"],
        },
    },
}
NOTHING = {"name": "noop", "description": "Nothing", "parameters": {"type": "object", "properties": {}}}
TOOLS = {"tools": [WEATHER, {"type": "function", "function": NOTHING}]}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(arguments: Any, name: str = "get_weather", call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}


def found(content: Any, name: str = "get_weather", call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


ASKED = user("Weather?")
MANY = {
    "city": "Zürich",
    "days": 2,
    "x": 1.5,
    "b": True,
    "n": None,
    "options": {"unit": "C"},
    "hours": ["1", "2"],
}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one": ([user("Hello")], {}),
    "spaces": ([system("You are  terse.\n"), user(" Hi <there> & 'you' \n")], {}),
    "turns": ([system("Sys"), user("a"), assistant("b"), user("c")], {}),
    "reasoning": ([user("a"), assistant("b", reasoning_content="because\n"), user("c")], {}),
    "thinking": (
        [user("a"), assistant("b", thinking="because"), user("c"), assistant("d", reasoning_content="r2")],
        {"add_generation_prompt": False},
    ),
    "reasoning, third name": ([user("a"), assistant("b", reasoning="because"), user("c")], {}),
    "tags": ([user("a"), assistant("<think>\nbecause\n</think>\n\nb"), user("c")], {}),
    "tools": ([system("Sys"), ASKED], TOOLS),
    "call": ([ASKED, assistant("", tool_calls=[call(MANY)]), found('{"t": 12}')], TOOLS),
    "null": (
        [
            ASKED,
            assistant(None, tool_calls=[call({"city": "Paris"})]),
            found("12 °C"),
            assistant("12."),
            user("ty"),
        ],
        TOOLS,
    ),
    "json": ([ASKED, assistant("", tool_calls=[call('{"city": "Paris"}')]), found("12")], TOOLS),
    "reasoned calls": (
        [
            system("Sys"),
            ASKED,
            assistant(
                "Let me see",
                reasoning_content="need it",
                tool_calls=[call({"city": "Paris"}), call({}, "noop", "bcdefghij")],
            ),
            found("12"),
            found("ok", "noop", "bcdefghij"),
        ],
        TOOLS,
    ),
    "parts": ([system(parts("Sys")), user(parts("Hello ", "world"))], {}),
    "parts of a result": (
        [ASKED, assistant("", tool_calls=[call({"city": "Paris"})]), found(parts("12"))],
        TOOLS,
    ),
    "a dict of a result": (
        [ASKED, assistant("", tool_calls=[call({"city": "Paris"})]), found({"t": 12, "ok": True})],
        TOOLS,
    ),
    "thinking off": ([system("Sys"), user("a")], {"enable_thinking": False, "thinking": False}),
    "thinking on": (
        [system("Sys /no_think"), user("a")],
        {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
    ),
    "documents": ([user("a")], {"documents": [{"title": "T", "text": "body", "doc_id": "1"}]}),
    "empty": ([user(""), assistant(""), user("x")], {}),
    "answered": ([user("a"), assistant("b")], {"add_generation_prompt": False}),
    "developer": ([{"role": "developer", "content": "Dev"}, user("a")], {}),
    "null beside nothing": ([user("a"), assistant("b", tool_calls=None, name=None), user("c")], {}),
}


def templates(data_dir: Path) -> list[Path]:
    source = os.environ.get("TINYLLM_LLAMA_CPP")
    return sorted((Path(source) / "models/templates" if source else data_dir / "chat/jinja").glob("*.jinja"))


def forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages as they are, and in all other forms that say the same."""

    def of(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        contents = [message.get("content")]
        if isinstance(contents[0], list):
            contents.append("".join(part["text"] for part in contents[0]))
        if contents[0] is None:
            contents.append("")
        for content in contents:
            calls = message.get("tool_calls") or []
            for as_text in (False, True) if calls else (None,):
                yield {
                    **message,
                    "content": content,
                    **({} if as_text is None else {"tool_calls": [rewritten(c, as_text) for c in calls]}),
                }

    yield messages
    for combination in product(*map(of, messages)):
        yield list(combination)


def rewritten(tool_call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    arguments = tool_call["function"]["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not as_text and isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {**tool_call, "function": {**tool_call["function"], "arguments": arguments}}


class Theirs:
    """transformers; None where it fails."""

    def __init__(self) -> None:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        if int(transformers.__version__.split(".")[0]) < 5:
            pytest.skip("transformers is older than 5")
        tokenizers = pytest.importorskip("tokenizers")
        from transformers.utils.chat_template_utils import render_jinja_template

        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        self._tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS)
        self._render = render_jinja_template

    def __call__(self, source: str, messages: Any, options: dict[str, Any]) -> str | None:
        given = {"add_generation_prompt": True, **options}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    json.loads(json.dumps(messages)), chat_template=source, tokenize=False, **given
                )
            )
        except Exception:
            return None

    def with_null(self, source: str, messages: Any, options: dict[str, Any]) -> str | None:
        """apply_chat_template leaves null out; its renderer does not."""
        given = {"add_generation_prompt": True, **TOKENS, **options}
        try:
            prompts, _ = self._render([json.loads(json.dumps(messages))], chat_template=source, **given)
            return str(prompts[0])
        except Exception:
            return None


def ours(source: str, messages: Any, options: dict[str, Any]) -> str | None:
    variables = {name: text for name, text in TOKENS.items() if name not in ("bos_token", "eos_token")}
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", variables=variables)
    try:
        return template.render(messages, **options)
    except Error:
        return None


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_those_of_transformers(name: str, data_dir: Path) -> None:
    theirs, (messages, options) = Theirs(), CONVERSATIONS[name]
    paths, n_same = templates(data_dir), 0
    assert len(paths) >= 59
    for path in paths:
        source = path.read_text(encoding="utf-8")
        prompt, wanted = ours(source, messages, options), theirs(source, messages, options)
        if prompt == wanted:
            n_same += 1
            continue
        others = [form for form in forms(messages) if form != messages]
        assert others or prompt is not None, (path.name, "only transformers takes it")
        possible = [theirs(source, form, options) for form in others]
        possible += [theirs.with_null(source, form, options) for form in (messages, *others)]
        if prompt is None:
            assert set(possible) == {None}, path.name
        else:
            assert prompt in possible, (path.name, prompt, wanted)
    assert n_same >= (5 if name in ("null", "json", "parts", "parts of a result") else len(paths) - 12)


@pytest.mark.parametrize("name", ["null", "json", "parts", "parts of a result"])
def test_no_prompt_shows_the_form_of_what_was_sent(name: str, data_dir: Path) -> None:
    messages, options = CONVERSATIONS[name]
    n = 0
    for path in templates(data_dir):
        prompt = ours(path.read_text(encoding="utf-8"), messages, options)
        if prompt is not None:
            shows = [sign for sign in ("'text'", '"type": "text"', "None", '\\"city\\"') if sign in prompt]
            assert not shows, path.name
            n += 1
    assert n >= 45
