"""The cases of golden/schemes.json as files: a directory with config.json and a safetensors file, without its
library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, Any] = json.loads((GOLDEN / "schemes.json").read_text(encoding="utf-8"))
VERSIONS = CASES.pop("versions")
WEIGHTS = [name for name, case in CASES.items() if "model" not in case]
MODELS = [name for name, case in CASES.items() if "model" in case]
MODULE = "model.layers.0.mlp.down_proj"
Tensor = tuple[str, list[int], bytes]  # dtype, shape, content


def arrays() -> Any:
    return np.load(GOLDEN / "schemes.npz")


def tensors_of(name: str) -> dict[str, Tensor]:
    with arrays() as file:
        return {
            tensor: (dtype, shape, file[f"{name}/{tensor}"].tobytes())
            for tensor, (dtype, shape) in CASES[name]["tensors"].items()
        }


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values()))


def write_case(folder: Path, name: str, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """The directory of a case; `config` replaces keys of its quantization_config."""
    folder.mkdir(exist_ok=True)
    case = CASES[name]
    said = {"quantization_config": {**case["config"], **config}}
    model = case.get("model", {})
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **model, **said})
    )
    write_safetensors(folder / "model.safetensors", tensors if tensors is not None else tensors_of(name))
    return folder


def logits_of(name: str) -> npt.NDArray[np.float32]:
    with arrays() as file:
        return np.asarray(file[f"{name}/logits"])
