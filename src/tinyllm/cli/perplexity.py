"""tinyllm-perplexity: how well a model predicts a text, and how far it is from another model.

The figures go to stdout, a progress bar to stderr. Imports common.py, and once the options make
sense measure/quality.py, which measures.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.cli import prefix
from tinyllm.cli.common import (
    EXIT_CODES,
    EXIT_OK,
    Parser,
    UsageError,
    add_model_argument,
    add_model_options,
    decimals,
    json_text,
    load_model,
    out_file,
    positive,
    progress_bar,
    put,
    read_text,
    run_command,
    table,
)

if TYPE_CHECKING:
    from tinyllm import LLM
    from tinyllm.measure.quality import Estimate, Quality, Windows

PROG = f"{prefix}perplexity"

DESCRIPTION = """Measures how well a model predicts a text it has not seen. The perplexity is the number of
equally likely tokens that would leave one as uncertain as the model is: 1 is perfect. Perplexities compare
between models with the same tokens only. ± is the standard error.

The text is cut into windows as llama-perplexity cuts it: 512 tokens each, the second half of which is scored.

--against runs a second model in step, the float original for instance, and says what quantizing changed:
the Kullback-Leibler divergence from its probabilities (0: none), how the probability of the correct token
moved, and how often both find the same token likeliest."""

EPILOG = f"""examples:
  {PROG} model.gguf wiki.test.raw                        perplexity
  {PROG} model-q4.gguf wiki.test.raw --against model-f16.gguf
  {PROG} model-f16.gguf text.txt --weights q4_0 --against model-f16.gguf
  {PROG} model.gguf text.txt --stride 64                 every token after 448 others: 8 times the work
  {PROG} model-f16.gguf calibration.txt --imatrix imatrix.gguf
  {PROG} model.gguf text.txt --chunks 20                 the first 20 windows, for a quick look

{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    if args.against == "-" or args.model == "-":
        raise UsageError("a model is a file; only TEXT can be -")
    from tinyllm.files.outfiles import target_of

    where = None if args.imatrix is None else target_of(args.imatrix)
    text = read_text(args.text)
    from tinyllm.measure import quality
    from tinyllm.quantization import calibration

    with ExitStack() as stack:
        model = stack.enter_context(load_model(args.model, args))
        models = [model]
        if args.against is not None:
            reference = stack.enter_context(load_model(args.against, args, weights=None))
            quality.require_same_vocabulary(reference, model)
            models = [reference, model]
        on = quality.text_windows(models[0], text, args.context, stride=args.stride, most=args.chunks)
        seen = {} if where is None else calibration.observe(model)
        with progress_bar("perplexity") as progress:

            def after(done: int, total: int, nll: Any) -> None:
                calibration.require_sums(seen)  # a broken model is noticed at once
                progress(done, total, _so_far(nll))

            found = quality.measure(models, on, progress=after)
        if where is not None:
            n_windows, n_ctx = on.ids.shape
            names = [] if args.text == "-" else [Path(args.text).name]
            calibration.write(where, seen, texts=names, n_windows=n_windows, n_ctx=n_ctx)
        WRITERS[args.output](args, models, on, found)
    return EXIT_OK


def _so_far(nll: Any) -> str:
    from tinyllm.results import perplexity_of

    return "perplexity so far " + ", ".join(decimals(perplexity_of(x), 4) for x in reversed(nll))


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL TEXT [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser)
    parser.add_argument("text", metavar="TEXT", help="a UTF-8 file; - reads it from a pipe")
    how = parser.add_argument_group("what to measure")
    how.add_argument(
        "--against", metavar="MODEL", help="compare with this model, of the same vocabulary, token by token"
    )
    how.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="windows N tokens apart, of each the last N tokens scored (default: windows side by side, of "
        "each the second half)",
    )
    how.add_argument(
        "--imatrix",
        type=out_file,
        metavar="OUT.gguf",
        help="also keep how much each input of each matrix matters on this text, for better quantizing",
    )
    how.add_argument("--chunks", type=positive, metavar="N", help="only the first N windows")
    add_model_options(
        parser, context="tokens of a window (default: 512, or the model's context where that is less)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", choices=tuple(WRITERS), default="md", metavar="FORMAT", help="md or json (md)"
    )
    return parser


# Output


def _write_md(args: argparse.Namespace, models: list[LLM], on: Windows, found: list[Quality]) -> None:
    n_windows, n_ctx = on.ids.shape
    header = ["", *(Path(model.name).name for model in reversed(models))]
    rows = [
        ["perplexity", *(_text(q.perplexity, 4) for q in reversed(found))],
        ["nats a token", *(_text(q.nll, 5) for q in reversed(found))],
    ]
    divergence = found[-1].divergence
    if divergence is not None:
        percent = [_times_100(x) for x in (divergence.change, divergence.rms_change, divergence.same_top)]
        rows += [
            ["more nats than reference", _text(divergence.nll, 5), ""],
            ["KL divergence: mean", _text(divergence.kl, 6), ""],
            ["median", decimals(divergence.kl_median, 6), ""],
            ["99 %", decimals(divergence.kl_99, 6), ""],
            ["largest", decimals(divergence.kl_max, 6), ""],
            ["correct token's probability: mean change", _text(percent[0], 3) + " %", ""],
            ["root mean square change", _text(percent[1], 3) + " %", ""],
            ["same likeliest token", _text(percent[2], 3) + " %", ""],
        ]
    put(table(header, rows))
    scored = (
        f"{on.n_tokens} tokens scored, the last {n_ctx - on.first} of each of {n_windows} windows of {n_ctx}"
    )
    put(f"\n{scored}.")


def _text(x: Estimate, digits: int) -> str:
    return f"{decimals(x.value, digits)} ± {decimals(x.error, digits)}"


def _times_100(x: Estimate) -> Estimate:
    return type(x)(100 * x.value, 100 * x.error)


def _write_json(args: argparse.Namespace, models: list[LLM], on: Windows, found: list[Quality]) -> None:
    from tinyllm import backends

    def one(model: LLM, quality: Quality) -> dict[str, Any]:
        return {"model": model.name, "perplexity": asdict(quality.perplexity), **asdict(quality)}

    result = one(models[-1], found[-1])
    if len(models) > 1:
        result["reference"] = one(models[0], found[0])
        del result["reference"]["divergence"]
    result |= {
        "text": args.text,
        "n_ctx": on.ids.shape[1],
        "n_windows": on.ids.shape[0],
        "stride": args.stride,
        "weights": args.weights,
        "cache_type": models[0].cache_type,
        "version": backends.version,
    }
    put(json_text(result, indent=2))


WRITERS = {"md": _write_md, "json": _write_json}


if __name__ == "__main__":
    sys.exit(main())
