"""Miniature embedding models as sentence-transformers saves them: a decoder without its head, a tokenizer
that ends texts, modules.json and its like.

golden/make_embeddings.py asks sentence-transformers for their vectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from helpers_models import (
    golden_spec,
    golden_specs,
    random_tensors,
    random_weights,
    write_hf_directory,
    write_safetensors,
)

TEXTS = ["the cat sat on the mat", "stock markets fell again today, badly", "x"]
LONG = " ".join(f"the {i} cats of the {i * i} houses" for i in range(20))  # more than two segments of 256
END = "<end>"


class Embedder(NamedTuple):
    """One model: its steps behind the transformer, and other files."""

    name: str
    spec: str  # the golden model that it is made of
    pooling: dict[str, Any]  # 1_Pooling/config.json
    normalize: bool = False
    prompts: dict[str, Any] | None = None  # config_sentence_transformers.json
    older: bool = False  # as sentence-transformers wrote it before its modules moved
    config: dict[str, Any] | None = None  # keys of config.json
    dense: tuple[tuple[int, bool, str], ...] = ()  # the layers behind the pooling: outputs, bias, activation
    longest: int = 100  # tokens of a text

    @property
    def texts(self) -> list[str]:
        return [*TEXTS, LONG] if self.longest > 100 else TEXTS


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
    Embedder(
        "apart",
        "qwen2",
        {"embedding_dimension": 64, "pooling_mode": "weightedmean", "include_prompt": False},
        prompts={"prompts": {"query": "Find: "}, "default_prompt_name": "query"},
    ),
    Embedder("max", "qwen2", {"word_embedding_dimension": 64, "pooling_mode_max_tokens": True}),
    Embedder("sqrt", "qwen2", {"embedding_dimension": 64, "pooling_mode": "mean_sqrt_len_tokens"}),
    Embedder(
        "dense",
        "qwen2",
        {"embedding_dimension": 64, "pooling_mode": "mean"},
        dense=((48, True, "activation.Tanh"), (20, False, "linear.Identity")),
    ),
    Embedder(  # as EmbeddingGemma is
        "gemma",
        "gemma3",
        {"embedding_dimension": 64, "pooling_mode": "mean"},
        True,
        prompts={"prompts": {"query": "task: search result | query: "}},
        config={"use_bidirectional_attention": True, "sliding_window": 21, "max_position_embeddings": 900},
        dense=((96, False, "linear.Identity"), (64, False, "linear.Identity")),
        longest=800,
    ),
    Embedder(
        "bidirectional",
        "llama3",
        {"embedding_dimension": 96, "pooling_mode": "mean"},
        config={"is_causal": False, "max_position_embeddings": 900},
        longest=800,
    ),
    Embedder(
        "bidirectional_window",
        "mistral_window",
        {"embedding_dimension": 64, "pooling_mode": "lasttoken"},
        config={"is_causal": False, "sliding_window": 30, "max_position_embeddings": 900},
        longest=800,
    ),
]


def config_of(embedder: Embedder) -> dict[str, Any]:
    specs = {spec.name: spec for spec in golden_specs("families")}
    spec = specs.get(embedder.spec) or golden_spec(embedder.spec)
    kind = spec.config["architectures"][0].replace("ForCausalLM", "Model")
    return {**spec.config, "vocab_size": 300, "architectures": [kind], **(embedder.config or {})}


def write_embedder(folder: Path, embedder: Embedder, seed: int = 7) -> Path:
    """Returns the directory. Its weights have no prefix and no head, as AutoModel saves them."""
    config = config_of(embedder)
    weights = {
        name.removeprefix("model."): w
        for name, w in random_weights(config, seed).items()
        if not name.startswith("lm_head")
    }
    write_hf_directory(folder, config, weights)
    backend = byte_tokenizer([END])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A $B {END}", special_tokens=[(END, backend.token_to_id(END))]
    )
    backend.save(str(folder / "tokenizer.json"))
    kinds = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling"]
    kinds += ["base.modules.dense.Dense"] * len(embedder.dense)
    kinds += ["base.modules.normalize.Normalize"] if embedder.normalize else []
    if embedder.older:
        kinds = [f"models.{kind.rpartition('.')[2]}" for kind in kinds]
    paths = ["", *(f"{i}_{kind.rpartition('.')[2]}" for i, kind in enumerate(kinds) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": embedder.pooling,
        "sentence_bert_config.json": {"max_seq_length": embedder.longest, "do_lower_case": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END,
        },
    }  # fmt: skip
    if embedder.prompts:
        files["config_sentence_transformers.json"] = embedder.prompts
    for path in paths[1:]:
        (folder / path).mkdir()
    n_in = config["hidden_size"]
    for i, (n_out, bias, activation) in enumerate(embedder.dense):
        path = paths[2 + i]
        files[f"{path}/config.json"] = {
            "in_features": n_in, "out_features": n_out, "bias": bias,
            "activation_function": f"torch.nn.modules.{activation}",
        }  # fmt: skip
        shapes = {"linear.weight": (n_out, n_in), **({"linear.bias": (n_out,)} if bias else {})}
        write_safetensors(folder / path / "model.safetensors", random_tensors(shapes, seed + 1 + i))
        n_in = n_out
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def byte_tokenizer(special: list[str], words: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A token a byte; words have one that no text becomes."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*letters, *special, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    return backend


# ---- rerankers of Qwen3's kind

TURNS = ["<|im_start|>", "<|im_end|>"]
PAIRS = ["the cat sat on the mat", "stocks fell", "A dog, perhaps, ran after it.", "x"]
QUERY, INSTRUCTION = "where is the cat?", "Find what is about animals"
# As sentence-transformers gives a query, a document and the default prompt to it.
JUDGES = (
    "{%- set said = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | first -%}"
    "<|im_start|>system\n{{ said }}<|im_end|>\n<|im_start|>user\n"
    "{%- for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor -%}"
    "<|im_end|>\n<|im_start|>assistant\n"
)


def write_reranker(folder: Path, modules: bool, seed: int = 7) -> Path:
    """modules: as sentence-transformers writes it, else as Qwen3-Reranker was published first. Returns the
    directory."""
    spec = next(spec for spec in golden_specs("families") if spec.name == "qwen3")
    config = {**spec.config, "vocab_size": 300, "max_position_embeddings": 2000}
    write_hf_directory(folder, config, random_weights(config, seed))
    backend = byte_tokenizer(TURNS, ["yes", "no"])
    backend.save(str(folder / "tokenizer.json"))
    names = ["base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore"]
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": TURNS[1], "pad_token": TURNS[1],
        },
    }  # fmt: skip
    if modules:
        (folder / "1_LogitScore").mkdir()
        (folder / "chat_template.jinja").write_text(JUDGES, encoding="utf-8")
        files |= {
            "modules.json": [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{name}"}
                for i, (name, path) in enumerate(zip(names, ["", "1_LogitScore"], strict=True))
            ],
            "1_LogitScore/config.json": {
                "true_token_id": backend.token_to_id("yes"), "false_token_id": backend.token_to_id("no"),
                "module_input_name": "causal_logits",
            },
            "sentence_bert_config.json": {
                "transformer_task": "text-generation", "module_output_name": "causal_logits",
                "modality_config": {
                    "text": {"method": "forward", "method_output_name": "logits"},
                    "message": {"method": "forward", "method_output_name": "logits", "format": "flat"},
                },
            },
            "config_sentence_transformers.json": {
                "activation_fn": "torch.nn.modules.linear.Identity", "model_type": "CrossEncoder",
                "prompts": {"query": INSTRUCTION}, "default_prompt_name": "query",
            },
        }  # fmt: skip
    else:
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Qwen3-Reranker-0.6B\n")
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder
