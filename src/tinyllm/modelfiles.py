"""What a path holds: everything about a model but the numbers of its weights.

One place knows which files people have (a GGUF, a Hugging Face directory, the bundled model, what hub/ finds
in caches) and what each of them says. Imports `config`, `files`, `hub`, `tokenizer` and `chat`. Read next:
loading.py, whose `load` uploads the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tinyllm import hub
from tinyllm.chat.templates import ChatTemplate, template_from_directory, template_from_gguf
from tinyllm.config import (
    QWEN3_RERANKER,
    EmbeddingDefaults,
    GenerationDefaults,
    ModelConfig,
    config_from_gguf,
    config_from_json,
    embedding_from_gguf,
    embedding_from_modules,
    generation_from_gguf,
    generation_from_json,
)
from tinyllm.errors import FormatError, NotFoundError, UnsupportedError
from tinyllm.files import (
    adapter_text,
    find_model,
    is_there,
    parse_json,
    read_json,
    read_json_if_any,
    read_small,
    user_path,
)
from tinyllm.files.gguf import read_gguf
from tinyllm.files.heads import HeadTensors, heads_of_directory, heads_of_gguf, is_qwen3_reranker
from tinyllm.files.names import Weights, map_tensors
from tinyllm.files.safetensors import read_safetensors
from tinyllm.tokenizer import Tokenizer, tokenizer_from_directory, tokenizer_from_gguf

BUNDLED = {"stories": Path(__file__).parent / "data" / "stories.gguf"}


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, read but for the weights and the tokenizer. template None: no chat. has_output: False
    for a model that gives vectors of texts, or scores, but no logits: it was saved without its output matrix,
    or attends to both sides. heads: what stands behind its pooling."""

    path: Path
    config: ModelConfig
    weights: Weights
    read_tokenizer: Callable[[], Tokenizer | None]
    template: ChatTemplate | None
    defaults: GenerationDefaults
    embedding: EmbeddingDefaults = field(default_factory=EmbeddingDefaults)
    has_output: bool = True
    heads: HeadTensors = field(default_factory=HeadTensors)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None: ids in, ids out. Read when it is first asked for. Raises FormatError, UnsupportedError,
        MemoryLimitError."""
        with _told_where(self.path):
            tokenizer = self.read_tokenizer()
            if tokenizer:
                tokenizer.check_fits(self.config.vocab_size)
            return tokenizer


@contextmanager
def _told_where(path: Path) -> Iterator[None]:
    """Put `path` before the message of a FormatError or UnsupportedError that does not have it."""
    try:
        yield
    except (FormatError, UnsupportedError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def model_path(path: str | os.PathLike[str]) -> Path:
    """What a user's `path` names: an existing path wins over a bundled model and a name of hub/, which may
    fetch it. Raises NotFoundError, and for such a name what `hub.find` does."""
    where = user_path(path)
    if os.path.exists(where):
        return where
    if hub.is_name(path):
        return hub.find(path)
    if str(path) not in BUNDLED:
        raise NotFoundError(
            f"{where}: no such file or directory, nor the name of a bundled model ({', '.join(BUNDLED)})"
            f"{hub.suggestion(str(path))}"
        )
    return BUNDLED[str(path)]


def read_model(path: str | os.PathLike[str]) -> ModelFiles:
    """Reads a GGUF file (of a split set the first), a directory, a .safetensors file in its directory, the
    bundled model by name, or a name of hub/; an existing path wins over the names. Raises NotFoundError,
    ReadError, FormatError, UnsupportedError, ArgumentError.
    """
    files = open_model(path)
    _ = files.tokenizer
    return files


def open_model(path: str | os.PathLike[str]) -> ModelFiles:
    """As `read_model`, but what is wrong with the tokenizer is raised where it is first asked for."""
    where = model_path(path)
    kind = find_model(where)
    with _told_where(where):
        return _read_gguf(where) if kind == "gguf" else _read_directory(where)


# What general.type says of GGUF files that are no models.
_OTHER_TYPES = {
    "adapter": adapter_text("general.type is 'adapter'"),
    "imatrix": "is an importance matrix (general.type is 'imatrix'), for tinyllm-quantize --imatrix",
    "mmproj": "is what reads images for a model (general.type is 'mmproj'); name the model's own file",
}


def require_model(metadata: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for a GGUF file that says it is something else."""
    kind = metadata.get("general.type")
    if isinstance(kind, str) and kind in _OTHER_TYPES:
        raise UnsupportedError(_OTHER_TYPES[kind])


def _read_gguf(path: Path) -> ModelFiles:
    file = read_gguf(path)
    require_model(file.metadata)
    config = config_from_gguf(file.metadata, file.tensors)
    embedding = embedding_from_gguf(file.metadata)
    heads, tensors = heads_of_gguf(file.tensors, embedding, config)
    # "none" is llama.cpp's word for a model without a vocabulary.
    has_tokenizer = str(file.metadata.get("tokenizer.ggml.model", "none")) != "none"
    return ModelFiles(
        path,
        config,
        map_tensors(tensors, config, "gguf"),
        lambda: tokenizer_from_gguf(file.metadata) if has_tokenizer else None,
        template_from_gguf(file.metadata),
        generation_from_gguf(file.metadata, config.vocab_size),
        embedding,
        # A reranker's file may lack the output matrix, and does not say so.
        not config.bidirectional and not heads.labels,
        heads,
    )


def _read_directory(path: Path) -> ModelFiles:
    from tinyllm.files.schemes import find_scheme, join  # which no GGUF needs

    folder = path if path.is_dir() else path.parent
    json = read_json(folder / "config.json")
    scheme = find_scheme(json, folder)
    if scheme is not None:
        json = {key: value for key, value in json.items() if key != "quantization_config"}
    joined = None if scheme is None else partial(join, scheme=scheme)
    tensors = read_safetensors(path, joined).tensors
    names = json.get("architectures")
    is_bare = isinstance(names, list) and bool(names) and all(str(name).endswith("Model") for name in names)
    config = config_from_json({**json, "architectures": None} if is_bare else json)
    has_output = not is_bare or config.tied or any(name.endswith("lm_head.weight") for name in tensors)
    # Where there is none, the embedding stands in its place, and nothing asks for it.
    weights = map_tensors(tensors, config if has_output else replace(config, tied=True), "hf")
    config = weights.config
    embedding = _embedding(folder)
    advice = folder / "generation_config.json"
    generation = read_json(advice) if is_there(advice) else None
    return ModelFiles(
        path,
        config,
        weights,
        lambda: tokenizer_from_directory(folder),
        template_from_directory(folder),
        generation_from_json(json, generation, config.vocab_size),
        embedding,
        has_output and not config.bidirectional,
        heads_of_directory(folder, embedding, weights),
    )


def _embedding(folder: Path) -> EmbeddingDefaults:
    """What sentence-transformers wrote beside a model."""
    modules = folder / "modules.json"
    if not is_there(modules):
        return QWEN3_RERANKER if is_qwen3_reranker(folder) else EmbeddingDefaults()
    value = parse_json(read_small(modules), str(modules))
    return embedding_from_modules(value, lambda name: read_json_if_any(folder / name))
