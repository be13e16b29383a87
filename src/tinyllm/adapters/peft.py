"""Reads adapters that PEFT saved: adapter_config.json and adapter_model.safetensors in a directory.

The matrices say what they stand beside, by their names; the config says how strong they are, and what else
PEFT would do. Every key of it is obeyed, says nothing of the numbers, or is refused by name: the tables
below. Imports config, errors and files.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.adapters.pairs import Adapter, Numbers, Pair, read_numbers
from tinyllm.adapters.targets import Part, Target, Targets, check_once
from tinyllm.config import ModelConfig
from tinyllm.config.families import family, hf_architecture
from tinyllm.errors import FormatError, NotFoundError, UnsupportedError
from tinyllm.files import TensorInfo, is_there, read_json, show, show_some
from tinyllm.files.names import unwrapped
from tinyllm.files.safetensors import read_safetensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MAX_PATTERN = 500  # characters of a pattern's expression

# What `_Strength` obeys, and what says which matrices there are, which the tensors' names say as well.
_OBEYED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "bias", "modules_to_save"),
}
# Of training, of files, or without a meaning unless a key that is refused is set.
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "runtime_config", "megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("ensure_weight_tying", "velora_config"),
}
_REFUSED = {
    "use_dora": "DoRA, which scales the matrices' rows to lengths of its own",
    "alora_invocation_tokens": "an activated LoRA, which acts after certain tokens only",
    "use_qalora": "QA-LoRA, whose matrices meet averages of groups",
    "layer_replication": "it repeats layers of the model",
    "trainable_token_indices": "it replaces rows of the embedding",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "a router over several adapters",
    "kasa_config": "KaSA, which changes the model's own matrices",
    "monteclora_config": "MonteCLoRA",
}
# Starts that leave the model's own matrices alone; the others take something out of them.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_MERGE = (
    "; merge it into its base model with PEFT (merge_and_unload), and load the merged model"  # its own words
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Strength:
    """How much a pair counts: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732), either of them
    otherwise where a pattern matches the module's name."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    rslora: bool

    def scale(self, where: str, module: str, rank: int) -> float:
        """Raises FormatError where the matrices have another rank than the config says."""
        said = _matching(self.rank_pattern, module, self.rank)
        if said != rank:
            raise FormatError(f"{where} has matrices of rank {rank}, the config says {said}")
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return float(alpha / math.sqrt(rank) if self.rslora else alpha / rank)


