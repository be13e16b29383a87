"""OpenAI's dialect with OpenAI's own client: chat, completions, embeddings, models, replay, what frees the
model. /v1/responses and the refusals have files of their own."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pydantic
import pytest
from helpers_cli import in_process
from helpers_embed import PAIRS, QUERY, write_reranker
from helpers_serve import Running, Says, serving, write_chat_model

import tinyllm
from tinyllm.cli.run import main

MESSAGES: list[Any] = [{"role": "user", "content": "Once upon a time"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
WRITTEN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
MALFORMED = WRITTEN.replace('"}}', '"}')


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("serve") / "chat.gguf")


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


@pytest.fixture
def client(running: Running, model: Says) -> Iterator[openai.OpenAI]:
    assert model.text is None
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[tinyllm.LLM]:
    with tinyllm.load(path, context=2048) as llm:
        yield llm


def post(running: Running, path: str, **body: Any) -> Any:
    answer = httpx.post(running.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def extra(value: Any, name: str) -> Any:
    """A member of ours, which the client's types do not have."""
    return (value.model_extra or {}).get(name)


# --- models -------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["chat", "plain"]
    assert client.models.retrieve("plain").id == "plain"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="only chat, plain") as caught:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# --- chat ---------------------------------------------------------------------------------------------------


def test_a_chat_has_the_tokens_of_llm_chat(client: openai.OpenAI, llm: tinyllm.LLM) -> None:
    wishes: dict[str, Any] = {"temperature": 0.9, "max_tokens": 16, "seed": 7}
    same = llm.chat(MESSAGES, **wishes, n=3, logprobs=True, top_logprobs=2)
    assert llm.tokenizer is not None
    made = client.chat.completions.create(
        model="chat", messages=MESSAGES, n=3, logprobs=True, top_logprobs=2, **wishes
    )
    assert [c.message.content for c in made.choices] == [c.text for c in same]
    assert [c.finish_reason for c in made.choices] == ["length"] * 3
    assert made.usage is not None
    n = len(same[0].prompt_tokens)
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (n, 48)
    assert extra(made, "seed") == 7
    assert extra(made, "timings")["generated_tokens"] == 48
    for choice, one in zip(made.choices, same, strict=True):
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        assert [t.logprob for t in tokens] == one.logprobs
        assert [bytes(t.bytes or []) for t in tokens] == [llm.tokenizer.token_bytes(t) for t in one.tokens]
        assert one.top_logprobs is not None
        assert [[t.logprob for t in token.top_logprobs] for token in tokens] == [
            [value for _, value in top] for top in one.top_logprobs
        ]


def test_a_stream_says_what_a_whole_answer_does(client: openai.OpenAI) -> None:
    wishes: dict[str, Any] = {"temperature": 0.9, "max_tokens": 16, "seed": 7, "n": 2}
    wishes |= {"model": "chat", "messages": MESSAGES, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**wishes)
    chunks = list(
        client.chat.completions.create(**wishes, stream=True, stream_options={"include_usage": True})
    )
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant"] * 2
    for i, choice in enumerate(whole.choices):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == i]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        tokens = [t for c in mine if c.logprobs for t in c.logprobs.content or []]
        assert choice.logprobs is not None
        assert tokens == choice.logprobs.content
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["length"]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [extra(c, "seed") for c in chunks if extra(c, "seed") is not None] == [7]
    assert len({c.id for c in chunks}) == 1


def test_stop_bias_and_our_own_parameters(client: openai.OpenAI, llm: tinyllm.LLM) -> None:
    made = client.chat.completions.create(
        model="chat", messages=MESSAGES, temperature=0, max_tokens=30, stop=[","]
    )
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].message.content == llm.chat(MESSAGES, temperature=0, stop=",").text
    first = llm.chat(MESSAGES, temperature=0, max_tokens=1).tokens[0]
    made = client.chat.completions.create(
        model="chat", messages=MESSAGES, logit_bias={str(first): -100}, **GREEDY
    )
    assert made.choices[0].message.content == llm.chat(MESSAGES, logit_bias={first: -100}, **GREEDY).text
    ours: dict[str, Any] = {"top_k": 3, "repetition_penalty": 1.3, "seed": 3, "min_p": 0.0}
    made = client.chat.completions.create(
        model="chat", messages=MESSAGES, max_completion_tokens=9, extra_body=ours
    )
    assert made.choices[0].message.content == llm.chat(MESSAGES, max_tokens=9, **ours).text


