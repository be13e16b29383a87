"""The encoder around a `tokenizers.Tokenizer`. Imports errors.

Used by from_gguf.py, which builds one, and from_directory.py, which reads one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers

from tinyllm.errors import FormatError


@contextmanager
def refused(what: str) -> Iterator[None]:
    """What the package raises inside becomes a FormatError that begins with `what`: bare Exceptions, and
    panics of its Rust, which are BaseExceptions of a type that it does not export."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{what}: {str(error)[:500]}") from error


class BPEEncoder:
    """Text to ids. Whether special tokens are parsed is a switch of the object, so one lock goes around
    it."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def __call__(self, text: str, special: bool) -> list[int]:
        with self._lock, refused("the vocabulary has no tokens for this text"):
            self._tokenizer.encode_special_tokens = not special
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
