"""OpenAI's /v1/responses with OpenAI's own client: items, events in their order, conversations that go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from helpers_serve import Running, Says, serving, write_chat_model
from test_serve_openai import MALFORMED, WEATHER, WRITTEN, extra

import tinyllm
from tinyllm.server.kept import Kept

GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 12}
TOOLS: list[Any] = [{"type": "function", **WEATHER}]
THINKS = "<think>\nHm, Paris.\n</think>\n\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("serve") / "chat.gguf")


@pytest.fixture(scope="module")
def model() -> Says:
    return Says()


@pytest.fixture(scope="module")
def running(path: Path, model: Says) -> Iterator[Running]:
    with serving({"chat": path}, model) as running:
        yield running


@pytest.fixture
def says(model: Says) -> Iterator[Says]:
    yield model
    model.text = None


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[tinyllm.LLM]:
    with tinyllm.load(path, context=2048) as llm:
        yield llm


def test_an_answer_is_that_of_llm_chat(client: openai.OpenAI, llm: tinyllm.LLM) -> None:
    made = client.responses.create(
        model="chat", input="Once upon", instructions="Be brief.", metadata={"a": "b"}, **GREEDY
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once upon"}]
    same = llm.chat(messages, temperature=0, max_tokens=12)
    assert made.output_text == same.text
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (len(same.prompt_tokens), 12)
    assert (made.instructions, made.metadata, made.temperature) == ("Be brief.", {"a": "b"}, 0)
    assert extra(made, "seed") is not None


def test_items_of_reasoning_text_and_calls(client: openai.OpenAI, says: Says) -> None:
    says.text = f"{THINKS}Let me look.\n{WRITTEN}"
    made = client.responses.create(model="chat", input="Rain?", tools=TOOLS)
    assert [item.type for item in made.output] == ["reasoning", "message", "function_call"]
    reasoning, message, call = made.output
    assert reasoning.type == "reasoning"
    assert [part.text for part in reasoning.content or []] == ["Hm, Paris."]
    assert message.type == "message"
    assert made.output_text == "Let me look."
    assert call.type == "function_call"
    assert (call.name, call.call_id, json.loads(call.arguments)) == (
        "get_weather",
        "call_0",
        {"city": "Paris"},
    )
    assert made.status == "completed"
    assert made.usage is not None
    assert 0 < made.usage.output_tokens_details.reasoning_tokens < made.usage.output_tokens


def test_events_come_in_their_order(client: openai.OpenAI, says: Says) -> None:
    says.text = f"{THINKS}Look.\n{WRITTEN}"
    events = list(client.responses.create(model="chat", input="Rain?", tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds: list[str] = []
    for event in events:
        if not kinds or kinds[-1] != event.type:
            kinds.append(event.type)
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    last = events[-1]
    assert last.type == "response.completed"
    assert [e.item for e in events if e.type == "response.output_item.done"] == last.response.output
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == last.response.output_text == "Look."
    arguments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert json.loads(arguments) == {"city": "Paris"}
    ids = {e.item_id for e in events if e.type == "response.function_call_arguments.delta"}
    assert ids == {last.response.output[2].id}


class Pet(pydantic.BaseModel):
    name: str
    legs: int


def test_the_clients_own_stream_and_parse(client: openai.OpenAI, says: Says) -> None:
    wishes: dict[str, Any] = {"model": "chat", "input": "A pet", "text_format": Pet}
    parsed = client.responses.parse(**wishes, extra_body={"seed": 1})
    assert isinstance(parsed.output_parsed, Pet)
    with client.responses.stream(**wishes, extra_body={"seed": 1}) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed
    assert "".join(texts) == final.output_text
    says.text = WRITTEN
    with client.responses.stream(model="chat", input="Rain?", tools=TOOLS) as stream:
        final = stream.get_final_response()
    (call,) = final.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Paris"}


def test_a_malformed_call_is_text(client: openai.OpenAI, says: Says) -> None:
    says.text = f"Look.\n{MALFORMED}"
    whole = client.responses.create(model="chat", input="Rain?", tools=TOOLS)
    assert {item.type for item in whole.output} == {"message"}
    assert whole.output_text == says.text
    with client.responses.stream(model="chat", input="Rain?", tools=TOOLS) as stream:
        done = [event.item for event in stream if event.type == "response.output_item.done"]
        final = stream.get_final_response()
    assert final.output_text == says.text
    assert [(item.type, item.status) for item in done if item.type == "function_call"] == [
        ("function_call", "incomplete")
    ]


def test_log_probabilities(client: openai.OpenAI, llm: tinyllm.LLM) -> None:
    wishes: dict[str, Any] = {"model": "chat", "input": "Once", "top_logprobs": 2, **GREEDY}
    same = llm.chat([{"role": "user", "content": "Once"}], temperature=0, max_tokens=12, logprobs=True)
    made = client.responses.create(**wishes, include=["message.output_text.logprobs"])
    (item,) = made.output
    assert item.type == "message"
    (part,) = item.content
    assert part.type == "output_text"
    assert [t.logprob for t in part.logprobs or []] == same.logprobs
    assert {len(t.top_logprobs) for t in part.logprobs or []} == {2}
    events = client.responses.create(**wishes, stream=True)
    tokens = [t.logprob for e in events if e.type == "response.output_text.delta" for t in e.logprobs]
    assert tokens == same.logprobs


# --- conversations ------------------------------------------------------------------------------------------


def test_a_conversation_goes_on(client: openai.OpenAI, says: Says, llm: tinyllm.LLM) -> None:
    says.text = f"{THINKS}Look.\n{WRITTEN}"
    first = client.responses.create(model="chat", input="Rain?", tools=TOOLS, instructions="Be brief.")
    call = next(item for item in first.output if item.type == "function_call")
    says.text = None
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    kept = client.responses.create(
        model="chat", previous_response_id=first.id, input=[result], tools=TOOLS, **GREEDY
    )
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
        *[item.to_dict() for item in first.output],
        result,
    ]
    stateless = client.responses.create(model="chat", input=items, tools=TOOLS, store=False, **GREEDY)
    messages = [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "reasoning_content": "Hm, Paris.",
            "content": "Look.",
            "tool_calls": [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "Rain."},
    ]
    told = [{"type": "function", "function": WEATHER}]
    same = llm.chat(messages, tools=told, temperature=0, max_tokens=12)
    assert kept.output_text == stateless.output_text == same.text
    assert kept.usage is not None
    assert kept.usage.input_tokens == len(same.prompt_tokens)
    assert kept.previous_response_id == first.id
    client.responses.create(model="chat", previous_response_id=kept.id, input="And now?", **GREEDY)
    with pytest.raises(openai.BadRequestError, match=r"no response.*whole conversation") as caught:
        client.responses.create(model="chat", previous_response_id=stateless.id, input="And now?")
    assert caught.value.code == "previous_response_not_found"


def test_responses_are_kept_and_deleted(client: openai.OpenAI) -> None:
    made = client.responses.create(model="chat", input="Once", **GREEDY)
    assert client.responses.retrieve(made.id) == made
    streamed = list(client.responses.create(model="chat", input="Once", stream=True, **GREEDY))[-1]
    assert streamed.type == "response.incomplete"
    assert client.responses.retrieve(streamed.response.id) == streamed.response
    client.responses.delete(made.id)
    for use in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="no response"):
            use(made.id)
    unkept = client.responses.create(model="chat", input="Once", store=False, **GREEDY)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)
    with pytest.raises(openai.BadRequestError, match="stream"):
        list(client.responses.retrieve(streamed.response.id, stream=True))


def test_the_least_recently_used_goes_first() -> None:
    kept = Kept(most_bytes=20)
    kept.put("a", "x" * 5)  # 7 bytes of JSON
    kept.put("b", "y" * 5)
    assert kept.get("a") == "x" * 5
    kept.put("c", "z" * 5)
    assert [kept.get(key) is not None for key in "abc"] == [True, False, True]
    kept.put("d", "w" * 30)
    assert kept.get("d") is None
    assert (kept.n_bytes, kept.remove("a"), kept.remove("a")) == (14, True, False)
    assert kept.n_bytes == 7


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"background": True}, "background", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"truncation": "auto"}, "truncation", "too long is refused"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "expected 'function'"),
        ({"tools": [{"name": "f"}]}, "tools[0].type", "missing"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type", "expected 'function'"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"max_tool_calls": 1}, "max_tool_calls", "not supported"),
        ({"include": ["file_search_call.results"]}, "include", "file_search_call"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "not supported"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "expected 'none'"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "expected 'text'"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "missing"),
        ({"messages": []}, "messages", "not known"),
        ({"input": None}, "input", "missing"),
        ({"input": 3}, "input", "string"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "item_reference"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "function_call_output"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "text alone",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments", "missing"),
        (
            {"input": [{"type": "reasoning", "encrypted_content": "x"}]},
            "input[0].encrypted_content",
            "cannot be",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
        ({"max_output_tokens": "9"}, "max_output_tokens", "must be an int"),
        ({"top_logprobs": 50}, "top_logprobs", "0 to 20"),
    ],
)
def test_what_is_refused_by_name(running: Running, body: dict[str, Any], param: str, message: str) -> None:
    answer = httpx.post(running.url + "/v1/responses", json={"input": "Once", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
