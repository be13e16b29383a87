"""SentencePiece: the encoder around a processor, and the few lines of protobuf that rebuild a model from its
pieces.

A SentencePiece model is a protobuf message, ModelProto; the field numbers below are those of
sentencepiece_model.proto. Imports core, and of the built module what writes the pieces. Used by from_gguf.py
and from_directory.py.
"""

from __future__ import annotations

import atexit
import bisect
import os
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllm._core import sentencepiece_pieces
from tinyllm.tokenizer.core import TokenFlags, refused

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces, and of GGUF tokens

_BPE = 2  # TrainerSpec.model_type
_PLAIN = TokenFlags()
# White space and characters of words as the tokenizers package has them (Unicode's; Python's differ).
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | frozenset(
    map(chr, range(0x2000, 0x200B))
)
_WORD = ("L", "M", "Nd", "Nl", "Pc")


class _Door:
    """A thread that comes back from SentencePiece while the interpreter ends would be torn down amid its
    C++, which terminates the process. So those inside are waited for at exit, 2 s at most, and from then on
    only the thread that exits enters: the others end, by SystemExit. (bindings.cpp has the same for the
    core.)"""

    def __init__(self) -> None:
        self._inside: set[int] = set()  # threads
        self._keeper: int | None = None  # the thread that exits
        atexit.register(self._close)
        os.register_at_fork(after_in_child=self._inside.clear)  # of threads that the child does not have

    def __enter__(self) -> None:
        me = threading.get_ident()
        self._inside.add(me)
        if self._keeper not in (None, me):
            self._inside.discard(me)
            raise SystemExit

    def __exit__(self, *_: object) -> None:
        self._inside.discard(threading.get_ident())

    def _close(self) -> None:
        self._keeper = threading.get_ident()
        end = time.monotonic() + 2
        while self._inside and time.monotonic() < end:
            time.sleep(0.001)


_door = _Door()


class SentencePieceEncoder:
    """Text to ids: cuts the text at `always` tokens, and at `special` ones when asked, and encodes what is
    between.

    Each part is encoded as a text of its own, so it gets a space prefix if the model has one: llama.cpp does
    the same, and Hugging Face with its default `legacy` tokenizers. `inner`, where given, is the processor
    for the parts that do not begin the text (Hugging Face with legacy=False). `flags` says which tokens take
    white space with them or stand alone.
    """

    def __init__(
        self,
        processor: SentencePieceProcessor,
        always: Mapping[str, int],
        special: Mapping[str, int],
        flags: Mapping[str, TokenFlags] | None = None,
        inner: SentencePieceProcessor | None = None,
    ) -> None:
        self._first = processor
        self._inner = inner or processor
        self._ids = {**always, **special}
        self._find = {False: _any_of(always), True: _any_of(self._ids)}
        self._flags = dict(flags or {})

    def __call__(self, text: str, special: bool | Mapping[int, str]) -> list[int]:
        find = self._find[special] if isinstance(special, bool) else _or_at(self._find[False], special)
        ids: list[int] = []
        done = at = 0  # what is encoded, what is searched
        while found := find(text, at):
            start, token = found
            at = start + len(token)
            flags = self._flags.get(token, _PLAIN)
            if flags.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[at : at + 1])):
                continue
            while flags.lstrip and start > done and text[start - 1] in _WHITE_SPACE:
                start -= 1
            while flags.rstrip and text[at : at + 1] in _WHITE_SPACE:
                at += 1
            ids += self._part(text, done, start)
            ids.append(self._ids[token])
            done = at
        return ids + self._part(text, done, len(text))

    def find(self, text: str, start: int) -> tuple[int, str] | None:
        return self._find[True](text, start)

    def _part(self, text: str, start: int, end: int) -> list[int]:
        if start == end:
            return []
        processor = self._inner if start else self._first
        with _door, refused("the model's tokenizer cannot encode this text"):
            ids: list[int] = processor.encode(text[start:end])
        return ids


def _is_word(character: str) -> bool:
    """Whether a character, or none at all, is part of a word."""
    if not character:
        return False
    return character in "\u200c\u200d" or unicodedata.category(character).startswith(_WORD)


_Find = Callable[[str, int], tuple[int, str] | None]


def _or_at(find: _Find, special: Mapping[int, str]) -> _Find:
    """What `find` finds, or a token of `special` (offset -> text) where one begins no later."""
    offsets = sorted(special)

    def find_both(text: str, at: int) -> tuple[int, str] | None:
        found, i = find(text, at), bisect.bisect_left(offsets, at)
        if i == len(offsets) or (found is not None and found[0] < offsets[i]):
            return found
        return offsets[i], special[offsets[i]]

    return find_both


def _any_of(tokens: Iterable[str]) -> _Find:
    """A function that finds in a text, from a position on, the leftmost of `tokens`, the longest where
    several begin: where it begins, and the token.

    The tokens are sorted: every one that begins what follows a position is the last that is not after it in
    order, or a token that that one begins with. A file may have tokens by the 100 000, at which a regular
    expression of all takes minutes."""
    ordered = sorted(filter(None, set(tokens)))
    if not ordered:
        return lambda text, at: None
    shorter: dict[str, str] = {}  # the longest other token that a token begins with
    open_: list[str] = []
    for token in ordered:
        while open_ and not token.startswith(open_[-1]):
            open_.pop()
        shorter[token] = open_[-1] if open_ else ""
        open_.append(token)
    longest = max(map(len, ordered))
    first = re.compile(f"[{''.join(map(re.escape, sorted({token[0] for token in ordered})))}]")

    def find(text: str, at: int) -> tuple[int, str] | None:
        while match := first.search(text, at):
            at = match.start()
            token = ordered[bisect.bisect_right(ordered, text[at : at + longest]) - 1]
            while token and not text.startswith(token, at):
                token = shorter[token]
            if token:
                return at, token
            at += 1
        return None

    return find


def load_processor(model: bytes, name: str) -> SentencePieceProcessor:
    """A processor for a serialized ModelProto; FormatError, naming `name`, for anything else."""
    from sentencepiece import SentencePieceProcessor  # 20 ms, which models with another tokenizer do without

    what = f"{name}: not a SentencePiece model (where this is a tiktoken file, put the tokenizer.json of the"
    with _door, refused(what + " same model next to it)"):
        return SentencePieceProcessor(model_proto=model)


def build_model(
    texts: list[str],
    scores: npt.NDArray[Any],
    types: npt.NDArray[Any],
    *,
    byte_fallback: bool,
    space_prefix: bool,
    squeeze_spaces: bool,
) -> bytes:
    """A BPE ModelProto from the text, score and type (1 to 6) of each piece, with the identity normalizer."""
    vocabulary = sentencepiece_pieces(texts, scores.astype(np.float32), types.astype(np.uint8))
    trainer = _number(3, _BPE) + _number(35, byte_fallback)
    return (
        vocabulary
        + _message(2, trainer)
        + _message(3, _message(1, b"identity"))
        + normalizer(space_prefix=space_prefix, squeeze_spaces=squeeze_spaces)
    )


def normalizer(space_prefix: bool | None = None, squeeze_spaces: bool | None = None) -> bytes:
    """Normalizer settings to append to a ModelProto. Protobuf merges a message that comes again into the
    first one, so these replace the model's own."""
    given = ((3, space_prefix), (4, squeeze_spaces))
    return _message(3, b"".join(_number(field, value) for field, value in given if value is not None))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload
