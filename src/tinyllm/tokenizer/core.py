"""The tokenizer that the rest of tinyllm sees: ids from text, text from ids, whole or as a stream.

It is the same class for every kind of vocabulary. What differs comes in as two functions: an encoder (text to
ids, without BOS and EOS) and a speller (a token as the vocabulary spells it to the bytes it stands for).
Decoding is then the same few lines for all: join the bytes, drop the space that SentencePiece put in front,
read them as UTF-8. Imports errors, habits.py, and of files how messages show texts. Where the functions come
from: from_gguf.py and from_directory.py.
"""

from __future__ import annotations

import codecs
import mmap
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from tinyllm.errors import ArgumentError, Error, FormatError, MemoryLimitError, comes_from, size_text
from tinyllm.files import show_words
from tinyllm.tokenizer.habits import Habits

Speller = Callable[[str], bytes]

SPACE = "▁"  # how SentencePiece spells a space inside a token


@dataclass(frozen=True)
class TokenFlags:
    """What a token that is looked for in a text takes with it: the white space before it (lstrip) and behind
    it (rstrip); `single_word`: it counts only where no word goes on at either side."""

    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Encoder(Protocol):
    """Text to ids, without what goes around a text."""

    def __call__(self, text: str, special: bool | Mapping[int, str]) -> list[int]:
        """special: whether the texts of special tokens are these tokens, or which: offset -> the text that
        stands there."""

    def find(self, text: str, start: int) -> tuple[int, str] | None:
        """The first token, from `start` on, that `special=True` takes out of a text: its offset, its text."""


@contextmanager
def refused(what: str) -> Iterator[None]:
    """What a package raises inside becomes a FormatError that begins with `what`, or a MemoryLimitError: bare
    Exceptions, messages that are no UTF-8, and panics of Rust, which are BaseExceptions of a type that is not
    exported. What a signal handler raises meanwhile stays what it is."""
    try:
        yield
    except BaseException as error:
        known = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, Error) or not known or not comes_from(error, "tokenizers", "sentencepiece"):
            raise
        if isinstance(error, MemoryError):
            raise MemoryLimitError(f"{what}: no memory left") from error
        raise FormatError(f"{what}: {show_words(str(error))}") from error


