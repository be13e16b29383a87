"""Writes GGUF files with random weights in the exact shapes of known models: speed without downloads.

    python benchmarks/synthetic.py --shape llama-3.2-1b --type q4_k_m OUT.gguf

Names, keys, row sizes and the mix of formats are those of llama.cpp's own files, so that every engine that
reads GGUF reads these. A matrix repeats one random tile of its format from a random place on: a file of 5 GB
takes seconds and a few MB of memory. Weights have a deviation of 1 / sqrt(k), so that activations and logits
stay of ordinary size; the text such a model writes means nothing. Imports numpy and tinyllm's files.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllm.errors import ArgumentError, Error
from tinyllm.files import FORMATS
from tinyllm.files.gguf import read_gguf

ALIGNMENT = 32
TILE_BYTES = 4 << 20
FORMAT_IDS = {format.name: id for id, format in FORMATS.items()}


class RopeScaling(NamedTuple):
    """Llama 3.1's: frequencies below `low` turns in the original context are divided by `factor`."""

    factor: float
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192


class Shape(NamedTuple):
    """A model's sizes, as its config.json has them."""

    name: str
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    ff_dim: int
    vocab_size: int
    context: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


LLAMA_3_VOCABULARY, LLAMA_3_CONTEXT, LLAMA_3_THETA = 128256, 131072, 500000.0
SHAPES = {
    "llama-3.2-1b": Shape(
        "Llama 3.2 1B", 16, 2048, 32, 8, 8192,
        LLAMA_3_VOCABULARY, LLAMA_3_CONTEXT, LLAMA_3_THETA, RopeScaling(32.0), True,
    ),
    "llama-2-7b": Shape("Llama 2 7B", 32, 4096, 32, 32, 11008, 32000, 4096, 10000.0, None, False),
    "llama-3.1-8b": Shape(
        "Llama 3.1 8B", 32, 4096, 32, 8, 14336,
        LLAMA_3_VOCABULARY, LLAMA_3_CONTEXT, LLAMA_3_THETA, RopeScaling(8.0), False,
    ),
    "llama-2-70b": Shape("Llama 2 70B", 80, 8192, 64, 8, 28672, 32000, 4096, 10000.0, None, False),
    "tiny": Shape(
        "tiny", 2, 256, 4, 2, 512, 512, 2048, LLAMA_3_THETA, RopeScaling(8.0, original_context=512), False
    ),
}  # fmt: skip


class Type(NamedTuple):
    """A mix of formats. `output`: of the output matrix, or of the embedding where that is the same. `more`:
    of attn_v and ffn_down in the layers that llama.cpp gives more bits. `file_type`: general.file_type.
    """

    file_type: int
    base: str
    output: str
    more: str | None = None


TYPES = {
    "f32": Type(0, "F32", "F32"),
    "f16": Type(1, "F16", "F16"),
    "bf16": Type(32, "BF16", "BF16"),
    "q8_0": Type(7, "Q8_0", "Q8_0"),
    "q4_0": Type(2, "Q4_0", "Q6_K"),
    "q4_1": Type(3, "Q4_1", "Q6_K"),
    "q5_0": Type(8, "Q5_0", "Q6_K"),
    "q5_1": Type(9, "Q5_1", "Q6_K"),
    "q2_k": Type(10, "Q2_K", "Q6_K"),
    "q3_k": Type(11, "Q3_K", "Q6_K"),
    "q4_k": Type(14, "Q4_K", "Q6_K"),
    "q4_k_m": Type(15, "Q4_K", "Q6_K", "Q6_K"),
    "q5_k": Type(16, "Q5_K", "Q6_K"),
    "q5_k_m": Type(17, "Q5_K", "Q6_K", "Q6_K"),
    "q6_k": Type(18, "Q6_K", "Q6_K"),
    "iq4_nl": Type(25, "IQ4_NL", "Q6_K"),
    "iq4_xs": Type(30, "IQ4_XS", "Q6_K"),
    "mxfp4": Type(38, "MXFP4", "Q8_0"),
    "nvfp4": Type(39, "NVFP4", "Q6_K"),
    "tq2_0": Type(37, "TQ2_0", "Q6_K"),
    "iq3_s": Type(26, "IQ3_S", "Q6_K"),
    "iq3_xxs": Type(23, "IQ3_XXS", "Q6_K"),
    "iq2_s": Type(29, "IQ2_S", "Q6_K"),
    "iq2_xxs": Type(19, "IQ2_XXS", "Q6_K"),
}


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]  # a matrix is (rows, k)
    format: str

    @property
    def n_bytes(self) -> int:
        form = FORMATS[FORMAT_IDS[self.format]]
        return math.prod(self.shape) // form.block * form.block_bytes


