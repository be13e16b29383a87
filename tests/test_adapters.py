"""Adapters: what PEFT and llama.cpp write is read as they mean it, logits are PEFT's, rows of one call have
adapters of their own and bits of their own, and what cannot be obeyed is refused by name.

The goldens are golden/make_adapters.py's. Merging is tested with quantize, in test_adapters_merged below."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from helpers_adapters import (
    Case,
    adapter_case,
    adapter_cases,
    random_tensors,
    write_adapter,
    write_lora_gguf,
    write_peft,
)
from helpers_cli import in_process
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import GOLDEN_DIR, from_bf16, golden_model, random_ids, random_weights, to_bf16
from helpers_serve import serving

import tinyllm
from tinyllm import backends, errors
from tinyllm.adapters import read_adapter
from tinyllm.cli import quantize as quantize_cli
from tinyllm.cli import run as run_cli
from tinyllm.modelfiles import read_model
from tinyllm.server.models import Loader

F32 = npt.NDArray[np.float32]
TOLERANCE = 1e-4  # of the largest logit
CASES = pytest.mark.parametrize("case", adapter_cases(), ids=lambda case: case.name)


def ids_of(case: Case) -> list[int]:
    return random_ids(case.spec.config, case.spec.seed, 70)


def golden(name: str) -> tuple[npt.NDArray[np.int64], F32]:
    arrays = np.load(GOLDEN_DIR / "adapters.npz")
    return arrays["all.positions"], arrays[f"{name}.logits"]


def check(logits: F32, name: str) -> None:
    positions, expected = golden(name)
    assert np.abs(logits[positions] - expected).max() < TOLERANCE * np.abs(expected).max()


def load(path: Path, **options: Any) -> tinyllm.LLM:
    return tinyllm.load(path, device="cpu", cache_type="f32", **options)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return golden_model(adapter_case("all").spec, tmp_path / "model")


def variants(folder: Path, n: int) -> dict[str, Path]:
    """Adapters of one model, one different from the other."""
    case = adapter_case("all")
    return {f"a{i}": write_adapter(case, folder / f"a{i}", seed=2000 + i) for i in range(n)}


# ---- logits


@CASES
def test_equals_peft(case: Case, tmp_path: Path) -> None:
    adapter = write_adapter(case, tmp_path / "adapter")
    with load(golden_model(case.spec, tmp_path / "model"), adapters={"it": adapter}) as llm:
        ids = ids_of(case)
        check(llm.logits(ids, adapter="it"), case.name)
        plain = llm.logits(ids)
        positions, expected = golden(case.name)
        assert np.abs(plain[positions] - expected).max() > 100 * TOLERANCE * np.abs(expected).max()
        np.testing.assert_array_equal(llm.logits(ids, adapter=[]), plain)
        assert llm.adapters == {"it": str(adapter)}


def test_several_with_strengths(model: Path, tmp_path: Path) -> None:
    case = adapter_case("all")
    paths = {
        "default": write_adapter(case, tmp_path / "one"),
        "other": write_adapter(case, tmp_path / "other", seed=case.seed + 500),
    }
    with load(model, adapters=paths) as llm:
        ids = ids_of(case)
        check(llm.logits(ids, adapter=[("default", 0.5), ("other", -1.25)]), "mixed")
        once = llm.logits(ids, adapter="default")
        np.testing.assert_array_equal(llm.logits(ids, adapter=[("default", 1)]), once)
        assert np.abs(llm.logits(ids, adapter=[("default", 1), ("other", 0)]) - once).max() < 1e-6


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_numbers_stay_as_stored(dtype: str, model: Path, tmp_path: Path) -> None:
    """An adapter of halves gives the bits of one that holds the same numbers as floats."""
    case = adapter_case("all")
    tensors = random_tensors(case.shapes, case.seed)
    halves = {
        name: t.astype(np.float16).astype(np.float32) if dtype == "F16" else from_bf16(to_bf16(t))
        for name, t in tensors.items()
    }
    paths = {
        "halves": write_peft(tmp_path / "halves", case.config, tensors, dtype),
        "floats": write_peft(tmp_path / "floats", case.config, halves),
    }
    with load(model, adapters=paths) as llm:
        ids = ids_of(case)
        np.testing.assert_array_equal(llm.logits(ids, adapter="halves"), llm.logits(ids, adapter="floats"))


@pytest.mark.parametrize("name", ["all", "embeddings", "tied", "residual", "fused", "experts"])
def test_gguf_adapters(name: str, tmp_path: Path) -> None:
    """llama.cpp's files, beside a GGUF model and beside a directory: the same pairs, their rows in another
    order."""
    case = adapter_case(name)
    peft, gguf = write_adapter(case, tmp_path / "adapter"), tmp_path / "adapter.gguf"
    directory = golden_model(case.spec, tmp_path / "model")
    write_gguf(tmp_path / "model.gguf", case.spec.config, random_weights(case.spec.config, case.spec.seed))
    write_lora_gguf(gguf, case)
    ids = ids_of(case)
    for path in (directory, tmp_path / "model.gguf"):
        with load(path, adapters={"peft": peft, "gguf": gguf}) as llm:
            logits = llm.logits(ids, adapter="gguf")
            check(logits, name)
            np.testing.assert_array_equal(llm.logits(ids, adapter="peft"), logits)


# ---- the numbers contract


@pytest.mark.parametrize("name", ["all", "experts", "tied"])
def test_a_rows_bits_are_its_own(name: str, tmp_path: Path) -> None:
    """Rows of one call with different adapters, several and none: those of each alone, whatever the threads,
    the instruction set and the chunks."""
    case = adapter_case(name)
    paths = {f"a{i}": write_adapter(case, tmp_path / f"a{i}", seed=3000 + i) for i in range(3)}
    uses = ["a0", None, "a1", [("a2", 0.5), ("a0", 2.0)], "a1", [("a0", 2.0), ("a2", 0.5)]]
    with load(golden_model(case.spec, tmp_path / "model"), adapters=paths) as llm:
        ids = np.array(ids_of(case)[:24])
        applied = [llm._applied(use).uses for use in uses]  # type: ignore[arg-type]
        n = len(uses)
        pool = llm.model.cache("f32", n * len(llm.model.cache_groups))
        pool.grow(n * len(llm.model.cache_groups))
        tables = np.arange(pool.n_pages).reshape(n, -1, 1)

        def forward(sequences: list[int], first: int, last: int) -> F32:
            m = len(sequences)
            return llm.model.forward(
                np.tile(ids[first:last], m),
                np.tile(np.arange(first, last), m),
                np.repeat(np.arange(m), last - first),
                tables[sequences],
                adapters=[applied[s] for s in sequences],
                cache=pool,
            ).reshape(m, last - first, -1)

        alone = np.concatenate([forward([s], 0, len(ids)) for s in range(n)])
        assert len({row.tobytes() for row in alone}) == n - 1  # a1 twice
        plain = llm.model.forward(ids, np.arange(len(ids)), np.zeros(len(ids), int), tables[[1]], cache=pool)
        np.testing.assert_array_equal(alone[1], plain)
        before = backends.isa_name()
        try:
            for isa in {before, "scalar"}:
                backends.select_isa(isa)
                for threads in (1, 3):
                    llm.model.threads = threads
                    np.testing.assert_array_equal(forward(list(range(n)), 0, len(ids)), alone)
            halves = [forward(list(range(n)), 0, 7), forward(list(range(n)), 7, len(ids))]
            np.testing.assert_array_equal(np.concatenate(halves, axis=1), alone)
            steps = [forward(list(range(n)), i, i + 1) for i in range(len(ids))]
            np.testing.assert_array_equal(np.concatenate(steps, axis=1), alone)
        finally:
            backends.select_isa(before)


def test_the_base_is_untouched(model: Path, tmp_path: Path) -> None:
    with load(model, weights="q8_0") as llm:
        ids = ids_of(adapter_case("all"))
        before = llm.logits(ids)
        for name, path in variants(tmp_path, 2).items():
            llm.add_adapter(name, path)
        adapted = llm.logits(ids, adapter="a0")
        np.testing.assert_array_equal(llm.logits(ids), before)
        llm.remove_adapter("a0")
        np.testing.assert_array_equal(llm.logits(ids), before)
        assert np.abs(adapted - before).max() > 0.1


# ---- pages, texts, sessions


def test_pages_are_the_adapters_own(model: Path, tmp_path: Path) -> None:
    paths = variants(tmp_path, 2)
    prompt = (ids_of(adapter_case("all")) * 3)[:200]
    fresh: dict[Any, Any] = {}
    choices: list[Any] = [None, "a0", "a1", [("a0", 0.5)], [("a0", 1.0)]]
    for choice in choices:
        with load(model, adapters=paths) as llm:
            fresh[str(choice)] = llm(prompt, max_tokens=8, temperature=0, adapter=choice)
            assert fresh[str(choice)].timings.cached_tokens == 0
    assert len({tuple(c.tokens) for c in fresh.values()}) > 2
    with load(model, adapters=paths, context=1024) as llm:
        for turn in range(2):
            for choice in choices:
                got = llm(prompt, max_tokens=8, temperature=0, adapter=choice, logprobs=True)
                assert got.tokens == fresh[str(choice)].tokens
                is_known = turn == 1 or choice == [("a0", 1.0)]  # which is what "a0" is
                assert (got.timings.cached_tokens > 0) == is_known
        llm.remove_adapter("a0")
        llm.add_adapter("a0", paths["a1"])  # another one of this name
        got = llm(prompt, max_tokens=8, temperature=0, adapter="a0")
        assert got.tokens == fresh["a1"].tokens
        assert got.timings.cached_tokens > 0


def test_every_entry_takes_one(model: Path, tmp_path: Path) -> None:
    prompt = ids_of(adapter_case("all"))
    asked: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    with load(model, adapters=variants(tmp_path, 1)) as llm:
        plain, expected = llm(prompt, **asked).tokens, llm(prompt, **asked, adapter="a0").tokens
        assert plain != expected
        assert llm([prompt, prompt], **asked, adapter="a0")[1].tokens == expected
        assert [c.tokens for c in llm(prompt, n=2, **asked, adapter="a0")] == [expected, expected]
        stream = llm.stream(prompt, **asked, adapter="a0")
        assert [p.token for p in stream if p.token is not None] == expected
        assert asyncio.run(llm.acall(prompt, **asked, adapter="a0")).tokens == expected

        async def streamed() -> list[int]:
            return [p.token async for p in llm.astream(prompt, **asked, adapter="a0") if p.token is not None]

        assert asyncio.run(streamed()) == expected
        logits = llm.logits(prompt, adapter="a0")
        score = llm.score(prompt, adapter="a0").logprobs
        assert score[0] == pytest.approx(backends.logprob(logits[0], prompt[1]), abs=1e-6)
        assert np.abs(llm.embed(prompt, adapter="a0") - llm.embed(prompt)).max() > 1e-3
        view = llm.adapted("a0")
        assert view(prompt, **asked).tokens == expected
        assert view(prompt, **asked, adapter=[]).tokens == plain
        np.testing.assert_array_equal(view.embed(prompt), llm.embed(prompt, adapter="a0"))
        with llm.session(adapter="a0") as session:
            session.append(prompt)
            np.testing.assert_array_equal(session.logits, logits[-1])
            with session.fork() as fork:
                assert fork.generate(**asked).tokens == expected


def test_texts_of_one_call(model: Path, tmp_path: Path) -> None:
    """Tasks with different adapters share the model's calls, and nothing else."""
    paths = variants(tmp_path, 3)
    prompt = ids_of(adapter_case("all"))[:20]
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    with load(model, adapters=paths) as llm:
        choices = [None, *paths, [("a0", 0.5), ("a1", 0.5)]]
        alone = [llm(prompt, **asked, adapter=choice).tokens for choice in choices]
        seen: list[int] = []
        forward = llm.model.forward

        def watched(*args: Any, **options: Any) -> Any:
            seen.append(len({id(uses) for uses in options.get("adapters") or ()}))
            return forward(*args, **options)

        llm.model.forward = watched  # type: ignore[method-assign]

        async def together() -> list[Any]:
            return await asyncio.gather(*(llm.acall(prompt, **asked, adapter=c) for c in choices))

        assert [c.tokens for c in asyncio.run(together())] == alone
        assert max(seen) == len(choices)


