"""tinyllm-run: continue a text or answer a question, once, in a batch, as JSON, or in a conversation.

Text goes to stdout, everything about it to stderr. Imports common.py and answers.py; results.py (JSON and
replay) and interactive.py (the terminal conversation) are imported when they are needed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.cli import prefix
from tinyllm.cli.answers import as_prompt, chat_only, chat_options, finish, is_chat, print_stream
from tinyllm.cli.common import (
    BOLD,
    EXIT_CODES,
    EXIT_INTERRUPTED,
    EXIT_OK,
    Parser,
    UsageError,
    add_model_argument,
    add_model_options,
    add_sampling_options,
    counted,
    load_model,
    note,
    peak_memory_bytes,
    positive,
    put,
    rate,
    read_text,
    run_command,
    sampling_fields,
    seconds,
    size,
    styled,
)

if TYPE_CHECKING:
    from tinyllm import LLM, Completion, SamplingParams

PROG = f"{prefix}run"

DESCRIPTION = """Runs a language model from a file on this machine.

A base model continues PROMPT; a model made for chat answers it. Without a prompt, on a terminal, you get a
conversation. A prompt can also come through a pipe."""

EPILOG = f"""examples:
  {PROG} stories "Once upon a time"              the small model that comes with tinyllm
  {PROG} model.gguf                              a conversation; /help there lists its commands
  {PROG} model.gguf "What is RoPE?" --temp 0     the likeliest answer, the same every time
  cat notes.txt | {PROG} model.gguf --system "Summarize this text."
  {PROG} stories "Lily" -n 50 --seed 7 --json > out.json
  {PROG} --replay out.json                       does this machine give the very same tokens?
  {PROG} stories --prompts beginnings.txt        one prompt a line, as one batch, JSON lines out

{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    return run_command(PROG, _run, argv)


def _run(argv: list[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
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
        if prompt is None:
            from tinyllm.cli.interactive import Chat, Text, interact

            chats = is_chat(llm, args)
            talk: Chat | Text = Text(llm, params, special=args.special)
            if chats:
                talk = Chat(llm, params, args.system, **chat_options(args))
            return interact(llm, talk, shows_reasoning=args.reasoning)
        return _run_once(llm, prompt, params, args)


# Options


def _parser() -> Parser:
    parser = Parser(PROG, "MODEL [PROMPT] [options]", DESCRIPTION, EPILOG)
    add_model_argument(parser, nargs="?")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text; - reads it from a pipe")

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
        "--prompts",
        metavar="FILE",
        help="one prompt a line, empty ones too (a .jsonl file: one JSON string a line), all as one batch; - "
        "for a pipe. "
        "The results are JSON lines, in that order",
    )

    add_sampling_options(parser)
    add_model_options(parser)

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
    """The prompt; None on a terminal without one, which asks for a conversation."""
    if args.file is not None:
        text = read_text(args.file)
    elif args.prompt == "-" or (args.prompt is None and not sys.stdin.isatty()):
        text = read_text("-")
        if not text:
            raise UsageError("there is no PROMPT, and standard input is empty")
    elif args.prompt is None:
        if args.json or args.logprobs is not None or not sys.stdout.isatty():
            raise UsageError("there is no PROMPT")
        return None
    else:
        return unescaped(args.prompt) if args.escapes else str(args.prompt)
    text = text.removesuffix("\n").removesuffix("\r")
    return unescaped(text) if args.escapes else text


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
    prompt, chats = as_prompt(llm, text, args), is_chat(llm, args)
    if args.json:
        from tinyllm.cli.results import as_json

        completion = llm(prompt, params, special=args.special, reasoning=chats)
        put(as_json(llm, text, completion, args))
    elif args.logprobs is not None:
        completion = llm(prompt, params, special=args.special)
        _print_logprobs(llm, completion)
    else:
        if not chats and sys.stdout.isatty():
            put(styled(text, BOLD, sys.stdout), end="", flush=True)
        stream = llm.stream(prompt, params, special=args.special, reasoning=chats)
        completion = print_stream(stream, shows_reasoning=args.reasoning)
    _print_figures(llm, completion)
    return EXIT_INTERRUPTED if completion.finish_reason == "cancelled" else EXIT_OK


def _print_logprobs(llm: LLM, completion: Completion) -> None:
    """A line a token: its text, log probability and probability, and the likeliest tokens in its place."""

    def name(token: int) -> str:
        return repr(llm.tokenizer.token_text(token)) if llm.tokenizer else str(token)

    tops = completion.top_logprobs or [[] for _ in completion.tokens]
    for token, logprob, top in zip(completion.tokens, completion.logprobs or [], tops, strict=True):
        others = "  ".join(f"{name(t)} {math.exp(p):.1%}" for t, p in top)
        put(f"{name(token):<20} {logprob:9.4f} {math.exp(logprob):7.2%}   {others}".rstrip())


def _print_figures(llm: LLM, completion: Completion) -> None:
    t = completion.timings
    where = f"cpu, {llm.model.threads} threads" if llm.device == "cpu" else llm.device
    note(
        f"{Path(llm.name).name}: loaded in {seconds(llm.load_s)}, {size(llm.model.weight_bytes)} of weights, "
        f"context {llm.context}, {where}; "
        f"peak memory {size(peak_memory_bytes())}"
    )
    prompt_rate, token_rate = rate(t.prompt_tokens, t.prompt_s), rate(t.generated_tokens, t.generate_s)
    prompt, generated = counted(t.prompt_tokens, "token", 5), counted(t.generated_tokens, "token", 5)
    note(f"prompt     {prompt} in {seconds(t.prompt_s):>7}  {prompt_rate:8.1f} tok/s")
    note(
        f"generated  {generated} in {seconds(t.generate_s):>7}  {token_rate:8.1f} tok/s  "
        f"{token_rate * llm.model.token_bytes / 1e9:.2f} GB/s of weights"
    )
    note(f"{finish(llm, completion)}; seed {completion.seed}")


if __name__ == "__main__":
    sys.exit(main())
