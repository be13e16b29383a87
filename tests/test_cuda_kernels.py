"""The CUDA backend without a GPU: cuda/host/ runs the very same kernels on the CPU, a fiber a thread, and the
library made of them is opened like the other one. What only hardware can show (memory order, speed, the
tensor cores' roundings) is not tested here. docs/cuda.md explains."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cffi
import numpy as np
import numpy.typing as npt
import pytest
import reference
from families_table import FILES
from helpers_adapters import Case, adapter_case, adapter_cases, write_adapter
from helpers_embed import EMBEDDERS, write_embedder
from helpers_gguf import FORMATS, rewritten, small_tokenizer, write_gguf
from helpers_models import (
    GOLDEN_DIR,
    golden_model,
    golden_spec,
    golden_specs,
    random_ids,
    random_weights,
    write_hf_directory,
)
from safetensors.numpy import load_file, save_file

import tinyllm
from tinyllm import backends
from tinyllm.engine.sampling import Sampler
from tinyllm.engine.speculation import Costs, Guessing
from tinyllm.files import TensorInfo
from tinyllm.modelfiles import read_model

ROOT = Path(__file__).resolve().parents[1]
F32 = npt.NDArray[np.float32]
PAGE = 64


def compiled(folder: Path, compiler: str, *options: str) -> Path:
    """The backend and its kernels as a library for the CPU."""
    flags = ["-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden"]
    flags += options
    objects = []
    for name in ("memory", "source"):
        objects.append(str(folder / f"{name}.o"))
        c = [*compiler.split(), "-x", "c", "-std=c11", *flags, "-c", str(ROOT / "csrc" / f"{name}.c")]
        subprocess.run([*c, "-o", objects[-1]], check=True)
    out = folder / "libtinyllm_cuda_host.so"
    cpp = [
        *compiler.split(),
        "-std=c++17",
        *flags,
        "-shared",
        "-pthread",
        "-o",
        str(out),
        *objects,
    ]
    subprocess.run([*cpp, "-x", "c++", str(ROOT / "cuda" / "backend_cuda.cu")], check=True)
    return out


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler")
    return compiled(tmp_path_factory.mktemp("kernels"), compiler, "-O2", "-Wall", "-Wextra", "-Werror")


class Host:
    """What the library exports for tests alone."""

    def __init__(self, library: Path) -> None:
        ffi = cffi.FFI()
        ffi.cdef("void tl_host_shuffle(unsigned long seed); long tl_host_live();")
        self._lib = ffi.dlopen(str(library))

    def live(self) -> int:
        """Blocks of device and pinned memory."""
        return int(self._lib.tl_host_live())

    def shuffle(self, seed: int) -> None:
        """In which order a block's threads take turns from now on; 0: as they are numbered."""
        self._lib.tl_host_shuffle(seed)


