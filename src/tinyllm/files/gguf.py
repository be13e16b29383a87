"""Reads the header of a GGUF file (versions 2 and 3, single or split): metadata and where the tensors lie.

The format is described in ggml's docs/gguf.md. Every field is checked before it is used, against the real
size of the file, so that a refused file costs work and memory in proportion to what it is, whatever it
claims. Imports only `errors`, this package's shared part, and of the core the reading of strings. Read next:
names.py.
"""

from __future__ import annotations

import os
import re
import reprlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tinyllm._core import read_strings
from tinyllm.errors import FormatError, NotFoundError, UnsupportedError
from tinyllm.files import CHUNK_BYTES, GGUF_FORMATS, FileReader, Format, TensorInfo, show, show_some

MAX_HEADER_BYTES = (
    256 << 20
)  # real headers stay below 30 MB; the limit keeps a hostile one from filling memory
MAX_NAME_BYTES = 65535  # the specification's limit of a key
MAX_ALIGNMENT = 1 << 16
NO_TOKEN = 0xFFFFFFFF

_STRING, _ARRAY, _BOOL = 8, 9, 7
_DTYPES = {  # value type -> numpy dtype
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip
_U32_TYPE = 4
# Types that exist but that no kernel reads: their names and sizes.
OTHER_FORMATS = {
    number: Format(name, block, block_bytes)
    for number, name, block, block_bytes in (
        (9, "Q8_1", 32, 36), (15, "Q8_K", 256, 292), (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4),
        (27, "I64", 1, 8), (28, "F64", 1, 8),
    )
}  # fmt: skip
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF model.

    `metadata` holds plain Python values; arrays of strings are lists, arrays of numbers are read-only numpy
    arrays. Special-token ids that say "none" (0xFFFFFFFF) are left out. In a split set, `metadata` is the
    first part's, `tensors` are those of all parts, and `files` lists the parts in order.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    types: dict[
        str, int
    ]  # of the metadata: GGUF's number of the value's type, of an array that of its elements


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read a GGUF file's header, and those of its siblings when it is the first part of a split set.

    Raises NotFoundError, ReadError, FormatError (what is broken, and where) or UnsupportedError (a version or
    a tensor type that is not read).
    """
    path = Path(path)
    metadata, types, tensors = _read_part(path)
    files: tuple[Path, ...] = (path,)
    count = _split_field(metadata, path, "split.count", 1)
    number = _split_field(metadata, path, "split.no", 0)
    if count < 1 or number >= count:
        raise FormatError(f"{path}: says that it is part {number + 1} of {count} (split.no, split.count)")
    if count > 1:
        files = _add_parts(path, metadata, tensors, count)
    _check_tokenizer(metadata, path)
    return GGUFFile(metadata, tensors, files, types)


class Header:
    """A cursor over the header that refills a bounded window and never moves past the end of the file."""

    def __init__(self, file: FileReader) -> None:
        self.file = file
        self.end = min(file.size, MAX_HEADER_BYTES)
        self._buffer = b""
        self._start = 0  # the file offset of _buffer[0]
        self._next = 0  # index into _buffer

    @property
    def position(self) -> int:
        return self._start + self._next

    @property
    def remaining(self) -> int:
        return self.end - self.position

    def fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self.file.path}: {what} (at byte {self.position} of {self.file.size})")

    def require(self, n_bytes: int, what: str) -> None:
        """Refuse unless `n_bytes` more bytes exist; reads nothing."""
        if n_bytes > self.remaining:
            if self.end < self.file.size:
                self.fail(f"{what} would need a header of more than {MAX_HEADER_BYTES} bytes")
            self.fail(f"{what} needs {n_bytes} bytes, {self.remaining} are left; is it a truncated download?")

    def take(self, n_bytes: int, what: str) -> bytes:
        self._fill(n_bytes, what)
        start = self._next
        self._next += n_bytes
        return self._buffer[start : self._next]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def name(self, what: str) -> str:
        """A key or a tensor's name: not empty, of bounded length."""
        length = self.u64(f"the length of {what}")
        if not 0 < length <= MAX_NAME_BYTES:
            self.fail(f"{what} has a length of {length} bytes; 1 to {MAX_NAME_BYTES} are possible")
        return self._text(self.take(length, what), what)

    def string(self, what: str) -> str:
        return self._text(self.take(self.u64(f"the length of {what}"), what), what)

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. A vocabulary has some 400 000 of them, so the core reads those of the window."""
        self.require(8 * count, what)
        found: list[str] = []
        try:
            while True:
                self._next = read_strings(self._buffer, self._next, count - len(found), found)
                if len(found) == count:
                    return found
                self._fill(8, what)
                length = int.from_bytes(self._buffer[self._next : self._next + 8], "little")
                self._fill(8 + length, what)
        except UnicodeDecodeError:
            self.fail(f"element {len(found)} of {what} is not UTF-8")

    def _text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def _fill(self, n_bytes: int, what: str) -> None:
        """Make the next `n_bytes` bytes available in the window."""
        left = len(self._buffer) - self._next
        if left >= n_bytes:
            return
        self.require(n_bytes, what)
        position = self.position
        n_more = min(max(n_bytes - left, CHUNK_BYTES), self.end - position - left)
        self._buffer = self._buffer[self._next :] + self.file.read_at(position + left, n_more)
        self._start, self._next = position, 0


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, int], dict[str, TensorInfo]]:
    with FileReader(path) as file:
        header = Header(file)
        n_tensors, metadata, types, alignment = read_keys(header)
        return metadata, types, _read_tensors(header, n_tensors, alignment)


def read_keys(header: Header) -> tuple[int, dict[str, Any], dict[str, int], int]:
    """How many tensors a file has, its metadata and their types, and its alignment. The cursor then stands
    where the tensors are described."""
    if header.take(4, "the magic number") != b"GGUF":
        raise FormatError(f"{header.file.path}: not a GGUF file")
    _check_version(header)
    n_tensors = header.u64("the number of tensors")
    n_pairs = header.u64("the number of metadata entries")
    what = f"a header of {n_pairs} entries and {n_tensors} tensors"
    header.require(MIN_TENSOR_BYTES * n_tensors + _MIN_PAIR_BYTES * n_pairs, what)
    metadata, types, alignment = _read_metadata(header, n_pairs)
    return n_tensors, metadata, types, alignment


def _check_version(header: Header) -> None:
    version = header.u32("the version")
    if version in (2, 3):
        return
    path = header.file.path
    if version == 1:
        raise UnsupportedError(f"{path}: GGUF version 1 is too old; convert the original model again")
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError(f"{path}: a big-endian GGUF file; only little-endian ones are read")
    raise UnsupportedError(f"{path}: GGUF version {version} is unknown; versions 2 and 3 are read")


def _read_metadata(header: Header, n_pairs: int) -> tuple[dict[str, Any], dict[str, int], int]:
    metadata: dict[str, Any] = {}
    types: dict[str, int] = {}
    alignment = 32
    for i in range(n_pairs):
        key = header.name(f"metadata key {i}")
        if key in metadata:
            header.fail(f"the metadata key {show(key)} appears twice")
        kind = header.u32(f"the type of {show(key)}")
        metadata[key], types[key] = value, _ = _read_value(header, kind, show(key))
        if key == "general.alignment":
            if kind != _U32_TYPE or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
                header.fail(
                    f"general.alignment must be a uint32 power of two up to {MAX_ALIGNMENT}, not "
                    f"{reprlib.repr(value)}"
                )
            alignment = value
    return metadata, types, alignment


def _read_value(header: Header, kind: int, what: str) -> tuple[Any, int]:
    if kind == _STRING:
        return header.string(what), kind
    if kind != _ARRAY:
        return _read_numbers(header, kind, 1, what)[0].item(), kind
    kind = header.u32(f"the element type of {what}")
    count = header.u64(f"the length of {what}")
    if kind == _ARRAY:
        header.fail(f"{what} is an array of arrays")
    if kind == _STRING:
        return header.strings(count, what), kind
    return _read_numbers(header, kind, count, what), kind


def _read_numbers(header: Header, kind: int, count: int, what: str) -> npt.NDArray[Any]:
    if kind not in _DTYPES:
        header.fail(f"{what} has the unknown value type {kind}")
    dtype = np.dtype(_DTYPES[kind])
    values = np.frombuffer(header.take(count * dtype.itemsize, what), dtype)
    if kind == _BOOL:
        if values.size and values.max() > 1:
            header.fail(f"{what} is a bool that is neither 0 nor 1")
        return values.astype(np.bool_)
    return values


def _read_tensors(header: Header, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    file = header.file
    found: dict[str, TensorInfo] = {}
    for i in range(n_tensors):
        name = header.name(f"the name of tensor {i}")
        what = f"tensor {show(name)}"
        if name in found:
            header.fail(f"{what} appears twice")
        n_dims = header.u32(f"the rank of {what}")
        if not 1 <= n_dims <= 4:
            header.fail(f"{what} has {n_dims} dimensions; 1 to 4 are possible")
        dims = struct.unpack(f"<{n_dims}Q", header.take(8 * n_dims, f"the shape of {what}"))
        type_number = header.u32(f"the type of {what}")
        offset = header.u64(f"the offset of {what}")
        n_bytes = _tensor_bytes(header, what, dims, type_number)
        if offset % alignment:
            header.fail(
                f"{what} starts at offset {offset}, which is no multiple of the alignment {alignment}"
            )
        found[name] = TensorInfo(
            name, dims[::-1], type_number, file.path, offset, n_bytes, identity=file.identity
        )
    data = -(-header.position // alignment) * alignment
    tensors = {t.name: replace(t, offset=data + t.offset) for t in found.values()}
    _check_ranges(file, list(tensors.values()))
    return tensors


def _tensor_bytes(header: Header, what: str, dims: tuple[int, ...], type_number: int) -> int:
    if type_number not in GGUF_FORMATS:
        other = OTHER_FORMATS.get(type_number)
        name = other.name if other else f"number {type_number}, which is unknown"
        supported = ", ".join(f.name for f in GGUF_FORMATS.values())
        raise UnsupportedError(f"{header.file.path}: {what} has type {name}; supported: {supported}")
    n_elements = 1
    for n in dims:
        n_elements *= n
    if n_elements == 0:
        header.fail(f"{what} has a dimension of 0: shape {dims[::-1]}")
    form = GGUF_FORMATS[type_number]
    if dims[0] % form.block:
        header.fail(f"{what} has rows of {dims[0]} elements, but {form.name} blocks hold {form.block} each")
    n_bytes = n_elements // form.block * form.block_bytes
    if n_bytes > header.file.size:
        header.fail(f"{what} of shape {dims[::-1]} would take {n_bytes} bytes; is it a truncated download?")
    return n_bytes


def _check_ranges(file: FileReader, tensors: list[TensorInfo]) -> None:
    end, before = 0, ""
    for t in sorted(tensors, key=lambda t: t.offset):
        if t.offset < end:
            raise FormatError(
                f"{file.path}: tensors {show(before)} and {show(t.name)} overlap at byte {t.offset}"
            )
        end, before = t.offset + t.n_bytes, t.name
    if end > file.size:
        raise FormatError(
            f"{file.path}: tensor {show(before)} ends at byte {end}, but the file has {file.size} bytes; "
            "is it a truncated download?"
        )


def _split_field(metadata: dict[str, Any], path: Path, key: str, default: int | None) -> int:
    value = metadata.get(key, default)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise FormatError(f"{path}: {key} must be a whole number, not {reprlib.repr(value)}")
    return value


def _add_parts(
    path: Path, metadata: dict[str, Any], tensors: dict[str, TensorInfo], count: int
) -> tuple[Path, ...]:
    """Read parts 2 to `count` from beside `path` as given, add their tensors to `tensors`, return all
    paths."""
    match = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", path.name, re.DOTALL)
    if count > 99999:
        raise FormatError(f"{path}: split.count is {count}; a set has at most 99999 parts")
    if not match:
        raise FormatError(
            f"{path}: part of a set of {count} files, which are found by name: "
            f"call the first NAME-00001-of-{count:05}.gguf and the others alike"
        )
    first = f"{match[1]}-00001-of-{count:05}.gguf"
    number = _split_field(metadata, path, "split.no", None)
    if number != 0:
        raise FormatError(f"{path}: this is part {number + 1} of {count}; name the first part, {first}")
    if path.name != first:
        raise FormatError(f"{path}: says that it is part 1 of {count}, so its name must be {first}")
    total = _split_field(metadata, path, "split.tensors.count", None)
    paths = [path]
    for i in range(1, count):
        part = path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf")
        paths.append(part)
        try:
            part_metadata, _, part_tensors = _read_part(part)
        except NotFoundError:
            raise NotFoundError(
                f"{part}: part {i + 1} of {count} is missing; all parts must lie together"
            ) from None
        for key, want in (("split.no", i), ("split.count", count), ("split.tensors.count", total)):
            have = _split_field(part_metadata, part, key, None)
            if have != want:
                raise FormatError(f"{part}: {key} is {have}, expected {want}: not part {i + 1} of this set")
        for key in ("general.architecture", "general.name", "general.uuid"):
            if key in part_metadata and str(part_metadata[key]) != str(metadata.get(key)):
                raise FormatError(
                    f"{part}: its {key} is another than that of {path.name}: not a part of this set"
                )
        repeated = sorted(show(name) for name in part_tensors.keys() & tensors.keys())
        if repeated:
            raise FormatError(f"{part}: tensors that an earlier part holds already: {show_some(repeated)}")
        tensors.update(part_tensors)
    if len(tensors) != total:
        raise FormatError(
            f"{path}: split.tensors.count is {total}, but the parts hold {len(tensors)} tensors"
        )
    return tuple(paths)


def _check_tokenizer(metadata: dict[str, Any], path: Path) -> None:
    """Check what any user of the vocabulary relies on: types, equal lengths, ids in range. Drops ids of
    "none"."""

    def is_strings(value: Any) -> bool:
        return isinstance(value, list)

    def is_numbers(kinds: str) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, np.ndarray) and value.dtype.kind in kinds

    prefix = "tokenizer.ggml."
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "tokens": (is_strings, "strings"),
        "merges": (is_strings, "strings"),
        "scores": (is_numbers("f"), "floats"),
        "token_type": (is_numbers("iu"), "integers"),
    }
    for key, (check, kind) in checks.items():
        if prefix + key in metadata and not check(metadata[prefix + key]):
            raise FormatError(f"{path}: {prefix}{key} must be an array of {kind}")
    n_tokens = len(metadata.get(prefix + "tokens", ()))
    for key in ("scores", "token_type"):
        n = len(metadata.get(prefix + key, ()))
        if prefix + key in metadata and n != n_tokens:
            raise FormatError(f"{path}: {prefix}{key} has {n} elements for {n_tokens} tokens")
    for key in [k for k in metadata if k.startswith(prefix) and k.endswith("_token_id")]:
        value = metadata[key]
        if type(value) is not int:
            raise FormatError(f"{path}: {key} must be a token id, not {reprlib.repr(value)}")
        if value in (NO_TOKEN, -1):
            del metadata[key]
        elif not 0 <= value < (n_tokens or NO_TOKEN):
            raise FormatError(f"{path}: {key} is {value}, but there are {n_tokens} tokens")
