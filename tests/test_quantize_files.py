"""`tinyllm.quantize` and its command: a file means the same model, and nothing half-written stays."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from helpers_formats import dequantize, kind_of
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import golden_spec, golden_specs, random_ids, random_weights, write_hf_directory
from test_families import LLAMA_CPP_DIFFERS, LLAMA_CPP_TOLERANCE

import tinyllm
from tinyllm import errors, quantization
from tinyllm.cli.perplexity import main as perplexity
from tinyllm.cli.quantize import main
from tinyllm.errors import ArgumentError
from tinyllm.files import FORMATS, gguf_writer
from tinyllm.files.gguf import read_gguf
from tinyllm.files.gguf_writer import OutTensor
from tinyllm.quantization import calibration, mixes
from tinyllm.quantization.imatrix import Imatrix, read_imatrix, write_imatrix

MASTER = Path(__file__).resolve().parents[1] / "benchmarks" / "stories-f16.gguf"
# What no GGUF file can say, of the golden models.
UNSAID = {
    "ministral": "windows", "qwen2_window": "windows", "qwen3_moe_not_renormalized": "norm_topk_prob",
    "helium": "architecture", "cwm": "architecture", "vaultgemma": "architecture",
    "hyperclovax": "architecture", "dynamic_short": "ntk_factor", "dynamic_long": "ntk_factor",
    "qwen3_5": "linear attention", "qwen3_5_even": "linear attention",
}  # fmt: skip
GOLDEN = golden_specs() + golden_specs("families")
SPECS = [spec for spec in GOLDEN if spec.name not in UNSAID]


def bytes_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer.json of 300 ids."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "abcdefg" for b in "hijklm"]
    vocabulary = {text: i for i, text in enumerate([*letters, *(a + b for a, b in pairs), "<s>", "</s>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))


# Wide enough for blocks of 256, with rows that fit none: k of w_down is 288.
CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("float") / "model.gguf"
    template = {"chat_template": "{{ messages[0].content }}"}
    write_gguf(out, CONFIG, random_weights(CONFIG, seed=3), tokenizer=small_tokenizer(400) | template,
               metadata={"general.sampling.temp": 0.5})  # fmt: skip
    return out


def formats_of(path: Path) -> dict[str, str]:
    return {name: FORMATS[t.format].name.lower() for name, t in read_gguf(path).tensors.items()}


def needs_imatrix(type: str) -> bool:
    return mixes.MIXES[type].base in mixes.NEED_IMATRIX or type == "iq3_xs"


def even_imatrix(path: Path) -> Imatrix:
    """All columns of all matrices of a GGUF file alike."""
    shapes = {name: t.shape for name, t in read_gguf(path).tensors.items() if len(t.shape) > 1}
    sums = {name: np.ones((int(np.prod(s[:-2])), s[-1]), np.float32) for name, s in shapes.items()}
    return Imatrix(sums, {name: np.ones(len(s), np.float32) for name, s in sums.items()})


@pytest.mark.parametrize("type", list(mixes.MIXES))
def test_a_written_file_is_what_loading_makes(type: str, path: Path, tmp_path: Path) -> None:
    """The same bits as load(weights=), and gguf reads the same numbers. Where importance is needed neither
    goes without."""
    out = tmp_path / "out.gguf"
    imatrix = None
    if needs_imatrix(type):
        imatrix = even_imatrix(path)
        for refused in (lambda: tinyllm.load(path, weights=type), lambda: tinyllm.quantize(path, out, type)):
            with pytest.raises(errors.ArgumentError, match=r"needs importance: pass an imatrix"):
                refused()
    done = tinyllm.quantize(path, out, type, imatrix=imatrix)
    assert done.n_bytes == out.stat().st_size
    ids = random_ids(CONFIG, 1, 20)
    with tinyllm.load(out) as b:
        logits, values = b.logits(ids), b.model.unpack("w_gate", 1)
    assert np.isfinite(logits).all()
    if not imatrix:
        with tinyllm.load(path, weights=type) as a:
            np.testing.assert_array_equal(a.logits(ids), logits)
    info = read_gguf(out).tensors["blk.1.ffn_gate.weight"]
    blocks = np.frombuffer(out.read_bytes(), np.uint8, info.n_bytes, info.offset).reshape(len(values), -1)
    np.testing.assert_array_equal(values, dequantize(blocks, kind_of(FORMATS[info.format].name)))


def test_metadata_comes_along(path: Path, tmp_path: Path) -> None:
    tinyllm.quantize(path, tmp_path / "out.gguf", "q4_k_m")
    before, after = read_gguf(path), read_gguf(tmp_path / "out.gguf")
    new = {"general.file_type": 15, "general.quantization_version": 2}
    assert {k: after.metadata[k] for k in new} == new
    for key in before.metadata.keys() - new.keys():
        np.testing.assert_array_equal(after.metadata[key], before.metadata[key])
        assert after.types[key] == before.types[key]
    assert "tokenizer.chat_template" in after.metadata


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_directory_becomes_the_same_model(spec: Any, dtype: str, tmp_path: Path) -> None:
    """Keys, scaling of RoPE, biases, fused matrices, experts, the order of q and k: the logits are the very
    same bits. (The file holds float32 where JSON has float64, but so does the core.)"""
    folder = write_hf_directory(
        tmp_path / "hf", spec.config, random_weights(spec.config, spec.seed), dtype=dtype
    )
    tinyllm.quantize(folder, tmp_path / "out.gguf", dtype.lower())
    ids = random_ids(spec.config, spec.seed, spec.n_tokens)
    with (
        tinyllm.load(folder, context=spec.context) as a,
        tinyllm.load(tmp_path / "out.gguf", context=spec.context) as b,
    ):
        np.testing.assert_array_equal(a.logits(ids), b.logits(ids))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_directory_is_written_as_llama_cpps_converter_would(spec: Any, tmp_path: Path) -> None:
    """The same tensors, bit for bit, and no key that the files of that architecture lack, as far as those
    that the tests write with `gguf` have them."""
    weights = random_weights(spec.config, spec.seed)
    tinyllm.quantize(write_hf_directory(tmp_path / "hf", spec.config, weights), tmp_path / "out.gguf", "f32")
    write_gguf(tmp_path / "theirs.gguf", spec.config, weights)
    ours, theirs = gguf.GGUFReader(tmp_path / "out.gguf"), gguf.GGUFReader(tmp_path / "theirs.gguf")
    for name in ("general.architecture", "tokenizer.ggml.model"):
        assert ours.fields[name].contents() == theirs.fields[name].contents()
    mine = {tensor.name: tensor.data for tensor in ours.tensors}
    assert sorted(mine) == sorted(tensor.name for tensor in theirs.tensors)
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(mine[tensor.name], tensor.data, err_msg=tensor.name)


def test_the_language_model_of_one_that_reads_images(tmp_path: Path) -> None:
    """Its scaling of RoPE stands in the text_config, by kind of layer as newer files have it."""
    spec = next(spec for spec in GOLDEN if spec.name == "gemma3")
    text = {key: value for key, value in spec.config.items() if not key.startswith("rope_")}
    text["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
    }
    weights = {f"language_model.{k}": w for k, w in random_weights(spec.config, spec.seed).items()}
    folder = write_hf_directory(tmp_path / "hf", config, weights)
    tinyllm.quantize(folder, tmp_path / "out.gguf", "f32")
    ids = random_ids(spec.config, spec.seed, 100)
    with tinyllm.load(folder) as a, tinyllm.load(tmp_path / "out.gguf") as b:
        np.testing.assert_array_equal(a.logits(ids), b.logits(ids))


@pytest.mark.parametrize("name", UNSAID)
def test_what_a_file_could_not_say_is_refused(name: str, tmp_path: Path) -> None:
    spec = next(spec for spec in GOLDEN if spec.name == name)
    folder = write_hf_directory(tmp_path / "hf", spec.config, random_weights(spec.config, spec.seed))
    with pytest.raises(errors.UnsupportedError, match=f"cannot say this model's {UNSAID[name]}"):
        tinyllm.quantize(folder, tmp_path / "out.gguf", "f32")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("name", ["phi3", "mixtral", "gemma2"])
@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_mixes_mean_the_same_while_loading(name: str, source: str, tmp_path: Path) -> None:
    """Where a file has several matrices in one tensor, what loading quantizes is what a file would hold."""
    spec = next(spec for spec in GOLDEN if spec.name == name)
    config = {**spec.config, "hidden_size": 256, "intermediate_size": 256}
    config["num_local_experts"] = 8 * ("num_local_experts" in config)
    config = {key: value for key, value in config.items() if value}
    weights = random_weights(config, spec.seed)
    path = tmp_path / "model"
    if source == "hf":
        write_hf_directory(path, config, weights)
    else:
        write_gguf(path, config, weights)
    tinyllm.quantize(path, tmp_path / "out.gguf", "q4_k_m")
    ids = random_ids(config, 1, 20)
    with tinyllm.load(path, weights="q4_k_m") as a, tinyllm.load(tmp_path / "out.gguf") as b:
        np.testing.assert_array_equal(a.logits(ids), b.logits(ids))


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama-tok105-hf"])
def test_a_trained_directory_keeps_its_tokenizer(name: str, data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "models" / name
    tinyllm.quantize(folder, tmp_path / "out.gguf", "f32")
    text = "Once upon a time, there was a café.\n <s> x"
    with tinyllm.load(folder) as a, tinyllm.load(tmp_path / "out.gguf") as b:
        assert a.tokenizer.encode(text) == b.tokenizer.encode(text)
        assert a.tokenizer.encode(text, special=True) == b.tokenizer.encode(text, special=True)
        assert (a.tokenizer.bos_id, a.tokenizer.eos_ids) == (b.tokenizer.bos_id, b.tokenizer.eos_ids)
        assert str(a("Once upon", max_tokens=30, temperature=0)) == str(
            b("Once upon", max_tokens=30, temperature=0)
        )


def test_byte_level_tokenizers_get_the_name_of_their_rule(data_dir: Path, tmp_path: Path) -> None:
    """A tokenizer.json made of a GGUF's vocabulary gives the GGUF's entries again."""
    from tinyllm.tokenizer import tokenizer_from_gguf
    from tinyllm.tokenizer.to_gguf import tokenizer_to_gguf

    for name, pre in (("llama-bpe", "llama-bpe"), ("qwen2", "qwen2"), ("gpt-2", "gpt-2")):
        metadata = read_gguf(data_dir / "vocab" / f"ggml-vocab-{name}.gguf").metadata
        backend = tokenizer_from_gguf(metadata)._encoder._tokenizer
        backend.decoder = tokenizers.decoders.ByteLevel()
        folder = tmp_path / name
        folder.mkdir()
        backend.save(str(folder / "tokenizer.json"))
        entries = tokenizer_to_gguf(folder)
        assert entries["tokenizer.ggml.pre"] == pre
        assert entries["tokenizer.ggml.merges"] == metadata["tokenizer.ggml.merges"]
        n = len(metadata["tokenizer.ggml.tokens"])
        assert entries["tokenizer.ggml.tokens"][:n] == metadata["tokenizer.ggml.tokens"]


# What a name stands for


def shapes(
    n_layers: int = 17, k: int = 256, kv: int = 64, experts: int = 0, tied: bool = False
) -> dict[str, Any]:
    found: dict[str, Any] = {"token_embd.weight": (64, k), "output_norm.weight": (k,)}
    found |= {} if tied else {"output.weight": (64, k)}
    for layer in range(n_layers):
        names = {
            "attn_q": (256, k),
            "attn_k": (kv, k),
            "attn_v": (kv, k),
            "attn_output": (k, 256),
            "attn_norm": (k,),
        }
        if experts:
            names |= {"ffn_gate_inp": (experts, k), "ffn_down_exps": (experts, k, 256)}
        else:
            names |= {"ffn_down": (k, 256)}
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in names.items()}
    return found


def named(found: dict[str, Any], type: str, **options: Any) -> Callable[[str], str]:
    chosen = mixes.tensor_formats(found, type, **options)
    return lambda name: FORMATS[chosen[name]].name.lower()


def test_q4_k_m() -> None:
    """As llama.cpp chooses: layers 0, 1 (the first eighth), 14 and up, every third between."""
    format = named(shapes(), "Q4_K_M")
    better = [layer for layer in range(17) if format(f"blk.{layer}.ffn_down.weight") == "q6_k"]
    assert better == [0, 1, 4, 7, 10, 13, 14, 15, 16]
    assert [format(f"blk.{layer}.attn_v.weight") == "q6_k" for layer in better] == [True] * 9
    assert format("blk.3.ffn_down.weight") == format("token_embd.weight") == "q4_k"
    assert format("output.weight") == "q6_k"
    assert format("blk.0.attn_norm.weight") == "f32"


def test_exceptions() -> None:
    assert named(shapes(tied=True), "q4_0")("token_embd.weight") == "q6_k"
    assert named(shapes(k=288), "q4_k_m")("blk.3.attn_q.weight") == "q5_0"
    assert named(shapes(k=288), "q6_k")("output.weight") == "q8_0"
    assert named(shapes(k=172), "q4_0")("blk.3.attn_q.weight") == "f16"
    assert named(shapes(), "q4_0", imatrix=True)("blk.0.ffn_down.weight") == "q4_1"
    assert named(shapes(), "iq4_xs")("blk.0.ffn_down.weight") == "q5_k"
    assert named(shapes(), "iq4_xs", imatrix=True)("blk.0.ffn_down.weight") == "iq4_xs"
    assert named(shapes(kv=256), "q2_k")("blk.9.attn_v.weight") == "q3_k"
    assert named(shapes(), "q2_k")("blk.9.attn_v.weight") == "q4_k"
    eight = named(shapes(experts=8), "q4_k_s")
    assert [eight(f"blk.9.{name}.weight") for name in ("attn_k", "attn_output", "ffn_gate_inp")] == [
        "q8_0",
        "q5_k",
        "f32",
    ]
    assert named(shapes(experts=8), "mxfp4")("blk.9.ffn_down_exps.weight") == "mxfp4"
    assert named(shapes(experts=8), "mxfp4")("blk.9.attn_q.weight") == "q8_0"
    with pytest.raises(errors.ArgumentError, match="'q9' is no quantization; there are f32, bf16"):
        mixes.key_of("q9")
    assert [mixes.key_of(name) for name in ("Q4_K", "q4_k_m", "q3_k", "Q5_K")] == [
        "q4_k_m",
        "q4_k_m",
        "q3_k_m",
        "q5_k_m",
    ]


def test_few_bits() -> None:
    """As llama.cpp chooses, with importance."""
    few = {
        type: named(shapes(kv=256), type, imatrix=True) for type in ("iq3_xxs", "iq2_m", "iq2_xxs", "iq1_s")
    }
    names = ["blk.0.attn_v", "blk.9.attn_q", "blk.9.attn_output", "blk.0.ffn_down", "blk.9.ffn_down"]
    names += ["token_embd", "output"]
    assert {type: [format(f"{name}.weight") for name in names] for type, format in few.items()} == {
        "iq3_xxs": ["iq3_xxs", "iq2_s", "iq3_s", "iq3_xxs", "iq3_xxs", "iq3_s", "q5_k"],
        "iq2_m": ["iq3_s", "iq2_s", "iq3_s", "iq3_s", "iq2_s", "iq3_s", "q5_k"],
        "iq2_xxs": ["q2_k", "iq2_xxs", "iq2_xxs", "q2_k", "iq2_xxs", "q2_k", "q5_k"],
        "iq1_s": ["q2_k", "iq1_s", "iq2_xxs", "q2_k", "iq1_s", "q2_k", "q5_k"],
    }
    shared = named(shapes(), "iq2_s", imatrix=True)
    assert [shared(f"blk.9.{name}.weight") for name in ("attn_v", "attn_k")] == ["q4_k", "iq2_xs"]
    eight = named(shapes(experts=8), "iq2_xs", imatrix=True)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down_exps")
    assert [eight(f"blk.9.{name}.weight") for name in parts] == ["iq2_xs", "q4_k", "q4_k", "q5_k", "iq2_xs"]
    assert named(shapes(experts=8), "iq3_m")("blk.9.attn_v.weight") == "q8_0"
    assert named(shapes(k=288), "iq2_xs", imatrix=True)("blk.9.attn_q.weight") == "iq4_nl"
    assert named(shapes(k=288), "iq2_xs", imatrix=True)("output.weight") == "q8_0"
    assert [named(shapes(), type)("token_embd.weight") for type in ("tq1_0", "q1_0")] == ["q4_k", "q1_0"]
    middle = named(
        shapes() | {f"blk.{i}.ffn_up.weight": (256, 256) for i in range(17)}, "iq3_xs", imatrix=True
    )
    assert [middle(f"blk.{i}.ffn_up.weight") for i in (1, 2, 13, 14)] == [
        "iq3_s",
        "iq3_xxs",
        "iq3_xxs",
        "iq3_s",
    ]
    with pytest.raises(
        errors.ArgumentError, match=r"iq2_xs makes blk\.0\.attn_q\.weight IQ2_XS, which needs"
    ):
        mixes.tensor_formats(shapes(), "iq2_xs")


def test_fused_attention_counts_as_its_values() -> None:
    """How many heads share a value is seen there as well: 4 of 256 columns, and one of 64."""
    fused = {
        name: shape
        for name, shape in shapes().items()
        if "attn_q" not in name and "attn_k" not in name and "attn_v" not in name
    } | {f"blk.{layer}.attn_qkv.weight": (384, 256) for layer in range(17)}
    for type in mixes.MIXES:
        apart, together = named(shapes(), type, imatrix=True), named(fused, type, imatrix=True)
        for layer in range(17):
            assert together(f"blk.{layer}.attn_qkv.weight") == apart(f"blk.{layer}.attn_v.weight"), type


# Importance


def importance_file(path: Path) -> Imatrix:
    rng = np.random.default_rng(0)
    sums = {"blk.0.ffn_gate.weight": rng.random((1, 256), np.float32) ** 4 + 0.001,
            "blk.1.ffn_down_exps.weight": rng.random((4, 32), np.float32)}  # fmt: skip
    counts = {"blk.0.ffn_gate.weight": np.array([7.0], np.float32),
              "blk.1.ffn_down_exps.weight": np.array([3, 0, 2, 1], np.float32)}  # fmt: skip
    imatrix = Imatrix(sums, counts, ("a.txt",), 5, 512)
    write_imatrix(path, imatrix)
    return imatrix


def test_imatrix_is_written_as_llama_cpp_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    written = importance_file(path)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 5
    found = {t.name: t.data for t in reader.tensors}
    np.testing.assert_array_equal(
        found["blk.1.ffn_down_exps.weight.in_sum2"], written.sums["blk.1.ffn_down_exps.weight"]
    )
    assert found["blk.1.ffn_down_exps.weight.counts"].shape == (4, 1)
    read = read_imatrix(path)
    assert (read.datasets, read.chunks, read.chunk_size) == (("a.txt",), 5, 512)
    for name, sums in written.sums.items():
        np.testing.assert_array_equal(read.sums[name], sums)
        np.testing.assert_array_equal(read.counts[name], written.counts[name])


def test_importance_has_a_mean_of_one(tmp_path: Path) -> None:
    importance_file(tmp_path / "i.gguf")
    imatrix = read_imatrix(tmp_path / "i.gguf")
    found = imatrix.importance("blk.1.ffn_down_exps.weight", 4, 32)
    assert found is not None
    np.testing.assert_allclose(found.mean(axis=1), 1, rtol=1e-6)
    assert (found[1] == 1).all()  # an expert that was never asked
    assert imatrix.importance("blk.9.ffn_up.weight", 1, 256) is None
    with pytest.raises(errors.FormatError, match="another model"):
        imatrix.importance("blk.0.ffn_gate.weight", 1, 128)


def dat(entries: dict[str, tuple[int, list[float]]], end: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        out += struct.pack(f"<{len(values)}f", *values)
    return out + end


def test_older_imatrix_files(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    end = struct.pack("<ii", 12, 5) + b"a.txt"
    path.write_bytes(dat({"blk.0.ffn_up.weight": (4, [4.0, 8.0, 12.0])}, end))
    imatrix = read_imatrix(path)
    assert (imatrix.chunks, imatrix.datasets) == (12, ("a.txt",))
    found = imatrix.importance("blk.0.ffn_up.weight", 1, 3)
    assert found is not None
    np.testing.assert_allclose(found, [[0.5, 1, 1.5]])
    # Of a mixture all experts in one entry, also where llama.cpp turned such a file into a GGUF.
    path.write_bytes(dat({"blk.0.ffn_up_exps.weight": (4, [4.0, 8.0, 12.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])}))
    mixture = read_imatrix(path)
    write_imatrix(tmp_path / "i.gguf", mixture)
    for imatrix in (mixture, read_imatrix(tmp_path / "i.gguf")):
        found = imatrix.importance("blk.0.ffn_up_exps.weight", 3, 3)
        assert found is not None
        np.testing.assert_allclose(found, [[0.5, 1, 1.5], [1, 1, 1], [1, 1, 1]])
        with pytest.raises(errors.FormatError, match=r"is \(1, 9\), but the model's is \(4, 3\)"):
            imatrix.importance("blk.0.ffn_up_exps.weight", 4, 3)
    good = dat({"blk.0.ffn_up.weight": (4, [4.0, 8.0])})
    for cut in range(len(good)):
        path.write_bytes(good[:cut])
        with pytest.raises(errors.FormatError):
            read_imatrix(path)
    path.write_bytes(dat({"a": (1, [-1.0])}))
    with pytest.raises(errors.FormatError, match="negative"):
        read_imatrix(path)


def test_matrices_that_meet_the_same_are_known_by_either_name(tmp_path: Path) -> None:
    """A file may have them fused, and the imatrix be of one that has not."""
    one, two = np.array([[1.0, 3.0]], np.float32), np.array([[1.0, 3.0], [3.0, 1.0]], np.float32)
    sums = {"blk.0.attn_q.weight": one, "blk.1.attn_qkv.weight": one, "blk.0.ffn_up_exps.weight": two}
    imatrix = Imatrix(sums, {name: np.ones(len(values), np.float32) for name, values in sums.items()})
    for name, n in (
        ("blk.0.attn_qkv.weight", 1), ("blk.1.attn_q.weight", 1), ("blk.1.attn_k.weight", 1),
        ("blk.1.attn_v.weight", 1), ("blk.0.ffn_gate_up_exps.weight", 2),
    ):  # fmt: skip
        found = imatrix.importance(name, n, 2)
        assert found is not None, name
        np.testing.assert_array_equal(found, two[:n] / 2)
    for name in ("blk.0.attn_k.weight", "blk.0.attn_v.weight", "blk.0.ffn_gate_exps.weight", "attn_q"):
        assert imatrix.importance(name, 1, 2) is None, name


def test_quantizing_with_an_imatrix(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It lowers the weighted error, and the command says what it knew nothing of."""
    importance_file(tmp_path / "i.gguf")
    imatrix = read_imatrix(tmp_path / "i.gguf")
    weights = imatrix.importance("blk.0.ffn_gate.weight", 1, 256)
    exact = random_weights(CONFIG, seed=3)["model.layers.0.mlp.gate_proj.weight"].astype(np.float64)
    error = []
    for name, more in (("plain", []), ("weighted", ["--imatrix", str(tmp_path / "i.gguf")])):
        out = tmp_path / f"{name}.gguf"
        assert main([str(path), str(out), "q4_k_s", *more]) == 0
        with tinyllm.load(out) as llm:
            error.append(float((weights * (llm.model.unpack("w_gate", 0) - exact) ** 2).sum()))
    assert error[1] < 0.95 * error[0]
    assert "the imatrix says nothing of 21 tensors: blk.0.attn_q.weight" in capsys.readouterr().err


