"""Rows of files: answered as a call would, alike however they are batched, kept when they are wrong, gone on
with after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import Cli, in_process

import tinyllm
from tinyllm.batch import Job, Rows, row_seed, run_file
from tinyllm.batch.jobs import is_failed
from tinyllm.cli import batch

ROWS: list[dict[str, Any]] = [
    {"id": f"r{i}", "prompt": f"{name} had a", "max_tokens": 5 + 3 * i, "logprobs": i % 2 == 0}
    for i, name in enumerate(("Tom", "Lily", "Ben", "Anna", "Max"))
]
BAD: list[tuple[Any, str]] = [
    ({"prompt": "x", "temperature": -1}, "temperature is -1"),
    ({"prompt": "x", "tempertaure": 1}, "tempertaure: no such option of a row with a prompt"),
    ({"prompt": "x", "tools": []}, "tools: no such option of a row with a prompt"),
    ({"prompt": "x", "messages": []}, "one of the two"),
    ({}, "one of the two"),
    ({"prompt": ["a", "b"]}, "several prompts are several rows"),
    ({"prompt": [10**9]}, "ArgumentError"),
    ({"messages": [{"role": "user", "content": "x"}]}, "TemplateError"),
    ([1], "not list"),
    ({"prompt": "x", "max_tokens": "many"}, "TypeError"),
]


@pytest.fixture(scope="module")
def llm() -> tinyllm.LLM:
    return tinyllm.load("stories", device="cpu", threads=1)


def by_key(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {line.get("custom_id") or line["id"]: line for line in lines}
    assert len(found) == len(lines), "a row is there twice"
    return found


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_row_is_a_call_with_its_keys_seed(llm: tinyllm.LLM) -> None:
    rows = Rows(llm, seed=7, options={"temperature": 0.9})
    for result in rows.results((row["id"], row) for row in ROWS):
        row = next(row for row in ROWS if row["id"] == result["id"])
        seed = row_seed(7, row["id"])
        call = {name: value for name, value in row.items() if name not in ("id", "prompt")}
        made = llm(row["prompt"], seed=seed, temperature=0.9, **call)
        assert (result["text"], result["tokens"], result["seed"]) == (made.text, made.tokens, seed)
        assert (result["finish_reason"], result["error"]) == ("length", None)
        assert result["logprobs"] == made.logprobs


def test_seeds_are_of_base_and_key() -> None:
    seeds = {row_seed(seed, key) for seed in (0, 1) for key in ("a", "b", "ab")}
    assert len(seeds) == 6
    assert max(seeds) < 1 << 53
    assert row_seed(0, "a") == row_seed(0, "a")


def test_batches_and_order_change_nothing(llm: tinyllm.LLM) -> None:
    found = [
        by_key(list(Rows(llm, at_once=n).results((row["id"], row) for row in rows)))
        for n, rows in ((1, ROWS), (3, ROWS), (64, ROWS[::-1]))
    ]
    assert found[0] == found[1] == found[2]


def test_bad_rows_say_why_and_end_nobody_else(llm: tinyllm.LLM) -> None:
    pairs = [(f"bad{i}", row) for i, (row, _) in enumerate(BAD)]
    found = by_key(list(Rows(llm).results([*pairs, ("good", {"prompt": "Tom", "max_tokens": 3})])))
    assert len(found["good"]["tokens"]) == 3
    for i, (row, why) in enumerate(BAD):
        assert why in found[f"bad{i}"]["error"], row
        assert found[f"bad{i}"].keys() == found["good"].keys()
        assert is_failed(found[f"bad{i}"])


def test_forms_are_parsed(llm: tinyllm.LLM) -> None:
    pytest.importorskip("llguidance")
    rows = {
        "whole": {"prompt": "x", "regex": "[0-9]{3}"},
        "cut": {"prompt": "x", "regex": "[0-9]{300}", "max_tokens": 2},
    }
    found = by_key(list(Rows(llm).results(rows.items())))
    assert found["whole"]["parsed"] == found["whole"]["text"]
    assert len(found["whole"]["text"]) == 3
    assert "ConstraintError" in found["cut"]["error"]


@pytest.mark.parametrize(
    ("options", "match"),
    [({"seed": 1}, None), ({"nonsense": 1}, "nonsense"), ({"processors": []}, "processors")],
)
def test_options_are_checked_at_once(llm: tinyllm.LLM, options: dict[str, Any], match: str | None) -> None:
    if match is None:
        Rows(llm, options=options)
    else:
        with pytest.raises(tinyllm.ArgumentError, match=match):
            Rows(llm, options=options)


# OpenAI's format


def openai(key: str, body: object, url: str = "/v1/completions", **more: object) -> dict[str, Any]:
    return {"custom_id": key, "method": "POST", "url": url, "body": body, **more}


def test_openai_rows_are_what_the_server_answers(llm: tinyllm.LLM) -> None:
    pytest.importorskip("starlette")
    rows = [
        openai("a", {"model": "m", "prompt": "Tom had", "max_tokens": 7}),
        openai("vectors", {"model": "m", "input": "Tom"}, "/v1/embeddings"),
        openai("other", {"model": "gpt-9", "prompt": "x"}),
        openai("stream", {"model": "m", "prompt": "x", "stream": True}),
        openai("where", {"model": "m"}, "/v1/images"),
        openai("get", {"model": "m"}, method="GET"),
        openai("more", {"model": "m"}, headers={}),
        openai("wrong", {"model": "m", "prompt": "x", "tempertaure": 1}),
        openai("none", None),
    ]
    name = llm.name
    try:
        found = by_key(list(Rows(llm, seed=3, name="m").results((row["custom_id"], row) for row in rows)))
    finally:
        llm.name = name
    body = found["a"]["response"]["body"]
    expected = llm("Tom had", max_tokens=7, seed=row_seed(3, "a"))
    assert found["a"]["response"]["status_code"] == 200
    assert body["choices"][0]["text"] == expected.text
    assert body["usage"]["completion_tokens"] == 7
    assert len(found["vectors"]["response"]["body"]["data"][0]["embedding"]) == llm.config.dim
    assert found["other"]["response"]["status_code"] == 404
    assert found["wrong"]["response"]["status_code"] == 400
    assert "tempertaure" in found["wrong"]["response"]["body"]["error"]["message"]
    for key, why in (("stream", "stream"), ("where", "/v1/images"), ("get", "GET"), ("more", "headers")):
        assert found[key]["response"] is None
        assert why in found[key]["error"]["message"]
    assert "no object" in found["none"]["error"]["message"]
    assert [key for key, line in found.items() if not is_failed(line)] == ["a", "vectors"] or {
        key for key, line in found.items() if not is_failed(line)
    } == {"a", "vectors"}


# Files


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return in_process(batch.main, monkeypatch, capsys, "stories")


def test_a_file_is_answered_and_gone_on_with(cli: Cli, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    assert cli(source, out, "--seed", "5").code == 0
    whole = out.read_bytes()
    found = by_key(read(out))
    assert found.keys() == {row["id"] for row in ROWS}
    again = cli(source, out, "--seed", "5")
    assert again.code == 0
    assert "0 of 5 rows done, 5 were there before" in again.err
    assert out.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:-9])  # as a kill in the middle of a line leaves it
    assert "3 of 5 rows done, 2 were there before" in cli(source, out, "--seed", "5").err
    assert by_key(read(out)) == found
    write(source, [*ROWS, {"id": "new", "prompt": "x", "max_tokens": 2}])
    assert "1 of 6 rows done" in cli(source, out, "--seed", "5").err


def test_failed_rows_are_kept_and_told(cli: Cli, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Tom", "max_tokens": 2}\n\nnot json\n{"prompt": ', encoding="utf-8")
    done = cli(source, out)
    assert done.code == 1
    assert "3 of 3 rows done, 2 rows failed" in done.err
    found = by_key(read(out))
    assert found.keys() == {"line-1", "line-3", "line-4"}
    assert found["line-1"]["error"] is None


def test_what_does_not_belong_together_is_refused(cli: Cli, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    twice = write(tmp_path / "twice.jsonl", [ROWS[0], ROWS[0]])
    assert "line 2: the key 'r0' was there before" in cli(twice, out).err
    assert "no such file" in cli(tmp_path / "none", out).err
    assert cli(source, out).code == 0
    assert "begun by another job" in cli(source, out, "--seed", "1").err
    assert "begun by another job" in cli(source, out, "--temp", "0.1").err
    assert "results of rows that" in cli(write(tmp_path / "other.jsonl", ROWS[1:2]), out).err
    (tmp_path / "out.jsonl.job").unlink()
    assert "no out.jsonl.job beside it" in cli(source, out).err
    (tmp_path / "text").write_text("mine\n", encoding="utf-8")
    assert cli(source, tmp_path / "text").code == 2
    assert (tmp_path / "text").read_text(encoding="utf-8") == "mine\n"
    assert "cannot be written" in cli(source, tmp_path / "no" / "out").err
    assert cli(source, out, "--workers", "2").code == 2


def test_a_killed_run_loses_no_row_and_no_bit(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": f"{i} dogs", "max_tokens": 40} for i in range(60)]
    source, out, whole = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    command = [sys.executable, "-m", "tinyllm", "batch", "stories", str(source)]
    options = ["--threads", "1", "--at-once", "4"]
    process = subprocess.Popen([*command, str(out), *options], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_before = out.read_bytes().count(b"\n")
    assert 0 < n_before < 60, "it was killed too early or too late to show anything"
    for path in (out, whole):
        subprocess.run([*command, str(path), *options], check=True, stderr=subprocess.DEVNULL, timeout=120)
    assert by_key(read(out)) == by_key(read(whole))
    assert len(read(out)) == 60


def test_lost_machines_end_the_run_and_not_the_row(
    llm: tinyllm.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(*_: object, **__: object) -> None:
        raise tinyllm.LostError("gone")

    source, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    job = Job(llm.identity, 0, {})
    with monkeypatch.context() as patched:
        patched.setattr(llm, "acall", lost)
        with pytest.raises(tinyllm.LostError):
            run_file(Rows(llm).results, source, out, job)
    assert out.read_bytes() == b""
    assert run_file(Rows(llm).results, source, out, job).done == len(ROWS)
    assert os.path.exists(f"{out}.job")
