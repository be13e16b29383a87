"""Wrong use of the public interface: an exception that says what is wrong, of a class that users catch, and a
model that answers as before."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_gguf import write_gguf
from helpers_models import golden_spec, golden_specs, random_ids, random_weights, write_hf_directory

import tinyllm
from tinyllm import backends, errors
from tinyllm.llm import Session
from tinyllm.measure import benchmark, quality
from tinyllm.modelfiles import BUNDLED
from tinyllm.quantization.imatrix import Imatrix

pytestmark = pytest.mark.usefixtures("frozen_heap")
CONFIG = golden_spec("llama3").config
VOCAB, DIM = CONFIG["vocab_size"], CONFIG["hidden_size"]
N_LAYERS = CONFIG["num_hidden_layers"]
PROMPT = random_ids(CONFIG, 1, 70)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinyllm.LLM]:
    path = write_hf_directory(tmp_path_factory.mktemp("model"), CONFIG, random_weights(CONFIG, seed=5))
    with tinyllm.load(path, threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pool(llm: tinyllm.LLM) -> Iterator[backends.PagePool]:
    pages = llm.model.cache("f16", 4)
    pages.grow(4)
    yield pages
    pages.close()


# ---- the layer below: model.forward. What a good call has, and what each case changes in it.

GOOD: dict[str, Any] = {
    "tokens_or_x": [1, 2, 3],
    "positions": [0, 1, 2],
    "sequences": [0, 0, 0],
    "page_tables": [[0, 1]],
}
CANDIDATES: dict[str, Any] = {("tokens" if name == "tokens_or_x" else name): GOOD[name] for name in GOOD}
ARGUMENT, TYPE = errors.ArgumentError, TypeError

WRONG: list[tuple[type[Exception], dict[str, Any]]] = [
    # ids
    (ARGUMENT, {"tokens_or_x": [1, 2, -1]}),
    (ARGUMENT, {"tokens_or_x": [1, 2, VOCAB]}),
    (ARGUMENT, {"tokens_or_x": [1, 2, 2**31]}),
    (ARGUMENT, {"tokens_or_x": [2**63, 2**63, 2**63]}),
    (ARGUMENT, {"tokens_or_x": [1, 2, 2**200]}),
    (ARGUMENT, {"tokens_or_x": np.array([1, 2, 2**64 - 1], np.uint64)}),
    (ARGUMENT, {"tokens_or_x": [1, 2]}),
    (ARGUMENT, {"tokens_or_x": 1}),
    (ARGUMENT, {"tokens_or_x": np.zeros((1, 3, 1), np.int32)}),
    (ARGUMENT, {"tokens_or_x": [[1, 2], [3]]}),
    (TYPE, {"tokens_or_x": [1.0, 2.0, 3.0]}),
    (TYPE, {"tokens_or_x": [True, False, True]}),
    (TYPE, {"tokens_or_x": "abc"}),
    (TYPE, {"tokens_or_x": ["a", "b", "c"]}),
    (TYPE, {"tokens_or_x": None}),
    (TYPE, {"tokens_or_x": [1, None, 3]}),
    (TYPE, {"tokens_or_x": np.array([1, 2, 3], "datetime64[s]")}),
    # activations
    (ARGUMENT, {"tokens_or_x": np.zeros((3, DIM - 1), np.float32)}),
    (ARGUMENT, {"tokens_or_x": np.zeros((DIM, 3), np.float32)}),
    (ARGUMENT, {"tokens_or_x": np.zeros((2, DIM), np.float32)}),
    (TYPE, {"tokens_or_x": np.zeros((3, DIM), np.complex64)}),
    (TYPE, {"tokens_or_x": np.full((3, DIM), "x")}),
    # positions
    (ARGUMENT, {"positions": [-1, 0, 1]}),
    (ARGUMENT, {"positions": [0, 1, 3]}),
    (ARGUMENT, {"positions": [2, 1, 0]}),
    (ARGUMENT, {"positions": [0, 0, 0]}),
    (ARGUMENT, {"positions": [127, 128, 129]}),  # past the table
    (ARGUMENT, {"positions": [2**31 - 3, 2**31 - 2, 2**31 - 1]}),
    (ARGUMENT, {"positions": [2**31 - 2, 2**31 - 1, -(2**31)]}),
    (ARGUMENT, {"positions": [2**40, 2**40 + 1, 2**40 + 2]}),
    (ARGUMENT, {"positions": [[0, 1, 2]]}),
    (ARGUMENT, {"positions": [0, 1]}),
    (ARGUMENT, {"positions": 0}),
    (TYPE, {"positions": [0.0, 1.0, 2.0]}),
    # sequences
    (ARGUMENT, {"sequences": [0, 0, 1]}),
    (ARGUMENT, {"sequences": [0, 0, -1]}),
    (ARGUMENT, {"sequences": [0, 0]}),
    (ARGUMENT, {"sequences": [[0, 0, 0]]}),
    (ARGUMENT, {"sequences": [1, 1, 0], "page_tables": [[0], [1]]}),
    (TYPE, {"sequences": ["a", "b", "c"]}),
    # page tables
    (ARGUMENT, {"page_tables": [[-1, 1]]}),
    (ARGUMENT, {"page_tables": [[4, 1]]}),
    (ARGUMENT, {"page_tables": [[2**31 - 1, 1]]}),
    (ARGUMENT, {"page_tables": [[2**31, 1]]}),
    (ARGUMENT, {"page_tables": [0, 1]}),
    (ARGUMENT, {"page_tables": [[]]}),
    (ARGUMENT, {"page_tables": np.zeros((0, 2), np.int32)}),
    (ARGUMENT, {"page_tables": [[[0, 1], [2, 3]]]}),
    (ARGUMENT, {"page_tables": [[0], [0, 1]]}),
    (TYPE, {"page_tables": [[0.5, 1.0]]}),
    # rows
    (ARGUMENT, {"rows": [3]}),
    (ARGUMENT, {"rows": [-1]}),
    (ARGUMENT, {"rows": [[0]]}),
    (ARGUMENT, {"rows": 2}),
    (ARGUMENT, {"rows": [0, 1, 2, 0]}),
    (ARGUMENT, {"rows": [2**33]}),
    (TYPE, {"rows": [0.0]}),
    (TYPE, {"rows": "all"}),
    # layers
    (ARGUMENT, {"layers": (0, N_LAYERS + 1)}),
    (ARGUMENT, {"layers": (-1, N_LAYERS)}),
    (ARGUMENT, {"layers": (1, 0)}),
    (ARGUMENT, {"layers": (0, 2**70)}),
    (ARGUMENT, {"layers": (0,)}),
    (ARGUMENT, {"layers": (0, 1, 2)}),
    (ARGUMENT, {"layers": 1}),
    (ARGUMENT, {"layers": (0, 1), "logits": True}),
    (TYPE, {"layers": (0.0, 1.0)}),
    (TYPE, {"layers": "all"}),
    # the rest
    (TYPE, {"cache": None}),
    (TYPE, {"cache": object()}),
    (TYPE, {"should_stop": 5}),
]


def test_what_forward_refuses(llm: tinyllm.LLM, pool: backends.PagePool) -> None:
    right = llm.model.forward(**GOOD, cache=pool)
    for error, change in WRONG:
        with pytest.raises(error) as raised:
            llm.model.forward(**({**GOOD, "cache": pool} | change))
        assert len(str(raised.value)) > 15, change
        np.testing.assert_array_equal(llm.model.forward(**GOOD, cache=pool), right)


def test_forward_goes_by_what_its_arrays_held_when_they_were_checked(
    llm: tinyllm.LLM, pool: backends.PagePool
) -> None:
    """Another thread, or should_stop, may write to them: the core would go where they point then."""
    good = {name: np.array(values, np.int32) for name, values in GOOD.items()} | {
        "rows": np.array([2], np.int32)
    }
    right = llm.model.forward(**GOOD, rows=[2], cache=pool)
    for name, others in {
        "tokens_or_x": [4, 5, 6],
        "positions": [5, 6, 7],
        "sequences": [1, 1, 1],
        "page_tables": [[99, 99]],
        "rows": [0],
    }.items():
        given = {key: value.copy() for key, value in good.items()}
        asked = []

        def should_stop(array: Any = given[name], others: Any = others, asked: Any = asked) -> bool:
            array[:] = others
            asked.append(1)
            return False

        np.testing.assert_array_equal(llm.model.forward(**given, cache=pool, should_stop=should_stop), right)
        assert asked, name


def test_forward_refuses_a_model_that_lacks_weights(llm: tinyllm.LLM) -> None:
    empty = backends.Model(llm.config, device="cpu", threads=1)
    pages = empty.cache("f16", 2)
    pages.grow(2)
    empty.tie()  # to an embedding that is not there yet
    for _ in range(2):
        with pytest.raises(errors.ArgumentError, match="not all weights are known to be there"):
            empty.forward(**GOOD, cache=pages)
        with pytest.raises(errors.ArgumentError, match="weight embedding of layer 0 is missing"):
            empty.check()
    pages.close()
    empty.close()


def test_forward_takes_any_memory_layout(llm: tinyllm.LLM, pool: backends.PagePool) -> None:
    """Strided, reversed, read-only, of another byte order or integer type: the same numbers."""
    right = llm.model.forward(**GOOD, cache=pool)
    strided = np.array([1, 9, 2, 9, 3, 9])[::2]
    fixed = np.array([1, 2, 3], np.int32)
    fixed.flags.writeable = False
    tokens = [strided, np.array([3, 2, 1])[::-1], fixed, strided.astype(">i8"), strided.astype(np.uint16)]
    for variant in tokens:
        got = llm.model.forward(**{**GOOD, "tokens_or_x": variant}, cache=pool)
        np.testing.assert_array_equal(got, right)
    table = np.asfortranarray(np.array([[0, 1], [2, 3]]))
    two = {"tokens_or_x": [1, 1], "positions": [0, 0], "sequences": [0, 1], "page_tables": table}
    got = llm.model.forward(**two, cache=pool)
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[0], right[0])
    x = llm.model.forward(**GOOD, cache=pool, layers=(0, 1))
    for variant in (np.asfortranarray(x), x.astype(np.float64), x.astype(">f4"), np.repeat(x, 2, 1)[:, ::2]):
        rest = {**GOOD, "tokens_or_x": variant, "layers": (1, N_LAYERS)}
        np.testing.assert_array_equal(llm.model.forward(**rest, cache=pool), right)


def test_forward_of_nothing(llm: tinyllm.LLM, pool: backends.PagePool) -> None:
    nothing: dict[str, Any] = {"tokens_or_x": [], "positions": [], "sequences": [], "page_tables": [[]]}
    assert llm.model.forward(**nothing, cache=pool).shape == (0, VOCAB)


def test_numbers_that_are_not_finite_stay_in_their_call(llm: tinyllm.LLM, pool: backends.PagePool) -> None:
    right = llm.model.forward(**GOOD, cache=pool)
    for value in (np.nan, np.inf, 3e38):
        llm.model.forward(**{**GOOD, "tokens_or_x": np.full((3, DIM), value, np.float32)}, cache=pool)
        np.testing.assert_array_equal(llm.model.forward(**GOOD, cache=pool), right)


def test_pools_refuse_pages_that_are_not_theirs(llm: tinyllm.LLM, pool: backends.PagePool) -> None:
    calls: list[Callable[[], object]] = [
        lambda: pool.clear_page(-1),
        lambda: pool.clear_page(2**40),
        lambda: pool.grow(2**31),
        lambda: pool.grow(-(10**5000)),
        lambda: pool.copy_page(2**70, 0, 1),
        lambda: llm.model.cache("f16", 2**40),
        lambda: llm.model.unpack("wq", 2**40),
        lambda: llm.model.unpack("wq\0", 0),
        lambda: llm.model.unpack("\ud800"),
        lambda: backends.Model(llm.config, threads=10**5000),
        lambda: pool.clear_page(4),
        lambda: pool.copy_page(0, 4, 1),
        lambda: pool.copy_page(-1, 0, 1),
        lambda: pool.copy_page(0, 1, 65),
        lambda: pool.copy_page(0, 1, -1),
        lambda: pool.grow(5),
        lambda: llm.model.cache("f16", 0),
        lambda: llm.model.cache("f16", -1),
        lambda: llm.model.cache("f16", 2**30),
        lambda: llm.model.cache("q4_0"),  # type: ignore[arg-type]
        lambda: llm.model.unpack("nosuch"),
        lambda: llm.model.unpack("wq", 99),
        lambda: llm.model.unpack("wq", -5),
        lambda: llm.model.unpack("w_gate.99999999999999999999", 0),
        lambda: llm.model.observe("wq", N_LAYERS),
    ]
    for call in calls:
        with pytest.raises(errors.ArgumentError) as raised:
            call()
        assert len(str(raised.value)) < 200
    wrong: Any = "2"
    types: list[Callable[[], object]] = [
        lambda: pool.grow(wrong),
        lambda: pool.grow(1.5),  # type: ignore[arg-type]
        lambda: pool.clear_page(wrong),
        lambda: pool.copy_page(0, 1, None),  # type: ignore[arg-type]
        lambda: llm.model.cache("f16", 1.5),  # type: ignore[arg-type]
        lambda: llm.model.unpack(5),  # type: ignore[arg-type]
        lambda: llm.model.unpack("wq", wrong),
        lambda: llm.model.observe(None),  # type: ignore[arg-type]
        lambda: backends.Model(llm.config, threads=2.5),  # type: ignore[arg-type]
        lambda: backends.Model(llm.config, threads=wrong),
        lambda: backends.Model(llm.config, threads=True),
        lambda: llm.model.candidates(**CANDIDATES, rows=[0], n=wrong, cache=pool),
    ]
    for call in types:
        with pytest.raises(TypeError, match=r"must be (an int|a str), not") as raised_type:
            call()
        assert len(str(raised_type.value)) < 100


# ---- the interface itself


def names(llm: tinyllm.LLM) -> dict[str, Callable[[], Any]]:
    """Calls that go wrong, by the error that they raise."""
    with_error = {
        ARGUMENT: [
            lambda: llm([VOCAB]),
            lambda: llm([-1]),
            lambda: llm([2**200]),
            lambda: llm([10**5000]),
            lambda: llm(PROMPT, n=10**5000),
            lambda: llm(PROMPT, temperature=-(10**5000)),
            lambda: llm(PROMPT, top_k=10**5000),
            lambda: llm(PROMPT, seed=10**5000),
            lambda: llm(PROMPT, logit_bias={1: 10**5000}),
            lambda: llm(PROMPT, logit_bias={10**5000: 1}),
            lambda: llm.session(seed=10**5000),
            lambda: tinyllm.load("stories", context=10**5000),
            lambda: tinyllm.load("stories", context=2**31),
            lambda: tinyllm.load("stories", threads=-(10**5000)),
            lambda: llm([[]]),
            lambda: llm("text"),  # it has no tokenizer
            lambda: llm(PROMPT, n=0),
            lambda: llm(PROMPT, n=-(2**70)),
            lambda: llm(PROMPT, max_tokens=0),
            lambda: llm(PROMPT, max_tokens=-1),
            lambda: llm(PROMPT, temperature=float("nan")),
            lambda: llm(PROMPT, temperature=-1),
            lambda: llm(PROMPT, top_k=-1),
            lambda: llm(PROMPT, top_p=2),
            lambda: llm(PROMPT, seed=2**64),
            lambda: llm(PROMPT, stop=[""]),
            lambda: llm(PROMPT, logit_bias={VOCAB: 1}),
            lambda: llm(PROMPT, logit_bias={-1: 1}),
            lambda: llm(PROMPT, processors=[lambda logits, tokens: logits[:-1]], max_tokens=1),
            lambda: llm(PROMPT, processors=[lambda logits, tokens: logits * np.nan], max_tokens=1),
            lambda: llm(PROMPT, processors=[lambda logits, tokens: logits - np.inf], max_tokens=1),
            lambda: llm.stream([PROMPT, PROMPT]),
            lambda: llm.session().logits,
            lambda: llm.session().sample(),
            lambda: llm.session().generate(),
            lambda: llm.session().append([]),
            lambda: llm.session().append([VOCAB]),
            lambda: llm.score([0, VOCAB]),
            lambda: llm.logits([VOCAB]),
        ],
        TYPE: [
            lambda: llm(None),  # type: ignore[call-overload]
            lambda: llm(5),  # type: ignore[call-overload]
            lambda: llm(b"bytes"),
            lambda: llm([True]),
            lambda: llm([1, False]),
            lambda: tinyllm.load("stories", device=0),  # type: ignore[arg-type]
            lambda: tinyllm.load("stories", weights=4),  # type: ignore[arg-type]
            lambda: tinyllm.load("stories", cache_type=["f16"]),  # type: ignore[arg-type]
            lambda: llm({"a": 1}),  # type: ignore[call-overload]
            lambda: llm({1, 2}),  # type: ignore[call-overload]
            lambda: llm([1.5, 2.5]),  # type: ignore[list-item]
            lambda: llm(np.ones(3)),
            lambda: llm([1, "a"]),  # type: ignore[list-item]
            lambda: llm([1, None]),  # type: ignore[list-item]
            lambda: tinyllm.load("stories", threads=2.5),  # type: ignore[arg-type]
            lambda: tinyllm.load("stories", context="9"),  # type: ignore[arg-type]
            lambda: llm(PROMPT, n="3"),  # type: ignore[call-overload]
            lambda: llm(PROMPT, temperature="hot"),
            lambda: llm(PROMPT, nosuch=1),
            lambda: llm(PROMPT, stop=b"x"),
            lambda: llm(PROMPT, stop=5),
            lambda: llm(PROMPT, processors=[5]),
            lambda: llm(PROMPT, processors=5),
            lambda: llm(PROMPT, logit_bias=[1]),
            lambda: llm(PROMPT, cancel=5),
            lambda: llm.session(seed="x"),  # type: ignore[arg-type]
            lambda: llm.session().append(None),  # type: ignore[arg-type]
            lambda: llm.score(7),  # type: ignore[arg-type]
        ],
        errors.ContextError: [
            lambda: llm([1] * (llm.context + 1)),
            lambda: llm([1] * llm.context),
            lambda: llm.logits([1] * (llm.context + 1)),
            lambda: llm.session().append([1] * (llm.context + 1)),
        ],
        errors.TemplateError: [lambda: llm.chat([{"role": "user", "content": "x"}])],
    }
    return {f"{e.__name__} {i}": (e, call) for e, calls in with_error.items() for i, call in enumerate(calls)}  # type: ignore[misc]


def test_messages_of_wrong_types(llm: tinyllm.LLM) -> None:
    for wrong in (None, 5, iter([1])):
        with pytest.raises(TypeError, match="a prompt is a str or a sequence of token ids, not "):
            llm(wrong)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="cache_type is a str, not list"):
        tinyllm.load("stories", cache_type=["f16"])  # type: ignore[arg-type]
    with pytest.raises(errors.NotFoundError, match="the path is empty"):
        tinyllm.load("")


def raised_by(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def pages_in_use(llm: tinyllm.LLM) -> int:
    with llm._cache.lock:
        llm._cache.collect()
    return llm._cache.n_used


def test_what_the_interface_refuses(llm: tinyllm.LLM) -> None:
    right = llm(PROMPT, seed=1, max_tokens=4).tokens
    for name, (error, call) in names(llm).items():  # type: ignore[misc]
        raised = raised_by(call)
        assert isinstance(raised, error), (name, raised)
        assert 10 < len(str(raised)) < 400, name
        del raised
        assert pages_in_use(llm) == 0, name
    assert llm(PROMPT, seed=1, max_tokens=4).tokens == right
    assert llm([], max_tokens=1) == []  # a batch of nothing


@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38])
def test_a_model_of_nan_is_a_broken_file(number: float, tmp_path: Path) -> None:
    weights = random_weights(CONFIG, seed=5)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name] = np.full_like(weights[name], number)
    path = write_hf_directory(tmp_path / "model", CONFIG, weights)
    with tinyllm.load(path, threads=2) as broken:
        session = broken.session()
        session.append(PROMPT)
        text = quality.Windows(np.array([PROMPT], np.int32), 3)
        calls: list[Callable[[], object]] = [
            session.sample,
            lambda: session.logits,
            lambda: broken(PROMPT, max_tokens=1),
            lambda: broken(PROMPT, max_tokens=1, temperature=0),
            lambda: broken.logits(PROMPT),
            lambda: broken.score(PROMPT),
            lambda: broken.embed(PROMPT),
            lambda: quality.measure([broken], text),
            lambda: benchmark.measure([str(path)], benchmark.cases(n_prompt=[2], n_gen=[])),
            lambda: benchmark.measure([str(path)], benchmark.cases(n_prompt=[], n_gen=[2])),
        ]
        for call in calls:
            with pytest.raises(errors.FormatError, match="the model computes numbers that are NaN"):
                call()
        session.close()


def one_bad_number(where: str, number: float, path: Path) -> Path:
    """A quantized model with one number that is none, in a tensor that stays float32."""
    config = {**CONFIG, "hidden_size": 128, "head_dim": 32, "num_key_value_heads": 2}
    weights = random_weights(config, seed=5)
    name = next(name for name in weights if where in name)
    weights[name].flat[3 + 128 * PROMPT[0] * (weights[name].ndim - 1)] = number
    kept = {"model.embed_tokens.weight": "F32"}
    with np.errstate(invalid="ignore"):
        write_gguf(path, config, weights, format="Q8_0", formats=kept, tokenizer=None)
    return path


@pytest.mark.parametrize("cache", ["f16", "q8_0", "f32"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["embed", "0.input_layernorm", "1.input", "0.post", "1.post", "model.norm"])
def test_one_bad_number_is_not_rounded_away(where: str, number: float, cache: Any, tmp_path: Path) -> None:
    """What is not finite has no int8; once it became 0 there, and the answer looked like one."""
    path = one_bad_number(where, number, tmp_path / "model.gguf")
    with tinyllm.load(path, cache_type=cache, threads=2) as broken:
        for n in (1, 3, 40):
            with pytest.raises(errors.FormatError, match="the model computes numbers that are NaN"):
                broken.logits(PROMPT[:n])


def last_layer(config: dict[str, Any]) -> list[str]:
    """The tensors that are not the experts' own, of the last layer and around the layers."""
    last = f"layers.{config['num_hidden_layers'] - 1}."
    names = [name for name in random_weights(config, seed=5) if ".layers." not in name or last in name]
    return [name for name in names if ".experts." not in name]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "cohere2", "qwen3_moe", "gpt_oss", "olmo3", "phi3"])
