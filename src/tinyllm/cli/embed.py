"""tinyllm-embed: vectors of the texts in a file, as a numpy array or as lines of JSON.

The file is complete or not there at all; without one, lines of JSON go to stdout and a progress bar to
stderr. Imports common.py, and once the options make sense files/outfiles.py. llm.py's `embed` does the work.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterator
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
    counted,
    json_text,
    load_model,
    note,
    out_file,
    progress_bar,
    put,
    rate,
    read_text,
    run_command,
    seconds,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PROG = f"{prefix}embed"

DESCRIPTION = """Makes vectors of texts: texts that mean much the same have vectors that point much the same
way, which is how a search by meaning finds them. The model should be one that was trained for it.

TEXTS is a file with one text a line, or .jsonl: on each line a JSON string, or an object whose "text" it is.
Row i of the result is the vector of line i."""

EPILOG = f"""examples:
  {PROG} model.gguf texts.txt -o vectors.npy             numpy.load("vectors.npy"): float32 [lines, numbers]
  {PROG} model.gguf texts.jsonl -o vectors.jsonl         lines of {{"index": 0, "embedding": [...]}}
  {PROG} model.gguf questions.txt --prompt query -o q.npy  with the instruction that the makers call query
  echo "What is a llama?" | {PROG} model.gguf -          to stdout, as .jsonl

{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    if args.model == "-":
        raise UsageError("a model is a file; only TEXTS can be -")
    suffix = Path(args.output).suffix if args.output else ".jsonl"
    if suffix not in (".npy", ".jsonl"):
        raise UsageError(f"{args.output}: the name of the output must end in .npy or .jsonl")
    texts = _texts(args.texts, read_text(args.texts))
    if args.output:
        from tinyllm.files.outfiles import target_of

        target_of(args.output)  # before any work
    with load_model(args.model, args) as llm:
        options = {"pooling": args.pooling, "prompt": args.prompt, "instruction": args.instruction}
        start, n_tokens = time.perf_counter(), 0
        with progress_bar("embedding") as bar:

            def progress(done: int, total: int) -> None:
                nonlocal n_tokens
                n_tokens = done
                bar(done, total)

            vectors = llm.embed(texts, normalize=args.normalize, progress=progress, **options)
        took = time.perf_counter() - start
    is_array = suffix == ".npy"
    parts = _npy(vectors) if is_array else _jsonl(vectors)
    _write(args.output, parts, vectors.nbytes * (1 if is_array else 4))
    if args.output:
        n, dim = vectors.shape
        speed = f"{rate(n_tokens, took):.0f} tokens a second"
        note(f"{counted(n, 'vector')} of {dim} numbers in {seconds(took)} ({speed})")
    return EXIT_OK


def _texts(path: str, data: str) -> list[str]:
    """The texts of a file, a line each. Raises UsageError, with the number of the line that is none."""
    lines = data.removesuffix("\n").split("\n") if data else []
    texts = []
    for i, line in enumerate(lines, 1):
        line, where = line.removesuffix("\r"), f"{'standard input' if path == '-' else path}: line {i}"
        text: Any = line
        if path.endswith(".jsonl"):
            try:
                text = json.loads(line)
            except (ValueError, RecursionError):
                raise UsageError(f"{where} is no JSON") from None
            text = text.get("text") if isinstance(text, dict) else text
            if not isinstance(text, str):
                raise UsageError(f'{where} is neither a JSON string nor an object with a "text"')
        if not text:
            raise UsageError(f"{where} is empty: an empty text has no vector")
        texts.append(text)
    if not texts:
        raise UsageError(f"{path}: there is no text in it")
    return texts


def _npy(vectors: npt.NDArray[np.float32]) -> Iterator[bytes]:
    import numpy as np

    file = io.BytesIO()
    np.save(file, vectors)
    yield file.getvalue()


def _jsonl(vectors: npt.NDArray[np.float32]) -> Iterator[bytes]:
    for i, vector in enumerate(vectors):
        numbers = [float(str(x)) for x in vector]  # as few digits as tell a float32
        yield json_text({"index": i, "embedding": numbers}).encode() + b"\n"


def _write(path: str | None, parts: Iterator[bytes], n_bytes: int) -> None:
    """To a file, or to stdout."""
    if path is None:
        for part in parts:
            put(part.decode(), end="")
        return
    from tinyllm.files.outfiles import replacing

    with replacing(path, n_bytes) as file:
        file.writelines(parts)


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL TEXTS [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser)
    parser.add_argument("texts", metavar="TEXTS", help="a UTF-8 file; - reads one text a line from a pipe")
    how = parser.add_argument_group("vectors", "Where you say nothing the model's files do.")
    before = how.add_mutually_exclusive_group()
    before.add_argument(
        "--prompt", metavar="NAME", help="the makers' instruction of this name, before each text"
    )
    before.add_argument("--instruction", metavar="TEXT", help='what goes before each text; "" for nothing')
    how.add_argument("--pooling", metavar="P", help="how tokens become one vector: mean, last, cls, max...")
    how.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, help="vectors of length 1, or as they come"
    )
    add_model_options(parser, context="tokens of the longest text (default: the model's own)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", type=out_file, metavar="FILE", help=".npy or .jsonl (default: .jsonl to stdout)"
    )
    return parser
