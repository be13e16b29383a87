"""Floats to blocks: how close they come, the same bits on every instruction set and number of threads, what
importance does, and what becomes of numbers at the edges. The gguf package says what blocks mean."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from helpers_formats import Kind, Newer, dequantize, size
from numpy.typing import NDArray

from tinyllm import _core, backends
from tinyllm.errors import ArgumentError
from tinyllm.quantization.imatrix import Imatrix

F32 = NDArray[np.float32]

FLOATS = [Type.F32, Type.F16, Type.BF16]
BLOCKS = [
    Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K,
    Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS, Type.MXFP4, Type.NVFP4, Type.TQ1_0, Type.TQ2_0, Newer.Q2_0,
    Type.Q1_0, Type.IQ3_XXS, Type.IQ3_S, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ1_S, Type.IQ1_M,
]  # fmt: skip
# What llama.cpp's quantizers leave of the sum of squares of `samples`, without importance and with
# `IMPORTANCE`. Made with ggml_quantize_chunk of llama-cpp-python 0.3.36, rounded down; up where both do what
# is best (Q1_0 without importance). IQ2_XXS, IQ2_XS and IQ1, which it makes with importance alone: all
# columns alike.
LLAMA_CPP: dict[str, dict[str, tuple[float, float]]] = {
    "Q8_0": {
        "gauss": (2.852e-05, 2.839e-05),
        "laplace": (4.508e-05, 4.545e-05),
        "tails": (0.0001187, 0.0001457),
        "shifted": (1.459e-05, 1.437e-05),
    },
    "Q4_0": {
        "gauss": (0.007337, 0.006023),
        "laplace": (0.01145, 0.009864),
        "tails": (0.01371, 0.0174),
        "shifted": (0.003684, 0.002703),
    },
    "Q4_1": {
        "gauss": (0.006119, 0.004116),
        "laplace": (0.008481, 0.005798),
        "tails": (0.01123, 0.008077),
        "shifted": (0.0008431, 0.0007464),
    },
    "Q5_0": {
        "gauss": (0.00182, 0.001478),
        "laplace": (0.002845, 0.002437),
        "tails": (0.004625, 0.005884),
        "shifted": (0.0009028, 0.0006795),
    },
    "Q5_1": {
        "gauss": (0.001418, 0.0009549),
        "laplace": (0.002003, 0.001388),
        "tails": (0.003305, 0.002271),
        "shifted": (0.0001953, 0.0001712),
    },
    "Q2_K": {
        "gauss": (0.08754, 0.05657),
        "laplace": (0.1174, 0.07107),
        "tails": (0.09887, 0.07855),
        "shifted": (0.01776, 0.01403),
    },
    "Q3_K": {
        "gauss": (0.02271, 0.01816),
        "laplace": (0.03046, 0.02511),
        "tails": (0.02357, 0.02848),
        "shifted": (0.01155, 0.008264),
    },
    "Q4_K": {
        "gauss": (0.005043, 0.004222),
        "laplace": (0.007191, 0.006044),
        "tails": (0.007367, 0.008659),
        "shifted": (0.0008957, 0.0007577),
    },
    "Q5_K": {
        "gauss": (0.001281, 0.001085),
        "laplace": (0.001851, 0.001614),
        "tails": (0.002223, 0.002642),
        "shifted": (0.000218, 0.0001851),
    },
    "Q6_K": {
        "gauss": (0.0003173, 0.0002644),
        "laplace": (0.0004639, 0.0004023),
        "tails": (0.0008351, 0.000933),
        "shifted": (0.0001618, 0.0001306),
    },
    "IQ4_NL": {
        "gauss": (0.005775, 0.004982),
        "laplace": (0.007766, 0.006798),
        "tails": (0.009797, 0.01172),
        "shifted": (0.003924, 0.00345),
    },
    "IQ4_XS": {
        "gauss": (0.005867, 0.005097),
        "laplace": (0.007904, 0.006956),
        "tails": (0.01097, 0.01346),
        "shifted": (0.003997, 0.003526),
    },
    "MXFP4": {
        "gauss": (0.01308, 0.01324),
        "laplace": (0.01591, 0.0161),
        "tails": (0.01739, 0.02131),
        "shifted": (0.01144, 0.01145),
    },
    "NVFP4": {
        "gauss": (0.01074, 0.01085),
        "laplace": (0.009535, 0.009395),
        "tails": (0.005796, 0.007469),
        "shifted": (0.01042, 0.0104),
    },
    "TQ1_0": {
        "gauss": (0.6559, 0.6526),
        "laplace": (0.6976, 0.7085),
        "tails": (0.3219, 0.4295),
        "shifted": (0.5236, 0.5201),
    },
    "TQ2_0": {
        "gauss": (0.6559, 0.6526),
        "laplace": (0.6976, 0.7085),
        "tails": (0.3219, 0.4295),
        "shifted": (0.5236, 0.5201),
    },
    "Q2_0": {
        "gauss": (0.5146, 0.5096),
        "laplace": (0.534, 0.5353),
        "tails": (0.206, 0.2624),
        "shifted": (0.4107, 0.407),
    },
    "Q1_0": {
        "gauss": (0.3608, 0.3611),
        "laplace": (0.4957, 0.4925),
        "tails": (0.8244, 0.782),
        "shifted": (0.1341, 0.1329),
    },
    "IQ3_XXS": {
        "gauss": (0.04534, 0.02282),
        "laplace": (0.06192, 0.02734),
        "tails": (0.129, 0.1158),
        "shifted": (0.02411, 0.01563),
    },
    "IQ3_S": {
        "gauss": (0.02735, 0.0143),
        "laplace": (0.03804, 0.01915),
        "tails": (0.09029, 0.1015),
        "shifted": (0.01755, 0.01141),
    },
    "IQ2_XXS": {
        "gauss": (0.118, 0.08596),
        "laplace": (0.1496, 0.1124),
        "tails": (0.632, 0.6791),
        "shifted": (0.09573, 0.07082),
    },
    "IQ2_XS": {
        "gauss": (0.09, 0.06563),
        "laplace": (0.1085, 0.08418),
        "tails": (0.3522, 0.3689),
        "shifted": (0.06726, 0.04861),
    },
    "IQ2_S": {
        "gauss": (0.07021, 0.05026),
        "laplace": (0.1056, 0.07149),
        "tails": (0.3766, 0.3356),
        "shifted": (0.05652, 0.04095),
    },
    "IQ1_S": {
        "gauss": (0.2346, 0.1944),
        "laplace": (0.2952, 0.2468),
        "tails": (0.5003, 0.6075),
        "shifted": (0.1348, 0.1148),
    },
    "IQ1_M": {
        "gauss": (0.2023, 0.1515),
        "laplace": (0.2315, 0.1757),
        "tails": (0.3259, 0.3653),
        "shifted": (0.1477, 0.1191),
    },
}
# Those with code books, which are looked through whole: fewer rows do where a test takes many.
BOOKS = BLOCKS[BLOCKS.index(Type.IQ3_XXS) :]
each_block = pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
each_format = pytest.mark.parametrize("kind", [*FLOATS, *BLOCKS], ids=lambda kind: kind.name)


def quantize(x: F32, kind: Kind, importance: F32 | None = None, threads: int = 1) -> NDArray[np.uint8]:
    """Blocks uint8 [rows, bytes] of x [rows, k]."""
    rows, k = x.shape
    data = np.ascontiguousarray(x).view(np.uint8).ravel()
    return backends.convert(data, int(Type.F32), int(kind), rows, k, importance=importance, threads=threads)


def values(blocks: NDArray[np.uint8], kind: Kind) -> F32:
    """NaN where NVFP4's scale is none to the format itself (to GGUF's readers it is 0)."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.asarray(dequantize(blocks, kind), np.float32)
    if kind == Type.NVFP4:
        no_scale = blocks.reshape(-1, 36)[:, :4] == 0x7F
        found = np.where(no_scale.repeat(16, axis=1).reshape(found.shape), np.float32(np.nan), found)
    return found


