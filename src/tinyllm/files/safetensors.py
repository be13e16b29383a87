"""Reads the headers of safetensors files: where the tensors of a file, or of a directory with shards, lie.

The format: a little-endian uint64, that many bytes of JSON, then the data; the tensors' ranges must tile the
data. The header is parsed here rather than by the `safetensors` package because the core reads the data
itself, by offset. Imports only `errors` and this package's shared part. Read next: names.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tinyllm.errors import FormatError, NotFoundError, UnsupportedError
from tinyllm.files import (
    BF16,
    F16,
    F32,
    FORMATS,
    MAX_JSON_BYTES,
    MXFP4,
    FileReader,
    Identity,
    TensorInfo,
    is_there,
    list_directory,
    parse_json,
    read_json,
    show,
    show_some,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_DIMENSIONS = 8
# Not formats: what parts of quantized weights hold, until schemes/ or `_join_mxfp4` puts them together.
U8, I8, I32, I64, F8, F8_SCALE = range(-1, -7, -1)
RAW_DTYPES = {U8: "U8", I8: "I8", I32: "I32", I64: "I64", F8: "F8_E4M3", F8_SCALE: "F8_E8M0"}
_RAW_BYTES = {U8: 1, I8: 1, I32: 4, I64: 8, F8: 1, F8_SCALE: 1}
_FORMAT_OF_DTYPE = {"F32": F32, "F16": F16, "BF16": BF16, **{dtype: raw for raw, dtype in RAW_DTYPES.items()}}
Join = Callable[[dict[str, TensorInfo]], dict[str, TensorInfo]]


@dataclass(frozen=True)
class SafetensorsFile:
    """The tensors of a safetensors model; `files` lists the files that hold them."""

    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]


def read_safetensors(path: str | os.PathLike[str], join: Join | None = None) -> SafetensorsFile:
    """Read the headers of a directory's model.safetensors, or of the shards its index names, or of one file.

    join: puts the tensors of quantized weights together (schemes/). Links are followed; shards are sought
    beside the index as given. Raises NotFoundError, ReadError, FormatError (what is broken, and where) or
    UnsupportedError (a dtype other than F32, F16, BF16 that nothing joined).
    """
    file = _read(Path(path))
    return replace(file, tensors=_join_mxfp4(join(file.tensors) if join else file.tensors))


def _read(path: Path) -> SafetensorsFile:
    if not os.path.isdir(path):
        return SafetensorsFile(_read_file(path), (path,))
    if is_there(path / SINGLE):
        return SafetensorsFile(_read_file(path / SINGLE), (path / SINGLE,))
    if is_there(path / INDEX):
        return _read_shards(path / INDEX)
    pickles = [show(name) for name in list_directory(path) if name.endswith((".bin", ".pth", ".pt"))]
    hint = f"; {show_some(pickles)} must be converted to safetensors first" if pickles else ""
    raise NotFoundError(f"{path}: holds neither {SINGLE} nor {INDEX}{hint}")


def _read_shards(index: Path) -> SafetensorsFile:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: has no weight_map of tensor names to files")
    for name, file in weight_map.items():
        # A plain name only: no separator, so neither an absolute path nor one that climbs out with "..".
        plain = isinstance(file, str) and file.isprintable() and not {"/", "\\"} & set(file)
        if not plain or file in ("", ".", ".."):
            raise FormatError(
                f"{index}: tensor {show(name)} is in {show(str(file))}, which is no plain file name"
            )
    shards: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(weight_map.values())):
        try:
            shards[file] = _read_file(index.with_name(file))
        except NotFoundError:
            raise NotFoundError(
                f"{index.with_name(file)}: this shard, named by {index.name}, is missing"
            ) from None
    missing = [f"{show(name)} in {file}" for name, file in weight_map.items() if name not in shards[file]]
    if missing:
        raise FormatError(f"{index}: names tensors that their shards do not hold: {show_some(missing)}")
    tensors = {name: shards[file][name] for name, file in weight_map.items()}
    return SafetensorsFile(tensors, tuple(index.with_name(file) for file in shards))


def _join_mxfp4(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """NAME_blocks [..., rows, blocks, 16] and NAME_scales [..., rows, blocks] as NAME [..., rows, k], MXFP4.

    Raises UnsupportedError for other tensors of what is no format.
    """
    joined: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if tensor.format >= 0:
            joined[name] = tensor
            continue
        stem, _, kind = name.rpartition("_")
        blocks, scales = tensors.get(f"{stem}_blocks"), tensors.get(f"{stem}_scales")
        if not (blocks and scales) or {tensor.format, blocks.format, scales.format} != {U8}:
            raise _unsupported(tensor.path, name, RAW_DTYPES[tensor.format])
        if blocks.shape != (*scales.shape, 16) or len(scales.shape) < 2:
            raise FormatError(
                f"{tensor.path}: {show(stem)} has blocks of shape {blocks.shape} and scales of shape "
                f"{scales.shape}; MXFP4 has 16 bytes and a scale a block"
            )
        if stem in tensors:
            raise FormatError(f"{tensor.path}: {show(stem)} is there whole and as {show(name)}")
        if kind == "blocks":
            shape = (*scales.shape[:-1], 32 * scales.shape[-1])
            joined[stem] = replace(blocks, name=stem, shape=shape, format=MXFP4, scales=scales)
    return joined


def _unsupported(path: Path, name: str, dtype: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: tensor {show(name)} has dtype {show(dtype)}; F32, F16 and BF16 are supported, and U8 in "
        "pairs of MXFP4 blocks and scales. Of other quantized models config.json must say the scheme "
        "(quantization_config)"
    )


class Entries(NamedTuple):
    """A file's tensors by name, as its JSON says them, its notes (__metadata__), where its data begins, and
    the file's size and identity."""

    tensors: dict[str, Any]
    notes: dict[str, str]
    data: int
    size: int
    identity: Identity | None


