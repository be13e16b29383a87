"""A tokenizer from a Hugging Face directory, as people have it: tokenizer.json, else tokenizer.model, with
what tokenizer_config.json, special_tokens_map.json, added_tokens.json and the model's own config files add.

Where the files disagree, the ids are those of transformers 5: a tokenizer.json's post-processor says what
goes around a text, tokenizer_config.json says the flags of an added token and which tokens are special.
Imports errors, files and the siblings core, bpe, spm, patterns.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tinyllm.errors import FormatError, NotFoundError, UnsupportedError, located
from tinyllm.files import is_there, parse_json, read_json_if_any, read_small, show, show_some, user_path
from tinyllm.tokenizer.bpe import PER_JSON, BPEEncoder, with_added_tokens
from tinyllm.tokenizer.core import (
    SPACE,
    TokenFlags,
    Tokenizer,
    need_memory,
    refused,
    spell_byte_level,
    spell_sentencepiece,
)
from tinyllm.tokenizer.patterns import MAX_STEPS, Cost, cost_of
from tinyllm.tokenizer.spm import SentencePieceEncoder, load_processor, normalizer

_log = logging.getLogger(__name__)

_OTHER_KINDS = ("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.tiktoken", "spiece.model")
_MAX_VOCABULARY = 1 << 22  # far above any model's; keeps a wild id from allocating memory
_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")
# Characters that a step may make of one; the longest decomposition that Unicode has is 18 long.
_GROWTH = {"ByteLevel": 2, "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3}
_MAX_GROWTH = 1000
_COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MODELS = ("BPE", "Unigram", "WordLevel")
_MAX_AFFIX = 64  # characters of what stands before or after parts of words; models have up to 5
_MAX_AROUND = 1000  # ids that a post-processor may put around a text; models have one or two
_ENDS = ("bos_token", "eos_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def tokenizer_from_directory(path: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer in a directory, or None when there is none at all.

    Raises NotFoundError when `path` is no directory, FormatError for broken files, UnsupportedError for kinds
    of tokenizer that tinyllm does not read.
    """
    folder = user_path(path)
    if not os.path.isdir(folder):
        raise NotFoundError(f"{folder}: no such directory")
    if is_there(folder / "tokenizer.json"):
        return _from_json(folder, _Settings.read(folder))
    if is_there(folder / "tokenizer.model"):
        return _from_sentencepiece(folder, _Settings.read(folder))
    others = sorted(show(file.name) for pattern in _OTHER_KINDS for file in folder.glob(pattern))
    if others:
        raise UnsupportedError(
            f"{folder}: tinyllm reads tokenizer.json and tokenizer.model, here is only {show_some(others)}; "
            "transformers writes the former: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return None


@dataclass(frozen=True)
class _Settings:
    """What the JSON files next to a vocabulary say."""

    values: dict[str, Any]  # tokenizer_config.json over special_tokens_map.json
    added: dict[int, AddedToken]  # by added_tokens.json and tokenizer_config.json
    flagged: dict[str, AddedToken]  # those of tokenizer_config.json, which says their flags
    named: frozenset[str]  # the texts of bos_token, mask_token...: special tokens
    model: dict[str, Any]  # generation_config.json over config.json
    ends: list[int]  # eos_token_id of both

    @classmethod
    def read(cls, folder: Path) -> _Settings:
        values = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        config, generation = _read_json(folder / "config.json"), _read_json(folder / "generation_config.json")
        extra, kinds = values.get("additional_special_tokens"), values.get("extra_special_tokens")
        named = [token for name, token in values.items() if name.endswith("_token")]
        named += kinds.values() if isinstance(kinds, dict) else ()
        names = frozenset(text for token in named if (text := _content(token)))
        special = names | {_content(token) for token in extra} if isinstance(extra, list) else names
        added: dict[int, AddedToken] = {}
        flagged: dict[str, AddedToken] = {}
        decoder = values.get("added_tokens_decoder") or {}
        for text, token in _read_json(folder / "added_tokens.json").items():
            if type(token) is not int:
                raise FormatError(
                    f"{folder / 'added_tokens.json'}: the id of {show(text)} is no whole number"
                )
            added[token] = AddedToken(text, special=text in special, normalized=text not in special)
        for key, token in decoder.items() if isinstance(decoder, dict) else ():
            content = _content(token)
            if not (key.isdecimal() and len(key) < 10 and content and isinstance(token, dict)):
                raise FormatError(
                    f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has no token at {show(key)}"
                )
            flags = {name: bool(token.get(name, False)) for name in _FLAGS}
            added[int(key)] = flagged[content] = AddedToken(
                content, special=bool(token.get("special")) or content in special, **flags
            )
        if added and not 0 <= min(added) <= max(added) < _MAX_VOCABULARY:
            raise FormatError(
                f"{folder}: an added token has the id {max(added)}, which no vocabulary reaches"
            )
        ends = [i for source in (config, generation) for i in _as_list(source.get("eos_token_id"))]
        model = config | {key: value for key, value in generation.items() if value is not None}
        return cls(values, added, flagged, names, model, ends)

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
    data = read_small(file)
    need_memory(PER_JSON * len(data), f"reading {file}")
    stated = _check_file(data, file)
    with refused(f"{file}: not a tokenizer that the tokenizers package reads"):
        backend = tokenizers.Tokenizer.from_buffer(data)
        backend.no_truncation()
        backend.no_padding()
    _check_steps(backend, file)
    before, after = _around(backend, file)
    with refused(f"{file}: the tokenizers package fails with it"):
        backend.encode("a", add_special_tokens=False)
    speller, leading_space = _read_decoder(backend, file)
    with refused(f"{file}: the tokenizers package fails with it"):
        backend, missing = _with_settings(backend, settings)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    size = settings.n_ids(max(vocabulary.values(), default=-1), folder)
    if outside := [i for i in (*before, *after) if i >= size]:
        raise FormatError(
            f"{file}: its post-processor adds the id {outside[0]}, outside the vocabulary of {size} tokens"
        )
    tokens = [""] * size
    for text, i in vocabulary.items():
        if tokens[i]:
            raise FormatError(f"{file}: the tokens {show(tokens[i])} and {show(text)} both have the id {i}")
        tokens[i] = text
    # The package counts added tokens on from the vocabulary's size, whatever id the file gives them.
    # Published files say other ids (Yi's), and all that reads them goes by the package.
    for text, i in (*stated, *((token.content, i) for i, token in missing)):
        if vocabulary.get(text, i) != i:
            _log.warning(
                "%s: the added token %s has the id %d, not %d", file, show(text), vocabulary[text], i
            )
    added = backend.get_added_tokens_decoder()
    special = {token.content: i for i, token in added.items() if token.special}
    bos_id, eos_id = (_in_range(settings.named_id(name, backend.token_to_id), size) for name in _ENDS)
    for side, token, around in (("bos", bos_id, before), ("eos", eos_id, after)):
        wanted = settings.values.get(f"add_{side}_token")
        if isinstance(wanted, bool) and wanted != (token in around):
            _log.warning(
                "%s: tokenizer_config.json says add_%s_token = %s, but the post-processor of tokenizer.json "
                "adds %s; the post-processor counts, as in transformers 5 (unlike 4)",
                folder,
                side,
                str(wanted).lower(),
                "none" if wanted else "one",
            )
    return Tokenizer(
        BPEEncoder(backend),
        speller,
        tokens,
        special_tokens=special,
        literal=added,
        prefix=before,
        suffix=after,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=[i for i in settings.ends if i < size],
        leading_space=leading_space,
    )


def _with_settings(
    backend: tokenizers.Tokenizer, settings: _Settings
) -> tuple[tokenizers.Tokenizer, list[tuple[int, AddedToken]]]:
    """The tokenizer with the flags that tokenizer_config.json says, with every token special that it names as
    one, and with the tokens that tokenizer.json lacks: these as (id, token)."""
    own = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    missing = [(i, t) for i, t in sorted(settings.added.items()) if backend.token_to_id(t.content) is None]
    wanted = [settings.flagged.get(token.content, token) for token in own]
    wanted = [_special(token) if token.content in settings.named else token for token in wanted]
    # A token for padding may be any ("!"), and is no marker for that.
    others = settings.named - {token.content for token in own} - {_content(settings.values.get("pad_token"))}
    wanted += [_special(AddedToken(text)) for text in sorted(others) if backend.token_to_id(text) is not None]
    wanted += [token for _, token in missing]
    changed = list(map(repr, wanted)) != list(map(repr, own))
    return with_added_tokens(backend, wanted) if changed else backend, missing


def _special(token: AddedToken) -> AddedToken:
    """The same token, special; a special one is looked for before the text is normalized."""
    flags = {name: getattr(token, name) for name in _FLAGS if name != "normalized"}
    return AddedToken(token.content, special=True, normalized=False, **flags)


def _check_file(data: bytes, file: Path) -> list[tuple[str, int]]:
    """Refuses what the package would take at its word, and then hang, end the process or print a panic.
    Returns (text, id) of the added tokens, which the package does not tell as the file states them."""
    value = parse_json(data, str(file))
    if not isinstance(value, dict):
        return []
    steps = 0.0
    for step in _objects([value.get(name) for name in _COMPONENTS]):  # a pattern is one, too
        if step.get("type") == "Precompiled" or "precompiled_charsmap" in step:
            raise UnsupportedError(
                f"{file}: its normalizer is a compiled table, which the tokenizers package does not check; "
                "where the model has a tokenizer.model, put that in the directory in place of the "
                "tokenizer.json"
            )
        with located(file):
            cost = _cost(step)
            steps += cost.steps
            if steps > MAX_STEPS:
                raise UnsupportedError("its regular expressions together can take a time without bound")
            pattern = step.get("pattern")
            if step.get("type") == "Replace" and isinstance(pattern, dict) and not _cost(pattern).least:
                raise UnsupportedError("its normalizer replaces a pattern that matches where nothing stands")
    model = value.get("model")
    if isinstance(model, dict):
        _check_affixes(model, file)
        if model.get("dropout"):
            raise UnsupportedError(f"{file}: its dropout makes other tokens each time; set it to null there")
    added = value.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return [(token.get("content", ""), token.get("id", 0)) for token in tokens]


def _cost(pattern: dict[str, Any]) -> Cost:
    """Of what a step looks for, as the file says it."""
    regex, text = pattern.get("Regex"), pattern.get("String")
    return cost_of(regex if isinstance(regex, str) else re.escape(text) if isinstance(text, str) else "")


def _check_affixes(model: dict[str, Any], file: Path) -> None:
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(affix := model.get(name), str) and len(affix) > _MAX_AFFIX:
            raise UnsupportedError(f"{file}: its {name} has {len(affix)} characters, {_MAX_AFFIX} at most")
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        _, right = merge.partition(" ")[::2] if isinstance(merge, str) else (*merge, "", "")[:2]
        if isinstance(right, str) and not right.startswith(prefix):
            raise FormatError(f"{file}: merges {show(right)}, which does not begin with {show(prefix)}")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object inside `value`."""
    todo = [value]
    while todo:
        inner = todo.pop()
        if isinstance(inner, dict):
            yield inner
            todo += inner.values()
        elif isinstance(inner, list):
            todo += inner


def _check_steps(backend: tokenizers.Tokenizer, file: Path) -> None:
    """Refuses models that take a time without bound (WordPiece: the square of a word), and what would take
    memory without bound, at which the package ends the whole process."""
    kind = type(backend.model).__name__
    if kind not in _MODELS:
        raise UnsupportedError(f"{file}: its model is {kind}; tinyllm reads {', '.join(_MODELS)}")
    growth = 1.0  # characters of a text, at most, for one of the user's
    for step in (*_steps(backend.normalizer), *_steps(backend.pre_tokenizer)):
        if step["type"] == "Replace":
            pattern = step["pattern"].get("String", "a")
            growth *= max(1.0, len(step["content"]) / max(len(pattern), 1))
        elif step["type"] == "Prepend":
            growth *= 1 + len(step["prepend"])
        else:
            growth *= _GROWTH.get(step["type"], 1)
        if growth > _MAX_GROWTH:
            raise FormatError(f"{file}: its steps before merging can make {growth:.3g} characters of one")


def _around(backend: tokenizers.Tokenizer, file: Path) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text, as it says them: the package would take
    any number of them, and end the process where they do not fit into memory."""
    steps = [step for step in _steps(backend.post_processor) if step["type"] != "ByteLevel"]  # offsets only
    if not steps:
        return [], []
    step = steps[0]
    texts: list[str] = []
    sides: list[list[int]] = [[]]
    if step["type"] == "TemplateProcessing":
        for part in step["single"]:
            if "Sequence" in part:
                texts.append(part["Sequence"]["id"])
                sides.append([])
            else:
                name = part["SpecialToken"]["id"]
                if name not in step["special_tokens"]:
                    raise FormatError(
                        f"{file}: its post-processor adds {show(name)} and does not say its ids"
                    )
                sides[-1] += step["special_tokens"][name]["ids"]
            if len(sides[-1]) > _MAX_AROUND:
                raise FormatError(f"{file}: its post-processor puts more than {_MAX_AROUND} ids at one side")
    elif step["type"] in ("BertProcessing", "RobertaProcessing"):
        texts, sides = ["A"], [[step["cls"][1]], [step["sep"][1]]]
    else:
        raise UnsupportedError(f"{file}: tinyllm does not know its post-processor {show(step['type'])}")
    if len(steps) > 1 or texts != ["A"]:
        raise FormatError(f"{file}: its post-processor does not put one text into its template")
    before, after = sides
    return before, after


def _read_decoder(backend: tokenizers.Tokenizer, file: Path) -> tuple[Callable[[str], bytes], bool]:
    """How tokens are spelled, and whether a text begins with a space that is not its own."""
    steps = _steps(backend.decoder)
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


def _steps(component: Any) -> list[dict[str, Any]]:
    """The settings of a normalizer, a decoder..., those of a sequence one after another."""
    if component is None:
        return []
    todo, steps = [json.loads(component.__getstate__())], []
    while todo:
        step = todo.pop()
        parts = next((step[key] for key in _PARTS if step["type"] == "Sequence" and key in step), None)
        steps += [step] if parts is None else []
        todo += reversed(parts or [])
    return steps


def _from_sentencepiece(folder: Path, settings: _Settings) -> Tokenizer:
    file = folder / "tokenizer.model"
    # Spaces stay as they are, even where the model asks to squeeze them: so do the GGUF of the same model and
    # Hugging Face's fast tokenizers, and a text comes back as it was.
    model = read_small(file) + normalizer(squeeze_spaces=False)
    processor = inner = load_processor(model, str(file))
    if settings.values.get("legacy") is False or settings.values.get("add_prefix_space") is False:
        inner = load_processor(model + normalizer(space_prefix=False), str(file))
    if settings.values.get("add_prefix_space") is False:
        processor = inner

    n_pieces = processor.get_piece_size()
    size = settings.n_ids(max([n_pieces - 1, *settings.added]), folder)
    with refused(f"{file}: a piece is no text"):
        tokens = [processor.id_to_piece(i) for i in range(n_pieces)] + [""] * (size - n_pieces)
        leading_space = "".join(processor.encode("a", out_type=str)).startswith(SPACE)
    for i in range(n_pieces):
        if not math.isfinite(processor.get_score(i)):
            raise FormatError(f"{file}: the score of its piece {show(tokens[i])} is no number")
    special = {tokens[i]: i for i in range(n_pieces) if processor.is_control(i) or processor.is_unknown(i)}
    always: dict[str, int] = {}
    flags: dict[str, TokenFlags] = {}
    for i, token in settings.added.items():
        tokens[i] = token.content
        (special if token.special else always)[token.content] = i
        flags[token.content] = TokenFlags(token.lstrip, token.rstrip, token.single_word)
    ids = {text: i for i, text in enumerate(tokens) if text}
    bos_id, eos_id = (_in_range(settings.named_id(name, ids.get), size) for name in _ENDS)
    bos_id = bos_id if bos_id is not None else _in_range(processor.bos_id(), size)
    eos_id = eos_id if eos_id is not None else _in_range(processor.eos_id(), size)
    return Tokenizer(
        SentencePieceEncoder(processor, always, special, flags, inner),
        spell_sentencepiece,
        tokens,
        special_tokens=special,
        literal=settings.added,
        prefix=settings.around("add_bos_token", bos_id, [i for i in (bos_id,) if i is not None]),
        suffix=settings.around("add_eos_token", eos_id, ()),
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=[i for i in settings.ends if i < size],
        leading_space=leading_space,
    )


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    value = read_json_if_any(file)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{file}: holds what is no text: {error.reason}") from error
    return value


def _content(token: Any) -> str | None:
    """A token is given as its text or as an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _as_list(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _in_range(token: int | None, size: int) -> int | None:
    return token if token is not None and 0 <= token < size else None
