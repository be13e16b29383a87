"""How many guessed tokens a text has computed with its next call. Changes no bit: a guess that is not what
the target's own sampler chooses is dropped, so it costs or saves time alone.

Invariant: by the measured times of calls, guessing takes no text more than LOSS longer, and one call at its
beginning. Who guesses is known by `propose` alone (guessers/). How often its guesses are right is counted by
its own `grade` of them (how sure it is: any small number), for this text and, to begin with, for all texts.
What they cost is learned from the calls that were made. Imports `errors`; engine.py asks it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol

from tinyllm.errors import ArgumentError, Error, number_text

MOST = 15  # guesses of a call: with the token before them a matrix unit's 16
LOSS = 0.01  # of a text's time that guesses may cost it
GAIN = 1.03  # that is expected of guesses at least: less is not worth its noise
STRETCH = 1.1  # of a call by one text's guesses, where other texts are in it
UNKNOWN = 0.05  # of a call that one token more is thought to take before anybody has tried
DEAR = 0.02  # of a call: what takes longer to guess is asked for as many as are worth it
KEPT = 5  # calls of a size whose median is what it takes
FORGET = 0.85  # what is left of older counts with each round of guesses
PRIOR = 1.5  # rounds of guesses that what is known of all texts counts as, in a new one

log = logging.getLogger(__name__)


class Guesser(Protocol):
    """Says how one text may go on. May have `grade`, a small whole number that says which of its guesses are
    right about equally often, for the last ones; and `close`, called when the text is over."""

    def propose(self, tokens: list[int], n: int) -> list[int]:
        """At most n tokens, in order; fewer, or none, where it has no idea. tokens: all so far, prompt
        included, which only grow; not to be changed. Raises an Error of ours where it cannot go on."""


class Costs:
    """What calls without prompts take, by their number of tokens, on this machine and model."""

    def __init__(self) -> None:
        self.n_texts = self.n_tokens = 1  # of the last call
        self.last_s = 0.0
        self._recent: dict[int, deque[float]] = {}
        self._known: list[tuple[int, float]] = []

    def learn(self, n_texts: int, n_tokens: int, seconds: float) -> None:
        self.n_texts, self.n_tokens, self.last_s = n_texts, n_tokens, seconds
        recent = self._recent.setdefault(n_tokens, deque(maxlen=KEPT))
        recent.append(seconds)
        known = dict(self._known)
        ordered = sorted(recent)
        known[n_tokens] = (ordered[len(ordered) // 2] + ordered[~(len(ordered) // 2)]) / 2  # the median
        self._known = sorted(known.items())

    def seconds(self, n: int) -> float | None:
        """Of a call of n tokens: a line between the sizes that are known, and beyond them."""
        known = self._known
        if not known:
            return None
        if len(known) == 1:
            return known[0][1] * (1 + UNKNOWN * (n - known[0][0]))
        i = next((i for i, (size, _) in enumerate(known) if size >= n), len(known) - 1)
        (a, a_s), (b, b_s) = known[max(i, 1) - 1], known[max(i, 1)]
        if n > b:  # few sizes are known: from the smallest, lest two neighbours' noise be all
            (a, a_s) = known[0]
        return max(0.0, a_s + (b_s - a_s) * (n - a) / (b - a))

    def most(self) -> int:
        """Tokens of a call of which anything is known: twice the largest so far."""
        return 2 * max((size for size, _ in self._known), default=1)


@dataclass
class Counts:
    """Of guesses of one grade: those that were tried, and those of them that were right, newer ones first."""

    tried: float = 2.0
    right: float = 1.0

    @property
    def share(self) -> float:
        return self.right / self.tried

    def add(self, tried: int, right: int) -> None:
        self.tried, self.right = FORGET * self.tried + tried, FORGET * self.right + right


@dataclass
class Record:
    """What is known of one kind of guesser over all texts of a model."""

    counts: dict[int, Counts] = field(default_factory=dict)
    guess_s: float = 0.0  # seconds that it takes for a guess
    spent_s: float = 0.0
    plain_s: float = 0.0

    def is_in_debt(self, plain_s: float) -> bool:
        """Whether guesses cost more than a share of all texts' time, and a call."""
        return self.spent_s - self.plain_s > LOSS * self.spent_s + plain_s


