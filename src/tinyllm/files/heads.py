"""What stands behind a model's pooling: where the tensors of its dense layers, or of a reranker's head, lie.

Their shapes are checked here, as names.py checks those of the model. Imports `config`, `errors` and this
package's shared part. Read next: engine/heads.py, which computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tinyllm.config import Activation, EmbeddingDefaults, ModelConfig
from tinyllm.errors import FormatError
from tinyllm.files import TensorInfo, is_there, read_small, show
from tinyllm.files.names import Weights
from tinyllm.files.safetensors import read_safetensors

_CLS, _DENSE = "cls.output.weight", ("dense_2", "dense_3")  # GGUF's
MOST_OUT = 1 << 20  # numbers of a vector


@dataclass(frozen=True)
class DenseTensors:
    """A linear layer: weight (out, in), bias (out,) or None."""

    weight: TensorInfo
    bias: TensorInfo | None
    activation: Activation


@dataclass(frozen=True)
class HeadTensors:
    """dense: behind the pooling, in order. labels: the matrix (rows, dim) that holds the rows of a reranker's
    yes and no, and which they are, as numbers or as tokens of the vocabulary."""

    dense: tuple[DenseTensors, ...] = ()
    labels: tuple[TensorInfo, int | str, int | str] | None = None


def heads_of_gguf(
    tensors: Mapping[str, TensorInfo], embedding: EmbeddingDefaults, config: ModelConfig
) -> tuple[HeadTensors, dict[str, TensorInfo]]:
    """The heads of a GGUF file, and the tensors that are the model's. Raises FormatError."""
    left, dense, labels = dict(tensors), [], None
    for name in _DENSE:
        weight, bias = left.pop(f"{name}.weight", None), left.pop(f"{name}.bias", None)
        if weight is not None:
            dense.append(DenseTensors(weight, bias, "identity"))
        elif bias is not None:
            raise FormatError(f"{name}.bias is there, and {name}.weight is not")
    if (head := left.pop(_CLS, None)) is not None:
        if embedding.labels is None or head.shape != (2, config.dim):
            raise FormatError(
                f"{_CLS} of shape {head.shape} is the head of a reranker, which is read with pooling_type 4, "
                f"two rows of {config.dim} numbers and classifier.output_labels yes and no"
            )
        labels = (head, *embedding.labels)
    elif embedding.labels is not None:
        raise FormatError(f"its keys say that it is a reranker, and {_CLS} is missing")
    return HeadTensors(_checked(dense, config.dim), labels), left


def heads_of_directory(folder: Path, embedding: EmbeddingDefaults, weights: Weights) -> HeadTensors:
    """Likewise of a directory that sentence-transformers wrote. Raises FormatError, NotFoundError."""
    dense = []
    for step in embedding.dense:
        tensors = read_safetensors(folder / step.path).tensors
        names = {"linear.weight", "linear.bias"} if step.bias else {"linear.weight"}
        if tensors.keys() != names:
            listed = ", ".join(map(show, sorted(tensors)))
            raise FormatError(f"{folder / step.path}: holds {listed}, expected {', '.join(sorted(names))}")
        weight = tensors["linear.weight"]
        if weight.shape != (step.n_out, step.n_in):
            raise FormatError(
                f"{weight.path}: linear.weight has shape {weight.shape}, its config.json says "
                f"{(step.n_out, step.n_in)}"
            )
        dense.append(DenseTensors(weight, tensors.get("linear.bias"), step.activation))
    labels = None
    if embedding.labels is not None:
        output = weights.get(("output", None)) or weights["embedding", None]
        labels = (output, *embedding.labels)
        for label in embedding.labels:
            if isinstance(label, int) and not 0 <= label < output.shape[0]:
                raise FormatError(f"a reranker's answer is the token {label}, outside the vocabulary")
    return HeadTensors(_checked(dense, weights.config.dim), labels)


def _checked(dense: list[DenseTensors], n_in: int) -> tuple[DenseTensors, ...]:
    for layer in dense:
        shape = layer.weight.shape
        if len(shape) != 2 or shape[1] != n_in or shape[0] > MOST_OUT:
            raise FormatError(
                f"{show(layer.weight.name)} of shape {shape} does not fit behind vectors of {n_in} numbers"
            )
        if layer.bias is not None and layer.bias.shape != shape[:1]:
            raise FormatError(f"{show(layer.bias.name)} has shape {layer.bias.shape}, expected {shape[:1]}")
        n_in = shape[0]
    return tuple(dense)


def is_qwen3_reranker(folder: Path) -> bool:
    """Whether a directory is Qwen3-Reranker as it was before it had modules.json: only its README and its
    name say so, and llama.cpp's converter goes by these as well."""
    readme = folder / "README.md"
    said = read_small(readme).decode("utf-8", "replace").lower() if is_there(readme) else ""
    return "# qwen3-reranker" in said or "qwen3-reranker" in folder.resolve().name.lower()