def test_roles_and_parts(client: openai.OpenAI, llm: tinyllm.LLM) -> None:
    parts = [{"type": "text", "text": "Once upon"}, {"type": "text", "text": " a time"}]
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Tom"},
        {"role": "assistant", "content": "Yes.", "refusal": None, "annotations": []},
        {"role": "user", "content": "And?"},
    ]
    made = client.chat.completions.create(model="chat", messages=messages, **GREEDY)
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Once upon a time"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And?"},
    ]
    assert made.choices[0].message.content == llm.chat(plain, **GREEDY).text
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(openai.BadRequestError, match=r"image_url.*reads text alone") as caught:
        client.chat.completions.create(model="chat", messages=[{"role": "user", "content": [image]}])  # type: ignore[list-item]
    assert caught.value.param == "messages[0].content[0].type"


def test_reasoning(client: openai.OpenAI, says: Says) -> None:
    says.text = "<think>\nThey want a story.\n</think>\n\nOnce."
    made = client.chat.completions.create(model="chat", messages=MESSAGES).choices[0].message
    assert (made.content, extra(made, "reasoning_content")) == ("Once.", "They want a story.")
    deltas = [
        c.choices[0].delta
        for c in client.chat.completions.create(model="chat", messages=MESSAGES, stream=True)
    ]
    assert "".join(d.content or "" for d in deltas) == "Once."
    assert "".join(extra(d, "reasoning_content") or "" for d in deltas) == "They want a story."


def test_reasoning_effort_is_the_templates(client: openai.OpenAI, llm: tinyllm.LLM, running: Running) -> None:
    off = llm.chat(MESSAGES, template_args={"enable_thinking": False}, **GREEDY)
    made = client.chat.completions.create(model="chat", messages=MESSAGES, reasoning_effort="none", **GREEDY)
    assert made.choices[0].message.content == off.text != llm.chat(MESSAGES, **GREEDY).text
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    made = client.chat.completions.create(model="chat", messages=MESSAGES, extra_body=kwargs, **GREEDY)
    assert made.choices[0].message.content == off.text
    for unread in ({"messages": []}, {"depth": 3}):
        with pytest.raises(
            openai.BadRequestError, match=r"does not read the variable.*reads enable_thinking"
        ):
            client.chat.completions.create(
                model="chat", messages=MESSAGES, extra_body={"chat_template_kwargs": unread}
            )


# --- tools --------------------------------------------------------------------------------------------------


def test_calls_and_their_way_back(client: openai.OpenAI, says: Says, llm: tinyllm.LLM) -> None:
    says.text = f"Let me look.\n{WRITTEN}"
    made = client.chat.completions.create(model="chat", messages=MESSAGES, tools=TOOLS).choices[0]
    assert made.finish_reason == "tool_calls"
    assert made.message.content == "Let me look."
    assert made.message.tool_calls is not None
    (call,) = made.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    says.text = None
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    messages = [*MESSAGES, made.message.to_dict(), result]
    again = client.chat.completions.create(model="chat", messages=messages, tools=TOOLS, **GREEDY)
    assert again.choices[0].message.content == llm.chat(messages, tools=TOOLS, **GREEDY).text
    assert again.usage is not None
    assert again.usage.prompt_tokens > 200  # the tools and the call are in it


