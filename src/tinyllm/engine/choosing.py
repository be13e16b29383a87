"""From rows of logits to tokens: of one text, or of all texts of a step in one call of the core.

Invariant: a choice is the same whoever makes it, the text's own thread or the one that called the model for
all. What runs a user's Python code is left to the text's own thread. Imports `sampling`, `backends` and
`errors`. engine.py asks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm import backends
from tinyllm.engine.sampling import Candidates, Logits, Sampled, Sampler
from tinyllm.errors import ArgumentError, Error, FormatError

Mask = npt.NDArray[np.uint32]


def choose(
    sampler: Callable[..., Sampled], logits: Logits, tokens: list[int], mask: Mask | None = None
) -> Sampled:
    """The token after `tokens`, of those whose bits are set in the mask, if there is one; candidates are of
    such already. Raises ArgumentError, and FormatError where the model computes logits that are NaN or
    infinite: to the sampler -inf is a token that must not come, which is for its user to say."""
    _require_numbers(logits)
    if mask is None:
        return sampler(logits, tokens, len(tokens))
    return sampler(logits, tokens, len(tokens), mask)


def taken(sampler: Any, logits: Any, token: int) -> Sampled:
    """What the sampler says of a token that was taken without a choice. logits: as the sampler's `taken`."""
    _require_numbers(logits)
    sampled: Sampled = sampler.taken(logits, token)
    return sampled


@dataclass(frozen=True)
class Wish:
    """A choice that may be made for a text by another thread: the arguments of `choose`. give: gets it, or
    the error that `choose` would raise."""

    sampler: Sampler
    logits: npt.NDArray[np.float32]
    tokens: list[int]
    mask: Mask | None
    give: Callable[[Sampled | Exception], None]


def grant(wishes: Sequence[Wish], threads: int) -> None:
    """Makes the choices in one call of the core, which shares the rows out to threads."""
    ready: list[tuple[Wish, tuple[Any, ...]]] = []
    for wish in wishes:
        try:
            require_finite(wish.logits)
            row = wish.sampler.row(wish.logits, wish.tokens, len(wish.tokens), wish.mask)
        except (Error, MemoryError) as error:  # the text's own; what a signal handler raises is this thread's
            wish.give(error)
        else:
            ready.append((wish, row))
    if not ready:
        return
    for (wish, row), found in zip(ready, backends.sample_rows([r for _, r in ready], threads), strict=True):
        if isinstance(found, str):
            wish.give(ArgumentError(found))
        else:
            wish.give(wish.sampler.sampled(row[1], *found))


def only(token: int, vocab_size: int) -> Mask:
    """The mask of a single token."""
    mask = np.zeros(-(-vocab_size // 32), np.uint32)
    mask[token // 32] = 1 << token % 32
    return mask


def _require_numbers(logits: Logits) -> None:
    require_finite(logits.sums if isinstance(logits, Candidates) else logits)


def require_finite(computed: npt.NDArray[np.floating[Any]]) -> None:
    """Raises FormatError where what a model computed is NaN or infinite."""
    if not np.isfinite(computed).all():
        raise FormatError(
            "the model computes numbers that are NaN or infinite: its weights hold such numbers or are "
            "damaged; get or convert its files again"
        ) from None
