"""Guesses of a second, smaller model that reads along.

Invariant: its own sequence holds the text's certain tokens alone; what it makes up grows in a fork that is
closed at once. With the target's vocabulary it chooses as the text's sampler does, with the random numbers of
each position: two models that agree about the odds then draw the same token. With another vocabulary what is
new in the text is read again as text, and what it says is turned back. Imports `engine`, `sampling`,
`backends` and what is asked of a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from tinyllm import backends
from tinyllm.engine.engine import Engine, Job
from tinyllm.engine.kvcache import NOTHING, Applied
from tinyllm.engine.sampling import Sampler

UNSURE = 0.2  # probability of all guesses together, below which it says no more
GRADES = 4  # of the first guess's probability


class Tokenizer(Protocol):
    """What is asked of a tokenizer; `tokenizer.Tokenizer` is one."""

    @property
    def vocab_size(self) -> int: ...

    def token_bytes(self, token: int) -> bytes: ...

    def encode(self, text: str, bos: bool | None = None, special: bool = False) -> list[int]: ...


class Draft:
    """Of one text."""

    def __init__(
        self,
        engine: Engine,
        context: int,
        *,
        applied: Applied = NOTHING,
        sampler: Sampler | None = None,
        translation: Translation | None = None,
    ) -> None:
        """context: tokens that the draft's engine lets a sequence hold. sampler: the text's, where the
        vocabularies are one and it runs no Python code; else the likeliest token is said."""
        self.grade = 0
        self._engine, self._context = engine, context
        self._sampler, self._translation = sampler, translation
        self._sequence = engine.sequence(applied=applied)

    def propose(self, tokens: list[int], n: int) -> list[int]:
        certain = self._sequence.tokens
        if self._translation is None:
            certain += tokens[len(certain) :]
        else:
            certain += self._translation.read(tokens)
        n = min(n, self._context - len(certain))
        if n <= 0 or not certain:
            return []
        token, chance = self._next(self._sequence)
        self.grade = int(chance * GRADES)
        said = [token]
        if n > 1 and chance > UNSURE:
            fork = self._engine.fork(self._sequence)
            try:
                while len(said) < n and chance > UNSURE:
                    fork.tokens.append(said[-1])
                    token, likely = self._next(fork)
                    said.append(token)
                    chance *= likely
            finally:
                fork.close()
        return said if self._translation is None else self._translation.said(said)[:n]

    def _next(self, sequence: Any) -> tuple[int, float]:
        """The token that it chooses after a sequence, and its probability."""
        (row,) = [rows[-1] for rows in self._engine.evaluate(Job(sequence))]
        if self._sampler is not None:
            token = self._sampler(row, sequence.tokens, len(sequence.tokens)).token
        else:
            token = int(np.argmax(row))
        return token, float(np.exp(backends.logprob(row, token)))

    def close(self) -> None:
        self._sequence.close()


class Translation:
    """Between the ids of a target and those of a draft, piece by piece through text."""

    def __init__(self, target: Tokenizer, draft: Tokenizer) -> None:
        self._target, self._draft = target, draft
        self._n_read = 0
        self._rest = b""  # of a character that is not whole yet

    def read(self, tokens: Sequence[int]) -> list[int]:
        """What is new in the target's tokens, in the draft's. The first time as a text of its own, later as
        more of it: a tokenizer may cut it otherwise, which makes guesses worse and nothing else."""
        is_first, new = self._n_read == 0, tokens[self._n_read :]
        self._n_read = len(tokens)
        text, self._rest = _whole(self._rest + _bytes_of(self._target, new))
        return self._draft.encode(text, special=True) if is_first else _within(self._draft, text)

    def said(self, tokens: Sequence[int]) -> list[int]:
        """What the draft says, in the target's ids; without the character that is not whole."""
        if self._rest:
            return []
        text, _ = _whole(_bytes_of(self._draft, tokens))
        return _within(self._target, text)


def same_vocabulary(target: Tokenizer, draft: Tokenizer) -> bool:
    """Whether an id stands for the same in both."""
    n = target.vocab_size
    of: Callable[[Tokenizer], list[bytes]] = lambda t: [t.token_bytes(i) for i in range(n)]  # noqa: E731
    return n == draft.vocab_size and of(target) == of(draft)


def _within(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in the midst of another: a tokenizer may begin every text with a space."""
    before = tokenizer.encode("\n", bos=False)
    ids = tokenizer.encode("\n" + text, bos=False, special=True)
    return ids[len(before) :] if ids[: len(before)] == before else tokenizer.encode(text, bos=False)


def _bytes_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(token) for token in tokens if token < tokenizer.vocab_size)


def _whole(data: bytes) -> tuple[str, bytes]:
    """The characters that are whole, and the bytes after them."""
    for n in range(min(4, len(data) + 1)):
        try:
            return data[: len(data) - n].decode(), data[len(data) - n :]
        except UnicodeDecodeError:
            continue
    return data.decode(errors="replace"), b""
