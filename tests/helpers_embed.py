"""Miniature embedding models as sentence-transformers saves them: a decoder without its head, a tokenizer
that ends texts, modules.json and its like.

golden/make_embeddings.py asks sentence-transformers for their vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from helpers_models import golden_spec, golden_specs, random_weights, write_hf_directory

TEXTS = ["the cat sat on the mat", "stock markets fell again today, badly", "x"]
END = "<end>"


class Embedder(NamedTuple):
    """One model: its steps behind the transformer, and other files."""

    name: str
    spec: str  # the golden model that it is made of
    pooling: dict[str, Any]  # 1_Pooling/config.json
    normalize: bool = False
    prompts: dict[str, Any] | None = None  # config_sentence_transformers.json
    older: bool = False  # as sentence-transformers wrote it before its modules moved


EMBEDDERS = [
    Embedder("last", "qwen2", {"embedding_dimension": 64, "pooling_mode": "lasttoken"}, True),
    Embedder(
        "mean", "llama3", {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}, older=True
    ),
    Embedder("cls", "qwen3_tied", {"word_embedding_dimension": 64, "pooling_mode_cls_token": True}, True),
    Embedder(
        "instructed",
        "qwen2",
        {"embedding_dimension": 64, "pooling_mode": "mean", "include_prompt": True},
        prompts={"prompts": {"query": "Find: ", "document": ""}, "default_prompt_name": "query"},
    ),
]


def config_of(embedder: Embedder) -> dict[str, Any]:
    specs = {spec.name: spec for spec in golden_specs("families")}
    spec = specs.get(embedder.spec) or golden_spec(embedder.spec)
    kind = spec.config["architectures"][0].replace("ForCausalLM", "Model")
    return {**spec.config, "vocab_size": 300, "architectures": [kind]}


def write_embedder(folder: Path, embedder: Embedder, seed: int = 7) -> Path:
    """Returns the directory. Its weights have no prefix and no head, as AutoModel saves them."""
    config = config_of(embedder)
    weights = {
        name.removeprefix("model."): w
        for name, w in random_weights(config, seed).items()
        if not name.startswith("lm_head")
    }
    write_hf_directory(folder, config, weights)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*letters, END])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([END])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A $B {END}", special_tokens=[(END, vocabulary[END])]
    )
    backend.save(str(folder / "tokenizer.json"))
    kinds = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling"]
    kinds += ["base.modules.normalize.Normalize"] if embedder.normalize else []
    if embedder.older:
        kinds = [f"models.{kind.rpartition('.')[2]}" for kind in kinds]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": embedder.pooling,
        "sentence_bert_config.json": {"max_seq_length": 100, "do_lower_case": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END,
        },
    }  # fmt: skip
    if embedder.prompts:
        files["config_sentence_transformers.json"] = embedder.prompts
    for path in paths[1 : len(kinds)]:
        (folder / path).mkdir()
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder
