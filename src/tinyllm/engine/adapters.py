"""The adapters of a loaded model, by name, and which of them a text asks for.

Invariant: a text keeps the adapters that it began with, whatever is added or removed meanwhile; what it
computed is known by their content, never by their names. Imports `adapters` (the reading), `backends`,
`kvcache` and `errors`. llm.py's `add_adapter` and every `adapter=` are the doors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from tinyllm import backends
from tinyllm.engine.kvcache import NOTHING, Applied
from tinyllm.errors import ArgumentError, MemoryLimitError, size_text
from tinyllm.files import show, show_some

# What a text asks for: nothing, one adapter by name, or several with a strength each, added in this order.
AdapterChoice = str | Sequence[tuple[str, float]] | None

MAX_NAME = 200


@dataclass(frozen=True)
class _Loaded:
    handle: backends.Adapter
    key: bytes
    path: str


class Adapters:
    """Of one model. Any thread may add, remove and ask."""

    def __init__(self, model: backends.Model) -> None:
        self._model = model
        self._loaded: dict[str, _Loaded] = {}

    @property
    def n_bytes(self) -> int:
        """Bytes of all."""
        return sum(loaded.handle.n_bytes for loaded in list(self._loaded.values()))

    @property
    def paths(self) -> dict[str, str]:
        """Where each comes from, by name."""
        return {name: loaded.path for name, loaded in list(self._loaded.items())}

    def add(self, name: str, path: str | os.PathLike[str]) -> None:
        """Raises ArgumentError for a name that is taken or none; see `LLM.add_adapter`."""
        if not isinstance(name, str):
            raise TypeError(f"an adapter's name is a str, not {type(name).__name__}")
        if not name or len(name) > MAX_NAME or not name.isprintable() or ":" in name:
            raise ArgumentError(f"{show(name)} is no name for an adapter: printable characters, no colon")
        if name in self._loaded:
            raise ArgumentError(f"there is an adapter {show(name)} already: remove it first")
        from tinyllm.adapters import read_adapter

        read = read_adapter(path, self._model.config)
        n_bytes, free = 4 * read.n_numbers, self._model.free_memory()
        if n_bytes > free:
            raise MemoryLimitError(
                f"{path}: an adapter of {size_text(n_bytes)} does not fit: {size_text(free)} are free"
            )
        handle = self._model.adapter(read.pairs)
        self._loaded[name] = _Loaded(handle, read.key, os.fspath(path))

    def remove(self, name: str) -> None:
        """Raises ArgumentError where there is none of this name."""
        self._find(name)
        self._loaded.pop(name, None)

    def applied(self, choice: AdapterChoice) -> Applied:
        """Raises ArgumentError for a name that there is not and a strength that is not finite; TypeError."""
        if choice is None:
            return NOTHING
        if isinstance(choice, str):
            choice = [(choice, 1.0)]
        uses: list[tuple[backends.Adapter, float]] = []
        hashed = blake2b(digest_size=16)
        for item in _items(choice):
            name, strength = item
            loaded = self._find(name)
            if isinstance(strength, bool) or not isinstance(strength, (int, float, np.floating, np.integer)):
                raise TypeError(f"the strength of an adapter is a number, not {type(strength).__name__}")
            strength = float(strength)
            if not math.isfinite(strength) or abs(strength) > 1e30:
                raise ArgumentError(
                    f"the strength of adapter {show(name)} is {strength}, not a usable number"
                )
            uses.append((loaded.handle, strength))
            hashed.update(loaded.key + np.float32(strength).tobytes())
        return Applied(tuple(uses), hashed.digest()) if uses else NOTHING

    def _find(self, name: str) -> _Loaded:
        if not isinstance(name, str):
            raise TypeError(f"an adapter's name is a str, not {type(name).__name__}")
        loaded = self._loaded.get(name)
        if loaded is None:
            there = show_some([show(n) for n in self._loaded]) or "none: load the model with adapters="
            raise ArgumentError(f"there is no adapter {show(name)}; there are {there}")
        return loaded


def _items(choice: object) -> list[tuple[str, float]]:
    items: list[Any] = list(choice) if isinstance(choice, (list, tuple)) else [None]
    for item in items:
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            raise TypeError(
                "adapter is the name of one, or a list of (name, strength), such as [('a', 0.5), ('b', 1.0)]"
            )
    return items