def test_a_bad_number_anywhere_is_seen(family: str, tmp_path: Path) -> None:
    """Through routers, caps, clamps and norms."""
    config = next(spec.config for spec in golden_specs("families") if spec.name == family)
    ids = random_ids(config, 1, 5)
    for name in last_layer(config):
        weights = random_weights(config, seed=5)
        weights[name].flat[3 + (ids[0] * config["hidden_size"] if "embed" in name else 0)] = np.nan
        write_gguf(tmp_path / "model.gguf", config, weights)
        with (
            tinyllm.load(tmp_path / "model.gguf", threads=2) as broken,
            pytest.raises(errors.FormatError, match="the model computes numbers that are NaN"),
        ):
            broken.logits(ids)


def test_squares_that_overflow(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, seed=5)
    weights["model.embed_tokens.weight"][PROMPT[0], 5] = 1e25
    write_hf_directory(tmp_path / "model", CONFIG, weights)
    with (
        tinyllm.load(tmp_path / "model", threads=2) as broken,
        pytest.raises(errors.FormatError, match="the model computes numbers that are NaN"),
    ):
        broken.logits(PROMPT[:3])


def test_a_models_own_infinite_logit_is_no_mask(tmp_path: Path) -> None:
    """Of one sign it is the largest of all, of the other it would be a token that never comes."""
    weights = random_weights(CONFIG, seed=5)
    for sign in (1, -1):
        weights["lm_head.weight"][9] = sign * 3e38
        write_hf_directory(tmp_path / f"model{sign}", CONFIG, weights)
        with (
            tinyllm.load(tmp_path / f"model{sign}", threads=2) as broken,
            pytest.raises(errors.FormatError, match="the model computes numbers that are NaN"),
        ):
            broken(PROMPT, max_tokens=1)


