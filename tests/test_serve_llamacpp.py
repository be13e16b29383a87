"""llama.cpp's dialect over HTTP: completion, tokens, templates, vectors, what the server is, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers_serve import Running, Says, serving, write_chat_model

import tinyllm

PROMPT = "Once upon a time"
ASKED: dict[str, Any] = {
    "prompt": PROMPT,
    "n_predict": 16,
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
    "dry_multiplier": 0.5,
    "dry_base": 1.5,
    "dry_allowed_length": 1,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ["."],
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
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
    "dry_multiplier": 0.5,
    "dry_base": 1.5,
    "dry_allowed_length": 1,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ["."],
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "stop": ["Zebra"],
}
DRAWN: dict[str, Any] = {"n_predict": 12, "seed": 7, "return_tokens": True}
SAME: dict[str, Any] = {"max_tokens": 12, "seed": 7, "special": True}


@pytest.fixture(scope="module")
def model() -> Says:
    return Says()


@pytest.fixture(scope="module")
def running(model: Says) -> Iterator[Running]:
    with serving({"plain": "stories"}, model) as running:
        yield running


@pytest.fixture
def says(model: Says) -> Iterator[Says]:
    yield model
    model.text = None


@pytest.fixture(scope="module")
def llm() -> Iterator[tinyllm.LLM]:
    with tinyllm.load("stories", context=2048) as llm:
        yield llm


def post(running: Running, path: str, **body: Any) -> Any:
    answer = httpx.post(running.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(running: Running, **body: Any) -> list[dict[str, Any]]:
    answer = httpx.post(f"{running.url}/completion", json={**body, "stream": True}, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(block.removeprefix("data: ")) for block in answer.text.strip().split("\n\n")]


# --- completion ---------------------------------------------------------------------------------------------


def test_a_completion_has_the_tokens_of_a_call(running: Running, llm: tinyllm.LLM) -> None:
    same = llm(PROMPT, **PARAMETERS)
    made = post(running, "/completion", **ASKED, return_tokens=True)
    assert (made["content"], made["tokens"]) == (same.text, same.tokens)
    assert (made["tokens_evaluated"], made["tokens_predicted"]) == (len(same.prompt_tokens), 16)
    assert (made["stop"], made["stop_type"], made["stopping_word"]) == (True, "limit", "")
    assert (made["model"], made["prompt"], made["truncated"]) == ("plain", f"<s> {PROMPT}", False)
    assert (made["index"], made["tokens_cached"], made["seed"]) == (0, len(same.prompt_tokens) + 15, 7)
    settings = made["generation_settings"]
    assert {name: settings[name] for name in ASKED if name != "prompt"} == {
        name: value for name, value in ASKED.items() if name != "prompt"
    }
    timings = made["timings"]
    for name, n in (("prompt", len(same.prompt_tokens)), ("predicted", 16)):
        assert timings[f"{name}_n"] == n
        assert timings[f"{name}_ms"] > 0
        assert timings[f"{name}_per_second"] == pytest.approx(1000 * n / timings[f"{name}_ms"])
        assert timings[f"{name}_per_token_ms"] == pytest.approx(timings[f"{name}_ms"] / n)
    assert post(running, "/completions", **ASKED)["content"] == same.text
    assert post(running, "/completion", **ASKED)["tokens"] == []
    replay = post(running, "/completion", **ASKED, replay=True)["replay"]
    assert replay[0]["tokens"] == same.tokens


def test_a_stream_says_what_a_whole_completion_does(running: Running, llm: tinyllm.LLM) -> None:
    same = llm(PROMPT, **PARAMETERS)
    *parts, last = stream(running, **ASKED)
    assert "".join(part["content"] for part in parts) == same.text
    assert [token for part in parts for token in part["tokens"]] == same.tokens
    assert [part["stop"] for part in parts] == [False] * len(parts)
    assert [part["tokens_predicted"] for part in parts] == list(range(1, 17))
    whole = post(running, "/completion", **ASKED)
    del whole["timings"], last["timings"]
    assert last == {**whole, "content": ""}


def test_a_random_seed_is_told(running: Running) -> None:
    made = post(running, "/completion", prompt=PROMPT, n_predict=8, seed=-1)
    again = post(running, "/completion", prompt=PROMPT, n_predict=8, seed=made["seed"])
    assert again["content"] == made["content"]


def test_prompts_of_texts_and_ids(running: Running, llm: tinyllm.LLM) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is not None

    def check(prompt: Any, ids: list[int]) -> dict[str, Any]:
        made: dict[str, Any] = post(running, "/completion", prompt=prompt, **DRAWN)
        assert made["tokens_evaluated"] == len(ids)
        assert made["tokens"] == llm(ids, max_tokens=12, seed=7).tokens
        return made

    ids = tokenizer.encode(PROMPT)
    assert check(ids, ids)["prompt"] == "<s> Once upon a time"
    check("Once</s>upon", tokenizer.encode("Once</s>upon", special=True))
    tail = tokenizer.encode("a time", bos=False)
    check([*ids[:-2], "a time"], [*ids[:-2], *tail])
    check(["Once", ids[-1]], [*tokenizer.encode("Once"), ids[-1]])
    check(["Once"], tokenizer.encode("Once"))


def test_several_prompts(running: Running, llm: tinyllm.LLM) -> None:
    prompts: list[Any] = [PROMPT, [1, "Lily"], [1, 412]]
    ids: list[Any] = [PROMPT, [1, *llm.tokenizer.encode("Lily", bos=False)], [1, 412]]  # type: ignore[union-attr]
    same = [llm(prompt, **SAME) for prompt in ids]
    made = post(running, "/completion", prompt=prompts, **DRAWN)
    assert [one["index"] for one in made] == [0, 1, 2]
    assert [one["tokens"] for one in made] == [one.tokens for one in same]
    parts = stream(running, prompt=prompts, **DRAWN)
    for i, one in enumerate(same):
        mine = [part for part in parts if part["index"] == i]
        assert [token for part in mine[:-1] for token in part["tokens"]] == one.tokens
        assert mine[-1]["stop"] is True


def test_how_a_completion_ends(running: Running, says: Says) -> None:
    says.text = "One.\nTwo."
    made = post(running, "/completion", prompt=PROMPT, n_predict=-1)
    assert (made["content"].strip(), made["stop_type"], made["has_new_line"]) == ("One.\nTwo.", "eos", True)
    made = post(running, "/completion", prompt=PROMPT, stop=["Two", "Three"])
    assert (made["content"].strip(), made["stop_type"], made["stopping_word"]) == ("One.", "word", "Two")


def test_probabilities(running: Running, llm: tinyllm.LLM) -> None:
    same = llm(PROMPT, **SAME, top_logprobs=3)
    assert llm.tokenizer is not None
    assert same.top_logprobs is not None
    whole = post(running, "/completion", prompt=PROMPT, **DRAWN, n_probs=3)["completion_probabilities"]
    parts = stream(running, prompt=PROMPT, **DRAWN, n_probs=3)[:-1]
    for found in (whole, [one for part in parts for one in part["completion_probabilities"]]):
        assert [one["id"] for one in found] == same.tokens
        assert [one["logprob"] for one in found] == same.logprobs
        assert [bytes(one["bytes"]) for one in found] == [llm.tokenizer.token_bytes(t) for t in same.tokens]
        assert [[(t["id"], t["logprob"]) for t in one["top_logprobs"]] for one in found] == same.top_logprobs


def test_biases(running: Running, llm: tinyllm.LLM) -> None:
    assert llm.tokenizer is not None
    (cat,) = llm.tokenizer.encode("cat", bos=False)
    (dot,) = llm.tokenizer.encode(".", bos=False)[-1:]
    bias = {cat: 3.5, dot: -math.inf}
    same = llm(PROMPT, **SAME, logit_bias=bias).tokens
    assert dot not in same
    for given in ([[cat, 3.5], [dot, False]], {str(cat): 3.5, str(dot): False}, [["cat", 3.5], [dot, False]]):
        assert post(running, "/completion", prompt=PROMPT, **DRAWN, logit_bias=given)["tokens"] == same
    ends = llm(PROMPT, max_tokens=400, seed=3, temperature=0)
    assert ends.finish_reason == "stop"
    made = post(
        running,
        "/completion",
        prompt=PROMPT,
        n_predict=400,
        temperature=0,
        ignore_eos=True,
        return_tokens=True,
    )
    assert (made["stop_type"], made["tokens"][: len(ends.tokens)]) == ("limit", ends.tokens)
    assert made["generation_settings"]["ignore_eos"] is True


def test_forms(running: Running, llm: tinyllm.LLM) -> None:
    gbnf = 'root ::= "One and " [a-z]+ "."'
    made = post(running, "/completion", prompt=PROMPT, **DRAWN, grammar=gbnf)
    assert made["content"].startswith("One and ")
    assert made["tokens"] == llm(PROMPT, **SAME, grammar=gbnf).tokens
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    made = post(running, "/completion", prompt=PROMPT, n_predict=100, json_schema=schema, grammar="")
    assert isinstance(json.loads(made["content"])["a"], int)


def test_samplers_that_are_left_out(running: Running, llm: tinyllm.LLM) -> None:
    off = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0}
    off |= {"typical_p": 1, "top_p": 1, "min_p": 0, "xtc_probability": 0}
    same = llm(PROMPT, **{**PARAMETERS, **off}).text
    assert same != llm(PROMPT, **PARAMETERS).text
    for samplers in (["top_k", "temperature"], "kt"):
        made = post(running, "/completion", **ASKED, samplers=samplers)
        assert made["content"] == same
        assert made["generation_settings"]["samplers"] == ["top_k", "temperature"]
    every = ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
    for samplers in (every, "edskypmxt"):
        assert post(running, "/completion", **ASKED, samplers=samplers)["content"] != same
    none = {**off, "top_k": 0, "temperature": 1.0}
    made = post(running, "/completion", **ASKED, samplers=[])
    assert made["content"] == llm(PROMPT, **{**PARAMETERS, **none}).text


def test_what_is_harmless(running: Running) -> None:
    more = {
        "cache_prompt": False,
        "id_slot": 3,
        "n_keep": -1,
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "dynatemp_range": 0.0,
        "top_n_sigma": -1,
        "t_max_predict_ms": -1,
        "n_probs": 0,
        "logit_bias": [],
        "lora": [],
        "min_keep": 0,
    }
    plain = post(running, "/completion", **ASKED)
    assert post(running, "/completion", **ASKED, **more)["content"] == plain["content"]


def test_a_client_that_goes_frees_its_text(running: Running) -> None:
    body = {"prompt": PROMPT, "ignore_eos": True, "stream": True, "n_predict": 2000}
    with httpx.stream("POST", f"{running.url}/completion", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert running.server.turns.running == 1
    running.wait_until_idle()


# --- tokens, templates, vectors -----------------------------------------------------------------------------


def test_tokens(running: Running, llm: tinyllm.LLM) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    text = "Once</s> é"

    def tokens(**options: Any) -> Any:
        return post(running, "/tokenize", **options)["tokens"]

    assert tokens(content=text) == tokenizer.encode(text, bos=False, special=True)
    assert tokens(content=text, add_special=True, parse_special=False) == tokenizer.encode(text)
    assert tokens(content=["Once", 5, "a"], add_special=True) == [
        *tokenizer.encode("Once"),
        5,
        *tokenizer.encode("a", bos=False),
    ]
    assert tokens(content="") == []
    pieces = tokens(content="Hi é", with_pieces=True)
    data = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces)
    assert data.decode().strip() == "Hi é"
    assert [195] in [p["piece"] for p in pieces]  # half a character
    ids = tokenizer.encode("Once</s>é", special=True)
    assert post(running, "/detokenize", tokens=ids)["content"] == "<s> Once</s> é"
    assert post(running, "/detokenize", tokens=[])["content"] == ""


def test_templates(tmp_path: Path) -> None:
    path = write_chat_model(tmp_path / "chat.gguf")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"text": "Hi"}]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    off = {"enable_thinking": False}
    with serving({"chat": path}) as running, tinyllm.load(path) as llm:
        made = post(running, "/apply-template", messages=messages, tools=tools, chat_template_kwargs=off)[
            "prompt"
        ]
        assert made.startswith("<|im_start|>system\n")
        assert made.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        ids = llm.chat_ids(messages, tools=tools, template_args=off)
        assert post(running, "/tokenize", content=made, add_special=True)["tokens"] == ids
        answer = httpx.post(
            f"{running.url}/apply-template", json={"messages": messages, "chat_template_kwargs": {"x": 1}}
        )
        assert (answer.status_code, "'x'" in answer.text) == (400, True)
        props = httpx.get(f"{running.url}/props").json()
        assert "im_start" in props["chat_template"]
        assert str(tmp_path) not in json.dumps(props)


def test_vectors(running: Running, llm: tinyllm.LLM) -> None:
    same = llm.embed(["A cat.", "A dog."], normalize=True)
    made = post(running, "/embedding", content=["A cat.", "A dog."])
    assert [one["index"] for one in made] == [0, 1]
    np.testing.assert_array_equal(np.array([one["embedding"][0] for one in made], np.float32), same)
    (one,) = post(running, "/embeddings", input="A cat.", embd_normalize=-1)
    np.testing.assert_array_equal(
        np.array(one["embedding"][0], np.float32), llm.embed("A cat.", normalize=False)
    )
    (one,) = post(running, "/embedding", content=[1, 5, 6])
    np.testing.assert_array_equal(
        np.array(one["embedding"][0], np.float32), llm.embed([1, 5, 6], normalize=True)
    )


# --- what the server is, errors -----------------------------------------------------------------------------


def test_what_the_server_is(running: Running, llm: tinyllm.LLM) -> None:
    for path in ("/health", "/v1/health"):
        assert httpx.get(running.url + path).json() == {"status": "ok"}
    props = httpx.get(f"{running.url}/props").json()
    assert (props["total_slots"], props["model_alias"], props["model_path"]) == (8, "plain", "plain")
    assert (props["bos_token"], props["eos_token"], props["chat_template"]) == ("<s>", "</s>", "")
    settings = props["default_generation_settings"]
    assert settings["n_ctx"] == 2048
    assert settings["params"]["temperature"] == llm.defaults["temperature"]
    assert settings["params"]["top_k"] == 40


ONE: dict[str, Any] = {"prompt": "x"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("completion", {}, "prompt is missing"),
    ("completion", {"prompt": []}, "prompt must be a text, a list of token ids and texts, or"),
    ("completion", {"prompt": [["a"], [5]]}, "prompt must be a text, a list of"),
    ("completion", {"prompt": [True]}, "prompt must be a text, a list of"),
    ("completion", {"prompt": {"prompt_string": "x", "multimodal_data": []}}, "prompt must be a text, a"),
    ("completion", {"prompt": ["x"] * 5000}, "prompt has 5000 prompts, the most is"),
    ("completion", {"prompt": [99999]}, "token id 99999 is not in the vocabulary"),
    ("completion", {**ONE, "colour": "red"}, "colour is not known here"),
    ("completion", {**ONE, "temperature": -1}, "temperature is -1"),
    ("completion", {**ONE, "n_predict": 0}, "n_predict is 0"),
    ("completion", {**ONE, "n_predict": 1, "max_tokens": 2}, "max_tokens means the same as n_predict"),
    ("completion", {**ONE, "repeat_last_n": -2}, "repeat_last_n is -2"),
    ("completion", {**ONE, "seed": "x"}, "seed must be"),
    ("completion", {**ONE, "mirostat": 2}, "mirostat is not supported"),
    ("completion", {**ONE, "top_n_sigma": 1.5}, "top_n_sigma is not supported"),
    ("completion", {**ONE, "dynatemp_range": 0.5}, "dynatemp_range is not supported"),
    ("completion", {**ONE, "timings_per_token": True}, "timings_per_token is not supported"),
    ("completion", {**ONE, "n": 2}, "n is not supported"),
    ("completion", {**ONE, "samplers": ["temperature", "top_k"]}, "samplers must be of these, in this order"),
    ("completion", {**ONE, "samplers": ["top_k", "top_k"]}, "samplers must be of these"),
    ("completion", {**ONE, "samplers": "zz"}, "samplers must be of these"),
    ("completion", {**ONE, "samplers": 5}, "samplers must be a list"),
    ("completion", {**ONE, "logit_bias": [[1]]}, "logit_bias must be pairs"),
    ("completion", {**ONE, "logit_bias": [[True, 1]]}, "logit_bias must be pairs"),
    ("completion", {**ONE, "logit_bias": [[1, True]]}, "logit_bias must be pairs"),
    ("completion", {**ONE, "logit_bias": [[1, 10**400]]}, "logit_bias must be pairs"),
    ("completion", {**ONE, "logit_bias": [[99999, 1]]}, "logit_bias names token 99999"),
    ("completion", {**ONE, "n_probs": -1}, "n_probs is -1"),
    ("completion", {**ONE, "grammar": "root ::= ("}, "grammar"),
    ("completion", {**ONE, "json_schema": {"not": {}}}, "json_schema cannot be enforced"),
    ("completion", {**ONE, "grammar": "root ::= [a-z]", "json_schema": {}}, "cannot be used together"),
    ("tokenize", {}, "content is missing"),
    ("tokenize", {"content": 5}, "content must be a text"),
    ("tokenize", {"content": "x", "colour": 1}, "colour is not known here"),
    ("detokenize", {"tokens": "x"}, "tokens must be a list"),
    ("detokenize", {"tokens": [1.5]}, "tokens must be token ids"),
    ("detokenize", {"tokens": [99999]}, "tokens has 99999"),
    ("apply-template", {"messages": []}, "messages must have a message"),
    ("apply-template", {"messages": [{"role": "user", "content": "x"}]}, "plain has no chat template"),
    ("embedding", {"content": [1, "x"]}, "content must be a text, token ids"),
    ("embedding", {"content": "x", "embd_normalize": 1}, "embd_normalize must be 2"),
]


@pytest.mark.parametrize(("endpoint", "body", "message"), REFUSED)
def test_what_is_refused(running: Running, endpoint: str, body: dict[str, Any], message: str) -> None:
    answer = httpx.post(f"{running.url}/{endpoint}", content=json.dumps(body))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert (error["code"], error["type"]) == (400, "invalid_request_error")


def test_other_errors(running: Running) -> None:
    answer = httpx.post(f"{running.url}/completion", json={"prompt": "x", "model": "llama"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (404, "not_found_error", 404)
    answer = httpx.post(f"{running.url}/completion", json={"prompt": "a " * 3000})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "exceed_context_size_error")
    for method, path in (
        ("POST", "/infill"),
        ("GET", "/slots"),
        ("POST", "/slots/0"),
        ("POST", "/props"),
        ("POST", "/rerank"),
        ("GET", "/lora-adapters"),
    ):
        answer = httpx.request(method, running.url + path)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (501, "not_supported_error")
        assert path in error["message"]


def test_an_error_within_a_stream() -> None:
    model = Says()
    body = {"prompt": PROMPT, "ignore_eos": True, "stream": True, "n_predict": 400}
    with serving({"plain": "stories"}, model) as running:
        with httpx.stream("POST", f"{running.url}/completion", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            model.loaded[0].close()
            last = [line for line in lines if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == (503, "unavailable_error")
