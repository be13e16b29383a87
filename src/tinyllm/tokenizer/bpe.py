"""The encoder around a `tokenizers.Tokenizer`. Imports core.

Used by from_gguf.py, which builds one, and from_directory.py, which reads one.
"""

from __future__ import annotations

import threading

import tokenizers

from tinyllm.tokenizer.core import refused


class BPEEncoder:
    """Text to ids. Whether special tokens are parsed is a switch of the object, so one lock goes around
    it."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def __call__(self, text: str, special: bool) -> list[int]:
        with self._lock, refused("the model's tokenizer cannot encode this text"):
            self._tokenizer.encode_special_tokens = not special
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
