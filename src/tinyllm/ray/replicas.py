"""Many users: a Ray Serve application, a door and behind it replicas of the server's own ASGI application.

Invariant: what a client sees is what one server would have said, byte for byte but for ids and times: the
door reads a request to its end, chooses by its beginning, and hands on what the replica sends as it comes.
Where a client goes, the replica learns it. Imports `server` and cluster.py; routing.py chooses.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import tinyllm
from tinyllm.errors import ArgumentError, UnsupportedError, install_text
from tinyllm.ray.cluster import ray_module

MOST_BODY_BYTES = 64 << 20
KEY_CHARS = 2048  # of a conversation's beginning, by which requests are told apart
ENDING_S = 10.0  # that a replica's answer may take to notice that nobody reads it

Message = dict[str, Any]
REPLICA = "replica"  # by which the door finds them
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client")


def application(
    model: str,
    *,
    name: str | None = None,
    replicas: int | tuple[int, int] = 1,
    parallel: int = 8,
    queue: int = 64,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = (),
    cpus: float = 1,
    gpus: float = 0,
    **load: Any,
) -> Any:
    """What `ray.serve.run` takes: the server of `tinyllm-serve` on as many replicas as there is work for.

    model: what `tinyllm.load` takes, as every node sees it; load: its further arguments. name: what clients
    call it. replicas: how many, or (least, most): Ray Serve adds some where more than `parallel` requests a
    replica are under way, and takes them back. parallel, queue: of each, texts computed at once and requests
    that may wait. api_key: what clients must send. allowed_hosts: names of the proxy, beside addresses and
    localhost. cpus, gpus: what a replica asks of Ray. Another model under the same name replaces the replicas
    one by one. Raises UnsupportedError where Ray or the server's packages are missing.

        serve.run(tinyllm.ray.application("model.gguf", replicas=(1, 4)), name="llm")
    """
    ray_module()
    try:
        from ray import serve

        import tinyllm.server.app  # noqa: F401  # so that what is missing is said here
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"replicas need {error.name}: {install_text('ray')} {install_text('serve')[12:]}"
        ) from None
    least, most = (replicas, replicas) if isinstance(replicas, int) else replicas
    if not 1 <= least <= most:
        raise ArgumentError(f"replicas is {replicas!r}, expected a number from 1 up, or (least, most)")
    options: dict[str, Any] = {
        "name": REPLICA,
        "max_ongoing_requests": parallel + queue,
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        "request_router_config": {"request_router_class": "tinyllm.ray.routing:PrefixRouter"},
    }
    if least == most:
        options["num_replicas"] = least
    else:
        options["autoscaling_config"] = {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": parallel,
        }
    replica = serve.deployment(Replica, **options)
    door = serve.deployment(
        serve.ingress(_door)(),
        name="door",
        max_ongoing_requests=most * (parallel + queue),
        ray_actor_options={"num_cpus": 0},
    )
    bound = replica.bind(
        model,
        name=name,
        parallel=parallel,
        queue=queue,
        api_key=api_key,
        allowed_hosts=list(allowed_hosts),
        load=load,
    )
    return door.bind(bound)


class Replica:
    """One server, without a socket."""

    def __init__(
        self,
        model: str,
        *,
        name: str | None,
        parallel: int,
        queue: int,
        api_key: str | None,
        allowed_hosts: Sequence[str],
        load: Mapping[str, Any],
    ) -> None:
        from tinyllm.server.app import Server, application
        from tinyllm.server.dialects import DIALECTS
        from tinyllm.server.guard import Access
        from tinyllm.server.models import Models
        from tinyllm.server.turns import Turns

        models = Models({name or model: model}, lambda path, **more: tinyllm.load(path, **load, **more))
        models.load_now(None)
        access = Access(api_key, tuple(allowed_hosts), True)
        self._app: Any = application(Server(models, Turns(parallel, queue), access=access), DIALECTS)

    async def ask(self, key: str, scope: Message, body: bytes) -> AsyncGenerator[Message, None]:
        """The messages of ASGI that answer a request. key: what it was routed by."""
        sent: asyncio.Queue[Message] = asyncio.Queue()
        is_gone = asyncio.Event()
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if given:
                return given.pop()
            await is_gone.wait()
            return {"type": "http.disconnect"}

        work = asyncio.create_task(self._app({**scope, "asgi": {"version": "3.0"}}, receive, sent.put))
        try:
            while True:
                getting = asyncio.create_task(sent.get())
                await asyncio.wait({getting, work}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():  # it ended without a last word
                    getting.cancel()
                    await work
                    return
                message = getting.result()
                yield message
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    return
        finally:
            is_gone.set()
            await asyncio.wait({work}, timeout=ENDING_S)
            work.cancel()


def _door() -> Callable[[Message, Any, Any], Awaitable[None]]:
    """The ASGI application that stands before the replicas, made by Ray Serve where it runs."""
    from ray import serve

    app_name = serve.get_replica_context().app_name
    asking = serve.get_deployment_handle(REPLICA, app_name).options(stream=True)

    async def app(scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        if scope["type"] != "http":
            return
        body = await _read(receive)
        if body is None:
            await _say(send, 413, f"the body has more than {MOST_BODY_BYTES} bytes")
            return
        told = {name: scope[name] for name in _SCOPE if name in scope}
        told["headers"] = [(bytes(key), bytes(value)) for key, value in scope["headers"]]
        answer = asking.ask.remote(routing_key(body), told, body)
        is_over = False
        try:
            async for message in answer:
                await send(message)
            is_over = True
        finally:
            if not is_over:
                answer.cancel()

    return app


async def _read(receive: Any) -> bytes | None:
    """A request's body; None where it is too long."""
    parts: list[bytes] = []
    n_bytes = 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        n_bytes += len(parts[-1])
        if n_bytes > MOST_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


async def _say(send: Any, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode("utf-8")
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def routing_key(body: bytes) -> str:
    """The same for requests that begin alike: of a conversation what its system and first user say, which its
    next turns repeat; of others the beginning of what they ask for; "" for those without any."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(asked, dict):
        return ""
    told: list[Any] = [asked.get("system"), asked.get("instructions"), asked.get("tools")]
    turns = asked.get("messages") or asked.get("input")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        for turn in turns:
            told.append(turn.get("content"))
            if turn.get("role") == "user":
                break
    else:
        told.append(turns or asked.get("prompt") or asked.get("content"))
    if not any(told):
        return ""
    text = json.dumps(told, ensure_ascii=False)[:KEY_CHARS]
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
