"""Answers that are kept for later requests: in memory, the least recently used go first.

Invariant: together they hold no more than `most_bytes` of JSON; one that is larger is not kept. For one event
loop. Imports streams.py.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from tinyllm.server.streams import dumps


class Kept:
    """Values of JSON by id."""

    def __init__(self, most_bytes: int = 64 << 20) -> None:
        self.most_bytes = most_bytes
        self.n_bytes = 0
        self._values: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def put(self, key: str, value: Any) -> None:
        self.remove(key)
        size = len(dumps(value).encode())
        if size > self.most_bytes:
            return
        self._values[key] = value, size
        self.n_bytes += size
        while self.n_bytes > self.most_bytes:
            self.remove(next(iter(self._values)))

    def get(self, key: str) -> Any:
        """None where it is not there, or no longer."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def remove(self, key: str) -> bool:
        """Whether it was there."""
        _, size = self._values.pop(key, (None, None))
        self.n_bytes -= size or 0
        return size is not None
