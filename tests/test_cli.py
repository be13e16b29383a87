"""tinyllm-run without a terminal: texts, JSON, batches, replay, and every error line with its exit code.

Most runs call `main` in this process, which is quick; what only a process of its own can show runs in one.
tests/test_terminal.py has the conversation and everything else that needs a terminal.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import pytest
from helpers_cli import Cli, Result, in_process

import tinyllm
from tinyllm.cli import common
from tinyllm.cli.run import main, print_stream, unescaped
from tinyllm.engine.engine import Piece
from tinyllm.engine.sampling import SamplingParams

RUN = [sys.executable, "-m", "tinyllm.cli.run"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs tinyllm-run in this process."""
    return in_process(main, monkeypatch, capsys)


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


# --- texts --------------------------------------------------------------------------------------------------


def test_text_to_stdout_and_figures_to_stderr(cli: Cli) -> None:
    result = cli("stories", "Once upon a time", "-n", "12", "--temp", "0")
    with tinyllm.load("stories") as llm:
        completion = llm("Once upon a time", max_tokens=12, temperature=0)
    assert result.code == 0
    assert result.out == completion.text + "\n", "the new text only: the prompt is echoed on terminals alone"
    for figure in (
        r"loaded in",
        r"prompt +\d+ tokens",
        r"generated +12 tokens",
        "tok/s",
        "GB/s",
        "peak memory",
    ):
        assert re.search(figure, result.err)
    assert f"prompt {len(completion.prompt_tokens):9} tokens" in result.err
    assert "ended after 12 tokens, as asked; seed " in result.err
    assert "\x1b" not in result.out + result.err


def test_reference_tokens(cli: Cli, data_dir: Path) -> None:
    folder = data_dir / "models/stories260K"
    reference = json.loads((folder / "reference_numpy_f64.json").read_text(encoding="utf-8"))
    ids = reference["greedy_from_bos_200"]
    for path, cache in ((folder / "stories260K.gguf", "f32"), (data_dir / "models/stories260K-hf", "f32")):
        n = str(len(ids) - 1)
        result = cli(path, "", "--temp", "0", "-n", n, "--cache-type", cache, "--json")
        assert result.code == 0
        assert json.loads(result.out)["tokens"] == ids[1:]


def test_the_prompt_from_a_pipe_or_a_file(cli: Cli, tmp_path: Path) -> None:
    options = ("-n", "5", "--temp", "0")
    expected = cli("stories", "One day", *options).out
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfOne day\r\n")
    assert cli("stories", *options, stdin=b"One day\n").out == expected
    assert cli("stories", "-", *options, stdin=b"One day").out == expected
    assert cli("stories", "-f", file, *options).out == expected
    both = cli("stories", "One", *options, "--json", stdin=b"day\n")
    assert json.loads(both.out)["prompt"] == "One\nday", "what is piped follows the prompt"
    assert json.loads(cli("stories", "-f", file, "--json", stdin=b"x").out)["prompt"] == "One day\nx"
    assert json.loads(cli("stories", r"One\nday", "-e", "--json", *options).out)["prompt"] == "One\nday"
    assert json.loads(cli("stories", r"One\nday", "--json", *options).out)["prompt"] == r"One\nday"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(r"a\nb", "a\nb"), (r"\\n", r"\n"), (r"\t\"", '\t"'), (r"\q", r"\q"), ("\\", "\\"), ("", "")],
)
def test_escapes(text: str, expected: str) -> None:
    assert unescaped(text) == expected


def test_the_same_seed_gives_the_same_text(cli: Cli) -> None:
    options = ("stories", "Lily", "-n", "10", "--temp", "1.5", "--top-k", "0", "--top-p", "1", "--min-p", "0")
    texts = [cli(*options, "--seed", seed).out for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_stop(cli: Cli) -> None:
    options = ("stories", "Once upon a time", "--temp", "0", "-n", "40", "--json")
    text = json.loads(cli(*options).out)["text"]
    word = text.split()[3]
    stopped = json.loads(cli(*options, "--stop", "no such words", "--stop", word).out)
    assert stopped["text"] == text[: text.index(word)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", word)


def test_logprobs_as_a_table(cli: Cli) -> None:
    lines = cli("stories", "Once upon a time", "-n", "4", "--temp", "0", "--logprobs", "2").out.splitlines()
    assert len(lines) == 4
    for line in lines:
        token, logprob, percent, first = re.fullmatch(
            r"('.*?') +(-?[\d.]+) +([\d.]+)%   ('.*?') [\d.]+%  '.*?' [\d.]+%", line
        ).groups()  # type: ignore[union-attr]
        assert token == first, "greedy takes the likeliest"
        assert float(logprob) <= 0
        assert 0 < float(percent) <= 100


# --- JSON, batches, replay ----------------------------------------------------------------------------------


def test_json_has_what_it_promises(cli: Cli) -> None:
    result = cli("stories", "Once upon a time", "-n", "6", "--seed", "5", "--json", "--logprobs", "2")
    lines = result.out.splitlines()
    assert len(lines) == 1
    value = json.loads(lines[0])
    assert {"text", "reasoning", "tokens", "finish_reason", "seed", "timings"} <= value.keys()
    assert value["reasoning"] is None
    assert set(value["timings"]) == {
        "load_s",
        "prompt_tokens",
        "prompt_s",
        "generated_tokens",
        "generate_s",
        "cached_tokens",
        "drafted_tokens",
        "accepted_tokens",
        "gain",
        "peak_memory_bytes",
    }
    assert value["model"] == "stories"
    assert value["prompt"] == "Once upon a time"
    assert not value["text"].startswith("Once")
    assert value["timings"]["prompt_tokens"] == len(value["prompt_ids"])
    assert value["timings"]["generated_tokens"] == len(value["tokens"]) == len(value["logprobs"]) == 6
    assert [len(top) for top in value["top_logprobs"]] == [2] * 6
    assert value["seed"] == 5
    assert value["timings"]["peak_memory_bytes"] > 1_000_000


def test_json_without_logprobs_has_none(cli: Cli) -> None:
    value = json.loads(cli("stories", "Lily", "-n", "2", "--json").out)
    assert "logprobs" not in value
    assert isinstance(value["seed"], int)


def test_prompts_are_one_batch_in_order(cli: Cli, tmp_path: Path) -> None:
    """An empty line is the prompt of a text from nothing, so that results stay beside prompts."""
    texts = ["Once upon a time", "", "The cat"]
    file = tmp_path / "prompts.txt"
    file.write_text("\r\n".join(texts) + "\n")
    options = ("stories", "-n", "8", "--seed", "9")
    result = cli(*options, "--prompts", file)
    values = [json.loads(line) for line in result.out.splitlines()]
    assert [value["prompt"] for value in values] == texts
    assert [value["tokens"] for value in values] == [
        json.loads(cli(*options, text, "--json").out)["tokens"] for text in texts
    ], "a batch is what each prompt gives alone"
    assert "3 prompts, 24 tokens" in result.err
    assert cli(*options, "--prompts", "-", stdin=b"The cat\n").out.count("\n") == 1


def test_prompts_as_json_lines(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"two\\nlines"\n"one"\n')
    values = [json.loads(line) for line in cli("stories", "-n", "1", "--prompts", file).out.splitlines()]
    assert [value["prompt"] for value in values] == ["two\nlines", "one"]


def test_replay_says_same_or_what_differs(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    made = cli(
        "stories", "Once upon a time", "-n", "9", "--temp", "1.2", "--json", "--stop", "qqq", "-c", "64"
    )
    file.write_text(made.out)
    result = cli("--replay", file)
    assert (result.code, result.out) == (0, "same: all 9 tokens\n")
    result = cli("stories", "--replay", file, "-t", "1")
    assert (result.code, result.out) == (0, "same: all 9 tokens\n"), "threads never matter"

    value = json.loads(made.out)
    value["tokens"][4] = (value["tokens"][4] + 1) % 2048
    file.write_text(json.dumps(value))
    result = cli("--replay", file)
    assert result.code == 1
    assert result.out.startswith(f"different: token 5 of 9 was {value['tokens'][4]} (")

    value["tokens"] = json.loads(made.out)["tokens"] + [3]
    file.write_text(json.dumps(value))
    assert "token 10 of 10 was 3" in (out := cli("--replay", file).out)
    assert out.endswith("is the end\n")


def test_replay_of_a_batch(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text(cli("stories", "--prompts", "-", "-n", "4", stdin=b"One\nTwo\n").out)
    result = cli("--replay", file)
    assert (result.code, result.out) == (0, "result 1: same: all 4 tokens\nresult 2: same: all 4 tokens\n")


# --- chat ---------------------------------------------------------------------------------------------------


def test_chat_template_from_a_file(cli: Cli, chat_file: Path) -> None:
    options = ("-n", "6", "--temp", "0", "--json")
    value = json.loads(
        cli("stories", "Hi", "--chat-template", chat_file, "--system", "Be brief.", *options).out
    )
    assert value["chat"] is True
    with tinyllm.load("stories") as llm:
        assert llm.tokenizer is not None
        prompt = llm.tokenizer.encode("system: Be brief.\nuser: Hi\nassistant: ", bos=True)
    assert value["prompt_ids"] == prompt


def test_special_tokens_in_a_prompt_are_text_unless_asked(cli: Cli, chat_file: Path) -> None:
    with tinyllm.load("stories") as llm:
        assert llm.tokenizer is not None
        text = f"a{llm.tokenizer.token_text(2)}b"
    for chat in ([], ["--chat-template", chat_file]):
        for special in ([], ["--special"]):
            run = cli("stories", text, *chat, *special, "-n", "1", "--json")
            assert (2 in json.loads(run.out)["prompt_ids"]) == bool(special)
            assert ("--special" in run.err) == (not special and not chat)


def test_reasoning_is_apart_from_the_answer(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "thinks.jinja"
    path.write_text("{{ messages[0].content }}{% if enable_thinking is not false %}<think>\n{% endif %}")
    options = ("stories", "Hi", "--chat-template", path, "-n", "6", "--temp", "0")
    thought = json.loads(cli(*options, "--json").out)
    assert (thought["text"], bool(thought["reasoning"])) == ("", True)
    answered = json.loads(cli(*options, "--json", "--template-arg", "enable_thinking=false").out)
    assert (bool(answered["text"]), answered["reasoning"]) == (True, None)
    shown = cli(*options)
    assert shown.out == ""
    assert thought["reasoning"] in shown.err
    hidden = cli(*options, "--no-reasoning")
    assert hidden.out == ""
    assert thought["reasoning"] not in hidden.err


def test_template_arguments_are_json_where_they_can_be(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "args.jinja"
    path.write_text("{{ a is false }} {{ b }} {{ c | length }} {{ d }}")
    given = ["--template-arg", "a=false", "--template-arg", "b=high", "--template-arg", "c=[1, 2]"]
    given += ["--template-arg", "d=x", "--template-arg", "d=a=b"]
    value = json.loads(cli("stories", "Hi", "--chat-template", path, *given, "-n", "1", "--json").out)
    with tinyllm.load("stories") as llm:
        assert llm.tokenizer is not None
        assert value["prompt_ids"] == llm.tokenizer.encode("True high 2 a=b", bos=True)


class _Stream(list[Piece]):
    completion = "the completion"

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_reasoning_goes_to_stderr_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [("", "reasoning"), ("Hm", "reasoning"), (".", "reasoning"), ("Yes", "text"), (".", "text")]
    stream = _Stream(Piece(text, kind=kind) for text, kind in parts)  # type: ignore[arg-type]
    assert print_stream(stream) == "the completion"  # type: ignore[arg-type, comparison-overlap]
    assert capsys.readouterr() == ("Yes.\n", "Hm.\n\n")
    print_stream(stream, shows_reasoning=False)  # type: ignore[arg-type]
    assert capsys.readouterr() == ("Yes.\n", "thinking ...\n")


def test_models_with_a_template_chat_and_others_do_not(cli: Cli, data_dir: Path, tmp_path: Path) -> None:
    for file in (data_dir / "models/stories260K-hf").iterdir():
        (tmp_path / file.name).symlink_to(file)
    options = (tmp_path, "Hello", "-n", "1", "--json")
    assert json.loads(cli(*options).out)["chat"] is False
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert json.loads(cli(*options).out)["chat"] is True
    assert json.loads(cli(*options, "--no-chat").out)["chat"] is False


# --- errors -------------------------------------------------------------------------------------------------


def broken_models(folder: Path) -> dict[str, Path]:
    stories = Path(tinyllm.__file__).parent / "data/stories.gguf"
    truncated = folder / "truncated.gguf"
    truncated.write_bytes(stories.read_bytes()[:-1000])
    half_a_header = folder / "header.gguf"
    half_a_header.write_bytes(stories.read_bytes()[:1000])
    text = folder / "text.gguf"
    text.write_text("This is no model.")
    writer = gguf.GGUFWriter(folder / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "empty").mkdir()
    return {
        "truncated": truncated,
        "header": half_a_header,
        "text": text,
        "other": folder / "other.gguf",
        "empty": folder / "empty",
        "missing": folder / "missing.gguf",
    }


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("missing", "no such file"),
        ("text", "not a model"),
        ("empty", "not a model"),
        ("truncated", "bytes"),
        ("header", "byte"),
        ("other", "mamba"),
    ],
)
def test_what_is_wrong_with_a_model_is_one_line(cli: Cli, tmp_path: Path, model: str, words: str) -> None:
    path = broken_models(tmp_path)[model]
    result = cli(path, "Hello")
    assert_one_line(result, 1)
    assert str(path) in result.err
    assert words in result.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "no MODEL given"),
        ("stories", "standard input is empty"),
        ("stories x --bogus", "there is no option --bogus"),
        ("stories x --temprature 1", "there is no option --temprature; --temperature is one"),
        ("stories x -n5", "there is no option -n5; -n 5 has a space between"),
        ("stories x --max-tok 5", "there is no option --max-tok; --max-tokens is one"),
        ("stories x --mirostat 2", "there is no option --mirostat"),
        ("stories x y z", "too many arguments: y z"),
        ("x y -m stories", "MODEL is given twice: x and --model stories"),
        ("stories x -p y", "PROMPT is given twice"),
        ("stories x -ngl", "-ngl needs a value"),
        ("stories x --batch-size", "--batch-size needs a value"),
        ("stories x -ctk f16 -ctv q8_0", "keys and values have one type here: f16 and q8_0"),
        ("stories x -l 5", "'5' is no token id and number"),
        ("stories x --chat-template-kwargs []", "'[]' is no JSON object"),
        ("stories x -cnv", "--conversation needs a terminal"),
        ("stories x --tools /dev/null", "/dev/null is no JSON"),
        ("stories --prompts y --tools /dev/null", "is no JSON"),
        ("stories x y", "y"),
        ("stories x --temp hot", "hot"),
        ("stories x --temp -1", "temperature is -1"),
        ("stories x --temp nan", "temperature"),
        ("stories x --top-p 2", "top_p is 2"),
        ("stories x --top-k -5", "top_k is -5"),
        ("stories x --repeat-penalty 0", "repetition_penalty is 0"),
        ("stories x --seed -2", "seed is -2"),
        ("stories x -n -2", "'-2' is not a whole number of 1 or more"),
        ("stories x -n 0", "'0' is not a whole number of 1 or more"),
        ("stories x -c -5", "--context"),
        ("stories x -t none", "--threads"),
        ("stories x -t 100000", "threads is 100000"),
        ("stories x --device tpu", "tpu"),
        ("stories x --cache-type q1", "q1"),
        ("stories x --weights q17", "q17"),
        ("stories x --logprobs -1", "--logprobs"),
        ("stories x --no-chat --chat", "not allowed with"),
        ("stories x --no-chat --system y", "--system"),
        ("stories x --system y", "has no chat template"),
        ("stories x --no-chat --template-arg a=b", "--template-arg is for chat"),
        ("stories x --template-arg a=b", "--template-arg is for chat"),
        ("stories x --template-arg ab", "'ab' is not NAME=VALUE"),
        ("stories x --prompts y", "PROMPT and --prompts cannot be used together"),
        ("stories x --replay y", "cannot be used together"),
        ("stories --prompts -", "has no prompts"),
    ],
)
def test_usage_errors_are_one_line_and_2(cli: Cli, argv: str, words: str) -> None:
    result = cli(*argv.split())
    assert_one_line(result, 2)
    assert words in result.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("stories x --chat", "has no chat template"),
        ("stories x --device cuda", "cuda"),
        ("stories x -c 200000000", "does not fit into memory"),
        ("stories --file /no/such/file", "/no/such/file: No such file"),
        ("stories --prompts /no/such/file", "/no/such/file: No such file"),
        ("stories x --chat-template /no/such/file", "/no/such/file: No such file"),
        ("--replay /no/such/file", "/no/such/file: No such file"),
    ],
)
def test_runtime_errors_are_one_line_and_1(cli: Cli, argv: str, words: str) -> None:
    if "cuda" in argv and tinyllm.info()["cuda"]:
        pytest.skip("this machine has CUDA")
    result = cli(*argv.split())
    assert_one_line(result, 1)
    assert words in result.err


