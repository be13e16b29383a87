"""Who owns which page of the KV cache: sequences, reference counts, fork, and reuse of common prefixes.

The numbers themselves lie in the core's pool of pages (64 tokens each); this file only hands page ids out.
A page that is full never changes again, so sequences share it; the last, partial page of a sequence belongs
to it alone. Layers that look back equally far share their pages, and a sequence has a table of pages for each
such group of layers: what lies wholly behind a group's window is given back. What layers keep at one size
lies in slots beside the pages (states.py), one sequence's at `n_cached`. Imports `states` and `errors`. Read
next: engine.py, which runs the sequences.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from hashlib import blake2b
from itertools import count, zip_longest
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from tinyllm.engine.states import BORDER, NONE, Kept, Slots
from tinyllm.errors import MemoryLimitError

PAGE = 64  # tokens of a page, TL_PAGE of the core
GONE = -1  # in a table: a page behind the window


class PagePool(Protocol):
    """The pages themselves, as the core keeps them. Ids run from 0 to n_pages - 1; a page never moves."""

    @property
    def n_pages(self) -> int: ...  # allocated so far

    @property
    def page_bytes(self) -> int: ...

    @property
    def epoch(self) -> int: ...  # another number where all pages lost what they held

    def grow(self, n_pages: int, /) -> None: ...  # at least n_pages exist from now on, or MemoryError

    def clear_page(self, page: int, /) -> None: ...

    def copy_page(self, to: int, source: int, n_tokens: int, /) -> None: ...

    def read_page(self, page: int, /) -> npt.NDArray[np.uint8]: ...

    def write_page(self, page: int, content: npt.NDArray[np.uint8], /) -> None: ...

    def close(self) -> None: ...


def root_key(*facts: str) -> bytes:
    """The key before a sequence's first page. `facts` are what the cached numbers depend on beside the
    tokens: the model, the cache's type, the choice of RoPE. (Of its adapters `Sequence.key` knows.)
    """
    return blake2b(b"\0".join(fact.encode() for fact in facts), digest_size=16).digest()


@dataclass(frozen=True)
class Applied:
    """The adapters that a sequence's numbers are made with: what the model takes for them, and a key of what
    they are, which its pages' keys depend on."""

    uses: Any = ()
    key: bytes = b""


NOTHING = Applied()


def first_seen(n_cached: int, window: int) -> int:
    """The first page that the token at position `n_cached`, or any later one, looks at."""
    return max(0, n_cached + 1 - window) // PAGE if window else 0


