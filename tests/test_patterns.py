"""The bound on a regular expression's time: those in use are below it, those that go back without end are
above, and what is below is quick in the package that runs them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from tinyllm.errors import UnsupportedError
from tinyllm.tokenizer import patterns
from tinyllm.tokenizer.patterns import MAX_STEPS, cost_of
from tinyllm.tokenizer.pretokenizers import PRE_TOKENIZERS


def regexes(value: Any) -> set[str]:
    """Those in the settings of a pre-tokenizer."""
    if isinstance(value, dict):
        own = {value["Regex"]} if "Regex" in value else set()
        return own.union(*map(regexes, value.values()))
    return set().union(*map(regexes, value)) if isinstance(value, list) else set()


OF_MODELS = {x for rule in PRE_TOKENIZERS.values() for x in regexes(json.loads(rule.build().__getstate__()))}
OTHERS = [  # in the form of those that models have
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    r"(?=(\d{3})+(?!\d))",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[\p{Han}]+|[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"(?i)'s|'t|\w+",
    r" {2,}",
    r"<0x[0-9A-F]{2}>|<\|[^|]*\|>|(?<year>\d{4})|(?>a+)b|(?<=a)b|(?<!\n)c|\A\x{41}\u0042\z|a{,2}|{",
]


def test_patterns_of_models() -> None:
    assert len(OF_MODELS) > 12
    assert all(cost_of(pattern).steps < MAX_STEPS / 2 for pattern in (*OF_MODELS, *OTHERS))
    assert all(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in OTHERS)


REFUSED = {
    # Of few counts, which no engine minds; the bound is lowered for them.
    "(a{1,3}){1,3}$": "without bound",
    "(a|a){0,3}b": "without bound",
    "(?:a|aa){1,3}b": "without bound",
    "(?:a{1,3}){1,3}b": "without bound",
    "a{1,3}+": "without bound",  # after a count + repeats once more
    "(?:.|.){3}(?!)": "without bound",
    "(?:a?){4}a{4}": "without bound",
    "((a{0,3}){0,3}){0,3}b": "without bound",
    ".{0,3}.{0,3}(?!)": "without bound",
    ".{0,3}?.{0,3}?x": "without bound",
    r"\s{0,3}\s{0,3}\s{0,3}x": "without bound",
    "(?=.{0,3}.{0,3}x)": "without bound",
    "(?<!a{0,3}b{0,3}c{0,3})": "without bound",
    ".{0,9}(?i)x|.{0,9}y": "without bound",  # (?i) holds for both branches
    "(?:a|b)(?:a|b)(?:a|b)" * 2 + "c": "without bound",
    "(?>.{0,3}.{0,3}x)": "without bound",
    "|".join([".{0,3}x"] * 5): "without bound",
    r"(a)b\1": r"uses \\1",
    r"(?<x>a\g<x>?b?)": r"uses \\g",
    r"(?<x>a)\k<x>": r"uses \\k",
    r"[\c]](a)b": r"uses \\c",
    "(?~a)": r"begins with '\(\?~a",
    "(?(1)a|b)": r"begins with '\(\?\(1",
    "(?x) # ) (a)b": r"begins with '\(\?x\)",
    "(*FAIL)": r"begins with '\(\*FA",
    "((a{1,5}){1,5}){1,5}": "counts to more than 50",
    "a{51}": "counts to more than 50",
    "a" * 4097: "4097 characters",
    "(" * 40 + ")" * 40: "nests deeper than 32",
    "(?i)" * 40: "nests deeper than 32",
    "[" * 40 + "a" + "]" * 40: "nests deeper than 32",
    "[]a]": "empty class",
    "(": "ends amid",
    "[a": "ends amid",
    "\\": "ends amid",
    "a)": "does not open",
    "+": "after nothing",
}


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:30])
def test_patterns_that_go_back_without_end(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if REFUSED[pattern] == "without bound":
        monkeypatch.setattr(patterns, "MAX_STEPS", 20)
    if "counts" in REFUSED[pattern]:
        monkeypatch.setattr(patterns, "MAX_SIZE", 50)
    with pytest.raises(UnsupportedError, match=rf"the regular expression .*{REFUSED[pattern]}"):
        cost_of(pattern)


def test_the_shortest_match() -> None:
    for pattern, least in (("ab|c", 1), ("a*", 0), ("(?:ab){2,}c?", 4), ("^$", 0), ("(?=a)", 0), ("a?|b", 0)):
        assert cost_of(pattern).least == least


atoms = st.sampled_from(
    ["a", "b", ".", "[ab]", r"\w", "(?!)", "$", "x", r"\p{L}", "^", "[^a]", r"\b", "(?!b)"]
)
counts = st.sampled_from(
    ["*", "+", "?", "{2}", "{1,3}", "{0,20}", "{3,}", "{,4}", "*?", "+?", "??", "++", "*+", "{2,5}?", "{3}+"]
)
opens = st.sampled_from(["(?=", "(?!", "(?>", "(?<x>", "(?i:", "("])


def composed(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: f"(?:{a}|{b})", inner, inner),
        st.builds(lambda a, n: f"(?:{a}){n}", inner, counts),
        st.builds(lambda kind, a: f"{kind}{a})", opens, inner),
        st.builds(lambda a: f"(?i){a}", inner),
    )


@settings(max_examples=200, deadline=None)
@given(st.recursive(atoms, composed, max_leaves=8))
def test_what_is_allowed_is_quick(pattern: str) -> None:
    """Of a thousand characters, from each of which a match may begin: in theory 150 million steps."""
    try:
        cost_of(pattern)
    except UnsupportedError:
        return
    try:
        step = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception:  # not everything that can be composed is a pattern
        return
    for text in ("a" * 1000, "ab" * 500):
        start = time.process_time()
        step.pre_tokenize_str(text)
        assert time.process_time() - start < 2
