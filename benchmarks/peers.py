"""Runs tinyllm and other engines on the same GGUF files, in alternating turns, and prints the ratios.

    python benchmarks/peers.py model.gguf --peer-bench ik=/path/to/ik_llama.cpp/build/bin/llama-bench

Engines: tinyllm; llama.cpp through llama-cpp-python and OpenVINO GenAI, which reads GGUF files itself, where
they are installed (`--python ENGINE=PATH` names an interpreter that has them); any llama-bench. A turn of an
engine is a process of its own, so that no thread and no memory of one is in another's way: it loads the file,
warms up and measures one case once. Every other turn goes in reverse order, and read bandwidth is sampled
around each. All count alike, without sampling and with a prompt's last logits only, but for OpenVINO, whose
pipeline picks the likeliest token. This file imports tinyllm only where it compares; engines run without.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
TIME_LIMIT_S = 3600
CHUNK = 512


class CacheType(NamedTuple):
    """A type of the KV cache's numbers, as the engines know it."""

    n_bytes: float  # of a number
    ggml: int
    openvino: str


CACHE_TYPES = {
    "f32": CacheType(4, 0, "f32"),
    "f16": CacheType(2, 1, "f16"),
    "q8_0": CacheType(34 / 32, 8, "u8"),
}


class Case(NamedTuple):
    """A prompt to read or tokens to decode (the other is 0), behind n_depth tokens in the cache."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        what = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return what + (f" @ d{self.n_depth}" if self.n_depth else "")


class Setting(NamedTuple):
    """What every engine is told."""

    model: str
    case: Case
    threads: int
    cache_type: str


class Engine(NamedTuple):
    """A name, and the command that measures once and prints llama-bench's JSON."""

    name: str
    command: Callable[[Setting], list[str]]


# Engines that run in this file, each in a process of its own


