"""The matrix products of one layer, for every weight format and instruction set: GMAC/s (1e9 multiply-adds
with weights a second) of one token, as in decoding, and of 64, as in prefill. Random weights of 4 MB at most,
so that they stay in a processor's caches; attention over 64 positions is part of it, and small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import synthetic

import tinyllm
from tinyllm import backends

ISAS: list[str] = backends.info()["isa_usable"]
LAYER = synthetic.Shape("layer", 1, 512, 8, 8, 1536, 512, 128, 10000.0, None, True)


@pytest.fixture(scope="module", params=[type for type in synthetic.TYPES if not type.endswith("_m")])
def llm(request: pytest.FixtureRequest, synthetic_model: Callable[..., Path]) -> Iterator[tinyllm.LLM]:
    with tinyllm.load(synthetic_model(LAYER, request.param)) as model:
        yield model


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = backends.info()["isa"]
    backends.select_isa(request.param)
    yield request.param
    backends.select_isa(before)


@pytest.mark.parametrize("n_tokens", [1, 64])
def test_layer(isa: str, llm: tinyllm.LLM, n_tokens: int, measure: Callable[..., None]) -> None:
    model = llm.model
    pool = model.cache("f16", 1)
    pool.grow(1)
    x = np.random.default_rng(0).standard_normal((n_tokens, LAYER.dim)).astype(np.float32)
    positions, zeros = np.arange(n_tokens, dtype=np.int32), np.zeros(n_tokens, np.int32)
    table = np.zeros((1, 1), np.int32)

    def run() -> None:
        for _ in range(n_calls):
            model.forward(x, positions, zeros, table, layers=(0, 1), logits=False, cache=pool)

    n_calls = 64 if n_tokens == 1 else 1
    weights = [t for t in synthetic.tensors(LAYER, synthetic.TYPES["f32"]) if t.name.startswith("blk.")]
    macs = sum(math.prod(t.shape) for t in weights if len(t.shape) == 2) * n_tokens * n_calls
    rounds = 3 if isa == "scalar" else 10
    measure(run, n=macs / 1e9, unit="GMAC/s", rounds=rounds)
    pool.close()
