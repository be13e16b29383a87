"""What the commands share: exit codes and one-line errors, option groups, the progress bar, how numbers are
written.

Imports tinyllm only inside functions that need it, so that `--help` and usage errors are instant. Read next:
run.py.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TextIO

from tinyllm.cli import peers

if TYPE_CHECKING:
    from tinyllm import LLM

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = """exit codes:
  0    all went well (also when the reader of the output closes it early)
  1    the model or the machine: no such file, not a model, unsupported, truncated, out of memory
  2    the command: an unknown option, a value out of range, no prompt
  130  interrupted with Ctrl-C"""


class UsageError(Exception):
    """The command makes no sense as typed."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and help that keeps its line breaks."""

    def __init__(self, prog: str, usage: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"%(prog)s {usage}",
            description=description,
            epilog=epilog,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def parse_intermixed_args(  # type: ignore[override]  # of a namespace there is no need
        self, args: Sequence[str]
    ) -> argparse.Namespace:
        """Reads a command line, with the names that llama.cpp and Ollama have for options of ours."""
        own = self._option_string_actions
        try:
            found, unknown = self.parse_known_intermixed_args(peers.translate(args, own, note))
        except peers.Untranslated as error:
            raise UsageError(str(error)) from None
        options = [arg for arg in unknown if arg.startswith("-")]
        if options:
            raise UsageError(f"there is no option {options[0]}{peers.hint(options[0], own)}")
        if unknown:
            raise UsageError(f"too many arguments: {' '.join(unknown)}")
        return found

    @property
    def options(self) -> Sequence[str]:
        """All there are."""
        return tuple(self._option_string_actions)

    def action_of(self, option: str) -> argparse.Action | None:
        return self._option_string_actions.get(option)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """What an option that is not known stands for: nothing, where argparse would read -ngl as -n gl."""
        return []

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def run_command(prog: str, command: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Runs a command and turns whatever goes wrong into an exit code and one line on stderr."""
    _use_utf8(sys.stdout)
    try:
        code = command([_as_utf8(arg) for arg in (sys.argv[1:] if argv is None else argv)])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader is gone. Python flushes stdout once more as it exits; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        _say(prog, "interrupted")
        return EXIT_INTERRUPTED
    except UsageError as e:
        _say(prog, f"{e} ({prog} --help explains the options)")
        return EXIT_USAGE
    except Exception as e:
        return _report(prog, e)


def _use_utf8(stream: TextIO) -> None:
    """Files and pipes get UTF-8 in every locale; a terminal that lacks a character shows a question mark."""
    if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
        if stream.isatty():
            stream.reconfigure(errors="replace")
        else:
            stream.reconfigure(encoding="utf-8", errors="strict")


def _as_utf8(arg: str) -> str:
    """An argument as its bytes read in UTF-8, where the locale made something else of them."""
    return arg if arg.isascii() else os.fsencode(arg).decode("utf-8", "surrogateescape")


def _report(prog: str, error: Exception) -> int:
    from tinyllm.errors import ArgumentError, Error

    if os.environ.get("TINYLLM_DEBUG"):
        raise error
    if isinstance(error, MemoryError) and not isinstance(error, Error):
        _say(prog, "out of memory")
    elif isinstance(error, OSError) and error.filename is not None:
        _say(prog, f"{error.filename}: {error.strerror}")
    elif isinstance(error, (Error, OSError)):
        _say(prog, in_options(str(error)))
    else:
        text = (
            f"internal error: {type(error).__name__}: {error} (TINYLLM_DEBUG=1 shows where; please report it)"
        )
        _say(prog, text)
    return EXIT_USAGE if isinstance(error, ArgumentError) else EXIT_ERROR


# What errors advise to those who write Python: what they advise here.
_ADVICE = {
    "load the model with a larger context=": "begin with a larger context: -c N",
    "pass allow_requantize=True (--allow-requantize)": "give --allow-requantize",
    "pass max_tokens": "give -n N",
    "use device='cpu'": "give --device cpu",
    "weights= is for float models": "--weights and --types are for float models",
    "chat_template= (tinyllm-run: --chat-template FILE)": "--chat-template FILE",
}


def in_options(message: str) -> str:
    """What an error says, in the words of the command line."""
    for advice, here in _ADVICE.items():
        message = message.replace(advice, here)
    return message


def _say(prog: str, message: str) -> None:
    put(f"{prog}: {' '.join(message.split())}", to=sys.stderr)


# Options


def positive(text: str) -> int:
    """An argparse type: a whole number, 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _or_none(kind: Callable[[str], Any], none: str) -> Callable[[str], Any]:
    """An argparse type: `kind`, or a word of llama.cpp's that leaves it to the model or to chance."""

    def read(text: str) -> Any:
        return None if text == none else kind(text)

    read.__name__ = kind.__name__  # which errors name
    return read


def out_file(text: str) -> str:
    """An argparse type: a file to write. It must not be a pipe, and - is one everywhere else."""
    if text == "-":
        raise argparse.ArgumentTypeError("a file is written, not a pipe (./- is the file of that name)")
    return text


def add_model_argument(
    parser: argparse.ArgumentParser, name: str = "model", nargs: str | None = None
) -> None:
    """MODEL, what `tinyllm.load` takes: one, or as many as argparse's nargs says."""
    parser.add_argument(
        name,
        nargs=nargs,
        metavar="MODEL",
        help="a .gguf file, a Hugging Face directory, a name (hf:ORG/REPO:Q4_K_M, fetched once, ollama:NAME) "
        "or stories, the model that comes with tinyllm",
    )


def add_model_options(
    parser: argparse.ArgumentParser,
    context: str = "room for N tokens of prompt and answer (default: the model's own)",
) -> argparse._ArgumentGroup:
    """The options that `load_model` reads, and the group they stand in. context: what --context means to the
    command."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-c",
        "--context",
        type=_or_none(positive, "0"),
        metavar="N",
        help=context,
    )
    group.add_argument(
        "-t",
        "--threads",
        type=positive,
        metavar="N",
        help="processor threads (default: the physical cores); never changes the result",
    )
    group.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    group.add_argument(
        "--cache-type",
        default="f16",
        metavar="T",
        help="numbers of the attention cache: f16, f32 or q8_0 (default: f16)",
    )
    group.add_argument(
        "--weights",
        metavar="F",
        help="quantize a float model while loading, to q8_0, q4_k_m...: smaller, faster, less exact",
    )
    return group


def add_lora_option(group: argparse._ArgumentGroup) -> None:
    """The option --lora that `load_model` reads."""
    group.add_argument(
        "--lora",
        action="append",
        type=path_and_scale,
        metavar="PATH[:SCALE]",
        help="apply an adapter (LoRA): a directory that PEFT saved, or a GGUF file; SCALE is its strength "
        "(default: 1). Several add up",
    )


def path_and_scale(text: str) -> tuple[str, float]:
    """Of PATH or PATH:SCALE."""
    path, colon, scale = text.rpartition(":")
    try:
        found = (path, float(scale)) if colon and path and not os.path.exists(text) else (text, 1.0)
    except ValueError:
        found = (text, 1.0)  # the colon is a part of the path
    if not math.isfinite(found[1]):
        raise argparse.ArgumentTypeError(f"the scale of {text!r} is not a number")
    return found


def add_speculation_options(parser: argparse.ArgumentParser) -> None:
    """Of commands that write texts: `draft` and `speculate` of `tinyllm.load`."""
    group = parser.add_argument_group(
        "speculation", "Tokens are guessed and computed together where that is faster; the text is the same."
    )
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--draft",
        metavar="MODEL",
        help="a smaller model that guesses (default: what came before in the text)",
    )
    one.add_argument(
        "--no-speculation",
        dest="speculate",
        action="store_const",
        const=None,
        default="auto",
        help="guess nothing",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options that `sampling_fields` reads. Defaults are left to the model and the library."""
    group = parser.add_argument_group(
        "sampling",
        "How the next token is chosen. Where you say nothing the model's makers do, else the values here.",
    )
    group.add_argument(
        "-n",
        "--max-tokens",
        type=_or_none(positive, "-1"),
        metavar="N",
        help="stop after N tokens (default: at the end of the text)",
    )
    group.add_argument(
        "--temp",
        dest="temperature",
        type=float,
        metavar="X",
        help="how adventurous: near 0 it nearly always takes the likeliest token, above 1 it takes risks; "
        "0 always takes the likeliest (0.8)",
    )
    group.add_argument(
        "--top-k", type=int, metavar="K", help="choose among the K likeliest tokens only; 0 for no limit (40)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="choose among the likeliest tokens that together have probability P; 1 for no limit (0.95)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="drop tokens less likely than P times the likeliest; 0 for no limit (0.05)",
    )
    group.add_argument(
        "--typical",
        dest="typical_p",
        type=float,
        metavar="P",
        help="choose among the tokens of usual surprise that together have probability P; 1 for no limit (1)",
    )
    group.add_argument(
        "--repeat-penalty",
        dest="repetition_penalty",
        type=float,
        metavar="X",
        help="make tokens of the last text less likely again, by this factor; 1 for none (1)",
    )
    group.add_argument(
        "--seed",
        type=_or_none(int, "-1"),
        metavar="S",
        help="the same seed gives the same text (default: a new one each time)",
    )
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the text before this string; may be given several times",
    )
    _add_repetition_options(parser)
    form = parser.add_argument_group(
        "form of the answer", "One of them; needs the package llguidance (docs/structured.md)."
    )
    for option, metavar, text in (
        ("--json-schema", "FILE|TEXT", "JSON that follows this schema"),
        ("--grammar", "FILE|TEXT", "text that follows this grammar, Lark or GBNF"),
    ):
        form.add_argument(option, type=_file_or_text, metavar=metavar, help=text)
    for option, dest in (("--json-schema-file", "json_schema"), ("--grammar-file", "grammar")):
        form.add_argument(option, dest=dest, type=read_text, metavar="FILE", help="the same, of a file alone")
    form.add_argument("--regex", metavar="REGEX", help="text that matches this regular expression")
    form.add_argument(
        "--choices", action="append", metavar="TEXT", help="one of these texts; may be given several times"
    )


def _file_or_text(given: str) -> str:
    """What a file holds, where one has this name; else the text itself."""
    try:
        is_file = Path(given).is_file()
    except (OSError, ValueError):  # too long for a name
        is_file = False
    return read_text(given) if is_file else given


def _add_repetition_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "repetition and bans", "Names are llama-cli's where it has one; docs/sampling.md says what each does."
    )
    for option, kind, metavar, text in (
        ("--min-tokens", int, "N", "do not let the text end before N tokens (0)"),
        (
            "--repeat-last-n",
            int,
            "N",
            "how many of the last tokens --repeat-penalty looks at; -1 for all (64)",
        ),
        (
            "--presence-penalty",
            float,
            "X",
            "take X from the logit of each token that came before; 0 for none (0)",
        ),
        ("--frequency-penalty", float, "X", "the same, as many times as it came; 0 for none (0)"),
        ("--no-repeat-ngram-size", int, "N", "let no N tokens in a row come twice; 0 for any (0)"),
        (
            "--dry-multiplier",
            float,
            "X",
            "make what would go on with a repetition less likely; 0 for none (0)",
        ),
        ("--dry-base", float, "X", "how much more so with each token that the repetition has (1.75)"),
        ("--dry-allowed-length", int, "N", "leave repetitions of fewer tokens alone (2)"),
        ("--dry-penalty-last-n", int, "N", "how many of the last tokens DRY looks at; -1 for all (64)"),
        ("--xtc-probability", float, "P", "how often to leave out the likeliest tokens (0)"),
        ("--xtc-threshold", float, "P", "of tokens at least so likely, leave out all but one (0.1)"),
    ):
        name = option.removeprefix("--").replace("-", "_").replace("repeat_last_n", "penalty_window")
        group.add_argument(option, dest=name, type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--dry-sequence-breaker",
        dest="dry_sequence_breakers",
        action="append",
        metavar="TEXT",
        help="no repetition goes over this string; may be given several times, none for none "
        '(the line break, :, " and *)',
    )
    group.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        metavar="ID(+|-)X",
        help="add X to a token's logit, such as 15043+1 or 15043-inf; may be given several times",
    )
    for option, text in (
        ("--suppress-tokens", "never choose these tokens"),
        ("--begin-suppress-tokens", "do not begin with one of these tokens"),
    ):
        group.add_argument(option, type=_token_ids, metavar="ID,ID", help=text)
    group.add_argument(
        "--bad-words-ids",
        type=_token_ids,
        action="append",
        metavar="ID,ID",
        help="do not let these tokens come one after the other; may be given several times",
    )


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids such as 13,198") from None


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d+)([+-](?:inf|\d+(?:\.\d+)?))", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no token id and number such as 15043+1")
    return int(match[1]), float(match[2])