def uniform(seed: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """In (0, 1), from raw Philox words, which numpy promises never to change."""
    words = np.random.Philox(key=[seed, 0]).random_raw(int(np.prod(shape)))
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5).reshape(shape) * 2.0**-53


def samples(name: str) -> F32:
    """Rows [32, 1024] as weights are distributed: bell-shaped, with heavier tails, off zero."""
    u, v = uniform(1, (32, 1024)), uniform(2, (32, 1024))
    gauss = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
    x = {
        "gauss": gauss,
        "laplace": np.log(u) * np.sign(v - 0.5),
        "tails": gauss / np.sqrt(-np.log(uniform(3, (32, 1024)))),  # Student's t with two degrees of freedom
        "shifted": gauss + 2.5,
    }[name]
    return (0.02 * x).astype(np.float32)


IMPORTANCE = (-np.log(uniform(4, (1024,)))).astype(np.float32)


def error(x: F32, blocks: NDArray[np.uint8], kind: Kind, importance: F32 | None = None) -> float:
    """Squared error as a share of the sum of squares, both weighted."""
    exact = x.astype(np.float64)
    weights = np.ones(x.shape[1]) if importance is None else importance.astype(np.float64)
    return float((weights * (exact - values(blocks, kind)) ** 2).sum() / (weights * exact**2).sum())


