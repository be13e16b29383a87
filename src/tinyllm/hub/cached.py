"""What models lie in the caches of Hugging Face, Ollama and llama.cpp, each by a name that runs it.

Reads folders and Ollama's manifests, no model, and opens no connection. Imports the rest of this package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.hub import huggingface, ollama
from tinyllm.hub.choose import choose, gguf_sets, short
from tinyllm.hub.names import OLLAMA, RepoName


@dataclass(frozen=True)
class CachedModel:
    """name: what `load` and the commands take. path: the file, of a split model the first, or the directory.
    cache: "Hugging Face", "Ollama" or "llama.cpp"."""

    name: str
    n_bytes: int
    path: Path
    cache: str


def cached_models() -> list[CachedModel]:
    """All of them, cache by cache."""
    return [*_of_hugging_face(), *_of_ollama(), *_of_llama_cpp()]


def _of_hugging_face() -> Iterator[CachedModel]:
    root = huggingface.cache_folder()
    for home in sorted(root.glob("models--*--*")) if root.is_dir() else ():
        name = RepoName(home.name.removeprefix("models--").replace("--", "/", 1))
        refs = [
            ref.relative_to(home / "refs").as_posix() for ref in (home / "refs").rglob("*") if ref.is_file()
        ]
        for revision in sorted(refs, key=lambda ref: (ref != "main", ref)):
            there = RepoName(name.repo, None if revision == "main" else revision)
            if snapshot := huggingface.snapshot_of(there):
                yield from _in_snapshot(there, snapshot)


def _in_snapshot(name: RepoName, snapshot: Path) -> Iterator[CachedModel]:
    files = huggingface.files_in(snapshot)
    sets = gguf_sets(files)
    choices = [short(gguf, sets) for gguf in sets]
    if "config.json" in files and any(file.endswith(".safetensors") for file in files):
        choices.append("")
    for choice in choices:
        try:
            chosen = choose(files, choice or None, str(name))
        except Error:
            continue  # not whole
        n_bytes = sum((snapshot / file).stat().st_size for file in chosen.files)
        full = RepoName(name.repo, name.revision, choice or None)
        yield CachedModel(str(full), n_bytes, snapshot / chosen.load, "Hugging Face")


def _of_ollama() -> Iterator[CachedModel]:
    for name, path, n_bytes in ollama.models():
        yield CachedModel(OLLAMA + name, n_bytes, path, "Ollama")


def llama_cpp_folder() -> Path:
    """Where llama.cpp keeps what it fetched; newer ones use Hugging Face's cache, unless LLAMA_CACHE is
    set."""
    if asked := os.environ.get("LLAMA_CACHE"):
        return Path(asked).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches/llama.cpp").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llama.cpp"


def _of_llama_cpp() -> Iterator[CachedModel]:
    folder = llama_cpp_folder()
    patterns = ("*.gguf", "models--*/snapshots/*/**/*.gguf")
    files = [path for pattern in patterns for path in folder.glob(pattern)] if folder.is_dir() else []
    there = [path.relative_to(folder).as_posix() for path in files if path.is_file()]
    for parts in gguf_sets(there).values():
        n_bytes = sum((folder / part).stat().st_size for part in parts)
        yield CachedModel(str(folder / parts[0]), n_bytes, folder / parts[0], "llama.cpp")