def test_a_saved_session_knows_its_adapter(model: Path, tmp_path: Path) -> None:
    paths = variants(tmp_path, 2)
    prompt = ids_of(adapter_case("all"))
    with load(model, adapters=paths) as llm, llm.session(adapter="a0") as session:
        session.append(prompt)
        session.save(tmp_path / "saved")
        expected = session.generate(max_tokens=5, temperature=0).tokens
    with load(model, adapters={"again": paths["a0"], "other": paths["a1"]}) as llm:
        with llm.restore(tmp_path / "saved", adapter="again") as session:
            assert session.generate(max_tokens=5, temperature=0).tokens == expected
        for adapter in (None, "other"):
            with pytest.raises(errors.FormatError, match="another adapters"):
                llm.restore(tmp_path / "saved", adapter=adapter)


def test_a_text_keeps_its_adapter(model: Path, tmp_path: Path) -> None:
    prompt = ids_of(adapter_case("all"))
    blocks = backends.live_allocations()
    with load(model, adapters=variants(tmp_path, 1)) as llm:
        expected = llm(prompt, max_tokens=8, temperature=0, adapter="a0").tokens
        stream = llm.stream(prompt, max_tokens=8, temperature=0, adapter="a0")
        first = next(stream).token
        llm.remove_adapter("a0")
        assert [first, *(piece.token for piece in stream)] == expected
        assert llm.adapters == {}
        with pytest.raises(errors.ArgumentError, match=r"no adapter 'a0'; there are none: load"):
            llm(prompt, adapter="a0")
        del stream
    del llm
    assert backends.live_allocations() == blocks


