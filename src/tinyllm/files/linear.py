"""What files hold otherwise of models with linear attention (Qwen 3.5): brought to a tensor a weight.

A gate of attention lies head by head between the rows of its queries; a convolution has a dimension too many;
safetensors hold the logarithm of a decay; layers behind the last guess further tokens, which nothing reads
yet and a warning names. Imports `config`, `errors` and this package's shared part; names.py calls it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tinyllm.config import ModelConfig
from tinyllm.config.families import Source
from tinyllm.errors import FormatError
from tinyllm.files import F32, TensorInfo, read_rows, show

_log = logging.getLogger(__name__)

Rows = npt.NDArray[np.uint8]

# By kind of file: in a layer, the queries and what their gate is called here; the convolution; the decay.
_LAYER: dict[Source, str] = {"gguf": "blk.{}.", "hf": "model.layers.{}."}
_QUERIES: dict[Source, str] = {"gguf": "attn_q.weight", "hf": "self_attn.q_proj.weight"}
QUERY_GATE: dict[Source, str] = {"gguf": "attn_q_gate.weight", "hf": "self_attn.q_gate_proj.weight"}
_CONV: dict[Source, str] = {"gguf": "ssm_conv1d.weight", "hf": "linear_attn.conv1d.weight"}
_DECAY = "linear_attn.A_log"


def apart(tensors: Mapping[str, TensorInfo], config: ModelConfig, source: Source) -> dict[str, TensorInfo]:
    """The tensors of a model, each of one weight. What does not fit stays as it is, for the table to say."""
    found = _without_guessing(tensors, config, source)
    for layer in range(config.n_layers):
        at = _LAYER[source].format(layer)
        if config.mixer(layer) == "attention" and config.gated_attention:
            _part_queries(found, at + _QUERIES[source], at + QUERY_GATE[source], config)
        delta, conv = config.delta, found.get(at + _CONV[source])
        if config.mixer(layer) != "delta" or delta is None:
            continue
        if conv is not None and conv.shape in (
            (delta.channels, delta.kernel),
            (delta.channels, 1, delta.kernel),
        ):
            found[at + _CONV[source]] = replace(conv, shape=(delta.channels * delta.kernel,))
        if source == "hf" and (decay := found.get(at + _DECAY)) is not None:
            found[at + _DECAY] = _decays(decay)
    return found


def _without_guessing(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, source: Source
) -> dict[str, TensorInfo]:
    pattern = r"(model\.)?mtp\..*"
    if source == "gguf":
        behind = range(config.n_layers, config.n_layers + config.guessing_layers)
        pattern = rf"blk\.({'|'.join(map(str, behind)) or 'none'})\..*"
    found = {name: info for name, info in tensors.items() if not re.fullmatch(pattern, name)}
    if len(found) < len(tensors):
        _log.warning(
            "%d tensors that guess further tokens (multi-token prediction: %s) are not read; the answers are "
            "the same without",
            len(tensors) - len(found),
            show(next(name for name in tensors if name not in found)),
        )
    return found


def _part_queries(found: dict[str, TensorInfo], name: str, gate: str, config: ModelConfig) -> None:
    """Rows of a head's queries and rows of its gate come in turn."""
    whole, d, n_heads = found.get(name), config.head_dim, config.n_heads
    if whole is None or len(whole.shape) != 2 or whole.shape[0] != 2 * n_heads * d:
        return
    if gate in found:
        raise FormatError(f"{show(gate)} is what {show(name)} holds as well")

    def part(at: int) -> Callable[[int, int], Rows]:
        def rows(first: int, last: int) -> Rows:
            runs = []
            while first < last:
                head, i = divmod(first, d)
                n = min(last - first, d - i)
                start = (2 * head + at) * d + i
                runs.append(read_rows(whole, start, start + n))
                first += n
            return np.concatenate(runs)

        return rows

    shape, n_bytes = (n_heads * d, whole.shape[1]), whole.n_bytes // 2
    for i, key in enumerate((name, gate)):
        found[key] = replace(whole, shape=shape, offset=0, n_bytes=n_bytes, row_stride=1, made=part(i))


def _decays(logarithms: TensorInfo) -> TensorInfo:
    """-exp of a vector, as GGUF files hold it."""

    def rows(first: int, last: int) -> Rows:
        with np.errstate(over="ignore"):  # what is infinite shows
            values = -np.exp(logarithms.read_f32().ravel().astype(np.float64))[first:last]
        return np.ascontiguousarray(values.astype("<f4")).view(np.uint8).reshape(-1, 4)

    size = 4 * math.prod(logarithms.shape)
    return replace(logarithms, format=F32, offset=0, n_bytes=size, row_stride=1, made=rows)
