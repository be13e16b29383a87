"""How a text is laid out on a terminal while it comes: where lines end, what is coloured, and that nothing of
it is lost."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.cli.common import BOLD, CYAN, DIM
from tinyllm.cli.page import SPARE, Page, columns

END = "\x1b[0m"
COLUMNS = 40


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def written(*pieces: str, wraps: bool = True, markdown: bool = False) -> str:
    out = Terminal()
    page = Page(out, wraps=wraps, markdown=markdown)
    for piece in pieces:
        page.write(piece)
    page.end()
    return out.getvalue()


def test_lines_end_between_words() -> None:
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps until the evening comes."
    assert written(text).split("\n") == [
        "The quick brown fox jumps over the lazy",
        "dog, and then it sleeps until the",
        "evening comes.",
    ]
    assert written(*(word + " " for word in text.split())).rstrip() == written(text)


def test_a_line_that_just_fits_is_one_line() -> None:
    assert written("a" * 30 + " " + "b" * 9) == "a" * 30 + " " + "b" * 9
    assert written("a" * 30 + " " + "b" * 10) == "a" * 30 + "\n" + "b" * 10


def test_words_in_tokens_are_not_torn() -> None:
    line = "x" * 30
    assert written(line, " un", "believ", "able", " end") == f"{line}\nunbelievable end"
    long = "y" * 90
    assert written("start ", long, " end") == f"start\n{long} end"


def test_a_word_with_room_to_grow_is_shown_at_once() -> None:
    out = Terminal()
    page = Page(out)
    page.write("Hel")
    assert out.getvalue() == "Hel"
    page.write("lo" + " w" * 8)
    assert out.getvalue().startswith("Hello w w")
    page.end()
    assert out.getvalue() == "Hello" + " w" * 8


def test_indents_and_lists_stay() -> None:
    assert written("- one\n  - two\n\tthree\n\n\nfour  \n") == "- one\n  - two\n\tthree\n\n\nfour  \n"


def test_scripts_without_spaces_break_anywhere_and_count_twice() -> None:
    assert columns("日本é語") == 7
    assert columns("e\u0301") == 1
    assert written("日" * 25) == "日" * 20 + "\n" + "日" * 5


def test_without_wrapping_and_without_a_terminal_the_text_is_as_it_is() -> None:
    text = "**a** " * 30 + "\n# b `c`"
    assert written(text, wraps=False) == text
    out = io.StringIO()
    page = Page(out, markdown=True)
    page.write(text)
    page.end()
    assert out.getvalue() == text


def test_the_terminals_size_is_asked_for_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    page = Page(out)
    page.write("one two three ")
    monkeypatch.setenv("COLUMNS", "12")
    page.write("four five six seven")
    page.end()
    assert out.getvalue().split("\n")[1:] == ["four five", "six seven"]


MARKDOWN = {
    "## A title\ntext": f"{BOLD}## A title{END}\ntext",
    "#include\n": "#include\n",
    "a **bold** word": f"a{BOLD} **bold**{END} word",
    "2 ** 3 ** 4": "2 ** 3 ** 4",
    "**never closed\nnext": f"{BOLD}**never closed{END}\nnext",
    "use `x ** y` here": f"use{CYAN} `x ** y`{END} here",
    "``a ` b`` c": f"{CYAN}``a ` b``{END} c",
    "* one\n* two": "* one\n* two",
    "```python\n# no title, `no` **mark**\n```\n**b**": (
        f"{DIM}```python{END}\n{CYAN}# no title, `no` **mark**{END}\n{DIM}```{END}\n{BOLD}**b**{END}"
    ),
    "### `code` in a title": f"{BOLD}###{END}{CYAN} `code`{END}{BOLD} in a title{END}",
}


@pytest.mark.parametrize("text", MARKDOWN)
@pytest.mark.parametrize("step", [1, 2, 100])
def test_markdown_is_coloured_however_it_comes(text: str, step: int) -> None:
    pieces = [text[i : i + step] for i in range(0, len(text), step)]

    def styles(shown: str) -> list[tuple[str, str]]:
        """Each character that is no space, with its style."""
        style, found = "", []
        for mark, character in re.findall(r"(\x1b\[\d*m)|(\S)", shown):
            style = mark or style
            found += [(character, "" if style == END else style)] if character else []
        return found

    assert styles(written(*pieces, markdown=True)) == styles(MARKDOWN[text])


def test_code_is_not_wrapped_and_no_colours_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "print(" + "1, " * 30 + ")"
    text = f"```\n{line}\n```\n"
    assert line in written(text, markdown=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert written("**a** `b`", markdown=True) == "**a** `b`"


@given(st.text(alphabet="ab \n\t`*#-日\x1b", max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_nothing_is_lost(text: str, cuts: list[int]) -> None:
    pieces = [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])]
    out = Terminal()
    page = Page(out, markdown=True)
    for piece in pieces:
        page.write(piece)
    page.end()
    plain = re.sub(r"\x1b\[\d*m", "", out.getvalue())
    assert re.sub(r"\s", "", plain) == re.sub(r"\s", "", text.replace("\x1b", "<1b>"))
    assert plain.count("\n") >= text.count("\n")


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=SPARE), max_size=60), st.integers(1, 9))
def test_no_line_is_longer_than_the_terminal(words: list[str], step: int) -> None:
    text = " ".join(words)
    out = Terminal()
    page = Page(out)
    for i in range(0, len(text), step):
        page.write(text[i : i + step])
    page.end()
    lines = out.getvalue().split("\n")
    assert " ".join(lines) == text
    assert all(len(line) <= COLUMNS for line in lines)