def test_added_and_removed_while_others_compute(model: Path, tmp_path: Path) -> None:
    paths = variants(tmp_path, 2)
    prompt = ids_of(adapter_case("all"))[:10]
    with load(model, adapters={"a0": paths["a0"]}) as llm:
        expected = llm(prompt, max_tokens=20, temperature=0, adapter="a0").tokens
        found: list[list[int]] = []

        def write() -> None:
            found.extend(llm(prompt, max_tokens=20, temperature=0, adapter="a0").tokens for _ in range(5))

        thread = threading.Thread(target=write)
        thread.start()
        for _ in range(10):
            llm.add_adapter("more", paths["a1"])
            llm.remove_adapter("more")
        thread.join()
        assert found == [expected] * 5


# ---- names and arguments


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("b", r"no adapter 'b'; there are 'a0'"),
        ([("a0", float("nan"))], "the strength of adapter 'a0' is nan"),
        ([("a0", float("inf"))], "is inf"),
        ([("a0",)], "a list of"),
        (["a0"], "a list of"),
        ([("a0", "1")], "is a number, not str"),
        (7, "a list of"),
        ([(3, 1.0)], "name is a str"),
    ],
)
def test_choices_that_make_no_sense(choice: Any, words: str, model: Path, tmp_path: Path) -> None:
    with (
        load(model, adapters=variants(tmp_path, 1)) as llm,
        pytest.raises((errors.ArgumentError, TypeError), match=words),
    ):
        llm([1, 2], max_tokens=1, adapter=choice)