def test_what_an_imatrix_does_not_know(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named; an embedding, which none can know where the output is another matrix, is not."""
    matrices = [t for t in read_gguf(path).tensors.values() if len(t.shape) == 2]
    known = {t.name: np.ones((1, t.shape[-1]), np.float32) for t in matrices if t.name != "token_embd.weight"}
    for without in ([], ["blk.2.ffn_up.weight"]):
        sums = {name: values for name, values in known.items() if name not in without}
        write_imatrix(tmp_path / "i.gguf", Imatrix(sums, {name: np.ones(1, np.float32) for name in sums}))
        assert main([str(path), str(tmp_path / "o.gguf"), "q4_0", "--imatrix", str(tmp_path / "i.gguf")]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "nothing" in line]
        assert said == [f"the imatrix says nothing of 1 tensor: {name}" for name in without]


def test_our_own_imatrix_from_end_to_end(tmp_path: Path) -> None:
    """What tinyllm-perplexity keeps of one text, tinyllm-quantize takes, and on another text of the kind the
    matrices' outputs are closer to the master's: by the sum over columns of mean x^2 (w - q)^2, relative to
    the outputs' squares. (Of so small a model the columns are much alike: it is a few percent.)"""
    with tinyllm.load(MASTER) as master:
        stories = master("Once upon a time", n=8, max_tokens=200, temperature=1.0, seed=1)
        texts = ["Once upon a time" + story.text for story in stories]
        (tmp_path / "text.txt").write_text("\n".join(texts[:4]), encoding="utf-8")
        seen = calibration.observe(master)
        for text in texts[4:]:
            master.logits(text)
        imatrix = tmp_path / "imatrix.gguf"
        command = [str(MASTER), str(tmp_path / "text.txt"), "-c", "128", "--imatrix", str(imatrix)]
        assert perplexity(command) == 0
        found = []
        for name, more in (("plain", []), ("weighted", ["--imatrix", str(imatrix)])):
            out = tmp_path / f"{name}.gguf"
            assert main([str(MASTER), str(out), "q3_k_s", *more]) == 0
            with tinyllm.load(out) as llm:
                found.append(_output_error(master, llm, seen))
    assert found[1] < 0.97 * found[0]


def _output_error(master: tinyllm.LLM, llm: tinyllm.LLM, seen: dict[str, list[Any]]) -> float:
    errors = []
    for weight, name in (("wq", "attn_q"), ("wo", "attn_output"), ("w_up", "ffn_up"), ("w_down", "ffn_down")):
        for layer in range(master.config.n_layers):
            (sums,) = seen[f"blk.{layer}.{name}.weight"]
            exact = master.model.unpack(weight, layer).astype(np.float64)
            error = ((exact - llm.model.unpack(weight, layer)) ** 2) @ sums[:-1]
            errors.append(error.sum() / (exact**2 @ sums[:-1]).sum())
    return float(np.mean(errors))


# What cannot be


def test_quantized_models_are_refused_unless_asked(path: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    tinyllm.quantize(path, first, "q8_0")
    with pytest.raises(errors.ArgumentError, match=r"quantized already .*--allow-requantize"):
        tinyllm.quantize(first, second, "q4_0")
    assert not second.exists()
    assert main([str(first), str(second), "q4_0", "--allow-requantize"]) == 0
    assert formats_of(second)["blk.0.attn_q.weight"] == "q4_0"


def test_a_nan_is_named(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, seed=3)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    write_gguf(tmp_path / "nan.gguf", CONFIG, weights)
    with pytest.raises(errors.FormatError, match=r"'blk\.1\.ffn_up\.weight' holds a NaN"):
        tinyllm.quantize(tmp_path / "nan.gguf", tmp_path / "out.gguf", "q4_0")
    assert sorted(os.listdir(tmp_path)) == ["nan.gguf"]


def test_wrong_places(path: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="is the model itself"):
        tinyllm.quantize(path, path, "q4_0")
    with pytest.raises(errors.WriteError, match="is a directory; name a file"):
        tinyllm.quantize(path, tmp_path, "q4_0")
    with pytest.raises(errors.WriteError, match="cannot be written: No such file"):
        tinyllm.quantize(path, tmp_path / "nowhere" / "x.gguf", "q4_0")
    with pytest.raises(errors.NotFoundError):
        tinyllm.quantize(tmp_path / "missing.gguf", tmp_path / "x.gguf", "q4_0")
    assert main([str(path), str(tmp_path / "x.gguf"), "q9"]) == 2


FALLBACK = re.compile(
    r"  [\w.*]+(?: \((\d+) of them\))?: (\w+) instead of (\w+), as rows of (?:80|160) are no multiple of its "
    r"block of (?:32|256)"
)


def test_pure_and_chosen_formats(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = tinyllm.quantize(path, out, "q4_k_m", pure=True)
    assert {one.wanted for one in done.tensors if "norm" not in one.name} == {"Q4_K"}
    assert formats_of(out)["blk.0.attn_v.weight"] == formats_of(out)["output.weight"] == "q4_k"
    chosen = [(r"blk\.0\..*attn_v", "Q8_0"), ("attn_v", "f16"), ("^output", "q5_0")]
    tinyllm.quantize(path, out, "q4_k_s", tensor_types=chosen)
    plain = mixes.tensor_formats({name: t.shape for name, t in read_gguf(path).tensors.items()}, "q4_k_s")
    expected = {name: FORMATS[format].name.lower() for name, format in plain.items()}
    expected |= {name: "f16" for name in expected if "attn_v" in name}
    assert formats_of(out) == expected | {"blk.0.attn_v.weight": "q8_0", "output.weight": "q5_0"}
    with tinyllm.load(out) as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()
    for wrong, words in (
        (("attn_v", "q9"), "'q9' is no format of a tensor; there are f32"),
        (("(", "q8_0"), "'(' is no regular expression"),
        (("attn_norm", "q8_0"), "no matrix has 'attn_norm' in its name; norms, biases and routers stay F32"),
    ):
        with pytest.raises(ArgumentError, match=re.escape(words)):
            tinyllm.quantize(path, out, "q4_0", tensor_types=[wrong])


def test_a_dry_run_says_what_would_be_written(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    options = ["q4_k_m", "--tensor-type", "ffn_down=q8_0"]
    assert main([str(path), *options, "--dry-run"]) == 0
    table, said = capsys.readouterr()
    assert not list(tmp_path.iterdir())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert main([str(path), str(out), *options]) == 0
    assert {name: to.lower() for name, _, _, to, _ in rows} == formats_of(out)
    real = capsys.readouterr().err
    bits = r"([\d.]+ bits a weight \(.*?\))"
    assert re.search(bits, said)[1] == re.search(bits, real)[1]  # type: ignore[index]
    planned = quantization.plan(path, "q4_k_m", tensor_types=[("ffn_down", "q8_0")])
    assert 0 < out.stat().st_size - planned.n_bytes < 60_000, "the metadata"
    assert main([str(path), "q4_0"]) == 2
    assert "no OUT given" in capsys.readouterr().err
    assert main([str(out), "q4_0", "--dry-run"]) == 2
    assert "quantized already" in capsys.readouterr().err


def split_model(folder: Path, path: Path, n: int) -> Path:
    """The same model in n files, by the reference writer."""
    file = gguf.GGUFReader(path)
    most = -(-len(file.tensors) // n)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=most)
    for name, field in file.fields.items():
        if name[:4] != "GGUF" and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in file.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / f"m-00001-of-{n:05}.gguf"


def test_a_set_stays_a_set(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, out = split_model(tmp_path, path, 3), tmp_path / "out"
    out.mkdir()
    whole = tinyllm.quantize(first, out / "whole.gguf", "q4_0")
    assert main([str(first), str(out / "set.gguf"), "q4_0", "--keep-split"]) == 0
    names = [f"set-{i}-of-00003.gguf" for i in ("00001", "00002", "00003")]
    assert sorted(p.name for p in out.iterdir()) == [*names, "whole.gguf"]
    assert f"{names[0]}: " in capsys.readouterr().err
    parts = [gguf.GGUFReader(out / name) for name in names]
    before = [gguf.GGUFReader(first.with_name(n.replace("set", "m"))) for n in names]
    assert [[t.name for t in part.tensors] for part in parts] == [
        [t.name for t in part.tensors] for part in before
    ]
    for i, part in enumerate(parts):
        kinds = {key: part.fields[f"split.{key}"] for key in ("no", "count", "tensors.count")}
        assert [field.contents() for field in kinds.values()] == [i, 3, sum(whole.formats.values())]
        assert [field.types[0].name for field in kinds.values()] == ["UINT16", "UINT16", "INT32"]
    ids = random_ids(CONFIG, 1, 20)
    with tinyllm.load(out / names[0]) as a, tinyllm.load(out / "whole.gguf") as b:
        np.testing.assert_array_equal(a.logits(ids), b.logits(ids))
    with pytest.raises(ArgumentError, match="keep_split is for a GGUF in several files"):
        tinyllm.quantize(path, out / "x.gguf", "q4_0", keep_split=True)
    with pytest.raises(ArgumentError, match="is the model itself"):
        tinyllm.quantize(first, tmp_path / "m.gguf", "q4_0", keep_split=True)
    assert sorted(p.name for p in out.iterdir()) == [*names, "whole.gguf"]


def test_a_set_appears_when_all_of_it_is_written(path: Path, tmp_path: Path) -> None:
    first, out = split_model(tmp_path, path, 2), tmp_path / "out"
    out.mkdir()

    def interrupted(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tinyllm.quantize(first, out / "m.gguf", "q8_0", keep_split=True, progress=interrupted)
    assert not list(out.iterdir())


def test_a_copy_changes_nothing(path: Path, tmp_path: Path) -> None:
    """Of a set it makes one file, of a directory a GGUF of the same floats with norms in F32."""
    quantized, out = tmp_path / "q.gguf", tmp_path / "copy.gguf"
    tinyllm.quantize(path, quantized, "q3_k_m")
    done = tinyllm.quantize(split_model(tmp_path, quantized, 3), out, "COPY")
    before, after = gguf.GGUFReader(quantized), gguf.GGUFReader(out)
    assert done.fallbacks == {}
    for a, b in zip(before.tensors, after.tensors, strict=True):
        assert (a.name, a.tensor_type) == (b.name, b.tensor_type)
        np.testing.assert_array_equal(a.data, b.data)
    assert read_gguf(out).metadata["general.file_type"] == 12
    spec = golden_spec("llama2")
    folder = write_hf_directory(tmp_path / "hf", spec.config, random_weights(spec.config, 1), dtype="BF16")
    tinyllm.quantize(folder, out, "copy")
    found = formats_of(out)
    assert {found[name] for name in found if "norm" in name} == {"f32"}
    assert {found[name] for name in found if "norm" not in name} == {"bf16"}
    assert read_gguf(out).metadata["general.file_type"] == 32
    with pytest.raises(ArgumentError, match="a copy changes no type"):
        tinyllm.quantize(path, out, "copy", pure=True)


def test_what_fell_back_and_what_grew_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of 160 fit no block of 256, rows of 80 none of 32 either, as the file itself shows."""
    config = CONFIG | {"hidden_size": 160, "intermediate_size": 80, "num_attention_heads": 4}
    path, out = tmp_path / "plain.gguf", tmp_path / "out.gguf"
    write_gguf(path, config, random_weights(config, seed=3), format="F16")
    done = tinyllm.quantize(path, out, "q4_k_m")
    got = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    matrices = {name for name, tensor in read_gguf(path).tensors.items() if len(tensor.shape) > 1}
    assert set(done.fallbacks) == matrices
    assert {name: found for name, (_, found) in done.fallbacks.items()} == {
        name: got[name] for name in matrices
    }
    assert done.fallbacks["blk.0.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert done.fallbacks["blk.2.attn_v.weight"] == ("Q6_K", "Q8_0")
    assert done.fallbacks["blk.2.ffn_down.weight"] == ("Q6_K", "F16")
    assert (done.source_bytes, done.n_bytes) == (path.stat().st_size, out.stat().st_size)

    assert main([str(path), str(out), "q4_k_m"]) == 0
    lines = capsys.readouterr().err.splitlines()
    counts = [(pair, list(done.fallbacks.values()).count(pair)) for pair in set(done.fallbacks.values())]
    assert lines[1] == f"{len(matrices)} of {len(got)} tensors got another type than theirs:"
    told = {(m[3], m[2]): 0 for m in map(FALLBACK.fullmatch, lines[2:]) if m}
    for line in lines[2:]:
        match = FALLBACK.fullmatch(line)
        assert match, line
        told[match[3], match[2]] += int(match[1] or 1)
    assert told == dict(counts)
    assert "  blk.*.attn_v.weight (2 of them): Q5_0 instead of Q4_K, as rows of 160 " in " ".join(lines)
    assert main([str(path), str(out), "f32"]) == 0
    *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"the file is larger than the [0-9.]+ [kM]B that it was made of", last)
    assert main([str(path), str(out), "q8_0"]) == 0
    assert "larger" not in capsys.readouterr().err


def test_what_is_no_file_is_not_replaced(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe stands for devices. What would be written there is said before a model is measured."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert main([str(path), "pipe", "q4_0"]) == 1
    assert perplexity([str(path), "no-text", "--imatrix", "pipe"]) == 1
    assert main([str(path), "-", "q4_0"]) == perplexity([str(path), "-", "--imatrix", "-"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert ["pipe: is no regular file" in line for line in said] == [True, True, False, False]
    assert ["a file is written, not a pipe" in line for line in said] == [False, False, True, True]
    assert Path("pipe").is_fifo()
    assert os.listdir() == ["pipe"]


def test_no_room_is_said_before_any_work(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(errors.WriteError, match=r"no room: 0\.\d+ MB are needed, 1\.00 kB were free"):
        tinyllm.quantize(path, tmp_path / "x.gguf", "q4_0")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tinyllm-test", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_that_is_too_small(path: Path, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(1 << 20))
    with pytest.raises(errors.WriteError, match=r"no room: 1\.\d+ MB are needed, 0\.5\d MB were free"):
        tinyllm.quantize(path, small_disk / "x.gguf", "q8_0")
    assert os.listdir(small_disk) == ["other"]


def test_a_real_disk_that_fills_up_meanwhile(path: Path, small_disk: Path) -> None:
    """Somebody else takes the room while the file is written; the name keeps what it had."""
    (small_disk / "x.gguf").write_bytes(b"before")

    def others(done: int, total: int) -> None:
        with (small_disk / "other").open("ab") as file:
            file.write(bytes(total // 4))

    with pytest.raises(errors.WriteError, match=r"x\.gguf: no room: .* Nothing is left of it; make room"):
        tinyllm.quantize(path, small_disk / "x.gguf", "q8_0", progress=others)
    assert (small_disk / "x.gguf").read_bytes() == b"before"
    assert sorted(os.listdir(small_disk)) == ["other", "x.gguf"]


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"before")

    def full() -> Any:
        yield bytes(64)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(errors.WriteError, match="no room"):
        gguf_writer.write_gguf(target, {}, [OutTensor("t", (32,), 0, full)])
    assert target.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_a_size_limit_is_a_clear_error(path: Path, tmp_path: Path) -> None:
    """The kernel refuses in the middle of the file."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "tinyllm.cli.quantize", str(path), str(tmp_path / "x.gguf"), "q8_0"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("tinyllm-quantize: ")
    assert "x.gguf: cannot be written: File too large" in done.stderr
    assert os.listdir(tmp_path) == []


def test_interrupting_leaves_nothing(path: Path, tmp_path: Path) -> None:
    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tinyllm.quantize(path, tmp_path / "x.gguf", "q4_0", progress=interrupted)
    assert os.listdir(tmp_path) == []


def test_ctrl_c(tmp_path: Path) -> None:
    """The process, stopped while it writes."""
    script = (
        "import sys, time, tinyllm.cli.quantize as q, tinyllm.quantization as z\n"
        "write = z.write_set\n"
        "def slow(*a, progress, **k):\n"
        "    return write(*a, progress=lambda d, t: (print(flush=True), time.sleep(60)), **k)\n"
        "z.write_set = slow\n"
        f"sys.exit(q.main(['stories', {str(tmp_path / 'x.gguf')!r}, 'q4_0', '--allow-requantize']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's & ignores it
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr == "tinyllm-quantize: interrupted\n"
    assert os.listdir(tmp_path) == []


def test_help_lists_the_types(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text or f"  {name}, " in text for name in mixes.MIXES)
    assert all(f"{key}, {name} " in text for name, key in mixes.ALIASES.items())


# Other tools


LLAMA_CPP_DIFFERS = LLAMA_CPP_DIFFERS | {
    "mistral_window": "llama.cpp knows no window of Mistral's",
}


# Four heads share a value; rows that fit no block of 256; attention in one tensor; eight experts.
OF_MIXES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 17, "num_key_value_heads": 1, "intermediate_size": 256},
    "narrow": {"hidden_size": 288, "head_dim": 64},
    "phi3": {"model_type": "phi3", "num_hidden_layers": 17, "intermediate_size": 256},
    "phi4": {"model_type": "phi3", "num_key_value_heads": 1, "intermediate_size": 256},
    "mixtral": {"model_type": "mixtral", "intermediate_size": 256, "num_local_experts": 8,
                "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", [*OF_MIXES, *(f"{name} with an imatrix" for name in OF_MIXES)])
def test_llama_cpp_gives_each_tensor_the_same_format(name: str, tmp_path: Path) -> None:
    """Its own quantizer, asked for every type."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    config = CONFIG | {"vocab_size": 300} | OF_MIXES[name.split()[0]]
    path, out = tmp_path / "model.gguf", tmp_path / "out.gguf"
    write_gguf(path, config, random_weights(config, 0), tokenizer=small_tokenizer(300))
    found = {tensor.name: tuple(tensor.shape) for tensor in read_gguf(path).tensors.values()}
    options = llama_cpp.llama_model_quantize_default_params()
    if "imatrix" in name:
        kind = llama_cpp.llama_model_imatrix_data
        matrices = {name: shape for name, shape in found.items() if len(shape) > 1}
        entries = (kind * (len(matrices) + 1))()
        for i, (matrix, shape) in enumerate(matrices.items()):
            n = int(np.prod(shape)) // shape[-2]
            entries[i] = kind(matrix.encode(), (ctypes.c_float * n)(*[1.0] * n), n)
        options.imatrix = ctypes.cast(entries, ctypes.POINTER(kind))
    for type, mix in mixes.MIXES.items():
        if type == "mxfp4" and "num_local_experts" not in config:
            continue  # llama.cpp makes everything Q8_0
        if type == "nvfp4" or (needs_imatrix(type) and "imatrix" not in name):
            continue  # it does not write that
        if type == "q1_0" and name.startswith("narrow"):
            continue  # for rows that fit no block it has nothing else
        options.ftype = mix.file_type
        done = llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(options))
        assert done == 0
        theirs = formats_of(out)
        ours = mixes.tensor_formats(found, type, imatrix="imatrix" in name)
        assert {n: FORMATS[format].name.lower() for n, format in ours.items()} == theirs, type
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_llama_cpp_reads_what_becomes_of_directories(spec: Any, tmp_path: Path) -> None:
    """Of each family: it loads, and the logits of a whole prompt are those that we compute."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if spec.name in LLAMA_CPP_DIFFERS:
        pytest.skip(LLAMA_CPP_DIFFERS[spec.name])
    config = {**spec.config, "vocab_size": 300}
    folder = write_hf_directory(tmp_path / "hf", config, random_weights(config, spec.seed))
    bytes_tokenizer(folder)
    path = tmp_path / "out.gguf"
    tinyllm.quantize(folder, path, "f32")
    ids = random_ids(config, spec.seed, spec.n_tokens)
    f32 = llama_cpp.GGML_TYPE_F32
    theirs = llama_cpp.Llama(
        str(path), n_ctx=spec.context or spec.n_tokens, n_batch=512, logits_all=True, type_k=f32, type_v=f32,
        verbose=False,
    )  # fmt: skip
    theirs.eval(ids)
    with tinyllm.load(path, device="cpu", cache_type="f32", context=spec.context) as llm:
        ours = llm.logits(ids)
        assert theirs.tokenize(b"Once upon", add_bos=False) == llm.tokenizer.encode("Once upon", bos=False)
    expected = np.array(theirs.scores[: len(ids)])
    tolerance = LLAMA_CPP_TOLERANCE[config.get("hidden_activation")]
    assert np.abs(ours - expected).max() < tolerance * np.abs(expected).max()


def perplexity_there(llama_cpp: Any, path: Path, ids: list[int]) -> float:
    """Of llama.cpp, its logarithm: nats a token."""
    theirs = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    theirs.eval(ids)
    logits = np.array(theirs.scores[: len(ids)], np.float64)
    logits -= logits.max(1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -float(np.mean([logprobs[i, ids[i + 1]] for i in range(len(ids) - 1)]))


@pytest.mark.parametrize("type", list(mixes.MIXES))
def test_llama_cpp_reads_every_type(type: str, tmp_path: Path) -> None:
    """Both round activations, each in its own way (bf16 as well, there), hence the tolerance: 0.02 nats."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    out = tmp_path / "out.gguf"
    tinyllm.quantize(MASTER, out, type, imatrix=even_imatrix(MASTER) if needs_imatrix(type) else None)
    with tinyllm.load(out) as llm:
        ids = llm.tokenizer.encode(
            "Once upon a time, there was a little girl named Lily. She loved to play outside with her dog."
        )
        most = 1e-3 if type in ("f32", "f16") else 0.02
        assert abs(perplexity_there(llama_cpp, out, ids) - np.log(llm.score(ids).perplexity)) < most


def test_llama_cpp_gives_the_same_perplexity(data_dir: Path, tmp_path: Path) -> None:
    """Of a directory: its tokenizer too."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = data_dir / "models" / "stories260K-hf"
    for type, most in (("f32", 1e-3), ("q8_0", 0.02), ("q4_0", 0.02), ("q5_1", 0.02)):
        out = tmp_path / f"{type}.gguf"
        tinyllm.quantize(folder, out, type)
        theirs = llama_cpp.Llama(str(out), n_ctx=256, vocab_only=True, verbose=False)
        with tinyllm.load(out) as llm:
            ids = llm.tokenizer.encode(
                "Once upon a time, there was a little girl named Lily. She loved to play outside."
            )
            assert theirs.tokenize(b"Once upon a time", add_bos=True) == llm.tokenizer.encode(
                "Once upon a time"
            )
            score = perplexity_there(llama_cpp, out, ids)
            assert abs(score - np.log(llm.score(ids).perplexity)) < most, type


def poisoned(path: Path, tensor: str, raw: bytes) -> Path:
    """A copy of a GGUF file in which a tensor begins with other bytes."""
    info, data = read_gguf(path).tensors[tensor], bytearray(path.read_bytes())
    data[info.offset : info.offset + len(raw)] = raw
    copy = path.with_name("poisoned.gguf")
    copy.write_bytes(data)
    return copy


def test_what_is_copied_is_looked_at_as_well(tmp_path: Path) -> None:
    """A norm, and the scale of a block that stays or is rounded anew."""
    plain, q8_0, mxfp4 = (tmp_path / f"{name}.gguf" for name in ("plain", "q8_0", "mxfp4"))
    write_gguf(plain, CONFIG, random_weights(CONFIG, seed=3))
    tinyllm.quantize(plain, q8_0, "q8_0")
    tinyllm.quantize(plain, mxfp4, "mxfp4")
    cases = [
        (plain, "output_norm.weight", struct.pack("<f", np.nan), "q8_0"),
        (mxfp4, "blk.0.ffn_up.weight", b"\xff", "mxfp4"),
        (q8_0, "blk.0.ffn_up.weight", struct.pack("<e", np.nan), "q8_0"),
        (q8_0, "blk.0.ffn_up.weight", struct.pack("<e", np.inf), "q4_0"),
        (q8_0, "blk.0.ffn_up.weight", struct.pack("<e", np.nan), "f32"),
    ]
    for path, tensor, raw, type in cases:
        model = poisoned(path, tensor, raw)
        with pytest.raises(errors.FormatError, match=f"tensor '{re.escape(tensor)}' holds a NaN, an inf"):
            tinyllm.quantize(model, tmp_path / "out.gguf", type, allow_requantize=True)
    assert sorted(os.listdir(tmp_path)) == ["mxfp4.gguf", "plain.gguf", "poisoned.gguf", "q8_0.gguf"]


@pytest.mark.parametrize("base", sorted({mix.base for mix in mixes.MIXES.values()}))
def test_numbers_that_a_format_does_not_hold(base: str, tmp_path: Path) -> None:
    """They are refused, with the tensor's name, and show in what is computed where loading quantizes."""
    type = next(name for name, mix in mixes.MIXES.items() if mix.base == base)
    config = {**CONFIG, "num_hidden_layers": 1, "vocab_size": 32}
    weights = random_weights(config, seed=3)
    name = "blk.0.ffn_up.weight"
    write_gguf(tmp_path / "plain.gguf", config, weights)
    imatrix = even_imatrix(tmp_path / "plain.gguf") if needs_imatrix(type) else None
    for number in (np.nan, -np.inf, 1e10, -1e30):
        model = poisoned(tmp_path / "plain.gguf", name, struct.pack("<f", number))
        out = tmp_path / "out.gguf"
        if np.isfinite(number) and base in ("f32", "bf16", "mxfp4"):
            tinyllm.quantize(model, out, type)
            tensor = next(t for t in gguf.GGUFReader(out).tensors if t.name == name)
            assert tensor.tensor_type.name.lower() == base
            held = gguf.quants.dequantize(tensor.data, tensor.tensor_type)[0, 0]
            assert abs(held / number - 1) < 0.3
            out.unlink()
            continue
        with pytest.raises(
            errors.FormatError, match=f"'{re.escape(name)}' holds .* too large for {base.upper()}"
        ):
            tinyllm.quantize(model, out, type, imatrix=imatrix)
        if imatrix:  # none is there while loading
            continue
        with tinyllm.load(model, weights=type) as llm, pytest.raises(errors.FormatError, match="NaN or inf"):
            llm.logits([1, 2, 3])
    assert sorted(os.listdir(tmp_path)) == ["plain.gguf", "poisoned.gguf"]
