"""What any GGUF or safetensors file says, a model that tinyllm runs or not: keys, tensors and their types.

`read_raw` looks at headers alone, knows no architecture, and takes types of tensors that no kernel reads.
What breaks the format itself is refused as by gguf.py and safetensors.py, whose parts it uses. Imports these,
`errors` and this package's shared part.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllm.errors import FormatError, NotFoundError
from tinyllm.files import FORMATS, FileReader, is_there, list_directory, read_json, show
from tinyllm.files.gguf import OTHER_FORMATS, Header, read_keys
from tinyllm.files.safetensors import MAX_DIMENSIONS, are_sizes, read_entries


@dataclass(frozen=True)
class RawTensor:
    """shape: in numpy's order. type: the format's own name, or "type N" for a number that nobody here knows,
    whose size is then None. offset: from the file's beginning."""

    name: str
    shape: tuple[int, ...]
    type: str
    file: str
    offset: int
    n_bytes: int | None


@dataclass(frozen=True)
class RawFiles:
    """keys: GGUF's metadata, or of safetensors __metadata__; of a directory config.json's."""

    path: Path
    kind: str
    keys: dict[str, Any]
    tensors: list[RawTensor]
    file_bytes: int
    n_files: int


def read_raw(path: Path) -> RawFiles:
    """Of a GGUF file, alone if it is one of a set, a safetensors file, or a directory with such. Raises
    NotFoundError, ReadError, FormatError (neither, or broken), UnsupportedError (versions of GGUF)."""
    if os.path.isdir(path):
        names = sorted(n for n in list_directory(path) if n.endswith(".safetensors"))
        if not names:
            raise NotFoundError(f"{path}: holds no .safetensors file; name a .gguf file in it")
        parts = [_safetensors(path / name) for name in names]
        keys: dict[str, Any] = {}
        if is_there(path / "config.json"):
            keys = dict(read_json(path / "config.json"))
        tensors = [tensor for part in parts for tensor in part.tensors]
        return RawFiles(path, "safetensors", keys, tensors, sum(p.file_bytes for p in parts), len(parts))
    with FileReader(path) as file:
        is_gguf = file.size >= 4 and file.read_at(0, 4) == b"GGUF"
    return _gguf(path) if is_gguf else _safetensors(path)


def _gguf(path: Path) -> RawFiles:
    with FileReader(path) as file:
        header = Header(file)
        n_tensors, keys, _, alignment = read_keys(header)
        rows = list(_gguf_rows(header, n_tensors))
        data = -(-header.position // alignment) * alignment
        tensors = [
            RawTensor(name, shape, type, path.name, data + offset, n_bytes)
            for name, shape, type, offset, n_bytes in rows
        ]
        return RawFiles(path, "GGUF", keys, tensors, file.size, 1)


def _gguf_rows(header: Header, n_tensors: int) -> Iterator[tuple[str, tuple[int, ...], str, int, int | None]]:
    for i in range(n_tensors):
        name = header.name(f"the name of tensor {i}")
        n_dims = header.u32(f"the rank of tensor {show(name)}")
        if not 0 <= n_dims <= MAX_DIMENSIONS:
            header.fail(f"tensor {show(name)} has {n_dims} dimensions; at most {MAX_DIMENSIONS} are possible")
        dims = struct.unpack(f"<{n_dims}Q", header.take(8 * n_dims, f"the shape of tensor {show(name)}"))
        number = header.u32(f"the type of tensor {show(name)}")
        offset = header.u64(f"the offset of tensor {show(name)}")
        known = FORMATS.get(number) or OTHER_FORMATS.get(number)
        n_bytes = None if known is None else math.prod(dims) * known.block_bytes // known.block
        yield name, dims[::-1], known.name if known else f"type {number}", offset, n_bytes


def _safetensors(path: Path) -> RawFiles:
    entries = read_entries(path)
    tensors = [_entry(path, name, entry, entries.data) for name, entry in entries.tensors.items()]
    tensors.sort(key=lambda tensor: tensor.offset)
    return RawFiles(path, "safetensors", dict(entries.notes), tensors, entries.size, 1)


def _entry(path: Path, name: str, entry: Any, data: int) -> RawTensor:
    entry = entry if isinstance(entry, Mapping) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and are_sizes(shape) and are_sizes(offsets) and len(offsets) == 2):
        raise FormatError(f"{path}: tensor {show(name)}: no entry with dtype, shape and data_offsets")
    n_bytes = max(0, offsets[1] - offsets[0])
    return RawTensor(name, tuple(shape), dtype, path.name, data + offsets[0], n_bytes)
