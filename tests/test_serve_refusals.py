"""What OpenAI's endpoints refuse, by its name: over plain HTTP, as no client would send it."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_serve import Running, Says, serving, write_chat_model
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES = "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    COMPLETIONS: {"prompt": "Once", "max_tokens": 1},
    EMBEDDINGS: {"input": "Once"},
    RESPONSES: {"input": "Once", "max_output_tokens": 1},
}
PARAMETERS: dict[str, Any] = {
    CHAT: chat_create_params.CompletionCreateParamsBase,
    COMPLETIONS: completion_create_params.CompletionCreateParamsBase,
    EMBEDDINGS: embedding_create_params.EmbeddingCreateParams,
    RESPONSES: response_create_params.ResponseCreateParamsBase,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = write_chat_model(tmp_path_factory.mktemp("serve") / "chat.gguf")
    with serving({"chat": path}, Says()) as running:
        yield running


@pytest.fixture(scope="module")
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as http:
        yield http


def refused(answer: httpx.Response) -> tuple[Any, str]:
    """The parameter and the message of a refusal."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert not re.search(r"Traceback|/tmp|\.py\b|NoneType", error["message"])
    return error["param"], error["message"]


def wrong_value(name: str) -> Any:
    """A value that no parameter of this name takes."""
    return [[{"wrong": name}], 7.5] if name not in ("stop", "input", "prompt") else {"wrong": name}


@pytest.mark.parametrize("path", BODIES)
def test_every_parameter_of_openais_client_is_known(http: httpx.Client, path: str) -> None:
    """None is ignored: a value of no sense is refused by the parameter's name, or the parameter has no
    meaning here."""
    from tinyllm.server.dialects.openai.common import HARMLESS

    for name in typing.get_type_hints(PARAMETERS[path]):
        answer = http.post(path, json={**BODIES[path], name: wrong_value(name)})
        if name in HARMLESS and not (path == RESPONSES and name in ("metadata", "user")):
            assert answer.status_code == 200, (name, answer.text)
            continue
        param, message = refused(answer)
        assert str(param).startswith(name), (name, message)
        assert name in message


