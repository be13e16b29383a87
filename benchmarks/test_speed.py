"""The speed of all that a user waits for: decode and prefill in every quantization of the bundled model,
sample, tokenize, load, quantize, start.

README.md says what the figures mean and how to run them.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic

import tinyllm
from tinyllm import backends
from tinyllm.engine.sampling import Sampler
from tinyllm.modelfiles import BUNDLED

Measure = Callable[..., None]  # conftest.py
ROOT = Path(__file__).resolve().parents[1]
PROSE = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/log.md"))
MIDDLE = synthetic.Shape("middle", 3, 1024, 16, 4, 3584, 4096, 2048, 10000.0, None, True)
N_DECODE = 64
N_PREFILL = 384


@pytest.fixture(scope="module", params=["f16", *(name for name in backends.FORMAT_IDS if name != "f16")])
def llm(request: pytest.FixtureRequest, master: Path) -> Iterator[tinyllm.LLM]:
    weights = None if request.param == "f16" else request.param
    with tinyllm.load(master, weights=weights) as model:
        yield model


class Prompts:
    """Random ids, never the same twice, so that no prompt is found in the cache."""

    def __init__(self, llm: tinyllm.LLM, n_tokens: int) -> None:
        self.random = np.random.default_rng(0)
        self.vocab_size, self.n_tokens = llm.config.vocab_size, n_tokens

    def __call__(self) -> tuple[tuple[list[int]], dict[str, Any]]:
        return (self.random.integers(self.vocab_size, size=self.n_tokens).tolist(),), {}


def test_decode(llm: tinyllm.LLM, measure: Measure) -> None:
    """One text, greedy, token by token. The prompt is one token, a small part of the time."""
    endless = dict.fromkeys(llm.eos_ids, -math.inf)

    def decode(prompt: list[int]) -> None:
        completion = llm(prompt, max_tokens=N_DECODE, temperature=0, logit_bias=endless)
        assert len(completion.tokens) == N_DECODE

    measure(decode, n=N_DECODE, setup=Prompts(llm, 1))


def test_decode_batch_of_8(llm: tinyllm.LLM, measure: Measure) -> None:
    """Eight texts in one batch; tokens of all of them together."""
    endless = dict.fromkeys(llm.eos_ids, -math.inf)
    prompts = Prompts(llm, 8)

    def setup() -> tuple[tuple[list[list[int]]], dict[str, Any]]:
        (ids,), _ = prompts()
        return ([[i] for i in ids],), {}

    def decode(batch: list[list[int]]) -> None:
        completions = llm(batch, max_tokens=N_DECODE, temperature=0, logit_bias=endless)
        assert sum(len(c.tokens) for c in completions) == 8 * N_DECODE

    measure(decode, n=8 * N_DECODE, setup=setup, rounds=5)


def test_prefill(llm: tinyllm.LLM, measure: Measure) -> None:
    """A prompt, up to the first token of the answer."""

    def prefill(prompt: list[int]) -> None:
        llm(prompt, max_tokens=1, temperature=0)

    measure(prefill, n=N_PREFILL, setup=Prompts(llm, N_PREFILL))


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "default"])
def test_sample_128k(temperature: float, measure: Measure) -> None:
    """One token out of 128k logits, with the default filters."""
    n_vocab = 128 * 1024
    logits = np.random.default_rng(0).normal(0, 3, n_vocab).astype(np.float32)
    sampler = Sampler(tinyllm.SamplingParams(temperature=temperature, seed=1).resolve(), n_vocab)
    history = list(range(100))
    measure(lambda: sampler(logits, history, len(history)), rounds=200)


def test_load_tokenizer_128k(data_dir: Path, measure: Measure) -> None:
    """Llama 3's vocabulary, rebuilt from a GGUF."""
    path = data_dir / "vocab" / "ggml-vocab-llama-bpe.gguf"
    measure(lambda: tinyllm.load_tokenizer(path), rounds=3)


def test_encode_sentencepiece(measure: Measure) -> None:
    """The bundled vocabulary on this repository's own prose."""
    tokenizer = tinyllm.load_tokenizer(BUNDLED["stories"])
    measure(lambda: tokenizer.encode(PROSE), n=len(PROSE.encode()) / 1e6, unit="MB/s")


def test_encode_bpe_128k(data_dir: Path, measure: Measure) -> None:
    """Llama 3's vocabulary on the same."""
    tokenizer = tinyllm.load_tokenizer(data_dir / "vocab" / "ggml-vocab-llama-bpe.gguf")
    measure(lambda: tokenizer.encode(PROSE), n=len(PROSE.encode()) / 1e6, unit="MB/s")


def test_decode_tokens_one_by_one(measure: Measure) -> None:
    """Ids back to text as a stream, the way answers are printed."""
    tokenizer = tinyllm.load_tokenizer(BUNDLED["stories"])
    ids = tokenizer.encode(PROSE)

    def decode() -> None:
        stream = tokenizer.stream()
        for i in ids:
            stream.push(i)

    measure(decode, n=len(ids))


def test_load(measure: Measure) -> None:
    """The bundled model, its file in the page cache."""
    measure(lambda: tinyllm.load("stories").close())


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_0", "q4_k_m"])
def test_load_42m(type: str, synthetic_model: Callable[..., Path], measure: Measure) -> None:
    """42 million random weights, read and packed; MB of the file."""
    path = synthetic_model(MIDDLE, type)
    measure(lambda: tinyllm.load(path).close(), n=path.stat().st_size / 1e6, unit="MB/s", rounds=5)


@pytest.mark.parametrize("format", [name for name in backends.FORMAT_IDS if name not in ("f32", "f16")])
def test_quantize_42m(format: str, synthetic_model: Callable[..., Path], measure: Measure) -> None:
    """Random F16 weights quantized while they are loaded; millions of weights a second."""
    path = synthetic_model(MIDDLE, "f16")
    n = sum(math.prod(t.shape) for t in synthetic.tensors(MIDDLE, synthetic.TYPES["f16"])) / 1e6
    measure(lambda: tinyllm.load(path, weights=format).close(), n=n, unit="M/s", rounds=3)


@pytest.mark.parametrize("type", ["q8_0", "q4_0", "q4_k_m", "iq4_xs"])
def test_quantize_42m_to_a_file(
    type: str, synthetic_model: Callable[..., Path], tmp_path: Path, measure: Measure
) -> None:
    """The same from file to file, in a mix, the disk's part included; millions of weights a second."""
    path = synthetic_model(MIDDLE, "f16")
    n = sum(math.prod(t.shape) for t in synthetic.tensors(MIDDLE, synthetic.TYPES["f16"])) / 1e6
    measure(lambda: tinyllm.quantize(path, tmp_path / "out.gguf", type), n=n, unit="M/s", rounds=3)


def test_start_to_first_token(measure: Measure) -> None:
    """The whole process: Python, imports, loading, a prompt, one token."""
    command = [sys.executable, "-m", "tinyllm.cli.run", "stories", "Once upon a time", "-n", "1"]
    measure(lambda: subprocess.run(command, check=True, capture_output=True), rounds=5)
