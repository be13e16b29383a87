"""tinyllm-quantize: a model as a GGUF file in another quantization, smaller or for other tools.

What it did goes to stderr, one line, and one for each thing to know about it. Imports common.py, and
quantization when it is needed.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from typing import TYPE_CHECKING

from tinyllm.cli import prefix
from tinyllm.cli.common import (
    EXIT_CODES,
    EXIT_OK,
    Parser,
    UsageError,
    counted,
    note,
    out_file,
    path_and_scale,
    positive,
    progress_bar,
    put,
    run_command,
    seconds,
    size,
    table,
)

if TYPE_CHECKING:
    from tinyllm.quantization import Quantized

PROG = f"{prefix}quantize"

DESCRIPTION = """Writes a model as a GGUF file in another quantization.

MODEL is a GGUF file with float weights (F32, F16, BF16) or a Hugging Face directory with safetensors.
Tokenizer and chat template come along. OUT appears when it is complete; llama.cpp reads it as well."""

EPILOG = rf"""types, best first:
%s

A name gives each tensor the format that it has with llama.cpp; only mxfp4 differs where there are no experts,
and llama.cpp makes everything Q8_0. In all of them norms, biases and routers stay F32, and the output matrix
is Q6_K (Q8_0 in q8_0 and mxfp4, Q5_K in iq3_xxs, iq2 and iq1, which need an imatrix). With eight experts
attention's keys and values are Q8_0, in models of 80 layers its values at least Q5_K. Rows that fit no block
of 256 get a type with smaller ones, or F16. docs/quantize.md has the whole table, and what an imatrix changes
in it.

examples:
  {PROG} path/to/hf-directory model-q4_k_m.gguf q4_k_m
  {PROG} model-f16.gguf model-q8_0.gguf q8_0
  {PROG} model-f16.gguf small.gguf q3_k_m --imatrix model.imatrix
  {PROG} path/to/hf-directory model-f16.gguf f16       only convert
  {PROG} model-f16.gguf q4_k_m --dry-run               what would become of each tensor
  {PROG} model-f16.gguf q4.gguf q4_0 --tensor-type 'ffn_down=q6_k' --tensor-type 'blk\.0\.=q8_0'
  {PROG} in-00001-of-00004.gguf out.gguf copy          several files as one
  {PROG} path/to/hf-directory merged.gguf q4_k_m --lora path/to/adapter

An imatrix says which columns of the weights matter, from a run over a text of your choice. On the bundled
model low-bit types lost 1 to 4 percent less with it, but q4_0 and q4_k_s 2 to 4 percent more: measure.
tinyllm-perplexity --against measures what a type costs, tinyllm-bench compares several.

{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _parser() -> Parser:
    from tinyllm.quantization.mixes import ALIASES, MIXES

    names = {name: [name, *(other for other, key in ALIASES.items() if key == name)] for name in MIXES}
    types = "\n".join(f"  {', '.join(names[name]):<14}{mix.note}" for name, mix in MIXES.items())
    types += f"\n  {'copy':<14}each tensor stays what it is"
    parser = Parser(PROG, "MODEL OUT TYPE [options]", DESCRIPTION, (EPILOG % types).replace("%", "%%"))
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a .gguf file, of a split model the first, a directory, or stories, the model that comes with "
        "tinyllm (in Q8_0: --allow-requantize)",
    )
    parser.add_argument(
        "out",
        type=out_file,
        nargs="?",
        metavar="OUT",
        help="the .gguf file to write; one that is there is replaced. With --dry-run none is needed",
    )
    parser.add_argument("type", metavar="TYPE", help="see below; q4_k_m is a good start")
    parser.add_argument(
        "--imatrix",
        metavar="FILE",
        help="importance of columns: tinyllm-perplexity's file, or llama.cpp's (GGUF or .dat)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        type=path_and_scale,
        default=[],
        metavar="PATH[:SCALE]",
        help="merge an adapter (LoRA) into the float model: a directory that PEFT saved, or a GGUF file; "
        "SCALE is its strength (default: 1). Several add up",
    )
    parser.add_argument(
        "--pure", action="store_true", help="every matrix gets TYPE's own format, none a better one"
    )
    parser.add_argument(
        "--tensor-type",
        dest="tensor_types",
        type=_pattern_and_type,
        action="append",
        default=[],
        metavar="PATTERN=TYPE",
        help="matrices in whose name the regular expression is found get this format, as attn_v=q8_0; may be "
        "given several times, the first that fits holds",
    )
    parser.add_argument(
        "--keep-split",
        action="store_true",
        help="of a model in several GGUF files, write as many: OUT-00001-of-0000N.gguf ...",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing, but what each tensor would become, and the size",
    )
    parser.add_argument(
        "--allow-requantize",
        action="store_true",
        help="take a quantized model too; worse than from its float original",
    )
    parser.add_argument(
        "-t", "--threads", type=positive, metavar="N", help="processor threads (default: the physical cores)"
    )
    return parser


