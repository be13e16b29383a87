"""Anthropic's dialect with Anthropic's own client: messages whole and streamed, tools, thinking, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pydantic
import pytest
from helpers_serve import Running, Says, serving, write_chat_model

import tinyllm
from tinyllm.server.ask import Fields
from tinyllm.server.dialects.anthropic.asked import wanted_of

MESSAGES: list[Any] = [{"role": "user", "content": "Once upon a time"}]
ASKED: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "max_tokens": 16}
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 7}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}
AS_OPENAI = {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}
WRITTEN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT = "<think>\nHm, hm.\n</think>\n\nWell."


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("anthropic") / "chat.gguf")


@pytest.fixture(scope="module")
def model() -> Says:
    return Says()


@pytest.fixture(scope="module")
def running(path: Path, model: Says) -> Iterator[Running]:
    with serving({"chat": path, "plain": "stories"}, model) as running:
        yield running


@pytest.fixture
def says(model: Says) -> Iterator[Says]:
    yield model
    model.text = None


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[tinyllm.LLM]:
    with tinyllm.load(path, context=2048) as llm:
        yield llm


def extra(value: Any, name: str) -> Any:
    """A member of ours, which the client's types do not have."""
    return (value.model_extra or {})[name]


def blocks_of(message: Any) -> list[dict[str, Any]]:
    """Its content; the client's streams have a class of their own for texts."""
    return [block.model_dump(exclude_none=True) for block in message.content]


