"""Sampling against a float64 reference written from the papers, stop strings against a whole-text search."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers_engine import candidates
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm import backends
from tinyllm.chat.reasoning import hidden
from tinyllm.engine.sampling import Sampler, SamplingParams, StopStrings, stream_seed
from tinyllm.errors import ArgumentError

EPSILON = 2.0**-24  # of one rounding to float32
OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 5}
Floats = npt.NDArray[np.float32]


BREAKERS = [[4], [6, 1], [6, 1, 3], [6]]
SAMPLER = {"start", "eos_ids", "min_length", "breakers"}


def sampler_for(logits: Floats, **params: Any) -> Sampler:
    own = {name: params.pop(name) for name in SAMPLER & params.keys()}
    return Sampler(SamplingParams(**{**OFF, **params}), len(logits), **own)


def draws(logits: Floats, n: int, history: list[int] | None = None, **params: Any) -> list[int]:
    sampler = sampler_for(logits, **params)
    return [sampler(logits, history or [], position).token for position in range(n)]


def of_probabilities(*probabilities: float) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)).astype(np.float32)


# ---- the reference ---------------------------------------------------------------------------------------


def philox_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011, section 3.3) on Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def uniform(seed: int, position: int, which: int = 0) -> float:
    """Which: 0 is the draw's, 1 is XTC's."""
    words = philox_words([position % 2**32, position >> 32, 0, 0], [seed % 2**32, seed >> 32])[2 * which :]
    return ((words[1] << 32 | words[0]) >> 11) / 2**53


def common_end(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


def dry_lengths(history: list[int], allowed: int, breakers: list[list[int]]) -> dict[int, int]:
    """By token: how long the repetition is that it would make longer, from the definition: the longest end of
    the text that also stands before an earlier place where the token came, and does not go over a breaker."""
    most = len(history)
    for start in reversed(range(len(history))):
        here = [b for b in breakers if history[start : start + len(b)] == b]
        if here:
            most = len(history) - start - max(map(len, here))
            break
    found: dict[int, int] = {}
    for place in range(1, len(history)):
        length = min(most, common_end(history[:place], history))
        if length >= allowed and len(history) > allowed and [history[place]] not in breakers:
            found[history[place]] = max(length, found.get(history[place], 0))
    return found


def adjusted(
    logits: Floats, params: SamplingParams, history: list[int], breakers: list[list[int]] | None = None
) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += np.float32(bias)
    assert params.penalty_window is not None
    start = 0 if params.penalty_window < 0 else max(0, len(history) - params.penalty_window)
    r = float(np.float32(params.repetition_penalty))
    for token, count in Counter(history[start:]).items():
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
        x[token] -= np.float32(params.presence_penalty) + count * np.float64(
            np.float32(params.frequency_penalty)
        )
    x[list(params.suppress_tokens or ())] = -np.inf
    ngrams = params.no_repeat_ngram_size or 0
    for i in range(len(history) - ngrams + 1 if ngrams else 0):  # transformers 5.24, by its definition
        if history[i : i + ngrams - 1] == history[len(history) - ngrams + 1 :]:
            x[history[i + ngrams - 1]] = -np.inf
    for word in map(list, params.bad_words_ids or ()):
        if len(history) >= len(word) - 1 and history[len(history) - len(word) + 1 :] == word[:-1]:
            x[word[-1]] = -np.inf
    if params.dry_multiplier:
        assert params.dry_base is not None
        assert params.dry_allowed_length is not None
        assert params.dry_penalty_last_n is not None
        n = params.dry_penalty_last_n
        last = history if n < 0 else history[max(0, len(history) - n) :]
        lengths = dry_lengths(last, params.dry_allowed_length, breakers or [])
        for token, length in lengths.items():
            power = float(np.float32(params.dry_base)) ** (length - params.dry_allowed_length)
            x[token] -= float(np.float32(params.dry_multiplier)) * power
    return x


def reference(
    logits: Floats,
    params: SamplingParams,
    history: list[int],
    clear: float = 5e-6,
    *,
    breakers: list[list[int]] | None = None,
    excluding: bool = False,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Ids of the survivors in descending order of probability, and their probabilities.

    Asserts that no token is within `clear` of a filter's border: the core's weights err by up to (4 + spread)
    epsilon relatively, its sums of 64 by 64 more, together under 5e-6 for logits that differ by up to 15.
    """
    params = params.resolve()
    x = adjusted(logits, params, history, breakers)
    ids = np.argsort(-x, kind="stable")
    ids = ids[np.isfinite(x[ids])]
    if params.top_k:
        ids = ids[: params.top_k]

    def probabilities(temperature: float = 1.0) -> npt.NDArray[np.float64]:
        weights = np.exp((x[ids] - x[ids].max()) / temperature)
        return weights / weights.sum()

    def shortest(p: npt.NDArray[np.float64], mass: float) -> int:
        cumulative = np.cumsum(p)
        assert np.abs(cumulative[:-1] - mass).min(initial=1) >= clear, "choose another case"
        return int(np.sum(cumulative[:-1] < mass)) + 1

    if params.typical_p != 1:  # arXiv 2202.00666, equation 10
        p = probabilities()
        surprise = -np.log(p)
        order = np.argsort(np.abs(surprise - np.sum(p * surprise)), kind="stable")
        ids = ids[np.sort(order[: shortest(p[order], float(np.float32(params.typical_p)))])]
    if params.top_p != 1:  # arXiv 1904.09751, section 3.1
        ids = ids[: shortest(probabilities(), float(np.float32(params.top_p)))]
    if params.min_p:  # arXiv 2407.01082, section 3
        ratio = probabilities() / probabilities()[0]
        assert np.abs(ratio[1:] / params.min_p - 1).min(initial=1) >= clear, "choose another case"
        ids = ids[ratio >= params.min_p]
    if excluding:
        p, threshold = probabilities(), float(np.float32(params.xtc_threshold))
        assert np.abs(p / threshold - 1).min(initial=1) >= clear, "choose another case"
        ids = ids[max(0, int(np.sum(p >= threshold)) - 1) :]
    return ids, probabilities(float(np.float32(params.temperature)))


