"""Which replica a request goes to: the one that has the beginning of its text in its cache.

Invariant: requests with one key go to one replica for as long as it has room; who comes or goes moves only
the keys that were its own (rendezvous hashing), and where it is full the next in line takes them. Loaded by
Ray Serve, by its name. Imports Ray.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from ray.serve.request_router import RequestRouter


def ranked(key: str, replicas: list[str]) -> list[str]:
    """Names of replicas, the one for this key first; equal names do not occur."""

    def weight(name: str) -> bytes:
        return blake2b(f"{key}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()

    return sorted(replicas, key=weight)


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray is Any here
    """The key is the first argument of the request."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        of_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        key = pending_request.args[0] if pending_request is not None and pending_request.args else ""
        return [[of_name[name]] for name in ranked(str(key), list(of_name))]
