"""Typed access to what a file says of a model, key by key, which remembers the keys that were asked for.

A key that nobody asked for and that switches something on is refused, never ignored; one that transformers
does not read is warned of. Imports `errors`. Read next: from_json.py and from_gguf.py, which ask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from tinyllm.errors import FormatError, UnsupportedError

log = logging.getLogger(__name__)


def brief(value: Any) -> str:
    """A value from a file for a message: its start, quoted, unprintable characters escaped."""
    return repr(str(value)[:80])


def ignored(key: str, value: Any, where: str) -> None:
    """Warns of a key that transformers does not read where it is, and that is not applied here either."""
    log.warning(
        "config.json: %s is %s, which transformers does not read in a %s; it is ignored here too",
        key,
        brief(value),
        where,
    )


def agree(what: str, one: Any, other: Any) -> None:
    """Refuses what a config.json says twice, in an old and a new place, and says differently."""
    if one is not None and other is not None and one != other:
        raise FormatError(f"{what} is both {brief(one)} and {brief(other)}; delete the one that is wrong")


class Fields:
    """Typed access to a table of hyperparameters that remembers which keys were asked for."""

    def __init__(self, table: Mapping[str, Any], prefix: str = "") -> None:
        """`prefix` opens every key, here and in messages."""
        self.table = table
        self.prefix = prefix
        self.seen: set[str] = set()

    def get(self, key: str) -> Any:
        """The value, or None where the key is absent."""
        self.seen.add(self.prefix + key)
        return self.table.get(self.prefix + key)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number. One value per layer is accepted where all are equal."""
        value = self.get(key)
        if isinstance(value, np.ndarray):
            if value.size == 0 or (value != value[0]).any():
                raise UnsupportedError(
                    f"{self.prefix}{key} differs from layer to layer, which is not supported"
                )
            value = value[0].item()
        if value is None:
            value = default
        if type(value) is not int:
            self.wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if type(value) not in (int, float) or not abs(value) < 1e300:
            self.wrong(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            value = default
        if type(value) is not bool:
            self.wrong(key, value, "true or false")
        return value

    def wrong(self, key: str, value: Any, kind: str) -> NoReturn:
        """Raises the FormatError for a value that is not of its kind."""
        if value is None:
            raise FormatError(f"the hyperparameter {self.prefix}{key} is missing")
        raise FormatError(f"the hyperparameter {self.prefix}{key} must be {kind}, not {brief(value)}")

    def refuse_unknown(self, harmless: Iterable[str]) -> None:
        """Raise UnsupportedError for a key that nobody asked for and that switches something on."""
        known = self.seen | {self.prefix + key for key in harmless}
        for key, value in self.table.items():
            if key.startswith(self.prefix) and key not in known and _is_set(value):
                raise UnsupportedError(
                    f"{brief(key)} is set ({brief(value)}), a feature that is not supported"
                )


def _is_set(value: Any) -> bool:
    return bool(value.any()) if isinstance(value, np.ndarray) else bool(value)
