"""What a model computes behind its pooling: dense layers, and a reranker's yes and no.

Invariant: a vector's bits do not depend on the vectors beside it. So each product is added up in order of k,
number by number, where numpy's own product of matrices has another order for each shape. Imports `backends`
(which unpacks any format), `config`, `files`, `tokenizer` and `errors`. Read next: llm.py's `embed` and
`rerank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinyllm import backends
from tinyllm.config import Activation
from tinyllm.errors import FormatError
from tinyllm.files import F32, TensorInfo, read_rows, show
from tinyllm.files.heads import DenseTensors, HeadTensors
from tinyllm.tokenizer import Tokenizer

F64 = npt.NDArray[np.float64]

_ACTIVATIONS: dict[Activation, Callable[[F64], F64]] = {
    "identity": lambda x: x,
    "tanh": lambda x: np.array([[math.tanh(number) for number in row] for row in x.tolist()]),
    "relu": lambda x: np.maximum(x, 0),
}


@dataclass(frozen=True)
class Dense:
    """y = activation(x @ weight.T + bias). weight_t float32 [in, out], the weight transposed; bias [out]."""

    weight_t: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None
    activation: Activation

    def __call__(self, x: F64) -> F64:
        """float64 [n, in] to [n, out]."""
        y = product(x, self.weight_t)
        return _ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias)


@dataclass(frozen=True)
class Heads:
    """labels: float32 [dim, 2], of a reranker the rows of its output that say yes and no; else None."""

    dense: tuple[Dense, ...] = ()
    labels: npt.NDArray[np.float32] | None = None

    def dim(self, pooled: int) -> int:
        """Numbers of a vector, where pooling leaves so many."""
        return self.dense[-1].weight_t.shape[1] if self.dense else pooled

    def behind_pooling(self, pooled: F64) -> F64:
        """What the dense layers make of pooled vectors, float64 [n, dim]."""
        for layer in self.dense:
            pooled = layer(pooled)
        return pooled

    def scores(self, last: F64) -> F64:
        """How much more likely than no a yes is, as the share of both, in 0 to 1: float64 [n], from what the
        output matrix reads of each text's last token, [n, dim]."""
        assert self.labels is not None, "the model is a reranker"
        yes, no = product(last, self.labels).T
        return np.array([1 / (1 + math.exp(min(x, 700.0))) for x in (no - yes).tolist()])


def product(x: F64, weight_t: npt.NDArray[np.float32]) -> F64:
    """x [n, k] times a transposed matrix [k, rows]: float64 [n, rows], added up in order of k."""
    y = np.zeros((len(x), weight_t.shape[1]))
    for k in range(weight_t.shape[0]):
        y += x[:, k : k + 1] * weight_t[k]
    return y


def read_heads(tensors: HeadTensors, tokenizer: Tokenizer | None) -> Heads:
    """The numbers of what the files hold. Raises FormatError, and as reading does."""
    labels = None
    if tensors.labels is not None:
        matrix, *named = tensors.labels
        rows = [_token(name, tokenizer) if isinstance(name, str) else name for name in named]
        labels = np.concatenate([_numbers(matrix, row, row + 1) for row in rows]).T.copy()
    return Heads(tuple(map(_dense, tensors.dense)), labels)


def _dense(layer: DenseTensors) -> Dense:
    weight_t = np.ascontiguousarray(_numbers(layer.weight, 0, layer.weight.shape[0]).T)
    return Dense(weight_t, layer.bias.read_f32() if layer.bias else None, layer.activation)


def _token(text: str, tokenizer: Tokenizer | None) -> int:
    token = tokenizer.id_of(text) if tokenizer else None
    if token is None:
        raise FormatError(f"a reranker answers {show(text)}, and its vocabulary has no such token")
    return token


def _numbers(info: TensorInfo, first: int, last: int) -> npt.NDArray[np.float32]:
    """Rows of a matrix in any format: float32 [rows, k]."""
    rows, k = np.ascontiguousarray(read_rows(info, first, last)), info.shape[-1]
    return backends.convert(rows.ravel(), info.format, F32, last - first, k).view("<f4").astype(np.float32)
