"""Vectors of whole texts: what a pooling makes of the last layer's activations of their tokens.

Texts share calls, and a text's bits are those of it alone: what is pooled is added up in order of position,
wherever calls cut a text. Imports `backends`, `config` (what poolings there are), `kvcache` (the size of a
page) and `errors`. Read next: heads.py; llm.py's `embed` is the door.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tinyllm import backends
from tinyllm.config import Pooling
from tinyllm.engine.kvcache import PAGE
from tinyllm.errors import ContextError, MemoryLimitError, size_text

EMBED = 64  # texts that share a call, each with pages of its own

Rows = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]
# Of a text whose tokens [first, n) are pooled: how much each position counts; 0 leaves it out.
WEIGHTS: dict[Pooling, Callable[[Positions, int, int], npt.NDArray[np.int64]]] = {
    "mean": lambda at, first, n: (at >= first).astype(np.int64),
    "last": lambda at, first, n: (at == n - 1).astype(np.int64),
    "cls": lambda at, first, n: (at == first).astype(np.int64),
    "max": lambda at, first, n: (at >= first).astype(np.int64),
    "weightedmean": lambda at, first, n: (at + 1) * (at >= first),
    "mean_sqrt_len_tokens": lambda at, first, n: (at >= first).astype(np.int64),
}


@dataclass(frozen=True)
class Text:
    """first: the position from which on its tokens are pooled."""

    ids: list[int]
    first: int = 0


@dataclass
class _Pooled:
    """What there is of a text's vector so far."""

    rows: Rows | None = None  # [1, dim]
    weight: int = 0

    def add(self, rows: Rows, weights: npt.NDArray[np.int64], pooling: Pooling) -> None:
        """rows [n, dim] of positions in a row."""
        rows, weights = rows[weights > 0], weights[weights > 0]
        if pooling not in ("max", "last", "cls"):
            rows = rows * weights[:, None]
        self.weight += int(weights.sum())
        both = rows if self.rows is None else np.concatenate([self.rows, rows])
        # Cumulative, as it is that which has one order: each row is added to the sum of all before it.
        fold = np.maximum.accumulate if pooling == "max" else np.add.accumulate
        self.rows = fold(both, axis=0)[-1:].copy() if len(both) else None

    def vector(self, pooling: Pooling) -> Rows:
        assert self.rows is not None, "a text has at least one token that is pooled"
        row: Rows = self.rows[0]
        if pooling in ("max", "last", "cls"):
            return row
        return row / (math.sqrt(self.weight) if pooling == "mean_sqrt_len_tokens" else self.weight)


@dataclass(frozen=True)
class _Call:
    """Parts of texts: (text, start, stop)."""

    parts: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return sum(stop - start for _, start, stop in self.parts)


def planned(lengths: Sequence[int], chunk: int, whole: bool) -> list[_Call]:
    """The calls for texts of these lengths, one after another: each but the last has `chunk` tokens, unless
    EMBED texts are fewer. whole: a text stays in one call. Raises ContextError for one that then is too
    long."""
    calls = [_Call()]
    for i, n in enumerate(lengths):
        if whole and n > chunk:
            raise ContextError(
                f"a text of {n} tokens is more than the {chunk} that a call takes, and this model, which "
                "attends to both sides, takes a text in one call; shorten it"
            )
        start = 0
        while start < n:
            room = chunk - calls[-1].n_tokens
            if room == 0 or len(calls[-1].parts) == EMBED or (whole and n > room):
                calls.append(_Call())
                continue
            stop = min(n, start + room)
            calls[-1].parts.append((i, start, stop))
            start = stop
    return calls if calls[0].parts else []


def vectors(
    model: backends.Model,
    texts: Sequence[Text],
    pooling: Pooling,
    *,
    cache_type: backends.CacheType,
    chunk: int,
    uses: backends.Uses = (),
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, Rows]]:
    """(tokens computed so far, the vectors that are complete with them [n, dim]), call by call, the texts' in
    order. uses: the adapters of all texts. Raises CancelledError once should_stop says so, ContextError,
    MemoryLimitError."""
    lengths = [len(text.ids) for text in texts]
    calls = planned(lengths, chunk, model.config.bidirectional)
    n_groups = len(model.cache_groups)
    pages_of = [n_groups * -(-n // PAGE) for n in lengths]
    n_pages = max((sum(pages_of[i] for i, *_ in call.parts) for call in calls), default=0)
    if n_pages == 0:
        return
    most_texts = max(len(call.parts) for call in calls) + 1  # that are begun and not over at a time
    pool = model.cache(cache_type, n_pages, 2 * most_texts)
    try:
        n_bytes, free = n_pages * pool.page_bytes + 2 * most_texts * pool.slot_bytes, model.free_memory()
        if n_bytes > free:
            raise MemoryLimitError(
                f"a call for these texts needs {size_text(n_bytes)} of KV cache, {size_text(free)} are free"
            )
        pool.grow(n_pages)
        states = backends.StatePairs(pool)
        unused, held, pooled = list(range(n_pages)), dict[int, list[int]](), dict[int, _Pooled]()
        done = 0
        for call in calls:
            most = max(-(-lengths[i] // PAGE) for i, *_ in call.parts)
            tables = np.zeros((len(call.parts), n_groups, most), np.int32)
            for row, (i, *_) in enumerate(call.parts):
                if i not in held:
                    held[i], unused = unused[: pages_of[i]], unused[pages_of[i] :]
                tables[row, :, : pages_of[i] // n_groups] = np.reshape(held[i], (n_groups, -1))
            x = model.forward(
                np.concatenate([texts[i].ids[start:stop] for i, start, stop in call.parts]),
                np.concatenate([np.arange(start, stop) for _, start, stop in call.parts]),
                np.repeat(np.arange(len(call.parts)), [stop - start for _, start, stop in call.parts]),
                tables,
                logits=False,
                adapters=[uses] * len(call.parts) if uses else None,
                states=states.next([i for i, *_ in call.parts], [end - at for _, at, end in call.parts]),
                cache=pool,
                should_stop=should_stop,
            )
            complete, end = [], 0
            with np.errstate(over="ignore", invalid="ignore"):  # who takes the vectors looks at them
                for i, start, stop in call.parts:
                    end += stop - start
                    rows = model.output_norm(x[end - (stop - start) : end])
                    weights = WEIGHTS[pooling](np.arange(start, stop), texts[i].first, lengths[i])
                    pooled.setdefault(i, _Pooled()).add(rows, weights, pooling)
                    if stop == lengths[i]:
                        complete.append(pooled.pop(i).vector(pooling))
                        unused += held.pop(i)
                        states.end(i)
            done += call.n_tokens
            yield done, np.array(complete).reshape(len(complete), model.config.dim)
    finally:
        pool.close()
