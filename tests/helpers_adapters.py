"""Adapters of the goldens: directories as PEFT saved them (golden/adapters.json has its config and the names
and shapes of its tensors), with numbers from a seed.

Imports numpy and `helpers_models.py`, so that `golden/make_adapters.py` can run it beside torch and peft."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from helpers_models import (
    F32,
    GOLDEN_DIR,
    Spec,
    _uniform,
    golden_specs,
    write_safetensors,
)

RECORD = GOLDEN_DIR / "adapters.json"


class Case(NamedTuple):
    """What PEFT saved for a golden model: adapter_config.json, and its tensors' shapes by name."""

    name: str
    spec: Spec
    seed: int
    config: dict[str, Any]
    shapes: dict[str, list[int]]


def spec_of(name: str) -> Spec:
    return next(s for file in ("specs", "families") for s in golden_specs(file) if s.name == name)


def adapter_cases() -> list[Case]:
    entries = json.loads(RECORD.read_text(encoding="utf-8"))
    return [
        Case(name, spec_of(e["spec"]), e["seed"], e["config"], e["shapes"]) for name, e in entries.items()
    ]


def adapter_case(name: str) -> Case:
    return next(case for case in adapter_cases() if case.name == name)


def random_tensors(shapes: Mapping[str, Any], seed: int) -> dict[str, F32]:
    """Numbers with which a pair adds about a third of what its matrix gives: the same for a seed
    everywhere."""
    found: dict[str, F32] = {}
    for stream, (name, shape) in enumerate(shapes.items()):
        u = _uniform(seed, stream, math.prod(shape)).reshape(shape)
        if "base_layer" in name and name.endswith("base_layer.weight"):
            continue  # the model's own, which PEFT saves beside trained embeddings
        if name.endswith("bias"):
            value = 0.5 * u
        elif "lora_A" in name or "lora_embedding_B" in name:
            value = u * math.sqrt(3.0) / math.sqrt(shape[-1])
        elif "lora_embedding_A" in name:
            value = 0.5 * u
        else:
            value = u * math.sqrt(3.0) * 0.3 / math.sqrt(min(shape[-1], 16))
        found[name] = value.astype(np.float32)
    return found


def write_peft(path: Path, config: Mapping[str, Any], tensors: Mapping[str, F32], dtype: str = "F32") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(path / "adapter_model.safetensors", tensors, dtype)
    return path


def write_adapter(case: Case, path: Path, *, seed: int | None = None, dtype: str = "F32") -> Path:
    """The directory of a case. seed: another adapter of the same shapes."""
    tensors = random_tensors(case.shapes, case.seed if seed is None else seed)
    return write_peft(path, case.config, tensors, dtype)


def write_lora_gguf(path: Path, case: Case, *, metadata: Mapping[str, Any] | None = None) -> Path:
    """The adapter of a case as llama.cpp's convert_lora_to_gguf writes it: names and order of rows are those
    of its models' files, token_embd's lora_a is transposed, experts are stacks."""
    import gguf
    from helpers_gguf import ARCHITECTURES, gguf_name, interleaved_rows

    config = case.spec.config
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, (metadata or {}).get("general.architecture", architecture.name))
    writer.add_type("adapter")
    said = {"adapter.type": "lora", "adapter.lora.alpha": float(case.config["lora_alpha"])} | dict(
        metadata or {}
    )
    for key, value in said.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif key != "general.architecture":
            writer.add_string(key, value)
    tensors = random_tensors(case.shapes, case.seed)
    n_heads = config["num_attention_heads"]
    n_kv_heads = config.get("num_key_value_heads") or n_heads

    def put(name: str, a: F32, b: F32) -> None:
        if architecture.interleaved and ".q_proj." in name:
            b = b[interleaved_rows(len(b), n_heads)]
        elif architecture.interleaved and ".k_proj." in name:
            b = b[interleaved_rows(len(b), n_kv_heads)]
        to = gguf_name(name, architecture)
        writer.add_tensor(f"{to}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{to}.lora_b", np.ascontiguousarray(b))

    for name, a in tensors.items():
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        b = tensors[name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
        stem = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")[0]
        if "lora_embedding_A" in name:
            put(f"{stem}.weight", a.T, b)
        elif stem.endswith((".experts", ".experts.base_layer")):
            n = config.get("num_local_experts") or config["num_experts"]
            block = stem.removesuffix(".base_layer")
            of_a = a.reshape(n, -1, a.shape[1])
            of_b = np.stack([b.reshape(len(b), -1, n)[:, :, i] for i in range(n)])
            if a.shape[1] != config["hidden_size"]:
                put(f"{block}.0.down_proj.weight", of_a, of_b)
                continue
            for i, part in enumerate(("gate_proj", "up_proj")):
                half = of_b.shape[1] // 2
                put(f"{block}.0.{part}.weight", of_a, of_b[:, i * half : (i + 1) * half])
        else:
            put(f"{stem}.weight", a, b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
