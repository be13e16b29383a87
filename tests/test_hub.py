"""Names of models elsewhere: fetched from a stand-in of the hub, found in caches, and never a connection
unasked.

tests/helpers_hub.py is the stand-in; huggingface_hub is the real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_cli import Result, in_process
from helpers_hub import COMMIT, Hub, serving
from helpers_models import golden_model, golden_spec
from huggingface_hub import constants

import tinyllm
from tinyllm import hub as names
from tinyllm.cli.commands import main
from tinyllm.hub import huggingface, ollama
from tinyllm.hub.cached import cached_models
from tinyllm.hub.choose import choose
from tinyllm.hub.names import RepoName, parse
from tinyllm.modelfiles import BUNDLED, model_path

STORIES = BUNDLED["stories"].read_bytes()
BROKEN = STORIES[:-1] + bytes([STORIES[-1] ^ 1])


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A Hugging Face directory, by its files."""
    path = golden_model(golden_spec("llama3"), tmp_path_factory.mktemp("directory"))
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def running(directory: dict[str, bytes]) -> Iterator[Hub]:
    """The stand-in."""
    repos = {
        "org/stories-GGUF": {
            "README.md": b"# Stories",
            "stories-Q8_0.gguf": STORIES,
            "stories-q4_k_m.gguf": STORIES,
            "mmproj-stories-f16.gguf": b"GGUF",
        },
        "org/split": {f"s-f16-0000{i}-of-00002.gguf": STORIES[:100] for i in (1, 2)} | {"one.gguf": STORIES},
        "org/directory": {**directory, "pytorch_model.bin": b"no", "onnx/model.onnx": b"no"},
        "org/pickle": {"config.json": b"{}", "pytorch_model.bin": b"no"},
        "org/gated": {"a.gguf": STORIES},
    }
    with serving(repos) as hub:
        yield hub


