"""The interface on miniature random models, with the core: batches and loops, samples, streams, sessions,
scores, chat, limits, and that everything is given back. Texts and perplexities of trained models are in
test_stories.py."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import golden_model, golden_spec, random_ids, random_weights

import tinyllm
from tinyllm import backends, errors, loading
from tinyllm.engine.breakers import breaker_ids
from tinyllm.engine.needs import call_bytes
from tinyllm.engine.sampling import SamplingParams, stream_seed

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONFIG = {**golden_spec("llama3").config, "vocab_size": 400}
pytestmark = pytest.mark.usefixtures("frozen_heap")
PROMPTS = ["Once upon a time", "b", "The end. " * 30, "The end. " * 29 + "?"]


def write_model(path: Path, **options: Any) -> Path:
    write_gguf(path, CONFIG, random_weights(CONFIG, seed=3), **{"tokenizer": small_tokenizer(400), **options})
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[tinyllm.LLM]:
    with tinyllm.load(path, threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def ids_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinyllm.LLM]:
    spec = golden_spec("llama2")
    with tinyllm.load(golden_model(spec, tmp_path_factory.mktemp("ids")), threads=1) as loaded:
        yield loaded


def pages_in_use(model: tinyllm.LLM) -> int:
    gc.collect()
    with model._cache.lock:
        model._cache.collect()
    return model._cache.n_used


def same(a: tinyllm.Completion, b: tinyllm.Completion) -> bool:
    """All that does not depend on time."""
    return (a.text, a.tokens, a.logprobs, a.finish_reason, a.stop_reason, a.seed) == (
        b.text,
        b.tokens,
        b.logprobs,
        b.finish_reason,
        b.stop_reason,
        b.seed,
    )


def test_a_list_equals_a_loop(model: tinyllm.LLM) -> None:
    options: dict[str, Any] = {"seed": 5, "max_tokens": 30, "logprobs": True}
    batch = model(PROMPTS, **options)
    for prompt, completion in zip(PROMPTS, batch, strict=True):
        assert same(completion, model(prompt, **options))
    assert pages_in_use(model) == 0


def test_one_call_chooses_the_tokens_of_a_whole_batch(
    model: tinyllm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one a text; a text with a processor, which is Python code, chooses for itself."""
    calls: list[int] = []
    original = backends.sample_rows

    def counted(rows: list[Any], threads: int) -> Any:
        calls.append(len(rows))
        return original(rows, threads)

    monkeypatch.setattr(backends, "sample_rows", counted)
    prompts = [[1, 2], [3, 4], [5, 6]]
    model(prompts, n=2, max_tokens=4, seed=1)
    assert calls == [6, 6, 6, 6]
    calls.clear()
    model(prompts, max_tokens=4, seed=1, processors=[lambda logits, tokens: None])
    assert calls == []


