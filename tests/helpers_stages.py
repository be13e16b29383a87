"""Stages in threads of this process, which a test can take away and bring back."""

from __future__ import annotations

from tinyllm.errors import LostError
from tinyllm.pipeline import Spec, Stage


class Local:
    """A `pipeline.Worker`."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.stage: Stage | None = Stage(spec)

    def fit(self, context: int | None) -> tuple[int, int]:
        assert self.stage is not None
        return self.stage.fit(context)

    def serve(self, context: int, timeout_s: float | None) -> tuple[str, int]:
        if self.stage is None:
            raise LostError("it is away")
        return self.stage.serve(context)

    def close(self) -> None:
        if self.stage is not None:
            self.stage.close()

    def kill(self) -> None:
        """Its process is gone."""
        self.close()
        self.stage = None

    def start_again(self) -> None:
        self.stage = Stage(self.spec)


class Cluster:
    """What starts workers, and has them."""

    def __init__(self) -> None:
        self.workers: list[Local] = []

    def __call__(self, spec: Spec) -> Local:
        self.workers.append(Local(spec))
        return self.workers[-1]
