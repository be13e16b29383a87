"""A tokenizer from a Hugging Face directory, as people have it: tokenizer.json, else tokenizer.model, with
what tokenizer_config.json, special_tokens_map.json, added_tokens.json and the model's own config files add.

Imports errors and the siblings core, bpe, spm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tinyllm.errors import FormatError, NotFoundError, ReadError, UnsupportedError
from tinyllm.tokenizer.bpe import BPEEncoder
from tinyllm.tokenizer.core import SPACE, Tokenizer, spell_byte_level, spell_sentencepiece
from tinyllm.tokenizer.spm import SentencePieceEncoder, load_processor, normalizer

_OTHER_KINDS = ("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.tiktoken", "spiece.model")
_MAX_VOCABULARY = 1 << 22  # far above any model's; keeps a wild id from allocating memory
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_from_directory(path: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer in a directory, or None when there is none at all.

    Raises NotFoundError when `path` is no directory, FormatError for broken files, UnsupportedError for kinds
    of tokenizer that tinyllm does not read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no such directory")
    if (folder / "tokenizer.json").exists():
        return _from_json(folder, _Settings.read(folder))
    if (folder / "tokenizer.model").exists():
        return _from_sentencepiece(folder, _Settings.read(folder))
    others = sorted(file.name for pattern in _OTHER_KINDS for file in folder.glob(pattern))
    if others:
        raise UnsupportedError(
            f"{folder}: tinyllm reads tokenizer.json and tokenizer.model, here is only {', '.join(others)}; "
            "transformers writes the former: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return None


@dataclass(frozen=True)
class _Settings:
    """What the JSON files next to a vocabulary say."""

    values: dict[str, Any]  # tokenizer_config.json over special_tokens_map.json
    added: dict[int, AddedToken]  # tokens outside the vocabulary file
    model: dict[str, Any]  # generation_config.json over config.json
    ends: list[int]  # eos_token_id of both

    @classmethod
    def read(cls, folder: Path) -> _Settings:
        values = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        config, generation = _read_json(folder / "config.json"), _read_json(folder / "generation_config.json")
        extra = values.get("additional_special_tokens")
        named = {_content(values.get(name)) for name in _NAMES}
        named |= {_content(token) for token in extra} if isinstance(extra, list) else set()
        added: dict[int, AddedToken] = {}
        decoder = values.get("added_tokens_decoder") or {}
        for text, token in _read_json(folder / "added_tokens.json").items():
            if isinstance(token, int):
                added[token] = AddedToken(text, special=text in named, normalized=False)
        for key, token in decoder.items() if isinstance(decoder, dict) else ():
            content = _content(token)
            if not (key.isdecimal() and len(key) < 10 and content and isinstance(token, dict)):
                raise FormatError(
                    f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has no token at {key!r}"
                )
            flags = {
                name: bool(token.get(name, False))
                for name in ("lstrip", "rstrip", "single_word", "normalized")
            }
            added[int(key)] = AddedToken(
                content, special=bool(token.get("special")) or content in named, **flags
            )
        if added and not 0 <= min(added) <= max(added) < _MAX_VOCABULARY:
            raise FormatError(
                f"{folder}: an added token has the id {max(added)}, which no vocabulary reaches"
            )
        ends = [i for source in (config, generation) for i in _as_list(source.get("eos_token_id"))]
        model = config | {key: value for key, value in generation.items() if value is not None}
        return cls(values, added, model, ends)

    def named_id(self, name: str, id_of: Callable[[str], int | None]) -> int | None:
        """The id of bos_token, eos_token...: by its text, else by the model's config."""
        text = _content(self.values.get(name))
        token = id_of(text) if text else None
        return next(iter(_as_list(self.model.get(f"{name}_id"))), None) if token is None else token

    def around(self, name: str, token: int | None, default: Sequence[int]) -> list[int]:
        """What goes before (add_bos_token) or after (add_eos_token) a text."""
        wanted = self.values.get(name)
        if not isinstance(wanted, bool):
            return list(default)
        return (list(default) or [i for i in (token,) if i is not None]) if wanted else []

    def n_ids(self, highest: int, folder: Path) -> int:
        """How many ids there are; models pad their vocabulary beyond the tokenizer's."""
        declared = self.model.get("vocab_size")
        size = max(highest + 1, declared if isinstance(declared, int) else 0)
        if size > _MAX_VOCABULARY:
            raise FormatError(f"{folder}: a vocabulary of {size} ids; tinyllm stops at {_MAX_VOCABULARY}")
        return size


