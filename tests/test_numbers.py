"""The numbers contract, through Python: a token's logits are the same bits whatever the threads, the
instruction set, the batch, the chunks its prompt came in, and whether its prefix was computed or reused.

tests/c/test_kernels.c and test_model.c hold the kernels and the forward pass to it; here whole models from
files of several formats are, at sizes that fill no panel, page or segment evenly. Weights come from
helpers_models.py and helpers_gguf.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers_gguf import write_gguf
from helpers_models import random_ids, random_weights

import tinyllm
from tinyllm import backends

F32 = npt.NDArray[np.float32]
PAGE = 64
N_TOKENS = 600  # nine pages and a piece, two segments of 256 and a piece
CONTEXT = 640
TABLE = CONTEXT // PAGE

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "num_hidden_layers": 2,
    "vocab_size": 105,
    "rope_theta": 10000.0,
}
ODD = {  # no size a multiple of 64, heads of 20
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
}
BLOCKS = {  # rows of whole blocks of 256 but for w_down's, which stay F16
    "hidden_size": 256,
    "intermediate_size": 172,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
MODELS = {"F32": ODD, "F16": ODD, "Q8_0": ODD, "Q4_0": ODD, "Q4_K": BLOCKS, "Q6_K": BLOCKS}


@dataclass
class Subject:
    """A model, pages for three sequences, and what everything is compared with: its prompt at once, one
    thread."""

    llm: tinyllm.LLM
    path: Path
    ids: list[int]
    pool: backends.PagePool
    expected: F32 = field(default_factory=lambda: np.zeros(0, np.float32))

    def forward(
        self,
        pieces: Sequence[tuple[int, int, int]],
        *,
        threads: int = 1,
        tables: npt.NDArray[np.int32] | None = None,
        **options: Any,
    ) -> F32:
        """One call. Each piece is (sequence, first, n): n tokens of the prompt from position `first` on."""
        positions = np.concatenate([np.arange(first, first + n) for _, first, n in pieces])
        sequences = np.concatenate([np.full(n, sequence) for sequence, _, n in pieces])
        given = options.pop("x", np.array(self.ids)[positions])
        self.llm.model.threads = threads
        return self.llm.model.forward(
            given,
            positions,
            sequences,
            default_tables() if tables is None else tables,
            cache=self.pool,
            **options,
        )

    def check(self, pieces: Sequence[tuple[int, int, int]], **options: Any) -> None:
        """The pieces' logits are those of the prompt at once."""
        positions = np.concatenate([np.arange(first, first + n) for _, first, n in pieces])
        np.testing.assert_array_equal(self.forward(pieces, **options), self.expected[positions])


def default_tables() -> npt.NDArray[np.int32]:
    """Page tables of three sequences that share nothing."""
    return np.arange(3 * TABLE, dtype=np.int32).reshape(3, TABLE)


def make_subject(path: Path, format: str, cache_type: backends.CacheType) -> Subject:
    config = {**BASE, **MODELS[format]}
    if not path.exists():
        write_gguf(path, config, random_weights(config, seed=41), format=format)
    llm = tinyllm.load(path, device="cpu", threads=1, cache_type=cache_type)
    pool = llm.model.cache(cache_type, 3 * TABLE)
    pool.grow(3 * TABLE)
    subject = Subject(llm, path, random_ids(config, 42, N_TOKENS), pool)
    subject.expected = subject.forward([(0, 0, N_TOKENS)])
    assert np.isfinite(subject.expected).all()
    assert subject.expected.std() > 0.3, "logits so flat that little could be seen in them"
    return subject


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbers")


SUBJECTS = [
    (format, cache_type)
    for format, sizes in MODELS.items()
    for cache_type in backends.CACHE_TYPES
    if cache_type != "q8_0" or sizes is BLOCKS  # its heads are whole groups of 32
]


@pytest.fixture(scope="module", params=SUBJECTS, ids="-".join)
def subject(request: pytest.FixtureRequest, folder: Path) -> Iterator[Subject]:
    format, cache_type = request.param
    made = make_subject(folder / f"{format}.gguf", format, cache_type)
    yield made
    made.pool.close()
    made.llm.close()


@pytest.fixture
def restored_isa() -> Iterator[None]:
    before = backends.info()["isa"]
    yield
    backends.select_isa(before)


# ---- the layer below: model.forward


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads(subject: Subject, threads: int) -> None:
    subject.check([(0, 0, N_TOKENS)], threads=threads)
    subject.check([(0, N_TOKENS - 1, 1)], threads=threads)


@pytest.mark.parametrize("isa", backends.info()["isa_usable"])
def test_instruction_sets(subject: Subject, restored_isa: None, isa: str) -> None:
    """Each from its own keys and values, and on those that another one wrote."""
    backends.select_isa(isa)
    assert subject.llm.model.isa == isa
    subject.check([(1, 0, 300)], threads=2)
    subject.check([(0, N_TOKENS - 3, 3)], threads=2)
    subject.check([(0, N_TOKENS - 1, 1)])


@pytest.mark.parametrize("size", [1, 3, 16, 64, 100, 257])
def test_chunks(subject: Subject, size: int) -> None:
    for first in range(0, N_TOKENS, size):
        subject.check([(1, first, min(size, N_TOKENS - first))], threads=1 + first % 3)


