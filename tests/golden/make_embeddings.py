"""Computes golden/embeddings.npz: what sentence-transformers makes with the miniature models of
helpers_embed.py, vectors of texts and scores of pairs.

Run from anywhere, with an interpreter that has sentence-transformers (6.2), tokenizers and numpy:
    python tests/golden/make_embeddings.py
The file holds for each model `NAME`, float32 [texts, dim], of its texts one by one; and of the rerankers the
scores of PAIRS, [pairs]: `rerank_modules` by CrossEncoder, `rerank_plain` by the lines that the makers of
Qwen3-Reranker publish, both also `_instructed`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers_embed import EMBEDDERS, PAIRS, QUERY, write_embedder, write_reranker
from helpers_models import GOLDEN_DIR

OTHER = "Find what has to do with money"
USUAL = "Given a web search query, retrieve relevant passages that answer the query"
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def by_modules(path: str, instruction: str | None) -> Any:
    model = CrossEncoder(path, device="cpu")
    pairs = [(QUERY, text) for text in PAIRS]
    options = {} if instruction is None else {"prompt": instruction}
    return model.predict(pairs, activation_fn=torch.nn.Sigmoid(), batch_size=1, **options)


def by_makers_lines(path: str, instruction: str) -> Any:
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    scores = []
    for text in PAIRS:
        body = f"<Instruct>: {instruction}\n<Query>: {QUERY}\n<Document>: {text}"
        ids = [i for part in (PREFIX, body, SUFFIX) for i in tokenizer.encode(part, add_special_tokens=False)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        yes_no = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
        scores.append(torch.softmax(logits[yes_no], 0)[0].item())
    return np.array(scores, np.float32)


def main() -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for embedder in EMBEDDERS:
            path = str(write_embedder(folder / embedder.name, embedder))
            model = SentenceTransformer(path, device="cpu")
            arrays[embedder.name] = np.stack([model.encode(text) for text in embedder.texts])
        modules = str(write_reranker(folder / "modules", True))
        plain = str(write_reranker(folder / "plain", False))
        arrays["rerank_modules"] = by_modules(modules, None)
        arrays["rerank_modules_instructed"] = by_modules(modules, OTHER)
        arrays["rerank_plain"] = by_makers_lines(plain, USUAL)
        arrays["rerank_plain_instructed"] = by_makers_lines(plain, OTHER)
    for name, array in arrays.items():
        print(name, array.shape, array if array.ndim == 1 else "")
    np.savez_compressed(GOLDEN_DIR / "embeddings.npz", **arrays)


if __name__ == "__main__":
    main()
