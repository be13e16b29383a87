"""The one command `tinyllm`: its table of subcommands, what a start imports, and that each calls itself by
the name it was called by."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_cli import Cli, in_process

from tinyllm import cli, errors
from tinyllm.cli.commands import COMMANDS, main

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def tinyllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.setattr(cli, "prefix", cli.prefix)
    return in_process(main, monkeypatch, capsys)


def test_every_command_is_installed_as_the_table_says() -> None:
    alone = {f"tinyllm-{n}": f"tinyllm.cli.{c.module}:main" for n, c in COMMANDS.items() if c.alone}
    assert PROJECT["scripts"] == {"tinyllm": "tinyllm.cli.commands:main"} | alone


def test_every_command_is_in_the_table() -> None:
    package = ROOT / "src" / "tinyllm" / "cli"
    has_main = {
        p.stem for p in package.glob("*.py") if re.search(r"^def main\(", p.read_text(), re.MULTILINE)
    }
    assert {command.module for command in COMMANDS.values()} == has_main - {"commands"}


def test_help_lists_every_command(tinyllm: Cli) -> None:
    for argv in ([], ["--help"], ["help"]):
        result = tinyllm(*argv)
        assert result.code == 0
        assert re.findall(r"^  (\w+) {2,}", result.out.split("examples:")[0], re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["rum"], "'rum' is no command; did you mean run?"),
        (["xyzzy"], "'xyzzy' is no command: run, serve"),
        (["stories", "Once"], "stories is a model, not a command: tinyllm run stories"),
        (["hf:a/b"], "hf:a/b is a model, not a command: tinyllm run hf:a/b"),
        (["--temp", "0"], "--temp stands after a command"),
    ],
)
def test_what_is_no_command_is_told_what_would_be(tinyllm: Cli, argv: list[str], words: str) -> None:
    result = tinyllm(*argv)
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1


def python(*argv: str) -> str:
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_a_subcommand_calls_itself_by_the_name_it_was_called_by() -> None:
    helped = python("-m", "tinyllm", "perplexity", "--help")
    assert helped.startswith("usage: tinyllm perplexity MODEL")
    assert "tinyllm-perplexity" not in helped
    assert python("-m", "tinyllm.cli.perplexity", "--help").startswith("usage: tinyllm-perplexity MODEL")
    assert python("-m", "tinyllm", "--version").startswith("tinyllm 0.")


def test_every_option_of_run_stands_in_a_group_that_says_what_it_is_about() -> None:
    listed = python("-m", "tinyllm", "run", "--help").partition("\noptions:\n")[2].partition("\n\n")[0]
    assert listed.split()[:2] == ["-h,", "--help"]
    assert len(listed.splitlines()) == 1, listed


LOADED = "import sys; {}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"


def test_import_loads_nothing_of_others() -> None:
    """`import tinyllm` costs what its own few lines do."""
    usual = "import __future__, typing, logging, contextlib, operator"
    before = set(python("-c", LOADED.format(usual)).split())
    assert set(python("-c", LOADED.format("import tinyllm")).split()) - before == {"tinyllm"}


def test_help_of_a_command_loads_no_packages() -> None:
    loaded = python("-c", LOADED.format("from tinyllm.cli import run, inspect, bench, quantize, serve, pull"))
    assert not {"numpy", "tokenizers", "sentencepiece", "jinja2", "rich", "huggingface_hub"} & set(
        loaded.split()
    )


def test_a_run_loads_what_it_uses() -> None:
    """No table is drawn, no template filled in, no tokenizer of another kind built, nothing fetched."""
    run = "from tinyllm.cli.run import main; main(['stories', 'Once', '-n', '1', '--temp', '0'])"
    loaded = set(python("-c", LOADED.format(run)).splitlines()[-1].split())
    assert {"numpy", "tinyllm"} <= loaded
    assert not {"rich", "jinja2", "tokenizers", "safetensors", "cffi", "huggingface_hub", "asyncio"} & loaded


def test_a_run_loads_no_part_of_ours_that_it_does_not_use() -> None:
    """The first word comes a fifth sooner for it: no adapters, tools, forms, nor schemes of directories."""
    unused = ("adapters", "chat.tools", "constraints", "files.schemes", "cli.interactive", "server")
    run = "from tinyllm.cli.run import main; main(['stories', 'Once', '-n', '1', '--temp', '0'])"
    shown = python("-c", f"import sys; {run}; print(*sorted(sys.modules))").splitlines()[-1].split()
    assert "tinyllm.llm" in shown
    assert not {f"tinyllm.{name}" for name in unused} & set(shown)


def test_hints_name_packages_of_the_index() -> None:
    """The index has another project of our name, so no hint asks it for ours."""
    extras = {name: needed for name, needed in PROJECT["optional-dependencies"].items() if name != "test"}
    assert {name: re.findall(r"(?:^|\s)([\w-]+)", text) for name, text in errors.EXTRAS.items()} == {
        name: [re.split(r"[><=\[]", package)[0] for package in needed] for name, needed in extras.items()
    }
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        assert not re.search(r"pip install\s+['\"]?tinyllm", path.read_text(encoding="utf-8")), path
