"""What a model's GGUF file holds, be the model one already or a Hugging Face directory: `contents_of`.

A GGUF file keeps its metadata; a directory gets what llama.cpp's converter would write: the architecture's
keys, tokenizer, chat template, sampling defaults, and tensors under its names, in its order of rows. Imports
chat, config, files, modelfiles and the tokenizer. `quantize` writes what is found here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.chat.templates import template_from_directory
from tinyllm.config import (
    ModelConfig,
    config_from_gguf,
    config_to_gguf,
    embedding_to_gguf,
    generation_to_gguf,
)
from tinyllm.config.families import family, gguf_architecture, has_gguf
from tinyllm.errors import FormatError, UnsupportedError, located
from tinyllm.files import F32, TensorInfo, find_model, read_json, read_rows
from tinyllm.files.gguf import read_gguf
from tinyllm.files.names import TABLE, fused_in_gguf, row_orders
from tinyllm.modelfiles import ModelFiles, read_model, require_model
from tinyllm.tokenizer.to_gguf import tokenizer_to_gguf

Rows = npt.NDArray[np.uint8]

_log = logging.getLogger(__name__)
_TIED_IN_LLAMA_CPP = ("gemma", "gemma2", "command-r", "cohere2")


@dataclass(frozen=True)
class Source:
    """A tensor to write: its numbers' shape and format, and the bytes of rows [first, last), uint8 [rows,
    bytes of one].

    Rows run along the last dimension; a vector has rows of one number.
    """

    shape: tuple[int, ...]
    format: int
    read: Callable[[int, int], Rows]

    @property
    def k(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape) // self.k


@dataclass(frozen=True)
class Contents:
    """A GGUF file's metadata (types: GGUF's numbers of their types, where they are known) and tensors.
    paths: the files that they are read from. part_of: of a GGUF, which of them each tensor is in.
    as_quantized: what a GGUF says of how it was quantized itself."""

    metadata: dict[str, Any]
    types: dict[str, int]
    tensors: dict[str, Source]
    paths: tuple[Path, ...]
    part_of: Mapping[str, int] = field(default_factory=dict)
    as_quantized: Mapping[str, Any] = field(default_factory=dict)


def contents_of(where: Path) -> Contents:
    """Of a GGUF file (of a split set the first) or a directory with safetensors. Raises NotFoundError,
    ReadError, FormatError, and UnsupportedError for what a GGUF file cannot say."""
    return _of_gguf(where) if find_model(where) == "gguf" else _of_directory(where)


def _of_gguf(path: Path) -> Contents:
    file = read_gguf(path)
    with located(path):
        require_model(file.metadata)
    if "general.architecture" not in file.metadata or not file.tensors:
        raise FormatError(f"{path}: not a model: it has no general.architecture, or no tensors")
    dropped = ("general.alignment", "general.file_type", "general.quantization_version")
    metadata = {
        key: value
        for key, value in file.metadata.items()
        if key not in dropped and not key.startswith("split.")
    }
    tensors = {name: _from_file(info) for name, info in file.tensors.items()}
    as_quantized = {key: file.metadata[key] for key in dropped[1:] if key in file.metadata}
    part_of = {name: file.files.index(info.path) for name, info in file.tensors.items()}
    return Contents(metadata, dict(file.types), tensors, file.files, part_of, as_quantized)


def _of_directory(path: Path) -> Contents:
    files = read_model(path)
    folder = path if path.is_dir() else path.parent
    config = files.config
    if not has_gguf(config.architecture):
        raise UnsupportedError(
            f"{folder}: a GGUF file cannot say this model's architecture: llama.cpp has none for "
            f"{config.architecture}; load the directory, with weights= to quantize it"
        )
    if config.mixers:
        raise UnsupportedError(
            f"{path}: a GGUF file written from safetensors cannot say this model's linear attention yet "
            "(Qwen 3.5); quantize a GGUF file of it, or load it with weights="
        )
    architecture = gguf_architecture(config.architecture, config.bidirectional)
    rope, vectors = _rope(read_json(folder / "config.json"), config)
    heads, behind = _heads(files, architecture)
    tensors = _tensors(files, architecture) | {name: _from_values(v) for name, v in vectors.items()} | behind
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": folder.resolve().name,
        **{f"{architecture}.{k}": v for k, v in (config_to_gguf(config, architecture) | rope).items()},
        **{f"{architecture}.{k}": v for k, v in embedding_to_gguf(files.embedding).items()},
        **heads,
        **generation_to_gguf(files.defaults, config.context),
        **(tokenizer_to_gguf(folder) or {"tokenizer.ggml.model": "none"}),
    }
    _check(folder, config, metadata, tensors, vectors)
    _warn_of_unsaid(files, architecture, behind)
    template = template_from_directory(folder)
    if template is not None:
        metadata["tokenizer.chat_template"] = template.source
    return Contents(metadata, {}, tensors, tuple({info.path for info in files.weights.values()}))


# ---- tensors


def _from_file(info: TensorInfo, order: npt.NDArray[np.int32] | None = None) -> Source:
    """A tensor as it lies in a file; `order`: for each row to write, the file's."""
    source = Source(info.shape, info.format, lambda first, last: _rows(info, first, last))
    if order is None or np.array_equal(order, np.arange(len(order))):
        return source

    def read(first: int, last: int) -> Rows:
        start, end = int(order[first:last].min()), int(order[first:last].max()) + 1
        return source.read(start, end)[order[first:last] - start]

    return replace(source, read=read)


