"""Writes a model as a GGUF file in another quantization: `quantize`, which tinyllm-quantize calls.

Tensors go through one by one, in pieces of some megabytes. What a model is made of is contents.py's, which
tensor gets which format mixes.py's, how it is rounded the core's. Imports these, backends, imatrix,
modelfiles, errors and files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyllm import backends
from tinyllm.errors import ArgumentError, FormatError, integer
from tinyllm.files import BF16, F16, F32, FORMATS, FileReader, are_finite, show
from tinyllm.files.gguf_writer import OutTensor, write_gguf
from tinyllm.files.outfiles import target_of
from tinyllm.modelfiles import model_path
from tinyllm.quantization.contents import Source, contents_of
from tinyllm.quantization.imatrix import Imatrix, read_imatrix
from tinyllm.quantization.mixes import IDS, MIXES, key_of, wanted_and_got

PIECE_NUMBERS = 1 << 22  # of a tensor, that are read, rounded and written at a time


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote: the file's size, its weights and their bits each, and how many tensors of which
    format. source_bytes: the size of the files it was made of. fallbacks: by name the tensors whose rows are
    no multiple of a block of the format that the quantization has for them, that format and the one they got.
    without_importance: matrices that the imatrix did not know; not the embedding, which no imatrix knows
    unless it is the output as well."""

    path: Path
    n_bytes: int
    n_weights: int
    bits: float
    formats: dict[str, int]
    source_bytes: int
    fallbacks: dict[str, tuple[str, str]]
    without_importance: tuple[str, ...]


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
    bytes in all). The file appears under its name when it is complete; where
    `out` is a symbolic link, what it points to is replaced.

    Raises ArgumentError, NotFoundError, ReadError, FormatError (a NaN, an infinity or a number too large for
    its format among the weights as well), UnsupportedError, WriteError.
    """
    mix = MIXES[key_of(type)]
    target = target_of(out)
    where = model_path(model)
    n_threads = backends.default_threads() if threads is None else threads
    integer("threads", n_threads, 1, backends.MAX_THREADS)
    known = read_imatrix(imatrix) if isinstance(imatrix, (str, os.PathLike)) else imatrix
    if not isinstance(known, Imatrix | None):
        raise TypeError(f"imatrix must be a file's path or an Imatrix, not {imatrix.__class__.__name__}")
    contents = contents_of(where)
    sources = contents.tensors
    if target.exists() and any(target.samefile(path) for path in contents.paths):
        raise ArgumentError(f"{out}: is the model itself; name another file")
    source_bytes = sum(_size(path) for path in contents.paths)
    chosen = wanted_and_got(
        {name: source.shape for name, source in sources.items()}, type, imatrix=known is not None
    )
    formats = {name: IDS[got] for name, (_, got) in chosen.items()}
    fallbacks = {name: (a.upper(), b.upper()) for name, (a, b) in chosen.items() if a != b}
    if not allow_requantize:
        _refuse_quantized(where, sources, formats)
    metadata = contents.metadata | {"general.file_type": mix.file_type, "general.quantization_version": 2}
    types = contents.types | {"general.file_type": 4, "general.quantization_version": 4}
    unknown: list[str] = []
    tensors: list[OutTensor] = []
    for name, source in sources.items():
        importance = _importance(known, name, source.shape, formats[name], unknown)
        tensors.append(_out_tensor(name, source, formats[name], importance, n_threads))
    n_bytes = write_gguf(out, metadata, tensors, types=types, progress=progress)
    counts: dict[str, int] = {}
    for format in formats.values():
        counts[FORMATS[format].name] = counts.get(FORMATS[format].name, 0) + 1
    n_weights = sum(int(np.prod(source.shape)) for source in sources.values())
    bits = 8 * sum(tensor.n_bytes for tensor in tensors) / n_weights
    if "output.weight" in sources:
        unknown = [name for name in unknown if name != "token_embd.weight"]
    return Quantized(
        Path(out).expanduser(), n_bytes, n_weights, bits, counts, source_bytes, fallbacks, tuple(unknown)
    )


def _size(path: Path) -> int:
    with FileReader(path) as file:
        return file.size


def _refuse_quantized(where: Path, sources: Mapping[str, Source], formats: Mapping[str, int]) -> None:
    """What stays as it is may be quantized: the experts of gpt-oss are MXFP4 from the beginning."""
    for name, source in sources.items():
        if source.format not in (F32, F16, BF16, formats[name]):
            raise ArgumentError(
                f"{where} is quantized already ({show(name)} is {FORMATS[source.format].name}), and errors "
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
