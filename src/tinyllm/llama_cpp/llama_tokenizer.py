"""Tokenizers as llama-cpp-python has them: bytes in, bytes out. One of your own may replace the model's.

Imports tinyllm's tokenizer. llama.py uses them.
"""

from __future__ import annotations

import abc
from typing import Any

from tinyllm.tokenizer import Tokenizer, load_tokenizer


class BaseLlamaTokenizer(abc.ABC):
    """What `Llama(tokenizer=...)` takes."""

    @abc.abstractmethod
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """The ids of a text in UTF-8. add_bos: with what the model's files put around a text. special:
        whether the texts of special tokens mean these tokens."""

    @abc.abstractmethod
    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """The bytes of ids; prev_tokens came before them. special: whether special tokens are shown."""


class LlamaTokenizer(BaseLlamaTokenizer):
    """The model's own."""

    def __init__(self, llama: Any) -> None:
        """llama: a `Llama`, or a tokenizer of tinyllm."""
        self._tokenizer: Tokenizer = llama if isinstance(llama, Tokenizer) else llama.own_tokenizer

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Raises UnicodeDecodeError (a ValueError) for bytes that are no UTF-8."""
        return self._tokenizer.encode(text.decode(), bos=None if add_bos else False, special=special)

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """The space that SentencePiece puts before a text goes away after a BOS, and only there."""
        own = self._tokenizer
        shown = [i for i in tokens if i < own.vocab_size and (special or i not in own.special_ids)]
        data = b"".join(map(own.token_bytes, shown))
        begins = len(tokens) > 0 and tokens[0] == own.bos_id
        return data[1:] if begins and data.startswith(b" ") else data

    def encode(self, text: str, add_bos: bool = True, special: bool = True) -> list[int]:
        return self.tokenize(text.encode(errors="ignore"), add_bos=add_bos, special=special)

    def decode(self, tokens: list[int]) -> str:
        return self.detokenize(tokens).decode(errors="ignore")

    @classmethod
    def from_ggml_file(cls, path: str) -> LlamaTokenizer:
        """Of a GGUF file, or of a directory of Hugging Face's."""
        return cls(load_tokenizer(path))


class LlamaHFTokenizer(BaseLlamaTokenizer):
    """One of transformers'."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf_tokenizer = hf_tokenizer

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        ids: list[int] = self.hf_tokenizer.encode(text.decode(errors="ignore"), add_special_tokens=special)
        return ids

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        def bytes_of(ids: list[int]) -> bytes:
            text: str = self.hf_tokenizer.decode(ids, skip_special_tokens=not special)
            return text.encode(errors="ignore")

        before = list(prev_tokens or [])
        return bytes_of(before + list(tokens))[len(bytes_of(before)) if before else 0 :]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str) -> LlamaHFTokenizer:
        """Needs the package transformers."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(pretrained_model_name_or_path))
