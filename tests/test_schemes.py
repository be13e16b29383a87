"""Quantized safetensors: weights are the numbers that the libraries make of them, bit for bit; models give
their logits; what is not read is refused by scheme and key. golden/make_schemes.py made the files."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers_schemes import CASES, MODELS, MODULE, WEIGHTS, Tensor, logits_of, tensors_of, write_case
from schemes_table import table, tensors_in, weight_of

import tinyllm
import tinyllm._core as _core
from tinyllm.errors import ArgumentError, FormatError, UnsupportedError
from tinyllm.files import F32, FORMATS, TensorInfo, read_rows
from tinyllm.files.schemes.patterns import safe_pattern

DOCS = Path(__file__).parents[1] / "docs"


def numbers(info: TensorInfo) -> npt.NDArray[np.float32]:
    """What the core computes with: rows packed into panels, and out again."""
    rows, k = info.shape
    return _core.pack_unpack(read_rows(info, 0, rows).tobytes(), info.format, rows, k)


def digest(values: npt.NDArray[np.float32]) -> str:
    return hashlib.sha256((values + np.float32(0)).tobytes()).hexdigest()  # of zeros without a sign


@pytest.mark.parametrize("name", WEIGHTS)
def test_numbers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    info = weight_of(write_case(tmp_path / name, name))
    assert list(info.shape) == case["shape"]
    got = numbers(info)
    assert got.ravel()[:8].tolist() == case["first"]
    assert digest(got) == case["sha256"]
    pieces = [read_rows(info, i, min(i + 7, info.shape[0])) for i in range(0, info.shape[0], 7)]
    assert np.array_equal(np.concatenate(pieces), read_rows(info, 0, info.shape[0]))
    assert info.n_bytes == info.shape[0] * pieces[0].shape[1]


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case, expected = CASES[name], logits_of(name)
    with tinyllm.load(write_case(tmp_path / name, name), device="cpu", cache_type="f32") as llm:
        got = llm.logits(case["ids"])
    if name == "model_w4a16":  # activations are rounded to int8
        p, q = (np.exp(x - np.logaddexp.reduce(x, 1)[:, None]) for x in (expected, got))
        assert float((p * np.log(p / q)).sum(1).max()) < 2e-4
    else:
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    if name == "model_fp8_static":
        said = " ".join(record.message for record in caplog.records if record.levelno == logging.WARNING)
        assert "input_scale" in said
        assert "config_groups.group_0" in said


@pytest.mark.parametrize("name", ["model_fp8_static", "model_nf4"])
def test_bits_are_those_of_floats(name: str, tmp_path: Path) -> None:
    """Weights that meet float32 activations give what the same numbers give as F32, bit for bit."""
    folder = write_case(tmp_path / "a", name)
    as_f32 = {
        tensor: (
            "F32",
            list(info.shape),
            (numbers(info) if len(info.shape) == 2 else info.read_f32()).tobytes(),
        )
        for tensor, info in tensors_in(folder).items()
    }
    bare = write_case(tmp_path / "b", name, as_f32)
    (bare / "config.json").write_text(json.dumps({"model_type": "llama", **CASES[name]["model"]}))
    logits = []
    for path in (folder, bare):
        with tinyllm.load(path, device="cpu") as llm:
            logits.append(llm.logits(CASES[name]["ids"]))
    assert logits[0].tobytes() == logits[1].tobytes()


def test_fused_rows(tmp_path: Path) -> None:
    """Parts of a quantized tensor, every other row and the parts of a stack, are those rows."""
    info = weight_of(write_case(tmp_path / "a", "ct_w4_group32"))
    whole, row_bytes = read_rows(info, 0, info.shape[0]), info.n_bytes // info.shape[0]
    assert np.array_equal(read_rows(info.every_other(1), 2, 5), whole[5:11:2])
    part = replace(info, shape=(6, info.shape[1]), offset=3 * row_bytes, n_bytes=6 * row_bytes)
    assert np.array_equal(read_rows(part, 1, 6), whole[4:9])
    with pytest.raises(UnsupportedError, match="lies transposed"):
        info.transposed()


def test_bias_of_zeros(tmp_path: Path) -> None:
    """AutoGPTQ writes one beside every matrix; one of other numbers stays, for names.py to judge."""
    for value in (0, 1):
        bias = {f"{MODULE}.bias": ("F16", [32], np.full(32, value, "<f2").tobytes())}
        found = tensors_in(write_case(tmp_path / str(value), "gptq_4_v1", tensors_of("gptq_4_v1") | bias))
        assert (f"{MODULE}.bias" in found) == bool(value)


def test_stacked_scales(tmp_path: Path) -> None:
    """As transformers 5 saves mixtures again: the scales of all experts in one tensor, gate's before up's."""
    tensors = tensors_of("fp8_blocks")
    weight, scale = tensors[f"{MODULE}.weight"], tensors[f"{MODULE}.weight_scale_inv"]
    doubled = ("F32", scale[1], (2 * np.frombuffer(scale[2], np.float32)).tobytes())
    experts = "model.layers.0.mlp.experts"
    stacked = {f"{experts}.{i}.{of}_proj.weight": weight for i in range(3) for of in ("gate", "up", "down")}
    stacked[f"{experts}.gate_up_proj_scale_inv"] = ("F32", [3, 4, 2], 3 * (scale[2] + doubled[2]))
    stacked[f"{experts}.down_proj_scale_inv"] = ("F32", [3, 2, 2], 2 * doubled[2] + scale[2])
    found = tensors_in(write_case(tmp_path / "a", "fp8_blocks", stacked))
    one = numbers(weight_of(write_case(tmp_path / "b", "fp8_blocks")))
    assert len(found) == 9
    for i in range(3):
        for of, factor in (("gate", 1), ("up", 2), ("down", 1 if i == 2 else 2)):
            assert np.array_equal(numbers(found[f"{experts}.{i}.{of}_proj.weight"]), factor * one), (i, of)


def test_requantized(tmp_path: Path) -> None:
    """tinyllm-quantize reads the same numbers, where it is told that it may."""
    folder, out = write_case(tmp_path / "a", "model_fp8_static"), tmp_path / "out.gguf"
    with pytest.raises(ArgumentError, match=r"is F8_E4M3.*allow_requantize=True"):
        tinyllm.quantize(folder, out, "f32")
    with pytest.raises(UnsupportedError, match="is kept as F8_E4M3, which no GGUF file holds"):
        tinyllm.quantize(folder, out, "copy")
    tinyllm.quantize(folder, out, "f32", allow_requantize=True)
    expected = logits_of("model_fp8_static")
    with tinyllm.load(out, device="cpu", cache_type="f32") as llm:
        got = llm.logits(CASES["model_fp8_static"]["ids"])
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown method": ("fp8_tensor", {"quant_method": "aqlm"}, "quant_method 'aqlm' is not supp"),
    "another format": ("ct_w4_group32",
                       {"format": "x", "config_groups": {"g": {"targets": [], "weights": {}}}},
                       "config_groups.g: format 'x' is not supported"),
    "sparsity": ("ct_w4_group32", {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
    "a transform": ("ct_w4_group32", {"transform_config": {"u": 1}}, "'transform_config' is set"),
    "an unknown key": ("fp8_tensor", {"new_thing": 3}, "'new_thing' is set"),
    "an activation scheme": ("fp8_tensor", {"activation_scheme": "odd"}, "activation_scheme 'odd'"),
    "a layout of GPTQ": ("gptq_4_v1", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not"),
    "bits of GPTQ": ("gptq_4_v1", {"bits": 5}, "GPTQ of 5 bits"),
    "a layout of AWQ": ("awq_gemm", {"version": "gemv"}, "version 'gemv'"),
    "an algorithm of ModelOpt": ("modelopt_fp8", {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' is not"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why: str, tmp_path: Path) -> None:
    name, config, message = REFUSED[why]
    with pytest.raises(UnsupportedError, match=message):
        weight_of(write_case(tmp_path / "a", name, **config))


def changed(name: str, part: str, shape: list[int]) -> dict[str, Tensor]:
    """The case's tensors, one of them cut to another shape."""
    tensors = tensors_of(name)
    dtype, old, data = tensors[f"{MODULE}.{part}"]
    size = len(data) // int(np.prod(old))
    data = (data * 8)[: size * int(np.prod(shape))]
    return tensors | {f"{MODULE}.{part}": (dtype, shape, data)}


