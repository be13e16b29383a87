"""What a path holds: everything about a model but the numbers of its weights.

One place knows which files people have (a GGUF, a Hugging Face directory, the bundled model) and what each
of them says. Imports `config`, `files`, `tokenizer` and `chat`. Read next: loading.py, whose `load`
uploads the weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tinyllm.chat.templates import ChatTemplate, template_from_directory, template_from_gguf
from tinyllm.config import (
    GenerationDefaults,
    ModelConfig,
    config_from_gguf,
    config_from_json,
    generation_from_gguf,
    generation_from_json,
)
from tinyllm.errors import FormatError, NotFoundError, UnsupportedError
from tinyllm.files import find_model, is_there, read_json, user_path
from tinyllm.files.gguf import read_gguf
from tinyllm.files.names import Weights, map_tensors
from tinyllm.files.safetensors import read_safetensors
from tinyllm.tokenizer import Tokenizer, tokenizer_from_directory, tokenizer_from_gguf

BUNDLED = {"stories": Path(__file__).parent / "data" / "stories.gguf"}


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, read but for the weights. tokenizer None: ids in, ids out. template None: no chat."""

    path: Path
    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    defaults: GenerationDefaults


def model_path(path: str | os.PathLike[str]) -> Path:
    """What a user's `path` names: an existing path wins over a bundled model. Raises NotFoundError."""
    where = user_path(path)
    if os.path.exists(where):
        return where
    if str(path) not in BUNDLED:
        raise NotFoundError(
            f"{where}: no such file or directory, nor the name of a bundled model ({', '.join(BUNDLED)})"
        )
    return BUNDLED[str(path)]


def read_model(path: str | os.PathLike[str]) -> ModelFiles:
    """Reads a GGUF file (of a split set the first), a directory, a .safetensors file in its directory, or
    the bundled model by name; an existing path wins over the name. Raises NotFoundError, ReadError,
    FormatError, UnsupportedError.
    """
    where = model_path(path)
    kind = find_model(where)
    try:
        files = _read_gguf(where) if kind == "gguf" else _read_directory(where)
        if files.tokenizer:
            files.tokenizer.check_fits(files.config.vocab_size)
        return files
    except (FormatError, UnsupportedError) as error:
        if str(where) in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error


def _read_gguf(path: Path) -> ModelFiles:
    file = read_gguf(path)
    config = config_from_gguf(file.metadata, file.tensors)
    # "none" is llama.cpp's word for a model without a vocabulary.
    has_tokenizer = str(file.metadata.get("tokenizer.ggml.model", "none")) != "none"
    return ModelFiles(
        path,
        config,
        map_tensors(file.tensors, config, "gguf"),
        tokenizer_from_gguf(file.metadata) if has_tokenizer else None,
        template_from_gguf(file.metadata),
        generation_from_gguf(file.metadata, config.vocab_size),
    )


def _read_directory(path: Path) -> ModelFiles:
    folder = path if path.is_dir() else path.parent
    json = read_json(folder / "config.json")
    config = config_from_json(json)
    advice = folder / "generation_config.json"
    return ModelFiles(
        path,
        config,
        map_tensors(read_safetensors(path).tensors, config, "hf"),
        tokenizer_from_directory(folder),
        template_from_directory(folder),
        generation_from_json(json, read_json(advice) if is_there(advice) else None, config.vocab_size),
    )
