"""The families of models that are read: what sets each apart from Llama, as its files spell it.

A row says how a family's config.json and GGUF differ; what the arithmetic needs becomes fields of
`ModelConfig`. Keys of config.json that a family's row does not know are refused when they are set, and what
says nothing of logits has its reason beside it; docs/keys.md is made of both. Imports only `errors`. Read
next: from_json.py and from_gguf.py, which read the files by these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tinyllm.errors import FormatError, UnsupportedError

Source = Literal["gguf", "hf"]
Mixer = Literal["attention", "delta"]


@dataclass(frozen=True)
class Family:
    """What sets a family apart. Defaults are Llama's; `json_defaults` are those of transformers' classes."""

    title: str  # the family's name, and models that belong to it
    interleaved: tuple[Source, ...] = ()  # files that hold q and k rows pair by pair instead of half-split
    json_defaults: Mapping[str, Any] = field(default_factory=dict)  # keys of config.json of its own, defaults
    # Keys that its class does not read, and the values that say what is computed anyway; others are warned of
    json_ignored: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    json_twice: Mapping[str, str] = field(default_factory=dict)  # likewise: what another key says as well
    rope_sections: bool = False  # its RoPE may be cut for pictures (mrope), which text does not see
    rope_by_kind: bool = False  # its class has the RoPE of windowed layers apart, in rope_parameters too
    rope_kinds: tuple[str, ...] = ()  # scalings of RoPE that its class takes; (): all
    features: Mapping[str, Any] = field(default_factory=dict)  # fields of ModelConfig that no file states
    gguf_defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # keys of GGUF metadata of its own, defaults
    window_period: int = 0  # where there is a window: every so-many-th layer attends to everything; 0: none
    full_first: bool = False  # config.json's: of each such period the first layer does, not the last
    windows_without_rope: bool = False  # its windowed layers are those without RoPE, where nothing lists them
    local_rope: bool = False  # windowed layers have a RoPE of their own, without scaling
    # Only windowed layers have RoPE; "hybrid": but where the file states no window, all layers have
    rope_in_windows: bool | Literal["hybrid"] = False
    no_rope_interval: int = 0  # every so-many-th layer has no RoPE; 0: all have
    rope_switch: bool = False  # GGUF's rope.scaling.finetuned says whether there is RoPE at all
    scaled_embedding: bool = False  # embeddings are multiplied by the root of their width
    divides_logits: bool = False  # by GGUF's logit_scale, which others multiply by
    optional_qk_norm: Literal["heads"] | None = None  # some of its models have q/k norms of this kind
    norms_minus_one: bool = False  # safetensors hold the norms' weights minus 1
    # Matrices that are one in its files: "qkv", and gate and up
    fused: Mapping[Source, tuple[Literal["qkv", "gate_up"], ...]] = field(default_factory=dict)
    qkv_bias: bool = False  # biases of q, k and v alone, whatever attention_bias says
    # Keys of config.json that say whether q, k and v, o, and gate, up and down have biases; "": none have
    bias_keys: tuple[str, str, str] = ("attention_bias", "attention_bias", "mlp_bias")
    norm_eps: float | None = None  # of its norms, where config.json does not say
    multiplies_logits: bool = False  # by config.json's logits_scaling, which others divide by
    alpha_theta: bool = False  # RoPE called dynamic has a fixed alpha, which stretches theta once and for all
    experts_in: tuple[Source, ...] = ()  # files whose models are mixtures of experts (GGUF: may be)
    # Parts of tensors' names; with @ and a weight's name: of that weight's alone
    renamed: Mapping[Source, Mapping[str, str]] = field(default_factory=dict)
    stacked: bool = False  # safetensors hold a layer's experts on top of each other, gate and up row by row
    growing_queries: bool = False  # its scaling of RoPE may scale queries by position (llama_4_scaling_beta)
    yarn_truncate: bool = True  # whether YaRN's first and last pair are rounded, where GGUF does not say
    guessing: bool = False  # its files may hold layers behind the last that guess further tokens
    text_of: str | None = None  # the model type of the text_config inside a model that also reads images


_LLAMA_LIKE: tuple[Source, ...] = ("gguf",)
_BIAS = {"attention_bias": False}
_BIASES = {**_BIAS, "mlp_bias": False}
_GEMMA = {"activation": "gelu"}
_GEMMA_JSON = {
    **_BIAS, "tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 8192,
}  # fmt: skip
_GEMMA2_JSON = {
    **_GEMMA_JSON, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "layer_types": None, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
_TANH = ("gelu_pytorch_tanh",)
_COHERE = {"norm_kind": "layer", "parallel": True}
_COHERE_JSON = {
    **_BIAS, "tie_word_embeddings": True, "logit_scale": 0.0625, "layer_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}  # fmt: skip
_MISTRAL_JSON = {
    "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
}  # fmt: skip
_QWEN_JSON = {
    "max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False,
    "sliding_window": 4096,
}  # fmt: skip
_QWEN_WINDOWS = {"max_window_layers": 28, "layer_types": None}
_GRANITE_JSON = {
    **_BIASES, "max_position_embeddings": 2048, "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip
_GRANITE_GGUF = {
    "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0, "attention.scale": 0.0,
}  # fmt: skip
# Of Granite 4's Mamba layers and experts, which a model without them does not have.
MAMBA_KEYS = (
    "num_experts_per_tok",
    "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand",
    "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit",
)  # fmt: skip
_OLMO = {"norm_place": "after", "qk_norm": "all"}
_OLMO_JSON = {**_BIAS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
_NORMALIZED = {"norm_topk_prob": (True,)}

# By config.json's model_type and GGUF's general.architecture.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama 1 to 3.3, Vicuna, Vigogne, Yi, TinyLlama, SmolLM 1 and 2, DeepSeek-R1 distills of Llama",
        _LLAMA_LIKE,
        {**_BIASES, "max_position_embeddings": 2048},
        experts_in=("gguf",),  # Mixtral's files say llama
    ),
    "mistral": Family("Mistral 7B, Zephyr, Mistral Nemo and Small", _LLAMA_LIKE, _MISTRAL_JSON),
    "mixtral": Family(
        "Mixtral 8x7B and 8x22B",
        json_defaults={
            **_MISTRAL_JSON, "sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
        },
        json_ignored=_NORMALIZED,
        experts_in=("hf",),
        renamed={
            "hf": {
                "mlp.gate.": "block_sparse_moe.gate.", "mlp.experts.": "block_sparse_moe.experts.",
                "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
            },
        },
    ),
    "mistral3": Family("Mistral Small 3.1, Ministral 3 (text)", text_of="mistral"),
    "ministral3": Family(
        "Ministral 3, Devstral 2",
        _LLAMA_LIKE,
        {
            **_MISTRAL_JSON, "max_position_embeddings": 262144, "sliding_window": None, "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "beta_fast": 32.0,
                "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16384,
            },
        },
        gguf_defaults={"attention.temperature_scale": 0.0, "rope.scaling.yarn_log_multiplier": 0.0},
        growing_queries=True,
    ),
    "ministral": Family("Ministral 8B", json_defaults={**_MISTRAL_JSON, "layer_types": None}),
    "qwen2": Family(
        "Qwen 2, Qwen 2.5, QwQ, DeepSeek-R1 distills of Qwen",
        json_defaults={**_QWEN_JSON, **_QWEN_WINDOWS},
        json_ignored={"attention_bias": (True,), "use_mrope": (False,)},
        qkv_bias=True,
    ),
    "qwen3": Family(
        "Qwen 3",
        json_defaults={**_BIAS, **_QWEN_JSON, **_QWEN_WINDOWS, "head_dim": 128},
        features={"qk_norm": "head"},
    ),
    "qwen3_moe": Family(
        "Qwen 3 30B-A3B and 235B-A22B, Qwen3-Coder",
        json_defaults={
            **_BIAS, **_QWEN_JSON, "num_key_value_heads": 4, "norm_topk_prob": False,
            "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": None,
        },
        features={"qk_norm": "head"},
        experts_in=("gguf", "hf"),
    ),
    "qwen3_5": Family("Qwen 3.5 and 3.6, dense (text)", text_of="qwen3_5_text"),
    "qwen3_5_text": Family(
        "Qwen 3.5 and 3.6, dense",
        json_defaults={
            **_BIAS, "max_position_embeddings": 32768, "num_key_value_heads": 4, "head_dim": 256,
            "partial_rotary_factor": 0.25, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            "layer_types": None, "full_attention_interval": 4, "mtp_num_hidden_layers": 0,
        },
        json_ignored={
            "attn_output_gate": (True,), "mamba_ssm_dtype": ("float32",), "mlp_only_layers": ([],),
            "mtp_use_dedicated_embeddings": (False,),
        },
        rope_sections=True,
        features={"qk_norm": "head", "gated_attention": True},
        gguf_defaults={
            "ssm.conv_kernel": None, "ssm.state_size": None, "ssm.group_count": None,
            "ssm.time_step_rank": None, "ssm.inner_size": None, "full_attention_interval": 4,
            "attention.recurrent_layers": None, "nextn_predict_layers": 0, "rope.dimension_sections": None,
        },
        norms_minus_one=True,
        renamed={"gguf": {"ffn_norm": "post_attention_norm"}},
        guessing=True,
    ),
    "gpt_oss": Family(
        "gpt-oss 20b and 120b",
        json_defaults={
            "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 64,
            "sliding_window": 128, "layer_types": None, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
            "attention_bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "quantization_config": None,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        json_ignored=_NORMALIZED,
        json_twice={
            "experts_per_token": "num_experts_per_tok",
            "initial_context_length": "original_max_position_embeddings",
        },
        features={"activation": "clamped_swiglu", "sinks": True, "expert_bias": True},
        window_period=2,
        experts_in=("gguf", "hf"),
        renamed={
            "hf": {"mlp.gate.": "mlp.router."},
            "gguf": {"ffn_norm": "post_attention_norm"},
        },
        stacked=True,
        yarn_truncate=False,
    ),
    "phi3": Family(
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        json_defaults={
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1.0, "sliding_window": None,
        },
        json_ignored={"full_attn_mod": (1,), "interpolate_factor": (1,)},
        rope_kinds=("default", "longrope"),
        fused={"gguf": ("qkv", "gate_up"), "hf": ("qkv", "gate_up")},
    ),
    "smollm3": Family(
        "SmolLM3",
        _LLAMA_LIKE,
        {
            **_BIASES, "max_position_embeddings": 32768, "tie_word_embeddings": True,
            "rope_theta": 2000000.0, "no_rope_layer_interval": 4, "num_key_value_heads": 4,
            "use_sliding_window": False, "sliding_window": None, "layer_types": None, "no_rope_layers": None,
        },
        windows_without_rope=True,
        no_rope_interval=4,
    ),
    "granite": Family(
        "Granite 3",
        _LLAMA_LIKE,
        _GRANITE_JSON,
        gguf_defaults=_GRANITE_GGUF,
        rope_switch=True,
        divides_logits=True,
    ),
    "granitemoehybrid": Family(
        "Granite 4 dense (350m, 1b, 3b)",
        _LLAMA_LIKE,
        {
            **{k: v for k, v in _GRANITE_JSON.items() if k != "mlp_bias"}, "shared_intermediate_size": 1024,
            "num_local_experts": 8, "layer_types": None, "position_embedding_type": None,
        },
        {"normalization_function": ("rmsnorm",)},
        gguf_defaults=_GRANITE_GGUF,
        rope_switch=True,
        divides_logits=True,
        fused={"hf": ("gate_up",)},
        renamed={
            "hf": {
                "mlp.gate_up_proj": "shared_mlp.input_linear", "mlp.down_proj": "shared_mlp.output_linear",
            },
        },
    ),
    "granite_swa": Family(
        "Granite with windows and sinks",
        _LLAMA_LIKE,
        {
            **_GRANITE_JSON, "max_position_embeddings": 8192, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True, "sliding_window": 128, "layer_types": None, "layer_rope_theta": None,
        },
        gguf_defaults={**_GRANITE_GGUF, "attention.rope_pattern": None},
        features={"sinks": True},
        window_period=4,
        full_first=True,
        divides_logits=True,
    ),
    "hyperclovax": Family(
        "HyperCLOVA X SEED Think",
        json_defaults={
            **_GRANITE_JSON, "attention_multiplier": None, "use_post_norm": True,
        },
        multiplies_logits=True,
        renamed={
            "hf": {
                "post_attention_layernorm@attention_post_norm": "post_norm1",
                "pre_feedforward_layernorm": "post_attention_layernorm",
                "post_feedforward_layernorm": "post_norm2",
            },
        },
    ),
    "minicpm": Family(
        "MiniCPM 1, 2 and 4",
        _LLAMA_LIKE,
        {
            **_BIAS, "max_position_embeddings": 2048, "scale_emb": 1.0, "scale_depth": 1.0,
            "dim_model_base": 1,
        },
        gguf_defaults={
            "embedding_scale": None, "residual_scale": None, "logit_scale": None,
            "rope.scaling.original_context_length": None,
        },
        rope_kinds=("default", "longrope"),
        divides_logits=True,
    ),
    "seed_oss": Family(
        "Seed-OSS",
        json_defaults={
            "attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "head_dim": 128,
            "num_key_value_heads": 8, "max_position_embeddings": 524288,
        },
        bias_keys=("attention_bias", "attention_out_bias", "mlp_bias"),
        renamed={"gguf": {"ffn_norm": "post_attention_norm"}},
    ),
    "ernie4_5": Family(
        "ERNIE 4.5 dense",
        ("gguf", "hf"),
        {
            "use_bias": False, "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
        },
        bias_keys=("use_bias", "use_bias", "use_bias"),
    ),
    "helium": Family(
        "Helium",
        ("hf",),
        {
            "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 4096,
            "num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8, "rope_theta": 100000.0,
        },
        bias_keys=("attention_bias", "", "mlp_bias"),
    ),
    "cwm": Family(
        "CWM",
        json_defaults={
            "mlp_bias": False, "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 128,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": 8192, "layer_types": None,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1000000.0, "factor": 16.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        },
        window_period=4,
        full_first=True,
    ),
    "exaone4": Family(
        "EXAONE 4",
        json_defaults={
            "max_position_embeddings": 2048, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
            "sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None,
        },
        features={"norm_place": "after", "qk_norm": "head"},
        window_period=4,
        rope_in_windows="hybrid",
    ),
    "glm4": Family(
        "GLM-4 0414, GLM-Z1",
        ("gguf", "hf"),
        {
            "attention_bias": True, "max_position_embeddings": 131072, "num_key_value_heads": 2,
            "head_dim": 128, "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5,
        },
        features={"norm_place": "both"},
        bias_keys=("attention_bias", "", ""),
        fused={"gguf": ("gate_up",), "hf": ("gate_up",)},
        renamed={
            "hf": {
                "post_attention_layernorm": "post_self_attn_layernorm",
                "pre_feedforward_layernorm": "post_attention_layernorm",
                "post_feedforward_layernorm": "post_mlp_layernorm",
            },
        },
    ),
    "hunyuan_v1_dense": Family(
        "Hunyuan dense (0.5B to 7B)",
        json_defaults={**_BIAS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        json_ignored={
            "use_qk_norm": (True,), "mlp_bias": (False,), "use_cla": (False,), "use_rotary_pos_emb": (True,),
            "norm_type": ("rms",), "num_experts": (1,), "add_classification_head": (False,),
        },
        json_twice={"attention_head_dim": "head_dim"},
        features={"qk_norm": "head", "qk_norm_late": True},
        alpha_theta=True,
        renamed={
            "hf": {
                "self_attn.q_norm": "self_attn.query_layernorm",
                "self_attn.k_norm": "self_attn.key_layernorm",
            },
        },
    ),
    "iquestcoder": Family(
        "IQuest-Coder",
        _LLAMA_LIKE,
        {
            **_BIASES, "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 128,
            "rms_norm_eps": 1e-5,
        },
    ),
    "arcee": Family(
        "AFM 4.5B (Arcee)",
        _LLAMA_LIKE,
        {**_BIASES, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        features={"activation": "relu_squared"},
    ),
    "apertus": Family(
        "Apertus",
        json_defaults={
            **_BIAS, "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 12000000.0,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 12000000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        },
        json_ignored={"mlp_bias": (False,), "post_norm": (False,), "qk_norm": (True,)},
        features={"activation": "xielu", "qk_norm": "head"},
        gguf_defaults={
            "xielu.alpha_p": None, "xielu.alpha_n": None, "xielu.beta": None, "xielu.eps": None,
        },
        renamed={
            "hf": {
                "input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm",
            },
        },
    ),
    "jais2": Family(
        "Jais 2",
        json_defaults={
            "attention_bias": True, "mlp_bias": True, "max_position_embeddings": 8192, "layer_norm_eps": 1e-5,
        },
        features={"activation": "relu_squared", "norm_kind": "layer", "norm_bias": True},
    ),
    "nanbeige": Family(
        "Nanbeige 4 without loops",
        _LLAMA_LIKE,
        {**_BIASES, "max_position_embeddings": 2048, "num_loops": 1},
        json_ignored={"skip_loop_final_norm": (False, True)},
        gguf_defaults={"num_loops": 1, "skip_loop_final_norm": False, "attention.head_dim": None},
    ),
    "olmo": Family(
        "OLMo 1",
        _LLAMA_LIKE,
        {**_BIAS, "max_position_embeddings": 2048, "clip_qkv": None},
        features={"norm_kind": "plain"},
        norm_eps=1e-5,
        gguf_defaults={"attention.clamp_kqv": 0.0},
    ),
    "olmo2": Family(
        "OLMo 2",
        json_defaults=_OLMO_JSON,
        features=_OLMO,
        gguf_defaults={"rope.freq_base_swa": None},  # OLMo 3's files say olmo2
        window_period=4,
        local_rope=True,
    ),
    "olmo3": Family(
        "OLMo 3",
        json_defaults={
            **_OLMO_JSON, "sliding_window": 4096, "layer_types": None, "rope_theta": 500000.0,
        },
        rope_by_kind=True,
        features=_OLMO,
        window_period=4,
        local_rope=True,
    ),
    "gemma": Family(
        "Gemma",
        json_defaults={**_GEMMA_JSON, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16},
        json_ignored={"hidden_activation": _TANH},
        features=_GEMMA,
        scaled_embedding=True,
        norms_minus_one=True,
    ),
    "gemma2": Family(
        "Gemma 2",
        json_defaults={**_GEMMA2_JSON, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        json_ignored={"hidden_act": _TANH},
        json_twice={"sliding_window_size": "sliding_window"},
        features={**_GEMMA, "norm_place": "both"},
        gguf_defaults={
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 4096,
        },
        window_period=2,
        scaled_embedding=True,
        norms_minus_one=True,
    ),
    "vaultgemma": Family(
        "VaultGemma",
        json_defaults={**_GEMMA2_JSON, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        json_ignored={"hidden_act": _TANH},
        features=_GEMMA,
        window_period=2,
        scaled_embedding=True,
        norms_minus_one=True,
        renamed={"hf": {"post_attention_layernorm": "pre_feedforward_layernorm"}},
    ),
    "gemma3_text": Family(
        "Gemma 3, EmbeddingGemma",
        json_defaults={
            **_GEMMA2_JSON, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0, "sliding_window_pattern": None, "final_logit_softcapping": None,
            "vocab_size": 262208, "use_bidirectional_attention": False,
        },
        json_ignored={"hidden_act": _TANH, "attn_logit_softcapping": ()},
        rope_by_kind=True,
        features={**_GEMMA, "norm_place": "both", "qk_norm": "head"},
        gguf_defaults={
            "rope.freq_base": 1000000.0, "rope.freq_base_swa": 10000.0, "final_logit_softcapping": 0.0,
        },
        window_period=6,
        local_rope=True,
        scaled_embedding=True,
        norms_minus_one=True,
    ),
    "gemma3": Family("Gemma 3 (text)", text_of="gemma3_text"),
    "cohere": Family(
        "Command R, Command R+",
        ("gguf", "hf"),
        {**_COHERE_JSON, "rope_theta": 500000.0, "use_qk_norm": False},
        features=_COHERE,
        gguf_defaults={"logit_scale": 1.0},
        optional_qk_norm="heads",
    ),
    "cohere2": Family(
        "Command R7B, Command A",
        ("gguf", "hf"),
        {**_COHERE_JSON, "sliding_window": 4096, "layer_types": None, "sliding_window_pattern": None},
        {
            "rotary_pct": (1.0,), "position_embedding_type": ("rope_gptj",), "layer_switch": (4,),
            "order_of_interleaved_layers": ("local_attn_first",), "use_embedding_sharing": (True,),
            "use_gated_activation": (True,), "use_parallel_block": (True,), "use_parallel_embedding": (True,),
        },
        features=_COHERE,
        gguf_defaults={"logit_scale": 1.0},
        window_period=4,
        rope_in_windows=True,
    ),
}  # fmt: skip

# General architectures of GGUF files that are called otherwise than the model type.
_GGUF_NAMES = {
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "qwen35": "qwen3_5_text",
    "gemma3": "gemma3_text",
    "command-r": "cohere",
    "mistral3": "ministral3",
    "granite-swa": "granite_swa",
    "hunyuan-dense": "hunyuan_v1_dense",
}
# Likewise of those whose tokens attend to both sides.
_GGUF_BIDIRECTIONAL = {"gemma-embedding": "gemma3_text", "llama-embed": "llama"}
# Model types that GGUF files do not know by a name of their own.
_WRITTEN_AS = {
    "mistral": "llama", "ministral": "llama", "mixtral": "llama", "olmo3": "olmo2",
    "iquestcoder": "llama", "granitemoehybrid": "granite",
}  # fmt: skip
# Model types that no GGUF file is of.
_NOT_IN_GGUF = ("helium", "cwm", "vaultgemma", "hyperclovax")
SUPPORTED = tuple(dict.fromkeys((*FAMILIES, *_GGUF_NAMES, *_GGUF_BIDIRECTIONAL)))

# What says nothing about logits in any family's config.json, by the reason why.
_JSON_HARMLESS: dict[str, tuple[str, ...]] = {
    "names the class, the model or what wrote the file": (
        "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path",
        "is_llama_config", "unsloth_fixed", "unsloth_version", "tokenizer_class",
    ),
    "names code of the model's makers, which nobody runs unasked": ("auto_map",),
    "numbers stay as the file's tensors hold them": ("torch_dtype", "dtype"),
    "matters to training alone": (
        "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
        "router_aux_loss_coef", "router_jitter_noise", "residual_dropout", "mup_denominator",
        "loop_loss_weights", "init_method",
    ),
    "how it is computed, not what": (
        "use_cache", "pretraining_tp", "chunk_size_feed_forward", "attn_implementation", "torchscript",
        "_attn_implementation", "_attn_implementation_autoset", "use_flash_attn", "_flash_attn_2_enabled",
        "cache_implementation",
    ),
    "what a call returns beside logits": (
        "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    ),
    "for models that classify": (
        "problem_type", "id2label", "label2id", "finetuning_task", "class_num", "pool_type", "dense_list",
    ),
    "for other programs or tasks": ("task_specific_params", "transformers.js_config"),
    "ids of tokens: the tokenizer's and the sampling's": (
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
        "decoder_start_token_id", "eod_token_id", "pad_id", "org_vocab_size", "mask_init_id", "im_start_id",
        "im_end_id", "im_newline_id", "text_start_id", "text_end_id",
    ),
    "a limit of the training's texts; max_position_embeddings is the model's": (
        "model_max_length", "max_sequence_length",
    ),
    "about sampling, not logits; see there": (
        "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p",
        "repetition_penalty", "length_penalty", "num_beams", "num_beam_groups", "num_return_sequences",
        "diversity_penalty", "no_repeat_ngram_size",
    ),
}  # fmt: skip
JSON_HARMLESS: dict[str, str] = {key: why for why, keys in _JSON_HARMLESS.items() for key in keys}

# Likewise outside of the text_config of a model that also reads images; a language model leaves those alone.
OUTER_HARMLESS: dict[str, str] = dict.fromkeys(
    (
        "text_config", "vision_config", "image_token_index", "image_token_id", "boi_token_index",
        "boi_token_id", "eoi_token_index", "eoi_token_id", "mm_tokens_per_image", "projector_hidden_act",
        "vision_feature_layer", "vision_feature_select_strategy", "multimodal_projector_bias",
        "spatial_merge_size", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    ),
    "about images",
)  # fmt: skip


def family(architecture: Any, source: Source) -> Family:
    """The family that a file names; raises UnsupportedError with the list of those there are."""
    name = architecture if isinstance(architecture, str) else ""
    name = (_GGUF_NAMES | _GGUF_BIDIRECTIONAL).get(name, name) if source == "gguf" else name
    if name not in FAMILIES:
        raise UnsupportedError(
            f"architecture {str(architecture)[:80]!r} is not supported; supported: {', '.join(SUPPORTED)}"
        )
    return FAMILIES[name]


def has_gguf(model_type: str) -> bool:
    """Whether llama.cpp has a name for models of this model_type, and so files of them."""
    return model_type not in _NOT_IN_GGUF


def gguf_architecture(model_type: str, bidirectional: bool = False) -> str:
    """The general.architecture under which GGUF files hold models of this model_type."""
    names = {kind: name for name, kind in _GGUF_NAMES.items()} | _WRITTEN_AS
    name = names.get(model_type, model_type)
    alike = (other for other, kind in _GGUF_BIDIRECTIONAL.items() if FAMILIES[kind] is family(name, "gguf"))
    return next(alike, name) if bidirectional else name


def is_bidirectional(architecture: str) -> bool:
    """Whether a GGUF file's general.architecture says so by itself. Those of llama-embed have a key."""
    return architecture == "gemma-embedding"


