"""Computes golden/embeddings.npz: the vectors that sentence-transformers makes with the miniature models of
helpers_embed.py.

Run from anywhere, with an interpreter that has sentence-transformers (6.2), tokenizers and numpy:
    python tests/golden/make_embeddings.py
The file holds for each model `NAME`, float32 [texts, dim], of TEXTS one by one."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers_embed import EMBEDDERS, TEXTS, write_embedder
from helpers_models import GOLDEN_DIR


def main() -> None:
    arrays = {}
    for embedder in EMBEDDERS:
        with tempfile.TemporaryDirectory() as folder:
            model = SentenceTransformer(str(write_embedder(Path(folder), embedder)), device="cpu")
            arrays[embedder.name] = np.stack([model.encode(text) for text in TEXTS])
        print(embedder.name, arrays[embedder.name].shape)
    np.savez_compressed(GOLDEN_DIR / "embeddings.npz", **arrays)


if __name__ == "__main__":
    main()
