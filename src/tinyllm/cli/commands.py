"""The one command `tinyllm`: the table of commands, each of which is a subcommand and a command of its own.

Imports the module of a command when it is asked for, and nothing else of the package, so that it adds nothing
to a command's own start. `python -m tinyllm` is the same. Read next: run.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from tinyllm import cli


class Command(NamedTuple):
    """module: of this package, with a `main(argv)`. alone: whether it is installed as tinyllm-NAME, too."""

    module: str
    does: str
    alone: bool = True


COMMANDS = {
    "run": Command("run", "continue a text, answer a question, or talk"),
    "serve": Command("serve", "serve models over HTTP, to programs and to a browser"),
    "batch": Command("batch", "answer every row of a file, here or on a cluster", alone=False),
    "pull": Command("pull", "fetch a model from Hugging Face", alone=False),
    "list": Command(
        "list", "show the models in the caches of Hugging Face, Ollama and llama.cpp", alone=False
    ),
    "inspect": Command("inspect", "show what a model is made of, how it cuts a text, what comes next"),
    "embed": Command("embed", "make vectors of the texts in a file, for a search by meaning"),
    "quantize": Command("quantize", "make a model smaller and faster, less exact"),
    "bench": Command("bench", "measure tokens a second, and how close that is to the machine's limit"),
    "compare": Command(
        "compare", "set models or quantizations side by side: size, speed, quality", alone=False
    ),
    "perplexity": Command("perplexity", "measure how well a model predicts a text"),
}

HELP = f"""usage: tinyllm COMMAND [options]

Runs language models from files on this machine.

commands:
{chr(10).join(f"  {name:<12}{command.does}" for name, command in COMMANDS.items())}

examples:
  tinyllm run stories "Once upon a time"        the small model that comes with tinyllm
  tinyllm run model.gguf                        a conversation with a model of your own
  tinyllm pull Qwen/Qwen3-0.6B-GGUF:Q8_0        fetch one; then: tinyllm run hf:Qwen/Qwen3-0.6B-GGUF:Q8_0
  tinyllm run --help                            the options of a command

`tinyllm --version` and `tinyllm --info` say what is installed and what it can use here."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command by its name."""
    first, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if first in ("--version", "--info"):
        first, rest = "run", [first, *rest]
    if first in COMMANDS:
        cli.prefix = "tinyllm "  # what the command calls itself
        command: Callable[[list[str]], int] = import_module(f"tinyllm.cli.{COMMANDS[first].module}").main
        return command(rest)
    from tinyllm.cli.common import UsageError, put, run_command

    def answer(argv: list[str]) -> int:
        if first not in ("-h", "--help", "help"):
            raise UsageError(_unknown(first))
        put(HELP)
        return 0

    return run_command("tinyllm", answer, [])


def _unknown(name: str) -> str:
    import os
    from difflib import get_close_matches

    if name.startswith("-"):
        return f"{name} stands after a command: tinyllm run {name} ..."
    if name == "stories" or ":" in name or os.path.exists(os.path.expanduser(name)):
        return f"{name} is a model, not a command: tinyllm run {name}"
    near = get_close_matches(name, COMMANDS, 1)
    return f"{name!r} is no command" + (f"; did you mean {near[0]}?" if near else f": {', '.join(COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main())