class Oops(Exception):
    pass


def oops(*_: object) -> Any:
    raise Oops


def test_what_callbacks_raise_comes_out(llm: tinyllm.LLM) -> None:
    right = llm(PROMPT, seed=1, max_tokens=4).tokens
    session = llm.session(seed=1)
    session.append(PROMPT)
    for _ in range(3):
        for options in ({"processors": [oops]}, {"cancel": oops}):
            with pytest.raises(Oops):
                llm([PROMPT, PROMPT[:9]], n=2, max_tokens=4, **options)
            with pytest.raises(Oops):
                list(llm.stream(PROMPT, max_tokens=4, **options))
        with pytest.raises(Oops):
            session.sample(processors=[oops])
        with pytest.raises(SystemExit):
            llm(PROMPT, cancel=lambda: exit(3))
        with pytest.raises(GeneratorExit):
            llm(PROMPT, processors=[lambda logits, tokens: (_ for _ in ()).throw(GeneratorExit)])
    assert session.tokens == PROMPT
    assert session.generate(max_tokens=4).tokens == right
    session.close()
    assert pages_in_use(llm) == 0


def returns(values: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda logits, tokens: values(logits)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda x: np.array(["1"] * VOCAB), "returned <U1, expected real numbers"),
        (lambda x: np.array([None] * VOCAB), "returned object"),
        (lambda x: [10**400] * VOCAB, "returned object"),
        (lambda x: x.astype(np.complex64), "returned complex64"),
        (lambda x: x > 0, "returned bool"),
        (lambda x: np.zeros(VOCAB, "datetime64[s]"), "returned datetime64"),
        (lambda x: [[1], [1, 2]], "returned no array"),
        (lambda x: (i for i in x), r"returned shape \[\]"),
        (lambda x: "abc", r"returned shape \[\]"),
        (lambda x: x[:, None], "returned shape"),
        (
            lambda x: np.full(VOCAB, 1e300),
            r"after the processors \(<lambda>\): the logit of token 0 is \+inf",
        ),
        (lambda x: np.full(VOCAB, -1e300), r"after the processors \(<lambda>\): all \d+ logits are -inf"),
        (lambda x: x.fill(np.nan), r"after the processors \(<lambda>\): the logit of token 0 is NaN"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_what_processors_return_is_checked(
    llm: tinyllm.LLM, values: Callable[[Any], Any], message: str, temperature: float
) -> None:
    with pytest.raises(errors.ArgumentError, match=message):
        llm(PROMPT, max_tokens=1, processors=[returns(values)], temperature=temperature)
    assert pages_in_use(llm) == 0


def test_processors_cannot_harm_the_text_or_the_logits(llm: tinyllm.LLM) -> None:
    """What they are given is theirs: the size, shape and type of the array, and the list of tokens."""

    def reshape(logits: Any, tokens: Any) -> None:
        with pytest.raises(ValueError, match="does not own its data"):
            logits.resize(3, refcheck=False)
        logits.shape = (2, -1)
        logits.setflags(write=False)

    def damage(logits: Any, tokens: Any) -> None:
        assert logits.shape == (VOCAB,)
        tokens[-1] = 10**6
        tokens.append("x")
        del tokens[:5]

    right = llm(PROMPT, seed=1, max_tokens=4).tokens
    for options in ({}, {"repetition_penalty": 1.0, "presence_penalty": 1e-30, "penalty_window": -1}):
        given = {**options, "seed": 1, "max_tokens": 4, "processors": [reshape, damage, reshape]}
        assert llm(PROMPT, **given).tokens == right
        with llm.session(seed=1) as session:
            session.append(PROMPT)
            assert session.generate(**given).tokens == right
            assert session.tokens == PROMPT + right


def test_two_streams_of_a_session_end_with_the_context(llm: tinyllm.LLM) -> None:
    with llm.session(seed=1) as session:
        session.append([1] * (llm.context - 1))
        one, other = session.stream(), session.stream()
        next(one)
        assert list(other) == []
        assert (one.completion.finish_reason, other.completion.finish_reason) == ("length", "length")
        assert len(session.tokens) == llm.context
        assert session.logits.shape == (VOCAB,)


def test_a_closed_model_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_hf_directory(tmp_path_factory.mktemp("model"), CONFIG, random_weights(CONFIG, seed=5))
    before = backends.live_allocations()
    llm = tinyllm.load(path, threads=2)
    session, stream = llm.session(), llm.stream(PROMPT)
    session.append(PROMPT)
    next(stream)
    cache = llm.model.cache("f16", 1)
    closed_cache = llm.model.cache("f16", 1)
    closed_cache.close()
    with pytest.raises(errors.ModelClosedError):
        llm.model.forward(**GOOD, cache=closed_cache)
    llm.close()
    llm.close()
    assert backends.live_allocations()[0] - before[0] == 2  # of `cache`, which is the user's own
    cache.close()
    assert backends.live_allocations() == before
    calls: list[Callable[[], object]] = [
        lambda: llm(PROMPT),
        lambda: list(llm.stream(PROMPT)),
        lambda: next(stream),
        lambda: llm.logits(PROMPT),
        lambda: llm.score(PROMPT),
        lambda: session.append([1]),
        lambda: session.generate(),
        lambda: session.fork(),
        lambda: llm.model.forward(**GOOD, cache=cache),
        lambda: llm.model.unpack("embedding"),
        lambda: llm.model.check(),
        lambda: llm.model.cache("f16", 1),
        lambda: llm.model.weight_bytes,
        lambda: cache.grow(1),
        lambda: cache.clear_page(0),
    ]
    for i, call in enumerate(calls):
        raised = raised_by(call)
        assert isinstance(raised, errors.ModelClosedError), (i, raised)
    session.close()
    session.close()
    repr(llm)


def test_a_closed_session_goes_on_from_its_tokens(llm: tinyllm.LLM) -> None:
    """close() gives back pages; the tokens are the session's."""
    session = llm.session(seed=1)
    session.append(PROMPT)
    right = llm(PROMPT, seed=1, max_tokens=4).tokens
    session.close()
    assert session.generate(max_tokens=4).tokens == right
    session.close()
    assert pages_in_use(llm) == 0


def test_models_cannot_be_pickled_or_copied(llm: tinyllm.LLM) -> None:
    session = llm.session()
    for thing in (llm, llm.model, session):
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            if way is copy.copy and thing is not llm.model:
                continue  # another name for the same model, which is fine
            with pytest.raises(TypeError, match="cannot be pickled or copied: load it in the process"):
                way(thing)
    tokenizer = tinyllm.load_tokenizer(BUNDLED["stories"])
    with pytest.raises(TypeError, match="a tokenizer cannot be pickled or copied: load it in the process"):
        pickle.dumps(tokenizer)
    for thing in (llm.stream(PROMPT), llm._cache.pool):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(thing)
    completion = llm(PROMPT, max_tokens=3)
    assert pickle.loads(pickle.dumps(completion)) == completion


def test_a_stream_in_two_threads_is_refused_by_python(llm: tinyllm.LLM) -> None:
    inside, go = threading.Event(), threading.Event()

    def wait(logits: Any, tokens: Any) -> None:
        inside.set()
        go.wait(60)

    stream = llm.stream(PROMPT, max_tokens=3, processors=[wait])
    thread = threading.Thread(target=lambda: list(stream), daemon=True)
    thread.start()
    assert inside.wait(60)
    with pytest.raises(ValueError, match="already executing"):
        next(stream)
    go.set()
    thread.join(60)
    assert stream.completion.finish_reason == "length"


def test_a_fork_outlives_its_parent(llm: tinyllm.LLM) -> None:
    right = llm(PROMPT, seed=1, max_tokens=4).tokens
    parent: Session = llm.session(seed=1)
    parent.append(PROMPT)
    child = parent.fork()
    child.seed = 1
    parent.close()
    del parent
    assert child.generate(max_tokens=4).tokens == right
    child.close()
    assert pages_in_use(llm) == 0


def test_the_library_leaves_stderr_alone() -> None:
    """Its warnings are for those who listen to them; the commands, for one, show them."""
    code = """if True:
        import tinyllm
        tinyllm.load("stories", context=100_000, threads=1).close()
        import tinyllm.cli
        tinyllm.load("stories", context=200_000, threads=1).close()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "context 200000 is more than the 512 the model was trained for\n"


# ---- quantizing and measuring


def test_what_quantize_refuses(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_hf_directory(tmp_path_factory.mktemp("model"), CONFIG, random_weights(CONFIG, seed=5))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    name, ones = "blk.0.attn_q.weight", np.ones((1, DIM), np.float32)
    good = {"model": path, "out": tmp_path / "out.gguf", "type": "q4_k_m", "threads": 2}

    def imatrix(sums: Any, counts: Any) -> Imatrix:
        return Imatrix({name: sums}, {} if counts is None else {name: counts})

    wrong: list[tuple[type[Exception], str, dict[str, Any] | Callable[[], Any]]] = [
        (errors.NotFoundError, "no file has a path of 1000000 characters", {"model": "a" * 10**6}),
        (errors.NotFoundError, "no such file", {"model": "a" * 300}),
        (errors.NotFoundError, "home directory", {"model": "~nobodyx/a"}),
        (errors.NotFoundError, "the path is empty", {"model": ""}),
        (errors.WriteError, "the path is empty", {"out": ""}),
        (errors.WriteError, "File name too long", {"out": tmp_path / ("a" * 300)}),
        (errors.WriteError, "File name too long", {"out": "a/" * 10**5}),
        (TYPE, "threads must be an int, not float", {"threads": 1.5}),
        (TYPE, "threads must be an int, not str", {"threads": "2"}),
        (ARGUMENT, "threads is 2147483648, expected 1 to", {"threads": 2**31}),
        (ARGUMENT, "threads is -1, expected 1 to", {"threads": -1}),
        (ARGUMENT, "threads is 0, expected 1 to", {"threads": 0}),
        (TYPE, "imatrix must be a file's path or an Imatrix, not int", {"imatrix": 5}),
        (TYPE, "imatrix must be a file's path or an Imatrix, not dict", {"imatrix": {}}),
        (errors.NotFoundError, "no file has a path", {"imatrix": "a" * 10**6}),
        (ARGUMENT, "has sums and no counts", lambda: imatrix(ones, None)),
        (ARGUMENT, "negative or not finite", lambda: imatrix(ones * np.nan, np.ones(1))),
        (ARGUMENT, "negative or not finite", lambda: imatrix(-ones, np.ones(1))),
        (ARGUMENT, "negative or not finite", lambda: imatrix(ones, -np.ones(1))),
        (ARGUMENT, r"have the shape \(1, 96\), counts \(2,\)", lambda: imatrix(ones, np.ones(2))),
        (TYPE, "must be arrays of numbers", lambda: imatrix([[1] * DIM], [1])),
        (ARGUMENT, "no entries", lambda: Imatrix({}, {})),
    ]
    for error, message, case in wrong:
        with pytest.raises(error, match=message) as raised:
            _ = case() if callable(case) else tinyllm.quantize(**{**good, **case})
        assert len(str(raised.value)) < 5000, case
    assert not list(tmp_path.iterdir())
    assert not list(Path().iterdir())
    tinyllm.quantize(**good, imatrix=imatrix(ones, np.ones(1, np.float32)))


def test_what_measuring_refuses(llm: tinyllm.LLM) -> None:
    ids = np.ones((2, 8), np.int32)
    on = quality.windows([1] * 64, 8)
    wrong: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TYPE, "ids must be integers", lambda: quality.windows("abc", 2)),  # type: ignore[arg-type]
        (TYPE, "ids must be integers", lambda: quality.windows([1.7] * 10, 4)),  # type: ignore[list-item]
        (ARGUMENT, "past 32 bits", lambda: quality.windows([2**40] * 10, 4)),
        (ARGUMENT, "2 dimensions, expected 1", lambda: quality.windows(ids, 4)),
        (TYPE, "n_ctx must be an int", lambda: quality.windows([1] * 10, 4.5)),  # type: ignore[arg-type]
        (ARGUMENT, "n_ctx is 2, expected 3 to", lambda: quality.windows([1] * 10, 2)),
        (ARGUMENT, "n_ctx is an integer of", lambda: quality.windows([1] * 10, 10**5000)),
        (TYPE, "stride must be", lambda: quality.windows([1] * 10, 4, stride="1")),  # type: ignore[arg-type]
        (ARGUMENT, "most is 0", lambda: quality.windows([1] * 10, 4, most=0)),
        (ARGUMENT, "bos_id is -1", lambda: quality.windows([1] * 10, 4, bos_id=-1)),
        (ARGUMENT, "there is no model", lambda: quality.measure([], on)),
        (ARGUMENT, "call is 0", lambda: quality.measure([llm], on, call=0)),
        (ARGUMENT, "have no token", lambda: quality.Windows(ids[:0], 3)),
        (ARGUMENT, "first is 8, expected 1 to 7", lambda: quality.Windows(ids, 8)),
        (ARGUMENT, "first is -1, expected 1 to 7", lambda: quality.Windows(ids, -1)),
        (ARGUMENT, "1 dimensions, expected 2", lambda: quality.Windows(ids[0], 3)),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()


def test_results_and_parameters_can_be_pickled(llm: tinyllm.LLM) -> None:
    """Also those that name the modules of before the package had folders."""
    completion = llm([1, 2, 3], max_tokens=3, seed=1, logprobs=True)
    for value in (completion, llm.score([1, 2, 3]), tinyllm.SamplingParams(seed=1, stop=["x"])):
        pickled = pickle.dumps(value, 0)
        assert pickle.loads(pickled) == value
        for now, before in ((b"tinyllm.results", b"tinyllm.llm"), (b"tinyllm.engine.", b"tinyllm.")):
            assert pickle.loads(pickled.replace(now, before)) == value
    piece = next(llm.stream([1, 2, 3], max_tokens=1))
    assert pickle.loads(pickle.dumps(piece, 0).replace(b"tinyllm.engine.engine", b"tinyllm.engine")) == piece