def _pattern_and_type(text: str) -> tuple[str, str]:
    pattern, sign, format = text.rpartition("=")
    if not (pattern and sign and format):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=TYPE, such as attn_v=q8_0")
    return pattern, format


def _run(argv: list[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    if args.out is None and not args.dry_run:
        raise UsageError("no OUT given: the .gguf file to write, between MODEL and TYPE")
    from tinyllm.quantization import plan, quantize

    choices = {"pure": args.pure, "tensor_types": args.tensor_types, "lora": args.lora}
    if args.dry_run:
        done = plan(
            args.model,
            args.type,
            imatrix=args.imatrix is not None,
            allow_requantize=args.allow_requantize,
            **choices,
        )
        _print_plan(done)
        note(f"{size(done.n_bytes)} and the metadata, {done.bits:.2f} bits a weight ({_formats(done)})")
    else:
        start = time.perf_counter()
        with progress_bar("quantizing") as progress:
            done = quantize(
                args.model,
                args.out,
                args.type,
                imatrix=args.imatrix,
                allow_requantize=args.allow_requantize,
                keep_split=args.keep_split,
                threads=args.threads,
                progress=progress,
                **choices,
            )
        note(
            f"{done.path}: {size(done.n_bytes)}, {done.bits:.2f} bits a weight ({_formats(done)}), "
            f"{seconds(time.perf_counter() - start)}"
        )
    _say_fallbacks(done)
    if done.n_bytes > done.source_bytes:
        note(f"the file is larger than the {size(done.source_bytes)} that it was made of")
    if done.without_importance:
        some = ", ".join(done.without_importance[:4])
        note(f"the imatrix says nothing of {counted(len(done.without_importance), 'tensor')}: {some}")
    return EXIT_OK


def _formats(done: Quantized) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(done.formats.items(), key=lambda item: -item[1]))


def _print_plan(done: Quantized) -> None:
    rows = [
        (one.name, " x ".join(map(str, one.shape)), one.source, one.got, size(one.n_bytes))
        for one in done.tensors
    ]
    header = ("tensor", "shape", "from", "to", "size")
    put(table(header, rows, left=header[:4]))


def _say_fallbacks(done: Quantized) -> None:
    """Which tensors got another format than the quantization has for them, and why; those of all layers as
    one."""
    if not done.fallbacks:
        return
    note(f"{len(done.fallbacks)} of {len(done.tensors)} tensors got another type than theirs:")
    found = Counter[tuple[str, int, str, str]]()
    for one in done.tensors:
        if one.wanted != one.got:
            found[re.sub(r"\.\d+\.", ".*.", one.name), one.shape[-1], one.wanted, one.got] += 1
    from tinyllm.files import GGUF_FORMATS

    for (name, k, wanted, got), n in found.items():
        block = next(form.block for form in GGUF_FORMATS.values() if form.name == wanted)
        note(
            f"  {name}{f' ({n} of them)' if n > 1 else ''}: {got} instead of {wanted}, as rows of {k} are no "
            f"multiple of its block of {block}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