def random_logits(seed: int, n: int, spread: float) -> Floats:
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000_000},
    {"top_p": 0.0},
    {"top_p": 0.6},
    {"top_p": 0.95, "temperature": 0.5},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"typical_p": 0.3},
    {"typical_p": 0.9},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
    {"top_k": 30, "typical_p": 0.8, "top_p": 0.9, "min_p": 0.1, "temperature": 1.5},
    {"typical_p": 0.7, "top_p": 0.8},
    {"typical_p": 0.7, "min_p": 0.3},
    {"logit_bias": {3: 4.0, 5: -math.inf, 9: -2.5}, "top_k": 12},
    {"repetition_penalty": 1.7, "penalty_window": -1},
    {"presence_penalty": 0.9, "frequency_penalty": 0.4, "top_p": 0.9},
    {"repetition_penalty": 1.3, "presence_penalty": -0.5, "frequency_penalty": 0.7, "penalty_window": 5},
    {"repetition_penalty": 2.0, "logit_bias": {1: 6.0, 2: 5.0}, "min_p": 0.02},
    {"suppress_tokens": [2, 8, 2], "top_k": 6},
    {"bad_words_ids": [[7], [4, 1], [4, 4, 2], [4, 4, 4, 9], [3, 6]]},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "min_p": 0.02},
    {"dry_multiplier": 0.8, "dry_penalty_last_n": -1, "breakers": []},
    {"dry_multiplier": 0.4, "dry_allowed_length": 0, "breakers": BREAKERS},
    {"dry_multiplier": 0.5, "dry_allowed_length": 1, "dry_base": 1.0, "dry_penalty_last_n": 4},
    {"dry_multiplier": 1.5, "no_repeat_ngram_size": 3, "frequency_penalty": 0.1, "top_p": 0.9},
]
HISTORY = [1, 2, 3, 2, 1, 2, 9, 4, 4, 4]


@pytest.mark.parametrize("n", [10, 200, 3000])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "+".join(case) or "off")
def test_every_draw_is_the_references(case: dict[str, Any], n: int) -> None:
    """The token must be the one whose slice of the cumulative distribution holds the random number.

    A weight e^(d / T) errs by at most 2 ulp of exp, and by two roundings of d / T, so relatively by
    (4 + 2 |d / T|) epsilon; a border of the cumulative distribution by twice that.
    """
    logits = random_logits(n + 2, n, 2.0)
    sampler = sampler_for(logits, **case)
    ids, p = reference(logits, sampler.params, HISTORY, breakers=case.get("breakers"))
    edges = np.cumsum(p)
    exponents = 200 if len(p) < 2 else float(np.log(p.max() / p.min()))
    tolerance = 2 * (4 + 2 * exponents) * EPSILON
    decided = 0
    for position in range(300):
        u = uniform(5, position)
        if len(ids) > 1 and np.abs(edges[:-1] - u).min() <= tolerance:
            continue
        decided += 1
        assert sampler(logits, HISTORY, position).token == ids[np.searchsorted(edges[:-1], u, side="right")]
    assert decided >= 200


@pytest.mark.parametrize("n", [10, 100, 460])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "+".join(case) or "off")
def test_survivors_are_the_references(case: dict[str, Any], n: int) -> None:
    """At temperature 1000 the survivors are about equally likely, so that many draws show all of them.

    The least likely of m has p >= e^(-range / 1000) / m; N = (log m + 20) / p draws miss any with probability
    below m (1 - p)^N <= e^-20. Filters look at temperature 1, so the set is the same.
    """
    logits = random_logits(n + 1, n, 2.0)
    hot = {**case, "temperature": 1000.0}
    params = sampler_for(logits, **hot).params
    ids, p = reference(logits, params, HISTORY, breakers=case.get("breakers"))
    n_draws = math.ceil((math.log(len(ids)) + 20) / p.min())
    found = draws(logits, n_draws, HISTORY, **hot)
    assert set(found) == set(ids.tolist())


@pytest.mark.parametrize(
    "case",
    [
        {"xtc_probability": 0.5, "xtc_threshold": 0.02},
        {"xtc_probability": 1.0, "xtc_threshold": 0.011, "temperature": 2.0},
        {"xtc_probability": 0.3, "xtc_threshold": 0.05, "top_k": 8, "min_p": 0.02},
        {"xtc_probability": 0.7, "xtc_threshold": 0.03, "typical_p": 0.9, "suppress_tokens": [3]},
    ],
    ids=lambda case: "+".join(case),
)
def test_excluded_top_choices_are_the_references(case: dict[str, Any]) -> None:
    """As test_every_draw_is_the_references, with a random number of its own that says whether they go."""
    logits = random_logits(7, 60, 2.0)
    sampler = sampler_for(logits, **case)
    kinds = [reference(logits, sampler.params, [], excluding=excluding) for excluding in (False, True)]
    assert len(kinds[1][0]) < len(kinds[0][0])
    decided = 0
    for position in range(400):
        ids, p = kinds[int(uniform(5, position, 1) < np.float32(case["xtc_probability"]))]
        edges, u = np.cumsum(p), uniform(5, position)
        if np.abs(edges[:-1] - u).min() <= 2 * (4 + 2 * np.log(p.max() / p.min())) * EPSILON:
            continue
        decided += 1
        assert sampler(logits, [], position).token == ids[np.searchsorted(edges[:-1], u, side="right")]
    assert decided >= 300