def _from_json(folder: Path, settings: _Settings) -> Tokenizer:
    file = folder / "tokenizer.json"
    data = _read_bytes(file)
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
        backend.no_truncation()
        backend.no_padding()
        before, after = _template(backend)
    except Exception as error:  # the package raises bare Exceptions
        raise FormatError(f"{file}: not a tokenizer that the tokenizers package reads: {error}") from error
    for _, token in sorted(settings.added.items()):
        if backend.token_to_id(token.content) is None:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    speller, leading_space = _read_decoder(backend, file)

    vocabulary = backend.get_vocab(with_added_tokens=True)
    size = settings.n_ids(max(vocabulary.values(), default=-1), folder)
    tokens = [""] * size
    for text, i in vocabulary.items():
        tokens[i] = text
    added = backend.get_added_tokens_decoder()
    named = {_content(settings.values.get(name)) for name in _NAMES}
    special = {t.content: i for i, t in added.items() if t.special or t.content in named}
    bos_id, eos_id = (_in_range(settings.named_id(name, backend.token_to_id), size) for name in _NAMES[:2])
    return Tokenizer(
        BPEEncoder(backend),
        speller,
        tokens,
        special_tokens=special,
        literal=added,
        prefix=settings.around("add_bos_token", bos_id, before),
        suffix=settings.around("add_eos_token", eos_id, after),
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=[i for i in settings.ends if i < size],
        leading_space=leading_space,
    )


def _template(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text."""
    text = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    for start in range(len(whole) - len(text) + 1):
        end = start + len(text)
        if whole[start:end] == text:
            return whole[:start], whole[end:]
    return [], []


def _read_decoder(backend: tokenizers.Tokenizer, file: Path) -> tuple[Callable[[str], bytes], bool]:
    """How tokens are spelled, and whether a text begins with a space that is not its own."""
    top = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    steps = list(_flatten(top))
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return spell_byte_level, False
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and (
        "Metaspace" in kinds or {"type": "Replace", "pattern": {"String": SPACE}, "content": " "} in steps
    ):
        strips = any(
            (s["type"] == "Strip" and s.get("content") == " " and s.get("start", 0) > 0)
            or (s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never")
            for s in steps
        )
        return spell_sentencepiece, strips
    raise UnsupportedError(
        f"{file}: its decoder is {' + '.join(sorted(kinds))}; tinyllm reads ByteLevel ones and those of "
        "SentencePiece vocabularies"
    )


def _flatten(decoder: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for step in decoder["decoders"]:
        yield from _flatten(step)


def _from_sentencepiece(folder: Path, settings: _Settings) -> Tokenizer:
    file = folder / "tokenizer.model"
    # Spaces stay as they are, even where the model asks to squeeze them: so do the GGUF of the same model and
    # Hugging Face's fast tokenizers, and a text comes back as it was.
    model = _read_bytes(file) + normalizer(squeeze_spaces=False)
    processor = inner = load_processor(model, str(file))
    if settings.values.get("legacy") is False or settings.values.get("add_prefix_space") is False:
        inner = load_processor(model + normalizer(space_prefix=False), str(file))
    if settings.values.get("add_prefix_space") is False:
        processor = inner

    n_pieces = processor.get_piece_size()
    size = settings.n_ids(max([n_pieces - 1, *settings.added]), folder)
    tokens = [processor.id_to_piece(i) for i in range(n_pieces)] + [""] * (size - n_pieces)
    special = {tokens[i]: i for i in range(n_pieces) if processor.is_control(i) or processor.is_unknown(i)}
    always: dict[str, int] = {}
    rstrip = set()
    for i, token in settings.added.items():
        tokens[i] = token.content
        (special if token.special else always)[token.content] = i
        if token.rstrip:
            rstrip.add(token.content)
    ids = {text: i for i, text in enumerate(tokens) if text}
    bos_id, eos_id = (_in_range(settings.named_id(name, ids.get), size) for name in _NAMES[:2])
    bos_id = bos_id if bos_id is not None else _in_range(processor.bos_id(), size)
    eos_id = eos_id if eos_id is not None else _in_range(processor.eos_id(), size)
    return Tokenizer(
        SentencePieceEncoder(processor, always, special, rstrip, inner),
        spell_sentencepiece,
        tokens,
        special_tokens=special,
        literal=settings.added,
        prefix=settings.around("add_bos_token", bos_id, [i for i in (bos_id,) if i is not None]),
        suffix=settings.around("add_eos_token", eos_id, ()),
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=[i for i in settings.ends if i < size],
        leading_space="".join(processor.encode("a", out_type=str)).startswith(SPACE),
    )


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not file.exists():
        return {}
    try:
        value = json.loads(_read_bytes(file))
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ReadError(f"{file}: {error.strerror or error}") from error


def _content(token: Any) -> str | None:
    """A token is given as its text or as an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _as_list(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _in_range(token: int | None, size: int) -> int | None:
    return token if token is not None and 0 <= token < size else None
