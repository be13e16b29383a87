"""Calls of tools: every template's own read back, in pieces cut anywhere; what is malformed; functions as
schemas; grammars held against llguidance."""

from __future__ import annotations

import codecs
import dataclasses
import enum
import functools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, TypedDict, Union

import pytest
import tools_table
from helpers_tools import (
    ARGUMENTS,
    TOKENS,
    TOOLS,
    VARIABLES,
    answer_of,
    call_dict,
    called,
    chat_template,
    parts_of,
    read,
    said,
    text_of,
    tool,
    tool_call,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm.chat.templates import ChatTemplate
from tinyllm.chat.tools import (
    FORMATS,
    GENERIC,
    CallSplitter,
    Format,
    Part,
    ToolCall,
    as_tools,
    call_grammar,
    count_calls,
    format_of,
    instructions,
    render,
    schema_of,
)
from tinyllm.errors import ArgumentError, TemplateError

ALL = (*FORMATS, GENERIC)
BY_NAME = {format.name: format for format in ALL}
HERMES, CODER, LLAMA = (
    BY_NAME["Hermes, Qwen 2.5 and 3, Granite 4"],
    BY_NAME["Qwen3-Coder, Qwen 3.5"],
    BY_NAME["Llama 3"],
)
HARMONY, MISTRAL3 = BY_NAME["gpt-oss (harmony)"], BY_NAME["Mistral v3 and v7"]
each_format = pytest.mark.parametrize("format", ALL, ids=lambda format: format.name)

TEMPLATES = {  # of the data folder: what each is recognised as
    "Apertus-8B-Instruct": "Apertus",
    "Apriel-1.6-15b-Thinker-fixed": "Apriel",
    "Bielik-11B-v3.0-Instruct": HERMES.name,
    "ByteDance-Seed-OSS": "Seed OSS",
    "Cohere2MoE": "Command R7B and A",
    "CohereForAI-c4ai-command-r-plus-tool_use": "Command R",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "Command R7B and A",
    "GLM-4.6": "GLM 4.5 and 4.6",
    "GLM-4.7-Flash": "GLM 4.7 and 5",
    "GLM-5.2": "GLM 4.7 and 5",
    "GigaChat3-10B-A1.8B": "GigaChat 3",
    "GigaChat3.1-10B-A1.8B": "GigaChat 3.1",
    "HuggingFaceTB-SmolLM3-3B": GENERIC.name,
    "Kimi-K2-Instruct": "Kimi K2",
    "Kimi-K2-Thinking": "Kimi K2",
    "LFM2-8B-A1B": "LFM2",
    "LFM2.5-Instruct": "LFM2",
    "MiMo-VL": HERMES.name,
    "MiniMax-M2": "MiniMax M2",
    "MiroThinker": HERMES.name,
    "Mistral-Small-3.2-24B-Instruct-2506": "Mistral v11",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": CODER.name,
    "NVIDIA-Nemotron-Nano-v2": "Nemotron Nano v2",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": HERMES.name,
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": HERMES.name,
    "Qwen-QwQ-32B": HERMES.name,
    "Qwen-Qwen2.5-7B-Instruct": HERMES.name,
    "Qwen-Qwen3-0.6B": HERMES.name,
    "Qwen3-Coder": CODER.name,
    "Qwen3.5-4B": CODER.name,
    "Reka-Edge": HERMES.name,
    "StepFun3.5-Flash": CODER.name,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "DeepSeek V3 and R1",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "DeepSeek V3 and R1",
    "deepseek-ai-DeepSeek-V3.1": "DeepSeek V3.1",
    "deepseek-ai-DeepSeek-V3.2": "DeepSeek V3.2",
    "deepseek-ai-DeepSeek-V4": "DeepSeek V4",
    "fireworks-ai-llama-3-firefunction-v2": "FireFunction",
    "google-gemma-2-2b-it": GENERIC.name,
    "google-gemma-4-31B-it": "Gemma 4",
    "google-gemma-4-31B-it-interleaved": "Gemma 4",
    "ibm-granite-granite-3.3-2B-Instruct": "Granite 3",
    "ibm-granite-granite-4.0": HERMES.name,
    "llama-cpp-deepseek-r1": "DeepSeek V3 and R1",
    "llama-cpp-rwkv-world": GENERIC.name,
    "meetkai-functionary-medium-v3.1": "Functionary 3.1",
    "meetkai-functionary-medium-v3.2": GENERIC.name,
    "meta-llama-Llama-3.1-8B-Instruct": LLAMA.name,
    "meta-llama-Llama-3.2-3B-Instruct": LLAMA.name,
    "meta-llama-Llama-3.3-70B-Instruct": LLAMA.name,
    "microsoft-Phi-3.5-mini-instruct": GENERIC.name,
    "mistralai-Ministral-3-14B-Reasoning-2512": "Mistral v13",
    "mistralai-Mistral-Nemo-Instruct-2407": MISTRAL3.name,
    "moonshotai-Kimi-K2": "Kimi K2",
    "openai-gpt-oss-120b": HARMONY.name,
    "stepfun-ai-Step-3.5-Flash": CODER.name,
    "unsloth-Apriel-1.5": "Apriel",
    "unsloth-mistral-Devstral-Small-2507": "Mistral v13",
    "upstage-Solar-Open-100B": "Solar Open",
}
NOT_ROUND_TRIPPED = {
    "MiroThinker": "a macro reads a loop's variable, which Jinja does not show it",
    "llama-cpp-deepseek-r1": "writes a generator as JSON, which Jinja cannot",
    "meetkai-functionary-medium-v3.2": "names a recipient before each text, '>>>all': not done",
}
ROUND_TRIPS = sorted(TEMPLATES.keys() - NOT_ROUND_TRIPPED.keys())


def path_of(data_dir: Path, stem: str) -> Path:
    return data_dir / "chat" / "jinja" / f"{stem}.jinja"


def cuts(text: str) -> Iterator[list[str]]:
    """The text cut once, at each place, and into single characters."""
    yield list(text)
    for at in range(len(text) + 1):
        yield [text[:at], text[at:]]


# ---- the makers' templates


def test_every_template_of_the_data_is_listed(data_dir: Path) -> None:
    assert {path.stem for path in (data_dir / "chat/jinja").glob("*.jinja")} == TEMPLATES.keys()


@pytest.mark.parametrize("stem", sorted(TEMPLATES))
def test_formats_are_recognised(data_dir: Path, stem: str) -> None:
    template = path_of(data_dir, stem).read_text(encoding="utf-8")
    assert format_of(template, TOKENS.get(stem, ())).name == TEMPLATES[stem]


@pytest.mark.parametrize("stem", sorted(NOT_ROUND_TRIPPED))
def test_templates_that_are_not_round_tripped_cannot_be(data_dir: Path, stem: str) -> None:
    call = ("get_weather", {"city": "x"})
    try:
        _, text = said(path_of(data_dir, stem), [call])
    except TemplateError:
        return
    assert called(read(BY_NAME[TEMPLATES[stem]], [text])) != [call]


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("stem", ROUND_TRIPS)
def test_a_templates_call_comes_back(data_dir: Path, stem: str, case: str) -> None:
    format, call = BY_NAME[TEMPLATES[stem]], ("get_weather", ARGUMENTS[case])
    prompt, text = said(path_of(data_dir, stem), [call])
    text = answer_of(format, prompt, text)
    machine = read(format, [text])
    assert (called(machine), machine.errors, text_of(machine).strip()) == ([call], [], "")
    assert called(read(format, list(text))) == [call]


@pytest.mark.parametrize("stem", ROUND_TRIPS)
def test_several_calls_come_back_however_the_text_is_cut(data_dir: Path, stem: str) -> None:
    format = BY_NAME[TEMPLATES[stem]]
    calls = [("get_weather", {"city": "é\n", "days": 5}), ("now", {})]
    calls = calls[:1] if format.is_single else calls
    prompt, text = said(path_of(data_dir, stem), calls)
    text = answer_of(format, prompt, text)
    for pieces in cuts(text):
        machine = read(format, pieces)
        assert (called(machine), machine.errors, text_of(machine).strip()) == (calls, [], ""), pieces


@pytest.mark.parametrize("stem", ROUND_TRIPS)
def test_calls_come_back_byte_by_byte(data_dir: Path, stem: str) -> None:
    """As from a model whose tokens are single bytes."""
    format, call = BY_NAME[TEMPLATES[stem]], ("get_weather", ARGUMENTS["unicode"])
    prompt, text = said(path_of(data_dir, stem), [call])
    decoder = codecs.getincrementaldecoder("utf-8")()
    pieces = [decoder.decode(bytes([byte])) for byte in answer_of(format, prompt, text).encode()]
    assert called(read(format, pieces)) == [call]


# ---- every format


@each_format
def test_what_a_format_writes_it_reads(format: Format) -> None:
    for case, arguments in ARGUMENTS.items():
        calls = [tool_call("get_weather", arguments), tool_call("now", {}, 1)]
        calls = calls[:1] if format.is_single else calls
        text = format.shape.write(calls)
        machine = read(format, [text])
        assert called(machine) == [(c.name, c.arguments) for c in calls], case
        raw = "".join(call.raw for call in machine.calls)
        assert "".join(raw.split()) == "".join(text.removesuffix("<|call|>").split())


@each_format
def test_text_around_calls(format: Format) -> None:
    call = written(format, ("now", {}))
    before = "" if format.shape.starts and not format.shape.opens else "Let me see.\n"
    call = call if before == "" or not format.shape.starts else "<|python_tag|>" + call
    for pieces in cuts(f"{before}{call}"):
        machine = read(format, pieces)
        assert (called(machine), text_of(machine)) == ([("now", {})], before.strip())


@each_format
def test_text_without_calls_stays_as_it_is(format: Format) -> None:
    for text in [
        "",
        " ",
        "Hi.\n",
        "\n\n a < b \n{x} [y] ",
        "<b>bold</b>",
        "```py\nx\n```",
        '{"city": "Paris"}',
        "[1, 2]",
        "{",
    ]:
        for pieces in cuts(text):
            machine = read(format, pieces)
            assert ([part.text for part in parts_of(machine) if part.error], text_of(machine)) == ([], text)


WORDS = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e6, 1e6) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab_", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
DRAWN = st.fixed_dictionaries(
    {"city": st.text(max_size=20)},
    optional={
        "days": st.integers(),
        "exact": st.booleans(),
        "factor": st.floats(-1e9, 1e9),
        "options": st.dictionaries(st.text("abc", min_size=1), WORDS, max_size=3),
        "tags": st.lists(st.text(max_size=8), max_size=3),
    },
)


