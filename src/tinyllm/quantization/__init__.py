"""Writes a model as a GGUF file in another quantization: `quantize`, which tinyllm-quantize calls.

Tensors go through one by one, in pieces of some megabytes. What a model is made of is contents.py's, which
tensor gets which format mixes.py's, how it is rounded the core's. Imports these, backends, imatrix,
modelfiles, errors and files.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm import backends
from tinyllm.errors import ArgumentError, FormatError, UnsupportedError, integer
from tinyllm.files import BF16, F16, F32, FORMATS, OWN_FORMATS, FileReader, are_finite, show
from tinyllm.files.gguf_writer import OutTensor, Part, write_set
from tinyllm.files.outfiles import target_of
from tinyllm.modelfiles import model_path
from tinyllm.quantization.contents import Contents, Source, contents_of
from tinyllm.quantization.imatrix import Imatrix, read_imatrix
from tinyllm.quantization.merging import merged
from tinyllm.quantization.mixes import IDS, MIXES, key_of, wanted_and_got

PIECE_NUMBERS = 1 << 22  # of a tensor, that are read, rounded and written at a time


COPY = "copy"  # a quantization by name: each tensor stays what it is


@dataclass(frozen=True)
class Planned:
    """A tensor to write: shape in numpy's order, the formats that it has, that the quantization has for it,
    and that it gets, and its bytes then."""

    name: str
    shape: tuple[int, ...]
    source: str
    wanted: str
    got: str
    n_bytes: int


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote: the file's size, its weights and their bits each, and how many tensors of which
    format. source_bytes: the size of the files it was made of. fallbacks: by name the tensors whose rows are
    no multiple of a block of the format that the quantization has for them, that format and the one they got.
    without_importance: matrices that the imatrix did not know; not the embedding, which no imatrix knows
    unless it is the output as well. tensors: each of them. Of a set of files `path` is the first."""

    path: Path
    n_bytes: int
    n_weights: int
    bits: float
    formats: dict[str, int]
    source_bytes: int
    fallbacks: dict[str, tuple[str, str]]
    without_importance: tuple[str, ...]
    tensors: tuple[Planned, ...] = ()


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str,
    *,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    lora: Sequence[tuple[str | os.PathLike[str], float]] = (),
    allow_requantize: bool = False,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    keep_split: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Quantized:
    """Writes `model` to the GGUF file `out` in the quantization `type` ("q4_k_m", "q8_0", "f16"...:
    mixes.MIXES; "copy": each tensor stays what it is).

    model: a GGUF file (of a split set the first) or a directory with safetensors. imatrix: importance of
    columns, a file's path. lora: adapters with a strength each, which are merged into the float matrices.
    allow_requantize: take a quantized model as well, whose errors then add up. pure:
    every matrix gets the quantization's own format, none a better one. tensor_types: (pattern, format): a
    matrix in whose name the regular expression is found gets this format; of several the first's holds.
    keep_split: of a split GGUF, write a set of as many files, called OUT-00001-of-0000N.gguf and so on.
    threads: None for one a physical core; never changes the bits. progress: called with (bytes written,
    bytes in all). A file appears under its name when all is complete; where
    `out` is a symbolic link, what it points to is replaced.

    Raises ArgumentError, NotFoundError, ReadError, FormatError (a NaN, an infinity or a number too large for
    its format among the weights as well), UnsupportedError, WriteError.
    """
    known = read_imatrix(imatrix) if isinstance(imatrix, (str, os.PathLike)) else imatrix
    if not isinstance(known, Imatrix | None):
        raise TypeError(f"imatrix must be a file's path or an Imatrix, not {imatrix.__class__.__name__}")
    n_threads = backends.default_threads() if threads is None else threads
    integer("threads", n_threads, 1, backends.MAX_THREADS)
    key = _key(type)
    target_of(out)
    where = model_path(model)
    contents = contents_of(where)
    if lora:
        contents = merged(contents, where, lora)
    planned = _planned(contents, key, known is not None, pure, tensor_types)
    if not allow_requantize:
        _refuse_quantized(model_path(model), contents.tensors, planned)
    unknown: list[str] = []
    tensors: list[OutTensor] = []
    for one in planned:
        source, format = contents.tensors[one.name], IDS[one.got.lower()]
        importance = _importance(known, one.name, source.shape, format, unknown)
        tensors.append(_out_tensor(one.name, source, format, importance, n_threads))
    parts = _parts(contents, out, _metadata(contents, key, planned), tensors, keep_split)
    targets = [target_of(part.path) for part in parts]
    if any(target.exists() and target.samefile(path) for target in targets for path in contents.paths):
        raise ArgumentError(f"{out}: is the model itself; name another file")
    types = contents.types | _TYPES
    n_bytes = write_set(parts, types=types, progress=progress)
    if "output.weight" in contents.tensors:
        unknown = [name for name in unknown if name != "token_embd.weight"]
    return _summary(Path(parts[0].path).expanduser(), n_bytes, contents, planned, unknown)


