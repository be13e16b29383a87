"""tinyllm.llama_cpp is llama-cpp-python to a program: its examples and its tests' scenarios, written anew.

Most run against both packages on the same file, the bundled model; without llama-cpp-python (tests/data.md)
its side is skipped by name. What must be the same: the shapes of what comes back, the ids of prompts, and
greedy texts, up to a token that both hold nearly as likely as another (`same_text`).
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers_adapters import adapter_case, write_lora_gguf
from helpers_gguf import write_gguf
from helpers_models import random_weights

import tinyllm
from tinyllm import backends
from tinyllm import llama_cpp as ours
from tinyllm.errors import ArgumentError, ContextError, NotFoundError, UnsupportedError
from tinyllm.llama_cpp import arguments, llama_chat_format
from tinyllm.modelfiles import BUNDLED

STORIES = str(BUNDLED["stories"])
PROMPT = "Once upon a time there was a little dog named"
CHAT = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": "Tell me one."},
    {"role": "assistant", "content": "Once upon a time."},
    {"role": "user", "content": "Go on."},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "UserDetail",
        "parameters": {
            "type": "object",
            "properties": {"name": {"enum": ["Lily", "Tom"]}, "likes_cake": {"type": "boolean"}},
            "required": ["name", "likes_cake"],
            "additionalProperties": False,
        },
    },
}


def theirs() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module", autouse=True)
def no_tiles() -> Iterator[None]:
    """ggml sets AMX's tiles up once a thread and expects them to stay so, where tinyllm lets go of them after
    each call: in one thread of one process the two cannot both use them. The bits are the same without."""
    before = backends.info()["isa"]
    if before == "amx":
        backends.select_isa("avx512vnni")
    yield
    backends.select_isa(before)


@pytest.fixture(scope="module", params=["tinyllm", "llama-cpp-python"])
def api(request: pytest.FixtureRequest) -> ModuleType:
    return ours if request.param == "tinyllm" else theirs()


@pytest.fixture(scope="module")
def make(api: ModuleType) -> Iterator[Callable[..., Any]]:
    """Makes a `Llama` of either package, of the bundled model."""
    made = []

    def make(**options: Any) -> Any:
        made.append(api.Llama(model_path=STORIES, **{"n_ctx": 256, "verbose": False, **options}))
        return made[-1]

    yield make
    for llama in made:
        llama.close()


@pytest.fixture(scope="module")
def llama(make: Callable[..., Any]) -> Any:
    return make(logits_all=True)


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Any, Any]]:
    made = [
        module.Llama(model_path=STORIES, n_ctx=256, logits_all=True, verbose=False)
        for module in (ours, theirs())
    ]
    yield made[0], made[1]
    for one in made:
        one.close()


def shape(value: Any) -> Any:
    """The keys and kinds of a dict from top to bottom; texts, numbers and how many of each do not matter."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [shape(value[-1])] if value else []
    if isinstance(value, (float, np.floating)):
        return "float"
    return type(value).__name__


NEAR = 0.05  # nats; on the bundled model the two round a log probability apart by a tenth of it


def same_text(own: Any, other: Any, prompt: str, texts: list[str]) -> None:
    """Greedy texts are equal, or part where the packages' rounding decides: the two tokens' logits are nearer
    to each other than six standard deviations of what the packages differ by, over that row's vocabulary;
    and they differ by little of what the logits themselves do."""
    if texts[0] == texts[1]:
        return
    tokens = [own.tokenize((prompt + text).encode(), special=True) for text in texts]
    n = own.longest_token_prefix(*tokens)
    row = own.llm.logits(tokens[0][:n])[-1]
    other.reset()
    other.eval(tokens[0][:n])
    rounding = float((other.scores[n - 1] - row).std())
    gap = float(row.max() - row[tokens[1][n]])
    assert rounding < 0.05 * row.std(), rounding
    assert gap < 6 * rounding, f"{texts} part after {n} tokens at a gap of {gap}, rounding is {rounding}"


# ---- the scenarios of its tests, on both


def test_tokenization(llama: Any) -> None:
    text = b"Once upon a time"
    ids = llama.tokenize(text)
    assert ids[0] == llama.token_bos()
    assert llama.detokenize(ids) == text
    assert llama.tokenize(text, add_bos=False) == ids[1:]
    end = llama.tokenize(b"Lily</s>", special=True)
    assert (end[-1] == llama.token_eos()) == (llama.detokenize([llama.token_eos()], special=True) == b"</s>")
    assert llama.tokenize(b"", add_bos=True, special=True) == [llama.token_bos()]
    assert llama.detokenize([llama.token_bos()]) == b""
    assert llama.tokenizer().decode(llama.tokenizer().encode("a cat")).strip() == "a cat"