@pytest.fixture
def host(library: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """With it the device "cuda" is the kernels on the CPU."""
    monkeypatch.setenv("TINYLLM_CUDA_LIBRARY", str(library))
    return Host(library)


def load(path: Path, **options: Any) -> tinyllm.LLM:
    return tinyllm.load(path, device="cuda", **options)


def relative_error(logits: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


# ---- every format


def one_layer(**changes: Any) -> dict[str, Any]:
    """Rows of whole blocks of 256, and a vocabulary that fills no whole tile."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    return {**golden_spec("llama3").config, "num_hidden_layers": 1, "vocab_size": 105, **sizes, **changes}


@pytest.mark.parametrize("format", FORMATS)
def test_format(format: str, host: Host, tmp_path: Path) -> None:
    """Unpacked, a matrix is exactly what the file holds; multiplied, it gives what float64 arithmetic gives
    for activations rounded to int8 (test_golden.py derives the tolerances), for one token (the kernel for
    one) and for two. A prompt of 35, for which there are larger tiles, gives the bits of its first two."""
    config = one_layer()
    held = write_gguf(tmp_path / "model.gguf", config, random_weights(config, seed=7), format=format)
    quantized = () if format in ("F32", "F16", "BF16") else held
    errors, int8_errors = [], []
    with load(tmp_path / "model.gguf", cache_type="f32") as llm:
        np.testing.assert_array_equal(llm.model.unpack("embedding"), held["model.embed_tokens.weight"])
        np.testing.assert_array_equal(
            llm.model.unpack("w_down", 0), held["model.layers.0.mlp.down_proj.weight"]
        )
        for seed in range(8):
            ids = random_ids(config, seed, 1 + seed % 2)
            expected = reference.logits(config, held, ids, quantized=quantized)
            errors.append(relative_error(llm.logits(ids), expected))
            int8_errors.append(relative_error(reference.logits(config, held, ids), expected))
        ids = random_ids(config, 1, 35)
        np.testing.assert_array_equal(llm.logits(ids)[:2], llm.logits(ids[:2]))
    assert np.quantile(errors, 0.6) < 1e-5
    assert max(errors) < max(*int8_errors, 1e-5)


def test_formats_may_differ_from_matrix_to_matrix(host: Host, tmp_path: Path) -> None:
    config = one_layer(intermediate_size=172)
    formats = {
        "model.embed_tokens.weight": "Q5_0",
        "model.layers.0.self_attn.v_proj.weight": "F16",
        "model.layers.0.self_attn.k_proj.weight": "Q6_K",
        "lm_head.weight": "Q8_0",
    }
    weights = random_weights(config, seed=8)
    held = write_gguf(tmp_path / "model.gguf", config, weights, format="Q4_K", formats=formats)
    quantized = set(held) - {
        f"model.layers.0.{name}.weight" for name in ("mlp.down_proj", "self_attn.v_proj")
    }
    with load(tmp_path / "model.gguf", cache_type="f32") as llm:
        errors = [
            relative_error(llm.logits(ids), reference.logits(config, held, ids, quantized=quantized))
            for ids in (random_ids(config, seed, 2) for seed in range(6))
        ]
    assert np.median(errors) < 1e-5


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
def test_quantized_while_loading(weights: str, host: Host, tmp_path: Path) -> None:
    config = one_layer()
    write_gguf(tmp_path / "model.gguf", config, random_weights(config, seed=9))
    with (
        load(tmp_path / "model.gguf", weights=weights) as llm,
        tinyllm.load(tmp_path / "model.gguf", device="cpu", weights=weights) as cpu,
    ):
        for name in ("wq", "w_down"):
            np.testing.assert_array_equal(llm.model.unpack(name, 0), cpu.model.unpack(name, 0))


def test_a_file_that_ends_early(host: Host, tmp_path: Path) -> None:
    config = one_layer()
    path = tmp_path / "model.gguf"
    write_gguf(path, config, random_weights(config, seed=9), format="Q4_0")
    whole = path.read_bytes()
    with load(path) as llm:
        model = llm.model
        info = TensorInfo("cut", (512, 256), 2, path, len(whole) - 1000, 512 * 144)
        with pytest.raises(tinyllm.FormatError, match="could not be read"):
            list(backends.Model(model.config, device="cuda").upload([backends.Weight("w_up", 0, info)]))
        llm.logits([1])  # frees what loading kept for the next matrix
    assert host.live() == 0


def test_rows_that_stand_apart_in_the_file(host: Host, tmp_path: Path) -> None:
    """As gate and up do where they alternate, and MXFP4 whose scales are a tensor of their own."""
    config = one_layer(intermediate_size=64)
    path = tmp_path / "model.gguf"
    write_gguf(path, config, random_weights(config, seed=9))
    rng = np.random.default_rng(1)
    data = tmp_path / "data"
    rows = rng.standard_normal((128, 256)).astype("<f4").tobytes()
    data.write_bytes(rows + rng.integers(0, 120, 64 * 256 // 2 + 64 * 8, np.uint8).tobytes())
    scales = TensorInfo("scales", (64, 8), 0, data, len(rows) + 64 * 128, 64 * 8)
    infos = [
        TensorInfo("gate", (64, 256), 0, data, 0, len(rows), row_stride=2),
        TensorInfo("up", (64, 256), 39, data, len(rows), 64 * 128, scales=scales),
    ]
    held = []
    with load(path) as llm:
        for device in ("cpu", "cuda"):
            model = backends.Model(llm.model.config, device=device)
            weights = [
                backends.Weight(name, 0, info) for name, info in zip(("w_gate", "w_up"), infos, strict=True)
            ]
            assert list(model.upload(weights)) == weights
            held.append((model.unpack("w_gate", 0), model.unpack("w_up", 0)))
            model.close()
    np.testing.assert_array_equal(held[0][0], held[1][0])
    np.testing.assert_array_equal(held[0][1], held[1][1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("spec", ["llama3", "mixtral"])
def test_factors_beside_matrices(spec: str, device: str, host: Host, tmp_path: Path) -> None:
    """Of a matrix, of each of the experts', of the output: powers of two, which change no digit wherever they
    are multiplied in."""
    config = {**golden_spec(spec).config, "num_hidden_layers": 1, "tie_word_embeddings": False}
    path = tmp_path / "model.gguf"
    write_gguf(path, config, random_weights(config, seed=9))
    names = ["output", "blk.0.attn_q", "blk.0.attn_output"]
    names += [f"blk.0.ffn_{part}{'_exps' * (spec == 'mixtral')}" for part in ("up", "down")]
    rng = np.random.default_rng(0)

    def apart(tensors: dict[str, Any]) -> None:
        for name in names:
            n = len(tensors[f"{name}.weight"][0]) if name.endswith("_exps") else 1
            tensors[f"{name}.scale"] = (
                factors.setdefault(name, 2.0 ** rng.integers(-3, 3, n)).astype("<f4"),
                0,
            )

    def within(tensors: dict[str, Any]) -> None:
        for name in names:
            values, kind = tensors[f"{name}.weight"]
            of_matrices = factors[name].astype("<f4").reshape(-1, *[1] * (values.ndim - 1))
            tensors[f"{name}.weight"] = (values * of_matrices, kind)

    factors: dict[str, npt.NDArray[np.float64]] = {}
    found = []
    for change in (apart, within):
        with tinyllm.load(rewritten(path, change), device=device) as llm:
            found.append([llm.logits(random_ids(config, 1, 2)), llm.logits(random_ids(config, 1, 40))])
            found[-1].append(llm.model.unpack("wq", 0))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- every shape of Llama, and other families


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("llama2", 70),
        ("llama3", 66),
        ("yarn_mscale", 20),
        ("attention_bias", 20),
        ("mlp_bias", 20),
        ("head_dim", 70),
        ("mixtral", 40),
        ("granite", 20),
        ("gemma", 20),
        ("cohere", 20),
        ("mistral_window", 300),
        ("ministral", 66),
        ("qwen3", 40),
        ("phi3_long", 40),
        ("smollm3", 40),
        ("ministral3", 66),
        ("olmo2", 20),
        ("olmo3", 66),
        ("gemma2", 66),
        ("gemma3", 66),
        ("cohere_plus", 20),
        ("cohere2", 66),
        ("qwen3_moe_not_renormalized", 20),
        ("gpt_oss", 66),
        ("seed_oss_biases", 20),
        ("exaone4", 66),
        ("glm4", 20),
        ("granite_swa", 66),
        ("hunyuan", 40),
        ("arcee", 20),
        ("apertus", 20),
        ("jais2", 20),
        ("olmo_clip", 20),
    ],
)
def test_equals_transformers(name: str, n: int, host: Host, tmp_path: Path) -> None:
    """The first n tokens of a golden, float32 throughout: within 1e-4 of the largest logit."""
    file, spec = next((f, spec) for f in FILES for spec in golden_specs(f) if spec.name == name)
    goldens = np.load(GOLDEN_DIR / FILES[file])
    positions = goldens[spec.name + ".positions"]
    seen = positions < n
    with load(golden_model(spec, tmp_path), cache_type="f32", context=spec.context) as llm:
        logits = llm.logits(random_ids(spec.config, spec.seed, spec.n_tokens)[:n])
    assert seen.sum() >= 2
    assert relative_error(logits[positions[seen]], goldens[spec.name + ".logits"][seen]) < 1e-4


@pytest.mark.parametrize(("gate", "up"), [("Q4_0", "F16"), ("F32", "Q8_0")])
def test_gate_and_up_may_differ(gate: str, up: str, host: Host, tmp_path: Path) -> None:
    """One of them quantized and the other not."""
    config = one_layer()
    formats = {f"model.layers.0.mlp.{k}_proj.weight": v for k, v in {"gate": gate, "up": up}.items()}
    held = write_gguf(tmp_path / "model.gguf", config, random_weights(config, seed=1), formats=formats)
    quantized = [name for name, format in formats.items() if format.startswith("Q")]
    ids = random_ids(config, 2, 35)
    with load(tmp_path / "model.gguf", cache_type="f32") as llm:
        logits = llm.logits(ids)
        np.testing.assert_array_equal(llm.logits(ids[:1]), logits[:1])
    errors = np.abs(logits - reference.logits(config, held, ids, quantized=quantized)).max(axis=1)
    assert np.quantile(errors, 0.6) < 1e-5 * np.abs(logits).max()


# ---- mixtures of experts

MIXTURE: dict[str, Any] = {  # what one_layer changes
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
}
EXPERTS = [
    f"model.layers.0.block_sparse_moe.experts.{i}.{part}.weight"
    for i in range(6)
    for part in ("w1", "w3", "w2")
]


@pytest.mark.parametrize(
    ("format", "gate"), [("Q8_0", "Q8_0"), ("MXFP4", "MXFP4"), ("Q8_0", "Q4_0"), ("F16", "Q8_0")]
)
def test_experts(format: str, gate: str, host: Host, tmp_path: Path) -> None:
    """What the CPU says, of one token and of two, but for the few activations that are rounded to the other
    side (test_golden.py). Of the last of three experts there are always two that score the same. And for 80
    tokens, for which quantized experts have larger tiles, the bits of each alone."""
    config = one_layer(**MIXTURE)
    weights = random_weights(config, seed=51)
    router = weights["model.layers.0.block_sparse_moe.gate.weight"]
    router[3:] = router[:3]
    formats = {name: gate if name.endswith("w1.weight") else format for name in EXPERTS}
    write_gguf(tmp_path / "model.gguf", config, weights, formats=formats)
    errors = []
    with (
        load(tmp_path / "model.gguf", cache_type="f32") as llm,
        tinyllm.load(tmp_path / "model.gguf", device="cpu", cache_type="f32") as cpu,
    ):
        for seed in range(12):
            ids = random_ids(config, seed, 1 + seed % 2)
            errors.append(relative_error(llm.logits(ids), cpu.logits(ids)))
        ids = random_ids(config, 1, 80)
        np.testing.assert_array_equal(llm.logits(ids)[:3], llm.logits(ids[:3]))
    assert np.quantile(errors, 0.75) < 1e-5


def test_a_token_that_is_no_number_harms_no_other(host: Host, tmp_path: Path) -> None:
    """Every score of its is as high as any other, so it may not visit more experts than it should."""
    config = one_layer(**MIXTURE)
    write_gguf(tmp_path / "model.gguf", config, random_weights(config, seed=3))
    with load(tmp_path / "model.gguf") as llm:
        pool = llm.model.cache("f16", 4)
        pool.grow(4)
        x = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
        call = ([0] * 4, range(4), np.arange(4).reshape(4, 1))
        good = llm.model.forward(x, *call, cache=pool)
        x[2] = np.nan
        found = llm.model.forward(x, *call, cache=pool)
        np.testing.assert_array_equal(found[[0, 1, 3]], good[[0, 1, 3]])
        assert np.isnan(found[2]).all()
        pool.close()


@pytest.mark.parametrize(("format", "cache"), [("F16", "f16"), ("Q8_0", "q8_0"), ("Q4_K", "f32")])
@pytest.mark.parametrize("where", ["embed", "input_layernorm", "post_attention", "model.norm"])
def test_one_bad_number_is_not_rounded_away(
    where: str, format: str, cache: Any, host: Host, tmp_path: Path
) -> None:
    """For one token and for many, in the first segment of a text and in the next."""
    config = one_layer(max_position_embeddings=512)
    weights = random_weights(config, seed=3)
    name = next(name for name in weights if where in name)
    weights[name].flat[3 + 256 * 7 * (weights[name].ndim - 1)] = np.nan
    write_gguf(
        tmp_path / "model.gguf", config, weights, format=format, formats={"model.embed_tokens.weight": "F32"}
    )
    with load(tmp_path / "model.gguf", cache_type=cache) as llm:
        for ids in ([7], [7] * 3, [8] * 270 + [7]):
            with pytest.raises(tinyllm.Error, match="the model computes numbers that are NaN"):
                llm.logits(ids)


@pytest.mark.parametrize("what", ["router", "cap", "norm"])
def test_what_would_hide_a_bad_number(what: str, host: Host, tmp_path: Path) -> None:
    """Softmaxes over the experts, soft caps, and norms of squares that overflow, as on the CPU."""
    config = (
        one_layer(**MIXTURE)
        if what == "router"
        else one_layer(**family("gemma2"))
        if what == "cap"
        else one_layer()
    )
    weights = random_weights(config, seed=3)
    if what == "router":
        next(w for name, w in weights.items() if name.endswith(".gate.weight")).flat[-1] = np.nan
    elif what == "cap":
        weights["model.norm.weight"][5] = np.inf
    else:
        weights["model.embed_tokens.weight"][7, 5] = 1e25
    write_gguf(tmp_path / "model.gguf", config, weights)
    with load(tmp_path / "model.gguf") as llm:
        for ids in ([7], [7] * 12):
            with pytest.raises(tinyllm.Error, match="the model computes numbers that are NaN"):
                llm.logits(ids)


def test_experts_that_differ_are_refused(host: Host, tmp_path: Path) -> None:
    config = one_layer(**MIXTURE)
    directory = write_hf_directory(tmp_path, config, random_weights(config, seed=3))
    tensors = load_file(directory / "model.safetensors")
    tensors[EXPERTS[7]] = tensors[EXPERTS[7]].astype(np.float16)
    save_file(tensors, directory / "model.safetensors")
    with (
        load(directory) as llm,
        pytest.raises(tinyllm.UnsupportedError, match="experts 0 and 2 of layer 0 are f32 and f16"),
    ):
        llm.logits([1, 2])


def test_greedy_text_of_a_trained_model(host: Host, data_dir: Path) -> None:
    """Token by token, so every call after the first of a shape is a graph run again."""
    path = data_dir / "models/stories260K/reference_numpy_f64.json"
    ids = json.loads(path.read_text(encoding="utf-8"))["greedy_from_bos_200"][:80]
    with load(data_dir / "models/stories260K/stories260K.gguf") as llm:
        assert ids[:1] + list(llm(ids[:1], max_tokens=len(ids) - 1, temperature=0).tokens) == ids


def test_guesses_change_no_bit(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows of a text in a call, of which the device finds the candidates, those of a form's too."""
    monkeypatch.setattr(Guessing, "_fitting", lambda self, grade, most: most)
    monkeypatch.setattr(Guessing, "_left_s", lambda self, plain_s: 1.0)
    monkeypatch.setattr(Costs, "most", lambda self: 1000)
    with load("stories") as llm:  # type: ignore[arg-type]
        assert llm.model.most_candidates > 40

        def noisy(tokens: list[int], n: int) -> list[int]:
            return [tokens[max(0, len(tokens) - 20 + i)] for i in range(min(n, 20))]

        for more in ({"temperature": 0}, {"temperature": 0.8}, {"regex": "(cat |dog ){9}", "temperature": 1}):
            options: dict[str, Any] = {"max_tokens": 24, "seed": 1, "logprobs": True, **more}
            plain = llm("Once upon a time", speculate=None, **options)
            known = plain.prompt_tokens + plain.tokens
            for who in (noisy, lambda tokens, n, known=known: known[len(tokens) : len(tokens) + n], "lookup"):
                made = llm("Once upon a time", speculate=who, **options)  # type: ignore[arg-type]
                assert (made.tokens, made.logprobs) == (plain.tokens, plain.logprobs)
            assert llm.cache_pages.used <= 1


# ---- the same bits


CONTEXT = 384
TABLE = CONTEXT // PAGE
N_TOKENS = 300  # a segment of 256 and a piece
# What attention varies: norms of heads, and in the first layer a window and another RoPE.
VARIED: dict[str, Any] = {  # changes of one_layer
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
VARIED_FIELDS = {  # of its ModelConfig
    "windows": (40, 0),
    "ropes": ("local", "none"),
    "local_rope_theta": 500.0,
    "attention_cap": 5.0,
    "query_growth": 0.3,
    "original_context": 64,
}


def load_varied(path: Path, **options: Any) -> tinyllm.LLM:
    """A model with all of that, and sinks."""
    files = read_model(path)
    config = dataclasses.replace(files.config, **VARIED_FIELDS)
    llm = tinyllm.load(dataclasses.replace(files, config=config), **options)
    data = path.with_suffix(".sinks")
    sinks = np.linspace(-1, 2, 2 * config.n_heads, dtype="<f4")
    data.write_bytes(sinks.tobytes())
    for layer in range(2):
        at = layer * config.n_heads * 4
        info = TensorInfo("sinks", (config.n_heads,), 0, data, at, config.n_heads * 4)
        list(llm.model.upload([backends.Weight("sinks", layer, info)]))
    return llm


def family(name: str, **changes: Any) -> dict[str, Any]:
    """What sets a golden model apart, but for its sizes."""
    config = next(spec.config for spec in golden_specs("families") if spec.name == name)
    sizes = ("head_dim", "max_position_embeddings", "vocab_size", "layer_types")
    return {key: value for key, value in config.items() if key not in sizes} | changes


SUBJECTS: dict[str, tuple[Any, ...]] = {
    # format, cache, heads, kv heads, width of a head, what else is not Llama's, who loads it
    "q4_0-f16": ("Q4_0", "f16", (4, 2, 16), {}),
    "q8_0-q8_0": ("Q8_0", "q8_0", (2, 1, 32), {}),
    "f16-f16": ("F16", "f16", (3, 1, 12), {}),
    "f32-f32": ("F32", "f32", (9, 1, 8), {}),
    "mixture": ("Q4_0", "f16", (4, 2, 16), MIXTURE),
    "gpt_oss": ("MXFP4", "f16", (4, 2, 16), family("gpt_oss", num_hidden_layers=1)),
    "gemma2": ("Q4_0", "f16", (4, 2, 16), family("gemma2", num_hidden_layers=2)),
    "varied": ("F32", "f16", (4, 2, 16), VARIED, load_varied),
    "hunyuan": ("Q8_0", "f16", (4, 2, 16), family("hunyuan", num_hidden_layers=1)),
    "apertus": ("Q4_0", "f16", (4, 2, 16), family("apertus", num_hidden_layers=1)),
    "jais2": ("Q4_0", "q8_0", (2, 1, 32), family("jais2", num_hidden_layers=1)),
}


class Subject:
    """A model, pages for three sequences, and what everything is compared with: a prompt at once."""

    def __init__(
        self,
        path: Path,
        format: str,
        cache: backends.CacheType,
        sizes: tuple[int, int, int],
        changes: dict[str, Any] | None = None,
        load: Callable[..., tinyllm.LLM] = tinyllm.load,
    ) -> None:
        small = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": sizes[0],
            "num_key_value_heads": sizes[1],
            "head_dim": sizes[2],
            "max_position_embeddings": CONTEXT,
            "vocab_size": 40,
        }
        self.config = one_layer(**{**small, **(changes or {})})
        write_gguf(path, self.config, random_weights(self.config, seed=41), format=format)
        self.llm = load(path, device="cuda", cache_type=cache)
        self.ids = np.array(random_ids(self.config, 42, N_TOKENS))
        n_tables = len(self.llm.model.cache_groups)
        self.tables = np.arange(3 * n_tables * TABLE, dtype=np.int32).reshape(3, n_tables, TABLE)
        self.pool = self.llm.model.cache(cache, self.tables.size)
        self.pool.grow(self.tables.size)
        self.expected = self.forward([(0, 0, N_TOKENS)])
        assert self.expected.std() > 0.3

    def forward(self, pieces: list[tuple[int, int, int]], **options: Any) -> F32:
        """One call. Each piece is (sequence, first, n): n tokens of the prompt from position `first` on."""
        positions = np.concatenate([np.arange(first, first + n) for _, first, n in pieces])
        sequences = np.concatenate([np.full(n, sequence) for sequence, _, n in pieces])
        given = options.pop("x", self.ids[positions])
        return self.llm.model.forward(given, positions, sequences, self.tables, cache=self.pool, **options)

    def check(self, *pieces: tuple[int, int, int]) -> None:
        positions = np.concatenate([np.arange(first, first + n) for _, first, n in pieces])
        np.testing.assert_array_equal(self.forward(list(pieces)), self.expected[positions])

    def close(self) -> None:
        self.pool.close()
        self.llm.close()


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, host: Host, tmp_path: Path) -> Iterator[Subject]:
    made = Subject(tmp_path / "model.gguf", *SUBJECTS[request.param])
    yield made
    made.close()


def test_bits(subject: Subject, host: Host) -> None:
    """Alone or in a batch, in any chunking, from a prefix that another sequence computed, from a graph that
    is run again, and in whatever order a block's threads take turns."""
    for first in range(4):  # the second is recorded, the others run it again
        subject.check((1, first, 1))
    subject.check((1, 4, 7), (2, 0, 257))
    subject.check((0, 299, 1), (1, 11, 1), (2, 257, 1))
    subject.check((0, 299, 1), (1, 12, 1), (2, 258, 1))
    subject.check((0, 290, 10), (1, 13, 100))
    try:
        for seed in (1, 2, 3):
            host.shuffle(seed)
            subject.check((1, 113, 20), (2, 259, 30))
            subject.check((0, 299, 1))
            subject.check((0, 299, 1), (2, 289, 1))
    finally:
        host.shuffle(0)
    subject.tables[2, :, :4] = subject.tables[0, :, :4]
    subject.check((2, 256, 40))
    for to, of in zip(subject.tables[1, :, 1], subject.tables[0, :, 1], strict=True):
        subject.pool.copy_page(int(to), int(of), 50)
    subject.tables[1, :, 0] = subject.tables[0, :, 0]
    subject.check((1, 64 + 50, 60))


def test_what_attention_varies(host: Host, tmp_path: Path) -> None:
    """As the CPU has it. Keys and values are rounded to f16, by 2^-11 of each, and one near the middle may go
    the other way there. What is behind a window is not looked at."""
    subject = Subject(tmp_path / "model.gguf", *SUBJECTS["varied"])
    with load_varied(tmp_path / "model.gguf", device="cpu", cache_type="f16") as cpu:
        assert relative_error(subject.expected, cpu.logits(subject.ids.tolist())) < 2.0**-11
    windowed = 1 + [group.window for group in subject.llm.model.cache_groups[1:]].index(40)
    subject.forward([(1, 0, 64)], x=np.full((64, 64), np.nan, np.float32))  # in pages of that sequence
    subject.tables[0, windowed, :2] = subject.tables[1, windowed, 0]
    subject.check((0, 192, 70))
    subject.tables[0, windowed, :4] = subject.tables[1, windowed, 0]
    subject.check((0, 295, 5))
    subject.check((0, 299, 1))
    subject.close()


def test_attention_to_both_sides(host: Host, tmp_path: Path) -> None:
    """As the CPU has it (test_embed.py: as sentence-transformers does), in a layer with a window and in one
    without; of several texts, and of one, whose segments blocks share."""
    embedder = next(embedder for embedder in EMBEDDERS if embedder.name == "gemma")
    few = {**(embedder.config or {}), "num_hidden_layers": 2, "sliding_window_pattern": 2}
    write_embedder(tmp_path, embedder._replace(config=few, dense=()))
    texts = [[5, 6, 7], random_ids({"vocab_size": 256}, 3, 300)]
    for cache_type, tolerance in (("f32", 1e-5), ("f16", 1e-3)):
        with tinyllm.load(tmp_path, device="cpu", cache_type=cache_type) as cpu:
            expected = cpu.embed(texts)
            assert set(cpu.config.windows) == {11, 0}
        with load(tmp_path, cache_type=cache_type) as llm:
            vectors = llm.embed(texts)
            assert relative_error(vectors, expected) < tolerance
            host.shuffle(7)
            np.testing.assert_array_equal(llm.embed(texts[1]), vectors[1])
            host.shuffle(0)


def test_rows_and_layers(host: Host, tmp_path: Path) -> None:
    subject = Subject(tmp_path / "model.gguf", "Q4_0", "f16", (4, 2, 16))
    rows = [299, 0, 7, 7]
    logits = subject.forward([(0, 0, N_TOKENS)], rows=rows)
    np.testing.assert_array_equal(logits, subject.expected[rows])
    x = subject.forward([(0, 0, N_TOKENS)], layers=(0, 0), rows=[])
    np.testing.assert_array_equal(subject.forward([(0, 0, N_TOKENS)], x=x), subject.expected)
    np.testing.assert_array_equal(subject.forward([(1, 0, 5)], x=x[:5]), subject.expected[:5])
    subject.close()


def test_a_cancelled_call_leaves_nothing_behind(host: Host, tmp_path: Path) -> None:
    """It is cancelled while its launches are recorded; the next call records them anew."""
    subject = Subject(tmp_path / "model.gguf", "Q4_0", "f16", (4, 2, 16))
    with pytest.raises(tinyllm.CancelledError):
        subject.forward([(1, 0, 1)], should_stop=lambda: True)
    subject.check((1, 0, 1))
    subject.check((1, 1, 1))
    subject.close()


def test_a_cancelled_call_may_still_be_reading_its_block(host: Host, tmp_path: Path) -> None:
    """What it was given may not be there yet when the next call, of another shape, fills its own in."""
    subject = Subject(tmp_path / "model.gguf", "Q4_0", "f16", (4, 2, 16))
    with pytest.raises(tinyllm.CancelledError):
        subject.forward([(1, 0, 300)], should_stop=lambda: True)
    subject.check((1, 0, 66))
    subject.close()


def test_what_others_do_while_a_call_is_recorded_is_no_part_of_it(host: Host, tmp_path: Path) -> None:
    """Another model's pages are handed out and its weights freed, in the middle of this one's first call of
    a shape."""
    subjects = [Subject(tmp_path / f"{i}.gguf", "Q4_0", "f16", (4, 2, 16)) for i in range(2)]
    asked = []

    def stop() -> bool:
        if not asked:
            subjects[1].pool.clear_page(2 * TABLE)
            subjects[1].pool.copy_page(2 * TABLE + 1, 0, 64)
        asked.append(True)
        return False

    forward = subjects[0].forward([(1, 0, 1)], should_stop=stop)
    assert asked
    np.testing.assert_array_equal(forward, subjects[0].expected[:1])
    subjects[1].check((2, 0, 66))
    subjects[0].check((1, 1, 1))  # the same launches again
    subjects[1].check((2, 66, 1))
    for subject in subjects:
        subject.close()


def test_everything_is_freed(host: Host, tmp_path: Path) -> None:
    before = host.live()
    subjects = [
        Subject(tmp_path / "a.gguf", "Q4_0", "f16", (4, 2, 16)),
        Subject(tmp_path / "b.gguf", "F16", "f32", (3, 1, 12)),
    ]
    for first in range(3):  # several models at once, in turns
        for subject in subjects:
            subject.check((1, first, 1))
    assert host.live() > before
    for subject in subjects:
        subject.close()
    assert host.live() == before


# ---- what sampling needs, found on the device


@pytest.fixture
def chooser(host: Host, tmp_path: Path) -> Iterator[tinyllm.LLM]:
    """A vocabulary of several pieces, each logit there twice, one of them a NaN's for a prompt of token 7."""
    config = one_layer(hidden_size=64, intermediate_size=64, vocab_size=9000)
    weights = random_weights(config, seed=3)
    weights["lm_head.weight"][4500:] = weights["lm_head.weight"][:4500]
    weights["model.embed_tokens.weight"][7] = np.nan
    write_gguf(tmp_path / "model.gguf", config, weights)
    with load(tmp_path / "model.gguf", context=100) as llm:
        yield llm


def test_candidates(chooser: tinyllm.LLM) -> None:
    """Of few rows from a graph, of a long prompt's last, and in any order of equals the lower first."""
    model = chooser.model
    with pytest.raises(tinyllm.ArgumentError, match="expected 1 to 64"):
        model.candidates([1], [0], [0], [[0]], rows=[0], n=65, cache=chooser._cache.pool)
    pool = model.cache("f16", 4)
    pool.grow(4)
    for n_tokens, rows, n in ((3, [2, 0], 5), (3, [2, 1], 5), (3, [1], 64), (90, [89, 4, 4], 1)):
        tokens, positions, zeros = (
            np.arange(8, 8 + n_tokens),
            np.arange(n_tokens),
            np.zeros(n_tokens, np.int32),
        )
        call = (tokens, positions, zeros, [[0, 1]])
        logits = model.forward(*call, rows=rows, cache=pool)
        found = model.candidates(*call, rows=rows, n=n, cache=pool)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :n]
        np.testing.assert_array_equal(found.tokens, order)
        np.testing.assert_array_equal(found.logits, np.take_along_axis(logits, order, 1))
        sums = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True)).sum(axis=1)
        np.testing.assert_allclose(found.sums, sums, rtol=1e-6)
        np.testing.assert_array_equal(found.largest, logits.max(axis=1))
    pool.close()


