"""Models that other programs fetched, and names for them: `hf:ORG/REPO:Q4_K_M` in the cache of Hugging Face,
`ollama:llama3.2` in Ollama's.

Only `pull`, and a name that begins with `hf:`, ever open a connection; what the cache already has is used
without one. Imports `files` and `errors`, and huggingface_hub only for such a name. Read next: names.py, then
choose.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from tinyllm.errors import ArgumentError
from tinyllm.hub.names import HF, OLLAMA, RepoName, parse

__all__ = ["find", "is_name", "pull", "suggestion"]


def is_name(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names a model by where it comes from, and not a file."""
    return os.fspath(path).startswith((HF, OLLAMA))


def find(name: str | os.PathLike[str]) -> Path:
    """The file or directory of a name, fetched first where it begins with `hf:` and is not in the cache.

    Raises ArgumentError for a name that is none, NotFoundError, ReadError (no connection, no permission, an
    answer that is not what was asked for), UnsupportedError.
    """
    text = os.fspath(name)
    if text.startswith(OLLAMA):
        from tinyllm.hub import ollama

        return ollama.model_file(text.removeprefix(OLLAMA))
    from tinyllm.hub import huggingface

    return huggingface.find(parse(text))


def pull(name: str) -> Path:
    """Fetches a model from Hugging Face into its cache, what of it is not there, and returns its path for
    `load`.

    name: "ORG/REPO", "ORG/REPO:Q4_K_M" (a quantization, in capitals or not), "ORG/REPO:FILE.gguf",
    "ORG/REPO@REVISION"; `hf:` may stand before it. A split GGUF is fetched whole. Of a repository without
    GGUF files its safetensors, config and tokenizer are. What was fetched is compared with the hub's
    checksums; what was begun before goes on where it ended. HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and HF_ENDPOINT
    mean what they mean to huggingface_hub, which draws the progress on a terminal's stderr.

    Raises ArgumentError, NotFoundError, ReadError, UnsupportedError.
    """
    if name.startswith(OLLAMA):
        raise ArgumentError(f"{name}: Ollama fetches its models itself; tinyllm runs them where they are")
    from tinyllm.hub import huggingface

    return huggingface.pull(parse(name if name.startswith(HF) else HF + name))


def suggestion(path: str) -> str:
    """What somebody may have meant with a path that is none, as the end of an error; "" where nothing is
    likely."""
    from tinyllm.hub import ollama

    address = path.removeprefix("https://").removeprefix("http://").removeprefix("www.")
    for host in ("huggingface.co/", "hf.co/"):
        if address.startswith(host):
            repo = RepoName.of_address(address.removeprefix(host))
            return f"; {repo} would fetch it from Hugging Face" if repo else ""
    if path.endswith((".gguf", ".safetensors")):
        return ""
    if found := ollama.known(path):
        return f"; {OLLAMA}{found} is one of Ollama's models"
    if RepoName.looks_like(path):
        return f"; {HF}{path} would fetch it from Hugging Face"
    if os.sep not in path:
        return f"; names of models of others begin with {HF} (as {HF}ORG/REPO) or {OLLAMA}"
    return ""