def _matching(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """Of the first pattern that is the name or the end of it."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return otherwise


def read_peft(folder: Path, config: ModelConfig) -> Adapter:
    """Raises FormatError and UnsupportedError; see `read_adapter`."""
    if not is_there(folder / CONFIG):
        raise NotFoundError(f"{folder}: not an adapter: it has no {CONFIG}")
    if not is_there(folder / TENSORS):
        pickle = is_there(folder / "adapter_model.bin")
        hint = "; adapter_model.bin is a pickle: save it again with safe_serialization=True" if pickle else ""
        raise NotFoundError(f"{folder}: has no {TENSORS}{hint}")
    strength = _read_config(folder / CONFIG)
    tensors = read_safetensors(folder / TENSORS).tensors
    pairs = _Reader(folder, config, strength).pairs(tensors)
    return Adapter(folder, tuple(pairs))


def _read_config(path: Path) -> _Strength:
    said = read_json(path)
    if said.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"{path}: peft_type is {show(str(said.get('peft_type')))}; only LORA is applied"
        )
    for key, why in _REFUSED.items():
        if said.get(key):
            raise UnsupportedError(f"{path}: {key} is not supported: {why}{_MERGE}")
    if said.get("modules_to_save"):
        raise UnsupportedError(
            f"{path}: modules_to_save is not supported: it replaces {show(str(said['modules_to_save']))} of "
            f"the model by trained ones{_MERGE}"
        )
    if said.get("bias", "none") != "none":
        raise UnsupportedError(
            f"{path}: bias is {show(str(said['bias']))}, so the model's own biases are trained; that is not "
            f"supported{_MERGE}"
        )
    if said.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise UnsupportedError(
            f"{path}: init_lora_weights is {show(str(said['init_lora_weights']))}, which changes the model's "
            "own matrices; save the adapter with path_initial_model_for_weight_conversion, which makes it a "
            "plain one"
        )
    unknown = [key for key, v in said.items() if v and key not in _OBEYED | _HARMLESS | set(_REFUSED)]
    if unknown:
        raise UnsupportedError(f"{path}: asks for what is not known here: {show_some(sorted(unknown))}")
    return _Strength(
        _number(path, "r", said.get("r", 8), whole=True),
        _number(path, "lora_alpha", said.get("lora_alpha", 8)),
        _patterns(path, "rank_pattern", said.get("rank_pattern") or {}, whole=True),
        _patterns(path, "alpha_pattern", said.get("alpha_pattern") or {}),
        bool(said.get("use_rslora", False)),
    )


def _number(path: Path, key: str, value: object, whole: bool = False) -> Any:
    good = isinstance(value, int) and value > 0 if whole else isinstance(value, (int, float))
    if isinstance(value, bool) or not good or not math.isfinite(value):  # type: ignore[arg-type]
        raise FormatError(f"{path}: {key} is {show(str(value))}, not a {'whole ' * whole}number")
    return value


def _patterns(path: Path, key: str, value: object, whole: bool = False) -> dict[str, float]:
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {key} is not an object")
    for pattern in value:
        # Names with dots and stars are all that people write; what backtracks without end is no such thing.
        if len(pattern) > MAX_PATTERN or not re.fullmatch(r"(?:[\w.^$|\-\[\]\\]|\.\*|\(\?:|\)|\d)*", pattern):
            raise UnsupportedError(f"{path}: {key} has the pattern {show(pattern)}, which is not supported")
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(f"{path}: {key} has the pattern {show(pattern)}: {error}") from None
    return {pattern: _number(path, f"{key}[{show(pattern)}]", v, whole) for pattern, v in value.items()}


_NAME = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(lora_(?:A|B|embedding_A|embedding_B))(?:\.(weight|bias))?"
)
_COPY = re.compile(r"(?:base_model\.model\.)?(.+)\.base_layer\.(weight|bias)")


class _Reader:
    """Turns the tensors of one adapter into pairs."""

    def __init__(self, folder: Path, config: ModelConfig, strength: _Strength) -> None:
        config = replace(config, architecture=hf_architecture(config.architecture, config.n_experts))
        self._folder, self._config, self._strength = folder, config, strength
        self._targets = Targets(config, "hf")

    def pairs(self, tensors: Mapping[str, TensorInfo]) -> list[Pair]:
        modules: dict[str, dict[str, TensorInfo]] = {}
        other: list[str] = []
        for name, info in tensors.items():
            match, copy = _NAME.fullmatch(name), _COPY.fullmatch(name)
            if match:
                kind = match[2].replace("embedding_", "") + (".bias" if match[3] == "bias" else "")
                modules.setdefault(match[1], {})[kind] = info
            elif copy and self._target(copy[1]) is not None:
                log.warning("%s: %s is a copy of the model's own, which is used", self._folder, show(name))
            else:
                other.append(name)
        if other:
            raise UnsupportedError(
                f"{self._folder}: holds tensors that are no pair of matrices: "
                f"{show_some([show(name) for name in sorted(other)])}"
            )
        found: list[Pair] = []
        for module, parts in modules.items():
            found += self._of_module(module, parts)
        if not found:
            raise FormatError(f"{self._folder}: holds no pair of matrices (lora_A, lora_B)")
        check_once(self._folder, found)
        return found

    def _target(self, module: str) -> Target | None:
        name = unwrapped(f"{module}.weight").removesuffix(".weight")
        return self._targets.found.get(name) or self._targets.found.get(self._in_files(name))

    def _in_files(self, name: str) -> str:
        """transformers 5 calls some modules otherwise than the files do that it reads: mlp.gate is
        block_sparse_moe.gate in Mixtral's."""
        name = f"{name}.weight"
        for new, old in family(self._config.architecture, "hf").renamed.get("hf", {}).items():
            name = name.replace(new, old)
        return name.removesuffix(".weight")

    def _of_module(self, module: str, parts: Mapping[str, TensorInfo]) -> list[Pair]:
        where = f"{self._folder}: {show(module)}"
        if not {"lora_A", "lora_B"} <= set(parts) or set(parts) - {"lora_A", "lora_B", "lora_B.bias"}:
            raise FormatError(f"{where} has {', '.join(sorted(parts))}, not one lora_A and one lora_B")
        a, b = read_numbers(parts["lora_A"]), read_numbers(parts["lora_B"])
        bias = read_numbers(parts["lora_B.bias"]) if "lora_B.bias" in parts else None
        if len(a.values.shape) != 2 or len(b.values.shape) != 2:
            raise FormatError(f"{where} has matrices of shape {a.values.shape} and {b.values.shape}")
        stem = unwrapped(f"{module}.weight").removesuffix(".weight")
        if match := re.fullmatch(
            r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts((?:\.base_layer)*)", stem
        ):
            return self._of_experts(where, int(match[1]), a, b)
        target = self._target(module)
        if target is None:
            raise UnsupportedError(
                f"{where} is no matrix of this model: the adapter was made for another one"
            )
        rank = int(b.values.shape[1])
        if target.parts[0].name == "embedding":
            a = a.take(a.values.T)
        scale = self._strength.scale(where, module, rank)
        return self._targets.pairs(where, target, scale, a, b, bias)

    def _of_experts(self, where: str, layer: int, a: Numbers, b: Numbers) -> list[Pair]:
        """A parameter of all experts on top of each other (target_parameters). Which one the shapes say, as
        the names do not: PEFT wraps one around the other. a [experts * rank, k] goes expert by expert, b
        [rows, rank * experts] has the expert fastest."""
        c = self._config
        n = c.n_experts
        kinds = {(c.dim, 2 * c.ff_dim): "gate_up_proj", (c.ff_dim, c.dim): "down_proj"}
        kind = kinds.get((a.values.shape[1], b.values.shape[0]))
        if kind is None or layer >= c.n_layers or not n or a.values.shape[0] % n:
            raise FormatError(
                f"{where} has matrices of shape {a.values.shape} and {b.values.shape}, which fit no experts "
                "of this model: the adapter was made for another one"
            )
        rank = a.values.shape[0] // n
        if b.values.shape[1] != rank * n:
            raise FormatError(f"{where} has matrices of different ranks")
        scale = self._strength.scale(where, f"model.layers.{layer}.mlp.experts.{kind}", rank)
        of_a = a.take(a.values.reshape(n, rank, -1))
        of_b = b.take(b.values.reshape(-1, rank, n).transpose(2, 0, 1))
        ff, stacked = c.ff_dim, family(c.architecture, "hf").stacked
        if kind == "down_proj":
            parts = [Part(f"w_down.{i}", layer, 0, c.dim, i) for i in range(n)]
            return self._targets.pairs(where, Target((n, c.dim, ff), tuple(parts)), scale, of_a, of_b)
        if stacked:  # gpt-oss has gate's and up's rows in turn
            of_b = of_b.take(np.concatenate([of_b.values[:, 0::2], of_b.values[:, 1::2]], axis=1))
        parts = [
            Part(f"{name}.{i}", layer, first, ff, i)
            for i in range(n)
            for name, first in (("w_gate", 0), ("w_up", ff))
        ]
        return self._targets.pairs(where, Target((n, 2 * ff, c.dim), tuple(parts)), scale, of_a, of_b)
