"""Filling a gap in the middle: the tokens that mark what stands before it, behind it, and where it is.

A GGUF file names them in its metadata; a vocabulary spells them in one of a few ways. Imports the tokenizer.
llama.py asks for them where a completion has a `suffix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tinyllm.tokenizer import Tokenizer

_KEYS = [
    ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.fim_mid_token_id"),
    ("tokenizer.ggml.prefix_token_id", "tokenizer.ggml.suffix_token_id", "tokenizer.ggml.middle_token_id"),
]
_TEXTS = [
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
]


class Infill(NamedTuple):
    prefix: int
    suffix: int
    middle: int

    def arrange(
        self, prompt: list[int], tokenizer: Tokenizer, suffix: str, *, suffix_first: bool
    ) -> list[int]:
        """The ids of a prompt with a gap behind it: BOS, then the two texts, each after its mark."""
        front = tokenizer.prefix
        front = front if prompt[: len(front)] == front else []
        before = [self.prefix, *prompt[len(front) :]]
        behind = [self.suffix, *tokenizer.encode(suffix, bos=False)]
        parts = [*behind, *before] if suffix_first else [*before, *behind]
        return [*front, *parts, self.middle]


def infill_tokens(tokenizer: Tokenizer, metadata: Mapping[str, str]) -> Infill | None:
    """None where the model has no such tokens."""
    for keys in _KEYS:
        found = [metadata.get(key, "") for key in keys]
        if all(text.isdecimal() and int(text) < tokenizer.vocab_size for text in found):
            return Infill(*map(int, found))
    for texts in _TEXTS:
        ids = [tokenizer.id_of(text) for text in texts]
        if None not in ids:
            return Infill(*[i for i in ids if i is not None])
    return None
