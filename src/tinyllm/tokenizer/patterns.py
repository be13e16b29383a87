"""How long a regular expression from a file can take, told from its text.

A tokenizer.json brings regular expressions that split every text, and the engine that runs them (Oniguruma,
inside the tokenizers package) goes back to try again wherever a part can match in several ways and a later
one fails: the tries multiply, nothing interrupts them, and 20 characters of pattern can take years. So the
pattern is read here, and an upper bound of its steps is computed before the package sees it. What cannot be
bounded so (references to groups, recursion, conditions) is refused.

Imports errors, and of files how messages show texts. Used by from_directory.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NoReturn

from tinyllm.errors import UnsupportedError
from tinyllm.files import show

MAX_LENGTH = 4096  # characters of a pattern; the longest in common use has 700
MAX_DEPTH = 32  # groups inside groups
MAX_SIZE = 4096  # parts, counting again what is repeated a number of times
LENGTH = 1000  # characters of the text for which steps are counted
# From one position of such a text on. Patterns in use take up to 50 thousand; any repetition that can match
# in many ways before another one that can fail takes a million.
MAX_STEPS = 150_000
_MANY = 1e30  # ways: more do not matter

_COUNT = re.compile(r"\{(?=[0-9,]*[0-9])([0-9]{0,9})(,?)([0-9]{0,9})\}")  # any other { stands for itself
_SIGN = re.compile(r"[*+?]")
_FLAGS = re.compile(r"\?[ims-]*([:)])")
_LOOK = re.compile(r"\?(?:<?[=!]|>)")
_NAME = re.compile(r"\?<\w{1,64}>")
_CHARACTER = re.compile(r"x\{[0-9a-fA-F]{1,8}\}|x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{4}|[pP]\{\^?[\w =-]{1,64}\}|0")
_KINDS = "dDsSwWhHRNOtnrfvae"  # letters after a backslash that stand for a character
_ANCHORS = "bBAzZG"


@dataclass(frozen=True)
class Cost:
    """What a part of a pattern can take from one position.

    ways: in which it can match. steps: to match in any of them, fails: until it is clear that it does not; 0
    where it always matches. least: characters of the shortest match. size: parts."""

    ways: float
    steps: float
    fails: float
    least: int
    size: int


_CHAR = Cost(1, 1, 1, 1, 1)
_ANCHOR = Cost(1, 1, 1, 0, 1)


def cost_of(pattern: str) -> Cost:
    """Of the whole pattern. Raises UnsupportedError for one that is too costly, and for what only a pattern
    that means harm needs."""
    return _Reader(pattern).read()


def _in_turn(parts: list[Cost]) -> Cost:
    """One part after another. Each is tried again in all its ways as long as a later one can fail."""
    if len(parts) == 1:
        return parts[0]
    last = max((i for i, part in enumerate(parts) if part.fails), default=-1)
    ways, fails = 1.0, 0.0
    for i, part in enumerate(parts[: last + 1]):
        fails += ways * (part.fails + (part.steps if i < last else 0))
        ways *= part.ways
    return Cost(
        min(_MANY, math.prod(part.ways for part in parts)),
        fails + sum(part.steps for part in parts),
        fails,
        sum(part.least for part in parts),
        sum(part.size for part in parts),
    )


def _one_of(branches: list[Cost]) -> Cost:
    """`a|b|c`: the first that matches, and the others when what follows fails."""
    if len(branches) == 1:
        return branches[0]
    fails = sum(branch.fails for branch in branches)
    return Cost(
        min(_MANY, sum(branch.ways for branch in branches)),
        sum(max(branch.steps, branch.fails) for branch in branches),
        fails if all(branch.fails for branch in branches) else 0,
        min(branch.least for branch in branches),
        sum(branch.size for branch in branches),
    )


def _repeated(part: Cost, low: int, high: int | None) -> Cost:
    times = max(low, LENGTH if high is None else min(high, LENGTH))
    # Each turn in all its ways, and all numbers of turns.
    ways = 2 * _power(part.ways, times) if part.ways > 1 else times - low + 1
    fails = _power(part.ways, low - 1) * (part.fails + (low - 1) * part.steps) if low and part.fails else 0
    steps = times * part.steps + (part.fails if times > low else 0)
    size = max(part.size, 1) * max(low, high or 1)
    return Cost(ways, max(steps, fails), fails, part.least * low, size)


def _power(x: float, n: int) -> float:
    return _MANY if n * math.log10(x) > math.log10(_MANY) else x**n


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0

    def read(self) -> Cost:
        if len(self._text) > MAX_LENGTH:
            self._refuse(f"has {len(self._text)} characters, and {MAX_LENGTH} is the most")
        cost = self._branches()
        if self._at < len(self._text):
            self._refuse("closes a group that it does not open")
        if cost.steps > MAX_STEPS:
            self._refuse(
                "can take a time without bound: it repeats what can itself match in several ways, or has "
                "several repetitions before a part that can fail"
            )
        return cost

    def _refuse(self, why: str) -> NoReturn:
        raise UnsupportedError(f"the regular expression {show(self._text)} {why}")

    def _next(self) -> str:
        if self._at == len(self._text):
            self._refuse("ends amid a group, a class or an escape")
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, what: re.Pattern[str]) -> re.Match[str] | None:
        found = what.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return found

    def _skip(self, c: str) -> bool:
        found = self._text.startswith(c, self._at)
        self._at += found
        return found

    def _branches(self) -> Cost:
        """Up to the end of the group."""
        branches: list[Cost] = []
        parts: list[Cost] = []
        while self._at < len(self._text) and self._text[self._at] != ")":
            if self._skip("|"):
                branches.append(_in_turn(parts))
                parts = []
            else:
                parts.append(self._quantified(self._part()))
        cost = _one_of([*branches, _in_turn(parts)])
        if cost.size > MAX_SIZE:
            self._refuse(f"counts to more than {MAX_SIZE}")
        return cost

    def _quantified(self, part: Cost) -> Cost:
        while self._at < len(self._text):
            if found := self._take(_SIGN):
                low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[0]]
                part = _repeated(part, low, high)
                if self._skip("+"):  # possessive: what it took it keeps
                    part = Cost(1, part.steps, part.fails, part.least, part.size)
            elif found := self._take(_COUNT):
                low, high = int(found[1] or 0), int(found[3]) if found[3] else None
                high = high if found[2] else low
                part = _repeated(part, *((high, low) if high is not None and high < low else (low, high)))
            else:
                break
            self._skip("?")  # lazy: the same ways in another order
            if part.size > MAX_SIZE:
                self._refuse(f"counts to more than {MAX_SIZE}")
        return part

    def _part(self) -> Cost:
        c = self._next()
        if c == "(":
            return self._group()
        if c == "[":
            self._class()
        elif c == "\\":
            return self._escape()
        elif c in "^$":
            return _ANCHOR
        elif c in "*+?":
            self._refuse(f"has {c} after nothing that it could repeat")
        return _CHAR

    def _escape(self) -> Cost:
        if self._take(_CHARACTER):
            return _CHAR
        c = self._next()
        if c in _ANCHORS:
            return _ANCHOR
        if c.isascii() and c.isalnum() and c not in _KINDS:
            self._refuse(f"uses \\{c}, which tinyllm does not follow")
        return _CHAR

    def _class(self, depth: int = 1) -> None:
        """`[...]`, which may hold others."""
        if depth > MAX_DEPTH:
            self._refuse(f"nests deeper than {MAX_DEPTH}")
        self._skip("^")
        if self._skip("]"):
            self._refuse("has an empty class of characters")
        while (c := self._next()) != "]":
            if c == "[":
                self._class(depth + 1)
            elif c == "\\":
                self._escape()

    def _group(self) -> Cost:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"nests deeper than {MAX_DEPTH}")
        kind = ""
        if found := self._take(_FLAGS):
            if found[1] == ")":  # (?i) holds up to the end of the group around it, in all its branches
                cost = self._branches()
                self._depth -= 1
                return cost
        elif found := self._take(_LOOK):
            kind = found[0]
        elif not self._take(_NAME) and self._text[self._at : self._at + 1] in ("?", "*"):
            self._refuse(f"has a group that begins with {show(self._text[self._at - 1 : self._at + 3])}")
        cost = self._branches()
        if self._next() != ")":
            self._refuse("does not close a group")
        self._depth -= 1
        if kind == "?>":
            return Cost(1, cost.steps, cost.fails, cost.least, cost.size)
        if kind:  # looks ahead, or behind, where a text of each length is tried
            steps = (cost.steps + cost.fails) * (min(cost.ways, LENGTH) if "<" in kind else 1)
            return Cost(1, steps, steps or 1, 0, cost.size + 1)
        return cost
