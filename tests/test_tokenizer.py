"""Tokenizers: the reference ids of llama.cpp, SentencePiece and `tokenizers` themselves as oracles, streams,
special tokens, and files that are broken. Vocabularies of real models come from `data_dir`; the others are
made here."""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from tinyllm.errors import ArgumentError, FormatError, NotFoundError, UnsupportedError
from tinyllm.files.gguf import read_gguf
from tinyllm.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_directory, tokenizer_from_gguf
from tinyllm.tokenizer.pretokenizers import PRE_TOKENIZERS
from tinyllm.tokenizer.spm import CONTROL, NORMAL, UNKNOWN, UNUSED, _any_of, build_model, load_processor

VOCABULARIES = ["deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2"]
STORIES = "models/stories260K/stories260K.gguf"

PAGE = (
    "Élodie, née à Sète, mangeait du maïs sur l'île ; « Où ça ? » dit-elle, çà et là. L'œuf coûte 3,50 €.\n"
    "🦙🎉👩‍👩‍👧 naïve café \t tabs\r\n  two spaces  and three   .\n"
    "日本語のテスト, Привет мир, שלום, x² ½ ﬁ e\u0301\n"
)

load = functools.cache(load_tokenizer)


def vocabulary(data_dir: Path, name: str) -> Tokenizer:
    return load(data_dir / f"vocab/ggml-vocab-{name}.gguf")


def reference(data_dir: Path, name: str) -> list[tuple[str, list[int]]]:
    """The texts of a vocabulary with the ids that llama.cpp gives them."""
    file = data_dir / f"vocab/ggml-vocab-{name}.gguf"
    with open(f"{file}.inp", encoding="utf-8", newline="") as texts:
        split = texts.read().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{file}.out").read_text("utf-8").split("\n")
    assert len(split) == len(lines) == 47
    assert split.pop() == lines.pop() == ""
    return [(text, [int(i) for i in line.split()]) for text, line in zip(split, lines, strict=True)]


def streamed(tokenizer: Tokenizer, ids: list[int], **options: Any) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*(stream.push(i) for i in ids), stream.flush()]


# Vocabularies of real models


def test_every_vocabulary_is_tested(data_dir: Path) -> None:
    files = {file.name.removeprefix("ggml-vocab-") for file in (data_dir / "vocab").glob("*.gguf")}
    assert files == {f"{name}.gguf" for name in VOCABULARIES}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_reference_texts_have_exactly_the_expected_ids(data_dir: Path, name: str) -> None:
    tokenizer = vocabulary(data_dir, name)
    for text, ids in reference(data_dir, name):
        assert tokenizer.encode(text, bos=False) == ids, repr(text)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_reference_texts_come_back_whole_and_as_a_stream(data_dir: Path, name: str) -> None:
    tokenizer = vocabulary(data_dir, name)
    for text, ids in reference(data_dir, name):
        assert tokenizer.decode(ids) == text
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip(" ") == text.lstrip(" ")


@pytest.mark.parametrize("name", [*VOCABULARIES, "stories260K"])
def test_a_stream_equals_decode_for_any_ids(data_dir: Path, name: str) -> None:
    tokenizer = load(data_dir / STORIES) if name == "stories260K" else vocabulary(data_dir, name)
    # The first ids of a vocabulary are its bytes: half of the draws come from there, to meet broken UTF-8.
    token = st.integers(0, 300) | st.integers(0, tokenizer.vocab_size - 1)

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.lists(token, max_size=40), st.booleans())
    def check(ids: list[int], special: bool) -> None:
        whole = tokenizer.decode(ids, special=special)
        assert "".join(streamed(tokenizer, ids, special=special)) == whole
        shown = [i for i in ids if special or i not in tokenizer.special_ids]
        data = b"".join(map(tokenizer.token_bytes, shown))
        assert data.decode("utf-8", "replace") in (whole, " " + whole)

    check()


@pytest.mark.parametrize("name", [*VOCABULARIES, "stories260K"])
def test_any_text_comes_back(data_dir: Path, name: str) -> None:
    tokenizer = load(data_dir / STORIES) if name == "stories260K" else vocabulary(data_dir, name)

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def check(text: str) -> None:
        if "\u2581" in text:
            return  # SentencePiece spells a space like that, so it cannot tell the two apart
        ids = tokenizer.encode(text, bos=False)
        assert tokenizer.decode(ids) == text
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == text
        assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")

    check()