def use_more_bits(layer: int, n_layers: int) -> bool:
    """llama.cpp's rule: the first and the last eighth of the layers, and every third between."""
    first = n_layers // 8
    return layer < first or layer >= 7 * n_layers // 8 or (layer - first) % 3 == 2


def tensors(shape: Shape, type: Type) -> list[Tensor]:
    """Every tensor of the file, in its order."""
    dim, kv_dim, ff = shape.dim, shape.n_kv_heads * shape.head_dim, shape.ff_dim
    vocabulary = (shape.vocab_size, dim)
    found = [Tensor("token_embd.weight", vocabulary, type.output if shape.tied else type.base)]
    if shape.rope_scaling is not None:
        found.append(Tensor("rope_freqs.weight", (shape.head_dim // 2,), "F32"))
    for layer in range(shape.n_layers):
        more = type.more if type.more and use_more_bits(layer, shape.n_layers) else type.base
        for name, size, format in (
            ("attn_norm", (dim,), "F32"),
            ("attn_q", (dim, dim), type.base),
            ("attn_k", (kv_dim, dim), type.base),
            ("attn_v", (kv_dim, dim), more),
            ("attn_output", (dim, dim), type.base),
            ("ffn_norm", (dim,), "F32"),
            ("ffn_gate", (ff, dim), type.base),
            ("ffn_up", (ff, dim), type.base),
            ("ffn_down", (dim, ff), more),
        ):
            found.append(Tensor(f"blk.{layer}.{name}.weight", size, format))
    found.append(Tensor("output_norm.weight", (dim,), "F32"))
    if not shape.tied:
        found.append(Tensor("output.weight", vocabulary, type.output))
    return found


# Weights


class Scales(NamedTuple):
    """Where a format's block keeps its float16 scales; every other byte may hold anything."""

    rms: float  # root mean square of the values of uniformly random bytes where the scale is 1
    d: int  # byte offset of the scale
    m: int | None = None  # byte offset of the scale of the minimums, or of the minimum
    ratio: float = 0.0  # m / d at which the mean is 0


# tests/test_bench.py compares `rms` with the gguf package's dequantization.
SCALES = {
    "Q4_0": Scales(4.637, 0),
    "Q4_1": Scales(4.610, 0, 2, -7.5),
    "Q5_0": Scales(9.247, 0),
    "Q5_1": Scales(9.233, 0, 2, -15.5),
    "Q8_0": Scales(73.90, 0),
    "Q2_K": Scales(13.88, 80, 82, 1.5),
    "Q3_K": Scales(43.33, 108),
    "Q4_K": Scales(258.3, 0, 2, 7.5),
    "Q5_K": Scales(525.8, 0, 2, 15.5),
    "Q6_K": Scales(1367.0, 208),
    "IQ4_NL": Scales(67.42, 0),
    "IQ4_XS": Scales(1247.0, 0),
    "TQ2_0": Scales(1.225, 64),
    "IQ3_S": Scales(140.1, 0),
    "IQ3_XXS": Scales(142.3, 0),
    "IQ2_S": Scales(56.44, 0),
    "IQ2_XXS": Scales(53.30, 0),
}
MXFP4_RMS = math.sqrt(34.25)  # of +-{0, 1, 2, 3, 4, 6, 8, 12}, which an exponent byte of 128 multiplies by 1


def tile(format: str, n_blocks: int, deviation: float, seed: int) -> npt.NDArray[np.uint8]:
    """Random blocks, uint8 [n_blocks, block_bytes], of values with about this deviation around 0 (MXFP4
    and NVFP4, whose scales are small floats: to the nearest). Scales differ by up to a factor of 3 between
    blocks."""
    rng = np.random.default_rng([seed, *format.encode()])
    n_bytes = FORMATS[FORMAT_IDS[format]].block_bytes
    if format in ("F32", "F16", "BF16"):
        values = (rng.standard_normal(n_blocks) * deviation).astype(np.float32)
        if format == "BF16":
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(-1, n_bytes)
        return values.astype("<f4" if format == "F32" else "<f2").view(np.uint8).reshape(-1, n_bytes)
    blocks = rng.integers(0, 256, (n_blocks, n_bytes), dtype=np.uint8)
    if format == "MXFP4":
        blocks[:, 0] = 128 + round(math.log2(deviation / MXFP4_RMS))
        return blocks
    if format == "NVFP4":  # a small scale is so many times 2^-9
        blocks[:, :4] = min(8, max(1, round(512 * deviation / (MXFP4_RMS / 2))))
        return blocks
    scales = SCALES[format]
    d = deviation / scales.rms * rng.uniform(0.5, 1.5, n_blocks)
    if scales.m is None:
        d *= rng.choice([-1.0, 1.0], n_blocks)  # so that an uneven range has no mean
    else:
        blocks[:, scales.m : scales.m + 2] = (d * scales.ratio).astype("<f2").view(np.uint8).reshape(-1, 2)
    blocks[:, scales.d : scales.d + 2] = d.astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks


class Weights:
    """Makes the tensors' bytes piece by piece, from one tile for each format and row length."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._shape, self._seed = shape, seed
        self._rng = np.random.default_rng(seed)
        self._tiles: dict[tuple[str, int], npt.NDArray[np.uint8]] = {}

    def pieces(self, tensor: Tensor) -> Iterator[bytes]:
        if tensor.name == "rope_freqs.weight":
            yield rope_factors(self._shape).astype("<f4").tobytes()
        elif len(tensor.shape) == 1:
            yield np.ones(tensor.shape, "<f4").tobytes()
        else:
            yield from self._matrix(tensor)

    def _matrix(self, tensor: Tensor) -> Iterator[bytes]:
        k = tensor.shape[1]
        blocks = self._tile(tensor.format, k)
        at = int(self._rng.integers(len(blocks)))
        left = tensor.n_bytes // blocks.shape[1]
        while left:
            piece = blocks[at : at + left]
            yield piece.tobytes()
            left -= len(piece)
            at = 0

    def _tile(self, format: str, k: int) -> npt.NDArray[np.uint8]:
        if (format, k) not in self._tiles:
            form = FORMATS[FORMAT_IDS[format]]
            n_blocks = TILE_BYTES // form.block_bytes
            while math.gcd(n_blocks, k // form.block) > 1:  # no row starts where another one did
                n_blocks -= 1
            self._tiles[format, k] = tile(format, n_blocks, 1 / math.sqrt(k), self._seed)
        return self._tiles[format, k]


def rope_factors(shape: Shape) -> npt.NDArray[np.float64]:
    """The divisors of the frequencies, [head_dim / 2]: transformers' `_compute_llama3_parameters`."""
    s = shape.rope_scaling
    assert s is not None, "only such shapes have the tensor"
    frequency = shape.rope_theta ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
    turns = s.original_context * frequency / (2 * math.pi)
    kept = np.clip((turns - s.low) / (s.high - s.low), 0.0, 1.0)  # the share that is not scaled
    factors: npt.NDArray[np.float64] = 1.0 / (kept + (1.0 - kept) / s.factor)
    return factors


# The file (ggml's docs/gguf.md)

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_ARRAY_TYPES = {"i": _I32, "u": _U32, "f": _F32}


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A metadata value with its type in front; numbers of arrays are 32 bits wide."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    array = np.asarray(value)
    kind = array.dtype.kind
    return struct.pack("<IIQ", _ARRAY, _ARRAY_TYPES[kind], len(array)) + array.astype(f"<{kind}4").tobytes()


def metadata(shape: Shape, type: Type, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter writes for such a model."""
    return {
        "general.architecture": "llama",
        "general.name": f"{shape.name}, random weights",
        "general.file_type": type.file_type,
        "general.quantization_version": 2,
        "llama.block_count": shape.n_layers,
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.dim,
        "llama.feed_forward_length": shape.ff_dim,
        "llama.attention.head_count": shape.n_heads,
        "llama.attention.head_count_kv": shape.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": shape.rope_theta,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.vocab_size": shape.vocab_size,
        **tokenizer,
    }


def generated_tokenizer(vocab_size: int) -> dict[str, Any]:
    """A SentencePiece vocabulary: <unk>, <s>, </s>, the 256 bytes, the word mark, strings of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ("".join(word) for n in itertools.count(1) for word in itertools.product(letters, repeat=n))
    pieces = ["\u2581", *itertools.islice(words, vocab_size - 260)]
    unknown, control, byte, normal = 2, 3, 6, 1
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces],
        "tokenizer.ggml.scores": -np.arange(vocab_size, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(
            [unknown, control, control] + [byte] * 256 + [normal] * len(pieces), np.int32
        ),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def copied_tokenizer(path: Path, shape: Shape) -> dict[str, Any]:
    """The tokenizer of a GGUF file, which may hold nothing else. Raises ArgumentError for another size."""
    found = {k: v for k, v in read_gguf(path).metadata.items() if k.startswith("tokenizer.")}
    n_tokens = len(found.get("tokenizer.ggml.tokens", ()))
    if n_tokens != shape.vocab_size:
        raise ArgumentError(
            f"{path} has a vocabulary of {n_tokens} tokens, {shape.name} of {shape.vocab_size}"
        )
    return found


def write(path: Path, shape: Shape, type: Type, *, vocab: Path | None = None, seed: int = 0) -> int:
    """Writes the file; returns its bytes. It appears under its name once it is complete.

    Raises Error for a vocabulary that does not fit, OSError.
    """
    tokenizer = generated_tokenizer(shape.vocab_size) if vocab is None else copied_tokenizer(vocab, shape)
    pairs, contents = metadata(shape, type, tokenizer), tensors(shape, type)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            _write_header(file, pairs, contents)
            weights = Weights(shape, seed)
            for tensor in contents:
                for piece in weights.pieces(tensor):
                    file.write(piece)
                _pad(file)
            n_bytes = file.tell()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return n_bytes


def _write_header(file: BinaryIO, pairs: dict[str, Any], contents: list[Tensor]) -> None:
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(contents), len(pairs)))
    for key, value in pairs.items():
        file.write(_string(key) + _value(value))
    offset = 0
    for tensor in contents:
        dims = tensor.shape[::-1]
        file.write(_string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        file.write(struct.pack("<IQ", FORMAT_IDS[tensor.format], offset))
        offset += -(-tensor.n_bytes // ALIGNMENT) * ALIGNMENT
    _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="synthetic.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", required=True, choices=tuple(SHAPES))
    parser.add_argument(
        "--type", required=True, choices=tuple(TYPES), help="the formats, as llama.cpp mixes them"
    )
    parser.add_argument(
        "--vocab", type=Path, metavar="FILE.gguf", help="copy this tokenizer (default: a made-up one)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    args = parser.parse_args(argv)
    try:
        n_bytes = write(args.out, SHAPES[args.shape], TYPES[args.type], vocab=args.vocab, seed=args.seed)
    except (Error, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {SHAPES[args.shape].name}, {args.type}, {n_bytes / 1e9:.2f} GB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