class Guessing:
    """One text's guesses. For one thread at a time."""

    def __init__(self, guesser: Guesser, costs: Costs, record: Record, vocab_size: int) -> None:
        self.drafted = self.accepted = 0
        self.spent_s, self.plain_s = 0.0, 0.0  # of its calls; what they would have taken without guesses
        self.read_s = 0.0  # that the guesser took to read the prompt
        self._has_read = False
        self._guesser: Guesser | None = guesser
        self._costs, self._record, self._vocab_size = costs, record, vocab_size
        self._counts: dict[int, Counts] = {}
        self._grade, self._guess_s = 0, 0.0

    @property
    def gain(self) -> float:
        """How many times as fast the text came as it would have without, by the measured times of calls."""
        return self.plain_s / (self.read_s + self.spent_s) if self.spent_s > 0 else 1.0

    def propose(self, tokens: list[int], room: int) -> list[int]:
        """What to compute with the text's next call beside the tokens that are certain; at most `room`."""
        self._guess_s = 0.0
        most = min(room, MOST, self._costs.most() - self._costs.n_texts)
        plain_s = self._costs.seconds(1) or 0.0
        if self._guesser is None or most <= 0 or self._left_s(plain_s) < 0:
            return []
        if self._record.guess_s > DEAR * plain_s:
            most = min(most, max((self._fitting(grade, most) for grade in self._grades()), default=most))
            if not most:
                return []
        started = time.perf_counter()
        try:
            guesses = self._checked(self._guesser.propose(tokens, most)[:most])
            self._grade = getattr(self._guesser, "grade", 0)
        except Error as error:
            log.warning("%s, and is not asked again in this text", error, exc_info=error.__cause__)
            self.close()
            guesses = []
        took_s = time.perf_counter() - started
        if self._has_read:
            self._guess_s = took_s
        else:  # it reads the prompt, which is the price of asking it at all
            self._has_read, self.read_s = True, took_s
        if not guesses:
            return []
        self._record.guess_s += 0.1 * (self._guess_s / len(guesses) - self._record.guess_s)
        return guesses[: self._fitting(self._grade, len(guesses))]

    def learn(self, n_computed: int, n_right: int) -> None:
        """What came of the last guesses, of which the call computed some."""
        plain_s = call_s = self._costs.last_s
        spent_s = call_s + self._guess_s
        if n_computed:
            usual_s = self._costs.seconds(max(1, self._costs.n_tokens - n_computed))
            plain_s = (n_right + 1) * min(call_s, call_s if usual_s is None else usual_s)
            tried = n_right + (n_right < n_computed)
            for counts in (
                self._counts_of(self._grade),
                self._record.counts.setdefault(self._grade, Counts()),
            ):
                counts.add(tried, n_right)
        self._guess_s = 0.0
        self.drafted, self.accepted = self.drafted + n_computed, self.accepted + n_right
        for book in (self, self._record):
            book.spent_s, book.plain_s = book.spent_s + spent_s, book.plain_s + plain_s

    def again(self) -> Guessing:
        """The same guesser for what comes next in its text, with an account of its own."""
        other = copy(self)
        other.drafted, other.accepted, other.spent_s, other.plain_s = 0, 0, 0.0, 0.0
        other.read_s, other._has_read = 0.0, False
        return other

    def close(self) -> None:
        guesser, self._guesser = self._guesser, None
        close = getattr(guesser, "close", None)
        if close is not None:
            close()

    def _fitting(self, grade: int, most: int) -> int:
        """The number of guesses with which the next call makes the most tokens a second."""
        costs, share = self._costs, self._counts_of(grade).share
        others = max(0, costs.n_texts - 1)
        base = others + 1
        plain_s = costs.seconds(base)
        if not plain_s or (left_s := self._left_s(plain_s)) < 0:  # 0: what a line beyond the known ends at
            return 0
        best, best_rate = 0, GAIN * (others + 1) / plain_s
        made = chance = 1.0
        for n in range(1, most + 1):
            chance *= share
            made += chance
            call_s = costs.seconds(base + n) or plain_s
            took_s = call_s + n * self._record.guess_s
            if took_s - plain_s > left_s or (others and call_s > STRETCH * plain_s):
                break
            rate = (others + made) / took_s
            if rate > best_rate:
                best, best_rate = n, rate
        if best == 0 and self._may_explore(plain_s, base):
            return 1
        return best

    def _left_s(self, plain_s: float) -> float:
        """What guesses may still cost: a share of the text's time, and a call at its start where guesses for
        the texts before were worth their time."""
        allowance_s = LOSS * self.spent_s + (0.0 if self._record.is_in_debt(plain_s) else plain_s)
        return allowance_s + self.plain_s - self.spent_s

    def _may_explore(self, plain_s: float, base: int) -> bool:
        """Whether a guess that is not expected to pay may find out whether it does after all."""
        loss_s = (self._costs.seconds(base + 1) or plain_s) - plain_s
        return self.spent_s - self.plain_s + max(loss_s, plain_s / 20) <= LOSS * self.spent_s

    def _grades(self) -> list[int]:
        return list({*self._counts, *self._record.counts})

    def _counts_of(self, grade: int) -> Counts:
        if grade not in self._counts:
            share = self._record.counts.get(grade, Counts()).share
            self._counts[grade] = Counts(PRIOR, PRIOR * share)
        return self._counts[grade]

    def _checked(self, guesses: list[int]) -> list[int]:
        for token in guesses:
            if not 0 <= token < self._vocab_size:
                name = getattr(self._guesser, "__name__", type(self._guesser).__name__)
                raise ArgumentError(
                    f"the guesser {name} says token {number_text(token)}, which the vocabulary of "
                    f"{self._vocab_size} lacks"
                )
        return guesses
