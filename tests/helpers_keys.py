"""The cases of golden/keys.json: every key of every family's config.json, set to other values, and left out.

golden/sweep_keys.py computes with transformers what becomes of each, test_keys.py holds tinyllm to it, and
keys_table.py makes docs/keys.md of it. Imports numpy's helpers_models.py alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from helpers_models import GOLDEN_DIR, Spec, golden_specs

from tinyllm.config.families import JSON_HARMLESS

ABSENT = "(absent)"
N_TOKENS = 140  # of each text: more than any window and original context of the golden models

# What becomes of a key, as keys.json has it, a letter for each of its values.
VERDICTS = {
    "o": "obeyed",
    "h": "harmless",  # logits are the same, and nothing is said
    "w": "warned",  # likewise, and a warning names the key
    "r": "refused",
    "u": "only ours",  # transformers has no such model
}

NO_ROPE = dict.fromkeys(
    ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"), ABSENT
)  # as files that leave all of it to the class
NO_LIST = {"layer_types": ABSENT}
WINDOWS = {"sliding_window": 50, "use_sliding_window": True, "max_window_layers": 1}

# Families of which transformers has no class: its word on their keys is not to be had.
NOT_IN_TRANSFORMERS = ("minicpm", "nanbeige")

# Models that stand for a family, by a golden model's name, each with what is changed of it.
BASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "llama": [("llama31", {}), ("llama2", {}), ("yarn", {})],
    "mistral": [("mistral_nemo", {"sliding_window": 50}), ("mistral_nemo", {})],
    "mixtral": [("mixtral", {}), ("mixtral", {"sliding_window": 50})],
    "ministral3": [("ministral3", {}), ("ministral3", {"sliding_window": 50})],
    "ministral": [("ministral", {}), ("ministral", NO_LIST)],
    "qwen2": [("qwen2_window", {}), ("qwen2", {})],
    "qwen3": [("qwen3", {}), ("qwen3", WINDOWS)],
    "qwen3_moe": [("qwen3_moe", {}), ("qwen3_moe", WINDOWS)],
    "qwen3_5_text": [("qwen3_5", {})],
    "gpt_oss": [("gpt_oss", {}), ("gpt_oss", NO_LIST)],
    "phi3": [("phi3", {}), ("phi3_long", {})],
    "smollm3": [
        ("smollm3", {}),
        (
            "smollm3",
            {**NO_LIST, "no_rope_layers": ABSENT, "sliding_window": 50, "use_sliding_window": True},
        ),
        ("smollm3", {"sliding_window": 50}),
    ],
    "granite": [("granite", {})],
    "olmo2": [("olmo2", {})],
    "olmo3": [("olmo3", {}), ("olmo3", NO_LIST)],
    "gemma": [("gemma", {})],
    "gemma2": [("gemma2", {})],
    "gemma3_text": [("gemma3", {}), ("gemma3", {"sliding_window_pattern": ABSENT})],
    "cohere": [("cohere", {}), ("cohere_plus", {})],
    "cohere2": [("cohere2", {}), ("cohere2", {"sliding_window_pattern": ABSENT})],
    "granitemoehybrid": [("granite4", {})],
    "granite_swa": [("granite_swa_rope", {}), ("granite_swa", {})],
    "hyperclovax": [("hyperclovax", {})],
    "seed_oss": [("seed_oss", {})],
    "ernie4_5": [("ernie4_5", {})],
    "helium": [("helium", {})],
    "cwm": [("cwm", {})],
    "exaone4": [("exaone4", {}), ("exaone4", {**NO_LIST, "sliding_window_pattern": 2})],
    "glm4": [("glm4", {})],
    "hunyuan_v1_dense": [("hunyuan", {})],
    "iquestcoder": [("iquestcoder", {})],
    "arcee": [("arcee", {})],
    "apertus": [("apertus", {})],
    "jais2": [("jais2", {})],
    "olmo": [("olmo", {})],
    "vaultgemma": [("vaultgemma", {})],
}


def yarn(**more: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, **more}


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
ROPES: list[Any] = [
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 54321.0},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 54321.0},
    yarn(),
    {**yarn(), "rope_theta": 54321.0},
    {"type": "yarn", "factor": 4.0},
    yarn(factor=None),
    yarn(attention_factor=1.3, beta_fast=4.0, beta_slow=0.5),
    yarn(mscale=1.0, mscale_all_dim=0.5),
    yarn(truncate=False),
    yarn(truncate=False, rope_theta=54321.0, attention_factor=1.25),
    LLAMA3,
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0,
     "original_max_position_embeddings": 32},
    {"full_attention": {"rope_type": "default", "rope_theta": 54321.0},
     "sliding_attention": {"rope_type": "default", "rope_theta": 12345.0}},
    {"full_attention": {"rope_theta": 54321.0, **yarn(truncate=False)},
     "sliding_attention": {"rope_type": "default", "rope_theta": 12345.0}},
    {"full_attention": {"rope_type": "linear", "factor": 4.0}, "sliding_attention": {"rope_type": "default"}},
    {"full_attention": {"rope_theta": 54321.0, "rope_type": "default"}},
    {"sliding_attention": {"rope_theta": 54321.0, "rope_type": "default"}},
    {"sliding_attention": {"rope_theta": 54321.0, "rope_type": "linear", "factor": 2.0}},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "default", "mrope_section": [2, 3, 3]},
    {"rope_type": "default", "finetuned": True, "max_position_embeddings": 99},
    {},
    None,
]  # fmt: skip


def layer_lists(config: Mapping[str, Any]) -> list[Any]:
    n = config["num_hidden_layers"]
    full, windowed = "full_attention", "sliding_attention"
    mixed = [windowed if i % 3 == 1 else full for i in range(n)]
    return [None, [full] * n, [windowed] * n, mixed, [full] * (n + 1), ["chunked_attention"] * n]


# Other values by key; a function has the golden model's config. All are tried without the key as well.
VALUES: dict[str, Any] = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": [12345.0, None],
    "rope_local_base_freq": [555.0, None],
    "partial_rotary_factor": [0.5, 1.0],
    "original_max_position_embeddings": [32],
    "max_position_embeddings": [256],
    "sliding_window": [8, None],
    "use_sliding_window": [True, False, None],
    "max_window_layers": [0, 1, 100],
    "layer_types": layer_lists,
    "sliding_window_pattern": [1, 2, 3],
    "_sliding_window_pattern": [2],
    "no_rope_layers": lambda c: [None, [1] * c["num_hidden_layers"], [0] * c["num_hidden_layers"]],
    "no_rope_layer_interval": [2, 3],
    "head_dim": [20, None],
    "hidden_size": [96],
    "intermediate_size": [48],
    "moe_intermediate_size": [20],
    "num_hidden_layers": lambda c: [c["num_hidden_layers"] + 1],
    "num_attention_heads": [8],
    "num_key_value_heads": [1, None],
    "vocab_size": [53],
    "initializer_range": [0.5],
    "hidden_act": ["gelu", "relu", "gelu_pytorch_tanh", "silu", "swish"],
    "hidden_activation": ["gelu", "gelu_pytorch_tanh", "silu", None],
    "rms_norm_eps": [0.5],
    "layer_norm_eps": [0.5],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "tie_word_embeddings": [True, False],
    "query_pre_attn_scalar": [7, None],
    "attn_logit_softcapping": [2.0, None],
    "final_logit_softcapping": [1.0, None],
    "logit_scale": [0.5],
    "use_qk_norm": [True, False],
    "embedding_multiplier": [3.0],
    "attention_multiplier": [0.7],
    "residual_multiplier": [0.5],
    "logits_scaling": [2.0],
    "num_experts": [4],
    "num_local_experts": [4],
    "num_experts_per_tok": [1],
    "experts_per_token": [1],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [[0], [], None],
    "router_aux_loss_coef": [0.7],
    "router_jitter_noise": [0.5],
    "swiglu_limit": [3.0],
    "swiglu_alpha": [1.0],
    "use_bidirectional_attention": [True, False, None],
    "is_encoder_decoder": [True, False],
    "is_decoder": [True, False],
    "add_cross_attention": [True, False],
    "id2label": [{"0": "a"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression"],
    "architectures": [["XForCausalLM"], None],
    "chunk_size_feed_forward": [2],
    "dtype": ["bfloat16"],
    "torch_dtype": ["bfloat16"],
    "pruned_heads": [{}, {"0": [1]}],
    "per_layer_config": [{"0": {"rms_norm_eps": 0.5}}],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}, None],
    "task_specific_params": [{"a": 1}],
    "auto_map": [{"AutoConfig": "x.Y"}],
    "transformers.js_config": [{"dtype": "q4"}],
    "rotary_pct": [1.0, 0.5],
    "position_embedding_type": ["rope_gptj", "absolute"],
    "order_of_interleaved_layers": ["local_attn_first", "global_attn_first"],
    "layer_switch": [4, 2],
    "use_embedding_sharing": [True, False],
    "use_gated_activation": [True, False],
    "use_parallel_block": [True, False],
    "use_parallel_embedding": [True, False],
    "cache_implementation": ["hybrid", "static"],
    "sliding_window_size": [8],
    "initial_context_length": [32],
    "full_attn_mod": [1, 2],
    "interpolate_factor": [1, 2],
    "rope_interleaved": [False, True],
    "num_labels": [3],
    "name_or_path": ["x"],
    "_name_or_path": ["x"],
    "transformers_version": ["4.30.0"],
    "tokenizer_class": ["X"],
    "finetuning_task": ["x"],
    "attn_implementation": ["eager"],
    "_attn_implementation": ["eager"],
    "unsloth_version": ["2025.1"],
    "top_p": [0.5],
    "typical_p": [0.5],
    "residual_dropout": [0.5],
    "attention_out_bias": [True, False],
    "use_bias": [True, False],
    "clip_qkv": [2.0, None],
    "use_post_norm": [True, False],
    "layer_rope_theta": lambda c: [
        None,
        [0] * c["num_hidden_layers"],
        [54321.0] * c["num_hidden_layers"],
        [54321.0, 12345.0] * c["num_hidden_layers"],
    ],
    "shared_intermediate_size": [48],
    "layers_block_type": lambda c: [["mamba"] * c["num_hidden_layers"], None],
    "num_loops": [1, 2],
    "skip_loop_final_norm": [True, False],
    "scale_emb": [3.0],
    "scale_depth": [0.7],
    "dim_model_base": [32],
    "attention_head_dim": [8],
    "use_cla": [True, False],
    "use_rotary_pos_emb": [True, False],
    "norm_type": ["rms", "layer"],
    "add_classification_head": [True, False],
    "qk_norm": [True, False],
    "post_norm": [True, False],
    "normalization_function": ["rmsnorm", "layernorm"],
    "init_method": ["mup"],
    "dense_list": [[1, 0]],
    "pool_type": ["last"],
    "loop_loss_weights": [[0.5, 0.5]],
}
FLAGS = (
    "is_causal", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "use_flash_attn", "_flash_attn_2_enabled", "torchscript", "unsloth_fixed", "do_sample",
    "is_llama_config", "_attn_implementation_autoset", "tie_last_hidden_states", "use_mrope",
)  # fmt: skip


class Case(NamedTuple):
    """One key of one model's config set to a value, or left out."""

    base: Spec
    config: dict[str, Any]
    key: str
    value: Any
    verdict: str = ""


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**config, **changes}.items() if value is not ABSENT}