@each_format
@settings(max_examples=25)
@given(arguments=DRAWN, at=st.lists(st.integers(0, 10**6), max_size=6))
@example(arguments={"city": "", "options": {"a": {}}, "tags": [""]}, at=[])
@example(arguments={"city": "\n a \n"}, at=[40, 41])
def test_any_arguments_come_back(format: Format, arguments: dict[str, Any], at: list[int]) -> None:
    text = format.shape.write([tool_call("get_weather", arguments)])
    stops = [mark for mark in format.shape.literals if mark.strip()]
    if any(mark.strip() in value for mark in stops for value in texts_in(arguments)):
        return  # in raw text, what closes a value closes it
    places = sorted({a % (len(text) + 1) for a in at})
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    machine = read(format, pieces)
    assert (called(machine), machine.errors) == ([("get_weather", arguments)], [])
    (call,) = machine.calls
    streamed = "".join(part.text for part in parts_of(machine) if part.kind == "tool_call")
    assert json.loads(streamed) == call.arguments


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def summary(machine: CallSplitter) -> Any:
    """What must not depend on the cuts."""
    calls = [dataclasses.astuple(call) for call in machine.calls]
    return calls, machine.errors, text_of(machine)


@each_format
@settings(max_examples=25)
@given(data=st.data())
def test_nothing_that_a_model_writes_raises(format: Format, data: st.DataObject) -> None:
    """Marks, names, JSON and rubbish in any order, cut anywhere: the same each time."""
    whole = format.shape.write([tool_call("get_weather", {"city": "x", "days": 3})])
    marks = [mark for mark in (*format.shape.literals, *format.shape.starts, *format.shape.opens) if mark]
    some = [
        *marks,
        "get_weather",
        "now",
        "a",
        " ",
        "\n",
        "<",
        "{",
        "}",
        "[",
        "]",
        '"',
        ",",
        ":",
        "\\",
        "(",
        "=",
        "5",
    ]
    words = data.draw(
        st.lists(st.sampled_from([*some, '{"name": "now"', '"arguments": {}}', whole]), max_size=12)
    )
    text = "".join(words)
    at_once = summary(read(format, [text]))
    assert summary(read(format, list(text))) == at_once
    at = data.draw(st.integers(0, len(text)))
    assert summary(read(format, [text[:at], text[at:]])) == at_once


@each_format
def test_a_call_that_is_cut_short_is_text(format: Format) -> None:
    text = format.shape.write([tool_call("get_weather", {"city": "Paris", "days": 3})])
    for end in range(1, len(text)):
        machine = read(format, [text[:end]])
        assert not machine.errors or (text_of(machine), called(machine)) == (text[:end], [])
        assert called(machine) in ([], [("get_weather", {"city": "Paris", "days": 3})])
        assert called(machine) or text_of(machine) == text[:end]


@each_format
def test_what_is_held_is_short(format: Format) -> None:
    """Reading is linear: no piece is looked at again with those after it."""
    text = format.shape.write([tool_call("get_weather", {"city": "x y\n" * 400, "tags": ["z"] * 400})])
    machine = CallSplitter(format, TOOLS)
    longest = max(map(len, format.shape.literals))
    for at in range(0, len(text), 7):
        machine.feed(text[at : at + 7])
        assert len(machine._scan._text) <= longest + 7
    machine.flush()
    assert len(machine.calls) == 1


def test_names_and_signs_are_the_rows_own() -> None:
    assert len(BY_NAME) == len(ALL)
    for row in FORMATS:
        assert row.signs or row.tokens
        assert row.shape.opens or row.shape.starts
    for row in (HARMONY, CODER, MISTRAL3, BY_NAME["Kimi K2"]):
        assert format_of(" ".join(row.signs)) is row
    assert format_of("", ["<|tool_call_start|>", "<|tool_call_end|>", "<s>"]).name == "LFM2"
    assert format_of("", ["<|tool_call|>", "<|/tool_call|>"]).name == "Phi-4-mini"
    assert format_of("{{ messages }}", ["<s>"]) is GENERIC


# ---- what a stream says


def test_a_stream_names_the_call_and_brings_its_arguments() -> None:
    pieces = [
        "Let me see.\n\n<tool",
        '_call>\n{"name": "get_weather", "argu',
        'ments": {"city": "P',
        'aris"}}\n</tool',
        "_call>",
    ]
    machine = CallSplitter(HERMES, TOOLS)
    seen = [machine.feed(piece) for piece in pieces] + [machine.flush()]
    (call,) = machine.calls
    assert seen == [
        [Part("text", "Let me see.")],
        [Part("tool_call", "", 0, "get_weather", "call_0")],
        [Part("tool_call", '{"city": "P', 0)],
        [Part("tool_call", 'aris"}', 0)],
        [Part("tool_call", "", 0, call=call)],
        [],
    ]
    assert call.raw == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def test_raw_text_streams_as_json() -> None:
    text = CODER.shape.write([tool_call("get_weather", {"city": 'Say "hi"', "days": 5})])
    machine = CallSplitter(CODER, TOOLS)
    streamed = [
        part.text for piece in text for part in machine.feed(piece) if part.kind == "tool_call" and part.text
    ]
    assert "".join(streamed) == '{"city": "Say \\"hi\\"", "days": 5}'
    assert len(streamed) > 8


def test_blocks_of_text_are_joined_as_those_of_reasoning_are() -> None:
    call = HERMES.shape.write([tool_call("now", {})])
    machine = read(HERMES, [f"  One.\n{call}\n\nTwo. {call}  "])
    assert (text_of(machine), len(machine.calls)) == ("  One.\n\nTwo.", 2)


def test_malformed_parts_void_what_came_before() -> None:
    machine = read(HERMES, ['<tool_call>\n{"name": "now", "arguments": {"a": 1 2}}\n</tool_call>'])
    named, error = parts_of(machine)[0], parts_of(machine)[-2]
    assert (named.index, named.name) == (0, "now")
    assert error.index == 0
    assert error.error == machine.errors[0]
    assert text_of(machine).startswith('<tool_call>\n{"name": "now"')


DOUBLE = '{"a": 1, "a": 2}'
DEEP = '{"name": "now", "arguments": {"a": ' + "[" * 80 + "]" * 80 + "}}"


@pytest.mark.parametrize(
    ("format", "text", "error"),
    [
        (HERMES, "<tool_call>\nnow()\n</tool_call>", "'{' or '\\['"),
        (
            HERMES,
            '<tool_call>{"name": "later", "arguments": {}}</tool_call>',
            "'later', which is none of the tools",
        ),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>', "no name"),
        (HERMES, '<tool_call>{"name": 5}</tool_call>', "its name is no text"),
        (HERMES, '<tool_call>{"name": "now", "name": "now"}</tool_call>', "two names"),
        (HERMES, '<tool_call>{"name": "now", "arguments": [1]}</tool_call>', "not an object"),
        (HERMES, '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>', "NaN is no number"),
        (HERMES, f'<tool_call>{{"name": "now", "arguments": {DOUBLE}}}</tool_call>', "'a' comes twice"),
        (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "\\ud800"}}</tool_call>', "surrogate"),
        (HERMES, '<tool_call>{"name": "now", "arguments": {"a": [}}}</tool_call>', "closes nothing"),
        (HERMES, f"<tool_call>{DEEP}</tool_call>", "nested deeper than 64"),
        (HERMES, '<tool_call>{"name": "now", "arguments": {}', "ends before the call is complete"),
        (HERMES, '<tool_call>{"name": "now" "arguments": {}}</tool_call>', "',' is missing"),
        (CODER, "<tool_call>\n<function=now" + "x" * 300, "within 256 characters"),
        (
            CODER,
            "<function=get_weather><parameter=days>five</parameter></function>",
            "'five' is not of type integer",
        ),
        (
            CODER,
            "<function=get_weather><parameter=city>x</parameter></tool_call>",
            "'</function>' is missing",
        ),
        (BY_NAME["Gemma 4"], "<|tool_call>call:now{a:b}<tool_call|>", "'b' is no value"),
        (BY_NAME["LFM2"], "<|tool_call_start|>[now(5)]<|tool_call_end|>", "'=' is missing"),
        (BY_NAME["Kimi K2"], "<|tool_calls_section_begin|>now", "'<|tool_call_begin|>functions.' is missing"),
        (LLAMA, "<|python_tag|>print(1)", "'{' or '\\['"),
        (LLAMA, '{"name": "now", "parameters": {"a": }}', "no valid JSON"),
        (MISTRAL3, "[TOOL_CALLS][]", "'{' is missing"),
    ],
)
def test_malformed_calls_are_text_with_a_reason(format: Format, text: str, error: str) -> None:
    for pieces in ([text], list(text)):
        machine = read(format, pieces)
        assert (called(machine), text_of(machine)) == ([], text)
        assert len(machine.errors) == 1
        assert re.search(error.replace("|", r"\|").replace(".", r"\."), machine.errors[0])


def test_a_call_after_a_malformed_one_counts() -> None:
    good = HERMES.shape.write([tool_call("now", {})])
    machine = read(HERMES, [f"<tool_call>oops</tool_call>\n{good}"])
    assert called(machine) == [("now", {})]
    assert (text_of(machine), len(machine.errors)) == ("<tool_call>oops</tool_call>", 1)


def test_a_list_that_breaks_keeps_the_calls_before() -> None:
    machine = read(MISTRAL3, ['[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": oops}]'])
    assert called(machine) == [("now", {})]
    assert len(machine.errors) == 1
    assert text_of(machine).endswith("oops}]")


IN_X, IN_LINES = ("get_weather", {"city": "x"}), ("get_weather", {"city": "a\nb\t"})
PYTHON = "<|tool_call_start|>[get_weather(city='it\\'s', tags=['a', \"b\"], options={'k': None},)]"


@pytest.mark.parametrize(
    ("format", "text", "calls"),
    [
        (LLAMA, '<|python_tag|>{"name": "now", "parameters": {}}', [("now", {})]),
        (LLAMA, '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}', [("now", {})] * 2),
        (LLAMA, '{"type": "function", "function": "now", "parameters": {}}', [("now", {})]),
        (GENERIC, '```json\n{"name": "now", "arguments": {}}\n```', [("now", {})]),
        (GENERIC, '[{"name": "now", "arguments": {}}, {"name": "now"}]', [("now", {})] * 2),
        (HERMES, '<tool_call>{"arguments": {"city": "x"}, "name": "get_weather"}</tool_call>', [IN_X]),
        (HERMES, '<tool_call>{"function": {"name": "now", "arguments": {}}}</tool_call>', [("now", {})]),
        (
            HERMES,
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"x\\"}"}</tool_call>',
            [IN_X],
        ),
        (HERMES, '<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb\t"}}', [IN_LINES]),
        (CODER, "<function=now>\n</function>", [("now", {})]),
        (HARMONY, "to=functions.now<|channel|>commentary <|constrain|>json<|message|>{}", [("now", {})]),
        (HARMONY, "<|channel|>commentary to=functions.now<|message|>{}", [("now", {})]),
        (BY_NAME["Command R"], 'Action: ```json\n[{"tool_name": "now", "parameters": {}}]```', [("now", {})]),
        (BY_NAME["Phi-4-mini"], 'functools[{"name": "now", "arguments": {}}]', [("now", {})]),
        (
            BY_NAME["LFM2"],
            PYTHON,
            [("get_weather", {"city": "it's", "tags": ["a", "b"], "options": {"k": None}})],
        ),
    ],
)
def test_ways_in_which_models_stray(format: Format, text: str, calls: list[Any]) -> None:
    for pieces in cuts(text):
        machine = read(format, pieces)
        assert (called(machine), machine.errors, text_of(machine)) == (calls, [], "")


@pytest.mark.parametrize(
    "text", ['{"name": "Bob", "age": 3}', '{"temperature": 3}', '[{"a": 1}]', "{", "[1]", '{"name']
)
def test_an_answer_in_json_is_an_answer(text: str) -> None:
    for format in (LLAMA, GENERIC):
        machine = read(format, list(text))
        assert (called(machine), machine.errors, text_of(machine)) == ([], [], text)


def test_a_call_that_the_prompt_has_opened() -> None:
    machine = read(
        HERMES,
        ['{"name": "now", "arguments": {}}\n</tool_call>'],
        prompt="<|im_start|>assistant\n<tool_call>\n",
    )
    assert called(machine) == [("now", {})]


# ---- values and their types


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, "null", "null"),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "-1.5e3", -1500.0),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "none", "none"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5 a", "5 a"),
        ({"type": "object"}, "{'a': [1, None, True], \"b\": 'x'}", {"a": [1, None, True], "b": "x"}),
        ({"type": "array"}, '[1, {"a": null}]', [1, {"a": None}]),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"$ref": "#/$defs/n"}, "7", 7),
        ({"type": "integer", "nullable": True}, "null", None),
        ({}, "5", 5),
        ({}, "five", "five"),
        ({"allOf": [{"type": "string"}]}, "5", "5"),
    ],
)
def test_raw_text_gets_the_type_of_its_schema(schema: dict[str, Any], text: str, value: Any) -> None:
    tools = [tool("f", {"x": schema})]
    tools[0]["function"]["parameters"]["$defs"] = {"n": {"type": "integer"}}
    machine = read(CODER, [f"<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>"], tools)
    ((_, arguments),) = called(machine)
    assert (arguments, type(arguments["x"])) == ({"x": value}, type(value))


def test_a_flag_beats_the_schema() -> None:
    format = BY_NAME["DeepSeek V3.2"]
    text = format.shape.write([tool_call("get_weather", {"days": 5})])
    assert called(read(format, [text])) == [("get_weather", {"days": 5})]
    text = text.replace('string="false"', 'string="true"')
    assert called(read(format, [text])) == [("get_weather", {"days": "5"})]


# ---- ids and tokens


def test_ids_count_the_calls_of_the_conversation() -> None:
    two = HERMES.shape.write([tool_call("now", {})] * 2)
    assert [call.id for call in read(HERMES, [two]).calls] == ["call_0", "call_1"]
    assert [call.id for call in read(HERMES, [two], n_before=3).calls] == ["call_3", "call_4"]
    text = "[TOOL_CALLS]now[ARGS]{}"
    assert read(BY_NAME["Mistral v13"], [text], n_before=12).calls[0].id == "call00012"


def test_a_models_own_ids_are_used_once() -> None:
    one = '{"name": "now", "arguments": {}, "id": "abcdefghi"}'
    machine = read(MISTRAL3, [f"[TOOL_CALLS][{one}, {one}]"])
    assert [call.id for call in machine.calls] == ["abcdefghi", "call00001"]
    assert next(part for part in parts_of(machine) if part.name).id == ""
    eleven = read(BY_NAME["Mistral v11"], ["[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}"])
    assert parts_of(eleven)[0].id == eleven.calls[0].id == "abcdefghi"
    kimi = BY_NAME["Kimi K2"]
    text = kimi.shape.write([ToolCall("functions.now:4", "now", {})])
    assert read(kimi, [text]).calls[0].id == "functions.now:4"


def test_special_tokens_that_are_shown_and_that_end_a_turn() -> None:
    tokens = {
        "<s>": 1,
        "<|channel|>": 2,
        "<|message|>": 3,
        "<|call|>": 4,
        "<|constrain|>": 5,
        "<|end|>": 6,
        "": 7,
    }
    assert HARMONY.visible_ids(tokens) == {2, 3, 4, 5}
    assert HARMONY.end_ids(tokens) == {4}
    assert LLAMA.visible_ids({"<|python_tag|>": 1, "<|eom_id|>": 2}) == {1}
    assert LLAMA.end_ids({"<|python_tag|>": 1, "<|eom_id|>": 2}) == {2}
    assert BY_NAME["DeepSeek V4"].visible_ids({"｜DSML｜": 9, "<think>": 1}) == {9}
    assert HERMES.end_ids(tokens) == frozenset()


# ---- tools as they are given


class Unit(enum.Enum):
    CELSIUS = "c"
    KELVIN = "k"


@dataclasses.dataclass
class Place:
    """A place.

    Attributes:
        name: Its name.
    """

    name: str
    height: float = 0.0


class Options(TypedDict, total=False):
    deep: bool


def forecast(
    city: str,
    days: int = 1,
    *,
    unit: Literal["c", "k"] = "c",
    tags: Optional[list[str]] = None,  # noqa: UP045
    limits: dict[str, float] | None = None,
    place: Place,
    kind: Unit = Unit.KELVIN,
    pair: tuple[int, str] = (1, "a"),
    options: Options | None = None,
    note: Annotated[str, "A note."] = "",
    either: Union[int, Place] = 0,  # noqa: UP007
    other: Any = None,
) -> str:
    """The weather forecast.

    It is often wrong.

    Args:
        city (str): Name of the city,
            in English: as people say it.
        days: How many.

    Returns:
        A text.
    """
    return f"{city}{days}{unit}{tags}{limits}{place}{kind}{pair}{options}{note}{either}{other}"


def test_a_function_becomes_a_schema() -> None:
    place = {
        "type": "object",
        "properties": {"name": {"type": "string", "description": "Its name."}, "height": {"type": "number"}},
        "required": ["name"],
    }
    assert schema_of(forecast) == {
        "type": "function",
        "function": {
            "name": "forecast",
            "description": "The weather forecast.\n\nIt is often wrong.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {
                        "type": "string",
                        "description": "Name of the city, in English: as people say it.",
                    },
                    "days": {"type": "integer", "description": "How many.", "default": 1},
                    "unit": {"type": "string", "enum": ["c", "k"], "default": "c"},
                    "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
                    "limits": {
                        "anyOf": [
                            {"type": "object", "additionalProperties": {"type": "number"}},
                            {"type": "null"},
                        ]
                    },
                    "place": place,
                    "kind": {"type": "string", "enum": ["c", "k"]},
                    "pair": {
                        "type": "array",
                        "prefixItems": [{"type": "integer"}, {"type": "string"}],
                        "minItems": 2,
                        "maxItems": 2,
                    },
                    "options": {
                        "anyOf": [
                            {"type": "object", "properties": {"deep": {"type": "boolean"}}, "required": []},
                            {"type": "null"},
                        ]
                    },
                    "note": {"type": "string", "description": "A note.", "default": ""},
                    "either": {"anyOf": [{"type": "integer"}, place], "default": 0},
                    "other": {},
                },
                "required": ["city", "place"],
            },
        },
    }


GOOGLE = """Does it.

Args:
    a: The first.
    b (int, optional): The second: a number,
        or so.
    *c: The third.
Returns:
    x: nothing
"""
NUMPY = """Does it.

Parameters
----------
a : str
    The first.
b : int, optional
    The second: a number,
    or so.
*c
    The third.

Returns
-------
x : str
    nothing
"""
REST = """Does it.

:param a: The first.
:param int b: The second: a number,
    or so.
:param c: The third.
:type c: str
:returns: x
:raises ValueError: never
"""


@pytest.mark.parametrize("text", [GOOGLE, NUMPY, REST], ids=["Google", "numpy", "reST"])
def test_styles_of_docstrings(text: str) -> None:
    def f(a: str, b: int, c: str) -> None: ...

    f.__doc__ = text
    function = schema_of(f)["function"]
    assert function["description"] == "Does it."
    texts = {name: schema["description"] for name, schema in function["parameters"]["properties"].items()}
    assert texts == {"a": "The first.", "b": "The second: a number, or so.", "c": "The third."}


def test_methods_and_objects_are_functions() -> None:
    class Shop:
        def buy(self, n: int) -> None:
            """Buys."""

        def __call__(self, n: int) -> None: ...

    assert schema_of(Shop().buy)["function"]["parameters"]["required"] == ["n"]
    with pytest.raises(ArgumentError, match="has no name"):
        schema_of(Shop())


def test_what_cannot_be_described() -> None:
    def untyped(a) -> None: ...  # type: ignore[no-untyped-def]
    def many(*a: int) -> None: ...
    def named(**a: int) -> None: ...
    def positional(a: int, /) -> None: ...
    def odd(a: complex) -> None: ...
    def keys(a: dict[int, str]) -> None: ...
    def unknown(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    for function, match in [
        (untyped, "parameter a has no annotation; write its type, as in a: str"),
        (many, "models call by names"),
        (named, "models call by names"),
        (positional, "models call by names"),
        (odd, "complex, which JSON schema cannot say; use str"),
        (keys, "keys of a JSON object are texts"),
        (unknown, "Nowhere"),
        (lambda x: x, "no name that a model could call"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            schema_of(function)


@dataclasses.dataclass
class Node:
    next: Node | None = None


def test_a_type_that_holds_itself() -> None:
    def f(node: Node) -> None: ...

    with pytest.raises(ArgumentError, match="Node holds itself"):
        schema_of(f)


def test_pydantic_models() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Inner(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        x: int = pydantic.Field(description="An x.")

    class Outer(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        inner: Inner
        more: list[Inner] = pydantic.Field(default_factory=list)

    def f(a: Outer) -> None: ...

    f.__annotations__["a"] = Outer
    schema = schema_of(f)["function"]["parameters"]["properties"]["a"]
    assert "$ref" not in json.dumps(schema)
    assert schema["properties"]["inner"]["properties"]["x"]["description"] == "An x."
    assert schema["required"] == ["inner"]


def test_tools_are_checked() -> None:
    made = as_tools([forecast, TOOLS[1], {"type": "function", "function": {"name": "bare"}}])
    assert [one["function"]["name"] for one in made] == ["forecast", "now", "bare"]
    assert made[2]["function"]["parameters"] == {"type": "object", "properties": {}}
    bad: list[tuple[Any, str]] = [
        ([{"name": "f"}], "tools\\[0\\] is no tool"),
        ([tool("a b", {})], "not made of letters"),
        ([TOOLS[1], TOOLS[1]], "two tools named 'now'"),
        ([{"function": {"name": "f", "parameters": "x"}}], "not a JSON schema"),
        ([{"function": {"name": "f", "parameters": {"type": "string"}}}], "type 'object'"),
        ([5], "a function or a dict"),
    ]
    for tools, match in bad:
        with pytest.raises(ArgumentError, match=match):
            as_tools(tools)
    with pytest.raises(TypeError, match="a list of functions"):
        as_tools("f")  # type: ignore[arg-type]


# ---- conversations

TWO_CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [call_dict(0, "now", "{}"), call_dict(1, "get_weather", '{"city": "Paris"}')],
    },
    {"role": "tool", "content": "sunshine", "tool_call_id": "call00001"},
    {"role": "tool", "content": "twelve", "tool_call_id": "call00000"},
]


@pytest.mark.parametrize("stem", ROUND_TRIPS)
def test_a_conversation_is_rendered_whole(data_dir: Path, stem: str) -> None:
    """Whatever a template wants: arguments as dicts or texts, a content or none, one call a message."""
    template = chat_template(path_of(data_dir, stem))
    prompt = render(template, TWO_CALLS, TOOLS, BY_NAME[TEMPLATES[stem]], **VARIABLES.get(stem, {}))
    for text in ("get_weather", "Does now", "Paris", "sunshine", "twelve"):
        assert text in prompt
    names = [at.start() for at in re.finditer(r"\bnow\b", prompt)]
    assert any(prompt.index("Hi") < at for at in names)


WHOLE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }} {{ c.function.arguments.a }}]{% endfor %}{% endfor %}{{ tools }}"
)
ANSWERED: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": None, "tool_calls": [call_dict(0, "now", '{"a": 1}')]},
    {"role": "tool", "content": "noon", "tool_call_id": "call00000"},
]


def test_arguments_reach_templates_as_dicts() -> None:
    shown = render(ChatTemplate(WHOLE), ANSWERED, TOOLS, HERMES)
    assert shown.startswith("<user>Hi<assistant>[now 1]<tool>noon[{")
    assert ANSWERED[1]["content"] is None, "the caller's own messages are left alone"
    own = [ANSWERED[0], {**ANSWERED[1], "tool_calls": [tool_call("now", {"a": 1})]}, ANSWERED[2]]
    assert render(ChatTemplate(WHOLE), own, TOOLS, HERMES) == shown
    assert count_calls(own) == count_calls(ANSWERED) == 1


