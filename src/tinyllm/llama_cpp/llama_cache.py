"""Caches of states that `Llama.set_cache` takes: what was computed for earlier texts, found by its tokens.

tinyllm keeps what prompts have in common by itself; these are for programs that hold such a cache, and for
states that are to outlive the model. Imports nothing of ours. state.py makes what they hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any


class BaseLlamaCache(ABC):
    """A mapping from tokens to `LlamaState`: the longest key that begins as the tokens do is the one."""

    def __init__(self, capacity_bytes: int = 2 << 30) -> None:
        self.capacity_bytes = capacity_bytes

    @property
    @abstractmethod
    def cache_size(self) -> int:
        """Bytes of the states it holds."""

    @abstractmethod
    def __getitem__(self, key: Sequence[int]) -> Any:
        """Raises KeyError where no key begins as these tokens do."""

    @abstractmethod
    def __contains__(self, key: Sequence[int]) -> bool: ...

    @abstractmethod
    def __setitem__(self, key: Sequence[int], value: Any) -> None: ...


class LlamaRAMCache(BaseLlamaCache):
    """In memory; those that were not asked for the longest go first."""

    def __init__(self, capacity_bytes: int = 2 << 30) -> None:
        super().__init__(capacity_bytes)
        self.cache_state: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    @property
    def cache_size(self) -> int:
        return sum(state.llama_state_size for state in self.cache_state.values())

    def __getitem__(self, key: Sequence[int]) -> Any:
        found = self._find(key)
        if found is None:
            raise KeyError("no state begins as these tokens do")
        self.cache_state.move_to_end(found)
        return self.cache_state[found]

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._find(key) is not None

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        self.cache_state.pop(tuple(key), None)
        self.cache_state[tuple(key)] = value
        while self.cache_state and self.cache_size > self.capacity_bytes:
            self.cache_state.popitem(last=False)

    def _find(self, key: Sequence[int]) -> tuple[int, ...] | None:
        """The key that has the longest beginning in common with this one, of those that have any."""
        shared = {known: n_shared(known, key) for known in self.cache_state}
        best = max(shared, key=lambda known: shared[known], default=None)
        return best if best is not None and shared[best] else None


LlamaCache = LlamaRAMCache


def n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    n = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        n += 1
    return n