def test_names(model: Path, tmp_path: Path) -> None:
    path = variants(tmp_path, 1)["a0"]
    with load(model) as llm:
        for name in ("", "a:b", "a\n", "x" * 300):
            with pytest.raises(errors.ArgumentError, match="is no name for an adapter"):
                llm.add_adapter(name, path)
        with pytest.raises(TypeError, match="name is a str"):
            llm.add_adapter(3, path)  # type: ignore[arg-type]
        llm.add_adapter("a", path)
        with pytest.raises(errors.ArgumentError, match="an adapter 'a' already"):
            llm.add_adapter("a", path)
        with pytest.raises(errors.ArgumentError, match="no adapter 'b'"):
            llm.remove_adapter("b")
    with pytest.raises(errors.NotFoundError, match="nowhere"):
        load(model, adapters={"a": tmp_path / "nowhere"})


# ---- what is refused, by name

Change = Callable[[dict[str, Any], dict[str, F32]], object]


def setting(**keys: Any) -> Change:
    return lambda config, tensors: config.update(keys)


def rename(old: str, new: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, F32]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def set_tensor(name: str, value: Any) -> Change:
    return lambda config, tensors: tensors.update({name: np.asarray(value, np.float32)})


Q = "base_model.model.model.layers.0.self_attn.q_proj."
REFUSALS: list[tuple[Change, str]] = [
    (setting(peft_type="LOHA"), "peft_type is 'LOHA'; only LORA"),
    (setting(use_dora=True), "use_dora is not supported: DoRA"),
    (setting(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens is not supported"),
    (setting(use_qalora=True), "use_qalora"),
    (setting(layer_replication=[[0, 1]]), "layer_replication"),
    (setting(trainable_token_indices=[1]), "trainable_token_indices"),
    (setting(modules_to_save=["lm_head"]), "modules_to_save .*'lm_head'"),
    (setting(bias="all"), "bias is 'all'"),
    (setting(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    (setting(some_new_key=3), "not known here: some_new_key"),
    (setting(r=3), "rank 4, the config says 3"),
    (setting(r="8"), "r is '8', not a whole number"),
    (setting(lora_alpha=None), "lora_alpha is 'None'"),
    (setting(rank_pattern=[1]), "rank_pattern is not an object"),
    (setting(rank_pattern={"(a+)+$": 4}), r"pattern '\(a\+\)\+\$', which is not supported"),
    (setting(alpha_pattern={"q_proj": True}), "alpha_pattern"),
    (rename("q_proj", "x_proj"), "x_proj.* is no matrix of this model"),
    (rename("layers.2", "layers.7"), "is no matrix of this model"),
    (rename(f"{Q}lora_B.weight", f"{Q}lora_magnitude_vector"), "no pair of matrices"),
    (rename(f"{Q}lora_B.weight", f"{Q}lora_B.bias"), "not one lora_A and one lora_B"),
    (set_tensor(f"{Q}lora_A.weight", np.zeros((4, 95))), "do not fit a matrix of"),
    (set_tensor(f"{Q}lora_B.weight", np.zeros((97, 4))), "do not fit a matrix of"),
    (set_tensor(f"{Q}lora_A.weight", np.full((4, 96), np.nan)), "a NaN or an infinity"),
    (set_tensor("base_model.model.model.norm.weight", np.zeros(96)), "no pair of matrices"),
]


@pytest.mark.parametrize(("change", "words"), REFUSALS, ids=[words[:40] for _, words in REFUSALS])
def test_refused_by_name(change: Change, words: str, model: Path, tmp_path: Path) -> None:
    case = adapter_case("all")
    config, tensors = json.loads(json.dumps(case.config)), random_tensors(case.shapes, case.seed)
    change(config, tensors)
    path = write_peft(tmp_path / "adapter", config, tensors)
    with pytest.raises((errors.UnsupportedError, errors.FormatError), match=words) as caught:
        read_adapter(path, read_model(model).config)
    assert str(path) in str(caught.value)


def test_every_key_that_peft_writes_has_its_place() -> None:
    """The golden configs are all that PEFT 0.21 writes: each key is obeyed, harmless, or refused when set."""
    from tinyllm.adapters import peft

    keys = {key for case in adapter_cases() for key in case.config}
    assert keys <= peft._OBEYED | peft._HARMLESS | set(peft._REFUSED)
    assert not peft._HARMLESS & set(peft._REFUSED)


def test_files_that_are_none(model: Path, tmp_path: Path) -> None:
    config = read_model(model).config
    path = write_adapter(adapter_case("all"), tmp_path / "adapter")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(errors.NotFoundError, match=r"adapter_model.bin is a pickle"):
        read_adapter(path, config)
    (tmp_path / "file").write_bytes(b"nonsense")
    with pytest.raises(errors.FormatError, match="not an adapter"):
        read_adapter(tmp_path / "file", config)
    with pytest.raises(errors.NotFoundError, match=r"it has no adapter_config.json"):
        read_adapter(tmp_path, config)
    spec = adapter_case("all").spec
    write_gguf(tmp_path / "model.gguf", spec.config, random_weights(spec.config, spec.seed))
    with pytest.raises(errors.FormatError, match=r"general\.type is"):
        read_adapter(tmp_path / "model.gguf", config)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"adapter.type": "control_vector"}, "adapter.type is 'control_vector'"),
        ({"general.architecture": "qwen2"}, "architecture 'qwen2', this one is 'llama'"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, "an activated LoRA"),
        ({"adapter.lora.alpha": "big"}, "adapter.lora.alpha is 'big'"),
    ],
)
def test_gguf_adapters_refused(metadata: dict[str, Any], words: str, model: Path, tmp_path: Path) -> None:
    config = read_model(model).config
    write_lora_gguf(tmp_path / "adapter.gguf", adapter_case("all"), metadata=metadata)
    with pytest.raises((errors.UnsupportedError, errors.FormatError), match=words):
        read_adapter(tmp_path / "adapter.gguf", config)


