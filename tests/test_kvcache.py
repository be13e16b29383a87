"""Pages and their owners: reference counts, fork, prefixes, eviction, a full pool; with a mock pool."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers_engine import NOTHING, MockPool, slots_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinyllm.engine.kvcache import GONE, PAGE, KVCache, Sequence, first_seen, pages_held, root_key
from tinyllm.errors import MemoryLimitError


def make_cache(max_pages: int = 8, **options: Any) -> tuple[KVCache, MockPool]:
    pool = MockPool(max_pages)
    return KVCache(pool, max_pages, root_key("model", "f16"), **options), pool


def write(cache: KVCache, pool: MockPool, sequence: Sequence, n: int | None = None) -> None:
    """What a call of the model does for a sequence's next n tokens (None: all)."""
    n = sequence.n_pending if n is None else n
    slots = slots_of(sequence.tokens)
    for position in range(sequence.n_cached, sequence.n_cached + n):
        for i, table in enumerate(sequence.tables):
            pool.pages[table[position // PAGE]][position % PAGE] = slots[position] + i
    cache.commit(sequence, n)


def compute(cache: KVCache, pool: MockPool, tokens: list[int]) -> Sequence:
    """A new sequence, brought up to date. Its last token is computed in any case, for its logits."""
    sequence = cache.sequence(tokens)
    cache.adopt(sequence, len(tokens) - 1)
    while sequence.n_pending:
        cache.reserve(sequence)
        write(cache, pool, sequence, min(sequence.n_pending, cache.ahead))
    return sequence


def text(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 256, n)]


def holds(pool: MockPool, sequence: Sequence, tokens: list[int]) -> bool:
    """Whether the sequence's pages hold what belongs to `tokens`, as far back as the next token looks."""
    slots, n = slots_of(tokens), sequence.n_cached
    for i, (table, window) in enumerate(zip(sequence.tables, sequence._cache.windows, strict=True)):
        start = max(0, n + 1 - window) if window else 0
        held = [int(pool.pages[table[p // PAGE]][p % PAGE]) - i for p in range(start, n)]
        if GONE in table[start // PAGE : -(-n // PAGE)] or held != slots[start:n]:
            return False
    return len(slots) == n


def test_prefix_is_shared_page_by_page() -> None:
    cache, pool = make_cache()
    a = compute(cache, pool, text(200))
    b = cache.sequence(text(200)[:150] + text(50, seed=1))
    cache.adopt(b, 199)
    assert b.n_cached == 2 * PAGE
    assert b.tables[0] == a.tables[0][:2]
    assert cache.n_used == 4


def test_the_last_token_of_a_known_prompt_is_left_to_compute() -> None:
    cache, pool = make_cache()
    compute(cache, pool, text(2 * PAGE))
    again = cache.sequence(text(2 * PAGE))
    cache.adopt(again, len(again.tokens) - 1)
    assert again.n_cached == PAGE


def test_a_page_that_was_not_committed_is_not_shared() -> None:
    cache, pool = make_cache()
    a = cache.sequence(text(100))
    cache.reserve(a)
    pool.pages[a.tables[0][0]][:] = a.tokens[:PAGE]  # the call wrote, but failed
    b = cache.sequence(text(100))
    cache.adopt(b, 99)
    assert b.n_cached == 0


def test_the_same_page_after_another_prefix_is_another_page() -> None:
    cache, pool = make_cache()
    kept = [compute(cache, pool, text(PAGE, a) + text(PAGE, b)) for a, b in ((0, 1), (2, 3))]
    other = cache.sequence(text(PAGE, 2) + text(PAGE, 1) + [1])
    cache.adopt(other, 2 * PAGE)
    assert other.pages == kept[1].pages[:1]


def test_keys_depend_on_the_root() -> None:
    keys = {KVCache(MockPool(1), 1, root_key(*facts)).sequence(text(PAGE)).key(0) for facts in
            [("model", "f16"), ("model", "f32"), ("other", "f16"), ("modelf", "16")]}  # fmt: skip
    assert len(keys) == 4


def test_two_that_compute_the_same_page_end_up_with_one() -> None:
    cache, pool = make_cache()
    a, b = cache.sequence(text(PAGE + 1)), cache.sequence(text(PAGE + 1))
    for sequence in (a, b):
        cache.reserve(sequence)
    assert cache.n_used == 4
    for sequence in (a, b):
        write(cache, pool, sequence)
    assert a.pages[0] == b.pages[0]
    assert a.pages[1] != b.pages[1]
    assert cache.n_used == 3


def test_fork_shares_full_pages_and_copies_the_last() -> None:
    cache, pool = make_cache()
    parent = compute(cache, pool, text(PAGE + 20))
    child = cache.fork(parent)
    assert child.pages[0] == parent.pages[0]
    assert child.pages[1] != parent.pages[1]
    assert holds(pool, child, text(PAGE + 20))
    assert holds(pool, parent, text(PAGE + 20))
    child.tokens.append(1)
    parent.tokens.append(2)
    write(cache, pool, child)
    write(cache, pool, parent)
    assert holds(pool, child, [*text(PAGE + 20), 1])
    assert holds(pool, parent, [*text(PAGE + 20), 2])


def test_fork_at_a_page_border_takes_no_page() -> None:
    cache, pool = make_cache()
    parent = compute(cache, pool, text(2 * PAGE))
    child = cache.fork(parent)
    assert child.pages == parent.pages
    assert cache.n_used == 2


def test_fork_in_a_full_pool_changes_nothing() -> None:
    cache, pool = make_cache(max_pages=2)
    parent = compute(cache, pool, text(PAGE + 1))
    with pytest.raises(MemoryLimitError):
        cache.fork(parent)
    assert cache.n_used == 2
    cache.drop(parent)
    assert cache.n_used == 0


def test_a_page_that_is_handed_out_is_clear() -> None:
    cache, pool = make_cache(max_pages=1)
    cache.drop(compute(cache, pool, text(30)))
    sequence = cache.sequence(text(1))
    cache.reserve(sequence)
    assert (pool.pages[sequence.pages[0]] == NOTHING).all()


def test_unused_prefixes_go_least_recently_used_first_and_from_their_end() -> None:
    cache, pool = make_cache(max_pages=4)
    for seed in (0, 1):
        cache.drop(compute(cache, pool, text(2 * PAGE, seed)))
    assert cache.n_used == 0

    def known(seed: int) -> int:
        probe = cache.sequence([*text(2 * PAGE, seed), 0])
        cache.adopt(probe, 2 * PAGE)
        n = len(probe.pages)
        cache.drop(probe)
        return n

    assert (known(1), known(0)) == (2, 2)  # which makes 1 the one to go
    third = compute(cache, pool, text(10, seed=2))
    assert (known(0), known(1)) == (2, 1)
    assert holds(pool, third, text(10, seed=2))


def test_unused_pages_have_a_limit() -> None:
    cache, pool = make_cache(max_pages=8, max_unused=2)
    for seed in range(4):
        cache.drop(compute(cache, pool, text(2 * PAGE, seed)))
    assert pool.n_pages <= 6  # two kept, two in use, in slabs of three
    probe = cache.sequence([*text(2 * PAGE, 3), 0])
    cache.adopt(probe, 2 * PAGE)
    assert probe.n_cached == 2 * PAGE


def test_a_full_pool_says_its_numbers_and_takes_nothing() -> None:
    cache, pool = make_cache(max_pages=3)
    older = compute(cache, pool, text(PAGE + 1))
    younger = cache.sequence(text(3 * PAGE))
    with pytest.raises(
        MemoryLimitError, match=r"3 more pages of 64 tokens \(1000 bytes each\).* 2 are in use"
    ):
        cache.reserve(younger)
    assert younger.pages == []
    assert holds(pool, older, older.tokens)


def test_the_older_takes_pages_from_the_youngest() -> None:
    cache, pool = make_cache(max_pages=4)
    oldest, middle, youngest = (compute(cache, pool, text(PAGE // 2, seed)) for seed in range(3))
    oldest.tokens += text(2 * PAGE)
    cache.reserve(oldest)
    assert (len(oldest.pages), len(middle.pages), len(youngest.pages)) == (3, 1, 0)
    assert youngest.n_pending == len(youngest.tokens)
    with pytest.raises(MemoryLimitError):
        cache.reserve(youngest)


def test_nobody_loses_pages_for_what_cannot_fit_anyway() -> None:
    cache, pool = make_cache(max_pages=4)
    oldest, younger = (compute(cache, pool, text(PAGE // 2, seed)) for seed in range(2))
    oldest.tokens += text(5 * PAGE)
    with pytest.raises(MemoryLimitError):
        cache.reserve(oldest)
    assert len(younger.pages) == 1


def test_the_pool_grows_only_into_free_memory() -> None:
    pool = MockPool(max_pages=8, slab=1)
    free = [2 * pool.page_bytes]
    cache = KVCache(pool, 8, free_bytes=lambda: free[0])
    kept = compute(cache, pool, text(2 * PAGE))
    free[0] = 0
    with pytest.raises(MemoryLimitError):
        compute(cache, pool, text(PAGE, seed=1))
    assert holds(pool, kept, kept.tokens)
    assert pool.n_pages == 2


def test_growing_that_fails_evicts_instead() -> None:
    class Stingy(MockPool):
        def grow(self, n_pages: int) -> None:
            if n_pages > 3:
                raise MemoryError
            super().grow(n_pages)

    pool = Stingy(8, slab=1)
    cache = KVCache(pool, 8)
    cache.drop(compute(cache, pool, text(3 * PAGE)))
    sequence = compute(cache, pool, text(2 * PAGE, seed=1))
    assert holds(pool, sequence, sequence.tokens)


def test_closed_and_forgotten_sequences_are_collected() -> None:
    cache, pool = make_cache()
    a, b = compute(cache, pool, text(10)), compute(cache, pool, text(10, seed=1))
    a.close()
    del b
    assert cache.n_used == 2
    cache.collect()
    assert cache.n_used == 0
    assert len(cache._tables_of) == 1
    del a  # after its close
    cache.collect()
    assert not cache._tables_of


# ---- windows


def test_pages_behind_a_window_go_where_the_next_call_takes_its_own() -> None:
    cache, pool = make_cache(max_pages=12, windows=(0, 100), ahead=PAGE)
    sequence = cache.sequence(text(6 * PAGE))
    for n in range(1, 7):
        cache.reserve(sequence)
        assert len(sequence.tables[0]) == 6
        assert sequence.tables[1].count(GONE) == first_seen((n - 1) * PAGE, 100)
        assert len(sequence.pages) <= 6 + pages_held(6 * PAGE, 100, PAGE) == 10
        write(cache, pool, sequence, PAGE)
    assert holds(pool, sequence, sequence.tokens)
    cache.drop(sequence)
    assert cache.n_used == 0


def test_a_prefix_is_known_by_what_its_windows_see() -> None:
    """Its first pages may be gone from the windowed tables, not from the others, and not those before its
    end."""
    cache, pool = make_cache(max_pages=20, windows=(0, 100, 100), ahead=PAGE, max_unused=10)
    cache.drop(compute(cache, pool, text(6 * PAGE)))
    assert len(cache._unused) == 10  # of 18: evicted are those behind the windows
    for n, n_known in ((6, 6), (5, 0), (4, 0), (0, 0)):
        again = cache.sequence([*text(6 * PAGE), 1])
        cache.adopt(again, n * PAGE)
        assert again.n_cached == n_known * PAGE
        assert holds(pool, again, text(6 * PAGE)[: again.n_cached])
        assert [table.count(GONE) for table in again.tables] == [0, *([4] * 2 if n_known else [0] * 2)]
        cache.drop(again)


def test_a_prefix_goes_as_far_as_the_longest_that_has_its_windows() -> None:
    cache, pool = make_cache(max_pages=40, windows=(0, 70), ahead=PAGE)
    kept = compute(cache, pool, text(6 * PAGE))
    cache.drop(kept)
    page = cache._page_of.pop((1, kept.key(3)))
    del cache._key_of[page]
    for n, n_known in ((3, 3), (4, 3), (5, 3), (6, 6)):
        again = cache.sequence([*text(6 * PAGE), 1])
        cache.adopt(again, n * PAGE)
        assert again.n_cached == n_known * PAGE
        assert holds(pool, again, text(6 * PAGE)[: n_known * PAGE])
        cache.drop(again)


def test_fork_behind_a_window() -> None:
    cache, pool = make_cache(max_pages=20, windows=(0, 100), ahead=PAGE)
    parent = compute(cache, pool, text(5 * PAGE + 20))
    cache.reserve(parent)
    child = cache.fork(parent)
    assert [table[:5] for table in child.tables] == [table[:5] for table in parent.tables]
    assert child.tables[0][5] != parent.tables[0][5]
    assert child.tables[1][5] != parent.tables[1][5]
    assert child.tables[1].count(GONE) == 3
    for sequence, token in ((child, 1), (parent, 2)):
        sequence.tokens.append(token)
        write(cache, pool, sequence)
        assert holds(pool, sequence, [*text(5 * PAGE + 20), token])


class Pages(RuleBasedStateMachine):
    """Any order of operations, against what every sequence should hold."""

    @initialize(
        max_pages=st.integers(1, 9),
        max_unused=st.integers(0, 9),
        windows=st.sampled_from([(0,), (1,), (70,), (0, 30), (0, 100, 100), (64, 200)]),
        ahead=st.integers(1, 3 * PAGE),
    )
    def start(self, max_pages: int, max_unused: int, windows: tuple[int, ...], ahead: int) -> None:
        n = len(windows)
        self.cache, self.pool = make_cache(
            n * max_pages, max_unused=n * max_unused, windows=windows, ahead=ahead
        )
        self.sequences: list[Sequence] = []

    def pick(self, i: int) -> Sequence:
        return self.sequences[i % len(self.sequences)]

    # Few different texts, so that prefixes meet.
    tokens = st.lists(st.tuples(st.integers(0, 1), st.integers(1, PAGE + 1)), max_size=3).map(
        lambda runs: [token for token, n in runs for _ in range(n)]
    )

    @rule(tokens=tokens)
    def new(self, tokens: list[int]) -> None:
        self.sequences.append(self.cache.sequence(tokens))

    @precondition(lambda self: self.sequences)
    @rule(i=st.integers(0, 99), tokens=tokens)
    def append(self, i: int, tokens: list[int]) -> None:
        self.pick(i).tokens += tokens

    @precondition(lambda self: self.sequences)
    @rule(i=st.integers(0, 99), n=st.integers(1, 3 * PAGE))
    def compute(self, i: int, n: int) -> None:
        sequence = self.pick(i)
        if not sequence.n_pending:
            return
        before = Counter(page for s in self.sequences if s.order < sequence.order for page in s.pages)
        self.cache.adopt(sequence, len(sequence.tokens) - 1)
        assert sequence.n_pending > 0
        try:
            self.cache.reserve(sequence)
        except MemoryLimitError:
            return
        after = Counter(page for s in self.sequences if s.order < sequence.order for page in s.pages)
        assert before == after, "an older sequence lost pages"
        for table, window in zip(sequence.tables, self.cache.windows, strict=True):
            most = pages_held(len(sequence.tokens), window, self.cache.ahead)
            assert len(table) - table.count(GONE) <= most
        write(self.cache, self.pool, sequence, min(n, sequence.n_pending, self.cache.ahead))

    @precondition(lambda self: self.sequences)
    @rule(i=st.integers(0, 99))
    def fork(self, i: int) -> None:
        parent = self.pick(i)
        try:
            child = self.cache.fork(parent)
        except MemoryLimitError:
            return
        assert child.tokens == parent.tokens
        assert child.n_cached == parent.n_cached
        self.sequences.append(child)

    @precondition(lambda self: self.sequences)
    @rule(i=st.integers(0, 99))
    def drop(self, i: int) -> None:
        self.cache.drop(self.pick(i))

    @precondition(lambda self: self.sequences)
    @rule(i=st.integers(0, 99))
    def close(self, i: int) -> None:
        sequence = self.pick(i)
        self.sequences.remove(sequence)
        sequence.close()
        self.cache.collect()

    @invariant()
    def contents_are_right(self) -> None:
        for sequence in self.sequences:
            assert all(len(table) * PAGE >= sequence.n_cached for table in sequence.tables)
            for table, window in zip(sequence.tables, self.cache.windows, strict=True):
                n_gone = table.count(GONE)
                assert table[:n_gone] == [GONE] * n_gone
                assert n_gone <= first_seen(sequence.n_cached, window)
            assert holds(self.pool, sequence, sequence.tokens[: sequence.n_cached])

    @invariant()
    def owners_are_counted(self) -> None:
        cache = self.cache
        owners = Counter(page for sequence in self.sequences for page in sequence.pages)
        assert cache._n_owners == owners
        assert all(n > 0 for n in cache._n_owners.values())
        for page, n in owners.items():
            assert n == 1 or page in cache._key_of, "a page is shared that is not full and known"
        for sequence in self.sequences:
            assert len(set(sequence.pages)) == len(sequence.pages)

    @invariant()
    def every_page_is_somewhere_once(self) -> None:
        cache = self.cache
        everywhere = [*cache._free, *cache._unused, *cache._n_owners]
        assert sorted(everywhere) == list(range(self.pool.n_pages))
        assert set(cache._unused) <= set(cache._key_of)
        assert {page: key for key, page in cache._page_of.items()} == cache._key_of


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
