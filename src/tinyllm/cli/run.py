"""tinyllm-run: continue a text or answer a question, once, in a batch, as JSON, or in a conversation.

Text goes to stdout, everything about it to stderr. Imports common.py and answers.py; results.py (JSON and
replay) and interactive.py (the terminal conversation) are imported when they are needed.
"""

from __future__ import annotations

import argparse
import json
import math
import select
import sys
from typing import TYPE_CHECKING, Any, TextIO

from tinyllm.cli import prefix
from tinyllm.cli.answers import (
    answer,
    as_prompt,
    chat_only,
    chat_options,
    is_chat,
    print_figures,
    print_stream,
)
from tinyllm.cli.common import (
    BOLD,
    EXIT_CODES,
    EXIT_INTERRUPTED,
    EXIT_OK,
    Parser,
    UsageError,
    add_lora_option,
    add_model_argument,
    add_model_options,
    add_sampling_options,
    add_speculation_options,
    load_model,
    note,
    positive,
    put,
    read_text,
    run_command,
    sampling_fields,
)
from tinyllm.cli.page import Page

if TYPE_CHECKING:
    from tinyllm import LLM, Completion, SamplingParams

PROG = f"{prefix}run"
PATIENCE_S = 1.0  # after which it is said that a pipe is waited for

DESCRIPTION = """Runs a language model from a file on this machine.

A base model continues PROMPT; a model made for chat answers it. Without a prompt, on a terminal, you get a
conversation. A prompt can also come through a pipe, or go on there."""

