"""tinyllm-inspect: what is in a model's files, what running it would take, and how it sees a text.

Facts go to stdout, as lines or JSON. Only --next loads the weights. Imports common.py; once the
options make sense, measure/inspection.py, which reads the headers, raw.py, which lists them, and
next_token.py, which draws.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.cli import prefix
from tinyllm.cli.common import (
    BACKGROUNDS,
    BOLD,
    DIM,
    EXIT_CODES,
    EXIT_OK,
    Parser,
    UsageError,
    add_model_argument,
    add_model_options,
    counted,
    json_text,
    load_model,
    positive,
    put,
    run_command,
    size,
    styled,
    table,
)

if TYPE_CHECKING:
    from tinyllm import Tokenizer
    from tinyllm.measure.inspection import Inspection, Memory, Tensor

PROG = f"{prefix}inspect"

DESCRIPTION = """Shows what a model is made of, from its files' headers and without loading it:
architecture, parameters, formats, tokenizer, chat template, the memory it would take here, and what
looks wrong.

Of a file that tinyllm does not run it lists the keys and tensors, as --raw does of any.

--tokens shows the pieces that a text is cut into. --next loads the model and shows what it thinks may
come after a text: each token's probability at several temperatures, and which ones sampling would
choose from."""

EPILOG = f"""examples:
  {PROG} model.gguf                              the facts
  {PROG} model.gguf -c 8192 --cache-type q8_0    the memory for another context
  {PROG} other.safetensors --raw --json          all that the headers say, for programs
  {PROG} stories --tokens "Lily's café"          the tokens of a text
  {PROG} stories --next "The dog was" --temp 0.5,1,1.5
  {PROG} stories --next "The dog was" --plot next.png

