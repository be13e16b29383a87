"""`load_stages`: from a path and workers to an LLM whose layers are computed by them.

Invariant: nothing big is read by the driver; each worker reads its own layers, once. Imports cut.py, model.py
and stage.py, `llm`, `loading`, `modelfiles`. Who makes workers: ray/.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, cast

import numpy as np

from tinyllm import backends
from tinyllm.backends import F32, CacheType
from tinyllm.engine.engine import CHUNK
from tinyllm.engine.heads import read_heads
from tinyllm.engine.kvcache import pages_held
from tinyllm.errors import MemoryLimitError, UnsupportedError, integer, out_of_memory
from tinyllm.llm import LLM
from tinyllm.loading import MAX_CONTEXT, kept_formats, numbers_in
from tinyllm.modelfiles import ModelFiles, open_model
from tinyllm.pipeline.cut import balanced, cuts_of, digest, tables_of
from tinyllm.pipeline.model import PATIENCE_S, PipelineModel
from tinyllm.pipeline.stage import Spec


class Worker(Protocol):
    """A process that holds a stage, as whoever started it sees it."""

    def fit(self, context: int | None) -> tuple[int, int]:
        """`Stage.fit` there."""

    def serve(self, context: int, timeout_s: float | None) -> tuple[str, int]:
        """`Stage.serve` there, of a stage that had to be started again, too. timeout_s: None: as long as
        loading takes. Raises LostError."""

    def close(self) -> None:
        """Ends it."""


@out_of_memory("loading a model")
def load_stages(
    path: str | os.PathLike[str] | ModelFiles,
    start: Callable[[Spec], Worker],
    *,
    stages: int | None = None,
    layers: Sequence[int] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    context: int | None = None,
    cache_type: CacheType = "f16",
    weights: str | None = None,
    patience_s: float = PATIENCE_S,
    host: str = "127.0.0.1",
    free_memory: Callable[[], int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> LLM:
    """An LLM in `stages` parts, or in parts of so many `layers` each, every one held by what `start` makes of
    its Spec. patience_s: how long a call waits for a part that was lost to come back. The rest is as in
    `tinyllm.load`; `threads` are each stage's. Raises what that does, and LostError."""
    started = time.perf_counter()
    if context is not None:
        context = integer("context", context, 1, MAX_CONTEXT)
    files = path if isinstance(path, ModelFiles) else open_model(path)
    name = str(files.path)
    if files.config.mixers:
        raise UnsupportedError(
            f"{name}: linear attention (Qwen 3.5) does not run in stages yet; load it in one process"
        )
    formats = kept_formats(files.weights, weights, name)
    if layers is None:
        cuts = balanced(files.config, files.weights, formats, 2 if stages is None else stages)
    else:
        cuts = cuts_of(layers, files.config.n_layers)
    secret = secrets.token_bytes(32)
    workers: list[Worker] = []

    def close() -> None:
        for worker in workers:
            worker.close()

    try:
        for number in range(len(cuts)):
            workers.append(
                start(
                    Spec(
                        os.path.abspath(files.path),
                        tuple(cuts),
                        number,
                        secret,
                        device=device,
                        threads=threads,
                        cache_type=cache_type,
                        weights=weights,
                        host=host,
                    )
                )
            )
        with ThreadPoolExecutor(len(workers)) as pool:
            fitting = list(pool.map(lambda worker: worker.fit(context), workers))
            chosen = min(n for n, _ in fitting)
            if any(n != chosen for n, _ in fitting):
                fitting = list(pool.map(lambda worker: worker.fit(chosen), workers))
            config = files.config.with_context(chosen)
            most = min(n for _, n in fitting)
            groups = tables_of(config, cuts).groups
            needed = sum(pages_held(chosen, group.window, CHUNK) for group in groups)
            if needed > most:
                raise MemoryLimitError(
                    f"{name}: a context of {chosen} takes {needed} pages on every stage, and one "
                    f"has room for {most}; ask for a shorter context="
                )
            serving = [pool.submit(worker.serve, chosen, None) for worker in workers]
            tokenizer = files.tokenizer
            heads = read_heads(files.heads, tokenizer)
            for done, future in enumerate(serving, 1):
                future.result()
                if progress is not None:
                    progress(done, len(serving))
        model = PipelineModel(
            config,
            cuts,
            [_address(worker, chosen) for worker in workers],
            secret,
            digest=digest(files.weights, formats),
            output_norm=_output_norm(files),
            patience_s=patience_s,
            on_close=close,
        )
    except BaseException:
        close()
        raise
    try:
        model.has_output = files.has_output
        return LLM(
            cast(backends.Model, model),
            tokenizer,
            files.template,
            files.defaults,
            files.embedding,
            heads,
            name=name,
            formats=numbers_in(files.weights, formats),
            cache_type=cache_type,
            max_pages=most,
            free_memory=free_memory,
            load_s=time.perf_counter() - started,
        )
    except BaseException:
        model.close()
        raise


def _address(worker: Worker, context: int) -> Callable[[float], tuple[str, int]]:
    return lambda timeout_s: worker.serve(context, timeout_s)


def _output_norm(files: ModelFiles) -> tuple[F32, F32]:
    """Weights and bias of the final norm, [dim] each: a model may have neither."""
    made = [np.ones(files.config.dim, np.float32), np.zeros(files.config.dim, np.float32)]
    for i, name in enumerate(("output_norm", "output_norm_bias")):
        if (name, None) in files.weights:
            with np.errstate(invalid="ignore"):  # a NaN stays one
                made[i] = files.weights[name, None].read_f32().ravel() + np.float32(files.weights.plus(name))
    return made[0], made[1]
