"""`load`: from a path to a model that runs, its weights packed and its context fitted into the memory.

Imports `llm`, `modelfiles`, `backends`, `files`, `quantization` (its mixes), `config` and `errors`. Read
next: llm.py, what `load` returns.
"""

from __future__ import annotations

import logging
import math
import os
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from tinyllm import backends
from tinyllm.backends import PAGE, CacheType
from tinyllm.config import ModelConfig
from tinyllm.engine.heads import read_heads
from tinyllm.engine.needs import LEAST_SLOTS, cache_pages, call_bytes, call_tokens, slot_bytes
from tinyllm.errors import (
    ArgumentError,
    Error,
    MemoryLimitError,
    UnsupportedError,
    integer,
    out_of_memory,
    size_text,
)
from tinyllm.files import BF16, F16, F32, FORMATS, OWN_FORMATS
from tinyllm.files.names import Weights, in_gguf
from tinyllm.llm import LLM, Speculate
from tinyllm.modelfiles import ModelFiles, open_model

MEMORY_SHARE = 0.8  # of the free memory, that weights and context are fitted into
USEFUL_CONTEXT = 4096  # that a GPU must have room for, to be chosen where no context is asked for
MAX_PAGES = 1 << 24  # of a pool, the core's limit
MAX_SLOTS = 4096  # of states
MAX_CONTEXT = 1 << 28  # that a config may have

log = logging.getLogger(__name__)


