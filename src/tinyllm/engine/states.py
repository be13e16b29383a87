"""Who owns which slot: what a sequence keeps, at one size, of layers whose memory does not grow with it.

A slot holds the state of all such layers after one token, and never changes once the call that wrote it has
succeeded: each call of a sequence reads one and writes another. So forks share it, a guess that was wrong is
undone by going on from an older one, a call that fails has spoilt nothing, and the state at a page's border
stays, under that page's key, for whoever begins with the same tokens. Imports `errors`. kvcache.py owns the
books of sequences, and calls everything here with its lock held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tinyllm.errors import MemoryLimitError

NONE = -1  # no slot: the state of a sequence that has not begun
BORDER = 256  # tokens: states at multiples of it stay; of other borders each text's last


class SlotPool(Protocol):
    """The slots themselves, as the core keeps them. Ids run from 0 to n_slots - 1."""

    @property
    def n_slots(self) -> int: ...  # allocated so far

    @property
    def slot_bytes(self) -> int: ...

    def grow_slots(self, n_slots: int, /) -> None: ...  # at least n_slots exist from now on, or MemoryError

    def read_slot(self, slot: int, /) -> npt.NDArray[np.uint8]: ...

    def write_slot(self, slot: int, content: npt.NDArray[np.uint8], /) -> None: ...


@dataclass
class Kept:
    """The slots of one sequence, one owner each. `state` is that after its computed tokens.

    spare: for what its next call makes. saves: (tokens, slot) of those that the call in the making writes:
    the state after so many tokens of the text. ahead: likewise after guesses, of the last call. border: the
    key of the last border that was kept, where another takes its place."""

    state: int = NONE
    spare: int = NONE
    saves: list[tuple[int, int]] = field(default_factory=list)
    ahead: list[tuple[int, int]] = field(default_factory=list)
    border: bytes | None = None

    @property
    def owned(self) -> list[int]:
        slots = [self.state, self.spare, *(slot for _, slot in (*self.saves, *self.ahead))]
        return [slot for slot in slots if slot != NONE]

    def clear(self) -> None:
        self.state = self.spare = NONE
        self.saves, self.ahead, self.border = [], [], None


class Slots:
    """Hands out the slots of a pool. Those without an owner whose tokens are known stay, least recently used
    first out, at most `max_unused`."""

    def __init__(
        self,
        pool: SlotPool,
        max_slots: int,
        *,
        max_unused: int | None = None,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        """free_bytes says how much memory is left, and is asked before the pool grows."""
        self.pool, self.max_slots = pool, max_slots
        self._max_unused = max_slots if max_unused is None else max_unused
        self._free_bytes = free_bytes
        self.reset()

    def reset(self) -> None:
        """Nobody owns anything, and nothing is known."""
        self._free = list(range(min(self.pool.n_slots, self.max_slots)))
        self._n_owners: dict[int, int] = {}
        self._slot_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # known, without an owner

    @property
    def n_used(self) -> int:
        """Slots that some sequence owns."""
        return len(self._n_owners)

    def find(self, key: bytes) -> int:
        """The slot of the state at the border that this page's key stands for, or NONE."""
        return self._slot_of.get(key, NONE)

    def take(self) -> int:
        """A slot with one owner. Raises MemoryLimitError."""
        if not self._free:
            self._grow()
        if not self._free and self._unused:
            self._evict()
        if not self._free:
            raise MemoryLimitError(
                f"no slot is left for the state of another text ({self.pool.slot_bytes} bytes each): "
                f"{self.n_used} are in use, {self.pool.n_slots} exist, at most {self.max_slots} may. Close "
                "sessions and streams, or ask for fewer texts at a time"
            )
        slot = self._free.pop()
        self._n_owners[slot] = 1
        return slot

    def take_if_any(self) -> int:
        """A slot for what can be done without, or NONE."""
        try:
            return self.take()
        except MemoryLimitError:
            return NONE

    def own(self, slot: int) -> None:
        """One owner more."""
        self._n_owners[slot] = self._n_owners.get(slot, 0) + 1
        self._unused.pop(slot, None)

    def disown(self, slot: int) -> None:
        if slot == NONE:
            return
        self._n_owners[slot] -= 1
        if self._n_owners[slot]:
            return
        del self._n_owners[slot]
        if slot not in self._key_of:
            self._free.append(slot)
            return
        self._unused[slot] = None
        if len(self._unused) > self._max_unused:
            self._evict()

    def keep(self, key: bytes, slot: int) -> None:
        """A slot holds the state at this border. Where one is known already, it stays: both are the same."""
        if key not in self._slot_of and slot not in self._key_of:
            self._slot_of[key], self._key_of[slot] = slot, key

    def forget(self, key: bytes) -> None:
        """The state at this border need not be known any more."""
        slot = self._slot_of.pop(key, NONE)
        if slot != NONE:
            del self._key_of[slot]
            if slot in self._unused:
                del self._unused[slot]
                self._free.append(slot)

    def _evict(self) -> None:
        slot, _ = self._unused.popitem(last=False)
        del self._slot_of[self._key_of.pop(slot)]
        self._free.append(slot)

    def _grow(self) -> None:
        """Adds a slot to the pool, where the limit and the memory allow."""
        n = self.pool.n_slots
        if n >= self.max_slots or (
            self._free_bytes is not None and self._free_bytes() < self.pool.slot_bytes
        ):
            return
        try:
            self.pool.grow_slots(n + 1)
        except MemoryError:
            return
        self._free += range(n, min(self.pool.n_slots, self.max_slots))


def moves(kept: list[Kept], starts: list[int], first: list[int]) -> tuple[Any, Any]:
    """What a call is told of states: the slot that each sequence goes on from, and after which of the call's
    tokens which slot is written. starts: where each sequence's tokens begin in the call; first: the position
    of the first of them."""
    saves = [
        (start + tokens - at - 1, slot)
        for one, start, at in zip(kept, starts, first, strict=True)
        for tokens, slot in sorted(one.saves)
    ]
    read = np.array([one.state for one in kept], np.int32)
    return read, np.array(saves, np.int32).reshape(-1, 2)
