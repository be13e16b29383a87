"""tinyllm compare, also tinyllm-bench compare: size, memory, speed and quality of several models, side by
side.

The table goes to stdout, progress to stderr, on a terminal. Imports common.py, and once
the options make sense tinyllm.measure.compare, which measures, and plot.py, which draws.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from tinyllm.cli import prefix
from tinyllm.cli.common import (
    EXIT_CODES,
    EXIT_OK,
    Parser,
    UsageError,
    add_model_argument,
    decimals,
    json_text,
    machine,
    percent,
    positive,
    progress_line,
    put,
    put_csv,
    read_text,
    run_command,
    seconds,
    size,
    table,
)

PROG = f"{prefix}compare" if prefix.endswith(" ") else "tinyllm-bench compare"

DESCRIPTION = """Which quantization should I use? One table for several models, or for one float model and
quantizations of it made on the way (--types): size, bits a weight, load time, peak memory, speed and, with
--text, quality. The models take turns, so that what else the machine does meets them alike.

Quality is measured against the largest model, of quantizations of one model the float one, on a text that
no model was trained on: perplexity (lower is better), KL divergence from its probabilities (0: none) and how
often both find the same token likeliest. tinyllm-perplexity --help says more."""

EPILOG = f"""examples:
  {PROG} model-f16.gguf --types q8_0,q4_0 --text wiki.test.raw
  {PROG} f16.gguf q5_k_m.gguf q4_k_m.gguf --text text.txt --plot out.png
  {PROG} 1b-q8_0.gguf 1b-q4_0.gguf -o csv          size, memory and speed only

columns:
  bits/weight  of the whole file: norms and what stays float included
  load         seconds, quantizing included for --types
  prefill      reading a prompt: tokens a second (median), 1e9 multiply-adds a second, and % of what the
               processor multiplies when it does nothing else (docs/roofline.md)
  decode       writing an answer: tokens a second (median), and % of the read bandwidth (docs/roofline.md)
  KL           mean Kullback-Leibler divergence from the reference, in 1e-3 nats a token, ± standard error;
               99 %: of 99 % of the tokens it is less