@pytest.mark.parametrize("seed", range(3))
def test_batches(subject: Subject, seed: int) -> None:
    """Three sequences of the same tokens, each at its own pace: one token, a few, or a chunk a call."""
    rng = np.random.default_rng(seed)
    at = [0, 0, 0]
    while min(at) < N_TOKENS:
        sizes = [min(int(rng.choice([0, 1, 1, 5, 90])), N_TOKENS - start) for start in at]
        pieces = [(i, at[i], n) for i, n in enumerate(sizes) if n]
        if pieces:
            subject.check(pieces, threads=int(rng.integers(1, 4)))
        at = [start + n for start, n in zip(at, sizes, strict=True)]


@pytest.mark.parametrize("n_shared", [1, 16, 63, 64, 100, 256, 300, 599])
def test_shared_prefixes(subject: Subject, n_shared: int) -> None:
    """Full pages of another sequence, and a copy of its next one's first tokens, over a page used before."""
    full, rest = divmod(n_shared, PAGE)
    tables = default_tables()
    subject.forward([(2, 0, N_TOKENS)])
    subject.forward([(0, 0, n_shared)])
    tables[1, :full] = tables[0, :full]
    tables[1, full:] = np.roll(tables[2], 3)[full:]  # other positions' keys and values still stand there
    if rest:
        subject.pool.copy_page(int(tables[1, full]), int(tables[0, full]), rest)
    subject.check([(1, n_shared, N_TOKENS - n_shared)], tables=tables)


def test_layers_may_be_run_apart(subject: Subject) -> None:
    n_layers = subject.llm.config.n_layers
    pieces = [(1, 0, N_TOKENS)]
    for middle in range(n_layers + 1):
        between = (
            subject.forward(pieces, layers=(0, middle), rows=[], threads=2)
            if middle < n_layers
            else subject.forward(
                pieces,
                x=subject.forward(pieces, layers=(0, n_layers - 1), rows=[]),
                layers=(n_layers - 1, n_layers - 1),
                rows=[],
            )
        )
        assert between.shape == (N_TOKENS, subject.llm.config.dim)
        if middle < n_layers:
            subject.check(pieces, x=between, layers=(middle, n_layers), threads=3)


def test_rows(subject: Subject) -> None:
    rows = [599, 0, 7, 7, 300]
    logits = subject.forward([(0, 0, N_TOKENS)], rows=rows)
    np.testing.assert_array_equal(logits, subject.expected[rows])


def test_more_rows_than_tokens_are_refused(subject: Subject) -> None:
    """The core's buffers are for as many rows as there are tokens."""
    with pytest.raises(tinyllm.Error, match="100000 rows"):
        subject.forward([(0, 0, 1)], rows=[0] * 100_000)


# ---- the layer above: texts


def texts(llm: tinyllm.LLM, prompts: list[list[int]]) -> list[tuple[list[int], list[float] | None]]:
    """Tokens and log probabilities, prompt by prompt."""
    done = [llm(ids, max_tokens=12, seed=i, logprobs=True) for i, ids in enumerate(prompts)]
    return [(c.tokens, c.logprobs) for c in done]


def prompts_of(subject: Subject) -> list[list[int]]:
    """Prompts that share prefixes of no page, some pages, and pages and a piece."""
    ids = subject.ids
    return [ids[:5], ids[:200], ids[:192] + ids[:30], ids[300:400], ids[:561]]


def test_logits_are_those_of_the_layer_below(subject: Subject) -> None:
    np.testing.assert_array_equal(subject.llm.logits(subject.ids), subject.expected)
    np.testing.assert_array_equal(
        subject.llm.logits(subject.ids), subject.expected
    )  # its prefix is cached now
    np.testing.assert_array_equal(subject.llm.logits(subject.ids[:333]), subject.expected[:333])


def test_texts_on_a_warm_cache_and_on_threads(subject: Subject) -> None:
    first = texts(subject.llm, prompts_of(subject))
    assert texts(subject.llm, prompts_of(subject)) == first
    with tinyllm.load(subject.path, device="cpu", threads=3, cache_type=subject.llm.cache_type) as fresh:
        assert texts(fresh, prompts_of(subject)[::-1][:1])[0][0]  # the longest first: another order of reuse
        assert texts(fresh, prompts_of(subject)) == first


def test_texts_alone_and_in_a_batch(subject: Subject) -> None:
    prompts = prompts_of(subject)
    together = subject.llm(prompts, max_tokens=12, seed=3, logprobs=True)
    alone = [subject.llm(ids, max_tokens=12, seed=3, logprobs=True) for ids in prompts]
    assert [(c.tokens, c.logprobs) for c in together] == [(c.tokens, c.logprobs) for c in alone]


def test_texts_on_every_instruction_set(subject: Subject, restored_isa: None) -> None:
    first = texts(subject.llm, prompts_of(subject)[:2])
    for isa in backends.info()["isa_usable"]:
        backends.select_isa(isa)
        with tinyllm.load(subject.path, device="cpu", threads=2, cache_type=subject.llm.cache_type) as fresh:
            assert texts(fresh, prompts_of(subject)[:2]) == first, isa
