"""Layers of linear attention (Qwen 3.5) in the miniature models: their tensors' shapes, and how llama.cpp's
converter writes them. Imports numpy alone; `helpers_models.py` and `helpers_gguf.py` ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Config = Mapping[str, Any]


def is_linear(config: Config, layer: int) -> bool:
    return str((config.get("layer_types") or {layer: ""})[layer]) == "linear_attention"


def sizes(config: Config) -> tuple[int, int, int, int, int]:
    """k_heads, v_heads, k_dim, v_dim, kernel."""
    names = (
        "num_key_heads",
        "num_value_heads",
        "key_head_dim",
        "value_head_dim",
        "conv_kernel_dim",
    )
    k_heads, v_heads, k_dim, v_dim, kernel = (int(config[f"linear_{name}"]) for name in names)
    return k_heads, v_heads, k_dim, v_dim, kernel


def linear_shapes(config: Config, at: str) -> dict[str, tuple[int, ...]]:
    """The tensors of such a layer, under Hugging Face's names behind `at`."""
    k_heads, v_heads, k_dim, v_dim, kernel = sizes(config)
    dim, values, channels = config["hidden_size"], v_heads * v_dim, 2 * k_heads * k_dim + v_heads * v_dim
    return {
        at + "linear_attn.dt_bias": (v_heads,),
        at + "linear_attn.A_log": (v_heads,),
        at + "linear_attn.conv1d.weight": (channels, 1, kernel),
        at + "linear_attn.norm.weight": (v_dim,),
        at + "linear_attn.out_proj.weight": (dim, values),
        at + "linear_attn.in_proj_qkv.weight": (channels, dim),
        at + "linear_attn.in_proj_z.weight": (values, dim),
        at + "linear_attn.in_proj_b.weight": (v_heads, dim),
        at + "linear_attn.in_proj_a.weight": (v_heads, dim),
    }


_IN_GGUF = {
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "conv1d.weight": "ssm_conv1d.weight",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
    "in_proj_qkv.weight": "attn_qkv.weight",
    "in_proj_z.weight": "attn_gate.weight",
    "in_proj_b.weight": "ssm_beta.weight",
    "in_proj_a.weight": "ssm_alpha.weight",
}


def linear_in_gguf(config: Config, name: str, w: F32) -> tuple[str, F32]:
    """A tensor's name and numbers as llama.cpp's converter writes it: value heads stand so that head h goes
    with key head h % k_heads, where Hugging Face has those of a key head together."""
    _, _, layer, _, part = name.split(".", 4)
    k_heads, v_heads, k_dim, v_dim, _ = sizes(config)
    order = np.arange(v_heads).reshape(k_heads, -1).T.ravel()  # of value heads
    numbers = (order[:, None] * v_dim + np.arange(v_dim)).ravel()  # of values
    behind = np.concatenate([np.arange(2 * k_heads * k_dim), 2 * k_heads * k_dim + numbers])  # q and k
    if part == "A_log":
        w = -np.exp(w)
    if part == "conv1d.weight":
        w = w[:, 0]
    if part == "out_proj.weight":
        w = w[:, numbers]
    rows = {
        "dt_bias": order,
        "A_log": order,
        "in_proj_a.weight": order,
        "in_proj_b.weight": order,
        "in_proj_z.weight": numbers,
        "conv1d.weight": behind,
        "in_proj_qkv.weight": behind,
    }
    return f"blk.{layer}.{_IN_GGUF[part]}", np.ascontiguousarray(w[rows[part]] if part in rows else w)