{EXIT_CODES}"""

_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥"})


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    given = [name for name in ("tokens", "next", "raw") if getattr(args, name) not in (None, False)]
    if len(given) > 1:
        raise UsageError(f"--{' and --'.join(given)} cannot be used together")
    if args.plot is not None and args.next is None:
        raise UsageError("--plot draws what --next shows; it needs --next TEXT")
    if args.tokens is not None:
        return _print_tokens(args)
    if args.next is not None:
        return _print_next(args)
    from tinyllm.cli import raw

    if args.raw:
        return raw.print_raw(args.model, args.output)
    from tinyllm.errors import FormatError, NotFoundError, UnsupportedError
    from tinyllm.measure.inspection import inspect_model

    try:
        found = inspect_model(
            args.model, context=args.context, cache_type=args.cache_type, weights=args.weights
        )
    except UnsupportedError as error:
        if not raw.is_readable(args.model):
            raise
        return raw.print_raw(args.model, args.output, str(error))
    except (FormatError, NotFoundError) as error:
        if raw.is_readable(args.model):
            raise type(error)(f"{error} (--raw lists what it holds)") from None
        raise
    if args.output == "json":
        put(json_text(found.record(), indent=1))
    else:
        for line in _lines(found, all_tensors=args.tensors):
            put(line)
    return EXIT_OK


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser)
    what = parser.add_argument_group("what to show")
    what.add_argument("--tensors", action="store_true", help="every tensor, not only kinds of them")
    what.add_argument(
        "--raw",
        action="store_true",
        help="every key and tensor as the file has them, of any GGUF or safetensors, be it a model or not",
    )
    what.add_argument("--tokens", metavar="TEXT", help="the tokens of a text")
    what.add_argument("--next", metavar="TEXT", help="the probabilities of the token after a text")
    what.add_argument(
        "--chat",
        action="store_true",
        help="with --tokens and --next: TEXT is a message, put through the model's chat template",
    )
    what.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="text, or json for programs (text)"
    )
    what.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")
    following = parser.add_argument_group("with --next")
    following.add_argument(
        "--temp",
        dest="temperatures",
        type=_temperatures,
        default=[0.5, 1.0, 1.5],
        metavar="X,...",
        help="temperatures to compare (0.5,1,1.5)",
    )
    following.add_argument("--top-k", type=int, metavar="K", help="as in tinyllm-run (40, or the model's)")
    following.add_argument("--top-p", type=float, metavar="P", help="as in tinyllm-run (0.95)")
    following.add_argument("--min-p", type=float, metavar="P", help="as in tinyllm-run (0.05)")
    following.add_argument(
        "-n", "--rows", type=positive, default=12, metavar="N", help="how many of the likeliest tokens (12)"
    )
    following.add_argument("--plot", metavar="OUT.png", help="draw it as a picture as well; needs matplotlib")
    add_model_options(parser)
    return parser


def _temperatures(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.5,1,1.5") from None
    if not all(0 <= value <= 1000 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: a temperature is 0 to 1000")
    return values


# Facts


def _lines(found: Inspection, all_tensors: bool) -> Iterator[str]:
    yield styled(found.path, BOLD, sys.stdout)
    before = ""
    for name, text in _facts(found):
        label = styled(f"{'' if name == before else name:<15}", DIM, sys.stdout)
        yield from wrapped(label, 15, text)
        before = name
    yield ""
    yield _tensor_table(found.tensors) if all_tensors else _group_table(found.tensors)
    if found.warnings:
        yield ""
    for warning in found.warnings:
        yield from wrapped(styled("warning: ", BOLD, sys.stdout), 9, warning)


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    """Names and texts; several of one name stand under it."""
    c = found.config
    files = "1 file" if found.n_files == 1 else f"{found.n_files} files"
    yield "files", f"{found.kind}, {files}, {size(found.file_bytes)}"
    experts = f" in {c.n_experts_used} of {c.n_experts} experts" if c.n_experts else ""
    yield (
        "architecture",
        f"{c.architecture}: {counted(c.n_layers, 'layer')} of width {c.dim}, "
        f"feed-forward {c.ff_dim}{experts}",
    )
    shared = "" if c.n_kv_heads == c.n_heads else f", sharing {c.n_kv_heads} for keys and values"
    windows = [window for window in c.windows if window]
    local = f"; the last {max(windows)} tokens only in {counted(len(windows), 'layer')}" if windows else ""
    yield "attention", f"{c.n_heads} heads of {c.head_dim}{shared}{local}"
    extended = "" if c.original_context is None else f", extended from {c.original_context}"
    yield "context", f"{c.context} tokens{extended}; RoPE base {c.rope_theta:g}"
    tied = "; the output matrix is the embedding" if c.tied else ""
    active = f", of which a token uses {_count(found.n_active_parameters)}" if c.n_experts else ""
    yield "parameters", _count(found.n_parameters) + active + tied
    for share in found.formats:
        tensors = "tensor" if share.n_tensors == 1 else "tensors"
        text = f"{share.format:<8}{share.n_tensors:4} {tensors:<8}{size(share.n_bytes):>8}"
        yield "formats", f"{text}  {share.bits:.4g} bits a number"
    yield "tokenizer", _tokenizer_line(found.tokenizer)
    yield from (("chat template", text) for text in _template_lines(found.template))
    yield from (("memory", text) for text in _memory_lines(found.memory))


def wrapped(label: str, indent: int, text: str) -> Iterator[str]:
    width = max(40, shutil.get_terminal_size((100, 40)).columns) - indent
    first, *rest = textwrap.wrap(text, width, replace_whitespace=False) or [""]
    yield label + first
    yield from (" " * indent + line for line in rest)


def _count(n: int) -> str:
    for unit, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if n >= unit:
            return f"{n / unit:.3g} {name} ({n})"
    return str(n)


def _names(ids: dict[str, int]) -> str:
    return ", ".join(f"{text} ({i})" for text, i in ids.items()) or "none"


def _tokenizer_line(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return "none"
    begins = _names(facts["bos"])
    return (
        f"{facts['kind']}, {facts['vocab_size']} tokens, {len(facts['special_tokens'])} special; "
        + (f"texts begin with {begins}" if facts["adds_bos"] else "nothing is put before a text")
        + f"; {_names(facts['ends'])} {'end' if len(facts['ends']) > 1 else 'ends'} a text"
    )


def _template_lines(facts: dict[str, Any] | None) -> Iterator[str]:
    if facts is None:
        yield "none: a base model, which continues a text"
        return
    abilities = ["tools"] * facts["takes_tools"]
    if facts["reasoning"]:
        abilities.append(f"reasoning ({', '.join(facts['reasoning'])})")
    yield f"{facts['name']}; {' and '.join(abilities) if abilities else 'no tools, no reasoning'}"
    if facts["variables"]:
        yield f"takes --template-arg {', '.join(facts['variables'])}"
    if facts["example"] is not None:
        yield json_text(facts["example"])


def _memory_lines(memory: Memory) -> Iterator[str]:
    parts = f"weights {size(memory.weights)} + cache {size(memory.cache)} + scratch {size(memory.scratch)}"
    yield f"{parts} = {size(memory.total)} for a context of {memory.context} ({memory.cache_type})"
    fits = "it fits"
    if memory.fitting_context < memory.context:
        fits = f"enough for a context of {memory.fitting_context}" if memory.fitting_context else "too little"
    yield f"{size(memory.free)} are free here: {fits}"


def _tensor_table(tensors: Iterable[Tensor]) -> str:
    rows = [(t.name, shape_text(t.shape), t.format, size(t.n_bytes)) for t in tensors]
    return table(("tensor", "shape", "format", "size"), rows, left=("tensor", "shape", "format"))


def _group_table(tensors: Iterable[Tensor]) -> str:
    """One row for each kind of weight and format."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for t in tensors:
        groups.setdefault((t.weight, shape_text(t.shape), t.format), []).append(t.n_bytes)
    rows = [(*group, str(len(sizes)), size(sum(sizes))) for group, sizes in groups.items()]
    return table(("weight", "shape", "format", "tensors", "size"), rows, left=("weight", "shape", "format"))


def shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


# Tokens


def visible(data: bytes) -> str:
    """The bytes of a token with nothing hidden: ·⏎⇥ for white space, <e2> for bytes that are no character."""
    text = data.decode("utf-8", "surrogateescape").translate(_VISIBLE)
    return "".join(
        c if c.isprintable() else "".join(f"<{byte:02x}>" for byte in c.encode("utf-8", "surrogateescape"))
        for c in text
    )


def _print_tokens(args: argparse.Namespace) -> int:
    from tinyllm.modelfiles import read_model

    files = read_model(args.model)
    if files.tokenizer is None:
        raise UsageError(f"{args.model} has no tokenizer")
    if args.chat:
        from tinyllm.chat.prompts import Prompts
        from tinyllm.chat.templates import require

        template = require(files.template, args.model, files.tokenizer.special_tokens)
        messages = [{"role": "user", "content": args.tokens}]
        text, ids = template.render(messages), Prompts(template, files.tokenizer).ids(messages)
    else:
        text, ids = args.tokens, files.tokenizer.encode(args.tokens)
    pieces = [(i, files.tokenizer.token_bytes(i)) for i in ids]
    if args.output == "json":
        tokens = [
            {"id": i, "text": data.decode("utf-8", "replace"), "bytes": data.hex()} for i, data in pieces
        ]
        put(json_text(tokens))
        return EXIT_OK
    for line in _cells(pieces, files.tokenizer):
        put(line)
    n, characters = len(ids), len(text)
    put(
        f"{counted(n, 'token')} for {counted(characters, 'character')}"
        + (f", {characters / n:.1f} a token" if n else "")
    )
    return EXIT_OK


def _cells(pieces: list[tuple[int, bytes]], tokenizer: Tokenizer) -> Iterator[str]:
    """The pieces in a row, each with its id below, as many rows as the terminal's width needs."""
    from rich.cells import cell_len

    width = shutil.get_terminal_size((100, 40)).columns
    top: list[str] = []
    bottom: list[str] = []
    used = 0
    for n, (i, data) in enumerate(pieces):
        text = visible(data)
        columns = max(cell_len(text), len(str(i)))
        if used and used + columns + 1 > width:
            yield from ("│".join(top), "│".join(bottom), "")
            top, bottom, used = [], [], 0
        style = DIM if i in tokenizer.special_ids else BACKGROUNDS[n % len(BACKGROUNDS)]
        top.append(styled(text + " " * (columns - cell_len(text)), style, sys.stdout))
        bottom.append(styled(f"{i:<{columns}}", DIM, sys.stdout))
        used += columns + 1
    if top:
        yield from ("│".join(top), "│".join(bottom), "")


# The next token


def _print_next(args: argparse.Namespace) -> int:
    from tinyllm.cli import next_token
    from tinyllm.engine.next_token import look, record
    from tinyllm.engine.sampling import SamplingParams

    if args.plot is not None:
        next_token.require_matplotlib()
    given = SamplingParams(top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
    with load_model(args.model, args) as llm:
        prompt: str | list[int] = args.next
        if args.chat:
            prompt = llm.chat_ids([{"role": "user", "content": args.next}])
        with llm.session() as session:
            session.append(prompt)
            found = look(session.logits, args.temperatures, given.resolve(llm.defaults))
        names = [visible(llm.tokenizer.token_bytes(i)) if llm.tokenizer else str(i) for i in found.ids]
    if args.output == "json":
        put(json_text(record(found, names, args.rows)))
    else:
        for line in next_token.lines(found, names, args.rows):
            put(line)
    if args.plot is not None:
        title = f"{Path(args.model).name}: what comes after “{args.next}”"
        next_token.plot(found, names, args.rows, title, args.plot)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
