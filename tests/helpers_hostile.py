"""Model files made field by field, so that each field can lie, and what fuzzers do with such files.

`TARGETS` says what is done with the bytes of each kind of file: it works, or raises a tinyllm.Error whose
text can be printed; anything else is a fault. Used by test_gguf.py, test_hostile.py (which replays corpus/)
and long/fuzz_loaders.py.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import pathlib
import re
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from conftest import ReadCount
from helpers_gguf import write_gguf
from helpers_models import Spec, golden_specs, random_weights, write_hf_directory

import tinyllm
from tinyllm import backends
from tinyllm.chat.templates import ChatTemplate, template_from_directory
from tinyllm.config import config_from_gguf
from tinyllm.errors import Error
from tinyllm.files import FORMATS, find_model
from tinyllm.files.gguf import read_gguf
from tinyllm.files.safetensors import read_safetensors
from tinyllm.quantization.imatrix import read_imatrix
from tinyllm.tokenizer.spm import build_model

CORPUS = Path(__file__).parent / "corpus"


@contextmanager
def peak_below(most_mb: int) -> Iterator[None]:
    """What happens inside needs no more memory than that at any moment, whoever asks for it."""

    def now(what: str) -> int:
        status = Path("/proc/self/status").read_text("ascii", "replace")
        return int(re.findall(rf"^{what}:\s*(\d+) kB", status, re.MULTILINE)[0]) // 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = now("VmRSS")
    yield
    assert now("VmHWM") - before < most_mb


@contextmanager
def bounded(reads: ReadCount, n_bytes: int) -> Iterator[None]:
    """What happens inside costs work and memory in proportion to the `n_bytes` of the files."""
    before, start = reads.n_bytes, time.process_time()
    tracemalloc.start()
    try:
        with peak_below(32 + 100 * n_bytes // (1 << 20)):  # what Python does not know of as well
            yield
        peak = tracemalloc.get_traced_memory()[1]
        if peak >= 1 << 20:  # Python's table of interned names doubles now and then, where pathlib adds to it
            interned = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, pathlib.__file__)])
            peak -= sum(trace.size for trace in interned.traces)
    finally:
        tracemalloc.stop()
    assert reads.n_bytes - before <= 3 * n_bytes + 4096  # the JSON files are read by two readers
    assert peak < 100 * n_bytes + (1 << 20)  # the interpreter's own caches and imports
    assert time.process_time() - start < 2


U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
CODES = {U8: "<B", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q"}
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    return struct.pack("<I", kind) + (text(value) if kind == STRING else struct.pack(CODES[kind], value))


def array(kind: int, values: list[Any], count: int | None = None) -> bytes:
    body = b"".join(text(v) if kind == STRING else struct.pack(CODES[kind], v) for v in values)
    return struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count) + body


@dataclass
class T:
    """A tensor of a file to encode; None: the value that makes the file right."""

    name: str | bytes = "w"
    dims: tuple[int, ...] = (32, 2)
    type: int = 0
    offset: int | None = None
    n_dims: int | None = None

    def n_bytes(self) -> int:
        form = FORMATS.get(self.type)
        return math.prod(self.dims) // form.block * form.block_bytes if form else 0


@dataclass
class File:
    """A GGUF file to encode; None: the value that makes the file right."""

    pairs: list[tuple[str | bytes, bytes]] = field(default_factory=list)
    tensors: list[T] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_pairs: int | None = None
    alignment: int = 32
    data: bytes | None = None


def encode(file: File) -> bytes:
    out = file.magic + struct.pack(
        "<IQQ",
        file.version % 2**32,
        len(file.tensors) if file.n_tensors is None else file.n_tensors,
        len(file.pairs) if file.n_pairs is None else file.n_pairs,
    )
    for key, value in file.pairs:
        out += text(key) + value
    end = 0
    for t in file.tensors:
        offset = end if t.offset is None else t.offset
        n_dims = len(t.dims) if t.n_dims is None else t.n_dims
        out += text(t.name) + struct.pack(f"<I{len(t.dims)}Q", n_dims, *t.dims)
        out += struct.pack("<IQ", t.type, offset % 2**64)
        end = -(-(end + t.n_bytes()) // file.alignment) * file.alignment
    out += bytes(-len(out) % file.alignment)
    return out + (bytes(min(end, 1 << 16)) if file.data is None else file.data)


def decode(raw: bytes) -> File:
    """What `encode` made, of a file that is right."""
    at = 0

    def take(n: int) -> bytes:
        nonlocal at
        at += n
        return raw[at - n : at]

    def number(code: str) -> int:
        n: int = struct.unpack(code, take(struct.calcsize(code)))[0]
        return n

    def value(kind: int) -> None:
        if kind == ARRAY:
            kind, n = number("<I"), number("<Q")
            for _ in range(n):
                value(kind)
        else:
            take(number("<Q") if kind == STRING else WIDTHS[kind])

    file = File(magic=take(4), version=number("<I"))
    n_tensors, n_pairs = number("<Q"), number("<Q")
    for _ in range(n_pairs):
        key, start = take(number("<Q")), at
        value(number("<I"))
        file.pairs.append((key.decode(), raw[start:at]))
    for _ in range(n_tensors):
        name, n_dims = take(number("<Q")), number("<I")
        dims = tuple(number("<Q") for _ in range(n_dims))
        file.tensors.append(T(name.decode(), dims, number("<I"), number("<Q")))
    file.data = raw[-(-at // file.alignment) * file.alignment :]
    return file


def tiny_gguf(family: str = "llama", **changes: bytes) -> File:
    """A model of one layer that is whole, of some 3 kB; `changes`: of the family's keys, with __ for dots."""
    sizes = {"embedding_length": 4, "block_count": 1, "context_length": 8, "feed_forward_length": 4}
    keys = {f"{family}.{name}": scalar(U32, n) for name, n in sizes.items()}
    keys |= {f"{family}.attention.head_count": scalar(U32, 2), "general.architecture": scalar(STRING, family)}
    keys[f"{family}.attention.layer_norm_rms_epsilon"] = scalar(F32, 1e-5)
    keys |= {f"{family}.{name.replace('__', '.')}": value for name, value in changes.items()}
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "\u2581"]
    keys |= {
        "tokenizer.ggml.model": scalar(STRING, "llama"),
        "tokenizer.ggml.tokens": array(STRING, tokens),
        "tokenizer.ggml.scores": array(F32, [0.0, 0.0, 0.0, -1.0, -2.0, -3.0]),
        "tokenizer.ggml.token_type": array(I32, [2, 3, 3, 1, 1, 1]),
        "tokenizer.ggml.eos_token_id": scalar(U32, 2),
        "tokenizer.chat_template": scalar(STRING, "{% for m in messages %}{{ m.content }}{% endfor %}"),
    }
    tensors = [T("token_embd.weight", (4, 6)), T("output_norm.weight", (4,))]
    tensors += [T(f"blk.0.{name}_norm.weight", (4,)) for name in ("attn", "ffn")]
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors += [T(f"blk.0.{name}.weight", (4, 4)) for name in matrices]
    return File(list(keys.items()), tensors)


