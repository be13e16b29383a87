"""Mixtures of experts as whole models: their tensors from both kinds of file, numbers that depend on nothing
else, what a token reads.

transformers' logits, llama.cpp's and the reference are in test_golden.py, test_families.py and
test_reference.py; which expert a token goes to, and that a batch reads an expert's weights once, in
tests/c/test_experts.c."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
from helpers_gguf import dequantize, quantize, write_gguf
from helpers_models import (
    F32,
    golden_spec,
    golden_specs,
    random_ids,
    random_weights,
    rounded,
    write_hf_directory,
)
from safetensors.numpy import save_file

import tinyllm
from tinyllm import backends
from tinyllm.config import config_from_gguf, config_from_json
from tinyllm.errors import ArgumentError, FormatError, MemoryLimitError, UnsupportedError
from tinyllm.files import FORMATS, FileReader, TensorInfo
from tinyllm.files.gguf import read_gguf
from tinyllm.files.names import map_tensors
from tinyllm.files.safetensors import read_safetensors
from tinyllm.measure.benchmark import read_facts
from tinyllm.modelfiles import read_model
from tinyllm.quantization.calibration import observe, write
from tinyllm.quantization.imatrix import read_imatrix

N_EXPERTS = 6
CONFIG: dict[str, Any] = {
    **golden_spec("mixtral").config,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": N_EXPERTS,
    "num_experts_per_tok": 3,
    "vocab_size": 105,
}
PROJECTIONS = {"w_gate": "w1", "w_up": "w3", "w_down": "w2"}


def hf_name(weight: str, expert: int, layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{PROJECTIONS[weight]}.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, F32]:
    return random_weights(CONFIG, seed=51)


@pytest.mark.parametrize("format", ["F32", "BF16", "Q8_0", "MXFP4"])
def test_every_expert_is_where_it_belongs(format: str, weights: dict[str, F32], tmp_path: Path) -> None:
    held = write_gguf(tmp_path / "model.gguf", CONFIG, weights, format=format)
    with tinyllm.load(tmp_path / "model.gguf", device="cpu") as llm:
        for layer in range(2):
            for weight in PROJECTIONS:
                for expert in range(N_EXPERTS):
                    unpacked = llm.model.unpack(f"{weight}.{expert}", layer)
                    np.testing.assert_array_equal(unpacked, held[hf_name(weight, expert, layer)])


def test_weights_may_be_quantized_while_loading_but_for_the_router(
    weights: dict[str, F32], tmp_path: Path
) -> None:
    """To the same bits as quantizing each matrix by itself."""
    directory = write_hf_directory(tmp_path, CONFIG, weights)
    with tinyllm.load(directory, device="cpu", weights="q8_0") as llm:
        for weight in PROJECTIONS:
            w = weights[hf_name(weight, 4, 1)]
            blocks = backends.convert(w.view(np.uint8), 0, backends.FORMAT_IDS["q8_0"], *w.shape)
            np.testing.assert_array_equal(llm.model.unpack(f"{weight}.4", 1), dequantize(blocks, "Q8_0"))
        router = weights["model.layers.1.block_sparse_moe.gate.weight"]
        np.testing.assert_array_equal(llm.model.unpack("router", 1), router)


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "MXFP4"])
def test_quantized_experts_equal_the_reference(format: str, weights: dict[str, F32], tmp_path: Path) -> None:
    """As test_golden.py has it for other models: two tokens a prompt, and three prompts in four free of an
    activation, or a pair of experts, that rounding puts on the other side."""
    held = write_gguf(tmp_path / "model.gguf", CONFIG, weights, format=format)
    quantized = {name for name in held if not name.endswith("block_sparse_moe.gate.weight")}
    errors = []
    with tinyllm.load(tmp_path / "model.gguf", device="cpu", cache_type="f32") as llm:
        for seed in range(32):
            ids = random_ids(CONFIG, seed, 2)
            expected = reference.logits(CONFIG, held, ids, quantized=quantized)
            errors.append(np.abs(llm.logits(ids) - expected).max() / np.abs(expected).max())
    assert np.quantile(errors, 0.75) < 1e-5


def test_a_token_reads_only_the_experts_it_uses(weights: dict[str, F32], tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", CONFIG, weights, format="Q8_0")
    expert = 3 * (64 * 96 // 32 * 34)  # bytes of gate, up and down; no panel is padded
    with tinyllm.load(tmp_path / "model.gguf", device="cpu") as llm:
        embedding = 112 * 64 // 32 * 34  # 105 rows in panels of 16
        unused = 2 * (N_EXPERTS - 3) * expert
        assert llm.model.token_bytes == llm.model.weight_bytes - embedding - unused
    facts = read_facts(str(tmp_path / "model.gguf"))
    attention, router = 2 * (64 * 64 + 64 * 32), 64 * N_EXPERTS
    assert facts.layer_macs == 2 * (attention + router + 3 * 3 * 64 * 96)


def test_inputs_of_experts_are_observed(weights: dict[str, F32], tmp_path: Path) -> None:
    """Of each expert those of the tokens that the router sends to it, whatever threads and calls, whether the
    weights are floats or not; and the file is in the form that llama.cpp has for stacks."""
    ids = random_ids(CONFIG, 5, 60)
    found: list[dict[str, bytes]] = []
    for format, threads, step in (("F32", 1, 60), ("F32", 3, 7), ("Q8_0", 1, 60), ("Q8_0", 2, 1)):
        path = tmp_path / f"{format}.gguf"
        write_gguf(path, CONFIG, weights, format=format)
        with tinyllm.load(path, device="cpu", threads=threads) as llm, llm.session() as session:
            seen = observe(llm)
            for first in range(0, len(ids), step):
                session.append(ids[first : first + step])
        layers = {name: np.stack(sums) for name, sums in seen.items() if name.startswith("blk")}
        found.append({name: sums.tobytes() for name, sums in layers.items()})
        gate, up, down = (layers[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        assert gate.shape == (N_EXPERTS, 64 + 1)
        assert down.shape == (N_EXPERTS, 96 + 1)
        assert gate[:, -1].tolist() == down[:, -1].tolist()
        assert gate[:, -1].sum() == 3 * len(ids)
        np.testing.assert_array_equal(gate, up)
    assert found[0] == found[1]
    assert found[2] == found[3]
    write(tmp_path / "imatrix.gguf", seen, texts=["a"], n_windows=1, n_ctx=60)
    known = read_imatrix(tmp_path / "imatrix.gguf")
    np.testing.assert_array_equal(known.counts["blk.1.ffn_down_exps.weight"], down[:, -1])
    np.testing.assert_array_equal(known.sums["blk.1.ffn_down_exps.weight"], down[:, :-1].astype(np.float32))


# ---- files


def test_both_files_name_the_same_weights(weights: dict[str, F32], tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", CONFIG, weights)
    a = read_model(tmp_path / "model.gguf")
    b = read_model(write_hf_directory(tmp_path / "hf", CONFIG, weights))
    assert a.weights.keys() == b.weights.keys()
    same = {
        "architecture": "",
        "attention_bias": None,
        "output_bias": None,
        "ffn_bias": None,
        "norm_eps": 1.0,
    }
    assert replace(a.config, **same) == replace(b.config, **same)
    assert (a.config.n_experts, a.config.n_experts_used, a.config.norm_topk_prob) == (6, 3, True)
    for key, tensor in a.weights.items():
        if "." in key[0] or key[0] == "router":
            np.testing.assert_array_equal(tensor.read_f32(), b.weights[key].read_f32(), str(key))


def test_missing_and_misshapen_experts_are_named(weights: dict[str, F32], tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", CONFIG, weights)
    file = read_gguf(tmp_path / "model.gguf")
    config = config_from_gguf(file.metadata, file.tensors)
    stack = "blk.1.ffn_up_exps.weight"
    tensors = {name: t for name, t in file.tensors.items() if name != stack}
    with pytest.raises(FormatError, match=rf"{stack} is missing, expected with shape \(6, 96, 64\)"):
        map_tensors(tensors, config, "gguf")
    with pytest.raises(FormatError, match=rf"{stack} has shape \(6, 96, 64\), expected \(7, 96, 64\)"):
        map_tensors(file.tensors, replace(config, n_experts=7), "gguf")
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_gate\.weight is missing"):
        map_tensors(file.tensors, replace(config, n_experts=0, n_experts_used=0), "gguf")
    directory = write_hf_directory(tmp_path / "hf", CONFIG, weights)
    tensors = read_safetensors(directory).tensors
    del tensors[hf_name("w_down", 4, 1)]
    with pytest.raises(FormatError, match=r"1\.block_sparse_moe\.experts\.4\.w2\.weight is missing"):
        map_tensors(tensors, config_from_json(CONFIG), "hf")


def test_configs_of_experts() -> None:
    def read(**changes: Any) -> tuple[int, int, bool]:
        config = config_from_json({**CONFIG, **changes})
        return config.n_experts, config.n_experts_used, config.norm_topk_prob

    assert read() == (6, 3, True)
    assert read(num_local_experts=None, num_experts=7) == (7, 3, True)
    defaults = {k: v for k, v in CONFIG.items() if "experts" not in k and k != "rope_theta"}
    with pytest.raises(FormatError, match="num_experts is missing"):
        config_from_json({**defaults, "num_experts_per_tok": 2})
    for wrong in ({"num_experts_per_tok": 7}, {"num_experts_per_tok": 0}, {"num_local_experts": 1 << 20}):
        with pytest.raises(FormatError, match=r"experts used of .*; a model has up to 4096"):
            read(**wrong)
    with pytest.raises(UnsupportedError, match="'num_local_experts' is set"):
        config_from_json({**CONFIG, "model_type": "llama"})
    qwen = next(s.config for s in golden_specs("families") if s.name == "qwen3_moe")
    assert config_from_json(qwen).norm_topk_prob
    assert not config_from_json({k: v for k, v in qwen.items() if k != "norm_topk_prob"}).norm_topk_prob
    for key, value in {"decoder_sparse_step": 2, "mlp_only_layers": [0]}.items():
        with pytest.raises(UnsupportedError, match="dense layers between layers of experts"):
            config_from_json({**qwen, key: value})


# ---- numbers


def logits_in_pieces(llm: tinyllm.LLM, ids: list[int], cuts: list[int]) -> npt.NDArray[np.float32]:
    """The prompt's logits, computed in calls that end at `cuts`, beside another sequence of the same
    tokens."""
    pool = llm.model.cache("f16", 4)
    pool.grow(4)
    rows = []
    for first, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        n = end - first
        both = llm.model.forward(
            (ids[first:end] * 2),
            [*range(first, end)] * 2,
            [0] * n + [1] * n,
            np.arange(4, dtype=np.int32).reshape(2, 2),
            cache=pool,
        )
        np.testing.assert_array_equal(both[:n], both[n:])
        rows.append(both[:n])
    pool.close()
    return np.concatenate(rows)


@pytest.mark.parametrize("format", ["F32", "Q8_0", "Q4_0"])
def test_bits_depend_on_nothing_else(format: str, weights: dict[str, F32], tmp_path: Path) -> None:
    """Neither on threads, nor on instruction sets, nor on which other tokens share an expert's call."""
    write_gguf(tmp_path / "model.gguf", CONFIG, weights, format=format)
    ids = random_ids(CONFIG, 2, 100)
    before = backends.info()["isa"]
    with tinyllm.load(tmp_path / "model.gguf", device="cpu", threads=1) as llm:
        expected = llm.logits(ids)
        assert expected.std() > 0.3
        try:
            for isa in backends.info()["isa_usable"]:
                backends.select_isa(isa)
                for threads in (1, 2, 3, 7):
                    llm.model.threads = threads
                    for cuts in ([], [1, 2, 60, 61], [37, 99]):
                        np.testing.assert_array_equal(logits_in_pieces(llm, ids, cuts), expected)
        finally:
            backends.select_isa(before)


