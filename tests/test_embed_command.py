"""tinyllm-embed: the vectors of `llm.embed` in files, and errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from helpers_cli import Cli, in_process
from helpers_embed import EMBEDDERS, write_embedder

import tinyllm
from tinyllm.cli.embed import main

LINES = ["The cat sat.", "Ein Lama, « très » doux.", "x"]


@pytest.fixture(scope="module")
def vectors() -> Iterator[npt.NDArray[np.float32]]:
    with tinyllm.load("stories", device="cpu") as llm:
        yield llm.embed(LINES)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return in_process(main, monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["txt", "crlf", "strings", "objects"])
def test_a_file_of_texts(kind: str, cli: Cli, tmp_path: Path, vectors: npt.NDArray[np.float32]) -> None:
    texts = tmp_path / ("texts.txt" if kind in ("txt", "crlf") else "texts.jsonl")
    lines = [json.dumps(line if kind == "strings" else {"id": 5, "text": line}) for line in LINES]
    lines = LINES if kind in ("txt", "crlf") else lines
    end = "\r\n" if kind == "crlf" else "\n"
    texts.write_bytes((end.join(lines) + ("" if kind == "strings" else end)).encode())
    done = cli("stories", texts, "-o", tmp_path / "out.npy")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("3 vectors of 256 numbers in ")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors)


def test_lines_of_json(cli: Cli, tmp_path: Path, vectors: npt.NDArray[np.float32]) -> None:
    texts = "\n".join(LINES).encode()
    done = cli("stories", "-", stdin=texts)
    assert cli("stories", "-", "-o", tmp_path / "out.jsonl", stdin=texts).code == done.code == 0
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == done.out
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], np.float32), vectors)


def test_options_reach_the_vectors(cli: Cli, tmp_path: Path) -> None:
    path = write_embedder(tmp_path / "m", next(e for e in EMBEDDERS if e.name == "instructed"))
    with tinyllm.load(path, device="cpu") as llm:
        for options, expected in (
            (["--prompt", "document"], llm.embed(["x"], prompt="document")),
            (["--instruction", "No: "], llm.embed(["x"], instruction="No: ")),
            (["--instruction", "", "--pooling", "max"], llm.embed(["x"], instruction="", pooling="max")),
            (["--normalize"], llm.embed(["x"], normalize=True)),
            (["--no-normalize"], llm.embed(["x"], normalize=False)),
        ):
            assert cli(path, "-", "-o", tmp_path / "a.npy", *options, stdin=b"x").code == 0
            np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)


@pytest.mark.parametrize(
    ("name", "content", "options", "code", "words"),
    [
        ("a.txt", "a\n\nb\n", [], 2, "a.txt: line 2 is empty: an empty text has no vector"),
        ("a.txt", "", [], 2, "a.txt: there is no text in it"),
        (
            "a.jsonl",
            '"a"\n{"txt": "b"}\n',
            [],
            2,
            'line 2 is neither a JSON string nor an object with a "text"',
        ),
        ("a.jsonl", '"a"\nb\n', [], 2, "a.jsonl: line 2 is no JSON"),
        ("a.txt", "a", ["-o", "out.csv"], 2, "out.csv: the name of the output must end in .npy or .jsonl"),
        ("a.txt", "a", ["-o", "-"], 2, "a file is written, not a pipe"),
        ("a.txt", "a", ["-o", "none/out.npy"], 1, "cannot be written"),
        ("a.txt", "a", ["--prompt", "query"], 2, "prompt is 'query'; the prompts of"),
        ("a.txt", "a", ["--pooling", "min"], 2, "pooling is 'min', expected one of"),
        ("a.txt", "a", ["--prompt", "a", "--instruction", "b"], 2, "not allowed with argument"),
    ],
)
def test_errors_are_one_line(
    name: str, content: str, options: list[str], code: int, words: str, cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    done = cli("stories", name, *options)
    assert (done.code, done.out) == (code, "")
    assert words in done.err
    assert len(done.err.splitlines()) <= 2
    assert not (tmp_path / "out.npy").exists()


def test_help_names_what_there_is(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("--help")
    assert "-o vectors.npy" in capsys.readouterr().out
