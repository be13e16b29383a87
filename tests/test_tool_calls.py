"""Calls of tools through `LLM.chat`: as data, while they stream, forced by a grammar, and the prompts that
tell of tools. The formats themselves are in test_tools.py."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_inspect import CHATML, MARKS, with_special, write

import tinyllm
from tinyllm.chat.tools import ToolCall

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "Write <tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
HOT: dict[str, Any] = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 400}


def get_weather(city: str, days: int = 1) -> str:
    """The weather forecast."""
    return f"{city} {days}"


def now() -> str:
    """The time."""
    return "12:00"


TOOLS: list[Any] = [get_weather, now]
WRITTEN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
CALL = ToolCall("call_0", "get_weather", {"city": "Paris", "days": 2}, WRITTEN)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinyllm.LLM]:
    tokens = (*MARKS, "<think>", "</think>", "<tool_call>", "</tool_call>")
    path = tmp_path_factory.mktemp("tools") / "chat.gguf"
    with tinyllm.load(write(path, with_special(*tokens, chat_template=TEMPLATE)), context=2048) as llm:
        yield llm


def says(llm: tinyllm.LLM, text: str, prompt: list[int], strength: float = np.inf) -> dict[str, Any]:
    """Options with which the model writes this text, and ends. strength: what other tokens lose by it."""
    assert llm.tokenizer is not None
    ids: list[int] = []
    for part in re.split("(<[^<>]*>)", text):
        special = llm.tokenizer.special_tokens.get(part)
        ids += [3 + byte for byte in part.encode()] if special is None else [special]
    ids.append(min(llm.eos_ids))

    def steer(logits: Any, tokens: Any) -> None:
        at = len(tokens) - len(prompt)
        if at < len(ids):
            kept = logits[ids[at]]
            logits -= strength
            logits[ids[at]] = kept

    return {"processors": [steer], "temperature": 0, "max_tokens": 400}


def id_of(llm: tinyllm.LLM, token: str) -> int:
    assert llm.tokenizer is not None
    return llm.tokenizer.special_tokens[token]


def answer(llm: tinyllm.LLM, text: str, **options: Any) -> tinyllm.Completion:
    """What `chat` makes of this text."""
    options = {"tools": TOOLS, **options}
    steered = says(llm, text, llm.chat_ids(HELLO, tools=options["tools"]))
    made: tinyllm.Completion = llm.chat(HELLO, **{**steered, **options})
    return made


def is_valid(arguments: dict[str, Any]) -> bool:
    days = arguments.get("days", 1)
    return {"city"} <= set(arguments) <= {"city", "days"} and isinstance(days, int)


def test_a_call_is_data_and_no_text(llm: tinyllm.LLM) -> None:
    made = answer(llm, WRITTEN)
    assert made.tool_calls == [CALL]
    assert (made.text.strip(), made.tool_call_error, made.finish_reason) == ("", None, "stop")
    assert get_weather(**made.tool_calls[0].arguments) == "Paris 2"


def test_text_reasoning_and_several_calls(llm: tinyllm.LLM) -> None:
    second = WRITTEN.replace("Paris", "Rome")
    made = answer(llm, f"<think>\nHmm {WRITTEN}</think>\n\nI look.\n{WRITTEN}\n{second}")
    assert made.text == "I look."
    assert made.reasoning is not None
    assert made.reasoning.startswith("Hmm <tool_call>")
    assert [(call.id, call.arguments["city"]) for call in made.tool_calls] == [
        ("call_0", "Paris"),
        ("call_1", "Rome"),
    ]


@pytest.mark.parametrize("text", ["Hello!", '{"name": "get_weather"}', "a < b <tool", "  x  \n\n"])
def test_text_is_untouched_where_there_is_no_call(llm: tinyllm.LLM, text: str) -> None:
    made, plain = answer(llm, text), answer(llm, text, tools=None)
    assert made.tool_calls == plain.tool_calls == []
    assert made.tool_call_error is None
    assert made.text == plain.text
    assert text.strip() in made.text


def test_a_malformed_call_stays_text_and_says_why(llm: tinyllm.LLM) -> None:
    for wrong, why in (
        (WRITTEN.replace("get_weather", "get_time"), "none of the tools"),
        (WRITTEN.replace('"days"', '"city"'), "malformed"),
        (WRITTEN[:40], "ends before the call is complete"),
    ):
        made = answer(llm, wrong)
        assert made.tool_calls == []
        assert made.text.strip() == wrong
        assert made.tool_call_error is not None
        assert why in made.tool_call_error
    cut = answer(llm, WRITTEN, max_tokens=20)
    assert (cut.finish_reason, cut.tool_calls) == ("length", [])
    assert cut.text.strip().startswith("<tool_call>")


def check_pieces(pieces: list[tinyllm.Piece], made: tinyllm.Completion) -> None:
    assert "".join(p.text for p in pieces if p.kind == "text") == made.text
    assert [p.token for p in pieces if p.token is not None] == made.tokens
    for index, call in enumerate(made.tool_calls):
        of_call = [p for p in pieces if p.kind == "tool_call" and p.index == index]
        assert (of_call[0].name, of_call[0].call_id) == (call.name, call.id)
        assert json.loads("".join(p.text for p in of_call)) == call.arguments
        assert [p.tool_call for p in of_call if p.tool_call] == [call]


def test_a_stream_brings_the_name_then_the_arguments(llm: tinyllm.LLM) -> None:
    text = f"I look.\n{WRITTEN}\n{WRITTEN.replace('Paris', 'Rome')}"
    steered = says(llm, text, llm.chat_ids(HELLO, tools=TOOLS))
    stream = llm.chat(HELLO, stream=True, tools=TOOLS, **steered)
    pieces = list(stream)
    made = stream.completion
    assert len(made.tool_calls) == 2
    assert len([p for p in pieces if p.kind == "tool_call" and p.text]) > 8
    check_pieces(pieces, made)


def test_a_stream_takes_a_malformed_call_back(llm: tinyllm.LLM) -> None:
    steered = says(llm, WRITTEN[:-30], llm.chat_ids(HELLO, tools=TOOLS))
    stream = llm.chat(HELLO, stream=True, tools=TOOLS, **steered)
    pieces = list(stream)
    assert [p.name for p in pieces if p.name] == ["get_weather"]
    assert [p.index for p in pieces if p.kind == "text" and p.index is not None] == [0]
    check_pieces(pieces, stream.completion)


def test_stop_strings_are_looked_for_in_text_only(llm: tinyllm.LLM) -> None:
    made = answer(llm, f"I look.\n{WRITTEN}\nDone. And more.", stop=["Paris", "call", "Done"])
    assert made.stop_reason == "Done"
    assert made.tool_calls == [CALL]
    assert "Done" not in made.text
    across = answer(llm, f"ab{WRITTEN}cd", stop=["bc", "b\n\nc"])
    assert across.tool_calls == [CALL]
    assert across.finish_reason == "stop"
    assert not isinstance(across.stop_reason, str)
    assert across.text.strip() == "ab\n\ncd"


@pytest.mark.parametrize("seed", range(5))
def test_a_forced_call_follows_its_schema(llm: tinyllm.LLM, seed: int) -> None:
    hot = {**HOT, "begin_suppress_tokens": [id_of(llm, "<think>")]}  # which may come before a call
    made = llm.chat(HELLO, tools=TOOLS, tool_choice="get_weather", strict=True, seed=seed, **hot)
    if made.finish_reason == "stop":
        (call,) = made.tool_calls
        assert call.name == "get_weather"
        assert is_valid(call.arguments)
        assert made.text == ""
    short = llm.chat(HELLO, tools=[now], tool_choice="now", strict=True, seed=seed, **hot)
    assert [(call.name, call.arguments) for call in short.tool_calls] == [("now", {})]


def test_what_is_forced_is_the_same_in_any_company(llm: tinyllm.LLM) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "get_weather", "strict": True, **HOT}
    options["temperature"] = 1.0
    both = llm.chat(HELLO, n=2, seed=4, **options)
    alone = [llm.chat(HELLO, seed=made.seed, **options) for made in both]
    assert [made.tokens for made in both] == [made.tokens for made in alone]
    assert [made.tool_calls for made in both] == [made.tool_calls for made in alone]
    stream = llm.chat(HELLO, stream=True, seed=4, **options)
    check_pieces(list(stream), stream.completion)
    assert stream.completion.tokens == alone[0].tokens

    async def work() -> None:
        made = await llm.achat(HELLO, seed=4, **options)
        assert (made.tokens, made.tool_calls) == (alone[0].tokens, alone[0].tool_calls)
        stream = llm.achat(HELLO, stream=True, seed=4, **options)
        pieces = [piece async for piece in stream]
        check_pieces(pieces, stream.completion)
        assert stream.completion.tokens == alone[0].tokens

    asyncio.run(work())


def test_required_and_strict(llm: tinyllm.LLM) -> None:
    """Whatever the model would rather write."""
    prompt = llm.chat_ids(HELLO, tools=TOOLS)
    steered = says(llm, WRITTEN.replace("2", '"two"'), prompt, strength=20)
    for choice in ("auto", "required"):
        made = llm.chat(HELLO, tools=TOOLS, tool_choice=choice, strict=True, **steered)
        assert all(call.name == "now" or is_valid(call.arguments) for call in made.tool_calls)
        assert made.tool_calls or made.finish_reason == "length"
        assert '"two"' not in "".join(call.raw for call in made.tool_calls)
    said = says(llm, "Hello!", prompt, strength=20)
    assert llm.chat(HELLO, tools=TOOLS, strict=True, **said).text.strip() == "Hello!"
    said["begin_suppress_tokens"] = [id_of(llm, "<think>")]
    for strict in (False, True):
        forced = llm.chat(HELLO, tools=TOOLS, tool_choice="now", strict=strict, **said)
        assert [call.name for call in forced.tool_calls] in ([], ["now"])
        assert forced.text == "" or forced.finish_reason == "length"
    assert [(call.name, call.arguments) for call in forced.tool_calls] == [("now", {})]


def test_reasoning_comes_before_a_forced_call(llm: tinyllm.LLM) -> None:
    prompt = llm.chat_ids(HELLO, tools=[now])
    steered = says(llm, "<think>Hmm</think>", prompt, strength=20)
    made = llm.chat(HELLO, tools=[now], tool_choice="now", strict=True, **steered)
    assert made.reasoning == "Hmm"
    assert [call.name for call in made.tool_calls] == ["now"]


def test_channels_are_part_of_a_forced_call(tmp_path: Path) -> None:
    tokens = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>", "<|return|>")
    template = (
        "{% for t in tools or [] %}functions.{{ t.function.name }}\n{% endfor %}"
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
        "{# <|channel|> #}<|start|>assistant"
    )
    with tinyllm.load(write(tmp_path / "oss.gguf", with_special(*tokens, chat_template=template))) as llm:
        for choice in ("now", "required"):
            made = llm.chat(HELLO, tools=[now], tool_choice=choice, strict=True, seed=1, **HOT)
            if made.finish_reason == "stop":
                assert [call.name for call in made.tool_calls] == ["now"], made
                assert made.text == ""


def test_a_token_that_ends_a_turn_of_calls(tmp_path: Path) -> None:
    """Ends an answer with tools, and no other."""
    call, end, escape, response = (
        "<start_function_call>",
        "<end_function_call>",
        "<escape>",
        "<start_function_response>",
    )
    tokens = (call, end, escape, response)
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}{# <start_function_call> #}"
    )
    with tinyllm.load(write(tmp_path / "g.gguf", with_special(*tokens, chat_template=template))) as llm:
        text = f"x{call}call:get_weather{{city:{escape}Paris{escape}}}{end}{response}and more"
        made = answer(llm, text)
        assert made.text.strip() == "x"
        assert [made.arguments for made in made.tool_calls] == [{"city": "Paris"}]
        assert made.stop_reason == id_of(llm, response)
        assert answer(llm, text, tools=None).text.endswith("and more")


def test_none_leaves_calls_in_the_text(llm: tinyllm.LLM) -> None:
    made = answer(llm, WRITTEN, tool_choice="none")
    assert made.text.strip() == WRITTEN
    assert made.tool_calls == []


def test_what_is_refused(llm: tinyllm.LLM) -> None:
    def refused(error: type[Exception], match: str, **options: Any) -> None:
        before = llm._cache.n_used
        with pytest.raises(error, match=match):
            llm.chat(HELLO, **options)
        assert llm._cache.n_used == before

    refused(tinyllm.ArgumentError, "there are no tools|no tools", tool_choice="required")
    refused(tinyllm.ArgumentError, "tool_choice is 'nothing'", tools=TOOLS, tool_choice="nothing")
    refused(tinyllm.ArgumentError, "is no tool", tools=[{"type": "function"}])
    refused(tinyllm.ArgumentError, "two tools named 'now'", tools=[now, now])
    refused(
        tinyllm.ConstraintError, "an answer has one form", tools=TOOLS, tool_choice="required", regex="a+"
    )
    opened = TEMPLATE + "<tool_call>"
    refused(tinyllm.UnsupportedError, "opens a call", tools=TOOLS, tool_choice="now", chat_template=opened)
    unique = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": unique}}}
    strict = {"tools": [{"type": "function", "function": function}], "tool_choice": "f", "strict": True}
    refused(tinyllm.ConstraintError, "uniqueItems", **strict)


def text_of(llm: tinyllm.LLM, ids: list[int]) -> str:
    assert llm.tokenizer is not None
    return llm.tokenizer.decode(ids, special=True)


def test_calls_go_back_as_they_came(llm: tinyllm.LLM) -> None:
    """As ToolCalls, with the result, and their ids count on."""
    first = answer(llm, WRITTEN)
    messages: list[dict[str, Any]] = [
        *HELLO,
        {"role": "assistant", "content": first.text, "tool_calls": first.tool_calls},
        {"role": "tool", "tool_call_id": "call_0", "content": "It <|im_end|> rains."},
    ]
    for tools in (TOOLS, None):
        ids = llm.chat_ids(messages, tools=tools)
        text = text_of(llm, ids)
        assert '"Paris"' in text
        assert "rains." in text
        assert ids.count(id_of(llm, "<|im_end|>")) == 3 + bool(tools)  # what a user or a tool writes is text
    steered = says(llm, WRITTEN, llm.chat_ids(messages, tools=TOOLS))
    assert [call.id for call in llm.chat(messages, tools=TOOLS, **steered).tool_calls] == ["call_1"]


def test_a_template_without_tools_is_helped_out(llm: tinyllm.LLM, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "It is noon."},
    ]
    for given in (HELLO, messages):
        text = text_of(llm, llm.chat_ids(given, tools=TOOLS, chat_template=CHATML))
        assert "get_weather" in text
        assert text.startswith("<s><|im_start|> system\n")
    assert "It is noon." in text
    assert '{"name": "now", "arguments": {}}' in text
    assert len([m for m in caplog.messages if "a message tells the model of them" in m]) == 1
    assert not [m for m in caplog.messages if "writes nothing of tools" in m]
    written = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    prompt = llm.chat_ids(HELLO, tools=TOOLS, chat_template=CHATML)
    made = llm.chat(HELLO, tools=TOOLS, chat_template=CHATML, **says(llm, written, prompt))
    assert [call.arguments for call in made.tool_calls] == [{"city": "Paris"}]