def run_llama_cpp(setting: Setting) -> dict[str, Any]:
    """llama.cpp at llama_decode, through llama-cpp-python's bindings, as llama-bench calls it."""
    import llama_cpp as lib

    case = setting.case
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(setting.model.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = sum(case)
    params.n_batch, params.n_ubatch = 2048, CHUNK
    params.n_threads = params.n_threads_batch = setting.threads
    params.type_k = params.type_v = CACHE_TYPES[setting.cache_type].ggml
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp could not load the model")
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(n_tokens: int) -> None:  # logits of the last one
        ids = (ctypes.c_int32 * n_tokens)(*(random.randrange(n_vocab) for _ in range(n_tokens)))
        if lib.llama_decode(context, lib.llama_batch_get_one(ids, n_tokens)):
            raise RuntimeError(f"llama_decode failed with {n_tokens} tokens")
        lib.llama_synchronize(context)

    def prefill(n_tokens: int) -> None:
        for start in range(0, n_tokens, params.n_batch):
            decode(min(params.n_batch, n_tokens - start))

    def run(n_gen: int) -> None:
        prefill(case.n_prompt)
        for _ in range(n_gen):
            decode(1)

    run(min(case.n_gen, 1))
    lib.llama_memory_clear(lib.llama_get_memory(context), False)
    prefill(case.n_depth)
    start = time.perf_counter()
    run(case.n_gen)
    seconds = time.perf_counter() - start
    return {"samples_ts": [(case.n_prompt + case.n_gen) / seconds], "version": lib.__version__}


def run_openvino(setting: Setting) -> dict[str, Any]:
    """OpenVINO GenAI's pipeline, its own reader of GGUF; a prompt is timed to its first token."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    case = setting.case
    if case.n_prompt and case.n_depth:
        raise RuntimeError("this pipeline cannot time a prompt behind what is in the cache")
    pipeline = genai.LLMPipeline(
        setting.model,
        "CPU",
        INFERENCE_NUM_THREADS=setting.threads,
        KV_CACHE_PRECISION=CACHE_TYPES[setting.cache_type].openvino,
    )
    config = genai.GenerationConfig()
    config.ignore_eos, config.do_sample = True, False

    def generate(n_prompt: int, n_new: int) -> Any:
        config.max_new_tokens = config.min_new_tokens = n_new
        ids = np.random.default_rng().integers(100, 400, (1, n_prompt))
        return pipeline.generate(openvino.Tensor(ids.astype(np.int64)), config).perf_metrics

    generate(case.n_prompt or 1, 2)
    if case.n_prompt:
        seconds = generate(case.n_prompt, 1).get_ttft().mean / 1e3
    else:  # every token after the first, each a step of its own
        seconds = sum(generate(case.n_depth or 1, case.n_gen + 1).raw_metrics.m_durations) / 1e6
    return {"samples_ts": [(case.n_prompt + case.n_gen) / seconds], "version": genai.__version__}


IN_THIS_FILE = {"llama.cpp": ("llama_cpp", run_llama_cpp), "openvino": ("openvino_genai", run_openvino)}


# The comparison


def tinyllm_command(s: Setting) -> list[str]:
    options = ["-r", "1", "-o", "json", "--buffer", "1", "--cache-type", s.cache_type]  # sampled around it
    return [sys.executable, "-m", "tinyllm.cli.bench", s.model, *case_options(s, depth=True), *options]


def bench_command(program: Sequence[str], s: Setting) -> list[str]:
    options = ["-r", "1", "-o", "json", "-ctk", s.cache_type, "-ctv", s.cache_type]
    return [*program, "-m", s.model, *case_options(s, depth=s.case.n_depth > 0), *options]


def file_command(python: str, name: str, s: Setting) -> list[str]:
    return [
        python,
        __file__,
        s.model,
        "--run",
        name,
        "--cache-type",
        s.cache_type,
        *case_options(s, depth=True),
    ]


def case_options(s: Setting, *, depth: bool) -> list[str]:
    pairs = {"-p": s.case.n_prompt, "-n": s.case.n_gen, "-t": s.threads}
    if depth:  # forks of llama-bench do not all know it
        pairs["-d"] = s.case.n_depth
    return [text for option, n in pairs.items() for text in (option, str(n))]


def find_engines(args: argparse.Namespace) -> list[Engine]:
    """tinyllm first, then every peer that is there; says on stderr which are not."""
    engines = [Engine("tinyllm", tinyllm_command)]
    pythons = dict(args.python)
    for name, (module, _) in IN_THIS_FILE.items():
        python = pythons.get(name, sys.executable)
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
            note(f"{name} is left out: {python} has no module {module}")
        else:
            engines.append(Engine(name, partial(file_command, python, name)))
    for name, command in args.peer_bench:
        engines.append(Engine(name, partial(bench_command, shlex.split(command))))
    return engines


class Failed(Exception):
    """An engine did not print a rate."""


def run_engine(engine: Engine, setting: Setting) -> tuple[float, str]:
    """Tokens a second and the engine's version. Raises Failed with the last line it wrote."""
    command = engine.command(setting)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(str(error)) from None
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    if done.returncode:
        raise Failed(f"exit code {done.returncode}: {last}")
    try:
        (row,) = json.loads(done.stdout[done.stdout.index("[") :])
        version = row.get("version") or f"{row['build_commit']} ({row['build_number']})"
        return float(row["samples_ts"][0]), str(version)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Failed(f"no row of llama-bench's JSON: {error!r}: {last}") from None


def compare(args: argparse.Namespace, engines: Sequence[Engine]) -> list[dict[str, Any]]:
    """A record for each model, case and engine, of `args.repetitions` turns."""
    from tinyllm import backends
    from tinyllm.measure import benchmark

    threads = args.threads or backends.default_threads()
    read_bytes = None if args.buffer is None else args.buffer << 20
    records = []
    for model, case in itertools.product(args.models, cases(args)):
        setting = Setting(model, case, threads, args.cache_type)
        bytes_a_step, file_hash = step_bytes(setting), benchmark.read_facts(model).file_hash
        rates: dict[str, list[float]] = {engine.name: [] for engine in engines}
        reads: dict[str, list[tuple[float, float]]] = {engine.name: [] for engine in engines}
        versions: dict[str, str] = {}
        failures: dict[str, str] = {}
        before = benchmark.sample_read_gb_s(threads, read_bytes)
        for turn in range(args.repetitions):
            for engine in engines[:: -1 if turn % 2 else 1]:
                if engine.name in failures:
                    continue
                progress(f"{Path(model).name} {case.name}, turn {turn + 1}: {engine.name}")
                try:
                    rate, versions[engine.name] = run_engine(engine, setting)
                except Failed as error:
                    failures[engine.name] = str(error)
                    note(f"{engine.name}, {case.name}: {error}")
                    continue
                after = benchmark.sample_read_gb_s(threads, read_bytes)
                rates[engine.name].append(rate)
                reads[engine.name].append((before, after))
                before = after
        for name in rates:
            if name not in failures:
                found = record(setting, name, rates[name], rates["tinyllm"], reads[name], bytes_a_step)
                records.append(
                    {
                        **found,
                        "version": versions[name],
                        "file_hash": file_hash,
                        "cpu_info": benchmark.cpu_name(),
                    }
                )
    return records


def cases(args: argparse.Namespace) -> list[Case]:
    tests = [(p, 0) for p in args.n_prompt if p] + [(0, n) for n in args.n_gen if n]
    return [Case(p, n, depth) for depth in args.n_depth for p, n in tests]


def step_bytes(setting: Setting) -> float:
    """Bytes that a step of decoding must read, from the file itself, so that it is the same for every engine:
    every tensor once, but for an embedding that is not the output matrix too, and the keys and values so far.
    0 for a prompt.
    """
    from tinyllm.modelfiles import read_model

    case, files = setting.case, read_model(setting.model)
    if not case.n_gen:
        return 0.0
    config, weights = files.config, files.weights
    n_bytes = sum(t.n_bytes for (name, _), t in weights.items() if name != "embedding" or config.tied)
    number = CACHE_TYPES[setting.cache_type].n_bytes
    position = 2 * config.n_layers * config.n_kv_heads * config.head_dim * number
    return n_bytes + position * (case.n_depth + (case.n_gen + 1) / 2)


def record(
    setting: Setting,
    engine: str,
    rates: list[float],
    ours: list[float],
    reads: list[tuple[float, float]],
    bytes_a_step: float,
) -> dict[str, Any]:
    """A row: the rates, their share of the bandwidth, and tinyllm's rate over them, turn by turn."""
    shares = [
        100 * rate * bytes_a_step / 1e9 / statistics.mean(pair)
        for rate, pair in zip(rates, reads, strict=True)
    ]
    ratios = [a / b for a, b in zip(ours, rates, strict=False)]
    return {
        "model_filename": Path(setting.model).name,
        "test": setting.case.name,
        **setting.case._asdict(),
        "n_threads": setting.threads,
        "type_k": setting.cache_type,
        "type_v": setting.cache_type,
        "engine": engine,
        "samples_ts": rates,
        "median_ts": statistics.median(rates),
        "min_ts": min(rates),
        "max_ts": max(rates),
        "bytes_per_step": bytes_a_step,
        "percent_of_read": statistics.median(shares) if bytes_a_step else None,
        "samples_read_gb_s": reads,
        "tinyllm_ratio": statistics.median(ratios) if ratios else None,
        "tinyllm_ratio_min": min(ratios, default=None),
        "tinyllm_ratio_max": max(ratios, default=None),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown; a row that tinyllm loses is a row like any other."""
    lines = [
        "| model | test | engine | t/s: median (least-most) | % of read | tinyllm / engine (least-most) |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in records:
        percent = "" if row["percent_of_read"] is None else f"{row['percent_of_read']:.0f}"
        ratio = "" if row["tinyllm_ratio"] is None else ratio_text(row)
        lines.append(
            f"| {row['model_filename']} | {row['test']} | {row['engine']} {row['version']} | "
            f"{row['median_ts']:.2f} ({row['min_ts']:.2f}-{row['max_ts']:.2f}) | {percent} | {ratio} |"
        )
    reads = [x for row in records for pair in row["samples_read_gb_s"] for x in pair]
    first = records[0]
    lines += [
        "",
        f"{first['cpu_info']}, {first['n_threads']} threads, {first['type_k']} cache; read bandwidth "
        f"{statistics.median(reads):.1f} GB/s ({min(reads):.1f}-{max(reads):.1f}).",
    ]
    return "\n".join(lines)


def ratio_text(row: dict[str, Any]) -> str:
    return f"{row['tinyllm_ratio']:.2f} ({row['tinyllm_ratio_min']:.2f}-{row['tinyllm_ratio_max']:.2f})"


def save(records: list[dict[str, Any]], folder: Path) -> Path:
    """Keeps the records with the machine and the command, under a name with the date."""
    now = datetime.now(timezone.utc)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now:%Y-%m-%d-%H%M%S}-peers.json"
    machine = {
        "cpu": records[0]["cpu_info"],
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    content = {
        "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine,
        # Names without folders: where this machine keeps its files says nothing to others.
        "command": shlex.join(["benchmarks/peers.py", *(a.rpartition("/")[2] for a in sys.argv[1:])]),
        "results": records,
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def note(text: str) -> None:
    print(f"peers.py: {text}", file=sys.stderr)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


# The command


def counts(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between")
    return [int(part) for part in text.split(",")]


def named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="peers.py", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL.gguf")
    add(
        "-p",
        "--n-prompt",
        type=counts,
        default=[512],
        metavar="N,...",
        help="tokens of prompt; 0: none (512)",
    )
    add("-n", "--n-gen", type=counts, default=[128], metavar="N,...", help="tokens to decode; 0: none (128)")
    add("-d", "--n-depth", type=counts, default=[0], metavar="N,...", help="tokens in the cache before (0)")
    add("-t", "--threads", type=int, metavar="N", help="threads of every engine (the physical cores)")
    add("-r", "--repetitions", type=int, default=5, metavar="N", help="turns (5)")
    add("--cache-type", choices=tuple(CACHE_TYPES), default="f16", help="of every engine (f16)")
    add("--buffer", type=int, metavar="MB", help="memory that a sample of the read bandwidth reads")
    add(
        "--peer-bench", type=named, action="append", default=[], metavar="NAME=COMMAND",
        help="a llama-bench, options of its own included: ik='/path/llama-bench -rtr 1'; may be given again",
    )  # fmt: skip
    add(
        "--python", type=named, action="append", default=[], metavar="ENGINE=PATH",
        help=f"the interpreter that has an engine ({', '.join(IN_THIS_FILE)}) installed",
    )  # fmt: skip
    add("-o", "--output", choices=("md", "json"), default="md", help="json: also kept in benchmarks/results/")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where -o json keeps them")
    add("--run", choices=tuple(IN_THIS_FILE), help=argparse.SUPPRESS)  # what a turn of such an engine calls
    args = parser.parse_args(argv)
    for name, _ in args.python:
        if name not in IN_THIS_FILE:
            parser.error(f"--python: {name} is not one of {', '.join(IN_THIS_FILE)}")
    if args.repetitions < 1 or (args.threads is not None and args.threads < 1):
        parser.error("-r and -t are 1 or more")
    if not cases(args):
        parser.error("there is nothing to measure: -p and -n are both 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.run is not None:
        (case,) = cases(args)
        setting = Setting(args.models[0], case, args.threads, args.cache_type)
        print(json.dumps([{**case._asdict(), **IN_THIS_FILE[args.run][1](setting)}]))
        return 0
    from tinyllm.errors import Error

    try:
        records = compare(args, find_engines(args))
    except Error as error:
        note(str(error))
        return 1
    progress("")
    if not records:
        return 1
    print(table(records))
    if args.output == "json":
        note(f"kept in {save(records, args.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