# ---- gpt-oss: stacks of MXFP4 in two parts, gate and up row by row

OSS = next(spec for spec in golden_specs("families") if spec.name == "gpt_oss")


def blocks_and_scales(w: F32) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], F32]:
    """A matrix [rows, k] as safetensors hold it, uint8 [rows, k / 32, 16] and [rows, k / 32], and the numbers
    that it then holds. Byte i of a block has number 2i in its low half and 2i + 1 in its high one; GGUF has i
    and i + 16."""
    stored = quantize(w, "MXFP4")
    blocks = stored.reshape(len(w), -1, 17)
    codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
    return codes[..., 0::2] | codes[..., 1::2] << 4, blocks[..., 0].copy(), dequantize(stored, "MXFP4")


@pytest.fixture(scope="module")
def oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, F32]]:
    """The golden model as a directory with experts in MXFP4 and the rest in float32; the same as GGUF; and
    the numbers of every expert's matrices by (weight, expert, layer) as unpack names them."""
    folder = tmp_path_factory.mktemp("oss")
    weights = random_weights(OSS.config, OSS.seed)
    files: dict[str, npt.NDArray[Any]] = {}
    held: dict[str, F32] = {}
    for name, w in weights.items():
        if w.ndim != 3:
            files[name] = w
            continue
        parts = [blocks_and_scales(np.ascontiguousarray(expert.T)) for expert in w]
        files[name + "_blocks"] = np.stack([blocks for blocks, _, _ in parts])
        files[name + "_scales"] = np.stack([scales for _, scales, _ in parts])
        layer = name.split(".")[2]
        for i, (_, _, values) in enumerate(parts):
            if "gate_up" in name:
                held[f"w_gate.{i} {layer}"], held[f"w_up.{i} {layer}"] = values[0::2], values[1::2]
            else:
                held[f"w_down.{i} {layer}"] = values
    directory = folder / "hf"
    directory.mkdir()
    config = {**OSS.config, "quantization_config": {"quant_method": "mxfp4"}}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # Blocks and scales in different shards.
    shards = {"a": {}, "b": {}}  # type: dict[str, dict[str, npt.NDArray[Any]]]
    for name, values in files.items():
        shards["b" if name.endswith("_scales") else "a"][name] = np.ascontiguousarray(values)
    for shard, tensors in shards.items():
        save_file(tensors, directory / f"{shard}.safetensors")
    weight_map = {name: f"{shard}.safetensors" for shard, tensors in shards.items() for name in tensors}
    index = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    experts = {
        f"model.layers.{layer}.mlp.experts.{i}.{part}_proj.weight": "MXFP4"
        for layer in range(3) for i in range(6) for part in ("gate", "up", "down")
    }  # fmt: skip
    write_gguf(folder / "model.gguf", OSS.config, weights, formats=experts)
    return directory, folder / "model.gguf", held


