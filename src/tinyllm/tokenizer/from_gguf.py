"""A tokenizer from the metadata of a GGUF file: tokens, scores or merges, token types and a handful of ids.

Metadata is untrusted: wrong types, lengths and ids are FormatErrors; kinds of tokenizer that are not known,
UnsupportedErrors. A token is what its type says, unless an id of the file or markers.py says that it begins
or ends a text. Imports errors and the siblings core, bpe, spm, pretokenizers, markers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import show
from tinyllm.tokenizer.core import (
    Encoder,
    Speller,
    Tokenizer,
    byte_of,
    spell_sentencepiece,
)
from tinyllm.tokenizer.markers import CONTROL_ENDS, TURN_ENDS, is_end_of_message, token_flags
from tinyllm.tokenizer.spm import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceEncoder,
    build_model,
    load_processor,
)

_log = logging.getLogger(__name__)

_KEY = "tokenizer.ggml."
_NO_TOKEN = 0xFFFFFFFF
_OF_SENTENCEPIECE = ("<s>", "</s>", "<unk>")  # where no ids say which begins, ends, is unknown
_NAMES = frozenset((*TURN_ENDS, *CONTROL_ENDS, *_OF_SENTENCEPIECE))  # that tell what a token does

# What files may ask for and tinyllm does not do, and what to do about it.
_NOT_DONE = {
    "suppress_tokens": "tokens that must never be sampled; pass a logit_bias that excludes them",
    "normalizer.lowercase": "text in lower case",
    "normalizer.strip_accents": "text without accents",
    "precompiled_charsmap": "text rewritten by a compiled table",
}


def tokenizer_from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that GGUF metadata (key -> Python value; arrays as lists or numpy arrays) describes.

    Raises FormatError when the entries are missing or contradict each other, UnsupportedError for a kind of
    tokenizer (`tokenizer.ggml.model`) or pre-tokenizer (`tokenizer.ggml.pre`) that tinyllm does not know.
    """
    model = metadata.get(_KEY + "model")
    if model is None:
        raise FormatError(f"the metadata has no {_KEY}model: this file holds no tokenizer")
    kind = str(model)  # an array equals nothing and everything
    if kind == "llama":
        return _sentencepiece(metadata)
    if kind in ("gpt2", "gemma4"):
        from tinyllm.tokenizer.bpe_from_gguf import bpe_from_gguf  # the package tokenizers takes 50 ms

        return bpe_from_gguf(metadata)
    raise UnsupportedError(
        f"{_KEY}model is {show(kind)}; tinyllm reads 'llama' (SentencePiece BPE), 'gpt2' (byte-level BPE) "
        "and 'gemma4'"
    )


@dataclass(frozen=True)
class _Vocabulary:
    """What all kinds share. Types are corrected: tokens that begin or end a text are control tokens."""

    tokens: list[str]
    types: npt.NDArray[Any]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eos_ids: frozenset[int]

    @cached_property
    def ids(self) -> dict[str, int]:
        return dict(zip(self.tokens, range(len(self.tokens)), strict=True))

    def of_type(self, *types: int) -> dict[str, int]:
        """Tokens of these types with their ids, in their order."""
        found = np.logical_or.reduce([self.types == kind for kind in types])
        return {self.tokens[i]: i for i in np.flatnonzero(found).tolist()}