@pytest.mark.parametrize(
    ("params", "survivors"),
    [
        ({"xtc_probability": 1.0, "xtc_threshold": 0.15}, {0, 1}),  # 0.4 0.3 0.2 are above, 0.2 stays
        ({"xtc_probability": 1.0, "xtc_threshold": 0.25}, {0, 1, 2}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.35}, {0, 1, 2, 3}),  # one alone stays
        ({"xtc_probability": 1.0, "xtc_threshold": 0.0}, {0}),
        ({"xtc_probability": 0.0, "xtc_threshold": 0.15}, {0, 1, 2, 3}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.51}, {0, 1, 2, 3}),  # more than half: off
        ({"xtc_probability": 1.0, "xtc_threshold": 0.4, "top_k": 2}, {2}),  # of 0.57 0.43
        ({"xtc_probability": 1.0, "xtc_threshold": 0.25, "temperature": 50.0}, {0, 1, 2}),  # at temperature 1
        ({"top_k": 2}, {3, 2}),
        ({"top_p": 0.35}, {3}),
        ({"top_p": 0.65}, {3, 2}),
        ({"top_p": 0.75}, {3, 2, 1}),
        ({"min_p": 0.6}, {3, 2}),
        ({"min_p": 0.6, "temperature": 50.0}, {3, 2}),  # filters look at temperature 1
        ({"top_k": 3, "top_p": 0.75}, {3, 2}),  # of 0.9, 0.7 is 0.78: renormalized after top_k
        ({"typical_p": 0.25}, {2}),  # entropy 1.28; surprises 2.30 1.61 1.20 0.92
        ({"typical_p": 0.45}, {2, 1}),
        ({"typical_p": 0.6}, {2, 1, 3}),
        ({"typical_p": 0.45, "top_p": 0.55}, {2}),  # renormalized after typical_p: 0.6 0.4
        ({"typical_p": 0.45, "min_p": 0.7}, {2}),  # of the most likely that is left
        ({}, {0, 1, 2, 3}),
    ],
)
def test_four_tokens(params: dict[str, Any], survivors: set[int]) -> None:
    assert set(draws(of_probabilities(0.1, 0.2, 0.3, 0.4), 300, **params)) == survivors


def test_frequencies() -> None:
    """Chi-squared of 20000 draws; P(X >= k + 2 sqrt(k t) + 2 t) <= e^-t for k degrees of freedom (Laurent and
    Massart 2000, lemma 1), here t = 15."""
    p = np.array([0.05, 0.15, 0.3, 0.5])
    n, freedom, t = 20_000, 3, 15
    counts = np.bincount(draws(of_probabilities(*p), n, seed=11), minlength=4)
    chi_squared = float(np.sum((counts - n * p) ** 2 / (n * p)))
    assert chi_squared < freedom + 2 * math.sqrt(freedom * t) + 2 * t


def test_large_vocabulary() -> None:
    logits = random_logits(8, 128_256, 2.5)
    for case in (
        {"top_k": 40, "min_p": 0.05, "top_p": 0.95},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"typical_p": 0.5},
    ):
        sampler = sampler_for(logits, **case)
        ids, p = reference(logits, sampler.params, [], clear=0)
        edges = np.cumsum(p)
        for position in range(20):
            rank = int(np.searchsorted(edges[:-1], uniform(5, position), side="right"))
            token = sampler(logits, [], position).token
            # Borders lie closer together than their error: a neighbour within 2^-18 of the mass is as good.
            at = int(np.flatnonzero(ids == token)[0])
            assert at == rank or abs(edges[min(at, rank)] - uniform(5, position)) < 2.0**-18


# ---- random numbers --------------------------------------------------------------------------------------


