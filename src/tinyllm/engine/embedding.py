"""Vectors of whole texts: the mean, the last or the first of what a model's last layer makes of their tokens.

Texts share calls, and a text's bits are those of it alone. Imports `backends`, `config` (what poolings there
are), `kvcache` (the size of a page) and `errors`. llm.py's `embed` is the door.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from tinyllm import backends
from tinyllm.config import Pooling
from tinyllm.engine.kvcache import PAGE
from tinyllm.errors import MemoryLimitError, size_text

EMBED = 32  # texts that share a call, each with pages of its own

Rows = npt.NDArray[np.float64]
# Of the rows of positions start, start + 1, ... of a text of n tokens those whose mean is its vector.
POOLED: dict[Pooling, Callable[[Rows, int, int], Rows]] = {
    "mean": lambda rows, start, n: rows,
    "last": lambda rows, start, n: rows[n - 1 - start :],
    "cls": lambda rows, start, n: rows[: int(start == 0)],
}


def vectors(
    model: backends.Model,
    texts: list[list[int]],
    pooling: Pooling,
    *,
    cache_type: backends.CacheType,
    chunk: int,
) -> Iterator[Rows]:
    """What `pooling` makes of each text's normed activations, [dim]. A call takes up to EMBED texts and
    `chunk` tokens, or one longer text in pieces.
    """
    calls: list[list[list[int]]] = []
    for ids in texts:
        if not calls or len(calls[-1]) == EMBED or sum(map(len, calls[-1])) + len(ids) > chunk:
            calls.append([])
        calls[-1].append(ids)
    shapes = [
        (len(call), len(model.cache_groups), max(-(-len(ids) // PAGE) for ids in call)) for call in calls
    ]
    n_pages = max(map(math.prod, shapes), default=0)
    if n_pages == 0:
        return
    pool = model.cache(cache_type, n_pages)
    try:
        n_bytes, free = n_pages * pool.page_bytes, model.free_memory()
        if n_bytes > free:
            raise MemoryLimitError(
                f"a call for these texts needs {size_text(n_bytes)} of KV cache, {size_text(free)} are free"
            )
        pool.grow(n_pages)
        for call, shape in zip(calls, shapes, strict=True):
            tables = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
            sums, n_pooled = np.zeros((len(call), model.config.dim)), [0] * len(call)
            for start in range(0, max(map(len, call)), chunk):
                parts = [ids[start : start + chunk] for ids in call]
                sizes = [len(part) for part in parts]
                x = model.forward(
                    np.concatenate(parts),
                    np.concatenate([np.arange(start, start + n) for n in sizes]),
                    np.repeat(np.arange(len(call)), sizes),
                    tables,
                    logits=False,
                    cache=pool,
                )
                normed = model.output_norm(x)
                ends = np.cumsum(sizes)
                for i, (n, end) in enumerate(zip(sizes, ends, strict=True)):
                    rows = POOLED[pooling](normed[end - n : end], start, len(call[i]))
                    sums[i] += rows.sum(axis=0)
                    n_pooled[i] += len(rows)
            for total, n in zip(sums, n_pooled, strict=True):
                yield total / n
    finally:
        pool.close()
