"""Which tokens may follow, for each text in the making: llguidance's parser over a model's own vocabulary.

Invariant: `mask` allows a token exactly if the grammar allows the bytes it stands for after those of the
accepted ones, and an end of text exactly where the grammar may end. Imports `errors` and llguidance.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tinyllm.constraints.forms import Form, guidance
from tinyllm.errors import ConstraintError

Bits = npt.NDArray[np.uint32]


class Tokens(Protocol):
    """What is asked of a tokenizer; `tokenizer.Tokenizer` is one."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token: int) -> bytes: ...

    def encode(self, text: str, bos: bool | None = None, special: bool = False) -> list[int]: ...


class Vocabulary:
    """A model's tokens as bytes, for any number of grammars. Making one takes a moment; it is kept."""

    def __init__(self, tokenizer: Tokens, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """vocab_size: of the model, which may have more ids than its tokenizer; those stand for nothing.
        eos_ids: what ends a text."""
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        n = min(tokenizer.vocab_size, vocab_size)
        self.tokens = [tokenizer.token_bytes(i) for i in range(n)] + [b""] * (vocab_size - n)
        self._longest = max(map(len, self.tokens), default=0)
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocab_size)
        special = set(self.special_token_ids)
        self._ids = {
            text: i for i, text in reversed(list(enumerate(self.tokens))) if text and i not in special
        }
        ends = sorted(i for i in eos_ids if i < vocab_size)
        if not ends:
            raise ConstraintError("the model has no token that ends a text, which an answer of a form needs")
        self.eos_token_id, self.bos_token_id = ends[0], None
        llguidance = guidance()
        wrapped = llguidance.TokenizerWrapper(self)
        self.core = llguidance.LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=ends)

    def __call__(self, text: bytes | str) -> list[int]:
        """The ids of bytes in the midst of a text, as the tokenizer cuts them where its ids stand for just
        these bytes; else the longest tokens first."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        try:
            words = data.decode()
        except UnicodeDecodeError:
            return self._longest_first(data)
        for before in ("", "\n", "."):  # a tokenizer may begin every text with a space
            head = self._tokenizer.encode(before, bos=False) if before else []
            ids = self._tokenizer.encode(before + words, bos=False)
            rest = ids[len(head) :]
            if ids[: len(head)] == head and b"".join(self.tokens[i] for i in rest) == data:
                return rest
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            lengths = range(min(self._longest, len(data) - at), 0, -1)
            found = next((n for n in lengths if data[at : at + n] in self._ids), None)
            if found is None:
                break  # bytes that no token stands for: what is there so far is forced all the same
            ids.append(self._ids[data[at : at + found]])
            at += found
        return ids


class Grammar:
    """A form, compiled for a vocabulary. Safe from many threads."""

    def __init__(self, form: Form, vocabulary: Vocabulary) -> None:
        """Raises ConstraintError for a grammar that this vocabulary cannot write."""
        self._vocabulary, self._lock = vocabulary, threading.Lock()
        self._matcher = guidance().LLMatcher(vocabulary.core, form.grammar, log_level=0)
        _check(self._matcher)

    def start(self, *, forces: bool = True) -> GrammarConstraint:
        """For one text, from its beginning. forces: whether it says which tokens must follow."""
        with self._lock:
            return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary.vocab_size, forces)


class GrammarConstraint:
    """One text's way through a grammar. For one thread at a time."""

    def __init__(self, matcher: Any, vocab_size: int, forces: bool) -> None:
        self._matcher, self._forces = matcher, forces
        self._coming: Future[None] | None = None  # a mask in the making, while the parser is not to be asked
        self._is_over: bool = matcher.is_stopped()
        self._bits = np.zeros(-(-vocab_size // 32), np.uint32)

    def prepare(self) -> None:
        """Begins with the next mask, in a thread beside the model's call."""
        if self._coming is None:
            self._coming = _masks().submit(self._compute)

    def mask(self) -> Bits:
        """A bit a token, the lowest first: uint32 [vocab_size / 32, rounded up]. Valid until the next call.
        Raises ConstraintError where the parser gives up (a grammar too large)."""
        coming, self._coming = self._coming, None
        if coming is None:
            self._compute()
        else:
            coming.result()
        _check(self._matcher)
        return self._bits

    def _compute(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)

    def accept(self, token: int) -> None:
        """The next token of the text, one of those allowed."""
        if self._coming is not None:  # nobody asked for that mask, and the parser is busy with it
            self.mask()
        if not self._matcher.consume_token(token):
            raise ConstraintError(f"token {token} is not one that the form allows")
        self._is_over = self._matcher.is_stopped()

    def mask_after(self, tokens: Sequence[int]) -> Bits | None:
        """What `mask` would be after these tokens, as an array of its own; None where the form does not allow
        them, or is over with them. The text stays where it is."""
        if self._coming is not None:
            self.mask()
        n = self._matcher.try_consume_tokens(list(tokens))
        bits = None
        if n == len(tokens) and not self._matcher.is_stopped():
            self._compute()
            bits = self._bits.copy()
        self.rollback(n)
        return bits

    def rollback(self, n: int) -> None:
        """Takes back the last n tokens."""
        if not self._matcher.rollback(n):
            _check(self._matcher)
        self._is_over = self._matcher.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that must follow now whatever the model says; [] where it has a choice."""
        if not self._forces or self._is_over:
            return []
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow."""
        return self._is_over


@functools.cache
def _masks() -> ThreadPoolExecutor:
    """One thread: a mask takes 50 us, a call of the model a thousand times that."""
    return ThreadPoolExecutor(1, thread_name_prefix="tinyllm-masks")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_masks.cache_clear)  # where that thread does not run


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise ConstraintError(f"the form cannot be enforced: {matcher.get_error()[:500]}")
