"""How a prompt goes to the model, through its chat template or as it stands, and how an answer is printed.

What run.py, results.py and interactive.py share. Text goes to stdout, everything about it to stderr. Imports
common.py.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from tinyllm.cli.common import DIM, UsageError, counted, note, put, styled

if TYPE_CHECKING:
    from tinyllm import LLM, Completion
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
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = [*system, {"role": "user", "content": text}]
    return llm.chat_ids(messages, **chat_options(args))


def chat_only(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The options that make no sense without a chat template."""
    return [("--system", args.system), ("--template-arg", args.template_args)]


def chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `LLM.chat` that were given."""
    return {
        "chat_template": args.chat_template,
        "template_args": dict(args.template_args or ()),
        "special_in_messages": args.special,
    }


def print_stream(stream: Stream, *, shows_reasoning: bool = True) -> Completion:
    """Prints a text as it comes, and a line break at its end; reasoning goes to stderr. Ctrl-C ends it
    there."""
    kind, ends_line = "text", True
    with stream:
        try:
            for piece in stream:
                if not piece.text:
                    continue
                if piece.kind != kind:
                    kind = _print_change(piece.kind, ends_line, shows_reasoning)
                if kind == "text":
                    put(piece.text, end="", flush=True)
                elif shows_reasoning:
                    put(styled(piece.text, DIM, sys.stderr), to=sys.stderr, end="", flush=True)
                ends_line = piece.text.endswith("\n") or (kind == "reasoning" and not shows_reasoning)
        except KeyboardInterrupt:
            ends_line = False
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