def pages_held(n_tokens: int, window: int, ahead: int) -> int:
    """The most pages of one table that a text of n_tokens holds at a time, computed up to `ahead` tokens a
    call. window: positions that the table's layers look at; 0: all.
    """
    n = -(-n_tokens // PAGE)
    return min(n, (window + ahead) // PAGE + 2) if window else n


class Sequence:
    """Tokens, and the pages that hold the keys and values of the first `n_cached` of them.

    tables: for each group of layers the pages in order, GONE where they are behind its window. Made by
    `KVCache.sequence`. Its owner appends to `tokens`; `tables` and `n_cached` change under the cache's lock
    only, and may fall back to nothing when an older sequence needs the room: the tokens are then computed
    again.
    """

    def __init__(
        self, cache: KVCache, tokens: Iterable[int], runner: int | None, applied: Applied = NOTHING
    ) -> None:
        # These very lists as long as it lives: the cache keeps them beyond that.
        self.tables: list[list[int]] = [[] for _ in cache.windows]
        self.tokens = list(tokens)
        self.n_cached = 0
        self.n_adopted = 0  # tokens that somebody else had computed
        self.n_ahead = 0  # guesses that the last call computed after them, which count for nothing
        self.n_right = 0  # how many of those its owner has made tokens of since, which `settle` then counts
        self.is_closed = False
        self.order = next(cache._orders)  # age: the lower, the older
        self.runner = runner  # the thread whose call closes it, or None: somebody does when it suits them
        self.applied = applied
        self._cache = cache
        self._keys: list[bytes] = []
        # A destructor in Python would swallow an interrupt and lose the pages; append of a deque is one step.
        self._ref = weakref.ref(self, cache._closed.append)
        self.kept = Kept()
        cache._tables_of[self._ref] = self.tables
        cache._kept_of[self._ref] = self.kept

    @property
    def n_pending(self) -> int:
        """Tokens that still have to be computed."""
        return len(self.tokens) - self.n_cached

    @property
    def pages(self) -> list[int]:
        """The pages it owns, of all tables."""
        return [page for table in self.tables for page in table if page != GONE]

    def key(self, page: int) -> bytes:
        """The key of a full page: a hash of its parent's key and its tokens, so of all tokens so far."""
        for i in range(len(self._keys), page + 1):
            parent = self._keys[-1] if i else self._cache.root + self.applied.key
            tokens = np.array(self.tokens[i * PAGE : (i + 1) * PAGE], dtype="<i4")
            assert len(tokens) == PAGE, "only full pages have a key"
            self._keys.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return self._keys[page]

    def close(self) -> None:
        """Gives the pages back. Never waits: the next call collects them. So does the end of its life."""
        self.is_closed = True
        self._cache._closed.append(self._ref)


Method = TypeVar("Method", bound=Callable[..., Any])


def _books(method: Method) -> Method:
    """Marks the cache as torn while a method rewrites who owns what. An interrupt (or whatever a signal
    handler raises) leaves the mark, for `collect` to see; MemoryLimitError comes where nothing is half
    written.
    """

    @wraps(method)
    def marked(self: KVCache, *arguments: Any) -> Any:
        self.is_torn = True
        try:
            result = method(self, *arguments)
        except MemoryLimitError:
            self.is_torn = False
            raise
        self.is_torn = False
        return result

    return cast(Method, marked)


def _extend(sequence: Sequence, pages: list[int], counts: list[int]) -> None:
    """Adds so many of the pages to each table."""
    for table, n in zip(sequence.tables, counts, strict=True):
        table += pages[:n]
        del pages[:n]


class KVCache:
    """Hands out the pages of a pool.

    Everything here but `sequence` is called with `lock` held, which also stands around the model's calls, so
    no page changes hands while one runs. Pages without an owner whose tokens are known stay as a cache of
    prefixes, least recently used first out, at most `max_unused` of them.
    """

    def __init__(
        self,
        pool: PagePool,
        max_pages: int,
        root: bytes = b"",
        *,
        windows: Iterable[int] = (0,),
        ahead: int = 512,
        max_unused: int | None = None,
        free_bytes: Callable[[], int] | None = None,
        slots: Slots | None = None,
    ) -> None:
        """windows: of each of a sequence's tables; 0: its layers look at everything. ahead: the most tokens
        of a sequence that one call computes. `free_bytes` says how much memory is left, and is asked before
        the pool grows. slots: of the model's states; None: it keeps none.
        """
        self.lock = threading.RLock()  # a signal handler may run in the thread that holds it
        self.is_torn = False  # an interrupt may have come while owners were written down
        self.pool, self.max_pages, self.root = pool, max_pages, root
        self.windows, self.ahead = tuple(windows), ahead
        self._epoch = pool.epoch
        self._max_unused = max_pages if max_unused is None else max_unused
        self._free_bytes = free_bytes
        self._orders = count()
        self._free = list(range(pool.n_pages))
        self._n_owners: dict[int, int] = {}  # of the pages that have any
        self._page_of: dict[tuple[int, bytes], int] = {}  # the prefixes: of table and key
        self._key_of: dict[int, tuple[int, bytes]] = {}  # its inverse
        self._unused: OrderedDict[int, None] = OrderedDict()  # in the table, without an owner
        # Of all sequences that live or are not collected
        self._tables_of: dict[weakref.ref[Sequence], list[list[int]]] = {}
        self._kept_of: dict[weakref.ref[Sequence], Kept] = {}
        self._closed: deque[weakref.ref[Sequence]] = deque()
        self.slots = slots

    def sequence(
        self, tokens: Iterable[int] = (), runner: int | None = None, applied: Applied = NOTHING
    ) -> Sequence:
        """A new sequence, with no pages yet."""
        return Sequence(self, tokens, runner, applied)

    def holders(self) -> list[Sequence]:
        """The sequences that have pages."""
        return [s for ref in list(self._tables_of) if (s := ref()) is not None and any(s.tables)]

    @property
    def n_used(self) -> int:
        """Pages that some sequence owns."""
        return len(self._n_owners)

    @_books
    def adopt(self, sequence: Sequence, n_tokens: int) -> None:
        """Takes known pages for the next tokens of `sequence`, as many as end at `n_tokens` or before: all
        that a token after them looks at.
        """
        first = end = sequence.n_cached // PAGE
        if sequence.n_cached % PAGE:
            return
        known_from = [first_seen(sequence.n_cached, window) for window in self.windows]  # without a gap
        for i in range(first, n_tokens // PAGE):
            known = [(table, sequence.key(i)) in self._page_of for table in range(len(self.windows))]
            if not all(is_known or window for is_known, window in zip(known, self.windows, strict=True)):
                break
            known_from = [n if is_known else i + 1 for n, is_known in zip(known_from, known, strict=True)]
            seen_from = [first_seen((i + 1) * PAGE, window) for window in self.windows]
            if all(n <= seen for n, seen in zip(known_from, seen_from, strict=True)) and (
                self.slots is None or self.slots.find(sequence.key(i)) != NONE
            ):
                end = i + 1
        if end == first:
            return
        sequence.n_cached = end * PAGE
        sequence.n_adopted += (end - first) * PAGE
        if self.slots is not None:
            slot = self.slots.find(sequence.key(end - 1))
            self.slots.own(slot)
            self._go_on_from(sequence, slot)
        self._trim(sequence)
        for table, window in enumerate(self.windows):
            seen = first_seen(sequence.n_cached, window)
            for i in range(first, end):
                page = self._page_of[table, sequence.key(i)] if i >= seen else GONE
                self._put(sequence, table, i, page)

    @_books
    def reserve(self, sequence: Sequence, n_guesses: int = 0) -> None:
        """Gives `sequence` the pages for all its tokens, or as many as its windows let it hold at a time; all
        or none. Where too few are left, younger sequences lose theirs, the youngest first. Raises
        MemoryLimitError, with the numbers, when that is not enough. n_guesses: tokens that may follow, whose
        pages it gets as far as nobody has to give them.
        """
        self._trim(sequence)
        missing = self._missing(sequence, len(sequence.tokens))
        n = sum(missing)
        while n or self.slots is not None:
            try:
                if self.slots is not None and sequence.kept.spare == NONE:
                    sequence.kept.spare = self._take_slot(self.slots)
                pages = self._take(n) if n else []
                break
            except MemoryLimitError:
                holders = self.holders()
                younger = [s for s in holders if s.order > sequence.order]
                kept = {page for s in holders if s.order <= sequence.order for page in s.pages}
                if not younger or n > self.max_pages - len(kept):
                    raise
                self._empty(max(younger, key=lambda s: s.order))
        if n:
            _extend(sequence, pages, missing)
        more = self._missing(sequence, len(sequence.tokens) + n_guesses)
        if n_guesses and any(more):
            with suppress(MemoryLimitError):  # the call takes fewer guesses
                _extend(sequence, self._take(sum(more)), more)

    def _take_slot(self, slots: Slots) -> int:
        """A slot, if need be one of those after guesses, which are only computed again without them."""
        if (slot := slots.take_if_any()) == NONE:
            for kept in list(self._kept_of.values()):
                ahead, kept.ahead = kept.ahead, []
                for _, one in ahead:
                    slots.disown(one)
            slot = slots.take()
        return slot

    def _missing(self, sequence: Sequence, n_tokens: int) -> list[int]:
        """How many pages each table lacks for so many tokens."""
        missing = []
        for table, window in zip(sequence.tables, self.windows, strict=True):
            seen = first_seen(sequence.n_cached, window)
            n_held = pages_held(n_tokens - seen * PAGE, window, self.ahead)
            missing.append(max(0, seen + n_held - len(table)))
        return missing

    @_books
    def commit(self, sequence: Sequence, n_tokens: int, n_guesses: int = 0) -> None:
        """The call that computed the next `n_tokens` tokens succeeded. Full pages can be shared now.
        n_guesses: what it computed after them, and is not known to be right."""
        saves, sequence.kept.saves = sequence.kept.saves, []
        end = sequence.n_cached + n_tokens
        for tokens, slot in saves:
            if tokens < end:
                self._keep_border(sequence, tokens, slot)
                assert self.slots is not None
                self.slots.disown(slot)
            elif tokens == end:
                self._go_on_from(sequence, slot)
            else:
                sequence.kept.ahead.append((tokens, slot))
        self._commit(sequence, n_tokens)
        sequence.n_ahead, sequence.n_right = n_guesses, 0

    @_books
    def plan(self, sequence: Sequence, n_tokens: int, n_guesses: int) -> None:
        """Says which states the next call keeps, that computes so many tokens and guesses: that after the
        last token, for which `reserve` has taken a slot; as far as there is room those after every guess, and
        those at borders of pages, for others that begin with the same tokens."""
        if self.slots is None:
            return
        kept, end = sequence.kept, sequence.n_cached + n_tokens
        for _, slot in kept.saves:  # of a call that failed
            if kept.spare == NONE:
                kept.spare = slot
            else:
                self.slots.disown(slot)
        kept.saves, kept.spare = [(end, kept.spare)], NONE
        wanted = [*range(end + 1, end + n_guesses + 1)]
        last = (end - 1) // PAGE * PAGE
        wanted += [
            n for n in range(PAGE, end, PAGE) if n > sequence.n_cached and (n % BORDER == 0 or n == last)
        ]
        for tokens in wanted:
            if (slot := self.slots.take_if_any()) != NONE:
                kept.saves.append((tokens, slot))

    def _go_on_from(self, sequence: Sequence, slot: int) -> None:
        """A slot that the sequence owns is its state."""
        assert self.slots is not None
        self.slots.disown(sequence.kept.state)
        sequence.kept.state = slot

    def _keep_border(self, sequence: Sequence, n_tokens: int, slot: int) -> None:
        """Others may go on from this state after n_tokens, where a page ends there."""
        if self.slots is None or n_tokens % PAGE:
            return
        key = sequence.key(n_tokens // PAGE - 1)
        self.slots.keep(key, slot)
        if sequence.kept.border is not None:
            self.slots.forget(sequence.kept.border)
        sequence.kept.border = None if n_tokens % BORDER == 0 else key

    @_books
    def settle(self, sequence: Sequence) -> None:
        """Counts the guesses that were right as computed, and forgets the others: their places are written
        again before anybody reads them, and no page with one of them was ever shared. Where states are kept,
        it counts as many as there is a state after; the rest is computed again."""
        n = min(sequence.n_ahead, sequence.n_right)
        sequence.n_ahead = sequence.n_right = 0
        if self.slots is not None:
            ahead, sequence.kept.ahead = sequence.kept.ahead, []
            best = max((tokens for tokens, _ in ahead if tokens <= sequence.n_cached + n), default=None)
            n = 0 if best is None else best - sequence.n_cached
            for tokens, slot in ahead:
                if tokens == best:
                    self._go_on_from(sequence, slot)
                else:
                    self.slots.disown(slot)
        if n:
            self._commit(sequence, n)

    def _commit(self, sequence: Sequence, n_tokens: int) -> None:
        first = sequence.n_cached // PAGE
        sequence.n_cached += n_tokens
        self._share(sequence, first)
        if sequence.n_cached:
            self._keep_border(sequence, sequence.n_cached, sequence.kept.state)
        if not sequence.n_pending:  # else `reserve` does, when it takes the next ones: nobody gets in between
            self._trim(sequence)

    def _share(self, sequence: Sequence, first: int) -> None:
        """Others may have its full pages from the `first` on, those that are not behind a window."""
        for i in range(first, sequence.n_cached // PAGE):
            for table, pages in enumerate(sequence.tables):
                key, own = (table, sequence.key(i)), pages[i]
                if own == GONE:
                    continue
                known = self._page_of.setdefault(key, own)
                if known == own:
                    self._key_of[own] = key
                else:  # another sequence was faster; both hold the same bits
                    self._put(sequence, table, i, known)

    @_books
    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens: it shares the full pages and gets a copy of the last,
        partial ones. Raises MemoryLimitError when there are no pages for the copies.
        """
        self.settle(sequence)
        self.is_torn = True  # `settle` is done, this is not
        child = self.sequence(sequence.tokens, sequence.runner, sequence.applied)
        child._keys = list(sequence._keys)
        n_full, n_rest = divmod(sequence.n_cached, PAGE)
        copies = self._take(len(self.windows)) if n_rest else []
        try:
            for table, copy in zip(sequence.tables, copies, strict=False):
                self.pool.copy_page(copy, table[n_full], n_rest)
        except BaseException:
            for page in copies:
                self._disown(page)
            raise
        for i, table in enumerate(sequence.tables):
            for page in table[:n_full]:
                if page != GONE:
                    self._own(page)
            child.tables[i] += table[:n_full] + copies[i : i + 1]
        child.n_cached = sequence.n_cached
        if self.slots is not None and sequence.kept.state != NONE:
            self.slots.own(sequence.kept.state)
            child.kept.state = sequence.kept.state
        return child

    @_books
    def restore(
        self,
        tokens: list[int],
        present: list[list[int]],
        contents: Iterable[npt.NDArray[np.uint8]],
        applied: Applied = NOTHING,
        state: npt.NDArray[np.uint8] | None = None,
    ) -> Sequence:
        """A sequence of which all tokens are computed, from the bytes of its pages and of its state. present:
        for each table whether there is an i-th page; else it is behind the window. Raises MemoryLimitError.
        """
        sequence = self.sequence(tokens, applied=applied)
        n = sum(map(sum, present))
        pages = self._take(n) if n else []
        left = iter(pages)
        try:
            if self.slots is not None and state is not None:
                sequence.kept.state = self.slots.take()
                self.slots.pool.write_slot(sequence.kept.state, state)
            for page, content in zip(pages, contents, strict=True):
                self.pool.write_page(page, content)
        except BaseException:
            self._release_slots(sequence.kept)
            for page in pages:
                self._disown(page)
            raise
        for table, row in zip(sequence.tables, present, strict=True):
            table += [next(left) if there else GONE for there in row]
        sequence.n_cached = len(tokens)
        self._share(sequence, 0)
        return sequence

    @_books
    def drop(self, sequence: Sequence) -> None:
        """Takes the pages away. The tokens stay; they have to be computed again to go on."""
        self._empty(sequence)

    def _empty(self, sequence: Sequence) -> None:
        sequence.n_cached = sequence.n_ahead = 0
        self._release(sequence.tables)
        self._release_slots(sequence.kept)

    def _release_slots(self, kept: Kept) -> None:
        owned = kept.owned
        kept.clear()
        for slot in owned:
            assert self.slots is not None
            self.slots.disown(slot)

    def collect(self) -> None:
        """Takes back what closed and dead sequences held. Where an interrupt tore the books, or the pool lost
        what pages held, everything: the tokens stay, and are computed again.
        """
        if self.is_torn or self.pool.epoch != self._epoch:
            self._epoch = self.pool.epoch
            self._reset()
        while self._closed:  # one leaves the queue when all is done for it, lest an interrupt lose it
            ref = self._closed[0]
            sequence = ref()
            if sequence is not None:
                self.drop(sequence)
            else:
                self._bury(ref)
            self._closed.popleft()

    @_books
    def _bury(self, ref: weakref.ref[Sequence]) -> None:
        self._release(self._tables_of.get(ref, []))
        self._release_slots(self._kept_of.get(ref, Kept()))
        self._tables_of.pop(ref, None)
        self._kept_of.pop(ref, None)

    def _reset(self) -> None:
        for ref, tables in list(self._tables_of.items()):
            sequence = ref()
            if sequence is not None:
                sequence.n_cached = sequence.n_ahead = 0
            for table in tables:
                table.clear()
        for kept in list(self._kept_of.values()):
            kept.clear()
        if self.slots is not None:
            self.slots.reset()
        for book in (self._n_owners, self._page_of, self._key_of, self._unused):
            book.clear()
        self._free = list(range(min(self.pool.n_pages, self.max_pages)))
        self.is_torn = False

    def _release(self, tables: list[list[int]]) -> None:
        """Empties a sequence's tables."""
        for row in reversed(list(zip_longest(*tables, fillvalue=GONE))):
            for page in row:  # so that the end of a prefix is evicted before its start
                if page != GONE:
                    self._disown(page)
        for table in tables:
            table.clear()

    def _own(self, page: int) -> None:
        self._n_owners[page] = self._n_owners.get(page, 0) + 1
        self._unused.pop(page, None)

    def _disown(self, page: int) -> None:
        self._n_owners[page] -= 1
        if self._n_owners[page]:
            return
        del self._n_owners[page]
        if page not in self._key_of:
            self._free.append(page)
            return
        self._unused[page] = None
        if len(self._unused) > self._max_unused:
            self._evict()

    def _put(self, sequence: Sequence, table: int, i: int, page: int) -> None:
        """Makes a shared page, or GONE, the i-th of a table of `sequence`."""
        pages = sequence.tables[table]
        if page != GONE:
            self._own(page)
        if i < len(pages):
            if pages[i] != GONE:
                self._disown(pages[i])
            pages[i] = page
        else:
            pages.append(page)

    def _trim(self, sequence: Sequence) -> None:
        """Gives back what is wholly behind the windows."""
        for table, (pages, window) in enumerate(zip(sequence.tables, self.windows, strict=True)):
            i = min(first_seen(sequence.n_cached, window), len(pages)) - 1
            while i >= 0 and pages[i] != GONE:
                self._put(sequence, table, i, GONE)
                i -= 1

    def _evict(self) -> None:
        page, _ = self._unused.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        self._free.append(page)

    def _take(self, n: int) -> list[int]:
        """n cleared pages with one owner each, or MemoryLimitError before any of them is touched."""
        if n > len(self._free):
            self._grow(n - len(self._free))
        if n > len(self._free) + len(self._unused):
            raise MemoryLimitError(
                f"the KV cache is full: {n} more pages of {PAGE} tokens ({self.pool.page_bytes} bytes each) "
                f"are needed; {self.n_used} are in use, {self.pool.n_pages} exist, at most {self.max_pages} "
                "may. Close sessions and streams, or ask for fewer or shorter texts at a time"
            )
        while n > len(self._free):
            self._evict()
        pages = self._free[-n:]
        for page in pages:
            self.pool.clear_page(page)
        del self._free[-n:]
        for page in pages:
            self._own(page)
        return pages

    def _grow(self, n: int) -> None:
        """Adds n pages to the pool, or as many as the limit and the memory allow."""
        before = self.pool.n_pages
        target = min(before + n, self.max_pages)
        if self._free_bytes is not None and target > before:
            target = min(target, before + self._free_bytes() // self.pool.page_bytes)
        if target <= before:
            return
        try:
            self.pool.grow(target)
        except MemoryError:
            return  # whoever asked goes by the number of free pages
        self._free.extend(range(before, min(self.pool.n_pages, self.max_pages)))
