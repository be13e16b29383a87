"""What a name of a repository says: hf:ORG/REPO, a revision after @, a file or a quantization after a colon.

Imports `errors`. Read next: choose.py, which files a name means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tinyllm.errors import ArgumentError

HF, OLLAMA = "hf:", "ollama:"

_PART = r"[A-Za-z0-9_][\w.-]*"
# Texts, compiled when a name is read: importing is quick.
_REPO = rf"(?a)({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?(?::([^:]+))?"
# https://huggingface.co/ORG/REPO, .../blob/main/FILE, and ORG/REPO:QUANTIZATION as Ollama has it.
_ADDRESS = rf"(?a)({_PART}/{_PART})(?:/(?:blob|resolve)/[^/]+/([^?]+)|:([^:/]+)|/?(?:tree/[^?]*)?)(?:\?.*)?"


@dataclass(frozen=True)
class RepoName:
    """repo: "ORG/REPO". choice: a file's path in it, or a quantization; None: what choose.py takes."""

    repo: str
    revision: str | None = None
    choice: str | None = None

    def __str__(self) -> str:
        revision, choice = (f"@{self.revision}", f":{self.choice}")
        return HF + self.repo + revision * bool(self.revision) + choice * bool(self.choice)

    @staticmethod
    def of_address(path: str) -> RepoName | None:
        """Of a page of huggingface.co, given without the host; None for another kind of page."""
        match = re.fullmatch(_ADDRESS, path)
        return RepoName(match[1], choice=match[2] or match[3]) if match else None

    @staticmethod
    def looks_like(text: str) -> bool:
        """Whether it would be a repository's name with `hf:` before it."""
        return re.fullmatch(_REPO, text) is not None


def parse(name: str) -> RepoName:
    """Raises ArgumentError."""
    match = re.fullmatch(_REPO, name.removeprefix(HF))
    if not match:
        raise ArgumentError(
            f"{name!r} is no name of a model on Hugging Face; such are {HF}ORG/REPO, {HF}ORG/REPO:Q4_K_M, "
            f"{HF}ORG/REPO:FILE.gguf and {HF}ORG/REPO@REVISION"
        )
    return RepoName(match[1], match[2], match[3])
