"""tinyllm-bench, the synthetic models it measures, and the comparison with other engines.

No figure here is a claim about speed: the tests look at what is counted, and at what is written. The gguf package
is the second opinion on the files; `--buffer 1` keeps the samples of the read bandwidth short.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import reference

import tinyllm
from tinyllm import backends, benchmark
from tinyllm.cli.bench import main
from tinyllm.errors import ArgumentError, MemoryLimitError, UnsupportedError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RUN = [sys.executable, "-m", "tinyllm.cli.bench"]
LLAMA_BENCH_KEYS = (
    "build_commit build_number cpu_info gpu_info backends model_filename model_type model_size model_n_params "
    "n_batch n_ubatch n_threads type_k type_v n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts "
    "samples_ns samples_ts"
).split()
OUR_KEYS = (
    "version test isa n_sequences median_ns median_ts weight_bytes_per_token kv_bytes_per_position bytes_per_step "
    "gb_s percent_of_read read_gb_s read_gb_s_min read_gb_s_max samples_read_gb_s gmac_s load_s peak_memory_bytes "
    "file_hash"
).split()


def script(name: str) -> ModuleType:
    """A script in benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


synthetic, peers = script("synthetic"), script("peers")
TINY = synthetic.SHAPES["tiny"]


def write_tiny(path: Path, type: str, **options: Any) -> Path:
    synthetic.write(path, TINY, synthetic.TYPES[type], **options)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bench") / "tiny.gguf", "q4_k_m")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs tinyllm-bench in this process."""

    def run(*argv: str | Path) -> Result:
        code = main([str(arg) for arg in argv])
        return Result(code, *capsys.readouterr())

    return run


def rows(cli: Cli, *argv: str | Path) -> list[dict[str, Any]]:
    result = cli(*argv, "--buffer", "1", "-o", "json")
    assert result.code == 0, result.err
    assert result.err == "", "quiet where stderr is no terminal"
    found: list[dict[str, Any]] = json.loads(result.out)
    return found


# --- synthetic files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", synthetic.TYPES)
def test_every_type_is_read_by_gguf_and_gives_finite_logits(type: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", type)
    reader = gguf.GGUFReader(path)
    wanted = {t.name: t for t in synthetic.tensors(TINY, synthetic.TYPES[type])}
    assert [t.name for t in reader.tensors] == list(wanted)
    for tensor in reader.tensors:
        want = wanted[tensor.name]
        assert tuple(int(n) for n in tensor.shape)[::-1] == want.shape
        assert tensor.tensor_type.name == want.format
        assert tensor.n_bytes == want.n_bytes
        if len(want.shape) == 2:
            # A rough bound: 2^17 values and more in blocks of up to 256 that share a scale (of relative deviation
            # 0.29), so the mean square is off by under 1 / sqrt(512) * sqrt(1 + 0.35) (K-quants' spread), and
            # MXFP4's scale, a power of two, by up to sqrt(2).
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            ratio = float(np.sqrt((values**2).mean() * want.shape[1]))
            slack = math.sqrt(2) if want.format == "MXFP4" else 1.0
            assert 0.85 / slack < ratio < 1.15 * slack, tensor.name
    with tinyllm.load(path, context=64) as llm:
        logits = llm.logits(list(range(1, 33)))
        assert llm.tokenizer is not None
        assert llm.tokenizer.decode(llm.tokenizer.encode("hello")) == "hello"
    assert np.isfinite(logits).all()
    # Rows of deviation about 1 / sqrt(k) times a normed vector of size sqrt(k): about 1.
    assert 0.3 < logits.std() < 3
    assert len(set(logits.argmax(axis=1).tolist())) > 4, "what comes out depends on what goes in"


@pytest.mark.parametrize("format", synthetic.SCALES)
def test_scales_say_what_gguf_dequantizes(format: str) -> None:
    n_blocks = 1 << 19 >> (8 if synthetic.FORMATS[synthetic.FORMAT_IDS[format]].block == 256 else 5)
    blocks = synthetic.tile(format, n_blocks, 1.0, seed=1)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[format]).astype(np.float64)
    values = values.reshape(n_blocks, -1)
    squares = (values**2).mean(axis=1)
    # Scales are uniform in [0.5, 1.5], of mean square 13/12. Five standard errors, from the blocks themselves.
    error = 5 * squares.std() / math.sqrt(n_blocks)
    assert abs(squares.mean() - 13 / 12) < error + 0.002 * 13 / 12, "0.002: the table has four digits"
    means = values.mean(axis=1)
    assert abs(means.mean()) < 5 * means.std() / math.sqrt(n_blocks) + 0.002


def test_sizes_are_those_of_the_real_files() -> None:
    """Parameters and tensor bytes as llama-bench prints them of the published files."""
    MiB, GiB = 1 << 20, 1 << 30
    for shape, type, n_params, size, unit in (
        ("llama-3.2-1b", "q4_k_m", 1_235_814_432, 762.81, MiB),
        ("llama-2-7b", "q4_0", 6_738_415_616, 3.56, GiB),
        ("llama-2-7b", "q4_k_m", 6_738_415_616, 3.80, GiB),
        ("llama-3.1-8b", "q4_k_m", 8_030_261_312, 4.58, GiB),
    ):
        contents = synthetic.tensors(synthetic.SHAPES[shape], synthetic.TYPES[type])
        assert sum(math.prod(t.shape) for t in contents) == n_params
        assert round(sum(t.n_bytes for t in contents) / unit, 2) == size


def test_rope_factors_are_those_of_llama_3(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "q8_0")
    config = {"hidden_size": TINY.dim, "num_attention_heads": TINY.n_heads}
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    plain, _ = reference.rope_frequencies({**config, "rope_parameters": {"rope_theta": TINY.rope_theta}})
    scaled, _ = reference.rope_frequencies(
        {**config, "rope_parameters": {"rope_theta": TINY.rope_theta, **scaling}}
    )
    (held,) = (t.data for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    np.testing.assert_allclose(held, plain / scaled, rtol=2 * 2.0**-24)


def test_same_seed_same_file_and_nothing_half_written(tmp_path: Path) -> None:
    a, b, c = (write_tiny(tmp_path / f"{i}.gguf", "q4_0", seed=i // 2) for i in range(3))
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()
    with pytest.raises(OSError, match="No space"):
        write_tiny(Path("/dev/full"), "q4_0") if False else _write_full(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.gguf", "1.gguf", "2.gguf"]
