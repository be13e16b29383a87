"""A model for tests of the engine that knows nothing but pages. Like keys and values, what it keeps for a
token depends on all tokens before it, and what it answers on all that it reads back through the page tables;
so any mistake with pages, positions or sequences changes the text."""

from __future__ import annotations

import math
from collections.abc import Callable
from hashlib import blake2b
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm import backends
from tinyllm.engine.kvcache import PAGE
from tinyllm.errors import CancelledError

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

VOCAB = 260  # the bytes, and four more
EOS = 256
N_LAYERS = 4
NOTHING = -1  # a slot of a page that was cleared


def candidates(logits: F32, n: int, allowed: npt.NDArray[np.bool_] | None = None) -> backends.Candidates:
    """What a device gives of a row."""
    some = logits if allowed is None else np.where(allowed, logits, np.float32(-np.inf))
    order = np.argsort(-some, kind="stable")[:n].astype(np.int32)
    tokens = np.where(some[order] == -np.inf, np.int32(-1), order)
    sums = np.array([math.exp(-backends.logprob(logits, int(np.argmax(logits))))])
    return backends.Candidates(tokens[None], some[order][None], sums, logits.max(keepdims=True))[0]


class MockPool:
    """Pages of one number a token."""

    page_bytes = 1000
    epoch = 0

    def __init__(self, max_pages: int, slab: int = 3) -> None:
        self.max_pages, self._slab = max_pages, slab
        self.pages: list[I64] = []
        self.is_closed = False

    @property
    def n_pages(self) -> int:
        return len(self.pages)

    def grow(self, n_pages: int) -> None:
        assert n_pages <= self.max_pages
        while len(self.pages) < n_pages:
            n = min(self._slab, self.max_pages - len(self.pages))
            self.pages += [np.full(PAGE, 7777, dtype=np.int64) for _ in range(n)]

    def clear_page(self, page: int) -> None:
        self.pages[page][:] = NOTHING

    def copy_page(self, to: int, source: int, n_tokens: int) -> None:
        n = -(-n_tokens // 16) * 16
        self.pages[to][:n] = self.pages[source][:n]

    def read_page(self, page: int) -> npt.NDArray[np.uint8]:
        return self.pages[page].copy().view(np.uint8)

    def write_page(self, page: int, content: npt.NDArray[np.uint8]) -> None:
        self.pages[page][:] = content.view(np.int64)

    def close(self) -> None:
        self.is_closed = True


def kept(before: int, token: int) -> int:
    """What stands in a token's slot, from what stands in the one before it (-1 at the start)."""
    return ((before + 2) * 6364136223846793005 + token) % (1 << 61)


def slots_of(history: list[int]) -> list[int]:
    """What stands in the slots of a sequence."""
    slots = list(accumulate(history, kept, initial=-1))
    return slots[1:]


def logits_after(history: list[int], windows: tuple[int, ...] = (0,)) -> F32:
    """The model: float32 [VOCAB], a function of all tokens so far. Now and then a text ends."""
    slots = np.array(slots_of(history))
    return logits_from(np.concatenate([slots[-window:] + i for i, window in enumerate(windows)]))


def logits_from(slots: I64) -> F32:
    key = int.from_bytes(blake2b(slots.astype("<i8").tobytes(), digest_size=16).digest(), "little")
    noise = np.random.Philox(key=key).random_raw(VOCAB) >> np.uint64(40)
    logits: F32 = (noise.astype(np.float64) * 2.0**-24 * 8.0).astype(np.float32)
    logits[EOS] += 0.2
    return logits


class MockModel:
    """Writes the batch's tokens into their pages and answers from what the page tables lead to, as far back
    as each table's window goes (0: to the start)."""

    def __init__(self, windows: tuple[int, ...] = (0,)) -> None:
        self.windows = windows
        self.most_candidates = 0
        self.n_asked: list[tuple[int, int]] = []  # rows and candidates of each call for these
        self.calls: list[int] = []  # tokens of each call
        self.n_layers_run = 0
        self.before_layer: Callable[[], None] = lambda: None

    def forward(
        self,
        tokens_or_x: npt.NDArray[Any],
        positions: I32,
        sequences: I32,
        page_tables: I32,
        *,
        rows: I32 | None = None,
        cache: Any,
        should_stop: Callable[[], bool] | None = None,
    ) -> F32:
        tokens = tokens_or_x
        assert tokens.dtype == positions.dtype == sequences.dtype == page_tables.dtype == np.int32
        assert len(tokens) == len(positions) == len(sequences)
        assert (np.diff(sequences) >= 0).all()
        assert (np.diff(positions)[np.diff(sequences) == 0] == 1).all()
        self.calls.append(len(tokens))
        for token, position, sequence in zip(tokens, positions, sequences, strict=True):
            tables, last = page_tables[sequence], position - 1
            before = -1 if position == 0 else int(cache.pages[tables[0, last // PAGE]][last % PAGE])
            assert position == 0 or before != NOTHING, "a token comes after one that nobody wrote"
            for i, table in enumerate(tables):
                cache.pages[table[position // PAGE]][position % PAGE] = kept(before, int(token)) + i
        for _ in range(N_LAYERS):
            self.before_layer()
            if should_stop is not None and should_stop():
                raise CancelledError
            self.n_layers_run += 1
        out = []
        for row in range(len(tokens)) if rows is None else rows:
            n, seen = positions[row] + 1, []
            for table, window in zip(page_tables[sequences[row]], self.windows, strict=True):
                slots = np.concatenate([cache.pages[page] for page in table[: -(-n // PAGE)]])
                seen.append(slots[max(0, n - window) if window else 0 : n])
                assert (seen[-1] != NOTHING).all(), "a slot was read that nobody wrote"
            out.append(logits_from(np.concatenate(seen)))
        return np.array(out, dtype=np.float32).reshape(-1, VOCAB)

    def candidates(
        self, *arguments: Any, n: int, allowed: npt.NDArray[np.uint32] | None = None, **options: Any
    ) -> backends.Candidates:
        logits = self.forward(*arguments, **options)
        self.n_asked.append((len(logits), n))
        masks: list[Any] = [None] * len(logits)
        if allowed is not None:
            assert allowed.shape == (len(logits), -(-VOCAB // 32))
            masks = list(np.unpackbits(allowed.view(np.uint8), axis=1, count=VOCAB, bitorder="little") > 0)
        rows = [candidates(row, n, mask) for row, mask in zip(logits, masks, strict=True)]
        return backends.Candidates(
            *(
                np.array([getattr(row, name) for row in rows])
                for name in ("tokens", "logits", "sums", "largest")
            )
        )
