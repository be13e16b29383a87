"""The models that are served: by name, loaded when first asked for, unloaded when their memory is needed.

Invariant: a name from a request is looked up in a table that the command line made, and nothing else: it
never opens a file. A model that computes for somebody is never unloaded. Under the memory limit the one that
was asked for least recently goes first; keep_alive_s after its last request every model goes. For one event
loop; loading and unloading run in threads. Imports tinyllm's public names and ask.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tinyllm import LLM, MemoryLimitError
from tinyllm.errors import Error, size_text
from tinyllm.server.ask import Refusal

log = logging.getLogger(__name__)


@dataclass
class Served:
    """A model that may be asked for. llm: None while it is not loaded. n_bytes: what it held when loaded."""

    name: str
    path: str
    created: int = field(default_factory=lambda: int(time.time()))
    llm: LLM | None = None
    users: int = 0
    n_bytes: int = 0
    last_used: float = 0.0  # time.monotonic
    keep_alive_s: float = math.inf
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Models:
    """paths: {name: what `tinyllm.load` takes}, the first is meant where a request names none.
    load: a path's model. memory_limit: bytes that all may hold, None for no limit of our own."""

    def __init__(
        self,
        paths: Mapping[str, str],
        load: Callable[[str], LLM],
        *,
        memory_limit: int | None = None,
        keep_alive_s: float = math.inf,
    ) -> None:
        self.served = {name: Served(name, path, keep_alive_s=keep_alive_s) for name, path in paths.items()}
        self._load, self._memory_limit, self._keep_alive_s = load, memory_limit, keep_alive_s
        self._making_room = asyncio.Lock()

    def find(self, name: str | None) -> Served:
        """By name; ":latest" at its end is what Ollama's clients put there. Raises Refusal (404)."""
        if name is None:
            return next(iter(self.served.values()))
        served = self.served.get(name) or self.served.get(name.removesuffix(":latest"))
        if served is None:
            names = ", ".join(self.served)
            shown = name if len(name) <= 100 else name[:97] + "..."
            raise Refusal(
                404, f"there is no model {shown!r} here, only {names}", param="model", code="model_not_found"
            )
        return served

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[LLM]:
        """The model, loaded, and not unloaded meanwhile."""
        served = self.find(name)
        served.users += 1
        served.last_used = time.monotonic()
        try:
            async with served.lock:
                if served.llm is None:
                    await self._bring(served)
            assert served.llm is not None
            yield served.llm
        finally:
            served.users -= 1
            served.last_used = time.monotonic()

    async def unload(self, served: Served) -> bool:
        """Frees a model that nobody uses; whether it is gone."""
        async with served.lock:
            llm = served.llm
            if llm is None:
                return True
            if served.users:
                return False
            served.llm, served.n_bytes = None, 0
            await asyncio.to_thread(llm.close)
            log.info("unloaded %s", served.name)
            return True

    async def reap(self) -> None:
        """Unloads what was not asked for in its keep-alive time, for ever; to be run as a task."""
        while True:
            now = time.monotonic()
            for served in self.served.values():
                if served.llm and not served.users and now - served.last_used > served.keep_alive_s:
                    await self.unload(served)
            await asyncio.sleep(0.2 if self._keep_alive_s < 60 else 5.0)

    async def close(self) -> None:
        for served in self.served.values():
            llm, served.llm = served.llm, None
            if llm is not None:
                await asyncio.to_thread(llm.close)

    async def _bring(self, served: Served) -> None:
        """Loads a model, in place of others where there is no room."""
        async with self._making_room:
            while True:
                try:
                    llm = await asyncio.to_thread(self._load, served.path)
                except MemoryLimitError as error:
                    if not await self._unload_one(but=served):
                        raise _failed(served, error, "there is not enough memory for it", 503) from None
                    continue
                except (Error, OSError) as error:
                    raise _failed(served, error, "its files cannot be read", 500) from None
                n_bytes = llm.model.weight_bytes
                held = sum(other.n_bytes for other in self.served.values())
                if self._memory_limit is None or held + n_bytes <= self._memory_limit:
                    break
                await asyncio.to_thread(llm.close)
                if not await self._unload_one(but=served):
                    raise MemoryLimitError(
                        f"{served.name} takes {size_text(n_bytes)}, and the models that are in use take "
                        f"{size_text(held)} of the {size_text(self._memory_limit)} that this server may hold"
                    )
            llm.name = served.name  # what messages call it: no path goes to a client
            served.llm, served.n_bytes = llm, n_bytes
            log.info("loaded %s in %.1f s", served.name, llm.load_s)

    async def _unload_one(self, but: Served) -> bool:
        """The least recently used one that nobody uses; False where there is none."""
        idle = [s for s in self.served.values() if s.llm is not None and not s.users and s is not but]
        if not idle:
            return False
        return await self.unload(min(idle, key=lambda s: s.last_used))


def _failed(served: Served, error: Exception, why: str, status: int) -> Refusal:
    """Why a model could not be loaded. The whole reason has the model's path, and is for the log."""
    log.error("%s was not loaded: %s", served.name, error)
    return Refusal(
        status,
        f"{served.name} could not be loaded: {why}; the server's log has more",
        param="model",
        code="model_error",
        retry_after=1 if status == 503 else None,
    )