def test_a_template_that_takes_one_call_a_message_gets_each_with_its_result() -> None:
    source = (
        "{% for m in messages %}{% if m.tool_calls %}"
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}"
        "[{{ m.tool_calls[0].function.name }}]{% else %}{{ m.content }}{% endif %} {% endfor %}"
    )
    for text in (source, source.replace("{{ raise_exception('one') }}", "")):
        prompt = render(ChatTemplate(text), TWO_CALLS, [], LLAMA)
        assert prompt.split() == ["Hi", "[now]", "twelve", "[get_weather]", "sunshine"]


def test_a_template_that_writes_no_calls_gets_them_as_text(caplog: pytest.LogCaptureFixture) -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tools }}"
    prompt = render(ChatTemplate(source), ANSWERED, TOOLS, BY_NAME["Granite 3"])
    written = '<|tool_call|>[{"name": "now", "arguments": {"a": 1}}]'
    assert prompt.startswith(f"<user>Hi<assistant>{written}<tool>noon[{{")
    without_results = source.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    prompt = render(ChatTemplate(without_results), ANSWERED, TOOLS, BY_NAME["Granite 3"])
    assert f"<assistant>{written}<user>The function returned: noon" in prompt
    assert not caplog.records


def test_a_template_without_tools_is_told_of_them(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    text = instructions(GENERIC, TOOLS)
    assert '{"name": "NAME", "arguments": {"PARAMETER": "VALUE"}}' in text
    assert '"name": "get_weather"' in text
    for _ in range(2):
        prompt = render(template, ANSWERED, TOOLS, GENERIC)
    system, user, assistant, result = re.split("<(?:system|user|assistant)>", prompt)[1:]
    assert (system, user, result) == (text, "Hi", "The function returned: noon")
    assert called(read(GENERIC, [assistant])) == [("now", {"a": 1})]
    (record,) = caplog.records
    assert "the chat template calls tools in no format that is known" in record.getMessage()
    brief = render(template, [{"role": "system", "content": "Be brief."}], TOOLS, GENERIC)
    assert brief == f"<system>Be brief.\n\n{text}"
    refuses = "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    no_system = f"{{% for m in messages %}}{refuses}{{{{ m.content }}}}{{% endfor %}}"
    assert render(ChatTemplate(no_system), ANSWERED[:1], TOOLS, GENERIC) == f"{text}\n\nHi"


def test_tools_that_only_some_words_are_missing_for(caplog: pytest.LogCaptureFixture) -> None:
    """DeepSeek's templates write calls, but show no tools: the model is asked for its own format."""
    format = BY_NAME["DeepSeek V3.1"]
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert render(template, ANSWERED[:1], TOOLS, format) == instructions(format, TOOLS) + "Hi"
    assert "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>" in instructions(format, TOOLS)
    (record,) = caplog.records
    assert "the chat template shows no tools: a message tells the model of them" in record.getMessage()
    assert render(template, ANSWERED[:1], [], format) == "Hi"


def test_what_a_template_leaves_out_is_an_error() -> None:
    with pytest.raises(TemplateError, match="leaves out calls of tools or their results"):
        render(ChatTemplate("{{ messages[0].content }}{{ tools }}"), ANSWERED, TOOLS, HERMES)
    with pytest.raises(TemplateError, match="never"):
        render(ChatTemplate("{{ raise_exception('never') }}"), ANSWERED, TOOLS, HERMES)
    with pytest.raises(TypeError, match="messages is a list of dicts"):
        render(ChatTemplate(WHOLE), "Hi", TOOLS, HERMES)  # type: ignore[arg-type]
    assert render(ChatTemplate("x"), [], [], HERMES) == "x"


def test_calls_that_are_none_are_refused() -> None:
    for call in ("now", {"function": {}}, call_dict(0, "now", "{"), call_dict(0, "now", "[1]")):
        with pytest.raises(ArgumentError, match=r"messages\[0\]"):
            render(ChatTemplate(WHOLE), [{"role": "assistant", "tool_calls": [call]}], TOOLS, HERMES)


# ---- grammars

SPECIAL = re.compile(
    r"<\|[^<>|]*\|>|<｜[^<>｜]*｜>|\[[A-Z_]+\](?!\W)|<\|tool_call>|<tool_call\|>|</?(?:start|end)_function_call>"
    r"|<escape>|｜DSML｜|<\|\"\|>"
)


class Vocabulary:
    """Every byte is a token, and so is each of these texts."""

    def __init__(self, special: Sequence[str]) -> None:
        self.ids = {text: 256 + i for i, text in enumerate(special)}
        self.tokens = [bytes([i]) for i in range(256)] + [
            b"\xff" + text.encode() for text in [*special, "<end>"]
        ]
        self.bos_token_id, self.eos_token_id = None, len(self.tokens) - 1
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)

    @functools.cached_property
    def tokenizer(self) -> Any:
        llguidance = pytest.importorskip("llguidance")
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(self))

    def encode(self, text: str) -> list[int]:
        ids, at = [], 0
        longest_first = sorted(self.ids, key=len, reverse=True)
        for found in re.finditer("|".join(map(re.escape, longest_first)) or "(?!)", text):
            ids += [*text[at : found.start()].encode(), self.ids[found[0]]]
            at = found.end()
        return [*ids, *text[at:].encode()]


def matches(grammar: str, vocabulary: Vocabulary, text: str) -> bool:
    """Whether llguidance takes the whole text and would let it end there."""
    matcher = pytest.importorskip("llguidance").LLMatcher(vocabulary.tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar}"
    ids = vocabulary.encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and bool(matcher.is_accepting())


