"""The built module's types (csrc/bindings.cpp). tests/test_boundary.py compares this file with the module."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

version: str
abi: int  # tl_seam_abi(): what a backend's library must say
cuda_build: str  # why libtinyllm_cuda.so was not built; empty: it was

class Cache:
    """Pages of the KV cache."""

    def grow(self, n_pages: int) -> None: ...
    def clear_page(self, page: int) -> None: ...
    def copy_page(self, to: int, source: int, n_tokens: int) -> None: ...
    def read_page(self, page: int) -> NDArray[np.uint8]: ...
    def write_page(self, page: int, bytes: NDArray[np.uint8]) -> None: ...
    @property
    def n_pages(self) -> int: ...
    @property
    def max_pages(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def grow_slots(self, n_slots: int) -> None: ...
    def read_slot(self, slot: int) -> NDArray[np.uint8]: ...
    def write_slot(self, slot: int, bytes: NDArray[np.uint8]) -> None: ...
    @property
    def n_slots(self) -> int: ...
    @property
    def max_slots(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    def close(self) -> None: ...

class Adapter:
    """Low-rank pairs beside a model's matrices."""

    def add(
        self,
        name: str,
        layer: int,
        rank: int,
        has_bias: bool,
        scale: float,
        a_format: int,
        a: NDArray[np.uint8],
        b_format: int,
        b: NDArray[np.uint8],
    ) -> None: ...
    @property
    def n_bytes(self) -> int: ...

class Model:
    """Packed weights and the forward pass over them."""

    def __init__(self, config: Mapping[str, object], backend: int) -> None: ...
    def tie(self) -> None: ...
    def check(self) -> None: ...
    def forward(
        self,
        cache: Cache,
        tokens: NDArray[np.int32] | None,
        x: NDArray[np.float32] | None,
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        page_tables: NDArray[np.int32],
        rows: NDArray[np.int32],
        first_layer: int,
        last_layer: int,
        logits: bool,
        n_candidates: int,
        allowed: NDArray[np.uint32] | None,
        adapters: Sequence[Sequence[tuple[Adapter, float]]] | None,
        states_in: NDArray[np.int32] | None,
        saves: NDArray[np.int32] | None,
        threads: int,
        should_stop: Callable[[], bool] | None,
    ) -> Any: ...
    def adapter(self, room: int) -> Adapter: ...
    @property
    def most_candidates(self) -> int: ...
    def unpack(self, name: str, layer: int) -> NDArray[np.float32]: ...
    def observe(self, name: str, layer: int) -> NDArray[np.float64]: ...
    def cache(self, type: int, max_pages: int, max_slots: int) -> Cache: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def token_bytes(self) -> int: ...
    def close(self) -> None: ...

Place = tuple[int, int]  # the number of an open file, an offset
Weight = tuple[
    str,  # name
    int,  # layer
    Place | NDArray[np.float32],
    int,  # format there
    int,  # format as it is kept
    NDArray[np.int32] | None,  # order of the rows
    int,  # row_stride
    Place | None,  # of scales apart
    float,  # factor of all numbers
]

class Uploads:
    """Weights that a thread packs, one after another."""

    def __init__(self, model: Model, weights: Sequence[Weight], files: object, threads: int) -> None: ...
    def wait(self, n: int) -> int:
        """How many are packed, once it is more than n, or 20 ms later. Raises what number n met."""

    def stop(self) -> None: ...

class Sampling:
    """What a text asks of sampling."""

    def __init__(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        typical_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        penalty_window: int,
        xtc_probability: float,
        xtc_threshold: float,
        bias_tokens: Sequence[int],
        bias: Sequence[float],
        no_repeat_ngram_size: int,
        bad_words: Sequence[Sequence[int]],
        dry_multiplier: float,
        dry_base: float,
        dry_allowed_length: int,
        dry_penalty_last_n: int,
        breakers: Sequence[Sequence[int]],
        seed: int,
    ) -> None: ...
    def sample(
        self,
        logits: NDArray[np.float32],
        history: NDArray[np.int32],
        position: int,
        banned: NDArray[np.int32],
        total: tuple[float, float] | None = None,
        allowed: NDArray[np.uint32] | None = None,
    ) -> tuple[int, float]: ...

Row = tuple[
    Sampling, NDArray[np.float32], NDArray[np.int32], int, NDArray[np.int32], NDArray[np.uint32] | None
]

def sample_rows(rows: Sequence[Row], threads: int) -> list[tuple[int, float] | str]:
    """`sample` for each, its arguments but the total, in one call; the message where it would raise."""

def formats() -> list[tuple[int, str, int, int, int]]:
    """(id, name, numbers a block, bytes a block, bytes of 16 rows' blocks when packed)."""

def pack_unpack(data: bytes, format: int, rows: int, k: int) -> NDArray[np.float32]: ...
def convert(
    data: NDArray[np.uint8],
    source_format: int,
    format: int,
    rows: int,
    k: int,
    importance: NDArray[np.float32] | None,
    threads: int,
) -> NDArray[np.uint8]: ...
def top_logprobs(
    logits: NDArray[np.float32], k: int, total: tuple[float, float] | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
def logprob(logits: NDArray[np.float32], token: int) -> float: ...
def read_strings(data: bytes, at: int, count: int, found: list[str]) -> int:
    """Appends to `found` those of `count` strings, each behind its length (uint64), that are whole in `data`
    from `at` on; returns where the next one begins. Raises UnicodeDecodeError."""

def sentencepiece_pieces(texts: list[str], scores: NDArray[np.float32], types: NDArray[np.uint8]) -> bytes:
    """The pieces of a ModelProto (sentencepiece_model.proto), a type below 128 each."""

def random(seed: int, position: int) -> float: ...
def read_bandwidth(n_bytes: int, threads: int, repetitions: int) -> float: ...
def multiply_rate(floats: bool, threads: int, repetitions: int) -> float: ...
def live_allocations() -> tuple[int, int]: ...
def isa_names() -> list[str]: ...
def isa_name() -> str: ...
def isa_refused() -> str | None: ...
def select_isa(name: str) -> bool: ...