def test_vocabulary_alone(make: Callable[..., Any], llama: Any) -> None:
    alone = make(vocab_only=True)
    assert alone.tokenize(b"Hello World") == llama.tokenize(b"Hello World")
    assert alone.n_vocab() == llama.n_vocab()


def test_completion(llama: Any) -> None:
    """examples/high_level_api_inference.py."""
    output = llama(PROMPT, max_tokens=48, stop=["Q:", "\n"], echo=True, temperature=0.0)
    (choice,) = output["choices"]
    assert choice["text"].startswith(PROMPT)
    assert "\n" not in choice["text"]
    assert choice["finish_reason"] in ("stop", "length")
    assert output["object"] == "text_completion"
    assert output["id"].startswith("cmpl-")
    assert output["model"] == STORIES
    usage = output["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len(llama.tokenize(PROMPT.encode()))
    json.dumps(output, indent=2)


def test_streaming(llama: Any) -> None:
    """examples/high_level_api_streaming.py."""
    whole = llama(PROMPT, max_tokens=30, temperature=0.0)
    chunks = list(llama(PROMPT, max_tokens=30, temperature=0.0, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "length"
    ]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len(chunks) > 20


@pytest.mark.parametrize("stream", [False, True])
def test_stop(llama: Any, stream: bool) -> None:
    whole = llama(PROMPT, max_tokens=40, temperature=0.0)["choices"][0]["text"]
    word = whole.split()[5]
    answer = llama(PROMPT, max_tokens=40, temperature=0.0, stop=word, stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole[: whole.index(word)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_prompt_of_ids(llama: Any) -> None:
    ids = llama.tokenize(PROMPT.encode(), special=True)
    text = llama.create_completion(ids, max_tokens=10, temperature=0.0)["choices"][0]["text"]
    assert text == llama(PROMPT, max_tokens=10, temperature=0.0)["choices"][0]["text"]


def test_max_tokens(llama: Any) -> None:
    for none in (None, -1, 0):
        usage = llama("The end", max_tokens=none, temperature=0.0)["usage"]
        assert 16 < usage["total_tokens"] <= 256
    with pytest.raises(ValueError, match="exceed context window"):
        llama("the cat " * 300)


def test_grammar(api: ModuleType, llama: Any) -> None:
    grammar = api.LlamaGrammar.from_string('root ::= "true" | "false"', verbose=False)
    output = llama(
        "A dog is a cat, true or false?\n", max_tokens=4, temperature=0.8, seed=1337, grammar=grammar
    )
    assert output["choices"][0]["text"] in ("true", "false")


def test_logits_processor(api: ModuleType, llama: Any) -> None:
    (token,) = llama.tokenize(b" dog", add_bos=False)[-1:]
    seen: list[tuple[Any, ...]] = []

    def only(input_ids: Any, scores: Any) -> Any:
        seen.append((input_ids.dtype, len(input_ids), scores.dtype, scores.shape))
        scores[:] = -np.inf
        scores[token] = 0
        return scores

    processors = api.LogitsProcessorList([only])
    output = llama(PROMPT, max_tokens=4, temperature=0.8, logits_processor=processors)
    assert output["choices"][0]["text"] == llama.detokenize([token] * 4).decode()
    n = len(llama.tokenize(PROMPT.encode()))
    assert seen == [(np.intc, n + i, np.single, (llama.n_vocab(),)) for i in range(4)]


def test_stopping_criteria(api: ModuleType, llama: Any) -> None:
    """It sees the tokens before the next one; the one it stops at is not in the text."""
    n = len(llama.tokenize(PROMPT.encode()))
    whole = llama(PROMPT, max_tokens=20, temperature=0.0)["choices"][0]["text"]
    criteria = api.StoppingCriteriaList([lambda input_ids, logits: len(input_ids) >= n + 5])
    output = llama(PROMPT, max_tokens=20, temperature=0.0, stopping_criteria=criteria)
    assert output["choices"][0]["finish_reason"] == "stop"
    assert output["usage"]["completion_tokens"] == 5
    assert whole.startswith(output["choices"][0]["text"])
    chunks = llama(PROMPT, max_tokens=20, temperature=0.0, stopping_criteria=criteria, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == output["choices"][0]["text"]


def test_logit_bias(llama: Any) -> None:
    (token,) = llama.tokenize(b" box", add_bos=False)[-1:]
    output = llama(PROMPT, max_tokens=3, temperature=0.0, logit_bias={str(token): 100.0})
    assert output["choices"][0]["text"] == llama.detokenize([token] * 3).decode()


def test_a_state_brings_the_seed_back(make: Callable[..., Any]) -> None:
    llama = make()
    llama.set_seed(1337)
    state = llama.save_state()
    ask = {"max_tokens": 20, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    first, second = (llama(PROMPT, **ask)["choices"][0]["text"] for _ in range(2))
    llama.load_state(state)
    assert llama(PROMPT, **ask)["choices"][0]["text"] == first != second


def test_generate_after_eval(make: Callable[..., Any]) -> None:
    """What was computed is not thrown away, and gives what a fresh text gives."""
    fresh, cached = make(), make()
    tokens = fresh.tokenize(PROMPT.encode(), add_bos=True, special=True)
    expected = list(itertools.islice(fresh.generate(tokens, temp=0.0), 4))
    cached.eval(tokens)
    assert cached.n_tokens == len(tokens)
    assert cached.input_ids[: cached.n_tokens].tolist() == tokens
    assert cached.sample(temp=0.0, idx=len(tokens) - 1) == expected[0]
    assert cached.sample(temp=0.0) == expected[0]
    generated = cached.generate(tokens, temp=0.0)
    assert list(itertools.islice(generated, 4)) == expected
    generated.close()
    assert cached.n_tokens == len(tokens) + 3


def test_eval_and_sample_by_hand(make: Callable[..., Any]) -> None:
    llama = make()
    tokens = llama.tokenize(PROMPT.encode())
    expected = list(itertools.islice(llama.generate(tokens, temp=0.0), 5))
    llama.reset()
    llama.eval(tokens)
    made = []
    for _ in range(5):
        made.append(llama.sample(temp=0.0))
        llama.eval(made[-1:])
    assert made == expected
    assert llama.n_tokens == len(tokens) + 5


def test_a_shorter_prompt_and_another(make: Callable[..., Any]) -> None:
    fresh, cached = make(), make()
    short, long = (fresh.tokenize(text.encode()) for text in (PROMPT, PROMPT + " Spot. He liked to run"))
    other = fresh.tokenize(b"The red ball")
    cached.eval(long)
    for tokens in (short, other, long):
        expected = list(itertools.islice(fresh.generate(tokens, temp=0.0), 3))
        assert list(itertools.islice(cached.generate(tokens, temp=0.0), 3)) == expected


def test_tokens_sent_into_the_generator_are_guesses(llama: Any) -> None:
    tokens, sent = llama.tokenize(PROMPT.encode()), llama.tokenize(b" and then", add_bos=False)
    expected = list(itertools.islice(llama.generate(tokens, temp=0.0), 4))
    for guesses in (sent, expected[1:3]):
        llama.reset()
        generated = llama.generate(tokens, temp=0.0)
        assert [next(generated), generated.send(guesses), next(generated), next(generated)] == expected
        generated.close()


def test_a_loaded_state_goes_on(make: Callable[..., Any]) -> None:
    source, loaded = make(), make()
    tokens = source.tokenize(PROMPT.encode())
    expected = list(itertools.islice(source.generate(tokens, temp=0.0), 3))
    source.reset()
    source.eval(tokens)
    state = pickle.loads(pickle.dumps(source.save_state()))
    assert state.llama_state_size == len(state.llama_state) > 1000
    loaded.eval(loaded.tokenize(b"The red ball"))
    loaded.load_state(state)
    assert loaded.n_tokens == len(tokens)
    assert loaded.input_ids[: loaded.n_tokens].tolist() == tokens
    assert list(itertools.islice(loaded.generate(tokens, temp=0.0), 3)) == expected


def test_a_cache_of_states(
    api: ModuleType, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask: dict[str, Any] = {"max_tokens": 3, "temperature": 0.0, "seed": 1}
    writer, reader = make(), make()
    tokens = writer.tokenize(PROMPT.encode())
    expected = writer.create_completion(tokens, **ask)
    cache = api.LlamaRAMCache()
    writer.set_cache(cache)
    writer.create_completion(tokens, **ask)
    assert cache.cache_size > 1000
    assert tokens in cache
    assert [5, 6, 7] not in cache
    reader.set_cache(cache)
    calls: list[Any] = []
    load_state = reader.load_state
    monkeypatch.setattr(reader, "load_state", lambda state: (calls.append(state), load_state(state)))
    actual = reader.create_completion(tokens, **ask)
    assert len(calls) == 1
    assert actual["choices"][0]["text"] == expected["choices"][0]["text"]


def test_scores(make: Callable[..., Any]) -> None:
    llama = make(logits_all=True)
    tokens = llama.tokenize(PROMPT.encode())
    llama.eval(tokens)
    logits = llama.scores[: llama.n_tokens]
    assert logits.shape == (len(tokens), llama.n_vocab())
    assert int(logits[-1].argmax()) == llama.sample(temp=0.0)
    logprobs = llama.logits_to_logprobs(logits)
    np.testing.assert_allclose(np.exp(logprobs).sum(axis=-1), 1, rtol=1e-4)
    assert list(llama.eval_tokens) == tokens


def test_embedding(api: ModuleType, make: Callable[..., Any]) -> None:
    """examples/high_level_api_embedding.py; a text has a vector for each token where nothing pools them."""
    llama = make(embedding=True)
    texts = ["Hello world!", "A different prompt"]
    answer = llama.create_embedding(texts)
    sizes = [len(llama.tokenize(text.encode())) for text in texts]
    assert answer["usage"] == {"prompt_tokens": sum(sizes), "total_tokens": sum(sizes)}
    assert [len(one["embedding"]) for one in answer["data"]] == sizes
    assert {len(vector) for one in answer["data"] for vector in one["embedding"]} == {llama.n_embd()}
    alone = [llama.embed(text) for text in texts]
    together = llama.embed(texts)
    if api is not ours:  # there all texts but the first are read at a wrong place
        together = together[:1]
    for one, other in zip(alone, together, strict=False):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    assert np.linalg.norm(llama.embed("cat", normalize=True), axis=1) == pytest.approx(1, rel=1e-4)


def test_pooled_embedding(api: ModuleType, make: Callable[..., Any]) -> None:
    llama = make(embedding=True, pooling_type=api.LLAMA_POOLING_TYPE_MEAN)
    by_token = make(embedding=True).embed("A cat sat.")
    vector = llama.embed("A cat sat.")
    np.testing.assert_allclose(vector, np.mean(by_token, axis=0), rtol=0.02, atol=0.02)


def test_chat(llama: Any) -> None:
    ask: dict[str, Any] = {"messages": CHAT, "max_tokens": 12, "temperature": 0.0}
    with_format = llama.chat_format
    llama.chat_format = "chatml"
    try:
        whole = llama.create_chat_completion(**ask)
        chunks = list(llama.create_chat_completion(**ask, stream=True))
    finally:
        llama.chat_format = with_format
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["role"] == "assistant"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"}
    assert deltas[-1] == {}
    text = "".join(delta["content"] for delta in deltas[1:-1])
    assert text == whole["choices"][0]["message"]["content"]


def test_json_in_a_chat(make: Callable[..., Any]) -> None:
    """README's JSON modes, and a grammar of a schema."""
    llama = make(chat_format="chatml")
    schema = TOOL["function"]["parameters"]  # type: ignore[index]
    ask: dict[str, Any] = {"messages": CHAT, "temperature": 0.7, "seed": 3, "max_tokens": 60}
    form = {"type": "json_object", "schema": schema}
    made = json.loads(
        llama.create_chat_completion(response_format=form, **ask)["choices"][0]["message"]["content"]
    )
    assert set(made) == {"name", "likes_cake"}
    assert made["name"] in ("Lily", "Tom")


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_is_named(make: Callable[..., Any], stream: bool) -> None:
    llama = make(chat_format="chatml")
    choice = {"type": "function", "function": {"name": "UserDetail"}}
    ask: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 60,
        "seed": 3,
        "stream": stream,
    }
    answer = llama.create_chat_completion(CHAT, **ask)
    if not stream:
        (made,) = answer["choices"]
        assert made["finish_reason"] == "tool_calls"
        (call,) = made["message"]["tool_calls"]
        assert made["message"]["function_call"] == call["function"]
        name, text = call["function"]["name"], call["function"]["arguments"]
    else:
        chunks = list(answer)
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        parts = [c["choices"][0]["delta"]["tool_calls"] for c in chunks]
        calls = [part[0]["function"] for part in parts if part]
        name, text = calls[0]["name"], "".join(call["arguments"] for call in calls)
    assert name == "UserDetail"
    assert set(json.loads(text)) == {"name", "likes_cake"}


def test_openai_objects(make: Callable[..., Any]) -> None:
    pytest.importorskip("openai")
    llama = make(chat_format="chatml")
    answer = llama.create_chat_completion_openai_v1(CHAT, max_tokens=4, temperature=0.0)
    assert answer.choices[0].message.role == "assistant"
    chunks = list(llama.create_chat_completion_openai_v1(messages=CHAT, max_tokens=4, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"


def test_a_handler_of_ones_own(api: ModuleType, make: Callable[..., Any]) -> None:
    formats = importlib.import_module(f"{api.__name__}.llama_chat_format")

    def shout(*, messages: Any, **options: Any) -> Any:
        return formats.ChatFormatterResponse(prompt=messages[-1]["content"].upper(), stop="\n")

    llama = make(chat_handler=formats.chat_formatter_to_chat_completion_handler(shout))
    answer = llama.create_chat_completion(CHAT, max_tokens=4, temperature=0.0)
    assert answer["usage"]["prompt_tokens"] == len(llama.tokenize(b"GO ON."))


def test_a_pickled_model(make: Callable[..., Any]) -> None:
    llama = make(seed=5, chat_format="chatml")
    again = pickle.loads(pickle.dumps(llama))
    assert (again.n_ctx(), again.chat_format) == (256, "chatml")
    again.close()


# ---- both at once


CASES: dict[str, Callable[[Any], Any]] = {
    "completion": lambda llama: llama(PROMPT, max_tokens=24, temperature=0.0, repeat_penalty=1.0),
    "another": lambda llama: llama("One day, Tom", max_tokens=24, temperature=0.0),
    "logprobs": lambda llama: llama(PROMPT, max_tokens=12, temperature=0.0, logprobs=3),
    "echo": lambda llama: llama(PROMPT, max_tokens=12, temperature=0.0, logprobs=2, echo=True),
    "penalties": lambda llama: llama(PROMPT, max_tokens=24, temperature=0.0, repeat_penalty=1.3),
    "chunk": lambda llama: next(llama(PROMPT, max_tokens=12, temperature=0.0, stream=True)),
    "last chunk": lambda llama: list(llama(PROMPT, max_tokens=12, temperature=0.0, stream=True))[-1],
    "logprob chunk": lambda llama: list(
        llama(PROMPT, max_tokens=12, temperature=0.0, stream=True, logprobs=2)
    )[1],
}
CHATS: dict[str, dict[str, Any]] = {
    "chat": {},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "tool": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "UserDetail"}}},
    "function": {"functions": [TOOL["function"]], "function_call": {"name": "UserDetail"}},
    "json": {"response_format": {"type": "json_object", "schema": TOOL["function"]["parameters"]}},  # type: ignore[index]
}


@pytest.mark.parametrize("name", CASES)
def test_completions_of_both(name: str, both: tuple[Any, Any]) -> None:
    one, other = (CASES[name](llama) for llama in both)
    assert shape(one) == shape(other)
    assert one.get("usage", {}).get("prompt_tokens") == other.get("usage", {}).get("prompt_tokens")
    if name in ("completion", "another", "penalties"):
        prompt = "One day, Tom" if name == "another" else PROMPT
        same_text(*both, prompt, [answer["choices"][0]["text"] for answer in (one, other)])
    if "logprob" in name:
        mine, its = (a["choices"][0]["logprobs"] for a in (one, other))
        assert mine["tokens"] == its["tokens"]
        assert mine["text_offset"] == its["text_offset"]
        assert mine["token_logprobs"] == pytest.approx(its["token_logprobs"], abs=NEAR)
        assert [len(top) for top in mine["top_logprobs"]] == [len(top) for top in its["top_logprobs"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_chats_of_both(name: str, stream: bool, both: tuple[Any, Any]) -> None:
    made = []
    for llama in both:
        llama.chat_format = "chatml"
        answer = llama.create_chat_completion(
            CHAT, max_tokens=40, temperature=0.0, stream=stream, **CHATS[name]
        )
        made.append(list(answer) if stream else answer)
    one, other = made
    if not stream:
        assert shape(one) == shape(other)
        assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
        return
    for i in (0, 1, -2, -1):
        assert shape(one[i]) == shape(other[i]), i


class Recorder:
    """Stands for a model: what a handler asks of it."""

    verbose = False

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        self.asked |= {"prompt": text.decode(), "add_bos": add_bos, "special": special}
        return [1]

    def create_completion(self, **options: Any) -> Any:
        self.asked["stop"] = options["stop"]
        choice = {"text": "", "index": 0, "logprobs": None, "finish_reason": "stop"}
        return {"id": "cmpl-1", "created": 0, "model": "m", "choices": [choice], "usage": {}}


OPTIONS: dict[str, Any] = dict.fromkeys(
    (
        *("functions", "function_call", "tools", "tool_choice", "seed", "response_format", "max_tokens"),
        *("model", "logits_processor", "grammar", "logit_bias", "logprobs", "top_logprobs"),
    )
) | {
    "temperature": 0.2,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.05,
    "typical_p": 1.0,
    "stream": False,
    "stop": [],
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repeat_penalty": 1.0,
    "tfs_z": 1.0,
    "mirostat_mode": 0,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
}


@pytest.mark.parametrize("name", [name for name in llama_chat_format.STYLES if name != "intel"])
@pytest.mark.parametrize(
    "messages", [CHAT, CHAT[1:], CHAT[:2], CHAT[1:2]], ids=["all", "no system", "2", "1"]
)
def test_prompts_of_both(name: str, messages: Any) -> None:
    """intel is left out: theirs writes the words "{system_message}" where the system's message belongs."""
    theirs()
    asked = []
    for module in ("tinyllm.llama_cpp", "llama_cpp"):
        handler = importlib.import_module(f"{module}.llama_chat_format").get_chat_completion_handler(name)
        recorder = Recorder()
        handler(llama=recorder, messages=messages, **OPTIONS)
        asked.append(recorder.asked)
    assert asked[0] == asked[1]


def test_tokens_of_both(both: tuple[Any, Any]) -> None:
    for text in ("", " ", "Hello  World", "é 日本 \n\n\t x", "<s>Hi</s>"):
        for options in ({}, {"add_bos": False}, {"special": True}):
            one, other = (llama.tokenize(text.encode(), **options) for llama in both)
            assert one == other, (text, options)
            assert both[0].detokenize(one) == both[1].detokenize(other)
            assert both[0].detokenize(one, special=True) == both[1].detokenize(other, special=True)
    for name in ("n_vocab", "n_embd", "n_ctx", "token_bos", "token_eos"):
        assert getattr(both[0], name)() == getattr(both[1], name)(), name
    shared = {key for key in both[1].metadata if not both[1].metadata[key].startswith("[")}
    assert {key: both[0].metadata.get(key) for key in shared} == {
        key: both[1].metadata[key] for key in shared
    }


def test_vectors_of_both() -> None:
    """A vector a token, and of whole texts; both packages round activations, each in its own way."""
    module = theirs()
    names = ("NONE", "MEAN", "LAST")
    for pooling in (getattr(ours, f"LLAMA_POOLING_TYPE_{name}") for name in names):
        made = []
        for package in (ours, module):
            llama = package.Llama(STORIES, n_ctx=64, embedding=True, pooling_type=pooling, verbose=False)
            made.append(np.array(llama.embed("A cat sat on the mat.")))
            llama.close()
        assert made[0].shape == made[1].shape
        assert np.linalg.norm(made[0] - made[1]) < 0.03 * np.linalg.norm(made[1]), pooling


def test_chats_of_both_with_a_real_model() -> None:
    """By the template in the file: the same prompts to a token, and greedy answers."""
    module, folder = theirs(), os.environ.get("TINYLLM_REAL_MODELS", "")
    paths = sorted(Path(folder).glob("SmolLM2-*.gguf")) if folder else []
    if not paths:
        pytest.skip("a real model is missing (set TINYLLM_REAL_MODELS; tests/data.md)")
    made = []
    questions = ["What is the capital of France?", "Write one sentence about the sea.", "2 + 2 = ?"]
    with ours.Llama(str(paths[0]), n_ctx=512, verbose=False) as own:
        other = module.Llama(str(paths[0]), n_ctx=512, logits_all=True, verbose=False)
        for question in questions:
            messages = [{"role": "user", "content": question}]
            made = [
                llama.create_chat_completion(messages, max_tokens=24, temperature=0.0)
                for llama in (own, other)
            ]
            assert shape(made[0]) == shape(made[1])
            assert made[0]["usage"]["prompt_tokens"] == made[1]["usage"]["prompt_tokens"]
            texts = [answer["choices"][0]["message"]["content"] for answer in made]
            same_text(own, other, own.llm.chat_text(messages), texts)
        other.close()


def test_signatures_of_both() -> None:
    """Every argument has its name, its place and its default."""
    import inspect

    module = theirs()
    for name in (
        *("__init__", "__call__", "create_completion", "create_chat_completion", "create_embedding", "embed"),
        *("tokenize", "detokenize", "eval", "sample", "generate", "from_pretrained", "set_seed", "set_cache"),
    ):
        one, other = (inspect.signature(getattr(m.Llama, name)).parameters for m in (ours, module))
        assert list(one) == list(other), name
        for key, parameter in one.items():
            kinds = parameter.kind, other[key].kind
            assert kinds[0] == kinds[1], (name, key)
            empty = parameter.default in (None, ()) and other[key].default == []
            assert empty or parameter.default == other[key].default, (name, key)


# ---- ours alone: what it says of what it cannot do, and that it is tinyllm


@pytest.fixture(scope="module")
def own() -> Iterator[Any]:
    llama = ours.Llama(STORIES, n_ctx=256, verbose=False)
    yield llama
    llama.close()


def test_texts_are_tinyllms(own: Any) -> None:
    with tinyllm.load("stories", context=256) as llm:
        ids = own.tokenize(PROMPT.encode())
        expected = llm(ids, max_tokens=30, temperature=0)
        output = own(PROMPT, max_tokens=30, temperature=0.0)
        assert output["choices"][0]["text"] == expected.text
        sampled = llm(ids, max_tokens=30, seed=7, temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)
        assert own(PROMPT, max_tokens=30, seed=7)["choices"][0]["text"] == sampled.text
        assert own.scores.tobytes() == llm.logits(list(own.eval_tokens)).tobytes()


@pytest.fixture
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_told", set())


@pytest.mark.usefixtures("fresh_warnings")
def test_arguments_without_use_are_named_once() -> None:
    ask: dict[str, Any] = {
        "vocab_only": True,
        "verbose": False,
        "n_batch": 8,
        "flash_attn": True,
        "colour": 1,
    }
    with pytest.warns(UserWarning, match="Llama: ") as caught:
        ours.Llama(STORIES, **ask)
    told = [str(one.message) for one in caught]
    assert any("n_batch, flash_attn" in text for text in told)
    assert any("no argument colour" in text for text in told)
    ours.Llama(STORIES, **ask)  # a second time nothing is said, else it would be an error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_overrides", {"tokenizer.ggml.add_bos_token": False}),
        ("rope_freq_base", 1e6),
        ("lora_base", "a.gguf"),
        ("type_k", ours.GGML_TYPE_Q4_0),
        ("pooling_type", ours.LLAMA_POOLING_TYPE_RANK),
    ],
)
def test_what_would_change_the_model_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=name):
        ours.Llama(STORIES, verbose=False, **{name: value})


def test_refusals(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="mirostat_mode=2"):
        own(PROMPT, mirostat_mode=2)
    with pytest.raises(ValueError, match="does not exist") as caught:
        ours.Llama("no/such/file.gguf")
    assert isinstance(caught.value, NotFoundError)
    with pytest.raises(ContextError):
        own("the cat " * 300)
    with pytest.raises(UnsupportedError, match="grammar"):
        own.sample(grammar=ours.LlamaGrammar.from_string('root ::= "a"'))
    with pytest.raises(llama_chat_format.LlamaChatCompletionHandlerNotFoundException, match="functionary"):
        llama_chat_format.get_chat_completion_handler("functionary")
    monkeypatch.setattr(own, "chat_format", "chatml")
    with pytest.raises(ArgumentError, match="none of the tools"):
        own.create_chat_completion(CHAT, tools=[TOOL], function_call={"name": "nothing"})
    with pytest.raises(ArgumentError, match="vocab_only"):
        ours.Llama(STORIES, vocab_only=True, verbose=False)("Once")
    with pytest.raises(AttributeError, match="low-level"):
        _ = own.ctx


@pytest.mark.usefixtures("fresh_warnings")
def test_a_model_without_a_template_is_warned_of(own: Any) -> None:
    with pytest.warns(UserWarning, match="no chat template"):
        answer = own.create_chat_completion(CHAT, max_tokens=2)
    prompt = llama_chat_format.STYLES["llama-2"].prompt(CHAT)
    assert answer["usage"]["prompt_tokens"] == len(own.tokenize(prompt.encode(), special=True))


def test_generate_ends_where_the_context_does(own: Any) -> None:
    tokens = own.tokenize(PROMPT.encode())
    assert len(list(own.generate(tokens, temp=0.0))) == 256 - len(tokens)


def test_the_end_of_text_is_a_token_of_generate(own: Any) -> None:
    bias = {own.token_eos(): 100.0}
    output = own(PROMPT, max_tokens=5, logit_bias=bias)
    assert (output["choices"][0]["text"], output["choices"][0]["finish_reason"]) == ("", "stop")

    def end(input_ids: Any, scores: Any) -> Any:
        scores[own.token_eos()] = 1e4
        return scores

    made = list(itertools.islice(own.generate(own.tokenize(PROMPT.encode()), logits_processor=end), 3))
    assert made == [own.token_eos()] * 3


def test_a_suffix_without_infill_tokens_goes_behind(own: Any) -> None:
    plain = own(PROMPT, max_tokens=5, temperature=0.0)["choices"][0]["text"]
    assert (
        own(PROMPT, suffix=" The end.", max_tokens=5, temperature=0.0)["choices"][0]["text"]
        == plain + " The end."
    )


def test_verbose_says_what_was_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with ours.Llama(STORIES, n_ctx=64) as llama:
        llama("Once", max_tokens=2)
    said = capsys.readouterr()
    assert said.out == ""
    assert "chat format: llama-2" in said.err
    assert "context 64" in said.err


def test_minimum_of_tokens(own: Any) -> None:
    bias = {own.token_eos(): 100.0}
    least = ours.MinTokensLogitsProcessor(4, own.token_eos())
    output = own(PROMPT, max_tokens=9, temperature=0.0, logit_bias=bias, logits_processor=[least])
    assert output["usage"]["completion_tokens"] == 4


def test_guesses_of_a_draft_model() -> None:
    from tinyllm.llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=3)
    assert draft(np.array([1, 2, 3, 4, 5, 1, 2], np.intc)).tolist() == [3, 4, 5]
    assert draft(np.array([1, 2, 3], np.intc)).tolist() == []
    with (
        pytest.warns(UserWarning, match="draft_model")
        if "draft_model" not in arguments._told
        else warnings.catch_warnings()
    ):
        ours.Llama(STORIES, vocab_only=True, verbose=False, draft_model=draft)


def test_a_template_of_the_file() -> None:
    """The prompt is tinyllm's own, and calls of tools are read from the answer."""
    from tinyllm.llama_cpp.chat_styles import CHATML_TOOLS

    with ours.Llama(STORIES, n_ctx=512, verbose=False, chat_format="chatml-function-calling") as llama:
        answer = llama.create_chat_completion(
            CHAT, tools=[TOOL], tool_choice="required", max_tokens=80, seed=1
        )
        (choice,) = answer["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        assert set(json.loads(call["function"]["arguments"])) == {"name", "likes_cake"}
        chunks = list(
            llama.create_chat_completion(
                CHAT, tools=[TOOL], tool_choice="required", max_tokens=80, seed=1, stream=True
            )
        )
        text = "".join(
            part["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"]
            for part in chunks
            if part["choices"][0]["delta"].get("tool_calls")
        )
        assert json.loads(text) == json.loads(call["function"]["arguments"])
        plain = llama.create_chat_completion(CHAT, max_tokens=4, temperature=0.0)
        ids = llama.llm.chat_ids(CHAT, chat_template=CHATML_TOOLS)
        assert plain["usage"]["prompt_tokens"] == len(ids)


def test_an_adapter(tmp_path: Path) -> None:
    case = adapter_case("all")
    config = case.spec.config
    write_gguf(tmp_path / "model.gguf", config, random_weights(config, case.spec.seed))
    write_lora_gguf(tmp_path / "lora.gguf", case)
    path, lora, ids = str(tmp_path / "model.gguf"), str(tmp_path / "lora.gguf"), [1, 5, 6, 7]
    with tinyllm.load(path, context=64, adapters={"a": lora}) as llm:
        with ours.Llama(path, n_ctx=64, lora_path=lora, lora_scale=0.5, verbose=False) as llama:
            llama.eval(ids)
            assert llama.scores.tobytes() == llm.logits(ids, adapter=[("a", 0.5)]).tobytes()
            assert llama.sample(temp=0.0) == int(llama.scores[-1].argmax())
        assert llm.logits(ids).tobytes() != llm.logits(ids, adapter=[("a", 0.5)]).tobytes()


def test_from_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one file that fits is fetched by huggingface_hub, with what else is asked for."""
    hub = pytest.importorskip("huggingface_hub")
    fetched: list[tuple[Any, ...]] = []

    def fetch(repo: str, name: str, **options: Any) -> str:
        fetched.append((repo, name, options))
        return STORIES

    names = ["sub/stories-q8_0.gguf", "other.gguf", "README.md"]
    monkeypatch.setattr(hub, "list_repo_files", lambda repo: names)
    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    with ours.Llama.from_pretrained(
        "me/stories", "*q8_0.gguf", ["README*"], cache_dir="cache", n_ctx=64, verbose=False
    ) as llama:
        assert llama.n_ctx() == 64
    options = {"local_dir": None, "cache_dir": "cache"}
    assert fetched == [("me/stories", name, options) for name in (names[0], names[2])]
    with pytest.raises(ValueError, match="2 files fit"):
        ours.Llama.from_pretrained("me/stories", "*.gguf")
    with pytest.raises(ValueError, match="no file fits"):
        ours.Llama.from_pretrained("me/stories", "*.bin")
