"""Reads adapters in GGUF files, as llama.cpp's convert_lora_to_gguf writes them.

NAME.lora_a [rank, k] and NAME.lora_b [rows, rank] stand beside the tensor NAME of a model's file, rows in the
order of such files; of token_embd lora_a is transposed, of stacks of experts both have a dimension in front.
The scale is adapter.lora.alpha / rank, or 1 where alpha is 0. Imports config, errors and files.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinyllm.adapters.pairs import Adapter, Pair, read_numbers
from tinyllm.adapters.targets import Targets, check_once
from tinyllm.config import ModelConfig
from tinyllm.config.families import gguf_architecture
from tinyllm.errors import FormatError, UnsupportedError
from tinyllm.files import TensorInfo, show, show_some
from tinyllm.files.gguf import read_gguf


def read_gguf_adapter(path: Path, config: ModelConfig) -> Adapter:
    """Raises FormatError and UnsupportedError; see `read_adapter`."""
    file = read_gguf(path)
    said = file.metadata
    if said.get("general.type") != "adapter":
        raise FormatError(
            f"{path}: not an adapter: its general.type is {show(str(said.get('general.type')))}, not "
            "'adapter'"
        )
    if said.get("adapter.type") != "lora":
        raise UnsupportedError(
            f"{path}: adapter.type is {show(str(said.get('adapter.type')))}; only 'lora' is applied"
        )
    if np.size(said.get("adapter.alora.invocation_tokens", ())):
        raise UnsupportedError(
            f"{path}: an activated LoRA (adapter.alora.invocation_tokens), which acts after certain tokens "
            "only; that is not supported"
        )
    architecture, own = said.get("general.architecture"), gguf_architecture(config.architecture)
    if architecture != own:
        raise FormatError(
            f"{path}: is for a model of architecture {show(str(architecture))}, this one is {own!r}: the "
            "adapter was made for another model"
        )
    alpha = said.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise FormatError(f"{path}: adapter.lora.alpha is {show(str(alpha))}, not a number")
    return Adapter(path, tuple(_pairs(path, file.tensors, float(alpha), config)))


def _pairs(path: Path, tensors: dict[str, TensorInfo], alpha: float, config: ModelConfig) -> list[Pair]:
    targets = Targets(replace(config, architecture=gguf_architecture(config.architecture)), "gguf")
    found: list[Pair] = []
    left = set(tensors)
    for name, info in tensors.items():
        stem, _, kind = name.rpartition(".")
        target = targets.found.get(stem.removesuffix(".weight"))
        if kind != "lora_a" or target is None or f"{stem}.lora_b" not in tensors:
            continue
        a, b = read_numbers(info), read_numbers(tensors[f"{stem}.lora_b"])
        rank = b.values.shape[-1]
        found += targets.pairs(f"{path}: {stem}", target, alpha / rank if alpha else 1.0, a, b)
        left -= {name, f"{stem}.lora_b"}
    if left:
        raise UnsupportedError(
            f"{path}: holds tensors that are no pair of this model's matrices: "
            f"{show_some([show(name) for name in sorted(left)])}"
        )
    if not found:
        raise FormatError(f"{path}: holds no pair of matrices (lora_a, lora_b)")
    check_once(path, found)
    return found
