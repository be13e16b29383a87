"""Where a model is cut, and what a stage of it is: a smaller model with tables of pages that fit its layers.

Invariant: the stages' layers are all of the model's, each once, in order. Imports `backends`, `config`,
`files` and `errors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.backends import CacheGroup, Weight, cache_groups, packed_bytes
from tinyllm.config import ModelConfig
from tinyllm.errors import ArgumentError, integer
from tinyllm.files import F32, TensorInfo, read_rows
from tinyllm.files.names import Weights

Key = tuple[str, "int | None"]
Formats = Mapping[Key, int]
MOST_STAGES = 1024
SAMPLED = 256  # tensors whose first row tells models apart


@dataclass(frozen=True)
class Cut:
    """Layers [first, last) of n_layers."""

    first: int
    last: int
    n_layers: int

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.last == self.n_layers

    def __str__(self) -> str:
        return f"layers {self.first} to {self.last - 1}"


def cuts_of(layers: Sequence[int], n_layers: int) -> list[Cut]:
    """The stages of so many layers each. Raises ArgumentError where they are not all of the model's."""
    counts = [integer("layers of a stage", n, 1, n_layers) for n in layers]
    if sum(counts) != n_layers:
        raise ArgumentError(f"the stages have {' + '.join(map(str, counts))} layers, the model {n_layers}")
    ends = np.cumsum(counts).tolist()
    return [Cut(end - n, end, n_layers) for n, end in zip(counts, ends, strict=True)]


def balanced(config: ModelConfig, weights: Weights, formats: Formats, stages: int) -> list[Cut]:
    """The cut in `stages` whose slowest stage reads the fewest bytes a token: its layers, and on the last the
    output matrix. Raises ArgumentError for more stages than layers."""
    n = config.n_layers
    stages = integer("stages", stages, 1, min(n, MOST_STAGES), f"the model has {n} layers")
    of_layer = [0] * n
    for (_, layer), info in weights.items():
        if layer is not None:
            of_layer[layer] += packed_bytes(info.shape, formats[_, layer])
    key = ("output", None) if ("output", None) in weights else ("embedding", None)
    of_layer[-1] += packed_bytes(weights[key].shape, formats[key])
    # least[s][i]: bytes of the largest of s stages that hold the first i layers.
    sums = np.concatenate([[0], np.cumsum(of_layer)])
    least = np.full((stages + 1, n + 1), np.inf)
    least[0, 0] = 0
    begins = np.zeros((stages + 1, n + 1), np.int64)
    for s in range(1, stages + 1):
        for i in range(s, n + 1):
            costs = np.maximum(least[s - 1, s - 1 : i], sums[i] - sums[s - 1 : i])
            best = len(costs) - 1 - int(np.argmin(costs[::-1]))
            least[s, i], begins[s, i] = costs[best], s - 1 + best
    counts: list[int] = []
    end = n
    for s in range(stages, 0, -1):
        counts.insert(0, end - int(begins[s, end]))
        end = int(begins[s, end])
    return cuts_of(counts, n)


def config_of(config: ModelConfig, cut: Cut) -> ModelConfig:
    """A stage as a model of its own. One in the middle has neither embedding nor output matrix: a vocabulary
    of one token stands for them."""
    here = slice(cut.first, cut.last)
    return replace(
        config,
        n_layers=cut.last - cut.first,
        windows=config.windows[here],
        ropes=config.ropes[here],
        xielu=config.xielu[here],
        vocab_size=config.vocab_size if cut.is_first or cut.is_last else 1,
        tied=True,
    )


def weights_of(weights: Weights, formats: Formats, cut: Cut) -> list[Weight]:
    """A stage's weights, to be uploaded and tied: its layers, the final norm, and as its embedding what it
    needs of the two big matrices. The first stage reads rows of the embedding, the last multiplies by the
    output matrix; where one stage is both, it has both."""

    def weight(key: Key, name: str, layer: int | None) -> Weight:
        info = weights[key]
        format = formats[key] if formats[key] != info.format else None
        return Weight(
            name,
            layer,
            info,
            row_order=weights.row_order(key[0]),
            format=format,
            plus=weights.plus(key[0]),
        )

    own: list[Weight] = []
    has_output = ("output", None) in weights
    for key in weights:
        name, layer = key
        if layer is None:
            of_first, of_last = name == "embedding" and cut.is_first, name == "output" and cut.is_last
            if name not in ("embedding", "output") or of_first or (of_last and cut.is_first):
                own.append(weight(key, name, None))
            elif of_last or (name == "embedding" and cut.is_last and not has_output):
                own.append(weight(key, "embedding", None))
        elif cut.first <= layer < cut.last:
            own.append(weight(key, name, layer - cut.first))
    if not (cut.is_first or cut.is_last):
        any_info = next(iter(weights.values()))
        dim = weights.config.dim
        nothing = TensorInfo("nothing", (1, dim), F32, any_info.path, 0, 4 * dim, made=_zeros(dim))
        own.append(Weight("embedding", None, nothing))
    return own


def _zeros(dim: int) -> Any:
    def made(first: int, last: int) -> npt.NDArray[np.uint8]:
        return np.zeros((last - first, 4 * dim), np.uint8)

    return made


def bytes_of(own: Sequence[Weight]) -> int:
    """Bytes that weights take once packed."""
    return sum(packed_bytes(w.info.shape, w.info.format if w.format is None else w.format) for w in own)


@dataclass(frozen=True)
class Tables:
    """groups: the driver's, of which a sequence has a table each. of_stage: which of these a stage reads, in
    the order of its own groups.

    A page's number means the same on every stage, and on each it holds the layers of one of the stage's own
    groups. So for each window there are as many tables as the stage with the most groups of it has.
    """

    groups: list[CacheGroup]
    of_stage: list[list[int]]


def tables_of(config: ModelConfig, cuts: Sequence[Cut]) -> Tables:
    """config: with its context."""
    own = [cache_groups(config_of(config, cut)) for cut in cuts]
    groups: list[CacheGroup] = []
    of_stage: list[list[int]] = [[] for _ in cuts]
    for window in sorted({group.window for stage in own for group in stage}):
        counts = [sum(group.window == window for group in stage) for stage in own]
        for stage, n in enumerate(counts):
            of_stage[stage] += range(len(groups), len(groups) + n)
        groups += [CacheGroup(window, ())] * max(counts)
    return Tables(groups, of_stage)


def digest(weights: Weights, formats: Formats) -> str:
    """What tells a model's files from others' of the same shape: the tensors' headers, and first rows."""
    hashed = blake2b(repr(weights.config).encode(), digest_size=16)
    keys = sorted(weights, key=str)
    for key in keys:
        info = weights[key]
        hashed.update(repr((key, info.shape, info.format, formats[key])).encode())
    for key in keys[:: -(-len(keys) // SAMPLED)]:
        hashed.update(read_rows(weights[key], 0, 1).tobytes())
    return hashed.hexdigest()