def test_broken_utf8_is_replaced_as_python_does(data_dir: Path) -> None:
    tokenizer = load(data_dir / STORIES)
    for data in (b"\xf0\x9f\xa6", b"a\xe2\x82b", b"\xff\xfe", b"\xc3\xa9\xc3", b"\xed\xa0\x80"):
        ids = [tokenizer.id_of(f"<0x{byte:02X}>") for byte in data]
        assert None not in ids
        assert tokenizer.decode([i for i in ids if i is not None]) == data.decode("utf-8", "replace")


def test_pieces_of_a_sentencepiece_model() -> None:
    """Read back by the package: lengths at which heads of messages grow, types, scores."""
    lengths = (1, 2, 114, 115, 116, 117, 118, 126, 127, 128, 129, 3000)
    texts = [
        "<unk>",
        "<s>",
        *(chr(0x100 + i) * n for i, n in enumerate(lengths)),
        *("x" * n for n in lengths),
    ]
    scores = np.linspace(-1e30, 1e-30, len(texts), dtype=np.float32)
    kinds = np.array([UNKNOWN, CONTROL, *[NORMAL, UNUSED] * len(lengths)])
    model = build_model(texts, scores, kinds, byte_fallback=False, space_prefix=False, squeeze_spaces=False)
    processor = load_processor(model, "pieces")
    assert processor.get_piece_size() == len(texts)
    for i, text in enumerate(texts):
        assert processor.id_to_piece(i) == text
        assert np.float32(processor.get_score(i)) == scores[i]
        assert processor.is_control(i) == (kinds[i] == CONTROL)
        assert processor.is_unknown(i) == (kinds[i] == UNKNOWN)
        assert processor.is_unused(i) == (kinds[i] == UNUSED)


def test_a_rebuilt_sentencepiece_model_equals_the_original(data_dir: Path) -> None:
    rebuilt = load(data_dir / STORIES)
    original = load(data_dir / "models/stories260K-hf")
    french = (data_dir / "text/fr_textbox_nouvelles19.txt").read_text("utf-8")[:20_000]
    for text in (PAGE, french):
        ids = rebuilt.encode(text)
        assert ids == original.encode(text)
        assert ids[0] == 1
        assert rebuilt.decode(ids) == original.decode(ids) == text
    # The model asks SentencePiece to squeeze spaces; where there is nothing to squeeze, it is an oracle
    # itself.
    native = sentencepiece.SentencePieceProcessor(
        model_file=str(data_dir / "models/stories260K/tok512.model")
    )
    plain = " ".join(french.split())
    assert rebuilt.encode(plain, bos=False) == native.encode(plain)
    assert rebuilt.decode(native.encode(plain)) == plain


def test_ids_around_a_text(data_dir: Path) -> None:
    llama = vocabulary(data_dir, "llama-bpe")  # says nothing about BOS; its kind has one
    plain = llama.encode("hi", bos=False)
    assert llama.encode("hi") == llama.encode("hi", bos=True) == [128000, *plain]
    assert (llama.bos_id, llama.eos_id, llama.eos_ids) == (128000, 128001, frozenset({128001, 128009}))
    gpt2 = vocabulary(data_dir, "gpt-2")
    assert gpt2.encode("hi") == gpt2.encode("hi", bos=False)
    assert gpt2.encode("hi", bos=True) == [50256, *gpt2.encode("hi")]
    assert vocabulary(data_dir, "llama-spm").encode("") == [1]
    assert vocabulary(data_dir, "qwen2").eos_ids == {151643, 151645}
    phi = vocabulary(data_dir, "phi-3")
    assert phi.eos_ids == {32000, 32007}
    assert phi.vocab_size == 32064


def test_special_tokens_are_parsed_only_where_asked(data_dir: Path) -> None:
    llama = vocabulary(data_dir, "llama-bpe")
    text = "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
    inside = llama.encode("\n\nHi!", bos=False)
    parsed = [128006, *llama.encode("user", bos=False), 128007, *inside, 128009]
    assert llama.encode(text, bos=False, special=True) == parsed
    assert llama.decode(parsed) == "user\n\nHi!"
    assert llama.decode(parsed, special=True) == text
    assert "".join(streamed(llama, parsed, special=True)) == text
    plain = llama.encode(text, bos=False)
    assert not set(plain) & llama.special_ids
    assert llama.decode(plain) == text


