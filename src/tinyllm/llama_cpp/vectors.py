"""Vectors as `Llama.embed` gives them: of whole texts, or one for each token where there is no pooling.

Imports `tinyllm`, constants, errors. llama.py calls it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllm import LLM
from tinyllm.errors import UnsupportedError, out_of_memory
from tinyllm.llama_cpp import constants

PAGE = 64  # positions of a page of the cache
_POOLINGS = {
    constants.LLAMA_POOLING_TYPE_MEAN: "mean",
    constants.LLAMA_POOLING_TYPE_CLS: "cls",
    constants.LLAMA_POOLING_TYPE_LAST: "last",
}


def pooling_of(llm: LLM, asked: int) -> int:
    """The pooling type that counts: the one asked for, else the file's, else none. Raises
    UnsupportedError."""
    if asked == constants.LLAMA_POOLING_TYPE_UNSPECIFIED:
        numbers = {name: number for number, name in _POOLINGS.items()}
        return numbers.get(llm.embedding.pooling or "", constants.LLAMA_POOLING_TYPE_NONE)
    if asked != constants.LLAMA_POOLING_TYPE_NONE and asked not in _POOLINGS:
        raise UnsupportedError(f"pooling_type is {asked}: only NONE, MEAN, CLS and LAST are supported")
    return asked


def vectors(llm: LLM, texts: list[list[int]], pooling: int, normalize: bool) -> list[Any]:
    """Of each text a list of `dim` floats, or without pooling a list of such lists, one a token."""
    if pooling in _POOLINGS:
        kind: Any = _POOLINGS[pooling]
        return llm.embed(texts, pooling=kind, normalize=normalize, instruction="").tolist() if texts else []
    return [_of_tokens(llm, ids, normalize) for ids in texts]


def _of_tokens(llm: LLM, ids: list[int], normalize: bool) -> list[list[float]]:
    n_pages = -(-len(ids) // PAGE)
    tables = np.arange(n_pages * len(llm.model.cache_groups), dtype=np.int32)
    pool = llm.model.cache(llm.cache_type, len(tables))
    try:
        with out_of_memory(f"computing vectors of {len(ids)} tokens"):
            pool.grow(len(tables))
            states, rows = llm.model.state_pairs(pool), []
            for start in range(0, len(ids), llm.chunk):
                part = np.array(ids[start : start + llm.chunk], np.int32)
                x = llm.model.forward(
                    part,
                    np.arange(start, start + len(part), dtype=np.int32),
                    np.zeros(len(part), np.int32),
                    tables.reshape(1, -1, n_pages),
                    logits=False,
                    states=states.next([0], [len(part)]),
                    cache=pool,
                )
                rows.append(llm.model.output_norm(x))
    finally:
        pool.close()
    found = np.concatenate(rows)
    if normalize:
        found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-30)
    vectors: list[list[float]] = found.tolist()
    return vectors
