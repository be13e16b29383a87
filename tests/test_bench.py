"""tinyllm-bench, the synthetic models it measures, and the comparison with other engines.

No figure here is a claim about speed: the tests look at what is counted, and at what is written. The gguf
package is the second opinion on the files; `--buffer 1` keeps the samples of the read bandwidth short.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import reference
from helpers_cli import Cli, in_process
from helpers_gguf import write_gguf
from helpers_models import golden_spec, random_weights

import tinyllm
from tinyllm import backends
from tinyllm.cli import bench
from tinyllm.cli.bench import main
from tinyllm.errors import ArgumentError, MemoryLimitError, UnsupportedError
from tinyllm.measure import benchmark
from tinyllm.quantization.mixes import MIXES

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LLAMA_BENCH_KEYS = [
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type",
    "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_prompt",
    "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts",
]  # fmt: skip
OUR_KEYS = {
    "version", "test", "isa", "n_sequences", "median_ns", "median_ts", "min_ts", "max_ts", "gb_s",
    "weight_bytes_per_token", "kv_bytes_per_position", "bytes_per_step", "percent_of_read", "read_gb_s",
    "read_gb_s_min", "read_gb_s_max", "samples_read_gb_s", "gmac_s", "peak_gmac_s", "percent_of_peak",
    "load_s", "peak_memory_bytes", "file_hash", "device",
}  # fmt: skip


def script(name: str) -> ModuleType:
    """A script in benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


synthetic, peers, regressions = script("synthetic"), script("peers"), script("regressions")
TINY = synthetic.SHAPES["tiny"]


def write_tiny(path: Path, type: str, **options: Any) -> Path:
    synthetic.write(path, TINY, synthetic.TYPES[type], **options)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bench") / "tiny.gguf", "q4_k_m")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs tinyllm-bench in this process."""
    return in_process(main, monkeypatch, capsys)


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
            # The mean square is 1 / k, times 13/12 where scales are uniform in [0.5, 1.5]; MXFP4's scale is
            # rounded to a power of two. Five standard errors, from the blocks; 1 %: float16 scales.
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            block = synthetic.FORMATS[synthetic.FORMAT_IDS[want.format]].block
            squares = (values.reshape(-1, block) ** 2).mean(axis=1) * want.shape[1]
            error = 5 * squares.std() / math.sqrt(len(squares)) + 0.01
            least = most = 13 / 12 if want.format in synthetic.SCALES else 1.0
            if want.format in ("MXFP4", "NVFP4"):
                least, most = 0.5, 2.0
            assert least - error < squares.mean() < most + error, tensor.name
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
    # Scales are uniform in [0.5, 1.5], of mean square 13/12. Five standard errors, from the blocks.
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


