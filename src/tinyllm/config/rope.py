"""How rotary positions are scaled: each kind is divisors of the pairs' angles and a factor on cos and sin.

Formulas and defaults are those of transformers; each names its paper. Imports `model` (its bounds) and
`errors`. Read next: from_json.py and from_gguf.py, which know how files spell them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tinyllm.config.model import BOUNDS
from tinyllm.errors import FormatError


def linear(factor: float, rope_dim: int) -> tuple[float, ...] | None:
    """Position interpolation (arXiv 2306.15595): every angle divided by `factor`."""
    check_scaling(factor)
    return None if factor == 1 else as_float32(np.full(rope_dim // 2, factor))


def llama3(
    factor: float, rope_dim: int, theta: float, original: int, low: float, high: float
) -> tuple[float, ...]:
    """Llama 3.1's rule: pairs that turn less than `low` times in the original context are slowed by `factor`,
    those that turn more than `high` times are kept, and in between the two frequencies are mixed linearly in
    the turns."""
    check_scaling(factor, theta, original)
    if not 1e-3 <= low < high <= 1e6:
        raise FormatError(
            f"low_freq_factor {low:g} and high_freq_factor {high:g} must ascend within 0.001 to 1e6"
        )
    frequency = theta ** (-np.arange(0, rope_dim, 2) / rope_dim)
    kept = np.clip((original * frequency / (2 * math.pi) - low) / (high - low), 0, 1)
    return as_float32(1 / ((1 - kept) / factor + kept))


def yarn(
    factor: float, rope_dim: int, theta: float, original: int, fast: float, slow: float, truncate: bool
) -> tuple[float, ...]:
    """YaRN (arXiv 2309.00071, section 3.2): the mix of `llama3`, but linear in the pair's index, between the
    pairs that turn `fast` and `slow` times in the original context; `truncate` rounds those two outwards."""
    check_scaling(factor, theta, original)
    if not 1e-3 <= slow <= fast <= 1e6:
        raise FormatError(f"YaRN's beta_slow {slow:g} and beta_fast {fast:g} must ascend within 0.001 to 1e6")

    def pair_that_turns(times: float) -> float:
        return rope_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope_dim - 1)
    scaled = np.clip((np.arange(rope_dim // 2) - first) / max(last - first, 0.001), 0, 1)
    return as_float32(1 / (scaled / factor + (1 - scaled)))


def yarn_scale(factor: float, m: float, m_all: float) -> float:
    """YaRN's factor on cos and sin: by arXiv 2309.00071, equation 22, or where both `mscale` and
    `mscale_all_dim` are given, the ratio of what they make of it."""
    if m < 0 or m_all < 0:
        raise FormatError(f"YaRN's mscale {m:g} and mscale_all_dim {m_all:g} must not be negative")

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    return scale(m) / scale(m_all) if m and m_all else scale(1.0)


def check_scaling(factor: float, theta: float = 2.0, original: int = 1) -> None:
    if not (1e-3 <= factor <= 1e6 and 1 < theta <= 1e15 and 1 <= original <= BOUNDS["context"][1]):
        raise FormatError(f"RoPE scaling: factor {factor:g}, theta {theta:g}, original context {original}")


def as_float32(factors: npt.NDArray[np.float64]) -> tuple[float, ...]:
    with np.errstate(over="ignore"):  # the config refuses infinity
        return tuple(float(factor) for factor in factors.astype(np.float32))
