"""What people who know transformers type gives what it gives there: the tokenizer's methods, `generate`.

Where transformers is not installed its side is skipped by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import tinyllm
from tinyllm.errors import ArgumentError, TemplateError, UnsupportedError

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[tinyllm.LLM]:
    with tinyllm.load("stories", context=128) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer(llm: tinyllm.LLM) -> tinyllm.Tokenizer:
    assert llm.tokenizer is not None
    return llm.tokenizer


def test_calls_of_a_tokenizer(tokenizer: tinyllm.Tokenizer) -> None:
    one, two = tokenizer.encode("Once upon a time"), tokenizer.encode("One day")
    assert tokenizer("One day") == {"input_ids": two, "attention_mask": [1] * len(two)}
    assert tokenizer("One day").input_ids == two
    assert tokenizer("One day", add_special_tokens=False).input_ids == tokenizer.encode("One day", bos=False)
    n, pad = len(one) - len(two), tokenizer.pad_token_id
    assert n > 0
    batch = tokenizer(["Once upon a time", "One day"], padding=True)
    assert batch.input_ids == [one, two + [pad] * n]
    assert batch.attention_mask == [[1] * len(one), [1] * len(two) + [0] * n]
    left = tokenizer(["Once upon a time", "One day"], padding=True, padding_side="left", return_tensors="np")
    assert left.input_ids.tolist() == [one, [pad] * n + two]
    assert left.input_ids.dtype == left.attention_mask.dtype == np.int64
    assert tokenizer("One day", return_tensors="np").input_ids.shape == (1, len(two))
    assert tokenizer("Once upon a time", truncation=True, max_length=3).input_ids == one[:3]
    assert tokenizer("One day", padding="max_length", max_length=9).attention_mask.count(0) == 9 - len(two)
    with pytest.raises(ArgumentError, match="different lengths"):
        tokenizer(["Once upon a time", "One day"], return_tensors="np")
    with pytest.raises(ValueError, match="'np'"):
        tokenizer("One day", return_tensors="pt")
    with pytest.raises(ArgumentError, match="padding is 'shortest'"):
        tokenizer("One day", padding="shortest")
    with pytest.raises(AttributeError, match="token_type_ids"):
        _ = tokenizer("One day").token_type_ids


def test_decoding_and_spelling(tokenizer: tinyllm.Tokenizer) -> None:
    rows = tokenizer(["Once upon a time", "One day"], padding=True, return_tensors="np").input_ids
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == ["Once upon a time", "One day"]
    bos = next(text for text, i in tokenizer.special_tokens.items() if i == tokenizer.bos_id)
    assert tokenizer.batch_decode(rows)[0].startswith(bos)
    assert tokenizer.decode(rows[0], skip_special_tokens=True) == tokenizer.decode(rows[0])
    assert tokenizer.decode(rows[0], skip_special_tokens=False) == tokenizer.decode(rows[0], special=True)
    tokens = tokenizer.convert_ids_to_tokens(rows[0])
    assert len(tokens) == len(rows[0])
    assert tokenizer.convert_tokens_to_ids(tokens) == rows[0].tolist()
    assert tokenizer.convert_ids_to_tokens(int(rows[0][1])) == tokens[1]
    assert tokenizer.convert_ids_to_tokens(rows[0], skip_special_tokens=True) == tokens[1:]
    assert tokenizer.convert_tokens_to_ids("no such token") is None


def test_chat_templates(llm: tinyllm.LLM, tokenizer: tinyllm.Tokenizer) -> None:
    ask: dict[str, Any] = {"chat_template": TEMPLATE, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, **ask)
    assert text == "<|user|> Hi\n<|assistant|>" == llm.chat_text(CHAT, chat_template=TEMPLATE)
    encoding = tokenizer.apply_chat_template(CHAT, **ask)
    assert encoding.input_ids == llm.chat_ids(CHAT, chat_template=TEMPLATE)
    assert tokenizer.apply_chat_template(CHAT, return_dict=False, **ask) == encoding.input_ids
    two = tokenizer.apply_chat_template([CHAT, CHAT], tokenize=False, chat_template=TEMPLATE)
    assert two == ["<|user|> Hi\n"] * 2
    array = tokenizer.apply_chat_template(CHAT, return_tensors="np", **ask)
    assert array["input_ids"].tolist() == [encoding.input_ids]
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.apply_chat_template(CHAT)
    with pytest.raises(UnsupportedError, match="continue_final_message"):
        tokenizer.apply_chat_template(CHAT, continue_final_message=True)
    alone = tinyllm.load_tokenizer(Path(tinyllm.__file__).parent / "data" / "stories.gguf")
    with pytest.raises(ArgumentError, match="the model's template"):
        alone.apply_chat_template(CHAT)


def test_generate(llm: tinyllm.LLM, tokenizer: tinyllm.Tokenizer) -> None:
    one, two = tokenizer("Once upon a time").input_ids, tokenizer("One day").input_ids
    expected = [llm(ids, max_tokens=8, temperature=0) for ids in (one, two)]
    rows = [[*made.prompt_tokens, *made.tokens] for made in expected]
    assert llm.generate(one, max_new_tokens=8) == rows[0]
    assert llm.generate([one, two], max_new_tokens=8) == rows
    assert llm.generate(np.array(one), max_new_tokens=8).tolist() == rows[0]
    for side in ("left", "right"):
        batch = tokenizer(
            ["Once upon a time", "One day"], padding=True, padding_side=side, return_tensors="np"
        )
        out = llm.generate(**batch, max_new_tokens=8)
        assert out.dtype == np.int64
        n = len(rows[0]) - len(rows[1])
        assert out.tolist() == [rows[0], rows[1] + [tokenizer.pad_token_id] * n]
    assert len(llm.generate(one, max_length=len(one) + 3)) == len(one) + 3
    several = llm.generate(np.array([two]), max_new_tokens=9, do_sample=True, num_return_sequences=3, seed=1)
    assert several.shape == (3, len(two) + 9)
    assert len({tuple(row) for row in several.tolist()}) == 3
    advised = llm.defaults["temperature"]  # goes before the default of 1.0
    sampled = llm(
        two, max_tokens=9, temperature=advised, top_k=50, top_p=1.0, min_p=0.0, typical_p=1.0, seed=1
    )
    assert several[0, len(two) :].tolist() == sampled.tokens


def test_the_end_of_text_is_in_the_row(llm: tinyllm.LLM, tokenizer: tinyllm.Tokenizer) -> None:
    def end(logits: Any, tokens: Any) -> None:
        logits[tokenizer.eos_id] = 1e4

    ids = tokenizer("One day").input_ids
    assert llm.generate(ids, max_new_tokens=5, logits_processor=[end]) == [*ids, tokenizer.eos_id]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_beams": 4}, UnsupportedError, "num_beams=4"),
        ({"streamer": object()}, UnsupportedError, "stream yields"),
        ({"temprature": 1}, TypeError, "temprature"),
        ({"temperature": -1, "do_sample": True}, ValueError, "temperature is -1"),
        ({"attention_mask": [1]}, ArgumentError, "attention_mask"),
        ({"max_length": 2}, ArgumentError, "max_tokens"),
    ],
)
def test_refusals(llm: tinyllm.LLM, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        llm.generate([1, 5, 6], **options)
    with pytest.raises(TypeError, match="takes ids"):
        llm.generate("Once upon a time")


def test_neutral_options_are_taken(llm: tinyllm.LLM) -> None:
    assert llm.generate([1, 5], max_new_tokens=1, num_beams=1, use_cache=True) == llm.generate(
        [1, 5], max_new_tokens=1
    )


def test_score_and_logits_of_lists(llm: tinyllm.LLM) -> None:
    texts = ["Once upon a time", "One day, Lily went out."]
    assert llm.score(texts) == [llm.score(text) for text in texts]
    ids = [[1, 5, 6], [7, 8]]
    for rows, alone in zip(llm.logits(ids), map(llm.logits, ids), strict=True):
        assert rows.tobytes() == alone.tobytes()
    assert len(llm.logits(np.array([[1, 2], [3, 4]]))) == 2


def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_ids(tmp_path: Path) -> None:
    package = transformers()
    trained = Tokenizer(models.BPE(byte_fallback=False))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["Once upon a time there was a cat. One day the cat went out."] * 4
    trained.train_from_iterator(words, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = package.PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(tmp_path)
    ours, theirs = tinyllm.load_tokenizer(tmp_path), package.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.pad_token_id == theirs.pad_token_id
    texts = ["Once upon a time", "One day", "<s>Hi</s>"]
    choices: list[dict[str, Any]] = [{}, {"padding": True}, {"add_special_tokens": False}]
    choices += [{"truncation": True, "max_length": 3}, {"padding": "max_length", "max_length": 30}]
    for options in choices:
        for side in ("left", "right"):
            expected, made = (t(texts, padding_side=side, **options) for t in (theirs, ours))
            assert made.input_ids == expected["input_ids"], options
            assert made.attention_mask == expected["attention_mask"], options
    array = ours(texts, padding=True, return_tensors="np").input_ids
    assert (array == theirs(texts, padding=True, return_tensors="np")["input_ids"]).all()
    rows = theirs(texts)["input_ids"]
    for skip in (False, True):
        assert ours.batch_decode(rows, skip_special_tokens=skip) == theirs.batch_decode(
            rows, skip_special_tokens=skip
        )
        spelled = ours.convert_ids_to_tokens(rows[2], skip_special_tokens=skip)
        assert spelled == theirs.convert_ids_to_tokens(rows[2], skip_special_tokens=skip)
    assert ours.convert_tokens_to_ids(["<s>", "cat"]) == theirs.convert_tokens_to_ids(["<s>", "cat"])


@pytest.mark.filterwarnings("ignore")
def test_transformers_generates_the_same_ids(data_dir: Path) -> None:
    package, torch = transformers(), pytest.importorskip("torch", reason="torch is not installed")
    folder = data_dir / "models" / "stories260K-hf"
    theirs = package.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with tinyllm.load(folder, cache_type="f32") as llm:
        assert llm.tokenizer is not None
        batch = llm.tokenizer(
            ["Once upon a time", "One day"], padding=True, padding_side="left", return_tensors="np"
        )
        made = llm.generate(**batch, max_new_tokens=30)
        as_tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        expected = theirs.generate(
            **as_tensors, max_new_tokens=30, do_sample=False, pad_token_id=llm.tokenizer.pad_token_id
        )
        for mine, its, mask in zip(made, expected.tolist(), batch.attention_mask, strict=True):
            n = int((mask == 0).sum())  # padding, which is not ours to give back
            assert mine[: len(its) - n].tolist() == its[n:]
