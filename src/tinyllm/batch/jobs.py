"""Files of rows: read, checked, answered, and gone on with where an earlier run ended.

Invariant: every line of the output is whole, and of the job that JOB beside it describes; a line that a kill
cut is taken away before the next is written, so that no row is there twice and none is lost. Imports
`errors`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyllm.errors import ArgumentError, FormatError, NotFoundError, ReadError, WriteError

SUFFIX = ".job"  # of the file beside the output that says what it is the output of
MOST_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Job:
    """What an output depends on beside its rows: the model by what it is, the seed, the options."""

    model: dict[str, Any]
    seed: int
    options: dict[str, Any]

    def text(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True, default=repr)


@dataclass
class Totals:
    """Rows: in the input, those that an earlier run had done, those done now, and failed among these."""

    rows: int = 0
    before: int = 0
    done: int = 0
    failed: int = 0


Answered = Callable[[Iterable[tuple[str, Any]]], Iterator[dict[str, Any]]]


def run_file(
    answered: Answered,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    job: Job,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Totals:
    """Answers the rows of a JSONL file into another, each line as its row is done.

    answered: from pairs of a key and a row to their results, in any order, such as `Rows.results`. What
    `target` has is kept, and not computed again. Raises NotFoundError, ReadError, FormatError (two rows with
    one key, a target that is no output), ArgumentError for a target that another job began, WriteError,
    LostError.
    """
    source, target = Path(source), Path(target)
    totals, keys = Totals(), set[str]()
    for number, key, _ in _lines(source):
        if key in keys:
            raise FormatError(
                f"{source}: line {number}: the key {key!r} was there before; keys are of one row"
            )
        keys.add(key)
    totals.rows = len(keys)
    try:
        done = _begun(target, job)
        totals.before = len(done & keys)
        if strange := done - keys:
            raise ArgumentError(
                f"{target} has results of rows that {source} does not have, such as {min(strange)!r}: name "
                "another file"
            )
        with open(target, "ab") as file:
            left = ((key, row) for _, key, row in _lines(source) if key not in done)
            for result in answered(left):
                line = json.dumps(result, ensure_ascii=False, default=repr)
                file.write(line.encode("utf-8", "replace") + b"\n")
                file.flush()  # what a killed process has handed over stays
                totals.done += 1
                totals.failed += is_failed(result)
                if progress is not None:
                    progress(totals.before + totals.done, totals.rows)
            os.fsync(file.fileno())
    except OSError as error:
        if isinstance(error, (NotFoundError, ReadError)):
            raise
        raise WriteError(f"{target}: cannot be written: {error.strerror}") from None
    return totals


def is_failed(result: dict[str, Any]) -> bool:
    """Whether a result says what was wrong with its row."""
    response = result.get("response")
    return bool(result["error"]) or (response is not None and response["status_code"] >= 400)


def _lines(source: Path) -> Iterator[tuple[int, str, Any]]:
    """(number, key, row) of each line that is not empty. The key of a row that has none is its line's number;
    a line that is no JSON is a row, too, which then says so."""
    try:
        with open(source, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), 1):
                if len(line) > MOST_LINE_BYTES:
                    raise FormatError(f"{source}: line {number} is longer than {MOST_LINE_BYTES} bytes")
                if line.strip():
                    yield (number, *_row(number, line))
    except FileNotFoundError:
        raise NotFoundError(f"{source}: no such file") from None
    except OSError as error:
        raise ReadError(f"{source}: cannot be read: {error.strerror}") from None


def _row(number: int, line: bytes) -> tuple[str, Any]:
    usual = f"line-{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return usual, "a line that is no JSON"
    key = (row.get("custom_id") or row.get("id")) if isinstance(row, dict) else None
    return (usual, row) if key is None else (str(key), row)


def _begun(target: Path, job: Job) -> set[str]:
    """The keys that `target` has whole results of; a line that was cut is taken away."""
    beside = target.with_name(target.name + SUFFIX)
    if not target.exists() or target.stat().st_size == 0:
        beside.write_text(job.text() + "\n", encoding="utf-8")
        target.touch()
        return set()
    if not beside.exists():
        raise ArgumentError(
            f"{target} is there, and no {beside.name} beside it says of what: name another file"
        )
    if (before := beside.read_text(encoding="utf-8").strip()) != job.text():
        raise ArgumentError(
            f"{target} was begun by another job: {before} then, {job.text()} now. Name another file, or "
            f"remove it and {beside.name}"
        )
    keys, whole = set[str](), 0
    with open(target, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                result = json.loads(line)
                keys.add(str(result["custom_id"] if "custom_id" in result else result["id"]))
            except (ValueError, KeyError, TypeError):
                raise FormatError(f"{target}: byte {whole}: no result of a batch") from None
            whole += len(line)
        file.truncate(whole)
    return keys
