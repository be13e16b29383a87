"""Makes docs/quantization.md and its plot: every weight format measured on the bundled model.

    python benchmarks/quantization.py measure --text held-out.txt --large 1b-q4_0.gguf 1b-q8_0.gguf
    python benchmarks/quantization.py page benchmarks/results/DATE-quantization.json

`measure` quantizes benchmarks/stories-f16.gguf to every format while loading and keeps what it finds in
benchmarks/results/: size, error of the weights, quality on the text, speed. --large adds size, memory and
speed of other files, such as those of synthetic.py, --peers what kl_peers.py found of the same weights.
`page` writes the page from such a file and quantization.template.md, and types no number itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kl_peers
import numpy as np

import tinyllm
from tinyllm import _core
from tinyllm.cli.common import percent, progress_line, read_text, seconds, size, table
from tinyllm.cli.plot import draw
from tinyllm.errors import Error
from tinyllm.files import GGUF_FORMATS
from tinyllm.measure import benchmark, compare
from tinyllm.modelfiles import read_model
from tinyllm.quantization.mixes import MIXES, NEED_IMATRIX

ROOT = Path(__file__).resolve().parents[1]
MASTER = ROOT / "benchmarks" / "stories-f16.gguf"
TEMPLATE = Path(__file__).with_name("quantization.template.md")
PAGE, PLOT = ROOT / "docs" / "quantization.md", ROOT / "docs" / "quantization.png"

LARGE = """
Random weights in the shape of Llama-3.2-1B (`benchmarks/synthetic.py`), where memory is the limit; such a
model has no quality to measure. *% of read*: what decoding reads, of the memory's bandwidth
([roofline.md](roofline.md)).

"""
PEERS = """
### Beside llama.cpp

The master with every matrix in the one format, in both engines, on the same tokens, against the master run
by tinyllm with a float32 cache. KL is the weights' own error and what an engine adds to it. *difference*:
the mean over the tokens of tinyllm's KL minus llama.cpp's, ± standard error.

