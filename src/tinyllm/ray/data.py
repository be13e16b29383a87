"""Many prompts: a Dataset of rows in, the same rows with their answers out.

Invariant: an answer depends on the model, the seed and its own row, whose key is its "id", or a hash of what
it says: not on the block it came in, the number of workers, or how often it was tried. A bad row's error is
in its column; Ray sees none. Imports `batch` and cluster.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import tinyllm
from tinyllm.batch import Job, Rows, Totals, run_file
from tinyllm.batch.rows import AT_ONCE
from tinyllm.errors import ArgumentError, UnsupportedError, integer
from tinyllm.ray.cluster import connection, ray_module, spare_cpus

BATCHES = 4  # times `at_once` rows, that a worker gets at a time: its engine is full while they last

# The columns of results, by their type in Arrow: the same in every block, whatever rows say.
_COLUMNS = {
    "text": "string",
    "tokens": "list<int32>",
    "prompt_tokens": "int64",
    "finish_reason": "string",
    "seed": "uint64",
    "logprobs": "list<double>",
    "reasoning": "string",
    "tool_calls": "json",
    "parsed": "json",
    "error": "string",
}


class Generator:
    """For `Dataset.map_batches(Generator, batch_format="pyarrow", fn_constructor_kwargs=...)`, which
    `generate` calls: one engine, and rows of a block together in it.

    model: what `tinyllm.load` takes, as a worker sees it; load: its further arguments. The rest is
    `generate`'s.
    """

    def __init__(
        self,
        model: str,
        *,
        seed: int = 0,
        at_once: int = AT_ONCE,
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
        load: Mapping[str, Any] | None = None,
    ) -> None:
        llm = tinyllm.load(model, **(load or {}))
        self._rows = Rows(llm, seed=seed, at_once=at_once, options=options, name=name)

    def __call__(self, table: Any) -> Any:
        """A block, a pyarrow.Table, with the columns of `generate` beside its own."""
        import pyarrow

        rows = [{k: _without_none(v) for k, v in row.items()} for row in table.to_pylist()]
        keys = [_key(row) for row in rows]
        found: dict[int, dict[str, Any]] = {}
        # Answers come in any order, and two rows may have one key: numbers bring them back.
        for number, result in self._numbered(keys, rows):
            found[number] = result
        for column, kind in _COLUMNS.items():
            values = [found[i].get(column) for i in range(len(rows))]
            if kind == "json":
                values = [
                    None if v is None else json.dumps(v, ensure_ascii=False, default=repr) for v in values
                ]
            array = pyarrow.array(values, _arrow(pyarrow, kind))
            if column in table.column_names:
                table = table.drop_columns([column])
            table = table.append_column(column, array)
        return table

    def _numbered(self, keys: list[str], rows: list[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        of_key: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            of_key.setdefault(key, []).append(number)
        firsts = ((key, rows[numbers[0]]) for key, numbers in of_key.items())
        same = all(rows[n] == rows[numbers[0]] for numbers in of_key.values() for n in numbers)
        if same:  # one answer serves all rows that say the same
            for result in self._rows.results(firsts):
                yield from ((number, result) for number in of_key[result["id"]])
            return
        for number, (key, row) in enumerate(zip(keys, rows, strict=True)):
            yield number, next(self._rows.results([(key, row)]))


class _Lines:
    """The same for rows of a file: (key, row as JSON) in, (result as JSON) out."""

    def __init__(self, **settings: Any) -> None:
        self._rows = Generator(**settings)._rows

    def __call__(self, table: Any) -> Any:
        import pyarrow

        pairs = [(row["key"], json.loads(row["row"])) for row in table.to_pylist()]
        made = [json.dumps(result, ensure_ascii=False, default=repr) for result in self._rows.results(pairs)]
        return pyarrow.table({"result": pyarrow.array(made, pyarrow.string())})


class _Identity:
    """What a worker's model is, for the file beside an output."""

    def __call__(self, model: str, load: Mapping[str, Any]) -> dict[str, str]:
        with tinyllm.load(model, **load) as llm:
            return llm.identity