def test_same_seed_same_file(tmp_path: Path) -> None:
    a, b, c = (write_tiny(tmp_path / f"{i}.gguf", "q4_0", seed=i // 2) for i in range(3))
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic.Weights, "pieces", full)
    assert synthetic.main(["--shape", "tiny", "--type", "q4_0", str(tmp_path / "a.gguf")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_is_copied(tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocab = data_dir / "vocab" / "ggml-vocab-llama-spm.gguf"
    path = tmp_path / "a.gguf"
    shape = TINY._replace(vocab_size=32000)
    synthetic.write(path, shape, synthetic.TYPES["q4_0"], vocab=vocab)
    with tinyllm.load(path, context=64) as llm:
        assert llm.tokenizer is not None
        text = "Once upon a time, 12 naïve 漢字"
        assert llm.tokenizer.encode(text) == tinyllm.load_tokenizer(vocab).encode(text)
    code = synthetic.main(["--shape", "tiny", "--type", "q4_0", "--vocab", str(vocab), str(tmp_path / "b")])
    assert code == 1
    assert capsys.readouterr().err == (
        f"synthetic.py: {vocab} has a vocabulary of 32000 tokens, tiny of 512\n"
    )


# --- what is counted ----------------------------------------------------------------------------------------


def test_bytes_of_a_step_are_the_sums_of_the_tensors(cli: Cli, tiny: Path) -> None:
    """By hand, for the tiny shape: 2 layers of dim 256, 4 heads and 2 kv heads of 64, ff 512, 512 tokens.
    Q4_K_M gives attn_v and ffn_down of the last layer Q6_K (the last eighth), and the output Q6_K.
    """
    panel = {name: n_bytes for _, name, _, _, n_bytes in backends._core.formats()}  # 16 rows' blocks, packed
    q, kv, ff = 256 * 256, 128 * 256, 512 * 256
    q4_k, q6_k = (panel[name] / 16 / 256 for name in ("q4_k", "q6_k"))  # bytes a weight
    layer_0 = (q + kv + kv + q + ff + ff + ff) * q4_k
    layer_1 = (q + kv + q + ff + ff) * q4_k + (kv + ff) * q6_k
    norms = (2 * 2 + 1) * 256 * 4
    weights = layer_0 + layer_1 + 512 * 256 * q6_k + norms  # the embedding's row is not counted
    position = 2 * 2 * 64 * 2 * 2  # k and v, kv heads, head_dim, layers, bytes of f16

    found = rows(cli, tiny, "-p", "3", "-n", "4", "-d", "0,70", "-b", "1,3", "-r", "1")
    by_name = {row["test"]: row for row in found}
    assert list(by_name) == ["pp3", "tg4", "tg4 x 3", "pp3 @ d70", "tg4 @ d70", "tg4 x 3 @ d70"]
    for name, sequences, depth in (
        ("tg4", 1, 0),
        ("tg4 x 3", 3, 0),
        ("tg4 @ d70", 1, 70),
        ("tg4 x 3 @ d70", 3, 70),
    ):
        row = by_name[name]
        assert row["weight_bytes_per_token"] == weights
        assert row["kv_bytes_per_position"] == position
        positions = sum(depth + i + 1 for i in range(4)) / 4
        assert row["bytes_per_step"] == weights + sequences * positions * position
        (ns,) = row["samples_ns"]
        assert row["samples_ts"] == [pytest.approx(4 * sequences / ns * 1e9)]
        assert row["gb_s"] == pytest.approx(row["bytes_per_step"] * 4 / ns)
        (around,) = row["samples_read_gb_s"]
        assert row["percent_of_read"] == pytest.approx(100 * row["gb_s"] / (sum(around) / 2))
        assert row["gmac_s"] == pytest.approx(
            4 * sequences * (2 * (2 * q + 2 * kv + 3 * ff) + 512 * 256) / ns
        )
    prompt = by_name["pp3"]
    assert prompt["bytes_per_step"] == prompt["gb_s"] == 0
    assert prompt["gmac_s"] == pytest.approx(
        (3 * 2 * (2 * q + 2 * kv + 3 * ff) + 512 * 256) / prompt["samples_ns"][0]
    )
    assert prompt["percent_of_peak"] == pytest.approx(100 * prompt["gmac_s"] / prompt["peak_gmac_s"])
    assert by_name["tg4"]["percent_of_peak"] is by_name["tg4"]["peak_gmac_s"] is None


def test_the_peak_of_a_model_is_that_of_its_formats(tiny: Path, tmp_path: Path) -> None:
    """Quantized layers multiply int8, float ones floats; a mixture's router is float in either."""
    limits = benchmark.Limits(10.0, int8_gmac_s=400.0, float_gmac_s=100.0)
    assert limits.gmac_s(0.0) == 400
    assert limits.gmac_s(1.0) == 100
    assert limits.gmac_s(0.5) == 160  # half of the work at each rate
    assert benchmark.read_facts(str(tiny)).float_share == 0
    assert benchmark.read_facts(str(BENCHMARKS / "stories-f16.gguf")).float_share == 1
    assert benchmark.read_facts(str(BENCHMARKS / "stories-f16.gguf"), "q4_0").float_share == 0
    config = golden_spec("mixtral").config
    write_gguf(tmp_path / "moe.gguf", config, random_weights(config, 1), format="Q8_0")
    dim, ff, n, used = (config[key] for key in (
        "hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok"))  # fmt: skip
    facts = benchmark.read_facts(str(tmp_path / "moe.gguf"))
    attention = 2 * dim * dim + 2 * dim * dim // config["num_attention_heads"] * config["num_key_value_heads"]
    layers = config["num_hidden_layers"]
    assert facts.layer_macs == layers * (attention + n * dim + used * 3 * ff * dim)
    floats = n * dim + (used * dim * ff if ff % 32 else 0)  # rows of ff numbers fit no block of Q8_0
    assert facts.float_share == pytest.approx(layers * floats / facts.layer_macs)


def test_what_the_processor_multiplies_is_a_rate_or_an_error() -> None:
    for threads in (1, 2):
        rates = backends.multiply_rate(threads, 2)
        assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    for wrong in ((0, 1), (257, 1), (1, 0)):
        with pytest.raises(ArgumentError, match="repetitions"):
            backends.multiply_rate(*wrong)
    sample = benchmark.sample_limits(benchmark.cases(n_prompt=[3], n_gen=[2], threads=[1])[0], 1 << 20)
    assert min(sample.read_gb_s, sample.int8_gmac_s, sample.float_gmac_s) > 0


def test_runs_compute_what_they_claim_to(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call a case makes; the same logits at a position, whatever earlier cases left in the cache."""
    calls: list[tuple[list[int], list[int], int]] = []
    last: dict[tuple[int, int], bytes] = {}  # (position, sequence) -> logits
    forward = backends.Model.forward

    def watching(
        self: backends.Model, tokens: Any, positions: Any, sequences: Any, *args: Any, **kw: Any
    ) -> Any:
        out = forward(self, tokens, positions, sequences, *args, **kw)
        calls.append((list(positions), list(sequences), len(out)))
        chosen = range(len(positions)) if kw.get("rows") is None else kw["rows"]
        for row, i in zip(out, chosen, strict=True):
            key = (int(positions[i]), int(sequences[i]))
            assert last.setdefault(key, row.tobytes()) == row.tobytes()
        return out

    monkeypatch.setattr(backends.Model, "forward", watching)
    n_chunk = benchmark.CHUNK
    of = benchmark.cases(n_prompt=[n_chunk + 8], n_gen=[2], n_depth=[0, 65], n_sequences=[1, 2])
    with benchmark.loaded(str(tiny), of) as subject:
        calls.clear()
        for case in (*of, *reversed(of)):
            subject.run(case)
    both = [n_chunk, 8]
    for (name, first, sequences), case in zip(
        [("pp", 0, 1), ("tg", 0, 1), ("tg", 0, 2), ("pp", 65, 1), ("tg", 65, 1), ("tg", 65, 2)],
        of,
        strict=True,
    ):
        assert case.name.startswith(name)
        made = [calls.pop(0) for _ in range(2)]
        if name == "pp":
            assert [len(positions) for positions, _, _ in made] == both
            assert [n_logits for _, _, n_logits in made] == [0, 1], "the last token's alone"
            assert made[0][0] + made[1][0] == list(range(first, first + n_chunk + 8))
        else:
            together = list(range(sequences))
            assert made == [([first + i] * sequences, together, sequences) for i in range(2)]


def test_all_sequences_see_the_same_past(tiny: Path) -> None:
    """Sequence 1's pages are copies of sequence 0's, in pages of their own."""
    (case,) = benchmark.cases(n_prompt=[], n_gen=[1], n_depth=[130], n_sequences=[2])
    with benchmark.loaded(str(tiny), [case]) as subject:
        table = subject._tables["f16"]
        assert len(set(table.ravel().tolist())) == table.size
        positions = np.array([130, 130], np.int32)
        logits = subject._model.forward(
            subject._ids[positions], positions, [0, 1], table, cache=subject._pools["f16"]
        )
        with tinyllm.load(tiny) as llm:
            assert logits[0].tobytes() == logits[1].tobytes() == llm.logits(subject._ids[:131])[-1].tobytes()


def test_nothing_is_left_in_memory(cli: Cli, tiny: Path) -> None:
    before = backends.live_allocations()
    isa = backends.info()["isa"]
    other = next((name for name in backends.isa_names() if name != isa), isa)  # the next best: scalar is slow
    rows(cli, tiny, "-p", "2", "-n", "1", "-r", "1", "--isa", other, "--cache-type", "f16,f32")
    assert backends.live_allocations() == before
    assert backends.info()["isa"] == isa


def test_cases_are_every_combination_once() -> None:
    of = benchmark.cases(
        n_prompt=[0, 16], n_gen=[4, 4], n_depth=[0, 8], n_sequences=[1, 2], threads=[1, 2], isa=["scalar"]
    )
    names = ["pp16", "tg4", "tg4 x 2", "pp16 @ d8", "tg4 @ d8", "tg4 x 2 @ d8"]
    assert [(case.threads, case.name) for case in of] == [(t, name) for t in (1, 2) for name in names]
    with pytest.raises(ArgumentError, match="nothing to measure"):
        benchmark.cases(n_prompt=[0], n_gen=[0])
    with pytest.raises(UnsupportedError, match="'nosuch' is not usable"):
        benchmark.cases(isa=["nosuch"])


def test_models_take_turns_and_every_other_turn_runs_backwards(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tiny(tmp_path / "other.gguf", "q4_0")
    order: list[str] = []
    run = benchmark.Subject.run
    monkeypatch.setattr(
        benchmark.Subject, "run", lambda s, case: (order.append(Path(s.facts.name).stem), run(s, case))[1]
    )
    of = benchmark.cases(n_prompt=[2], n_gen=[])
    results = benchmark.measure([str(tiny), str(other)], of, repetitions=3, read_bytes=1 << 20)
    assert order == ["tiny", "other", *["tiny", "other"], *["other", "tiny"], *["tiny", "other"]]
    assert [len(result.limits) for result in results] == [3, 3]


def test_cache_that_does_not_fit_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = benchmark.cases(n_prompt=[], n_gen=[1], n_depth=[1000], n_sequences=[16])
    # One sequence fits: 16 pages of 64 positions of 1024 bytes; sixteen do not.
    monkeypatch.setattr(backends, "free_memory", lambda: 9_000_000)
    words = "16 x 1024 positions takes 16777216 bytes, 9000000 are free"
    with pytest.raises(MemoryLimitError, match=words), benchmark.loaded(str(tiny), of):
        pass


# --- what is written ----------------------------------------------------------------------------------------


def test_json_has_llama_benchs_keys_and_ours(cli: Cli, tiny: Path) -> None:
    found = rows(cli, tiny, "-p", "4", "-n", "2", "-r", "3", "-t", "1")
    facts = gguf.GGUFReader(tiny)
    for row in found:
        assert list(row)[: len(LLAMA_BENCH_KEYS)] == LLAMA_BENCH_KEYS
        assert set(row) - set(LLAMA_BENCH_KEYS) == OUR_KEYS
        assert row["model_filename"] == str(tiny)
        assert row["model_type"] == "llama 1.44M Q4_K+Q6_K"
        in_file = [t for t in facts.tensors if t.name != "rope_freqs.weight"]
        assert row["model_n_params"] == sum(int(t.n_elements) for t in in_file)
        assert row["model_size"] == sum(int(t.n_bytes) for t in in_file)
        assert (row["n_threads"], row["type_k"], row["type_v"], row["n_depth"]) == (1, "f16", "f16", 0)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["test_time"])
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == len(row["samples_read_gb_s"]) == 3
        assert row["avg_ts"] == pytest.approx(np.mean(row["samples_ts"]))
        assert row["stddev_ts"] == pytest.approx(np.std(row["samples_ts"], ddof=1))
        assert row["median_ts"] == np.median(row["samples_ts"])
        assert row["avg_ns"] == pytest.approx(np.mean(row["samples_ns"]), abs=1)
        assert row["median_ns"] == np.median(row["samples_ns"])
        reads = np.array(row["samples_read_gb_s"])
        assert reads.min() == row["read_gb_s_min"] > 0
        assert (row["read_gb_s_max"], row["read_gb_s"]) == (reads.max(), np.median(reads))
        assert row["peak_memory_bytes"] > row["weight_bytes_per_token"]
        assert row["load_s"] > 0
        assert row["file_hash"] == "sha256:" + hashlib.sha256(tiny.read_bytes()).hexdigest()
        assert row["version"] == backends.version
        assert row["cpu_info"]
    assert [(row["n_prompt"], row["n_gen"]) for row in found] == [(4, 0), (0, 2)]


def test_markdown_is_a_table_whose_rows_say_it_all(cli: Cli, tiny: Path) -> None:
    result = cli(tiny, "-p", "4", "-n", "2", "-b", "2", "-r", "2", "--buffer", "1", "--wide")
    assert result.code == 0
    header, rule, *body = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in result.out.splitlines()
    )
    assert all(re.fullmatch(r"-+:?", cell) for cell in rule)
    assert {len(cells) for cells in (header, rule, *body)} == {16}
    prompt, decode = (dict(zip(header, cells, strict=True)) for cells in body)
    assert (prompt["test"], decode["test"]) == ("pp4", "tg2 x 2")
    assert (prompt["GB/s"], prompt["% of read"]) == ("", "")
    assert prompt["% of peak"].isdecimal()
    assert decode["% of peak"] == ""
    number = r"\d+(\.\d+)?"
    for row in (prompt, decode):
        assert re.fullmatch(rf"{number} ± {number}", row["t/s"])
        assert re.fullmatch(rf"{number} \({number}-{number}\)", row["read GB/s"])
        assert row["file"] == "sha256:" + hashlib.sha256(tiny.read_bytes()).hexdigest()[:12]
        assert f"threads, tinyllm {backends.version}" in row["machine"]
        assert row["machine"].startswith(benchmark.cpu_name())
    assert re.fullmatch(number, decode["% of read"])
    lines = result.out.splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


def test_a_table_fits_a_hundred_columns(cli: Cli, tiny: Path) -> None:
    """What is the same in all rows stands above them; what differs in a column."""
    theirs = ("-m", tiny, "-fa", "0,1", "-ngl", "0")
    result = cli(*theirs, "-p", "4", "-n", "2", "-r", "1", "--buffer", "1")
    assert "-fa means nothing here" in result.err
    above, _, body = result.out.partition("\n\n")
    above = " ".join(above.split())
    for fact in (
        benchmark.cpu_name(),
        f"threads, f16 cache, tinyllm {backends.version} memory reads ",
        f"{tiny.name}: ",
        "sha256:" + hashlib.sha256(tiny.read_bytes()).hexdigest()[:12],
        " parameters, ",
        "loaded in ",
        "of memory",
    ):
        assert fact in above, fact
    header, _, prompt, *_ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines())
    assert header == ["test", "t/s", "GB/s", "% of read", "GMAC/s", "% of peak"]
    assert prompt[0] == "pp4"
    assert max(map(len, result.out.splitlines())) <= 100


def record(**changes: Any) -> dict[str, Any]:
    """A row of figures as wide as they come."""
    row: dict[str, Any] = dict.fromkeys([*LLAMA_BENCH_KEYS, *OUR_KEYS], 12345.678)
    return row | {
        "model_filename": "m.gguf", "model_type": "llama Q4_K_M", "gpu_info": "", "device": "cpu",
        "cpu_info": "AMD EPYC 9B14", "isa": "avx512vnni", "n_threads": 2, "type_k": "f16", "n_gen": 128,
        "test": "tg128 @ d16384 x 16", "file_hash": "sha256:0", "avg_ts": 57106.66, "stddev_ts": 3400.79,
        **changes,
    }  # fmt: skip


def test_tables_of_much_that_differs_fit_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    long = "Meta-Llama-3.1-8B-Instruct-{}-with-a-very-long-name.gguf"
    few = [record(model_filename=long.format(t), file_hash=f"sha256:{t}") for t in ("q4_0", "q8_0")]
    all_of_it = [
        record(model_filename=name, file_hash=f"sha256:{name}", type_k=cache, isa=isa, n_threads=threads)
        for name in (long.format("q4_0"), "b.gguf")
        for cache, isa, threads in (("f16", "avx2", 1), ("q8_0", "avx512vnni", 128))
    ]
    for records, columns in ((few, ["model"]), (all_of_it, ["model", "cache", "isa", "threads"])):
        bench._write_md(records)
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 100
        header = [cell.strip() for cell in out.partition("\n\n")[2].splitlines()[0].split("|")[1:-1]]
        assert header[: len(columns) + 2] == [*columns, "test", "t/s"]
        assert " ".join(out.split()).count(long.format("q4_0")) == 1, "whole names stand above"
    assert "57107 ± 3401" in out


def test_csv_has_a_line_a_row(cli: Cli, tiny: Path) -> None:
    result = cli(tiny, "-p", "4", "-n", "2", "-r", "1", "--buffer", "1", "-o", "csv")
    assert result.code == 0
    found = list(csv.DictReader(io.StringIO(result.out)))
    assert [row["test"] for row in found] == ["pp4", "tg2"]
    assert all(float(row["avg_ts"]) > 0 and None not in row for row in found)
    assert not [key for key in found[0] if key.startswith("samples")]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 2, "no MODEL given"),
        (["{tiny}", "-p", "x"], 2, "argument -p/--n-prompt: 'x' is not whole numbers with commas between"),
        (["{tiny}", "-p", "-1"], 2, "argument -p/--n-prompt"),
        (["{tiny}", "-b", "0"], 2, "argument -b/--batch: '0' is not a whole number of 1 or more"),
        (["{tiny}", "-r", "0"], 2, "argument -r/--repetitions: '0' is not a whole number of 1 or more"),
        (["{tiny}", "-p", "0", "-n", "0"], 2, "there is nothing to measure"),
        (["{tiny}", "-t", "100000"], 2, "threads is 100000, not in 1..256"),
        (["{tiny}", "-o", "xml"], 2, "argument -o/--output: invalid choice: 'xml'"),
        (["{tiny}", "--cache-type", "q3"], 2, "cache type is 'q3'; it is one of "),
        (["{tiny}", "--isa", "mmx"], 1, "instruction set 'mmx' is not usable on this machine"),
        (["{tiny}", "--nosuch"], 2, "there is no option --nosuch"),
        (["nosuch.gguf"], 1, "nosuch.gguf: no such file or directory"),
        (["{junk}"], 1, "not a model"),
    ],
)
def test_errors_are_one_line(
    cli: Cli, tiny: Path, tmp_path: Path, options: list[str], code: int, said: str
) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_text("no model")
    result = cli(
        *(option.format(tiny=tiny, junk=junk) for option in options), *(["--buffer", "1"] if options else [])
    )
    assert (result.code, result.out) == (code, "")
    assert re.fullmatch(r"tinyllm-bench: [^\n]+\n", result.err), result.err
    assert said in result.err


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from tinyllm.cli import bench\n"
        "try: bench.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('numpy' in sys.modules or 'tinyllm.measure.benchmark' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for option in (
        "--n-prompt",
        "--n-gen",
        "--n-depth",
        "--batch",
        "--threads",
        "--isa",
        "--cache-type",
        "--output",
    ):
        assert option in done.stdout


# --- the machine --------------------------------------------------------------------------------------------


def test_read_bandwidth_is_a_rate_or_an_error() -> None:
    for threads in (1, 2, 3):
        gb_s = backends.read_bandwidth(3 << 20, threads, 2)
        assert math.isfinite(gb_s)
        assert gb_s > 0
    for wrong in (((1 << 20) - 1, 1, 1), (1 << 20, 0, 1), (1 << 20, 257, 1), (1 << 20, 1, 0)):
        with pytest.raises(ArgumentError, match="at least 1048576"):
            backends.read_bandwidth(*wrong)


def test_large_files_are_hashed_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "HASHED_WHOLE", 3_000_000)
    data = np.random.default_rng(0).integers(0, 256, 70 << 20, dtype=np.uint8)
    path, small = tmp_path / "large", tmp_path / "small"
    path.write_bytes(data.tobytes())
    small.write_bytes(b"small")
    starts = [i * (len(data) - (1 << 20)) // 63 for i in range(64)]
    size = len(data).to_bytes(8, "little")
    pieces = b"".join(data[start : start + (1 << 20)].tobytes() for start in starts)
    wanted = "sha256-sampled:" + hashlib.sha256(size + pieces).hexdigest()
    assert benchmark.hash_files([path]) == wanted
    assert benchmark.hash_files([small]) == "sha256:" + hashlib.sha256(b"small").hexdigest()
    both = hashlib.sha256((5).to_bytes(8, "little") + b"small" + size + pieces).hexdigest()
    assert benchmark.hash_files([small, path]) == f"sha256-sampled:{both}"
    for at in (0, len(data) - 1, starts[30]):
        data[at] ^= 1
        path.write_bytes(data.tobytes())
        assert benchmark.hash_files([path]) != wanted
        data[at] ^= 1


# --- other engines ------------------------------------------------------------------------------------------

FAKE_BENCH = """#!{python}
import json, pathlib, sys
log = pathlib.Path({log!r})
with log.open("a") as file: file.write(json.dumps(sys.argv[1:]) + "\\n")
n = len(log.read_text().splitlines())
if "--broken" in sys.argv: sys.exit("no AVX here")
print("a line of chatter")
print(json.dumps([{{"build_commit": "abc", "build_number": 7, "samples_ts": [1000.0 * n]}}]))
"""


@pytest.fixture
def fake_bench(tmp_path: Path) -> Path:
    """A llama-bench whose n-th run has 1000 n tokens a second, and that logs its options."""
    path = tmp_path / "fake-bench"
    path.write_text(FAKE_BENCH.format(python=sys.executable, log=str(tmp_path / "log")))
    path.chmod(0o755)
    return path


def test_peers_take_turns_and_losing_rows_are_printed(
    tiny: Path,
    fake_bench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran: list[str] = []

    def ours(engine: Any, setting: Any) -> tuple[float, str]:
        ran.append(engine.name)
        return (500.0, "0") if engine.name == "tinyllm" else run_engine(engine, setting)

    run_engine = peers.run_engine
    monkeypatch.setattr(peers, "run_engine", ours)
    monkeypatch.setattr(peers, "IN_THIS_FILE", {"absent": ("no_such_module", None)})
    code = peers.main([
        str(tiny), "-p", "4", "-n", "2", "-d", "0,9", "-r", "2", "-t", "1", "--buffer", "1", "-o", "json",
        "--results", str(tmp_path / "results"), "--peer-bench", f"fake={fake_bench} -fa 1",
        "--peer-bench", f"broken={fake_bench} --broken",
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0
    assert "absent is left out" in err
    assert "broken, pp4: exit code 1: no AVX here" in err
    assert ran == ["tinyllm", "fake", "broken", "fake", "tinyllm"] * 4
    (kept,) = (tmp_path / "results").iterdir()
    content = json.loads(kept.read_text())
    found = {(row["test"], row["engine"]): row for row in content["results"]}
    assert [key[0] for key in found if key[1] == "fake"] == ["pp4", "tg2", "pp4 @ d9", "tg2 @ d9"]
    assert {name for _, name in found} == {"tinyllm", "fake"}
    row = found["pp4", "fake"]  # runs 1 and 3 of the log, the broken one's in between
    assert row["samples_ts"] == [1000.0, 3000.0]
    assert (row["tinyllm_ratio_min"], row["tinyllm_ratio_max"]) == (500 / 3000, 0.5)
    assert row["tinyllm_ratio"] == pytest.approx((0.5 + 500 / 3000) / 2)
    assert "| tiny.gguf | pp4 | fake abc (7) | 2000.00 (1000.00-3000.00) |  | 0.33 (0.17-0.50) |" in out
    size = sum(int(t.n_bytes) for t in gguf.GGUFReader(tiny).tensors)
    embedding, rope = 512 * 256 * 144 // 256, 32 * 4  # not read whole; read into the configuration
    decode = found["tg2 @ d9", "fake"]
    assert decode["bytes_per_step"] == size - embedding - rope + 1024 * (9 + 1.5)
    around = [sum(pair) / 2 for pair in decode["samples_read_gb_s"]]
    shares = [
        100e-9 * r * decode["bytes_per_step"] / b for r, b in zip(decode["samples_ts"], around, strict=True)
    ]
    assert decode["percent_of_read"] == pytest.approx(sum(shares) / 2)
    options = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert options[0][:2] == ["-fa", "1"]
    assert "-d" not in options[0], "a llama-bench without -d works where none is asked for"
    assert options[-1][options[-1].index("-d") + 1] == "9"


def test_peers_run_tinyllm_as_a_process(tiny: Path) -> None:
    setting = peers.Setting(str(tiny), peers.Case(0, 2, 5), 1, "f16")
    rate, version = peers.run_engine(peers.Engine("tinyllm", peers.tinyllm_command), setting)
    assert rate > 0
    assert version == backends.version


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["m", "-p", "x"], "'x' is not whole numbers"),
        (["m", "--peer-bench", "nameless"], "'nameless' is not NAME=PATH"),
        (["m", "--python", "nosuch=python3"], "nosuch is not one of llama.cpp, openvino"),
        (["m", "-r", "0"], "-r and -t are 1 or more"),
        (["m", "-p", "0", "-n", "0"], "nothing to measure"),
    ],
)
def test_peers_refuses_bad_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        peers.main(options)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


# --- two runs of the suite ----------------------------------------------------------------------------------


def suite(**times: tuple[float, float, float]) -> dict[str, Any]:
    """A kept run: name -> (lower quartile, median, upper quartile) in seconds."""
    benchmarks = {
        name: {"q1_s": q1, "median_s": median, "q3_s": q3} for name, (q1, median, q3) in times.items()
    }
    return {"machine": "a", "isa": "scalar", "threads": 2, "benchmarks": benchmarks}


def test_slower_means_beyond_the_noise_of_both_runs() -> None:
    old = suite(quiet=(1, 1, 1), noisy=(0.9, 1, 1.2), better=(2, 2, 2), gone=(1, 1, 1))
    new = suite(quiet=(1.06, 1.06, 1.06), noisy=(1.2, 1.3, 1.4), better=(1, 1, 1), added=(1, 1, 1))
    found = {change.name: change for change in regressions.changes(old, new)}
    assert set(found) == {"quiet", "noisy", "better"}
    assert found["quiet"].ratio == pytest.approx(1.06)
    assert found["quiet"].noise == pytest.approx(1.05)
    assert found["noisy"].noise == pytest.approx(1.05 * (1.2 / 0.9) * (1.4 / 1.2))
    assert [name for name, change in found.items() if change.is_slower] == ["quiet"]
    assert [name for name, change in found.items() if change.is_faster] == ["better"]
    lines = "\n".join(regressions.report(old, new | {"threads": 4}))
    assert "missing: 1 of 4\n  gone\n" in lines
    assert "slower: 1 of 3\n  quiet " in lines
    assert "faster: 1 of 3\n  better " in lines
    assert "all: time x 1.06 (median), 0.50 to 1.30" in lines
    assert "not comparable: threads was 2, is 4" in lines
    assert regressions.report(old, suite(other=(1, 1, 1)))[-1] == "the two runs have no benchmark in common"


def test_regressions_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seconds in (("old", 1.0), ("same", 1.04), ("slow", 1.06)):
        (tmp_path / name).write_text(json.dumps(suite(a=(seconds, seconds, seconds))))
    (tmp_path / "other").write_text("[]")
    (tmp_path / "fewer").write_text(json.dumps(suite()))
    (tmp_path / "elsewhere").write_text(json.dumps(suite(a=(9.0, 9.0, 9.0)) | {"isa": "avx2"}))
    codes = [
        regressions.main([str(tmp_path / "old"), str(tmp_path / name)])
        for name in ("same", "slow", "other", "none", "fewer", "elsewhere")
    ]
    assert codes == [0, 1, 2, 2, 1, 6]
    assert "is not what `pytest benchmarks --results FILE` keeps" in capsys.readouterr().err


def test_suite_keeps_a_run_and_compares_with_it(tmp_path: Path) -> None:
    """The suite itself, on its quickest benchmark; against a run a thousand times as fast it is flagged."""
    kept = tmp_path / "run.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "test_sample_128k",
    ]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--benchmark-only", *options], cwd=BENCHMARKS.parent, capture_output=True, text=True,
            env={**os.environ, "CI": ""}, timeout=600,
        )  # fmt: skip

    assert run("--results", str(kept)).returncode == 0
    before = json.loads(kept.read_text())
    assert set(before["benchmarks"]) == {"test_sample_128k[greedy]", "test_sample_128k[default]"}
    for times in before["benchmarks"].values():
        assert 0 < times["min_s"] <= times["q1_s"] <= times["median_s"] <= times["q3_s"] <= times["max_s"]
        times.update({key: times[key] / 1000 for key in ("q1_s", "median_s", "q3_s")})
    kept.write_text(json.dumps(before))
    slower = run("--against", str(kept))
    assert slower.returncode == 1
    assert "slower: 2 of 2" in slower.stdout
    # What cannot be kept or compared is said first, not after ten minutes.
    for option, said in (
        (("--results", str(tmp_path / "no" / "run.json")), "there is no such folder"),
        (("--against", str(tmp_path / "no.json")), "No such file"),
        (("--against", str(BENCHMARKS / "README.md")), "--against: "),
    ):
        refused = run(*option)
        assert refused.returncode == 4
        assert said in refused.stderr
        assert "passed" not in refused.stdout


# --- the page about quantization ----------------------------------------------------------------------------


def test_quantization_page_is_what_the_script_makes_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody typed a number into it, and all formats and mixes are there."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    quantization = script("quantization")
    newest = max((BENCHMARKS / "results").glob("*-quantization.json"))
    found = json.loads(newest.read_text(encoding="utf-8"))
    page = quantization.PAGE.read_text(encoding="utf-8")
    assert page == quantization.page(found)
    assert quantization.PLOT.read_bytes().startswith(b"\x89PNG")
    measured = {row["weights"] or "f16" for row in found["rows"]} | {"f32"}
    assert measured <= set(MIXES)
    left = ", ".join(f"`{type}`" for type in MIXES if type not in measured)
    assert (f"Not yet measured: {left}." in page) if left else ("Not yet measured" not in page)
    assert set(quantization.WHAT) == set(backends.FORMAT_IDS)
    assert "/" not in found["text"]


def test_weight_error_is_that_of_dequantized_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Q8_0, dequantized by the gguf package, against the master's weights."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    quantization = script("quantization")
    error = total = 0.0
    for tensor in gguf.GGUFReader(quantization.MASTER).tensors:
        if len(tensor.shape) == 2:
            w = tensor.data.astype(np.float32)
            blocks = backends.convert(w.view(np.uint8).ravel(), 0, 8, *w.shape)
            q = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
            error += float(((q.astype(np.float64) - w) ** 2).sum())
            total += float((w.astype(np.float64) ** 2).sum())
    of = [quantization.compare.Candidate(str(quantization.MASTER), type) for type in ("q8_0", None)]
    assert quantization.weight_error(of[0]) == pytest.approx(math.sqrt(error / total), rel=1e-9)
    assert quantization.weight_error(of[1]) == 0
