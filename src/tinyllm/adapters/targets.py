"""Which matrices of a model an adapter's tensor stands beside: one, or several that lie on top of each other.

Invariant: the table of names (files/names.py) is the only place that knows names; here they are turned into
rows of matrices, for fused tensors and stacks of experts as well. Imports config, errors and files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.adapters.pairs import Numbers, Pair
from tinyllm.config import ModelConfig
from tinyllm.config.families import Source
from tinyllm.errors import FormatError
from tinyllm.files.names import TABLE, fused_tensors, row_orders


@dataclass(frozen=True)
class Part:
    """Rows of a tensor that are the matrix `name` of `layer`: n from `first` on, in matrix `expert` of a
    stack."""

    name: str
    layer: int | None
    first: int
    n: int
    expert: int | None = None


@dataclass(frozen=True)
class Target:
    """A tensor (rows, k) or a stack (experts, rows, k), and the matrices that its rows are."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class Targets:
    """Of a model, by the names of one kind of files without ".weight"."""

    def __init__(self, config: ModelConfig, source: Source) -> None:
        self.config, self._orders = config, row_orders(config, source)
        self.found: dict[str, Target] = {}
        for row in TABLE:
            if row.mixer == "delta":  # read_adapter refuses models that have it
                continue
            shape = row.shape(config)
            is_output = row.canonical == "output"  # a tied one can have a pair of its own, too
            if len(shape) != 2 or (row.present(config) is False and not is_output):
                continue
            for tensor, keys in row.tensors(config, source):
                if row.per_expert and source == "gguf":
                    parts = [Part(name, layer, 0, shape[0], i) for i, (name, layer) in enumerate(keys)]
                    self._put(tensor, (len(parts), *shape), parts)
                else:
                    name, layer = next(keys)
                    self._put(tensor, shape, [Part(name, layer, 0, shape[0])])
        single = dict(self.found)
        for tensor, lying in fused_tensors(config, source).items():
            targets = [single.get(part.removesuffix(".weight")) for part, _ in lying]
            if any(target is None for target in targets):
                continue
            parts, first = [], 0
            for target, (_, n) in zip(targets, lying, strict=True):
                assert target is not None
                parts += [Part(p.name, p.layer, first, n, p.expert) for p in target.parts]
                first += n
            assert targets[0] is not None
            self._put(tensor, (*targets[0].shape[:-2], first, targets[0].shape[-1]), parts)

    def _put(self, tensor: str, shape: tuple[int, ...], parts: list[Part]) -> None:
        self.found[tensor.removesuffix(".weight")] = Target(shape, tuple(parts))

    def pairs(
        self, where: str, target: Target, scale: float, a: Numbers, b: Numbers, bias: Numbers | None = None
    ) -> list[Pair]:
        """The pairs of a tensor's a [rank, k] and b [rows, rank] (of a stack with a dimension in front), and
        a bias [rows]. Of the embedding a is [vocabulary, rank]. Raises FormatError for shapes that do not
        fit."""
        *stack, rows, k = target.shape
        rank = b.values.shape[-1]
        if target.parts[0].name == "embedding":
            rows, wanted = k, [(rows, rank), (k, rank)]
        else:
            wanted = [(*stack, rank, k), (*stack, rows, rank)]
        if [a.values.shape, b.values.shape] != wanted or (bias and bias.values.shape != (rows,)):
            shapes = " and ".join(str(n.values.shape) for n in (a, b, bias) if n)
            raise FormatError(
                f"{where} has matrices of shape {shapes}, which do not fit a matrix of {target.shape}: the "
                "adapter was made for another model"
            )
        if bias is not None:
            if bias.format != b.format:
                b, bias = Numbers(b.f32(), 0), Numbers(bias.f32(), 0)
            b = b.take(np.concatenate([b.values, bias.values[:, None]], axis=1))
        found = []
        for part in target.parts:
            of_a = a.values if part.expert is None else a.values[part.expert]
            of_b = b.values if part.expert is None else b.values[part.expert]
            if part.name != "embedding":
                of_b = of_b[part.first : part.first + part.n]
            order = self._orders.get(part.name)
            of_b = of_b if order is None else of_b[order]
            found.append(
                Pair(part.name, part.layer, scale, a.take(of_a), b.take(of_b), has_bias=bias is not None)
            )
        return found


def check_once(path: Path, pairs: list[Pair]) -> None:
    """Raises FormatError for two pairs of one matrix, as a part of a fused one and alone."""
    seen: set[tuple[str, int | None]] = set()
    for pair in pairs:
        key = pair.name, pair.layer
        if key in seen:
            raise FormatError(f"{path}: holds two pairs for {pair.name} of layer {pair.layer}")
        seen.add(key)