def test_a_streamed_call_brings_its_name_first(client: openai.OpenAI, says: Says) -> None:
    says.text = WRITTEN
    chunks = client.chat.completions.create(model="chat", messages=MESSAGES, tools=TOOLS, stream=True)
    choices = [c.choices[0] for c in chunks]
    first, *rest = [call for c in choices for call in c.delta.tool_calls or []]
    assert (first.index, first.id, first.type) == (0, "call_0", "function")
    assert first.function is not None
    assert first.function.name == "get_weather"
    assert len(rest) > 5
    assert all(call.function and not call.function.name and call.id is None for call in rest)
    arguments = "".join(call.function.arguments or "" for call in [first, *rest] if call.function)
    assert json.loads(arguments) == {"city": "Paris"}
    assert choices[-1].finish_reason == "tool_calls"
    with client.chat.completions.stream(model="chat", messages=MESSAGES, tools=TOOLS) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}


def test_a_malformed_call_is_text(client: openai.OpenAI, says: Says) -> None:
    says.text = MALFORMED
    whole = client.chat.completions.create(model="chat", messages=MESSAGES, tools=TOOLS).choices[0]
    assert (whole.finish_reason, whole.message.tool_calls) == ("stop", None)
    assert whole.message.content == MALFORMED
    chunks = client.chat.completions.create(model="chat", messages=MESSAGES, tools=TOOLS, stream=True)
    choices = [c.choices[0] for c in chunks]
    assert any(c.delta.tool_calls for c in choices)  # it looked like one
    assert [extra(c.delta, "retracted_tool_call") for c in choices].count(0) == 1
    assert "".join(c.delta.content or "" for c in choices) == MALFORMED
    assert choices[-1].finish_reason == "stop"


def test_one_call_at_most(client: openai.OpenAI, says: Says) -> None:
    says.text = WRITTEN + "\n" + WRITTEN.replace("Paris", "Rome")
    wishes: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "tools": TOOLS}
    for parallel, n in ((True, 2), (False, 1)):
        made = client.chat.completions.create(**wishes, parallel_tool_calls=parallel).choices[0]
        assert len(made.message.tool_calls or []) == n
        chunks = client.chat.completions.create(**wishes, parallel_tool_calls=parallel, stream=True)
        calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        assert {call.index for call in calls} == set(range(n))


def test_forced_calls(client: openai.OpenAI) -> None:
    wishes: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "max_tokens": 150, "seed": 1}
    strict = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "get_weather"}}]
    for choice in choices:
        made = client.chat.completions.create(**wishes, tools=strict, tool_choice=choice).choices[0]
        assert made.message.tool_calls is not None
        arguments = json.loads(made.message.tool_calls[0].function.arguments)  # type: ignore[union-attr]
        assert isinstance(arguments["city"], str)
    made = client.chat.completions.create(**wishes, tools=TOOLS, tool_choice="none").choices[0]
    assert made.message.tool_calls is None
    for wrong, word in (
        ("sometimes", "tool_choice"),
        ({"type": "function", "function": {"name": "f"}}, "'f'"),
    ):
        with pytest.raises(openai.BadRequestError, match=word):
            client.chat.completions.create(**wishes, tools=TOOLS, tool_choice=wrong)


# --- forms --------------------------------------------------------------------------------------------------


class Pet(pydantic.BaseModel):
    name: str
    legs: int


def test_forms(client: openai.OpenAI) -> None:
    wishes: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "seed": 1, "max_tokens": 200}
    parsed = client.chat.completions.parse(**wishes, response_format=Pet).choices[0].message.parsed
    assert isinstance(parsed, Pet)
    made = client.chat.completions.create(
        **{**wishes, "stop": None}, response_format={"type": "json_object"}, logit_bias={}
    )
    text = made.choices[0].message.content or ""
    assert text.startswith("{")
    made = client.chat.completions.create(**wishes, extra_body={"choices": ["yes", "no"]})
    assert made.choices[0].message.content in ("yes", "no")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}, "strict": False}}
    with pytest.raises(openai.BadRequestError, match="json_schema cannot be enforced"):
        client.chat.completions.create(**wishes, response_format=schema)
    with pytest.raises(openai.BadRequestError, match="tools and json_schema cannot be used together"):
        client.chat.completions.create(**wishes, tools=TOOLS, response_format={"type": "json_object"})


# --- completions --------------------------------------------------------------------------------------------