def test_a_copy_of_the_embedding_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT saves the model's own embedding beside a trained one."""
    case = adapter_case("embeddings")
    tensors = random_tensors(case.shapes, case.seed)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert name in case.shapes
    tensors[name] = np.zeros(case.shapes[name], np.float32)
    path = write_peft(tmp_path / "adapter", case.config, tensors)
    read_adapter(path, read_model(golden_model(case.spec, tmp_path / "model")).config)
    assert "is a copy of the model's own, which is used" in caplog.text


# ---- merging


@CASES
def test_merged(case: Case, tmp_path: Path) -> None:
    """The merged file's logits are PEFT's."""
    adapter = write_adapter(case, tmp_path / "adapter")
    model = golden_model(case.spec, tmp_path / "model")
    tinyllm.quantize(model, tmp_path / "merged.gguf", "f32", lora=[(adapter, 1.0)])
    with load(tmp_path / "merged.gguf") as llm:
        check(llm.logits(ids_of(case)), case.name)


def test_merging_two_and_into_halves(model: Path, tmp_path: Path) -> None:
    case = adapter_case("all")
    one = write_adapter(case, tmp_path / "one")
    two = write_adapter(case, tmp_path / "two", seed=case.seed + 500)
    tinyllm.quantize(model, tmp_path / "merged.gguf", "f32", lora=[(one, 0.5), (two, -1.25)])
    with load(tmp_path / "merged.gguf") as llm:
        check(llm.logits(ids_of(case)), "mixed")
    tinyllm.quantize(model, tmp_path / "q.gguf", "q8_0")
    with pytest.raises(errors.ArgumentError, match="adapters are merged into floats"):
        tinyllm.quantize(
            tmp_path / "q.gguf", tmp_path / "x.gguf", "q4_0", lora=[(one, 1)], allow_requantize=True
        )