def test_philox_reference_meets_published_vectors() -> None:
    """The known answers for philox4x32-10 that its authors publish with their library Random123."""
    ones = 2**32 - 1
    assert philox_words([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_words([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert philox_words(pi[:4], pi[4:]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 3, 2**64 - 1])
def test_random_numbers_are_philox(seed: int) -> None:
    """Among 2^16 equal logits the token is floor(2^16 u), exactly."""
    logits = np.zeros(2**16, dtype=np.float32)
    sampler = sampler_for(logits, seed=seed)
    for position in (0, 1, 2, 1000, 2**32, 2**40 + 17):
        assert sampler(logits, [], position).token == int(uniform(seed, position) * 2**16)


def test_draws_depend_on_seed_and_position_only() -> None:
    logits = random_logits(3, 500, 1.0)
    forward = draws(logits, 50)
    sampler = sampler_for(logits)
    assert [sampler(logits, [7, 8], position).token for position in reversed(range(50))] == forward[::-1]
    assert draws(logits, 50, seed=6) != forward
    assert len(set(forward)) > 25


def test_xtc_draws_a_number_of_its_own() -> None:
    """Whether the top goes says nothing of which of the others comes, and changes no draw where it stays."""
    logits = of_probabilities(0.4, 0.3, 0.1, 0.1, 0.1)
    plain = draws(logits, 4000)
    some = draws(logits, 4000, xtc_probability=0.5, xtc_threshold=0.2)
    stays = [uniform(5, position, 1) >= 0.5 for position in range(4000)]
    assert [a for a, kept in zip(some, stays, strict=True) if kept] == [
        a for a, kept in zip(plain, stays, strict=True) if kept
    ]
    gone = [a for a, kept in zip(some, stays, strict=True) if not kept]
    assert 0 not in gone
    # Of 2000 the share of 0.5 errs by sqrt(0.25 / 2000) = 0.011; 5 of these.
    assert abs(gone.count(1) / len(gone) - 0.5) < 0.056
    sampler = sampler_for(logits, xtc_probability=0.5, xtc_threshold=0.2)
    assert [sampler(logits, [], position).token for position in reversed(range(50))] == some[:50][::-1]


def test_stream_seed() -> None:
    assert stream_seed(1234, 0) == 1234
    derived = [stream_seed(seed, i) for seed in (0, 1, 1234, 2**64 - 1) for i in range(1, 50)]
    assert len(set(derived)) == len(derived)
    assert all(0 <= seed < 2**53 for seed in derived)
    assert stream_seed(0, 1) == stream_seed(0, 1)


# ---- greedy, ties, masks, penalties ----------------------------------------------------------------------


def test_greedy() -> None:
    logits = random_logits(4, 1000, 3.0)
    assert sampler_for(logits, temperature=0)(logits, [], 0).token == int(np.argmax(logits))
    assert draws(logits, 20, temperature=1e-6) == [int(np.argmax(logits))] * 20


@pytest.mark.parametrize(
    ("logits", "token"),
    [([1, 3, 3], 1), ([0.0, -0.0], 0), ([-0.0, 0.0], 0), ([2] * 200, 0), ([0] * 70 + [5] * 70, 70)],
)
def test_ties_go_to_the_lower_id(logits: list[float], token: int) -> None:
    row = np.array(logits, dtype=np.float32)
    assert sampler_for(row, temperature=0)(row, [], 0).token == token
    assert draws(row, 20, top_k=1) == [token] * 20
    assert draws(row, 20, top_p=0.0) == [token] * 20
    top = sampler_for(row, top_logprobs=2)(row, [], 0).top
    assert [id for id, _ in top] == np.argsort(-row, kind="stable")[:2].tolist()


def test_masked_tokens_are_never_chosen() -> None:
    logits = np.full(300, -np.inf, dtype=np.float32)
    logits[[17, 130]] = 0, -1
    for case in ({}, {"top_k": 50}, {"top_p": 0.99}, {"typical_p": 0.999}, {"temperature": 1000}):
        assert set(draws(logits, 100, **case)) == {17, 130}
    logits[17] = -np.inf
    result = sampler_for(logits, top_logprobs=3)(logits, [], 0)
    assert (result.token, result.logprob) == (130, 0.0)
    assert result.top == [(130, 0.0), (0, -math.inf), (1, -math.inf)]


@pytest.mark.parametrize(
    ("logits", "params", "history", "token"),
    [
        ([2, 1.5, -1], {"repetition_penalty": 2.0}, [0], 1),
        ([-1, -1.5], {"repetition_penalty": 2.0}, [0], 1),
        ([2, 1.5], {"presence_penalty": 0.4}, [0, 0, 0], 0),
        ([2, 1.5], {"presence_penalty": 0.6}, [0, 0, 0], 1),
        ([2, 1.5], {"frequency_penalty": 0.2}, [0, 0], 0),
        ([2, 1.5], {"frequency_penalty": 0.2}, [0, 0, 0], 1),
        ([2, 1.5], {"frequency_penalty": 1.0, "penalty_window": 0}, [0, 0, 0], 0),
        ([2, 1.5], {"frequency_penalty": 1.0, "penalty_window": 2}, [0, 1, 1], 0),
        ([2, 1.5], {"presence_penalty": 1.0}, [0] + [1] * 64, 0),  # the default window is 64
        ([2, 1.5], {"presence_penalty": 1.0, "penalty_window": -1}, [0] + [2] * 64, 1),
        ([2, 1.5], {"logit_bias": {1: 0.6}}, [], 1),
        ([2, 1.5], {"logit_bias": {0: -math.inf}}, [], 1),
        ([1, 0.6], {"logit_bias": {0: 1.0}, "repetition_penalty": 4.0}, [0], 1),  # bias comes first
        ([1, 0.5], {"repetition_penalty": 2.0, "presence_penalty": 0.1}, [0], 1),  # 1 / 2 - 0.1
    ],
)
def test_penalties_and_bias(
    logits: list[float], params: dict[str, Any], history: list[int], token: int
) -> None:
    row = np.array([*logits, -9], dtype=np.float32)
    kept = row.copy()
    assert sampler_for(row, temperature=0, **params)(row, history, 0).token == token
    np.testing.assert_array_equal(row, kept)


# ---- bans and repetitions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "history", "token"),
    [
        ({"suppress_tokens": [0]}, [], 1),
        ({"bad_words_ids": [[0]]}, [], 1),
        ({"bad_words_ids": [[3, 0]]}, [3], 1),
        ({"bad_words_ids": [[3, 0]]}, [3, 2], 0),
        ({"bad_words_ids": [[3, 2, 0], [2, 1]]}, [3, 2], 2),
        ({"bad_words_ids": [[3, 2, 0]]}, [2], 0),  # longer than the text
        ({"no_repeat_ngram_size": 1}, [0, 2], 1),
        ({"no_repeat_ngram_size": 2}, [3, 0, 3], 1),
        ({"no_repeat_ngram_size": 2}, [3, 0, 2], 0),
        ({"no_repeat_ngram_size": 3}, [3, 3, 0, 3, 3], 1),
        ({"no_repeat_ngram_size": 3}, [3, 0, 3], 0),
        ({"no_repeat_ngram_size": 4}, [3, 0], 0),  # longer than the text
        ({"no_repeat_ngram_size": 2}, [3, 0] + [2] * 500 + [3], 1),  # at any distance
        ({"dry_multiplier": 3.0}, [2, 3, 0, 3, 2, 3], 1),  # 2 3 came before 0
        ({"dry_multiplier": 3.0}, [1, 3, 0, 3, 2, 3], 0),  # 3 alone is allowed
        ({"dry_multiplier": 3.0, "dry_allowed_length": 1}, [1, 3, 0, 3, 2, 3], 1),
        ({"dry_multiplier": 3.0, "dry_penalty_last_n": 3}, [2, 3, 0, 3, 2, 3], 0),
        ({"dry_multiplier": 3.0, "dry_penalty_last_n": 0}, [2, 3, 0, 3, 2, 3], 0),
        ({"dry_multiplier": 3.0}, [2, 3, 0] + [1] * 60 + [2, 3], 0),  # the last 64
        ({"dry_multiplier": 3.0, "dry_penalty_last_n": -1}, [2, 3, 0] + [1] * 60 + [2, 3], 1),
        ({"dry_multiplier": 3.0, "breakers": [[2]]}, [2, 3, 0, 3, 2, 3], 0),
        ({"dry_multiplier": 3.0, "breakers": [[0]]}, [2, 3, 0, 3, 2, 3], 0),  # a breaker itself is free
        ({"dry_multiplier": 3.0, "breakers": [[2, 3]]}, [2, 3, 0, 3, 2, 3], 0),
        ({"dry_multiplier": 3.0, "breakers": [[3, 2]]}, [2, 3, 0, 3, 2, 3], 0),
        ({"dry_multiplier": 3.0, "breakers": [[2, 2], [0, 1]]}, [2, 3, 0, 3, 2, 3], 1),
        ({"dry_multiplier": 1.5, "dry_base": 1.0}, [2] * 9 + [0] + [2] * 9, 0),  # 1.5 whatever the length
        ({"dry_multiplier": 0.5, "dry_base": 4.0}, [2, 2, 2, 0, 2, 2, 2], 1),  # 0.5 x 4
        ({"dry_multiplier": 1e3, "dry_base": 1e3, "dry_penalty_last_n": -1}, [0] * 300, 1),  # no overflow
    ],
)
def test_what_the_text_forbids(params: dict[str, Any], history: list[int], token: int) -> None:
    logits = np.array([2.0, 0.4, 0.2, 0.1], dtype=np.float32)
    kept = logits.copy()
    assert sampler_for(logits, temperature=0, **params)(logits, history, len(history)).token == token
    np.testing.assert_array_equal(logits, kept)


@settings(deadline=None, max_examples=400)
@given(
    history=st.lists(st.integers(0, 4), max_size=40),
    ngrams=st.integers(0, 5),
    words=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=3),
    dry=st.tuples(st.integers(0, 4), st.integers(-1, 40), st.sampled_from([1.0, 1.5, 2.0])),
    breakers=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=3),
)
def test_repetitions_are_the_references(
    history: list[int],
    ngrams: int,
    words: list[list[int]],
    dry: tuple[int, int, float],
    breakers: list[list[int]],
) -> None:
    """Each token's logit after all steps, by the choice between it and one that nothing changes, lifted to a
    little below and a little above: they are multiples of powers of 2, or are rounded by 2^-24 of 1000."""
    allowed, last_n, base = dry
    logits = np.array([3.0, 2.5, 2.0, 1.5, 1.0, 0.0], dtype=np.float32)
    options: dict[str, Any] = {
        "no_repeat_ngram_size": ngrams,
        "bad_words_ids": words,
        "dry_multiplier": 0.25,
        "dry_base": base,
        "dry_allowed_length": allowed,
        "dry_penalty_last_n": last_n,
        "breakers": breakers,
    }
    params = sampler_for(logits, **options).params
    for token, expected in enumerate(adjusted(logits, params, history, breakers)[:5]):
        bias = {other: -math.inf for other in range(5) if other != token}
        choices = {-1000.0: 5} if expected < -1001 else {expected - 2.0**-10: token, expected + 2.0**-10: 5}
        for level, chosen in choices.items():
            sampler = sampler_for(logits, temperature=0, logit_bias={**bias, 5: level}, **options)
            assert sampler(logits, history, 0).token == chosen


