"""Files that mean harm or are simply broken, from the path to the model: each way of being wrong is one
tinyllm.Error that names the file, at a cost in proportion to what the file really is."""

from __future__ import annotations

import base64
import json
import os
import struct
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ReadCount
from helpers_hostile import (
    ARRAY,
    CORPUS,
    STRING,
    TARGETS,
    TINY_CONFIG,
    TINY_TOKENIZER_JSON,
    U32,
    U64,
    File,
    T,
    array,
    bounded,
    decode,
    encode,
    miniatures,
    pack_directory,
    peak_below,
    safetensors_bytes,
    scalar,
    seeds,
    tiny_directory,
    tiny_gguf,
    tiny_sentencepiece_model,
    try_out,
)
from hypothesis import given, settings
from strategies import damaged, directories, gguf_files, safetensors_files
from test_tokenizer import tiny_sentencepiece, tiny_tokenizer_json

import tinyllm
from tinyllm.chat.templates import template_from_directory
from tinyllm.errors import Error, FormatError, NotFoundError, ReadError, UnsupportedError
from tinyllm.files import TensorInfo
from tinyllm.files.gguf import read_gguf
from tinyllm.measure import benchmark
from tinyllm.measure.quality import measure, windows
from tinyllm.modelfiles import read_model
from tinyllm.quantization.imatrix import read_imatrix
from tinyllm.tokenizer import from_directory, load_tokenizer, patterns, tokenizer_from_gguf
from tinyllm.tokenizer.spm import _message

pytestmark = pytest.mark.usefixtures("frozen_heap")  # memory and blocks of the core are counted

SEEDS = {f"{target}-{name}": (target, raw) for target, name, raw in seeds()}
WORKING = SEEDS.keys() - {"gguf-experts", "gguf-split", "directory-sharded"}


@pytest.mark.parametrize("name", SEEDS)
def test_seeds(name: str, tmp_path: Path) -> None:
    """What fuzzers begin with works, or is wrong where it should be."""
    target, raw = SEEDS[name]
    assert (try_out(target, raw, tmp_path) == "") == (name in WORKING)


def test_miniatures(tmp_path: Path) -> None:
    """The models whose fields lie below work as long as they do not."""
    for name, (gguf, directory) in miniatures().items():
        if gguf is not None:
            assert encode(decode(gguf)) == gguf
            assert try_out("gguf", gguf, tmp_path) == "", name
        if directory is not None:
            assert try_out("directory", pack_directory(directory), tmp_path) == "", name


