"""Our own API: what it says of models, tokens and what may come next is what the library says."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers_serve import Running, Says, serving, write_chat_model

import tinyllm
from tinyllm.engine.next_token import look
from tinyllm.engine.sampling import SamplingParams
from tinyllm.measure.inspection import inspect_model

MESSAGES = [{"role": "user", "content": "Tell me of a dog."}]
TEXT = "Once upon a time, Léa saw a 🐕.\n"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    chat = write_chat_model(tmp_path_factory.mktemp("models") / "chat.gguf")
    with serving({"stories": "stories", "chat": chat}, Says()) as running:
        yield running


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinyllm.LLM]:
    """The same model, beside the server."""
    with tinyllm.load(write_chat_model(tmp_path_factory.mktemp("models") / "same.gguf")) as llm:
        yield llm


def ask(running: Running, path: str, body: Any, status: int = 200) -> Any:
    response = httpx.post(f"{running.url}/tinyllm/{path}", json=body)
    assert response.status_code == status, response.text
    return response.json()


def test_models_are_known_once_they_are_loaded(tmp_path: Path) -> None:
    paths = {"stories": "stories", "chat": write_chat_model(tmp_path / "chat.gguf")}
    with serving(paths, Says()) as running:
        before = httpx.get(f"{running.url}/tinyllm/models").json()["models"]
        assert [(m["name"], m["loaded"], m["kind"]) for m in before] == [
            ("stories", False, None),
            ("chat", False, None),
        ]
        facts = ask(running, "load", {"model": "chat"})
        stories, chat = httpx.get(f"{running.url}/tinyllm/models").json()["models"]
        ask(running, "load", {})  # the first one
        assert httpx.get(f"{running.url}/tinyllm/models").json()["models"][0]["kind"] == "base"
    assert stories["loaded"] is False
    assert facts == chat
    assert chat["parameters"] == inspect_model("stories").n_parameters
    assert chat.pop("sampling") == {
        "temperature": pytest.approx(0.8),
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "max_tokens": None,
    }
    assert chat == {
        "name": "chat", "loaded": True, "kind": "chat", "architecture": "llama", "quantization": "Q8_0",
        "parameters": 3_672_320, "context": 2048, "device": "cpu",
    }  # fmt: skip


def test_the_tokens_of_a_text(running: Running, chat: tinyllm.LLM) -> None:
    found = ask(running, "tokens", {"text": TEXT, "logprobs": True})
    ids, logprobs = chat.tokenizer.encode(TEXT), chat.score(TEXT).logprobs
    assert [token["id"] for token in found["tokens"]] == ids
    assert [token["logprob"] for token in found["tokens"]] == [None, *logprobs]
    assert found["prompt_tokens"] == 0
    assert found["tokens"][0]["special"] is (ids[0] in chat.tokenizer.special_ids)
    raw = [bytes.fromhex(token["bytes"]) for token in found["tokens"] if not token["special"]]
    assert b"".join(raw).decode() == " " + TEXT, "bytes make up for what is no character by itself"
    assert [t["text"] for t in found["tokens"]] == [chat.tokenizer.token_text(i) for i in ids]
    assert "logprob" not in ask(running, "tokens", {"text": TEXT})["tokens"][0]


def test_the_tokens_of_an_answer_follow_those_of_its_prompt(running: Running, chat: tinyllm.LLM) -> None:
    """They are those that the model itself writes."""
    prompt = chat.chat_ids(MESSAGES)
    made = chat.chat(MESSAGES, max_tokens=30, temperature=0, logprobs=True)
    body = {"model": "chat", "messages": MESSAGES, "text": made.text, "logprobs": True}
    found = ask(running, "tokens", body)
    assert found["prompt_tokens"] == len(prompt)
    assert [token["id"] for token in found["tokens"]] == prompt + made.tokens
    np.testing.assert_allclose(
        [token["logprob"] for token in found["tokens"][len(prompt) :]], made.logprobs, rtol=1e-5, atol=1e-5
    )
    assert ask(running, "tokens", {"model": "chat", "messages": MESSAGES})["prompt_tokens"] == len(prompt)


def test_an_answer_begins_as_the_vocabulary_writes_it_in_a_text(running: Running) -> None:
    """After a special token a text begins anew, with a space that the vocabulary adds; after a word it goes
    on."""
    with tinyllm.load("stories") as llm:
        from tinyllm.server.dialects.inspect import _after

        tokenizer = llm.tokenizer
        assert tokenizer is not None
        assert tokenizer.bos_id is not None
        for last, text in ((tokenizer.bos_id, "Once"), (tokenizer.encode("dog", bos=False)[-1], " Once")):
            ids = _after(tokenizer, last, text)
            assert b"".join(map(tokenizer.token_bytes, ids)) == b" Once"
        assert b"".join(map(tokenizer.token_bytes, _after(tokenizer, ids[-1], "ly"))) == b"ly"


@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "top_p": 1.0, "min_p": 0}, {"min_p": 0.2}])
def test_what_may_come_next(running: Running, chat: tinyllm.LLM, settings: dict[str, Any]) -> None:
    begun = chat.chat(MESSAGES, max_tokens=3, temperature=0)
    body = {"model": "chat", "messages": MESSAGES, "text": begun.text, "temperatures": [0, 0.7, 2], "top": 9}
    found = ask(running, "next", {**body, **settings})
    ids = [*begun.prompt_tokens, *begun.tokens]
    expected = look(chat.logits(ids)[-1], [0, 0.7, 2], SamplingParams(**settings).resolve(chat.defaults))
    assert [token["id"] for token in found["tokens"]] == expected.ids[:9]
    got = [token["probabilities"] for token in found["tokens"]]
    np.testing.assert_allclose(got, expected.probabilities[:, :9].T, rtol=1e-4, atol=1e-7)
    assert [token["dropped_by"] for token in found["tokens"]] == [expected.dropped_by(r) for r in range(9)]
    assert found["filters"] == [{"filter": name, "left": n} for name, n in expected.left]
    assert found["vocab_size"] == chat.config.vocab_size
    assert found["n_tokens"] == len(ids)
    assert [t["text"] for t in found["tokens"]] == [
        chat.tokenizer.token_text(t["id"]) for t in found["tokens"]
    ]


def test_what_may_come_next_after_a_text_by_itself(running: Running) -> None:
    found = ask(running, "next", {"text": "Once upon a"})
    assert found["temperatures"] == [0.5, 1.0, 1.5]
    assert len(found["tokens"]) == 12
    first = found["tokens"][0]
    assert first["text"] == " time"
    cold, usual, hot = first["probabilities"]
    assert cold > usual > hot > 0.5


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("tokens", {}, 400, "text is missing: give a text, or messages"),
        ("tokens", {"text": 3}, 400, "text must be a string"),
        ("tokens", {"text": "a", "logprob": True}, 400, "logprob is not known here"),
        ("tokens", {"text": "a", "model": "gpt"}, 404, "there is no model 'gpt' here"),
        ("tokens", {"messages": MESSAGES}, 400, "chat template"),
        ("tokens", {"messages": [{}], "model": "chat"}, 400, "message"),
        ("tokens", {"text": "dog " * 3000}, 400, "more than the context of 2048"),
        ("next", {"text": "a", "temperatures": []}, 400, "temperatures must be 1 to 8 numbers"),
        ("next", {"text": "a", "temperatures": [1, True]}, 400, "temperatures must be 1 to 8 numbers"),
        ("next", {"text": "a", "temperatures": [-1]}, 400, "temperatures must be 1 to 8 numbers"),
        ("next", {"text": "a", "top": 0}, 400, "top must be 1 to 200"),
        ("next", {"text": "a", "top_p": 3}, 400, "top_p"),
        ("next", {"text": "a", "top_k": "many"}, 400, "top_k"),
        ("next", {"text": "a", "seed": 1}, 400, "seed is not known here"),
        ("load", {"model": "gpt"}, 404, "there is no model 'gpt' here"),
        ("load", {"force": True}, 400, "force is not known here"),
        ("load", [], 400, "the body must be an object"),
    ],
)
def test_what_is_wrong_is_said(running: Running, path: str, body: Any, status: int, said: str) -> None:
    assert said in ask(running, path, body, status)["error"]["message"]


LONG = "The dog was here. " * 300


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tinyllm/tokens", {"text": LONG, "logprobs": True}),
        ("/v1/embeddings", {"input": LONG}),
        ("/api/embed", {"model": "stories", "input": LONG}),
        ("/embedding", {"content": LONG}),
    ],
)
def test_a_client_that_goes_ends_what_is_computed_for_it(
    path: str, body: dict[str, Any], running: Running
) -> None:
    """It goes while the model reads the beginning of a long text; nobody waits for the rest."""
    ask(running, "load", {})
    llm = running.server.models.served["stories"].llm
    assert llm is not None
    forward, begun, gone, calls = llm.model.forward, threading.Event(), threading.Event(), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(len(args[0]))
        begun.set()
        assert gone.wait(60)
        return forward(*args, **options)

    llm.model.forward = counted  # type: ignore[method-assign]
    try:
        client = http.client.HTTPConnection(running.url.removeprefix("http://"))
        client.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        assert begun.wait(60)
        client.close()
        time.sleep(0.2)  # it is seen to be gone by then
        gone.set()
        running.wait_until_idle()
        cut, calls[:] = sum(calls), []
        assert httpx.post(running.url + path, json=body).status_code == 200
        assert cut < sum(calls) > 1000, "some of it was never computed"
    finally:
        del llm.model.forward