def test_tokens_that_may_not_end_or_begin() -> None:
    logits = np.array([3.0, 2.0, 1.0, 0.0], dtype=np.float32)

    def chosen(position: int, **params: Any) -> int:
        own = {"start": 10, "eos_ids": [0, 9], "temperature": 0, **params}
        return sampler_for(logits, **own)(logits, [], position).token

    assert [chosen(p, min_tokens=2) for p in (10, 11, 12, 13)] == [1, 1, 0, 0]
    assert [chosen(p, min_length=12) for p in (10, 11, 12)] == [1, 1, 0]
    assert [chosen(p, min_length=12, min_tokens=0) for p in (10, 11)] == [0, 0]
    assert [chosen(p, begin_suppress_tokens=[0, 1]) for p in (10, 11)] == [2, 0]
    both = {"begin_suppress_tokens": [1], "min_tokens": 2, "suppress_tokens": [2]}
    assert [chosen(p, **both) for p in (10, 11, 12)] == [3, 1, 0]
    with pytest.raises(ArgumentError, match="all 4 logits are -inf after logit bias, bans and penalties"):
        chosen(11, suppress_tokens=[1, 2, 3], min_tokens=5)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"temperature": 0},
        {"suppress_tokens": "the largest"},
        {"suppress_tokens": "the largest", "temperature": 0, "top_logprobs": 3},
        {"bad_words_ids": [[5]], "begin_suppress_tokens": "the largest", "min_tokens": 3},
        {"xtc_probability": 0.5, "xtc_threshold": 0.05},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01, "suppress_tokens": "the largest", "min_p": 0.05},
    ],
    ids=lambda case: "+".join(case),
)
@pytest.mark.parametrize("share", [None, 0.5, 0.03], ids="allowed {}".format)
def test_the_largest_logits_are_enough(case: dict[str, Any], share: float | None) -> None:
    """Of all, or of those that a mask allows, which may be fewer."""
    for seed in range(20):
        logits = random_logits(seed, 300, 2.0)
        mask, bits = None, None
        if share is not None:
            mask = np.random.default_rng(seed).random(320) < share
            mask[np.argsort(-logits)[5]] = True  # one that is not banned
            mask, bits = mask[:300], np.packbits(mask, bitorder="little").view(np.uint32)
        order = np.argsort(-logits).tolist()
        params = {name: order[:3] if value == "the largest" else value for name, value in case.items()}
        sampler = sampler_for(logits, **{"top_k": 8, "start": 0, "eos_ids": order[2:5], **params})
        assert sampler.n_candidates is not None
        assert sampler.n_candidates < 30
        few = candidates(logits, sampler.n_candidates, mask)
        for position in range(6):
            all, some = sampler(logits, [], position, bits), sampler(few, [], position)
            assert all.token == some.token
            if mask is None:  # else the likeliest of all are not among those that may come
                assert [i for i, _ in all.top] == [i for i, _ in some.top]
            # The core's own sum, in its own order, is in tests of the backends.
            assert all.logprob == pytest.approx(some.logprob, abs=1e-6)


@pytest.mark.parametrize(
    ("params", "are_all_needed"),
    [
        ({"no_repeat_ngram_size": 2}, True),
        ({"bad_words_ids": [[1, 2]]}, True),
        ({"dry_multiplier": 0.5}, True),
        ({"dry_multiplier": 0.5, "dry_penalty_last_n": 0}, False),
        ({"repetition_penalty": 1.5, "penalty_window": 0}, False),
        ({"xtc_probability": 0.5}, False),
        ({"suppress_tokens": [1]}, False),
    ],
)
def test_what_changes_logits_needs_all_of_them(params: dict[str, Any], are_all_needed: bool) -> None:
    sampler = Sampler(SamplingParams(top_k=5, **params), 100)
    assert (sampler.n_candidates is None) == are_all_needed


