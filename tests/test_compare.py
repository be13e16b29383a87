"""`tinyllm-bench compare`: what it brings together, what it writes, what it draws. No figure here is a claim
about speed: prompts are a few tokens, and `--buffer 1` keeps the samples of the read bandwidth short.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_cli import Cli, in_process
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import random_weights

import tinyllm
from tinyllm import backends
from tinyllm.cli import compare as cli_compare
from tinyllm.cli import plot
from tinyllm.cli.bench import main
from tinyllm.errors import ArgumentError
from tinyllm.measure import benchmark, compare, quality
from tinyllm.measure.compare import Candidate

MASTER = Path(__file__).resolve().parents[1] / "benchmarks" / "stories-f16.gguf"
TEXT = "Once upon a time there was a frog. The frog sat on a stone and looked at the moon all night. " * 8
FAST = ("-p", "4", "-n", "2", "-r", "1", "--buffer", "1")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `tinyllm-bench compare` in this process, TEXT as what a pipe holds."""
    return in_process(main, monkeypatch, capsys, "compare", stdin=TEXT.encode())


def of_types(*types: str) -> list[Candidate]:
    return compare.candidates([str(MASTER)], types)


def fast(of: list[Candidate], text: str | None = None) -> list[compare.Row]:
    cases = benchmark.cases(n_prompt=[4], n_gen=[2], threads=[1])
    return compare.compare(of, cases, text, n_ctx=32, most_windows=3, repetitions=1, read_bytes=1 << 20)


# --- rows ---------------------------------------------------------------------------------------------------


def test_candidates() -> None:
    assert compare.candidates(["a.gguf", "b.gguf", "a.gguf"]) == [Candidate("a.gguf"), Candidate("b.gguf")]
    found = compare.candidates(["dir/a.gguf"], ["q8_0", "q4_0"])
    assert [c.label for c in found] == ["a.gguf", "q8_0", "q4_0"]
    assert {c.path for c in found} == {"dir/a.gguf"}
    named_twice = compare.candidates(["a.gguf"], ["q8_0", "Q8_0", "q4_k", "q4_k_m"])
    assert [c.label for c in named_twice] == ["a.gguf", "q8_0", "q4_k_m"]
    with pytest.raises(ArgumentError, match="'q9' is no quantization"):
        compare.candidates(["a.gguf"], ["q9"])
    with pytest.raises(ArgumentError, match="types are made of one float model; there are 2 models"):
        compare.candidates(["a", "b"], ["q8_0"])
    with pytest.raises(ArgumentError, match="one model alone has nothing to be compared with"):
        compare.candidates(["a", "a"])


def test_types_are_what_files_of_them_would_be() -> None:
    """The bundled model is of the master's shape, in Q8_0."""
    rows = fast([Candidate(str(MASTER), "q8_0"), Candidate("stories"), Candidate(str(MASTER))], TEXT)
    quantized, bundled, master = rows
    assert quantized.facts.size_bytes == bundled.facts.size_bytes == 3_908_608
    assert quantized.facts.kind == bundled.facts.kind
    assert 8.5 < quantized.bits_per_weight == bundled.bits_per_weight < 8.52, "norms stay F32"
    assert [row.is_reference for row in rows] == [False, False, True], "the largest"
    assert master.quality is not None
    assert master.quality.divergence is None


def test_figures_are_those_of_benchmark_and_quality() -> None:
    rows = fast(of_types("q4_0"), TEXT)
    with tinyllm.load(MASTER) as master, tinyllm.load(MASTER, weights="q4_0") as q4_0:
        on = quality.text_windows(master, TEXT, 32, most=3)
        assert [row.quality for row in rows] == quality.measure([master, q4_0], on)
        packed = q4_0.model.weight_bytes
    record = rows[1].record()
    assert record["prefill"]["test"] == "pp4"
    assert record["decode"]["test"] == "tg2"
    assert record["decode"]["weight_bytes_per_token"] == packed == rows[1].results[1].weight_bytes
    assert record["quality"]["divergence"]["kl"]["value"] > 1e-3
    assert record["weights"] == record["model"] == "q4_0"
    json.dumps(record)


def test_without_a_text_there_is_no_quality() -> None:
    rows = fast(of_types("q4_0"))
    assert [row.quality for row in rows] == [None, None]
    assert rows[0].record()["perplexity"] is None


