"""Measures models: prefill and decoding as llama-bench counts them, beside what the memory could deliver.

Calls `Model.forward` directly: no sampling, no tokenizer; logits of the last token only in prefill, of
every token in decoding. Imports backends, engine, llm, loading, modelfiles, files and errors; prints
nothing. docs/roofline.md says how to read the figures; cli/bench.py prints them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from tinyllm import backends
from tinyllm.backends import I32, PAGE, CacheType, PagePool
from tinyllm.engine.choosing import require_finite
from tinyllm.engine.engine import CHUNK
from tinyllm.engine.needs import call_tokens
from tinyllm.errors import ArgumentError, MemoryLimitError
from tinyllm.files import FORMATS, MEET_FLOATS, FileReader, TensorInfo
from tinyllm.loading import kept_formats, load
from tinyllm.modelfiles import ModelFiles, read_model

READ_BYTES = 1 << 30  # that a sample of the read bandwidth reads at least
HASHED_WHOLE = 64 << 20  # files up to this size are hashed whole
HASHED_PIECES = 64  # of 1 MB each, evenly spread, of larger ones

Progress = Callable[[str, int, int], object]  # (what, done, total)


@dataclass(frozen=True)
class Case:
    """One thing to measure: a prompt of n_prompt tokens, or n_gen tokens for each of n_sequences at once
    (the other of the two is 0), after n_depth tokens that are in the cache already.
    """

    n_prompt: int
    n_gen: int
    n_depth: int
    n_sequences: int
    threads: int
    isa: str
    cache_type: str

    @property
    def name(self) -> str:
        """As llama-bench calls it: pp512, tg128 @ d4096; several sequences are tg128 x 8."""
        what = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        together = f" x {self.n_sequences}" if self.n_sequences > 1 else ""
        return what + together + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_tokens(self) -> int:
        """Tokens that count for the rate."""
        return (self.n_prompt + self.n_gen) * self.n_sequences

    @property
    def n_positions(self) -> int:
        """Positions of the cache that a sequence takes."""
        return self.n_depth + self.n_prompt + self.n_gen


def cases(
    *,
    n_prompt: Iterable[int] = (512,),
    n_gen: Iterable[int] = (128,),
    n_depth: Iterable[int] = (0,),
    n_sequences: Iterable[int] = (1,),
    threads: Iterable[int] | None = None,
    isa: Iterable[str] | None = None,
    cache_type: Iterable[str] = ("f16",),
) -> list[Case]:
    """Every combination, each once; prompts with one sequence only. A 0 in n_prompt or n_gen stands for none.

    threads None: the default number. isa None: the instruction set in use. Raises ArgumentError,
    UnsupportedError for an instruction set that is not usable here.
    """
    threads = [backends.default_threads()] if threads is None else list(threads)
    isa = [backends.isa_name()] if isa is None else list(isa)
    cache_type = list(cache_type)
    for n in threads:
        if not 1 <= n <= backends.MAX_THREADS:
            raise ArgumentError(f"threads is {n}, not in 1..{backends.MAX_THREADS}")
    for name in cache_type:
        if name not in backends.CACHE_TYPES:
            raise ArgumentError(f"cache type is {name!r}; it is one of {', '.join(backends.CACHE_TYPES)}")
    for name in isa:
        with _using(name):
            pass
    tests = [(p, 0, 1) for p in n_prompt if p]
    tests += [(0, g, s) for g, s in itertools.product(n_gen, n_sequences) if g]
    if not tests:
        raise ArgumentError("there is nothing to measure: neither a prompt nor tokens to generate")
    product = itertools.product(isa, threads, cache_type, n_depth, tests)
    found = (Case(p, g, depth, s, t, i, c) for i, t, c, depth, (p, g, s) in product)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Facts:
    """What a model is, from its files. size_bytes and n_params: of all tensors as they are stored.

    layer_macs, output_macs: the multiply-adds with weights that a token takes in the layers, and for its
    logits. float_share: of layer_macs, those with weights that are floats.
    """

    name: str
    kind: str
    size_bytes: int
    n_params: int
    layer_macs: int
    output_macs: int
    float_share: float
    file_hash: str


def read_facts(path: str, weights: str | None = None) -> Facts:
    """Reads a model's headers and hashes its files. weights: what `load` is told to quantize it to; the sizes
    are then those of such a file. Raises what `read_model` does, and ArgumentError.
    """
    return facts_of(read_model(path), weights)


def facts_of(files: ModelFiles, weights: str | None = None) -> Facts:
    """The same of files that are read already."""
    tensors: Mapping[tuple[str, int | None], TensorInfo] = files.weights
    kept = kept_formats(files.weights, weights, str(files.path))
    n_params = sum(_elements(t) for t in tensors.values())
    matrices = {key: t for key, t in tensors.items() if len(t.shape) == 2}
    n_bytes: dict[str, int] = {}
    for key, tensor in matrices.items():
        name = FORMATS[kept[key]].name
        n_bytes[name] = n_bytes.get(name, 0) + _n_bytes(tensor, kept[key])
    formats = "+".join(sorted(n_bytes, key=lambda name: -n_bytes[name]))
    embedding = _elements(tensors["embedding", None])
    layers = {key: _elements(t) for key, t in matrices.items() if key[1] is not None}
    experts = sum(n for (weight, _), n in layers.items() if "." in weight)
    unused = experts - experts * files.config.n_experts_used // max(1, files.config.n_experts)
    layer_macs = sum(layers.values()) - unused
    used = files.config.n_experts_used / max(1, files.config.n_experts)  # of the experts
    in_floats = sum(
        n * (used if "." in key[0] else 1.0) for key, n in layers.items() if kept[key] in MEET_FLOATS
    )
    return Facts(
        name=str(files.path),
        kind=f"{files.config.architecture} {_short(n_params)} {formats}",
        size_bytes=sum(_n_bytes(t, kept[key]) for key, t in tensors.items()),
        n_params=n_params,
        layer_macs=layer_macs,
        output_macs=embedding,  # of the same shape as the output matrix, tied or not
        float_share=min(in_floats / layer_macs, 1.0),
        file_hash=hash_files(sorted({t.path for t in tensors.values()})),
    )


def _elements(tensor: TensorInfo) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _n_bytes(tensor: TensorInfo, format: int) -> int:
    return _elements(tensor) // FORMATS[format].block * FORMATS[format].block_bytes


def _short(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"


def hash_files(paths: Sequence[Path]) -> str:
    """Which file this is. "sha256:..." is the hash of one file of at most 64 MB, as sha256sum prints it.

    Otherwise "sha256-sampled:...", of each file its size (8 bytes, little-endian) and 64 pieces of 1 MB (of a
    smaller one, all of it), the first at its start, the last at its end, evenly spread.
    """
    digest = hashlib.sha256()
    whole = False
    for path in paths:
        with FileReader(path) as file:
            whole = len(paths) == 1 and file.size <= HASHED_WHOLE
            if not whole:
                digest.update(file.size.to_bytes(8, "little"))
            if file.size <= HASHED_WHOLE:
                digest.update(file.read_at(0, file.size))
                continue
            for i in range(HASHED_PIECES):
                digest.update(file.read_at(i * (file.size - (1 << 20)) // (HASHED_PIECES - 1), 1 << 20))
    return f"{'sha256' if whole else 'sha256-sampled'}:{digest.hexdigest()}"


class Subject:
    """A loaded model, ready to run any of the cases: its cache is filled to the greatest depth, and every
    case has run once to warm up.

    facts: see Facts. load_s: seconds of loading, tokenizer included. peak_memory_bytes: the most that this
    process held while the model was loaded and warmed up, less what other models held. Token p of every
    sequence is the same in all cases, so what one case leaves in the cache is what the next expects there.
    """

    def __init__(
        self,
        facts: Facts,
        model: backends.Model,
        for_cases: Sequence[Case],
        progress: Progress | None = None,
        *,
        load_s: float = 0.0,
        others_bytes: int = 0,
    ) -> None:
        """model: loaded in load_s, with a context that holds the cases. others_bytes: memory that this
        process holds for other models.

        Raises MemoryLimitError when the caches do not fit, FormatError where a broken model computes what is
        not finite.
        """
        self.facts, self._model, self.load_s = facts, model, load_s
        self._pools: dict[str, PagePool] = {}
        self._states: dict[str, backends.StatePairs] = {}
        self._tables: dict[str, I32] = {}
        n_positions = max(case.n_positions for case in for_cases)
        try:
            ids = np.random.default_rng(0).integers(model.config.vocab_size, size=n_positions)
            self._ids = ids.astype(np.int32)
            for cache_type in dict.fromkeys(case.cache_type for case in for_cases):
                self._make_cache(cache_type, [c for c in for_cases if c.cache_type == cache_type])
            for i, case in enumerate(for_cases):
                if progress is not None:
                    progress(f"warming up {facts.name}", i, len(for_cases))
                self.run(case)
            self.peak_memory_bytes = _memory("VmHWM") - others_bytes
        except BaseException:
            self.close()
            raise

    @property
    def device(self) -> backends.Device:
        """Where it runs."""
        return backends.choose_device(self._model.device)

    def _make_cache(self, cache_type: str, for_cases: Sequence[Case]) -> None:
        n_sequences = max(case.n_sequences for case in for_cases)
        a_sequence = -(-max(case.n_positions for case in for_cases) // PAGE)
        shape = (n_sequences, len(self._model.cache_groups), a_sequence)
        pool = self._model.cache(cast(CacheType, cache_type), math.prod(shape), 2 * n_sequences)
        self._pools[cache_type], self._states[cache_type] = pool, backends.StatePairs(pool)
        n_bytes = pool.page_bytes * pool.max_pages + pool.slot_bytes * pool.max_slots
        free = self._model.free_memory()
        if n_bytes > free:
            raise MemoryLimitError(
                f"{self.facts.name}: a cache of {n_sequences} x {a_sequence * PAGE} positions takes "
                f"{n_bytes} bytes, {free} are free; measure fewer sequences or less depth"
            )
        pool.grow(pool.max_pages)
        table = np.arange(pool.max_pages, dtype=np.int32).reshape(shape)
        self._tables[cache_type] = table
        deepest = max(for_cases, key=lambda case: case.n_depth)
        self._use(deepest)
        self._prefill(cache_type, 0, deepest.n_depth)
        computed = table[:, :, : -(-deepest.n_depth // PAGE)].reshape(n_sequences, -1)
        for row in computed[1:].tolist():
            for to, source in zip(row, computed[0].tolist(), strict=True):
                pool.copy_page(to, source, PAGE)

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights that a token reads: every matrix and norm once, of experts as many as it
        uses. Of an embedding that is not the output matrix as well it reads a row, which is not counted.
        """
        return self._model.token_bytes

    def kv_bytes(self, cache_type: str) -> int:
        """Bytes of keys and values that one position takes in all layers, from the cache's own geometry."""
        return len(self._model.cache_groups) * self._pools[cache_type].page_bytes // PAGE

    def step_bytes(self, case: Case) -> float:
        """Bytes that decoding reads a step, on average over the case: every packed weight once, and every
        position of every sequence so far. 0 for a prompt, whose limit is arithmetic. Of a mixture of experts
        those of one token count: sequences that choose others read more.
        """
        if not case.n_gen:
            return 0.0
        positions = case.n_depth + (case.n_gen + 1) / 2
        kept = positions * self.kv_bytes(case.cache_type) + self._pools[case.cache_type].slot_bytes
        return self.weight_bytes + case.n_sequences * kept

    def macs(self, case: Case) -> int:
        """Multiply-adds with weights that a run takes."""
        facts = self.facts
        if case.n_prompt:
            return case.n_prompt * facts.layer_macs + facts.output_macs
        return case.n_tokens * (facts.layer_macs + facts.output_macs)

    def run(self, case: Case) -> int:
        """Runs a case once; nanoseconds. Raises FormatError where the last logits are not finite."""
        self._use(case)
        start = time.perf_counter_ns()
        if case.n_prompt:
            logits = self._prefill(case.cache_type, case.n_depth, case.n_prompt)
        else:
            logits = self._decode(case)
        elapsed = time.perf_counter_ns() - start
        require_finite(logits)
        return elapsed

    def _use(self, case: Case) -> None:
        backends.select_isa(case.isa)
        self._model.threads = case.threads

    def _prefill(self, cache_type: str, first: int, n: int) -> backends.F32:
        end, logits = first + n, np.empty((0, 0), np.float32)
        step = call_tokens(self._model.config, self._model.weight_bytes)
        for start in range(first, end, step):
            positions = np.arange(start, min(start + step, end), dtype=np.int32)
            logits = self._model.forward(
                self._ids[positions],
                positions,
                np.zeros_like(positions),
                self._tables[cache_type][:1],
                rows=[len(positions) - 1] if positions[-1] == end - 1 else [],
                states=self._states[cache_type].next([0], [len(positions)]),
                cache=self._pools[cache_type],
            )
        return logits

    def _decode(self, case: Case) -> backends.F32:
        sequences = np.arange(case.n_sequences, dtype=np.int32)
        table = self._tables[case.cache_type][: case.n_sequences]
        for position in range(case.n_depth, case.n_positions):
            positions = np.full_like(sequences, position)
            logits = self._model.forward(
                self._ids[positions],
                positions,
                sequences,
                table,
                states=self._states[case.cache_type].next(sequences.tolist(), [1] * len(sequences)),
                cache=self._pools[case.cache_type],
            )
        return logits

    def result(
        self,
        case: Case,
        samples_ns: list[int],
        limits: list[tuple[Limits, Limits]],
        test_time: str | None = None,
    ) -> Result:
        """What the repetitions of a case say. limits: see Result. test_time: ISO 8601; None: now."""
        return Result(
            facts=self.facts,
            case=case,
            device=self.device,
            load_s=self.load_s,
            peak_memory_bytes=self.peak_memory_bytes,
            weight_bytes=self.weight_bytes,
            kv_bytes=self.kv_bytes(case.cache_type),
            step_bytes=self.step_bytes(case),
            macs=self.macs(case),
            test_time=test_time or _now(),
            samples_ns=samples_ns,
            limits=limits,
        )

    def close(self) -> None:
        """Frees the caches."""
        for pool in self._pools.values():
            pool.close()


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def loaded(
    path: str,
    for_cases: Sequence[Case],
    progress: Progress | None = None,
    *,
    device: str = "auto",
    weights: str | None = None,
    others_bytes: int = 0,
) -> Iterator[Subject]:
    """A model from its files, for as long as the context lasts. device, weights: as `load` takes them.

    Raises what `load` and `Subject` do.
    """
    facts = read_facts(path, weights)
    _reset_peak_memory()
    with (
        load(
            path,
            device=device,
            threads=max(case.threads for case in for_cases),
            context=max(case.n_positions for case in for_cases),
            cache_type=cast(CacheType, for_cases[0].cache_type),
            weights=weights,
            progress=progress and (lambda done, total: progress(f"loading {path}", done, total)),
        ) as llm,
        closing(
            Subject(facts, llm.model, for_cases, progress, load_s=llm.load_s, others_bytes=others_bytes)
        ) as subject,
    ):
        yield subject


