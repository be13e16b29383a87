"""tinyllm-quantize: a model as a GGUF file in another quantization, smaller or for other tools.

What it did goes to stderr, one line, and one for each thing to know about it. Imports common.py, and
quantization when it is needed.
"""

from __future__ import annotations

import time
from collections import Counter

from tinyllm.cli import prefix
from tinyllm.cli.common import (
    EXIT_CODES,
    EXIT_OK,
    Parser,
    counted,
    note,
    out_file,
    positive,
    progress_bar,
    run_command,
    seconds,
    size,
)

PROG = f"{prefix}quantize"

DESCRIPTION = """Writes a model as a GGUF file in another quantization.

MODEL is a GGUF file with float weights (F32, F16, BF16) or a Hugging Face directory with safetensors.
Tokenizer and chat template come along. OUT appears when it is complete; llama.cpp reads it as well."""

EPILOG = f"""types, best first:
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
    parser = Parser(PROG, "MODEL OUT TYPE [options]", DESCRIPTION, (EPILOG % types).replace("%", "%%"))
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a .gguf file, of a split model the first, a directory, or stories, the model that comes with "
        "tinyllm (in Q8_0: --allow-requantize)",
    )
    parser.add_argument(
        "out", type=out_file, metavar="OUT", help="the .gguf file to write; one that is there is replaced"
    )
    parser.add_argument("type", metavar="TYPE", help="see below; q4_k_m is a good start")
    parser.add_argument(
        "--imatrix",
        metavar="FILE",
        help="importance of columns: tinyllm-perplexity's file, or llama.cpp's (GGUF or .dat)",
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


def _run(argv: list[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    from tinyllm.quantization import quantize

    start = time.perf_counter()
    with progress_bar("quantizing") as progress:
        done = quantize(
            args.model,
            args.out,
            args.type,
            imatrix=args.imatrix,
            allow_requantize=args.allow_requantize,
            threads=args.threads,
            progress=progress,
        )
    formats = ", ".join(f"{n} {name}" for name, n in sorted(done.formats.items(), key=lambda item: -item[1]))
    note(
        f"{done.path}: {size(done.n_bytes)}, {done.bits:.2f} bits a weight ({formats}), "
        f"{seconds(time.perf_counter() - start)}"
    )
    if done.fallbacks:
        pairs = Counter(done.fallbacks.values()).most_common()
        some = ", ".join(f"{n} {got} instead of {wanted}" for (wanted, got), n in pairs)
        n, n_all = len(done.fallbacks), sum(done.formats.values())
        note(f"{n} of {n_all} tensors got another type, as their rows fit no block of its own: {some}")
    if done.n_bytes > done.source_bytes:
        note(f"the file is larger than the {size(done.source_bytes)} that it was made of")
    if done.without_importance:
        some = ", ".join(done.without_importance[:4])
        note(f"the imatrix says nothing of {counted(len(done.without_importance), 'tensor')}: {some}")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
