"""docs/guide.md tells the truth: every command in it is run as a reader would, and gives what is printed.
docs/guide.fr.md is the same in French: it has the very same commands and outputs.

Commands stand in `console` blocks after "$ ", followed by what a terminal 90 columns wide shows of stdout;
Python in `pycon` blocks, one session from top to bottom. "..." stands for any text, and of what tinyllm-bench
prints the numbers are not compared. `python tests/test_guide.py` writes what is printed now, but for outputs
with "...", into both.
"""

from __future__ import annotations

import code
import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "guide.md"
FRENCH = ROOT / "docs" / "guide.fr.md"
BLOCK = re.compile(r"^```(console|pycon)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
COLUMNS, LIMIT_S = 90, 300
# No bar is drawn where a busy machine is slow.
LAUNCH = (
    "import sys; from tinyllm.cli import common; from {} import main; "
    "common.BAR_AFTER_S = float('inf'); sys.exit(main())"
)


class Step(NamedTuple):
    """A command, or statements, and what they print."""

    line: int
    command: str
    output: str


def steps(kind: str, body: str, line: int) -> list[Step]:
    """The commands of a block, which begins at `line`."""
    prompt = "$ " if kind == "console" else ">>> "
    found = []
    for part in re.split(rf"^(?={re.escape(prompt)})", body, flags=re.MULTILINE):
        if not part:
            continue
        command, *rest = part.splitlines()
        command = command.removeprefix(prompt)
        while kind == "pycon" and rest and rest[0].startswith("..."):
            command += "\n" + rest.pop(0)[4:]
        found.append(Step(line, command, "\n".join(rest).strip("\n")))
        line += len(part.splitlines())
    return found


def blocks(kind: str) -> list[tuple[re.Match[str], list[Step]]]:
    text = GUIDE.read_text(encoding="utf-8")
    matches = (match for match in BLOCK.finditer(text) if match[1] == kind)
    return [(match, steps(kind, match[2], text[: match.start()].count("\n") + 2)) for match in matches]


def shape(table: str) -> str:
    """A table without its numbers and the widths that they give it."""
    return re.sub(r"[ :-]+", " ", re.sub(r"\d+(\.\d+)?", "0", table))


def is_same(step: Step, output: str) -> bool:
    if step.command.startswith("tinyllm-bench"):
        return shape(step.output) == shape(output)
    return matches(step.output, output)


def matches(expected: str, output: str) -> bool:
    """Whether an output is what is printed, where "..." is any text."""
    pattern = ".*".join(map(re.escape, expected.split("...")))
    return re.fullmatch(pattern, output, re.DOTALL) is not None


def report(step: Step, output: str) -> str:
    how = "`python tests/test_guide.py` writes what is printed now"
    return f"docs/guide.md, line {step.line}: {step.command}\n{output}\n({how})"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("guide"))


def make_folder(folder: Path) -> Path:
    """What the reader's folder has, and bin/ with the commands of this very package."""
    (folder / "bin").mkdir()
    scripts = re.findall(
        r'^(tinyllm-\w+) = "([\w.]+):main"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    for name, module in scripts:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{LAUNCH.format(module)}" "$@"\n')
        path.chmod(0o755)
    for name in ("benchmarks", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command: str, folder: Path) -> str:
    """What a command writes to a terminal: stdout is one, stderr goes to a pipe."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "TINYLLM_ISA")}
    path = f"{folder / 'bin'}{os.pathsep}{env['PATH']}"
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        cwd=folder,
        env={**env, "PATH": path, "NO_COLOR": "1", "LC_ALL": "C.UTF-8", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=subprocess.PIPE,
    )
    os.close(slave)
    timer = threading.Timer(LIMIT_S, process.kill)
    timer.start()
    output = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while chunk := os.read(master, 65536):
            output += chunk
    _, errors = process.communicate()
    timer.cancel()
    os.close(master)
    assert process.returncode == 0, f"{command}: {errors.decode()}"
    lines = output.decode().replace("\r\n", "\n").strip("\n").split("\n")
    return "\n".join(line.rstrip() for line in lines)


class Session:
    """A Python session."""

    def __init__(self) -> None:
        self._console = code.InteractiveConsole()

    def run(self, statements: str) -> str:
        shown, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
            incomplete = self._console.runsource(statements + "\n", symbol="single")
        assert not incomplete, statements
        assert not errors.getvalue(), errors.getvalue()
        return shown.getvalue().strip("\n")


COMMANDS = [step for _, found in blocks("console") for step in found]


@pytest.mark.parametrize("step", COMMANDS, ids=lambda step: f"line{step.line}")
def test_commands(step: Step, folder: Path) -> None:
    output = run(step.command, folder)
    assert is_same(step, output), report(step, output)


def test_python() -> None:
    session = Session()
    for _, found in blocks("pycon"):
        for step in found:
            output = session.run(step.command)
            assert matches(step.output, output), report(step, output)


def test_the_guide_has_what_it_should() -> None:
    tools = {step.command.split()[0] for step in COMMANDS}
    assert {"tinyllm-run", "tinyllm-inspect", "tinyllm-bench", "tinyllm-perplexity"} <= tools


def test_the_french_guide_has_the_same_commands_and_outputs() -> None:
    english, french = (BLOCK.findall(guide.read_text(encoding="utf-8")) for guide in (GUIDE, FRENCH))
    assert french == english


@pytest.mark.parametrize("guide", [GUIDE, FRENCH], ids=lambda guide: guide.name)
def test_every_block_is_run_and_every_link_leads_somewhere(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    fetched = re.findall(r"^```sh\n(.*?)^```\n", text, re.MULTILINE | re.DOTALL)
    assert len(BLOCK.findall(text)) == text.count("```") / 2 - len(fetched), "every other block is run"
    assert all(line.startswith("tinyllm run hf:") for block in fetched for line in block.splitlines())
    sections = re.findall(r"^## (\d.*)", text, re.MULTILINE)
    for anchor in re.findall(r"\]\(#([\w-]+)\)", text):
        assert anchor in {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in sections}
    for link in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", text):
        assert (guide.parent / link).exists(), link


@pytest.mark.parametrize(
    ("expected", "output", "same"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a...c", "abc", True),
        ("a\n...", "a\nb\nc", True),
        ("...b", "a", False),
    ],
)
def test_matching(expected: str, output: str, same: bool) -> None:
    assert matches(expected, output) is same


def rewritten(folder: Path) -> Iterator[str]:
    """The guide with what its commands print now."""
    text, end, session = GUIDE.read_text(encoding="utf-8"), 0, Session()
    both = sorted([*blocks("console"), *blocks("pycon")], key=lambda block: block[0].start())
    for match, found in both:
        yield text[end : match.start()] + f"```{match[1]}\n"
        for step in found:
            if match[1] == "console":
                shown = f"$ {step.command}\n"
                output = step.output if "..." in step.output else run(step.command, folder)
            else:
                shown = ">>> " + step.command.replace("\n", "\n... ") + "\n"
                output = session.run(step.command)
            yield shown + (f"{output}\n" if output else "")
        yield "```\n"
        end = match.end()
    yield text[end:]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        new = "".join(rewritten(make_folder(Path(temporary))))
    GUIDE.write_text(new, encoding="utf-8")
    printed = iter([match[0] for match in BLOCK.finditer(new)])
    FRENCH.write_text(
        BLOCK.sub(lambda _: next(printed), FRENCH.read_text(encoding="utf-8")), encoding="utf-8"
    )
