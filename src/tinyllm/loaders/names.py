"""The one table of tensor names: what this project, GGUF and Hugging Face call each weight, and its shape.

`map_tensors` matches a file's tensors with the table and reports all that is missing, extra or wrongly shaped
at once. A new family adds rows. Imports `config`, `errors` and this package's shared part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig, family
from ..errors import FormatError
from . import BF16, F16, F32, FORMATS, TensorInfo, show

Source = Literal["gguf", "hf"]
Key = tuple[str, "int | None"]  # (canonical name, layer)
MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Name:
    """One row: the names of a weight, with {} where the number of the layer stands, and its shape (rows,
    k)."""

    canonical: str
    gguf: str
    hf: str
    shape: Callable[[ModelConfig], tuple[int, ...]]
    # Whether a model of this config has it; None: as the file has it, but in all layers or in none.
    present: Callable[[ModelConfig], bool | None] = lambda config: True
    rotated: Callable[[ModelConfig], int] | None = None  # number of heads, where the rows are rotated by RoPE

    @property
    def per_layer(self) -> bool:
        return "{}" in self.gguf


def _q_dim(c: ModelConfig) -> int:
    return c.n_heads * c.head_dim


def _kv_dim(c: ModelConfig) -> int:
    return c.n_kv_heads * c.head_dim


def _linear(
    suffix: str,
    gguf: str,
    hf: str,
    rows: Callable[[ModelConfig], int],
    k: Callable[[ModelConfig], int],
    bias: Callable[[ModelConfig], bool | None],
    rotated: Callable[[ModelConfig], int] | None = None,
) -> tuple[Name, Name]:
    """A matrix w<suffix> and its bias b<suffix>."""
    gguf, hf = f"blk.{{}}.{gguf}", f"model.layers.{{}}.{hf}"
    return (
        Name(f"w{suffix}", f"{gguf}.weight", f"{hf}.weight", lambda c: (rows(c), k(c)), rotated=rotated),
        Name(f"b{suffix}", f"{gguf}.bias", f"{hf}.bias", lambda c: (rows(c),), bias, rotated),
    )


def _vector(c: ModelConfig) -> tuple[int, ...]:
    return (c.dim,)


def _vocabulary(c: ModelConfig) -> tuple[int, ...]:
    return (c.vocab_size, c.dim)


def _dim(c: ModelConfig) -> int:
    return c.dim


def _ff_dim(c: ModelConfig) -> int:
    return c.ff_dim


def _attention_bias(c: ModelConfig) -> bool | None:
    return c.attention_bias


def _ffn_bias(c: ModelConfig) -> bool | None:
    return c.ffn_bias


_LAYER = "model.layers.{}."
TABLE: tuple[Name, ...] = (
    Name("embedding", "token_embd.weight", "model.embed_tokens.weight", _vocabulary),
    Name("output_norm", "output_norm.weight", "model.norm.weight", _vector),
    Name("output", "output.weight", "lm_head.weight", _vocabulary, lambda c: not c.tied),
    Name("attention_norm", "blk.{}.attn_norm.weight", _LAYER + "input_layernorm.weight", _vector),
    *_linear("q", "attn_q", "self_attn.q_proj", _q_dim, _dim, _attention_bias, lambda c: c.n_heads),
    *_linear("k", "attn_k", "self_attn.k_proj", _kv_dim, _dim, _attention_bias, lambda c: c.n_kv_heads),
    *_linear("v", "attn_v", "self_attn.v_proj", _kv_dim, _dim, _attention_bias),
    *_linear("o", "attn_output", "self_attn.o_proj", _dim, _q_dim, _attention_bias),
    Name("ffn_norm", "blk.{}.ffn_norm.weight", _LAYER + "post_attention_layernorm.weight", _vector),
    *_linear("_gate", "ffn_gate", "mlp.gate_proj", _ff_dim, _dim, _ffn_bias),
    *_linear("_up", "ffn_up", "mlp.up_proj", _ff_dim, _dim, _ffn_bias),
    *_linear("_down", "ffn_down", "mlp.down_proj", _dim, _ff_dim, _ffn_bias),
)

# Tensors that say nothing new: tables of rotary frequencies, and an output matrix beside tied embeddings
# (which transformers drops as well). rope_freqs.weight is read into the config.
_HARMLESS = {
    "gguf": re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight"),
    "hf": re.compile(r"(.*\.)?rotary_emb\.inv_freq|lm_head\.weight"),
}


class Weights(Mapping[Key, TensorInfo]):
    """The tensors of a model by (canonical name, layer), layer None for those outside the layers.

    `weights.get(("bq", 3))` is None where a model has no such bias; "output" is absent where the embedding
    serves.
    """

    def __init__(self, tensors: dict[Key, TensorInfo], row_orders: dict[str, npt.NDArray[np.int32]]) -> None:
        self._tensors = tensors
        self._row_orders = row_orders

    def __getitem__(self, key: Key) -> TensorInfo:
        return self._tensors[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def row_order(self, canonical: str) -> npt.NDArray[np.int32] | None:
        """For each row as the model wants it (half-split order), the row of the file; None: as they are.

        int32 [rows]; the same in every layer.
        """
        return self._row_orders.get(canonical)


def map_tensors(tensors: Mapping[str, TensorInfo], config: ModelConfig, source: Source) -> Weights:
    """Match a file's tensors with the table.

    Raises one FormatError that lists every tensor that is missing, unexpected, wrongly shaped, or a norm or
    bias in blocks.
    """
    found: dict[Key, TensorInfo] = {}
    problems: list[str] = []
    expected: set[str] = set()
    for row in TABLE:
        name = row.gguf if source == "gguf" else row.hf
        keys: list[Key] = (
            [(row.canonical, i) for i in range(config.n_layers)] if row.per_layer else [(row.canonical, None)]
        )
        names = [name.format(layer) for _, layer in keys]
        present = row.present(config)
        if present is None:
            present = any(name in tensors for name in names)
        if not present:
            continue
        expected.update(names)
        shape = row.shape(config)
        for key, name in zip(keys, names, strict=True):
            if name in tensors:
                found[key] = tensors[name]
                problems.extend(_mismatch(tensors[name], shape))
            else:
                problems.append(f"{name} is missing, expected with shape {shape}")
    harmless = _HARMLESS[source]
    extra = [name for name in tensors if name not in expected and not harmless.fullmatch(name)]
    problems += [f"{show(name)} of shape {tensors[name].shape} is not expected" for name in sorted(extra)]
    if problems:
        more = f"\n  and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:MAX_PROBLEMS])
        model = f"{config.architecture}, {config.n_layers} layers"
        raise FormatError(f"the tensors do not fit the config ({model}):{listed}{more}")
    return Weights(found, _row_orders(config, source))


def _mismatch(tensor: TensorInfo, shape: tuple[int, ...]) -> Iterator[str]:
    if tensor.shape != shape:
        yield f"{tensor.name} has shape {tensor.shape}, expected {shape}"
    elif len(shape) == 1 and tensor.format not in (F32, F16, BF16):
        yield f"{tensor.name} is {FORMATS[tensor.format].name}; a norm or bias must be F32, F16 or BF16"


def _row_orders(config: ModelConfig, source: Source) -> dict[str, npt.NDArray[np.int32]]:
    if source != "gguf" or not family(config.architecture).gguf_interleaved:
        return {}
    return {row.canonical: half_split_order(config, row.rotated(config)) for row in TABLE if row.rotated}


def half_split_order(config: ModelConfig, n_heads: int) -> npt.NDArray[np.int32]:
    """Source rows, int32 [n_heads * head_dim], that bring interleaved rotary pairs (2i, 2i + 1) to (i, i +
    rope_dim/2).

    Dimensions of a head past rope_dim stay where they are. q.k does not change, as q and k move alike.
    """
    head = np.arange(config.head_dim, dtype=np.int32)
    head[: config.rope_dim] = np.arange(config.rope_dim, dtype=np.int32).reshape(-1, 2).T.ravel()
    starts = np.arange(n_heads, dtype=np.int32) * config.head_dim
    return np.asarray((starts[:, None] + head).ravel(), np.int32)