# ---- the server


def stories_adapter(folder: Path) -> Path:
    """Of random numbers, for the model that comes with tinyllm."""
    files = read_model("stories")
    c = files.config
    shapes = {"q_proj": (c.n_heads * c.head_dim, c.dim), "o_proj": (c.dim, c.n_heads * c.head_dim)}
    names = {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{of}.weight": shape
        for layer in range(c.n_layers)
        for module, (rows, k) in shapes.items()
        for of, shape in (("A", (4, k)), ("B", (rows, 4)))
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 40}
    return write_peft(folder, config, random_tensors(names, 77))


def test_served_under_a_name_of_its_own(tmp_path: Path) -> None:
    """ "base:adapter" is a model to every client, beside the base: one model is loaded for both."""
    adapter = str(stories_adapter(tmp_path / "adapter"))
    asked: dict[str, Any] = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12}
    with tinyllm.load("stories", device="cpu", adapters={"x": adapter}) as llm:
        expected = llm("Once upon a time", temperature=0, max_tokens=12, adapter="x").text
        plain = llm("Once upon a time", temperature=0, max_tokens=12).text
        vector = llm.embed("a text", adapter="x")
    assert expected != plain
    load = Loader(device="cpu", context=512)
    with serving({"base": "stories"}, load, adapters={"base": {"x": adapter}}) as running:

        def post(path: str, **body: Any) -> Any:
            answer = httpx.post(running.url + path, json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()

        listed = httpx.get(f"{running.url}/v1/models").json()["data"]
        assert [one["id"] for one in listed] == ["base", "base:x"]
        for model, text in (("base:x", expected), ("base", plain), ("base:x", expected)):
            answer = post("/v1/completions", model=model, **asked, replay=True)
            assert (answer["model"], answer["choices"][0]["text"]) == (model, text)
            assert answer["replay"][0]["settings"].get("adapter") == ("x" if model == "base:x" else None)
            body = {"model": model, "prompt": asked["prompt"], "stream": False, "raw": True}
            options = {"temperature": 0, "num_predict": 12}
            assert post("/api/generate", **body, options=options)["response"] == text
        found = post("/v1/embeddings", model="base:x", input="a text")["data"][0]["embedding"]
        np.testing.assert_allclose(found, vector, atol=1e-6)
        assert len([served for served in running.server.models.served.values() if served.llm]) == 1
        refused = httpx.post(f"{running.url}/v1/completions", json={"model": "base:y", **asked})
        assert refused.status_code == 404
        assert "only base, base:x" in refused.text


# ---- commands


def test_commands(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--lora applies adapters, --json notes them, --replay applies them again; tinyllm-quantize merges."""
    monkeypatch.chdir(tmp_path)
    case = adapter_case("all")
    write_adapter(case, tmp_path / "one")
    config = {**case.spec.config, "vocab_size": 400}
    gguf, weights = tmp_path / "text.gguf", random_weights(config, case.spec.seed)
    write_gguf(gguf, config, weights, tokenizer=small_tokenizer(400))
    run = in_process(run_cli.main, monkeypatch, capsys)
    with load(gguf, adapters={"one": "one"}) as llm:
        expected = llm("a", max_tokens=5, temperature=0, adapter=[("one", 0.5)]).tokens
        assert llm("a", max_tokens=5, temperature=0).tokens != expected
    options = ("--device", "cpu", "--cache-type", "f32", "-n", "5", "--temp", "0")
    got = run(gguf, "a", *options, "--lora", "one:0.5", "--json")
    assert (got.code, json.loads(got.out)["tokens"]) == (0, expected), got.err
    Path("out.json").write_text(got.out)
    assert "same: all" in run("--replay", "out.json", "--device", "cpu").out
    assert run(gguf, "a", *options, "--lora", "nowhere").code != 0
    quantize = in_process(quantize_cli.main, monkeypatch, capsys)
    assert quantize(gguf, "merged.gguf", "f32", "--lora", "one:0.5").code == 0
    got = run("merged.gguf", "a", *options, "--json")
    assert json.loads(got.out)["tokens"] == expected
