"""Trained models whose behaviour is known in float64: greedy text, logits and perplexity, from a GGUF and
from safetensors.

Data from `data_dir` (conftest.py): stories260K as .gguf and as a directory, babyllama as a directory;
tests/data.md names their sources."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sentencepiece

import tinyllm

STORIES = ["models/stories260K/stories260K.gguf", "models/stories260K-hf"]
PERPLEXITIES = ["models/stories260K-hf", "models/babyllama-tok105-hf"]
PROMPT = "Once upon a time"


@pytest.fixture
def stories(data_dir: Path) -> dict[str, Any]:
    """The float64 reference: greedy_from_bos_200, prompt_ids, logits_last_position,
    logits_argmax_each_position."""
    path = data_dir / "models/stories260K/reference_numpy_f64.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


@pytest.fixture
def greedy_text(data_dir: Path, stories: dict[str, Any]) -> str:
    model = str(data_dir / "models/stories260K/tok512.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    text: str = tokenizer.decode(stories["greedy_from_bos_200"][1:])
    return text


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> int:
    n: int = request.param
    return n


@pytest.fixture(params=STORIES, ids=["gguf", "safetensors"])
def story_model(request: pytest.FixtureRequest, data_dir: Path) -> Path:
    path: Path = data_dir / request.param
    return path


@pytest.fixture
def llm(story_model: Path, threads: int) -> Iterator[tinyllm.LLM]:
    with tinyllm.load(story_model, device="cpu", threads=threads, cache_type="f32") as model:
        yield model


def test_greedy_ids(llm: tinyllm.LLM, stories: dict[str, Any], greedy_text: str) -> None:
    ids = stories["greedy_from_bos_200"]
    completion = llm(ids[:1], max_tokens=len(ids) - 1, temperature=0)
    assert ids[:1] + list(completion.tokens) == ids
    assert completion.text.strip() == greedy_text
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("cache_type", ["f16", "f32"])
def test_greedy_ids_from_text(
    story_model: Path, cache_type: str, stories: dict[str, Any], greedy_text: str
) -> None:
    ids = stories["greedy_from_bos_200"]
    with tinyllm.load(story_model, device="cpu", cache_type=cache_type) as model:
        completion = model(PROMPT, max_tokens=len(ids) - 5, temperature=0)
    assert list(completion.tokens) == ids[5:]
    assert PROMPT + completion.text == greedy_text


def test_logits(llm: tinyllm.LLM, stories: dict[str, Any]) -> None:
    """Within 1e-4 of the largest logit, float32 against float64; the best token is the same at every
    position."""
    logits = llm.logits(stories["prompt_ids"])
    expected = np.array(stories["logits_last_position"])
    assert np.abs(logits[-1] - expected).max() < 1e-4 * np.abs(expected).max()
    assert logits.argmax(axis=1).tolist() == stories["logits_argmax_each_position"]


def nll(logits: npt.NDArray[np.float32], ids: list[int]) -> float:
    """Sum of -ln p(next token) over a text, in nats. logits [n, vocabulary] after each of the n ids."""
    x = logits[:-1].astype(np.float64)
    top = x.max(axis=1)
    log_sum = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    return float((log_sum - x[np.arange(len(x)), ids[1:]]).sum())


@pytest.mark.parametrize("directory", PERPLEXITIES)
def test_perplexity(directory: str, data_dir: Path) -> None:
    known = json.loads((data_dir / directory / "perplexity.json").read_text(encoding="utf-8"))
    with tinyllm.load(data_dir / directory, device="cpu", threads=2, cache_type="f32") as model:
        total = sum(nll(model.logits(ids), ids) for ids in known["ids"])
    perplexity = np.exp(total / known["tokens"])
    assert abs(perplexity - known["perplexity"]) < 0.0005


def test_perplexity_does_not_depend_on_the_file_or_on_threads(data_dir: Path) -> None:
    """The same weights in both kinds of file, with one and two threads: the same bits."""
    known = json.loads((data_dir / "models/stories260K-hf/perplexity.json").read_text(encoding="utf-8"))
    results: list[list[npt.NDArray[np.float32]]] = []
    for path in STORIES:
        for threads in (1, 2):
            with tinyllm.load(data_dir / path, device="cpu", threads=threads) as model:
                results.append([model.logits(ids) for ids in known["ids"][:3]])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def run_cli(*arguments: str) -> str:
    program = Path(sysconfig.get_path("scripts")) / "tinyllm-run"
    command = [str(program), *arguments]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_command_line_prints_the_greedy_text(
    story_model: Path, threads: int, stories: dict[str, Any], greedy_text: str
) -> None:
    """Standard output is no terminal here, so it holds the new text alone."""
    n = str(len(stories["greedy_from_bos_200"]) - 5)
    out = run_cli(str(story_model), PROMPT, "--temp", "0", "-n", n, "-t", str(threads))
    assert PROMPT + out.rstrip("\n") == greedy_text


def test_command_line_json(story_model: Path, stories: dict[str, Any], greedy_text: str) -> None:
    ids = stories["greedy_from_bos_200"]
    out = json.loads(run_cli(str(story_model), PROMPT, "--temp", "0", "-n", str(len(ids) - 5), "--json"))
    assert out["tokens"] == ids[5:]
    assert PROMPT + out["text"] == greedy_text
    assert out["finish_reason"] == "length"