def test_a_text_goes_on_after_the_choice_that_another_thread_makes_for_it(
    model: tinyllm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that look for their news every 20 ms do not see it before their token is chosen."""
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.5}
    prompts = [[1, 2], [3, 4, 5], [6]]
    want = [model(prompt, seed=i, **options).tokens for i, prompt in enumerate(prompts)]
    original = backends.sample_rows

    def slow(rows: list[Any], threads: int) -> Any:
        time.sleep(0.06)
        return original(rows, threads)

    monkeypatch.setattr(backends, "sample_rows", slow)
    with ThreadPoolExecutor(len(prompts)) as pool:
        calls = [
            pool.submit(model, prompt, seed=i, cancel=lambda: False, **options)
            for i, prompt in enumerate(prompts)
        ]
        assert [call.result(60).tokens for call in calls] == want


def test_samples_equal_solo_runs_with_their_seeds(model: tinyllm.LLM) -> None:
    samples = model(PROMPTS[2], n=8, seed=7, temperature=1, max_tokens=20, logprobs=True)
    assert [sample.seed for sample in samples] == [stream_seed(7, i) for i in range(8)]
    assert len({sample.text for sample in samples}) == 8
    for sample in samples:
        assert same(sample, model(PROMPTS[2], seed=sample.seed, temperature=1, max_tokens=20, logprobs=True))


def test_shapes_of_results(model: tinyllm.LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 1}
    assert isinstance(model("a", **options), tinyllm.Completion)
    assert [len(model("a", n=n, **options)) for n in (1, 2)] == [1, 2]
    assert [type(c) for c in model(["a", [1, 2]], **options)] == [tinyllm.Completion] * 2
    assert [len(group) for group in model(["a", "b", "c"], n=2, **options)] == [2, 2, 2]
    assert isinstance(model(np.array([1, 2]), **options), tinyllm.Completion)
    none: list[str] = []
    assert model(none) == []


def test_without_a_seed_each_result_has_its_own(model: tinyllm.LLM) -> None:
    batch = model(["a", "a", "a"], max_tokens=20)
    assert len({c.seed for c in batch}) == 3
    assert same(batch[1], model("a", max_tokens=20, seed=batch[1].seed))


def test_text_and_its_ids_are_the_same_prompt(model: tinyllm.LLM) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("Once upon")
    assert ids[0] == model.tokenizer.bos_id
    assert same(model("Once upon", seed=1, max_tokens=9), model(ids, seed=1, max_tokens=9))


def test_special_tokens_in_a_text_are_parsed_only_when_asked(model: tinyllm.LLM) -> None:
    plain = model("a</s>", max_tokens=1).prompt_tokens
    special = model("a</s>", special=True, max_tokens=1).prompt_tokens
    assert (2 in plain, 2 in special) == (False, True)


def test_completion_fields(model: tinyllm.LLM) -> None:
    c = model("Once", max_tokens=5, temperature=0, top_logprobs=3)
    assert str(c) == c.text
    assert len(c.tokens) == c.timings.generated_tokens == 5
    assert c.timings.prompt_tokens == len(c.prompt_tokens)
    assert c.logprobs is not None
    assert c.top_logprobs is not None
    for token, logprob, top in zip(c.tokens, c.logprobs, c.top_logprobs, strict=True):
        assert top[0] == (token, logprob)  # greedy takes the most likely
        assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
    assert c.device == "cpu"
    assert model("Once", max_tokens=5).logprobs is None
    assert 0 < c.timings.prompt_s < 60
    assert 0 < c.timings.load_s < 60


def test_logits_do_not_depend_on_how_they_are_asked_for(model: tinyllm.LLM) -> None:
    """At once, token by token, in a call that shares the prefix, beside others: the same bits."""
    ids = random_ids(CONFIG, 1, 200)
    logits = model.logits(ids)
    assert logits.shape == (200, 400)
    assert logits.dtype == np.float32
    with model.session() as session:
        for i, token in enumerate(ids):
            session.append([token])
            np.testing.assert_array_equal(session.logits, logits[i])
        with model.session() as other:
            other.append(ids[:150])
            np.testing.assert_array_equal(other.logits, logits[149])


def test_score_is_what_the_logits_say(model: tinyllm.LLM) -> None:
    ids = random_ids(CONFIG, 2, 150)
    score, logits = model.score(ids), model.logits(ids).astype(np.float64)
    shifted = logits[:-1] - logits[:-1].max(axis=1, keepdims=True)
    expected = (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))[np.arange(149), ids[1:]]
    # One rounding to float32, and an exp and a log good to a few units in float32's last place.
    np.testing.assert_allclose(score.logprobs, expected, rtol=2.0**-23, atol=8 * 2.0**-24)
    assert score.tokens == ids
    assert score.total == math.fsum(score.logprobs)
    assert math.isclose(score.perplexity, math.exp(-score.total / 149))
    assert math.isnan(model.score(ids[:1]).perplexity)
    assert pages_in_use(model) == 0


def test_likeliest_tokens_of_scores_and_pieces(model: tinyllm.LLM) -> None:
    made = model("Once", max_tokens=6, temperature=0, top_logprobs=3)
    assert made.top_logprobs is not None
    pieces = list(model.stream("Once", max_tokens=6, temperature=0, top_logprobs=3))
    assert [list(p.top_logprobs) for p in pieces if p.token is not None] == made.top_logprobs
    score = model.score(made.prompt_tokens + made.tokens, top_logprobs=3)
    assert score.top_logprobs is not None
    for found, same in zip(score.top_logprobs[-6:], made.top_logprobs, strict=True):
        assert [token for token, _ in found] == [token for token, _ in same]
        assert [value for _, value in found] == pytest.approx([value for _, value in same], abs=1e-4)
    assert model.score("Once").top_logprobs is None
    with pytest.raises(tinyllm.ArgumentError, match="top_logprobs is -1"):
        model.score("Once", top_logprobs=-1)


def test_timings_count_what_was_there_already(model: tinyllm.LLM) -> None:
    prompt = "Tim and his red kite went up the hill to see how far it would fly. " * 4
    first = model(prompt, max_tokens=2)
    again = model(prompt, max_tokens=2)
    assert first.timings.cached_tokens == 0
    assert 0 < again.timings.cached_tokens < len(again.prompt_tokens)


def test_score_agrees_with_generation(model: tinyllm.LLM) -> None:
    c = model(PROMPTS[2], seed=3, max_tokens=40, logprobs=True)
    score = model.score(c.prompt_tokens + c.tokens)
    assert score.logprobs[len(c.prompt_tokens) - 1 :] == c.logprobs


def test_stream_is_the_call_in_pieces(model: tinyllm.LLM) -> None:
    stream = model.stream("Once", seed=2, max_tokens=60, logprobs=True)
    pieces = list(stream)
    whole = model("Once", seed=2, max_tokens=60, logprobs=True)
    assert "".join(str(piece) for piece in pieces) == whole.text
    assert [piece.token for piece in pieces if piece.token is not None] == whole.tokens
    assert [piece.logprob for piece in pieces if piece.token is not None] == whole.logprobs
    assert same(stream.completion, whole)


def test_stream_left_early(model: tinyllm.LLM) -> None:
    with model.stream("Once", seed=2, max_tokens=60, temperature=1) as stream:
        next(stream)
        next(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.tokens == model("Once", seed=2, max_tokens=2, temperature=1).tokens
    assert pages_in_use(model) == 0


def test_stop_string(model: tinyllm.LLM) -> None:
    whole = model("Once", seed=4, max_tokens=60)
    stop = whole.text[10:13]
    c = model("Once", seed=4, max_tokens=60, stop=["never in it", stop])
    assert c.text == whole.text[: whole.text.index(stop)]
    assert (c.finish_reason, c.stop_reason) == ("stop", stop)
    assert whole.tokens[: len(c.tokens)] == c.tokens


def test_end_of_text(model: tinyllm.LLM) -> None:
    c = model("Once", seed=4, logit_bias={2: 1000.0})
    assert (c.text, c.tokens, c.finish_reason, c.stop_reason) == ("", [], "stop", 2)


def test_until_the_context_is_full(path: Path) -> None:
    with tinyllm.load(path, context=50) as small:
        assert small.context == 50
        c = small([1, 2, 3], logit_bias={2: -math.inf})
        assert (len(c.tokens), c.finish_reason) == (47, "length")


def test_a_processor_is_any_callable(model: tinyllm.LLM) -> None:
    seen = []

    def only_even(logits: Any, tokens: Any) -> None:
        seen.append(len(tokens))
        logits[1::2] = -np.inf

    c = model("Once", seed=1, max_tokens=20, temperature=1, processors=[only_even])
    assert all(token % 2 == 0 for token in c.tokens)
    assert seen[0] == len(c.prompt_tokens)

    def broken(logits: Any, tokens: Any) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        model(["Once", "upon"], processors=[broken])
    assert pages_in_use(model) == 0


def test_a_processor_may_use_the_model(model: tinyllm.LLM) -> None:
    scores = []

    def look(logits: Any, tokens: Any) -> None:
        scores.append(model.score(list(tokens)).total)

    model("Once upon", max_tokens=3, processors=[look])
    assert len(scores) == 3


def test_params_and_fields_over_them(model: tinyllm.LLM) -> None:
    params = SamplingParams(temperature=1, seed=3, max_tokens=10)
    assert same(model("a", params), model("a", temperature=1, seed=3, max_tokens=10))
    assert len(model("a", params, max_tokens=4, logit_bias={2: -math.inf}).tokens) == 4


def test_cancel(model: tinyllm.LLM) -> None:
    n_asked = []

    def after_some() -> bool:
        n_asked.append(1)
        return len(n_asked) > 10

    c = model("Once", seed=1, cancel=after_some)
    assert c.finish_reason == "cancelled"
    assert c.tokens == model("Once", seed=1, max_tokens=300).tokens[: len(c.tokens)]
    never = model(["a", "b"], cancel=lambda: True)
    assert [(c.finish_reason, c.tokens) for c in never] == [("cancelled", [])] * 2
    assert pages_in_use(model) == 0


def test_the_models_own_sampling_defaults(tmp_path: Path) -> None:
    path = write_model(tmp_path / "greedy.gguf", metadata={"general.sampling.temp": 0.0})
    with tinyllm.load(path) as greedy:
        ids = greedy("Once", max_tokens=10).prompt_tokens
        first = greedy(ids, max_tokens=10).tokens
        assert first[0] == greedy.logits(ids)[-1].argmax()
        assert greedy(ids, max_tokens=10).tokens == first
        assert len({tuple(greedy(ids, max_tokens=10, temperature=2, top_p=1).tokens) for _ in range(3)}) > 1


# Chat.


def test_chat_renders_and_has_one_bos(tmp_path: Path) -> None:
    path = write_model(tmp_path / "chat.gguf", tokenizer={**small_tokenizer(400), "chat_template": TEMPLATE})
    messages = [{"role": "user", "content": "Hello"}]
    with tinyllm.load(path) as chat:
        assert chat.tokenizer is not None
        ids = chat.chat_ids(messages)
        assert ids == chat.tokenizer.encode("<s>user: Hello\nassistant: ", bos=False, special=True)
        assert ids.count(1) == 1
        c = chat.chat(messages, seed=1, max_tokens=10)
        assert c.prompt_tokens == ids
        assert same(c, chat(ids, seed=1, max_tokens=10))
        stream = chat.chat(messages, stream=True, seed=1, max_tokens=10)
        assert "".join(map(str, stream)) == c.text
        template = "{{ bos_token }}{{ messages[0].content }}{{ x }}"
        other = chat.chat_ids(messages, chat_template=template, template_args={"x": 3})
        assert other == chat.tokenizer.encode("<s>Hello3", bos=False, special=True)


def test_chat_of_special_tokens_in_messages(tmp_path: Path) -> None:
    path = write_model(tmp_path / "chat.gguf", tokenizer={**small_tokenizer(400), "chat_template": TEMPLATE})
    messages = [{"role": "user", "content": "a</s><s>b"}]
    with tinyllm.load(path) as chat:
        assert chat.tokenizer is not None
        ids = chat.chat_ids(messages)
        assert (ids.count(1), ids.count(2)) == (1, 0)
        assert chat.tokenizer.decode(ids, special=True) == "<s> user: a</s><s>b\nassistant: "
        both = chat.chat_ids(messages, special_in_messages=True)
        assert (both.count(1), both.count(2)) == (2, 1)
        options: dict[str, Any] = {"seed": 1, "max_tokens": 3}
        assert chat.chat(messages, **options).prompt_tokens == ids
        assert chat.chat(messages, special_in_messages=True, **options).prompt_tokens == both
        stream = chat.chat(messages, stream=True, special_in_messages=True, **options)
        assert list(stream)
        assert stream.completion.prompt_tokens == both


def test_a_template_of_the_callers_is_kept_and_warns_once(
    model: tinyllm.LLM, caplog: pytest.LogCaptureFixture
) -> None:
    for template in ("{{ messages[0].content }}", "{{ messages[0].content }}!") * 2:
        for _ in range(2):
            model.chat_ids(
                [{"role": "user", "content": "a"}], chat_template=template, template_args={"unread": 1}
            )
    assert len(caplog.messages) == 4  # each time that it is another one than before


def test_a_prompt_with_the_text_of_special_tokens_says_so_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tinyllm.load(path) as llm:
        llm("Once</s", max_tokens=1)
        llm("Once</s>", max_tokens=1, special=True)
        llm([1, 2], max_tokens=1)
        assert not caplog.messages
        for _ in range(2):
            assert 2 not in llm("Once</s>", max_tokens=1).prompt_tokens
            with llm.session() as session:
                session.append("Once</s>")
        (message,) = caplog.messages
        assert "the prompt holds '</s>', which is read as text" in message
        assert "special=True" in message
        assert "--special" in message
    with tinyllm.load(path) as llm, llm.session() as session:
        session.append("Once</s>")
    assert len(caplog.messages) == 2


def test_chat_without_a_template(model: tinyllm.LLM) -> None:
    with pytest.raises(errors.TemplateError, match="chat_template="):
        model.chat([{"role": "user", "content": "Hello"}])


def test_chat_without_a_prompt(model: tinyllm.LLM) -> None:
    """A list of no ids is no batch of no prompts."""
    for stream in (False, True):
        with pytest.raises(errors.TemplateError, match="renders nothing for these messages"):
            model.chat([{"role": "user", "content": "Hello"}], chat_template="{# no #}", stream=stream)  # type: ignore[call-overload]


# Sessions.


def test_session_goes_on_like_a_call(model: tinyllm.LLM) -> None:
    with model.session(seed=9) as session:
        session.append("Once upon a time")
        first = session.generate(max_tokens=10, logprobs=True)
        assert same(first, model("Once upon a time", seed=9, max_tokens=10, logprobs=True))
        assert session.tokens == first.prompt_tokens + first.tokens
        second = session.generate(max_tokens=10, logprobs=True)
        whole = model("Once upon a time", seed=9, max_tokens=20, logprobs=True)
        assert first.tokens + second.tokens == whole.tokens
        assert model.tokenizer is not None
        assert session.text == model.tokenizer.decode(session.tokens)
    assert pages_in_use(model) == 0


def test_session_samples_one_token(model: tinyllm.LLM) -> None:
    with model.session(seed=9) as session:
        session.append("Once upon a time")
        tokens = [session.sample() for _ in range(5)]
        assert session.tokens[-5:] == tokens
    assert tokens == model("Once upon a time", seed=9, max_tokens=5).tokens


def test_forks_go_their_own_ways(model: tinyllm.LLM) -> None:
    with model.session(seed=4) as session:
        session.append(PROMPTS[2])
        forks = [session.fork() for _ in range(3)]
        assert [fork.seed for fork in forks] == [stream_seed(4, i) for i in (1, 2, 3)]
        texts = [fork.generate(max_tokens=15, temperature=1) for fork in [session, *forks]]
        for i, c in enumerate(texts):
            assert c.tokens == model(PROMPTS[2], seed=stream_seed(4, i), temperature=1, max_tokens=15).tokens
        for fork in forks:
            fork.close()
    assert pages_in_use(model) == 0


def test_only_the_first_text_of_a_session_gets_a_bos(model: tinyllm.LLM) -> None:
    with model.session() as session:
        session.append("Once")
        session.append("upon")
        assert session.tokens.count(1) == 1


def test_session_in_a_full_context(path: Path) -> None:
    with tinyllm.load(path, context=20) as small, small.session() as session:
        session.append(list(range(3, 15)))
        with pytest.raises(errors.ContextError, match="24 tokens do not fit into the context of 20"):
            session.append(list(range(3, 15)))
        assert session.tokens == list(range(3, 15))
        assert session.generate(logit_bias={2: -math.inf}).finish_reason == "length"
        with pytest.raises(errors.ContextError, match="room for an answer"):
            session.sample()


def test_an_empty_session_has_nothing_to_say(model: tinyllm.LLM) -> None:
    with model.session() as session:
        for act in (session.sample, session.generate, lambda: session.logits):
            with pytest.raises(errors.ArgumentError, match="empty"):
                act()


# What does not work, and says so.


def test_ids_only(ids_only: tinyllm.LLM) -> None:
    c = ids_only([1, 2, 3], max_tokens=5, seed=1)
    assert c.text == ""
    assert len(c.tokens) == 5
    for act in (ids_only, ids_only.score, ids_only.logits, ids_only.session().append, ids_only.stream):
        with pytest.raises(errors.ArgumentError, match="no tokenizer"):
            act("text")


def test_prompts_that_do_not_fit(path: Path) -> None:
    with tinyllm.load(path, context=20) as small:
        ids = list(range(3, 23))
        assert len(small.logits(ids)) == 20
        assert len(small.score(ids).logprobs) == 19
        with pytest.raises(errors.ContextError, match=r"20 tokens do not fit .* 20 with room"):
            small(ids)
        for act in (small, small.logits, small.score, small.stream):
            with pytest.raises(errors.ContextError, match="21 tokens do not fit into the context of 20"):
                act([*ids, 3])
        assert len(small(ids[:-1]).tokens) == 1
        with pytest.raises(errors.ContextError):
            small([[1, 2], ids])


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([400], {}, errors.ArgumentError, "token id 400 is not in the vocabulary, 0 to 399"),
        ([3, -1], {}, errors.ArgumentError, "token id -1"),
        ([[]], {}, errors.ArgumentError, "empty"),
        ("a", {"n": 0}, errors.ArgumentError, "n is 0"),
        ("a", {"temperature": -1}, errors.ArgumentError, "temperature"),
        ("a", {"temprature": 1}, TypeError, "temprature"),
        ([3, 1.5], {}, TypeError, "float"),
    ],
)
def test_bad_arguments(
    model: tinyllm.LLM, prompt: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model(prompt, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"cache_type": "f8"}, "cache_type is 'f8', expected one of f32, f16, q8_0"),
        ({"weights": "q9"}, "'q9' is no quantization; there are f32"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_options_of_load(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ArgumentError, match=message):
        tinyllm.load(path, **options)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file.*stories"):
        tinyllm.load(tmp_path / "none.gguf")


# Loading.


def test_ways_to_name_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory, the weights in it, a path with ~, and a path that is called like the bundled model."""
    spec = golden_spec("llama2")
    directory = golden_model(spec, tmp_path / "stories")
    ids = random_ids(spec.config, 1, 20)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    results = []
    for name in (directory, directory / "model.safetensors", "~/stories", "stories"):
        with tinyllm.load(name) as loaded:
            results.append(loaded.logits(ids))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_progress_ends_at_the_total(path: Path) -> None:
    calls: list[tuple[int, int]] = []
    tinyllm.load(path, progress=lambda done, total: calls.append((done, total))).close()
    done = [d for d, _ in calls]
    assert done == sorted(set(done))
    assert {total for _, total in calls} == {done[-1]}


@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4", "bf16"])
def test_quantizing_while_loading_rounds_as_the_converter(format: str, path: Path, tmp_path: Path) -> None:
    written = write_model(tmp_path / "written.gguf", format="Q4_0")
    id = backends.FORMAT_IDS[format]
    with tinyllm.load(path, weights=format) as loaded:
        for name, hf in (("w_down", "mlp.down_proj"), ("wv", "self_attn.v_proj")):
            w = random_weights(CONFIG, seed=3)[f"model.layers.1.{hf}.weight"]
            blocks = backends.convert(w.view(np.uint8).ravel(), 0, id, *w.shape)
            values = backends.convert(blocks.ravel(), id, 0, *w.shape).view(np.float32)
            np.testing.assert_array_equal(loaded.model.unpack(name, 1), values)
        floats = 4 * sum(w.size for w in random_weights(CONFIG, seed=3).values())
        assert loaded.model.weight_bytes < 0.6 * floats
    with pytest.raises(errors.ArgumentError, match="quantized already"):
        tinyllm.load(written, weights=format)


def test_packed_size_is_estimated_well(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal before loading goes by what loading then takes."""
    estimates: list[int] = []
    fit = loading.fit_memory

    def noting(config: Any, cache_type: Any, weight_bytes: int, *rest: Any) -> tuple[int, int]:
        estimates.append(weight_bytes)
        return fit(config, cache_type, weight_bytes, *rest)

    monkeypatch.setattr(loading, "fit_memory", noting)
    with tinyllm.load(path) as loaded:
        # Vectors, which weight_bytes may leave out, are less than 1 % here.
        assert abs(estimates[0] / loaded.model.weight_bytes - 1) < 0.01


def test_page_size_is_known_before_loading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "free_memory", lambda: 1 << 40)
    for cache_type in ("f16", "f32"):
        with tinyllm.load(path, cache_type=cache_type, context=64) as loaded:
            page_bytes = loaded._cache.pool.page_bytes
        weight_bytes = 1 << 20
        limit = weight_bytes + 3 * page_bytes + call_bytes(loaded.config, 3 * 64)
        monkeypatch.setattr(backends, "free_memory", lambda limit=limit: limit)
        assert loading.fit_memory(loaded.config, cache_type, weight_bytes, 3 * 64, "")[0] == 3 * 64
        with pytest.raises(errors.MemoryLimitError):
            loading.fit_memory(loaded.config, cache_type, weight_bytes, 3 * 64 + 1, "")
        monkeypatch.setattr(backends, "free_memory", lambda: 1 << 40)


def test_a_model_too_large_is_refused_before_anything_is_allocated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = backends.live_allocations()
    monkeypatch.setattr(backends, "free_memory", lambda: 100_000)
    monkeypatch.setattr(backends, "Model", None)
    with pytest.raises(errors.MemoryLimitError, match=r"weights take 1\.\d\d MB.*512.*0\.10 MB are free"):
        tinyllm.load(path)
    assert backends.live_allocations() == before


def test_the_context_is_lowered_to_what_fits(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tinyllm.load(path) as loaded:
        assert loaded.context == 512
        needed = loaded.model.weight_bytes + 2 * loaded._cache.pool.page_bytes + 50_000
        needed += call_bytes(loaded.config, 512)
    monkeypatch.setattr(backends, "free_memory", lambda: int(needed / 0.8))
    with tinyllm.load(path) as loaded:
        assert loaded.context % 64 == 0
        assert 64 <= loaded.context < 512
    assert f"context {loaded.context} instead of 512" in caplog.text
    with pytest.raises(errors.MemoryLimitError, match=r"a context of \d+ would fit"):
        tinyllm.load(path, context=100_000)


def test_close_gives_everything_back(path: Path) -> None:
    before = backends.live_allocations()
    loaded = tinyllm.load(path)
    assert backends.live_allocations() > before
    session = loaded.session()
    session.append("Once")
    stream = loaded.stream("upon")
    next(stream)
    loaded("a time", n=3, max_tokens=5)
    loaded.close()
    assert backends.live_allocations() == before
    for act in (
        lambda: loaded("a"),
        lambda: next(stream),
        lambda: session.generate(max_tokens=2),
        lambda: loaded.logits("a"),
    ):
        with pytest.raises(errors.ModelClosedError):
            act()
    session.close()
    stream.close()
    loaded.close()
    with tinyllm.load(path) as again:
        again("a", max_tokens=1)
    assert backends.live_allocations() == before


def test_a_load_that_fails_gives_everything_back(path: Path) -> None:
    before = backends.live_allocations()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tinyllm.load(path, progress=stop)
    assert backends.live_allocations() == before


def test_a_damaged_file_gives_everything_back(path: Path, tmp_path: Path) -> None:
    before = backends.live_allocations()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(errors.FormatError, match="truncated"):
        tinyllm.load(cut)
    assert backends.live_allocations() == before


# ---- what the text so far forbids


class Letters:
    """A tokenizer of a vocabulary that fits on a line; encodes with the longest token that fits."""

    texts = (
        b"a",
        b"b",
        b"ab",
        b"\n",
        b"b\n\n",
        b": ",
        b"x:",
        b"x",
        b"\xc3",
        b"\xa9",
        b"\xc3\xa9c",
        b" ",
        b":",
    )
    vocab_size = len(texts)

    def token_bytes(self, token: int) -> bytes:
        return self.texts[token]

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        assert bos is False
        data, ids = text.encode(), []
        while data:
            i = max(
                (i for i, t in enumerate(self.texts) if data.startswith(t)), key=lambda i: len(self.texts[i])
            )
            ids.append(i)
            data = data[len(self.texts[i]) :]
        return ids


@pytest.mark.parametrize(
    ("strings", "ids"),
    [
        (["\n"], [[3], [4]]),
        ([":"], [[5], [6], [12]]),
        (["b:"], [[1, 12], [2, 12]]),  # ends with b, then what is left
        (["x: "], [[6, 11], [7, 5]]),
        (["ab"], [[2], [0, 1]]),
        (["é"], [[10], [8, 9]]),  # a character in pieces
        (["xé"], [[7, 8, 9]]),
        (["\n", "\n"], [[3], [4]]),
        (["é:", ": "], [[8, 9, 12], [5], [6, 11], [12, 11]]),
        ([], []),
    ],
)
def test_breakers_are_all_ways_to_spell_them(strings: list[str], ids: list[list[int]]) -> None:
    found = breaker_ids(Letters(), strings)  # type: ignore[arg-type]
    assert sorted(found) == sorted(ids)


def test_repetitions_end_at_breakers(model: tinyllm.LLM) -> None:
    """With three tokens to choose from there are repetitions, which DRY makes shorter; where every token is a
    breaker there are none to it."""
    assert model.tokenizer is not None
    few = [i for i in range(400) if i not in (70, 80, 90)]
    options: dict[str, Any] = {"suppress_tokens": few, "temperature": 0, "max_tokens": 40}
    dry = {**options, "dry_multiplier": 100.0, "dry_penalty_last_n": -1}

    def longest(tokens: list[int]) -> int:
        n = len(tokens)
        return max(
            k for k in range(n) for i in range(n - k) if tokens[i : i + k] in pieces(tokens[i + 1 :], k)
        )

    def pieces(tokens: list[int], k: int) -> list[list[int]]:
        return [tokens[i : i + k] for i in range(len(tokens) - k + 1)]

    plain = model("a", **options).tokens
    varied = model("a", **dry, dry_sequence_breakers=()).tokens
    assert longest(varied) < longest(plain)
    everything = [chr(i) for i in range(1, 256)]
    assert model("a", **dry, dry_sequence_breakers=everything).tokens == plain
    assert model("a", **dry, dry_sequence_breakers=()).tokens == varied
    with pytest.raises(errors.ArgumentError, match="all 400 logits are -inf after logit bias, bans"):
        model("a", suppress_tokens=range(400))


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": range(3, 200, 2), "min_tokens": 5},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[5, 6], [7]]},
        {"dry_multiplier": 0.8, "dry_penalty_last_n": -1},
        {"xtc_probability": 0.5, "xtc_threshold": 0.01},
        {"begin_suppress_tokens": [5], "repetition_penalty": 1.2, "penalty_window": -1},
    ],
    ids=lambda options: "+".join(options),
)
def test_a_batch_of_bans_equals_a_loop(model: tinyllm.LLM, options: dict[str, Any]) -> None:
    both = {**options, "seed": 5, "max_tokens": 20, "logprobs": True}
    batch = model(PROMPTS, n=2, **both)
    for prompt, samples in zip(PROMPTS, batch, strict=True):
        for sample in samples:
            assert same(sample, model(prompt, **{**both, "seed": sample.seed}))
    with model.session(seed=5) as session:
        session.append(PROMPTS[0])
        tokens = [session.sample(**{k: v for k, v in both.items() if k != "max_tokens"}) for _ in range(9)]
    assert tokens == batch[0][0].tokens[:9]


def test_a_session_counts_from_what_was_appended(model: tinyllm.LLM) -> None:
    def is_first(session: tinyllm.Session) -> bool:
        """Whether the next token is what begin_suppress_tokens looks at."""
        with session.fork() as plain, session.fork() as other:
            token = plain.sample(temperature=0)
            return other.sample(temperature=0, begin_suppress_tokens=[token]) != token

    with model.session(seed=1) as session:
        session.append([5, 6])
        assert is_first(session)
        session.sample(temperature=0)
        assert not is_first(session)
        session.append([7])
        assert is_first(session)
        session.generate(temperature=0, max_tokens=2)
        assert not is_first(session)
