"""tinyllm-bench: how fast models run on this machine, and how close that is to its limit.

The figures go to stdout, as llama-bench's table or JSON; progress to stderr, on a terminal. Imports
common.py, and measure/benchmark.py, which measures, once the options make sense.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tinyllm.cli import prefix
from tinyllm.cli.common import (
    EXIT_CODES,
    EXIT_OK,
    Parser,
    UsageError,
    add_model_argument,
    json_text,
    machine,
    percent,
    positive,
    progress_line,
    put,
    put_csv,
    run_command,
    seconds,
    size,
    table,
)

PROG = f"{prefix}bench"

DESCRIPTION = f"""Measures prefill (pp, reading a prompt) and decoding (tg, writing an answer) in tokens a
second, as llama-bench does: without sampling, after a warm-up, the logits of a prompt's last token only.
Beside decoding stands what it reads from memory in GB/s, and what share that is of what the memory
delivers; beside a prompt what it multiplies, and what share that is of what the processor can
(docs/roofline.md).

Options with N,... take several values; every combination is measured. Several models take turns.

`compare` sets size, memory, speed and quality of several models, or of several quantizations of one, side by
side: {PROG} compare --help."""

EPILOG = f"""examples:
  {PROG} model.gguf                                512 tokens of prompt, 128 of answer
  {PROG} a.gguf b.gguf -d 0,4096 -b 1,8            two files in turns, at two depths, 1 and 8 texts at once
  {PROG} model.gguf -p 0 -t 1,2,4 -r 10 -o csv     how decoding grows with threads
  {PROG} compare f16.gguf --types q8_0,q4_0 --text wiki.test.raw

columns:
  t/s        tokens a second: mean ± standard deviation; --wide has the median too
  GB/s       weights and cache that decoding reads, summed from the model's real tensors
  % of read  that, of the read bandwidth measured before and after each repetition with the same threads
  read GB/s  with --wide, this bandwidth: median (least to most)
  GMAC/s     1e9 multiply-adds with weights a second, the figure that limits prefill
  % of peak  of a prompt, that of what the processor multiplies when it does nothing else, measured likewise

{EXIT_CODES}"""

NOT_IN_CSV = ("samples_ns", "samples_ts", "samples_read_gb_s")


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    if argv[:1] == ["compare"]:
        from tinyllm.cli import compare

        return compare.run(argv[1:])
    args = _parser().parse_intermixed_args(argv)
    if args.wide and args.output != "md":
        raise UsageError("--wide is for -o md; the others have every figure anyway")
    models = [*args.models, *args.more]
    if not models:
        raise UsageError("no MODEL given: a .gguf file, a directory, or stories")
    from tinyllm.measure import benchmark

    to_measure = benchmark.cases(
        n_prompt=args.n_prompt,
        n_gen=args.n_gen,
        n_depth=args.n_depth,
        n_sequences=args.batch,
        threads=args.threads,
        isa=args.isa,
        cache_type=args.cache_type,
    )
    with progress_line() as progress:
        results = benchmark.measure(
            models,
            to_measure,
            device=args.device,
            repetitions=args.repetitions,
            read_bytes=None if args.buffer is None else args.buffer * 1_048_576,
            progress=progress,
        )
    write = _write_wide if args.wide else WRITERS[args.output]
    write([result.record() for result in results])
    return EXIT_OK


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL... [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser, "models", "*")
    parser.add_argument("--model", dest="more", action="append", default=[], help=argparse.SUPPRESS)
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "-p",
        "--n-prompt",
        type=_counts,
        default=[512],
        metavar="N,...",
        help="tokens of prompt; 0: none (512)",
    )
    what.add_argument(
        "-n", "--n-gen", type=_counts, default=[128], metavar="N,...", help="tokens to decode; 0: none (128)"
    )
    what.add_argument(
        "-d", "--n-depth", type=_counts, default=[0], metavar="N,...", help="tokens in the cache before (0)"
    )
    what.add_argument(
        "-b",
        "--batch",
        type=_positives,
        default=[1],
        metavar="N,...",
        help="sequences that are decoded together (1)",
    )
    what.add_argument(
        "-r", "--repetitions", type=positive, default=5, metavar="N", help="of each measurement (5)"
    )
    how = parser.add_argument_group("how to run it")
    how.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    how.add_argument("-t", "--threads", type=_positives, metavar="N,...", help="threads (the physical cores)")
    how.add_argument(
        "--cache-type", type=_names, default=["f16"], metavar="T,...", help="f16, f32, q8_0 (f16)"
    )
    how.add_argument(
        "--isa", type=_names, metavar="NAME,...", help="instruction sets, such as avx2,avx512vnni (the best)"
    )
    how.add_argument(
        "--buffer",
        type=positive,
        metavar="MB",
        help="memory that a sample of the read bandwidth reads (1024, or 4 times the last-level caches)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", choices=tuple(WRITERS), default="md", metavar="FORMAT", help="md, csv or json (md)"
    )
    output.add_argument(
        "--wide", action="store_true", help="md: every row says it all, also what is the same in all of them"
    )
    return parser


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between")
    return [int(part) for part in parts]


def _positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


# Output


MOST_COLUMNS = 100
TEXT_COLUMNS = ("model", "cache", "isa", "test", "file", "machine")
FIGURES = ("test", "t/s", "GB/s", "% of read", "GMAC/s", "% of peak")
NAME_LENGTHS = (40, 24, 16, 12, 8)  # of a model at most: the first with which the table is narrow enough


def _write_md(records: list[dict[str, Any]]) -> None:
    """What differs as a table, below what is the same in all rows."""
    for line in _above(records):
        put("\n".join(textwrap.wrap(line, MOST_COLUMNS)))
    put()
    tables = (_narrow(records, length, FIGURES) for length in NAME_LENGTHS)
    last = (_narrow(records, NAME_LENGTHS[-1], FIGURES[:n]) for n in (4, 2))
    for text in chain(tables, last):
        if len(text.partition("\n")[0]) <= MOST_COLUMNS:
            break
    put(text)


def _above(records: list[dict[str, Any]]) -> Iterator[str]:
    """What is the same in all rows, and of each model what is the same in its rows."""
    first = records[0]
    places = "; ".join(dict.fromkeys(machine(record) for record in records))
    cache = f", {first['type_k']} cache" if len({record["type_k"] for record in records}) == 1 else ""
    yield f"{places}{cache}, tinyllm {first['version']}"
    reads = [record[key] for record in records for key in ("read_gb_s_min", "read_gb_s_max")]
    middle = statistics.median(record["read_gb_s"] for record in records)
    yield f"memory reads {middle:.1f} GB/s ({min(reads):.1f}-{max(reads):.1f})"
    for rows in _by_model(records):
        cells, peak = _cells(rows[0]), max(record["peak_memory_bytes"] for record in rows)
        yield (
            f"{cells['model']}, {cells['size']}, {cells['params']} parameters, {cells['file']}; "
            f"loaded in {cells['load']}, at most {size(peak)} of memory"
        )


def _by_model(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault((record["model_filename"], record["file_hash"]), []).append(record)
    return list(found.values())


def _narrow(records: list[dict[str, Any]], length: int, figures: Sequence[str]) -> str:
    """A table of these figures, and of what differs beside them. length: of a model's name at most."""
    differing = [
        (key, title)
        for key, title in (("type_k", "cache"), ("isa", "isa"), ("n_threads", "threads"))
        if len({record[key] for record in records}) > 1
    ]
    rows = []
    for record in records:
        name = Path(record["model_filename"]).name
        if len(name) > length:
            name = f"{name[: length // 3]}…{name[length // 3 + 1 - length :]}"
        digits = 2 if record["avg_ts"] < 100 else 1 if record["avg_ts"] < 1000 else 0
        cells = _cells(record) | {
            "model": name,
            "t/s": f"{record['avg_ts']:.{digits}f} ± {record['stddev_ts']:.{digits}f}",
            **{title: str(record[key]) for key, title in differing},
        }
        columns = [*["model"] * (len(_by_model(records)) > 1), *(title for _, title in differing), *figures]
        rows.append({title: cells[title] for title in columns})
    return table(list(rows[0]), [list(row.values()) for row in rows], TEXT_COLUMNS)


def _write_wide(records: list[dict[str, Any]]) -> None:
    """Rows that say it all."""
    rows = [_cells(record) for record in records]
    put(table(list(rows[0]), [list(row.values()) for row in rows], TEXT_COLUMNS))


def _cells(record: dict[str, Any]) -> dict[str, str]:
    decodes = record["n_gen"] > 0
    kind, _, digest = record["file_hash"].partition(":")
    return {
        "model": f"{Path(record['model_filename']).name}: {record['model_type']}",
        "size": size(record["model_size"]),
        "params": f"{record['model_n_params'] / 1e9:.3g} B",
        "cache": record["type_k"],
        "test": record["test"],
        "t/s": f"{record['avg_ts']:.2f} ± {record['stddev_ts']:.2f}",
        "median": f"{record['median_ts']:.2f}",
        "GB/s": f"{record['gb_s']:.2f}" if decodes else "",
        "% of read": f"{record['percent_of_read']:.0f}" if decodes else "",
        "read GB/s": "{read_gb_s:.1f} ({read_gb_s_min:.1f}-{read_gb_s_max:.1f})".format(**record),
        "GMAC/s": f"{record['gmac_s']:.1f}",
        "% of peak": percent(record["percent_of_peak"]),
        "load": seconds(record["load_s"]),
        "peak memory": size(record["peak_memory_bytes"]),
        "file": f"{kind}:{digest[:12]}",
        "machine": f"{machine(record)}, tinyllm {record['version']}",
    }


def _write_csv(records: list[dict[str, Any]]) -> None:
    put_csv(records, [name for name in records[0] if name not in NOT_IN_CSV])


def _write_json(records: list[dict[str, Any]]) -> None:
    put(json_text(records, indent=2))


WRITERS: dict[str, Callable[[list[dict[str, Any]]], None]] = {
    "md": _write_md,
    "csv": _write_csv,
    "json": _write_json,
}


if __name__ == "__main__":
    sys.exit(main())
