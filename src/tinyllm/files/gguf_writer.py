"""Writes GGUF files (version 3): metadata, then tensor after tensor as they are made, in bounded memory.

A file appears under its name when it is complete, and not before (outfiles.py). Imports `errors`, outfiles
and this package's shared part. gguf.py reads what is written here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from tinyllm.errors import ArgumentError
from tinyllm.files import FORMATS
from tinyllm.files.outfiles import replacing

ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11
_PACKED = {  # value type -> struct format
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_DTYPES = {  # of arrays; a bool is a byte
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8",
    _BOOL: "|b1",
}  # fmt: skip


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write: shape in numpy's order, format a key of FORMATS; `chunks` makes its bytes."""

    name: str
    shape: tuple[int, ...]
    format: int
    chunks: Callable[[], Iterable[bytes]]

    @property
    def n_bytes(self) -> int:
        form = FORMATS[self.format]
        n = 1
        for size in self.shape:
            n *= size
        return n // form.block * form.block_bytes


@dataclass(frozen=True)
class Part:
    """One file of a set: where, its metadata and its tensors."""

    path: str | os.PathLike[str]
    metadata: Mapping[str, Any]
    tensors: Sequence[OutTensor]


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Sequence[OutTensor],
    *,
    types: Mapping[str, int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Writes a file and returns its size in bytes.

    metadata: strings, bools, whole numbers, floats, lists of strings, numpy arrays. types: GGUF's numbers of
    their types where they are known (GGUFFile.types); else whole numbers become uint32, or the first of
    int32, uint64 and int64 that holds them, and floats float32. progress: called with (bytes written, bytes
    in all). Raises WriteError, ArgumentError; leaves nothing behind then.
    """
    return write_set([Part(path, metadata, tensors)], types=types, progress=progress)


def write_set(
    parts: Sequence[Part],
    *,
    types: Mapping[str, int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """As `write_gguf`, of several files, none of which appears before all are written."""
    headers = [_header(part, types or {}) for part in parts]
    sizes = [
        len(header) + sum(_padded(tensor.n_bytes) for tensor in part.tensors)
        for header, part in zip(headers, parts, strict=True)
    ]
    done, total = 0, sum(sizes)
    with ExitStack() as stack:
        for part, header in zip(parts, headers, strict=True):
            file = stack.enter_context(replacing(part.path, total - done))
            done += file.write(header)
            for tensor in part.tensors:
                done = _write_tensor(file, tensor, done, total, progress)
    return total


def _write_tensor(
    file: IO[bytes],
    tensor: OutTensor,
    done: int,
    total: int,
    progress: Callable[[int, int], object] | None,
) -> int:
    """Returns how many bytes are written then."""
    end = done + tensor.n_bytes
    for chunk in tensor.chunks():
        file.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress(done, total)
    if done != end:
        raise ArgumentError(f"{tensor.name}: {end - done} bytes are missing")
    return done + file.write(bytes(_padded(tensor.n_bytes) - tensor.n_bytes))


def _header(part: Part, types: Mapping[str, int]) -> bytes:
    """What comes before the tensors' bytes."""
    tensors = part.tensors
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(part.metadata))]
    for key, value in part.metadata.items():
        header += [_text(key), _value(value, types.get(key), key)]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        header += [_text(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        header.append(struct.pack("<IQ", tensor.format, offset))
        offset += _padded(tensor.n_bytes)
    start = b"".join(header)
    return start + bytes(_padded(len(start)) - len(start))


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any, kind: int | None, key: str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, np.ndarray):
        kind = (
            kind
            if kind is not None
            else next(k for k, dtype in _DTYPES.items() if np.dtype(dtype) == value.dtype)
        )
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.astype(_DTYPES[kind]).tobytes()
    if isinstance(value, (list, tuple)):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    if kind is None:
        kind = (
            _BOOL if isinstance(value, bool) else _FLOAT32 if isinstance(value, float) else _whole(value, key)
        )
    return struct.pack("<I", kind) + struct.pack(_PACKED[kind], value)


def _whole(value: Any, key: str) -> int:
    for kind, least, most in ((_UINT32, 0, 1 << 32), (_INT32, -(1 << 31), 0), (_UINT64, 0, 1 << 64),
                              (_INT64, -(1 << 63), 0)):  # fmt: skip
        if isinstance(value, int) and least <= value < most:
            return kind
    raise ArgumentError(f"{key} cannot be written: {value!r}")