def plan(
    model: str | os.PathLike[str],
    type: str,
    *,
    imatrix: bool = False,
    lora: Sequence[tuple[str | os.PathLike[str], float]] = (),
    allow_requantize: bool = False,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
) -> Quantized:
    """What `quantize` would write, told from the headers alone; n_bytes is that of the tensors. imatrix:
    whether there would be one. Raises what `quantize` does, but for the weights' values and OUT."""
    where = model_path(model)
    contents = merged(contents_of(where), where, lora) if lora else contents_of(where)
    planned = _planned(contents, _key(type), imatrix, pure, tensor_types)
    if not allow_requantize:
        _refuse_quantized(model_path(model), contents.tensors, planned)
    return _summary(Path(), sum(one.n_bytes for one in planned), contents, planned, ())


# What is written beside the model's own keys, and GGUF's numbers of their types: uint32, uint16, int32.
_TYPES = {
    "general.file_type": 4,
    "general.quantization_version": 4,
    "split.no": 2,
    "split.count": 2,
    "split.tensors.count": 5,
}


def _key(type: str) -> str:
    return COPY if isinstance(type, str) and type.lower() == COPY else key_of(type)


def _planned(
    contents: Contents, key: str, imatrix: bool, pure: bool, tensor_types: Sequence[tuple[str, str]]
) -> tuple[Planned, ...]:
    """key: as `_key` has it."""
    sources = contents.tensors
    shapes = {name: source.shape for name, source in sources.items()}
    if key == COPY:
        if pure or tensor_types:
            raise ArgumentError("a copy changes no type: pure and tensor_types are for quantizations")
        chosen = wanted_and_got(shapes, "f32")
        for name, source in sources.items():
            if source.format in OWN_FORMATS:
                raise UnsupportedError(
                    f"{show(name)} is kept as {FORMATS[source.format].name}, which no GGUF file holds, so it "
                    "cannot be copied; name a type, with allow_requantize=True (--allow-requantize)"
                )
            # A directory's norms may be 16-bit floats, which a GGUF has as F32.
            if contents.part_of or chosen[name][1] != "f32" or len(source.shape) > 1:
                chosen[name] = (FORMATS[source.format].name.lower(),) * 2
    else:
        chosen = wanted_and_got(shapes, key, imatrix=imatrix, pure=pure, overrides=tensor_types)
    return tuple(
        Planned(
            name,
            source.shape,
            FORMATS[source.format].name,
            chosen[name][0].upper(),
            chosen[name][1].upper(),
            OutTensor(name, source.shape, IDS[chosen[name][1]], tuple).n_bytes,
        )
        for name, source in sources.items()
    )


def _metadata(contents: Contents, key: str, planned: Sequence[Planned]) -> dict[str, Any]:
    if key != COPY:
        said: Mapping[str, Any] = {
            "general.file_type": MIXES[key].file_type,
            "general.quantization_version": 2,
        }
    else:
        most = max(planned, key=lambda one: one.n_bytes).got.lower()
        said = contents.as_quantized or {"general.file_type": MIXES[most].file_type if most in MIXES else 0}
    return {**contents.metadata, **said}


def _parts(
    contents: Contents,
    out: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Sequence[OutTensor],
    keep_split: bool,
) -> list[Part]:
    """The files to write: one, or as many as the model has."""
    count = len(contents.paths)
    if not keep_split:
        return [Part(out, metadata, tensors)]
    if not contents.part_of or count == 1:
        raise ArgumentError("keep_split is for a GGUF in several files, and this model is none")
    stem = os.fspath(out).removesuffix(".gguf")
    return [
        Part(
            f"{stem}-{i + 1:05}-of-{count:05}.gguf",
            {
                **(metadata if i == 0 else {}),
                "split.no": i,
                "split.count": count,
                "split.tensors.count": len(tensors),
            },
            [tensor for tensor in tensors if contents.part_of[tensor.name] == i],
        )
        for i in range(count)
    ]


def _summary(
    path: Path, n_bytes: int, contents: Contents, planned: Sequence[Planned], unknown: Sequence[str]
) -> Quantized:
    n_weights = sum(math.prod(one.shape) for one in planned)
    return Quantized(
        path,
        n_bytes,
        n_weights,
        8 * sum(one.n_bytes for one in planned) / n_weights,
        dict(Counter(one.got for one in planned)),
        sum(_size(path) for path in contents.paths),
        {one.name: (one.wanted, one.got) for one in planned if one.wanted != one.got},
        tuple(unknown),
        tuple(planned),
    )


def _size(path: Path) -> int:
    with FileReader(path) as file:
        return file.size


def _refuse_quantized(where: Path, sources: Mapping[str, Source], planned: Sequence[Planned]) -> None:
    """What stays as it is may be quantized: the experts of gpt-oss are MXFP4 from the beginning."""
    for one in planned:
        if sources[one.name].format not in (F32, F16, BF16) and one.source != one.got:
            raise ArgumentError(
                f"{where} is quantized already ({show(one.name)} is {one.source}), and errors "
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


def _out_tensor(
    name: str, source: Source, format: int, importance: npt.NDArray[np.float32] | None, threads: int
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
                if source.format != format:
                    data = backends.convert(
                        data, source.format, format, last - first, k, importance=of_columns, threads=threads
                    ).ravel()
                if not are_finite(data, format):
                    raise FormatError(
                        f"tensor {show(name)} holds a NaN, an infinity, or a number too large for "
                        f"{FORMATS[format].name}; such a model cannot be quantized"
                    )
                yield data.tobytes()

    return OutTensor(name, source.shape, format, pieces)