def events_of(running: Running, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, as they are on the wire."""
    answer = httpx.post(f"{running.url}/v1/messages", json={**body, "stream": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


# --- messages -----------------------------------------------------------------------------------------------


def test_a_message_has_the_tokens_of_llm_chat(client: anthropic.Anthropic, llm: tinyllm.LLM) -> None:
    turns: list[Any] = [
        *MESSAGES,
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    made = client.messages.create(**{**ASKED, "messages": turns}, system="Be brief.", extra_body=DRAWN)
    same = llm.chat([{"role": "system", "content": "Be brief."}, *turns], max_tokens=16, **DRAWN)
    assert blocks_of(made) == [{"type": "text", "text": same.text}]
    assert (made.role, made.model, made.stop_reason, made.stop_sequence) == (
        "assistant",
        "chat",
        "max_tokens",
        None,
    )
    assert (made.usage.input_tokens, made.usage.output_tokens) == (len(same.prompt_tokens), 16)
    assert extra(made, "seed") == 7
    assert extra(made, "timings")["generated_tokens"] == 16
    replay = client.messages.create(**ASKED, extra_body={**DRAWN, "replay": True})
    assert extra(replay, "replay")[0]["tokens"] == llm.chat(MESSAGES, max_tokens=16, **DRAWN).tokens


def test_a_stream_says_what_a_whole_answer_does(client: anthropic.Anthropic, running: Running) -> None:
    whole = client.messages.create(**ASKED, extra_body=DRAWN)
    with client.messages.stream(**ASKED, extra_body=DRAWN) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [b.type for b in whole.content] == ["text"]
    assert text == getattr(whole.content[0], "text", None) == stream.get_final_text()
    assert final.usage == whole.usage
    assert (final.stop_reason, final.model) == (whole.stop_reason, whole.model)

    first, *middle, end, last = events_of(running, **ASKED, **DRAWN)
    assert first["type"] == "message_start"
    assert first["message"]["content"] == []
    assert first["message"]["usage"] == {"input_tokens": whole.usage.input_tokens, "output_tokens": 0}
    kinds = [event["type"] for event in middle]
    deltas = len(kinds) - 2
    assert kinds == ["content_block_start", *["content_block_delta"] * deltas, "content_block_stop"]
    assert deltas > 10
    assert {event["index"] for event in middle} == {0}
    assert end["type"] == "message_delta"
    assert end["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == 16
    assert (end["seed"], end["timings"]["prompt_tokens"]) == (7, whole.usage.input_tokens)
    assert last == {"type": "message_stop"}


def test_the_client_for_tasks(running: Running, client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASKED, extra_body=DRAWN)

    async def work() -> None:
        async with anthropic.AsyncAnthropic(base_url=running.url, api_key="none", max_retries=0) as many:
            made = await asyncio.gather(*(many.messages.create(**ASKED, extra_body=DRAWN) for _ in range(3)))
            assert all(blocks_of(one) == blocks_of(whole) for one in made)
            async with many.messages.stream(**ASKED, extra_body=DRAWN) as stream:
                assert blocks_of(await stream.get_final_message()) == blocks_of(whole)

    asyncio.run(work())


@pytest.mark.parametrize("is_read", [True, False])
def test_a_client_that_goes_frees_its_text(running: Running, is_read: bool) -> None:
    long: dict[str, Any] = {**ASKED, "max_tokens": 1900, "extra_body": {"min_tokens": 1900}}

    async def work() -> None:
        async with anthropic.AsyncAnthropic(base_url=running.url, api_key="none", max_retries=0) as client:
            if is_read:
                async with client.messages.stream(**long) as stream:
                    await anext(aiter(stream.text_stream))
                    assert running.server.turns.running == 1
            else:
                task = asyncio.create_task(client.messages.create(**long))
                while not running.server.turns.running:
                    await asyncio.sleep(0.005)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    asyncio.run(work())
    running.wait_until_idle()


def test_why_an_answer_ends(client: anthropic.Anthropic, says: Says) -> None:
    says.text = "One. Two. Three."
    made = client.messages.create(**{**ASKED, "max_tokens": 50}, stop_sequences=["Nine", "Three"])
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", "Three")
    assert [getattr(block, "text", None) for block in made.content] == ["One. Two. "]
    made = client.messages.create(**{**ASKED, "max_tokens": 50})
    assert (made.stop_reason, made.stop_sequence) == ("end_turn", None)
    says.text = ""
    assert client.messages.create(**ASKED).content == []
    says.text = None
    long = [{"role": "user", "content": "a " * 1950}]
    more = {"min_tokens": 100}
    made = client.messages.create(**{**ASKED, "messages": long, "max_tokens": 1900}, extra_body=more)
    assert made.stop_reason == "model_context_window_exceeded"
    assert made.usage.input_tokens + made.usage.output_tokens == 2048


def test_tokens_are_counted(client: anthropic.Anthropic, llm: tinyllm.LLM) -> None:
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    counted = client.messages.count_tokens(
        model="chat",
        system=blocks,  # type: ignore[arg-type]
        messages=MESSAGES,
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice={"type": "auto"},
        thinking={"type": "disabled"},
    )
    same = llm.chat_ids(
        [{"role": "system", "content": "Be brief."}, *MESSAGES],
        tools=[{"type": "function", "function": AS_OPENAI}],
        template_args={"enable_thinking": False},
    )
    assert counted.input_tokens == len(same)


# --- thinking -----------------------------------------------------------------------------------------------


def test_thinking_is_a_block(client: anthropic.Anthropic, says: Says, running: Running) -> None:
    says.text = THOUGHT
    asked: dict[str, Any] = {**ASKED, "max_tokens": 100}
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    made = client.messages.create(**asked, thinking=thinking)
    assert [(b.type, getattr(b, b.type, None)) for b in made.content] == [
        ("thinking", "Hm, hm."),
        ("text", "Well."),
    ]
    with client.messages.stream(**asked, thinking=thinking) as stream:
        kinds = [event.type for event in stream]
        assert blocks_of(stream.get_final_message()) == blocks_of(made)
    assert kinds.index("thinking") < kinds.index("content_block_stop") < kinds.index("text")
    deltas = [e["delta"] for e in events_of(running, **asked) if e["type"] == "content_block_delta"]
    assert {d["type"] for d in deltas} == {"thinking_delta", "text_delta"}
    assert "".join(d.get("thinking", "") for d in deltas) == "Hm, hm."

    omitted: Any = {"type": "adaptive", "display": "omitted"}
    for hidden in (omitted, {"type": "disabled"}):
        made = client.messages.create(**asked, thinking=hidden)
        assert [b.type for b in made.content] == ["text"]
        with client.messages.stream(**asked, thinking=hidden) as stream:
            assert blocks_of(stream.get_final_message()) == blocks_of(made)


def test_thinking_reaches_the_template(client: anthropic.Anthropic, llm: tinyllm.LLM) -> None:
    for kind, is_on in (("disabled", False), ("adaptive", True)):
        made = client.messages.create(**ASKED, thinking={"type": kind})  # type: ignore[misc]
        ids = llm.chat_ids(MESSAGES, template_args={"enable_thinking": is_on})
        assert made.usage.input_tokens == len(ids)
    made = client.messages.create(**ASKED, output_config={"effort": "high"})
    assert made.usage.input_tokens == len(llm.chat_ids(MESSAGES, template_args={"enable_thinking": True}))


# --- tools --------------------------------------------------------------------------------------------------


def test_a_call_is_a_block(client: anthropic.Anthropic, says: Says, running: Running) -> None:
    says.text = f"<think>Hm.</think>Let me see.\n{WRITTEN}\nAnd.\n{WRITTEN.replace('Paris', 'Rome')}"
    asked: dict[str, Any] = {**ASKED, "max_tokens": 200, "tools": [TOOL]}
    made = client.messages.create(**asked)
    assert [b.type for b in made.content] == ["thinking", "text", "tool_use", "tool_use"]
    calls = [b for b in made.content if b.type == "tool_use"]
    assert [(c.id, c.name, c.input) for c in calls] == [
        ("call_0", "get_weather", {"city": "Paris"}),
        ("call_1", "get_weather", {"city": "Rome"}),
    ]
    assert made.stop_reason == "tool_use"
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert [b.type for b in final.content] == ["thinking", "text", "tool_use", "text", "tool_use"]
    assert [b for b in final.content if b.type == "tool_use"] == calls
    assert "".join(b.text for b in final.content if b.type == "text") == getattr(made.content[1], "text", "")
    assert (final.stop_reason, final.usage) == (made.stop_reason, made.usage)

    events = events_of(running, **asked)
    starts = [e for e in events if e["type"] == "content_block_start"]
    assert [e["index"] for e in starts] == list(range(5))
    assert starts[2]["content_block"] == {
        "type": "tool_use",
        "id": "call_0",
        "name": "get_weather",
        "input": {},
    }
    one = client.messages.create(**asked, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [b for b in one.content if b.type == "tool_use"] == calls[:1]


def test_eager_arguments_go_out_while_they_are_written(
    client: anthropic.Anthropic, says: Says, running: Running
) -> None:
    says.text = WRITTEN
    asked: dict[str, Any] = {**ASKED, "max_tokens": 200}

    def deltas(tool: dict[str, Any]) -> list[str]:
        events = events_of(running, **asked, tools=[tool])
        return [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"]

    whole, parts = deltas(TOOL), deltas({**TOOL, "eager_input_streaming": True})
    assert len(whole) == 1
    assert len(parts) > 3
    assert json.loads("".join(parts)) == json.loads(whole[0]) == {"city": "Paris"}


@pytest.mark.parametrize("is_eager", [False, True])
def test_a_malformed_call_is_text(client: anthropic.Anthropic, says: Says, is_eager: bool) -> None:
    says.text = WRITTEN.replace('"}}', '"}')
    tools: Any = [{**TOOL, "eager_input_streaming": is_eager}]
    made = client.messages.create(**{**ASKED, "max_tokens": 200}, tools=tools)
    assert [b.type for b in made.content] == ["text"]
    assert (getattr(made.content[0], "text", None), made.stop_reason) == (says.text, "end_turn")
    with client.messages.stream(**{**ASKED, "max_tokens": 200}, tools=tools) as stream:
        final = stream.get_final_message()
    assert blocks_of(final)[is_eager:] == blocks_of(made)
    assert final.stop_reason == "end_turn"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_can_be_forced(client: anthropic.Anthropic, choice: Any) -> None:
    tools: Any = [{**TOOL, "strict": True}]
    choice = {**choice, "disable_parallel_tool_use": True}
    made = client.messages.create(
        **{**ASKED, "max_tokens": 300}, tools=tools, tool_choice=choice, extra_body={"seed": 1}
    )
    assert [b.type for b in made.content] == ["tool_use"]
    arguments = getattr(made.content[0], "input", {})
    assert {"city"} <= set(arguments) <= {"city", "days"}
    assert made.stop_reason == "tool_use"


def test_no_call_where_there_is_to_be_none(client: anthropic.Anthropic, says: Says) -> None:
    says.text = WRITTEN
    made = client.messages.create(
        **{**ASKED, "max_tokens": 200},
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice={"type": "none"},
    )
    assert [(b.type, getattr(b, "text", None)) for b in made.content] == [("text", WRITTEN)]


def test_results_go_back(client: anthropic.Anthropic, says: Says, llm: tinyllm.LLM) -> None:
    """What the client gives back, its own blocks among it, is the conversation that `LLM.chat` takes."""
    says.text = f"{WRITTEN}\n{WRITTEN.replace('Paris', 'Rome')}"
    asked: dict[str, Any] = {**ASKED, "max_tokens": 200, "tools": [TOOL]}
    made = client.messages.create(**asked)
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": "call_1", "content": "7 degrees"},
        {
            "type": "tool_result",
            "tool_use_id": "call_0",
            "is_error": True,
            "content": [{"type": "text", "text": "no "}, {"type": "text", "text": "such city"}],
            "cache_control": {"type": "ephemeral"},
        },
        {"type": "text", "text": "So?"},
    ]
    turns = [*MESSAGES, {"role": "assistant", "content": made.content}, {"role": "user", "content": results}]
    says.text = "Well."
    answer = client.messages.create(**{**asked, "messages": turns})
    calls = [
        {
            "id": f"call_{i}",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": city}},
        }
        for i, city in enumerate(("Paris", "Rome"))
    ]
    same = llm.chat_ids(
        [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "call_1", "content": "7 degrees"},
            {"role": "tool", "tool_call_id": "call_0", "content": "Error: no such city"},
            {"role": "user", "content": "So?"},
        ],
        tools=[{"type": "function", "function": AS_OPENAI}],
    )
    assert answer.usage.input_tokens == len(same)


def test_a_conversation_in_openais_form() -> None:
    """Turns of one role in a row are one, thinking goes back, results are messages of their own."""
    body = {
        "model": "m",
        "system": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}],
        "messages": [
            {"role": "user", "content": "C"},
            {"role": "user", "content": [{"type": "text", "text": "D"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "E", "signature": "x"},
                    {"type": "text", "text": "F", "citations": None},
                    {"type": "tool_use", "id": "i", "name": "f", "input": {}, "caller": {"type": "direct"}},
                    {"type": "text", "text": "G"},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "i"}]},
        ],
    }
    parts = [[{"type": "text", "text": text} for text in pair] for pair in ("AB", "CD")]
    assert wanted_of(Fields(body)).ask.messages == [
        {"role": "system", "content": parts[0]},
        {"role": "user", "content": parts[1]},
        {
            "role": "assistant",
            "content": "FG",
            "reasoning_content": "E",
            "tool_calls": [{"id": "i", "type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "tool_call_id": "i", "name": "f", "content": ""},
    ]


# --- forms, models, errors ----------------------------------------------------------------------------------


class Ball(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    colour: str
    size: int


def test_an_answer_of_a_form(client: anthropic.Anthropic) -> None:
    made = client.messages.parse(**{**ASKED, "max_tokens": 400}, output_format=Ball, extra_body={"seed": 3})
    assert isinstance(made.parsed_output, Ball)


def test_models_under_its_header(client: anthropic.Anthropic, running: Running) -> None:
    listed = client.models.list()
    assert [(m.id, m.display_name, m.type) for m in listed] == [
        ("chat", "chat", "model"),
        ("plain", "plain", "model"),
    ]
    assert listed.data[0].created_at.year >= 2026
    assert client.models.retrieve("plain").id == "plain"
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'gpt'") as caught:
        client.models.retrieve("gpt")
    assert caught.value.type == "not_found_error"
    openai = httpx.get(f"{running.url}/v1/models").json()
    assert (openai["object"], [m["id"] for m in openai["data"]]) == ("list", ["chat", "plain"])


def _block(**block: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [block]}]}


SOURCE = {"type": "url", "url": "http://127.0.0.1/a.png"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens is missing"),
    ({"max_tokens": 0}, "max_tokens is 0, expected 1"),
    ({"max_tokens": "5"}, "max_tokens must be"),
    ({"model": None}, "model is missing"),
    ({"messages": []}, "messages must have a message"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "Once"}]}, "not continued"),
    ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role is 'tool'"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, r"messages\[0\].name is not known"),
    ({"messages": "Hello"}, "messages must be a list"),
    (_block(type="image", source=SOURCE), r"content\[0\].type is 'image', .* takes text, tool_result"),
    (_block(type="document", source=SOURCE), "is 'document'"),
    (_block(type="redacted_thinking", data="x"), "is 'redacted_thinking'"),
    (_block(type="text", text="x", citations=[{}]), "citations is not supported"),
    (_block(type="text", text="x", colour="red"), "colour is not known"),
    (_block(type="tool_result", tool_use_id="call_9", content="x"), "'call_9', which no tool_use before"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\].type is 'web_search"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "defer_loading is not supported"),
    ({"tools": [{**TOOL, "input_examples": [{}]}]}, "input_examples is not known"),
    ({"tools": [{"name": "f"}]}, r"tools\[0\].input_schema is missing"),
    ({"tools": [TOOL, TOOL]}, "two tools named 'get_weather'"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type is 'some'"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice is 'g'"),
    ({"tool_choice": {"type": "tool", "name": "none"}}, "tool_choice.name is 'none'"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type is 'between_tools'"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "budget_tokens is 0"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "cannot be enforced"),
    ({"output_config": {"effort": "huge"}}, "effort is 'huge'"),
    ({"stop_sequences": [""]}, "stop_sequences has an empty string"),
    ({"temperature": -1}, "temperature is -1"),
    ({"speed": "fast"}, "speed is not supported"),
    ({"container": "x"}, "container is not known here"),
    ({"mcp_servers": []}, "mcp_servers is not known here"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_what_is_refused(client: anthropic.Anthropic, body: dict[str, Any], message: str) -> None:
    for streams in (False, True):
        whole = {**ASKED, **body, "stream": streams}
        with pytest.raises(anthropic.BadRequestError, match=message) as caught:
            client.post("/v1/messages", cast_to=object, body=whole)
        assert caught.value.type == "invalid_request_error"


def test_what_is_harmless(client: anthropic.Anthropic) -> None:
    marked = [{"type": "text", "text": "Once upon a time", "cache_control": {"type": "ephemeral"}}]
    plain = client.messages.create(**ASKED, extra_body=DRAWN)
    more: dict[str, Any] = {
        "messages": [{"role": "user", "content": marked}],
        "metadata": {"user_id": "me"},
        "cache_control": {"type": "ephemeral"},
        "service_tier": "auto",
        "speed": "standard",
        "inference_geo": "eu",
    }
    made = client.messages.create(**{**ASKED, **more}, extra_body=DRAWN)
    assert made.content == plain.content


def test_other_errors(client: anthropic.Anthropic, running: Running, path: Path) -> None:
    with pytest.raises(anthropic.NotFoundError, match="only chat, plain") as missing:
        client.messages.create(**{**ASKED, "model": "claude"})
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="tokens do not fit into the context of 2048"):
        client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": "a " * 3000}]})
    with pytest.raises(anthropic.BadRequestError, match="plain has no chat template"):
        client.messages.create(**{**ASKED, "model": "plain"})
    bad = httpx.post(f"{running.url}/v1/messages", content=b"{")
    assert (bad.status_code, bad.json()["type"]) == (400, "error")
    assert bad.json()["error"]["type"] == "invalid_request_error"


def test_a_full_queue(path: Path) -> None:
    with serving({"chat": path}, parallel=1, queue=0) as running:
        client = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
        long: dict[str, Any] = {**ASKED, "max_tokens": 400, "extra_body": {"min_tokens": 400}}
        with client, client.messages.stream(**long) as stream:
            next(iter(stream.text_stream))
            with pytest.raises(anthropic.RateLimitError, match="come back later") as caught:
                client.messages.create(**ASKED)
            assert caught.value.type == "rate_limit_error"
            assert int(caught.value.response.headers["retry-after"]) >= 1


def test_an_error_within_a_stream(path: Path) -> None:
    model = Says()
    with serving({"chat": path}, model) as running:
        client = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
        long: dict[str, Any] = {**ASKED, "max_tokens": 400, "extra_body": {"min_tokens": 400}}
        with client, client.messages.stream(**long) as stream:
            next(iter(stream.text_stream))
            model.loaded[0].close()
            with pytest.raises(anthropic.APIStatusError, match="the server is ending") as caught:
                stream.until_done()
            assert caught.value.type == "overloaded_error"
