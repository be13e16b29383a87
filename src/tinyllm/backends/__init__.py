"""The one door to compiled code: models and caches on a device, the machine's facts, sampling's arithmetic.

Only this module imports `_core`, and cuda.py beside it, which opens the CUDA library. Imports config, errors
and files' TensorInfo. Read next: engine/engine.py, which calls `Model`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

import tinyllm._core as _core
from tinyllm.backends import cuda
from tinyllm.config import ModelConfig
from tinyllm.errors import (
    ArgumentError,
    MemoryLimitError,
    UnsupportedError,
    comes_from,
    integer,
    located,
    size_text,
)
from tinyllm.files import F32 as F32_ID
from tinyllm.files import FORMATS, OWN_FORMATS, FileReader, TensorInfo, read_rows, show

if TYPE_CHECKING:  # read where one is loaded
    from tinyllm.adapters import Pair

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
CacheType = Literal["f16", "f32", "q8_0"]

PAGE = 64  # tokens of a KV page, TL_PAGE
CACHE_TYPES: dict[str, int] = {"f32": 0, "f16": 1, "q8_0": 8}  # by name: the core's format id
# By name: the core's number of what a GGUF file may hold.
FORMAT_IDS: dict[str, int] = {name: id for id, name, *_ in _core.formats() if id not in OWN_FORMATS}

Sampling = _core.Sampling
sample_rows = _core.sample_rows
top_logprobs = _core.top_logprobs
logprob = _core.logprob
live_allocations = _core.live_allocations  # () -> (blocks, bytes) that the core holds now
version = _core.version
isa_name = _core.isa_name  # () -> the one in use
isa_names = _core.isa_names  # () -> those usable here, the best first

log = logging.getLogger(__name__)


def select_isa(name: str) -> None:
    """Use one instruction set from now on; the results do not change.

    Raises UnsupportedError for one that is not usable here.
    """
    if not _core.select_isa(name):
        usable = ", ".join(_core.isa_names())
        raise UnsupportedError(f"instruction set {name!r} is not usable on this machine; there are: {usable}")


if os.environ.get("TINYLLM_ISA"):
    select_isa(os.environ["TINYLLM_ISA"])


class Cpu:
    """The processor as a place for a model, beside `cuda.Gpu`."""

    name, title = "cpu", ""
    table = 0  # the core's own operations

    def free_memory(self) -> int:
        """Bytes this process can still take."""
        return free_memory()


Device = Cpu | cuda.Gpu
CPU = Cpu()


def choose_device(device: str, needed_bytes: int = 0) -> Device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" names here.

    "auto" is the first GPU with needed_bytes of free memory, else the CPU, and the reason is logged. "cuda"
    is that GPU, else the one with the most. Raises UnsupportedError, which says what is missing, for one that
    is not there; ArgumentError for another name.
    """
    if not isinstance(device, str):
        raise TypeError(f"device is a str such as 'cpu' or 'cuda:0', not {type(device).__name__}")
    if device == "cpu":
        return CPU
    number = device[5:] if device.startswith("cuda:") else None
    if device not in ("auto", "cuda") and not (number and number.isdecimal() and number.isascii()):
        raise ArgumentError(f"device is {device!r}; it is 'auto', 'cpu', 'cuda' or 'cuda:N'")
    gpus, reason = find_gpus()
    if number is not None and gpus:
        gpus = [gpu for gpu in gpus if gpu.name == f"cuda:{int(number)}"]
        reason = f"the GPUs here are {', '.join(gpu.name for gpu in find_gpus()[0])}"
    if device != "auto" and not gpus:
        raise UnsupportedError(f"device {device!r} asked for, but {reason}; use device='cpu'")
    free = {gpu: gpu.free_memory() for gpu in gpus}
    fitting = [gpu for gpu in gpus if free[gpu] >= needed_bytes]
    if device != "auto":
        return (fitting or sorted(gpus, key=lambda gpu: -free[gpu]))[0]
    if fitting:
        return fitting[0]
    if gpus:
        room = ", ".join(f"{gpu.name} has {size_text(n)} free" for gpu, n in free.items())
        reason = f"the model needs {size_text(needed_bytes)}, {room}"
    log.info("device cpu: %s", reason)
    return CPU