EPILOG = f"""examples:
  {PROG} stories "Once upon a time"              the small model that comes with tinyllm
  {PROG} model.gguf                              a conversation; /help there lists its commands
  {PROG} model.gguf "What is RoPE?" --temp 0     the likeliest answer, the same every time
  cat notes.txt | {PROG} model.gguf "Summarize:"  the prompt, and what comes through the pipe
  {PROG} stories "Lily" -n 50 --seed 7 --json > out.json
  {PROG} model.gguf "Hello" --lora adapter:0.7   with an adapter (LoRA), at 0.7 of its strength
  {PROG} --replay out.json                       does this machine give the very same tokens?
  {PROG} stories --prompts beginnings.txt        one prompt a line, as one batch, JSON lines out

Options of llama.cpp and Ollama are known by their names where they mean the same (-m -p -s -sys -cnv -hf
--ctx-size --n-predict --temperature --format ...), and named where they mean nothing here: docs/terminal.md.

{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    _take_options_for_arguments(args)
    if args.version or args.info:
        return _print_info(args.info)
    _check(args)
    if args.replay is not None:
        from tinyllm.cli.results import replay

        return replay(args)
    from tinyllm.engine.sampling import SamplingParams

    top_logprobs = {"logprobs": True, "top_logprobs": args.logprobs} if args.logprobs is not None else {}
    params = SamplingParams(**sampling_fields(args), **top_logprobs)
    if args.prompts is not None:
        from tinyllm.cli.results import run_batch

        return run_batch(args, _read_prompts(args), params)
    prompt = _read_prompt(args)
    with load_model(args.model, args) as llm:
        if prompt is None or args.conversation:
            from tinyllm.cli.interactive import View, interact
            from tinyllm.cli.talks import Chat, Talk, Text

            talk: Talk
            if is_chat(llm, args):
                talk = Chat(llm, params, args.system, **chat_options(args))
            else:
                talk = Text(llm, params, special=args.special)
            view = View(args.reasoning, args.wraps and not args.plain, not args.plain, args.verbose)
            return interact(llm, talk, view, prompt)
        return _run_once(llm, prompt, params, args)


# Options


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL [PROMPT] [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser, nargs="?")
    for option, what in (("--model", "MODEL"), ("--prompt", "PROMPT")):
        parser.add_argument(option, dest=f"{option[2:]}_option", metavar=what, help=argparse.SUPPRESS)
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the text; what comes through a pipe follows it, - stands for the pipe alone",
    )

    text = parser.add_argument_group("prompt")
    text.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file")
    text.add_argument(
        "-e", "--escapes", action="store_true", help=r"\n, \t, \\ and \" in the prompt mean what they do in C"
    )
    text.add_argument(
        "--special",
        action="store_true",
        help="read the text of special tokens in the prompt, such as <|im_end|>, as these tokens",
    )
    text.add_argument(
        "--system", metavar="TEXT", help="how a chat model should behave, told before the first message"
    )
    text.add_argument(
        "--conversation", action="store_true", help="go on with a conversation after PROMPT is answered"
    )
    chat = text.add_mutually_exclusive_group()
    chat.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="use the model's chat template (default: where it has one)",
    )
    chat.add_argument("--no-chat", dest="chat", action="store_false", help="continue the prompt as it stands")
    chat.add_argument(
        "--chat-template",
        type=read_text,
        metavar="FILE",
        help="chat with this Jinja template in place of the model's",
    )
    text.add_argument(
        "--template-arg",
        dest="template_args",
        action="append",
        type=_key_and_value,
        metavar="NAME=VALUE",
        help="a variable for the chat template, such as enable_thinking=false; may be given several times",
    )
    text.add_argument(
        "--tools",
        type=_tools,
        metavar="FILE",
        help="what a chat model may call: a JSON list of tools, as OpenAI writes them (docs/tools.md)",
    )
    text.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line, empty ones too (a .jsonl file: one JSON string a line), all as one batch; - "
        "for a pipe. "
        "The results are JSON lines, in that order",
    )

    add_sampling_options(parser)
    add_lora_option(add_model_options(parser))
    add_speculation_options(parser)

    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        help="one JSON object: text, reasoning, tokens, finish_reason, seed, timings...",
    )
    output.add_argument(
        "--no-reasoning",
        dest="reasoning",
        action="store_false",
        help="do not show what a model thinks before it answers (it goes to stderr, faint)",
    )
    output.add_argument(
        "--plain",
        action="store_true",
        help="on a terminal: colour no Markdown, break no lines at words",
    )
    output.add_argument("--no-wrap", dest="wraps", action="store_false", help="do not break lines at words")
    output.add_argument(
        "--verbose", action="store_true", help="in a conversation too, say what each answer took"
    )
    output.add_argument(
        "--logprobs",
        type=_count,
        metavar="K",
        help="show each token's log probability, and the K likeliest tokens in its place",
    )
    output.add_argument(
        "--replay",
        metavar="OUT.json",
        help="generate what --json wrote once more and say whether every token is the same",
    )
    output.add_argument("--version", action="store_true", help="version, instruction set, threads, CUDA")
    output.add_argument("--info", action="store_true", help="all that tinyllm knows about this machine")
    return parser


def _take_options_for_arguments(args: argparse.Namespace) -> None:
    """--model and --prompt are other ways to say MODEL and PROMPT. Raises UsageError where both are there."""
    if args.model_option is not None:
        if args.prompt is not None:
            raise UsageError(f"MODEL is given twice: {args.model} and --model {args.model_option}")
        args.model, args.prompt = args.model_option, args.model
    if args.prompt_option is not None:
        if args.prompt is not None:
            raise UsageError(f"PROMPT is given twice: {args.prompt!r} and --prompt {args.prompt_option!r}")
        args.prompt = args.prompt_option


def _tools(path: str) -> list[dict[str, Any]]:
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise argparse.ArgumentTypeError(f"{path} is no list of tools")
    return value


def _key_and_value(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON where it is that, else as text."""
    name, sign, value = text.partition("=")
    if not name.isidentifier() or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for options that do not go together."""
    sources = {"PROMPT": args.prompt, "--file": args.file, "--prompts": args.prompts, "--replay": args.replay}
    given = [name for name, value in sources.items() if value is not None]
    if args.model is None and args.replay is None:
        raise UsageError("no MODEL given: a .gguf file, a directory, or stories")
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} cannot be used together")
    if args.tools is not None and (args.prompts is not None or args.logprobs is not None):
        raise UsageError("--tools is for a PROMPT or a conversation, without --logprobs")
    if args.conversation and not (_is_terminal(sys.stdin) and sys.stdout.isatty()):
        raise UsageError("--conversation needs a terminal")
    for name, value in chat_only(args):
        if value is not None and args.chat is False:
            raise UsageError(f"{name} is for chat; it cannot be used with --no-chat")
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if math.isnan(getattr(args, name) or 0.0):
            raise UsageError(f"{name} is not a number")


def _print_info(all_of_it: bool) -> int:
    import tinyllm

    info = tinyllm.info()
    if not all_of_it:
        cuda = "CUDA" if info["cuda"] else f"no CUDA: {info['cuda_reason']}"
        put(f"tinyllm {info['version']} ({info['isa']}, {info['threads']} threads; {cuda})")
        return EXIT_OK
    for key, value in info.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        put(f"{key:<18}{text}")
    return EXIT_OK


# Prompts


def _read_prompt(args: argparse.Namespace) -> str | None:
    """The prompt, and behind it what comes through a pipe; None on a terminal without either, which asks for
    a conversation."""
    text = args.prompt if args.file is None else _trimmed(read_text(args.file))
    if not _is_terminal(sys.stdin) and args.file != "-":
        piped = _trimmed(_read_pipe(waits=text in (None, "-")))
        if not piped and text in (None, "-"):
            raise UsageError("there is no PROMPT, and standard input is empty")
        text = piped if text in (None, "-", "") else f"{text}\n{piped}" if piped else text
    elif text == "-":
        text = _trimmed(read_text("-"))
    if text is None:
        if args.json or args.logprobs is not None or not sys.stdout.isatty():
            raise UsageError("there is no PROMPT")
        return None
    return unescaped(text) if args.escapes else str(text)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _trimmed(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _read_pipe(waits: bool) -> str:
    """What standard input holds. waits: whether nobody wonders that it is waited for."""
    if sys.stdin is None:
        return ""
    if waits:
        return read_text("-")
    try:
        comes = bool(select.select([sys.stdin], [], [], PATIENCE_S)[0])
    except (OSError, ValueError):  # no file of the system's
        comes = True
    if not comes:
        note("waiting for the text that follows PROMPT through the pipe (with < /dev/null there is none)")
    try:
        return read_text("-")
    except OSError:  # nohup's, say, which cannot be read
        return ""


def _read_prompts(args: argparse.Namespace) -> list[str]:
    text = read_text(args.prompts)
    if not text.strip():
        raise UsageError(f"{args.prompts} has no prompts")
    lines = text.removesuffix("\n").split("\n")  # an empty line is a prompt, so that results stay in line
    lines = [line.removesuffix("\r") for line in lines]
    if not args.prompts.endswith(".jsonl"):
        return [unescaped(line) if args.escapes else line for line in lines]
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, str):
            raise UsageError(f"{args.prompts}, line {number}: not a JSON string")
        prompts.append(value)
    return prompts


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", '"': '"', "'": "'", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""`text` with \n, \t and the like replaced; an unknown one stays as it is."""
    out, rest = "", text
    while "\\" in rest:
        before, _, rest = rest.partition("\\")
        known = _ESCAPES.get(rest[:1])
        out += before + (known if known is not None else "\\" + rest[:1])
        rest = rest[1:]
    return out + rest


