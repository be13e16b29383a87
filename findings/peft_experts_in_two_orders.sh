#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: how the pair of a parameter that holds all experts is laid out (target_parameters).
#
# One would guess: lora_A [experts * rank, in] and lora_B [out, experts * rank] count experts and ranks the same way, and
# the tensors' names say which parameter they belong to.
# True: lora_A goes expert by expert, lora_B rank by rank with the expert fastest. Of two parameters of one module the first
# one's names end with base_layer (one wrapper around the other), neither has the parameter's name.
# Seen: experts.base_layer.lora_A (8, 16) experts.base_layer.lora_B (48, 8) experts.lora_A (8, 24) experts.lora_B (16, 8)
#       same order: False, expert fastest in lora_B: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'P'
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=1, head_dim=8,
    num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
)
options = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "r": 2}
model = get_peft_model(Qwen3MoeForCausalLM(config), LoraConfig(**options, init_lora_weights=False))
model.save_pretrained("adapter")
from safetensors.torch import load_file

saved = load_file("adapter/adapter_model.safetensors")
shapes = {name.split("mlp.")[1].removesuffix(".weight"): tuple(t.shape) for name, t in sorted(saved.items())}
print(*(f"{name} {shape}" for name, shape in shapes.items()))
assert shapes == {
    "experts.base_layer.lora_A": (8, 16), "experts.base_layer.lora_B": (48, 8),
    "experts.lora_A": (8, 24), "experts.lora_B": (16, 8),
}
stem = next(name for name in saved if name.endswith("base_layer.lora_A.weight"))
a, b = saved[stem], saved[stem.replace("lora_A", "lora_B")]
before = model.get_base_model().model.layers[0].mlp.experts
layer = next(m for n, m in model.named_modules() if n.endswith("mlp.experts.base_layer"))
plain = layer.get_base_layer().gate_up_proj.detach().clone()
change = model.merge_and_unload().model.layers[0].mlp.experts.gate_up_proj.detach() - plain
scale = 8 / 2  # lora_alpha / r
by_expert = torch.stack([b[:, 2 * i : 2 * i + 2] @ a[2 * i : 2 * i + 2] for i in range(4)]) * scale
fastest = torch.stack([b[:, i::4] @ a[2 * i : 2 * i + 2] for i in range(4)]) * scale
found = (torch.allclose(change, by_expert, atol=1e-5), torch.allclose(change, fastest, atol=1e-5))
print(f"same order: {found[0]}, expert fastest in lora_B: {found[1]}")
assert found == (False, True)
P
