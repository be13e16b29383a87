"""How many pages, bytes and tokens a call of a model takes at most. Changes no result.

Imports `backends` (its groups of layers), `config`, `engine` (how long a call may be) and `kvcache`.
loading.py chooses a context by it, llm.py the length of calls.
"""

from __future__ import annotations

from tinyllm import backends
from tinyllm.config import ModelConfig
from tinyllm.engine.engine import CHUNK
from tinyllm.engine.kvcache import pages_held

LEAST_SLOTS = 2  # of states that a text needs: one to go on from, one to write
MOST_SLOTS = 64  # that there may be where nobody says
SCRATCH_BYTES = 64 << 20  # that a call may take in any case


def cache_pages(config: ModelConfig) -> int:
    """Pages of the KV cache that a text of the whole context holds at most."""
    return sum(pages_held(config.context, group.window, CHUNK) for group in backends.cache_groups(config))


def slot_bytes(config: ModelConfig) -> int:
    """Bytes of a slot: what a text keeps beside its pages, whatever its length."""
    return 4 * config.state_floats


def call_bytes(config: ModelConfig, n: int) -> int:
    """About what a call of n tokens needs beside weights and cache, with one row of logits: float32
    activations, twice as wide as the residual, the heads and the hidden layer, what attention adds up head by
    head, and a copy in 8 bits; a second one, with half a byte of scales a number, for a matrix unit."""
    c, rows = config, config.n_experts_used or 1  # of the hidden layer
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    floats = 2 * c.dim + 2 * heads + c.n_heads * (c.head_dim + 32) + 2 * kv + 2 * rows * c.ff_dim + c.rope_dim
    floats += (
        4 * c.n_heads // c.n_kv_heads + c.n_experts + c.n_experts_used * c.dim + c.gated_attention * heads
    )
    if c.delta:
        floats += 2 * c.delta.channels + c.delta.v_width + 2 * c.delta.v_heads
    rounded = (
        max(heads, c.delta.v_width if c.delta else 0, rows * max(c.dim, c.ff_dim))
        * (5 if backends.isa_name() == "amx" else 2)
        // 2
    )
    return n * (4 * floats + rounded) + 4 * c.vocab_size


def call_tokens(config: ModelConfig, weight_bytes: int) -> int:
    """Tokens of a call at most, which change no result: CHUNK, but where a few weights ask for activations by
    the gigabyte no more than take what the weights do, or 64 MB. A model that attends to both sides takes a
    text in one call, so that it is the longest text that may be had."""
    room, most = max(weight_bytes, SCRATCH_BYTES), config.context if config.bidirectional else CHUNK
    return most if call_bytes(config, most) <= room else max(1, room // call_bytes(config, 1))