_SAMPLING = (
    "max_tokens temperature top_k top_p min_p typical_p repetition_penalty seed stop min_tokens "
    "penalty_window presence_penalty frequency_penalty logit_bias "
    "no_repeat_ngram_size dry_multiplier dry_base dry_allowed_length dry_penalty_last_n "
    "dry_sequence_breakers xtc_probability xtc_threshold suppress_tokens begin_suppress_tokens bad_words_ids "
    "json_schema regex choices grammar"
)


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingParams that were given."""
    fields = {name: getattr(args, name, None) for name in _SAMPLING.split()}
    if fields["dry_sequence_breakers"] == ["none"]:
        fields["dry_sequence_breakers"] = []
    if fields["logit_bias"] is not None:
        fields["logit_bias"] = dict(fields["logit_bias"])
    return {name: value for name, value in fields.items() if value is not None}


# Ollama's names of parameters that have another here.
_OLLAMA = {"num_predict": "max_tokens", "num_thread": "threads", "num_ctx": "context"}
_FIXED = ("context", "threads", "device", "cache_type", "weights")


def setting(name: str, value: str) -> dict[str, Any]:
    """The field of SamplingParams that an option sets, by its name here, llama.cpp's or Ollama's; the value -
    takes it back. Raises UsageError."""
    name = name.lstrip("-").replace("-", "_")
    name = _OLLAMA.get(name, name)
    option = f"--{name.replace('_', '-')}"
    ours = peers.SAME.get(option, option)
    if ours[2:].replace("-", "_") in _FIXED:
        raise UsageError(f"{name} cannot change while a model is loaded: leave, and give it when you begin")
    parser = Parser("/set", "", "", "")
    add_sampling_options(parser)
    action = parser.action_of(ours)
    given = {}
    try:
        if value != "-" and option != "--help":
            given = sampling_fields(parser.parse_intermixed_args([f"{option}={value}"]))
    except UsageError as error:
        if not str(error).startswith("there is no option"):
            raise UsageError(re.sub("^argument [^:]*", name, str(error))) from None
    if given:
        return given
    if action is None or option == "--help":
        known = [known for known in parser.options if known != "--help"]
        raise UsageError(f"there is no setting {name}{peers.hint(option, known).replace('--', '')}")
    return {action.dest: {} if action.dest == "logit_bias" else None}


def load_model(path: str, args: argparse.Namespace, **settings: Any) -> LLM:
    """`tinyllm.load` with the model options, and a progress bar where it takes long. `settings` win over
    `args`."""
    import tinyllm

    names = ("device", "threads", "context", "cache_type", "weights", "draft", "speculate")
    options = {name: getattr(args, name) for name in names if hasattr(args, name)} | settings
    loras: list[tuple[str, float]] = getattr(args, "lora", None) or []
    adapters = {f"{i}": where for i, (where, _) in enumerate(loras)}
    with progress_bar("loading") as progress:
        llm = tinyllm.load(path, **options, adapters=adapters, progress=progress)
    return llm.adapted([(f"{i}", scale) for i, (_, scale) in enumerate(loras)])


MOST_TEXT_BYTES = 1_000_000_000  # far above what anybody measures on; a device may never end


def read_text(path: str) -> str:
    """A UTF-8 file's text, without a byte order mark; - reads standard input."""
    name, data = "standard input" if path == "-" else path, bytearray()
    with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).expanduser().open("rb") as file:
        while part := file.read(1 << 20):
            data += part
            if len(data) > MOST_TEXT_BYTES:
                raise UsageError(f"{name} does not end within {size(MOST_TEXT_BYTES)}; give a part of it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UsageError(f"{name} is not UTF-8 text: byte {e.start} is 0x{data[e.start]:02x}") from None


# Output


BAR_AFTER_S = 1.0


class Progress(Protocol):
    def __call__(self, done: int, total: int, what: str = ...) -> None: ...


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A function (done, total, what) that draws a bar on stderr: on a terminal, once BAR_AFTER_S have
    passed. `what` may change the words before the bar."""
    bar: Any = None
    task: Any = None
    start = time.monotonic()

    def update(done: int, total: int, what: str = what) -> None:
        nonlocal bar, task
        if bar is None:
            if not sys.stderr.isatty() or time.monotonic() - start < BAR_AFTER_S:
                return
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
            task = bar.add_task("", total=total)
            bar.start()
        bar.update(task, description=_plain(what), completed=done, total=total)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()


@contextmanager
def progress_line() -> Iterator[Callable[[str, int, int], None] | None]:
    """A function that draws a bar on stderr where that is a terminal. It draws when it is called, ten times a
    second at most, and never on its own: nothing else may run while a model is measured.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task, drawn = bar.add_task(""), 0.0

        def update(what: str, done: int, total: int) -> None:
            nonlocal drawn
            due = time.monotonic() - drawn > 0.1
            drawn = time.monotonic() if due else drawn
            bar.update(task, description=_plain(what), completed=done, total=total, refresh=due)

        yield update


def _plain(text: str) -> str:
    """`text` for a progress bar, to which brackets are styles."""
    from rich.markup import escape

    return escape(shown(text, sys.stderr))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Container[str] = ()) -> str:
    """Markdown whose columns line up; those named in `left`, and one without a name, stand to the left."""
    width = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    is_left = [name in left or not name for name in header]

    def line(cells: Sequence[str]) -> str:
        each = zip(cells, width, is_left, strict=True)
        return "| " + " | ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in each) + " |"

    rule = ["-" * (w - 1) + ("-" if to_left else ":") for w, to_left in zip(width, is_left, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


BOLD, DIM, CYAN = "\x1b[1m", "\x1b[2m", "\x1b[36m"
# For pieces of a text in turns, dark enough for white letters.
BACKGROUNDS = tuple(f"\x1b[97;48;5;{color}m" for color in (24, 65, 96, 94, 60))
_END = "\x1b[0m"
_STYLES = "|".join(map(re.escape, (BOLD, DIM, CYAN, *BACKGROUNDS, _END)))
_CONTROL = re.compile(rf"(?P<style>{_STYLES})|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def has_styles(stream: TextIO) -> bool:
    """https://no-color.org"""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO) -> str:
    """`text` in one of the styles above where `stream` is a terminal that has styles."""
    return f"{style}{text}{_END}" if text and style and has_styles(stream) else text


def shown(text: str, stream: TextIO) -> str:
    """`text` for `stream`: on a terminal, control characters (which could drive it) become visible, but for
    the styles above: a file that holds one makes a text bold, and that is all."""
    if not stream.isatty():
        return text
    keeps_styles = has_styles(stream)
    return _CONTROL.sub(lambda m: m[0] if m["style"] and keeps_styles else _visible(m[0]), text)


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else f"<{ord(c):02x}>" for c in text)


def put(text: str = "", *, to: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Prints to stdout, or `to`, as `shown`. Everything that the commands write goes through here: texts of
    models, and names and messages that come from their files."""
    stream = to or sys.stdout
    print(shown(text, stream), file=stream, end=end, flush=flush)


def put_csv(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """The `fields` of rows, with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    put(text.getvalue(), end="")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON in UTF-8; null for numbers that are none, for which JSON has no word. Every control character is
    escaped: JSON itself asks for those below 0x20 alone, and others drive terminals, too."""
    text = json.dumps(_without_nan(value), ensure_ascii=False, indent=indent, allow_nan=False)
    return re.sub(r"[\x7f-\x9f]", lambda m: f"\\u{ord(m[0]):04x}", text)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def note(text: str) -> None:
    """A line about the work, on stderr, faint."""
    put(styled(_fitted(text, sys.stderr), DIM, sys.stderr), to=sys.stderr, flush=True)


def _fitted(text: str, stream: TextIO) -> str:
    """Lines that end between words where a terminal would break them; what follows a gap stays behind it."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no terminal
        return text
    lines: list[str] = []
    for line in text.split("\n"):
        gap = re.match(r"\S.{0,18}?\s{2,}", line)
        wrapper = textwrap.TextWrapper(max(width, 20), replace_whitespace=False, break_on_hyphens=False)
        wrapper.subsequent_indent = " " * len(gap[0] if gap else "")
        lines += [line] if len(line) <= width else wrapper.wrap(line)
    return "\n".join(lines)


def counted(n: int, thing: str, width: int = 0) -> str:
    """ "1 token", "2 tokens"; width: of the number, where such texts stand under each other."""
    return f"{n:{width}} {thing}{'s' if n != 1 else ' ' if width else ''}"


def decimals(x: float, n: int) -> str:
    """With n digits after the point; as a power of ten where those before it would be a long row."""
    return f"{x:.{n}f}" if abs(x) < 1e9 else f"{x:.{n}e}"


def seconds(s: float) -> str:
    return f"{s:.1f} s" if s >= 10 else f"{s:.2f} s" if s >= 1 else f"{s * 1000:.0f} ms"


def size(n_bytes: float) -> str:
    """Decimal units, as file managers show them."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def machine(record: dict[str, Any]) -> str:
    """What a record of `benchmark.Result` was measured on."""
    if record["gpu_info"]:
        return f"{record['device']} {record['gpu_info']}"
    return f"{record['cpu_info']}, {record['isa']}, {record['n_threads']} threads"


def percent(share: float | None) -> str:
    """Empty where there is none."""
    return "" if share is None else f"{share:.0f}"


def rate(n: float, s: float) -> float:
    """n a second; 0 where no time passed."""
    return n / s if s > 0 else 0.0


def peak_memory_bytes() -> int:
    """The most memory that this process held at once."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
