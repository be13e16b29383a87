"""Perplexity, KL divergence and agreement: against their definitions written out, values known in float64,
and llama.cpp; and tinyllm-perplexity, which prints them.

The text is made here; the data of others is only measured on (`data_dir`, conftest.py).
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers_cli import Cli, in_process
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import random_weights

import tinyllm
from tinyllm.cli import common
from tinyllm.cli.perplexity import main
from tinyllm.errors import ArgumentError, ContextError
from tinyllm.measure import quality

ROOT = Path(__file__).resolve().parents[1]
MASTER = ROOT / "benchmarks" / "stories-f16.gguf"
TEXT = (
    "Once upon a time there was a small boat that lived on a big lake. Every day the boat went out with a "
    'girl and her dog. "Look at the sun!" said the girl. The dog did not look at the sun, it looked at the '
    "fish. One day the wind was strong, and the boat was afraid. The girl held it and said that they would "
    "go home. At home they had soup and bread, and the boat slept under the old tree. "
) * 4


@pytest.fixture(scope="module")
def stories() -> Iterator[tinyllm.LLM]:
    with tinyllm.load("stories", threads=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def master() -> Iterator[tinyllm.LLM]:
    with tinyllm.load(MASTER, threads=2) as llm:
        yield llm


# --- windows ------------------------------------------------------------------------------------------------


def test_windows_side_by_side() -> None:
    """As llama-perplexity: of 8 tokens the last 3 are scored (its `first` is n_ctx / 2, and the last logits
    predict nothing)."""
    cut = quality.windows(range(100, 126), 8, bos_id=1)
    assert cut.ids.tolist() == [[1, *range(s + 1, s + 8)] for s in (100, 108, 116)]
    assert (cut.first, cut.n_tokens) == (5, 9)
    assert cut.ids.dtype == np.int32


def test_windows_of_an_odd_size_and_without_bos() -> None:
    cut = quality.windows(range(14), 7)
    assert cut.ids.tolist() == [[*range(7)], [*range(7, 14)]]
    assert (cut.first, cut.n_tokens) == (4, 6)


def test_strided_windows_score_every_later_token_once() -> None:
    cut = quality.windows(range(24), 8, stride=3)
    scored = cut.ids[:, cut.first :]
    assert scored.ravel().tolist() == [*range(5, 5 + scored.size)]
    assert cut.ids[-1, -1] == 22, "a window that starts at 18 would need 26 tokens"
    assert quality.windows(range(24), 8, stride=3, most=2).ids.tolist() == [[*range(8)], [*range(3, 11)]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_ctx": 1}, "n_ctx is 1, expected 3 to"),
        ({"n_ctx": 8, "stride": 8}, "stride is 8, expected 1 to 7"),
        ({"n_ctx": 8, "stride": 0}, "stride is 0, expected 1"),
        ({"n_ctx": 8, "most": 0}, "most is 0, expected 1"),
        ({"n_ctx": 21}, "the text has 20 tokens, a window takes 21; give more text or a smaller window"),
    ],
)
def test_windows_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        quality.windows(range(20), **arguments)


def test_text_windows_put_a_bos_in_front_of_each(stories: tinyllm.LLM) -> None:
    ids = stories.tokenizer.encode(TEXT)  # type: ignore[union-attr]
    cut = quality.text_windows(stories, TEXT, 64, most=3)
    assert cut.ids[:, 0].tolist() == [1, 1, 1]
    assert cut.ids[:, 1:].tolist() == [ids[s + 1 : s + 64] for s in (0, 64, 128)]
    with pytest.raises(ContextError, match="windows of 513 tokens do not fit into the context of 512"):
        quality.text_windows(stories, TEXT, 513)


# --- the figures --------------------------------------------------------------------------------------------


def log_p(llm: tinyllm.LLM, on: quality.Windows) -> npt.NDArray[np.float64]:
    """Log probabilities [scored tokens, vocabulary], the definition written out over `LLM.logits`."""
    rows = [llm.logits(window.tolist())[on.first - 1 : -1].astype(np.float64) for window in on.ids]
    return np.concatenate([row - np.logaddexp.reduce(row, axis=1, keepdims=True) for row in rows])


def of_targets(x: npt.NDArray[np.float64], on: quality.Windows) -> npt.NDArray[np.float64]:
    picked: npt.NDArray[np.float64] = x[np.arange(len(x)), on.ids[:, on.first :].ravel()]
    return picked


@pytest.mark.parametrize("stride", [None, 24])
def test_perplexity_is_its_definition(stories: tinyllm.LLM, stride: int | None) -> None:
    """The logits are the same bits either way, so what is left is float64's rounding of a mean."""
    on = quality.text_windows(stories, TEXT, 100, stride=stride)
    (found,) = quality.measure([stories], on)
    nll = -of_targets(log_p(stories, on), on)
    assert found.n_tokens == on.n_tokens == len(nll)
    assert found.nll.value == pytest.approx(nll.mean(), rel=1e-12)
    assert found.nll.error == pytest.approx(nll.std(ddof=1) / math.sqrt(len(nll)), rel=1e-9)
    assert found.perplexity.value == pytest.approx(math.exp(nll.mean()), rel=1e-11)
    assert found.perplexity.error == pytest.approx(found.perplexity.value * found.nll.error)
    assert found.divergence is None


