"""tinyllm-run on a terminal: the echo, colours, the conversation and its commands, Ctrl-C and Ctrl-D.

A pseudo-terminal runs the real program as a person would; the texts and commands themselves are tested beside
it without one.
"""

from __future__ import annotations

import ast
import fcntl
import importlib.util
import io
import itertools
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_hostile import STRING, array, encode, scalar, tiny_directory, tiny_gguf

import tinyllm
from tinyllm import LLM, SamplingParams
from tinyllm.cli.common import BACKGROUNDS, BOLD, CYAN, DIM, progress_bar, progress_line, shown
from tinyllm.cli.interactive import View, interact
from tinyllm.cli.talks import Chat, Talk, Text
from tinyllm.errors import FormatError, TemplateError, UnsupportedError

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
# Takes the terminal over first, so that Ctrl-C is a signal, and listens to it even where the tests run in the
# background, whose commands ignore it. No bar is drawn where a busy machine is slow to load.
LAUNCH = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from tinyllm.cli import common, run
common.BAR_AFTER_S = float("inf")
sys.exit(run.main())
"""
END = "\x1b[0m"
LIMIT_S = 120  # for something that takes a second; only a hang reaches it


class Terminal:
    """tinyllm-run in a pseudo-terminal of its own."""

    def __init__(self, *argv: str | Path, columns: int = 1320, **env: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns)
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "INPUTRC", "COLUMNS")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, argv)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**environment, "TERM": "xterm", "INPUTRC": os.devnull, **env},
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""  # since the last `expect`

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    def expect(self, text: str) -> str:
        """Waits for `text`; what came before it."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.seen:
            chunk = self._read(deadline)
            assert chunk, f"the program ended without {text!r}: {self.seen!r}"
            self.seen += chunk
        before, _, self.seen = self.seen.partition(text)
        return before

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def interrupt_prompt(self, text: str) -> str:
        """Ctrl-C at a prompt, again every 2 s, until `text`; what came before it.

        A signal between the printing of the prompt and readline's wait for keys is seen with the next only
        (CPython's readline looks when its wait is interrupted). A person presses the key again; so does this.
        """
        deadline = time.monotonic() + LIMIT_S
        while text not in self.seen and time.monotonic() < deadline:
            self.send("\x03")
            until = time.monotonic() + 2
            while (
                text not in self.seen
                and select.select([self.master], [], [], max(0.0, until - time.monotonic()))[0]
            ):
                self.seen += self._read(deadline)
        return self.expect(text)

    def rest(self) -> str:
        """Everything until the program ends."""
        deadline = time.monotonic() + LIMIT_S
        while chunk := self._read(deadline):
            self.seen += chunk
        return self.seen

    def code(self) -> int:
        return self.process.wait(timeout=LIMIT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def _read(self, deadline: float) -> str:
        ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing comes any more; so far: {self.seen!r}"
        try:
            return os.read(self.master, 65536).decode("utf-8", "replace").replace("\r\n", "\n")
        except OSError:  # how Linux says that the other side is gone
            return ""


Open = Callable[..., Terminal]


@pytest.fixture
def terminal() -> Iterator[Open]:
    opened: list[Terminal] = []

    def start(*argv: str | Path, **options: Any) -> Terminal:
        opened.append(Terminal(*argv, **options))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with tinyllm.load("stories", context=200) as llm:
        yield llm


# --- one prompt -----------------------------------------------------------------------------------------


def test_a_base_models_prompt_is_echoed_before_the_text(terminal: Open, llm: LLM) -> None:
    text = llm("Once upon a time", max_tokens=8, temperature=0).text
    out = terminal("stories", "Once upon a time", "-n", "8", "--temp", "0").rest()
    assert f"{BOLD}Once upon a time\x1b[0m{text}\n" in out
    assert "8 tokens" in out


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_not_wanted(terminal: Open, env: dict[str, str]) -> None:
    out = terminal("stories", "Once upon a time", "-n", "2", **env).rest()
    assert out.startswith("Once upon a time")
    assert "\x1b[" not in out


def test_json_has_no_echo_and_no_colours(terminal: Open) -> None:
    out = terminal("stories", "Once upon a time", "-n", "2", "--json").rest()
    assert out.startswith('{"model": "stories", ')


def test_a_chat_prompt_is_not_echoed(terminal: Open, chat_file: Path) -> None:
    out = terminal("stories", "Once upon a time", "--chat-template", chat_file, "-n", "2").rest()
    assert "Once upon a time" not in out


def test_reasoning_is_faint(terminal: Open, llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "thinks.jinja"
    path.write_text("{{ messages[0].content }}<think>\n")
    options = ("--chat-template", path, "-n", "6", "--temp", "0")
    messages = [{"role": "user", "content": "Hi"}]
    thought = llm.chat(messages, chat_template=path.read_text(), max_tokens=6, temperature=0).reasoning
    assert thought
    seen = terminal("stories", "Hi", *options).expect("loaded in")
    *words, figures = seen.split(END)
    assert all(word.startswith(DIM) for word in words)
    assert "".join(words).replace(DIM, "") == thought
    assert figures == f"\n{DIM}stories.gguf: "
    hidden = terminal("stories", "Hi", *options, "--no-reasoning").expect("loaded in")
    assert hidden == f"{DIM}thinking ...{END}\n{DIM}stories.gguf: "


def test_ctrl_c_ends_the_text(terminal: Open, tmp_path: Path) -> None:
    # A prompt long enough to keep any machine busy for seconds, and interruptible within a layer.
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Lily had a dog. " * 6000 + "THE END")
    run = terminal("stories", "-f", prompt, "-c", "100000")
    run.expect("THE END")
    time.sleep(0.5)
    run.send("\x03")
    out = run.rest()
    assert run.code() == 130
    assert "stopped by Ctrl-C" in out
    assert "Traceback" not in out


def test_json_on_a_terminal_needs_a_prompt(terminal: Open) -> None:
    run = terminal("stories", "--json")
    assert "tinyllm-run: there is no PROMPT" in run.rest()
    assert run.code() == 2


# --- the conversation -----------------------------------------------------------------------------------


def test_a_chat_on_a_terminal(terminal: Open, chat_file: Path) -> None:
    run = terminal("stories", "--chat-template", chat_file, "-n", "5", "--temp", "0", "--system", "Be kind.")
    assert "a chat" in run.expect("> ")
    run.send("Hello\r")
    answer = run.expect("tok/s; context ")
    assert answer.startswith("Hello\n")
    assert "5 tokens, " in answer
    used = int(run.expect(" of 512"))
    run.expect("> ")

    run.send('"""first\rsecond\r"""\r')
    run.expect("tok/s; context ")
    assert int(run.expect(" of 512")) > used
    run.expect("> ")

    run.send("/undo\r")
    run.expect("took back 'first\\nsecond' and its answer")
    run.expect("> ")
    run.send("/system\r")
    run.expect("system prompt: Be kind.")
    run.expect("> ")
    run.send("/nonsense\r")
    run.expect("there is no command /nonsense")
    run.expect("> ")
    run.send("/help\r")
    listing = run.expect("> ")
    assert all(word in listing for word in ("/clear", "/undo", "/system", '"""', "Ctrl-C"))
    run.interrupt_prompt("Ctrl-D leaves")
    run.expect("> ")
    run.send("\x04")
    run.rest()
    assert run.code() == 0


@pytest.mark.skipif(importlib.util.find_spec("readline") is None, reason="this Python has no readline")
def test_the_arrow_key_brings_back_the_last_line(terminal: Open) -> None:
    run = terminal("stories", "-n", "6", "--temp", "0")
    assert "is a base model" in run.expect("> ")
    texts = []
    for keys in ("One day\r", "\x1b[A\r"):
        run.send(keys)
        run.expect(BOLD + "One day\x1b[0m")
        texts.append(run.expect("tok/s"))
        run.expect("> ")
    assert texts[0].split("\n")[0] == texts[1].split("\n")[0]
    run.send("/quit\r")
    run.rest()
    assert run.code() == 0


GNU_READLINE = pytest.mark.skipif(
    importlib.util.find_spec("readline") is None
    or "libedit" in (importlib.import_module("readline").__doc__ or ""),
    reason="this Python has no GNU readline",
)


@GNU_READLINE
def test_pasted_lines_are_one_message(terminal: Open, chat_file: Path) -> None:
    run = terminal("stories", "--chat-template", chat_file, "-n", "3", "--temp", "0")
    run.expect("\x1b[?2004h> ")  # the terminal is asked to mark what is pasted
    run.send("\x1b[200~first line\r/undo\r\tlast line\r\x1b[201~")
    time.sleep(0.3)
    run.send(" typed\r")
    run.expect("3 tokens, ")
    run.expect("> ")
    run.send("/undo\r")
    run.expect(repr("first line\n/undo\n\tlast line\n typed"))
    run.expect("> ")
    run.send("\x04")
    assert run.code() == 0


def test_lines_end_between_words_at_the_edge_of_any_size(terminal: Open, llm: LLM) -> None:
    options = ("-n", "60", "--temp", "0", "-c", "200")
    text = "Once upon a time" + llm("Once upon a time", max_tokens=60, temperature=0).text
    run = terminal("stories", *options, columns=30)
    for columns in (30, 50):
        run.resize(columns)
        run.expect("> ")
        run.send("Once upon a time\r")
        run.expect(f"{BOLD}Once")
        shown = "Once" + run.expect(f"\n{DIM}60 tokens")
        lines = re.sub(r"\x1b\[\d*m", "", shown).split("\n")
        assert " ".join(" ".join(lines).split()) == " ".join(text.split())
        assert columns - 15 < max(map(len, lines)) <= columns
        figures = "60 tokens" + run.expect(END)
        assert max(map(len, figures.split("\n"))) <= columns, "what is said of it as well"
    run.expect("> ")
    run.send("/bye\r")
    assert run.code() == 0


def test_plain_breaks_no_lines(terminal: Open, llm: LLM) -> None:
    text = llm("Once upon a time", max_tokens=60, temperature=0).text
    for option in ("--plain", "--no-wrap", "--nowordwrap"):
        out = terminal("stories", "Once upon a time", "-n", "60", "--temp", "0", option, columns=30).rest()
        assert f"Once upon a time{END}{text}\n" in out


def test_a_conversation_goes_on_after_a_prompt(terminal: Open, chat_file: Path) -> None:
    run = terminal("stories", "-p", "Hello", "-cnv", "--chat-template", chat_file, "-n", "3", "--verbose")
    run.expect("a chat")
    run.expect("loaded in")
    said = run.expect("> ")
    assert "generated      3 tokens in" in said
    assert said.count("3 tokens") == 2, "in the figures, and in why it ended"
    assert re.search(r"context \d+ of 512", said)
    run.send("Again\r")
    assert "loaded in" not in run.expect("generated"), "it was loaded once"
    for message in ("Again", "Hello"):
        run.expect("> ")
        run.send("/undo\r")
        run.expect(f"took back '{message}' and its answer")
    run.expect("> ")
    run.send("\x04")
    run.rest()
    assert run.code() == 0


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(terminal: Open, tmp_path: Path) -> None:
    template = tmp_path / "slow.jinja"
    template.write_text("{{ 'Lily had a dog. ' * 6000 if messages[-1].content == 'long' else 'Once' }}")
    run = terminal("stories", "--chat-template", template, "-c", "100000", "-n", "3")
    run.expect("> ")
    run.send("long\r")
    run.expect("long\n")
    time.sleep(0.5)
    run.send("\x03")
    run.expect("stopped by Ctrl-C")
    run.expect("> ")
    run.send("short\r")
    run.expect("3 tokens")
    run.expect("> ")
    run.send("\x04")
    assert "Traceback" not in run.rest()
    assert run.code() == 0


# --- the same, without a terminal -----------------------------------------------------------------------


def type_lines(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(lines)

    def read(prompt: str) -> str:
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)


def converse(
    llm: LLM,
    talk: Talk,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[str, str]:
    """A conversation of typed lines, then Ctrl-D; what it wrote to stdout and stderr."""
    type_lines(lines, monkeypatch)
    assert interact(llm, talk) == 0
    out, err = capsys.readouterr()
    return out, err


PARAMS = SamplingParams(max_tokens=5, temperature=0)


@pytest.fixture(scope="module")
def endless(llm: LLM) -> SamplingParams:
    """No token ends the text."""
    return SamplingParams(temperature=0, logit_bias=dict.fromkeys(llm.eos_ids, float("-inf")))


def test_a_chat_sends_everything_said_so_far(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = []
    monkeypatch.setattr(
        llm,
        "chat",
        lambda messages, **options: (sent.append(messages), LLM.chat(llm, messages, **options))[1],
    )
    talk = Chat(llm, PARAMS, None, chat_template=TEMPLATE)
    lines = [
        "Hello",
        "",
        "/system Be brief.",
        " /not a command",
        "/undo",
        "Bye",
        "/clear",
        "Again",
        "/system -",
        "More",
    ]
    converse(llm, talk, lines, monkeypatch, capsys)
    roles = [[message["role"] for message in messages] for messages in sent]
    assert roles == [
        ["user"],
        ["system", "user", "assistant", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
        ["user", "assistant", "user"],
    ]
    assert [messages[-1]["content"] for messages in sent] == [
        "Hello",
        " /not a command",
        "Bye",
        "Again",
        "More",
    ]
    assert sent[1][2]["content"] == llm.chat(sent[0], params=PARAMS, chat_template=TEMPLATE).text


def test_a_full_context_is_said_with_numbers_and_forgets_nothing(
    llm: LLM, endless: SamplingParams, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Chat(llm, endless, None, chat_template=TEMPLATE)
    _, err = converse(llm, talk, ["Hello", "One more thing", "n"], monkeypatch, capsys)
    assert "tok/s; the context is full: 200 of 200 tokens" in err, (
        "the answer ran into it, which is said once"
    )
    assert "tokens do not fit into the context of 200" in err, "the next question did not fit"
    assert "begin with a larger context: -c N" in err
    assert "context=" not in err
    assert err.count("nothing was forgotten") == 2
    assert talk._messages[0]["content"] == "Hello"
    assert len(talk._messages) == 2


def test_the_oldest_turns_go_when_the_user_agrees(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Chat(llm, SamplingParams(max_tokens=40, temperature=0), "Be kind.", chat_template=TEMPLATE)
    lines = ["One", "Two", "Three", "Four", "yes", "/drop", "/drop x"]
    asked: list[str] = []
    typed = iter(lines)

    def read(prompt: str) -> str:
        asked.append(prompt)
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    assert interact(llm, talk) == 0
    err = capsys.readouterr().err
    (question,) = (prompt for prompt in asked if prompt != "> ")
    assert re.fullmatch(
        r"Forget the oldest (1|2) of 3 turns to make room, and answer again\? \[y/N\] ", question
    )
    n = int(question.split()[3])
    left = [m["content"] for m in talk._messages if m["role"] == "user"]
    assert left == ["One", "Two", "Three", "Four"][n + 1 :], "one more by /drop"
    assert f"forgot 1 turn; {3 - n} left" in err
    assert "/drop takes a number, not 'x'" in err
    assert re.search(r"\d+ tokens of context are left; /drop forgets the oldest part", err), (
        "it is said before"
    )


def test_an_answer_that_broke_off_may_be_made_again_with_room(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Chat(llm, SamplingParams(max_tokens=100, temperature=0), None, chat_template=TEMPLATE)
    _, err = converse(llm, talk, ["One", "Two", "y"], monkeypatch, capsys)
    assert err.count("the context is full: 200 of 200 tokens") == 1
    assert [m["content"] for m in talk._messages if m["role"] == "user"] == ["Two"]
    alone = llm.chat([{"role": "user", "content": "Two"}], params=talk.params, chat_template=TEMPLATE)
    assert talk._messages[-1]["content"] == alone.text


def test_a_long_text_goes_on_without_its_beginning(
    llm: LLM, endless: SamplingParams, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Text(llm, endless)
    _, err = converse(llm, talk, ["Once upon a time", "", "n", "", "y", "/drop 10"], monkeypatch, capsys)
    assert "nothing was forgotten" in err
    assert "forgot 10 tokens; 190 left" in err
    ids, _ = talk._texts[-1]
    assert ids[0] == llm.tokenizer.bos_id  # type: ignore[union-attr]
    too_long = "dog " * 300
    _, err = converse(llm, Text(llm, endless), [too_long], monkeypatch, capsys)
    assert "do not fit into the context of 200" in err, "nothing helps, so nothing is asked"


def test_another_answer_differs_whatever_the_seed(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=7)
    for talk in (Chat(llm, params, None, chat_template=TEMPLATE), Text(llm, params)):
        lines = ["Once", "/regen", "/undo", "Once", "/set seed 7", "/undo", "Once"]
        out, err = converse(llm, talk, lines, monkeypatch, capsys)
        first, again, undone, same = (line.removeprefix("Once") for line in out.rstrip("\n").split("\n"))
        assert len({first, again, undone}) == 3
        assert same == first, "a seed that is set begins anew"
        assert "seed: 7" in err
    greedy = Chat(llm, PARAMS, None, chat_template=TEMPLATE)
    out, err = converse(llm, greedy, ["/regen", "Hi", "/regen", "/set temp 1"], monkeypatch, capsys)
    assert "there is no answer yet" in err
    assert "the temperature is 0, so the answer will be the same" in err
    assert len(set(out.rstrip("\n").split("\n"))) == 1
    assert len(greedy._messages) == 2


def test_settings_have_the_names_of_options(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk, view = Chat(llm, PARAMS, None, chat_template=TEMPLATE), View()
    lines = """/set temperature 0.5|/set parameter top_k 3|/set num_predict 9|/set repeat-penalty 1.5
        /set stop END|/set min_p -|/set logit_bias 5-inf|/set verbose|/set nowordwrap|/set temperature hot
        /set system Be brief.
        /set nonsense 1|/set temprature 1|/set help -|/set num_ctx 99|/set ctx-size 9|/set
        /set top_p 7|/show|/?|/set max-tokens -1|/set logit-bias -"""
    type_lines([line.strip() for line in lines.replace("\n", "|").split("|")], monkeypatch)
    assert interact(llm, talk, view) == 0
    err = capsys.readouterr().err
    p = talk.params
    assert (p.temperature, p.top_k, p.repetition_penalty, p.stop, p.min_p) == (0.5, 3, 1.5, ("END",), None)
    assert (p.max_tokens, p.logit_bias) == (None, {})
    assert (view.figures, view.wraps, talk._system) == (True, False, "Be brief.")
    for words in (
        "temperature: invalid float value: 'hot'",
        "there is no setting nonsense",
        "there is no setting temprature; temperature is one",
        "there is no setting help",
        "ctx_size cannot change while a model is loaded",
        "context cannot change while a model is loaded",
        "top_p is 7",
        "min_p: the default again",
        "temperature 0.5, top_k 3, top_p 0.95, min_p 0.05",
        "logit_bias {5: -inf}",
        "system prompt: Be brief.",
        "0 turns so far",
    ):
        assert words in err, words
    for command in (
        "regen",
        "undo",
        "clear",
        "drop",
        "system",
        "set",
        "show",
        "read",
        "save",
        "load",
        "exit",
    ):
        assert f"\n/{command} " in err


def test_a_conversation_is_saved_and_loaded(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, notes = tmp_path / "talk.json", tmp_path / "notes.txt"
    notes.write_text("Some notes.\n")
    talk = Chat(llm, PARAMS, "Be kind.", chat_template=TEMPLATE)
    lines = [
        f"/read {notes}",
        "Hello",
        f"/save {file}",
        f"/save {file}",
        f"/save {notes}",
        "/save",
        "/read /none",
    ]
    _, err = converse(llm, talk, lines, monkeypatch, capsys)
    assert talk._messages[0]["content"] == "Some notes.\n\nHello"
    assert "11 characters, which go before your next message" in err
    assert err.count("saved as") == 2, "a saved conversation may be replaced"
    assert f"{notes} is there and no saved conversation" in err
    assert "which file?" in err
    assert "/none: No such file" in err
    other = Chat(llm, PARAMS, None, chat_template=TEMPLATE)
    _, err = converse(llm, other, [f"/load {file}", "More"], monkeypatch, capsys)
    assert "1 turn; system prompt: Be kind." in err
    assert other._messages[:2] == talk._messages
    assert len(other._messages) == 4
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]))
    for wrong in ("{", "[1]", '{"messages": [{"role": "user"}]}', "[" * 100_000):
        notes.write_text(wrong)
        _, err = converse(llm, other, [f"/load {notes}"], monkeypatch, capsys)
        assert f"{notes}: it holds no messages" in err or f"{notes} is no JSON" in err
        assert len(other._messages) == 4
    converse(llm, other, [f"/load {listed}"], monkeypatch, capsys)
    assert (other._system, len(other._messages)) == ("S", 1)


def test_a_text_is_saved_and_loaded(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, talk = tmp_path / "text.json", Text(llm, PARAMS)
    converse(llm, talk, ["Once", f"/save {file}"], monkeypatch, capsys)
    record = json.loads(file.read_text())
    assert record["tokens"] == talk._texts[-1][0]
    other = Text(llm, PARAMS)
    out, _ = converse(llm, other, [f"/load {file}", ""], monkeypatch, capsys)
    assert out == llm(record["tokens"], PARAMS).text + "\n\n"
    file.write_text(json.dumps({**record, "tokens": [5, 6]}))  # of another model
    _, err = converse(llm, other, [f"/load {file}"], monkeypatch, capsys)
    assert other._texts[-1][0] == llm.tokenizer.encode(record["text"])  # type: ignore[union-attr]
    assert "tokens of text; Enter goes on with it" in err


def test_results_of_tools_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's words are forced: the bundled one calls no tools of its own accord."""
    tool = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    template = "{{ tools }}{% for m in messages %}{{ m.role }} {{ m.content }}{{ m.tool_calls }}{% endfor %}"
    call, sent = {"name": "add", "arguments": {}}, list[Any]()
    answers = iter([json.dumps(call), "done"])
    with tinyllm.load("stories") as llm:
        options = {"chat_template": template, "tools": [{"type": "function", "function": tool}]}
        talk = Chat(llm, PARAMS, None, **options)

        def chat(messages: Any, **options: Any) -> Any:
            sent.append(messages)
            options["params"] = SamplingParams(choices=[next(answers)], max_tokens=40)
            return LLM.chat(llm, messages, **options)

        monkeypatch.setattr(llm, "chat", chat)
        out, _ = converse(llm, talk, ["Add", "42"], monkeypatch, capsys)
    assert out.startswith(json.dumps({"tool_call": call}))
    assert out.rstrip().endswith("done")
    assert [m["role"] for m in sent[1]] == ["user", "assistant", "tool"]
    assert sent[1][2]["content"] == "42"


def test_a_base_model_continues_its_text(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["", "Once upon a time", "", "/undo", "", "/system x", "/clear", "", "/undo"]
    out, err = converse(llm, Text(llm, PARAMS), lines, monkeypatch, capsys)
    whole = llm("Once upon a time", max_tokens=10, temperature=0)
    first = llm("Once upon a time", max_tokens=5, temperature=0).text
    second = whole.text.removeprefix(first)
    assert out == f"Once upon a time{first}\n{second}\n{second}\n\n"
    assert "is a base model" in err
    assert "a base model has no system prompt" in err
    assert "there is nothing to take back" in err


def test_an_error_does_not_end_the_conversation(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}Hi"
    _, err = converse(
        llm, Chat(llm, PARAMS, None, chat_template=template), ["a", "b", "/undo", "c"], monkeypatch, capsys
    )
    assert err.count("one message only") == 1
    assert err.count("tok/s") == 2


# --- what comes from files ------------------------------------------------------------------------------


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
STYLES = re.compile("|".join(map(re.escape, (BOLD, DIM, CYAN, END, *BACKGROUNDS))))
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f"


def test_control_characters_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x1b[2Jb\tc\nd\x07\x9b\r"
    assert shown(text, Tty()) == "a<1b>[2Jb\tc\nd<07><9b><0d>"
    assert shown(text, sys.stdout) == text


def test_styles_are_all_that_gets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = f"{BOLD}a{END}\x1b[8mb\x1b[1"
    assert shown(text, Tty()) == f"{BOLD}a{END}<1b>[8mb<1b>[1"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(f"{BOLD}a{END}", Tty()) == "<1b>[1ma<1b>[0m"


def test_progress_bars_show_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Tty())
    clock = itertools.count(0, 10)  # a bar is drawn after a second
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress_bar(f"[/nothing] {EVIL}") as progress, progress_line() as line:
        progress(1, 2)
        assert line is not None
        line(f"[/nothing] {EVIL}", 1, 2)
    assert not re.search(r"\x1b\]0|\x07|\x9b|\[2J", sys.stderr.getvalue().replace("<1b>[2J", ""))
    assert sys.stderr.getvalue().count("[/nothing] <1b>]0;owned<07>") >= 2


def test_the_commands_print_in_one_place() -> None:
    """Whatever a command writes goes through `put`, which escapes it."""
    folder = Path(tinyllm.__file__).parent / "cli"
    found = []
    for file in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                to_stream = any(re.fullmatch(r"sys\.std(out|err)", ast.unparse(arg)) for arg in node.args)
                is_ours = name in (
                    "styled",
                    "shown",
                    "has_styles",
                    "_fitted",
                    "_use_utf8",
                    "_is_terminal",
                    "Page",
                )
                if name in ("print", "sys.stdout.write", "sys.stderr.write") or (to_stream and not is_ours):
                    found.append(f"{file.name}: {name}")
    assert found == ["common.py: print"]


def evil_gguf(path: Path, **changes: bytes) -> Path:
    """A model whose tokens drive terminals; changes: of its keys, with __ for dots."""
    file = tiny_gguf()
    tokens = ["<unk>", EVIL, "</s>\n\nfake", "a", "b\x9b31m", "\u2581"]
    changes = {"tokenizer__ggml__tokens": array(STRING, tokens), **changes}
    new = {key.replace("__", "."): value for key, value in changes.items()}
    file.pairs = list((dict(file.pairs) | new).items())
    path.write_bytes(encode(file))
    return path


def run_on_a_terminal(monkeypatch: pytest.MonkeyPatch, command: str, *argv: str | Path) -> tuple[int, str]:
    """The exit code of a command, and all that it wrote."""
    out = Tty()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", out)
        code = importlib.import_module(f"tinyllm.cli.{command}").main(list(map(str, argv)))
    text = out.getvalue()
    assert not CONTROL.search(STYLES.sub("", text)), text
    return code, text


TEMPLATES = {
    "refuses": ("{{ raise_exception(" + repr(EVIL) + ") }}", "does not take these messages"),
    "is wrong": ("{{ messages." + EVIL + " }}", "is not valid"),
    "fails": ("{{ bos[" + repr(EVIL) + "] }}", "failed"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_templates_words_on_a_terminal(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, message = TEMPLATES[case]
    path = evil_gguf(tmp_path / "m.gguf", tokenizer__chat_template=scalar(STRING, source))
    code, text = run_on_a_terminal(monkeypatch, "run", path, "a")
    assert code == 1
    assert message in text
    assert run_on_a_terminal(monkeypatch, "inspect", path)[0] == 0
    with tinyllm.load(path) as llm, pytest.raises(TemplateError) as caught:
        llm.chat([{"role": "user", "content": "a"}])
    assert not CONTROL.search(str(caught.value))  # whoever prints it
    out = Tty()
    monkeypatch.setattr(sys, "stderr", out)
    with tinyllm.load(path) as llm:
        type_lines(["a"], monkeypatch)
        assert interact(llm, Chat(llm, PARAMS, None)) == 0
    assert message in out.getvalue()
    assert not CONTROL.search(STYLES.sub("", out.getvalue()))


COMMANDS: dict[str, tuple[str, ...]] = {
    "the text": ("run", "ab", "-n", "20", "--no-chat", "--temp", "5"),
    "logprobs": ("run", "ab", "-n", "9", "--no-chat", "--temp", "5", "--logprobs", "5"),
    "json": ("run", "ab", "-n", "9", "--no-chat", "--temp", "5", "--json"),
    "facts": ("inspect",),
    "facts as json": ("inspect", "-o", "json"),
    "tokens": ("inspect", "--tokens", EVIL, "--chat"),
    "tokens as json": ("inspect", "--tokens", EVIL, "--chat", "-o", "json"),
    "next": ("inspect", "--next", "a"),
    "next as json": ("inspect", "--next", "a", "-o", "json"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_models_tokens_on_a_terminal(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, *options = COMMANDS[case]
    template = "{{ messages[0].content }}" + EVIL  # of which the token is a marker; what users type is text
    path = evil_gguf(tmp_path / "m.gguf", tokenizer__chat_template=scalar(STRING, template))
    code, text = run_on_a_terminal(monkeypatch, command, path, *options)
    assert code == 0
    if case == "tokens as json":
        assert json.loads(text)[-1]["text"] == EVIL


@pytest.mark.parametrize("name", [f"{EVIL}.tiktoken", f"additional_chat_templates/{EVIL}.jinja"])
def test_names_of_files_on_a_terminal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, raw in tiny_directory().items():
        (tmp_path / file).write_bytes(raw)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises((FormatError, UnsupportedError)) as caught:
        tinyllm.load(tmp_path)
    assert "owned" in str(caught.value)
    assert not CONTROL.search(str(caught.value))
    assert run_on_a_terminal(monkeypatch, "run", tmp_path, "a")[0] == 1
