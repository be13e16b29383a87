"""The encoder around a `tokenizers.Tokenizer`, and the memory that the package takes. Imports core.

Used by from_gguf.py, which builds one, and from_directory.py, which reads one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import tokenizers

from tinyllm.tokenizer.core import need_memory, refused

# Bytes that the package takes at most, measured and rounded up: it doubles its tables as they grow.
_PER_ENTRY, _PER_TEXT = 400, 16  # to build a vocabulary: a token or merge (180), a character of theirs (9)
_PER_ADDED, _PER_ADDED_TEXT = 1600, 300  # an added token (640), a character of it (120), both twice
PER_JSON = 32  # to read a tokenizer.json: a byte of it (20)
_PER_BYTE = 600  # to encode: a byte of text (520 of digits, 160 of English)
_UNASKED = 1 << 12  # characters that are encoded without asking, in about a millisecond


def need_for_vocabulary(
    texts: Collection[str], merges: Sequence[tuple[str, str]], added: Collection[str]
) -> None:
    """Raises MemoryLimitError where a vocabulary of these texts would not fit into memory."""
    n_characters = sum(map(len, texts)) + sum(len(left) + len(right) for left, right in merges)
    n_bytes = _PER_ENTRY * (len(texts) + len(merges)) + _PER_TEXT * n_characters
    n_bytes += _PER_ADDED * len(added) + _PER_ADDED_TEXT * sum(map(len, added))
    need_memory(n_bytes, "building a tokenizer")


def with_added_tokens(
    tokenizer: tokenizers.Tokenizer, tokens: list[tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    """Another tokenizer that encodes as this one does, with these added tokens, in order, in place of its
    own, which the package does not let one change."""
    other = tokenizers.Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        other.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        other.pre_tokenizer = tokenizer.pre_tokenizer
    other.add_tokens(tokens)
    return other


class BPEEncoder:
    """Text to ids.

    Whether special tokens are parsed is a switch of the package's object, so there are two, with one
    vocabulary between them: nothing changes once they are made, and neither threads nor forked processes nor
    signal handlers need a lock."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        with refused("the tokenizers package fails with the model's tokenizer"):
            plain = with_added_tokens(
                tokenizer, [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
            )
            plain.encode_special_tokens, tokenizer.encode_special_tokens = True, False
        self._plain, self._tokenizer = plain, tokenizer

    def __call__(self, text: str, special: bool) -> list[int]:
        tokenizer = self._tokenizer if special else self._plain
        with refused("the model's tokenizer cannot encode this text"):
            if len(text) > _UNASKED:
                need_memory(_PER_BYTE * _n_bytes(tokenizer, text), "encoding a text")
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _n_bytes(tokenizer: tokenizers.Tokenizer, text: str) -> int:
    """Bytes of a text that is normalized, part by part: a normalizer may make many of one."""
    normalizer = tokenizer.normalizer
    if normalizer is None:
        return len(text.encode())
    parts = (text[i : i + _UNASKED] for i in range(0, len(text), _UNASKED))
    return sum(len(normalizer.normalize_str(part).encode()) for part in parts)
