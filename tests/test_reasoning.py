"""Reasoning told from the answer: by tags and by channels, in pieces cut anywhere, and through a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_gguf import small_tokenizer, write_gguf
from helpers_models import golden_spec, random_weights
from hypothesis import example, given
from hypothesis import strategies as st

import tinyllm
from tinyllm.chat.reasoning import (
    TAGS,
    Channels,
    Kind,
    Plain,
    Splitter,
    Tagged,
    hidden,
    shown,
    splitter,
    visible_ids,
)
from tinyllm.engine.engine import Generation
from tinyllm.engine.sampling import Sampled, StopStrings

MARKS = ["<think>", "</think>", "[THINK]"]
CHANNELS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]


def split(machine: Splitter, pieces: Iterable[str]) -> tuple[list[tuple[Kind, str]], bool]:
    """All parts, neighbours of a kind joined."""
    joined: list[tuple[Kind, str]] = []
    for kind, text in [part for piece in pieces for part in machine.feed(piece)] + machine.flush():
        assert text
        if joined and joined[-1][0] == kind:
            text = joined.pop()[1] + text
        joined.append((kind, text))
    return joined, machine.has_reasoning


def whole(machine: Splitter, text: str) -> dict[str, str]:
    return dict(split(machine, [text])[0])


def slow_truth(text: str, opened: bool) -> list[tuple[Kind, str]]:
    """What `Tagged` without special marks says of <think>, on the text at once."""
    if not opened:
        match = re.match(r"\s*<think>", text)
        if match is None:
            return [("text", text)] if text else []
        text = text[match.end() :]
    reasoning, _, answer = text.partition("</think>")
    parts: list[tuple[Kind, str]] = [("reasoning", reasoning.strip()), ("text", answer.lstrip())]
    return [part for part in parts if part[1]]


def cut(text: str, cuts: list[int]) -> list[str]:
    at = sorted({c % (len(text) + 1) for c in cuts})
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


WORDS = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", "<", " ", "\n", "a", "é", "[THINK]", ">"]),
    max_size=12,
).map("".join)
CHANNEL_WORDS = st.lists(
    st.sampled_from(
        [
            *CHANNELS,
            "analysis",
            "final",
            " to=functions.f",
            "assistant",
            "<|",
            "|>",
            " ",
            "\n",
            "a",
            "t",
            "to",
        ]
    ),
    max_size=14,
).map("".join)
CUTS = st.lists(st.integers(0, 200), max_size=8)


@given(WORDS, CUTS, st.booleans())
@example("<think>\nHm.\n\n</think>\n\nYes.", list(range(40)), False)
@example("  \n", [1], False)
def test_tags_equal_the_slow_truth_however_the_text_is_cut(text: str, cuts: list[int], opened: bool) -> None:
    if not opened and text.lstrip().startswith("[THINK]"):
        return  # the slow truth knows one pair of tags
    tag = "<think>" if opened else None
    assert split(Tagged(opened=tag), cut(text, cuts))[0] == slow_truth(text, opened)


@given(WORDS, CUTS)
def test_special_marks_count_anywhere_however_the_text_is_cut(text: str, cuts: list[int]) -> None:
    at_once, has_reasoning = split(Tagged(MARKS), [text])
    assert split(Tagged(MARKS), cut(text, cuts)) == (at_once, has_reasoning)
    left = re.sub(r"</?think>|\[THINK\]", "", text)
    if any(mark in left for mark in MARKS):
        return  # what stood around a mark makes another, and that is text
    assert not any(mark in part for mark in MARKS[:2] for kind, part in at_once if kind == "text")


WHOLE_WORDS = st.lists(
    st.sampled_from(["<think>", "</think>", "[THINK]", " ", "\n", "a", "b", None]), max_size=12
)


@given(WHOLE_WORDS, CUTS, st.sampled_from([(), MARKS]), st.sampled_from([None, "<think>"]))
@example([None, "\n", "<think>", None, "a", "</think>", None, "\n", "b"], [1], (), None)
@example(["</think>"], [], MARKS, None)
def test_hidden_tokens_change_nothing_and_stay_in_the_text(
    words: list[str | None], cuts: list[int], marks: Any, opened: str | None
) -> None:
    seen = "".join(word or "" for word in words)
    wanted = split(Tagged(marks, opened), [seen])
    tokens = [hidden("<|x|>") if word is None else word for word in words]
    machine = Tagged(marks, opened)
    parts, _ = split(machine, tokens)
    assert all(shown(text) == text for kind, text in parts if kind == "reasoning")
    joined: list[tuple[Kind, str]] = []
    for kind, text in ((kind, shown(text)) for kind, text in parts):
        if text and joined and joined[-1][0] == kind:
            joined[-1] = kind, joined[-1][1] + text
        elif text:
            joined.append((kind, text))
    assert (joined, machine.has_reasoning) == wanted
    if not wanted[1] and not any(mark in seen for mark in marks):  # a mark that closes nothing is taken out
        assert "".join(text for _, text in parts) == "".join(tokens)


def test_a_tag_does_not_go_on_across_a_hidden_token() -> None:
    machine = Tagged()
    assert split(machine, ["<thi", hidden("<|x|>"), "nk>a"])[0] == [("text", f"<thi{hidden('<|x|>')}nk>a")]


@given(CHANNEL_WORDS, CUTS)
@example("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.", [3])
def test_channels_are_the_same_however_the_text_is_cut(text: str, cuts: list[int]) -> None:
    assert split(Channels(), cut(text, cuts)) == split(Channels(), [text])


def test_nothing_is_held_back_longer_than_it_must_be() -> None:
    tags = Tagged()
    seen = [tags.feed(piece) for piece in ["\n", "<thi", "nk>\n", "a <", "b ", "</thi", "nk>", "\n\nc", "<"]]
    assert seen == [
        *([], [], []),
        *([("reasoning", "a")], [("reasoning", " <b")], [], []),
        *([("text", "c")], [("text", "<")]),
    ]
    answer = Tagged()
    assert [answer.feed(piece) for piece in ["Hi", " <", "think>"]] == [
        [("text", "Hi")],
        [("text", " <")],
        [("text", "think>")],
    ]


@pytest.mark.parametrize(("opening", "closing"), TAGS.items())
def test_every_pair_of_tags(opening: str, closing: str) -> None:
    assert whole(Tagged(), f"{opening}Hm.{closing}Yes.") == {"reasoning": "Hm.", "text": "Yes."}
    assert whole(splitter(f"user: Hi\n{opening}\n", ()), f"Hm.{closing}Yes.") == {
        "reasoning": "Hm.",
        "text": "Yes.",
    }


def test_an_empty_block_is_a_block() -> None:
    assert split(Tagged(), ["<think>\n\n</think>\n\nYes."]) == ([("text", "Yes.")], True)
    assert split(Tagged(), ["Yes."]) == ([("text", "Yes.")], False)


def test_a_block_that_does_not_end() -> None:
    assert split(Tagged(), ["<think>Hm. </thi"])[0] == [("reasoning", "Hm. </thi")]


def test_tags_later_in_the_text_are_text_unless_they_are_special() -> None:
    text = "Say <think>a</think> b"
    assert whole(Tagged(), text) == {"text": text}
    assert split(Tagged(MARKS), [text])[0] == [("text", "Say "), ("reasoning", "a"), ("text", "\n\nb")]
    assert whole(Tagged(MARKS), "a</think>b") == {"text": "ab"}


def test_what_a_user_says_opens_nothing() -> None:
    assert whole(splitter("user: <think>\nassistant:", ()), "Yes.") == {"text": "Yes."}
    assert whole(splitter("assistant: <think>\n\n</think>\n\n", ()), "Yes.") == {"text": "Yes."}


HEADER, NEXT = "<|channel|>{}<|message|>", "<|end|><|start|>assistant"
PROMPT = "<|start|>user<|message|>Hi<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("output", "reasoning", "text"),
    [
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            "Hm.",
            "Yes.",
        ),
        ("<|channel|>final<|message|>Yes.", None, "Yes."),
        ("<|channel|>analysis<|message|>Hm.", "Hm.", ""),
        ("<|channel|>analysis<|message|><|channel|>final<|message|>Yes.", "", "Yes."),
        ("<|channel|>anal", None, ""),
        ("Yes.", None, "Yes."),
        (
            f"{HEADER.format('analysis')}Hm.{NEXT}{HEADER.format('commentary')}One.{NEXT}"
            f"{HEADER.format('analysis')}Two.{NEXT} to=functions.f<|channel|>commentary <|constrain|>json"
            "<|message|>{}",
            "Hm.\n\nTwo.",
            "One.\n\nto=functions.f<|channel|>commentary <|constrain|>json<|message|>{}",
        ),
    ],
)
def test_channels(output: str, reasoning: str | None, text: str) -> None:
    machine = splitter(PROMPT, CHANNELS)
    parts, has_reasoning = split(machine, [output])
    assert "".join(part for kind, part in parts if kind == "text") == text
    assert has_reasoning == (reasoning is not None)
    assert "".join(part for kind, part in parts if kind == "reasoning") == (reasoning or "")


def test_a_channel_that_the_prompt_opened() -> None:
    assert whole(splitter(PROMPT + "<|channel|>analysis<|message|>", CHANNELS), "Hm.") == {"reasoning": "Hm."}


def test_special_tokens_that_are_seen() -> None:
    tokens = {"<s>": 1, "<|eot|>": 2, "[TOOL_CALLS]": 3, "<think>": 4, "<|end|>": 5, "<|python_tag|>": 6}
    assert visible_ids(tokens) == {3, 4, 6}
    assert visible_ids({"<|channel|>": 1, "<|end|>": 2, "<|call|>": 3, "<|constrain|>": 4}) == {1, 2, 4}


# --- in the engine ------------------------------------------------------------------------------------------


class _Sequence:
    def __init__(self) -> None:
        self.tokens: list[int] = [0]

    def close(self) -> None:
        pass


def generate(texts: list[str], machine: Splitter, **options: Any) -> tuple[Generation, list[Any]]:
    """A generation whose tokens are these texts."""
    script = iter(range(len(texts)))
    generation = Generation(
        _Sequence(),  # type: ignore[arg-type]
        lambda logits, history, position: Sampled(next(script), -1.0, []),
        StopStrings(options.pop("stop", ())),
        lambda token: "" if token is None else texts[token],
        context=1000,
        max_tokens=len(texts),
        split=machine,
        **options,
    )
    pieces = []
    while generation.finish_reason is None:
        for news in generation.accept(np.zeros(1, np.float32)):
            pieces += news
    return generation, pieces


def test_each_token_has_one_piece_and_each_piece_a_kind() -> None:
    texts = ["<think>", "Hm", ". ", "</think>\n\nYes", ".", " <"]
    generation, pieces = generate(texts, Tagged())
    assert (generation.reasoning, generation.text) == ("Hm.", "Yes. <")
    assert [piece.token for piece in pieces if piece.token is not None] == list(range(len(texts)))
    assert [(p.kind, p.text) for p in pieces if p.text] == [
        ("reasoning", "Hm"),
        ("reasoning", "."),
        ("text", "Yes"),
        ("text", "."),
        ("text", " <"),
    ]
    assert pieces[0].kind == "reasoning"


def test_stop_strings_are_looked_for_in_the_answer_only() -> None:
    generation, pieces = generate(
        ["<think>", "a STOP b", "</think>", "c ST", "OP", " d"], Tagged(), stop="STOP"
    )
    assert (generation.reasoning, generation.text) == ("a STOP b", "c ")
    assert (generation.finish_reason, generation.stop_reason) == ("stop", "STOP")
    assert "".join(p.text for p in pieces) == "a STOP bc "


def test_what_is_held_back_comes_at_the_end() -> None:
    generation, pieces = generate(["<thi", "nk"], Tagged())
    assert generation.text == "<think"
    assert [(p.text, p.token) for p in pieces] == [("", 0), ("<think", 1)]
    assert generate(["a"], Plain())[0].text == "a"


# --- through a model ----------------------------------------------------------------------------------------

CONFIG = {**golden_spec("llama3").config, "vocab_size": 400}
SPECIAL = [*CHANNELS, "<|constrain|>", "<|return|>", "<|call|>"]
HELLO = [{"role": "user", "content": "Hello"}]
R1 = "{{ messages[0].content }}<think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}"


def load(path: Path, special: list[str]) -> tinyllm.LLM:
    """A model with random weights whose vocabulary ends with these control tokens."""
    tokenizer = small_tokenizer(400)
    for i, text in enumerate(special, 400 - len(special)):
        tokenizer["tokens"][i], tokenizer["types"][i] = text, 3
    write_gguf(path, CONFIG, random_weights(CONFIG, seed=3), tokenizer=tokenizer)
    return tinyllm.load(path, threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinyllm.LLM]:
    with load(tmp_path_factory.mktemp("plain") / "model.gguf", ["[TOOL_CALLS]", "<|other|>"]) as llm:
        yield llm


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinyllm.LLM]:
    with load(tmp_path_factory.mktemp("channels") / "model.gguf", SPECIAL) as llm:
        yield llm


def saying(llm: tinyllm.LLM, text: str) -> dict[str, Any]:
    """Options that make a model say this."""
    assert llm.tokenizer is not None
    return saying_ids(llm, llm.tokenizer.encode(text, bos=False, special=True))


def saying_ids(llm: tinyllm.LLM, ids: Iterable[int | None]) -> dict[str, Any]:
    assert llm.tokenizer is not None
    script = iter([*ids, llm.tokenizer.eos_id])

    def force(logits: Any, tokens: Any) -> None:
        chosen = next(script)
        logits[np.arange(len(logits)) != chosen] = -np.inf

    return {"processors": [force], "temperature": 0}


def test_reasoning_that_the_template_opens(model: tinyllm.LLM) -> None:
    said = "Well. Let me see.\n</think>\n\nHello!"
    completion = model.chat(HELLO, chat_template=R1, **saying(model, said))
    assert (completion.reasoning, completion.text) == ("Well. Let me see.", "Hello!")
    stream = model.chat(HELLO, chat_template=R1, stream=True, **saying(model, said))
    pieces = list(stream)
    assert "".join(p.text for p in pieces if p.kind == "reasoning") == "Well. Let me see."
    assert "".join(p.text for p in pieces if p.kind == "text") == "Hello!"
    assert stream.completion.reasoning == "Well. Let me see."
    assert [p.token for p in pieces if p.token is not None] == stream.completion.tokens


def test_template_args_reach_the_template(model: tinyllm.LLM) -> None:
    off = {"template_args": {"enable_thinking": False}}
    completion = model.chat(HELLO, chat_template=R1, **off, **saying(model, "Hello!"))
    assert (completion.reasoning, completion.text.strip()) == (None, "Hello!")


def test_a_prompt_that_is_no_chat_keeps_its_tags(model: tinyllm.LLM) -> None:
    said = "<think>a</think>b"
    assert model("Hello", **saying(model, said)).text.strip() == said
    assert model("Hello", reasoning=True, **saying(model, said)).text == "b"
    batch = model(["Hello", "Hello"], reasoning=True, max_tokens=3)
    assert all(completion.reasoning is None for completion in batch)


def test_channels_through_a_model(channels: tinyllm.LLM) -> None:
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    template = "<|start|>user<|message|>{{ messages[0].content }}<|end|><|start|>assistant"
    completion = channels.chat(HELLO, chat_template=template, **saying(channels, said))
    assert (completion.reasoning, completion.text) == ("Hm.", "Yes.")


@pytest.mark.parametrize(
    ("stop", "which", "text"),
    [
        ("<|other|>", "<|other|>", "Hello"),
        ("<|other|>us", "<|other|>us", "Hello"),
        ("llo<|other|>us", "llo<|other|>us", "He"),
        (["lous", "r[TOOL"], None, "HellouserX"),
        (["|", "r|>us"], None, "HellouserX"),
        ("[TOOL_CALLS]", "[TOOL_CALLS]", "Hellouser"),
        ("er[TOOL_CALLS]X", "er[TOOL_CALLS]X", "Hellous"),
    ],
)
def test_a_stop_string_may_name_special_tokens(
    model: tinyllm.LLM, stop: Any, which: str | None, text: str
) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    said = [*"Hello", "<|other|>", *"user", "[TOOL_CALLS]", "X"]

    def options() -> dict[str, Any]:
        return saying_ids(model, map(tokenizer.id_of, said))

    def check(completion: tinyllm.Completion, text: str = text) -> None:
        assert (completion.text, completion.finish_reason) == (text, "stop")
        assert completion.stop_reason == (which or tokenizer.eos_id)

    check(model("Hello", stop=stop, **options()))
    stream = model.stream("Hello", stop=stop, **options())
    assert "".join(map(str, stream)) == text
    check(stream.completion)
    with model.session() as session:
        session.append("Hello")
        check(session.generate(stop=stop, **options()))
    # In a chat the mark of a tool call is text.
    if "[TOOL" not in str(stop):
        shown_text = text.replace("X", "[TOOL_CALLS]X")
        chat = {"chat_template": "{{ messages[0].content }}", "stop": stop}
        check(model.chat(HELLO, **chat, **options()), shown_text)
        stream = model.chat(HELLO, stream=True, **chat, **options())
        assert "".join(map(str, stream)) == shown_text
        check(stream.completion, shown_text)


def test_a_stop_string_after_reasoning_names_special_tokens(model: tinyllm.LLM) -> None:
    for said, text in (("Hm.<|other|>\n</think>\n<|other|>Yes", ""), ("Hm.</think>Yes.<|other|>No", "Yes.")):
        completion = model.chat(HELLO, chat_template=R1, stop="<|other|>", **saying(model, said))
        assert (completion.reasoning, completion.text, completion.stop_reason) == ("Hm.", text, "<|other|>")


def test_tool_calls_are_text_with_their_marks(model: tinyllm.LLM) -> None:
    completion = model.chat(
        HELLO, chat_template="{{ messages[0].content }}:", **saying(model, '[TOOL_CALLS]{"a": 1}<|other|>')
    )
    assert completion.text.replace(" ", "") == '[TOOL_CALLS]{"a":1}'