def test_models_that_do_not_fit_together_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the reference and one other are loaded at once, and the figures are the same."""
    together = fast(of_types("q8_0", "q4_0"), TEXT)
    monkeypatch.setattr(compare, "MEMORY_SHARE", 0.0)
    groups: list[list[str | None]] = []
    measured: list[int] = []
    measure, of_quality = benchmark.measure, compare.measure_quality

    def timed(paths: Any, *args: Any, **options: Any) -> Any:
        groups.append(options["weights"])
        return measure(paths, *args, **options)

    def compared(models: Any, *args: Any, **options: Any) -> Any:
        measured.append(len(models))
        return of_quality(models, *args, **options)

    monkeypatch.setattr(benchmark, "measure", timed)
    monkeypatch.setattr(compare, "measure_quality", compared)
    before = backends.live_allocations()
    apart = fast(of_types("q8_0", "q4_0"), TEXT)
    assert groups == [[None], ["q8_0"], ["q4_0"]]
    assert measured == [2, 2]
    assert [row.quality for row in apart] == [row.quality for row in together]
    assert [row.results[1].case.name for row in apart] == ["tg2"] * 3
    assert backends.live_allocations() == before, "nothing stays in memory"


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "hidden_act": "silu", "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }  # fmt: skip
    write_gguf(tmp_path / "a.gguf", config, random_weights(config, 0), tokenizer=small_tokenizer())
    with pytest.raises(ArgumentError, match="do not share a vocabulary: they have 2048 and 512 tokens"):
        fast([Candidate("stories"), Candidate(str(tmp_path / "a.gguf"))], TEXT)


# --- what is written ----------------------------------------------------------------------------------------


def test_markdown(cli: Cli) -> None:
    result = cli(MASTER, "--types", "q8_0,q4_0", "--text", "-", "-c", "32", *FAST)
    assert (result.code, result.err) == (0, "")
    header, rule, *rows = result.out.splitlines()[:5]
    assert len({len(line) for line in (header, rule, *rows)}) == 1
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names == [
        "model", "weights", "size", "bits/weight", "load", "peak memory", "prefill t/s", "GMAC/s",
        "% of peak", "decode t/s", "% of read", "perplexity", "KL, 1e-3 nats", "99 %", "same top",
    ]  # fmt: skip
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["stories-f16.gguf (reference)", "q8_0", "q4_0"]
    assert [row[1] for row in cells] == ["F16", "Q8_0", "Q4_0+Q6_K"]
    assert [row[2] for row in cells] == ["7.35 MB", "3.91 MB", "2.21 MB"]
    assert cells[0][-3:] == ["", "", ""]
    assert float(cells[1][-3].split()[0]) < float(cells[2][-3].split()[0])
    assert "pp4, tg2, medians of 1; read bandwidth" in result.out
    without = cli(MASTER, "stories", *FAST)
    assert "perplexity" not in without.out
    assert "(reference)" not in without.out


def test_the_table_names_its_device(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--device reaches the loading for speed and for quality, and what was measured on stands below."""
    asked: list[Any] = []
    for module in (benchmark, compare):
        real = module.load

        def watched(*args: Any, real: Any = real, **options: Any) -> Any:
            asked.append(options["device"])
            return real(*args, **options)

        monkeypatch.setattr(module, "load", watched)
    result = cli(MASTER, "stories", "--device", "cpu", "--text", "-", "-c", "32", *FAST, "-o", "json")
    assert asked == ["cpu"] * 4
    records = json.loads(result.out)
    for record in records:
        assert (record["decode"]["device"], record["decode"]["gpu_info"]) == ("cpu", "")
        record["decode"] |= {"device": "cuda:1", "gpu_info": "A GPU"}
    cli_compare._write_md(records)
    assert "\ncuda:1 A GPU, f16 cache, tinyllm" in capsys.readouterr().out
    cli_compare._write_csv(records)
    assert "cuda:1" in capsys.readouterr().out


def test_json_and_csv_have_the_same_figures(cli: Cli) -> None:
    options = (MASTER, "--types", "q4_0", "--text", "-", "-c", "32", *FAST)
    records = json.loads(cli(*options, "-o", "json").out)
    rows = list(csv.DictReader(io.StringIO(cli(*options, "-o", "csv").out)))
    assert [row["model"] for row in rows] == [record["model"] for record in records]
    for row, record in zip(rows, records, strict=True):
        assert int(row["size_bytes"]) == record["size_bytes"]
        assert float(row["perplexity.value"]) == record["perplexity"]["value"]
        assert float(row["decode.median_ts"]) > 0
        assert row["prefill.test"] == "pp4"
    assert rows[0]["quality.divergence.kl.value"] == ""
    kl = records[1]["quality"]["divergence"]["kl"]["value"]
    assert float(rows[1]["quality.divergence.kl.value"]) == kl


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["stories"], 2, "one model alone has nothing to be compared with"),
        (["stories", "--types", "q4_0"], 2, "quantized already; --weights and --types are for float models"),
        ([str(MASTER), "--types", "q9"], 2, "'q9' is no quantization; there are f32, "),
        (["stories", str(MASTER), "--plot", "a.png"], 2, "--plot draws quality, which is measured on a text"),
        (["stories", str(MASTER), "--device", "gpu"], 2, "gpu"),
        (["stories", str(MASTER), "--cache-type", "q9"], 2, "cache type is 'q9'"),
        (["stories", "nowhere.gguf"], 1, "nowhere.gguf: no such file or directory"),
        (["stories", str(MASTER), "--text", "nowhere.txt"], 1, "nowhere.txt: No such file or directory"),
        ([], 2, "the following arguments are required: MODEL"),
    ],
)
def test_errors_are_one_line(cli: Cli, argv: list[str], code: int, message: str) -> None:
    result = cli(*argv)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1