@dataclass(frozen=True)
class Result:
    """The repetitions of one case of one model. limits: what the machine gave before and after each."""

    facts: Facts
    case: Case
    device: backends.Device
    load_s: float
    peak_memory_bytes: int
    weight_bytes: int  # that a token reads
    kv_bytes: int  # that a position takes
    step_bytes: float  # that a step of decoding reads; 0 for a prompt
    macs: int  # of a run
    test_time: str
    samples_ns: list[int]
    limits: list[tuple[Limits, Limits]]

    @property
    def samples_ts(self) -> list[float]:
        """Tokens a second, by repetition."""
        return [1e9 * self.case.n_tokens / ns for ns in self.samples_ns]

    @property
    def samples_gb_s(self) -> list[float]:
        """GB/s that decoding read, by repetition."""
        return [self.step_bytes * self.case.n_gen / ns for ns in self.samples_ns]

    def record(self) -> dict[str, Any]:
        """One row of the table: llama-bench's keys, where the figure exists here, and our own after them."""
        case, facts = self.case, self.facts
        samples_ts = self.samples_ts
        reads = [(before.read_gb_s, after.read_gb_s) for before, after in self.limits]
        read = [x for pair in reads for x in pair]
        shares = [
            100 * gb_s / statistics.mean(pair) for gb_s, pair in zip(self.samples_gb_s, reads, strict=True)
        ]
        gmac_s = [self.macs / ns for ns in self.samples_ns]
        peaks = [
            statistics.mean(limit.gmac_s(facts.float_share) for limit in pair)
            for pair in self.limits
            if pair[0].int8_gmac_s
        ]
        of_peak = [100 * rate / peak for rate, peak in zip(gmac_s, peaks, strict=False)]
        return {
            "build_commit": f"tinyllm-{backends.version}",
            "build_number": 0,
            "cpu_info": cpu_name(),
            "gpu_info": self.device.title,
            "backends": "CPU" if self.device.name == "cpu" else "CUDA",
            "model_filename": facts.name,
            "model_type": facts.kind,
            "model_size": facts.size_bytes,
            "model_n_params": facts.n_params,
            "n_batch": CHUNK,
            "n_ubatch": CHUNK,
            "n_threads": case.threads,
            "type_k": case.cache_type,
            "type_v": case.cache_type,
            "n_prompt": case.n_prompt,
            "n_gen": case.n_gen,
            "n_depth": case.n_depth,
            "test_time": self.test_time,
            "avg_ns": round(statistics.mean(self.samples_ns)),
            "stddev_ns": round(_deviation(self.samples_ns)),
            "avg_ts": statistics.mean(samples_ts),
            "stddev_ts": _deviation(samples_ts),
            "samples_ns": self.samples_ns,
            "samples_ts": samples_ts,
            "version": backends.version,
            "test": case.name,
            "device": self.device.name,
            "isa": case.isa,
            "n_sequences": case.n_sequences,
            "median_ns": round(statistics.median(self.samples_ns)),
            "median_ts": statistics.median(samples_ts),
            "min_ts": min(samples_ts),
            "max_ts": max(samples_ts),
            "weight_bytes_per_token": self.weight_bytes,
            "kv_bytes_per_position": self.kv_bytes,
            "bytes_per_step": self.step_bytes,
            "gb_s": statistics.median(self.samples_gb_s),
            "percent_of_read": statistics.median(shares),
            "read_gb_s": statistics.median(read),
            "read_gb_s_min": min(read),
            "read_gb_s_max": max(read),
            "samples_read_gb_s": reads,
            "gmac_s": statistics.median(gmac_s),
            "peak_gmac_s": statistics.median(peaks) if peaks else None,
            "percent_of_peak": statistics.median(of_peak) if of_peak else None,
            "load_s": self.load_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "file_hash": facts.file_hash,
        }


def _deviation(samples: Sequence[float]) -> float:
    """The sample's standard deviation (n - 1), as llama-bench has it; 0 for one."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def measure(
    paths: Sequence[str],
    of: Sequence[Case],
    *,
    device: str = "auto",
    weights: Sequence[str | None] | None = None,
    repetitions: int = 5,
    read_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Measures every case with every model, the models in turns, every other turn in reverse order, so that
    what the machine's neighbours do meets them alike. All models are in memory at once, on one device, named
    as for `load`. weights: of each path, as `load` takes it; None: all as they are. read_bytes: see
    `sample_read_gb_s`.

    Returns the results case by case, models in the order given. Raises what `loaded` does.
    """
    with ExitStack() as stack:
        stack.enter_context(_using(of[0].isa))
        subjects, at_start = [], _memory("VmRSS")
        for path, kept in zip(paths, weights or [None] * len(paths), strict=True):
            others = _memory("VmRSS") - at_start
            one = loaded(path, of, progress, device=device, weights=kept, others_bytes=others)
            subjects.append(stack.enter_context(one))
        results, total = [], len(of) * repetitions * len(paths)
        for done, case in enumerate(of):
            times: list[list[int]] = [[] for _ in subjects]
            limits: list[list[tuple[Limits, Limits]]] = [[] for _ in subjects]
            test_time = _now()
            sample = partial(sample_limits, case, read_bytes, subjects[0].device)
            before = sample()
            for turn in range(repetitions):
                order = list(range(len(subjects)))[:: -1 if turn % 2 else 1]
                for n, i in enumerate(order):
                    if progress is not None:
                        progress(case.name, (done * repetitions + turn) * len(paths) + n, total)
                    times[i].append(subjects[i].run(case))
                    after = sample()
                    limits[i].append((before, after))
                    before = after
            for subject, samples_ns, around in zip(subjects, times, limits, strict=True):
                results.append(subject.result(case, samples_ns, around, test_time))
        return results


# The machine


@contextmanager
def _using(isa: str) -> Iterator[None]:
    """An instruction set for a while. Raises UnsupportedError where it is not usable."""
    before = backends.isa_name()
    backends.select_isa(isa)
    try:
        yield
    finally:
        backends.select_isa(before)


@dataclass(frozen=True)
class Limits:
    """What the machine gives at a moment: GB/s that it reads, and 1e9 multiply-adds a second, of int8 and of
    floats; these are 0 where they were not measured.
    """

    read_gb_s: float
    int8_gmac_s: float = 0.0
    float_gmac_s: float = 0.0

    def gmac_s(self, float_share: float) -> float:
        """The most that work of which that share is with float weights could reach."""
        return 1 / ((1 - float_share) / self.int8_gmac_s + float_share / self.float_gmac_s)


def sample_limits(
    case: Case, read_bytes: int | None = None, device: backends.Device = backends.CPU
) -> Limits:
    """What a case runs against now: of all the memory, for a prompt on the CPU the arithmetic as well, of the
    case's threads and instruction set. read_bytes: as `sample_read_gb_s` takes it.
    """
    read = sample_read_gb_s(case.threads, read_bytes, device)
    if case.n_prompt and device.name == "cpu":
        with _using(case.isa):
            rates = [backends.multiply_rate(case.threads) for _ in range(3)]
        return Limits(read, *map(max, zip(*rates, strict=True)))  # others only take from it
    return Limits(read)


def sample_read_gb_s(
    threads: int, n_bytes: int | None = None, device: backends.Device = backends.CPU
) -> float:
    """GB/s at which a device's memory is read now, three times over: by all of a GPU, or by `threads` threads
    with the best instruction set.

    n_bytes: of memory; None: 1 GB or four times the last-level caches, at most a quarter of what is free.
    """
    if n_bytes is None:
        n_bytes = min(max(READ_BYTES, 4 * last_level_cache_bytes()), device.free_memory() // 4)
    with _using(backends.isa_names()[0]):
        return backends.read_bandwidth(max(n_bytes, 1 << 20), threads, 3, device)


def last_level_cache_bytes() -> int:
    """All of the machine's L3 caches together; 0 where the system does not tell."""
    caches: dict[str, int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            shared, size = ((index / name).read_text().strip() for name in ("shared_cpu_list", "size"))
            caches[shared] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return sum(caches.values())


def cpu_name() -> str:
    """The processor's name, as the system has it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory(field: str) -> int:
    """Bytes of VmRSS (held now) or VmHWM (the most since the last reset), or what comes closest."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import resource  # not on every system that imports this module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _reset_peak_memory() -> None:
    with suppress(OSError):  # where it cannot be reset, the peak is the whole life's
        Path("/proc/self/clear_refs").write_text("5")