def need_memory(n_bytes: int, doing: str) -> None:
    """Raises MemoryLimitError unless the process can get n_bytes more just now.

    The tokenizers package ends the process when an allocation fails, so it is asked beforehand: address space
    is taken and, never touched, given back (4 us)."""
    try:
        mmap.mmap(-1, max(n_bytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, OverflowError) as error:
        raise MemoryLimitError(
            f"no memory left while {doing}, which may take {size_text(n_bytes)}"
        ) from error


class Tokenizer(Habits):
    """A vocabulary with its rules. Immutable; any number of threads may use one.

    vocab_size      number of ids, 0 <= id < vocab_size; padding ids that have no text are counted
    bos_id, eos_id  the ids that begin and end a text, or None
    eos_ids         every id that ends a text or a turn (eos, eot, eom...)
    special_tokens  text -> id of the control tokens; special_ids, their ids. They are parsed only when asked
                    for (`special=True`) and hidden by `decode`.

    Added tokens that are not special ("<think>", runs of spaces) are ordinary text: always parsed, always
    shown, as in Hugging Face and llama.cpp.
    """

    def __init__(
        self,
        encoder: Encoder,
        speller: Speller,
        tokens: Sequence[str],
        *,
        special_tokens: Mapping[str, int],
        literal: Collection[int] = (),
        unused: Collection[int] = (),
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        leading_space: bool = False,
    ) -> None:
        """`tokens[id]` is the vocabulary's spelling. Special and `literal` tokens stand for that very text,
        `unused` ones for nothing. `prefix` and `suffix` are what the files say to put around a text;
        `leading_space` says that the encoder puts a space before a text, which decoding then takes away."""
        self.special_tokens: dict[str, int] = dict(special_tokens)
        self.special_ids = frozenset(self.special_tokens.values())
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.eos_ids = frozenset(eos_ids) | ({eos_id} if eos_id is not None else set())
        self._encoder = encoder
        self._speller = speller
        self._tokens = tokens
        self._literal = self.special_ids | frozenset(literal)
        self._unused = frozenset(unused)
        self._prefix = list(prefix)
        self._suffix = list(suffix)
        self._leading_space = leading_space

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self._tokens) if text}

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @property
    def kind(self) -> str:
        """How the vocabulary spells its tokens, in words."""
        return _KINDS.get(self._speller, "BPE")

    @property
    def prefix(self) -> list[int]:
        """What the model's files say to put in front of every text: mostly [bos_id] or nothing."""
        return list(self._prefix)

    def encode(
        self, text: str, bos: bool | None = None, special: bool | Mapping[int, str] = False
    ) -> list[int]:
        """The ids of `text`.

        `bos` None adds what the model's files say (BOS, EOS, both or neither), True a BOS, False nothing at
        all. `special=True` turns the text of special tokens ("<|eot_id|>") into their ids; otherwise it is
        plain text. A mapping, offset -> text of the special token there, turns these alone into ids (see
        `find_special`). A SentencePiece vocabulary with a space prefix gets it at the start and again after
        each special token. Raises ArgumentError for `bos=True` without a BOS in the vocabulary, and for text
        with lone surrogates; MemoryLimitError for one that might not fit into memory.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"character {error.start} of the text is the lone surrogate {text[error.start]!r}, which "
                "UTF-8 cannot hold; read the text with errors='replace'"
            ) from None
        if bos and not self._prefix and self.bos_id is None:
            raise ArgumentError("bos=True, but this vocabulary has no BOS token; pass bos=None or False")
        ids = self._encoder(text, special)
        if bos is None:
            return [*self._prefix, *ids, *self._suffix]
        if not bos:
            return ids
        return [*(self._prefix or [self.bos_id]), *ids]  # type: ignore[list-item]

    def find_special(self, text: str, start: int = 0) -> tuple[int, str] | None:
        """The first text of a special token in `text`, from the offset `start` on, as `encode(special=True)`
        finds it: its offset and the token's text. None where there is none."""
        while found := self._encoder.find(text, start):
            if found[1] in self.special_tokens:
                return found
            start = found[0] + len(found[1])
        return None

    def decode(
        self, ids: Iterable[int], special: bool = False, *, skip_special_tokens: bool | None = None
    ) -> str:
        """The text of `ids`; special tokens are left out unless `special`, which `skip_special_tokens`, if it
        is given, is the opposite of. Bytes that are no UTF-8 become U+FFFD; nothing else is changed (spaces
        before punctuation stay, unlike with Hugging Face's clean-up).

        Raises ArgumentError for an id outside the vocabulary."""
        special = special if skip_special_tokens is None else not skip_special_tokens
        data = b"".join(self._visible(i, special) for i in ids)
        if self._leading_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def stream(self, special: bool | Collection[int] = False, after: int | None = None) -> TokenStream:
        """Decodes ids one at a time into whole characters; the pieces joined are `decode` of all the ids.

        `special`: whether special tokens are shown, or which.
        `after` is the id that came before the first one, if any. When that is a token of text, the stream
        goes on in the middle of a text, and a space in front of its first word is kept."""
        begins = after is None or self._index(after) in self.special_ids
        return TokenStream(self, special, drop_space=self._leading_space and begins)

    def check_fits(self, n_ids: int) -> None:
        """Raises FormatError where a model with `n_ids` ids has none for what goes around every text."""
        around = [i for i in (*self._prefix, *self._suffix, self.bos_id) if i is not None and i >= n_ids]
        if around:
            raise FormatError(
                f"its tokenizer puts the token {around[0]} around texts, and the model has {n_ids} tokens: "
                "are the two of the same model?"
            )

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """`token_text` of each id."""
        return [self.token_text(i) for i in ids]

    def token_text(self, token: int) -> str:
        """One token as text for display: special tokens by name, incomplete characters as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that a token stands for; a special token's are those of its name."""
        token = self._index(token)
        text = self._tokens[token]
        if token in self._literal:
            return text.encode()
        return b"" if token in self._unused else self._speller(text)

    def id_of(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells `text` ("<|eot_id|>", "▁the", "Ġthe"), or None."""
        return self._ids.get(text)

    def __repr__(self) -> str:
        n_special = len(self.special_tokens)
        return f"<Tokenizer {self.kind}: {self.vocab_size} tokens, {n_special} of them special>"

    def __reduce__(self) -> Any:
        raise TypeError("a tokenizer cannot be pickled or copied: load it in the process that uses it")

    def _visible(self, token: int, special: bool | Collection[int]) -> bytes:
        data = self.token_bytes(token)
        is_shown = special if isinstance(special, bool) else token in special
        return data if is_shown or token not in self.special_ids else b""

    def _index(self, token: int) -> int:
        token = operator.index(token)
        if not 0 <= token < len(self._tokens):
            raise ArgumentError(f"token id {token} is outside the vocabulary of {len(self._tokens)} tokens")
        return token


class TokenStream:
    """Made by `Tokenizer.stream`: `push` returns the characters that an id completes, `flush` what is
    left."""

    def __init__(self, tokenizer: Tokenizer, special: bool | Collection[int], drop_space: bool) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._drop_space = drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        data = self._tokenizer._visible(token, self._special)
        if data and self._drop_space:
            data = data[data.startswith(b" ") :]
            self._drop_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end: an incomplete character, if one is pending, as U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _byte_characters() -> dict[int, str]:
    """GPT-2's alphabet, as a table for str.translate to Latin-1: printable Latin-1 stands for itself, the
    other 68 bytes for U+0100 and up, in order. Latin-1 characters that stand for no byte map outside
    Latin-1."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict.fromkeys(others, "\uffff") | {0x100 + n: chr(byte) for n, byte in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()


def spell_byte_level(text: str) -> bytes:
    """A byte-level BPE token ("Ġthe") as bytes; one with a character outside the alphabet is its own text."""
    try:
        return text.translate(_BYTE_CHARACTERS).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()


def spell_sentencepiece(text: str) -> bytes:
    """A SentencePiece token ("▁the", "<0x0A>") as bytes."""
    byte = byte_of(text)
    return text.replace(SPACE, " ").encode() if byte is None else bytes([byte])


def byte_of(text: str) -> int | None:
    """The byte that a byte-fallback token ("<0x0A>") stands for, or None for any other token."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


_KINDS: dict[Speller, str] = {spell_byte_level: "byte-level BPE", spell_sentencepiece: "SentencePiece"}
