"""What all readers of files share: the description of a tensor, the table of formats, bounded reading.

Model files come from strangers. Nothing here trusts a size that a file states: reading goes through
`FileReader`, which uses pread in bounded chunks (never mmap, so a file cut meanwhile cannot fault) and knows
the real size. Imports only `errors`. Read next: gguf.py and safetensors.py (the files), names.py (what the
tensors are called).
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from tinyllm.errors import FormatError, NotFoundError, ReadError, UnsupportedError, comes_from

CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = (
    100_000_000  # the safetensors library's own limit of a header; ample for any config or tokenizer
)
MAX_JSON_DEPTH = 64
_NESTING = {dict, list}
MAX_PATH = 4096  # Linux's limit, the highest of the systems that tinyllm runs on

Identity = tuple[int, int, int, int]  # of a file: device, inode, size, time of the last change in ns


@dataclass(frozen=True)
class Format:
    """One tensor format: `block` consecutive elements of a row take `block_bytes` bytes. `scales`: where in
    them half-precision factors and offsets lie, that make all the others NaN or infinite where they are."""

    name: str
    block: int
    block_bytes: int
    scales: tuple[int, ...] = ()


# By GGML type number: what GGUF files hold.
GGUF_FORMATS: dict[int, Format] = {
    0: Format("F32", 1, 4),
    1: Format("F16", 1, 2, (0,)),
    2: Format("Q4_0", 32, 18, (0,)),
    3: Format("Q4_1", 32, 20, (0, 2)),
    6: Format("Q5_0", 32, 22, (0,)),
    7: Format("Q5_1", 32, 24, (0, 2)),
    8: Format("Q8_0", 32, 34, (0,)),
    10: Format("Q2_K", 256, 84, (80, 82)),
    11: Format("Q3_K", 256, 110, (108,)),
    12: Format("Q4_K", 256, 144, (0, 2)),
    13: Format("Q5_K", 256, 176, (0, 2)),
    14: Format("Q6_K", 256, 210, (208,)),
    20: Format("IQ4_NL", 32, 18, (0,)),
    23: Format("IQ4_XS", 256, 136, (0,)),
    30: Format("BF16", 1, 2),
    39: Format("MXFP4", 32, 17),
    40: Format("NVFP4", 64, 36),
    34: Format("TQ1_0", 256, 54, (52,)),
    35: Format("TQ2_0", 256, 66, (64,)),
    41: Format("Q1_0", 128, 18, (0,)),
    42: Format("Q2_0", 64, 18, (0,)),
    18: Format("IQ3_XXS", 256, 98, (0,)),
    21: Format("IQ3_S", 256, 110, (0,)),
    16: Format("IQ2_XXS", 256, 66, (0,)),
    17: Format("IQ2_XS", 256, 74, (0,)),
    22: Format("IQ2_S", 256, 82, (0,)),
    19: Format("IQ1_S", 256, 50, (0,)),
    29: Format("IQ1_M", 256, 56),
}
F32, F16, BF16, Q4_0, Q8_0, MXFP4, NVFP4, IQ1_M = 0, 1, 30, 2, 8, 39, 40, 29

# What no file holds as it is: weights of safetensors that other libraries quantized (schemes/), their numbers
# unchanged; csrc/formats/pack_schemes.c says what a block is.
OWN_FORMATS: dict[int, Format] = {
    200: Format("I4_128", 128, 69),
    201: Format("I4_32", 32, 19, (0,)),
    202: Format("I8_64", 64, 68),
    203: Format("NVFP4_64", 64, 40),
    204: Format("F8_E4M3", 64, 68),
    205: Format("BNB4", 64, 37),
    206: Format("BNB8", 64, 68),
}
I4_128, I4_32, I8_64, NVFP4_64, F8_E4M3, BNB4, BNB8 = OWN_FORMATS

# Those whose weights meet float32 activations; others meet activations rounded to int8.
MEET_FLOATS = (F32, F16, BF16, F8_E4M3, BNB4, BNB8)

# All. The core keeps the same table beside its kernels; tests/test_boundary.py compares the two.
FORMATS: dict[int, Format] = GGUF_FORMATS | OWN_FORMATS

Made = Callable[[int, int], npt.NDArray[np.uint8]]  # rows [first, last) of a matrix, [rows, bytes of one]


def are_finite(data: npt.NDArray[np.uint8], format: int) -> bool:
    """Whether whole blocks, uint8 [n], hold neither NaN nor infinity: told by the scales, where they have
    some. Of MXFP4's one is no number, 255, and of NVFP4's 0x7f, which is read as 0. IQ1_M's half lies in four
    words' highest bits."""
    if format == F32:
        return bool(np.isfinite(data.view("<f4")).all())
    if format == BF16:
        return not ((data.view("<u2") & 0x7F80) == 0x7F80).any()
    blocks = data.reshape(-1, FORMATS[format].block_bytes)
    if format == MXFP4:
        return not (blocks[:, 0] == 255).any()
    if format == NVFP4:
        return not (blocks[:, :4] == 0x7F).any()
    if format == IQ1_M:
        words = np.ascontiguousarray(blocks[:, 48:56]).view("<u2") >> 12
        return not ((words[:, 3] & 7 == 7) & (words[:, 2] >> 2 == 3)).any()
    halves = (np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2") for at in FORMATS[format].scales)
    return not any(((half & 0x7C00) == 0x7C00).any() for half in halves)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `n_bytes` bytes at `offset` of `path`, checked to be inside the file.

    `shape` is in numpy's order, so a matrix is (rows, k) and its rows are contiguous; `format` is a key of
    `FORMATS`. Where `row_stride` is not 1, only every so-many-th row (or number, of a vector) from `offset`
    on belongs to it; of a stack `stack_stride` is the bytes from one matrix to the next, 0 where nothing
    lies between. `columns` (n, first, step): it lies transposed, its rows are the columns first, first +
    step... of a matrix of n columns at `offset`; floats alone do. MXFP4 in two parts, as safetensors hold it,
    has its bytes of scale in `scales`. `factors`: what all numbers are multiplied by beside what their blocks
    say, one for all or one for each matrix of a stack; none is 1. `identity` is the file's when its header
    was read; None takes any.
    `made`: no file holds it as it is; this makes its rows from other tensors, `offset` and `n_bytes` say
    where they would lie if they lay one after another from 0 on, and path is that of one of the others.
    """

    name: str
    shape: tuple[int, ...]
    format: int
    path: Path
    offset: int
    n_bytes: int
    row_stride: int = 1
    stack_stride: int = 0
    columns: tuple[int, int, int] | None = None
    scales: TensorInfo | None = None
    factors: tuple[float, ...] = ()
    identity: Identity | None = None
    made: Made | None = None

    def open(self) -> FileReader:
        """The file; raises FormatError where it is no longer the one whose header was read."""
        return FileReader(self.path, self.identity)

    def parts(self) -> list[TensorInfo]:
        """What a tensor of several dimensions is made of along the first: a stack's matrices."""
        n = self.shape[0]
        scales = self.scales.parts() if self.scales else [None] * n
        size = self.n_bytes // n
        return [
            replace(
                self,
                name=f"{self.name}[{i}]",
                shape=self.shape[1:],
                offset=self.offset + i * (self.stack_stride or size),
                n_bytes=size,
                stack_stride=0,
                scales=scales[i],
                factors=self.factors[i : i + 1] if len(self.factors) > 1 else self.factors,
            )
            for i in range(n)
        ]

    def transposed(self, first: int = 0, step: int = 1) -> TensorInfo:
        """The matrix whose rows are this one's columns first, first + step, ... Raises FormatError where
        the number of columns is no multiple of step."""
        k, n = self.shape
        if self.made:
            raise UnsupportedError(f"{self.path}: {show(self.name)} is quantized and lies transposed")
        if n % step:
            raise FormatError(
                f"{self.path}: tensor {show(self.name)} has {n} columns, which cannot be those of {step} "
                "matrices in turn"
            )
        return replace(self, shape=(n // step, k), n_bytes=self.n_bytes // step, columns=(n, first, step))

    def every_other(self, first: int) -> TensorInfo:
        """The rows (or numbers) first, first + 2, ... where first is 0 or 1. Raises FormatError for an odd
        number of them."""
        if self.shape[0] % 2:
            raise FormatError(
                f"{self.path}: tensor {show(self.name)} has {self.shape[0]} rows, which cannot be those "
                "of two matrices in turn"
            )
        return replace(
            self,
            shape=(self.shape[0] // 2, *self.shape[1:]),
            offset=self.offset + first * (self.n_bytes // self.shape[0]),
            n_bytes=self.n_bytes // 2,
            row_stride=2,
            scales=self.scales and self.scales.every_other(first),
        )

    def read_f32(self) -> npt.NDArray[np.float32]:
        """The values as float32, of this shape. For small float tensors; raises UnsupportedError for
        blocks."""
        return read_tensor_f32(self)


def read_rows(info: TensorInfo, first: int, last: int) -> npt.NDArray[np.uint8]:
    """Rows [first, last) as they are stored, uint8 [rows, bytes of one]; of MXFP4 in two parts the blocks
    alone. Rows run along the last dimension; a vector has rows of one number."""
    n_rows = math.prod(info.shape[:-1]) if len(info.shape) > 1 else math.prod(info.shape)
    row_bytes, stride = info.n_bytes // n_rows, info.row_stride
    if info.made:
        start = info.offset // row_bytes + first * stride
        return info.made(start, start + (last - first - 1) * stride + 1)[::stride]
    if info.columns:
        n, start, step = info.columns
        k = info.shape[-1]
        with info.open() as file:
            whole = np.frombuffer(file.read_at(info.offset, n * row_bytes), f"<u{row_bytes // k}")
        turned = whole.reshape(k, n)[:, start::step][:, first:last].T
        return np.ascontiguousarray(turned).view(np.uint8)
    with info.open() as file:
        data = file.read_at(
            info.offset + first * stride * row_bytes, ((last - first - 1) * stride + 1) * row_bytes
        )
    return np.frombuffer(data, np.uint8).reshape(-1, row_bytes)[::stride]


def to_f32(data: npt.NDArray[np.uint8], format: int) -> npt.NDArray[np.float32]:
    """The numbers of F32, F16 or BF16 (exact in all three cases), float32 [n], from contiguous bytes."""
    if format == F32:
        return data.ravel().view("<f4").astype(np.float32)
    if format == F16:
        return data.ravel().view("<f2").astype(np.float32)
    return (data.ravel().view("<u2").astype(np.uint32) << 16).view(np.float32)


def read_tensor_f32(info: TensorInfo) -> npt.NDArray[np.float32]:
    """Read a whole F32, F16 or BF16 tensor as float32."""
    if info.format not in (F32, F16, BF16):
        raise UnsupportedError(
            f"{info.path}: tensor {show(info.name)} is {FORMATS[info.format].name}, not F32, F16 or BF16"
        )
    n_rows = math.prod(info.shape[:-1]) if len(info.shape) > 1 else math.prod(info.shape)
    rows = np.ascontiguousarray(read_rows(info, 0, n_rows))
    return to_f32(rows, info.format).reshape(info.shape)


def same_numbers(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two float matrices hold the same numbers, read piece by piece up to where they differ."""
    if a.shape != b.shape or not {a.format, b.format} <= {F32, F16, BF16}:
        return False
    n_rows, k = a.shape
    step = max(1, CHUNK_BYTES // k)

    def numbers(info: TensorInfo, first: int) -> npt.NDArray[Any]:
        rows = np.ascontiguousarray(read_rows(info, first, min(first + step, n_rows)))
        return rows if a.format == b.format else to_f32(rows, info.format)

    return all(np.array_equal(numbers(a, first), numbers(b, first)) for first in range(0, n_rows, step))


class FileReader:
    """A regular file opened for bounded reads; a context manager.

    Raises NotFoundError or ReadError on opening; FormatError for a range outside the file or a short read,
    where the file has not the `identity` it is expected to have, and on leaving where it has changed since.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Identity | None = None) -> None:
        self.path = Path(path)
        try:
            # Looked at first, as opening a named pipe would wait for its writer.
            is_file = stat.S_ISREG(os.stat(self.path).st_mode)
            # An object from the start: an interrupt before its first use leaves nothing open.
            file = FileIO(self.path) if is_file else None
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"{self.path}: no such file") from None
        except (OSError, ValueError) as error:
            if not comes_from(error):
                raise
            raise ReadError(f"{self.path}: cannot be opened: {error}") from None
        if file is None:
            raise ReadError(f"{self.path}: not a regular file")
        self._file = file
        status = os.fstat(self.fileno())
        self.size = status.st_size
        self.identity = identity or _identity(status)
        try:
            self._check_identity()
        except FormatError:
            self._file.close()
            raise

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._check_identity()

    def fileno(self) -> int:
        return self._file.fileno()

    def _check_identity(self) -> None:
        if _identity(os.fstat(self.fileno())) != self.identity:
            raise FormatError(f"{self.path}: the file changed while it was read; try again")

    def read_at(self, offset: int, n_bytes: int) -> bytes:
        """Exactly `n_bytes` bytes at `offset`."""
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.size:
            raise FormatError(
                f"{self.path}: needs {n_bytes} bytes at offset {offset}, but the file has {self.size} bytes; "
                "is it a truncated download?"
            )
        parts = []
        while n_bytes:
            try:
                part = os.pread(self.fileno(), min(n_bytes, CHUNK_BYTES), offset)
            except OSError as error:
                if not comes_from(error):
                    raise
                raise ReadError(f"{self.path}: reading at offset {offset} failed: {error}") from None
            if not part:
                raise FormatError(
                    f"{self.path}: {n_bytes} bytes at offset {offset} are gone; was the file cut meanwhile?"
                )
            parts.append(part)
            offset += len(part)
            n_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _identity(status: os.stat_result) -> Identity:
    """What changes when a file is replaced, cut or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def user_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a user gives one, with its ~ expanded. Raises NotFoundError where nobody has that name, and
    for an empty one or one that no system takes."""
    if path == "":  # which Python takes for the current directory
        raise NotFoundError("the path is empty: name a file or a directory")
    if len(name := os.fspath(path)) > MAX_PATH:
        raise NotFoundError(f"no file has a path of {len(name)} characters: {name[:100]!r}...")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise NotFoundError(f"{os.fspath(path)}: {error}") from None


def read_small(path: str | os.PathLike[str]) -> bytes:
    """All of a file that nobody makes larger than `MAX_JSON_BYTES`: a template, a vocabulary, JSON."""
    with FileReader(path) as file:
        if file.size > MAX_JSON_BYTES:
            raise FormatError(
                f"{file.path}: {file.size} bytes are too many for such a file ({MAX_JSON_BYTES} at most)"
            )
        return file.read_at(0, file.size)


def show(text: str, limit: int = 100) -> str:
    """A name from a file for a message: quoted, unprintable characters escaped, cut to about `limit`
    characters."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


def show_words(text: str, limit: int = 500) -> str:
    """As `show`, of words that stand in a message without quotes: those of a template or of a package."""
    text = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show_some(items: Sequence[str], limit: int = 8) -> str:
    """The first `limit` of `items` for a message, and how many were left out."""
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")


def parse_json(raw: bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or Infinity, depth at most `MAX_JSON_DEPTH`.

    `where` opens the messages. Raises FormatError.
    """

    def fail(what: str) -> NoReturn:
        raise FormatError(f"{where}: {what}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    fail(f"the key {show(key)} appears twice in one object")
                seen.add(key)
        return table

    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=lambda c: fail(f"{c} is no JSON")
        )
    except UnicodeDecodeError as error:
        fail(f"not UTF-8 at byte {error.start}")
    except RecursionError:
        fail("nested too deeply")
    except ValueError as error:
        fail(f"not valid JSON: {error}")
    level: list[Any] = [[value]]
    depth = 0
    while level := [
        v
        for item in level
        for v in (item.values() if isinstance(item, dict) else item)
        if type(v) in _NESTING
    ]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            fail(f"nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that holds one object (config.json and its like), with the checks of `parse_json`."""
    value = parse_json(read_small(path), str(path))
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_if_any(path: str | os.PathLike[str]) -> dict[str, Any]:
    """As `read_json`, and {} where there is no such file."""
    return read_json(path) if is_there(path) else {}


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file of a model that may do without. Raises FormatError for a link to nothing: the
    model has the file, and is another one without it."""
    if not os.path.exists(path) and os.path.islink(path):
        raise FormatError(
            f"{path}: a link to {show(os.readlink(path))}, which is not there; did the download end early? "
            "Download the model again"
        )
    return os.path.exists(path)


def list_directory(path: Path) -> list[str]:
    """The names in a directory, sorted."""
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        if not comes_from(error):
            raise
        raise ReadError(f"{path}: cannot be listed: {error}") from None


ModelKind = Literal["gguf", "safetensors", "directory"]
_EXPECTED = "expected a GGUF file or a directory with config.json and *.safetensors"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_LEGACY_GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg")


def find_model(path: str | os.PathLike[str]) -> ModelKind:
    """Tell what kind of model `path` is, by content and never by extension.

    "gguf" and "safetensors" are files, "directory" is a folder with a config.json. Raises NotFoundError,
    ReadError, FormatError with a hint for what people commonly mistake for a model, or UnsupportedError for
    an adapter, also one beside a model.
    """
    path = Path(path)
    if os.path.isdir(path):
        _refuse_adapter(path)
        return _find_in_directory(path)
    with FileReader(path) as file:
        head = file.read_at(0, min(file.size, 64))
        size = file.size
    if head[:4] == b"GGUF":
        return "gguf"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        _refuse_adapter(path.parent)
        return "safetensors"
    raise FormatError(f"{path}: not a model: {_hint(head)}; {_EXPECTED}")


def _find_in_directory(path: Path) -> ModelKind:
    if is_there(path / "config.json"):
        return "directory"
    found = list_directory(path)
    ggufs = [show(name) for name in found if name.endswith(".gguf")]
    if ggufs:
        raise FormatError(f"{path}: this directory holds GGUF files; name one of them: {show_some(ggufs)}")
    raise FormatError(f"{path}: not a model: the directory has no config.json; {_EXPECTED}")


def _refuse_adapter(folder: Path) -> None:
    """transformers applies one beside a model where peft is installed, so the model alone is another."""
    found = [name for name in _ADAPTER_FILES if is_there(folder / name)]
    if found:
        bare = " (or move the adapter away, to run the model without it)" * is_there(folder / "config.json")
        raise UnsupportedError(f"{folder}: {adapter_text(show_some(found))}{bare}")


def adapter_text(found: str) -> str:
    """The message for an adapter, instead of a model or beside one; `found` says where."""
    return (
        f"holds an adapter ({found}), not a model of its own. Name its base model, and the adapter beside "
        'it: tinyllm.load("BASE", adapters={"name": "ADAPTER"}), tinyllm-run BASE --lora ADAPTER; or merge '
        "the two into a file: tinyllm-quantize BASE MERGED.gguf TYPE --lora ADAPTER"
    )


def _hint(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "the file is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "it is a web page, probably a login or error page saved in place of the file; download it again"
        )
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"
    if head[:4] == b"PK\x03\x04" or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "it is a PyTorch pickle, which can run code when opened; convert it to safetensors"
    if head[:4] in _LEGACY_GGML:
        return "it is a GGML file from before GGUF; convert the original model again"
    if text.startswith(b"{"):
        return "it is a JSON file; name the directory that holds it"
    return f"the file starts with {head[:8]!r}"
