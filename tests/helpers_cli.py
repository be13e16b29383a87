"""A command run in this process: what it returns and prints."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


def in_process(
    main: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *first: str,
    stdin: bytes = b"",
) -> Cli:
    """A callable that runs main with `first` and its own arguments.

    `stdin`, unless the call gives another, is what a pipe holds.
    """
    usual = stdin

    def run(*argv: str | Path, stdin: bytes = usual) -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main([*first, *(str(arg) for arg in argv)])
        return Result(code, *capsys.readouterr())

    return run
