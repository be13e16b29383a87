"""Adapters merged into a model's matrices on their way into a file: `merged`.

A matrix with pairs becomes w + scale * b @ a, float32, before it is rounded to what the file holds; so the
file needs no adapter any more. Only float matrices can be merged into. Imports adapters, config, contents.py,
errors, files and modelfiles.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyllm.adapters import Pair, read_adapter
from tinyllm.adapters.targets import Targets
from tinyllm.config.families import gguf_architecture
from tinyllm.errors import ArgumentError, UnsupportedError
from tinyllm.files import BF16, F16, F32, FORMATS, show, to_f32
from tinyllm.files.names import row_orders
from tinyllm.modelfiles import read_model
from tinyllm.quantization.contents import Contents, Rows, Source

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


def merged(
    contents: Contents, where: Path, loras: Sequence[tuple[str | os.PathLike[str], float]]
) -> Contents:
    """The contents of the model at `where` with adapters, each with its strength. Raises ArgumentError for
    matrices that are quantized, UnsupportedError for biases where the model has none, and as `read_adapter`
    does."""
    config = read_model(where).config
    in_file = replace(config, architecture=gguf_architecture(config.architecture))
    adapters = [(read_adapter(path, config), float(strength)) for path, strength in loras]
    names = {pair.name for adapter, _ in adapters for pair in adapter.pairs}
    tensors = dict(contents.tensors)
    if names & {"embedding", "output"} and _OUTPUT not in tensors:
        tensors[_OUTPUT] = tensors[_EMBEDDING]  # one was both; now they differ
    places = {
        (part.name, part.layer): (f"{stem}.weight", (part.expert or 0) * target.shape[-2] + part.first)
        for stem, target in Targets(in_file, "gguf").found.items()
        for part in target.parts
        if f"{stem}.weight" in tensors
    }
    orders = {name: np.argsort(order) for name, order in row_orders(in_file, "gguf").items()}
    of_tensors: dict[str, list[tuple[int, Pair]]] = {}
    biases: dict[str, list[npt.NDArray[np.float32]]] = {}
    for adapter, strength in adapters:
        for pair in adapter.pairs:
            tensor, first = places[pair.name, pair.layer]
            if pair.name in orders:
                pair = replace(pair, b=pair.b.take(pair.b.values[orders[pair.name]]))
            pair = replace(pair, scale=pair.scale * strength)
            of_tensors.setdefault(tensor, []).append((first, pair))
            if pair.has_bias:
                bias = f"{tensor.removesuffix('.weight')}.bias"
                if bias not in tensors:
                    raise UnsupportedError(
                        f"{adapter.path}: lora_bias adds a bias to {show(tensor)}, which has none; it cannot "
                        "be merged"
                    )
                biases.setdefault(bias, []).append(pair.scale * pair.b.f32()[:, -1])
    for tensor, pairs in of_tensors.items():
        _require_float(where, tensor, tensors[tensor])
        tensors[tensor] = _with_pairs(tensors[tensor], pairs)
    for tensor, values in biases.items():
        tensors[tensor] = _with_vector(tensors[tensor], sum(values[1:], values[0]))
    part_of = dict(contents.part_of)
    if part_of:
        part_of.setdefault(_OUTPUT, part_of[_EMBEDDING])
    return replace(contents, tensors=tensors, part_of=part_of)


def _require_float(where: Path, name: str, source: Source) -> None:
    if source.format not in (F32, F16, BF16):
        raise ArgumentError(
            f"{where}: {show(name)} is {FORMATS[source.format].name}, and adapters are merged into floats: "
            "start from the float model, or apply the adapter while the model runs (adapters=, --lora)"
        )


def _with_pairs(source: Source, pairs: Sequence[tuple[int, Pair]]) -> Source:
    def read(first: int, last: int) -> Rows:
        rows = _floats(source, first, last).reshape(last - first, -1)
        for start, pair in pairs:
            height = pair.a.values.shape[0] if pair.name == "embedding" else pair.b.values.shape[0]
            low, high = max(first, start), min(last, start + height)
            if low < high:
                rows[low - first : high - first] += pair.delta(low - start, high - start)
        return rows.view(np.uint8)

    return Source(source.shape, F32, read)


def _with_vector(source: Source, more: npt.NDArray[np.float32]) -> Source:
    def read(first: int, last: int) -> Rows:
        return (_floats(source, first, last) + more[first:last]).reshape(last - first, 1).view(np.uint8)

    return Source(source.shape, F32, read)


def _floats(source: Source, first: int, last: int) -> npt.NDArray[np.float32]:
    return to_f32(np.ascontiguousarray(source.read(first, last)), source.format)
