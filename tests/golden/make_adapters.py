"""Computes golden/adapters.json and adapters.npz: what PEFT saves for adapters of the golden models, and what
transformers and PEFT say of the models with them.

Run from anywhere, with an interpreter that has torch, transformers and peft (the tests need none):
    python tests/golden/make_adapters.py

PEFT makes an adapter for a model and saves it; its tensors get numbers from a seed (helpers_adapters.py), and
PEFT loads the directory again. adapters.json holds the config that it wrote, and the names and shapes of the
tensors. adapters.npz holds for each case `NAME.logits` float32 [m, vocab_size] at `NAME.positions` int64 [m];
`mixed.*` are those of two adapters of "all" with strengths 0.5 and -1.25. Weights are float64."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers_adapters import RECORD, random_tensors, spec_of, write_peft
from helpers_models import GOLDEN_DIR, golden_model, random_ids

N_TOKENS = 70
POSITIONS = np.array([0, 1, 17, 63, 64, 69])
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 7, r".*\.o_proj": 3},
    "alpha_pattern": {"layers.0.mlp.up_proj": 32, r"^model.layers.1.self_attn.v_proj": 1},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama3", {"target_modules": ALL, "r": 4, "lora_alpha": 8}),
    "rslora": ("llama2", {"target_modules": ALL, "r": 17, "lora_alpha": 6, "use_rslora": True, **PATTERNS}),
    "bias": ("attention_bias", {"target_modules": ["q_proj", "k_proj", "o_proj"], "r": 8, "lora_bias": True}),
    "embeddings": ("llama31", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 5}),
    "tied": ("gemma2", {"target_modules": ["embed_tokens", *ALL], "r": 4}),
    "residual": ("granite", {"target_modules": ALL, "r": 4}),
    "rotated_pairs": ("cohere", {"target_modules": ALL, "r": 4}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "r": 6}),
    "experts": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
            "r": 2,
        },
    ),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"], "r": 2, "lora_alpha": 4}),
    "stacked": (
        "gpt_oss",
        {
            "target_modules": ["k_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "r": 2,
        },
    ),
}


def base(spec: Any, folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        golden_model(spec, folder),
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )


def logits(model: Any, spec: Any) -> Any:
    ids = random_ids(spec.config, spec.seed, N_TOKENS)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()[POSITIONS]


def main() -> None:
    record: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for seed, (name, (spec_name, options)) in enumerate(CASES.items(), 1000):
        spec = spec_of(spec_name)
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            model = get_peft_model(base(spec, folder / "base"), LoraConfig(**options))
            model.save_pretrained(folder / "saved")
            with safe_open(folder / "saved" / "adapter_model.safetensors", "np") as file:
                shapes = {key: list(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
            config = json.loads((folder / "saved" / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = None  # a path of this run
            tensors = random_tensors(shapes, seed)
            write_peft(folder / "adapter", config, tensors)
            plain = base(spec, folder / "base")
            without = logits(plain, spec)
            adapted = PeftModel.from_pretrained(
                plain, folder / "adapter", autocast_adapter_dtype=False
            ).double()
            said = logits(adapted, spec)
            n_loaded = sum("lora_" in parameter for parameter, _ in adapted.named_parameters())
            assert n_loaded == len(tensors), (n_loaded, len(tensors))
            arrays[f"{name}.positions"], arrays[f"{name}.logits"] = POSITIONS, said.astype(np.float32)
            if name == "all":
                other = random_tensors(shapes, seed + 500)
                write_peft(folder / "other", config, other)
                adapted.load_adapter(folder / "other", "other", autocast_adapter_dtype=False)
                adapted.double()
                adapted.base_model.set_adapter(["default", "other"])
                for module in adapted.modules():
                    if hasattr(module, "set_scale") and "other" in getattr(module, "scaling", {}):
                        module.set_scale("default", 0.5)
                        module.set_scale("other", -1.25)
                arrays["mixed.logits"] = logits(adapted, spec).astype(np.float32)
        record[name] = {"spec": spec_name, "seed": seed, "config": config, "shapes": shapes}
        change = np.abs(said - without).max() / np.abs(without).max()
        print(f"{name}: {len(tensors)} tensors, logits change by {change:.2f}", flush=True)
    np.savez_compressed(GOLDEN_DIR / "adapters.npz", **arrays)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