@pytest.mark.parametrize(
    "path",
    sorted(path for name in TARGETS for path in (CORPUS / name).iterdir()),
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def test_corpus(path: Path, tmp_path: Path) -> None:
    """Files that a fuzzer made of them, one for each behaviour it found."""
    try_out(path.parent.name, path.read_bytes(), tmp_path)


def write_directory(folder: Path, **files: bytes | dict[str, Any] | None) -> Path:
    """tiny_directory() with other files ("config" is config.json), None for one that is not there."""
    everything = tiny_directory() | {
        name.replace("__", ".") + ("" if "__" in name else ".json"): raw for name, raw in files.items()
    }
    folder.mkdir(exist_ok=True)
    for name, raw in everything.items():
        if raw is not None:
            (folder / name).write_bytes(json.dumps(raw).encode() if isinstance(raw, dict) else raw)
    return folder


# From the path to the model

LLAMA = {
    "no layers": ({"block_count": scalar(U32, 0)}, "n_layers is 0"),
    "2^31 layers": ({"block_count": scalar(U32, 1 << 31)}, "n_layers is 2147483648"),
    "a thousand layers": ({"block_count": scalar(U32, 1024)}, "blk.1.*is missing.*and more"),
    "layers in words": ({"block_count": scalar(STRING, "1")}, "block_count must be a whole number"),
    "no heads": ({"attention__head_count": scalar(U32, 0)}, "n_heads is 0"),
    "heads not divisible": ({"attention__head_count_kv": scalar(U32, 3)}, "no multiple of n_kv_heads 3"),
    "heads do not divide the width": ({"attention__head_count": scalar(U32, 3)}, "attention.key_length"),
    "heads listed and different": ({"attention__head_count": array(U32, [2, 3])}, "differs from layer"),
    "no heads listed": ({"attention__head_count": array(U32, [])}, "differs from layer"),
    "huge width": ({"embedding_length": scalar(U32, 0xFFFFFFFF)}, "dim is 4294967295"),
    "huge context": ({"context_length": scalar(U32, 0xFFFFFFFF)}, "context is 4294967295"),
    "a million experts": (
        {
            "expert_count": scalar(U32, 4096), "expert_used_count": scalar(U32, 1),
            "block_count": scalar(U32, 1024),
        },
        "1024 layers of 4096 experts are 4194304; a model has up to 32768",
    ),
    "more experts used": (
        {"expert_count": scalar(U32, 2), "expert_used_count": scalar(U32, 3)}, "3 experts used of 2",
    ),
    "rope not even": ({"rope__dimension_count": scalar(U32, 1)}, "rope_dim is 1"),
    "another width": ({"feed_forward_length": scalar(U32, 8)}, "has shape .4, 4., expected .8, 4."),
}  # fmt: skip


@pytest.mark.parametrize("case", LLAMA)
def test_hyperparameters(case: str, tmp_path: Path, reads: ReadCount) -> None:
    changes, message = LLAMA[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(encode(tiny_gguf(**changes)))
    with (
        bounded(reads, path.stat().st_size),
        pytest.raises((FormatError, UnsupportedError), match=rf"(?s)model\.gguf: .*{message}"),
    ):
        read_model(path)


TOKENIZER = "tokenizer.ggml."
PAIRS = {
    "architecture an array": ("general.architecture", array(U32, [1, 2]), r"architecture '\[1 2\]'"),
    "architecture strings": ("general.architecture", array(STRING, ["llama"]), "is not supported"),
    "tokenizer an array": (TOKENIZER + "model", array(U32, [1, 2]), r"model is '\[1 2\]'"),
    "no such tokenizer": (TOKENIZER + "model", scalar(STRING, "x" * 5000), "model is 'xxx"),
    "type -1": (TOKENIZER + "token_type", array(5, [2, 3, 3, -1, 1, 1]), "token_type holds -1 to 3"),
    "type 7": (TOKENIZER + "token_type", array(5, [2, 3, 3, 7, 1, 1]), "token_type holds 1 to 7"),
    "score too large": (
        TOKENIZER + "scores", struct.pack("<IIQ6d", ARRAY, 12, 6, *[0.0] * 5, 1e300), "no room for",
    ),
    "score no number": (TOKENIZER + "scores", array(6, [float("nan")] * 6), "not finite"),
    "id past the end": (TOKENIZER + "eos_token_id", scalar(U32, 6), "eos_token_id is 6, but there are 6"),
    "flag a number": (TOKENIZER + "add_bos_token", scalar(U32, 1), "add_bos_token must be true or false"),
    "alignment of a long text": (
        "general.alignment", scalar(STRING, "x" * 100_000),
        r"power of two up to 65536, not .{,100} \(at byte \d+ of \d+\)$",
    ),
    "no part of a set": ("split.count", scalar(U32, 0), r"part 1 of 0 \(split\.no, split\.count\)"),
    "a part past the end": ("split.no", scalar(U32, 5), r"part 6 of 1 \(split\.no, split\.count\)"),
    "template a number": ("tokenizer.chat_template", scalar(U32, 3), "template' is a int, expected a text"),
    "the same token twice": (
        TOKENIZER + "tokens", array(STRING, ["<unk>", "a", "</s>", "a", "b", "c"]), "'a' stands there twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_metadata(case: str, tmp_path: Path, reads: ReadCount) -> None:
    key, value, message = PAIRS[case]
    good = tiny_gguf()
    path = tmp_path / "model.gguf"
    path.write_bytes(encode(File(list((dict(good.pairs) | {key: value}).items()), good.tensors)))
    with (
        bounded(reads, path.stat().st_size),
        pytest.raises((FormatError, UnsupportedError), match=rf"model\.gguf: .*{message}"),
    ):
        read_model(path)


def test_ids_that_mean_none(tmp_path: Path) -> None:
    good = tiny_gguf()
    pairs = dict(good.pairs) | {
        f"{TOKENIZER}{name}_token_id": scalar(U32, 0xFFFFFFFF) for name in ("bos", "eos")
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(encode(File(list(pairs.items()), good.tensors)))
    tokenizer = read_model(path).tokenizer
    assert tokenizer is not None
    assert tokenizer.eos_id == 2  # by the name "</s>"


def test_arrays_where_parts_of_a_set_are_compared(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    for i in range(2):
        pairs = [("split.no", scalar(U32, i)), ("split.count", scalar(U32, 2))]
        pairs += [("split.tensors.count", scalar(U32, 2)), ("general.name", array(U32, [1, 2, i]))]
        first.with_name(f"m-0000{i + 1}-of-00002.gguf").write_bytes(encode(File([*pairs], [T(f"t{i}")])))
    with pytest.raises(FormatError, match=r"m-00002-of-00002\.gguf: its general\.name is another"):
        read_gguf(first)


CONFIGS = {
    "not JSON": (b"{", "not valid JSON"),
    "a list": (b"[]", "expected a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "NaN": (b'{"model_type": "llama", "rms_norm_eps": NaN}', "NaN is no JSON"),
    "Infinity": (b'{"model_type": "llama", "rope_theta": -Infinity}', "-Infinity is no JSON"),
    "twice": (b'{"model_type": "llama", "model_type": "qwen2"}', "'model_type' appears twice"),
    "deep": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
    "many digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "type a list": ({"model_type": ["llama"]}, "is not supported"),
    "type an object": ({"model_type": {}}, "is not supported"),
    "no type": ({}, "no model_type"),
    "sizes in words": (TINY_CONFIG | {"hidden_size": "4"}, "hidden_size must be a whole number"),
    "sizes with a point": (TINY_CONFIG | {"hidden_size": 4.0}, "hidden_size must be a whole number"),
    "sizes true": (TINY_CONFIG | {"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
    "sizes negative": (TINY_CONFIG | {"vocab_size": -1}, "vocab_size is -1"),
    "sizes huge": (TINY_CONFIG | {"num_hidden_layers": 10**400}, "n_layers is 1000"),
    "number huge": (TINY_CONFIG | {"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
    "number overflows": (b'{"model_type": "llama", "rms_norm_eps": 1e999, "x": ""}', "hidden_size"),
    "list for a number": (TINY_CONFIG | {"rope_theta": [1]}, "rope_theta must be a number"),
    "scaling a list": (TINY_CONFIG | {"rope_scaling": [1]}, "rope_scaling must be an object"),
    "scaling of lists": (
        TINY_CONFIG | {"rope_scaling": {"rope_type": ["yarn"]}}, "RoPE type .* is not supported",
    ),
    "unknown and on": (TINY_CONFIG | {"quantum": {"a": 1}}, "'quantum' is set"),
    "text in text": ({"model_type": "mistral3", "text_config": {"model_type": "mistral3"}}, "no text_config"),
    "no heads": (TINY_CONFIG | {"num_attention_heads": 0}, "n_heads is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_config_json(case: str, tmp_path: Path, reads: ReadCount) -> None:
    config, message = CONFIGS[case]
    folder = write_directory(tmp_path / "model", config=config)
    with (
        bounded(reads, sum(file.stat().st_size for file in folder.iterdir())),
        pytest.raises((FormatError, UnsupportedError), match=f"model.*{message}"),
    ):
        read_model(folder)


def test_json_that_is_too_deep_for_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader gives up by itself."""

    def loads(*args: object, **options: object) -> None:
        raise RecursionError

    folder = write_directory(tmp_path / "model")
    monkeypatch.setattr(json, "loads", loads)
    with pytest.raises(FormatError, match=r"json: nested too deeply"):
        read_model(folder)


def test_experts_by_the_thousand_in_a_directory(tmp_path: Path, reads: ReadCount) -> None:
    for n_layers, message in (
        (128, "and more"),
        (129, "129 layers of 256 experts are 33024"),
    ):
        sizes = {
            "model_type": "qwen3_moe",
            "num_hidden_layers": n_layers,
            "num_key_value_heads": 1,
            "num_experts": 256,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 4,
        }
        folder = write_directory(tmp_path / "model", config=TINY_CONFIG | sizes)
        size = sum(file.stat().st_size for file in folder.iterdir())
        with bounded(reads, size), pytest.raises(FormatError, match=message):
            read_model(folder)


def test_a_weight_that_is_there_twice(tmp_path: Path) -> None:
    """Under two names, and as a matrix of its own beside the one that holds several."""
    shapes = {"model.norm.weight": [4], "language_model.model.norm.weight": [4]}
    folder = write_directory(tmp_path / "model", model__safetensors=safetensors_bytes(shapes))
    with pytest.raises(FormatError, match=r"both hold 'model\.norm\.weight'"):
        read_model(folder)
    layer = "model.layers.0.self_attn."
    shapes = {f"{layer}qkv_proj.weight": [12, 4], f"{layer}q_proj.weight": [4, 4]}
    phi = TINY_CONFIG | {"model_type": "phi3", "pad_token_id": 0}
    write_directory(folder, config=phi, model__safetensors=safetensors_bytes(shapes))
    with pytest.raises(FormatError, match=r"both hold '.*q_proj\.weight'"):
        read_model(folder)


@pytest.mark.parametrize("name", ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"])
@pytest.mark.parametrize("shape", [[], [2], [3]])
def test_a_stack_of_experts_that_is_none(name: str, shape: list[int], tmp_path: Path) -> None:
    sizes = {"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1}
    sizes |= {"num_key_value_heads": 2}
    raw = safetensors_bytes({f"model.layers.0.mlp.experts.{name}": shape})
    folder = write_directory(tmp_path / "model", config=TINY_CONFIG | sizes, model__safetensors=raw)
    with pytest.raises(FormatError, match=r"(?s)the tensors do not fit.*is missing"):
        read_model(folder)


def test_two_matrices_in_turn_have_an_even_number_of_rows(tmp_path: Path) -> None:
    info = TensorInfo("gate_up", (65, 32), 0, tmp_path / "model.safetensors", 0, 65 * 128)
    with pytest.raises(FormatError, match=r"model\.safetensors: tensor 'gate_up' has 65 rows, which cannot"):
        info.every_other(0)


def test_a_snapshot_of_links(tmp_path: Path) -> None:
    """A Hugging Face cache: a folder of links to blobs named by hash, siblings sought beside the links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, (name, raw) in enumerate(tiny_directory().items()):
        (blobs / f"{i:064x}").write_bytes(raw)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / f"{i:064x}")
    model = read_model(snapshot)
    assert model.template is not None
    assert {info.path.parent for info in model.weights.values()} == {snapshot}
    (tmp_path / "link").symlink_to(snapshot)
    assert read_model(tmp_path / "link").config == model.config
    assert read_model(snapshot / "model.safetensors").config == model.config
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("config.json")
    with pytest.raises(Error, match="snapshots"):
        read_model(snapshot)


@pytest.mark.parametrize(
    "path", ["a" * 5000, "~nosuchuser/model", "a\0b", "\ud800", "", "/dev/null", "/dev/zero"]
)
def test_paths_that_are_none(path: str) -> None:
    for read in (tinyllm.load, load_tokenizer, read_imatrix):
        with pytest.raises((NotFoundError, ReadError, FormatError)):
            read(path)


# Files that are not what they seem

ODD = {
    "a pipe": (os.mkfifo, "not a regular file"),
    "a folder": (os.mkdir, "not a regular file"),
    "huge": (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "too many for such a file"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja",
             "chat_template.json", "model.safetensors", "model.safetensors.index.json"],
)  # fmt: skip
def test_odd_files(name: str, odd: str, tmp_path: Path, reads: ReadCount) -> None:
    make, message = ODD[odd]
    folder = write_directory(tmp_path / "model", model__safetensors=None, tokenizer_config={})
    if name == "added_tokens.json":  # read beside a vocabulary
        tiny_tokenizer_json(folder)
    if name != "model.safetensors.index.json":
        (folder / "model.safetensors").write_bytes(tiny_directory()["model.safetensors"])
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with bounded(reads, 4096), pytest.raises((FormatError, ReadError), match=f"{name}: .*({message}|header)"):
        read_model(folder)


def test_odd_templates_of_a_folder(tmp_path: Path) -> None:
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    os.mkfifo(more / "tool_use.jinja")
    with pytest.raises(ReadError, match="not a regular file"):
        template_from_directory(tmp_path)


def test_a_large_file_is_no_imatrix(tmp_path: Path, reads: ReadCount) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<ii", 5, 1 << 30))
    os.truncate(path, 1 << 40)
    with bounded(reads, 4096), pytest.raises(FormatError, match="no imatrix"):
        read_imatrix(path)


# Vocabularies


def step(type: str, **settings: Any) -> dict[str, Any]:
    return {"type": type, **settings}


def splitter(regex: str) -> dict[str, Any]:
    return step("Split", pattern={"Regex": regex}, behavior="Isolated", invert=False)


def table_of_characters(text: bytes) -> bytes:
    """A normalizer's compiled table that makes `text` of "a": a trie of three nodes."""
    nodes = [0] * 256
    nodes[0] = 128 << 10
    nodes[128 ^ ord("a")] = 64 << 10 | 1 << 8 | ord("a")
    nodes[128 ^ ord("a") ^ 64] = 1 << 31
    return struct.pack("<I256I", 1024, *nodes) + text + b"\0"


AB = {"a": 0, "b": 1, "ab": 2}
BYTES = step("ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
FOURFOLD = step("Replace", pattern={"String": "a"}, content="a" * 4)
COMPILED = step("Precompiled", precompiled_charsmap=base64.b64encode(table_of_characters(b"b")).decode())
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
TEMPLATE = step(
    "TemplateProcessing",
    single=[TEXT],
    pair=[TEXT, {"Sequence": {"id": "B", "type_id": 0}}],
    special_tokens={},
)
TOKENIZER_JSON: dict[str, tuple[dict[str, Any], str]] = {
    "grows": ({"normalizer": step("Sequence", normalizers=[FOURFOLD] * 2)}, "make 16 characters of one"),
    "grows in bytes": (
        {"pre_tokenizer": step("Sequence", pretokenizers=[BYTES] * 4)}, "make 16 characters of one",
    ),
    "grows in front": (
        {"normalizer": step("Sequence", normalizers=[step("Prepend", prepend="a" * 3)] * 2)},
        "make 16 characters of one",
    ),
    "a compiled table": ({"normalizer": COMPILED}, "a compiled table"),
    "a compiled table inside": ({"normalizer": step("Sequence", normalizers=[COMPILED])}, "a compiled table"),
    "two templates": (
        {"post_processor": step("Sequence", processors=[TEMPLATE, TEMPLATE])}, "one text into its template",
    ),
    "the text twice": (
        {"post_processor": TEMPLATE | {"single": [TEXT, TEXT]}, "truncation": None}, "one text into its temp",
    ),
    "a prefix longer than a merge": (
        {"model": step("BPE", continuing_subword_prefix="b", vocab=AB | {"aab": 3}, merges=["a ab"])},
        "merges 'ab', which does not begin with 'b'",
    ),
    "other tokens each time": (
        {"model": step("BPE", dropout=0.5, vocab=AB, merges=[])}, "its dropout makes other tokens each time",
    ),
    "a long prefix": (
        {"model": step("BPE", continuing_subword_prefix="é" * 65, vocab=AB, merges=[])}, "65 char",
    ),
    "a long suffix": ({"model": step("BPE", end_of_word_suffix="x" * 65, vocab=AB, merges=[])}, "has 65 ch"),
    "words of any length": (
        {"model": step("WordPiece", unk_token="a", continuing_subword_prefix="##",
                       max_input_chars_per_word=100, vocab=AB)},
        "its model is WordPiece; tinyllm reads BPE, Unigram, WordLevel",
    ),
    "words of any length, without a type": (
        {"model": {"unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                   "vocab": AB}},
        "its model is WordPiece",
    ),
    "a table without a type": (
        {"normalizer": {"precompiled_charsmap": COMPILED["precompiled_charsmap"]}}, "a compiled table",
    ),
    "a pattern of nothing": (  # and which nothing matches
        {"normalizer": step("Replace", pattern={"Regex": "(?!)"}, content="z")}, "matches where nothing",
    ),
    "a pattern that takes long": (
        {"normalizer": step("Replace", pattern={"Regex": "((a|b| )+)$c"}, content="z")}, "bound: it repeats",
    ),
    "a splitter that takes long": ({"pre_tokenizer": splitter("(?:.|.){6}(?!)")}, "bound: it repeats"),
    "many patterns": (
        {"pre_tokenizer": step("Sequence", pretokenizers=[splitter(" ?[ab]")] * 99)},
        "expressions together can take",
    ),
    "a long text to look for": (
        {"pre_tokenizer": step("Split", pattern={"String": "a" * 51}, behavior="Isolated", invert=False)},
        "51 characters, and 50 is the most",
    ),
    "a wild id": ({"model": step("BPE", vocab={"a": 300}, merges=[])}, "vocabulary of 301 ids"),
}  # fmt: skip


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that small files meet, of which none does any harm where the file is read without them."""
    monkeypatch.setattr(from_directory, "_MAX_GROWTH", 15)
    monkeypatch.setattr(from_directory, "_MAX_VOCABULARY", 300)
    monkeypatch.setattr(from_directory, "_MAX_AROUND", 5)
    monkeypatch.setattr(from_directory, "MAX_STEPS", 300)
    monkeypatch.setattr(patterns, "MAX_STEPS", 300)
    monkeypatch.setattr(patterns, "MAX_LENGTH", 50)


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("case", TOKENIZER_JSON)
def test_tokenizer_json(case: str, tmp_path: Path) -> None:
    """What the tokenizers package would take at its word."""
    changes, message = TOKENIZER_JSON[case]
    tiny_tokenizer_json(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((FormatError, UnsupportedError), match=message):
        load_tokenizer(tmp_path)


PANICS = """
import tokenizers

class PanicException(BaseException):
    pass

class Tokenizer:
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        if name == METHOD:
            raise PanicException("an index")
        return getattr(self.inner, name)

    @classmethod
    def from_buffer(cls, data):
        return cls(tokenizers.Tokenizer.from_buffer(data))
"""


@pytest.mark.parametrize(("method", "message"), [("no_padding", "reads"), ("encode", "fails with it")])
def test_panics_of_the_package(
    method: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no Exceptions, and come while a file is read or when it is first used."""
    package = ModuleType("tokenizers")
    vars(package)["METHOD"] = method
    exec(PANICS, vars(package))
    tiny_tokenizer_json(tmp_path)
    monkeypatch.setattr(from_directory, "tokenizers", package)
    with pytest.raises(FormatError, match=rf"tokenizer\.json: .*{message}: an index"):
        load_tokenizer(tmp_path)


def test_texts_to_replace_are_measured_as_patterns_are() -> None:
    for text, least in (("ab", 2), ("a*", 2), ("", 0)):
        assert from_directory._cost({"String": text}).least == least


def test_a_compiled_table_spelled_otherwise(tmp_path: Path) -> None:
    tiny_tokenizer_json(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = json.dumps(json.loads(path.read_text()) | {"normalizer": COMPILED})
    path.write_text(text.replace("Precompiled", "\\u0050recompiled"))
    with pytest.raises(UnsupportedError, match="a compiled table"):
        load_tokenizer(tmp_path)


def test_metadata_that_a_caller_made() -> None:
    for key, value in (
        ("model", np.array([1, 2])),
        ("eos_token_id", np.array([1, 2])),
        ("scores", [1e300] * 269),
    ):
        with pytest.raises((FormatError, UnsupportedError), match=key):
            tokenizer_from_gguf(tiny_sentencepiece() | {TOKENIZER + key: value})


def test_tokens_beside_the_vocabulary(tmp_path: Path) -> None:
    """One after another these took 11 seconds, and four times as long for twice as many."""
    n = 8000
    texts = [f"<x{i}>" for i in range(n)]
    for name, tokens in (
        ("added_tokens", {text: 261 + i for i, text in enumerate(texts)}),
        ("tokenizer_config", {"added_tokens_decoder": {str(261 + i): {"content": t, "special": bool(i % 2)}
                                                       for i, t in enumerate(texts)}}),
    ):  # fmt: skip
        tiny_tokenizer_json(tmp_path)
        (tmp_path / f"{name}.json").write_text(json.dumps(tokens))
        start = time.process_time()
        tokenizer = load_tokenizer(tmp_path)
        assert time.process_time() - start < 1
        (tmp_path / f"{name}.json").unlink()
        assert tokenizer.encode(texts[-1] + texts[0], bos=False, special=True) == [260 + n, 261]
        assert tokenizer.vocab_size == 261 + n
        assert (261 + 1 in tokenizer.special_ids) == (name == "tokenizer_config")


def test_ids_of_two_tokens_and_tokens_of_two_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The package takes the first of two tokens, and counts on from the vocabulary where an added token's id
    says something else: there we go by the package, as all do, and log it."""

    def write(added: int = 4, settings: str = "{}", **vocabulary: int) -> None:
        tokenizer = json.loads(json.dumps(TINY_TOKENIZER_JSON))
        tokenizer["added_tokens"][0]["id"] = added
        tokenizer["model"]["vocab"] |= vocabulary
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        (tmp_path / "tokenizer_config.json").write_text(settings)

    for message, vocabulary in (
        ("'[ab]' and '[ab]'.* 0", {"b": 0}),
        (r"'(ab|<s>)' and '(ab|<s>)'.* 4", {"ab": 4}),
    ):
        write(**vocabulary)
        with pytest.raises(FormatError, match=rf"tokenizer\.json: the tokens {message}"):
            load_tokenizer(tmp_path)
    write()
    load_tokenizer(tmp_path)
    assert not caplog.text
    for other in (0, 5):
        write(added=other)
        assert load_tokenizer(tmp_path).encode("<s>", special=True)[-1] == 4
        assert f"the added token '<s>' has the id 4, not {other}" in caplog.text
    write(settings=json.dumps({"added_tokens_decoder": {"7": {"content": "<x>"}}}))
    assert load_tokenizer(tmp_path).encode("<x>", special=True)[-1] == 5
    assert "the added token '<x>' has the id 5, not 7" in caplog.text


@pytest.mark.parametrize("odd", [261.0, "261", True, None, [261]])
def test_ids_beside_the_vocabulary_that_are_no_integers(odd: Any, tmp_path: Path) -> None:
    """Such a token was left out, or became the token 1."""
    tiny_tokenizer_json(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": odd}))
    with pytest.raises(FormatError, match=r"added_tokens\.json: the id of '<x>' is no whole number"):
        load_tokenizer(tmp_path)


def test_scores_that_are_no_numbers(tmp_path: Path) -> None:
    for score in (float("nan"), float("inf"), float("-inf")):
        (tmp_path / "tokenizer.model").write_bytes(tiny_sentencepiece_model(("ab", score, 1)))
        with pytest.raises(FormatError, match="the score of its piece 'ab' is no number"):
            load_tokenizer(tmp_path)


def test_what_goes_around_a_text_is_of_the_model(tmp_path: Path) -> None:
    """Such a model loaded, and then refused every prompt."""
    tokenizer = json.loads(json.dumps(TINY_TOKENIZER_JSON))
    tokenizer["model"]["vocab"]["z"] = 50
    tokenizer["added_tokens"][0]["id"] = tokenizer["post_processor"]["special_tokens"]["<s>"]["ids"][0] = 5
    write_directory(tmp_path, tokenizer=tokenizer)
    with tinyllm.load(tmp_path) as llm:
        assert llm("a", max_tokens=1, temperature=0).tokens  # padding of the tokenizer alone does no harm
    tokenizer["post_processor"]["special_tokens"]["<s>"]["ids"] = [50]
    write_directory(tmp_path, tokenizer=tokenizer)
    with pytest.raises(FormatError, match=r"puts the token 50 around texts, and the model has 6 tokens"):
        tinyllm.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
        *("generation_config.json", "chat_template.jinja", "chat_template.json", "added_tokens.json"),
        *("special_tokens_map.json", "model.safetensors", "model.safetensors.index.json"),
    ],
)
def test_links_that_lead_nowhere(name: str, tmp_path: Path) -> None:
    """Of a download that ended early; without the file it would be another model."""
    write_directory(tmp_path, tokenizer_config=None, model__safetensors=None)
    if name != "model.safetensors.index.json":
        (tmp_path / "model.safetensors").write_bytes(tiny_directory()["model.safetensors"])
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("../../blobs/0123")
    if name == "added_tokens.json":  # which is read for a vocabulary alone
        tiny_tokenizer_json(tmp_path)
    with pytest.raises(FormatError, match=rf"{name}: a link to '../../blobs/0123', which is not there"):
        tinyllm.load(tmp_path)
    (tmp_path / "blobs").mkdir()
    if name == "generation_config.json":
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("blobs/0123")
        (tmp_path / "blobs" / "0123").write_text('{"eos_token_id": [3]}')
        with tinyllm.load(tmp_path) as llm:
            assert 3 in llm.eos_ids


# Whole models that lie in a few places, and damage

KINDS = {"gguf": gguf_files(), "safetensors": safetensors_files(), "directory": directories()}


@pytest.mark.parametrize("kind", KINDS)
def test_random_files(kind: str, tmp_path: Path, reads: ReadCount) -> None:
    outcomes = {"": 0}

    @settings(max_examples=150)
    @given(damaged(KINDS[kind]))
    def check(raw: bytes) -> None:
        before, start = reads.n_bytes, time.process_time()
        with peak_below(100):
            outcome = try_out(kind, raw, tmp_path)
        outcomes[outcome and "refused"] = outcomes.get(outcome and "refused", 0) + 1
        assert reads.n_bytes - before <= 6 * len(raw) + 4096  # of a GGUF three readers in turn
        assert time.process_time() - start < 2

    check()
    assert outcomes[""] > 0
    assert outcomes["refused"] > 0


# Tokenizers of directories


def special(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def many(parts: int, ids: int) -> dict[str, Any]:
    tokens = {"id": "<s>", "ids": [0] * ids, "tokens": ["!"] * ids}
    return TEMPLATE | {"single": [special("<s>")] * parts + [TEXT], "special_tokens": {"<s>": tokens}}


BERT = step("BertProcessing", cls=["<s>", 258], sep=["</s>", 259])
POST_PROCESSORS: dict[str, tuple[dict[str, Any], str]] = {
    "many ids of one part": (many(1, 6), "more than 5 ids"),
    "many parts": (many(6, 1), "more than 5 ids"),
    "many parts of many ids": (many(2, 3), "more than 5 ids"),
    "many in a sequence": (step("Sequence", processors=[BYTES, many(6, 1)]), "more than 5 ids"),
    "a wild id": (many(1, 1) | {"special_tokens": {"<s>": {"id": "<s>", "ids": [999], "tokens": ["x"]}}},
                  "the id 999, outside the vocabulary of 261"),
    "a wild id of BERT": (BERT | {"cls": ["<s>", 999]}, "the id 999, outside"),
    "a wild id of RoBERTa": (step("RobertaProcessing", cls=["<s>", 258], sep=["</s>", 261],
                                  trim_offsets=True, add_prefix_space=True), "the id 261, outside"),
    "no text": (TEMPLATE | {"single": []}, "one text into its template"),
    "two of BERT": (step("Sequence", processors=[BERT, BERT]), "one text into its template"),
}  # fmt: skip


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("case", POST_PROCESSORS)
def test_post_processors(case: str, tmp_path: Path) -> None:
    """What they add is a file's choice, and no user sees it before the model does."""
    processor, message = POST_PROCESSORS[case]
    tiny_tokenizer_json(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    with pytest.raises(FormatError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"single": [{"SpecialToken": {"id": "<s>"}}, TEXT]}, "adds '<s>' and does not say its ids"),
        ({"single": [{"Sequence": {"id": "C"}}]}, "one text into its template"),
        ({"type": "Another"}, "does not know its post-processor 'Another'"),
    ],
    ids=["a token without ids", "another text", "another kind"],
)
def test_templates_that_say_too_little(changes: dict[str, Any], message: str) -> None:
    """As the package tells them. It does not read these, which have a single side."""
    state = step("TemplateProcessing", single=[TEXT], special_tokens={}) | changes
    processor = SimpleNamespace(__getstate__=lambda: json.dumps(state))
    with pytest.raises((FormatError, UnsupportedError), match=message):
        from_directory._around(SimpleNamespace(post_processor=processor), Path("tokenizer.json"))


def normalizer_message(text: bytes) -> bytes:
    """The table for appending to a SentencePiece model."""
    return _message(3, _message(2, table_of_characters(text)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny_sentencepiece_model(("<0xAA>", 0.0, 6)).replace(b"<0xAA>", b"<0xA\xff>"), "not a Sentence"),
        (tiny_sentencepiece_model(("xx", 0.0, 1)).replace(b"xx", b"x\xff"), "a piece is no text"),
        (tiny_sentencepiece_model() + normalizer_message(b"\xff"), "a piece is no text"),
    ],
    ids=["a message of the package", "a piece", "a table of characters"],
)
def test_sentencepiece_models_of_no_text(model: bytes, message: str, tmp_path: Path) -> None:
    """The package's strings are bytes, those that it quotes in its messages, too."""
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(FormatError, match=message):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tiny_sentencepiece_model() + normalizer_message(b"b"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == tokenizer.encode("b")  # such tables are read


def test_many_tokens_that_are_always_parsed() -> None:
    """A regular expression of these took half a minute."""
    n = 20_000
    tokens = ["<unk>", "<s>", "</s>", "a", *("a" * 200 + str(i) for i in range(n))]
    start = time.process_time()
    tokenizer = tokenizer_from_gguf(
        {
            TOKENIZER + "model": "llama",
            TOKENIZER + "tokens": tokens,
            TOKENIZER + "token_type": [2, 3, 3, 1, *[4] * n],
            TOKENIZER + "scores": [0.0] * len(tokens),
        }
    )
    assert tokenizer.encode("a" * 1000 + "777", bos=False)[-1] == tokens.index("a" * 200 + "777")
    assert time.process_time() - start < 3


# What a model's numbers and names do


def test_a_name_that_steers_the_terminal(tmp_path: Path) -> None:
    sizes = {"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1}
    raw = safetensors_bytes({"\x1b[2J.mlp.experts.gate_up_proj": [2, 4, 5]})
    config = TINY_CONFIG | sizes | {"num_key_value_heads": 2}
    folder = write_directory(tmp_path / "model", config=config, model__safetensors=raw)
    with pytest.raises(FormatError, match=r"'\\x1b\[2J\.mlp.* has 5 columns") as refused:
        read_model(folder)
    assert str(refused.value).isprintable()


def test_sampling_defaults_are_refused_while_loading(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    file = tiny_gguf()
    file.pairs.append(("general.sampling.top_k", scalar(U64, 1 << 31)))
    path.write_bytes(encode(file))
    with pytest.raises(FormatError, match=r"model\.gguf: .*general\.sampling\.top_k is .*outside 0 to"):
        tinyllm.load(path)


def test_memory_of_a_call_is_in_proportion(tmp_path: Path) -> None:
    """4 MB of weights whose queries are a million numbers a token."""
    n = 16384
    sizes = {
        "embedding_length": 1,
        "feed_forward_length": 1,
        "context_length": 4096,
        "attention.head_count": n,
    }
    sizes |= {"attention.head_count_kv": 1, "attention.key_length": 64, "attention.value_length": 64}
    keys = {f"llama.{key}": scalar(U32, value) for key, value in sizes.items()}
    file, path = tiny_gguf(), tmp_path / "model.gguf"
    file.pairs = list((dict(file.pairs) | keys).items())
    shapes = {"token_embd": (1, 6), "attn_q": (1, 64 * n), "attn_k": (1, 64), "attn_v": (1, 64)}
    shapes |= {"attn_output": (64 * n, 1)}
    for tensor in file.tensors:
        stem = str(tensor.name).removesuffix(".weight").removeprefix("blk.0.")
        tensor.dims, tensor.type = shapes.get(stem, (1,) * len(tensor.dims)), 0 if "norm" in stem else 1
    file.data = bytes(sum(-(-tensor.n_bytes() // 32) * 32 for tensor in file.tensors))
    path.write_bytes(encode(file))
    assert path.stat().st_size < 5e6
    prompt = [3] * 30
    with peak_below(300), tinyllm.load(path, threads=1) as llm:
        assert llm(prompt, max_tokens=1, temperature=0).tokens == [0]
        assert llm.embed(prompt).shape == (1,)
        measure([llm], windows(prompt, 30))
        cases = benchmark.cases(n_prompt=[30], n_gen=[], threads=[1])
        benchmark.measure([str(path)], cases, repetitions=1, read_bytes=1 << 20)