BROKEN: dict[str, tuple[str, str, list[int] | None]] = {
    "scales of another height": ("ct_fp8_channel", "weight_scale", [23, 1]),
    "blocks too few": ("fp8_blocks", "weight_scale_inv", [1, 2]),
    "no scale": ("fp8_blocks", "weight_scale_inv", None),
    "a shape that does not fit": ("ct_w4_group32", "weight_packed", [24, 15]),
    "groups that do not fit": ("ct_w4_group32", "weight_scale", [24, 3]),
    "zeros of another width": ("ct_w4_asym32", "weight_zero_point", [3, 4]),
    "GPTQ's groups": ("gptq_4_v1", "scales", [1, 32]),
    "GPTQ's columns": ("gptq_4_v1", "g_idx", [120]),
    "AWQ's zeros": ("awq_gemm", "qzeros", [1, 4]),
    "NVFP4's scales": ("modelopt_nvfp4", "weight_scale", [24, 4]),
    "absmax": ("bnb_nf4", "weight.absmax", [47]),
    "quant_map": ("bnb_nf4", "weight.quant_map", [15]),
}


@pytest.mark.parametrize("why", BROKEN)
def test_broken(why: str, tmp_path: Path) -> None:
    name, part, shape = BROKEN[why]
    tensors = tensors_of(name)
    if shape is None:
        del tensors[f"{MODULE}.{part}"]
    else:
        tensors = changed(name, part, shape)
    with pytest.raises(FormatError):
        weight_of(write_case(tmp_path / "a", name, tensors))