def vocabularies(format: Format) -> list[Vocabulary]:
    """One in which the format's marks are special tokens, and one in which they are text."""
    more = {"<|end|>", "<|start|>"} if format is HARMONY else set()
    special = tuple(sorted({*SPECIAL.findall("\0".join(format.shape.literals)), *more}))
    return [vocabulary(special), *([vocabulary(())] if special and format is not HARMONY else [])]


vocabulary = functools.cache(Vocabulary)


def written(format: Format, *calls: Any) -> str:
    """What a model would write before its end token. Arguments come in the order of Google's templates, which
    is that of the schema."""
    text = format.shape.write([tool_call(name, arguments, i) for i, (name, arguments) in enumerate(calls)])
    for token in format.end_tokens:
        text = text.replace(token, "")
    return text


GOOD = [("get_weather", arguments) for arguments in ARGUMENTS.values()]
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("get_weather", {"days": 3}),  # city is required
    ("get_weather", {"city": "x", "days": "three"}),
    ("get_weather", {"city": "x", "other": 3}),
    ("get_weather", {"city": "x", "tags": [1]}),
    ("now", {"a": 1}),
]


@each_format
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", "get_weather"])
def test_a_grammar_takes_the_formats_own_calls(format: Format, choice: str, strict: bool) -> None:
    for vocabulary in vocabularies(format):
        grammar = call_grammar(format, TOOLS, choice, strict=strict, special_tokens=vocabulary.ids)
        if grammar is None:
            assert (choice, strict) == ("auto", False)
            return
        for name, arguments in GOOD:
            text = written(format, (name, dict(sorted(arguments.items()))))
            assert matches(grammar, vocabulary, text), text
        several = written(format, GOOD[0], ("now", {}))
        assert matches(grammar, vocabulary, several) == (not format.is_single and choice != "get_weather")
        assert matches(grammar, vocabulary, written(format, ("now", {}))) == (choice != "get_weather")
        assert not matches(grammar, vocabulary, written(format, ("later", {})))
        if format is HARMONY:
            thoughts = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
            said_first = "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant"
            assert matches(grammar, vocabulary, thoughts + text)
            assert matches(grammar, vocabulary, thoughts + said_first + text) == (choice == "auto")
            assert matches(grammar, vocabulary, "<|channel|>final<|message|>Hi.") == (choice == "auto")
            continue
        assert matches(grammar, vocabulary, "Hi.") == (choice == "auto")
        if choice == "auto" and format.shape.opens and format is not LLAMA:
            assert matches(grammar, vocabulary, "Hi <a> [b].\n" + text)
            assert not matches(grammar, vocabulary, written(format, ("now", {}))[:-1])


@each_format
def test_a_strict_grammar_takes_no_wrong_arguments(format: Format) -> None:
    for vocabulary in vocabularies(format):
        grammar = call_grammar(format, TOOLS, "required", strict=True, special_tokens=vocabulary.ids)
        assert grammar is not None
        for call in WRONG:
            assert not matches(grammar, vocabulary, written(format, call)), call
        loose = call_grammar(format, TOOLS, "required", special_tokens=vocabulary.ids)
        assert loose is not None
        assert matches(loose, vocabulary, written(format, ("now", {"a": 1})))


RICH = {
    "a": {"enum": ["x", "y"]},
    "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "c": {
        "type": "object",
        "properties": {"d": {"type": "string"}, "e": {"$ref": "#/$defs/n"}},
        "required": ["d"],
    },
    "f": {
        "type": "array",
        "items": {"type": "object", "properties": {"g": {"type": "boolean"}}, "required": ["g"]},
    },
}


@each_format
def test_grammars_of_rich_schemas(format: Format) -> None:
    tools = [tool("f", RICH, ["a"]), tool("g", {"x": {"type": "string"}})]
    tools[0]["function"]["parameters"]["$defs"] = {"n": {"type": "integer"}}
    vocabulary = vocabularies(format)[0]
    grammar = call_grammar(format, tools, "required", strict=True, special_tokens=vocabulary.ids)
    assert grammar is not None
    good: list[dict[str, Any]] = [
        {"a": "x"},
        {"a": "y", "b": 5, "c": {"d": "z", "e": 3}, "f": [{"g": True}, {"g": False}]},
        {"a": "x", "b": None, "c": {"d": ""}, "f": []},
    ]
    for arguments in good:
        assert matches(grammar, vocabulary, written(format, ("f", arguments))), arguments
        assert called(read(format, [written(format, ("f", arguments))], tools)) == [("f", arguments)]
    for arguments in [
        {"a": "z"},
        {"a": "x", "b": True},
        {"a": "x", "c": {"e": 3}},
        {"a": "x", "f": [{"g": 1}]},
    ]:
        assert not matches(grammar, vocabulary, written(format, ("f", arguments))), arguments


def test_choices() -> None:
    assert call_grammar(HERMES, TOOLS, "none", strict=True, special_tokens={}) is None
    assert call_grammar(HERMES, TOOLS, "auto", special_tokens={}) is None
    with pytest.raises(ArgumentError, match=r"tool_choice is 'later', expected .*\(get_weather, now\)"):
        call_grammar(HERMES, TOOLS, "later", special_tokens={})
    with pytest.raises(ArgumentError, match="there are no tools"):
        call_grammar(HERMES, [], "required", special_tokens={})


def test_what_a_notation_cannot_enforce_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    tools = [
        tool("warned_of", {"x": {"type": "string", "pattern": "^a"}, "y": {"type": "integer", "minimum": 3}})
    ]
    with caplog.at_level(logging.WARNING, "tinyllm.chat.tools"):
        for _ in range(2):
            call_grammar(CODER, tools, "required", strict=True, special_tokens={})
            call_grammar(HERMES, tools, "required", strict=True, special_tokens={})
    (record,) = caplog.records
    assert "cannot enforce warned_of(x): pattern" in record.getMessage()


# ---- the page


def test_the_page_has_the_table() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "tools.md"
    assert tools_table.table() in page.read_text(encoding="utf-8")