def _rows(info: TensorInfo, first: int, last: int) -> Rows:
    rows = read_rows(info, first, last)
    if info.scales is None:
        return rows
    # MXFP4 in two parts. Byte i of a block has numbers 2i and 2i + 1; in GGUF i and i + 16, behind the scale.
    pairs = rows.reshape(len(rows), -1, 16)
    low, high = np.split(np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:2], 32), 2, -1)
    scales = read_rows(info.scales, first, last)[..., None]
    return np.concatenate([scales, low | high << 4], axis=-1).reshape(len(rows), -1)


def _from_values(values: npt.NDArray[np.float32]) -> Source:
    """Numbers of our own."""
    raw = values.astype("<f4").view(np.uint8).reshape(-1, 4)
    rows = raw.reshape(-1, 4 * (values.shape[-1] if values.ndim > 1 else 1))
    return Source(values.shape, F32, lambda first, last: rows[first:last])


def _on_top_of_each_other(name: str, parts: Sequence[Source], shape: tuple[int, ...]) -> Source:
    """One tensor of several: their rows one after another."""
    if len({part.format for part in parts}) > 1:
        raise UnsupportedError(f"{name} would be made of tensors in different formats")
    starts = np.cumsum([0, *(part.n_rows for part in parts)])

    def read(first: int, last: int) -> Rows:
        return np.concatenate(
            [
                part.read(max(first - start, 0), min(last - start, part.n_rows))
                for part, start in zip(parts, starts.tolist(), strict=False)
                if start < last and first < start + part.n_rows
            ]
        )

    return Source(shape, parts[0].format, read)


def _tensors(files: ModelFiles, architecture: str) -> dict[str, Source]:
    """The weights under their GGUF names, their rows in the order of llama.cpp's files."""
    found: dict[str, Source] = {}
    config = replace(files.config, architecture=architecture)
    to_file = row_orders(config, "gguf")
    for row in TABLE:
        if row.present(config) is False:
            continue
        to_model = files.weights.row_order(row.canonical)
        order = to_model
        if row.canonical in to_file:
            order = np.argsort(to_file[row.canonical]).astype(np.int32)
            order = order if to_model is None else to_model[order]
        plus = np.float32(files.weights.plus(row.canonical))
        for name, keys in row.tensors(config, "gguf"):
            infos = [files.weights[key] for key in keys if key in files.weights]
            if not infos:
                continue
            if row.per_expert:
                vectors = len(infos[0].shape) == 1
                parts = [_from_values(i.read_f32()[None]) if vectors else _from_file(i, order) for i in infos]
                found[name] = _on_top_of_each_other(name, parts, (len(infos), *infos[0].shape))
            elif plus:
                found[name] = _from_values(infos[0].read_f32() + plus)
            else:
                found[name] = _from_file(infos[0], order)
    for name, of in fused_in_gguf(config):
        parts = [found.pop(part) for part in of]
        found[name] = _on_top_of_each_other(name, parts, (sum(p.n_rows for p in parts), parts[0].k))
    return found


def _heads(files: ModelFiles, architecture: str) -> tuple[dict[str, Any], dict[str, Source]]:
    """Keys and tensors of what stands behind the pooling, where llama.cpp's files can have it: the dense
    layers of EmbeddingGemma, and a reranker whose prompt is a text with places."""
    heads, keys, tensors = files.heads, dict[str, Any](), dict[str, Source]()
    linear = all(layer.bias is None and layer.activation == "identity" for layer in heads.dense)
    if architecture == "gemma-embedding" and linear and len(heads.dense) <= 2:
        for name, layer in zip(("dense_2", "dense_3"), heads.dense, strict=False):
            tensors[f"{name}.weight"] = _from_file(layer.weight)
            n_out, n_in = layer.weight.shape
            keys |= {f"{architecture}.{name}_feat_in": n_in, f"{architecture}.{name}_feat_out": n_out}
    if heads.labels and files.embedding.judges:
        matrix, *labels = heads.labels
        ids = [files.tokenizer.id_of(i) if isinstance(i, str) and files.tokenizer else i for i in labels]
        if all(isinstance(i, int) for i in ids):
            rows = np.concatenate([_rows(matrix, int(i), int(i) + 1) for i in ids])  # type: ignore[arg-type]
            shape = (2, matrix.shape[-1])
            tensors["cls.output.weight"] = Source(shape, matrix.format, lambda first, last: rows[first:last])
            keys |= {
                f"{architecture}.pooling_type": 4,
                f"{architecture}.classifier.output_labels": ["yes", "no"],
                "tokenizer.chat_template.rerank": files.embedding.judges,
            }
    return keys, tensors