# --- the plot -----------------------------------------------------------------------------------------------


def record(name: str, bits: float, rate: float, kl: float | None) -> dict[str, Any]:
    """As much of a row's record as the plot looks at."""
    divergence = None if kl is None else {"kl": {"value": kl, "error": kl / 50}}
    return {
        "model": name,
        "is_reference": kl is None,
        "size_bytes": bits * 1e9,
        "n_params": 8_000_000_000,
        "decode": {"median_ts": rate},
        "quality": {"divergence": divergence},
    }


def test_plot_is_a_png(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    options = ("--text", "-", "-c", "32", "--plot", path, *FAST)
    result = cli(MASTER, "--types", "q8_0,q4_0", *options)
    assert (result.code, result.err) == (0, "")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_loses_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table stands already, the error names the file, and what was there is as it was; nor does a table
    that nobody takes lose the plot."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    options = (MASTER, "--types", "q8_0", "--text", "-", "-c", "32", "--plot", path, *FAST)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
        result = cli(*options)
    assert result.code == 1
    assert result.out.startswith("| model")
    assert f"{path}: no room: " in result.err
    assert path.read_bytes() == b"before"

    def full(records: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(cli_compare.WRITERS, "md", full)
    assert cli(*options).code == 1
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_plot_names_its_reference_and_shows_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bits of a small model are less than 4 of a large one."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    large, small = record("8b-q8_0.gguf", 8.5, 9, None), record("1b-q8_0.gguf", 8.5, 60, 0.3)
    small |= {"n_params": 1_000_000_000, "size_bytes": 1_062_500_000}
    same = record("8b-q4_0.gguf", 4.5, 16, 0.02)
    for records, size in (
        ([large, same, small], "size, GB"),
        ([large, same], "size, GB (8 bits a weight: 8 GB)"),
    ):
        plot.draw(records, str(tmp_path / "a.png"))
        left = figures[-1].axes[0]
        assert left.get_ylabel().startswith("KL divergence from 8b-q8_0.gguf, nats a token")
        assert left.get_xlabel() == size
        xs = [point for line in left.lines for point in line.get_xdata()]
        assert xs[: len(records) - 1] == [r["size_bytes"] / 1e9 for r in records[1:]]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("a.nosuch", 2, "a plot is a file of type .png, or "),
        ("no/a.png", 1, "no/a.png: cannot be written: No such file or directory"),
    ],
)
def test_plot_is_refused_before_anything_is_measured(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, code: int, message: str
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(compare, "compare", lambda *args, **options: pytest.fail("too late"))
    result = cli("stories", MASTER, "--text", "-", "--plot", name)
    assert result.code == code
    assert message in result.err


def test_labels_of_the_plot_do_not_cover_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sixteen formats, many of 4.5 bits: every name readable, in both panels."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    bits = [8.5, 6.6, 6, 5.5, 5.5, 5, 4.5, 4.5, 4.5, 4.5, 4.25, 4.25, 3.4, 2.6, 4.8, 5.7]
    points = [
        record(f"type_{i:x}", b, 6000 / b, 2e-4 * 4 ** (8.5 - b) * (1 + i % 3)) for i, b in enumerate(bits)
    ]
    plot.draw([record("model-f16.gguf", 16, 400, None), *points], str(tmp_path / "a.png"))
    (figure,) = figures
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        # Text.get_window_extent of the text alone, without the leader line that an annotation has.
        boxes = {t.get_text(): plot_text_extent(t, renderer) for t in axes.texts if "type" in t.get_text()}
        assert len(boxes) == 16
        covered = [(a, b) for (a, x), (b, y) in itertools.combinations(boxes.items(), 2) if x.overlaps(y)]
        assert covered == []


def plot_text_extent(text: Any, renderer: Any) -> Any:
    from matplotlib.text import Text

    return Text.get_window_extent(text, renderer)


def test_plot_without_matplotlib_says_what_to_install(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(compare, "compare", lambda *args, **options: pytest.fail("too late"))
    result = cli(MASTER, "--types", "q8_0", "--text", "-", "-c", "32", "--plot", "a.png", *FAST)
    assert result.code == 1
    assert "pip install matplotlib" in result.err
