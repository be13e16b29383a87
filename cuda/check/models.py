"""Times models with random weights in the shapes of well-known ones, as tinyllm-bench does (models.json), and
the memory they run against (bandwidth.json).

No model file is read or written: each format's blocks are repeated in a file in memory, from which every
layer is loaded. `models.py bandwidth | first | more | tiny`; tiny is a small model of every type, untimed,
for compute-sanitizer.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from common import EMULATE, read, seconds_left, write

import tinyllm
from tinyllm import backends
from tinyllm.config import GenerationDefaults, config_from_gguf
from tinyllm.files import TensorInfo
from tinyllm.files.names import map_tensors
from tinyllm.loading import load
from tinyllm.measure import benchmark
from tinyllm.modelfiles import ModelFiles

# A model and which groups of cases (cases_of): alone, then in batches and far into the context. What the
# targets are about comes first.
ALONE, FURTHER = slice(0, 1), slice(1, None)
FIRST = [
    ("llama-3.1-8b", "q4_k_m", ALONE),
    ("llama-2-7b", "q4_0", ALONE),
    ("llama-3.2-1b", "q4_k_m", ALONE),
    ("llama-2-70b", "q4_0", ALONE),
]
MORE = [
    ("llama-3.1-8b", "q4_k_m", FURTHER),
    ("llama-3.1-8b", "q4_0", ALONE),
    ("llama-3.1-8b", "q8_0", ALONE),
    ("llama-3.2-1b", "q4_0", ALONE),
    ("llama-3.2-1b", "q8_0", ALONE),
    ("llama-2-7b", "q4_k_m", ALONE),
    ("llama-2-7b", "q8_0", ALONE),
    ("llama-3.2-1b", "q4_k_m", FURTHER),
    ("llama-2-7b", "q4_0", FURTHER),
    ("llama-2-70b", "q4_0", FURTHER),
]
REPETITIONS = 3
PER_CASE_S = 2.0  # kept for the next stage's start, and not begun below


def files_of(shape_name: str, type_name: str) -> ModelFiles:
    """A model as `load` takes it, every tensor of a format and row length in the same bytes."""
    shape, type = synthetic.SHAPES[shape_name], synthetic.TYPES[type_name]
    wanted = synthetic.tensors(shape, type)
    longest: dict[tuple[str, int], int] = {}
    for t in wanted:
        key = (t.format, t.shape[-1] if len(t.shape) == 2 else 0)
        longest[key] = max(longest.get(key, 0), t.n_bytes)
    paths = {key: memory_file(*key, n_bytes) for key, n_bytes in longest.items()}
    tensors = {}
    for t in wanted:
        path = paths[t.format, t.shape[-1] if len(t.shape) == 2 else 0]
        if t.name == "rope_freqs.weight":
            path = in_memory(synthetic.rope_factors(shape).astype("<f4").tobytes())
        format = synthetic.FORMAT_IDS[t.format]
        tensors[t.name] = TensorInfo(t.name, t.shape, format, path, 0, t.n_bytes)
    config = config_from_gguf(synthetic.metadata(shape, type, {}), tensors)
    weights = map_tensors(tensors, config, "gguf")
    return ModelFiles(
        Path(f"{shape_name} {type_name}"), config, weights, lambda: None, None, GenerationDefaults()
    )


def memory_file(format: str, k: int, n_bytes: int) -> Path:
    """Random blocks of a format, for rows of k numbers; k 0: ones, for vectors."""
    if k == 0:
        return in_memory(np.ones(n_bytes // 4, "<f4").tobytes())
    block_bytes = synthetic.FORMATS[synthetic.FORMAT_IDS[format]].block_bytes
    n_blocks = min(synthetic.TILE_BYTES, n_bytes) // block_bytes
    blocks = synthetic.tile(format, n_blocks, 1 / math.sqrt(k), 0).tobytes()
    return in_memory(blocks, n_bytes)


def in_memory(data: bytes, n_bytes: int | None = None) -> Path:
    """A file that lives as long as this process: data, repeated up to n_bytes."""
    n_bytes = len(data) if n_bytes is None else n_bytes
    fd = os.memfd_create("weights")
    for start in range(0, n_bytes, len(data)):
        os.write(fd, data[: n_bytes - start])
    return Path(f"/proc/self/fd/{fd}")


def cases_of(config: Any) -> list[list[benchmark.Case]]:
    """What to time, in groups that share a cache: alone, in batches, far into the context."""
    one = {"threads": [1]}
    if EMULATE:
        return [
            benchmark.cases(n_prompt=[20], n_gen=[3], **one),
            benchmark.cases(n_prompt=[], n_gen=[2], n_sequences=[2, 4], **one),
            benchmark.cases(n_prompt=[9], n_gen=[2], n_depth=[130], **one),
        ]
    depths = [d for d in (4096, 8192, 16384, 32768) if d + 640 <= config.context] or [config.context - 640]
    return [
        benchmark.cases(n_prompt=[512, 2048], n_gen=[128], **one),
        benchmark.cases(n_prompt=[], n_gen=[32], n_sequences=[2, 4, 8, 16, 32, 64], **one),
        benchmark.cases(n_prompt=[512], n_gen=[32], n_depth=depths, **one),
    ]


def measure(shape_name: str, type_name: str, of: slice, rows: list[dict[str, Any]]) -> None:
    """Adds a model's rows, written after each, while there is time."""
    files = files_of(shape_name, type_name)
    groups = cases_of(files.config)[of]
    context = max(case.n_positions for group in groups for case in group)
    facts = benchmark.facts_of(files)
    with load(files, device="cuda", context=context) as llm:
        rate = facts.size_bytes / 1e9 / llm.load_s
        print(f"{files.path}: loaded in {llm.load_s:.1f} s, {rate:.1f} GB/s", flush=True)
        for group in groups:
            if seconds_left() < PER_CASE_S * (1 + len(group)):
                print(f"{files.path}: no time for {', '.join(case.name for case in group)}", flush=True)
                continue
            with closing(benchmark.Subject(facts, llm.model, group, load_s=llm.load_s)) as subject:
                for case in group:
                    rows.append(timed(subject, case) | {"shape": shape_name, "type": type_name})
                    write("models", rows)
        if of is ALONE:
            rows.extend(generated(llm, shape_name, type_name))
            write("models", rows)


def timed(subject: benchmark.Subject, case: benchmark.Case) -> dict[str, Any]:
    """A row: the case's repetitions, with the read bandwidth around each."""
    limits, samples_ns = [], []
    n_bytes = 1 << 22 if EMULATE else None
    before = benchmark.sample_limits(case, n_bytes, subject.device)
    for _ in range(REPETITIONS):
        samples_ns.append(subject.run(case))
        after = benchmark.sample_limits(case, n_bytes, subject.device)
        limits.append((before, after))
        before = after
    record = subject.result(case, samples_ns, limits).record()
    share = f", {record['gb_s']:.0f} GB/s, {record['percent_of_read']:.0f} % of read" if case.n_gen else ""
    print(f"{subject.facts.name}: {case.name} {record['median_ts']:.1f} tok/s{share}", flush=True)
    return record


def generated(llm: tinyllm.LLM, shape_name: str, type_name: str) -> list[dict[str, Any]]:
    """Whole texts, with sampling and all that Python does: what a user sees."""
    rows, prompt = [], list(range(1, 9))
    for name, settings in (("greedy", {"temperature": 0.0}), ("sampled", {"temperature": 0.8, "seed": 1})):
        n = 4 if EMULATE else 128
        llm(prompt, max_tokens=2, **settings)
        start = time.perf_counter()
        done = llm(prompt, max_tokens=n, **settings)
        seconds = time.perf_counter() - start
        rate = len(done.tokens) / seconds
        print(f"{llm.name}: llm(...) {name} {rate:.1f} tok/s", flush=True)
        row = {"shape": shape_name, "type": type_name, "test": f"llm() {name}", "median_ts": rate}
        rows.append(row | {"n_gen": len(done.tokens), "n_prompt": 0, "device": done.device})
    return rows


def bandwidth() -> None:
    """What the memory delivers, in buffers of several sizes."""
    device = backends.choose_device("cuda")
    sizes = [1 << 22, 1 << 24] if EMULATE else [1 << 30, 4 << 30, 16 << 30]
    rows = []
    for n_bytes in sizes:
        gb_s = [backends.read_bandwidth(n_bytes, 1, 10, device) for _ in range(3)]
        rows.append({"n_bytes": n_bytes, "gb_s": gb_s})
        print(f"reading {n_bytes / 1e9:.1f} GB: {max(gb_s):.0f} GB/s", flush=True)
        best = max(max(row["gb_s"]) for row in rows)
        sheet = device.bandwidth_gb_s
        write(
            "bandwidth", {"device": device.title, "read_gb_s": best, "data_sheet_gb_s": sheet, "rows": rows}
        )


def tiny(types: Sequence[str]) -> None:
    """A small model of each type: a prompt, a few tokens, a fork's copy of a page."""
    for type_name in types:
        files = files_of("tiny", type_name)
        for cache_type in ("f16", "f32", "q8_0"):
            with load(files, device="cuda", context=256, cache_type=cache_type) as llm:
                logits = llm.logits(list(range(1, 76)))
                assert np.isfinite(logits).all(), type_name
                with llm.session() as session:
                    session.append([1, 2, 3])
                    with session.fork() as other:
                        other.generate(max_tokens=2, temperature=0)
                llm([[1, 2], [3, 4, 5]], max_tokens=2, temperature=0)
        print(f"tiny {type_name}: fine", flush=True)


def main() -> int:
    what = sys.argv[1]
    if what == "bandwidth":
        bandwidth()
    elif what == "tiny":
        tiny(list(synthetic.TYPES))
    else:
        models = FIRST if what == "first" else MORE
        if EMULATE:
            models = [("tiny", type, of) for _, type, of in models[:2]]
        rows = read("models", []) if what == "more" else []
        failed = 0
        for shape_name, type_name, of in models:
            try:
                if seconds_left() > 3 * PER_CASE_S:
                    measure(shape_name, type_name, of, rows)
            except tinyllm.Error as error:
                failed += 1
                rows.append({"shape": shape_name, "type": type_name, "test": "load", "error": str(error)})
                print(f"{shape_name} {type_name}: {error}", flush=True)
                write("models", rows)
        return 1 if failed else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
