"""Writes a model as a GGUF file in another quantization: `quantize`, which tinyllm-quantize calls.

A GGUF file keeps its metadata; a Hugging Face directory gets what llama.cpp's converter would write: the
architecture's keys, tokenizer, chat template, sampling defaults. Tensors go through one by one, in pieces of
some megabytes. Which tensor gets which format is mixes.py's, how it is rounded the core's. Imports the
loaders, modelfiles, backends, imatrix, mixes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import backends
from .chat import template_from_directory
from .config import GenerationDefaults, ModelConfig, config_from_gguf
from .errors import ArgumentError, FormatError, NotFoundError, UnsupportedError
from .imatrix import Imatrix, read_imatrix
from .loaders import BF16, F16, F32, FORMATS, FileReader, TensorInfo, find_model, read_json
from .loaders.gguf import read_gguf
from .loaders.gguf_writer import OutTensor, write_gguf
from .loaders.names import TABLE, row_orders
from .mixes import tensor_formats, type_named
from .modelfiles import BUNDLED, ModelFiles, read_model
from .tokenizer.to_gguf import tokenizer_to_gguf

PIECE_NUMBERS = 1 << 22  # of a tensor, that are read, rounded and written at a time
# The architecture under which llama.cpp knows a config.json's model_type, for those whose directories are
# written.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2"}


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote: the file's size, its weights and their bits each, and how many tensors of which
    format. without_importance: matrices that the imatrix did not know."""

    path: Path
    n_bytes: int
    n_weights: int
    bits: float
    formats: dict[str, int]
    without_importance: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """A tensor to write: its numbers' shape and format, and the file's bytes of rows [first, last).

    Rows run along the last dimension; a vector has rows of one number.
    """

    shape: tuple[int, ...]
    format: int
    read: Callable[[int, int], npt.NDArray[np.uint8]]

    @property
    def k(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str,
    *,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    allow_requantize: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Quantized:
    """Writes `model` to the GGUF file `out` in the quantization `type` ("q4_k_m", "q8_0", "f16"...:
    mixes.MIXES).

    model: a GGUF file (of a split set the first) or a directory with safetensors. imatrix: importance of
    columns, a file's path. allow_requantize: take a quantized model as well, whose errors then add up.
    threads: None for one a physical core; never changes the bits. progress: called with (bytes written,
    bytes in all). The file appears under its name when it is complete.

    Raises ArgumentError, NotFoundError, ReadError, FormatError (a NaN or an infinity among the weights as
    well), UnsupportedError, WriteError.
    """
    mix = type_named(type)
    target = Path(out).expanduser()
    where = _where(model)
    known = read_imatrix(imatrix) if isinstance(imatrix, (str, os.PathLike)) else imatrix
    read = _from_gguf if find_model(where) == "gguf" else _from_directory
    metadata, types, sources, paths = read(where)
    if target.exists() and any(target.samefile(path) for path in paths):
        raise ArgumentError(f"{target}: is the model itself; name another file")
    if not allow_requantize:
        _refuse_quantized(where, sources)
    formats = tensor_formats(
        {name: source.shape for name, source in sources.items()}, type, imatrix=known is not None
    )
    metadata |= {"general.file_type": mix.file_type, "general.quantization_version": 2}
    types |= {"general.file_type": 4, "general.quantization_version": 4}
    unknown: list[str] = []
    tensors: list[OutTensor] = []
    n_threads = threads or backends.default_threads()
    for name, source in sources.items():
        importance = _importance(known, name, source.shape, formats[name], unknown)
        tensors.append(_out_tensor(name, source, formats[name], importance, n_threads))
    n_bytes = write_gguf(target, metadata, tensors, types=types, progress=progress)
    counts: dict[str, int] = {}
    for format in formats.values():
        counts[FORMATS[format].name] = counts.get(FORMATS[format].name, 0) + 1
    n_weights = sum(int(np.prod(source.shape)) for source in sources.values())
    bits = 8 * sum(tensor.n_bytes for tensor in tensors) / n_weights
    return Quantized(target, n_bytes, n_weights, bits, counts, tuple(unknown))


def _where(model: str | os.PathLike[str]) -> Path:
    path = Path(model).expanduser()
    if path.exists():
        return path
    if str(model) in BUNDLED:
        return BUNDLED[str(model)]
    raise NotFoundError(f"{path}: no such file or directory")


def _refuse_quantized(where: Path, sources: Mapping[str, _Source]) -> None:
    for name, source in sources.items():
        if source.format not in (F32, F16, BF16):
            raise ArgumentError(
                f"{where} is quantized already ({name} is {FORMATS[source.format].name}), and errors "
                "would add up; start from the float model, or pass allow_requantize=True (--allow-requantize)"
            )


def _importance(
    imatrix: Imatrix | None, name: str, shape: tuple[int, ...], format: int, unknown: list[str]
) -> npt.NDArray[np.float32] | None:
    """float32 [matrices, k], where the format can use it."""
    if imatrix is None or format in (F32, F16, BF16):
        return None
    found = imatrix.importance(name, shape[0] if len(shape) == 3 else 1, shape[-1])
    if found is None:
        unknown.append(name)
    return found


# ---- tensors
# ------------------------------------------------------------------------------------------------------


def _from_file(info: TensorInfo, order: npt.NDArray[np.int32] | None = None) -> _Source:
    """A tensor as it lies in a file; `order`: for each row to write, the file's."""
    form, k = FORMATS[info.format], info.shape[-1] if len(info.shape) > 1 else 1
    row_bytes = k // form.block * form.block_bytes

    def read(first: int, last: int) -> npt.NDArray[np.uint8]:
        start, end = first, last
        if order is not None:
            start, end = int(order[first:last].min()), int(order[first:last].max()) + 1
        with FileReader(info.path) as file:
            data = file.read_at(info.offset + start * row_bytes, (end - start) * row_bytes)
        rows = np.frombuffer(data, np.uint8).reshape(-1, row_bytes)
        return rows if order is None else rows[order[first:last] - start]

    return _Source(info.shape, info.format, read)


def _from_values(values: npt.NDArray[np.float32]) -> _Source:
    """A vector of our own."""
    raw = values.astype("<f4").view(np.uint8).reshape(-1, 4)
    return _Source(values.shape, F32, lambda first, last: raw[first:last])


def _out_tensor(
    name: str, source: _Source, format: int, importance: npt.NDArray[np.float32] | None, threads: int
) -> OutTensor:
    k = source.k
    n_rows = int(np.prod(source.shape)) // k
    per_matrix = n_rows if importance is None else n_rows // len(importance)

    def pieces() -> Iterator[bytes]:
        step = max(1, PIECE_NUMBERS // k)
        for matrix in range(0, n_rows, per_matrix):
            of_columns = None if importance is None else importance[matrix // per_matrix]
            for first in range(matrix, matrix + per_matrix, step):
                last = min(first + step, matrix + per_matrix)
                data = np.ascontiguousarray(source.read(first, last)).ravel()
                if source.format == format:
                    yield data.tobytes()
                    continue
                _check_finite(name, source.format, data)
                yield backends.convert(
                    data, source.format, format, last - first, k, importance=of_columns, threads=threads
                ).tobytes()

    return OutTensor(name, source.shape, format, pieces)


def _check_finite(name: str, format: int, data: npt.NDArray[np.uint8]) -> None:
    """A NaN would spread over its block, and an infinity make its scale infinite."""
    exponents = {F32: ("<u4", 0x7F800000), F16: ("<u2", 0x7C00), BF16: ("<u2", 0x7F80)}
    if format in exponents:
        dtype, mask = exponents[format]
        if ((data.view(dtype) & mask) == mask).any():
            raise FormatError(f"tensor {name} holds a NaN or an infinity; such a model cannot be quantized")


# ---- from where
# ---------------------------------------------------------------------------------------------------

_Read = tuple[dict[str, Any], dict[str, int], dict[str, _Source], tuple[Path, ...]]


def _from_gguf(path: Path) -> _Read:
    file = read_gguf(path)
    if "general.architecture" not in file.metadata or not file.tensors:
        raise FormatError(f"{path}: not a model: it has no general.architecture, or no tensors")
    dropped = ("general.alignment", "general.file_type", "general.quantization_version")
    metadata = {
        key: value
        for key, value in file.metadata.items()
        if key not in dropped and not key.startswith("split.")
    }
    return metadata, dict(file.types), {n: _from_file(t) for n, t in file.tensors.items()}, file.files


def _from_directory(path: Path) -> _Read:
    files = read_model(path)
    folder = path if path.is_dir() else path.parent
    config = files.config
    if config.architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{folder}: directories of {config.architecture} models are not written as GGUF yet, only of "
            f"{', '.join(ARCHITECTURES)}; convert it with llama.cpp's convert_hf_to_gguf.py, quantize that"
        )
    architecture = ARCHITECTURES[config.architecture]
    sources = _gguf_tensors(files, architecture)
    keys = _config_keys(config) | _rope_keys(read_json(folder / "config.json"), config)
    tensors: dict[str, Any] = {name: _Shape(source.shape) for name, source in sources.items()}
    if config.rope_factors is not None and "rope.scaling.type" not in keys:
        factors = np.array(config.rope_factors, np.float32)
        sources["rope_freqs.weight"] = _from_values(factors)
        tensors["rope_freqs.weight"] = _Shape(factors.shape, factors)
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": folder.resolve().name,
        **{f"{architecture}.{key}": value for key, value in keys.items()},
        **_sampling_keys(files.defaults),
        **(tokenizer_to_gguf(folder) or {"tokenizer.ggml.model": "none"}),
    }
    _check_config(folder, config, metadata, tensors)
    template = template_from_directory(folder)
    if template is not None:
        metadata["tokenizer.chat_template"] = template.source
    return metadata, {}, sources, tuple({info.path for info in files.weights.values()})


def _gguf_tensors(files: ModelFiles, architecture: str) -> dict[str, _Source]:
    """The weights under their GGUF names, their rows in the order of llama.cpp's files."""
    sources = {}
    config = replace(files.config, architecture=architecture)
    for row in TABLE:
        if row.present(files.config) is False:
            continue
        to_model, to_file = (
            files.weights.row_order(row.canonical),
            row_orders(config, "gguf").get(row.canonical),
        )
        order = to_model if to_file is None else np.argsort(to_file).astype(np.int32)
        if to_model is not None and to_file is not None:
            order = to_model[order]
        for layer in range(files.config.n_layers) if row.per_layer else (None,):
            info = files.weights.get((row.canonical, layer))
            if info is not None:
                plus = files.weights.plus(row.canonical)
                sources[row.gguf.format(layer)] = (
                    _from_values(info.read_f32() + np.float32(plus)) if plus else _from_file(info, order)
                )
    return sources


def _config_keys(c: ModelConfig) -> dict[str, Any]:
    """GGUF's keys, without the architecture that opens each."""
    windows = set(c.windows)  # layers that differ are refused by _check_config
    return {
        **({"attention.sliding_window": windows.pop()} if len(windows) == 1 else {}),
        "block_count": c.n_layers,
        "context_length": c.context,
        "embedding_length": c.dim,
        "feed_forward_length": c.ff_dim,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.dimension_count": c.rope_dim,
        "rope.freq_base": c.rope_theta,
        "vocab_size": c.vocab_size,
    }


def _rope_keys(json: Mapping[str, Any], c: ModelConfig) -> dict[str, Any]:
    """Linear scaling and YaRN have keys; what else scales becomes rope_freqs.weight."""
    table = json.get("rope_scaling") or json.get("rope_parameters") or {}
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind not in ("linear", "yarn"):
        return {}
    factor = table.get("factor") or c.context / (c.original_context or c.context)
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(factor)}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = c.original_context or c.context
        for name in ("beta_fast", "beta_slow"):
            if table.get(name):
                keys[f"rope.scaling.yarn_{name}"] = float(table[name])
        usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        if c.rope_scale != usual:
            keys["rope.scaling.attn_factor"] = c.rope_scale / usual
    return keys


def _sampling_keys(d: GenerationDefaults) -> dict[str, Any]:
    values = {
        "temp": d.temperature,
        "top_k": d.top_k,
        "top_p": d.top_p,
        "min_p": d.min_p,
        "penalty_repeat": d.repetition_penalty,
    }
    return {f"general.sampling.{name}": value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Shape:
    """What `config_from_gguf` asks of a tensor."""

    shape: tuple[int, ...]
    values: npt.NDArray[np.float32] | None = None

    def read_f32(self) -> npt.NDArray[np.float32]:
        return np.zeros(self.shape, np.float32) if self.values is None else self.values


def _check_config(
    folder: Path, config: ModelConfig, metadata: Mapping[str, Any], tensors: Mapping[str, _Shape]
) -> None:
    """What is written must mean the model that was read."""
    written = config_from_gguf(metadata, tensors)
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
