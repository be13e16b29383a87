"""What may come next: the probabilities of the tokens after a text at several temperatures, and what the
filters of sampling leave of them.

Nothing is drawn here: it shows what a `Sampler` would draw from. docs/sampling.md says what the filters do.
Imports sampling.py. cli/next_token.py and the server show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tinyllm.engine.sampling import SamplingParams

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NextToken:
    """ids: all tokens, the likeliest first. probabilities: float64 [temperatures, tokens], in that order,
    before any filter. left: (filter, how many tokens are left after it), in the order they are applied."""

    ids: list[int]
    temperatures: list[float]
    probabilities: F64
    left: list[tuple[str, int]]

    def dropped_by(self, rank: int) -> str | None:
        """The filter that removes the token of this rank, or None."""
        return next((name for name, n in self.left if rank >= n), None)


def look(logits: npt.NDArray[np.float32], temperatures: list[float], params: SamplingParams) -> NextToken:
    """logits: float32 [vocab_size]. params: resolved; of its fields top_k, top_p and min_p count.

    The filters look at temperature 1, one after the other (docs/sampling.md), and keep likelier tokens before
    less likely ones; so what they leave is a number each.
    """
    top_k, top_p, min_p = params.top_k or 0, cast(float, params.top_p), params.min_p or 0.0
    x = logits.astype(np.float64)
    order = np.argsort(-x, kind="stable")
    x = x[order] - x[order[0]]
    p = np.exp(x)
    n, left = len(p), []
    if top_k:
        n = min(n, top_k)
        left.append((f"top-k {top_k}", n))
    if top_p != 1:
        share = np.cumsum(p[:n]) / p[:n].sum()
        n = int(np.sum(share[:-1] < np.float32(top_p))) + 1
        left.append((f"top-p {top_p:g}", n))
    if min_p:
        n = int(np.sum(p[:n] >= min_p))
        left.append((f"min-p {min_p:g}", n))
    rows = [np.exp(x / t) if t else (x == 0) * (np.arange(len(x)) == 0) for t in temperatures]
    probabilities = np.array([row / row.sum() for row in rows])
    return NextToken(order.tolist(), temperatures, probabilities, left)


def record(found: NextToken, names: list[str], n_rows: int) -> dict[str, Any]:
    """What JSON gets: the n_rows likeliest tokens. names: of these, in their order."""
    n_rows = min(n_rows, len(found.ids))
    tokens = [
        {
            "id": found.ids[rank],
            "text": names[rank],
            "probabilities": found.probabilities[:, rank].tolist(),
            "dropped_by": found.dropped_by(rank),
        }
        for rank in range(n_rows)
    ]
    filters = [{"filter": name, "left": n} for name, n in found.left]
    return {"temperatures": found.temperatures, "filters": filters, "tokens": tokens}
