"""Guesses of a user's function.

Invariant: it gets a copy of the tokens, so that nothing it does reaches the text; what it raises or says
wrongly is told by its name. Imports `errors`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from tinyllm.errors import ArgumentError

Propose = Callable[[list[int], int], Sequence[int]]
"""`propose(tokens, n)`: tokens so far, prompt included; at most n ids that may come next, in order."""


class Called:
    """Of one text."""

    def __init__(self, function: Propose) -> None:
        self._function = function
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))

    def propose(self, tokens: list[int], n: int) -> list[int]:
        try:
            return [operator.index(token) for token in list(self._function(list(tokens), n))[:n]]
        except Exception as error:  # the user's code
            raise ArgumentError(f"the guesser {self.__name__} fails: {error!r:.200}") from error