def _read_vocabulary(metadata: dict[str, Any]) -> _Vocabulary:
    for name, what in _NOT_DONE.items():
        value = metadata.get(_KEY + name)
        if value is not None and value is not False and np.size(value):
            _log.warning("%s%s asks for %s, which is not done", _KEY, name, what)
    tokens = _strings(metadata, "tokens")
    stated = _numbers(metadata, "token_type", len(tokens), "iu")
    if stated is None:
        types = np.array([NORMAL if byte_of(text) is None else BYTE for text in tokens], np.int64)
    else:
        types = stated.copy()
    if not all(tokens):
        for i, text in enumerate(tokens):
            if not text:  # files have them where a vocabulary was padded; they can stand for nothing
                tokens[i], types[i] = f"[EMPTY_{i}]", UNUSED
    different = set(tokens)
    if len(different) != len(tokens):
        ids = {text: i for i, text in enumerate(tokens)}
        i, text = next((i, text) for i, text in enumerate(tokens) if ids[text] != i)
        raise FormatError(f"{_KEY}tokens: {show(text)} stands there twice, as {i} and {ids[text]}")
    ids = {text: tokens.index(text) for text in _NAMES & different}

    bos_id, eos_id, eot_id, eom_id, unk_id = (
        _token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown")
    )
    if metadata[_KEY + "model"] == "llama":  # without ids, the names that SentencePiece gives them
        bos_id, eos_id, unk_id = (
            ids[text]
            if i is None and text in ids and (stated is None or types[ids[text]] in (CONTROL, UNKNOWN))
            else i
            for i, text in zip((bos_id, eos_id, unk_id), _OF_SENTENCEPIECE, strict=True)
        )
    ends = {ids[text] for text in TURN_ENDS if text in ids and types[ids[text]] != UNUSED}
    ends |= {ids[text] for text in CONTROL_ENDS if text in ids and types[ids[text]] == CONTROL}
    ends |= {i for i in (eot_id, eom_id) if i is not None}
    if is_end_of_message(ids):
        ends.discard(ids["<|end|>"])
    ends |= {eos_id} if eos_id is not None else set()
    for i in sorted(ends | ({bos_id} if bos_id is not None else set())):
        # Added tokens of type USER_DEFINED are a converter's habit; an ordinary one is worth a word.
        if stated is not None and types[i] == NORMAL:
            _log.warning(
                "%stoken_type says that %s, the token %d, is ordinary text; it begins or ends texts, and is "
                "read as a control token",
                _KEY,
                show(tokens[i]),
                i,
            )
        types[i] = CONTROL
    if unk_id is not None:
        types[unk_id] = UNKNOWN
    return _Vocabulary(tokens, types, bos_id, eos_id, unk_id, frozenset(ends))


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    vocabulary = _read_vocabulary(metadata)
    tokens, types = vocabulary.tokens, vocabulary.types
    scores = _numbers(metadata, "scores", len(tokens), "fiu")
    if scores is None:
        raise FormatError(
            f"{_KEY}scores is missing; a SentencePiece vocabulary needs the score of each token"
        )
    space_prefix = _flag(metadata, "add_space_prefix", True)
    always = vocabulary.of_type(USER_DEFINED)
    special = vocabulary.of_type(CONTROL, UNKNOWN)

    # SentencePiece wants exactly one unknown piece; the encoder cuts at user-defined tokens before it gets to
    # see them, so to SentencePiece they are control pieces.
    unknown = vocabulary.of_type(UNKNOWN)
    unk_id = vocabulary.unk_id if vocabulary.unk_id is not None else next(iter(unknown.values()), None)
    if unk_id is None:
        raise FormatError(f"no token is of type {UNKNOWN} (unknown) and {_KEY}unknown_token_id is missing")
    if not 1 <= types.min() <= types.max() <= 6:
        raise FormatError(f"{_KEY}token_type holds {types.min()} to {types.max()}; there are types 1 to 6")
    if not (np.abs(scores.astype(np.float64)) < 1e38).all():
        raise FormatError(f"{_KEY}scores holds a number that float32 has no room for")
    kinds = np.where((types == UNKNOWN) | (types == USER_DEFINED), CONTROL, types)
    kinds[unk_id] = UNKNOWN
    n_bytes = int(np.count_nonzero(kinds == BYTE))
    if n_bytes not in (0, 256):
        raise FormatError(f"{n_bytes} tokens are of type {BYTE} (byte); there must be all 256 or none")
    model = build_model(
        tokens,
        scores,
        kinds,
        byte_fallback=n_bytes == 256,
        space_prefix=space_prefix,
        squeeze_spaces=_flag(metadata, "remove_extra_whitespaces", False),
    )
    return _tokenizer(
        metadata,
        vocabulary,
        SentencePieceEncoder(
            load_processor(model, _KEY + "tokens"), always, special, token_flags({*always, *special})
        ),
        spell_sentencepiece,
        add_bos=True,
        leading_space=space_prefix,
    )


def _tokenizer(
    metadata: dict[str, Any],
    vocabulary: _Vocabulary,
    encoder: Encoder,
    speller: Speller,
    *,
    add_bos: bool,
    leading_space: bool = False,
) -> Tokenizer:
    def around(name: str, token: int | None, default: bool) -> list[int]:
        if not _flag(metadata, name, default):
            return []
        if token is None and _KEY + name in metadata:
            _log.warning("%s%s is set, but the file names no such token; none is added", _KEY, name)
        return [] if token is None else [token]

    return Tokenizer(
        encoder,
        speller,
        vocabulary.tokens,
        special_tokens=vocabulary.of_type(CONTROL, UNKNOWN),
        literal=vocabulary.of_type(USER_DEFINED).values(),
        unused=vocabulary.of_type(UNUSED).values(),
        prefix=around("add_bos_token", vocabulary.bos_id, add_bos),
        suffix=around("add_eos_token", vocabulary.eos_id, False),
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        eos_ids=vocabulary.eos_ids,
        leading_space=leading_space,
    )


def _strings(metadata: dict[str, Any], name: str) -> list[str]:
    value = metadata.get(_KEY + name)
    if value is None:
        raise FormatError(f"{_KEY}{name} is missing")
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise FormatError(f"{_KEY}{name} must be an array of strings, not {type(value).__name__}")
    strings = list(value)
    if set(map(type, strings)) - {str}:
        for i, text in enumerate(strings):
            if not isinstance(text, str):
                raise FormatError(f"{_KEY}{name}: entry {i} must be a string, not {type(text).__name__}")
    return strings


def _numbers(metadata: dict[str, Any], name: str, length: int, kinds: str) -> npt.NDArray[Any] | None:
    """An array of `length` numbers of the given numpy kinds; None where the file has none."""
    value = metadata.get(_KEY + name)
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise FormatError(
            f"{_KEY}{name} must be an array of numbers, not of {array.dtype} with shape {array.shape}"
        )
    if len(array) != length:
        raise FormatError(f"{_KEY}{name} has {len(array)} entries, {_KEY}tokens {length}")
    if not np.isfinite(array).all():
        raise FormatError(f"{_KEY}{name} has entries that are not finite")
    return array


def _token_id(metadata: dict[str, Any], name: str, n_tokens: int) -> int | None:
    key = f"{_KEY}{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise FormatError(f"{key} must be an integer, not {type(value).__name__}")
    if value in (_NO_TOKEN, -1):
        return None
    if not 0 <= value < n_tokens:
        raise FormatError(f"{key} is {value}, outside the vocabulary of {n_tokens} tokens")
    return int(value)


def _flag(metadata: dict[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(_KEY + name, default)
    if not isinstance(value, bool | np.bool_):
        raise FormatError(f"{_KEY}{name} must be true or false, not {type(value).__name__}")
    return bool(value)