{EXIT_CODES}"""

KL = "KL, 1e-3 nats"
LEFT = ("model", "weights")


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, run, argv)


def run(argv: list[str]) -> int:
    """What `tinyllm compare` and `tinyllm-bench compare` do with their arguments."""
    args = _parser().parse_intermixed_args(argv)
    if args.text is None and args.plot is not None:
        raise UsageError("--plot draws quality, which is measured on a text: give --text")
    text = None if args.text is None else read_text(args.text)
    from tinyllm.cli import plot
    from tinyllm.measure import benchmark, compare

    if args.plot is not None:
        plot.require(args.plot)
    of = compare.candidates(args.models, args.types)
    cases = benchmark.cases(
        n_prompt=[args.n_prompt],
        n_gen=[args.n_gen],
        threads=None if args.threads is None else [args.threads],
        cache_type=[args.cache_type],
    )
    with progress_line() as progress:
        rows = compare.compare(
            of,
            cases,
            text,
            n_ctx=args.context,
            most_windows=args.chunks,
            repetitions=args.repetitions,
            read_bytes=None if args.buffer is None else args.buffer * 1_048_576,
            device=args.device,
            progress=progress,
        )
    records = [row.record() for row in rows]
    try:
        WRITERS[args.output](records)
        sys.stdout.flush()
    finally:  # that one of them cannot be written does not lose the other
        if args.plot is not None:
            plot.draw(records, args.plot)
    return EXIT_OK


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL... [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser, "models", "+")
    parser.add_argument(
        "--types",
        type=lambda text: text.split(","),
        default=[],
        metavar="T,...",
        help="quantize one float model to each of these while loading (tinyllm-quantize --help lists them)",
    )
    quality = parser.add_argument_group("quality")
    quality.add_argument("--text", metavar="FILE", help="a UTF-8 text to measure quality on; - for a pipe")
    quality.add_argument("-c", "--context", type=positive, metavar="N", help="tokens of a window (512)")
    quality.add_argument("--chunks", type=positive, metavar="N", help="only the first N windows of the text")
    speed = parser.add_argument_group("speed")
    speed.add_argument("-p", "--n-prompt", type=positive, default=512, metavar="N", help="of a prompt (512)")
    speed.add_argument("-n", "--n-gen", type=positive, default=128, metavar="N", help="to decode (128)")
    speed.add_argument("-r", "--repetitions", type=positive, default=5, metavar="N", help="of each (5)")
    speed.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (auto)")
    speed.add_argument("-t", "--threads", type=positive, metavar="N", help="threads (the physical cores)")
    speed.add_argument("--cache-type", default="f16", metavar="T", help="f16, f32 or q8_0 (f16)")
    speed.add_argument(
        "--buffer", type=positive, metavar="MB", help="memory that a sample of the read bandwidth reads"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--plot", metavar="OUT.png", help="draw size and speed against quality (matplotlib)")
    output.add_argument(
        "-o", "--output", choices=tuple(WRITERS), default="md", metavar="FORMAT", help="md, csv or json (md)"
    )
    return parser


# Output


def cells(record: dict[str, Any]) -> dict[str, str]:
    """A record of `compare.Row` as a line of the table."""
    prefill, decode, quality = record["prefill"], record["decode"], record["quality"]
    row = {
        "model": record["model"] + (" (reference)" if record["is_reference"] and quality else ""),
        "weights": record["kind"].split()[-1],
        "size": size(record["size_bytes"]),
        "bits/weight": f"{record['bits_per_weight']:.2f}",
        "load": seconds(record["load_s"]),
        "peak memory": size(record["peak_memory_bytes"]),
        "prefill t/s": f"{prefill['median_ts']:.0f}",
        "GMAC/s": f"{prefill['gmac_s']:.0f}",
        "% of peak": percent(prefill["percent_of_peak"]),
        "decode t/s": f"{decode['median_ts']:.1f}",
        "% of read": f"{decode['percent_of_read']:.0f}",
    }
    if quality is None:
        return row
    perplexity, divergence = record["perplexity"], quality["divergence"]
    row["perplexity"] = f"{decimals(perplexity['value'], 3)} ± {decimals(perplexity['error'], 3)}"
    row[KL] = row["99 %"] = row["same top"] = ""
    if divergence is not None:
        kl, same = divergence["kl"], divergence["same_top"]
        row[KL] = f"{decimals(1e3 * kl['value'], 3)} ± {decimals(1e3 * kl['error'], 3)}"
        row["99 %"] = decimals(1e3 * divergence["kl_99"], 1)
        row["same top"] = f"{100 * same['value']:.2f} ± {100 * same['error']:.2f} %"
    return row


def _write_md(records: list[dict[str, Any]]) -> None:
    rows = [cells(record) for record in records]
    put(table(list(rows[0]), [list(row.values()) for row in rows], LEFT))
    prefill, decode = records[0]["prefill"], records[0]["decode"]
    reads = [r["decode"]["read_gb_s"] for r in records]
    put(
        f"\n{machine(decode)}, {decode['type_k']} cache, tinyllm {decode['version']}; {prefill['test']}, "
        f"{decode['test']}, medians of {len(decode['samples_ns'])}; read bandwidth {min(reads):.0f}-"
        f"{max(reads):.0f} GB/s."
    )
    if records[0]["quality"] is not None:
        put(f"Quality on {records[0]['quality']['n_tokens']} tokens.")


def _write_csv(records: list[dict[str, Any]]) -> None:
    rows = [dict(_flat(record)) for record in records]
    put_csv(rows, list(dict.fromkeys(name for row in rows for name in row)))


OF_SPEED = (
    "device",
    "test",
    "median_ts",
    "min_ts",
    "max_ts",
    "gmac_s",
    "percent_of_peak",
    "gb_s",
    "percent_of_read",
)


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(column, value) pairs: what is nested gets names with dots, what is None has no column."""
    for name, value in record.items():
        if name in ("prefill", "decode"):
            value = {key: value[key] for key in OF_SPEED}
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _write_json(records: list[dict[str, Any]]) -> None:
    put(json_text(records, indent=2))


WRITERS: dict[str, Callable[[list[dict[str, Any]]], None]] = {
    "md": _write_md,
    "csv": _write_csv,
    "json": _write_json,
}
