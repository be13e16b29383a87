"""One model larger than a machine: an actor a stage, placed and brought back by Ray.

Invariant: a stage that dies is started again by Ray, on another node where its own is gone, and loads its
layers from its own copy of the files; the driver finds it at its new address. Imports `pipeline`, `loading`,
`modelfiles`, cluster.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tinyllm.errors import Error, LostError
from tinyllm.llm import LLM
from tinyllm.loading import kept_formats
from tinyllm.modelfiles import ModelFiles, open_model
from tinyllm.pipeline import Spec, Stage, balanced, load_stages
from tinyllm.pipeline.cut import cuts_of
from tinyllm.pipeline.model import PATIENCE_S
from tinyllm.ray.cluster import connect, disconnect, ray_module

FIT_S = 120.0  # to be placed, started, and to read the headers of the files


def load(
    path: str | os.PathLike[str] | ModelFiles,
    *,
    stages: int | None = None,
    layers: Sequence[int] | None = None,
    address: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
    patience_s: float = PATIENCE_S,
    **settings: Any,
) -> LLM:
    """A model in stages, each an actor on a Ray cluster; the LLM is used as one of `tinyllm.load`.

    path: as of `tinyllm.load`, the same on every node; each reads its own layers only. stages: how many (2),
    cut where they read alike much; layers: how many each has, in place of that. address: as of `ray.init`;
    None: the cluster that this process is connected to, or one of this machine alone. cpus, gpus: what each
    stage asks of Ray; they are spread over the nodes. patience_s: how long a call waits for a stage that was
    lost to come back. settings: device (of every stage), threads (each stage's), context, cache_type,
    weights, progress, as of `tinyllm.load`.

    Raises what that does, UnsupportedError where Ray is missing, and LostError: for stages that do not start,
    and from any call while which a stage goes.

        with tinyllm.ray.load("model.gguf", stages=4) as llm: print(llm("Once upon a time"))
    """
    ray = ray_module()
    # What is wrong with the request is said before anybody waits for a place.
    files = path if isinstance(path, ModelFiles) else open_model(path)
    formats = kept_formats(files.weights, settings.get("weights"), str(files.path))
    if layers is None:
        n = len(balanced(files.config, files.weights, formats, 2 if stages is None else stages))
    else:
        n = len(cuts_of(layers, files.config.n_layers))
    is_ours = connect(address)
    group: Any = None
    try:
        bundle = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        if bundle:
            group = ray.util.placement_group([bundle] * n, strategy="SPREAD")
            if not group.wait(FIT_S):
                raise LostError(
                    f"no room on the cluster for {n} stages of {bundle}: it has {ray.cluster_resources()}"
                )
        place = _placing(ray, group, cpus, gpus)
        llm = load_stages(files, place, stages=n, layers=layers, patience_s=patience_s, **settings)
    except BaseException:
        _end(ray, group, is_ours)
        raise
    close = llm.model.close

    def close_all() -> None:
        close()
        _end(ray, group, is_ours)

    llm.model.close = close_all  # type: ignore[method-assign]  # the cluster's share goes with the model
    return llm


def _end(ray: Any, group: Any, is_ours: bool) -> None:
    if group is not None and ray.is_initialized():
        ray.util.remove_placement_group(group)
    if is_ours:
        disconnect()


def _placing(ray: Any, group: Any, cpus: float, gpus: float) -> Callable[[Spec], _Worker]:
    def place(spec: Spec) -> _Worker:
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1}
        options["max_task_retries"] = -1
        if group is not None:
            options["scheduling_strategy"] = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=spec.number
            )
        return _Worker(ray, ray.remote(_Actor).options(**options).remote(spec), spec)

    return place


class _Actor:
    """A stage's process."""

    def __init__(self, spec: Spec) -> None:
        import ray

        self._stage = Stage(replace(spec, host=ray.util.get_node_ip_address()))

    def fit(self, context: int | None) -> tuple[int, int]:
        return self._stage.fit(context)

    def serve(self, context: int) -> tuple[str, int]:
        return self._stage.serve(context)

    def pid(self) -> int:
        return os.getpid()


class _Worker:
    """A `pipeline.Worker`."""

    def __init__(self, ray: Any, actor: Any, spec: Spec) -> None:
        self._ray, self.actor = ray, actor
        self._name = f"stage {spec.number} of {len(spec.cuts)} ({spec.cut})"

    def fit(self, context: int | None) -> tuple[int, int]:
        found: tuple[int, int] = self._get(self.actor.fit.remote(context), FIT_S)
        return found

    def serve(self, context: int, timeout_s: float | None) -> tuple[str, int]:
        found: tuple[str, int] = self._get(self.actor.serve.remote(context), timeout_s)
        return found

    def close(self) -> None:
        if self._ray.is_initialized():
            self._ray.kill(self.actor)

    def _get(self, reference: Any, timeout_s: float | None) -> Any:
        failures = self._ray.exceptions
        try:
            return self._ray.get(reference, timeout=timeout_s)
        except failures.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, Error):
                raise cause from None
            raise LostError(f"{self._name} failed: {cause!r}") from None
        except (failures.RayActorError, failures.GetTimeoutError) as error:
            raise LostError(f"{self._name} is not there: {str(error).splitlines()[0]}") from None
