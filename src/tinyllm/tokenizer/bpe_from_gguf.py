"""A BPE tokenizer from the metadata of a GGUF file: tokens, merges and the name of a pre-tokenizer.

Apart from from_gguf.py, whose reading of vocabularies it uses, because the package `tokenizers`, which builds
one, takes long to import. Imports errors and the siblings from_gguf, core, bpe, pretokenizers, markers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import repeat
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, normalizers

from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import show
from tinyllm.tokenizer.bpe import BPEEncoder, need_for_vocabulary
from tinyllm.tokenizer.core import (
    SPACE,
    TokenFlags,
    Tokenizer,
    refused,
    spell_byte_level,
    spell_sentencepiece,
)
from tinyllm.tokenizer.from_gguf import _KEY, _flag, _log, _read_vocabulary, _strings, _tokenizer, _Vocabulary
from tinyllm.tokenizer.markers import token_flags
from tinyllm.tokenizer.pretokenizers import PRE_TOKENIZERS, PreTokenizerRule
from tinyllm.tokenizer.spm import CONTROL, NORMAL, UNKNOWN, USER_DEFINED


def bpe_from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a byte-level BPE vocabulary, or of Gemma 4's kind. Raises FormatError,
    UnsupportedError."""
    if metadata[_KEY + "model"] == "gemma4":  # says no tokenizer.ggml.pre
        if not _flag(metadata, "add_bos_token", True):
            _log.warning("%sadd_bos_token is false by a mistake of early converters; a BOS is added", _KEY)
            metadata = metadata | {_KEY + "add_bos_token": True}
        rule = PRE_TOKENIZERS["gemma4"]
    else:
        rule = _rule(metadata)
    vocabulary = _read_vocabulary(metadata)
    merges = [
        (left, right) for left, _, right in map(str.partition, _strings(metadata, "merges"), repeat(" "))
    ]
    for i, (left, right) in enumerate(merges):
        if not left or not right:
            raise FormatError(
                f"{_KEY}merges: entry {i}, {show(left or right)}, is not two tokens with a space between"
            )
    if _flag(metadata, "add_space_prefix", False):
        _log.warning("%sadd_space_prefix is set, which means nothing to this kind of vocabulary", _KEY)
    always = vocabulary.of_type(USER_DEFINED)
    if not rule.is_byte_level:  # their own tokenizers look for these as a whole, whatever the merges say
        always |= {text: i for text, i in vocabulary.of_type(NORMAL).items() if text.strip("\n") == ""}
    special = vocabulary.of_type(CONTROL, UNKNOWN)
    need_for_vocabulary(vocabulary.tokens, merges, [*always, *special])
    flags = {
        **{token: TokenFlags(lstrip=True) for token in rule.lstrip},
        **token_flags({*always, *special}),
    }
    with refused(f"{_KEY}merges do not fit {_KEY}tokens"):
        bpe = _byte_level(vocabulary, merges, rule) if rule.is_byte_level else _spelled(vocabulary, merges)
    bpe.add_tokens([_added(text, flags) for text in always])
    bpe.add_special_tokens([_added(text, flags, special=True) for text in special])
    return _tokenizer(
        metadata,
        vocabulary,
        BPEEncoder(bpe),
        spell_byte_level if rule.is_byte_level else spell_sentencepiece,
        add_bos=rule.add_bos,
    )


def _rule(metadata: dict[str, Any]) -> PreTokenizerRule:
    name = metadata.get(_KEY + "pre")
    if name is None:
        raise UnsupportedError(
            f"{_KEY}pre is missing, so the file does not say how its vocabulary splits text; files made "
            "before May 2024 lack it: convert the model again, or set the key"
        )
    rule = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if rule is None:
        raise UnsupportedError(
            f"the pre-tokenizer {show(str(name))} ({_KEY}pre) is none of the {len(PRE_TOKENIZERS)} that "
            "tinyllm knows, and another rule would give wrong ids; 'default' is what converters that did not "
            "know the rule wrote"
        )
    return rule


def _byte_level(
    vocabulary: _Vocabulary, merges: list[tuple[str, str]], rule: PreTokenizerRule
) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=rule.ignore_merges)
    )
    bpe.pre_tokenizer = rule.build()
    return bpe


def _spelled(vocabulary: _Vocabulary, merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """A vocabulary in the spelling of SentencePiece, with merges: Gemma's tokenizer.json, in a GGUF."""
    unknown = vocabulary.of_type(UNKNOWN)
    unk_id = vocabulary.unk_id if vocabulary.unk_id is not None else next(iter(unknown.values()), None)
    missing = [f"<0x{i:02X}>" for i in range(256) if f"<0x{i:02X}>" not in vocabulary.ids]
    if missing and unk_id is None:
        raise FormatError(
            f"{_KEY}tokens has no token for the byte {missing[0]} and none for what is unknown: it cannot "
            "spell every text"
        )
    # Some converters write runs of spaces as spaces, and merges with "▁".
    spaces = {text.replace(" ", SPACE): i for text, i in vocabulary.ids.items() if " " in text}
    bpe = tokenizers.Tokenizer(
        models.BPE(
            vocab={**spaces, **vocabulary.ids},
            merges=merges,
            unk_token=None if unk_id is None else vocabulary.tokens[unk_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    bpe.normalizer = normalizers.Replace(" ", SPACE)
    return bpe


def _added(text: str, flags: Mapping[str, TokenFlags], special: bool = False) -> AddedToken:
    return AddedToken(text, normalized=False, special=special, **asdict(flags.get(text, TokenFlags())))