def find_gpus() -> tuple[list[cuda.Gpu], str]:
    """The GPUs that can be used here, and "" or why there are none.

    TINYLLM_CUDA_LIBRARY names another library than the one beside the core; empty: no GPU is used.
    """
    given = os.environ.get("TINYLLM_CUDA_LIBRARY")
    if given == "":
        return [], "TINYLLM_CUDA_LIBRARY is empty"
    path = Path(given) if given else Path(_core.__file__).with_name("libtinyllm_cuda.so")
    if given is None and _core.cuda_build:
        return [], f"tinyllm was built without it: {_core.cuda_build}"
    return cuda.look(path, _core.abi)


def _read(path: str) -> str:
    """What a file of the system's says; "" where there is none."""
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        if not comes_from(error):
            raise
        return ""


def _read_number(path: str) -> int | None:
    text = _read(path).split()
    return int(text[0]) if text and text[0].isdecimal() else None


def _cgroup_cpus() -> float | None:
    of_version_2 = _read("/sys/fs/cgroup/cpu.max").split()
    if of_version_2[:1] == ["max"]:
        return None
    quota_us = _read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period_us = _read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if len(of_version_2) == 2 and all(number.isdecimal() for number in of_version_2):
        quota_us, period_us = map(int, of_version_2)
    return quota_us / period_us if quota_us and period_us else None


def default_threads() -> int:
    """The physical cores this process may use: its affinity mask, capped by the cgroup's quota."""
    try:
        cpus = sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cpus = list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.strip() or str(cpu))
    quota = _cgroup_cpus()
    n = len(cores) if quota is None else min(len(cores), int(quota))
    return max(1, min(n, MAX_THREADS))


MAX_THREADS = 256
MADE_BYTES = 1 << 24  # of a matrix that no file holds, made at a time
MOST_INT = (1 << 31) - 1  # of the core's


def free_memory() -> int:
    """Bytes this process can still take: the available memory, or what its cgroup leaves if less."""
    free, meminfo = 1 << 62, _read("/proc/meminfo")
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    if not meminfo:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _read_number(limit), _read_number(used)
        if most is not None and now is not None:
            free = min(free, max(0, most - now))
    return free


def read_bandwidth(n_bytes: int, threads: int, repetitions: int = 1, device: Device = CPU) -> float:
    """How fast a device reads n_bytes (at least 1 MB) of its memory now, in GB/s (1e9 bytes).

    The CPU with `threads` threads and the instruction set in use. Raises ArgumentError, MemoryLimitError.
    """
    if isinstance(device, cuda.Gpu):
        return device.read_bandwidth(n_bytes, repetitions)
    return _core.read_bandwidth(n_bytes, threads, repetitions)


def multiply_rate(threads: int, repetitions: int = 20) -> tuple[float, float]:
    """How fast `threads` threads multiply and add now with the instruction set in use, in GMAC/s (1e9): int8
    with int8, which quantized weights take, and floats. Of a repetition each takes about 0.1 ms where there
    are 512-bit registers. Raises ArgumentError.
    """
    return (
        _core.multiply_rate(False, threads, repetitions),
        _core.multiply_rate(True, threads, repetitions),
    )


def info() -> dict[str, Any]:
    """Version, instruction sets (in use, usable, why one that the processor has is not), default threads, the
    GPUs, or why none is used.
    """
    gpus, reason = find_gpus()
    return {
        "version": version,
        "isa": _core.isa_name(),
        "isa_usable": _core.isa_names(),
        "isa_refused": _core.isa_refused(),
        "threads": default_threads(),
        "cuda": bool(gpus),
        "cuda_reason": reason,
        "cuda_devices": [f"{gpu.name} {gpu.title}, {size_text(gpu.total_bytes)}" for gpu in gpus],
        "formats": list(FORMAT_IDS),
    }


def convert(
    data: npt.NDArray[np.uint8],
    source_format: int,
    format: int,
    rows: int,
    k: int,
    *,
    importance: F32 | None = None,
    threads: int = 1,
) -> npt.NDArray[np.uint8]:
    """Rows of a tensor in another format.

    data: uint8, the file's blocks of rows x k numbers in `source_format`. importance: float32 [k], finite and
    >= 0, what a squared error in each column counts; None: all alike. Returns uint8 [rows, bytes of a row],
    the same whatever the threads. A number that is not finite makes its block's numbers not finite.
    Raises ArgumentError, MemoryLimitError.
    """
    return _core.convert(data, source_format, format, rows, k, importance, threads)


