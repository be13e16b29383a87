"""The encoder around a `tokenizers.Tokenizer`, and the memory that the package takes. Imports core.

Used by from_gguf.py, which builds one, and from_directory.py, which reads one. Imports spm for its search.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import count

import tokenizers
from tokenizers import AddedToken

from tinyllm.tokenizer.core import need_memory, refused
from tinyllm.tokenizer.spm import _any_of

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
            self._added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
            plain = with_added_tokens(tokenizer, self._added)
            plain.encode_special_tokens, tokenizer.encode_special_tokens = True, False
        self._plain, self._tokenizer = plain, tokenizer
        self.find = _any_of(token.content for token in self._added)

    def __call__(self, text: str, special: bool | Mapping[int, str]) -> list[int]:
        if not isinstance(special, bool):
            return self._encode_some(text, special) if special else _encode(self._plain, text)
        return _encode(self._tokenizer if special else self._plain, text)

    def _encode_some(self, text: str, special: Mapping[int, str]) -> list[int]:
        """The package takes all special tokens out of a text or none. So those at these offsets get names
        that stand nowhere in it, in a tokenizer made for this one text, to which the others are text."""
        need_memory(
            _PER_ADDED * len(self._added)
            + _PER_ADDED_TEXT * sum(len(token.content) for token in self._added),
            "encoding a text",
        )
        mark = next(mark for n in count() if (mark := f"\ufdd0{n}\ufdd0") not in text)  # no character
        names = {token: f"{mark}{n}\ufdd0" for n, token in enumerate(dict.fromkeys(special.values()))}
        with refused("the model's tokenizer cannot encode this text"):
            other = with_added_tokens(self._tokenizer, self._added)
            other.encode_special_tokens = True
            other.add_tokens(
                [
                    AddedToken(names[t.content], lstrip=t.lstrip, rstrip=t.rstrip, normalized=False)
                    for t in self._added
                    if t.content in names
                ]
            )
            own = self._tokenizer.get_added_tokens_decoder()
            ids = {other.token_to_id(names[t.content]): i for i, t in own.items() if t.content in names}
        parts, at = [], 0
        for offset, token in sorted(special.items()):
            parts += [text[at:offset], names[token]]
            at = offset + len(token)
        return [ids.get(i, i) for i in _encode(other, "".join([*parts, text[at:]]))]


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
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
