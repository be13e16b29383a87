"""The table of tensor names: both sources map to the same weights, and every mismatch is reported at once."""

from __future__ import annotations

import json
import logging
import re
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import reference
from helpers_gguf import rewritten, write_gguf
from helpers_models import (
    F32,
    Spec,
    golden_spec,
    golden_specs,
    random_ids,
    random_weights,
    write_hf_directory,
    write_safetensors,
)

import tinyllm
from tinyllm.config import ModelConfig, config_from_gguf, config_from_json
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import BF16, FORMATS, TensorInfo, read_json
from tinyllm.files.gguf import read_gguf
from tinyllm.files.names import MAX_PROBLEMS, TABLE, Key, Source, Weights, half_split_order, map_tensors
from tinyllm.files.safetensors import read_safetensors
from tinyllm.modelfiles import read_model

CONFIG = ModelConfig(
    architecture="llama",
    n_layers=2,
    dim=24,
    n_heads=3,
    n_kv_heads=1,
    head_dim=10,
    ff_dim=40,
    vocab_size=50,
    context=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_dim=10,
    rope_factors=None,
    rope_scale=1.0,
    attention_scale=1.0,
    tied=False,
)
F64 = npt.NDArray[np.float64]
BOTH: list[Source] = ["gguf", "hf"]


def tensor(name: str, shape: tuple[int, ...], format: int = 0) -> TensorInfo:
    return TensorInfo(name, shape, format, Path("x"), 0, int(np.prod(shape)) * 4)