def packed_bytes(shape: tuple[int, ...], format: int) -> int:
    """Bytes a tensor [rows, k] takes once packed; vectors are kept as float32."""
    if len(shape) < 2:
        return 4 * int(np.prod(shape))
    rows, k = shape[-2:]
    block = FORMATS[format].block
    panel_bytes = next(row[4] for row in _core.formats() if row[0] == format)
    return -(-rows // 16) * (-(-k // block)) * panel_bytes


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose keys and values share pages of the cache. window: the positions that they look at, 0: all,
    also where a window is as long as the context.
    """

    window: int
    layers: tuple[int, ...]


def cache_groups(config: ModelConfig) -> list[CacheGroup]:
    """The layers by what they look at, in groups of one size (the last of a kind may be smaller), so that a
    page of the cache serves any group. One group where no layer has a window, or all have the same.
    """
    layers_of: dict[int, list[int]] = {}
    for layer, window in enumerate(config.windows or (0,) * config.n_layers):
        if config.mixer(layer) != "attention":  # what it keeps does not grow: states, no pages
            continue
        layers_of.setdefault(window if window < config.context else 0, []).append(layer)
    size = min(map(len, layers_of.values()))
    return [
        CacheGroup(window, tuple(layers[i : i + size]))
        for window, layers in sorted(layers_of.items())
        for i in range(0, len(layers), size)
    ]


def page_bytes(config: ModelConfig, cache_type: CacheType) -> int:
    """Bytes of a KV page: 64 tokens in the layers of a group (tl_cache in tinyllm.h). Raises ArgumentError
    for q8_0 with heads that are no whole groups of 32.
    """
    d = config.head_dim
    if cache_type == "q8_0" and d % 32:
        raise ArgumentError(f"cache type q8_0 needs heads of a multiple of 32 dimensions, not {d}; use f16")
    of_token = (
        2 * (d // 32) * 34
        if cache_type == "q8_0"
        else (d + -(-d // 16) * 16) * (4 if cache_type == "f32" else 2)
    )
    return len(cache_groups(config)[0].layers) * config.n_kv_heads * PAGE * of_token


# The core's numbers for the words of a config (tinyllm.h).
_WORDS: dict[str, tuple[str | None, ...]] = {
    "norm_kind": ("rms", "layer", "plain"),
    "norm_place": ("before", "after", "both"),
    "activation": ("silu", "gelu", "clamped_swiglu", "relu_squared", "xielu"),
    "qk_norm": (None, "head", "heads", "all"),
}
_ROPES = ("usual", "local", "none")
_MIXERS = ("attention", "delta")
_NO_DELTA = dict.fromkeys(("k_heads", "v_heads", "k_dim", "v_dim", "kernel", "tiled"), 0)


def _core_config(config: ModelConfig) -> dict[str, Any]:
    """A config as the core's tl_config spells it."""
    values = asdict(config)
    if config.rope_factors is not None:
        values["rope_factors"] = np.asarray(config.rope_factors, np.float32)
    for name, words in _WORDS.items():
        values[name] = words.index(values[name])
    values["xielu"] = np.asarray(config.xielu_numbers, np.float32) if config.xielu else None
    values["query_span"] = config.original_context or 0
    values["local_rope_theta"] = config.local_rope_theta or 0.0
    values["windows"] = np.asarray(config.windows or (0,) * config.n_layers, np.int32)
    ropes = config.ropes or ("usual",) * config.n_layers
    values["ropes"] = np.asarray([_ROPES.index(rope) for rope in ropes], np.int32)
    mixers = [_MIXERS.index(config.mixer(layer)) for layer in range(config.n_layers)]
    values["mixers"] = np.asarray(mixers, np.int32)
    values |= {f"delta_{name}": int(n) for name, n in (values["delta"] or _NO_DELTA).items()}
    groups = cache_groups(config)
    values["page_layers"] = len(groups[0].layers)
    values["places"] = np.zeros(config.n_layers, np.int32)
    for i, group in enumerate(groups):
        values["places"][list(group.layers)] = i * len(groups[0].layers) + np.arange(len(group.layers))
    return values


@dataclass(frozen=True)
class Candidates:
    """The largest logits of rows, of those tokens that may come, and what a probability needs of the others:
    all that sampling with a top_k below their number, or greedily, asks of a row, to the same bits.

    tokens int32 and logits float32 [rows, n]: the largest first, of equal ones the lower token; where fewer
    may come, the rest are -1 and -inf. sums float64 [rows]: over all tokens, of e^(logit - largest), as
    csrc/sample.c adds it up; not finite where a logit is NaN or +inf. largest float32 [rows]: of all logits.
    An index picks rows, as of an array.
    """

    tokens: npt.NDArray[np.int32]
    logits: F32
    sums: npt.NDArray[np.float64]
    largest: F32

    @property
    def total(self) -> tuple[float, float]:
        """Of one row, what the core takes beside its logits."""
        return float(self.sums), float(self.largest)

    def __getitem__(self, rows: int | slice) -> Candidates:
        return Candidates(self.tokens[rows], self.logits[rows], self.sums[rows], self.largest[rows])

    def __len__(self) -> int:
        return len(self.tokens)


class PagePool:
    """The memory of a KV cache: pages of 64 tokens, growing up to max_pages, and of what layers keep at one
    size slots of slot_bytes (0: there are no such layers), up to max_slots. engine/kvcache.py owns it.
    """

    epoch = 0  # nothing ever takes pages from their owner

    def __init__(self, core: _core.Cache) -> None:
        self._core = core
        self.page_bytes: int = core.page_bytes
        self.max_pages: int = core.max_pages
        self.slot_bytes: int = core.slot_bytes
        self.max_slots: int = core.max_slots

    @property
    def n_pages(self) -> int:
        """Pages that exist so far."""
        return self._core.n_pages

    def grow(self, n_pages: int) -> None:
        """At least n_pages exist from now on. Raises MemoryLimitError, ArgumentError past max_pages."""
        self._core.grow(integer("n_pages", n_pages, 0, self.max_pages))

    def clear_page(self, page: int) -> None:
        """Zeroes a page; do it when it is handed out."""
        self._core.clear_page(self._checked("page", page))

    def copy_page(self, to: int, source: int, n_tokens: int) -> None:
        """Copies a page's first n_tokens tokens, rounded up to a multiple of 16."""
        to, source = self._checked("to", to), self._checked("source", source)
        self._core.copy_page(to, source, integer("n_tokens", n_tokens, 0, PAGE))

    def read_page(self, page: int) -> npt.NDArray[np.uint8]:
        """The bytes of a page, [page_bytes]; the same device and build read them again."""
        return self._core.read_page(self._checked("page", page))

    def write_page(self, page: int, content: npt.NDArray[np.uint8]) -> None:
        """Writes what `read_page` gave. Raises ArgumentError for another number of bytes."""
        self._core.write_page(self._checked("page", page), np.ascontiguousarray(content, np.uint8))

    @property
    def n_slots(self) -> int:
        """Slots that exist so far."""
        return self._core.n_slots

    def grow_slots(self, n_slots: int) -> None:
        """At least n_slots exist from now on. Raises MemoryLimitError, ArgumentError past max_slots."""
        self._core.grow_slots(integer("n_slots", n_slots, 0, self.max_slots))

    def read_slot(self, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes of a slot, [slot_bytes]; the same device and build read them again."""
        return self._core.read_slot(integer("slot", slot, 0, self.n_slots - 1, "a slot that exists"))

    def write_slot(self, slot: int, content: npt.NDArray[np.uint8]) -> None:
        """Writes what `read_slot` gave. Raises ArgumentError for another number of bytes."""
        slot = integer("slot", slot, 0, self.n_slots - 1, "a slot that exists")
        self._core.write_slot(slot, np.ascontiguousarray(content, np.uint8))

    def _checked(self, name: str, page: int) -> int:
        return integer(name, page, 0, self.n_pages - 1, "a page that exists")

    def close(self) -> None:
        """Frees the pages, once no call uses them any more."""
        self._core.close()


# Of a call: the slot of what is before each sequence's first token here, int [n_sequences] (any number where
# that is at position 0), and after which of the call's tokens the state goes into which slot, int [n, 2],
# ascending by token. A slot is not read and written in one call.
States = tuple[npt.ArrayLike, npt.ArrayLike]


class StatePairs:
    """The states of texts that are computed from their beginning on and never go back: two slots each,
    written in turn, and taken from the pool as texts begin. Nothing where the model keeps no states."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._slots: dict[int, list[int]] = {}
        self._unused: list[list[int]] = []

    def next(self, texts: Sequence[int], lengths: Sequence[int]) -> States | None:
        """Of a call that computes so many tokens of each of these texts, in this order. Raises
        MemoryLimitError, ArgumentError past the pool's slots."""
        if not self._pool.slot_bytes:
            return None
        for i in texts:
            if i not in self._slots:
                self._slots[i] = self._unused.pop() if self._unused else self._more()
        read, ends = [self._slots[i][0] for i in texts], np.cumsum(lengths) - 1
        for i in texts:
            self._slots[i].reverse()
        return read, [(int(end), self._slots[i][0]) for i, end in zip(texts, ends, strict=True)]

    def end(self, text: int) -> None:
        """Its slots are another's from now on."""
        if text in self._slots:
            self._unused.append(self._slots.pop(text))

    def _more(self) -> list[int]:
        n = self._pool.n_slots
        self._pool.grow_slots(n + 2)
        return [n, n + 1]


class Adapter:
    """An adapter's pairs beside a model's weights, made by `Model.adapter`; they go when nothing uses it."""

    def __init__(self, core: _core.Adapter) -> None:
        self._core = core
        self.n_bytes: int = core.n_bytes


Uses = Sequence[
    tuple[Adapter, float]
]  # a sequence's adapters, each with its strength, in the order they are added


@dataclass(frozen=True)
class Weight:
    """A tensor that is to become a weight of a model. layer: None for one outside the layers. row_order:
    int32 [rows], the file's row for each of the matrix; None: as they are. format: an id to quantize a float
    tensor to; None: as it is. plus: what is added to a vector's numbers."""

    name: str
    layer: int | None
    info: TensorInfo
    row_order: I32 | None = None
    format: int | None = None
    plus: float = 0.0


class Uploads:
    """Weights on their way into a model: an iterable of them, each when it is packed, and a context that
    packing does not outlive. It begins at once, beside what the caller does before he asks.

    A thread of the core's packs the weights of a file, one after another, and needs nothing of the
    interpreter. Raises, where the weight in question is asked for, FormatError when the file has changed
    since its header was read, NotFoundError, ReadError, MemoryLimitError, UnsupportedError, ArgumentError; no
    weight after it is packed then.
    """

    def __init__(self, model: Model, weights: Sequence[Weight]) -> None:
        self._model = model
        self._batches = [list(batch) for _, batch in groupby(weights, key=_batch_key)]
        self._core: _core.Uploads | None = None
        self._files = ExitStack()
        if self._batches:
            self._begin(self._batches[0])

    def __iter__(self) -> Iterator[Weight]:
        try:
            for batch in self._batches:
                core = self._core or self._begin(batch)
                for i, weight in enumerate(batch):
                    with located(weight.info.path):
                        while core.wait(i) <= i:
                            pass  # handlers of signals run here
                    yield weight
                self.stop()
                for info in {weight.info.path: weight.info for weight in batch}.values():
                    with info.open():  # looks whether it is still the same
                        pass
        finally:
            self.stop()

    def stop(self) -> None:
        """Nothing is packed any more when it returns."""
        core, self._core = self._core, None
        if core is not None:
            core.stop()
        self._files.close()

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _begin(self, batch: Sequence[Weight]) -> _core.Uploads:
        files: list[FileReader | IO[bytes]] = []

        def opened(file: FileReader | IO[bytes]) -> int:
            files.append(file)
            self._files.enter_context(file)
            return file.fileno()

        try:
            paths = {info.path: info for w in batch for info in (w.info, w.info.scales) if info}
            numbers = {path: opened(info.open()) for path, info in paths.items()}
            given: list[_core.Weight] = []
            for w in batch:
                info, order = w.info, w.row_order
                values = self._values(w)
                where: tuple[int, int] | F32 = (numbers[info.path], info.offset)
                if values is not None:
                    where, order = values, np.arange(len(values), dtype=np.int32)
                elif info.columns or info.made:
                    where = (opened(_made(info)), 0)
                given.append(
                    (
                        w.name,
                        -1 if w.layer is None else w.layer,
                        where,
                        F32_ID if values is not None else info.format,
                        info.format if w.format is None else w.format,
                        order,
                        1 if values is not None or info.made else info.row_stride,
                        (numbers[info.scales.path], info.scales.offset) if info.scales else None,
                        info.factors[0] if info.factors else 1.0,
                    )
                )
            self._core = _core.Uploads(self._model._core, given, files, self._model.threads)
        except BaseException:
            self._files.close()
            raise
        return self._core

    def _values(self, w: Weight) -> F32 | None:
        """The numbers of a vector that the core does not read by itself."""
        by_us = w.plus != 0 or (w.info.row_stride != 1 and len(w.info.shape) == 1)
        if not by_us and w.name not in ("output_norm", "output_norm_bias"):
            return None
        values = w.info.read_f32().ravel()
        if w.plus:
            with np.errstate(invalid="ignore"):  # a NaN stays one
                values = values + np.float32(w.plus)
        if w.name == "output_norm":
            self._model._output_norm = values
        if w.name == "output_norm_bias":
            self._model._output_norm_bias = values
        return values if w.row_order is None else values[w.row_order]


def _batch_key(w: Weight) -> tuple[Path, str, str]:
    """The same for neighbours that are packed in one go: of one file, and of what is made first one alone,
    as it takes room of its own."""
    alone = w.info.columns or w.info.made
    return w.info.path, f"{w.name} {w.layer}" if alone else "", w.info.name if alone else ""


class Model:
    """One model's packed weights on one device. Not a text interface: see `tinyllm.load`.

    has_output: False where the output matrix only fills a place; asking for logits is then refused.
    """

    has_output = True

    def __init__(self, config: ModelConfig, *, device: str = "auto", threads: int | None = None) -> None:
        self.config, self.cache_groups = config, cache_groups(config)
        self._device = choose_device(device)
        self.device = self._device.name
        self.threads = default_threads() if threads is None else integer("threads", threads, 1, MAX_THREADS)
        self._output_norm = np.ones(config.dim, np.float32)
        self._output_norm_bias = np.zeros(config.dim, np.float32)
        self._core = _core.Model(_core_config(config), self._device.table)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return _core.isa_name()

    def free_memory(self) -> int:
        """Bytes that are free where the weights and the cache lie."""
        return self._device.free_memory()

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights."""
        return self._core.weight_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        return self._core.token_bytes

    def upload(self, weights: Sequence[Weight]) -> Uploads:
        """Begins to pack weights; what it returns says when they are. Raises as that does."""
        return Uploads(self, weights)

    def tie(self) -> None:
        """The output matrix is the embedding."""
        self._core.tie()

    def check(self) -> None:
        """Raises ArgumentError naming the first missing weight. Until it found none, `forward` raises it."""
        self._core.check()

    def unpack(self, name: str, layer: int | None = None) -> F32:
        """A matrix as float32 [rows, k], exactly the numbers its format means."""
        return self._core.unpack(*_weight(name, layer))

    def adapter(self, pairs: Sequence[Pair]) -> Adapter:
        """Uploads an adapter's pairs; calls say which sequences have it. Raises ArgumentError for a matrix
        that there is not, UnsupportedError where the device has no adapters, MemoryLimitError."""
        if self.device != "cpu" and any("." in pair.name for pair in pairs):
            raise UnsupportedError(
                f"adapters of experts run on the CPU only, not on {self.device}; use device='cpu'"
            )
        core = self._core.adapter(len(pairs))
        for pair in pairs:
            name, layer = _weight(pair.name, pair.layer)
            scale, a, b = float(pair.scale), pair.a, pair.b
            core.add(name, layer, pair.rank, pair.has_bias, scale, a.format, a.bytes(), b.format, b.bytes())
        return Adapter(core)

    def observe(self, name: str, layer: int | None = None) -> npt.NDArray[np.float64]:
        """What a matrix [rows, k] meets from now on: float64 [k + 1] that every call adds to.

        Sums over rows of activations (after the norm, before rounding) of the square of each column, and at
        the end the number of rows. The same bits whatever threads and batches. Raises ArgumentError where
        there is no such matrix, UnsupportedError on a device other than the CPU.
        """
        if self.device != "cpu":
            raise UnsupportedError(
                f"inputs are observed on the CPU only, not on {self.device}; use device='cpu'"
            )
        return self._core.observe(*_weight(name, layer))

    def cache(self, type: CacheType = "f16", max_pages: int | None = None, max_slots: int = 2) -> PagePool:
        """A page pool for this model; max_pages None: all pages of one sequence of the whole context.
        max_slots: of states, where it keeps any."""
        if type not in CACHE_TYPES:
            raise ArgumentError(f"cache type is {type!r}; it is one of {', '.join(CACHE_TYPES)}")
        context_pages = -(-self.config.context // PAGE) * len(self.cache_groups)
        pages = context_pages if max_pages is None else integer("max_pages", max_pages, 1, MOST_INT)
        slots = integer("max_slots", max_slots, 1, MOST_INT) if self.config.state_floats else 0
        return PagePool(self._core.cache(CACHE_TYPES[type], pages, slots))

    def state_pairs(self, cache: PagePool) -> StatePairs:
        """What names the states of texts that are computed from their beginning on: `states=` of calls."""
        return StatePairs(cache)

    def forward(
        self,
        tokens_or_x: npt.ArrayLike,
        positions: npt.ArrayLike,
        sequences: npt.ArrayLike,
        page_tables: npt.ArrayLike,
        *,
        rows: npt.ArrayLike | None = None,
        layers: tuple[int, int] | None = None,
        logits: bool | None = None,
        adapters: Sequence[Uses] | None = None,
        states: States | None = None,
        cache: PagePool,
        should_stop: Callable[[], bool] | None = None,
    ) -> F32:
        """One call of the model for n tokens of any sequences.

        tokens_or_x: token ids int [n], or activations float32 [n, dim]. positions, sequences: int [n]; a
        sequence's tokens stand together in order, sequences ascend. page_tables: int [n_sequences,
        len(cache_groups), max_pages], page ids of `cache`, or [n_sequences, max_pages] where there is one
        group; what is wholly behind a group's window is not read, but must be a page. layers: (first, last),
        default all. adapters: of each sequence those that are applied to its rows, [] for none; None: to no
        row of the call. states: of a model that keeps some (`cache.slot_bytes`). should_stop: asked before
        each layer (at most every 20 ms), True cancels; what it does to the arrays of the call reaches the
        next one, which takes copies. Returns float32 logits [len(rows),
        vocab_size] of the tokens that `rows` lists (None: all), or, where the last layer is not the model's
        last or `logits` is False, activations [n, dim]: the numbers as they are computed, NaN and infinity
        where the weights make them so. Raises ArgumentError for what does not fit, and where `check` has not
        found all weights; CancelledError.
        """
        found: F32 = self._forward(
            tokens_or_x, positions, sequences, page_tables, rows, layers, logits, 0, cache, should_stop,
            adapters=adapters, states=states,
        )  # fmt: skip
        return found

    def candidates(
        self,
        tokens: npt.ArrayLike,
        positions: npt.ArrayLike,
        sequences: npt.ArrayLike,
        page_tables: npt.ArrayLike,
        *,
        rows: npt.ArrayLike,
        n: int,
        allowed: npt.NDArray[np.uint32] | None = None,
        adapters: Sequence[Uses] | None = None,
        states: States | None = None,
        cache: PagePool,
        should_stop: Callable[[], bool] | None = None,
    ) -> Candidates:
        """As `forward` through all layers, but of each of at most 64 rows only the n largest logits, so that
        a vocabulary need not leave the device. n: 1 to most_candidates. allowed: of which tokens, a bit a
        token, the lowest first: uint32 [rows, vocab_size / 32, rounded up]; None: of all."""
        n = integer("n", n, 1, self.most_candidates, f"candidates that {self.device} finds")
        if allowed is not None:
            allowed = _array("allowed", allowed)
            if allowed.dtype != np.uint32:
                raise TypeError(f"allowed must be uint32, not {allowed.dtype}")
            allowed = np.array(allowed, order="C")
        found = self._forward(
            tokens,
            positions,
            sequences,
            page_tables,
            rows,
            None,
            None,
            n,
            cache,
            should_stop,
            allowed,
            adapters,
            states,
        )
        return Candidates(*found)

    @property
    def most_candidates(self) -> int:
        """How many logits of a row the device finds by itself; 0: none."""
        return self._core.most_candidates

    def _forward(
        self,
        tokens_or_x: npt.ArrayLike,
        positions: npt.ArrayLike,
        sequences: npt.ArrayLike,
        page_tables: npt.ArrayLike,
        rows: npt.ArrayLike | None,
        layers: tuple[int, int] | None,
        logits: bool | None,
        n_candidates: int,
        cache: PagePool,
        should_stop: Callable[[], bool] | None,
        allowed: npt.NDArray[np.uint32] | None = None,
        adapters: Sequence[Uses] | None = None,
        states: States | None = None,
    ) -> Any:
        if not isinstance(cache, PagePool):
            raise TypeError(f"cache must be what `Model.cache` returns, not {type(cache).__name__}")
        position = integers("positions", positions, 1)
        given = _array("tokens_or_x", tokens_or_x)
        is_x = given.ndim == 2
        if is_x and given.dtype.kind not in "fiu":
            raise TypeError(f"activations must be numbers, not {given.dtype}")
        if is_x and given.shape != (len(position), self.config.dim):
            raise ArgumentError(
                f"activations are {list(given.shape)}, expected [{len(position)}, {self.config.dim}]"
            )
        tokens = None if is_x else integers("tokens", given, 1)
        x = np.ascontiguousarray(given, np.float32) if is_x else None  # any numbers will do: it stays theirs
        chosen = np.arange(len(position), dtype=np.int32) if rows is None else integers("rows", rows, 1)
        between = integers("layers", (0, self.config.n_layers) if layers is None else layers, 1).tolist()
        if len(between) != 2:
            raise ArgumentError(f"layers is {between}, expected (first, last)")
        wants_logits = between[1] == self.config.n_layers if logits is None else bool(logits)
        if wants_logits and not self.has_output:
            why = "was saved without its output matrix"
            why = "attends to both sides" if self.config.bidirectional else why
            raise UnsupportedError(f"this model {why}: it gives vectors of texts (embed), no logits")
        return self._core.forward(
            cache._core,
            tokens,
            x,
            position,
            integers("sequences", sequences, 1),
            integers("page_tables", page_tables),
            chosen,
            between[0],
            between[1],
            wants_logits,
            n_candidates,
            allowed,
            None if adapters is None else [[(one._core, scale) for one, scale in uses] for uses in adapters],
            None if states is None else integers("states", states[0], 1),
            None if states is None else integers("states", np.reshape(states[1], (-1, 2))),
            self.threads,
            should_stop,
        )

    def output_norm(self, x: F32) -> npt.NDArray[np.float64]:
        """What the output matrix reads of activations x [n, dim] after the last layer: float64 [n, dim], by
        the model's RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450). What is not finite makes what
        is not finite.
        """
        return output_norm(x, self._output_norm, self._output_norm_bias, self.config)

    def close(self) -> None:
        """Frees the weights, once no call uses them any more."""
        self._core.close()

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<Model {config.architecture} on {self.device}: {config.n_layers} layers, dim {config.dim}, "
            f"{size_text(self.weight_bytes)} of weights>"
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "a loaded model cannot be pickled or copied: load it in the process that uses it, or fork after "
            "loading"
        )


def output_norm(x: F32, weight: F32, bias: F32, config: ModelConfig) -> npt.NDArray[np.float64]:
    """`Model.output_norm` with the norm's weights and bias [dim]."""
    with np.errstate(invalid="ignore"):
        y = x.astype(np.float64)
        if config.norm_kind != "rms":
            y -= y.mean(axis=1, keepdims=True)
        y /= np.sqrt((y * y).mean(axis=1, keepdims=True) + config.norm_eps)
        return y * weight + bias


def _made(info: TensorInfo) -> IO[bytes]:
    """A file without a name that holds the rows of a matrix which lies transposed in its own, or which no
    file holds."""
    step = max(1, MADE_BYTES * info.shape[0] // info.n_bytes) if info.made else info.shape[0]
    with ExitStack() as opened:
        try:
            file = opened.enter_context(TemporaryFile())
            for first in range(0, info.shape[0], step):
                rows = read_rows(info, first, min(first + step, info.shape[0]))
                file.write(np.ascontiguousarray(rows).data)
            file.flush()
        except OSError as error:
            if not comes_from(error):
                raise
            raise MemoryLimitError(
                f"no room in {gettempdir()} for {size_text(info.n_bytes)}, where {show(info.name)} is made "
                f"while loading ({error.strerror}); set TMPDIR to a folder with room"
            ) from None
        opened.pop_all()
    return file


def _weight(name: str, layer: int | None) -> tuple[str, int]:
    """A weight as the core names it."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a weight must be a str, not {type(name).__name__}")
    if not (name.isascii() and name.isprintable()):
        raise ArgumentError(f"no weight has the name {show(name)}")
    return name, -1 if layer is None else integer("layer", layer, 0, MOST_INT)


def _array(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except (ValueError, OverflowError) as error:  # rows of different lengths
        raise ArgumentError(f"{name} is no array: {error}") from None


def integers(name: str, values: npt.ArrayLike, n_dimensions: int | None = None) -> I32:
    """int32, a copy of its own. Raises TypeError for what are no whole numbers, ArgumentError for those past
    32 bits and another number of dimensions."""
    array = _array(name, values)
    if array.size and array.dtype.kind not in "iu":
        big = array.dtype == object and all(isinstance(value, int) for value in array.flat)  # past 64 bits
        if not big:
            raise TypeError(f"{name} must be integers, not {array.dtype}")
    if n_dimensions not in (None, array.ndim):
        raise ArgumentError(f"{name} has {array.ndim} dimensions, expected {n_dimensions}")
    if array.dtype != np.int32 and array.size and not -(1 << 31) <= array.min() <= array.max() < 1 << 31:
        raise ArgumentError(f"{name} has a value past 32 bits")
    # A copy, so that what was checked stays so: other threads and should_stop can write to the caller's.
    return np.array(array, np.int32, order="C")