@settings(deadline=None, max_examples=200)
@given(
    logits=st.lists(st.floats(width=32, allow_nan=False) | st.just(-math.inf), min_size=1, max_size=150),
    temperature=st.floats(0, 1000),
    top_k=st.integers(0, 200),
    shares=st.tuples(*[st.floats(0, 1)] * 3),
    seed=st.integers(0, 2**64 - 1),
)
def test_something_always_survives(
    logits: list[float], temperature: float, top_k: int, shares: tuple[float, float, float], seed: int
) -> None:
    row = np.array(logits, dtype=np.float32)
    top_p, min_p, typical_p = shares
    params = SamplingParams(temperature, top_k, top_p, min_p, typical_p, seed=seed)
    if np.isposinf(row).any() or np.isneginf(row).all():
        with pytest.raises(ArgumentError, match=r"\+inf|all \d+ logits are -inf"):
            Sampler(params, len(row))(row, [], 0)
        return
    result = Sampler(params, len(row))(row, [], 0)
    assert np.isfinite(row[result.token])
    assert result.logprob <= 0
    if temperature == 0:
        assert result.token == int(np.argmax(row))


# ---- log probabilities -----------------------------------------------------------------------------------


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - np.float64(logits.max())
    return shifted - np.log(np.sum(np.exp(shifted)))


def logprob_tolerance(logits: Floats) -> float:
    """The result's rounding, and the sum's relative error: exp 4, 64 terms a partial sum, and the rounding of
    the differences, in units of epsilon."""
    spread = float(logits.max() - logits[np.isfinite(logits)].min())
    return EPSILON * (spread + math.log(len(logits)) + 4 + 64 + spread)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1024, 5000])