def test_a_prompt_that_does_not_fit(cli: Cli) -> None:
    result = cli("stories", "Once upon a time there was a dog", "-c", "4")
    assert_one_line(result, 1)
    assert "context of 4" in result.err
    assert "begin with a larger context: -c N" in result.err


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b"\xff", b'{"model": "stories"}', b"null"])
def test_replay_of_something_else(cli: Cli, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "out.json"
    file.write_bytes(content)
    result = cli("--replay", file)
    assert_one_line(result, 1)
    assert f"{file} is not what --json writes" in result.err


def test_text_that_is_not_utf8(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes("caf\xe9".encode("latin-1"))
    result = cli("stories", "-f", file)
    assert_one_line(result, 2)
    assert "byte 3 is 0xe9" in result.err
    assert_one_line(cli("stories", "caf\udce9"), 2)


def test_prompts_file_with_something_else(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"good"\n{"prompt": 3}\n')
    result = cli("stories", "--prompts", file)
    assert_one_line(result, 2)
    assert "line 2" in result.err
    file.write_text('"good"\n\n"also good"\n')
    assert "line 2: not a JSON string" in cli("stories", "--prompts", file).err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("boom\nboom"), 1, "internal error: RuntimeError: boom boom"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied"),
    ],
)
def test_anything_else_that_goes_wrong(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.delenv("TINYLLM_DEBUG", raising=False)
    monkeypatch.setattr(tinyllm, "load", load)
    result = cli("stories", "Hello")
    assert_one_line(result, code)
    assert words in result.err


def test_debug_shows_where(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLLM_DEBUG", "1")
    with pytest.raises(tinyllm.NotFoundError):
        cli("/no/such/model", "Hello")


def assert_one_line(result: Result, code: int) -> None:
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("tinyllm-run: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err


# --- about itself -------------------------------------------------------------------------------------------


def test_options_of_sampling_reach_the_call() -> None:
    parser = argparse.ArgumentParser()
    common.add_sampling_options(parser)
    assert common.sampling_fields(parser.parse_args([])) == {}
    line = """-n 9 --temp 0.5 --top-k 3 --top-p 0.5 --min-p 0.25 --repeat-penalty 1.5 --seed 7 --stop x
        --stop y --min-tokens 2 --repeat-last-n -1 --no-repeat-ngram-size 4 --dry-multiplier 0.75 --dry-base 2
        --dry-allowed-length 3 --dry-penalty-last-n 99 --dry-sequence-breaker , --dry-sequence-breaker none
        --xtc-probability 0.5 --xtc-threshold 0.2 --suppress-tokens 5,6 --begin-suppress-tokens 7
        --bad-words-ids 1,2 --bad-words-ids 3 --typical 0.9 --presence-penalty 0.5 --frequency-penalty 0.25
        --logit-bias 5-inf --logit-bias 7+1.5"""
    fields = common.sampling_fields(parser.parse_args(line.split()))
    assert fields == {
        "max_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.25, "seed": 7,
        "repetition_penalty": 1.5, "stop": ["x", "y"], "min_tokens": 2, "penalty_window": -1,
        "no_repeat_ngram_size": 4,
        "dry_multiplier": 0.75, "dry_base": 2.0, "dry_allowed_length": 3, "dry_penalty_last_n": 99,
        "dry_sequence_breakers": [",", "none"], "xtc_probability": 0.5, "xtc_threshold": 0.2,
        "typical_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25,
        "logit_bias": {5: float("-inf"), 7: 1.5},
        "suppress_tokens": [5, 6], "begin_suppress_tokens": [7], "bad_words_ids": [[1, 2], [3]],
    }  # fmt: skip
    SamplingParams(**fields)
    none = common.sampling_fields(parser.parse_args(["--dry-sequence-breaker", "none"]))
    assert none == {"dry_sequence_breakers": []}


def test_bans_on_the_command_line(cli: Cli) -> None:
    options = ("stories", "Once upon a time", "-n", "6", "--temp", "0", "--json")
    plain = json.loads(cli(*options).out)["tokens"]
    banned = json.loads(cli(*options, "--suppress-tokens", f"{plain[0]},{plain[1]}").out)["tokens"]
    assert not {plain[0], plain[1]} & set(banned)
    assert_one_line(cli(*options, "--suppress-tokens", "a"), 2)
    assert "token 99999" in cli(*options, "--suppress-tokens", "99999").err


LLAMA_CLI = """-m stories -p Once -s 7 -n -1 --n-predict 9 --temperature 1.5 -c 0 --ctx-size 300 -ngl 0 -fa on
    --flash-attn -b 512 --mlock --typical-p 0.9 --presence-penalty 0.5 --repeat-last-n 32 --logit-bias 5-inf
    --no-mmap -ctk q8_0 -ctv q8_0 -no-cnv --color --no-warmup -st --jinja"""


def test_the_options_of_llama_cpp_and_ollama(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What means the same gives the same; what means nothing is named."""
    theirs = LLAMA_CLI.split()
    ours = "stories Once --seed 7 -n 9 --temp 1.5 -c 300 --device cpu --typical 0.9 --presence-penalty 0.5 "
    ours += "--repeat-last-n 32 --logit-bias 5-inf --cache-type q8_0 --no-chat"
    a, b = cli(*theirs, "--json"), cli(*ours.split(), "--json")
    assert a.code == b.code == 0
    same = ("model", "prompt", "chat", "tokens", "seed", "settings", "parameters")
    assert [json.loads(a.out)[key] for key in same] == [json.loads(b.out)[key] for key in same]
    named = re.findall(r"(?m)^(-\S+) means nothing here: \w", a.err)
    assert named == [
        "-fa",
        "--flash-attn",
        "-b",
        "--mlock",
        "--no-mmap",
        "--color",
        "--no-warmup",
        "-st",
        "--jinja",
    ]
    assert not re.search("means nothing", b.err)
    assert "-ngl means nothing here unless it is 0" in cli("stories", "x", "-n", "1", "-ngl", "99").err
    assert json.loads(cli("stories", "x", "-n", "1", "-s", "-1", "--json").out)["seed"] >= 0
    replayed = tmp_path / "out.json"
    replayed.write_text(a.out)
    assert cli("--replay", replayed).out == "same: all 9 tokens\n", "with a token that is forbidden"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hf:org/repo:Q4_0: HF_HUB_OFFLINE is set" in cli("-hf", "org/repo:Q4_0", "-p", "x").err


def test_a_value_is_no_option(cli: Cli) -> None:
    value = json.loads(cli("stories", "-n", "1", "--stop=-fa", "--json", "--", "-fa").out)
    assert (value["prompt"], value["parameters"]["stop"]) == ("-fa", ["-fa"])


def test_tools_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    """Calls are lines of JSON, and the result replays."""
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
    tools, template, out = tmp_path / "tools.json", tmp_path / "t.jinja", tmp_path / "out.json"
    tools.write_text(json.dumps([tool]))
    template.write_text("{{ tools }}{% for m in messages %}{{ m }}{% endfor %}")
    call = '{"name": "add", "arguments": {}}'
    options = ("stories", "Add", "--tools", tools, "--chat-template", template, "--choices", call)
    assert cli(*options).out == '{"tool_call": {"name": "add", "arguments": {}}}\n'
    out.write_text(cli(*options, "--json").out)
    (made,) = json.loads(out.read_text())["tool_calls"]
    assert (made["name"], made["arguments"]) == ("add", {})
    assert cli("--replay", out).out.startswith("same: all ")
    assert_one_line(cli("stories", "Add", "--tools", tools), 2)
    assert_one_line(cli("stories", "--prompts", "-", "--tools", tools), 2)


def test_a_pipe_that_says_nothing_is_told_of() -> None:
    """PROMPT waits for what is piped to follow it; who forgot the pipe is told."""
    with subprocess.Popen(
        [*RUN, "stories", "Once", "-n", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        assert b"waiting for the text that follows PROMPT" in process.stderr.readline()
        process.stdin.close()
        assert process.wait(timeout=120) == 0


def test_a_long_list_of_prompts_says_how_far_it_is() -> None:
    with tinyllm.load("stories") as llm:
        seen: list[tuple[int, int]] = []
        texts = llm(["One", "Two", "Three"], max_tokens=4, progress=lambda *p: seen.append(p), temperature=0)
        alone = [llm(prompt, max_tokens=4, temperature=0).tokens for prompt in ("One", "Two", "Three")]
    assert [text.tokens for text in texts] == alone
    assert seen[-1] == (3, 3)
    assert seen == sorted(seen)
    assert len(seen) >= 3


def test_help_teaches(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    options = """-n -t -c --temp --top-k --top-p --min-p --repeat-penalty --seed --stop --system --chat
        --min-tokens --dry-multiplier --xtc-probability --suppress-tokens
        --no-chat --special --device --cache-type --weights --logprobs -f -e --prompts --json --replay
        --version --info"""
    for option in options.split():
        assert re.search(rf"(?m)^  .*{option}\b", text), option
    for code in ("0", "1", "2", "130"):
        assert re.search(rf"(?m)^  {code} +\w", text)
    assert max(map(len, text.splitlines())) <= 110


def test_version_and_info(cli: Cli) -> None:
    info = tinyllm.info()
    assert cli("--version").out.startswith(f"tinyllm {info['version']} ({info['isa']}, ")
    out = cli("--info").out
    assert all(re.search(rf"(?m)^{key} ", out) for key in info)


# --- the progress bar ---------------------------------------------------------------------------------------


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "shows"), [(0.5, False), (1.5, True)])
def test_the_bar_shows_after_a_second(monkeypatch: pytest.MonkeyPatch, seconds: float, shows: bool) -> None:
    clock: Iterable[float] = iter([0.0, seconds])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock, seconds))  # type: ignore[call-overload]
    monkeypatch.setattr(sys, "stderr", terminal := FakeTerminal())
    with common.progress_bar("loading") as progress:
        progress(10, 100)
    assert ("loading" in terminal.getvalue()) == shows


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    clock = iter([0.0])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock, 100.0))
    with common.progress_bar("loading") as progress:
        progress(10, 100)
    assert pipe.getvalue() == ""


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (3_910_000, "3.91 MB"), (7.5e9, "7.5 GB"), (2e12, "2 TB")]
)
def test_sizes(n: float, text: str) -> None:
    assert common.size(n) == text


@pytest.mark.parametrize(("s", "text"), [(0.0123, "12 ms"), (1.234, "1.23 s"), (75.0, "75.0 s")])
def test_seconds(s: float, text: str) -> None:
    assert common.seconds(s) == text


# --- what only a process can show ---------------------------------------------------------------------------


def test_as_a_process() -> None:
    done = subprocess.run(
        [*RUN, "stories", "Once upon a time", "-n", "3", "--temp", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [*RUN, "stories", "--prompts", "-", "-n", "1", "--top-k", "1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"Once\n" * 50)  # more output than the pipe or Python's buffer would hold
        process.stdin.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "Broken" not in errors


def test_usage_errors_need_no_model_and_no_numpy() -> None:
    code = "import sys; from tinyllm.cli.run import main; print(main(['--bogus']), 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 False\n"


def test_an_ascii_locale_does_not_break_the_text() -> None:
    done = subprocess.run(
        [*RUN, "stories", "Caf\u00e9", "-n", "2", "--json"],
        capture_output=True,
        env={
            **os.environ,
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
        },
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode())["prompt"] == "Café"


def test_one_token_is_no_plural(cli: Cli) -> None:
    result = cli("stories", "Once", "-n", "1")
    assert "ended after 1 token, as asked" in result.err
    assert re.search(r"generated +1 token  in", result.err)


def test_a_context_that_no_model_may_have(cli: Cli) -> None:
    result = cli("stories", "x", "-c", "99999999999")
    assert_one_line(result, 2)
    assert "context is 99999999999, expected 1 to 268435456" in result.err