def read_entries(path: Path) -> Entries:
    """Nothing of the tensors is checked yet. Raises ReadError, FormatError."""
    with FileReader(path) as file:
        n_header = int.from_bytes(file.read_at(0, 8), "little")
        if n_header > min(file.size - 8, MAX_JSON_BYTES):
            raise FormatError(
                f"{path}: claims a header of {n_header} bytes, but the file has {file.size} bytes (and a "
                f"header at most {MAX_JSON_BYTES}); not a safetensors file, or a truncated download"
            )
        header = parse_json(file.read_at(8, n_header), f"{path}: header")
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is not a JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings")
    return Entries(header, notes, 8 + n_header, file.size, file.identity)


def _read_file(path: Path) -> dict[str, TensorInfo]:
    header, _, data, size, identity = read_entries(path)
    tensors = {
        name: replace(_tensor(path, name, entry, data), identity=identity) for name, entry in header.items()
    }
    end, before = data, "the header"
    for t in sorted(tensors.values(), key=lambda t: t.offset):
        if t.offset != end:
            kind = "overlaps" if t.offset < end else "leaves a gap after"
            raise FormatError(
                f"{path}: tensor {show(t.name)} at byte {t.offset} {kind} {before}, which ends at {end}"
            )
        end, before = t.offset + t.n_bytes, f"tensor {show(t.name)}"
    if end != size:
        raise FormatError(
            f"{path}: {before} ends at byte {end}, but the file has {size} bytes; "
            + ("is it a truncated download?" if end > size else "what follows belongs to no tensor")
        )
    return tensors


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    def fail(what: str) -> NoReturn:
        raise FormatError(f"{path}: tensor {show(name)}: {what}")

    if not name:
        fail("has an empty name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        fail("its entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        fail("its dtype is not a string")
    if dtype not in _FORMAT_OF_DTYPE:
        raise _unsupported(path, name, dtype)
    if not are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        fail(f"its shape must be a list of at most {MAX_DIMENSIONS} whole numbers")
    if not are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        fail("its data_offsets must be two whole numbers in ascending order")
    format = _FORMAT_OF_DTYPE[dtype]
    n_bytes = _RAW_BYTES[format] if format < 0 else FORMATS[format].block_bytes
    for n in shape:
        n_bytes *= n
    if n_bytes == 0:
        fail(f"has a dimension of 0: shape {tuple(shape)}")
    if n_bytes != offsets[1] - offsets[0]:
        size = offsets[1] - offsets[0]
        fail(f"shape {tuple(shape)} of {dtype} takes {n_bytes} bytes, its data_offsets {size}")
    return TensorInfo(name, tuple(shape), format, path, data + offsets[0], n_bytes)


def are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)