def safetensors_bytes(shapes: dict[str, list[int]], **more: Any) -> bytes:
    """A file of zeros in F32."""
    header, end = dict(more), 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(end)


TINY_CONFIG = {
    "model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 4, "vocab_size": 6, "max_position_embeddings": 8, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip


def tiny_directory() -> dict[str, bytes]:
    """The files of a model of one layer."""
    layer = "model.layers.0."
    shapes = {"model.embed_tokens.weight": [6, 4], "model.norm.weight": [4]}
    shapes |= {f"{layer}{name}.weight": [4] for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"{layer}self_attn.{name}_proj.weight": [4, 4] for name in "qkvo"}
    shapes |= {f"{layer}mlp.{name}_proj.weight": [4, 4] for name in ("gate", "up", "down")}
    return {
        "config.json": json.dumps(TINY_CONFIG).encode(),
        "generation_config.json": b'{"eos_token_id": [2], "temperature": 0.5}',
        "tokenizer_config.json": b'{"chat_template": "{{ messages[0].content }}", "eos_token": "</s>"}',
        "model.safetensors": safetensors_bytes(shapes),
    }


def miniature(config: dict[str, Any]) -> dict[str, Any]:
    """A golden model's config, with two layers and as few numbers as every family can have."""
    small = {"hidden_size": 16, "intermediate_size": 4, "moe_intermediate_size": 4, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 6}
    small |= {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    small |= {"sliding_window_pattern": 2}
    experts = ("num_local_experts", "num_experts_per_tok")  # 0 where a family may have none
    small = {
        key: n
        for key, n in small.items()
        if key == "num_key_value_heads" or (config.get(key) if key in experts else key in config)
    }
    per_layer = ("layer_types", "no_rope_layers", "layer_rope_theta")
    lists = {key: config[key][:2] for key in per_layer if config.get(key)}
    if "linear_attention" in lists.get("layer_types", ()):
        lists["layer_types"] = ["linear_attention", "full_attention"]  # one of each
        small["full_attention_interval"] = 2
    rope = {
        key: settings | {of: [1.0, 1.5, 2.0] for of in ("long_factor", "short_factor") if of in settings}
        for key in ("rope_scaling", "rope_parameters")
        if (settings := config.get(key))
    }
    return config | small | lists | rope


@functools.cache
def miniatures() -> dict[str, tuple[bytes | None, dict[str, bytes] | None]]:
    """A GGUF file and a directory's files of each golden model, where it can be one, without tokenizers."""

    def files(spec: Spec, folder: Path) -> tuple[bytes | None, dict[str, bytes] | None]:
        gguf, hf, config = folder / "gguf", folder / "hf", miniature(spec.config)
        weights = random_weights(config, spec.seed)
        if spec.in_gguf:
            write_gguf(gguf, config, weights, format="F16")
        write_hf_directory(hf, config, weights, dtype="F16")
        return (
            gguf.read_bytes() if spec.in_gguf else None,
            {path.name: path.read_bytes() for path in hf.iterdir()},
        )

    made = {}
    for spec in golden_specs() + golden_specs("families"):
        with tempfile.TemporaryDirectory() as folder:
            made[spec.name] = files(spec, Path(folder))
    return made


# Of 6 tokens, as the model has.
TINY_TOKENIZER_JSON: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [
        {"id": 4, "content": "<s>", "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False},
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": " ?[a-z]+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3}, "merges": [["a", "b"]]},
}  # fmt: skip


def tiny_sentencepiece_model(*pieces: tuple[str, float, int]) -> bytes:
    """A tokenizer.model of 6 tokens and `pieces`."""
    some = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    some += [("a", -1.0, 1), ("b", -2.0, 1), ("\u2581", -3.0, 1), *pieces]
    texts, scores, types = zip(*some, strict=True)
    return build_model(
        list(texts),
        np.array(scores),
        np.array(types),
        byte_fallback=False,
        space_prefix=True,
        squeeze_spaces=False,
    )


_FILE = re.compile(rb"=== ([a-z_.]{1,40})\n", re.DOTALL)


def pack_directory(files: dict[str, bytes]) -> bytes:
    """Several files as the bytes of one."""
    return b"".join(b"=== " + name.encode() + b"\n" + raw for name, raw in files.items())


def _unpack_directory(data: bytes, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    parts = _FILE.split(data)[1:]
    for name, raw in zip(parts[::2], parts[1::2], strict=True):
        if name.strip(b"."):
            (folder / name.decode()).write_bytes(raw)


def _file(data: bytes, folder: Path) -> Path:
    path = folder / "file"
    path.write_bytes(data)
    return path


def _gguf(data: bytes, folder: Path) -> None:
    path = _file(data, folder)
    file = read_gguf(path)
    ranges = sorted((t.offset, t.offset + t.n_bytes) for t in file.tensors.values())
    assert all(0 < start < end <= len(data) for start, end in ranges)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))
    config_from_gguf(file.metadata, file.tensors)
    _use(path)