def test_sentencepiece_special_tokens(data_dir: Path) -> None:
    llama = vocabulary(data_dir, "llama-spm")
    hello = llama.encode("Hello", bos=False)
    assert llama.pieces(hello) == [" Hello"]
    # The space prefix comes again after each special token (llama.cpp; Hugging Face with legacy tokenizers).
    assert llama.encode("<s>Hello</s>Hello", bos=False, special=True) == [1, *hello, 2, *hello]
    assert llama.decode([1, *hello, 2, *hello], special=True) == "<s> Hello</s> Hello"
    assert llama.decode([1, *hello]) == "Hello"
    assert not set(llama.encode("<s>Hello</s>", bos=False)) & llama.special_ids
    # Phi-3's swallow the white space behind them.
    phi = vocabulary(data_dir, "phi-3")
    ids = phi.encode("<|user|>\nHello<|end|>\n<|assistant|>\n", bos=False, special=True)
    assert ids == [32010, *phi.encode("Hello", bos=False), 32007, 32001]


def test_a_stream_that_continues_a_text_keeps_its_space(data_dir: Path) -> None:
    llama = vocabulary(data_dir, "llama-spm")
    first, second = llama.encode("Hello", bos=False), llama.encode("world", bos=False)
    assert "".join(streamed(llama, second, after=first[-1])) == " world"
    assert "".join(streamed(llama, second, after=llama.bos_id)) == "world"
    assert "".join(streamed(llama, second)) == "world"


def test_tokens_by_name_and_number(data_dir: Path) -> None:
    llama = vocabulary(data_dir, "llama-bpe")
    assert llama.id_of("<|eot_id|>") == llama.special_tokens["<|eot_id|>"] == 128009
    the = llama.id_of("Ġthe")
    assert the is not None
    assert (llama.token_bytes(the), llama.token_text(the)) == (b" the", " the")
    assert llama.id_of("no such token") is None
    assert llama.token_text(128009) == "<|eot_id|>"
    llama_emoji = llama.encode("🦙", bos=False)
    assert b"".join(map(llama.token_bytes, llama_emoji)) == "🦙".encode()
    assert "\ufffd" in "".join(llama.pieces(llama_emoji))
    assert llama.decode(np.array(llama_emoji, np.int32)) == "🦙"


def test_one_tokenizer_serves_many_threads(data_dir: Path) -> None:
    tokenizer = vocabulary(data_dir, "llama-bpe")
    text = "<|eot_id|> and <|eot_id|>"
    expected = {special: tokenizer.encode(text, special=special) for special in (False, True)}
    assert expected[False] != expected[True]
    wrong: list[Any] = []

    def work(special: bool) -> None:
        for _ in range(300):
            if tokenizer.encode(text, special=special) != expected[special]:
                wrong.append(special)

    threads = [threading.Thread(target=work, args=(n % 2 == 0,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Vocabularies made here


def tiny_sentencepiece() -> dict[str, Any]:
    """GGUF metadata of a SentencePiece vocabulary: 3 special tokens, 256 bytes, and a few pieces."""
    pieces = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "<mid>", "<|im_end|>", ""]
    kinds = [1, 1, 1, 1, 1, 1, 1, 4, 4, 1]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces],
        "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, *kinds], np.int32),
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-float(i) for i in range(len(pieces))], np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 0xFFFFFFFF,
    }


def byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tiny_bpe(pre: str = "gpt-2") -> dict[str, Any]:
    """GGUF metadata of a byte-level BPE vocabulary; "xyz" is a token that no merge makes."""
    tokens = [*byte_alphabet(), "ab", "Ġab", "xyz", "<|end|>", "<think>", "[PAD]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 259 + [3, 4, 5],
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "tokenizer.ggml.eos_token_id": 259,
    }


def spelled(tokenizer: Tokenizer, text: str, **options: Any) -> list[str]:
    return tokenizer.pieces(tokenizer.encode(text, bos=False, **options))


def test_sentencepiece_from_metadata() -> None:
    tokenizer = tokenizer_from_gguf(tiny_sentencepiece())
    assert tokenizer.vocab_size == 269
    assert spelled(tokenizer, "ab é") == [" ab", " ", "\ufffd", "\ufffd"]
    assert tokenizer.decode(tokenizer.encode("ab é  c")) == "ab é  c"
    # A user-defined token is text like any other, one that ends a turn is not.
    assert spelled(tokenizer, "a<mid>b") == [" a", "<mid>", " ", "b"]
    assert "<|im_end|>" not in spelled(tokenizer, "a<|im_end|>")
    assert spelled(tokenizer, "a<|im_end|>", special=True) == [" a", "<|im_end|>"]
    assert tokenizer.eos_ids == {2, 267}
    assert tokenizer.decode([263, 266, 267, 268]) == "a<mid>"
    assert tokenizer.token_bytes(268) == b""


