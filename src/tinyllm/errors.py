"""The exceptions of tinyllm: one base, one class a kind of cause; and what finds and words causes everywhere:
whole numbers in a range, memory that ran out, packages that are missing, whether an exception is a signal
handler's own.

Whatever a file, the value of an argument or the machine causes is an `Error`; where Python has a built-in
exception for the same cause, the class inherits it too. Wrong Python types and unknown keywords stay
`TypeError`. Imports nothing of ours.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Error(Exception):
    """Base of everything that tinyllm raises on purpose."""


class FormatError(Error):
    """A file is broken, truncated or contradicts itself."""


class UnsupportedError(Error):
    """A file is well formed, but asks for something that tinyllm does not do."""


class NotFoundError(Error, FileNotFoundError):
    """A file or folder does not exist."""


class ReadError(Error, OSError):
    """A file exists but the system does not let us read it (permissions, a device error, not a regular
    file)."""


class WriteError(Error, OSError):
    """A file cannot be written: no space, no permission, a device error. Nothing is left behind."""


class ArgumentError(Error, ValueError):
    """An argument has a value that makes no sense."""


class ConstraintError(ArgumentError):
    """The form that was asked of an answer is wrong or cannot be enforced, or a text is no whole document."""


class ContextError(Error):
    """A prompt or a sequence does not fit into the context."""


class MemoryLimitError(Error, MemoryError):
    """The weights or the cache do not fit into the memory that is there."""


class ModelClosedError(Error):
    """A model is used after `close()`."""


class CancelledError(Error):
    """A call was stopped before its next layer; its positions count as unwritten."""


class LostError(Error):
    """A part of a model on another machine or in another process is gone, with the call that it was in. The
    next call waits for it to come back."""


class TemplateError(Error):
    """A chat template is missing, broken, or went past its limits."""


@contextmanager
def located(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put `path` before the message of a FormatError or UnsupportedError from code that knows no path."""
    try:
        yield
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from None


@contextmanager
def out_of_memory(doing: str) -> Iterator[None]:
    """Python's own MemoryError, too, comes out as ours; `doing` says when."""
    try:
        yield
    except MemoryError as error:
        if isinstance(error, Error):
            raise
        raise MemoryLimitError(f"no memory left while {doing}") from error


def comes_from(error: BaseException, *origins: str) -> bool:
    """Whether `error` was raised where nothing ran but tinyllm, the standard library and `origins`: names of
    packages, or of files of code.

    A signal handler runs between any two steps of theirs, and what it raises is the program's own: it has a
    frame of the handler in its traceback."""
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
        known = module in ("tinyllm", *origins) or module in sys.stdlib_module_names
        if not known and trace.tb_frame.f_code.co_filename not in origins:
            return False
        trace = trace.tb_next
    return True


def number_text(value: object) -> str:
    """A number as messages write it: one with more digits than anybody reads, or Python prints, by its
    size."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def integer(name: str, value: object, low: float, high: float, hint: str = "") -> int:
    """An argument that must be a whole number in low..high.

    Raises TypeError, and ArgumentError with the range and the hint.
    """
    try:
        number = operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    if not low <= number <= high:
        hint = f" ({hint})" if hint else ""
        raise ArgumentError(f"{name} is {number_text(number)}, expected {low} to {high}{hint}")
    return number


# What the extras of pyproject.toml install.
EXTRAS = {
    "plot": "matplotlib",
    "structured": "llguidance",
    "serve": "starlette uvicorn prometheus-client llguidance",
    "ray": "ray[data,serve]",
}


def install_text(extra: str) -> str:
    """The command that installs what an extra needs. It names packages of the index: tinyllm itself came from
    a clone or a wheel, and asking the index for tinyllm would bring another project."""
    return f"pip install {EXTRAS[extra]}"


def size_text(n_bytes: int) -> str:
    """A number of bytes as messages write it, in decimal units."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= of / 10:
            return f"{n_bytes / of:.2f} {unit}"
    return f"{n_bytes} bytes"
