"""A model for tests of the engine that knows nothing but pages: what it answers depends on every token it reads
back through the page tables, so any mistake with pages, positions or sequences changes the text."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.kvcache import PAGE

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

VOCAB = 260  # the bytes, and four more
EOS = 256
N_LAYERS = 4
NOTHING = -1  # a slot of a page that was cleared


class MockPool:
    """Pages of one number a token: its id."""

    page_bytes = 1000

    def __init__(self, max_pages: int, slab: int = 3) -> None:
        self.max_pages, self._slab = max_pages, slab
        self.pages: list[I32] = []
        self.is_closed = False

    @property
    def n_pages(self) -> int:
        return len(self.pages)

    def grow(self, n_pages: int) -> None:
        assert n_pages <= self.max_pages
        while len(self.pages) < n_pages:
            n = min(self._slab, self.max_pages - len(self.pages))
            self.pages += [np.full(PAGE, 7777, dtype=np.int32) for _ in range(n)]

    def clear_page(self, page: int) -> None:
        self.pages[page][:] = NOTHING

    def copy_page(self, to: int, source: int, n_tokens: int) -> None:
        n = -(-n_tokens // 16) * 16
        self.pages[to][:n] = self.pages[source][:n]

    def close(self) -> None:
        self.is_closed = True


class Cancelled(Exception):
    pass


def logits_after(history: list[int]) -> F32:
    """The model: float32 [VOCAB], a function of all tokens so far. The end of text becomes likely now and then."""
    key = int.from_bytes(blake2b(np.array(history, dtype="<i4").tobytes(), digest_size=16).digest(), "little")
    noise = np.random.Philox(key=key).random_raw(VOCAB) >> np.uint64(40)
    logits = (noise.astype(np.float64) * 2.0**-24 * 8.0).astype(np.float32)
    logits[EOS] += 0.2
    return logits


class MockModel:
    """Writes the batch's tokens into their pages and answers from what the page tables lead to."""

    def __init__(self) -> None:
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
            cache.pages[page_tables[sequence, position // PAGE]][position % PAGE] = token
        for _ in range(N_LAYERS):
            self.before_layer()
            if should_stop is not None and should_stop():
                raise Cancelled
            self.n_layers_run += 1
        out = []
        for row in range(len(tokens)) if rows is None else rows:
            table = page_tables[sequences[row]][: positions[row] // PAGE + 1]
            history = np.concatenate([cache.pages[page] for page in table])[: positions[row] + 1]
            assert (history != NOTHING).all(), "a token was read that nobody wrote"
            out.append(logits_after(history.tolist()))
        return np.array(out, dtype=np.float32).reshape(-1, VOCAB)
