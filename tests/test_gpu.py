"""What the CUDA backend computes, on a device: against the truths that hold the CPU, against the CPU itself,
and the bits it promises. Each test is skipped, by name, where no GPU can be used; `pytest -m gpu` runs these
alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
from families_table import FILES
from helpers_gguf import FORMATS, write_gguf
from helpers_models import GOLDEN_DIR, Spec, golden_model, golden_specs, random_ids, random_weights

import tinyllm
from tinyllm import backends, errors
from tinyllm.loading import load

F32 = npt.NDArray[np.float32]
pytestmark = pytest.mark.gpu

TOLERANCE = 1e-4  # of the largest logit, float32 models with a float32 cache, as on the CPU (test_golden.py)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 301,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
IDS = random_ids(CONFIG, 7, 300)  # four pages and a piece, one segment of 256 and a piece
CACHES = ("f16", "f32", "q8_0")


def model_file(path: Path, format: str) -> dict[str, F32]:
    """A small model in a format; the numbers it holds."""
    return write_gguf(path, CONFIG, random_weights(CONFIG, seed=5), format=format)


# ---- against the truth


@pytest.mark.parametrize(
    ("file", "spec"), [pytest.param(f, spec, id=spec.name) for f in FILES for spec in golden_specs(f)]
)
def test_goldens(gpu: str, file: str, spec: Spec, tmp_path: Path) -> None:
    goldens = np.load(GOLDEN_DIR / FILES[file])
    ids = random_ids(spec.config, spec.seed, spec.n_tokens)
    with load(golden_model(spec, tmp_path), device=gpu, cache_type="f32", context=spec.context) as llm:
        logits = llm.logits(ids)[goldens[spec.name + ".positions"]]
    expected = goldens[spec.name + ".logits"]
    assert np.abs(logits - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("path", ["models/stories260K/stories260K.gguf", "models/stories260K-hf"])
def test_trained_model(gpu: str, path: str, data_dir: Path) -> None:
    """Greedy text and logits as computed in float64."""
    known = json.loads((data_dir / "models/stories260K/reference_numpy_f64.json").read_text())
    ids = known["greedy_from_bos_200"]
    with load(data_dir / path, device=gpu, cache_type="f32") as llm:
        assert ids[:1] + llm(ids[:1], max_tokens=len(ids) - 1, temperature=0).tokens == ids
        logits = llm.logits(known["prompt_ids"])
    expected = np.array(known["logits_last_position"])
    assert np.abs(logits[-1] - expected).max() < TOLERANCE * np.abs(expected).max()
    assert logits.argmax(axis=1).tolist() == known["logits_argmax_each_position"]


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
@pytest.mark.parametrize("cache_type", ["f16", "f32"])
def test_trained_model_quantized_says_what_the_cpu_says(
    gpu: str, weights: str, cache_type: backends.CacheType, data_dir: Path
) -> None:
    path, texts = data_dir / "models/babyllama-tok105-hf", []
    for device in ("cpu", gpu):
        with load(path, device=device, weights=weights, cache_type=cache_type) as llm:
            texts.append(llm([1, 5, 9], max_tokens=60, temperature=0).tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("format", FORMATS)
def test_against_the_cpu(gpu: str, format: str, tmp_path: Path) -> None:
    """Both round activations to int8 by the same rule and add integers exactly. But floats are added in
    another order, so an activation near the middle between two steps may go the other way; each that does
    moves what comes after it, and more go the other way there. At worst the two roundings have nothing in
    common: then their errors (from float64 of the same weights) are as large and independent, and the
    difference is sqrt(2) times such an error. An error's square is a sum over at least k = 256 roundings,
    known to sqrt(2 / 256); five such deviations, halved by the root.
    """
    held = model_file(tmp_path / "model.gguf", format)
    spread = 1 + 5 * math.sqrt(2 / 256) / 2
    found = {}
    for device in ("cpu", gpu):
        with load(tmp_path / "model.gguf", device=device, cache_type="f32") as llm:
            found[device] = llm.logits(IDS)
            layer = llm.model.unpack("wq", 1)
        order = found.setdefault("weights", layer)
        np.testing.assert_array_equal(order, layer)
    truth = reference.logits(CONFIG, held, IDS)
    if format in ("F32", "F16", "BF16"):
        assert np.abs(found[gpu] - truth).max() < TOLERANCE * np.abs(truth).max()
        return
    rounding = np.linalg.norm(found["cpu"] - truth)
    assert np.linalg.norm(found[gpu] - truth) < spread * rounding
    assert np.linalg.norm(found[gpu] - found["cpu"]) < math.sqrt(2) * spread * rounding


# ---- the same bits


@pytest.fixture(scope="module", params=["F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpu") / f"{request.param}.gguf"
    model_file(made, request.param)
    return made


@pytest.fixture(params=CACHES)
def llm(gpu: str, path: Path, request: pytest.FixtureRequest) -> Iterator[tinyllm.LLM]:
    with load(path, device=gpu, cache_type=request.param) as model:
        yield model


def test_bits_from_run_to_run(llm: tinyllm.LLM, gpu: str, path: Path) -> None:
    first = llm.logits(IDS)
    np.testing.assert_array_equal(llm.logits(IDS), first)  # from a cached prefix
    with load(path, device=gpu, cache_type=llm.cache_type) as fresh:
        np.testing.assert_array_equal(fresh.logits(IDS), first)


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_bits_in_any_chunks(llm: tinyllm.LLM, gpu: str, path: Path, size: int) -> None:
    n = 40 if size == 1 else len(IDS)
    expected = llm.logits(IDS[:n])
    with load(path, device=gpu, cache_type=llm.cache_type) as fresh, fresh.session() as session:
        for start in range(0, n, size):
            session.append(IDS[start : min(start + size, n)])
            end = len(session.tokens)
            np.testing.assert_array_equal(session.logits, expected[end - 1])


def test_bits_alone_and_in_a_batch(llm: tinyllm.LLM) -> None:
    prompts = [IDS[i : i + n] for i, n in enumerate((1, 3, 17, 64, 65, 130, 257, 2, 9))]
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "logprobs": True}
    for prompt, together in zip(prompts, llm(prompts, **options), strict=True):
        alone = llm(prompt, **options)
        assert (alone.tokens, alone.logprobs) == (together.tokens, together.logprobs)


def test_layers_may_be_run_apart(llm: tinyllm.LLM) -> None:
    pool = llm.model.cache(llm.cache_type, 5)
    pool.grow(5)
    table, positions = [[0, 1, 2, 3, 4]], np.arange(len(IDS))
    sequences = np.zeros(len(IDS), np.int32)
    middle = llm.model.forward(IDS, positions, sequences, table, layers=(0, 1), cache=pool)
    end = llm.model.forward(middle, positions, sequences, table, layers=(1, 2), cache=pool)
    np.testing.assert_array_equal(end, llm.logits(IDS))
    pool.close()


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1, "top_k": 20, "top_logprobs": 9}])
def test_choosing_on_the_device_is_choosing_from_all(
    options: dict[str, Any], llm: tinyllm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"max_tokens": 9, "seed": 5, "logprobs": True, **options}
    some = llm([IDS[:9], IDS[:90]], **wanted)
    assert llm.model.most_candidates == 64
    monkeypatch.setattr(backends.Model, "most_candidates", 0)
    for a, b in zip(some, llm([IDS[:9], IDS[:90]], **wanted), strict=True):
        assert (a.tokens, a.logprobs, a.top_logprobs) == (b.tokens, b.logprobs, b.top_logprobs)


def test_candidates_of_a_mask(llm: tinyllm.LLM) -> None:
    pool = llm.model.cache(llm.cache_type, 2)
    pool.grow(2)
    call = (IDS[:9], np.arange(9), np.zeros(9, np.int32), [[0, 1]])
    logits = llm.model.forward(*call, rows=[8, 2], cache=pool)
    words = -(-logits.shape[1] // 32)
    for bits in (0x80000001, 0x00100000):  # the second time from the graph
        masks = np.full((2, words), bits, np.uint32)
        allowed = np.unpackbits(masks.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little") > 0
        found = llm.model.candidates(*call, rows=[8, 2], n=7, allowed=masks, cache=pool)
        order = np.argsort(-np.where(allowed, logits, -np.inf), axis=1, kind="stable")[:, :7]
        n = min(7, int(allowed[0].sum()))
        np.testing.assert_array_equal(found.tokens[:, :n], order[:, :n])
        np.testing.assert_array_equal(found.logits[:, :n], np.take_along_axis(logits, order, 1)[:, :n])
        assert (found.tokens[:, n:] == -1).all()
        np.testing.assert_array_equal(found.largest, logits.max(axis=1))
    pool.close()


# ---- manners


def test_several_models_and_forks(llm: tinyllm.LLM, gpu: str, path: Path) -> None:
    with load(path, device=gpu) as other, llm.session(seed=1) as session:
        session.append(IDS[:70])
        with session.fork() as fork:
            answers = [s.generate(max_tokens=5, temperature=0).tokens for s in (session, fork)]
        assert answers[0] == answers[1] == llm(IDS[:70], max_tokens=5, temperature=0).tokens
        assert other.device == llm.device == gpu


def test_cancelling(llm: tinyllm.LLM) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    done = llm(IDS[:9], max_tokens=10_000, temperature=0, cancel=stop)
    assert done.finish_reason in ("cancelled", "length")
    assert llm(IDS[:9], max_tokens=3, temperature=0).tokens == done.tokens[:3] or len(done.tokens) < 3


def test_everything_is_given_back(gpu: str, path: Path) -> None:
    free = []
    for _ in range(3):
        with load(path, device=gpu) as model:
            model(IDS[:70], max_tokens=3)
        free.append(backends.choose_device(gpu).free_memory())
    assert free[1] == free[2], "the first load may have made the driver's own things"


def test_too_much_is_refused_with_the_numbers(gpu: str, path: Path) -> None:
    device = backends.choose_device(gpu)
    page_bytes = 64 * 2 * 2 * 2 * 32 * 2  # tokens, keys and values, layers, kv heads, head size, f16
    context = device.free_memory() // page_bytes * 64 * 2
    with pytest.raises(errors.MemoryLimitError, match=rf"the memory of {gpu} \(.*are free"):
        load(path, device=gpu, context=context)


def test_bandwidth_is_measured(gpu: str) -> None:
    device = backends.choose_device(gpu)
    assert backends.read_bandwidth(1 << 26, 1, 2, device) > 1
    with pytest.raises(errors.ArgumentError, match="at least"):
        backends.read_bandwidth(1, 1, 1, device)