def test_divergence_is_its_definition(stories: tinyllm.LLM, master: tinyllm.LLM) -> None:
    on = quality.text_windows(stories, TEXT, 128)
    reference, found = quality.measure([master, stories], on)
    p, q = log_p(master, on), log_p(stories, on)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    change = np.exp(of_targets(q, on)) - np.exp(of_targets(p, on))
    same = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    n = len(kl)
    d = found.divergence
    assert d is not None
    assert reference.divergence is None
    # Sums of terms p (ln p - ln q) around 1e-6, each with float64's error of ln p: 2e-16 * 10.
    assert d.kl.value == pytest.approx(kl.mean(), abs=1e-14)
    assert d.kl.error == pytest.approx(kl.std(ddof=1) / math.sqrt(n), rel=1e-6)
    assert [d.kl_median, d.kl_99, d.kl_max] == pytest.approx([*np.quantile(kl, [0.5, 0.99, 1])], abs=1e-13)
    assert d.kl.value > 1e-5, "Q8_0 is not F16"
    assert d.change.value == pytest.approx(change.mean(), abs=1e-14)
    assert d.rms_change.value == pytest.approx(math.sqrt((change**2).mean()), rel=1e-9)
    assert d.same_top.value == same
    assert d.same_top.error == pytest.approx(math.sqrt(same * (1 - same) / (n - 1)))
    assert d.nll.value == pytest.approx(found.nll.value - reference.nll.value, abs=1e-14)
    assert d.nll.error < 0.1 * found.nll.error, "the error of the differences, which are small"


def test_root_mean_square_change_and_its_error() -> None:
    """By hand: targets' probabilities 1/2, 1/2 become 3/4, 1/4; squares of the changes are alike, error 0."""
    even, uneven = np.zeros((2, 2), np.float32), np.log(np.array([[3, 1], [3, 1]], np.float32))
    comparison = quality.Comparison(2)
    comparison.add(np.array([0, 1], np.int32), [even, uneven])
    _, found = comparison.qualities()
    d = found.divergence
    assert d is not None
    assert d.rms_change.value == pytest.approx(0.25)
    assert d.rms_change.error == pytest.approx(0, abs=1e-8)
    assert d.change.value == pytest.approx(0, abs=1e-7)
    assert d.kl.value == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert found.nll.value == pytest.approx(math.log(16 / 3) / 2, rel=1e-6)


def test_a_model_does_not_differ_from_itself(master: tinyllm.LLM) -> None:
    on = quality.text_windows(master, TEXT, 64)
    _, found = quality.measure([master, master], on)
    d = found.divergence
    assert d is not None
    assert (d.kl.value, d.kl_max, d.change.value, d.rms_change.value) == (0, 0, 0, 0)
    assert (d.same_top.value, d.same_top.error, d.rms_change.error) == (1, 0, 0)


