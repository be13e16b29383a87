"""Guesses change nothing but the time: whoever guesses, however often it is right, every token, logprob and
piece is the one that there would be without, and what was guessed wrongly leaves no trace in the pages."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_engine import VOCAB, slots_of
from helpers_models import golden_model, golden_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import Form, assert_alike, expected, formed, generation, make_engine, pages_in_use, run, text

import tinyllm
from tinyllm.engine import speculation
from tinyllm.engine.engine import Engine, Generation
from tinyllm.engine.guessers import Called, Lookup, Translation
from tinyllm.engine.kvcache import PAGE
from tinyllm.engine.speculation import Costs, Guesser, Guessing, Record

# ---- with the engine's mock model


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess is computed, whatever it costs."""
    be_eager(monkeypatch)


def be_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guessing, "_fitting", lambda self, grade, most: most)
    monkeypatch.setattr(Guessing, "_left_s", lambda self, plain_s: 1.0)
    monkeypatch.setattr(Costs, "most", lambda self: 1000)


class Oracle:
    """Knows the text, and is wrong every so many tokens."""

    def __init__(self, n_prompt: int, answer: Sequence[int], wrong_every: int = 0) -> None:
        self._n_prompt, self._answer, self._wrong_every = n_prompt, list(answer), wrong_every

    def propose(self, tokens: list[int], n: int) -> list[int]:
        done = len(tokens) - self._n_prompt
        said = self._answer[done : done + n]
        if self._wrong_every:
            said = [t ^ 1 if (done + i) % self._wrong_every == 0 else t for i, t in enumerate(said)]
        return said


class Random:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def propose(self, tokens: list[int], n: int) -> list[int]:
        return [self._random.randrange(VOCAB) for _ in range(self._random.randint(0, n))]


def raises(tokens: list[int], n: int) -> list[int]:
    raise RuntimeError("no idea")


class Says:
    def __init__(self, said: Any) -> None:
        self._said = said

    def propose(self, tokens: list[int], n: int) -> Any:
        return self._said


def guesser(kind: int, prompt: list[int], answer: list[int]) -> Guesser:
    makers: list[Callable[[], Guesser]] = [
        Lookup,
        lambda: Oracle(len(prompt), answer),
        lambda: Oracle(len(prompt), answer, 3),
        lambda: Oracle(len(prompt), answer, 7),
        lambda: Random(kind),
        lambda: Called(raises),
        lambda: Called(lambda tokens, n: [answer[0] if answer else 1, 1 << 40, -1]),
        lambda: Called(lambda tokens, n: ["a", None]),  # type: ignore[list-item]
        lambda: Called(lambda tokens, n: None),  # type: ignore[arg-type, return-value]
    ]
    return makers[kind % len(makers)]()


def guess_with(g: Generation, engine: Engine, who: Guesser) -> Guessing:
    g.guessing = Guessing(who, engine.costs, Record(), VOCAB)
    return g.guessing


