"""Models of the Hugging Face Hub, for `Llama.from_pretrained`: which files, and where they lie then.

huggingface_hub downloads them, into its own cache. Nothing else of this package opens a connection. Imports
errors. llama.py calls it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from tinyllm.errors import ArgumentError, UnsupportedError


def download(
    repo_id: str,
    filename: str,
    additional_files: Sequence[str] = (),
    *,
    local_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """The path of the one file of a repository that `filename`, a name or a pattern ("*q4_k_m.gguf"), is for;
    those of `additional_files` come too. Raises ArgumentError (a ValueError) where a pattern fits none or
    several, and what huggingface_hub raises."""
    hub = _hub()
    there = hub.list_repo_files(repo_id)
    names = [_only(repo_id, pattern, there) for pattern in (filename, *additional_files)]
    paths: list[str] = [
        hub.hf_hub_download(repo_id, name, local_dir=local_dir, cache_dir=cache_dir) for name in names
    ]
    return paths[0]


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UnsupportedError(
            "from_pretrained needs the package huggingface_hub: pip install huggingface_hub"
        ) from None
    return huggingface_hub


def _only(repo_id: str, pattern: str, names: Sequence[str]) -> str:
    found = [name for name in names if fnmatch(name, pattern)]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} files fit" if found else "no file fits"
    raise ArgumentError(f"{what} {pattern!r} in {repo_id}: {', '.join(found or names)}")