def hf_architecture(architecture: str, n_experts: int) -> str:
    """The model_type under which Hugging Face's files hold what a GGUF file calls so; its own name as it
    is."""
    if architecture == "llama" and n_experts:
        return "mixtral"
    return _GGUF_NAMES.get(architecture, architecture)


def layer_windows(
    n_layers: int, window: int, period: int | list[bool], full_first: bool = False
) -> tuple[int, ...]:
    """Windows by layer; () where there are none. With a period every period-th layer has none (period 1: none
    has one; 0: all have; full_first: from the first on), or by a list of whether a layer has one."""
    if isinstance(period, int):
        if not 0 <= period <= 1024:
            raise FormatError(f"a sliding window pattern of {period} is absurd")
        period = [not period or (layer + (not full_first)) % period != 0 for layer in range(n_layers)]
    windows = tuple(window if windowed else 0 for windowed in period)
    return windows if any(windows) else ()


def layer_mixers(n_layers: int, period: int | list[bool]) -> tuple[Mixer, ...]:
    """Mixers by layer, where every period-th is attention, or by a list of whether a layer is linear."""
    if isinstance(period, int):
        if not 1 <= period <= 1024:
            raise FormatError(f"full attention every {period} layers is absurd")
        period = [(layer + 1) % period != 0 for layer in range(n_layers)]
    return tuple("delta" if linear else "attention" for linear in period)


def layer_ropes(
    row: Family, windows: tuple[int, ...], n_layers: int, local_theta: float, has_window: bool
) -> dict[str, Any]:
    """The fields `ropes` and `local_rope_theta`; has_window: the file states one, whatever layers have it."""
    if row.local_rope and windows:
        ropes = ["local" if window else "usual" for window in windows]
        return {"ropes": tuple(ropes), "local_rope_theta": local_theta}
    if row.rope_in_windows and (has_window or row.rope_in_windows != "hybrid"):
        return {"ropes": tuple("usual" if window else "none" for window in windows or (0,) * n_layers)}
    return {}


def head_dim_of(dim: int, n_heads: int) -> int | None:
    """The head size where nothing states it; None where dim / n_heads is no whole number."""
    return dim // n_heads if dim % n_heads == 0 else None
