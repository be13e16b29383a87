"""Adapters: low-rank pairs beside a model's matrices (LoRA, arXiv 2106.09685), read from files.

Invariant: what comes out is one narrow thing, `Adapter`, whatever wrote the file; what of a file cannot be
obeyed is refused by its name, or warned of, never left out in silence. peft.py reads PEFT's directories,
gguf.py llama.cpp's files, targets.py knows which tensor is which matrix. Imports config, errors and files.
Read next: backends, whose `Model.adapter` uploads the pairs.
"""

from __future__ import annotations

import os
from pathlib import Path

from tinyllm.adapters.gguf import read_gguf_adapter
from tinyllm.adapters.pairs import Adapter, Numbers, Pair
from tinyllm.adapters.peft import read_peft
from tinyllm.config import ModelConfig
from tinyllm.errors import FormatError, NotFoundError, UnsupportedError
from tinyllm.files import FileReader, user_path

__all__ = ["Adapter", "Numbers", "Pair", "read_adapter"]


def read_adapter(path: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """Reads an adapter for a model of this config: a directory that PEFT saved, or a GGUF file of llama.cpp's
    convert_lora_to_gguf.

    Raises NotFoundError, ReadError, FormatError (broken, or made for another model), UnsupportedError (asks
    for what is not done here, which it names).
    """
    where = user_path(path)
    if config.mixers:
        raise UnsupportedError(f"{where}: adapters do not run on models with Gated DeltaNet (Qwen 3.5) yet")
    if os.path.isdir(where):
        return read_peft(where, config)
    if where.name in ("adapter_model.safetensors", "adapter_config.json") and os.path.exists(where):
        return read_peft(where.parent, config)
    if not os.path.exists(where):
        raise NotFoundError(f"{where}: no such file or directory, where an adapter is expected")
    with FileReader(where) as file:
        head = file.read_at(0, min(file.size, 4))
    if head != b"GGUF":
        raise FormatError(
            f"{where}: not an adapter: expected a directory with adapter_config.json and "
            "adapter_model.safetensors, or a GGUF file"
        )
    return read_gguf_adapter(Path(where), config)
