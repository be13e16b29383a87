"""Marker tokens: a token is what its type says, an end token ends whatever its type, flags of added tokens
hold, and what goes around a text is what transformers 5 puts there. Vocabularies of real models come from
`data_dir` and from the folder that TINYLLM_REAL_MODELS names; the others are made here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import golden_spec, random_weights
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

import tinyllm
from tinyllm.errors import FormatError
from tinyllm.files.gguf import read_gguf
from tinyllm.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from tinyllm.tokenizer.markers import CONTROL_ENDS, TURN_ENDS
from tinyllm.tokenizer.to_gguf import tokenizer_to_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def gguf_of(kind: str, markers: dict[str, int], pre: str = "gpt-2", **entries: Any) -> dict[str, Any]:
    """GGUF metadata: 256 bytes, "ab" and what it is made of, then tokens with their types. The eos is
    <|stop|>."""
    if kind == "gpt2":
        tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
        types = [NORMAL] * 256
        rest: dict[str, Any] = {"pre": pre, "merges": ["a b"]}
        words = ["ab"]
    else:
        tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        types = [UNKNOWN] + [BYTE] * 256
        rest = {"add_space_prefix": False, "merges": ["a b", "▁ ab"], "unknown_token_id": 0}
        words = ["▁", "a", "b", "ab", "▁ab"]
    tokens += [*words, "<|stop|>", *markers]
    types += [NORMAL] * len(words) + [CONTROL] + list(markers.values())
    if kind == "llama":
        rest["scores"] = [-float(i) for i in range(len(tokens))]
    return {
        f"tokenizer.ggml.{key}": value
        for key, value in {
            "model": kind,
            "tokens": tokens,
            "token_type": np.array(types, np.int32),
            "eos_token_id": tokens.index("<|stop|>"),
            **rest,
            **entries,
        }.items()
    }


def spelled(tokenizer: Tokenizer, text: str, special: bool = True) -> list[str]:
    return tokenizer.pieces(tokenizer.encode(text, bos=False, special=special))


def real(name: str) -> Path:
    path = Path(os.environ.get("TINYLLM_REAL_MODELS", "")) / name
    if not path.is_file():
        pytest.skip(f"no {name} in the folder TINYLLM_REAL_MODELS")
    return path


# Types


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma4"])
@pytest.mark.parametrize("name", CONTROL_ENDS)
def test_a_name_does_not_make_an_end_of_a_text_token(kind: str, name: str) -> None:
    for type_ in (USER_DEFINED, NORMAL):
        tokenizer = tokenizer_from_gguf(gguf_of(kind, {name: type_}))
        token = tokenizer.id_of(name)
        assert token not in tokenizer.special_ids | tokenizer.eos_ids
        ids = [*tokenizer.encode("ab", bos=False), token, *tokenizer.encode("ab", bos=False)]
        assert tokenizer.decode(ids) == f"ab{name}ab"
        assert (token in tokenizer.encode(f"ab{name}ab", bos=False)) == (type_ == USER_DEFINED)
    tokenizer = tokenizer_from_gguf(gguf_of(kind, {name: CONTROL}))
    assert tokenizer.id_of(name) in tokenizer.eos_ids
    assert spelled(tokenizer, f"ab{name}") == ["ab", name]
    assert tokenizer.decode(tokenizer.encode(f"ab{name}", bos=False, special=True)) == "ab"


def test_names_stand_in_for_ids_only_where_the_types_agree() -> None:
    """SentencePiece's names of BOS and EOS, in a file that says no ids."""
    for type_, expected in ((CONTROL, True), (USER_DEFINED, False), (NORMAL, False)):
        metadata = gguf_of("llama", {"<s>": type_, "</s>": type_}, eos_token_id=0xFFFFFFFF)
        tokenizer = tokenizer_from_gguf(metadata)
        assert (tokenizer.bos_id is not None, tokenizer.eos_id is not None) == (expected, expected)
        assert tokenizer.decode(tokenizer.encode("<s>ab</s>", bos=False)) == "<s>ab</s>"
    del metadata["tokenizer.ggml.token_type"]
    assert tokenizer_from_gguf(metadata).eos_id == tokenizer.id_of("</s>")