def _safetensors(data: bytes, folder: Path) -> None:
    path = _file(data, folder)
    find_model(path)
    assert sum(t.n_bytes for t in read_safetensors(path).tensors.values()) <= len(data)


def _directory(data: bytes, folder: Path) -> None:
    _unpack_directory(data, folder / "model")
    template_from_directory(folder / "model")
    _use(folder / "model")


def _use(path: Path) -> None:
    """Loads a model and answers."""
    with tinyllm.load(path, threads=1) as llm:
        options: dict[str, Any] = {"max_tokens": 2, "seed": 1}
        answer = llm("a b" if llm.tokenizer else [0, 1], **options)
        assert all(0 <= token < llm.config.vocab_size for token in answer.tokens)
        if llm.tokenizer and llm.chat_template:
            llm.chat([{"role": "user", "content": "a"}], **options)


def _imatrix(data: bytes, folder: Path) -> None:
    found = read_imatrix(_file(data, folder))
    for name, sums in found.sums.items():
        found.importance(name, *sums.shape)


def _template(data: bytes, folder: Path) -> None:
    template = ChatTemplate(data.decode("utf-8", "replace"), bos_token="<s>")
    template.render([{"role": "user", "content": "hello"}], tools=[{"name": "f"}])


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "gguf": _gguf,
    "safetensors": _safetensors,
    "directory": _directory,
    "imatrix": _imatrix,
    "template": _template,
}