"""

# What a block of weights holds. Numbers of bytes and weights come from the formats' own table.
WHAT = {
    "f32": "float32",
    "f16": "float16: 11 significant bits, range 6e-8 to 65504",
    "bf16": "bfloat16: the upper half of a float32: 8 significant bits, its whole range",
    "q8_0": "8-bit integers and one float16 scale",
    "q6_k": "6-bit integers; each 16 have an 8-bit scale, the block a float16 one",
    "q5_1": "5-bit integers, a float16 scale and a float16 minimum",
    "q5_0": "5-bit integers around zero and a float16 scale",
    "q5_k": "5-bit integers; each 32 have a 6-bit scale and minimum, the block a float16 scale of each",
    "q4_1": "4-bit integers, a float16 scale and a float16 minimum",
    "q4_0": "4-bit integers around zero and a float16 scale",
    "q4_k": "4-bit integers; each 32 have a 6-bit scale and minimum, the block a float16 scale of each",
    "iq4_nl": "4-bit codes for 16 uneven levels, denser near zero, and a float16 scale",
    "iq4_xs": "the same 16 levels; each 32 have a 6-bit scale, the block a float16 one",
    "mxfp4": "4-bit floats (0, 0.5, 1, 1.5, 2, 3, 4, 6, of either sign) and a power of two as their scale",
    "q3_k": "3-bit integers; each 16 have a 6-bit scale, the block a float16 one",
    "q2_k": "2-bit integers; each 16 have a 4-bit scale and minimum, the block a float16 scale of each",
    "nvfp4": "4-bit floats as mxfp4's; each 16 have an 8-bit float as their scale",
    "iq3_s": "places in a code book of 512 fours, signs; each 32 have a 4-bit scale, the block a float16 one",
    "iq3_xxs": "places in one of 256, 7 of 8 signs; each 32 have a 4-bit scale, the block a float16 one",
    "iq2_s": "places in one of 1024 eights, signs; each 16 have a 4-bit scale, the block a float16 one",
    "iq2_xs": "places in one of 512, 7 of 8 signs; each 16 have a 4-bit scale, the block a float16 one",
    "iq2_xxs": "places in one of 256, 7 of 8 signs; each 32 have a 4-bit scale, the block a float16 one",
    "iq1_m": "places in one of 2048 eights of -1, 0, 1; each 8 an eighth more or less; each 16 a scale",
    "iq1_s": "the same, an eighth more or less each 32, which have a 3-bit scale, the block a float16 one",
    "q2_0": "-1, 0, 1 or 2, and a float16 scale",
    "tq2_0": "-1, 0 or 1 (in 2 bits), and a float16 scale",
    "tq1_0": "-1, 0 or 1 (5 in a byte), and a float16 scale",
    "q1_0": "signs, and a float16 scale",
}


# Measuring


def measure(args: argparse.Namespace) -> dict[str, Any]:
    text = read_text(args.text)
    with progress_line() as progress, TemporaryDirectory() as folder:
        # What needs importance cannot be quantized while loading: these are files.
        files = {
            type: Path(folder) / f"{type}.gguf"
            for type in args.types
            if type == "iq3_xs" or MIXES[type].base in NEED_IMATRIX
        }
        for type, path in files.items():
            tinyllm.quantize(MASTER, path, type, imatrix=args.imatrix)
        of = compare.candidates([str(MASTER)], [type for type in args.types if type not in files])
        of += [compare.Candidate(str(path)) for path in files.values()]
        cases = benchmark.cases(n_prompt=[512], n_gen=[128])
        options: dict[str, Any] = {"repetitions": args.repetitions, "progress": progress}
        rows = compare.compare(of, cases, text, most_windows=args.chunks, **options)
        large = (
            compare.compare([compare.Candidate(f) for f in args.large], cases, **options)
            if args.large
            else []
        )
        records = [trimmed(row.record()) | {"weight_error": weight_error(row.candidate)} for row in rows]
        for record in records:
            stem = Path(record["path"]).stem
            record["weights"] = stem if stem in files else record["weights"]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "text": Path(args.text).name,
        "rows": records,
        "large": [trimmed(row.record()) for row in large],
        "peers": [] if args.peers is None else json.loads(read_text(args.peers)),
    }


OF_SPEED = (
    "cpu_info", "isa", "n_threads", "type_k", "version", "test", "median_ts", "min_ts", "max_ts", "gmac_s",
    "percent_of_peak", "gb_s", "percent_of_read", "read_gb_s", "samples_ts", "file_hash",
)  # fmt: skip


def trimmed(record: dict[str, Any]) -> dict[str, Any]:
    """A record of compare.Row without what the page does not say, and without folders."""
    speed = {case: {key: record[case][key] for key in OF_SPEED} for case in ("prefill", "decode")}
    return record | speed | {"path": Path(record["path"]).name}


def weight_error(of: compare.Candidate) -> float:
    """sqrt(sum (w - q)^2 / sum w^2) over all matrices of the master: weights w, quantized to q."""
    error = total = 0.0
    weights = read_model(MASTER).weights
    with tinyllm.load(of.path, weights=of.weights) as quantized, tinyllm.load(MASTER) as master:
        for (name, layer), tensor in weights.items():
            if len(tensor.shape) == 2:
                w = master.model.unpack(name, layer).astype(np.float64)
                error += float(((quantized.model.unpack(name, layer) - w) ** 2).sum())
                total += float((w**2).sum())
    return math.sqrt(error / total)


# The page


def page(found: dict[str, Any]) -> str:
    rows = found["rows"]
    n_tokens = rows[0]["quality"]["n_tokens"]
    decode = rows[0]["decode"]
    return TEMPLATE.read_text(encoding="utf-8").format(
        formats=format_table(),
        quality=quality_table(rows),
        unmeasured=unmeasured(rows),
        n_tokens=f"{n_tokens:,}",
        text=found["text"],
        machine=f"{decode['cpu_info']}, {decode['isa']}, {decode['n_threads']} threads",
        version=decode["version"],
        date=found["date"][:10],
        repetitions=len(decode["samples_ts"]),
        speed=speed_table(rows),
        large=LARGE + speed_table(found["large"]) + "\n" if found["large"] else "",
        peers=PEERS + kl_peers.table(sorted(found["peers"], key=_kl)) + "\n" if found["peers"] else "",
    )


def _kl(row: dict[str, Any]) -> float:
    return float(row["tinyllm"]["divergence"]["kl"]["value"])


def format_table() -> str:
    by_bits = sorted(GGUF_FORMATS.values(), key=lambda f: -f.block_bytes / f.block)
    panel_bytes = {id: n for id, *_, n in _core.formats()}  # of 16 rows' blocks
    in_memory = {f.name: 8 * panel_bytes[id] / (16 * f.block) for id, f in GGUF_FORMATS.items()}
    rows = [
        [
            f"`{f.name.lower()}`",
            str(f.block),
            str(f.block_bytes),
            f"{8 * f.block_bytes / f.block:g}",
            f"{in_memory[f.name]:.4g}",
            WHAT[f.name.lower()],
        ]
        for f in by_bits
    ]
    return table(
        ["format", "weights a block", "bytes", "bits a weight", "in memory", "a block holds"],
        rows,
        ("format", "a block holds"),
    )


def unmeasured(rows: Sequence[dict[str, Any]]) -> str:
    """The mixes that came after the measurement, in a sentence."""
    left = [f"`{type}`" for type in MIXES if type not in {"f32", "f16", *(row["weights"] for row in rows)}]
    return f"\nNot yet measured: {', '.join(left)}.\n" if left else ""


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "weights",
        "size",
        "bits a weight",
        "error of weights",
        "perplexity",
        "KL, 1e-3 nats",
        "99 %",
        "same top",
    ]
    lines = []
    for row in sorted(rows, key=lambda r: -r["size_bytes"]):
        divergence, perplexity = row["quality"]["divergence"], row["perplexity"]
        line = [
            f"`{row['weights'] or 'f16'}`" + ("" if row["weights"] else " (the master)"),
            size(row["size_bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{100 * row['weight_error']:.3g} %",
            f"{perplexity['value']:.3f}",
        ]
        if divergence is None:
            line += ["", "", ""]
        else:
            kl, same = divergence["kl"], divergence["same_top"]
            line += [
                f"{1e3 * kl['value']:.3f} ± {1e3 * kl['error']:.3f}",
                f"{1e3 * divergence['kl_99']:.1f}",
                f"{100 * same['value']:.2f} %",
            ]
        lines.append(line)
    return table(header, lines, ("weights",))


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "weights",
        "size",
        "load",
        "peak memory",
        "prefill t/s",
        "GMAC/s",
        "% of peak",
        "decode t/s",
        "least-most",
        "% of read",
    ]
    lines = [
        [
            f"`{row['weights'] or (row['model'] if row['quality'] is None else 'f16')}`",
            size(row["size_bytes"]),
            seconds(row["load_s"]),
            size(row["peak_memory_bytes"]),
            f"{row['prefill']['median_ts']:.0f}",
            f"{row['prefill']['gmac_s']:.0f}",
            percent(row["prefill"].get("percent_of_peak")),  # runs before it was measured lack it
            f"{row['decode']['median_ts']:.1f}",
            f"{row['decode']['min_ts']:.1f}-{row['decode']['max_ts']:.1f}",
            f"{row['decode']['percent_of_read']:.0f}",
        ]
        for row in sorted(rows, key=lambda r: -r["size_bytes"])
    ]
    return table(header, lines, ("weights",))


# The command


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quantization.py", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_measure = commands.add_parser("measure", help="measure, and keep the results")
    add = of_measure.add_argument
    add("--text", required=True, metavar="FILE", help="a UTF-8 text that the model was not trained on")
    add("--chunks", type=int, metavar="N", help="only the first N windows")
    add(
        "--types",
        type=lambda t: t.split(","),
        metavar="T,...",
        default=[t for t in MIXES if t not in ("f32", "f16")],
    )
    add("--imatrix", metavar="FILE", help="of the master, for the types that need one")
    add("--large", nargs="*", default=[], metavar="FILE", help="measure speed of these too")
    add("--peers", metavar="PEERS.json", help="what kl_peers.py printed with -o json")
    add("-r", "--repetitions", type=int, default=5, metavar="N")
    add("--out", type=Path, metavar="FILE.json", help="(benchmarks/results/DATE-quantization.json)")
    of_page = commands.add_parser("page", help="write docs/quantization.md and its plot from results")
    of_page.add_argument("results", type=Path, metavar="RESULTS.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if args.command == "measure":
            found = measure(args)
            name = f"{found['date'][:10]}-quantization.json"
            out = args.out or ROOT / "benchmarks" / "results" / name
            out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"quantization.py: kept in {out}", file=sys.stderr)
            return 0
        found = json.loads(args.results.read_text(encoding="utf-8"))
        PAGE.write_text(page(found), encoding="utf-8")
        draw(found["rows"], str(PLOT))
    except Error as error:
        print(f"quantization.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
