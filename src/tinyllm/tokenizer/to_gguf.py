"""The tokenizer of a Hugging Face directory as GGUF metadata, the way llama.cpp's converter writes it.

What comes out is read back by from_gguf.py and must give the ids that the directory's own tokenizer gives,
on a battery of texts: a tokenizer that GGUF cannot express is refused, not approximated. What it cannot say
of single tokens is logged. Imports errors and siblings.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import is_there, show, show_some
from tinyllm.tokenizer.core import Tokenizer, byte_of
from tinyllm.tokenizer.from_directory import tokenizer_from_directory
from tinyllm.tokenizer.from_gguf import tokenizer_from_gguf
from tinyllm.tokenizer.markers import TURN_ENDS
from tinyllm.tokenizer.pretokenizers import PRE_TOKENIZERS
from tinyllm.tokenizer.spm import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, load_processor

_log = logging.getLogger(__name__)

_KEY = "tokenizer.ggml."

# Texts on which any two of the splitting rules in use differ.
BATTERY = (
    "Hello world", " Hello  world   again", "I'm, you'LL, it's; we'Ve'd", "'tis 'Twas 'S 'sx",
    "x1 12 123 1234 12345 1,234.5 ٣٤٥", "CamelCase HTTPServer iPhone ÀÉ Straße ŒUVRE",
    "tabs\tand\n\nnew\r\nlines \n  \n x", "a/b//c \\d\n/e http://x.y/z?q=1", "ends in spaces   ", "\n", " ",
    "!!! ... ?!\n --- ===\n\n (a) [b] {c}",
    "日本語のテキスト 한국어 中文字符。，「」 ไทย हिन्दी עברית العربية",
    "emoji 🙂👍🏽 e\u0308 \u00a0nbsp\u3000wide", "def f(x):\n    return x**2  # ok\n\t\tif x_1 != 'y':",
    "$5 €6.70 50% #tag @me", "   leading", "x  12   3", "ﬁ ½ Ⅷ ① x² H₂O",
)  # fmt: skip


def tokenizer_to_gguf(folder: Path) -> dict[str, Any]:
    """The `tokenizer.ggml.*` entries for a directory's tokenizer; empty where it has none.

    Raises FormatError, UnsupportedError for a tokenizer that a GGUF file cannot hold.
    """
    tokenizer = tokenizer_from_directory(folder)
    if tokenizer is None:
        return {}
    if is_there(folder / "tokenizer.model"):
        entries = _sentencepiece(folder, tokenizer)
    else:
        entries = _from_json(folder, tokenizer)
    entries |= _ids(tokenizer)
    _verify(folder, tokenizer, entries)
    return entries


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    prefix, suffix = tokenizer._prefix, tokenizer._suffix
    entries: dict[str, Any] = {
        _KEY + "add_bos_token": tokenizer.bos_id is not None and prefix[:1] == [tokenizer.bos_id],
        _KEY + "add_eos_token": tokenizer.eos_id is not None and suffix[-1:] == [tokenizer.eos_id],
    }
    # There is room for three; those that are known by their names need none.
    named = {tokenizer.id_of(text) for text in TURN_ENDS}
    others = sorted(tokenizer.eos_ids - {tokenizer.eos_id}, key=lambda i: (i in named, i))
    eot, eom = [*others, None, None][:2]
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "eot": eot, "eom": eom}
    return entries | {f"{_KEY}{name}_token_id": i for name, i in ids.items() if i is not None}


def _table(tokenizer: Tokenizer, types: Mapping[int, int]) -> dict[str, Any]:
    """Tokens and their types; ids without a text are padding."""
    tokens = [text or f"[PAD{i}]" for i, text in enumerate(tokenizer._tokens)]
    kinds = [types.get(i, NORMAL) if text else UNUSED for i, text in enumerate(tokenizer._tokens)]
    return {_KEY + "tokens": tokens, _KEY + "token_type": np.array(kinds, np.int32)}


def _sentencepiece(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    processor = load_processor((folder / "tokenizer.model").read_bytes(), str(folder / "tokenizer.model"))
    n = processor.get_piece_size()
    types: dict[int, int] = {}
    for i in range(n):
        if processor.is_unknown(i):
            types[i] = UNKNOWN
        elif processor.is_control(i):
            types[i] = CONTROL
        elif processor.is_byte(i):
            types[i] = BYTE
        elif processor.is_unused(i):
            types[i] = UNUSED
    types |= {
        i: CONTROL if i in tokenizer.special_ids else USER_DEFINED for i in tokenizer._literal if i >= n
    }
    types |= {i: CONTROL for i in tokenizer.special_ids if types.get(i, NORMAL) == NORMAL}
    scores = [processor.get_score(i) if i < n else -1000.0 for i in range(tokenizer.vocab_size)]
    unknown = {f"{_KEY}unknown_token_id": processor.unk_id()} if processor.unk_id() >= 0 else {}
    return (
        {_KEY + "model": "llama", _KEY + "pre": "default"}
        | _table(tokenizer, types)
        | {
            _KEY + "scores": np.array(scores, np.float32),
            _KEY + "add_space_prefix": tokenizer._leading_space,
        }
        | unknown
    )


def _from_json(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_bytes())
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedError(f"{file}: a {model.get('type')} tokenizer; BPE ones can be written as GGUF")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    special = tokenizer.special_ids
    types = {i: CONTROL if i in special else USER_DEFINED for i in tokenizer._literal}
    if model.get("byte_fallback"):
        return _pieces(tokenizer, types, merges, model)
    return (
        {_KEY + "model": "gpt2", _KEY + "pre": _rule(file, model)}
        | _table(tokenizer, types)
        | {_KEY + "merges": merges}
    )


def _pieces(
    tokenizer: Tokenizer, types: dict[int, int], merges: list[str], model: Mapping[str, Any]
) -> dict[str, Any]:
    """A SentencePiece vocabulary in tokenizer.json: merges in order are scores in order."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    tokens = tokenizer._tokens
    types = {i: BYTE for i, text in enumerate(tokens) if byte_of(text) is not None} | types
    unknown = tokenizer.id_of(model["unk_token"]) if model.get("unk_token") else None
    entries: dict[str, Any] = {_KEY + "model": "llama", _KEY + "pre": "default"}
    if unknown is not None:
        types[unknown] = UNKNOWN
        entries[f"{_KEY}unknown_token_id"] = unknown
    scores = [float(-rank.get(text, len(merges))) for text in tokens]
    return (
        entries
        | _table(tokenizer, types)
        | {
            _KEY + "scores": np.array(scores, np.float32),
            _KEY + "add_space_prefix": tokenizer._leading_space,
        }
    )


def _rule(file: Path, model: Mapping[str, Any]) -> str:
    """The name of the splitting rule that cuts the battery as this file does."""
    backend = tokenizers.Tokenizer.from_file(str(file))
    wanted = _splits(backend.pre_tokenizer)
    ignore_merges = bool(model.get("ignore_merges", False))
    rules = {name: rule for name, rule in PRE_TOKENIZERS.items() if rule.is_byte_level}
    fitting = [name for name, rule in rules.items() if _splits(rule.build()) == wanted]
    exact = [name for name in fitting if PRE_TOKENIZERS[name].ignore_merges == ignore_merges]
    if not exact:
        raise UnsupportedError(
            f"{file}: it splits text by a rule that has no name in GGUF files (tokenizer.ggml.pre)"
        )
    return exact[0]


def _splits(rule: PreTokenizer | None) -> list[list[str]]:
    if rule is None:
        return []
    return [[piece for piece, _ in rule.pre_tokenize_str(text)] for text in BATTERY]


def _verify(folder: Path, tokenizer: Tokenizer, entries: dict[str, Any]) -> None:
    try:
        written = tokenizer_from_gguf(entries)
    except FormatError as error:
        raise UnsupportedError(f"{folder}: this tokenizer cannot be written as GGUF: {error}") from error
    for text in BATTERY:
        ours, theirs = written.encode(text), tokenizer.encode(text)
        if ours != theirs:
            raise UnsupportedError(
                f"{folder}: this tokenizer cannot be written as GGUF: {text!r} would become {ours[:12]}, not "
                f"{theirs[:12]}"
            )
    if lost := sorted(tokenizer.eos_ids - written.eos_ids):
        _log.warning(
            "%s: a GGUF file names three tokens that end a text; %s will not end one in the file written",
            folder,
            show_some([show(tokenizer.token_text(i)) for i in lost]),
        )
    around = {text: f"x {text} y" for i in sorted(tokenizer._literal) if (text := tokenizer.token_text(i))}
    if not _agree(tokenizer, written, "".join(around.values())):
        others = [show(token) for token, text in around.items() if not _agree(tokenizer, written, text)]
        _log.warning(
            "%s: a GGUF file cannot say what becomes of the space beside %s: prompts with them will have "
            "other ids in the file written",
            folder,
            show_some(others or ["added tokens"]),
        )


def _agree(a: Tokenizer, b: Tokenizer, text: str) -> bool:
    return a.encode(text, bos=False, special=True) == b.encode(text, bos=False, special=True)