def try_out(target: str, data: bytes, folder: Path) -> str:
    """ "" where the file works, else the refusal. Anything but a tinyllm.Error goes through, and so does
    memory of the core that is left."""
    refusal, allocations = "", backends.live_allocations()
    try:
        TARGETS[target](data, folder)
    except Error as error:
        refusal = str(error)
        refusal.encode()  # fit to be printed
        assert refusal
    assert backends.live_allocations() == allocations
    return refusal


def seeds() -> Iterator[tuple[str, str, bytes]]:
    """(target, name, bytes): files that work, for fuzzers to begin with."""
    yield "gguf", "llama", encode(tiny_gguf())
    experts = {"expert_count": scalar(U32, 2), "expert_used_count": scalar(U32, 1)}
    yield "gguf", "experts", encode(tiny_gguf("llama", **experts))
    yield "gguf", "scaled", encode(tiny_gguf("llama", rope__scaling__type=scalar(STRING, "yarn")))
    yield "gguf", "split", encode(File([("split.count", scalar(U32, 2)), ("split.no", scalar(U32, 0))]))
    yield "safetensors", "two", safetensors_bytes({"a": [2, 3], "b": [1]}, __metadata__={"format": "pt"})
    yield "directory", "llama", pack_directory(tiny_directory())
    tokenizer_json = json.dumps(TINY_TOKENIZER_JSON).encode()
    yield "directory", "tokenizer-json", pack_directory(tiny_directory() | {"tokenizer.json": tokenizer_json})
    model = tiny_sentencepiece_model()
    yield "directory", "tokenizer-model", pack_directory(tiny_directory() | {"tokenizer.model": model})
    index = {"weight_map": {"a": "x.safetensors"}}
    sharded = {"model.safetensors.index.json": json.dumps(index).encode()}
    sharded["x.safetensors"] = safetensors_bytes({"a": [2]})
    yield "directory", "sharded", pack_directory({"config.json": tiny_directory()["config.json"]} | sharded)
    one = struct.pack("<i", 1) + struct.pack("<i", 1) + b"a" + struct.pack("<iif", 1, 1, 1.0)
    yield "imatrix", "dat", one + struct.pack("<ii", 1, 1) + b"t"
    pairs: list[tuple[str | bytes, bytes]] = [("general.type", scalar(STRING, "imatrix"))]
    yield "imatrix", "gguf", encode(File(pairs, [T("a.in_sum2"), T("a.counts", (1, 2))]))
    yield (
        "template",
        "loop",
        (
            b"{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
            b"{{ '<|' ~ m.role | upper ~ '|>' }}"
            b"{{ m['content'].split('l') | join(',') }}{% else %}"
            b"{{ raise_exception('no') }}{% endif %}{% endfor %}"
        ),
    )
    yield (
        "template",
        "macro",
        (
            b"{% macro f(x, n=2) %}{{ '%s-%5d' % (x, n) }}{% endmacro %}{% set ns = namespace(i=0) %}"
            b"{% for t in tools %}{% set ns.i = ns.i + 1 %}"
            b"{{ f(t | tojson, ns.i) }}{{ '{0}'.format(t.name) }}{% endfor %}"
        ),
    )
