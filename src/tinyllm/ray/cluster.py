"""The connection to a Ray cluster, and one of its own on this machine where none is named.

Invariant: what is started here has no dashboard, reports no usage, and is stopped by the one who started it.
Its ports are Ray's, on all addresses of the machine: Ray takes no loopback address. Imports `errors`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tinyllm.errors import NotFoundError, UnsupportedError, install_text

LOCAL = "local"


def ray_module() -> Any:
    """The package ray. Raises UnsupportedError where it is missing."""
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UnsupportedError(f"more than one machine needs ray: {install_text('ray')}") from None
    return ray


def connect(address: str | None) -> bool:
    """Whether a connection was made here, which `disconnect` ends; one that there is stays as it is.

    address: of a cluster, "auto" for the one of this machine, "local" or None for a new one of this machine
    alone, which ends with the connection. Raises NotFoundError, UnsupportedError.
    """
    ray = ray_module()
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address in (None, LOCAL):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address=LOCAL, include_dashboard=False, **quiet)
        return True
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        raise NotFoundError(f"no Ray cluster answers at {address!r}: {reason}") from None
    return True


def disconnect() -> None:
    """Ends what `connect` began."""
    ray_module().shutdown()


@contextmanager
def connection(address: str | None) -> Iterator[Any]:
    """The package ray, connected for as long as the block runs."""
    is_ours = connect(address)
    try:
        yield ray_module()
    finally:
        if is_ours:
            disconnect()


def spare_cpus() -> int:
    """What a process on each node may ask of Ray for itself so that one processor stays for what feeds it,
    by the smallest node: 0 where that has one."""
    nodes = [node["Resources"].get("CPU", 0) for node in ray_module().nodes() if node["Alive"]]
    return max(0, int(min((n for n in nodes if n), default=1)) - 1)
