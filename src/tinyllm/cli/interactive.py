"""The conversation on a terminal: what is typed, what is answered, and the commands that begin with /.

Texts go to stdout, everything else to stderr. Nothing is written to disk but by /save. The standard library's
readline edits lines: it knows pastes, history and resizing, so no dependency is needed for that. Imports
common.py, answers.py and talks.py, which knows what is said.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.cli.answers import finish, print_figures, print_stream
from tinyllm.cli.common import (
    BOLD,
    EXIT_OK,
    UsageError,
    counted,
    in_options,
    json_text,
    note,
    put,
    rate,
    read_text,
    setting,
    shown,
)
from tinyllm.cli.page import Page
from tinyllm.cli.talks import Talk, Text

if TYPE_CHECKING:
    from tinyllm import LLM
    from tinyllm.results import Stream

QUOTES = '"""'
FULL = "nothing was forgotten: /undo takes back the last turn, /drop forgets the oldest, /clear starts anew"
LOW = 4  # what is left is said when it is less than this part of the context


@dataclass
class View:
    """What is shown, and how; /set changes it."""

    reasoning: bool = True
    wraps: bool = True
    markdown: bool = True
    figures: bool = False


class Leave(Exception):
    """The conversation is over."""


def interact(llm: LLM, talk: Talk, view: View | None = None, first: str | None = None) -> int:
    """Talks until Ctrl-D. first: what is said before anything is typed."""
    _enable_line_editing()
    loop = _Conversation(llm, talk, view or View())
    note(talk.greeting)
    if first is not None:
        loop.say(first)
    while True:
        try:
            loop.take(_read_line())
        except (EOFError, Leave) as end:
            if isinstance(end, EOFError):
                put(flush=True)
            return EXIT_OK
        except KeyboardInterrupt:
            put(flush=True)
            note("Ctrl-C stops an answer; Ctrl-D leaves")