def assert_shared_pages_hold_no_guess(engine: Engine, texts: list[list[int]]) -> None:
    """Every page that others may find holds what its key stands for, of a text that there is."""
    known: dict[tuple[int, bytes], list[int]] = {}
    for tokens in texts:
        sequence = engine.sequence(tokens)
        for i in range(len(tokens) // PAGE):
            for table in range(len(engine.cache.windows)):
                known[table, sequence.key(i)] = [
                    slot + table for slot in slots_of(tokens)[i * PAGE : (i + 1) * PAGE]
                ]
    pool: Any = engine.cache.pool
    for key, page in engine.cache._page_of.items():
        assert pool.pages[page].tolist() == known[key]


@settings(max_examples=12, deadline=None)
@given(
    texts=st.lists(
        st.tuples(st.integers(1, 140), st.integers(0, 2), st.integers(0, 5), st.integers(0, 17)),
        min_size=1,
        max_size=5,
    ),
    n_samples=st.integers(1, 3),
    chunk=st.sampled_from([1, 3, 16, 512]),
    windows=st.sampled_from([(0,), (0, 70)]),
    max_pages=st.sampled_from([24, 64]),
    max_tokens=st.integers(1, 70),
    context=st.sampled_from([150, 600]),
)
def test_whoever_guesses_the_texts_are_the_same(
    texts: list[tuple[int, int, int, int]],
    n_samples: int,
    chunk: int,
    windows: tuple[int, ...],
    max_pages: int,
    max_tokens: int,
    context: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        be_eager(patch)
        engine = make_engine(max_pages, windows, chunk)
        groups, answers, n_right = [], {}, 0
        for length, prompt_seed, seed, kind in texts:
            prompt = text(length, prompt_seed)
            runner = threading.get_ident()
            group = [
                generation(
                    engine if i == 0 else None,
                    prompt,
                    seed + i,
                    max_tokens=max_tokens,
                    context=context,
                    **({"runner": runner} if i == 0 else {}),
                )
                for i in range(n_samples)
            ]
            for i, g in enumerate(group):
                answer = expected(prompt, seed + i, max_tokens, windows, context)
                answers[g] = prompt, answer
                guess_with(g, engine, guesser(kind + i, prompt, answer))
            groups.append(group)
        logging.disable(logging.WARNING)
        try:
            pieces = run(engine, groups)
        finally:
            logging.disable(logging.NOTSET)
        for g, (_, answer) in answers.items():
            assert g.tokens == answer
            assert [
                piece.token for owner, piece in pieces if owner is g and piece.token is not None
            ] == answer
            assert g.guessing is not None
            n_right += g.guessing.accepted
        assert pages_in_use(engine) == 0
        assert_shared_pages_hold_no_guess(engine, [p + a for p, a in answers.values()])


@pytest.mark.usefixtures("eager")
def test_right_guesses_save_calls() -> None:
    engine, plain = make_engine(), make_engine()
    answer = expected(text(10), 3, 64, eos=None)
    g = generation(engine, text(10), 3, max_tokens=64, eos_ids=frozenset())
    guessing = guess_with(g, engine, Oracle(10, answer))
    run(engine, [[g]])
    assert g.tokens == answer
    model: Any = engine.model
    assert model.calls == [10, 16, 16, 16, 15]  # the first token comes of the prompt, then 16 a call
    assert (guessing.drafted, guessing.accepted) == (59, 59)
    del plain


@pytest.mark.usefixtures("eager")
def test_a_wrong_guess_costs_no_page() -> None:
    engine = make_engine()
    prompt = text(PAGE - 3)
    answer = expected(prompt, 0, 10, eos=None)
    g = generation(engine, prompt, 0, max_tokens=10, eos_ids=frozenset())
    guess_with(g, engine, Oracle(len(prompt), answer, 2))
    run(engine, [[g]])
    assert g.tokens == answer
    assert len(engine.cache._page_of) == 1
    assert_shared_pages_hold_no_guess(engine, [prompt + answer])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("n_guesses", [1, 4, 15])
def test_guesses_take_no_page_from_anybody(n_guesses: int) -> None:
    """Where the pool is full a call takes the guesses that fit into the last page."""
    engine = make_engine(max_pages=1)
    prompt = text(PAGE - 12)
    answer = expected(prompt, 0, 12, eos=None)
    g = generation(engine, prompt, 0, max_tokens=12, eos_ids=frozenset())
    guess_with(g, engine, Says((answer * 2)[1 : 1 + n_guesses]))
    run(engine, [[g]])
    assert g.tokens == answer


@pytest.mark.usefixtures("eager")
def test_a_stream_that_is_left_holds_what_was_read() -> None:
    engine = make_engine()
    answer = expected(text(10), 3, 40, eos=None)
    g = generation(engine, text(10), 3, max_tokens=40, eos_ids=frozenset())
    guess_with(g, engine, Oracle(10, answer))
    stream = engine.generate([[g]])
    for _ in range(7):
        next(stream)
    assert g.tokens == answer[:7]
    stream.close()
    assert g.tokens == answer[:7]
    assert pages_in_use(engine) == 0


class Ahead(Form):
    """A form that is asked before a call what it allows after guesses."""


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 1}], ids=str)
@pytest.mark.parametrize("kind", [1, 2, 4])
@pytest.mark.parametrize("n_forced", [0, 3])
def test_forms_on_every_device(kind: int, params: dict[str, Any], n_forced: int) -> None:
    """Masks are made for the rows of guesses, too, where a device finds the largest logits by itself."""
    made = []
    for most_candidates, guesses in ((0, False), (0, True), (64, False), (64, True)):
        engine = make_engine()
        engine.model.most_candidates = most_candidates  # type: ignore[misc]
        forms = [Ahead(n_forced) for _ in range(2)]
        group = [
            formed(engine if i == 0 else None, text(9), form, i, **params) for i, form in enumerate(forms)
        ]
        free = formed(engine, text(70, seed=1), None, 5, **params)
        if guesses:
            for g, known in zip([*group, free], made[0], strict=True):
                prompt = text(9) if g is not free else text(70, seed=1)
                guess_with(g, engine, guesser(kind, prompt, known.tokens))
        run(engine, [group, [free]])
        model: Any = engine.model
        assert len(model.n_asked) == (len(model.calls) if most_candidates else 0)
        made.append([*group, free])
        if guesses and kind == 1:
            assert free.guessing is not None
            assert free.guessing.accepted > 20
    assert any(len(g.tokens) > 10 for g in made[0])
    for others in made[1:]:
        assert_alike(made[0], others)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("said", "told"),
    [
        (raises, "no idea"),
        (lambda tokens, n: [1, 1 << 40], "says token"),
        (lambda tokens, n: ["x"], "TypeError"),
        (lambda tokens, n: 7, "TypeError"),
    ],
)
def test_a_function_that_fails_is_named_and_not_asked_again(
    said: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    g = generation(engine, text(10), 3)
    guess_with(g, engine, Called(said))
    run(engine, [[g]])
    assert g.tokens == expected(text(10), 3)
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(messages) == 1
    assert all(words in messages[0] for words in (said.__name__, told, "not asked again"))


@pytest.mark.usefixtures("eager")
def test_threads_share_calls_with_guesses() -> None:
    engine = make_engine()
    answers = {seed: expected(text(30, seed), seed, 40) for seed in range(6)}

    def one(seed: int) -> list[int]:
        g = generation(engine, text(30, seed), seed, max_tokens=40, runner=threading.get_ident())
        guess_with(g, engine, Oracle(30, answers[seed], 4) if seed % 2 else Random(seed))
        run(engine, [[g]])
        return g.tokens

    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            found = list(pool.map(one, range(6)))
            assert found == [answers[seed] for seed in range(6)]


# ---- lookup


def test_lookup_goes_on_as_the_text_did() -> None:
    look = Lookup()
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    assert look.propose(tokens, 4) == [4, 5, 6, 7]
    assert Lookup().propose([5, 6, 7], 4) == []
    assert Lookup().propose([5], 4) == []
    assert Lookup().propose([], 4) == []


def test_lookup_takes_the_longest_past_and_then_the_more_frequent() -> None:
    # After 2 3 came 9 twice and 7 once; but 1 2 3 was followed by 7.
    assert Lookup().propose([1, 2, 3, 7, 5, 2, 3, 9, 6, 2, 3, 9, 8, 1, 2, 3], 1) == [7]
    assert Lookup().propose([2, 3, 9, 4, 2, 3, 9, 5, 2, 3, 7, 6, 2, 3], 1) == [9]


def test_lookup_repeats_what_repeats() -> None:
    assert Lookup().propose([1, 2, 1, 2, 1, 2], 7) == [1, 2, 1, 2, 1, 2, 1]


@given(st.lists(st.integers(0, 3), max_size=120), st.lists(st.integers(1, 20), max_size=10))
def test_lookup_is_the_same_however_the_text_grew(tokens: list[int], cuts: list[int]) -> None:
    grown, at = Lookup(), 0
    for cut in cuts:
        at = min(len(tokens), at + cut)
        grown.propose(tokens[:at], 5)
    grades = []
    for look in (grown, Lookup()):
        said = look.propose(tokens, 5)
        grades.append((said, look.grade if said else None))
        assert len(said) <= 5
    assert grades[0] == grades[1]


def test_lookup_of_a_long_text_is_fast() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 100_000).tolist()
    look = Lookup()
    look.propose(tokens, 8)
    started = time.process_time()
    for i in range(200):
        tokens.append(i % 7)
        look.propose(tokens, 8)
    assert time.process_time() - started < 200 * 1e-3


