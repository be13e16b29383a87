"""Which files of a repository a name means: a GGUF, whole where it is split, or what a safetensors directory
is made of. Knows names alone, and opens nothing.

Never guesses between models: one is taken where the name fits one, or where it is the customary Q4_K_M.
Imports `errors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from tinyllm.errors import ArgumentError, NotFoundError, UnsupportedError

USUAL = "Q4_K_M"  # where a repository has several and the name chooses none
QUANTIZATION = re.compile(r"(?:UD-)?(?:I?Q\d\w*|MXFP4\w*|BF16|F16|F32)", re.IGNORECASE | re.ASCII)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.ASCII)
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
# Of a repository's own folder: weights as read_safetensors looks for them, and what is read beside them.
_OF_DIRECTORY = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|[^/]*\.json|tokenizer\.model|vocab\.txt|merges\.txt|"
    r"chat_template\.jinja|additional_chat_templates/[^/]+\.jinja|\d_[A-Za-z]+/config\.json"
)


class Chosen(NamedTuple):
    """The files to have, and which of them `load` is given: "" for the directory that they lie in."""

    files: tuple[str, ...]
    load: str


def choose(names: Iterable[str], choice: str | None, repo: str) -> Chosen:
    """names: every file's path in the repository. Raises NotFoundError where nothing fits, ArgumentError
    where several do, UnsupportedError for a repository without anything that can be read."""
    names = sorted(names)
    sets = gguf_sets(names)
    directory = tuple(name for name in names if _OF_DIRECTORY.fullmatch(name))
    weights = [name for name in directory if name.endswith(".safetensors")]
    if choice is None:
        if weights:
            return Chosen(directory, "")
        if not sets:
            raise UnsupportedError(f"{repo} has neither GGUF files nor safetensors that can be read")
        usual = fitting(sets, USUAL)
        return _only(usual if len(usual) == 1 else sets, sets, repo)
    if choice in names and choice.lower().endswith(".gguf"):
        return _whole(next((files for files in sets.values() if choice in files), (choice,)), repo)
    if found := fitting(sets, choice):
        return _only(found, sets, repo)
    if not sets:
        if weights:
            raise NotFoundError(
                f"{repo} has no GGUF files, so no {choice}: without :{choice} its safetensors are read, and "
                "the option --weights (or weights=) quantizes them while loading"
            )
        raise UnsupportedError(f"{repo} has neither GGUF files nor safetensors that can be read")
    raise NotFoundError(f"{repo} has no {choice}; it has {_listed(sets)}")


def gguf_sets(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The models among GGUF files, by name: of a split one all parts that are there, in order."""
    sets: dict[str, list[str]] = {}
    for name in sorted(names):
        if not name.lower().endswith(".gguf") or _NO_MODEL.search(name.rpartition("/")[2]):
            continue
        part = _PART.fullmatch(name)
        sets.setdefault(f"{part[1]}.gguf" if part else name, []).append(name)
    return {name: tuple(files) for name, files in sets.items()}


def fitting(sets: dict[str, tuple[str, ...]], choice: str) -> dict[str, tuple[str, ...]]:
    """Those whose name has `choice` as a whole word, in capitals or not."""
    word = re.compile(rf"(?<![a-z0-9]){re.escape(choice)}(?![a-z0-9_])", re.IGNORECASE | re.ASCII)
    return {name: files for name, files in sets.items() if word.search(name)}


def short(name: str, sets: dict[str, tuple[str, ...]]) -> str:
    """What chooses this one of the sets: its quantization where that is enough, else its first file."""
    found = QUANTIZATION.findall(name.rpartition("/")[2])
    if found and len(fitting(sets, found[-1])) == 1:
        return str(found[-1])
    return sets[name][0]


def _only(found: dict[str, tuple[str, ...]], sets: dict[str, tuple[str, ...]], repo: str) -> Chosen:
    if len(found) > 1:
        raise ArgumentError(f"{repo} has several models, name one: {_listed(sets, found)}")
    ((files),) = found.values()
    return _whole(files, repo)


def _whole(files: tuple[str, ...], repo: str) -> Chosen:
    part = _PART.fullmatch(files[0])
    if part and len(files) != int(part[3]):
        raise NotFoundError(f"{repo}: of {part[1]} {len(files)} of {int(part[3])} parts are there")
    return Chosen(files, files[0])


def _listed(sets: dict[str, tuple[str, ...]], found: Iterable[str] | None = None) -> str:
    names = [f":{short(name, sets)}" for name in (sets if found is None else found)]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