def test_gpt_oss_experts_hold_the_numbers_of_their_blocks(oss: tuple[Path, Path, dict[str, F32]]) -> None:
    directory, _, held = oss
    with tinyllm.load(directory, device="cpu") as llm:
        for key, values in held.items():
            name, layer = key.split()
            np.testing.assert_array_equal(llm.model.unpack(name, int(layer)), values)


def test_gpt_oss_from_both_files_is_the_same(oss: tuple[Path, Path, dict[str, F32]]) -> None:
    directory, gguf, _ = oss
    ids = random_ids(OSS.config, OSS.seed, OSS.n_tokens)
    with (
        tinyllm.load(directory, device="cpu", threads=3) as a,
        tinyllm.load(gguf, device="cpu", threads=1) as b,
    ):
        np.testing.assert_array_equal(a.logits(ids), b.logits(ids))


def test_gpt_oss_is_written_as_gguf(oss: tuple[Path, Path, dict[str, F32]], tmp_path: Path) -> None:
    """What is MXFP4 from the beginning stays as it is, to the bit, and is no quantized model; what is not
    follows the mix."""
    directory, gguf, _ = oss
    tinyllm.quantize(directory, tmp_path / "out.gguf", "mxfp4")
    ours, theirs = read_gguf(tmp_path / "out.gguf"), read_gguf(gguf)
    assert sorted(ours.tensors) == sorted(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        mine = ours.tensors[name]
        if "_exps." in name or len(tensor.shape) == 1:
            assert (mine.shape, mine.format) == (tensor.shape, tensor.format)
            assert bytes_of(mine) == bytes_of(tensor), name
        elif "_inp" not in name:
            assert FORMATS[mine.format].name == "Q8_0"
    ids = random_ids(OSS.config, OSS.seed, OSS.n_tokens)
    with tinyllm.load(directory, weights="mxfp4") as a, tinyllm.load(tmp_path / "out.gguf") as b:
        np.testing.assert_array_equal(a.logits(ids), b.logits(ids))
    with pytest.raises(ArgumentError, match=r"is quantized already .*is MXFP4"):
        tinyllm.quantize(directory, tmp_path / "other.gguf", "q8_0")


def bytes_of(tensor: TensorInfo) -> bytes:
    with FileReader(tensor.path) as file:
        return file.read_at(tensor.offset, tensor.n_bytes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"swiglu_limit": 6.0}, UnsupportedError, "swiglu_limit 6 is not supported, only 7"),
        ({"swiglu_alpha": 1.5}, UnsupportedError, "swiglu_alpha 1.5 is not supported"),
        ({"num_experts_per_tok": 7}, FormatError, "7 experts used of 6"),
    ],
)
def test_gpt_oss_configs(changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        config_from_json({**OSS.config, **changes})
    plain = config_from_json(
        {k: v for k, v in OSS.config.items() if k not in ("rope_scaling", "layer_types")}
    )
    assert plain.windows == (40, 0, 40)
    assert plain.original_context == 4096, "transformers' default is YaRN"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_gpt_oss_in_floats_is_read(dtype: str, tmp_path: Path) -> None:
    """Stacks of floats lie transposed, gate and up column by column: every number is where it belongs, and
    a GGUF of the same numbers computes the same bits. (transformers' logits: test_families.py.)"""
    weights = rounded(random_weights(OSS.config, OSS.seed), dtype)
    directory = write_hf_directory(tmp_path / "hf", OSS.config, weights, dtype=dtype)
    write_gguf(tmp_path / "model.gguf", OSS.config, weights, format=dtype)
    ids = random_ids(OSS.config, OSS.seed, 60)
    with tinyllm.load(directory, device="cpu") as a, tinyllm.load(tmp_path / "model.gguf", device="cpu") as b:
        for layer, expert in ((0, 0), (2, 5)):
            at = f"model.layers.{layer}.mlp.experts."
            gate_up, down = weights[at + "gate_up_proj"][expert], weights[at + "down_proj"][expert]
            np.testing.assert_array_equal(a.model.unpack(f"w_gate.{expert}", layer), gate_up.T[0::2])
            np.testing.assert_array_equal(a.model.unpack(f"w_up.{expert}", layer), gate_up.T[1::2])
            np.testing.assert_array_equal(a.model.unpack(f"w_down.{expert}", layer), down.T)
        np.testing.assert_array_equal(a.logits(ids), b.logits(ids))


def test_gpt_oss_in_floats_is_quantized_to_the_same_bits(tmp_path: Path) -> None:
    weights = random_weights(OSS.config, OSS.seed)
    directory = write_hf_directory(tmp_path / "hf", OSS.config, weights, dtype="BF16")
    ids = random_ids(OSS.config, OSS.seed, 60)
    for type in ("mxfp4", "q8_0"):
        tinyllm.quantize(directory, tmp_path / "out.gguf", type)
        with tinyllm.load(directory, weights=type) as a, tinyllm.load(tmp_path / "out.gguf") as b:
            np.testing.assert_array_equal(a.logits(ids), b.logits(ids))


def test_no_room_to_turn_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_hf_directory(tmp_path, OSS.config, random_weights(OSS.config, OSS.seed))
    before = backends.live_allocations()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(
        MemoryLimitError, match=r"no room in .*missing for .*gate_up_proj.* \(No such.*TMPDIR"
    ):
        tinyllm.load(path, device="cpu")
    assert backends.live_allocations() == before


def test_misshapen_stacks_of_floats_are_named(tmp_path: Path) -> None:
    weights = random_weights(OSS.config, OSS.seed)
    odd = {**weights, (name := "model.layers.1.mlp.experts.gate_up_proj"): weights[name][..., :-1]}
    with pytest.raises(FormatError, match=r"gate_up_proj\[0\]' has 191 columns, .* 2 matrices in turn"):
        read_model(write_hf_directory(tmp_path / "odd", OSS.config, odd))
    turned = {**weights, name: weights[name].transpose(0, 2, 1)}
    with pytest.raises(FormatError, match=r"experts\.0\.gate_proj\.weight has shape \(32, 192\), expected"):
        read_model(write_hf_directory(tmp_path / "turned", OSS.config, turned))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a_scales": None}, UnsupportedError, "'a_blocks' has dtype 'U8'"),
        ({"a_blocks": None}, UnsupportedError, "'a_scales' has dtype 'U8'"),
        ({"a_scales": np.zeros((2, 4), np.uint8)}, FormatError, "16 bytes and a scale a block"),
        ({"a_scales": np.zeros((2, 3), np.float32)}, UnsupportedError, "'a_blocks' has dtype 'U8'"),
        ({"b": np.zeros(3, np.uint8)}, UnsupportedError, "'b' has dtype 'U8'"),
    ],
)
def test_bytes_are_mxfp4_or_refused(
    changes: dict[str, Any], error: Any, message: str, tmp_path: Path
) -> None:
    good = {"a_blocks": np.zeros((2, 3, 16), np.uint8), "a_scales": np.zeros((2, 3), np.uint8)}
    path = tmp_path / "model.safetensors"
    save_file(good, path)
    joined = read_safetensors(path).tensors["a"]
    assert (joined.shape, FORMATS[joined.format].name) == ((2, 96), "MXFP4")
    save_file({k: v for k, v in {**good, **changes}.items() if v is not None}, path)
    with pytest.raises(error, match=message):
        read_safetensors(path)