def test_generation_goes_on_past_html(tmp_path: Path) -> None:
    """A model with Gemma's <s> and </s>, made to write them."""
    config = golden_spec("llama3").config | {"vocab_size": 400}
    tokenizer = small_tokenizer(config["vocab_size"])
    tokenizer["tokens"][1:3] = ["<bos>", "<eos>"]
    tokenizer["tokens"][-2:] = ["<s>", "</s>"]
    tokenizer["types"][-2:] = [USER_DEFINED] * 2
    write_gguf(tmp_path / "m.gguf", config, random_weights(config, seed=3), tokenizer=tokenizer)
    with tinyllm.load(tmp_path / "m.gguf", threads=1) as llm:
        assert llm.tokenizer is not None
        old, last = llm.tokenizer.encode("old", bos=False), config["vocab_size"] - 1
        at = iter([last - 1, *old, last, *old, 2])

        def write(logits: Any, _: Any) -> None:
            logits[:] = -np.inf
            logits[next(at)] = 0

        answer = llm("a", max_tokens=20, temperature=0, processors=[write])
    assert answer.text == "<s> old</s> old"
    assert (answer.finish_reason, answer.stop_reason) == ("stop", 2)


def test_phi_3_has_a_text_token_that_looks_like_an_end(data_dir: Path) -> None:
    phi = load_tokenizer(data_dir / "vocab/ggml-vocab-phi-3.gguf")
    assert phi.eos_ids == {32000, 32007}
    assert phi.encode("a </s>b", bos=False)[-2] == 2
    assert phi.decode([263, 2, 289]) == "a</s> b"


def test_gemma_3_has_html_among_its_tokens() -> None:
    gemma = load_tokenizer(real("gemma-3-270m-q4_k_m.gguf"))
    assert gemma.encode("<s>old</s>", bos=False) == [203, 947, 212]
    assert gemma.decode([203, 947, 212]) == "<s>old</s>"
    assert 212 not in gemma.eos_ids
    assert {1, 106} <= gemma.eos_ids