def generate(
    dataset: Any,
    model: str | os.PathLike[str],
    *,
    workers: int = 1,
    seed: int = 0,
    at_once: int = AT_ONCE,
    options: Mapping[str, Any] | None = None,
    cpus: float | None = None,
    gpus: float = 0,
    **load: Any,
) -> Any:
    """Answers every row of a ray.data.Dataset; lazily, as Datasets are.

    dataset: rows with "prompt" (a text or ids) or "messages", and options of sampling as further columns,
    empty (None) where they do not apply; "id" is a row's key, from which its seed is made. model: what
    `tinyllm.load` takes, as the workers see it, and in **load its further arguments. workers: processes with
    the model, best one a node. seed, options: for all rows that say nothing else. at_once: rows that a worker
    computes together. cpus: what a worker asks of Ray; None: all of a node's but one. gpus: likewise.

    Returns a Dataset with the columns text, tokens, prompt_tokens, finish_reason, seed, logprobs, reasoning,
    tool_calls and parsed (as JSON), and error: what was wrong with a row, else None. Raises ArgumentError,
    and UnsupportedError where Ray is missing; what a worker raises while it loads comes when the Dataset is
    read.
    """
    ray_module()
    settings = {
        "model": _model(model),
        "seed": seed,
        "at_once": at_once,
        "options": dict(options or {}),
        "load": load,
    }
    return _mapped(dataset, Generator, settings, workers, at_once, cpus, gpus)


def generate_file(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    address: str | None = None,
    workers: int = 1,
    seed: int = 0,
    at_once: int = AT_ONCE,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    cpus: float | None = None,
    gpus: float = 0,
    load: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Totals:
    """`batch.run_file` on a cluster: this process reads and writes the files, workers answer rows. address:
    as of `ray.init`; "local" or None: a cluster of this machine alone. The rest is as of `generate`; raises
    what both do."""
    path, settings = _model(model), dict(load or {})
    options = dict(options or {})
    with connection(address) as ray:
        if cpus is None:
            cpus = spare_cpus()
        identity = ray.remote(num_cpus=cpus, num_gpus=gpus)(_identity)
        try:
            facts = ray.get(identity.remote(path, settings))
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        job = Job(facts, seed, options)
        given = {
            "model": path,
            "seed": seed,
            "at_once": at_once,
            "options": options,
            "name": name,
            "load": settings,
        }
        answered = partial(_answered, ray, given, workers, at_once, cpus, gpus)
        return run_file(answered, source, target, job, progress=progress)


def _identity(model: str, load: Mapping[str, Any]) -> dict[str, str]:
    return _Identity()(model, load)


def _answered(
    ray: Any,
    settings: dict[str, Any],
    workers: int,
    at_once: int,
    cpus: float,
    gpus: float,
    rows: Iterable[tuple[str, Any]],
) -> Iterator[dict[str, Any]]:
    items = [{"key": key, "row": json.dumps(row)} for key, row in rows]
    if not items:
        return
    dataset = ray.data.from_items(items, override_num_blocks=max(1, len(items) // (BATCHES * at_once)))
    results = _mapped(dataset, _Lines, settings, workers, at_once, cpus, gpus)
    for row in results.iter_rows():
        yield json.loads(row["result"])


def _mapped(
    dataset: Any,
    worker: type,
    settings: dict[str, Any],
    workers: int,
    at_once: int,
    cpus: float | None,
    gpus: float,
) -> Any:
    ray = ray_module()
    workers = integer("workers", workers, 1, 1 << 20)
    if cpus is None:
        cpus = spare_cpus() if ray.is_initialized() else 1
    return dataset.map_batches(
        worker,
        batch_format="pyarrow",
        batch_size=BATCHES * at_once,
        fn_constructor_kwargs=settings,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
        scheduling_strategy="SPREAD",
    )


def _model(model: str | os.PathLike[str]) -> str:
    """As workers, whose current folder is another, find it."""
    path = os.fspath(model)
    return os.path.abspath(path) if os.path.exists(path) else path


def _cause(error: Any) -> Exception:
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, tinyllm.Error) else UnsupportedError(f"a worker failed: {error}")


def _key(row: Mapping[str, Any]) -> str:
    id = row.get("id")
    if id is not None:
        return str(id)
    text = json.dumps(row, ensure_ascii=False, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _without_none(value: Any) -> Any:
    """Arrow gives every object the members of all: those that one lacks are None."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None or k == "content"}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value


def _arrow(pyarrow: Any, kind: str) -> Any:
    kinds = {
        "string": pyarrow.string(),
        "json": pyarrow.string(),
        "int64": pyarrow.int64(),
        "uint64": pyarrow.uint64(),
        "list<int32>": pyarrow.list_(pyarrow.int32()),
        "list<double>": pyarrow.list_(pyarrow.float64()),
    }
    if kind not in kinds:
        raise ArgumentError(f"no column is {kind}")
    return kinds[kind]
