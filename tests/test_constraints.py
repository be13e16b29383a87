"""Answers of a given form: valid whatever the model says, the same bits in any company, and never weaker."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from helpers_cli import Cli, in_process
from test_inspect import MARKS, with_special, write

import tinyllm
from tinyllm.cli.run import main
from tinyllm.constraints import Form, Grammar, Vocabulary, form_of

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "blue", "é€"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
HOT: dict[str, Any] = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # nearly any token


@pytest.fixture(scope="module")
def llm() -> Iterator[tinyllm.LLM]:
    with tinyllm.load("stories") as llm:
        yield llm


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return in_process(main, monkeypatch, capsys)


def is_valid(value: Any) -> bool:
    good = isinstance(value, dict) and set(value) == {"name", "age", "tags"}
    return good and len(value["name"]) <= 8 and 0 <= value["age"] <= 120 and len(value["tags"]) <= 2


@pytest.mark.parametrize("seed", range(10))
def test_json_of_a_schema(llm: tinyllm.LLM, seed: int) -> None:
    completion = llm("Tom", json_schema=SCHEMA, max_tokens=300, seed=seed, **HOT)
    assert completion.finish_reason == "stop"
    assert is_valid(completion.parsed)
    assert json.loads(completion.text) == completion.parsed
    text = llm("Tom", json_schema=json.dumps(SCHEMA), max_tokens=300, seed=seed, **HOT).text
    assert text == completion.text


def test_a_pydantic_model_comes_back_as_an_instance(llm: tinyllm.LLM) -> None:
    class Colour(Enum):
        red = "red"
        blue = "blue"

    class Ball(pydantic.BaseModel):
        colour: Colour
        size: float = pydantic.Field(ge=0, le=10)

    made = llm("A ball", json_schema=Ball, max_tokens=100, seed=1, **HOT).parsed
    assert isinstance(made, Ball)
    assert isinstance(made.colour, Colour)


def test_any_object_regex_choices_and_grammars(llm: tinyllm.LLM) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 60}
    any_object = llm("{", json_schema=True, max_tokens=400, seed=3)
    if any_object.finish_reason == "stop":
        assert isinstance(any_object.parsed, dict)
    date = llm("On", regex=r"[12][0-9]{3}-[01][0-9]", **greedy)
    assert re.fullmatch(r"[12][0-9]{3}-[01][0-9]", date.text)
    assert date.parsed == date.text
    for seed in range(5):
        assert llm("Is it?", choices=["yes", "no", 'may "be" é'], seed=seed, **HOT).text in (
            "yes",
            "no",
            'may "be" é',
        )
        lark = llm("x", grammar='start: "a" /b+/ "c"', seed=seed, max_tokens=99, **HOT)
        gbnf = llm("x", grammar='root ::= "a" [b]+ "c"', seed=seed, max_tokens=99, **HOT)
        for completion in (lark, gbnf):
            assert completion.finish_reason == "length" or re.fullmatch("ab+c", completion.text)


def test_the_same_in_any_company(llm: tinyllm.LLM) -> None:
    """Batches, n=, threads, tasks, streams, sessions: the text is that of the call alone."""
    options: dict[str, Any] = {"json_schema": SCHEMA, "max_tokens": 200, **HOT}
    prompts = ["Tom", "Once upon a time there was", "Lily", "The"]
    alone = [llm(prompt, seed=5, **options) for prompt in prompts]
    batch = llm(prompts, seed=5, **options)
    assert [c.tokens for c in batch] == [c.tokens for c in alone]
    samples = llm("Tom", n=3, seed=5, logprobs=True, **options)
    for sample in samples:
        again = llm("Tom", seed=sample.seed, logprobs=True, **options)
        assert (sample.tokens, sample.logprobs) == (again.tokens, again.logprobs)
    stream = llm.stream("Tom", seed=5, **options)
    pieces = list(stream)
    assert "".join(map(str, pieces)) == alone[0].text
    assert [p.token for p in pieces if p.token is not None] == alone[0].tokens
    made: dict[str, list[int]] = {}

    def work(prompt: str) -> None:
        made[prompt] = llm(prompt, seed=5, **options).tokens

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [made[prompt] for prompt in prompts] == [c.tokens for c in alone]
    assert asyncio.run(llm.acall("Tom", seed=5, **options)).tokens == alone[0].tokens
    with tinyllm.load("stories", threads=1, cache_type="f16") as other:
        other.chunk = 7
        assert other("Tom", seed=5, **options).tokens == alone[0].tokens
    with llm.session() as session:
        session.append("Tom")
        chosen = session.generate(seed=5, **options)
    assert is_valid(chosen.parsed)


def test_forced_tokens_cost_no_call_each_and_have_the_models_logprobs(llm: tinyllm.LLM) -> None:
    """Their logprobs are those that `logits` gives at their places, bit for bit."""
    schema = {
        "type": "object",
        "properties": {f"a_long_name_of_a_key_{i}": {"const": i} for i in range(6)},
        "required": [f"a_long_name_of_a_key_{i}" for i in range(6)],
        "additionalProperties": False,
    }
    calls = 0
    forward = llm.model.forward

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*given, **options)

    llm.model.forward = counted  # type: ignore[method-assign]
    try:
        made = llm("Tom", json_schema=schema, temperature=0, max_tokens=300, logprobs=True, top_logprobs=3)
    finally:
        del llm.model.forward  # type: ignore[method-assign]
    assert list(made.parsed.values()) == list(range(6))
    assert calls < len(made.tokens) / 2
    rows = llm.logits([*made.prompt_tokens, *made.tokens])
    from tinyllm import backends

    start = len(made.prompt_tokens) - 1
    assert made.logprobs == [
        float(backends.logprob(rows[start + i], token)) for i, token in enumerate(made.tokens)
    ]
    assert made.top_logprobs is not None
    assert all(len(top) == 3 for top in made.top_logprobs)


@pytest.mark.parametrize("n", range(1, 40, 3))
def test_max_tokens_ends_a_document_early(llm: tinyllm.LLM, n: int) -> None:
    completion = llm("Tom", json_schema=SCHEMA, max_tokens=n, seed=1, **HOT)
    assert len(completion.tokens) <= n
    if completion.finish_reason == "length":
        assert len(completion.tokens) == n
        with pytest.raises(tinyllm.ConstraintError, match="is not finished") as caught:
            completion.parsed  # noqa: B018
        assert repr(completion.text) in str(caught.value)


def test_a_context_that_ends_within_forced_tokens() -> None:
    with tinyllm.load("stories", context=16) as llm:
        completion = llm("Once upon a time", choices=["a long text that has no end in this context"])
        assert completion.finish_reason == "length"
        assert len(completion.prompt_tokens) + len(completion.tokens) == 16


def test_stop_strings_penalties_and_processors_compose(llm: tinyllm.LLM) -> None:
    seen: list[int] = []

    def watch(logits: Any, tokens: Any) -> None:
        seen.append(len(tokens))
        logits[:] = -logits

    made = llm(
        "Tom", json_schema=SCHEMA, processors=[watch], repetition_penalty=1.3, seed=1, max_tokens=300, **HOT
    )
    assert seen
    assert made.finish_reason == "length" or is_valid(made.parsed)
    cut = llm("Tom", json_schema=SCHEMA, stop=['"age"'], seed=1, max_tokens=300, **HOT)
    assert cut.stop_reason == '"age"'
    assert '"age"' not in cut.text
    with pytest.raises(tinyllm.ConstraintError, match="no whole document"):
        cut.parsed  # noqa: B018


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not": ({"json_schema": {"not": {"type": "string"}}}, "not"),
    "unique": ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "format": ({"json_schema": {"type": "string", "format": "no-such"}}, "no-such"),
    "elsewhere": ({"json_schema": {"$ref": "https://example.org/a.json"}}, "example.org"),
    "no json": ({"json_schema": "{"}, "no JSON"),
    "a list": ({"json_schema": "[]"}, "is an object"),
    "regex": ({"regex": "("}, "regex"),
    "empty regex": ({"regex": ""}, "empty"),
    "grammar": ({"grammar": "???"}, "neither Lark nor GBNF"),
    "no choice": ({"choices": []}, "empty"),
    "empty choice": ({"choices": ["a", ""]}, "empty"),
    "two": ({"regex": "a", "choices": ["a"]}, "regex and choices cannot be used together"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_before_anything_is_computed(llm: tinyllm.LLM, name: str) -> None:
    options, words = REFUSED[name]
    before = llm._cache.n_used
    with pytest.raises(tinyllm.ConstraintError, match=re.escape(words)):
        llm("Tom", **options)
    assert llm._cache.n_used == before


def test_wrong_types_and_places(llm: tinyllm.LLM) -> None:
    for options in ({"json_schema": 5}, {"choices": "ab"}, {"choices": [1]}, {"regex": 5}, {"grammar": b""}):
        with pytest.raises(TypeError):
            llm("Tom", **options)  # type: ignore[arg-type]
    with llm.session() as session:
        session.append("Tom")
        with pytest.raises(tinyllm.ArgumentError, match="sample chooses one token"):
            session.sample(regex="a+")
    with pytest.raises(tinyllm.ConstraintError, match="no form was asked"):
        llm("Tom", max_tokens=1).parsed  # noqa: B018


class Bytes:
    """A vocabulary whose tokens are bytes, pieces that are no whole characters, and words."""

    words = (b"\xc3", b"\xe2\x82", b"ab", b"abc", b'"x', b"  ", b"\xa9\xe2", b"true", b'{"')
    special_ids = frozenset({256, 257})
    vocab_size = 258 + len(words)

    def token_bytes(self, token: int) -> bytes:
        if token < 256:
            return bytes([token])
        return (b"<s>", b"</s>", *self.words)[token - 256]

    def encode(self, text: str, bos: bool | None = None, special: bool = False) -> list[int]:
        return list(text.encode())


def walk(vocabulary: Vocabulary, form: Form, seed: int, forces: bool) -> bytes:
    """A text of random allowed tokens."""
    constraint, random, tokens = (
        Grammar(form, vocabulary).start(forces=forces),
        np.random.default_rng(seed),
        [],
    )
    while not constraint.is_over and len(tokens) < 300:
        if forced := constraint.forced():
            tokens += forced
            for token in forced:
                constraint.accept(token)
            continue
        constraint.prepare()
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        assert not bits[vocabulary.vocab_size :].any()
        token = int(random.choice(np.flatnonzero(bits)))
        if token == 257:
            break
        assert token != 256
        constraint.accept(token)
        tokens.append(token)
    return b"".join(vocabulary.tokens[token] for token in tokens)


@pytest.mark.parametrize("forces", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_pieces_that_are_no_whole_characters(seed: int, forces: bool) -> None:
    vocabulary = Vocabulary(Bytes(), Bytes.vocab_size + 3, [257])
    assert walk(vocabulary, form_of(choices=["é€", "é", "abcab"]), seed, forces).decode() in (
        "é€",
        "é",
        "abcab",
    )  # type: ignore[arg-type]
    text = walk(vocabulary, form_of(regex="(é|€|ab){1,4}"), seed, forces).decode()  # type: ignore[arg-type]
    assert re.fullmatch("(é|€|ab){1,4}", text)


def test_rollback_goes_back_to_the_same_masks() -> None:
    vocabulary = Vocabulary(Bytes(), Bytes.vocab_size, [257])
    constraint = Grammar(form_of(regex="(ab|cd)+e"), vocabulary).start(forces=False)  # type: ignore[arg-type]
    masks = [constraint.mask().copy()]
    for token in b"abcd":
        constraint.accept(token)
        masks.append(constraint.mask().copy())
    constraint.rollback(3)
    np.testing.assert_array_equal(constraint.mask(), masks[1])
    constraint.accept(b"b"[0])
    np.testing.assert_array_equal(constraint.mask(), masks[2])
    with pytest.raises(tinyllm.ConstraintError, match="not one that the form allows"):
        constraint.accept(b"z"[0])


def test_a_model_without_a_tokenizer_or_an_end(llm: tinyllm.LLM) -> None:
    with pytest.raises(tinyllm.ConstraintError, match="no token that ends a text"):
        Vocabulary(Bytes(), 300, [])


def test_the_bits_of_a_mask_reach_the_sampler(llm: tinyllm.LLM) -> None:
    """As if all other logits were -inf, whatever else is asked for."""
    from tinyllm.engine.sampling import Sampler

    random = np.random.default_rng(1)
    for size in (1, 31, 32, 33, 64, 1000):
        for seed in range(4):
            logits = random.normal(size=size).astype(np.float32)
            allowed = random.random(size) < 0.3
            allowed[int(random.integers(size))] = True
            bits = np.packbits(allowed, bitorder="little")
            bits = np.pad(bits, (0, -len(bits) % 4), constant_values=255).view(np.uint32)
            for params in (
                tinyllm.SamplingParams(temperature=0, seed=seed),
                tinyllm.SamplingParams(temperature=2, top_k=0, seed=seed),
                tinyllm.SamplingParams(top_k=3, min_p=0.1, logit_bias={0: 3.0}, seed=seed),
            ):
                sampler = Sampler(params, size)
                masked = np.where(allowed, logits, -np.inf).astype(np.float32)
                assert sampler(logits, [], 5, bits).token == sampler(masked, [], 5).token
                assert allowed[sampler(logits, [], 5, bits).token]


def test_reasoning_comes_before_the_form(tmp_path: Path) -> None:
    """A template that opens it leaves it free; a model that may open it can."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
    path = write(tmp_path / "chat.gguf", with_special(*MARKS, "<think>", "</think>", chat_template=template))
    with tinyllm.load(path) as llm:
        close = llm.tokenizer.id_of("</think>")  # type: ignore[union-attr]
        n_thought = 5

        def think(logits: Any, tokens: Any) -> None:
            n = len(tokens) - start
            if n < n_thought:
                logits[close] = -np.inf
                logits[list(llm.eos_ids)] = -np.inf
            elif n == n_thought:
                logits[:] = -np.inf
                logits[close] = 0

        messages = [{"role": "user", "content": "Hi"}]
        start = len(llm.chat_ids(messages))
        made = llm.chat(messages, choices=["yes", "no"], processors=[think], seed=1, max_tokens=40)
        assert made.text in ("yes", "no")
        assert made.reasoning is not None
        assert len(made.tokens) > n_thought


def test_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    options = ("stories", "Tom", "-n", "200", "--seed", "1")
    assert is_valid(json.loads(cli(*options, "--json-schema", str(file)).out))
    assert is_valid(json.loads(cli(*options, "--json-schema", json.dumps(SCHEMA)).out))
    assert cli(*options, "--regex", "[ab]{3}c").out.strip("\n").endswith("c")
    assert cli(*options, "--choices", "yes", "--choices", "no").out.strip() in ("yes", "no")
    assert cli(*options, "--grammar", 'root ::= "x" "y"').out.strip() == "xy"
    made = tmp_path / "out.json"
    made.write_text(cli(*options, "--choices", "yes", "--choices", "no", "--json").out)
    assert "same" in cli("--replay", str(made)).out
    wrong = cli(*options, "--json-schema", '{"not": {}}')
    assert wrong.code != 0
    assert "not" in wrong.err
