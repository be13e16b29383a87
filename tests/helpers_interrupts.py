"""Interrupts at every place where Python would let a signal's handler run: after each call of C code, when a
function begins, and where a loop goes back; and a handler that raises at any moment."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest


class Interrupts:
    """Counts the places in `files` while a piece of work runs, and raises KeyboardInterrupt at one."""

    def __init__(self, files: set[str], at: int | None = None) -> None:
        self.n, self._files, self._at = 0, files, at
        self._lines: dict[FrameType, int] = {}

    def _place(self) -> None:
        self.n += 1
        if self.n == self._at:
            raise KeyboardInterrupt

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        # An expression that any() leaves early is called once more, to end it; no handler runs there.
        is_ended = frame.f_code.co_name == "<genexpr>" and event == "call"
        if event in ("call", "c_return") and frame.f_code.co_filename in self._files and not is_ended:
            self._place()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            before, self._lines[frame] = self._lines.get(frame, 0), frame.f_lineno
            # A `with` is gone back to when it ends, where no handler can run.
            if frame.f_lineno <= before and frame.f_lineno not in with_lines(frame.f_code.co_filename):
                self._place()
        return self._trace

    def run(self, work: Callable[[], object]) -> bool:
        """Whether the work ended by the interrupt."""
        profile, trace = sys.getprofile(), sys.gettrace()
        sys.settrace(self._trace)
        sys.setprofile(self._profile)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(profile)
            sys.settrace(trace)
            self._lines.clear()
        return False


_with_lines: dict[str, set[int]] = {}


def with_lines(file: str) -> set[int]:
    if file not in _with_lines:
        with open(file, encoding="utf-8") as source:
            _with_lines[file] = {n for n, line in enumerate(source, 1) if line.lstrip().startswith("with ")}
    return _with_lines[file]


# Python can only report what is raised within a callback of its collector or a finalizer. Hypothesis has such
# a callback, so any test may meet one.
handlers_exception_may_be_lost = pytest.mark.filterwarnings(
    r"ignore:(.|\n)*of the handler:pytest.PytestUnraisableExceptionWarning"
)


def raise_amid(work: Callable[[], object], seconds: float, error: type[BaseException]) -> None:
    """Repeats the work until a signal's handler, after so many seconds, raises `error` amid it; for
    tests marked as above."""

    def handler(*_: object) -> None:
        raise error("of the handler")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(error, match=r"^of the handler$") as raised:  # noqa: PT012
            while True:  # again where it is lost, as Jinja does where it compiles what it takes for constants
                signal.setitimer(signal.ITIMER_REAL, seconds)
                end = time.monotonic() + seconds + 0.1
                while time.monotonic() < end:
                    work()
        assert type(raised.value) is error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
