#!/usr/bin/env bash
# transformers 5.24.0: with is_causal=False a sliding window reaches one token farther than the causal one does.
#
# One would guess: sliding_window=3 lets a token see 3 positions to its left, itself among them, and with
# is_causal=False as many to its right.
# True: causal, token 5 sees 3, 4 and 5; with is_causal=False it sees 2 to 8: three neighbours on each side beside
# itself. In a Gemma 3 with use_bidirectional_attention=True the same 3 means 4 to 6: the number is the whole window,
# halved.
# Seen: causal [3, 4, 5] / both sides [2, 3, 4, 5, 6, 7, 8] / Gemma 3 [4, 5, 6]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'P'
import torch
from transformers import Gemma3TextConfig, Gemma3TextModel, MistralConfig, MistralModel

sizes = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "sliding_window": 3,
}


def seen(model):
    """The positions whose token changes what becomes of token 5."""
    model.eval()
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        usual = model(ids).last_hidden_state[0, 5]
        found = []
        for i in range(11):
            other = ids.clone()
            other[0, i] = 30
            if not torch.equal(model(other).last_hidden_state[0, 5], usual):
                found.append(i)
    return found


torch.manual_seed(0)
causal = seen(MistralModel(MistralConfig(**sizes)))
both = seen(MistralModel(MistralConfig(**sizes, is_causal=False)))
gemma = seen(
    Gemma3TextModel(Gemma3TextConfig(**sizes, use_bidirectional_attention=True, layer_types=["sliding_attention"]))
)
print("causal", causal, "/ both sides", both, "/ Gemma 3", gemma)
assert causal == [3, 4, 5]
assert both == [2, 3, 4, 5, 6, 7, 8]
assert gemma == [4, 5, 6]
P
