"""Computes golden/logits.npz, families.npz and config_keys.npz: what Hugging Face transformers says of the
models in specs.json, families.json and config_keys.json.

Run from anywhere, with an interpreter that has torch and transformers (the tests need neither):
    python tests/golden/make_goldens.py [NAME...]     with names only these; the others stay as they are

transformers runs unmodified with weights in float64, except where it goes to float32 by itself (norms, the
attention's softmax, rotary angles); `test_reference.py` derives its tolerance from that. The files hold, for
each model, `NAME.positions` int64 [m] and `NAME.logits` [m, vocab_size], float64 (float32 but in logits.npz),
and `NAME.mean` float32 [hidden_size], the mean over all positions of what the output matrix reads. The prompt
is `random_ids(config, seed, n_tokens)`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers_models import GOLDEN_DIR, golden_model, golden_specs, random_ids

N_POSITIONS = 16
# The borders of pages and of attention segments, and a scaled model's original context of 64.
BORDERS = (0, 1, 2, 62, 63, 64, 65, 127, 128, 129, 255, 256, 257)


def make(specs: str, file: str, dtype: Any) -> None:
    names = sys.argv[1:]
    arrays: dict[str, Any] = dict(np.load(GOLDEN_DIR / file)) if names else {}
    for spec in golden_specs(specs):
        if names and spec.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            spoken = spec._replace(config=spec.as_transformers) if spec.as_transformers else spec
            path = golden_model(spoken, Path(folder))
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float64,
                attn_implementation="eager",
                experts_implementation="eager",
            )
        ids = random_ids(spec.config, spec.seed, spec.n_tokens)
        with torch.no_grad():
            said = model(torch.tensor([ids]), output_hidden_states=True)
        logits = said.logits[0].numpy()
        borders = [p for p in BORDERS if p < spec.n_tokens]
        others = sorted(set(range(3, spec.n_tokens)) - set(borders))
        spread = [others[i] for i in np.linspace(0, len(others) - 1, N_POSITIONS - len(borders)).astype(int)]
        positions = np.array(sorted(borders + spread))
        arrays[spec.name + ".positions"] = positions
        arrays[spec.name + ".mean"] = said.hidden_states[-1][0].numpy().mean(axis=0).astype(np.float32)
        arrays[spec.name + ".logits"] = logits[positions].astype(dtype)
        print(f"{spec.name}: {len(positions)} positions, max |logit| {np.abs(logits).max():.2f}")
    np.savez_compressed(GOLDEN_DIR / file, **arrays)


def main() -> None:
    make("specs", "logits.npz", np.float64)
    make("families", "families.npz", np.float32)
    make("config_keys", "config_keys.npz", np.float32)


if __name__ == "__main__":
    main()
