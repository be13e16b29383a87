"""What a path holds: adapters and other files that are no models, in the words of every door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers_gguf import write_gguf
from helpers_models import golden_spec, random_weights, write_hf_directory, write_safetensors

import tinyllm
from tinyllm.cli.inspect import main as inspect
from tinyllm.cli.quantize import main as quantize
from tinyllm.errors import UnsupportedError
from tinyllm.modelfiles import read_model

CONFIG = {**golden_spec("llama3").config, "num_hidden_layers": 1}
MERGE = r'tinyllm\.load\("BASE", adapters=.*tinyllm-quantize BASE MERGED\.gguf TYPE --lora ADAPTER'


def adapter(folder: Path) -> Path:
    """A LoRA adapter as peft saves it."""
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    stem, dim = "base_model.model.model.layers.0.self_attn.q_proj.lora_", CONFIG["hidden_size"]
    pair = {f"{stem}A.weight": np.ones((4, dim)), f"{stem}B.weight": np.ones((dim, 4))}
    write_safetensors(
        folder / "adapter_model.safetensors", {k: w.astype(np.float32) for k, w in pair.items()}
    )
    return folder


def model(folder: Path) -> Path:
    return write_hf_directory(folder, CONFIG, random_weights(CONFIG, 3))


@pytest.mark.parametrize("file", ["", "model.safetensors", "adapter_model.safetensors"])
def test_an_adapter_beside_a_model_is_not_overlooked(file: str, tmp_path: Path) -> None:
    path = adapter(model(tmp_path / "both")) / file
    words = (
        rf"both: holds an adapter \(adapter_config\.json, adapter_model.*{MERGE}.*or move the adapter away"
    )
    with pytest.raises(UnsupportedError, match=words):
        tinyllm.load(path)
    with pytest.raises(UnsupportedError, match=words):
        tinyllm.quantize(path, tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_one_file_of_an_adapter_is_enough(name: str, tmp_path: Path) -> None:
    (model(tmp_path / "m") / name).write_bytes(b"{}")
    with pytest.raises(UnsupportedError, match=rf"m: holds an adapter \({name}\)"):
        read_model(tmp_path / "m")


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
def test_an_adapter_alone_says_what_it_is(file: str, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"only: holds an adapter \(adapter_config.*{MERGE}"
    ) as caught:
        tinyllm.load(adapter(tmp_path / "only") / file)
    assert "move" not in str(caught.value)


def test_an_adapter_under_the_name_of_a_model(tmp_path: Path) -> None:
    """Saved with the model that it is in, unmerged, or put in its place."""
    folder = model(tmp_path / "m")
    tensors = random_weights(CONFIG, 3)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = np.ones(
        (4, 4), np.float32
    )
    write_safetensors(folder / "model.safetensors", tensors)
    words = rf"holds an adapter \(model\.safetensors has '.*lora_A.*'\), .*{MERGE}"
    with pytest.raises(UnsupportedError, match=words):
        read_model(folder)


@pytest.mark.parametrize(
    ("type", "words"),
    [
        ("adapter", r"f\.gguf: holds an adapter \(general\.type is 'adapter'\).* --lora ADAPTER"),
        ("imatrix", r"f\.gguf: is an importance matrix .* for tinyllm-quantize --imatrix"),
        ("mmproj", r"f\.gguf: is what reads images for a model .* name the model's own file"),
    ],
)
def test_gguf_files_of_other_types(type: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    write_gguf(path, CONFIG, random_weights(CONFIG, 3), metadata={"general.type": type})
    with pytest.raises(UnsupportedError, match=words):
        read_model(path)
    with pytest.raises(UnsupportedError, match=words):
        tinyllm.quantize(path, tmp_path / "out.gguf", "q8_0")
    write_gguf(path, CONFIG, random_weights(CONFIG, 3), metadata={"general.type": "model"})
    read_model(path)


@pytest.mark.parametrize("both", [False, True])
def test_the_commands_say_it_too(both: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(adapter(model(tmp_path / "m") if both else tmp_path / "m"))
    assert quantize([folder, str(tmp_path / "out.gguf"), "q8_0"]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert "m: holds an adapter (adapter_config.json" in said.err
    assert inspect([folder]) == 0, "which lists what is there"
    said = capsys.readouterr()
    assert "lora_A" in said.out
    assert "m: holds an adapter (adapter_config.json" in " ".join(said.out.split())
