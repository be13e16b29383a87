"""Sessions in files: the tokens of a text and its pages of the KV cache, so that a long prompt is read once.

Invariant: a restored session goes on with the bits that the saved one would have made, or is refused. So a
file names what its numbers depend on (`facts`), and ends with a hash of all before. It is written whole or
not at all. Imports `kvcache`, `files` and `errors`; llm.py's `Session.save` and `LLM.restore` are the doors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.engine.kvcache import GONE, NOTHING, PAGE, Applied, KVCache, Sequence
from tinyllm.engine.states import NONE
from tinyllm.errors import FormatError
from tinyllm.files import FileReader, parse_json
from tinyllm.files.outfiles import replacing

MAGIC = b"tinyllm session\n"
DIGEST = 32  # bytes of the hash at the end
MAX_HEADER = 1 << 30

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Snapshot:
    """A sequence of which all tokens are computed. tables: which pages there are; pages: their bytes."""

    tokens: list[int]
    tables: list[list[int]]
    pages: list[npt.NDArray[np.uint8]]
    page_bytes: int
    state: npt.NDArray[np.uint8] | None = None  # of layers that keep one


def snapshot(cache: KVCache, sequence: Sequence) -> Snapshot | None:
    """A copy of what a sequence holds now; None where some of its tokens are not computed."""
    with cache.lock:  # pages change hands under it only
        cache.settle(sequence)
        if sequence.n_pending:
            return None
        n = -(-len(sequence.tokens) // PAGE)  # a page more may be there for guesses
        tables = [table[:n] for table in sequence.tables]
        pages = [cache.pool.read_page(page) for table in tables for page in table if page != GONE]
        present = [[int(page != GONE) for page in table] for table in tables]
        state = None
        if cache.slots is not None and sequence.kept.state != NONE:
            state = cache.slots.pool.read_slot(sequence.kept.state)
        return Snapshot(list(sequence.tokens), present, pages, cache.pool.page_bytes, state)


def save(
    path: str | os.PathLike[str], kept: Snapshot, logits: Logits | None, facts: Mapping[str, Any]
) -> None:
    """Writes a sequence, and the logits after its last token, [vocab_size].

    facts: what the numbers depend on, and whatever else belongs to the session; JSON. Raises WriteError.
    """
    header = {
        **facts,
        "tokens": kept.tokens,
        "pages": kept.tables,
        "page_bytes": kept.page_bytes,
        "logits": 0 if logits is None else len(logits),
    }
    if kept.state is not None:
        header["state_bytes"] = kept.state.size
    words = json.dumps(header).encode()
    parts = [MAGIC, len(words).to_bytes(8, "little"), words]
    parts += [] if logits is None else [logits.astype("<f4").tobytes()]
    parts += [page.tobytes() for page in kept.pages]
    parts += [] if kept.state is None else [kept.state.tobytes()]
    hashed = blake2b(digest_size=DIGEST)
    with replacing(path, sum(map(len, parts)) + DIGEST) as file:
        for part in parts:
            hashed.update(part)
            file.write(part)
        file.write(hashed.digest())


def restore(
    path: str | os.PathLike[str],
    cache: KVCache,
    vocab_size: int,
    facts: Mapping[str, Any],
    applied: Applied = NOTHING,
) -> tuple[Sequence, Logits | None, dict[str, Any]]:
    """The sequence that `save` wrote, its logits and its header.

    Raises FormatError for a file that is cut, damaged, none of these, or of other `facts`, which it names;
    NotFoundError, ReadError; MemoryLimitError where there are too few pages.
    """
    with FileReader(path) as file:
        start = file.read_at(0, min(file.size, len(MAGIC) + 8))
        if start[: len(MAGIC)] != MAGIC or len(start) < len(MAGIC) + 8:
            raise FormatError(f"{path}: not a session that tinyllm saved")
        n_words = int.from_bytes(start[len(MAGIC) :], "little")
        if n_words > min(MAX_HEADER, file.size):
            raise FormatError(f"{path}: cut or damaged: its header says {n_words} bytes")
        _check_hash(file)
        header = parse_json(file.read_at(len(start), n_words), str(path))
        tokens, present, n_logits = _checked(header, path, cache, vocab_size, facts)
        offset = len(start) + n_words
        n_pages, page_bytes = sum(map(sum, present)), cache.pool.page_bytes
        n_state = cache.slots.pool.slot_bytes if cache.slots is not None and tokens else 0
        if file.size != offset + 4 * n_logits + n_pages * page_bytes + n_state + DIGEST:
            raise FormatError(f"{path}: cut or damaged: it has {file.size} bytes")
        logits = np.frombuffer(file.read_at(offset, 4 * n_logits), "<f4").copy() if n_logits else None
        offset += 4 * n_logits

        def contents() -> Iterator[npt.NDArray[np.uint8]]:
            for i in range(n_pages):
                yield np.frombuffer(file.read_at(offset + i * page_bytes, page_bytes), np.uint8)

        at = offset + n_pages * page_bytes
        state = np.frombuffer(file.read_at(at, n_state), np.uint8) if n_state else None
        with cache.lock:
            cache.collect()
            return cache.restore(tokens, present, contents(), applied, state), logits, header


def _check_hash(file: FileReader) -> None:
    hashed, end, step = blake2b(digest_size=DIGEST), file.size - DIGEST, 1 << 24
    for offset in range(0, max(end, 0), step):
        hashed.update(file.read_at(offset, min(step, end - offset)))
    if end < 0 or file.read_at(end, DIGEST) != hashed.digest():
        raise FormatError(f"{file.path}: cut or damaged: the hash at its end is another; save it again")


def _checked(
    header: Any, path: str | os.PathLike[str], cache: KVCache, vocab_size: int, facts: Mapping[str, Any]
) -> tuple[list[int], list[list[int]], int]:
    """(tokens, which pages there are, how many logits) of a header; they come from a file."""
    table = header if isinstance(header, dict) else {}
    expected = {**facts, "page_bytes": cache.pool.page_bytes}
    if cache.slots is not None and table.get("tokens"):
        expected["state_bytes"] = cache.slots.pool.slot_bytes
    for name, value in expected.items():
        if table.get(name) != value:
            raise FormatError(
                f"{path}: was saved with another {name.replace('_', ' ')}: {table.get(name)!s:.100}, here it "
                f"is {value!s:.100}"
            )
    tokens, present, n_logits = table.get("tokens"), table.get("pages"), table.get("logits")
    n_pages = -(-len(tokens) // PAGE) if isinstance(tokens, list) else -1
    good = (
        isinstance(tokens, list)
        and all(type(token) is int and 0 <= token < vocab_size for token in tokens)
        and isinstance(present, list)
        and len(present) == len(cache.windows)
        and all(isinstance(row, list) and len(row) == n_pages for row in present)
        and all(there in (0, 1) and type(there) is int for row in present for there in row)
        and n_logits in (0, vocab_size)
        and type(table.get("seed")) is int
        and 0 <= table["seed"] < 1 << 64
        and type(table.get("n_forks")) is int
        and table["n_forks"] >= 0
    )
    if not good or not isinstance(tokens, list) or not isinstance(present, list):
        raise FormatError(f"{path}: damaged: its tokens and pages do not fit together")
    return tokens, present, int(n_logits or 0)