@pytest.mark.parametrize("name", ["gauss", "laplace", "tails", "shifted"])
@each_block
def test_no_worse_than_llama_cpp(kind: Kind, name: str) -> None:
    plain, weighted = LLAMA_CPP[kind.name][name]
    x = samples(name)
    assert error(x, quantize(x, kind), kind) <= plain
    assert error(x, quantize(x, kind, IMPORTANCE), kind, IMPORTANCE) <= weighted


@pytest.mark.parametrize(
    "kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1], ids=lambda k: k.name
)
def test_no_worse_than_gguf(kind: Kind) -> None:
    for name in ("gauss", "laplace", "tails", "shifted"):
        x = samples(name)
        theirs = np.asarray(gguf.quants.quantize(x, kind), np.uint8)
        assert error(x, quantize(x, kind), kind) <= error(x, theirs, kind)


@pytest.mark.parametrize(
    ("kind", "lo", "hi"), [(Type.Q4_0, -8, 7), (Type.Q5_0, -16, 15), (Type.Q8_0, -127, 127)]
)
def test_close_to_the_best_scale(kind: Kind, lo: int, hi: int) -> None:
    """A dense search over 4000 scales a block finds at most a few percent more."""
    x = samples("laplace")[:2].reshape(-1, 32).astype(np.float64)
    scales = np.concatenate([np.linspace(0.6, 1.4, 2000) / lo, np.linspace(0.6, 1.4, 2000) / hi])
    farthest = x[np.arange(len(x)), np.abs(x).argmax(axis=1)]
    d = farthest[:, None, None] * scales[None, :, None]
    best = ((x[:, None] - d * np.clip(np.rint(x[:, None] / d), lo, hi)) ** 2).sum(axis=2).min(axis=1).sum()
    ours = error(x.astype(np.float32), quantize(x.astype(np.float32), kind), kind) * (x**2).sum()
    assert ours <= 1.12 * best


@each_block
def test_importance_moves_the_error(kind: Kind) -> None:
    """Columns that count gain, and with them the weighted sum; none known (all zero) is as all alike."""
    x = samples("gauss")
    importance = np.where(np.arange(1024) % 32 < 4, 100, 1).astype(np.float32)
    plain, weighted = quantize(x, kind), quantize(x, kind, importance)
    assert error(x, weighted, kind, importance) < 0.97 * error(x, plain, kind, importance)
    ones, zeros = np.ones(1024, np.float32), np.zeros(1024, np.float32)
    assert np.array_equal(quantize(x, kind, zeros), quantize(x, kind, ones))
    assert np.array_equal(quantize(x, kind, 16 * IMPORTANCE), quantize(x, kind, IMPORTANCE))


@each_block
def test_columns_that_hardly_matter(kind: Kind) -> None:
    """They lose next to nothing where no others stand in their blocks, and zeros stay zeros."""
    sums = np.full((1, 1024), 1e10, np.float32)
    sums[:, :512], sums[:, 600:610] = 1e-20, 0
    importance = Imatrix({"w": sums}, {"w": np.ones(1, np.float32)}).importance("w", 1, 1024)
    assert importance is not None
    assert not importance[0, 600:610].any()
    x = samples("gauss")
    plain, weighted = (values(quantize(x, kind, given), kind)[:, :512] for given in (None, importance[0]))
    assert ((weighted - x[:, :512]) ** 2).sum() < 1.1 * ((plain - x[:, :512]) ** 2).sum()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_importance_must_be_finite_and_not_negative(bad: float) -> None:
    importance = np.ones(64, np.float32)
    importance[7] = bad
    with pytest.raises(ArgumentError, match="column 7"):
        quantize(np.ones((1, 64), np.float32), Type.Q4_0, importance)