# Runs


def _run_once(llm: LLM, text: str, params: SamplingParams, args: argparse.Namespace) -> int:
    chats = is_chat(llm, args)
    if args.json:
        from tinyllm.cli.results import as_json

        completion = answer(llm, text, params, args)
        put(as_json(llm, text, completion, args))
    elif args.logprobs is not None:
        completion = llm(as_prompt(llm, text, args), params, special=args.special)
        _print_logprobs(llm, completion)
    else:
        page = Page(sys.stdout, wraps=args.wraps and not args.plain, markdown=chats and not args.plain)
        if not chats and sys.stdout.isatty():
            page.write(text, BOLD)
        stream = answer(llm, text, params, args, stream=True)
        completion = print_stream(stream, page, shows_reasoning=args.reasoning)
    print_figures(llm, completion)
    return EXIT_INTERRUPTED if completion.finish_reason == "cancelled" else EXIT_OK


def _print_logprobs(llm: LLM, completion: Completion) -> None:
    """A line a token: its text, log probability and probability, and the likeliest tokens in its place."""

    def name(token: int) -> str:
        return repr(llm.tokenizer.token_text(token)) if llm.tokenizer else str(token)

    tops = completion.top_logprobs or [[] for _ in completion.tokens]
    for token, logprob, top in zip(completion.tokens, completion.logprobs or [], tops, strict=True):
        others = "  ".join(f"{name(t)} {math.exp(p):.1%}" for t, p in top)
        put(f"{name(token):<20} {logprob:9.4f} {math.exp(logprob):7.2%}   {others}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
