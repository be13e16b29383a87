"""Ollama's dialect with Ollama's own client: chat, generate, tools, models, vectors, errors."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import pytest
from helpers_serve import Running, Says, serving, write_chat_model
from ollama._utils import convert_function_to_tool

import tinyllm
from tinyllm.server.ask import Fields, Refusal
from tinyllm.server.dialects.ollama.asked import keep_alive_of, message_of, typed

MESSAGES: list[Any] = [{"role": "user", "content": "Once upon a time"}]
OPTIONS: dict[str, Any] = {
    "num_predict": 16,
    "seed": 7,
    "temperature": 0.9,
    "top_k": 30,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.95,
    "repeat_penalty": 1.2,
    "repeat_last_n": 32,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "stop": ["Zebra"],
}
PARAMETERS: dict[str, Any] = {
    "max_tokens": 16,
    "seed": 7,
    "temperature": 0.9,
    "top_k": 30,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.95,
    "repetition_penalty": 1.2,
    "penalty_window": 32,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "stop": ["Zebra"],
}
WRITTEN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT = "<think>\nHm, hm.\n</think>\n\nWell."


def get_weather(city: str, days: int = 1) -> str:
    """The weather.

    Args:
      city: Which.
      days: How many.
    """
    return f"{city} {days}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("ollama") / "chat.gguf")


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
def client(running: Running) -> Iterator[ollama.Client]:
    with ollama.Client(host=running.url) as client:
        yield client


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[tinyllm.LLM]:
    with tinyllm.load(path, context=2048) as llm:
        yield llm


# --- chat and generate --------------------------------------------------------------------------------------


def test_a_chat_has_the_tokens_of_llm_chat(client: ollama.Client, llm: tinyllm.LLM, running: Running) -> None:
    turns: list[Any] = [
        {"role": "system", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": "Yes?", "thinking": "Hm."},
        {"role": "user", "content": "Go"},
    ]
    same = llm.chat(turns, **PARAMETERS)
    made = client.chat("chat", turns, options=OPTIONS)
    assert made.message.content == same.text
    assert (made.done, made.done_reason, made.model) == (True, "length", "chat")
    assert (made.prompt_eval_count, made.eval_count) == (len(same.prompt_tokens), 16)
    assert made.message.thinking is made.message.tool_calls is None
    durations = (made.load_duration, made.prompt_eval_duration, made.eval_duration)
    assert all(isinstance(n, int) and n >= 0 for n in durations)
    assert sum(n or 0 for n in durations) <= (made.total_duration or 0)
    assert made.created_at is not None
    at = datetime.fromisoformat(made.created_at.replace("Z", "+00:00"))
    assert abs(at - datetime.now(timezone.utc)) < timedelta(minutes=5)

    chunks = list(client.chat("chat", turns, options=OPTIONS, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == same.text
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) > 10
    last = chunks[-1]
    assert (last.done_reason, last.eval_count) == ("length", 16)

    body = {"model": "chat", "messages": turns, "options": OPTIONS}  # a stream is what it gives unasked
    answer = httpx.post(f"{running.url}/api/chat", json={**body, "replay": True})
    assert answer.headers["content-type"] == "application/x-ndjson"
    end = json.loads(answer.text.splitlines()[-1])
    assert (end["seed"], end["timings"]["generated_tokens"]) == (7, 16)
    assert end["replay"][0]["tokens"] == same.tokens


def test_generate(client: ollama.Client, llm: tinyllm.LLM) -> None:
    """After the template of a chat model; raw, and of a model without one, as it is."""
    ask: dict[str, Any] = {"options": OPTIONS}
    made = client.generate("chat", "Hello", system="Be brief.", **ask)
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert made.response == llm.chat(conversation, **PARAMETERS).text
    assert made.context is None
    text = "Once upon a time</s>"
    raw = client.generate("chat", text, raw=True, **ask)
    same = llm(text, special=True, **PARAMETERS)
    assert (raw.response, raw.prompt_eval_count) == (same.text, len(same.prompt_tokens))
    plain = client.generate("plain", text, **ask)
    same = llm(text, **PARAMETERS)
    assert (plain.response, plain.prompt_eval_count) == (same.text, len(same.prompt_tokens))
    chunks = list(client.generate("plain", text, stream=True, **ask))
    assert "".join(chunk.response or "" for chunk in chunks) == same.text
    assert chunks[-1].eval_count == 16


def test_how_an_answer_ends(client: ollama.Client, says: Says) -> None:
    says.text = "One. Two. Three."
    made = client.chat("chat", MESSAGES, options={"num_predict": -1})
    assert (made.message.content, made.done_reason) == ("One. Two. Three.", "stop")
    made = client.chat("chat", MESSAGES, options={"stop": "Three", "num_predict": 100})
    assert (made.message.content, made.done_reason) == ("One. Two. ", "stop")


def test_log_probabilities(client: ollama.Client, llm: tinyllm.LLM) -> None:
    same = llm.chat(MESSAGES, **PARAMETERS, top_logprobs=2)
    ask: dict[str, Any] = {"options": OPTIONS, "logprobs": True, "top_logprobs": 2}
    made = client.chat("chat", MESSAGES, **ask)
    streamed = [t for c in client.chat("chat", MESSAGES, stream=True, **ask) for t in c.logprobs or ()]
    for found in (made.logprobs or (), streamed):
        assert [t.logprob for t in found] == same.logprobs
        assert [[t.logprob for t in one.top_logprobs or ()] for one in found] == [
            [value for _, value in top] for top in same.top_logprobs or ()
        ]
    assert "".join(t.token for t in streamed).strip() == same.text.strip()


def test_the_client_for_tasks(running: Running, client: ollama.Client) -> None:
    whole = client.chat("chat", MESSAGES, options=OPTIONS)

    async def work() -> None:
        async with ollama.AsyncClient(host=running.url) as many:
            made = await asyncio.gather(*(many.chat("chat", MESSAGES, options=OPTIONS) for _ in range(3)))
            assert all(one.message == whole.message for one in made)
            stream = await many.chat("chat", MESSAGES, options=OPTIONS, stream=True)
            assert "".join([chunk.message.content or "" async for chunk in stream]) == whole.message.content

    asyncio.run(work())


def test_a_client_that_goes_frees_its_text(client: ollama.Client, running: Running) -> None:
    form = {"type": "string", "minLength": 100000}
    body = {"model": "plain", "prompt": "Once", "format": form, "options": {"num_predict": -1}}
    with httpx.stream("POST", f"{running.url}/api/generate", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert running.server.turns.running == 1
    running.wait_until_idle()


# --- forms, thinking, tools ---------------------------------------------------------------------------------


def test_an_answer_of_a_form(client: ollama.Client, llm: tinyllm.LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    options = {"num_predict": 200, "seed": 1}
    closed = {**schema, "additionalProperties": False}
    made = client.chat("chat", MESSAGES, format=closed, options=options)
    assert isinstance(json.loads(made.message.content or "")["a"], int)
    text = client.generate("plain", "JSON:", format="json", options=OPTIONS).response
    assert text == llm("JSON:", json_schema=True, **PARAMETERS).text


def test_thinking(client: ollama.Client, says: Says, llm: tinyllm.LLM) -> None:
    says.text = THOUGHT
    for think in (None, True, "low"):
        made = client.chat("chat", MESSAGES, think=think)  # type: ignore[call-overload]
        assert (made.message.thinking, made.message.content) == ("Hm, hm.", "Well.")
    chunks = list(client.chat("chat", MESSAGES, think=True, stream=True))
    assert "".join(c.message.thinking or "" for c in chunks) == "Hm, hm."
    assert "".join(c.message.content or "" for c in chunks) == "Well."
    made = client.chat("chat", MESSAGES, think=False)
    assert (made.message.thinking, made.message.content) == (None, "Well.")
    assert made.prompt_eval_count == len(llm.chat_ids(MESSAGES, template_args={"enable_thinking": False}))
    assert client.generate("chat", "Hi", think=True).thinking == "Hm, hm."
    with pytest.raises(ollama.ResponseError, match="plain does not support thinking"):
        client.generate("plain", "Hi", think=True)


def tool_of(function: Callable[..., Any]) -> dict[str, Any]:
    """What the client makes of a function."""
    made: dict[str, Any] = convert_function_to_tool(function).model_dump(exclude_none=True)
    return made


def test_calls_of_a_python_function(
    client: ollama.Client, running: Running, says: Says, llm: tinyllm.LLM
) -> None:
    says.text = f"Let me see.\n{WRITTEN}\n{WRITTEN.replace('Paris', 'Rome')}"
    made = client.chat("chat", MESSAGES, tools=[get_weather])
    assert made.message.content == "Let me see."
    calls = made.message.tool_calls or []
    assert [get_weather(**call.function.arguments) for call in calls] == ["Paris 1", "Rome 1"]
    chunks = list(client.chat("chat", MESSAGES, tools=[get_weather], stream=True))
    assert [call for chunk in chunks for call in chunk.message.tool_calls or []] == calls
    assert "".join(chunk.message.content or "" for chunk in chunks) == "Let me see."
    assert chunks[-1].done_reason == "stop"

    # The client drops the ids, and its results have none: they are told by name and order.
    results = [
        {"role": "tool", "tool_name": "get_weather", "content": get_weather(**call.function.arguments)}
        for call in calls
    ]
    says.text = "Well."
    answer = client.chat("chat", [*MESSAGES, made.message, *results], tools=[get_weather])
    assert answer.message.content == "Well."
    body: dict[str, Any] = {"model": "chat", "stream": False, "replay": True, "tools": [tool_of(get_weather)]}
    body["messages"] = [*MESSAGES, made.message.model_dump(exclude_none=True), *results]
    replay = httpx.post(f"{running.url}/api/chat", json=body).json()["replay"]
    assert replay[0]["conversation"]["messages"][2]["name"] == "get_weather"
    as_openai = [
        {"id": id, "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
        for id, city in (("call_0", "Paris"), ("call_1", "Rome"))
    ]
    same = llm.chat_ids(
        [
            *MESSAGES,
            {"role": "assistant", "content": "Let me see.", "tool_calls": as_openai},
            {"role": "tool", "tool_call_id": "call_0", "name": "get_weather", "content": "Paris 1"},
            {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "Rome 1"},
        ],
        tools=[tool_of(get_weather)],
    )
    assert answer.prompt_eval_count == len(same)


def test_results_are_matched_with_calls(llm: tinyllm.LLM) -> None:
    """As a template that writes ids shows; an id that is given counts."""
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}<tool_call>{{ c.id }}={{ c.function.name }}"
        "{{ c.function.arguments }};{% endfor %}{% if m.role == 'tool' %}"
        "{{ m.tool_call_id }}:{{ m.content }};{% endif %}{% endfor %}"
    )
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in ("f", "g", "f")]
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": "", "tool_calls": calls}]
    results: list[dict[str, Any]] = [
        {"role": "tool", "name": "g", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "name": "f", "content": "3"},
        {"role": "tool", "content": "4"},
    ]
    assert llm.tokenizer is not None

    def shown(results: list[dict[str, Any]]) -> list[str]:
        ids = llm.chat_ids([*messages, *results], chat_template=source)
        assert llm.tokenizer is not None
        text = llm.tokenizer.decode(ids)
        return [part for part in text.split(";") if "=" not in part and part]

    assert shown(results) == ["call_1:1", "call_0:2", "call_2:3", ":4"]
    given = [{**results[0], "tool_call_id": "call_2"}, *results[1:3]]
    assert shown(given) == ["call_2:1", "call_0:2", ":3"]


def test_types_that_the_client_writes_in_one() -> None:
    def f(x: int | str) -> None:
        """Does f."""

    made = tool_of(f)
    kind = made["function"]["parameters"]["properties"]["x"]["type"]
    assert sorted(kind.split(", ")) == ["integer", "string"]  # which is no JSON schema
    schema = typed(made)["function"]["parameters"]["properties"]["x"]
    assert sorted(schema["type"]) == ["integer", "string"]


def test_messages_member_by_member() -> None:
    call = {"id": "i", "type": "function", "function": {"index": 0, "name": "f", "arguments": {"a": 1}}}
    given = {"role": "assistant", "thinking": "Hm.", "tool_calls": [call]}
    assert message_of(Fields(given)) == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "i", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }
    result = {"role": "tool", "content": "x", "tool_name": "f", "tool_call_id": "i", "images": []}
    assert message_of(Fields(result)) == {"role": "tool", "content": "x", "name": "f", "tool_call_id": "i"}


# --- models -------------------------------------------------------------------------------------------------


def test_models(client: ollama.Client, running: Running, path: Path) -> None:
    listed = {m.model: m for m in client.list().models}
    assert list(listed) == ["chat:latest", "plain:latest"]
    one = listed["chat:latest"]
    assert one.size == path.stat().st_size
    assert one.details is not None
    assert (one.details.format, one.details.family, one.details.quantization_level) == (
        "gguf",
        "llama",
        "Q8_0",
    )
    assert one.details.parameter_size == "3.7M"
    assert len(one.digest or "") == 64
    assert one.digest != listed["plain:latest"].digest

    shown = client.show("chat:latest")
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["general.parameter_count"] == 3_672_320
    assert (shown.modelinfo["llama.context_length"], shown.modelinfo["llama.block_count"]) == (512, 4)
    assert "im_start" in (shown.template or "")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert "temperature" in (shown.parameters or "")
    assert client.show("plain").capabilities == ["completion"]
    everything = json.dumps([m.model_dump(mode="json") for m in (*listed.values(), shown)])
    assert str(path.parent) not in everything
    with pytest.raises(ollama.ResponseError, match="there is no model 'llama3'") as caught:
        client.show("llama3")
    assert caught.value.status_code == 404

    assert httpx.get(f"{running.url}/api/version").json() == {"version": "0.13.4"}  # Codex needs it
    assert httpx.head(f"{running.url}/").status_code == 200


def test_models_are_loaded_and_unloaded(path: Path) -> None:
    with serving({"chat": path, "plain": "stories"}) as running, ollama.Client(host=running.url) as client:
        assert client.ps().models == []
        made = client.generate("chat", "")
        assert (made.response, made.done, made.done_reason) == ("", True, "load")
        (loaded,) = client.ps().models
        assert (loaded.name, loaded.context_length) == ("chat:latest", 512)
        assert loaded.expires_at is not None
        assert loaded.expires_at.year == 9999
        assert client.chat("plain", [], keep_alive="1h30m").done_reason == "load"
        plain = client.ps().models[1]
        assert plain.expires_at is not None
        left = plain.expires_at - datetime.now(timezone.utc)
        assert timedelta(minutes=89) < left <= timedelta(minutes=90)
        assert client.chat("plain", [], keep_alive=0).done_reason == "unload"
        assert [m.name for m in client.ps().models] == ["chat:latest"]
        client.generate("chat", "Hi", keep_alive=0.1, options={"num_predict": 2})
        for _ in range(500):
            if not client.ps().models:
                break
            time.sleep(0.02)
        assert client.ps().models == []
        client.generate("chat", "Hi", options={"num_predict": 2})  # the server's own time again
        assert running.server.models.served["chat"].keep_alive_s == math.inf


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (5, 5.0),
        (0, 0.0),
        (1.5, 1.5),
        (-1, math.inf),
        ("-1", math.inf),
        ("-1m", math.inf),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("300ms", 0.3),
        ("1.5h", 5400.0),
        ("0", 0.0),
        (10**400, math.inf),
        (None, None),
    ],
)
def test_how_long_a_model_is_kept(given: Any, seconds: float | None) -> None:
    kept = keep_alive_of(Fields({"keep_alive": given}))
    assert kept == (seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("given", ["5 minutes", "", "m", "5x", True, [5], {}])
def test_no_time_at_all(given: Any) -> None:
    with pytest.raises(Refusal, match="keep_alive is"):
        keep_alive_of(Fields({"keep_alive": given}))


# --- vectors ------------------------------------------------------------------------------------------------


def test_vectors(client: ollama.Client, llm: tinyllm.LLM) -> None:
    texts = ["A cat sat.", "A dog ran."]
    same = llm.embed(texts, normalize=True)
    made = client.embed("plain", texts)
    np.testing.assert_allclose(np.array(made.embeddings, np.float32), same, atol=1e-6)
    assert llm.tokenizer is not None
    assert made.prompt_eval_count == sum(len(llm.tokenizer.encode(text)) for text in texts)
    (one,) = client.embed("plain", texts[0], dimensions=5).embeddings
    np.testing.assert_allclose(one, same[0][:5] / np.linalg.norm(same[0][:5]), atol=1e-6)
    older = client.embeddings("plain", texts[0]).embedding
    np.testing.assert_array_equal(np.array(older, np.float32), llm.embed(texts[0]))
    long = "a " * 3000
    with pytest.raises(ollama.ResponseError, match="do not fit into the context"):
        client.embed("plain", long)
    (cut,) = client.embed("plain", long, truncate=True).embeddings
    want = llm.embed(llm.tokenizer.encode(long)[:2048], normalize=True)
    np.testing.assert_allclose(np.array(cut, np.float32), want, atol=1e-6)
    with pytest.raises(ollama.ResponseError, match="dimensions is 0, expected 1 to 256"):
        client.embed("plain", texts, dimensions=0)


# --- errors -------------------------------------------------------------------------------------------------

CHAT: dict[str, Any] = {"model": "chat", "messages": MESSAGES}
GENERATE: dict[str, Any] = {"model": "plain", "prompt": "Once"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"messages": MESSAGES}, "model is missing"),
    ("chat", {**CHAT, "colour": "red"}, "colour is not known here"),
    ("chat", {**CHAT, "options": {"colour": "red"}}, "options.colour is not known here"),
    ("chat", {**CHAT, "options": {"temperature": -1}}, "options.temperature is -1"),
    ("chat", {**CHAT, "options": {"num_predict": "x"}}, "options.num_predict must be"),
    ("chat", {**CHAT, "options": {"num_predict": -7}}, "options.num_predict is -7"),
    ("chat", {**CHAT, "options": {"mirostat": 2}}, "options.mirostat is not supported"),
    ("chat", {**CHAT, "options": {"tfs_z": 0.5}}, "options.tfs_z is not supported"),
    ("chat", {**CHAT, "options": {"num_ctx": 4096}}, "num_ctx is 4096, the model is loaded with 2048"),
    ("chat", {**CHAT, "options": []}, "options must be an object"),
    ("chat", {**CHAT, "format": "xml"}, 'format must be "json"'),
    ("chat", {**CHAT, "format": {"not": {}}}, "json_schema cannot be enforced"),
    ("chat", {**CHAT, "think": "much"}, "think must be true, false"),
    ("chat", {**CHAT, "top_logprobs": 2}, "top_logprobs needs logprobs"),
    ("chat", {**CHAT, "messages": [{"role": "user", "content": "x", "images": ["aa"]}]}, "images are not"),
    ("chat", {**CHAT, "messages": [{"role": "cat", "content": "x"}]}, r"messages[0].role is 'cat'"),
    ("chat", {**CHAT, "messages": [{"content": "x"}]}, "messages[0].role is missing"),
    ("chat", {**CHAT, "messages": [{"role": "user", "content": []}]}, "content must be a string"),
    (
        "chat",
        {**CHAT, "messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
        "messages[0].tool_calls[0].function.name is missing",
    ),
    ("chat", {**CHAT, "tools": ["f"]}, "tools[0] must be an object"),
    ("chat", {**CHAT, "model": "plain"}, "plain has no chat template"),
    ("generate", {**GENERATE, "suffix": "x"}, "suffix is not supported"),
    ("generate", {**GENERATE, "images": ["aa"]}, "images are not supported"),
    ("generate", {**GENERATE, "context": [1, 2]}, "context is not supported"),
    ("generate", {**GENERATE, "template": "x"}, "--allow-templates"),
    ("generate", {**GENERATE, "system": "x"}, "system needs a chat template"),
    ("generate", {**GENERATE, "system": "x", "raw": True}, "raw does not go with system"),
    ("generate", {**GENERATE, "prompt": ["x"]}, "prompt must be a string"),
    ("generate", {**GENERATE, "width": 5}, "width is not known here"),
    ("generate", {**GENERATE, "keep_alive": "soon"}, "keep_alive is 'soon'"),
    ("embed", {"model": "plain"}, "input is missing"),
    ("embed", {"model": "plain", "input": [1]}, "input must be a string or"),
    ("embeddings", {"model": "plain", "prompt": "x", "colour": 1}, "colour is not known here"),
    ("show", {"model": "plain", "system": "x"}, "system is not known here"),
]


@pytest.mark.parametrize(("endpoint", "body", "message"), REFUSED)
def test_what_is_refused(running: Running, endpoint: str, body: dict[str, Any], message: str) -> None:
    answer = httpx.post(f"{running.url}/api/{endpoint}", json=body)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]


def test_errors_are_the_clients(client: ollama.Client, running: Running) -> None:
    with pytest.raises(ollama.ResponseError, match="there is no model 'llama3' here") as caught:
        client.chat("llama3", MESSAGES)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="colour is not known"):
        list(client.chat("chat", MESSAGES, options={"colour": 1}, stream=True))
    for refused in (
        lambda: client.pull("llama3"),
        lambda: list(client.push("llama3", stream=True)),
        lambda: client.create("mine", from_="chat"),
        lambda: client.copy("chat", "mine"),
        lambda: client.delete("chat"),
    ):
        with pytest.raises(ollama.ResponseError, match="those of the server's command line") as caught:
            refused()
        assert caught.value.status_code == 501
    bad = httpx.post(f"{running.url}/api/chat", content=b"[")
    assert (bad.status_code, list(bad.json())) == (400, ["error"])


def test_what_is_harmless(client: ollama.Client) -> None:
    more: dict[str, Any] = {
        "num_thread": 3,
        "num_gpu": 99,
        "num_batch": 64,
        "use_mmap": True,
        "numa": False,
        "num_keep": 4,
        "mirostat": 0,
        "penalize_newline": True,
        "num_ctx": 2048,
        "tfs_z": 1.0,
    }
    plain = client.chat("chat", MESSAGES, options=OPTIONS)
    made = client.chat("chat", MESSAGES, options={**OPTIONS, **more}, keep_alive="5m", format="")
    assert made.message == plain.message


def test_templates_of_requests_where_they_are_allowed(path: Path) -> None:
    with serving({"chat": path}, allows_templates=True) as running:
        with ollama.Client(host=running.url) as client:
            made = client.generate("chat", "Hi", template="A {{ messages[0].content }}", options=OPTIONS)
        with tinyllm.load(path) as llm:
            same = llm.chat(
                [{"role": "user", "content": "Hi"}], chat_template="A {{ messages[0].content }}", **PARAMETERS
            )
    assert (made.response, made.prompt_eval_count) == (same.text, len(same.prompt_tokens))


def test_an_error_within_a_stream(path: Path) -> None:
    model = Says()
    with serving({"plain": "stories"}, model) as running, ollama.Client(host=running.url) as client:
        form = {"type": "string", "minLength": 100000}
        stream = client.generate("plain", "Once", format=form, stream=True)
        next(stream)
        model.loaded[0].close()
        with pytest.raises(ollama.ResponseError, match="the server is ending"):
            list(stream)