# ---- metadata


def _rope(
    json: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.float32]]]:
    """How RoPE is scaled: keys, and the divisors that are tensors.

    Linear scaling and YaRN have keys; what else scales has tensors.
    """
    if config.long_rope_factors is not None:
        factors = {"long": config.long_rope_factors, "short": config.rope_factors}
        keys = {
            "rope.scaling.original_context_length": config.original_context,
            "rope.scaling.attn_factor": config.rope_scale,
        }
        return keys, {f"rope_factors_{of}.weight": np.array(f, np.float32) for of, f in factors.items()}
    if config.rope_factors is None:
        return {}, {}
    json = json.get("text_config") or json
    defaults = family(config.architecture, "hf").json_defaults
    table = json.get("rope_scaling") or json.get("rope_parameters") or defaults.get("rope_parameters", {})
    table = table.get("full_attention", table)
    kind = table.get("rope_type") or table.get("type")
    if kind not in ("linear", "yarn"):
        return {}, {"rope_freqs.weight": np.array(config.rope_factors, np.float32)}
    original = config.original_context or config.context
    factor = table.get("factor") or config.context / original
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(factor)}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = original
        for name in ("beta_fast", "beta_slow"):
            if table.get(name):
                keys[f"rope.scaling.yarn_{name}"] = float(table[name])
        usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        if config.rope_scale != usual:
            keys["rope.scaling.attn_factor"] = config.rope_scale / usual
    return keys, {}


def _warn_of_unsaid(files: ModelFiles, architecture: str, behind: Mapping[str, Source]) -> None:
    """What the file means all the same, for who knows it."""
    e = files.embedding
    steps = {
        "normalize": e.normalize, "instruction": bool(e.instruction), "max_seq_length": bool(e.max_tokens),
        "dense layers": bool(e.dense) and not behind, "include_prompt": not e.pools_instruction,
        "its pooling": e.pooling is not None and not embedding_to_gguf(e),
        "that it is a reranker": bool(e.labels) and not behind,
        "that embed refuses it": bool(e.refused) and not e.labels,
    }  # fmt: skip
    if unsaid := [name for name, there in steps.items() if there]:
        _log.warning(
            "%s: a GGUF file cannot say this of its vectors of texts: %s", files.path, ", ".join(unsaid)
        )
    if not files.has_output and not files.config.bidirectional:
        _log.warning(
            "%s: a GGUF file cannot say that a model has no output matrix: ask it for vectors of texts alone",
            files.path,
        )
    elif not files.config.tied and architecture in _TIED_IN_LLAMA_CPP:
        _log.warning(
            "%s: its output matrix is not the embedding, and llama.cpp refuses such files of %s",
            files.path, architecture,
        )  # fmt: skip


@dataclass(frozen=True)
class _Tensor:
    """What `config_from_gguf` asks of a tensor."""

    shape: tuple[int, ...]
    values: npt.NDArray[np.float32] | None

    def read_f32(self) -> npt.NDArray[np.float32]:
        return np.zeros(self.shape, np.float32) if self.values is None else self.values


def _check(
    folder: Path,
    config: ModelConfig,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Source],
    vectors: Mapping[str, npt.NDArray[np.float32]],
) -> None:
    """What is written must mean the model that was read."""
    written = config_from_gguf(
        metadata, {name: _Tensor(source.shape, vectors.get(name)) for name, source in tensors.items()}
    )
    # What the tensors decide in a GGUF file, and what it does not say.
    same = {
        name: getattr(written, name)
        for name in ("architecture", "attention_bias", "output_bias", "ffn_bias", "original_context", "tied")
    }
    wanted = replace(config, **same)
    different = [
        field.name
        for field in fields(config)
        if not _close(getattr(written, field.name), getattr(wanted, field.name))
    ]
    if different:
        raise UnsupportedError(f"{folder}: a GGUF file cannot say this model's {', '.join(different)}")


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_close, a, b))
    return abs(a - b) <= 1e-6 * abs(b) if isinstance(a, float) and isinstance(b, float) else a == b
