"""tinyllm-bench: how fast models run on this machine, and how close that is to its limit.

The figures go to stdout, as llama-bench's table or JSON; progress to stderr, on a terminal. Imports
common.py, and measure/benchmark.py, which measures, once the options make sense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllm.cli import prefix
from tinyllm.cli.common import (
    EXIT_CODES,
    EXIT_OK,
    Parser,
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
  t/s        tokens a second: mean ± standard deviation, and the median
  GB/s       weights and cache that decoding reads, summed from the model's real tensors
  % of read  that, of the read bandwidth measured before and after each repetition with the same threads
  read GB/s  this bandwidth: median (least to most)
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
            args.models,
            to_measure,
            device=args.device,
            repetitions=args.repetitions,
            read_bytes=None if args.buffer is None else args.buffer * 1_048_576,
            progress=progress,
        )
    WRITERS[args.output]([result.record() for result in results])
    return EXIT_OK


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL... [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser, "models", "+")
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


def _write_md(records: list[dict[str, Any]]) -> None:
    rows = [_cells(record) for record in records]
    put(table(list(rows[0]), [list(row.values()) for row in rows], TEXT_COLUMNS))


TEXT_COLUMNS = ("model", "cache", "test", "file", "machine")


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