def test_top_logprobs(n: int) -> None:
    logits = random_logits(n, n, 4.0)
    logits[n // 2 :: 3] = logits[n // 2]
    expected, order = log_softmax(logits), np.argsort(-logits, kind="stable")
    for k in {k for k in (1, 2, 20, 78, 79, 80, n) if k <= n}:
        tokens, logprobs = backends.top_logprobs(logits, k)
        np.testing.assert_array_equal(tokens, order[:k])
        np.testing.assert_allclose(logprobs, expected[order[:k]], rtol=0, atol=logprob_tolerance(logits))
    for token in {0, n // 2, n - 1}:
        assert backends.logprob(logits, token) == pytest.approx(
            expected[token], abs=logprob_tolerance(logits)
        )


def test_exponential_and_logarithm() -> None:
    """Of logits 0 and x, the log probability of the first is -log(1 + e^x). e^x errs by 2 ulp, or 4 epsilon
    relatively; its share of the sum counts; the result is rounded once."""
    for x in np.linspace(-90, 0, 4001).astype(np.float32):
        share = math.exp(x) / (1 + math.exp(x))
        expected = -math.log1p(math.exp(x))
        error = abs(backends.logprob(np.array([0, x], dtype=np.float32), 0) - expected)
        assert error <= 4 * EPSILON * share + EPSILON * abs(expected) + 2.0**-52
    assert backends.logprob(np.zeros(2**10, dtype=np.float32), 5) == np.float32(-10 * math.log(2))


def test_logprob_is_the_models_own() -> None:
    """Not that of the distribution drawn from: penalties, bias, filters and processors leave it alone."""
    logits = random_logits(6, 400, 2.0)
    expected = log_softmax(logits)
    for params in (
        {"temperature": 0.3, "top_k": 3},
        {"logit_bias": dict.fromkeys(range(100), 5.0), "repetition_penalty": 1.5},
        {"processors": [lambda x, tokens: x * 0.1]},
    ):
        sampler = sampler_for(logits, top_logprobs=5, **params)
        for position in range(20):
            token, logprob, top = sampler(logits, [3, 4], position)
            assert logprob == pytest.approx(expected[token], abs=logprob_tolerance(logits))
            assert [id for id, _ in top] == np.argsort(-logits, kind="stable")[:5].tolist()
            assert [value for _, value in top] == pytest.approx(
                np.sort(expected)[::-1][:5].tolist(), abs=logprob_tolerance(logits)
            )


def test_top_logprobs_stop_at_the_vocabulary() -> None:
    logits = of_probabilities(0.25, 0.75)
    assert len(sampler_for(logits, top_logprobs=10)(logits, [], 0).top) == 2
    assert sampler_for(logits)(logits, [], 0).top == []


# ---- processors ------------------------------------------------------------------------------------------


def test_processors_see_tokens_and_change_logits() -> None:
    logits = np.array([3, 2, 1], dtype=np.float32)
    seen = []

    def in_place(x: Floats, tokens: Any) -> None:
        seen.append(list(tokens))
        x[0] = -np.inf

    def new(x: Floats, tokens: Any) -> npt.NDArray[np.float64]:
        assert x[0] == -np.inf
        return np.where(np.arange(3) == 2, 9.0, x.astype(np.float64))

    assert sampler_for(logits, temperature=0, processors=[in_place])(logits, [4, 5], 0).token == 1
    assert sampler_for(logits, temperature=0, processors=[in_place, new])(logits, [4, 5], 0).token == 2
    assert seen == [[4, 5], [4, 5]]
    assert logits.tolist() == [3, 2, 1]


def test_processor_errors() -> None:
    logits = np.zeros(3, dtype=np.float32)
    with pytest.raises(ArgumentError, match=r"returned shape \[2\], expected \[3\]"):
        sampler_for(logits, processors=[lambda x, tokens: x[:2]])(logits, [], 0)
    with pytest.raises(ArgumentError, match="all 3 logits are -inf"):
        sampler_for(logits, processors=[lambda x, tokens: x - np.float32(np.inf)])(logits, [], 0)
    with pytest.raises(ZeroDivisionError):
        sampler_for(logits, processors=[lambda x, tokens: 1 // 0])(logits, [], 0)


# ---- parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1, expected 0 to 1000 \(0 is greedy\)"),
        ({"temperature": math.nan}, "temperature is nan, expected"),
        ({"temperature": math.inf}, "temperature is inf, expected"),
        ({"top_k": -1}, r"top_k is -1, expected 0 to \d+ \(0 turns it off\)"),
        ({"top_p": 1.1}, r"top_p is 1.1, expected 0 to 1 \(1 turns it off\)"),
        ({"min_p": -0.5}, r"min_p is -0.5, expected 0 to 1 \(0 turns it off\)"),
        ({"typical_p": 2}, "typical_p is 2, expected 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected 0.001 to 1000"),
        ({"presence_penalty": 1e9}, "presence_penalty is .*, expected -1000 to 1000"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan, expected -1000 to 1000"),
        ({"penalty_window": -2}, r"penalty_window is -2, expected -1 .*whole text"),
        ({"seed": -1}, "seed is -1, expected 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed is 18446744073709551616, expected"),
        ({"max_tokens": 0}, "max_tokens is 0, expected 1 to"),
        ({"top_logprobs": -1}, "top_logprobs is -1, expected 0 to"),
        ({"logit_bias": {-1: 1.0}}, "token id in logit_bias is -1, expected 0 to"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 is nan, expected -inf to 1000"),
        ({"logit_bias": {3: math.inf}}, "logit_bias of token 3 is inf, expected -inf to 1000"),
        ({"stop": ""}, "empty string"),
        ({"stop": ["a", ""]}, "empty string"),
        ({"min_tokens": -1}, r"min_tokens is -1, expected 0 to \d+ \(0 turns it off\)"),
        ({"suppress_tokens": [-1]}, "a token id in suppress_tokens is -1, expected 0 to"),
        ({"begin_suppress_tokens": [2**31]}, "a token id in begin_suppress_tokens is 2147483648, expected 0"),
        ({"bad_words_ids": [[3, -2]]}, "a token id in bad_words_ids is -2, expected 0 to"),
        ({"bad_words_ids": [[]]}, "bad_words_ids has an empty sequence"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1, expected 0 to"),
        ({"dry_multiplier": -0.5}, r"dry_multiplier is -0.5, expected 0 to 1000 \(0 turns it off\)"),
        ({"dry_base": 0.5}, r"dry_base is 0.5, expected 1 to 1000 \(dry_multiplier=0 turns it off\)"),
        ({"dry_allowed_length": -1}, "dry_allowed_length is -1, expected 0 to"),
        ({"dry_penalty_last_n": -2}, r"dry_penalty_last_n is -2, expected -1 .*whole text"),
        ({"dry_sequence_breakers": ""}, "dry_sequence_breakers has an empty string"),
        ({"xtc_probability": 1.5}, "xtc_probability is 1.5, expected 0 to 1"),
        ({"xtc_threshold": math.nan}, "xtc_threshold is nan, expected 0 to 1"),
    ],
)
def test_values_out_of_range(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SamplingParams(**params)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": 1.5},
        {"top_k": False},
        {"seed": "1"},
        {"logprobs": 1},
        {"top_logprobs": None},
        {"logit_bias": [(1, 2.0)]},
        {"logit_bias": {"1": 2.0}},
        {"logit_bias": {1: "2"}},
        {"stop": b"a"},
        {"stop": ["a", 1]},
        {"stop": 3},
        {"processors": [3]},
        {"min_tokens": 1.5},
        {"suppress_tokens": 3},
        {"suppress_tokens": "3"},
        {"suppress_tokens": ["3"]},
        {"begin_suppress_tokens": {3: 1.0}},
        {"bad_words_ids": [3]},
        {"bad_words_ids": "ab"},
        {"bad_words_ids": ["ab"]},
        {"dry_sequence_breakers": [3]},
        {"no_repeat_ngram_size": True},
    ],
)
def test_wrong_types(params: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        SamplingParams(**params)


def test_resolve() -> None:
    filled = SamplingParams(top_k=7).resolve(
        {"temperature": 0.6, "top_k": 50, "top_p": None, "eos_ids": (2,)}
    )
    assert (filled.temperature, filled.top_k, filled.top_p, filled.min_p) == (0.6, 7, 0.95, 0.05)
    assert (filled.typical_p, filled.repetition_penalty, filled.penalty_window) == (1, 1, 64)
    assert (filled.presence_penalty, filled.frequency_penalty, filled.max_tokens) == (0, 0, None)
    assert filled.resolve({"temperature": 0.1}) == filled
    assert SamplingParams(temperature=0).resolve({"temperature": 0.9}).temperature == 0
    plain = SamplingParams().resolve()
    assert (plain.temperature, plain.top_k) == (0.8, 40)
    assert len({SamplingParams().resolve().seed for _ in range(8)}) > 1
    assert replace(plain, seed=9).resolve().seed == 9


@pytest.mark.parametrize("defaults", [{"top_p": 1.5}, {"top_k": 2.5}, {"temperature": "warm"}])
def test_broken_model_defaults(defaults: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"the model's own sampling defaults: {next(iter(defaults))}"):
        SamplingParams().resolve(defaults)


def test_normal_forms() -> None:
    params = SamplingParams(stop="end", temperature=1, top_k=np.int64(3), logit_bias={np.int32(4): 1})  # type: ignore[dict-item]
    assert params.stop == ("end",)
    assert params.logit_bias == {4: 1.0}
    assert [type(value) for value in (params.temperature, params.top_k)] == [float, int]


def test_calls_with_wrong_inputs() -> None:
    logits = np.zeros(4, dtype=np.float32)
    sampler = sampler_for(logits, repetition_penalty=2.0)
    for wrong in (np.zeros(5, np.float32), np.zeros((1, 4), np.float32), np.zeros(4, np.float64)):
        with pytest.raises(ArgumentError, match=r"logits are .*, expected float32 \[4\]"):
            sampler(wrong, [], 0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="token 1 of the history is 4, expected 0 to 3"):
        sampler(logits, [0, 4], 0)
    for name, value in (
        ("logit_bias", {4: 1.0}),
        ("suppress_tokens", [4]),
        ("begin_suppress_tokens", [4]),
        ("bad_words_ids", [[1, 2], [4, 1]]),
    ):
        with pytest.raises(ArgumentError, match=f"{name} names token 4, expected 0 to 3"):
            Sampler(SamplingParams(**{name: value}), 4)
    for value, name in ((math.nan, "NaN"), (math.inf, r"\+inf")):
        logits[2] = value
        with pytest.raises(ArgumentError, match=f"the logit of token 2 is {name}"):
            sampler(logits, [], 0)
        with pytest.raises(ArgumentError, match=f"the logit of token 2 is {name}"):
            backends.top_logprobs(logits, 1)
    logits[:] = -math.inf
    with pytest.raises(ArgumentError, match="all 4 logits are -inf: leave"):
        sampler(logits, [], 0)
    logits[:] = 0
    with pytest.raises(ArgumentError, match="all 4 logits are -inf after logit bias, bans and penalties"):
        sampler_for(logits, logit_bias=dict.fromkeys(range(4), -math.inf))(logits, [], 0)


# ---- stop strings ----------------------------------------------------------------------------------------


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The match that ends first, the longest of those that end together, by looking at the whole text."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end - max(map(len, ending)), max(ending, key=len)
    return None


words = st.text(alphabet="ab\u00e9", min_size=1, max_size=5)


@settings(deadline=None, max_examples=500)
@given(
    pieces=st.lists(st.text(alphabet="ab\u00e9", max_size=4), max_size=12), stops=st.lists(words, max_size=4)
)
def test_stop_strings(pieces: list[str], stops: list[str]) -> None:
    matcher, text, passed = StopStrings(stops), "", ""
    for piece in pieces:
        text += piece
        passed += matcher.feed(piece)
        match = first_match(text, stops)
        if match:
            assert (passed, matcher.found) == (text[: match[0]], match[1])
            continue
        assert matcher.found is None
        assert text.startswith(passed)
        # Held back is exactly the longest end of the text with which a stop string may begin.
        held = next(
            i for i in range(len(text) + 1) if i == len(text) or any(s.startswith(text[i:]) for s in stops)
        )
        assert passed == text[:held]
    final = first_match(text, stops)
    assert passed + matcher.flush() == (text[: final[0]] if final else text)


UNITS = st.lists(
    st.sampled_from(["a", "b", "<x>", "<", "x", ">", hidden("<x>"), hidden("<x>a"), hidden("")]), max_size=10
)


def first_match_of_units(units: list[str], stops: list[str]) -> tuple[int, str] | None:
    """As `first_match`, over characters and hidden tokens, which count as a whole or not at all."""
    texts = [unit[1:-1] if unit == hidden(unit[1:-1]) else unit for unit in units]
    for end in range(1, len(units) + 1):
        for start in range(end):
            if "" not in texts[start:end] and "".join(texts[start:end]) in stops:
                return start, "".join(texts[start:end])
    return None


@settings(deadline=None, max_examples=1000)
@given(
    UNITS,
    st.lists(st.sampled_from(["<x>", "a<x>b", "<x>a", "ab", "x>", ">", "<x><x>"]), max_size=3),
    st.data(),
)
@example(["a", hidden("<x>"), "b"], ["ab"], None)
def test_stop_strings_and_hidden_tokens(units: list[str], stops: list[str], data: Any) -> None:
    """A hidden token matches its own text as a whole, nothing goes on across it, and it is not passed on."""
    characters = [part for unit in units for part in ([unit] if unit.startswith("\ud800") else unit)]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(characters))))) if data else [1]
    pieces = ["".join(characters[a:b]) for a, b in pairwise([0, *cuts, len(characters)])]
    matcher = StopStrings(stops)
    passed = "".join(map(matcher.feed, pieces))
    match = first_match_of_units(characters, stops)
    assert matcher.found == (match[1] if match else None)
    kept = characters[: match[0]] if match else characters
    assert passed + matcher.flush() == "".join(c for c in kept if not c.startswith("\ud800"))


def test_stop_string_across_pieces() -> None:
    matcher = StopStrings("</end>")
    assert [matcher.feed(piece) for piece in ("text <", "b> </", "en", "d> more")] == [
        "text ",
        "<b> ",
        "",
        "",
    ]
    assert matcher.found == "</end>"
    assert matcher.feed("later") == ""
    assert matcher.flush() == ""


# ---- many rows in one call


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32))
def test_many_rows_at_once_are_the_same_choices(n: int, threads: int, seed: int) -> None:
    """Each with its own parameters, history, mask and errors, bit for bit as alone."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (n, 200)).astype(np.float32)
    rows, alone = [], []
    for i in range(n):
        params = SamplingParams(
            temperature=float(rng.choice([0, 0.7, 1.5])),
            top_k=int(rng.choice([0, 5, 40])),
            repetition_penalty=float(rng.choice([1, 1.3])),
            logit_bias={3: 1.5} if rng.random() < 0.5 else {},
            seed=int(rng.integers(2**32)),
        )
        sampler = Sampler(params, 200)
        history = [int(t) for t in rng.integers(0, 200, 30)]
        mask = rng.integers(1, 2**32, 7, dtype=np.uint32) if rng.random() < 0.5 else None
        if rng.random() < 0.2:
            logits[i, 7] = np.nan
        rows.append(sampler.row(logits[i], history, 30, mask))
        try:
            chosen = sampler(logits[i], history, 30, mask)
            alone.append((chosen.token, chosen.logprob))
        except ArgumentError as error:
            alone.append(str(error))
    assert backends.sample_rows(rows, threads) == alone


def test_no_rows_and_a_mask_that_is_too_short() -> None:
    assert backends.sample_rows([], 2) == []
    row = Sampler(SamplingParams(seed=1), 64).row(np.zeros(64, np.float32), [], 0, np.ones(1, np.uint32))
    with pytest.raises(ArgumentError, match="a bit for each logit"):
        backends.sample_rows([row], 1)