def test_several_prompts_are_numbered_as_openai_does(client: openai.OpenAI, llm: tinyllm.LLM) -> None:
    prompts = ["Once upon", "The dog", "Tom and", "A cat", "Lily"]  # more than are computed at once
    wishes: dict[str, Any] = {"max_tokens": 6, "seed": 5, "temperature": 0.9}
    same = [c.text for group in llm(prompts, n=2, **wishes) for c in group]
    made = client.completions.create(model="plain", prompt=prompts, n=2, **wishes)
    assert [c.index for c in made.choices] == list(range(10))
    assert [c.text for c in made.choices] == same
    assert made.usage is not None
    assert made.usage.prompt_tokens == sum(len(llm(p, max_tokens=1).prompt_tokens) for p in prompts)
    texts = [""] * 10
    reasons: list[Any] = [None] * 10
    for chunk in client.completions.create(model="plain", prompt=prompts, n=2, stream=True, **wishes):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert (texts, reasons) == (same, ["length"] * 10)


def test_prompts_of_ids(client: openai.OpenAI, llm: tinyllm.LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("Once upon")
    wishes: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    text = llm("Once upon", **wishes).text
    for prompt in (ids, [ids], [ids, ids]):
        made = client.completions.create(model="plain", prompt=prompt, **wishes)
        assert {c.text for c in made.choices} == {text}


def test_log_probabilities_of_old_and_echo(client: openai.OpenAI, llm: tinyllm.LLM) -> None:
    wishes: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    made = client.completions.create(model="plain", prompt="Once upon", logprobs=2, echo=True, **wishes)
    same = llm("Once upon", logprobs=True, top_logprobs=2, **wishes)
    score = llm.score(same.prompt_tokens + same.tokens, top_logprobs=2)
    (choice,) = made.choices
    assert choice.text == "Once upon" + same.text
    old = choice.logprobs
    assert old is not None
    assert old.tokens is not None
    assert old.token_logprobs is not None
    assert old.token_logprobs[0] is None
    assert old.token_logprobs[1:] == pytest.approx(score.logprobs, abs=1e-4)
    assert old.token_logprobs[-8:] == same.logprobs
    assert old.text_offset is not None
    for token, start, end in zip(old.tokens[2:], old.text_offset[2:], old.text_offset[3:], strict=False):
        assert choice.text[start:end] == token
    assert old.top_logprobs is not None
    for token, value, top in zip(old.tokens[1:], old.token_logprobs[1:], old.top_logprobs[1:], strict=True):
        assert top[token] == value
        assert len(top) in (2, 3)
    chunks = client.completions.create(
        model="plain", prompt="Once upon", logprobs=2, echo=True, stream=True, **wishes
    )
    choices = [c.choices[0] for c in chunks]
    assert "".join(c.text for c in choices) == choice.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [one for c in choices if c.logprobs for one in getattr(c.logprobs, name)]
        assert streamed == getattr(old, name)
    scored = client.completions.create(model="plain", prompt="Once upon", logprobs=0, echo=True, max_tokens=0)
    (choice,) = scored.choices
    assert choice.text == "Once upon"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == old.token_logprobs[:3]
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0


def test_best_of(client: openai.OpenAI, llm: tinyllm.LLM) -> None:
    made = client.completions.create(model="plain", prompt="Once", best_of=4, n=2, max_tokens=5, seed=1)
    same = llm("Once", n=4, max_tokens=5, seed=1, logprobs=True)
    same.sort(key=lambda c: -sum(c.logprobs or []) / len(c.tokens))
    assert [c.text for c in made.choices] == [c.text for c in same[:2]]
    assert made.usage is not None
    assert made.usage.completion_tokens == sum(len(c.tokens) for c in same)
    assert extra(made, "seed") == 1


# --- embeddings ---------------------------------------------------------------------------------------------


def test_embeddings(client: openai.OpenAI, running: Running, llm: tinyllm.LLM) -> None:
    assert llm.tokenizer is not None
    texts = ["A cat sat.", "A dog ran away."]
    same = llm.embed(texts)
    made = client.embeddings.create(model="plain", input=texts)  # asks for base64
    assert np.array_equal(np.array([d.embedding for d in made.data], np.float32), same)
    assert made.usage.prompt_tokens == sum(len(llm.tokenizer.encode(text)) for text in texts)
    floats = client.embeddings.create(model="plain", input=texts, encoding_format="float", dimensions=256)
    assert np.array_equal(np.array([d.embedding for d in floats.data], np.float32), same)
    raw = post(running, "/v1/embeddings", model="plain", input=texts[0], encoding_format="base64")
    assert np.array_equal(np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4"), same[0])
    ids = [llm.tokenizer.encode(text) for text in texts]
    by_ids = client.embeddings.create(model="plain", input=ids)
    assert np.array_equal(np.array([d.embedding for d in by_ids.data], np.float32), same)
    with pytest.raises(openai.BadRequestError, match="have 256 numbers") as caught:
        client.embeddings.create(model="plain", input=texts, dimensions=64)
    assert caught.value.param == "dimensions"


def test_a_reranker_says_why_not(running: Running, tmp_path: Path) -> None:
    answer = httpx.post(running.url + "/v1/rerank", json={"query": "a", "documents": ["b"], "model": "plain"})
    assert answer.status_code == 400
    assert "do not say that it is a reranker" in answer.json()["error"]["message"]
    path = write_chat_model(tmp_path / "rank.gguf", metadata={"llama.pooling_type": 4})
    with serving({"rank": path}) as ranks:
        for where, body in (
            ("/v1/rerank", {"query": "a", "documents": ["b"]}),
            ("/v1/embeddings", {"input": "a"}),
        ):
            answer = httpx.post(ranks.url + where, json=body)
            assert answer.status_code == 400
            assert "pooling_type 4, a reranker, without" in answer.json()["error"]["message"]


def test_a_reranker_scores(tmp_path: Path) -> None:
    path = write_reranker(tmp_path / "m", modules=False)
    with tinyllm.load(path, device="cpu", context=1024) as llm:
        scores = llm.rerank(QUERY, PAIRS)
    best = np.argsort(-scores, kind="stable")
    with serving({"rank": path}) as ranks:

        def ask(**more: Any) -> httpx.Response:
            return httpx.post(ranks.url + "/v1/rerank", json={"query": QUERY, "documents": PAIRS, **more})

        found = ask().json()
        assert [one["index"] for one in found["results"]] == best.tolist()
        assert [one["relevance_score"] for one in found["results"]] == pytest.approx(scores[best].tolist())
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 4 * 300
        [first] = ask(top_n=1, return_documents=True, documents=[{"text": text} for text in PAIRS]).json()[
            "results"
        ]
        assert first["document"] == {"text": PAIRS[best[0]]}
        for body, param in (
            ({"documents": []}, "documents"),
            ({"documents": ["a", 5]}, "documents"),
            ({"top_n": 0}, "top_n"),
            ({"rank_fields": ["a"]}, "rank_fields"),
        ):
            answer = ask(**body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


# --- replay -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chat", "calls", "forms", "completions", "responses"])
def test_a_served_answer_can_be_made_again(
    kind: str,
    running: Running,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    body: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "replay": True, "n": 2}
    where = "/v1/chat/completions"
    if kind == "chat":
        body |= {"max_tokens": 20, "logit_bias": {"300": 3}, "stop": ["\n"], "reasoning_effort": "none"}
    elif kind == "calls":
        body |= {"max_tokens": 80, "tools": TOOLS, "tool_choice": "required"}
    elif kind == "forms":
        body |= {"max_tokens": 80, "response_format": {"type": "json_object"}}
    elif kind == "completions":
        where = "/v1/completions"
        body = {"model": "chat", "prompt": ["Once", "The dog"], "max_tokens": 9, "replay": True}
    else:
        where = "/v1/responses"
        body = {"model": "chat", "input": "Once", "max_output_tokens": 9, "replay": True}
    made = post(running, where, **body, seed=1)
    assert len(made["replay"]) == (1 if kind == "responses" else 2)
    assert all(one["tokens"] for one in made["replay"])
    assert str(path) not in json.dumps(made)
    file = tmp_path / "answer.json"
    for indent in (None, 2):
        file.write_text(json.dumps(made, indent=indent))
        result = in_process(main, monkeypatch, capsys)(path, "--replay", file)
        assert (result.code, result.out.count("same: ")) == (0, len(made["replay"])), result
    made["replay"][-1]["tokens"][-1] += 1
    file.write_text(json.dumps(made))
    result = in_process(main, monkeypatch, capsys)(path, "--replay", file)
    assert result.code == 1
    assert "different: token" in result.out


def test_a_stream_ends_with_its_replay(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="chat", messages=MESSAGES, stream=True, **GREEDY, extra_body={"replay": True}
        )
    )
    (replay,) = [extra(c, "replay") for c in chunks if extra(c, "replay")]
    assert len(replay[0]["tokens"]) == 12


# --- errors amid a stream -----------------------------------------------------------------------------------


def test_an_error_amid_a_stream_is_told(path: Path) -> None:
    with (
        serving({"chat": path}, Says()) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client,
    ):
        long: dict[str, Any] = {"model": "chat", "extra_body": {"min_tokens": 1500}, "stream": True}
        chat = client.chat.completions.create(messages=MESSAGES, **long)
        texts = client.completions.create(prompt="Once", **long)
        response = client.responses.create(input="Once", **long)
        for stream in (chat, texts, response):
            for _ in zip(range(4), stream, strict=False):
                pass
        llm = running.server.models.served["chat"].llm
        assert llm is not None
        llm.close()
        for stream in (chat, texts):
            with pytest.raises(openai.APIError, match="the server is ending"):
                list(stream)
        last = list(response)[-1]
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert last.response.error.message == "the server is ending"
        running.wait_until_idle()


# --- what frees the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["chat", "completions", "responses"])
def test_leaving_a_stream_frees_the_model(where: str, client: openai.OpenAI, running: Running) -> None:
    long: dict[str, Any] = {"model": "chat", "extra_body": {"min_tokens": 1500}, "stream": True}
    stream: Any
    if where == "chat":
        stream = client.chat.completions.create(messages=MESSAGES, **long)
    elif where == "completions":
        stream = client.completions.create(prompt=["Once", "Tom"], **long)
    else:
        stream = client.responses.create(input="Once", **long)
    for _ in zip(range(5), stream, strict=False):
        pass
    assert running.server.turns.running > 0
    stream.close()
    check_idle(running)


def test_cancelling_a_call_frees_the_model(running: Running) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
            call = client.chat.completions.create(
                model="chat", messages=MESSAGES, extra_body={"min_tokens": 1500}
            )
            task = asyncio.create_task(call)
            while not running.server.turns.running:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            made = await client.chat.completions.create(model="chat", messages=MESSAGES, **GREEDY)
            assert made.choices[0].finish_reason == "length"
            chunks = await client.chat.completions.create(
                model="chat", messages=MESSAGES, **GREEDY, stream=True
            )
            assert [c.choices[0].finish_reason async for c in chunks][-1] == "length"

    asyncio.run(main())
    check_idle(running)


def check_idle(running: Running) -> None:
    """Nothing is computed, and no page held."""
    running.wait_until_idle()
    llm = running.server.models.served["chat"].llm
    assert llm is not None
    for _ in range(500):  # the layer that is computed goes on to its end
        llm.score("Once")  # a call collects what others gave back
        if not llm._cache.holders():
            return
        time.sleep(0.01)
    raise AssertionError("pages are still held")


def test_too_many_requests(path: Path) -> None:
    with (
        serving({"chat": path}, parallel=1, queue=0) as busy,
        openai.OpenAI(base_url=f"{busy.url}/v1", api_key="x", max_retries=0) as client,
    ):
        wishes: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "extra_body": {"min_tokens": 400}}
        stream = client.chat.completions.create(**wishes, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="come back later") as caught:
            client.chat.completions.create(**wishes)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        stream.close()
        busy.wait_until_idle()
        with pytest.raises(openai.BadRequestError, match="n is 2"):
            client.chat.completions.create(**wishes, n=2)