@out_of_memory("loading a model")
def load(
    path: str | os.PathLike[str] | ModelFiles,
    *,
    device: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    cache_type: CacheType = "f16",
    weights: str | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    draft: str | os.PathLike[str] | ModelFiles | None = None,
    speculate: Speculate = "auto",
    free_memory: Callable[[], int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> LLM:
    """Loads a model.

    path: a GGUF file (of a split set the first), a directory with config.json and *.safetensors, a
    .safetensors file in one, "stories", the model that comes with tinyllm, "hf:ORG/REPO:Q4_K_M", a model on
    Hugging Face, fetched where it is not in the cache (`pull` says more), "ollama:llama3.2", one of Ollama's,
    or what `read_model` has read. device: "cpu", "cuda" or "cuda:N", the N-th GPU; "auto": a GPU where one
    has enough free memory, else the CPU, for a reason that is logged and in `tinyllm.info()`. threads: None
    for one a physical core. context: how many tokens a sequence may hold; None: what the model was trained
    for (with LongRoPE, as in Phi-3: at first; more chooses the factors for long texts), or less where only
    less fits into 80 % of the device's free memory. cache_type: the numbers of the KV cache, "f16", "f32" or
    "q8_0". weights: a quantization ("q8_0", "q4_k_m"...) for a float model, made while loading: the same bits
    as in the file that `quantize` writes. adapters: {name: path} of adapters (LoRA) to load beside it, as
    `LLM.add_adapter` does. draft: a smaller model, as `path`, that guesses tokens for it
    (docs/speculation.md); it is closed with the model. speculate: what calls do that say nothing of it, as in
    a call; "auto": the draft guesses, else tokens are looked up. free_memory: says how many bytes it may take
    beside those it has, asked while it loads and whenever the cache grows, for programs that keep to less
    than the device has. progress: called with (bytes done, bytes in all).

    Raises NotFoundError, ReadError, FormatError, UnsupportedError, ArgumentError, and MemoryLimitError,
    with the numbers, before anything big is allocated.

        with tinyllm.load("model.gguf") as llm: print(llm("Once upon a time"))
    """
    started = time.perf_counter()
    if draft is not None:
        settings: dict[str, Any] = {
            "device": device,
            "threads": threads,
            "cache_type": cache_type,
            "free_memory": free_memory,
        }
        llm = load(path, context=context, weights=weights, adapters=adapters, progress=progress, **settings)
        try:
            llm.use_draft(load(draft, **settings))
            if speculate != "auto":
                llm.speculate = speculate
        except BaseException:
            llm.close()
            raise
        return llm
    if context is not None:
        context = integer("context", context, 1, MAX_CONTEXT)
    if not isinstance(cache_type, str):
        raise TypeError(f"cache_type is a str, not {type(cache_type).__name__}")
    if cache_type not in backends.CACHE_TYPES:
        raise ArgumentError(
            f"cache_type is {cache_type!r}, expected one of {', '.join(backends.CACHE_TYPES)}"
        )
    files = path if isinstance(path, ModelFiles) else open_model(path)
    name = str(files.path)

    def free() -> int:
        left = chosen.free_memory()
        return left if free_memory is None else max(0, min(left, free_memory()))

    asked = context
    try:
        formats = kept_formats(files.weights, weights, name)
        weight_bytes = _weight_bytes(files, formats)
        device = _device_for(device, files.config, formats, name)
        chosen = backends.choose_device(device, _needed(files.config, weight_bytes, context, cache_type))
        context, max_pages, max_slots = fit_memory(
            files.config, cache_type, weight_bytes, context, name, chosen, free()
        )
        model = backends.Model(files.config.with_context(context), device=chosen.name, threads=threads)
    except Error:
        _ = files.tokenizer  # what is wrong with it is told first, as `read_model` does
        raise
    try:
        done, total = 0, sum(info.n_bytes for info in files.weights.values())
        with model.upload(_to_upload(files.weights, formats)) as uploads:
            tokenizer = files.tokenizer  # read while weights are packed
            heads = read_heads(files.heads, tokenizer)
            for weight in uploads:
                done += weight.info.n_bytes
                if progress is not None:
                    progress(done, total)
        if files.config.tied:
            model.tie()
        model.check()
        if device == "auto" and (reason := _refusal(model, cache_type)):
            log.info("device cpu: %s", reason)
            model.close()
            return load(
                files,
                device="cpu",
                threads=threads,
                context=asked,
                cache_type=cache_type,
                weights=weights,
                adapters=adapters,
                speculate=speculate,
                free_memory=free_memory,
                progress=progress,
            )
        model.has_output = files.has_output
        if context > (covered := files.config.covered_context):
            log.warning("context %d is more than the %d the model was trained for", context, covered)
        llm = LLM(
            model,
            tokenizer,
            files.template,
            files.defaults,
            files.embedding,
            heads,
            name=name,
            formats=numbers_in(files.weights, formats),
            cache_type=cache_type,
            max_pages=max_pages,
            max_slots=max_slots,
            free_memory=free,
            load_s=time.perf_counter() - started,
        )
        for adapter, where in (adapters or {}).items():
            llm.add_adapter(adapter, where)
        if speculate != "auto":
            llm.speculate = speculate
        return llm
    except BaseException:
        model.close()
        raise


def _device_for(
    device: str, config: ModelConfig, formats: Mapping[tuple[str, int | None], int], name: str
) -> str:
    """ "cpu" where a GPU may be chosen, but lacks the kernels; the reason is logged. Raises UnsupportedError
    where one is asked for."""
    lacking = sorted({FORMATS[format].name for format in formats.values() if format in OWN_FORMATS})
    if device == "cpu" or not (lacking or config.mixers):
        return device
    if config.mixers:
        reason = f"{name} has layers of Gated DeltaNet, which only the CPU computes so far"
    else:
        reason = f"{name} has weights in {', '.join(lacking)}, which only the CPU multiplies so far"
    if device != "auto":
        raise UnsupportedError(f"device {device!r} asked for, but {reason}; use device='cpu'")
    log.info("device cpu: %s", reason)
    return "cpu"


def needed_bytes(
    files: ModelFiles,
    *,
    context: int | None = None,
    cache_type: CacheType = "f16",
    weights: str | None = None,
) -> int:
    """Bytes that a model of these files, and of these arguments of `load`, takes at least to be of use:
    weights, a call, and the cache of a text of `context` tokens (None: of USEFUL_CONTEXT, where the model has
    as many)."""
    formats = kept_formats(files.weights, weights, str(files.path))
    return _needed(files.config, _weight_bytes(files, formats), context, cache_type)


def _weight_bytes(files: ModelFiles, formats: Mapping[tuple[str, int | None], int]) -> int:
    return sum(backends.packed_bytes(files.weights[key].shape, f) for key, f in formats.items())


def _to_upload(weights: Weights, formats: Mapping[tuple[str, int | None], int]) -> list[backends.Weight]:
    return [
        backends.Weight(
            name,
            layer,
            info,
            row_order=weights.row_order(name),
            format=formats[name, layer] if formats[name, layer] != info.format else None,
            plus=weights.plus(name),
        )
        for (name, layer), info in weights.items()
    ]


def _needed(config: ModelConfig, weight_bytes: int, context: int | None, cache_type: CacheType) -> int:
    wanted = min(config.default_context, USEFUL_CONTEXT) if context is None else context
    scratch = call_bytes(config, min(call_tokens(config, weight_bytes), wanted))
    return weight_bytes + cache_bytes(config, cache_type, wanted) + scratch


def _refusal(model: backends.Model, cache_type: CacheType) -> str:
    """What a GPU says where it cannot compute this model, "" where it can."""
    if model.device == "cpu":
        return ""
    pool = model.cache(cache_type, 1)
    try:
        pool.grow(1)
        model.forward([0], [0], [0], [[[0]] * len(model.cache_groups)], cache=pool)
    except UnsupportedError as error:
        return str(error)
    finally:
        pool.close()
    return ""


def kept_formats(weights: Weights, quantize_to: str | None, name: str) -> dict[tuple[str, int | None], int]:
    """The format that `load` keeps each tensor in. quantize_to: its `weights`. Raises ArgumentError."""
    formats = {key: info.format for key, info in weights.items()}
    if quantize_to is None:
        return formats
    from tinyllm.quantization.mixes import tensor_formats  # with all that writes files, seldom needed

    tensors = in_gguf(weights)
    chosen = tensor_formats(dict(tensors.values()), quantize_to)
    matrices = {k: t for k, t in weights.items() if len(t.shape) == 2 and t.format in (F32, F16, BF16)}
    matrices = {k: t for k, t in matrices.items() if k[0] != "router"}  # small, and what it chooses matters
    if not matrices:
        raise ArgumentError(f"{name} is quantized already; weights= is for float models")
    return formats | {key: chosen[tensors[key][0]] for key in matrices}


def numbers_in(weights: Weights, formats: Mapping[tuple[str, int | None], int]) -> dict[str, int]:
    """How many numbers each format holds, by its name, the most first."""
    held: Counter[str] = Counter()
    for key, format in formats.items():
        held[FORMATS[format].name] += math.prod(weights[key].shape)
    return dict(held.most_common())


def cache_bytes(config: ModelConfig, cache_type: CacheType, context: int) -> int:
    """Bytes of KV cache, and of states beside it, that a text of `context` tokens takes at most. Raises
    ArgumentError past what a model may have."""
    if context > MAX_CONTEXT:
        raise ArgumentError(f"context is {context}, the most is {MAX_CONTEXT}")
    config = config.with_context(context)
    return cache_pages(config) * backends.page_bytes(config, cache_type) + LEAST_SLOTS * slot_bytes(config)


def fitting_context(config: ModelConfig, cache_type: CacheType, n_bytes: int) -> int:
    """The longest context, in whole pages, whose cache fits into n_bytes; 0 where none does."""
    pages = range(1, MAX_CONTEXT // PAGE + 1)
    return PAGE * bisect_right(pages, n_bytes, key=lambda n: cache_bytes(config, cache_type, n * PAGE))


def fit_memory(
    config: ModelConfig,
    cache_type: CacheType,
    weight_bytes: int,
    context: int | None,
    name: str,
    device: backends.Device = backends.CPU,
    free: int | None = None,
) -> tuple[int, int, int]:
    """(context, most pages of the cache, most slots of states) for the `free` bytes of a device, None for all
    that it has, or MemoryLimitError."""
    free = device.free_memory() if free is None else free
    memory = f"the memory of {device.name} ({device.title})" if device.title else "memory"
    usual = config.default_context
    scratch = call_bytes(config, min(call_tokens(config, weight_bytes), context or usual))
    # A context that was asked for may take all that is free; one that we choose leaves some.
    budget = (int(MEMORY_SHARE * free) if context is None else free) - weight_bytes - scratch
    fitting = fitting_context(config, cache_type, budget)
    if fitting < (context or 1):
        hint = f"; a context of {fitting} would fit" if fitting > 0 else ""
        raise MemoryLimitError(
            f"{name} does not fit into {memory}: its weights take {size_text(weight_bytes)}, a context of "
            f"{context or usual} takes {size_text(cache_bytes(config, cache_type, context or usual))}, "
            f"a call {size_text(scratch)}, {size_text(free)} are free{hint}"
        )
    if context is None:
        context = min(usual, fitting)
        if context < usual:
            log.warning("context %d instead of %d: more does not fit into %s", context, usual, memory)
    config = config.with_context(context)
    max_slots, a_slot = LEAST_SLOTS, slot_bytes(config)
    if a_slot:  # of what is left beside a whole text a quarter
        left = max(0, budget - cache_bytes(config, cache_type, context))
        max_slots = min(MAX_SLOTS, LEAST_SLOTS + left // 4 // a_slot)
    most = (budget - max_slots * a_slot) // backends.page_bytes(config, cache_type)
    return context, min(max(cache_pages(config), most), MAX_PAGES), max_slots