@pytest.fixture
def any_isa() -> Iterator[list[str]]:
    before = _core.isa_name()
    yield _core.isa_names()
    backends.select_isa(before)


def hard_rows() -> F32:
    """Rows [n, 768] of zeros, constants, single spikes, of every magnitude that a float32 has."""
    x = np.concatenate([samples(name)[:3, :768] for name in ("gauss", "tails", "shifted")])
    constant = np.full((2, 768), [[0.25], [-3.0]])
    spikes = np.zeros((2, 768))
    spikes[0, ::97], spikes[1, 5] = 1.0, -2.0
    parts = [x, np.zeros((1, 768)), -np.zeros((1, 768)), constant, spikes, np.abs(x[:2]), -np.abs(x[:2])]
    parts += [x[:1] * 2.0**e for e in range(-149, 126, 11)]
    return np.concatenate(parts).astype(np.float32)


@each_format
def test_the_same_bits_everywhere(kind: Kind, any_isa: list[str]) -> None:
    """Instruction sets and thread counts, at widths that fill no tile of sixteen groups."""
    x = hard_rows()[:: 6 if kind in BOOKS else 1]
    importance = IMPORTANCE[:768]
    block = size(kind)[0]
    for k in sorted({max(block, 32), 3 * max(block, 32), 768}):
        some = np.ascontiguousarray(x[:, :k])
        backends.select_isa("scalar")
        plain, weighted = quantize(some, kind), quantize(some, kind, importance[:k])
        for isa in any_isa:
            backends.select_isa(isa)
            for threads in (1, 3):
                assert np.array_equal(quantize(some, kind, threads=threads), plain), (isa, k)
                assert np.array_equal(quantize(some, kind, importance[:k], threads), weighted), (isa, k)


@each_block
def test_a_row_stands_alone(kind: Kind) -> None:
    x = hard_rows()[:: 4 if kind in BOOKS else 1]
    whole = quantize(x, kind)
    assert all(np.array_equal(quantize(x[i : i + 1], kind)[0], whole[i]) for i in range(len(x)))
    assert quantize(x[:0], kind).shape == (0, whole.shape[1])


# Of a block's farthest number, what others may be wrong by.
STEP = {
    Type.Q8_0: 1 / 127, Type.Q6_K: 1 / 16, Type.Q5_K: 1 / 15, Type.Q2_K: 0.6, Type.Q3_K: 0.4, Type.TQ1_0: 1.0,
    Type.TQ2_0: 1.0, Newer.Q2_0: 1.0, Type.Q1_0: 1.0, Type.IQ3_XXS: 0.7, Type.IQ3_S: 0.7, Type.IQ2_XXS: 1.0,
    Type.IQ2_XS: 1.0, Type.IQ2_S: 1.0, Type.IQ1_S: 1.0, Type.IQ1_M: 1.0,
}  # fmt: skip
# Between which magnitudes the farthest number of a block is held.
HELD = {Type.MXFP4: (2.0**-120, np.inf), Type.NVFP4: (0.05, 2688.0)}


@each_block
def test_edges(kind: Kind) -> None:
    """Zeros stay zeros, and whatever a half can scale comes back within the format's step."""
    x = hard_rows()
    y = values(quantize(x, kind), kind)
    largest = np.abs(x).max(axis=1)
    assert not y[largest == 0].any()
    block = size(kind)[0]
    far = np.abs(x.reshape(-1, block)).max(axis=1)
    there = (far > max(1e-3, HELD.get(kind, (0, 0))[0])) & (far < 1e3)
    share = np.abs(x - y).reshape(-1, block).max(axis=1)[there] / far[there]
    assert share.max() <= STEP.get(kind, 0.3)


