"""Two small trained models beside transformers, which reads the same GGUF: how far are our probabilities off?

They lie in the folder that TINYLLM_REAL_MODELS names (tests/data.md says where they come from); transformers
and torch are needed. Skipped by name without. `pytest tests/long/test_real_models.py`
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm

N_TOKENS = 900
# nats a token, mean over positions: what int8 activations and an F16 cache cost on these two files was 0.0023
# and 0.0017 when this was written
MOST = 0.003
MODELS = ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"]


def log_softmax(logits: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_divergence_from_transformers(name: str, data_dir: Path) -> None:
    path = Path(os.environ.get("TINYLLM_REAL_MODELS", "")) / name
    if not path.is_file():
        pytest.skip(f"no {name} in the folder TINYLLM_REAL_MODELS")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = (data_dir / "text" / "wiki.test.raw").read_text(encoding="utf-8")
    with tinyllm.load(path) as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode(text[:8000])[:N_TOKENS]
        ours = llm.logits(ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    assert len(ids) == N_TOKENS
    divergences = []
    for at in range(0, N_TOKENS, 20):  # a vocabulary of 262 144 in float64 is large
        p, q = (log_softmax(x[at : at + 20, : theirs.shape[1]].astype(np.float64)) for x in (theirs, ours))
        divergences += (np.exp(p) * (p - q)).sum(axis=-1).tolist()
    assert 0 <= np.mean(divergences) <= MOST