# Ends


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma4"])
@pytest.mark.parametrize("name", TURN_ENDS)
def test_an_end_of_a_turn_ends_it_whatever_its_type(
    kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for type_ in (NORMAL, USER_DEFINED, CONTROL):
        caplog.clear()
        tokenizer = tokenizer_from_gguf(gguf_of(kind, {name: type_}))
        token = tokenizer.id_of(name)
        assert tokenizer.eos_ids == {tokenizer.eos_id, token}
        assert tokenizer.encode(f"ab{name}ab", bos=False, special=True).count(token) == 1
        assert token not in tokenizer.encode(f"ab{name}ab", bos=False)
        assert tokenizer.decode([*tokenizer.encode("ab", bos=False), token]) == "ab"
        said = [record.getMessage() for record in caplog.records if name in record.getMessage()]
        assert len(said) == (type_ == NORMAL)
    unused = tokenizer_from_gguf(gguf_of(kind, {name: UNUSED}))
    assert unused.eos_ids == {unused.eos_id}


def test_qwen_2_with_an_end_of_the_wrong_type(data_dir: Path) -> None:
    """What some converters wrote; Qwen2 has an ordinary </s> besides."""
    metadata = dict(read_gguf(data_dir / "vocab/ggml-vocab-qwen2.gguf").metadata)
    types = np.array(metadata["tokenizer.ggml.token_type"])
    assert types[128247] == NORMAL
    types[151645] = NORMAL
    metadata["tokenizer.ggml.token_type"] = types
    qwen = tokenizer_from_gguf(metadata)
    assert qwen.id_of("</s>") == 128247
    assert qwen.eos_ids == {151643, 151645}
    assert qwen.encode("<|im_start|>user\nhi<|im_end|>\n", bos=False, special=True) == [
        151644, 872, 198, 6023, 151645, 198,
    ]  # fmt: skip
    assert 151645 not in qwen.encode("hi<|im_end|>", bos=False)
    assert qwen.decode([6023, 128247]) == "hi</s>"


def test_ends_of_messages_end_no_turn() -> None:
    for others in (("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>")):
        tokenizer = tokenizer_from_gguf(gguf_of("gpt2", dict.fromkeys(("<|end|>", *others), CONTROL)))
        assert tokenizer.eos_ids == {tokenizer.eos_id, *map(tokenizer.id_of, others)}
    alone = tokenizer_from_gguf(gguf_of("gpt2", {"<|end|>": CONTROL, "<|call|>": CONTROL}))
    assert alone.id_of("<|end|>") in alone.eos_ids


def test_what_a_gguf_asks_for_in_vain_is_said(caplog: pytest.LogCaptureFixture) -> None:
    asked: dict[str, tuple[Any, Any]] = {
        "suppress_tokens": (np.array([3, 4]), np.array([], np.int32)),
        "precompiled_charsmap": (np.array([0], np.int8), np.array([], np.int8)),
        "normalizer.lowercase": (True, False),
        "normalizer.strip_accents": (True, False),
        "add_space_prefix": (True, False),
    }
    for key, values in asked.items():
        for value in values:
            caplog.clear()
            tokenizer_from_gguf(gguf_of("gpt2", {}, **{key: value}))
            assert [key in record.getMessage() for record in caplog.records] == [True] * (value is values[0])


# Flags


PHI_3 = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|placeholder1|>", "<|endoftext|>"]
PHI_4 = ["<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|dummy_0|>", "<|endoftext|>"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma4"])
def test_flags_hang_on_the_vocabulary(kind: str) -> None:
    phi = dict.fromkeys(PHI_3, CONTROL) | {"</s>": USER_DEFINED, "<mine>": USER_DEFINED}
    for name in ("Phi 3.5 Mini Instruct", "models", "phi-3"):
        tokenizer = tokenizer_from_gguf(gguf_of(kind, phi) | {"general.name": name})
        assert spelled(tokenizer, "ab \n<|end|>\n\u3000 ab") == ["ab", " ", "\n", "<|end|>", "ab"]
        assert spelled(tokenizer, "</s> ab<mine> b") == ["</s>", "ab", "<mine>", " ", "b"]
        assert spelled(tokenizer, "<|endoftext|>\n") == ["<|endoftext|>", "\n"]
    del phi["<|placeholder1|>"]
    tokenizer = tokenizer_from_gguf(gguf_of(kind, phi) | {"general.name": "phi-3"})
    assert spelled(tokenizer, "<|end|>\n") == ["<|end|>", "\n"]
    tokenizer = tokenizer_from_gguf(gguf_of(kind, dict.fromkeys(PHI_4, CONTROL)))
    assert spelled(tokenizer, "ab \n<|im_sep|> \nab") == ["ab", "<|im_sep|>", "ab"]
    assert spelled(tokenizer, "<|im_end|> <|im_sep|>  ") == ["<|im_end|>", "<|im_sep|>"]


def test_phi_3_under_any_name(data_dir: Path) -> None:
    metadata = read_gguf(data_dir / "vocab/ggml-vocab-phi-3.gguf").metadata
    for name in ("Phi 3.5 Mini Instruct", "Phi-3-mini-4k-instruct", "my-finetune"):
        phi = tokenizer_from_gguf({**metadata, "general.name": name})
        ids = phi.encode("<|user|>\nHello<|end|>\n<|assistant|>\n", bos=False, special=True)
        assert ids == [32010, 15043, 32007, 32001]


@pytest.mark.parametrize(("pre", "mask"), [("roberta-bpe", "<mask>"), ("modern-bert", "[MASK]")])
def test_the_mask_of_an_encoder_takes_the_space_before_it(pre: str, mask: str) -> None:
    tokenizer = tokenizer_from_gguf(gguf_of("gpt2", {mask: CONTROL}, pre=pre))
    assert spelled(tokenizer, f"ab {mask} ab") == ["ab", mask, " ", "ab"]


def folder_of(
    folder: Path, added: list[AddedToken], single: str | None = None, model: str = "bpe", **files: Any
) -> tokenizers.Tokenizer:
    """A tokenizer.json with a byte-level BPE ("ab" is a word, <word> an ordinary token), and files beside."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "Ġab", "<word>"]
    backend = tokenizers.Tokenizer(
        models.BPE({text: i for i, text in enumerate(tokens)}, [("a", "b"), ("Ġ", "ab")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if model == "lowercase":
        backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens(["<s>", "</s>"])  # 259, 260
    backend.add_tokens(added)
    if single is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 259), ("</s>", 260)]
        )
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return backend


FLAGS: list[dict[str, bool]] = [
    {},
    {"lstrip": True},
    {"rstrip": True},
    {"single_word": True},
    {"lstrip": True, "rstrip": True, "single_word": True},
    {"normalized": True},
    {"normalized": True, "lstrip": True},
]
TEXTS = (
    "ab <X> ab", "ab\n \u3000<X>\u00a0\n ab", "a<X>b", "<X>", " <X> <X>  <X>", "a_<X>", "<X>9", "é<X>",
    "e\u0301<X>", "-<X>-", "<x> <X>", "\u200d<X>", "ab<X>", "<X> b",
)  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("model", ["bpe", "lowercase"])
def test_flags_of_a_tokenizer_json(tmp_path: Path, flags: dict[str, bool], model: str) -> None:
    """Whether tokenizer.json says them, or tokenizer_config.json beside it, or it alone: as the package."""
    flags = {"normalized": False, **flags}
    token = {
        "content": "<X>",
        "special": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        **flags,
    }
    truth = folder_of(tmp_path, [AddedToken("<X>", **flags)], model=model)
    for own, config in (
        ([AddedToken("<X>", **flags)], {}),
        ([AddedToken("<X>", normalized=False)], {"added_tokens_decoder": {"261": token}}),
        ([], {"added_tokens_decoder": {"261": token}}),
    ):
        folder_of(tmp_path, own, model=model, tokenizer_config=config)
        tokenizer = load_tokenizer(tmp_path)
        for text in TEXTS:
            for special in (False, True):
                assert tokenizer.encode(text, special=special) == truth.encode(text).ids, text


@pytest.mark.parametrize("flags", FLAGS[:5], ids=str)
@pytest.mark.parametrize("special", [False, True])
def test_flags_of_a_tokenizer_model(
    data_dir: Path, tmp_path: Path, flags: dict[str, bool], special: bool
) -> None:
    """The tokenizers package cuts a text into the same parts; each is then encoded for itself."""
    (tmp_path / "tokenizer.model").write_bytes((data_dir / "models/stories260K/tok512.model").read_bytes())
    token = {"content": "<X>", "special": special, "normalized": False, **flags}
    config = {"added_tokens_decoder": {"512": token}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    cutter = tokenizers.Tokenizer(models.WordLevel({"?": 0}, "?"))
    cutter.add_tokens([AddedToken("<X>", normalized=False, **flags)])
    for text in TEXTS:
        cut = cutter.encode(text)
        expected = []
        for i, (start, end) in zip(cut.ids, cut.offsets, strict=True):
            expected += [512] if i else tokenizer.encode(text[start:end], bos=False)
        assert tokenizer.encode(text, bos=False, special=True) == expected, text
        if special:
            assert 512 not in tokenizer.encode(text)


# Special tokens of a directory


def test_a_token_that_the_config_names_is_special(tmp_path: Path) -> None:
    """Whether it is an added token or an ordinary one: transformers makes all of them special."""
    folder_of(
        tmp_path,
        [AddedToken("<sep>", normalized=False), AddedToken("<image>", normalized=False)],
        tokenizer_config={
            "eos_token": "<word>",
            "sep_token": {"content": "<sep>"},
            "extra_special_tokens": {"image_token": "<image>"},
            "pad_token": "!",
        },
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.id_of("<sep>"), tokenizer.id_of("<image>")) == (258, 261, 262)
    assert {258, 261, 262} <= tokenizer.special_ids
    for text, token in (("<word>", 258), ("<sep>", 261), ("<image>", 262)):
        assert tokenizer.encode(f"ab{text}ab", special=True) == [256, token, 256]
        assert token not in tokenizer.encode(f"ab{text}ab")
        assert tokenizer.decode([256, token, 256]) == "abab"
    assert tokenizer.decode(tokenizer.encode("ab!", special=True)) == "ab!"


def test_the_config_says_which_added_tokens_are_special(tmp_path: Path) -> None:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    folder_of(
        tmp_path,
        [AddedToken("<x>", normalized=False), AddedToken("<y>", normalized=False, special=True)],
        tokenizer_config={
            "added_tokens_decoder": {
                "261": {"content": "<x>", "special": True, **plain},
                "262": {"content": "<y>", "special": False, **plain},
            }
        },
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_ids == {259, 260, 261}
    assert tokenizer.encode("<x><y>", special=True) == [261, 262]
    assert tokenizer.encode("<x><y>")[-1] == 262
    assert tokenizer.decode([261, 262]) == "<y>"


# Around a text


@pytest.mark.parametrize("add", [None, False, True])
@pytest.mark.parametrize("single", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_the_post_processor_says_what_goes_around_a_text(
    tmp_path: Path, single: str | None, add: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers 5.24 gives these ids, whatever add_bos_token and add_eos_token say."""
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    if add is not None:
        config |= {"add_bos_token": add, "add_eos_token": add}
    backend = folder_of(tmp_path, [], single, tokenizer_config=config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab") == backend.encode("ab").ids
    has_bos, has_eos = "<s>" in (single or ""), "</s>" in (single or "")
    expected = [
        f"says add_{side}_token = {str(add).lower()}"
        for side, has in (("bos", has_bos), ("eos", has_eos))
        if add is not None and add != has
    ]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(expected)
    assert all(part in text for part, text in zip(expected, said, strict=True))


def test_a_tokenizer_model_obeys_its_config(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((data_dir / "models/stories260K/tok512.model").read_bytes())
    for config, expected in (
        ({}, [1, 403]),
        ({"add_bos_token": False}, [403]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 403, 2]),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(tmp_path).encode("Once") == expected


# Written as GGUF


def test_what_a_written_gguf_cannot_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    added = [AddedToken(f"<x{i}>", normalized=False, special=True) for i in range(3)]
    added += [AddedToken("<|im_end|>", normalized=False, special=True)]
    ends = {"eos_token_id": [260, 261, 262, 264]}
    folder_of(tmp_path, added, config=ends, tokenizer_config={"eos_token": "</s>"})
    tokenizer = load_tokenizer(tmp_path)
    written = tokenizer_from_gguf(tokenizer_to_gguf(tmp_path))
    assert written.eos_ids == tokenizer.eos_ids == {260, 261, 262, 264}
    assert not caplog.records
    (tmp_path / "config.json").write_text('{"eos_token_id": [260, 261, 262, 263]}')
    assert tokenizer_from_gguf(tokenizer_to_gguf(tmp_path)).eos_ids == {260, 261, 262, 264}
    assert "<x2>" in caplog.text
    caplog.clear()
    folder_of(tmp_path, [AddedToken("<y>", normalized=False, lstrip=True), *added])
    tokenizer_to_gguf(tmp_path)
    assert "the space beside '<y>':" in caplog.text


# Gemma 4's kind: merges over text that is spelled as SentencePiece does


def test_a_vocabulary_of_gemma_4s_kind(caplog: pytest.LogCaptureFixture) -> None:
    markers = {"  ": USER_DEFINED, "\n\n": NORMAL, "<turn|>": CONTROL, "<bos>": CONTROL}
    metadata = gguf_of("gemma4", markers)
    del metadata["tokenizer.ggml.add_space_prefix"]
    metadata["tokenizer.ggml.bos_token_id"] = bos = metadata["tokenizer.ggml.tokens"].index("<bos>")
    metadata["tokenizer.ggml.merges"] += ["▁ ▁"]
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.kind == "SentencePiece"
    assert spelled(tokenizer, "ab ab") == ["ab", " ab"]
    assert spelled(tokenizer, "ab  ab") == ["ab", "  ", "ab"]
    assert spelled(tokenizer, "ab\n\n\nab") == ["ab", "\n\n", "\n", "ab"]
    assert spelled(tokenizer, "ab<turn|>é") == ["ab", "<turn|>", "\ufffd", "\ufffd"]
    for text in ("ab ab é 🦙\n\n a", "", " ", "  a", "\n"):
        ids = tokenizer.encode(text)
        assert ids[0] == bos
        assert tokenizer.decode(ids) == text
    assert not caplog.records
    early = tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_bos_token": False})
    assert early.encode("ab")[0] == bos
    assert "add_bos_token" in caplog.text
    # The same in a file of kind "gpt2", which names the rule.
    other = metadata | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "sarvam-moe"}
    assert tokenizer_from_gguf(other).encode("ab  ab é") == tokenizer.encode("ab  ab é", bos=False)
    tokens = [text if text != "<0x00>" else "<zero>" for text in metadata["tokenizer.ggml.tokens"]]
    types = np.array(metadata["tokenizer.ggml.token_type"])
    types[0] = CONTROL
    broken = metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    del broken["tokenizer.ggml.unknown_token_id"]
    with pytest.raises(FormatError, match=r"no token for the byte <0x00>"):
        tokenizer_from_gguf(broken)
