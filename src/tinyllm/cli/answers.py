"""How a prompt goes to the model, through its chat template or as it stands, and how an answer is printed.

What run.py, results.py and interactive.py share. Text goes to stdout, everything about it to stderr. Imports
common.py and page.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.cli.common import (
    DIM,
    UsageError,
    counted,
    json_text,
    note,
    peak_memory_bytes,
    put,
    rate,
    seconds,
    size,
)
from tinyllm.cli.page import Page

if TYPE_CHECKING:
    from tinyllm import LLM, Completion, SamplingParams
    from tinyllm.chat.reasoning import Kind
    from tinyllm.results import Stream


def is_chat(llm: LLM, args: argparse.Namespace) -> bool:
    """Whether prompts go through the chat template: as asked, else where the model has one."""
    if args.chat is not None:
        return bool(args.chat)
    has_template = llm.chat_template is not None or args.chat_template is not None
    for name, value in chat_only(args):
        if value is not None and not has_template:
            raise UsageError(f"{name} is for chat models, and {llm.name} has no chat template")
    return has_template


def as_prompt(llm: LLM, text: str, args: argparse.Namespace) -> str | list[int]:
    """What the model gets: the text, or a chat model's whole prompt as ids."""
    if not is_chat(llm, args):
        return text
    return llm.chat_ids(messages_of(text, args), **chat_options(args))


def messages_of(text: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """The conversation that a prompt begins."""
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": text}]


def answer(
    llm: LLM, text: str, params: SamplingParams, args: argparse.Namespace, *, stream: bool = False
) -> Any:
    """A Completion, or a Stream of it: a chat model's answer, or how another goes on."""
    ask: Any = llm.chat if is_chat(llm, args) else llm.stream if stream else llm
    if is_chat(llm, args):
        return ask(messages_of(text, args), params=params, stream=stream, **chat_options(args))
    return ask(text, params, special=args.special)


def chat_only(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The options that make no sense without a chat template."""
    return [
        ("--system", args.system),
        ("--template-arg", args.template_args),
        ("--tools", args.tools),
    ]


def chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `LLM.chat` that were given."""
    return {
        "tools": args.tools,
        "chat_template": args.chat_template,
        "template_args": dict(args.template_args or ()),
        "special_in_messages": args.special,
    }


def print_stream(stream: Stream, page: Page | None = None, *, shows_reasoning: bool = True) -> Completion:
    """Prints a text as it comes, and a line break at its end. Reasoning goes to stderr, and a call of a tool
    to stdout, a line of JSON. Ctrl-C ends it there. page: what text goes to; None: stdout, as it is."""
    page = page or Page(sys.stdout, wraps=False)
    thoughts = Page(sys.stderr, wraps=page.wraps)
    kind: Kind = "text"
    ends_line = True
    with stream:
        try:
            for piece in stream:
                shows: Kind = "text" if piece.kind == "tool_call" else piece.kind
                if shows != kind and (piece.text or piece.tool_call):
                    (thoughts if kind == "reasoning" else page).end()
                    kind = _print_change(shows, ends_line, shows_reasoning)
                    ends_line = True
                if piece.tool_call is not None:
                    call = {"name": piece.tool_call.name, "arguments": piece.tool_call.arguments}
                    page.write("" if ends_line else "\n")
                    page.end()
                    put(json_text({"tool_call": call}), flush=True)
                    ends_line = True
                elif piece.kind == "text":
                    page.write(piece.text)
                elif piece.kind == "reasoning" and shows_reasoning:
                    thoughts.write(piece.text, DIM)
                if piece.text and piece.kind != "tool_call":
                    ends_line = piece.text.endswith("\n") or (kind == "reasoning" and not shows_reasoning)
        except KeyboardInterrupt:
            ends_line = False
    page.end()
    thoughts.end()
    if not ends_line:
        put(to=sys.stdout if kind == "text" else sys.stderr, flush=True)
    return stream.completion


def _print_change(to: Kind, ends_line: bool, shows_reasoning: bool) -> Kind:
    """What stands between reasoning and answer on a terminal, where both go to."""
    if to == "reasoning" and not shows_reasoning:
        note("thinking ...")
    elif to == "text" and shows_reasoning:
        put("\n", to=sys.stderr, flush=True)
    elif not ends_line:
        put(to=sys.stderr, flush=True)
    return to


def finish(llm: LLM, completion: Completion) -> str:
    """Why the text ended, in words."""
    if completion.finish_reason == "cancelled":
        return "stopped by Ctrl-C"
    if completion.finish_reason == "length":
        used = len(completion.prompt_tokens) + len(completion.tokens)
        if used >= llm.context:
            return f"the context is full: {used} of {llm.context} tokens"
        return f"ended after {counted(len(completion.tokens), 'token')}, as asked"
    if isinstance(completion.stop_reason, str):
        return f"ended before {completion.stop_reason!r}, as asked"
    return "ended by the model"


def print_figures(llm: LLM, completion: Completion, *, loading: bool = True) -> None:
    """What a text took: loading, prompt, answer."""
    t = completion.timings
    if loading:
        where = f"cpu, {llm.model.threads} threads" if llm.device == "cpu" else llm.device
        note(
            f"{Path(llm.name).name}: loaded in {seconds(llm.load_s)}, {size(llm.model.weight_bytes)} of "
            f"weights, context {llm.context}, {where}; "
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