@pytest.mark.parametrize("call", [1, 7, 64, 100, 1000])
def test_how_calls_are_cut_does_not_matter(stories: tinyllm.LLM, master: tinyllm.LLM, call: int) -> None:
    """One token a call, a part of a window, many windows at once: the same tokens in another order."""
    on = quality.text_windows(stories, TEXT, 32, most=5)
    whole = quality.measure([master, stories], on)[1]
    cut = quality.measure([master, stories], on, call=call)[1]
    assert cut.nll.value == pytest.approx(whole.nll.value, rel=1e-13)
    assert cut.divergence is not None
    assert whole.divergence is not None
    assert cut.divergence.kl_max == whole.divergence.kl_max
    assert cut.divergence.same_top.value == whole.divergence.same_top.value


def test_logits_are_held_a_slice_at_a_time(stories: tinyllm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    on = quality.text_windows(stories, TEXT, 64, most=4)
    whole = quality.measure([stories], on)[0]
    sizes = []
    add = quality.Comparison.add

    def spy(self: quality.Comparison, targets: Any, logits: Any) -> None:
        sizes.append(len(logits[0]))
        add(self, targets, logits)

    monkeypatch.setattr(quality.Comparison, "add", spy)
    assert quality.measure([stories], on)[0] == whole
    assert max(sizes) <= 64, "never more than a window's"
    monkeypatch.setattr(quality, "LOGITS", 5 * stories.config.vocab_size)
    monkeypatch.setattr(quality, "IN_CACHE", 1)
    sizes.clear()
    small = quality.measure([stories], on)[0]
    assert max(sizes) == 5
    assert small.nll.value == pytest.approx(whole.nll.value, rel=1e-13)


def test_progress_has_the_running_figures(stories: tinyllm.LLM, master: tinyllm.LLM) -> None:
    on = quality.text_windows(stories, TEXT, 300)
    told: list[tuple[int, int, list[float]]] = []
    found = quality.measure(
        [master, stories], on, progress=lambda *now: told.append((*now[:2], list(now[2])))
    )
    n_windows = len(on.ids)
    assert [now[:2] for now in told] == [(i + 1, n_windows) for i in range(n_windows)]
    assert told[-1][2] == [q.nll.value for q in found]


@pytest.mark.parametrize("directory", ["models/stories260K-hf", "models/babyllama-tok105-hf"])
def test_known_perplexity(directory: str, data_dir: Path) -> None:
    """Sixty stories, each one window; the value was computed in float64, to four decimals."""
    known = json.loads((data_dir / directory / "perplexity.json").read_text(encoding="utf-8"))
    total = 0.0
    with tinyllm.load(data_dir / directory, device="cpu", cache_type="f32") as llm:
        for ids in known["ids"]:
            (found,) = quality.measure([llm], quality.Windows(np.array([ids], np.int32), 1))
            total += found.nll.value * found.n_tokens
    assert math.exp(total / known["tokens"]) == pytest.approx(known["perplexity"], abs=0.0005)


# --- models that cannot be compared -------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def write_small(path: Path, tokenizer: dict[str, Any] | None, vocab_size: int = 512) -> Path:
    config = CONFIG | {"vocab_size": vocab_size}
    write_gguf(path, config, random_weights(config, 0), tokenizer=tokenizer)
    return path


def test_vocabularies_must_be_the_same(tmp_path: Path, stories: tinyllm.LLM) -> None:
    tokens = small_tokenizer()
    other = small_tokenizer()
    other["tokens"] = [*other["tokens"][:-1], "otherwise"]
    with (
        tinyllm.load(write_small(tmp_path / "a.gguf", tokens)) as a,
        tinyllm.load(write_small(tmp_path / "b.gguf", other)) as b,
        tinyllm.load(write_small(tmp_path / "c.gguf", None)) as c,
    ):
        quality.require_same_vocabulary(a, a)
        with pytest.raises(
            ArgumentError, match=r"a\.gguf and .*b\.gguf do not share a vocabulary: token 511"
        ):
            quality.require_same_vocabulary(a, b)
        with pytest.raises(ArgumentError, match="they have 2048 and 512 tokens"):
            quality.require_same_vocabulary(stories, a)
        with pytest.raises(ArgumentError, match=r"c\.gguf has no tokenizer to compare"):
            quality.require_same_vocabulary(a, c)
        with pytest.raises(ArgumentError, match=r"c\.gguf has no tokenizer, so it cannot read a text"):
            quality.text_windows(c, TEXT)
        on = quality.Windows(np.full((1, 8), 511, np.int32), 4)
        with pytest.raises(ArgumentError, match=r"has 2048 tokens, .*a\.gguf 512"):
            quality.measure([a, stories], on)
        with pytest.raises(ArgumentError, match="an id of the text is not in the vocabulary of"):
            quality.measure([a], quality.Windows(on.ids + 1, 4))
        with pytest.raises(ContextError, match="windows of 300 tokens do not fit into 256"):
            quality.measure([a], quality.Windows(np.ones((1, 300), np.int32), 4))


# --- llama.cpp ----------------------------------------------------------------------------------------------


def peers() -> ModuleType:
    """benchmarks/kl_peers.py as a module."""
    spec = importlib.util.spec_from_file_location("kl_peers", ROOT / "benchmarks" / "kl_peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kl_peers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stride", [None, 100])
def test_llama_cpp_finds_the_same_perplexity(stride: int | None, master: tinyllm.LLM) -> None:
    """F16 weights. Two right answers differ by what one of them rounds: llama.cpp turns activations into
    float16 (2^-11 relative) before each product with F16 weights. The divergence of its logits from ours was
    2e-7 nats; a mean over n tokens of changes with that variance 2 KL stays within six standard errors,
    6 sqrt(2 * 2e-7 / n) relative."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    on = quality.text_windows(master, TEXT, 200, stride=stride)
    (ours,) = quality.measure([master], on)
    theirs = peers().llama_cpp_quality(MASTER, on, threads=2)
    assert theirs.n_tokens == ours.n_tokens
    bound = 6 * math.sqrt(2 * 2e-7 / ours.n_tokens)
    assert theirs.perplexity.value == pytest.approx(ours.perplexity.value, rel=bound)


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs tinyllm-perplexity in this process."""
    return in_process(main, monkeypatch, capsys)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_command_prints_a_table(cli: Cli, text_file: Path, stories: tinyllm.LLM) -> None:
    result = cli("stories", text_file, "-c", "64")
    (found,) = quality.measure([stories], quality.text_windows(stories, TEXT, 64))
    assert (result.code, result.err) == (0, "")
    assert f"{found.perplexity.value:.4f} ± {found.perplexity.error:.4f}" in result.out
    n = found.n_tokens // 31
    assert result.out.endswith(f"{found.n_tokens} tokens scored, the last 31 of each of {n} windows of 64.\n")
    piped = cli("stories", "-", "-c", "64", stdin=TEXT.encode())
    assert piped.out == result.out


def test_an_error_of_one_token_is_null(cli: Cli, text_file: Path) -> None:
    """JSON has no word for what a single number's spread is."""
    result = cli("stories", text_file, "-c", "4", "--chunks", "1", "-o", "json")
    found = json.loads(result.out, parse_constant=pytest.fail)
    assert (found["n_tokens"], found["nll"]["error"]) == (1, None)


def test_a_perplexity_past_float64_is_infinite(cli: Cli, text_file: Path, tmp_path: Path) -> None:
    """Logits of a finite model may be so far apart that its nats a token are thousands."""
    config = CONFIG | {"tie_word_embeddings": False}
    weights = random_weights(config, 3)
    weights["lm_head.weight"] *= np.float32(1e4)
    path = tmp_path / "sure.gguf"
    write_gguf(path, config, weights, tokenizer=small_tokenizer())
    with tinyllm.load(path, threads=1) as llm:
        windows = quality.text_windows(llm, TEXT, 64, most=1)
        (found,) = quality.measure([llm], windows)
        score = llm.score(windows.ids[0])
    assert 710 < found.nll.value < math.inf
    assert -math.inf < score.total < 0
    assert found.perplexity.value == score.perplexity == math.inf
    options = (path, text_file, "-c", "64", "--chunks", "1")
    assert "inf ± inf" in cli(*options).out
    json_found = json.loads(cli(*options, "-o", "json").out, parse_constant=pytest.fail)
    assert json_found["perplexity"] == {"value": None, "error": None}


def test_command_compares(cli: Cli, text_file: Path, stories: tinyllm.LLM, master: tinyllm.LLM) -> None:
    options = (text_file, "--against", MASTER, "-c", "64", "--chunks", "3")
    result = cli("stories", *options, "-o", "json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    reference, want = quality.measure([master, stories], quality.text_windows(master, TEXT, 64, most=3))
    assert want.divergence is not None
    assert found["divergence"]["kl"]["value"] == want.divergence.kl.value
    assert found["nll"]["value"] == want.nll.value
    assert found["reference"]["perplexity"]["value"] == reference.perplexity.value
    assert found["reference"]["model"].endswith("stories-f16.gguf")
    assert (found["n_windows"], found["n_ctx"]) == (3, 64)
    table = cli("stories", *options).out
    assert f"{want.divergence.kl.value:.6f} ±" in table
    assert f"{100 * want.divergence.same_top.value:.3f} ±" in table
    header, rule, *_ = table.splitlines()
    assert header.count("|") == rule.count("|") == 4
    assert len({len(line) for line in table.splitlines()[:11]}) == 1


def test_weights_quantizes_the_model_and_not_the_reference(cli: Cli, text_file: Path) -> None:
    options = ("--against", MASTER, "-c", "64", "--chunks", "2", "-o", "json")
    found = json.loads(cli(MASTER, text_file, "--weights", "q4_0", *options).out)
    assert found["divergence"]["kl"]["value"] > 1e-3
    same = json.loads(cli(MASTER, text_file, *options).out)
    assert same["divergence"]["kl"]["value"] == 0


def test_a_text_without_end_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MOST_TEXT_BYTES", 3_000_000)
    for argv, stdin in (("stories", "/dev/zero"), b""), (("stories", "-"), b"a" * 5_000_000):
        result = cli(*argv, stdin=stdin)
        assert (result.code, result.out) == (2, "")
        assert "does not end within 3 MB; give a part of it" in result.err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["stories"], 2, "the following arguments are required: TEXT"),
        (["stories", "{text}", "--stride", "0"], 2, "'0' is not a whole number of 1 or more"),
        (["stories", "{text}", "-c", "8", "--stride", "9"], 2, "stride is 9, expected 1 to 7"),
        (["stories", "{text}", "--against", "-"], 2, "only TEXT can be -"),
        (["stories", "nowhere.txt"], 1, "nowhere.txt: No such file or directory"),
        (["nowhere.gguf", "{text}"], 1, "nowhere.gguf: no such file or directory"),
        (["stories", "{latin}"], 2, "is not UTF-8 text: byte 1 is 0xe9"),
        (["stories", "{short}"], 2, "the text has 2 tokens, a window takes 512"),
    ],
)
def test_command_errors(
    cli: Cli, tmp_path: Path, text_file: Path, argv: list[str], code: int, message: str
) -> None:
    files = {"text": text_file, "latin": tmp_path / "latin.txt", "short": tmp_path / "short.txt"}
    files["latin"].write_bytes(b"h\xe9")
    files["short"].write_text("a")
    result = cli(*(arg.format(**files) for arg in argv))
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("tinyllm-perplexity: ")
    assert message in result.err
    assert result.err.count("\n") == 1