# ---- how many


class Clock:
    """A text whose calls take what a table says, and whose guesses are right with a chance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, guess_s: float = 0.0) -> None:
        self.now, self.guess_s = 0.0, guess_s
        monkeypatch.setattr(speculation.time, "perf_counter", lambda: self.now)

    def propose(self, tokens: list[int], n: int) -> list[int]:
        self.now += self.guess_s * n
        return [0] * n

    def run(
        self,
        call_s: Callable[[int], float],
        chance: float,
        n_tokens: int = 400,
        record: Record | None = None,
        n_others: int = 0,
        costs: Costs | None = None,
    ) -> tuple[float, Guessing]:
        """The time of n_tokens, and the text's account."""
        costs, luck = costs or Costs(), random.Random(1)
        guessing = Guessing(self, costs, record or Record(), 10)
        made, started = 0, self.now
        while made < n_tokens:
            n = len(guessing.propose([0] * made, n_tokens - made - 1))
            seconds = call_s(1 + n_others + n)
            self.now += seconds
            costs.learn(1 + n_others, 1 + n_others + n, seconds)
            n_right = next((i for i in range(n) if luck.random() >= chance), n)
            guessing.learn(n, n_right)
            made += 1 + n_right
        return self.now - started, guessing


def cheap(n: int) -> float:
    return 0.01 * (1 + 0.04 * (n - 1))