def shown_by(kind: Kind) -> int:
    """How many numbers show it where one of them is none."""
    return 16 if kind == Type.NVFP4 else size(kind)[0]


@each_block
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(kind: Kind, bad: float) -> None:
    """In its block, and in no other."""
    x = samples("gauss")[:1].copy()
    x[0, 300] = bad
    block = shown_by(kind)
    for importance in (None, IMPORTANCE):
        shown = np.isfinite(values(quantize(x, kind, importance), kind)).reshape(-1, block)
        assert not shown[300 // block].any()
        assert np.delete(shown, 300 // block, axis=0).all()


@each_block
def test_a_number_too_large_shows(kind: Kind) -> None:
    """At each magnitude a block comes back within the format's step, or as no numbers at all: spikes among
    small numbers, numbers of one sign and of both. MXFP4 holds every float32."""
    wide = kind == Type.MXFP4
    scales = 2.0 ** np.arange(-120 if wide else -3, 128, 5 if kind in BOOKS else 1)
    noise = samples("gauss")[0, :256].astype(np.float64)
    noise /= np.abs(noise).max()
    spike = np.where(np.arange(256) == 40, -1.75, 2.0**-20 * noise)
    rows = [spike, -spike, 1 + 0.75 * noise, 1.99 * noise, np.where(np.arange(256) % 2, 1.0, -1.0)]
    exact = (np.array(rows)[:, None] * scales[:, None]).reshape(-1, shown_by(kind))
    far = np.abs(exact).max(axis=1)
    least, most = HELD.get(kind, (1e-3, 2.0**15))
    plain = STEP.get(kind, 0.3)
    # Where hardly anything depends on a number, a code book gives it next to nothing of its size.
    weighted = 1.0 if kind in BOOKS else max(plain, 0.9)
    for importance, step in (None, plain), (IMPORTANCE[:256], weighted):
        y = values(quantize(exact.astype(np.float32).reshape(-1, 256), kind, importance), kind)
        shown = ~np.isfinite(y.reshape(exact.shape)).any(axis=1)
        with np.errstate(invalid="ignore"):
            close = np.abs(y.reshape(exact.shape) - exact).max(axis=1) <= step * far
        held = far > least
        assert (shown | close)[held].all()
        assert close[held & (far < most)].all()
        assert shown[far >= 2.0**30].all() or wide


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_floats_are_rounded_half_to_even(kind: Kind) -> None:
    patterns = np.random.Philox(key=[9, 0]).random_raw(1 << 16).astype(np.uint32)
    middle = patterns.copy()
    middle[::2] = middle[::2] >> 13 << 13 | 1 << 12  # half way between two halves
    middle[1::2] = middle[1::2] >> 16 << 16 | 1 << 15  # and between two bfloat16
    x = np.concatenate([patterns, middle]).view(np.float32).reshape(-1, 512)[:, :509]
    assert np.isnan(values(quantize(x, kind), kind)[np.isnan(x)]).all()
    x = np.where(np.isnan(x), np.float32(1), x)  # what else a NaN says is nobody's promise
    with np.errstate(all="ignore"):
        expected = np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(x), kind)).view(np.uint8)
    assert np.array_equal(quantize(x, kind), expected)


@each_block
def test_requantizing_goes_through_the_numbers_it_means(kind: Kind) -> None:
    x = samples("gauss")[:4]
    blocks = quantize(x, kind)
    back = backends.convert(blocks.ravel(), int(kind), int(Type.F32), 4, 1024)
    assert np.array_equal(back.view(np.float32), values(blocks, kind))


def test_half_sources() -> None:
    x = samples("gauss")
    halves = x.astype(np.float16)
    direct = backends.convert(halves.view(np.uint8).ravel(), int(Type.F16), int(Type.Q4_K), 32, 1024)
    assert np.array_equal(direct, quantize(halves.astype(np.float32), Type.Q4_K))


def test_rows_that_fit_no_block() -> None:
    with pytest.raises(ArgumentError, match="rows of 96 numbers do not fit q4_k's blocks of 256"):
        quantize(np.ones((1, 96), np.float32), Type.Q4_K)
    with pytest.raises(ArgumentError, match="not rows x k"):
        backends.convert(np.zeros(10, np.uint8), int(Type.F32), int(Type.Q4_0), 1, 32)
