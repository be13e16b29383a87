"""Draft models as llama-cpp-python has them. They change no text; tinyllm takes one and does not ask it.

Imports nothing of ours.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.intc]


class LlamaDraftModel(abc.ABC):
    """Guesses what follows: `draft(input_ids)` gives ids, int32 [n], perhaps none."""

    @abc.abstractmethod
    def __call__(self, input_ids: Tokens, /, **kwargs: Any) -> Tokens: ...


class LlamaPromptLookupDecoding(LlamaDraftModel):
    """What followed the last few tokens where they stood before in the same text."""

    def __init__(self, max_ngram_size: int = 2, num_pred_tokens: int = 10) -> None:
        self.max_ngram_size, self.num_pred_tokens = max_ngram_size, num_pred_tokens

    def __call__(self, input_ids: Tokens, /, **kwargs: Any) -> Tokens:
        n_ids = len(input_ids)
        for n in range(min(self.max_ngram_size, n_ids - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(input_ids[:-1], n)
            (found,) = np.nonzero((windows == input_ids[-n:]).all(axis=1))
            if len(found):
                start = int(found[0]) + n
                return input_ids[start : start + self.num_pred_tokens]
        return np.empty(0, np.intc)