@pytest.mark.parametrize("path", BODIES)
def test_what_nobody_knows_is_refused(http: httpx.Client, path: str) -> None:
    assert refused(http.post(path, json={**BODIES[path], "wizard": 1})) == (
        "wizard",
        "wizard is not known here",
    )
    param, message = refused(http.post(path, json={**BODIES[path], "w" * 500: 1}))
    assert len(str(param)) == 64
    assert len(message) < 100
    assert http.post(path, json={**BODIES[path], "wizard": None}).status_code == 200  # null is left out


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "must be an object"),
        (b"\xff{}", "not UTF-8"),
        (b'{"temperature": NaN}', "NaN is no JSON"),
        (b'{"a":' * 100000 + b"1" + b"}" * 100000, "nested too deeply"),
    ],
)
def test_bodies_that_are_no_object(http: httpx.Client, path: str, body: bytes, message: str) -> None:
    assert message in refused(http.post(path, content=body))[1]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (CHAT, {"messages": None}, "messages", "must have a message"),
        (CHAT, {"messages": []}, "messages", "must have a message"),
        (CHAT, {"messages": "Hi"}, "messages", "must be a list"),
        (CHAT, {"messages": ["Hi"]}, "messages[0]", "must be an object"),
        (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role", "missing"),
        (CHAT, {"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role", "expected 'system'"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "must be a string"),
        (CHAT, {"messages": [{"role": "user", "content": "", "mood": 1}]}, "messages[0].mood", "not known"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0].type",
            "text alone",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "messages[0].tool_calls[0].function",
            "missing",
        ),
        (CHAT, {"temperature": "hot"}, "temperature", "must be a number, not str"),
        (CHAT, {"temperature": True}, "temperature", "must be a number, not bool"),
        (CHAT, {"temperature": -1}, "temperature", "temperature is -1, expected 0 to"),
        (CHAT, {"top_p": 1.5}, "top_p", "top_p is 1.5"),
        (CHAT, {"max_completion_tokens": 0, "max_tokens": None}, "max_completion_tokens", "is 0, expected 1"),
        (CHAT, {"max_completion_tokens": 2}, "max_completion_tokens", "means the same as max_tokens"),
        (CHAT, {"max_tokens": 1.5}, "max_tokens", "max_tokens must be an int"),
        (CHAT, {"seed": -1}, "seed", "seed is -1"),
        (CHAT, {"seed": 10**4000}, "seed", "seed is an integer of"),
        (CHAT, {"stop": [1]}, "stop", "string or a sequence of strings"),
        (CHAT, {"stop": ""}, "stop", "empty string"),
        (CHAT, {"stop": ["x"] * 65}, "stop", "65 stop strings"),
        (CHAT, {"n": 0}, "n", "n is 0"),
        (CHAT, {"n": 1000}, "n", "n is 1000, expected 1 to 128"),
        (CHAT, {"n": 9}, "n", "computes 8 texts at once"),
        (CHAT, {"n": "2"}, "n", "must be a whole number"),
        (CHAT, {"stream": "yes"}, "stream", "must be true or false"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        (CHAT, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not known"),
        (CHAT, {"logprobs": 1}, "logprobs", "must be true or false"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs", "needs logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        (CHAT, {"logit_bias": {"a": 1}}, "logit_bias", "no token id"),
        (CHAT, {"logit_bias": {"1": "x"}}, "logit_bias", "must be a number"),
        (CHAT, {"logit_bias": {"99999999": 1}}, None, "logit_bias names token 99999999"),
        (CHAT, {"tools": [{"type": "custom"}]}, "tools[0].type", "expected 'function'"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        (CHAT, {"tools": [{"function": {"name": "f", "x": 1}}]}, "tools[0].function.x", "not known"),
        (CHAT, {"tools": [{"function": {"name": "a b"}}]}, None, "tools[0]: the name 'a b'"),
        (CHAT, {"tool_choice": "required"}, None, "there are no tools"),
        (CHAT, {"response_format": {"type": "yaml"}}, "response_format.type", "expected 'text'"),
        (CHAT, {"response_format": {}}, "response_format.type", "missing"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, None, "schema is missing"),
        (CHAT, {"store": True}, "store", "not kept"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities", "text alone"),
        (CHAT, {"functions": []}, "functions", "not supported"),
        (CHAT, {"reasoning_effort": "a lot"}, "reasoning_effort", "expected 'none'"),
        (CHAT, {"chat_template": "{{ messages }}"}, None, "--allow-templates"),
        (CHAT, {"chat_template_kwargs": {"tools": []}}, None, "does not read the variable 'tools'"),
        (CHAT, {"grammar": 3}, "grammar", "must be a string"),
        (CHAT, {"regex": "["}, None, "regex cannot be enforced"),
        (CHAT, {"choices": [1]}, "choices", "list of strings"),
        (CHAT, {"model": 3}, "model", "must be a string"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 9000}]}, None, "do not fit into the context"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
        (COMPLETIONS, {"prompt": None}, "prompt", "missing"),
        (COMPLETIONS, {"prompt": []}, "prompt", "must be a text"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt", "must be a text"),
        (COMPLETIONS, {"prompt": [True]}, "prompt", "must be a text"),
        (COMPLETIONS, {"prompt": [1.5]}, "prompt", "must be a text"),
        (COMPLETIONS, {"prompt": [3, "x"]}, "prompt", "must be a text"),
        (COMPLETIONS, {"prompt": ["a"] * 2049}, "prompt", "has 2049 texts"),
        (COMPLETIONS, {"prompt": [99999999]}, None, "token id 99999999"),
        (COMPLETIONS, {"prompt": [-1]}, None, "token id -1"),
        (COMPLETIONS, {"suffix": "The end."}, "suffix", "continued, not filled in"),
        (COMPLETIONS, {"best_of": 1, "n": 2}, "best_of", "fewer than n"),
        (COMPLETIONS, {"best_of": 2, "stream": True}, "best_of", "cannot be used with stream"),
        (COMPLETIONS, {"logprobs": 6}, "logprobs", "0 to 5"),
        (COMPLETIONS, {"logprobs": True}, "logprobs", "must be a whole number"),
        (COMPLETIONS, {"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
        (COMPLETIONS, {"messages": []}, "messages", "not known"),
        (EMBEDDINGS, {"input": None}, "input", "missing"),
        (EMBEDDINGS, {"input": {}}, "input", "must be a text"),
        (EMBEDDINGS, {"input": ["a"] * 2049}, "input", "has 2049 texts"),
        (EMBEDDINGS, {"encoding_format": "hex"}, "encoding_format", "expected 'float'"),
        (EMBEDDINGS, {"dimensions": 3}, "dimensions", "have 256 numbers"),
        (EMBEDDINGS, {"dimensions": "3"}, "dimensions", "must be a whole number"),
        (EMBEDDINGS, {"input": [99999999]}, None, "token id 99999999"),
        (EMBEDDINGS, {"input": "x" * 9000}, None, "do not fit into the context"),
    ],
)
def test_refusals_say_what_and_where(
    http: httpx.Client, path: str, body: dict[str, Any], param: str | None, message: str
) -> None:
    found, said = refused(http.post(path, content=json.dumps({**BODIES[path], **body})))
    assert message in said
    if param is not None:
        assert found == param


def test_streams_are_refused_with_a_status_too(http: httpx.Client) -> None:
    for path in (CHAT, COMPLETIONS, RESPONSES):
        body = {**BODIES[path], "stream": True, "logit_bias": {"99999999": 1}}
        assert "logit_bias" in refused(http.post(path, json=body))[1]


def test_schemas_have_a_limit(http: httpx.Client) -> None:
    schema = {"type": "object", "description": "x" * 300_000}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert "the most is 262144" in refused(http.post(CHAT, json={**BODIES[CHAT], "response_format": form}))[1]


def test_paths_stay_on_the_server(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF????")
    with serving({"broken": tmp_path / "broken.gguf", "gone": tmp_path / "gone.gguf"}) as running:
        for name in ("broken", "gone"):
            answer = httpx.post(running.url + COMPLETIONS, json={"prompt": "a", "model": name})
            assert answer.status_code == 500
            assert str(tmp_path) not in answer.text
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "model_error")
            assert name in error["message"]