def _enable_line_editing() -> None:
    """Arrow keys, history and pasting in `input`, for this process only; where Python has them."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)
    if "libedit" not in (readline.__doc__ or ""):  # which knows no pasting
        readline.parse_and_bind("set enable-bracketed-paste on")


def _read_line() -> str:
    """A message: a line, several that were pasted, or what stands between quotes."""
    line = input("> ")
    if not line.lstrip().startswith(QUOTES):
        return line.rstrip("\n")
    text = line.lstrip()[len(QUOTES) :]
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + input(". ")
    return text.rstrip()[: -len(QUOTES)].strip("\n")


def _agrees(question: str) -> bool:
    """Whether a question is answered with yes; Ctrl-C and Ctrl-D are no."""
    with suppress(EOFError, KeyboardInterrupt):
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    put(flush=True)
    return False


class _Conversation:
    """One talk, and what waits to be said in it."""

    def __init__(self, llm: LLM, talk: Talk, view: View) -> None:
        self._llm, self._talk, self._view = llm, talk, view
        self._read: list[str] = []  # files that go before the next line
        self._told = False  # whether figures said how the model was loaded
        self._commands: dict[str, tuple[Callable[[str], str | None], str, str]] = {
            "regen": (self._regenerate, "", "answer once more in place of the last answer"),
            "undo": (lambda text: talk.undo(), "", "take back the last turn"),
            "clear": (self._clear, "", "forget everything said so far"),
            "drop": (self._drop, "N", "forget the oldest N turns (1); of a text the first N tokens (half)"),
            "system": (talk.set_system, "TEXT", "set the system prompt (alone: show it; -: none)"),
            "set": (
                self._set,
                "NAME VALUE",
                "an option of sampling: /set temperature 0 (-: the model's own)",
            ),
            "show": (lambda text: "\n".join(talk.show()), "", "the model, what is said, the settings"),
            "read": (self._attach, "FILE", "put a text file before your next message"),
            "save": (self._save, "FILE", "write the conversation to a file"),
            "load": (self._load, "FILE", "go on with a conversation that was saved"),
            "help": (lambda text: self._help(), "", "this list; /? too"),
            "exit": (self._leave, "", "leave, like Ctrl-D; /bye and /quit too"),
        }
        for name, same in (("?", "help"), ("bye", "exit"), ("quit", "exit")):
            self._commands[name] = self._commands[same]

    def take(self, line: str) -> None:
        """A command, or a message."""
        command = re.fullmatch(r"/([a-z]+|\?)(?:\s+(.*))?", line.rstrip(), re.DOTALL)
        if command is None:
            self.say(line)
            return
        if command[1] not in self._commands:
            note(f"there is no command /{command[1]}; /help lists them. A space in front makes it a message")
            return
        from tinyllm.errors import Error

        try:
            said = self._commands[command[1]][0](command[2] or "")
        except (UsageError, Error) as error:
            said = in_options(str(error))
        except OSError as error:
            said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if said is not None:
            note(said)

    def say(self, line: str) -> None:
        """A message, behind the files that were read; of a base model's text what is typed is shown again."""
        text = "\n\n".join([*self._read, line]) if self._read else line
        self._answer(lambda: self._talk.start(text), echo=text if isinstance(self._talk, Text) else "")

    def _answer(self, start: Callable[[], Stream | None], echo: str = "") -> None:
        from tinyllm.errors import ContextError, Error

        try:
            try:
                stream = start()
            except KeyboardInterrupt:
                put(flush=True)
                note("stopped by Ctrl-C before the answer began")
                return
            except ContextError as error:
                note(in_options(str(error)))
                if not self._makes_room("answer then"):
                    return
                stream = self._talk.retry()
            if stream is None:
                return
            markdown = self._view.markdown and not isinstance(self._talk, Text)
            page = Page(sys.stdout, wraps=self._view.wraps, markdown=markdown)
            page.write(echo, BOLD)
            completion = print_stream(stream, page, shows_reasoning=self._view.reasoning)
        except Error as error:
            note(in_options(str(error)))
            return
        self._read.clear()
        self._talk.keep(completion)
        t = completion.timings
        used = len(completion.prompt_tokens) + len(completion.tokens)
        room = f"context {used} of {self._llm.context}"
        if self._view.figures:
            print_figures(self._llm, completion, loading=not self._told)
            self._told = True
            note(room)
        else:
            speed = f"{rate(t.generated_tokens, t.generate_s):.1f} tok/s"
            ended = finish(self._llm, completion)
            is_said = room.removeprefix("context ") in ended
            told = [f"{counted(t.generated_tokens, 'token')}, {speed}", *([] if is_said else [room]), ended]
            note("; ".join(told))
        self._go_on(self._llm.context - used)

    def _go_on(self, left: int) -> None:
        """What an answer may ask of the user. left: tokens of the context."""
        if left <= 0:
            if self._makes_room("answer again"):
                self._answer(self._talk.retry)
            return
        if left < self._llm.context // LOW:
            are = "is" if left == 1 else "are"
            note(
                f"{counted(left, 'token')} of context {are} left; /drop forgets the oldest part to make room"
            )
        if self._talk.calls():
            results = [self._result(call) for call in self._talk.calls()]
            self._answer(lambda: self._talk.go_on(results))

    def _makes_room(self, then: str) -> bool:
        """Whether what was asked for has room now: the oldest part goes if the user agrees."""
        what = self._talk.to_forget()
        if not what:
            note(FULL)
            return False
        if not _agrees(f"Forget {what} to make room, and {then}?"):
            note(FULL)
            return False
        self._talk.make_room()
        return True

    @staticmethod
    def _result(call: Any) -> str:
        return input(shown(f"{call.name} {json_text(call.arguments)} gives: ", sys.stdout))

    # ---- commands: what they say

    def _help(self) -> str:
        names = {name: entry for name, entry in self._commands.items() if name not in ("?", "bye", "quit")}
        lines = [f"/{name + ' ' + what:<18}{text}" for name, (_, what, text) in names.items()]
        quotes = f"{QUOTES:<19}begins and ends a text of several lines; pasted lines need none"
        stop = "Ctrl-C             stop the answer; what there is of it stays"
        return "\n".join([self._talk.help, quotes, *lines, stop])

    def _leave(self, text: str) -> None:
        raise Leave

    def _clear(self, text: str) -> str:
        self._read.clear()
        return self._talk.clear()

    def _drop(self, text: str) -> str:
        if text and not text.isdecimal():
            raise UsageError(f"/drop takes a number, not {text!r}")
        return self._talk.drop(int(text) if text else None)

    def _regenerate(self, text: str) -> str | None:
        if self._talk.params.resolve(self._llm.defaults).temperature == 0:
            note("the temperature is 0, so the answer will be the same; /set temperature 0.8 changes that")
        asked: list[Stream | None] = []

        def start() -> Stream | None:
            asked.append(self._talk.again())
            return asked[-1]

        self._answer(start)
        return "there is no answer yet" if asked == [None] else None

    def _set(self, text: str) -> str:
        name, _, value = text.removeprefix("parameter ").strip().partition(" ")
        switches = {
            "verbose": {"figures": True},
            "quiet": {"figures": False},
            "wordwrap": {"wraps": True},
            "nowordwrap": {"wraps": False},
            "color": {"markdown": True},
            "plain": {"markdown": False, "wraps": False},
        }
        if name == "system":
            return self._talk.set_system(value)
        if name in switches:
            for what, shows in switches[name].items():
                setattr(self._view, what, shows)
            return f"{name} from now on"
        if not name or not value:
            return f"/set NAME VALUE takes tinyllm-run's options of sampling, and {', '.join(switches)}"
        changes = setting(name, value.strip())
        self._talk.set_params(**changes)
        return ", ".join(
            f"{key}: {'the default again' if v in (None, {}) else v}" for key, v in changes.items()
        )

    def _attach(self, text: str) -> str:
        path = _path(text)
        self._read.append(read_text(str(path)).rstrip("\n"))
        return f"{path}: {counted(len(self._read[-1]), 'character')}, which go before your next message"

    def _save(self, text: str) -> str:
        from tinyllm.files.outfiles import replacing

        path = _path(text)
        if path.exists() and not _is_saved(path):
            raise UsageError(f"{path} is there and no saved conversation; name another file")
        data = (json_text(self._talk.record(), indent=1) + "\n").encode()
        with replacing(path, len(data)) as file:
            file.write(data)
        return f"saved as {path}; /load {path} goes on with it"

    def _load(self, text: str) -> str:
        path = _path(text)
        try:
            record = json.loads(read_text(str(path)))
        except (ValueError, RecursionError):
            raise UsageError(f"{path} is no JSON") from None
        try:
            said = self._talk.restore(record)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        self._read.clear()
        return f"loaded {path}: {said}"


def _path(text: str) -> Path:
    name = text.strip().strip("\"'")
    if not name:
        raise UsageError("which file?")
    return Path(name).expanduser()


def _is_saved(path: Path) -> bool:
    try:
        record = json.loads(read_text(str(path)))
    except (OSError, UsageError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "model" in record and bool({"messages", "tokens"} & record.keys())