def test_the_flags_of_a_gguf_are_honoured() -> None:
    plain = tokenizer_from_gguf(tiny_sentencepiece())
    assert plain.encode("ab") == [1, 265]
    flags = {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}
    tokenizer = tokenizer_from_gguf(
        tiny_sentencepiece() | {f"tokenizer.ggml.{k}": v for k, v in flags.items()}
    )
    assert tokenizer.encode("ab") == [264, 2]
    assert tokenizer.encode("ab", bos=True) == [1, 264]
    assert tokenizer.encode("ab", bos=False) == [264]
    assert tokenizer.decode([265]) == " ab"
    squeezed = tiny_sentencepiece() | {"tokenizer.ggml.remove_extra_whitespaces": True}
    assert tokenizer_from_gguf(squeezed).encode(" a   b ") == plain.encode("a b")


def test_a_sentencepiece_vocabulary_with_little_said() -> None:
    """Without types and ids, the usual names count; without byte tokens, what is unknown is <unk>."""
    metadata = tiny_sentencepiece()
    for key in ("token_type", "bos_token_id", "eos_token_id"):
        del metadata[f"tokenizer.ggml.{key}"]
    tokenizer = tokenizer_from_gguf(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode(tokenizer.encode("é ab")) == "é ab"
    small = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1],
    }
    assert tokenizer_from_gguf(small).encode("aé") == [1, 3, 4, 0]


def test_bpe_from_metadata() -> None:
    tokenizer = tokenizer_from_gguf(tiny_bpe())
    assert spelled(tokenizer, "ab ab xyz<think>") == ["ab", " ab", " ", "x", "y", "z", "<think>"]
    assert tokenizer.decode([*tokenizer.encode("é<|end|>"), 259, 261]) == "é<|end|>"
    assert spelled(tokenizer, "ab<|end|>", special=True) == ["ab", "<|end|>"]
    assert tokenizer.bos_id is None
    with pytest.raises(ArgumentError, match="no BOS"):
        tokenizer.encode("a", bos=True)
    # Llama 3 takes a piece that is a token as that token, whatever the merges say.
    assert spelled(tokenizer_from_gguf(tiny_bpe("llama-bpe")), "xyz") == ["xyz"]


