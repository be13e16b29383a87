"""The conversation on a terminal: a chat with an instruct model, or texts continued by a base model.

`interact` is the loop; `Chat` and `Text` hold what was said and know what a line, /undo and /clear mean for
them. Texts go to stdout, everything else to stderr. Nothing is written to disk. Imports common.py and
answers.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tinyllm.cli.answers import finish, print_stream
from tinyllm.cli.common import BOLD, EXIT_OK, counted, note, put, rate, styled

if TYPE_CHECKING:
    from tinyllm import LLM, Completion, SamplingParams
    from tinyllm.results import Stream

QUOTES = '"""'
FULL = "nothing was forgotten: /undo takes back the last turn, /clear starts anew"


class Talk(Protocol):
    """What is said so far."""

    greeting: str
    help: str

    def start(self, line: str) -> Stream | None:
        """The model's answer to a line; None where there is nothing to say. Changes nothing yet."""

    def keep(self, completion: Completion) -> None:
        """Adds the last line and its answer."""

    def undo(self) -> str:
        """Takes back the last turn; says what it did."""

    def clear(self) -> str: ...

    def set_system(self, text: str) -> str: ...


class Chat:
    """Messages back and forth through the model's chat template."""

    help = "Type a message and press Enter."

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, **options: Any) -> None:
        """options: further arguments of `LLM.chat`."""
        self.greeting = f"{Path(llm.name).name}: a chat. /help lists the commands, Ctrl-D leaves."
        self._llm, self._params, self._system, self._options = llm, params, system, options
        self._messages: list[dict[str, str]] = []
        self._line = ""

    def start(self, line: str) -> Stream | None:
        if not line.strip():
            return None
        self._line = line
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        messages = [*system, *self._messages, {"role": "user", "content": line}]
        return self._llm.chat(messages, params=self._params, stream=True, **self._options)

    def keep(self, completion: Completion) -> None:
        self._messages.append({"role": "user", "content": self._line})
        self._messages.append({"role": "assistant", "content": completion.text})

    def undo(self) -> str:
        if not self._messages:
            return "there is nothing to take back"
        question = self._messages[-2]["content"]
        del self._messages[-2:]
        return f"took back {question[:60]!r} and its answer"

    def clear(self) -> str:
        self._messages.clear()
        return "the conversation starts anew" + ("" if self._system is None else "; the system prompt stays")

    def set_system(self, text: str) -> str:
        if text:
            self._system = None if text == "-" else text
        return "no system prompt" if self._system is None else f"system prompt: {self._system}"


class Text:
    """A text that a base model continues: a line begins a new one, an empty line goes on with it."""

    help = "Type the beginning of a text and press Enter; press Enter alone to let the text go on."

    def __init__(self, llm: LLM, params: SamplingParams, *, special: bool = False) -> None:
        self._special = special
        self.greeting = (
            f"{Path(llm.name).name} is a base model: it continues a text rather than answering. Type a "
            "beginning; Enter alone goes on, /help lists the commands, Ctrl-D leaves."
        )
        self._llm, self._params = llm, params
        self._texts: list[list[int]] = []  # ids, one text more a turn

    def start(self, line: str) -> Stream | None:
        if line:
            put(styled(line, BOLD, sys.stdout), end="", flush=True)
            return self._llm.stream(line, self._params, special=self._special)
        return self._llm.stream(self._texts[-1], self._params) if self._texts else None

    def keep(self, completion: Completion) -> None:
        self._texts.append([*completion.prompt_tokens, *completion.tokens])

    def undo(self) -> str:
        if not self._texts:
            return "there is nothing to take back"
        self._texts.pop()
        return "took back the last continuation" + ("" if self._texts else "; there is no text now")

    def clear(self) -> str:
        self._texts.clear()
        return "there is no text now"

    def set_system(self, text: str) -> str:
        return "a base model has no system prompt: put what it should know into the text"


def interact(llm: LLM, talk: Talk, *, shows_reasoning: bool = True) -> int:
    """Talks until Ctrl-D."""
    _enable_line_editing()
    note(talk.greeting)
    while True:
        try:
            line = _read_line()
        except EOFError:
            put(flush=True)
            return EXIT_OK
        except KeyboardInterrupt:
            put(flush=True)
            note("Ctrl-C stops an answer; Ctrl-D leaves")
            continue
        command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", line.rstrip(), re.DOTALL)
        if command is None:
            _answer(llm, talk, line, shows_reasoning)
        elif command[1] == "quit":
            return EXIT_OK
        else:
            note(_command(talk, command[1], command[2] or ""))


def _enable_line_editing() -> None:
    """Arrow keys and history in `input`, for this process only; where Python has it."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)


def _read_line() -> str:
    line = input("> ")
    if not line.lstrip().startswith(QUOTES):
        return line
    text = line.lstrip()[len(QUOTES) :]
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + input(". ")
    return text.rstrip()[: -len(QUOTES)].strip("\n")


def _command(talk: Talk, name: str, text: str) -> str:
    commands: dict[str, Callable[[], str]] = {
        "clear": talk.clear,
        "undo": talk.undo,
        "system": lambda: talk.set_system(text),
        "help": lambda: _help(talk),
    }
    unknown = f"there is no command /{name}; /help lists them. A space in front makes it a message"
    return commands.get(name, lambda: unknown)()


def _help(talk: Talk) -> str:
    return f"""{talk.help}
{QUOTES}            begins and ends a text of several lines
/clear         forget everything said so far
/undo          take back the last turn
/system TEXT   set the system prompt (alone: show it; -: none)
/quit          leave, like Ctrl-D
Ctrl-C         stop the answer; what there is of it stays"""


def _answer(llm: LLM, talk: Talk, line: str, shows_reasoning: bool) -> None:
    from tinyllm.errors import ContextError, Error

    try:
        stream = talk.start(line)
        if stream is None:
            return
        completion = print_stream(stream, shows_reasoning=shows_reasoning)
    except ContextError as e:
        note(f"{e}; {FULL}")
        return
    except Error as e:
        note(f"{e}")
        return
    talk.keep(completion)
    t = completion.timings
    used = len(completion.prompt_tokens) + len(completion.tokens)
    note(
        f"{counted(t.generated_tokens, 'token')}, {rate(t.generated_tokens, t.generate_s):.1f} tok/s; "
        f"context {used} of {llm.context}; {finish(llm, completion)}"
    )
    if used >= llm.context:
        note(FULL)
