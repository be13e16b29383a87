"""Who owns which page of the KV cache: sequences, reference counts, fork, and reuse of common prefixes.

The numbers themselves lie in the core's pool of pages (64 tokens each); this file only hands page ids out.
A page that is full never changes again, so sequences share it; the last, partial page of a sequence belongs
to it alone. Imports only `errors`. Read next: engine.py, which runs the sequences.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import wraps
from hashlib import blake2b
from itertools import count
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from .errors import MemoryLimitError

PAGE = 64  # tokens of a page, TL_PAGE of the core


class PagePool(Protocol):
    """The pages themselves, as the core keeps them. Ids run from 0 to n_pages - 1; a page never moves."""

    @property
    def n_pages(self) -> int: ...  # allocated so far

    @property
    def page_bytes(self) -> int: ...

    def grow(self, n_pages: int, /) -> None: ...  # at least n_pages exist from now on, or MemoryError

    def clear_page(self, page: int, /) -> None: ...

    def copy_page(self, to: int, source: int, n_tokens: int, /) -> None: ...

    def close(self) -> None: ...


def root_key(*facts: str) -> bytes:
    """The key before a sequence's first page. `facts` are what the cached numbers depend on beside the
    tokens: the model, its adapter, the cache's type, the choice of RoPE.
    """
    return blake2b(b"\0".join(fact.encode() for fact in facts), digest_size=16).digest()


class Sequence:
    """Tokens, and the pages that hold the keys and values of the first `n_cached` of them.

    Made by `KVCache.sequence`. Its owner appends to `tokens`; `pages` and `n_cached` change under the
    cache's lock only, and may fall back to nothing when an older sequence needs the room: the tokens are
    then computed again.
    """

    def __init__(self, cache: KVCache, tokens: Iterable[int]) -> None:
        self.pages: list[int] = []  # this very list as long as it lives: the cache keeps it beyond that
        self.tokens = list(tokens)
        self.n_cached = 0
        self.order = next(cache._orders)  # age: the lower, the older
        self._cache = cache
        self._keys: list[bytes] = []
        # A destructor in Python would swallow an interrupt and lose the pages; append of a deque is one step.
        self._ref = weakref.ref(self, cache._closed.append)
        cache._pages_of[self._ref] = self.pages

    @property
    def n_pending(self) -> int:
        """Tokens that still have to be computed."""
        return len(self.tokens) - self.n_cached

    def key(self, page: int) -> bytes:
        """The key of a full page: a hash of its parent's key and its tokens, so of all tokens so far."""
        for i in range(len(self._keys), page + 1):
            parent = self._keys[-1] if i else self._cache.root
            tokens = np.array(self.tokens[i * PAGE : (i + 1) * PAGE], dtype="<i4")
            assert len(tokens) == PAGE, "only full pages have a key"
            self._keys.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return self._keys[page]

    def close(self) -> None:
        """Gives the pages back. Never waits: the next call collects them. So does the end of its life."""
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
        max_unused: int | None = None,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        """`free_bytes` says how much memory is left, and is asked before the pool grows."""
        self.lock = threading.RLock()  # a signal handler may run in the thread that holds it
        self.is_torn = False  # an interrupt may have come while owners were written down
        self.pool, self.max_pages, self.root = pool, max_pages, root
        self._max_unused = max_pages if max_unused is None else max_unused
        self._free_bytes = free_bytes
        self._orders = count()
        self._free = list(range(pool.n_pages))
        self._n_owners: dict[int, int] = {}  # of the pages that have any
        self._page_of: dict[bytes, int] = {}  # the prefix table
        self._key_of: dict[int, bytes] = {}  # its inverse
        self._unused: OrderedDict[int, None] = OrderedDict()  # in the table, without an owner
        self._pages_of: dict[weakref.ref[Sequence], list[int]] = {}  # of all that live or are not collected
        self._closed: deque[weakref.ref[Sequence]] = deque()

    def sequence(self, tokens: Iterable[int] = ()) -> Sequence:
        """A new sequence, with no pages yet."""
        return Sequence(self, tokens)

    @property
    def n_used(self) -> int:
        """Pages that some sequence owns."""
        return len(self._n_owners)

    @property
    def n_available(self) -> int:
        """Pages that could be handed out now, memory permitting."""
        return self.max_pages - self.n_used

    @_books
    def adopt(self, sequence: Sequence, n_tokens: int) -> None:
        """Takes pages of the prefix table for the next tokens of `sequence` that end at `n_tokens` or
        before.
        """
        while sequence.n_cached % PAGE == 0 and sequence.n_cached + PAGE <= n_tokens:
            i = sequence.n_cached // PAGE
            page = self._page_of.get(sequence.key(i))
            if page is None:
                return
            self._put(sequence, i, page)
            sequence.n_cached += PAGE

    @_books
    def reserve(self, sequence: Sequence) -> None:
        """Gives `sequence` the pages for all its tokens, all or none. Where too few are left, younger
        sequences lose theirs, the youngest first. Raises MemoryLimitError, with the numbers, when that is
        not enough.
        """
        n = -(-len(sequence.tokens) // PAGE) - len(sequence.pages)
        if n <= 0:
            return
        while True:
            try:
                pages = self._take(n)
                break
            except MemoryLimitError:
                holders = [s for ref in list(self._pages_of) if (s := ref()) is not None and s.pages]
                younger = [s for s in holders if s.order > sequence.order]
                kept = {page for s in holders if s.order <= sequence.order for page in s.pages}
                if not younger or n > self.max_pages - len(kept):
                    raise
                youngest = max(younger, key=lambda s: s.order)
                youngest.n_cached = 0
                self._release(youngest.pages)
        sequence.pages += pages

    @_books
    def commit(self, sequence: Sequence, n_tokens: int) -> None:
        """The call that computed the next `n_tokens` tokens succeeded. Full pages can be shared now."""
        first = sequence.n_cached // PAGE
        sequence.n_cached += n_tokens
        for i in range(first, sequence.n_cached // PAGE):
            key, own = sequence.key(i), sequence.pages[i]
            known = self._page_of.setdefault(key, own)
            if known == own:
                self._key_of[own] = key
            else:  # another sequence was faster; both hold the same bits
                self._put(sequence, i, known)

    @_books
    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens: it shares the full pages and gets a copy of the last,
        partial one. Raises MemoryLimitError when there is no page for the copy.
        """
        child = self.sequence(sequence.tokens)
        child._keys = list(sequence._keys)
        n_full, n_rest = divmod(sequence.n_cached, PAGE)
        if n_rest:
            pages = self._take(1)
            try:
                self.pool.copy_page(pages[0], sequence.pages[n_full], n_rest)
            except BaseException:
                self._disown(pages[0])
                raise
            child.pages += pages
        for page in reversed(sequence.pages[:n_full]):
            self._own(page)
            child.pages.insert(0, page)
        child.n_cached = sequence.n_cached
        return child

    @_books
    def drop(self, sequence: Sequence) -> None:
        """Takes the pages away. The tokens stay; they have to be computed again to go on."""
        sequence.n_cached = 0
        self._release(sequence.pages)

    def collect(self) -> None:
        """Takes back what closed and dead sequences held. Where an interrupt tore the books, everything: the
        tokens stay, and are computed again.
        """
        if self.is_torn:
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
        self._release(self._pages_of.get(ref, []))
        self._pages_of.pop(ref, None)

    def _reset(self) -> None:
        for ref, pages in list(self._pages_of.items()):
            sequence = ref()
            if sequence is not None:
                sequence.n_cached = 0
            pages.clear()
        for book in (self._n_owners, self._page_of, self._key_of, self._unused):
            book.clear()
        self._free = list(range(min(self.pool.n_pages, self.max_pages)))
        self.is_torn = False

    def _release(self, pages: list[int]) -> None:
        """Empties a sequence's list."""
        for page in reversed(pages):  # so that the end of a prefix is evicted before its start
            self._disown(page)
        pages.clear()

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

    def _put(self, sequence: Sequence, i: int, page: int) -> None:
        """Makes a shared page the i-th of `sequence`."""
        self._own(page)
        if i < len(sequence.pages):
            self._disown(sequence.pages[i])
            sequence.pages[i] = page
        else:
            sequence.pages.append(page)

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