def bases(kind: str) -> list[tuple[Spec, dict[str, Any]]]:
    """Models of a family, each with what is changed of a golden one; the last says nothing of RoPE."""
    specs = {spec.name: spec for file in ("specs", "families") for spec in golden_specs(file)}
    first, changes = BASES[kind][0]
    models = [*BASES[kind], (first, {**changes, **NO_ROPE})]
    return [(specs[name]._replace(config=changed(specs[name].config, c)), c) for name, c in models]


def swept(keys: list[str], changes: Mapping[str, Any], *, first: bool) -> list[str]:
    """All of a family's keys for its first model, for the others what its changes can matter to."""
    if first:
        return keys
    if NO_ROPE.keys() <= changes.keys():
        return list(NO_ROPE)
    window = {
        "sliding_window", *WINDOWS, *NO_LIST, "sliding_window_pattern", "_sliding_window_pattern",
        "no_rope_layers", "no_rope_layer_interval",
    }  # fmt: skip
    if changes:
        return [key for key in keys if key in window]
    return [key for key in keys if key not in JSON_HARMLESS]


def others(key: str, config: Mapping[str, Any]) -> Iterator[Any]:
    """Values that differ from the model's, and none where it has one."""
    values = VALUES.get(key, [True, False] if key in FLAGS else [3])
    values = values(config) if callable(values) else values
    for value in values:
        if key not in config or config[key] != value:
            yield value
    if key in config:
        yield ABSENT


def case(base: Spec, key: str, value: Any, verdict: str = "") -> Case:
    return Case(base, changed(base.config, {key: value}), key, value, verdict)


def found_cases(kind: str) -> Iterator[Case]:
    """Those of golden/keys.json."""
    found = json.loads((GOLDEN_DIR / "keys.json").read_text(encoding="utf-8"))[kind]
    for (base, _), keys in zip(bases(kind), found, strict=True):
        for key, letters in keys.items():
            for value, letter in zip(others(key, base.config), letters, strict=True):
                yield case(base, key, value, VERDICTS[letter])