def test_turn_and_message_ends_are_told_apart() -> None:
    metadata = tiny_bpe("gpt-4o")
    metadata["tokenizer.ggml.tokens"] += ["<|return|>", "<|call|>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    metadata["tokenizer.ggml.eos_token_id"] = 262
    assert tokenizer_from_gguf(metadata).eos_ids == {262, 263}


def test_an_id_to_add_that_is_not_there_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_from_gguf(tiny_bpe() | {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("ab") == [256]
    assert "add_bos_token" in caplog.text


SPLITS: dict[str, tuple[str, list[str]]] = {
    "gpt-2": ("it's 12345 ok!!\n\n x", ["it", "'s", " 12345", " ok", "!!", "\n\n", " x"]),
    "mpt": ("IT'S  a", ["IT", "'", "S", " ", " a"]),
    "llama-bpe": ("IT'S 12345\n\n x", ["IT", "'S", " ", "123", "45", "\n\n", " x"]),
    "dbrx": ("(a)1234", ["(a", ")", "123", "4"]),
    "qwen2": ("IT'S 123", ["IT", "'S", " ", "1", "2", "3"]),
    "deepseek-r1-qwen": ("a/b 12", ["a", "/b", " ", "1", "2"]),
    "qwen35": ("e\u0301t 1", ["e\u0301t", " ", "1"]),
    "smollm": ("a 123", ["a", " ", "1", "2", "3"]),
    "starcoder": ("x=12;", ["x", "=", "1", "2", ";"]),
    "refact": ("it's 1", ["it", "'s", " ", "1"]),
    "command-r": ("v 10", ["v", " ", "1", "0"]),
    "falcon": ("a--b 12345.", ["a", "--", "b", " ", "123", "45", "."]),
    "tekken": ("HelloWorld's 12 a/b/\n", ["Hello", "World", "'s", " ", "1", "2", " a", "/b", "/\n"]),
    "gpt-4o": ("HelloWorld's 1234 /\n", ["Hello", "World's", " ", "123", "4", " /\n"]),
    "deepseek-llm": ("Ça va, 12\n你好", ["Ç", "a", " va", ",", " ", "1", "2", "\n", "你好"]),
    "deepseek-coder": ("x += 12\n你好", ["x", " += ", "1", "2", "\n", "你好"]),
    "deepseek-v3": ("it's 12345你好 !", ["it", "'s", " ", "123", "45", "你好", " !"]),
    "seed-coder": ("a!\n12", ["a", "!", "\n", "1", "2"]),
    "hy_v4": ("it's 12345你好 !", ["it", "'s", " ", "123", "45", "你好", " !"]),
    "jina-v5-nano": ("IT'S 12345\n\n x", ["IT", "'S", " ", "123", "45", "\n\n", " x"]),
    "chatglm-bpe": ("IT'S 12345", ["IT", "'S", " ", "123", "45"]),
    "glm4": ("IT'S 12345", ["IT", "'S", " ", "123", "45"]),
    "glm5": ("(a)1234", ["(a", ")", "123", "4"]),
    "jais-2": ("a" + " " * 7 + "b\n c", ["a", " " * 4, " " * 2, " b", "\n", " c"]),
    "minicpm5": ("IT'S x12345", ["IT", "'S", " x", "123", "45"]),
    "ufakzeka": ("Ankara'da it's 12", ["Ankara", "'da", " it", "'s", " ", "1", "2"]),
    "laguna": ("a \n\nb 12", ["a", " ", "\n\n", "b", " ", "1", "2"]),
    "bailingmoe": ("IT'LL a\r\nb 12", ["IT", "'LL", " a", "\r\n", "b", " ", "1", "2"]),
    "bailingmoe2": ("a \n\n b", ["a", " \n\n", " b"]),
    "llada-moe": ("a \n\n b", ["a", " \n\n", " b"]),
    "exaone-moe": ("가 나 ab c 12!/\n\n", ["가 나 ab c", " ", "1", "2", "!/\n", "\n"]),
    "granite-embed-multi-97m": ("HelloWorld's 1234 /\n", ["Hello", "World's", " ", "123", "4", " /\n"]),
    "tiny_aya": ("ÉtéHiver 1234567 12ab/", ["Été", "Hiver", " ", "1", "234", "567", " ", "12", "ab", "/"]),
    "cohere2moe": ("1234 a", ["1", "234", " a"]),
    "youtu": ("한글，abC12 漢字ㄅ", ["한글", "，", "ab", "C", "1", "2", " ", "漢字", "ㄅ"]),
    "kimi-k2": ("GoTo漢字ab's 1234", ["Go", "To", "漢字", "ab's", " ", "123", "4"]),
    "spark2_5": ("a!\n\n b 1234", ["a", "!", "\n", "\n", " b", " ", "1", "2", "3", "4"]),
    "afmoe": ("a1234567 ไทย漢字!b", ["a", "1", "234", "567", " ", "ไทย漢字", "!b"]),
    "superbpe": ("of the 1234567 x", ["of the ", "1", "234", "567", " x"]),
    "bloom": ("a b,c (d) 12", ["a", " b", ",", "c", " (", "d", ")", " 12"]),
    "poro-chat": ("a b.", ["a", " b", "."]),
    "gpt3-finnish": ("a b.", ["a", " b", "."]),
    "viking": ("a b, 12", ["a", " b", ",", " ", "1", "2"]),
    "chameleon": ("a\tb  c,12 IMGIMGABZ", ["a", "\t", "b", "  ", "c", ",", "1", "2", " ", "IMGIMGABZ"]),
    "roberta-bpe": ("it's 12345 ok!!", ["it", "'s", " 12345", " ok", "!!"]),
    "modern-bert": ("it's 12345 ok!!", ["it", "'s", " 12345", " ok", "!!"]),
}


@pytest.mark.parametrize("name", [name for name, rule in PRE_TOKENIZERS.items() if rule.is_byte_level])
def test_every_pre_tokenizer_splits_and_loses_nothing(name: str) -> None:
    rule = PRE_TOKENIZERS[name]
    spell = tokenizer_from_gguf(tiny_bpe()).token_bytes
    ids = {text: i for i, text in enumerate(byte_alphabet())}

    def split(text: str) -> list[str]:
        pieces = [piece for piece, _ in rule.build().pre_tokenize_str(text)]
        return [b"".join(spell(ids[c]) for c in piece).decode("utf-8", "replace") for piece in pieces]

    assert "".join(piece for piece, _ in rule.build().pre_tokenize_str(PAGE)) == "".join(
        byte_characters()[byte] for byte in PAGE.encode()
    )
    if name in SPLITS:
        text, expected = SPLITS[name]
        assert split(text) == expected


@functools.cache
def byte_characters() -> dict[int, str]:
    """byte -> its character in byte-level vocabularies, asked of the tokenizers package, 2 bytes at a
    time."""
    table: dict[int, str] = {}
    for point in range(0x80, 0x800):
        spelled = "".join(
            p for p, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(chr(point))
        )
        table |= dict(zip(chr(point).encode(), spelled, strict=True))
    for text in [*map(chr, range(0x80)), *(chr(n << 12 | 0x800) for n in range(16) if n != 13), "\U0001f999"]:
        spelled = "".join(
            p for p, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
        )
        table |= dict(zip(text.encode(), spelled, strict=True))
    return table


def without(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"}


def changed(metadata: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return metadata | {f"tokenizer.ggml.{key}": value}


SPM, BPE = tiny_sentencepiece, tiny_bpe
BROKEN: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "no tokenizer": (dict, FormatError, "holds no tokenizer"),
    "unigram": (lambda: changed(SPM(), "model", "t5"), UnsupportedError, "'t5'"),
    "odd model": (lambda: changed(SPM(), "model", 3), UnsupportedError, "3"),
    "no tokens": (lambda: without(SPM(), "tokens"), FormatError, "tokens is missing"),
    "tokens a string": (lambda: changed(SPM(), "tokens", "abc"), FormatError, "array of strings"),
    "tokens numbers": (lambda: changed(BPE(), "tokens", [1, 2]), FormatError, "entry 0"),
    "tokens twice": (
        lambda: changed(BPE(), "tokens", ["a"] * 262),
        FormatError,
        "'a' stands there twice, as 0 and 261",
    ),
    "no scores": (lambda: without(SPM(), "scores"), FormatError, "scores is missing"),
    "short scores": (lambda: changed(SPM(), "scores", [0.0]), FormatError, "has 1 entries, .*tokens 269"),
    "scores strings": (lambda: changed(SPM(), "scores", ["x"] * 269), FormatError, "array of numbers"),
    "scores nan": (lambda: changed(SPM(), "scores", [float("nan")] * 269), FormatError, "not finite"),
    "short types": (lambda: changed(SPM(), "token_type", [1]), FormatError, "token_type has 1 entries"),
    "float types": (lambda: changed(SPM(), "token_type", [1.5] * 269), FormatError, "array of numbers"),
    "some bytes": (
        lambda: changed(SPM(), "token_type", [2, 3, 3, 6, *[1] * 265]),
        FormatError,
        "1 tokens are of type 6",
    ),
    "no unknown": (
        lambda: changed(changed(SPM(), "token_type", [1] * 269), "tokens", [f"t{i}" for i in range(269)]),
        FormatError,
        "unknown_token_id is missing",
    ),
    "id too large": (
        lambda: changed(SPM(), "bos_token_id", 269),
        FormatError,
        "bos_token_id is 269, outside",
    ),
    "id no number": (lambda: changed(SPM(), "eos_token_id", "</s>"), FormatError, "must be an integer"),
    "flag no bool": (lambda: changed(SPM(), "add_bos_token", 1), FormatError, "must be true or false"),
    "no pre": (lambda: without(BPE(), "pre"), UnsupportedError, "pre is missing"),
    "unknown pre": (lambda: BPE("default"), UnsupportedError, "'default'"),
    "odd pre": (lambda: changed(BPE(), "pre", ["gpt-2"]), UnsupportedError, "gpt-2"),
    "no merges": (lambda: without(BPE(), "merges"), FormatError, "merges is missing"),
    "half a merge": (lambda: changed(BPE(), "merges", ["a b", "ab"]), FormatError, "entry 1, 'ab'"),
    "wild merge": (lambda: changed(BPE(), "merges", ["a c"]), FormatError, "do not fit"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_metadata_is_a_clear_error(
    case: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        logging.getLogger("tinyllm"), "handlers", [logging.NullHandler()]
    )  # else the commands'
    make, error, message = BROKEN[case]
    with pytest.raises(error, match=message):
        tokenizer_from_gguf(make())
    assert capfd.readouterr() == ("", "")


def test_long_texts_are_cut_in_messages() -> None:
    """A file's own text, a megabyte of it, where a message quotes it."""
    long = "x" * 1_000_000
    tokens = BPE()["tokenizer.ggml.tokens"]
    for metadata in (
        changed(BPE(), "pre", long),
        changed(BPE(), "add_bos_token", [long]),
        changed(BPE(), "tokens", [*tokens[:-2], long, long]),
        changed(BPE(), "merges", [long]),
    ):
        with pytest.raises((FormatError, UnsupportedError)) as caught:
            tokenizer_from_gguf(metadata)
        assert len(str(caught.value)) < 1000


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.text("ab^]-\\[", max_size=5), max_size=6), st.text("ab^]-\\[c", max_size=20))
def test_the_leftmost_and_longest_token_is_found(tokens: list[str], text: str) -> None:
    find, at, found = _any_of(tokens), 0, []
    while pair := find(text, at):
        found.append(pair)
        at = pair[0] + len(pair[1])
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    matches = re.finditer("|".join(map(re.escape, longest_first)), text) if longest_first else ()
    assert found == [(match.start(), match[0]) for match in matches]


def test_bad_arguments() -> None:
    tokenizer = tokenizer_from_gguf(tiny_bpe())
    for bad in (-1, 262, 1 << 40):
        with pytest.raises(ArgumentError, match=f"token id {bad} is outside the vocabulary of 262"):
            tokenizer.decode([1, bad])
        with pytest.raises(ArgumentError, match=str(bad)):
            tokenizer.stream().push(bad)
        with pytest.raises(ArgumentError, match=str(bad)):
            tokenizer.token_bytes(bad)
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="must be str"):
        tokenizer.encode(b"a")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="character 1 of the text is the lone surrogate"):
        tokenizer.encode("a\ud800")


# Directories


def write_json(folder: Path, **files: Any) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")


def tiny_tokenizer_json(folder: Path) -> tokenizers.Tokenizer:
    """A byte-level BPE as Hugging Face stores one: <s> in front by the post-processor, an added token of each
    kind."""
    vocabulary = {text: i for i, text in enumerate([*byte_alphabet(), "ab", "Ġab"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("Ġ", "ab")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 258)])
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    return backend


def test_a_tokenizer_json(tmp_path: Path) -> None:
    backend = tiny_tokenizer_json(tmp_path)
    write_json(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    tokenizer = load_tokenizer(tmp_path)
    for text in (PAGE, "ab ab<think>x</s>", ""):
        assert tokenizer.encode(text, special=True) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text, special=True), special=True) == "<s>" + text
    plain = tokenizer.encode("ab</s><think>", bos=False)
    assert not set(plain) & tokenizer.special_ids
    assert plain[-1] == 260
    assert tokenizer.decode(plain) == "ab</s><think>"
    assert tokenizer.special_tokens == {"<s>": 258, "</s>": 259}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (258, 259, frozenset({259}))
    assert tokenizer.id_of("Ġab") == 257


@pytest.mark.parametrize(
    "processor",
    [
        processors.BertProcessing(("</s>", 259), ("<s>", 258)),
        processors.RobertaProcessing(("</s>", 259), ("<s>", 258)),
        processors.ByteLevel(),
        processors.TemplateProcessing(
            single="<s> <s> $A </s> <two>",
            special_tokens=[
                ("<s>", 258),
                ("</s>", 259),
                {"id": "<two>", "ids": [0, 1], "tokens": ["!", '"']},
            ],
        ),
        processors.Sequence(
            [
                processors.ByteLevel(),
                processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 259)]),
            ]
        ),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_every_post_processor(processor: processors.PostProcessor, tmp_path: Path) -> None:
    backend = tiny_tokenizer_json(tmp_path)
    backend.post_processor = processor
    backend.save(str(tmp_path / "tokenizer.json"))
    for text in ("ab ab", ""):
        assert load_tokenizer(tmp_path).encode(text) == backend.encode(text).ids


def test_what_the_config_files_add(tmp_path: Path) -> None:
    tiny_tokenizer_json(tmp_path)
    write_json(
        tmp_path,
        tokenizer_config={
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {"261": {"content": "<|im_end|>", "special": True}},
        },
        special_tokens_map={"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
        config={"vocab_size": 300, "eos_token_id": 259},
        generation_config={"eos_token_id": [259, 261, 999], "bos_token_id": None},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab") == [258, 256]
    assert tokenizer.encode("ab<|im_end|>", bos=False, special=True) == [256, 261]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (258, 261, frozenset({259, 261}))
    assert tokenizer.vocab_size == 300  # the model's, padded
    assert tokenizer.decode([256, 299]) == "ab"
    with pytest.raises(ArgumentError, match="token id 300"):
        tokenizer.decode([300])


def test_a_sentencepiece_like_tokenizer_json(tmp_path: Path) -> None:
    """Llama 2's layout: a space in front by the normalizer, bytes as fallback, the space taken away by the
    decoder."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(tokens)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path, tokenizer_config={"bos_token": "<s>"})
    tokenizer = load_tokenizer(tmp_path)
    ids = backend.encode("a é  b🦙").ids
    assert tokenizer.encode("a é  b🦙", bos=True) == [1, *ids]
    assert tokenizer.decode([1, *ids]) == backend.decode([1, *ids]) == "a é  b🦙"
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == "a é  b🦙"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_tokenizer_model_with_added_tokens(data_dir: Path, tmp_path: Path) -> None:
    shutil.copyfile(data_dir / "models/stories260K/tok512.model", tmp_path / "tokenizer.model")
    write_json(
        tmp_path,
        added_tokens={"<|im_end|>": 512, "<fact>": 513},
        special_tokens_map={"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_end|>"]},
    )
    tokenizer = load_tokenizer(tmp_path)
    once = tokenizer.encode("Once", bos=False)
    assert tokenizer.encode("Once<|im_end|>Once<fact>", special=True) == [1, *once, 512, *once, 513]
    assert tokenizer.encode("Once<fact>") == [1, *once, 513]
    assert not set(tokenizer.encode("<|im_end|>", bos=False)) & tokenizer.special_ids
    assert tokenizer.decode([1, *once, 512, 513]) == "Once<fact>"
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (512, 514)
    # legacy=False: the space prefix belongs to the beginning of the text alone
    write_json(tmp_path, tokenizer_config={"legacy": False})
    newer = load_tokenizer(tmp_path)
    ids = newer.encode("Once<|im_end|> Once<|im_end|>Once", bos=False, special=True)
    after_second = ids[len(ids) - ids[::-1].index(512) :]
    assert ids[: 2 * len(once) + 2] == [*once, 512, *once, 512]
    assert after_second != once
    assert newer.decode(ids) == "Once OnceOnce"
    write_json(tmp_path, tokenizer_config={"add_prefix_space": False})
    assert load_tokenizer(tmp_path).encode("Once", bos=False) == after_second


def test_tokenizer_json_comes_before_tokenizer_model(data_dir: Path, tmp_path: Path) -> None:
    shutil.copyfile(data_dir / "models/stories260K/tok512.model", tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).vocab_size == 512
    tiny_tokenizer_json(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 261


def test_paths_without_a_tokenizer(data_dir: Path, tmp_path: Path) -> None:
    assert tokenizer_from_directory(tmp_path) is None
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(NotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="nowhere"):
        tokenizer_from_directory(tmp_path / "nowhere")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"only .vocab\.json"):
        load_tokenizer(tmp_path)
    assert tokenizer_from_gguf(read_gguf(data_dir / STORIES).metadata).vocab_size == 512


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("tokenizer.json", "{", FormatError, "tokenizer.json"),
        ("tokenizer.json", '{"version": "1.0"}', FormatError, "tokenizer.json"),
        ("tokenizer.model", "IQ== 0\nIg== 1\n", FormatError, "tiktoken"),
        ("tokenizer.model", "", FormatError, "SentencePiece"),
        ("tokenizer_config.json", "[]", FormatError, "expected a JSON object, found list"),
        ("tokenizer_config.json", "{", FormatError, "not valid JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', FormatError, "no token at 'x'"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', FormatError, "surrogates"),
        ("added_tokens.json", '{"<a>": 99999999}', FormatError, "99999999"),
        ("config.json", '{"vocab_size": 100000000}', FormatError, "vocabulary of 100000000"),
    ],
)
def test_broken_files_are_clear_errors(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    text: str,
    error: type[Exception],
    message: str,
) -> None:
    if name != "tokenizer.model":
        tiny_tokenizer_json(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        load_tokenizer(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_that_cannot_spell_a_text(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel(vocab={"a": 0}, unk_token="<unk>"))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(FormatError, match=r"cannot encode this text: .*UNK"):
        tokenizer.encode("b")


def test_a_decoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    backend = tiny_tokenizer_json(tmp_path)
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match="WordPiece"):
        load_tokenizer(tmp_path)