CHANGES_NOTHING = ("g_idx", "_weight_zero_point", "input_scale", "weight_format")


def outcome(folder: Path) -> str:
    try:
        return "a weight" if f"{MODULE}.weight" in tensors_in(folder) else "no weight"
    except (FormatError, UnsupportedError) as error:
        return "refused" if "down_proj" in str(error) else f"refused without a name: {error}"


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_tensor_is_missed(name: str, tmp_path: Path) -> None:
    """Without one of its tensors a weight is refused by its name, but for those that change nothing."""
    for i, part in enumerate(tensors_of(name)):
        tensors = tensors_of(name)
        del tensors[part]
        expected = {"a weight"} if part.endswith(CHANGES_NOTHING) else {"refused"}
        if name == "gptq_4_act_order":
            expected = {"refused"}
        if part.endswith((".weight", "qdata")):
            expected.add("no weight")  # which names.py misses
        assert outcome(write_case(tmp_path / str(i), name, tensors)) in expected, part


def test_nan(tmp_path: Path) -> None:
    tensors = tensors_of("ct_fp8_tensor")
    dtype, shape, data = tensors[f"{MODULE}.weight"]
    tensors[f"{MODULE}.weight"] = (dtype, shape, data[:100] + b"\x7f" + data[101:])
    info = weight_of(write_case(tmp_path / "a", "ct_fp8_tensor", tensors))
    with pytest.raises(FormatError, match=r"model\.safetensors: .*down_proj\.weight' holds NaN"):
        read_rows(info, 0, 24)


def test_wide_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert weight_of(write_case(tmp_path / "a", "gptq_4_act_order")).format == F32
    assert "which take 4 bytes each (1: " in caplog.text


def test_device(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "a", "model_fp8_static")
    with pytest.raises(UnsupportedError, match="F8_E4M3, which only the CPU multiplies so far"):
        tinyllm.load(folder, device="cuda")


def test_mixed_groups(tmp_path: Path) -> None:
    """Which group a module is in decides its format, by class, name or pattern; a pattern may not take
    forever."""
    config = CASES["ct_w4_group32"]["config"]
    own = config["config_groups"]["group_0"]
    for targets in (["Linear"], [MODULE], ["re:.*(up|down)_proj$"]):
        groups = {
            "a": {"targets": ["re:.*o_proj"], "weights": {"num_bits": 8}, "format": "float-quantized"},
            "b": {**own, "targets": targets},
        }
        info = weight_of(write_case(tmp_path / "a", "ct_w4_group32", config_groups=groups))
        assert digest(numbers(info)) == CASES["ct_w4_group32"]["sha256"]
    groups["b"]["targets"] = ["lm_head"]
    with pytest.raises(FormatError, match="no group of config_groups has it as a target"):
        weight_of(write_case(tmp_path / "a", "ct_w4_group32", config_groups=groups))
    for pattern in ("(a+)+$", "(a*)*", ".*.*.*.*.*", "(x|y){2,}(x+){9}"):
        with pytest.raises(UnsupportedError, match="repeats too much"):
            safe_pattern(pattern)
    with pytest.raises(FormatError, match="is no pattern"):
        safe_pattern("(")


AS_F32 = {"gptq_4_act_order", "gptq_8_asym", "ct_int8_asym"}
OF_OTHER_WIDTHS = {"ct_w2_asym", "ct_w3_group64", "ct_w6_group64", "gptq_2", "gptq_3"}


def test_memory() -> None:
    """At most 1.1 times the file (1.11 for NVFP4 and groups of 64 with zero points), but for what the docs
    name."""
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in table().splitlines()[2:]]
    assert {form.name for form in FORMATS.values()} >= {kept for _, _, _, _, kept, *_ in rows}
    assert {name for _, _, name, _, kept, *_ in rows if kept == "F32"} == AS_F32
    for _, _, name, _, _, bits, *_ in rows:
        kept, stored = (float(n.strip("()")) for n in bits.split())
        assert kept <= 1.111 * stored or name in AS_F32 | OF_OTHER_WIDTHS, (name, kept, stored)


def test_docs() -> None:
    assert table() in (DOCS / "files.md").read_text(encoding="utf-8"), "run `python tests/schemes_table.py`"