def dear(n: int) -> float:
    return 0.01 * n


@pytest.mark.parametrize("chance", [0.0, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("call_s", [cheap, dear])
@pytest.mark.parametrize("guess_s", [0.0, 0.0005, 0.02])
def test_guessing_never_loses(
    chance: float, call_s: Callable[[int], float], guess_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    took_s, guessing = Clock(monkeypatch, guess_s).run(call_s, chance)
    plain_s = 400 * call_s(1)
    assert took_s <= 1.02 * plain_s + 2 * call_s(1)
    assert guessing.gain > 0.97


@pytest.mark.parametrize(("chance", "least"), [(0.5, 1.5), (0.7, 2.2), (0.9, 4.0), (1.0, 8.0)])
def test_right_guesses_are_taken_up(chance: float, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    took_s, guessing = Clock(monkeypatch).run(cheap, chance)
    gain = 400 * cheap(1) / took_s
    assert gain >= least
    assert guessing.gain == pytest.approx(gain, rel=0.1)


def test_short_texts_do_not_each_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    record, costs, clock = Record(), Costs(), Clock(monkeypatch)
    took_s = sum(clock.run(dear, 0.0, 20, record, costs=costs)[0] for _ in range(50))
    assert took_s <= 1.02 * 50 * 20 * dear(1) + 2 * dear(1)


def test_it_asks_again_when_a_text_begins_to_repeat_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, costs, record = Clock(monkeypatch), Costs(), Record()
    clock.run(cheap, 0.0, 300, record, costs=costs)
    took_s, _ = clock.run(cheap, 1.0, 300, record, costs=costs)
    assert took_s < 0.6 * 300 * cheap(1)


def test_others_in_a_call_wait_little(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0

    def call_s(n: int) -> float:
        nonlocal longest
        longest = max(longest, n)
        return 0.01 * (1 + 0.04 * (n - 1))

    costs = Costs()
    Clock(monkeypatch).run(call_s, 1.0, n_others=7, costs=costs)
    assert call_s(longest) <= speculation.STRETCH * call_s(8) * 1.001
    assert longest > 8


def test_a_line_of_costs_that_ends_at_nothing_is_not_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that something slows down, two sizes of calls may say that one token takes no time."""
    costs = Costs()
    costs.learn(1, 2, 2.0)
    costs.learn(1, 4, 8.0)
    assert costs.seconds(1) == 0.0
    assert list(Guessing(Clock(monkeypatch), costs, Record(), 10).propose([0] * 20, 15)) == []


# ---- whole models


@pytest.fixture(scope="module")
def llm() -> Iterator[tinyllm.LLM]:
    with tinyllm.load("stories", threads=2) as model:
        yield model


def noisy(tokens: list[int], n: int) -> list[int]:
    """Now right, now wrong: what came 20 tokens ago."""
    return [tokens[max(0, len(tokens) - 20 + i)] for i in range(min(n, 20))]


def facts(made: tinyllm.Completion) -> tuple[Any, ...]:
    return (
        made.tokens,
        made.logprobs,
        made.top_logprobs,
        made.text,
        made.finish_reason,
        made.stop_reason,
        made.seed,
    )


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.2, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 4},
    {"temperature": 0, "repetition_penalty": 1.3, "penalty_window": -1},
    {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.2, "seed": 5},
    {"temperature": 0.8, "dry_multiplier": 0.8, "no_repeat_ngram_size": 4, "seed": 6},
    {"temperature": 0.8, "min_tokens": 30, "max_tokens": 33, "seed": 7},
    {"temperature": 0.8, "stop": ["the", "."], "seed": 8},
    {"temperature": 0.8, "xtc_probability": 0.5, "seed": 9},
    {"temperature": 0.9, "typical_p": 0.9, "logit_bias": {5: 3.0}, "seed": 10},
]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: ",".join(o))
def test_every_setting_gives_the_same_bits(options: dict[str, Any], llm: tinyllm.LLM) -> None:
    options = {"max_tokens": 36, "seed": 1, "logprobs": True, "top_logprobs": 3, **options}
    plain = llm("Once upon a time", speculate=None, **options)
    known = plain.prompt_tokens + plain.tokens

    def oracle(tokens: list[int], n: int) -> list[int]:
        return known[len(tokens) : len(tokens) + n]

    for who in ("lookup", llm, noisy, oracle):
        made = llm("Once upon a time", speculate=who, **options)  # type: ignore[arg-type]
        assert facts(made) == facts(plain), who
        if who is oracle:
            assert made.timings.accepted_tokens > 0.6 * (len(plain.tokens) - 2)
    batches = [
        llm(["Once upon a time", "Lily saw"], n=2, speculate=who, **options)
        for who in (None, oracle, "lookup")
    ]
    told = [[facts(made) for group in batch for made in group] for batch in batches]
    assert told[0] == told[1] == told[2]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("cache_type", ["f32", "q8_0"])
def test_every_cache_gives_the_same_bits(cache_type: Any) -> None:
    with tinyllm.load("stories", threads=2, cache_type=cache_type, context=100) as model:
        plain = model("Once", temperature=0.8, seed=1, logprobs=True, speculate=None)
        for who in ("lookup", noisy, model):
            made = model("Once", temperature=0.8, seed=1, logprobs=True, speculate=who)
            assert facts(made) == facts(plain)


@pytest.mark.usefixtures("eager")
def test_a_draft_with_the_texts_own_random_numbers_is_always_right(llm: tinyllm.LLM) -> None:
    """The same model, so the same odds: it draws what the text draws, at any temperature."""
    made = llm("Once upon a time", temperature=1.1, seed=2, max_tokens=50, speculate=llm)
    assert made.timings.accepted_tokens == made.timings.drafted_tokens > 20


@pytest.mark.usefixtures("eager")
def test_user_code_is_called_as_without(llm: tinyllm.LLM) -> None:
    """A processor sees the same histories in the same order, so that it may keep a state."""

    def watched() -> tuple[list[tuple[int, ...]], Callable[..., None]]:
        seen: list[tuple[int, ...]] = []

        def processor(logits: Any, tokens: Sequence[int]) -> None:
            seen.append(tuple(tokens))
            logits[len(seen) % 50] += 4.0

        return seen, processor

    made = []
    for who in (None, noisy, "lookup"):
        seen, processor = watched()
        c = llm("Once", temperature=0.8, seed=1, max_tokens=40, processors=[processor], speculate=who)  # type: ignore[arg-type]
        made.append((seen, facts(c)))
    assert made[0] == made[1] == made[2]


@pytest.mark.usefixtures("eager")
def test_pieces_sessions_forks_and_files(llm: tinyllm.LLM, tmp_path: Path) -> None:
    for temperature in (0, 0.8):
        found = []
        for who in (None, noisy, "lookup"):
            options: dict[str, Any] = {"temperature": temperature, "logprobs": True}
            pieces = list(llm.stream("Once", seed=1, max_tokens=30, speculate=who, **options))  # type: ignore[arg-type]
            with llm.session(seed=4, speculate=who) as session:  # type: ignore[arg-type]
                session.append("Once upon a time, there was a dog. The dog")
                first = session.generate(max_tokens=25, **options)
                stream = session.stream(max_tokens=25, **options)
                left = [next(stream).token for _ in range(9)]
                stream.close()
                after = session.tokens
                path = tmp_path / "a.session"
                session.save(path)
                with session.fork() as fork, llm.restore(path, speculate=who) as back:  # type: ignore[arg-type]
                    assert back.tokens == session.tokens
                    assert back.logits.tobytes() == session.logits.tobytes()
                    b, c = fork.generate(max_tokens=30, **options), back.generate(max_tokens=30, **options)
                    d = session.generate(max_tokens=30, **options)
                assert facts(c) == facts(d)
            found.append((pieces, facts(first), left, after, facts(b), facts(d)))
        assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("eager")
def test_async_and_json(llm: tinyllm.LLM) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 12}}, "required": ["a"]}

    async def ask(who: Any) -> list[Any]:
        jobs = [
            llm.acall("Say: ", temperature=0.8, seed=i, max_tokens=40, json_schema=schema, speculate=who)
            for i in range(3)
        ]
        return [facts(c) for c in await asyncio.gather(*jobs)]

    plain = asyncio.run(ask(None))
    assert plain == asyncio.run(ask(noisy)) == asyncio.run(ask("lookup")) == asyncio.run(ask(llm))


@pytest.mark.usefixtures("eager")
def test_a_forms_mask_after_guesses(llm: tinyllm.LLM) -> None:
    """It is the one that there is once they are accepted, and asking for it changes nothing."""
    pytest.importorskip("llguidance")
    from tinyllm.constraints import Grammar, Vocabulary, form_of

    assert llm.tokenizer is not None
    vocabulary = Vocabulary(llm.tokenizer, llm.config.vocab_size, llm.eos_ids)
    form = form_of(regex="(the cat|the dog) sat[.]?")
    assert form is not None
    ids = vocabulary("the dog sat")
    asked, plain = Grammar(form, vocabulary).start(), Grammar(form, vocabulary).start()
    for i, token in enumerate(ids):
        asked.prepare()
        ahead = [asked.mask_after(ids[i : i + n]) for n in range(1, len(ids) - i)]
        assert asked.mask_after([ids[0] + 1, *ids]) is None
        assert (asked.mask() == plain.mask()).all()
        asked.accept(token)
        plain.accept(token)
        if ahead:
            assert (plain.mask() == ahead[0]).all()


def test_translation_of_texts_between_vocabularies() -> None:
    class Letters:
        vocab_size = 256

        def token_bytes(self, token: int) -> bytes:
            return bytes([token])

        def encode(self, text: str, bos: bool | None = None, special: bool = False) -> list[int]:
            return list(text.encode())

    class Pairs(Letters):
        vocab_size = 65536

        def token_bytes(self, token: int) -> bytes:
            return bytes([token % 256]) + (bytes([token // 256]) if token > 255 else b"")

        def encode(self, text: str, bos: bool | None = None, special: bool = False) -> list[int]:
            head, data = ([10], text[1:].encode()) if text[:1] == "\n" else ([], text.encode())
            return head + [a + 256 * b for a, b in zip(data[::2], [*data[1::2], 0], strict=False)]

    both = Translation(Letters(), Pairs())
    words = list("naïve".encode())
    assert both.read(words[:3]) == Pairs().encode("na")  # half an ï
    assert both.said([ord("x")]) == []
    assert both.read(words) == Pairs().encode("ïve")
    assert both.said(Pairs().encode("t\u00e9")) == list("té".encode())


@pytest.mark.usefixtures("eager")
def test_a_draft_of_another_vocabulary(llm: tinyllm.LLM, data_dir: Path) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "logprobs": True, "seed": 1}
    with tinyllm.load(data_dir / "models/stories260K/stories260K.gguf", threads=1) as other:
        assert other.config.vocab_size != llm.config.vocab_size
        for target, draft in ((llm, other), (other, llm)):
            plain = target("Once upon a time", speculate=None, **options)
            made = target("Once upon a time", speculate=draft, **options)
            assert facts(made) == facts(plain)
            assert made.timings.accepted_tokens > 3


def test_a_draft_of_another_vocabulary_needs_tokenizers(llm: tinyllm.LLM, tmp_path: Path) -> None:
    with tinyllm.load(golden_model(golden_spec("llama3"), tmp_path), threads=1) as other:
        assert other.tokenizer is None
        with pytest.raises(tinyllm.ArgumentError, match="vocabularies differ"):
            llm("Once", max_tokens=5, speculate=other)
        with pytest.raises(tinyllm.ArgumentError, match="vocabularies differ"):
            llm.use_draft(other)
    assert llm.speculate == "lookup"


def test_what_cannot_guess_is_refused_by_name(llm: tinyllm.LLM) -> None:
    with pytest.raises(tinyllm.ArgumentError, match="speculate is 'yes'"):
        llm("Once", max_tokens=5, speculate="yes")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="speculate must be"):
        llm("Once", max_tokens=5, speculate=7)  # type: ignore[call-overload]


def test_load_with_a_draft() -> None:
    with tinyllm.load("stories", threads=1, draft="stories") as model:
        assert model.speculate is model.draft is not None
        draft = model.draft
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "logprobs": True, "seed": 1}
        made = model("Once", **options)
        plain = model("Once", speculate=None, **options)
        assert facts(made) == facts(plain)
    with pytest.raises(tinyllm.ModelClosedError):
        draft("Once")


SCRIPT = """
import hashlib, json, sys
import tinyllm
from tinyllm.engine.speculation import Costs, Guessing
Guessing._fitting = lambda self, grade, most: most
Guessing._left_s = lambda self, plain_s: 1.0
Costs.most = lambda self: 1000
llm = tinyllm.load("stories", threads=2)
noisy = lambda tokens, n: [tokens[max(0, len(tokens) - 20 + i)] for i in range(min(n, 20))]
made = [llm("Once upon a time", temperature=t, seed=1, max_tokens=16, logprobs=True, speculate=who)
        for t in (0, 0.8) for who in (None, noisy, llm)]
print(json.dumps([[c.tokens, c.logprobs] for c in made]), tinyllm.info()["isa"])
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    made = {}
    for isa in ("scalar", "avx2", "avx512", "neon"):
        env = {**os.environ, "TINYLLM_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120
        )
        if done.returncode == 0:
            made[isa] = done.stdout.rsplit(" ", 1)[0]
    assert "scalar" in made
    assert len(set(made.values())) == 1
    found = json.loads(made["scalar"])
    assert found[0] == found[1] == found[2]
    assert found[3] == found[4] == found[5]


# ---- the server


@pytest.mark.usefixtures("eager")
def test_over_the_server(tmp_path: Path) -> None:
    """Nothing is asked for, and nothing but the time and its figures differs."""
    pytest.importorskip("uvicorn")
    import httpx
    from helpers_serve import serving, write_chat_model

    path, answers = write_chat_model(tmp_path / "chat.gguf"), []
    for speculate in (None, noisy, "lookup"):

        def load(path: str, speculate: Any = speculate) -> tinyllm.LLM:
            return tinyllm.load(path, context=512, threads=2, speculate=speculate)

        with serving({"m": path}, load) as running:
            body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 40, "seed": 3, "logprobs": 2}
            asked = [
                httpx.post(f"{running.url}/v1/completions", json=body | {"n": n}, timeout=60) for n in (1, 3)
            ]
            streamed = httpx.post(f"{running.url}/v1/completions", json=body | {"stream": True}, timeout=60)
            said = [r.json() for r in asked]
            running.wait_until_idle()
            metrics = httpx.get(f"{running.url}/metrics").text
        drafted = [a["timings"]["drafted_tokens"] for a in said]
        assert (sum(drafted) > 0) == (speculate is not None)
        total = next(x for x in metrics.splitlines() if x.startswith("tinyllm_drafted_tokens_total"))
        assert float(total.split()[1]) >= sum(drafted)
        texts = [x for x in streamed.text.splitlines() if x.startswith("data: {")]
        choices = [c for x in texts for c in json.loads(x[6:])["choices"]]
        answers.append(([a["choices"] for a in said], choices))
    assert answers[0] == answers[1] == answers[2]