def make(config: ModelConfig, source: Source, *, biases: bool = False) -> dict[str, TensorInfo]:
    """A full set of tensors, named by hand from the two formats' conventions rather than from TABLE."""
    q, kv, dim, ff = (
        config.n_heads * config.head_dim,
        config.n_kv_heads * config.head_dim,
        config.dim,
        config.ff_dim,
    )
    linear = {
        ("attn_q", "self_attn.q_proj"): (q, dim),
        ("attn_k", "self_attn.k_proj"): (kv, dim),
        ("attn_v", "self_attn.v_proj"): (kv, dim),
        ("attn_output", "self_attn.o_proj"): (dim, q),
        ("ffn_gate", "mlp.gate_proj"): (ff, dim),
        ("ffn_up", "mlp.up_proj"): (ff, dim),
        ("ffn_down", "mlp.down_proj"): (dim, ff),
    }
    norms = {("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")}
    at = BOTH.index(source)
    shapes: dict[str, tuple[int, ...]] = {
        ("token_embd.weight", "model.embed_tokens.weight")[at]: (config.vocab_size, dim),
        ("output_norm.weight", "model.norm.weight")[at]: (dim,),
    }
    if not config.tied:
        shapes[("output.weight", "lm_head.weight")[at]] = (config.vocab_size, dim)
    for layer in range(config.n_layers):
        prefix = (f"blk.{layer}.", f"model.layers.{layer}.")[at]
        shapes.update({f"{prefix}{norm[at]}.weight": (dim,) for norm in norms})
        shapes.update({f"{prefix}{names[at]}.weight": shape for names, shape in linear.items()})
        if biases:
            shapes.update({f"{prefix}{names[at]}.bias": shape[:1] for names, shape in linear.items()})
    return {name: tensor(name, shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("source", BOTH)
@pytest.mark.parametrize("tied", [False, True])
def test_all_names(source: Source, tied: bool) -> None:
    config = replace(CONFIG, tied=tied)
    tensors = make(config, source)
    weights = map_tensors(tensors, config, source)
    assert {info.name for info in weights.values()} == set(tensors)
    assert len(weights) == len(tensors) == 9 * 2 + 3 - tied
    assert (("output", None) in weights) is not tied
    assert weights["wq", 1].shape == (30, 24)
    assert weights["w_down", 0].shape == (24, 40)
    assert weights.get(("bq", 0)) is None


@pytest.mark.parametrize("source", BOTH)
def test_biases(source: Source) -> None:
    tensors = make(CONFIG, source, biases=True)
    weights = map_tensors(tensors, CONFIG, source)
    assert len(weights) == len(tensors)
    assert weights["bk", 1].shape == (10,)
    assert weights["b_gate", 0].shape == (40,)
    name = ("blk.1.attn_output.bias", "model.layers.1.self_attn.o_proj.bias")[BOTH.index(source)]
    del tensors[name]
    with pytest.raises(FormatError, match=f"{name} is missing, expected with shape \\(24,\\)"):
        map_tensors(tensors, CONFIG, source)


def test_biases_as_the_config_has_them() -> None:
    with_biases, without = make(CONFIG, "hf", biases=True), make(CONFIG, "hf")
    needed = replace(CONFIG, attention_bias=True, ffn_bias=True)
    refused = replace(CONFIG, attention_bias=False, ffn_bias=False)
    assert len(map_tensors(with_biases, needed, "hf")) == len(with_biases)
    assert len(map_tensors(without, refused, "hf")) == len(without)
    with pytest.raises(FormatError, match=r"q_proj\.bias is missing"):
        map_tensors(without, needed, "hf")
    with pytest.raises(FormatError, match=r"q_proj\.bias' of shape \(30,\) is not expected"):
        map_tensors(with_biases, refused, "hf")


@pytest.mark.parametrize("source", BOTH)
def test_each_tensor_matters(source: Source) -> None:
    tensors = make(CONFIG, source)
    for name, info in tensors.items():
        with pytest.raises(FormatError, match=f"{name} is missing"):
            map_tensors({k: v for k, v in tensors.items() if k != name}, CONFIG, source)
        wrong = {**tensors, name: tensor(name, (*info.shape[:-1], info.shape[-1] + 1))}
        with pytest.raises(FormatError, match=f"{name} has shape .*, expected"):
            map_tensors(wrong, CONFIG, source)


def test_all_problems_in_one_error() -> None:
    tensors = make(CONFIG, "gguf")
    del tensors["output_norm.weight"]
    tensors["blk.1.attn_q.weight"] = tensor("blk.1.attn_q.weight", (24, 30))
    tensors["blk.0.attn_norm.weight"] = tensor("blk.0.attn_norm.weight", (24,), 8)
    tensors["blk.2.attn_q.weight"] = tensor("blk.2.attn_q.weight", (30, 24))
    tensors["bad\n\ud800"] = tensor("bad\n\ud800", (1,))
    with pytest.raises(FormatError) as caught:
        map_tensors(tensors, CONFIG, "gguf")
    assert str(caught.value).split("\n  ") == [
        "the tensors do not fit the config (llama, 2 layers):",
        "output_norm.weight is missing, expected with shape (24,)",
        "blk.0.attn_norm.weight is Q8_0; a norm or bias must be F32, F16 or BF16",
        "blk.1.attn_q.weight has shape (24, 30), expected (30, 24)",
        r"'bad\n\ud800' of shape (1,) is not expected",
        "'blk.2.attn_q.weight' of shape (30, 24) is not expected",
    ]


def test_the_list_of_problems_is_bounded() -> None:
    config = replace(CONFIG, n_layers=1024)
    with pytest.raises(FormatError) as caught:
        map_tensors({}, config, "gguf")
    lines = str(caught.value).split("\n")
    assert len(lines) == MAX_PROBLEMS + 2
    assert lines[-1] == "  and more"


@pytest.mark.parametrize("source", ["gguf", "hf"])
def test_a_config_that_asks_for_a_hundred_thousand_tensors_costs_nothing(source: Source) -> None:
    architecture = {"gguf": "qwen3moe", "hf": "qwen3_moe"}[source]
    config = replace(
        CONFIG, architecture=architecture, n_layers=1024, n_experts=32, n_experts_used=1, qk_norm="head"
    )
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="and more"):
            map_tensors({}, config, source)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_harmless_extras() -> None:
    old = {
        name: tensor(name, (5,))
        for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    }
    assert len(map_tensors({**make(CONFIG, "hf"), **old}, CONFIG, "hf")) == 21
    freqs = {"rope_freqs.weight": tensor("rope_freqs.weight", (5,))}
    assert len(map_tensors({**make(CONFIG, "gguf"), **freqs}, CONFIG, "gguf")) == 21


def test_every_float_format_of_a_vector() -> None:
    for format in FORMATS:
        tensors = make(CONFIG, "gguf")
        tensors["output_norm.weight"] = tensor("output_norm.weight", (24,), format)
        if format in (0, 1, BF16):
            map_tensors(tensors, CONFIG, "gguf")
        else:
            with pytest.raises(FormatError, match="must be F32, F16 or BF16"):
                map_tensors(tensors, CONFIG, "gguf")


# Row order


def interleaved_rope(x: F64, angles: F64) -> F64:
    """RoPE as GGUF's Llama rows expect it: (2i, 2i + 1) are a pair. x [rows], angles [rope_dim / 2]."""
    out: F64 = x.copy()
    for i, a in enumerate(angles):
        u, v = x[2 * i], x[2 * i + 1]
        out[2 * i], out[2 * i + 1] = u * np.cos(a) - v * np.sin(a), u * np.sin(a) + v * np.cos(a)
    return out


def half_split_rope(x: F64, angles: F64) -> F64:
    """RoPE as the model does it: (i, i + rope_dim / 2) are a pair."""
    out: F64 = x.copy()
    half = len(angles)
    u, v = x[:half], x[half : 2 * half]
    out[:half], out[half : 2 * half] = (
        u * np.cos(angles) - v * np.sin(angles),
        u * np.sin(angles) + v * np.cos(angles),
    )
    return out


@pytest.mark.parametrize("rope_dim", [10, 6, 2])
def test_row_order_keeps_the_scores(rope_dim: int) -> None:
    """Rotating reordered rows in half-split order is the reordering of rows rotated pair by pair."""
    config = replace(CONFIG, rope_dim=rope_dim)
    order = half_split_order(config, 3)
    assert order.dtype == np.int32
    assert sorted(order) == list(range(30))
    rng = np.random.default_rng(0)
    x, angles = rng.standard_normal((3, 10)), rng.standard_normal(rope_dim // 2)
    rotated = np.stack([interleaved_rope(head, angles) for head in x]).ravel()[order]
    reordered = x.ravel()[order].reshape(3, 10)
    assert np.array_equal(np.stack([half_split_rope(head, angles) for head in reordered]).ravel(), rotated)


def test_row_orders_of_weights() -> None:
    weights = map_tensors(make(CONFIG, "gguf", biases=True), CONFIG, "gguf")
    reordered = {row.canonical for row in TABLE if weights.row_order(row.canonical) is not None}
    assert reordered == {"wq", "wk", "bq", "bk"}
    q, k = weights.row_order("wq"), weights.row_order("wk")
    assert q is not None
    assert k is not None
    assert k.tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    assert q.tolist() == [head * 10 + row for head in range(3) for row in k.tolist()]
    assert all(
        map_tensors(make(CONFIG, "hf"), CONFIG, "hf").row_order(row.canonical) is None for row in TABLE
    )
    with pytest.raises(UnsupportedError, match="'qwen9'"):
        map_tensors(make(CONFIG, "gguf"), replace(CONFIG, architecture="qwen9"), "gguf")


def test_both_files_of_one_model_hold_the_same_weights(data_dir: Path) -> None:
    file = read_gguf(data_dir / "models/stories260K/stories260K.gguf")
    a = map_tensors(file.tensors, config_from_gguf(file.metadata, file.tensors), "gguf")
    directory = data_dir / "models/stories260K-hf"
    config = config_from_json(read_json(directory / "config.json"))
    b = map_tensors(read_safetensors(directory).tensors, config, "hf")

    def values(weights: Weights, key: Key) -> npt.NDArray[np.float32]:
        order = weights.row_order(key[0])
        rows = weights[key].read_f32()
        return rows if order is None else rows[order]

    assert a.keys() - b.keys() == {("output", None)}
    assert np.array_equal(values(a, ("output", None)), values(b, ("embedding", None)))
    assert not np.array_equal(a["wq", 0].read_f32(), b["wq", 0].read_f32())
    for key in b:
        assert np.array_equal(values(a, key), values(b, key)), key


# ---- an output matrix of its own beside tie_word_embeddings

UNTIED = golden_spec("llama3").config | {"tie_word_embeddings": False, "num_hidden_layers": 1}
TIED = UNTIED | {"tie_word_embeddings": True}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = random_ids(UNTIED, 5, 20)


def near(values: npt.NDArray[Any], expected: npt.NDArray[Any]) -> bool:
    """Within what float32 models are promised, 1e-4 of the largest logit."""
    return float(np.abs(values - expected).max()) < 1e-4 * float(np.abs(expected).max())


def test_a_head_of_its_own_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As transformers 5.24 does, whatever tie_word_embeddings says, and as a GGUF file of it holds it."""
    weights = random_weights(UNTIED, 3)
    expected = reference.logits(UNTIED, weights, IDS)
    directory = write_hf_directory(tmp_path / "hf", TIED, weights)
    with caplog.at_level(logging.WARNING), tinyllm.load(directory, device="cpu", cache_type="f32") as llm:
        assert not llm.config.tied
        assert near(llm.logits(IDS), expected)
        bits = llm.logits(IDS)
    [record] = caplog.records
    assert record.getMessage().startswith("config.json says tie_word_embeddings, but lm_head.weight differs")
    tinyllm.quantize(directory, tmp_path / "out.gguf", "f32")
    assert "output.weight" in read_gguf(tmp_path / "out.gguf").tensors
    with tinyllm.load(tmp_path / "out.gguf", device="cpu", cache_type="f32") as llm:
        np.testing.assert_array_equal(llm.logits(IDS), bits)


def test_one_number_makes_a_head_of_its_own(tmp_path: Path) -> None:
    """The last, so that all of both is looked at; of another format as well."""
    weights = random_weights(TIED, 3)
    head = weights[EMBEDDING].copy()
    head[-1, -1] += 1
    assert not read_model(write_hf_directory(tmp_path / "a", TIED, weights | {HEAD: head})).config.tied
    equal = write_hf_directory(tmp_path / "b", TIED, weights | {HEAD: weights[EMBEDDING]})
    files = read_model(equal)
    assert files.config.tied
    assert ("output", None) not in files.weights
    # Beside numbers that bfloat16 holds, a copy in it is no other matrix.
    for name, values in (("c", weights[EMBEDDING]), ("d", np.round(8 * weights[EMBEDDING]) / 8)):
        folder = write_hf_directory(tmp_path / name, TIED, weights | {EMBEDDING: values.astype(np.float32)})
        write_safetensors(folder / "head.safetensors", {HEAD: values.astype(np.float32)}, "BF16")
        index = dict.fromkeys(weights, "first.safetensors") | {HEAD: "head.safetensors"}
        (folder / "model.safetensors").rename(folder / "first.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        assert read_model(folder).config.tied is (name == "d")


def test_a_head_alone_is_the_embedding_too(tmp_path: Path) -> None:
    """What of two tied tensors some tools save; transformers ties either way."""
    weights = random_weights(TIED, 3)
    expected = reference.logits(TIED, weights, IDS)
    weights[HEAD] = weights.pop(EMBEDDING)
    with tinyllm.load(write_hf_directory(tmp_path, TIED, weights), device="cpu", cache_type="f32") as llm:
        assert near(llm.logits(IDS), expected)


# ---- names with more or fewer prefixes


def renamed(weights: Mapping[str, F32], rename: Callable[[str], str]) -> dict[str, F32]:
    return {rename(name): w for name, w in weights.items()}


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),  # as AutoModel saves it
        lambda name: f"model.{name}",
        lambda name: f"model.{name}" if name.startswith("model.") else name,
        lambda name: f"language_model.{name}",
        lambda name: f"model.language_model.{name}",
        lambda name: re.sub(r"^model\.", "language_model.", name),
    ],
    ids=["none", "doubled", "doubled but for the head", "wrapped", "wrapped twice", "replaced"],
)
def test_prefixes_of_names(rename: Callable[[str], str], tmp_path: Path) -> None:
    weights = random_weights(UNTIED, 3)
    with tinyllm.load(write_hf_directory(tmp_path / "plain", UNTIED, weights), device="cpu") as llm:
        expected = llm.logits(IDS)
    other = write_hf_directory(tmp_path / "other", UNTIED, renamed(weights, rename))
    with tinyllm.load(other, device="cpu") as llm:
        np.testing.assert_array_equal(llm.logits(IDS), expected)


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    weights = random_weights(UNTIED, 3)
    weights["norm.weight"] = weights["model.norm.weight"]
    with pytest.raises(FormatError, match=r"'norm\.weight' and 'model\.norm\.weight' both hold"):
        read_model(write_hf_directory(tmp_path, UNTIED, weights))


# ---- fused tensors of GGUF files, and factors beside matrices


def fuse(tensors: dict[str, Any], whole: str, parts: list[str], axis: int) -> bool:
    """Parts on top of each other, where they are there and of one type, as llama.cpp's converter has them."""
    if any(part not in tensors for part in parts) or len({tensors[part][1] for part in parts}) > 1:
        return False
    kind = tensors[parts[0]][1]
    tensors[whole] = np.concatenate([tensors.pop(part)[0] for part in parts], axis=axis), kind
    return True


FUSABLE = [spec for spec in golden_specs("families") if spec.in_gguf and spec.config["model_type"] != "phi3"]


@pytest.mark.parametrize("format", ["F32", "Q8_0"])
@pytest.mark.parametrize(
    "spec", [golden_spec("attention_bias"), golden_spec("llama3"), *FUSABLE], ids=lambda spec: spec.name
)
def test_fused_tensors_of_any_family(spec: Spec, format: str, tmp_path: Path) -> None:
    """Queries, keys and values, their biases, and gates with ups of experts: the same bits."""
    path = tmp_path / "model.gguf"
    write_gguf(path, spec.config, random_weights(spec.config, spec.seed), format=format)
    n_fused = {"qkv.weight": 0, "qkv.bias": 0, "gate_up_exps": 0}

    def change(tensors: dict[str, Any]) -> None:
        for layer in range(spec.config["num_hidden_layers"]):
            at = f"blk.{layer}."
            for kind in ("weight", "bias"):
                qkv = [f"{at}attn_{part}.{kind}" for part in "qkv"]
                n_fused[f"qkv.{kind}"] += fuse(tensors, f"{at}attn_qkv.{kind}", qkv, 0)
                experts = [f"{at}ffn_{part}_exps.{kind}" for part in ("gate", "up")]
                n_fused["gate_up_exps"] += fuse(tensors, f"{at}ffn_gate_up_exps.{kind}", experts, 1)

    fused = rewritten(path, change)
    n_layers = spec.config["num_hidden_layers"] - spec.config.get("layer_types", []).count("linear_attention")
    biased = spec.config.get("attention_bias") or spec.config.get("use_bias") or False
    has_bias = spec.config["model_type"] == "qwen2" or biased
    n_stacks = 1 + (spec.name == "gpt_oss") if spec.config.get("num_experts_per_tok") else 0
    assert list(n_fused.values()) == [n_layers, n_layers * has_bias, n_layers * n_stacks]
    ids = random_ids(spec.config, spec.seed, 40)
    with tinyllm.load(path, device="cpu") as a, tinyllm.load(fused, device="cpu") as b:
        np.testing.assert_array_equal(a.logits(ids), b.logits(ids))


@pytest.mark.parametrize("type", ["q2_k", "q4_k_m", "q8_0"])
@pytest.mark.parametrize("name", ["phi3", "qwen2", "mixtral"])
def test_fused_tensors_are_quantized_alike_in_memory_and_in_a_file(
    name: str, type: str, tmp_path: Path
) -> None:
    """phi3's are always fused. Its heads share no keys here, which the shape of the fused tensor says."""
    specs = {spec.name: spec for spec in (*golden_specs(), *golden_specs("families"))}
    spec = next(spec for key, spec in specs.items() if key.startswith(name))
    config = spec.config | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": None}
    config |= {"max_position_embeddings": 64, "head_dim": 64}
    config = {key: value for key, value in config.items() if key not in ("rope_scaling", "layer_types")}
    path = tmp_path / "model.gguf"
    write_gguf(path, config, random_weights(config, 5))

    def change(tensors: dict[str, Any]) -> None:
        fuse(tensors, "blk.0.attn_qkv.weight", [f"blk.0.attn_{part}.weight" for part in "qkv"], 0)
        fuse(tensors, "blk.0.attn_qkv.bias", [f"blk.0.attn_{part}.bias" for part in "qkv"], 0)
        experts = [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up")]
        fuse(tensors, "blk.0.ffn_gate_up_exps.weight", experts, 1)

    fused = rewritten(path, change)
    tinyllm.quantize(fused, tmp_path / "out.gguf", type)
    ids = random_ids(config, 5, 20)
    with tinyllm.load(fused, device="cpu", weights=type) as a, tinyllm.load(tmp_path / "out.gguf") as b:
        np.testing.assert_array_equal(a.logits(ids), b.logits(ids))


def test_factors_beside_matrices(tmp_path: Path) -> None:
    """What files with NVFP4 have beside their matrices, and keep when they are quantized again: NAME.scale
    multiplies what the matrix gives, NAME.input_scale nothing."""
    path = tmp_path / "model.gguf"
    write_gguf(path, UNTIED, random_weights(UNTIED, 3))

    def with_scale(name: str, *values: float) -> Path:
        return rewritten(
            path,
            lambda tensors: tensors.update(
                {name: (np.array(values, np.float32), gguf.GGMLQuantizationType.F32)}
            ),
        )

    def times(name: str, factor: float) -> Path:
        def change(tensors: dict[str, Any]) -> None:
            values, kind = tensors[name]
            tensors[name] = (values * np.float32(factor), kind)

        return rewritten(path, change)

    with tinyllm.load(path, device="cpu") as llm:
        expected = llm.logits(IDS)
    for name, value in (("blk.0.attn_q.scale", 1.0), ("blk.0.ffn_up.input_scale", 0.37)):
        with tinyllm.load(with_scale(name, value), device="cpu") as llm:
            np.testing.assert_array_equal(llm.logits(IDS), expected)
    # Powers of two change no digit, wherever they are multiplied in.
    for name in ("blk.0.attn_q", "blk.0.attn_v", "blk.0.attn_output", "blk.0.ffn_gate", "output"):
        with (
            tinyllm.load(with_scale(f"{name}.scale", 0.25), device="cpu") as a,
            tinyllm.load(times(f"{name}.weight", 0.25), device="cpu") as b,
        ):
            logits = a.logits(IDS)
            np.testing.assert_array_equal(logits, b.logits(IDS))
            assert not np.array_equal(logits, expected)
            if name == "blk.0.attn_output":
                np.testing.assert_array_equal(a.model.unpack("wo", 0), b.model.unpack("wo", 0))
    again = with_scale("blk.0.ffn_down.scale", 0.25)
    tinyllm.quantize(again, tmp_path / "again.gguf", "bf16")
    with (
        tinyllm.load(tmp_path / "again.gguf", device="cpu") as a,
        tinyllm.load(times("blk.0.ffn_down.weight", 0.25), device="cpu", weights="bf16") as b,
    ):
        np.testing.assert_array_equal(a.logits(IDS), b.logits(IDS))
    for values in ([0.5, 2.0], [1.0, 1.0, np.nan]):
        with pytest.raises(FormatError, match=r"'blk\.0\.attn_q\.scale' has \d numbers beside"):
            read_model(with_scale("blk.0.attn_q.scale", *values))
    for value in (0.0, np.inf, np.nan):
        with pytest.raises(FormatError, match=r"'blk\.0\.attn_q\.scale' holds a factor that is 0"):
            read_model(with_scale("blk.0.attn_q.scale", value))
    with pytest.raises(FormatError, match=r"'blk\.0\.nothing\.scale' of shape \(1,\) is not expected"):
        read_model(with_scale("blk.0.nothing.scale", 1.0))