def bits_of(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Masks [rows, tokens], a bit a token; what is past the last token is set, and means nothing."""
    packed = np.packbits(np.pad(allowed, ((0, 0), (0, 31)), constant_values=True), axis=1, bitorder="little")
    n_words = -(-allowed.shape[1] // 32)
    return np.ascontiguousarray(packed[:, : 4 * n_words]).view(np.uint32)


@pytest.mark.parametrize("size", [41, 4129, 9000])
def test_candidates_of_a_mask(size: int, host: Host, tmp_path: Path) -> None:
    """Random masks, also of all and of nothing: what is allowed in descending order, and of the whole row
    what a probability needs, so that a choice is that from the whole row with the mask, to the bit. The same
    launches again take another mask; a call without one is another graph."""
    config = one_layer(hidden_size=64, intermediate_size=64, vocab_size=size)
    weights = random_weights(config, seed=3)
    weights["lm_head.weight"][size // 2 : size // 2 * 2] = weights["lm_head.weight"][
        : size // 2
    ]  # equal ones
    write_gguf(tmp_path / "model.gguf", config, weights)
    random = np.random.default_rng(size)
    with load(tmp_path / "model.gguf", context=100) as llm:
        pool = llm.model.cache("f16", 4)
        pool.grow(4)
        for turn, (n_tokens, rows, n) in enumerate(
            [(3, [2, 0, 1], 5), (3, [0, 1, 2], 5), (3, [1, 2, 0], 41), (1, [0], 1), (90, [89, 4, 4, 7], 9)]
        ):
            positions = np.arange(n_tokens)
            call = ((positions + 8) % size, positions, np.zeros(n_tokens, np.int32), [[0, 1]])
            logits = llm.model.forward(*call, rows=rows, cache=pool)
            for _ in range(2):
                shares = random.choice([0, 2 / size, 0.02, 0.5, 0.999, 1], (len(rows), 1))
                allowed = random.random((len(rows), size)) < shares
                host.shuffle(turn)
                masks = bits_of(allowed)
                found = llm.model.candidates(*call, rows=rows, n=n, allowed=masks, cache=pool)
                masked = np.where(allowed, logits, np.float32(-np.inf))
                order = np.argsort(-masked, axis=1, kind="stable")[:, :n]
                expected = np.take_along_axis(masked, order, 1)
                np.testing.assert_array_equal(found.logits, expected)
                np.testing.assert_array_equal(found.tokens, np.where(expected == -np.inf, -1, order))
                np.testing.assert_array_equal(found.largest, logits.max(axis=1))
                for i in np.flatnonzero(allowed.any(axis=1)):
                    for sampler in (
                        Sampler(tinyllm.SamplingParams(temperature=0), size),
                        Sampler(tinyllm.SamplingParams(temperature=3, top_k=n - 1 or 40, seed=turn), size),
                    ):
                        if (sampler.n_candidates or size) <= n:
                            whole = sampler(logits[i], [], 5, masks[i])
                            assert sampler(found[int(i)], [], 5) == whole
                            assert allowed[i, whole.token]
            every = llm.model.candidates(*call, rows=rows, n=n, cache=pool)
            np.testing.assert_array_equal(every.tokens, np.argsort(-logits, axis=1, kind="stable")[:, :n])
            np.testing.assert_array_equal(every.sums, found.sums)
        for wrong in (masks[1:], masks[:, 1:], masks.T, masks[0]):
            with pytest.raises(tinyllm.ArgumentError, match=rf"allowed must be \[4, {-(-size // 32)}\]"):
                llm.model.candidates(*call, rows=rows, n=n, allowed=wrong, cache=pool)
        with pytest.raises(TypeError, match="allowed must be uint32, not bool"):
            llm.model.candidates(*call, rows=rows, n=n, allowed=allowed, cache=pool)  # type: ignore[arg-type]
        pool.close()
    host.shuffle(0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "top_logprobs": 9},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1, "top_k": 3, "typical_p": 0.9, "top_logprobs": 20},
        {"temperature": 1, "top_k": 1},
    ],
)
def test_choosing_from_candidates_is_choosing_from_all(
    options: dict[str, Any], chooser: tinyllm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    find = chooser.model.candidates

    def candidates(*arguments: Any, **named: Any) -> Any:
        asked.append(named["n"])
        return find(*arguments, **named)

    monkeypatch.setattr(chooser.model, "candidates", candidates)
    prompts = [[1, 2, 3], [4, 5]]
    wanted = {"max_tokens": 6, "seed": 5, "logprobs": True, **options}
    some = chooser(prompts, **wanted)
    assert len(asked) >= 6
    monkeypatch.setattr(backends.Model, "most_candidates", 0)
    every = chooser(prompts, **wanted)
    assert len(asked) < 12
    for a, b in zip(some, every, strict=True):
        assert (a.tokens, a.logprobs, a.top_logprobs) == (b.tokens, b.logprobs, b.top_logprobs)


BALL = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "size": {"type": "integer"}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_forms_are_chosen_from_candidates(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of one prompt, tokens without a choice, a free text in the same calls, and a form that
    opens the reasoning it is not for: the tokens and log probabilities of whole rows, of which none is
    fetched."""
    options: dict[str, Any] = {"logprobs": True, "max_tokens": 9, "temperature": 2, "seed": 3}
    chat: dict[str, Any] = {"regex": "<think>[a-z]{3}", "chat_template": PLAIN_TEMPLATE, **options}
    words: dict[str, Any] = {"choices": ["yes", "no"], "logprobs": True, "temperature": 0}

    def made(llm: tinyllm.LLM) -> list[tuple[list[int], list[float]]]:
        async def together() -> list[Any]:
            samples = llm.acall("A ball", n=2, json_schema=BALL, **options)
            return [*await asyncio.gather(samples, llm.acall("One day", **options))]

        samples, free = asyncio.run(together())
        thought = llm.chat([{"role": "user", "content": "Once"}], **chat)
        texts = [*samples, free, thought, llm("Is it?", **words)]
        return [(text.tokens, text.logprobs) for text in texts]

    config = one_layer(hidden_size=64, intermediate_size=64, vocab_size=400)
    weights = random_weights(config, seed=3)
    write_gguf(tmp_path / "model.gguf", config, weights, tokenizer=small_tokenizer(400))
    with load(tmp_path / "model.gguf") as llm:
        with monkeypatch.context() as patch:
            patch.setattr(llm.model, "forward", None)
            some = made(llm)
        # The likeliest tokens of all need not be among those that a form allows.
        word = llm("Is it?", top_logprobs=3, **words)
        assert (word.tokens, word.logprobs) == some[-1]
        monkeypatch.setattr(backends.Model, "most_candidates", 0)
        assert some == made(llm)


def test_no_number_among_candidates_is_said(chooser: tinyllm.LLM) -> None:
    with pytest.raises(tinyllm.FormatError, match="NaN"):
        chooser([7], max_tokens=1, temperature=0)


@pytest.mark.parametrize(
    "options",
    [{"top_k": 0}, {"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.1}, {"processors": [lambda x, _: x]}],
)
def test_what_needs_all_logits_gets_them(
    options: dict[str, Any], chooser: tinyllm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chooser.model, "candidates", None)
    assert len(chooser([1, 2], max_tokens=2, temperature=1, seed=1, **options).tokens) == 2


# ---- adapters


ON_GPU = [case for case in adapter_cases() if case.name not in ("mixtral", "stacked", "experts")]


@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: case.name)
def test_adapters_equal_peft(case: Case, host: Host, tmp_path: Path) -> None:
    """As on the CPU (test_adapters.py): within 1e-4 of PEFT's largest logit, candidates and vectors as well.
    Nothing is left behind."""
    arrays = np.load(GOLDEN_DIR / "adapters.npz")
    positions, expected = arrays[f"{case.name}.positions"], arrays[f"{case.name}.logits"]
    ids = random_ids(case.spec.config, case.spec.seed, 70)
    adapters = {"it": write_adapter(case, tmp_path / "adapter")}
    live = host.live()
    with load(golden_model(case.spec, tmp_path / "model"), cache_type="f32", adapters=adapters) as llm:
        logits = llm.logits(ids, adapter="it")
        assert relative_error(logits[positions], expected) < 1e-4
        one = llm(ids, max_tokens=1, temperature=0, adapter="it")
        assert one.tokens == [int(logits[-1].argmax())]
        assert llm(ids, max_tokens=1, temperature=0).tokens == [int(llm.logits(ids)[-1].argmax())]
    del llm
    assert host.live() == live


def test_adapters_of_one_call(host: Host, tmp_path: Path) -> None:
    """Rows with different adapters, several and none: the bits of each alone, in prompts and step by step."""
    case = adapter_case("all")
    paths = {f"a{i}": write_adapter(case, tmp_path / f"a{i}", seed=3000 + i) for i in range(2)}
    choices: list[Any] = ["a0", None, [("a1", 0.5), ("a0", 2.0)]]
    ids = np.array(random_ids(case.spec.config, case.spec.seed, 12))
    with load(golden_model(case.spec, tmp_path / "model"), cache_type="f32", adapters=paths) as llm:
        uses = [llm._applied(choice).uses for choice in choices]
        pool = llm.model.cache("f32", len(uses))
        pool.grow(len(uses))

        def forward(sequences: list[int], first: int, last: int) -> F32:
            m = len(sequences)
            return llm.model.forward(
                np.tile(ids[first:last], m),
                np.tile(np.arange(first, last), m),
                np.repeat(np.arange(m), last - first),
                np.array(sequences)[:, None, None],
                adapters=[uses[s] for s in sequences] if any(uses[s] for s in sequences) else None,
                cache=pool,
            ).reshape(m, last - first, -1)

        alone = np.concatenate([forward([s], 0, len(ids)) for s in range(3)])
        assert len({row.tobytes() for row in alone}) == 3
        np.testing.assert_array_equal(forward([0, 1, 2], 0, len(ids)), alone)
        steps = [forward([0, 1, 2], i, i + 1) for i in range(len(ids))]
        np.testing.assert_array_equal(np.concatenate(steps, axis=1), alone)


def test_adapters_of_experts_are_refused(host: Host, tmp_path: Path) -> None:
    """By name when they are loaded, and by the backend itself."""
    case = adapter_case("experts")
    path = write_adapter(case, tmp_path / "adapter")
    with load(golden_model(case.spec, tmp_path / "model")) as llm:
        with pytest.raises(tinyllm.UnsupportedError, match="adapters of experts run on the CPU only"):
            llm.add_adapter("it", path)
        llm.model.device = "cpu"
        llm.add_adapter("it", path)
        with pytest.raises(tinyllm.UnsupportedError, match=r"\d+ of an adapter's \d+ pairs are of experts"):
            llm([1, 2], max_tokens=1, adapter="it")
