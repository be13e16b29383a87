"""Ollama's models, where they lie: a manifest of JSON names blobs, one of which is a plain GGUF file.

Nothing is written there and no connection opened. Of the other layers (a template in Go's language, a system
prompt, parameters) none is used, which a warning says; the GGUF has a chat template of its own. Imports
`files` and `errors`. Read next: cached.py.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllm.errors import ArgumentError, Error, FormatError, NotFoundError, ReadError, UnsupportedError
from tinyllm.files import read_json, show

HOST, OWNER, TAG = "registry.ollama.ai", "library", "latest"  # what a short name leaves out
SHARED = Path("/usr/share/ollama/.ollama/models")  # of the service that Linux packages install
_LAYER = "application/vnd.ollama.image."
_PART = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)

log = logging.getLogger(__name__)


def folders() -> list[Path]:
    """Where Ollama may keep models."""
    if asked := os.environ.get("OLLAMA_MODELS"):
        return [Path(asked).expanduser()]
    return [Path("~/.ollama/models").expanduser(), SHARED]


def model_file(name: str) -> Path:
    """The GGUF of "llama3.2", "llama3.2:1b" or "HOST/OWNER/MODEL:TAG".

    Raises ArgumentError, NotFoundError, FormatError, UnsupportedError, ReadError for a blob that is not
    whole.
    """
    parts = _parts(name)
    if parts is None:
        raise ArgumentError(f"ollama:{name} is no name of a model of Ollama's, such as ollama:llama3.2:1b")
    for folder in folders():
        manifest = folder.joinpath("manifests", *parts)
        if manifest.is_file():
            layers = _layers(manifest)
            blob = _gguf(folder, layers, f"ollama:{name}")
            unused = sorted({"system", "params", "messages", "template"} & layers.keys())
            if unused:
                log.warning(
                    "ollama:%s: Ollama's own %s are not used; the file's chat template and settings are",
                    name,
                    ", ".join(unused),
                )
            return blob
    where = ", ".join(str(folder) for folder in folders())
    raise NotFoundError(
        f"ollama:{name}: Ollama has no such model in {where}; `tinyllm list` shows those it has"
    )


def known(name: str) -> str | None:
    """The name, if Ollama has a model of it."""
    parts = _parts(name)
    there = parts and any(folder.joinpath("manifests", *parts).is_file() for folder in folders())
    return name if there else None


def models() -> Iterator[tuple[str, Path, int]]:
    """(name, GGUF, bytes) of every model that can be run here; what is broken or of another kind is left
    out."""
    for folder in folders():
        root = folder / "manifests"
        for manifest in sorted(root.glob("*/*/*/*")) if root.is_dir() else ():
            try:
                blob = _gguf(folder, _layers(manifest), manifest.name)
            except Error as error:
                log.info("%s is left out: %s", manifest, error)
                continue
            yield _short(manifest.relative_to(root).parts), blob, blob.stat().st_size


def _parts(name: str) -> tuple[str, str, str, str] | None:
    """(host, owner, model, tag); None for what Ollama would not take, which might climb out of the folder."""
    *lead, last = name.split("/")
    model, _, tag = last.partition(":")
    if len(lead) > 2:
        return None
    host, owner = ([HOST, OWNER, *lead])[-2:] if len(lead) != 1 else (HOST, lead[0])
    parts = (host, owner, model, tag or TAG)
    return parts if all(_PART.fullmatch(part) for part in parts) else None


def _short(parts: tuple[str, ...]) -> str:
    host, owner, model, tag = parts
    lead = "" if (host, owner) == (HOST, OWNER) else f"{owner}/" if host == HOST else f"{host}/{owner}/"
    return f"{lead}{model}" + ("" if tag == TAG else f":{tag}")


def _layers(manifest: Path) -> dict[str, dict[str, Any]]:
    """The first layer of each kind: "model", "template", ..."""
    layers = read_json(manifest).get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise FormatError(f"{manifest}: has no list of layers")
    found: dict[str, dict[str, Any]] = {}
    for layer in layers:
        kind = str(layer.get("mediaType")).partition(";")[0]
        if kind.startswith(_LAYER):
            found.setdefault(kind.removeprefix(_LAYER), layer)
    return found


def _gguf(folder: Path, layers: dict[str, dict[str, Any]], name: str) -> Path:
    if "adapter" in layers:
        raise UnsupportedError(f"{name}: has an adapter, which is not supported")
    if "model" not in layers:
        raise UnsupportedError(f"{name}: has no GGUF (its layers: {', '.join(sorted(layers)) or 'none'})")
    digest, size = layers["model"].get("digest"), layers["model"].get("size")
    if not isinstance(digest, str) or not re.fullmatch(r"sha256[:-][0-9a-f]{64}", digest):
        raise FormatError(f"{name}: the digest of its model is {show(str(digest))}")
    blob = folder / "blobs" / digest.replace(":", "-")
    if not blob.is_file():
        raise NotFoundError(
            f"{blob}: {name} names this file, which is not there; `ollama pull` brings it again"
        )
    if isinstance(size, int) and blob.stat().st_size != size:
        raise ReadError(
            f"{blob}: {blob.stat().st_size} bytes, {name} says {size}; `ollama pull` brings it again"
        )
    return blob