@pytest.fixture
def hub(running: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in in place of the hub, and empty caches of all kinds."""
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "llama.cpp"))
    running.gated, running.sends, running.breaks_at, running.gone = {"org/gated"}, {}, {}, set()
    running.asked.clear()
    running.ranges.clear()
    return running


# --- choosing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("Q4_K_S", "m-Q4_K_S.gguf"),
        ("f16", "m-f16.gguf"),
        ("bf16", "BF16/m-BF16-00001-of-00002.gguf"),
        ("m-Q4_K_S.gguf", "m-Q4_K_S.gguf"),
        ("BF16/m-BF16-00002-of-00002.gguf", "BF16/m-BF16-00001-of-00002.gguf"),
        ("mmproj-m-f16.gguf", "mmproj-m-f16.gguf"),
        (None, "m-Q4_K_M.gguf"),
    ],
)
def test_a_choice_is_a_file_or_a_quantization(choice: str | None, expected: str) -> None:
    files = [
        *("m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-f16.gguf", "mmproj-m-f16.gguf", "imatrix.gguf", "README.md"),
        *(f"BF16/m-BF16-0000{i}-of-00002.gguf" for i in (1, 2)),
    ]
    assert choose(files, choice, "hf:a/b").load == expected


def test_a_split_model_is_taken_whole_or_not_at_all() -> None:
    parts = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert choose(parts, None, "hf:a/b") == (tuple(parts), parts[0])
    with pytest.raises(tinyllm.NotFoundError, match=r"hf:a/b: of m 2 of 3 parts are there"):
        choose(parts[:2], None, "hf:a/b")


@pytest.mark.parametrize(
    ("files", "choice", "error", "words"),
    [
        (
            ["a-Q8_0.gguf", "b-Q6_K.gguf"],
            None,
            tinyllm.ArgumentError,
            "several models, name one: :Q8_0, :Q6_K",
        ),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "q8_0", tinyllm.ArgumentError, ":a-Q8_0.gguf, :b-Q8_0.gguf"),
        (["a-Q8_0.gguf"], "Q8", tinyllm.NotFoundError, "hf:a/b has no Q8; it has :Q8_0"),
        (["a-Q4_K_M.gguf"], "Q4_K", tinyllm.NotFoundError, "it has :Q4_K_M"),
        (["model.safetensors", "config.json"], "Q8_0", tinyllm.NotFoundError, "--weights"),
        (["pytorch_model.bin"], None, tinyllm.UnsupportedError, "neither GGUF files nor safetensors"),
        (["pytorch_model.bin"], "Q8_0", tinyllm.UnsupportedError, "neither GGUF files nor safetensors"),
    ],
)
def test_a_choice_is_never_guessed(
    files: list[str], choice: str | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        choose(files, choice, "hf:a/b")


@pytest.mark.parametrize(
    "name", ["hf:", "hf:a", "hf:a/b/c", "hf:a/b:", "hf:../b", "hf:a/b@../c", "hf:a/b:c:d"]
)
def test_a_name_that_is_none_is_told_what_names_are(name: str) -> None:
    with pytest.raises(tinyllm.ArgumentError, match=r"such are hf:ORG/REPO, hf:ORG/REPO:Q4_K_M"):
        tinyllm.load(name)


def test_names_are_written_as_they_are_read() -> None:
    for text in ("hf:a/b", "hf:a/b@v1", "hf:a/b:Q4_0", "hf:a/b@refs/pr/1:c/d.gguf"):
        assert str(parse(text)) == text


# --- fetching -----------------------------------------------------------------------------------------------


def test_load_fetches_once_and_then_asks_nobody(hub: Hub) -> None:
    with tinyllm.load("hf:org/stories-GGUF:q8_0") as llm:
        text = llm("Once upon a time", max_tokens=8, temperature=0).text
    with tinyllm.load("stories") as llm:
        assert text == llm("Once upon a time", max_tokens=8, temperature=0).text
    assert "GET /org/stories-GGUF/resolve/" + COMMIT + "/stories-Q8_0.gguf" in hub.asked
    assert not [line for line in hub.asked if "q4_k_m" in line or "README" in line]
    hub.asked.clear()
    tinyllm.load("hf:org/stories-GGUF:Q8_0").close()
    assert hub.asked == []


def test_a_directory_is_fetched_without_what_nobody_reads(hub: Hub, directory: dict[str, bytes]) -> None:
    path = tinyllm.pull("org/directory")
    there = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert {"config.json", "model.safetensors"} <= there <= set(directory)
    with tinyllm.load("hf:org/directory") as llm:
        assert llm.logits([1, 2]).shape[0] == 2


def test_pull_goes_on_where_it_ended(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MB nothing would have been written
    hub.breaks_at["stories-Q8_0.gguf"] = 2500
    with pytest.raises(tinyllm.ReadError, match=r"Q8_0: the hub answers: .*503"):
        tinyllm.pull("hf:org/stories-GGUF:Q8_0")
    hub.gone.clear()
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 20)
    path = tinyllm.pull("hf:org/stories-GGUF:Q8_0")
    assert path.read_bytes() == STORIES
    assert hub.ranges == ["stories-Q8_0.gguf bytes=2000-"]
    assert not list(path.parents[2].rglob("*.tinyllm-part"))


def test_what_differs_from_its_checksum_is_removed(hub: Hub) -> None:
    hub.sends["stories-Q8_0.gguf"] = BROKEN
    with pytest.raises(tinyllm.ReadError, match=r"Q8_0.gguf is not what the hub says it is \(checksum"):
        tinyllm.pull("org/stories-GGUF:Q8_0")
    hub.sends.clear()
    assert tinyllm.pull("org/stories-GGUF:Q8_0").read_bytes() == STORIES


def test_small_files_are_checked_too(hub: Hub, directory: dict[str, bytes]) -> None:
    hub.sends["config.json"] = b" " * len(directory["config.json"])
    with pytest.raises(tinyllm.ReadError, match=r"config.json is not what the hub says it is"):
        tinyllm.pull("org/directory")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("hf:org/none", tinyllm.NotFoundError, "no such repository (or a private one"),
        ("hf:org/stories-GGUF@v9:Q8_0", tinyllm.NotFoundError, "the repository has no revision v9"),
        ("hf:org/gated", tinyllm.ReadError, "accept their terms on https://huggingface.co/org/gated"),
        ("hf:org/pickle", tinyllm.UnsupportedError, "neither GGUF files nor safetensors"),
        ("hf:org/stories-GGUF:Q2_K", tinyllm.NotFoundError, "has no Q2_K; it has :Q8_0, :q4_k_m"),
        ("hf:org/split", tinyllm.ArgumentError, "several models"),
    ],
)
def test_what_cannot_be_had_says_why(hub: Hub, name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        tinyllm.load(name)


def test_without_a_connection_the_cache_answers(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    tinyllm.pull("org/stories-GGUF")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    with caplog.at_level(logging.WARNING, "tinyllm"):
        assert tinyllm.pull("org/stories-GGUF").name == "stories-q4_k_m.gguf"
    assert "cannot be fetched" in caplog.text
    assert "the files in the cache are used" in caplog.text
    with pytest.raises(tinyllm.ReadError, match="hf:org/split: cannot be fetched"):
        tinyllm.pull("org/split")


def test_offline_opens_no_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    tinyllm.pull("org/stories-GGUF:Q8_0")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert names.find("hf:org/stories-GGUF").name == "stories-Q8_0.gguf", "the one that the cache has"
    with pytest.raises(tinyllm.ReadError, match="HF_HUB_OFFLINE is set, so nothing is fetched"):
        names.find("hf:org/stories-GGUF:q4_k_m")
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["org/stories-GGUF", "https://huggingface.co/a/b", "ollama:a", "stories", "a"]
)
def test_only_names_that_begin_with_hf_open_a_connection(hub: Hub, name: str) -> None:
    with contextlib.suppress(tinyllm.NotFoundError):
        model_path(name)
    assert hub.asked == []


def test_a_path_wins_over_a_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hf:org").mkdir()
    Path("hf:org/stories-GGUF:Q8_0").write_bytes(STORIES)
    tinyllm.load("hf:org/stories-GGUF:Q8_0").close()
    assert hub.asked == []


# --- what somebody may have meant ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("Qwen/Qwen3-0.6B-GGUF:Q8_0", "hf:Qwen/Qwen3-0.6B-GGUF:Q8_0 would fetch it"),
        ("https://huggingface.co/a/b", "hf:a/b would"),
        ("https://huggingface.co/a/b/tree/main", "hf:a/b would"),
        ("https://huggingface.co/a/b/blob/main/c.gguf?x=1", "hf:a/b:c.gguf would"),
        ("hf.co/a/b:Q8_0", "hf:a/b:Q8_0 would"),
        ("llama3.2", "begin with hf: (as hf:ORG/REPO) or ollama:"),
    ],
)
def test_a_bare_name_suggests_where_it_may_be_had(hub: Hub, typed: str, meant: str) -> None:
    with pytest.raises(tinyllm.NotFoundError, match=re.escape(meant)):
        tinyllm.load(typed)


@pytest.mark.parametrize("typed", ["model.gguf", "models/model.gguf", "./a/b", "/no/such/file", "~/a/b"])
def test_a_path_suggests_nothing(hub: Hub, typed: str) -> None:
    with pytest.raises(tinyllm.NotFoundError) as error:
        tinyllm.load(typed)
    assert "hf:" not in str(error.value)


# --- Ollama -------------------------------------------------------------------------------------------------


def put_ollama(root: Path, name: str, content: bytes = STORIES, **layers: bytes) -> Path:
    """A model as Ollama keeps it; its blob. name: "HOST/OWNER/MODEL/TAG"."""
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    described = []
    for kind, data in {"model": content, **layers}.items():
        digest = hashlib.sha256(data).hexdigest()
        (root / "blobs" / f"sha256-{digest}").write_bytes(data)
        media = f"application/vnd.ollama.image.{kind}"
        described.append({"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)})
    manifest = root / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": described}))
    return root / "blobs" / str(described[0]["digest"]).replace(":", "-")


def test_ollamas_models_run_where_they_lie(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "ollama"
    blob = put_ollama(root, "registry.ollama.ai/library/stories/latest", system=b"Be kind.", license=b"MIT")
    with caplog.at_level(logging.WARNING, "tinyllm"), tinyllm.load("ollama:stories") as llm:
        assert llm.name == str(blob)
    assert "ollama:stories: Ollama's own system are not used" in caplog.text
    for name, manifest in {
        "stories:1b": "registry.ollama.ai/library/stories/1b",
        "me/stories": "registry.ollama.ai/me/stories/latest",
        "hf.co/me/stories:Q8_0": "hf.co/me/stories/Q8_0",
    }.items():
        put_ollama(root, manifest)
        assert names.find(f"ollama:{name}") == blob
    with pytest.raises(tinyllm.NotFoundError, match="ollama:stories:1b is one of Ollama's models"):
        tinyllm.load("stories:1b")


def test_what_ollama_lacks_or_lost_is_told(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "ollama"
    for name in ("none", "a/b/c/d", "../x", "a/../b", ":tag"):
        with pytest.raises(tinyllm.Error, match=r"Ollama has no such model|no name of a model of Ollama's"):
            tinyllm.load(f"ollama:{name}")
    blob = put_ollama(root, "registry.ollama.ai/library/cut/latest")
    blob.write_bytes(STORIES[:-1])
    with pytest.raises(tinyllm.ReadError, match=r"bytes, ollama:cut says"):
        tinyllm.load("ollama:cut")
    blob.unlink()
    with pytest.raises(tinyllm.NotFoundError, match=r"`ollama pull` brings it again"):
        tinyllm.load("ollama:cut")
    put_ollama(root, "registry.ollama.ai/library/tuned/latest", adapter=b"GGUF")
    with pytest.raises(tinyllm.UnsupportedError, match="has an adapter"):
        tinyllm.load("ollama:tuned")
    (root / "manifests/registry.ollama.ai/library/cut/latest").write_text(
        '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "../../etc/passwd"}]}'
    )
    with pytest.raises(tinyllm.FormatError, match="the digest of its model is"):
        tinyllm.load("ollama:cut")
    assert [name for name, *_ in ollama.models()] == []


# --- the commands -------------------------------------------------------------------------------------------


def test_list_shows_the_caches_by_names_that_run(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = in_process(main, monkeypatch, capsys)
    assert "no models in the caches" in cli("list").err
    for name in ("org/stories-GGUF:Q8_0", "org/directory"):
        tinyllm.pull(name)
    put_ollama(tmp_path / "ollama", "registry.ollama.ai/library/stories/latest")
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "org_a.gguf").write_bytes(STORIES)
    hub.asked.clear()
    found = {model["name"]: model for model in json.loads(cli("list", "--json").out)}
    llama_cpp = str(tmp_path / "llama.cpp" / "org_a.gguf")
    assert list(found) == ["hf:org/directory", "hf:org/stories-GGUF:Q8_0", "ollama:stories", llama_cpp]
    assert found["ollama:stories"]["n_bytes"] == len(STORIES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, model in found.items():
        assert model_path(name) == Path(model["path"])
    table = cli("list").out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == list(found)
    assert hub.asked == []


def test_a_model_that_is_not_whole_is_not_listed(hub: Hub) -> None:
    tinyllm.pull("org/split:one.gguf")
    snapshot = huggingface.snapshot_of(RepoName("org/split"))
    assert snapshot is not None
    (snapshot / "s-f16-00001-of-00002.gguf").write_bytes(b"GGUF")
    (snapshot / "gone.gguf").symlink_to("nowhere")
    assert [model.name for model in cached_models()] == ["hf:org/split:one.gguf"]


def test_the_commands_do_it_all_by_the_environment(hub: Hub, tmp_path: Path) -> None:
    """In processes of their own, as people call them, with the variables of huggingface_hub."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    def tinyllm_(*argv: str, **more: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "tinyllm", *argv],
            env=env | more,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    pulled = tinyllm_("pull", "org/stories-GGUF:q4_k_m")
    assert pulled.code == 0, pulled.err
    assert Path(pulled.out.strip()).read_bytes() == STORIES
    assert "tinyllm run hf:org/stories-GGUF:q4_k_m" in pulled.err
    hub.asked.clear()
    ran = tinyllm_("run", "hf:org/stories-GGUF:q4_k_m", "Once", "-n", "4", "--temp", "0", HF_HUB_OFFLINE="1")
    assert ran.code == 0, ran.err
    assert ran.out.strip()
    refused = tinyllm_("run", "hf:org/stories-GGUF:Q8_0", "Once", HF_HUB_OFFLINE="1")
    assert refused.code == 1
    assert refused.err == (
        "tinyllm run: hf:org/stories-GGUF:Q8_0: HF_HUB_OFFLINE is set, so nothing is fetched\n"
    )
    assert hub.asked == []
