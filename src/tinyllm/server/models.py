"""The models that are served: by name, loaded when first asked for, unloaded when their memory is needed.

Invariant: a name from a request is looked up in a table that the command line made, and nothing else: it
never opens a file. A model that computes for somebody is never unloaded. Under the memory limit the one that
was asked for least recently goes first, and what can never fit is refused before anything of it is loaded;
`keep_alive_s` after its last request every model goes. For one event loop; models are loaded and unloaded one
at a time, in threads. Imports tinyllm's public names, loading.py (how much a model takes), ask.py and
streams.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import tinyllm
from tinyllm import LLM, MemoryLimitError, ModelClosedError
from tinyllm.chat.templates import ChatTemplate
from tinyllm.errors import size_text
from tinyllm.loading import needed_bytes
from tinyllm.modelfiles import ModelFiles, read_model
from tinyllm.server.ask import Refusal
from tinyllm.server.streams import shielded

STEP_BYTES = 64 << 20  # by which a cache grows (SLAB_BYTES of the core)
LOOKS_S = 0.25  # how often somebody looks for models whose time is over

log = logging.getLogger(__name__)


@dataclass
class Served:
    """A model that may be asked for. llm: None while it is not loaded. reserved: bytes that are kept for it
    while it is loaded: weights, a call and a useful context. base: of a name "base:adapter" the model, which
    alone is loaded and unloaded; adapter: with which it then answers."""

    name: str
    path: str
    created: int = field(default_factory=lambda: int(time.time()))
    llm: LLM | None = None
    users: int = 0
    reserved: int = 0
    last_used: float = 0.0  # time.monotonic
    keep_alive_s: float = math.inf
    base: Served | None = None
    adapter: str | None = None

    @property
    def root(self) -> Served:
        """The model that is loaded for it."""
        return self.base or self

    @property
    def n_bytes(self) -> int:
        """What it holds: weights and the pages that exist, or what is kept for it where that is more, which
        is from before it is loaded."""
        return max(self.reserved, held_bytes(self.llm))


def held_bytes(llm: LLM | None) -> int:
    """Weights and the pages of the cache that exist, its draft's too."""
    if llm is None:
        return 0
    pages = llm.cache_pages
    own = llm.model.weight_bytes + llm.adapter_bytes + pages.allocated * pages.page_bytes
    return own + held_bytes(llm.draft)


class Loader:
    """Loads models for `Models`. templates: {path: Jinja source} in place of the models' own; drafts: {path:
    its draft's}; start: what stands in for `tinyllm.load`, None for itself; settings: its arguments."""

    def __init__(
        self,
        templates: Mapping[str, str] | None = None,
        drafts: Mapping[str, str] | None = None,
        *,
        start: Callable[..., LLM] | None = None,
        **settings: Any,
    ) -> None:
        self._start = start
        self._templates, self._drafts, self._settings = templates or {}, drafts or {}, settings

    def __call__(self, path: str, **more: Any) -> LLM:
        draft = self._drafts.get(path)
        load = self._start or tinyllm.load
        return load(self._read(path), draft=draft, **self._settings, **more)

    def needed(self, path: str) -> int:
        """Bytes that it takes at least; reads its headers."""
        names = ("context", "cache_type", "weights")
        needed = needed_bytes(read_model(path), **{k: v for k, v in self._settings.items() if k in names})
        if (draft := self._drafts.get(path)) is not None:
            needed += needed_bytes(read_model(draft), cache_type=self._settings.get("cache_type", "f16"))
        return needed

    def _read(self, path: str) -> ModelFiles:
        files = read_model(path)
        if (source := self._templates.get(path)) is None:
            return files
        own = files.template
        bos, eos = (own.bos_token, own.eos_token) if own else ("", "")
        return replace(files, template=ChatTemplate(source, bos_token=bos, eos_token=eos))


class Models:
    """paths: {name: what `tinyllm.load` takes}, the first is meant where a request names none. adapters: of a
    name {adapter: its path}, each asked for as "name:adapter". load: a path's model; under a limit it gets
    `free_memory` as `tinyllm.load` does, and needed says how many bytes a path takes at least. memory_limit:
    bytes that all may hold, None for no limit of our own."""

    def __init__(
        self,
        paths: Mapping[str, str],
        load: Callable[..., LLM],
        *,
        adapters: Mapping[str, Mapping[str, str]] | None = None,
        needed: Callable[[str], int] | None = None,
        memory_limit: int | None = None,
        keep_alive_s: float = math.inf,
    ) -> None:
        self.served = {name: Served(name, path, keep_alive_s=keep_alive_s) for name, path in paths.items()}
        self._adapters = adapters or {}
        for base, names in self._adapters.items():
            for adapter in names:
                root, name = self.served[base], f"{base}:{adapter}"
                self.served[name] = Served(name, root.path, base=root, adapter=adapter)
        self.keep_alive_s = keep_alive_s  # of every model, unless a request says otherwise
        self._load, self._needed, self._memory_limit = load, needed, memory_limit
        self._changing = asyncio.Lock()  # what is loaded; one lock for all, lest two wait for each other
        self._is_closed = False

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
        """The model, loaded, and not unloaded meanwhile. Raises Refusal (404), MemoryLimitError, whatever
        its files are refused for, and ModelClosedError once all are closed."""
        found = self.find(name)
        served = found.root
        served.users += 1
        served.last_used = time.monotonic()
        try:
            if served.llm is None:
                await shielded(self._bring(served))  # a client that goes does not break it off: others wait
            if served.llm is None:
                raise ModelClosedError("the server is ending")
            yield served.llm if found.adapter is None else _adapted(served.llm, found)
        finally:
            served.users -= 1
            served.last_used = time.monotonic()

    def load_now(self, name: str | None, **more: Any) -> None:
        """Loads a model in this thread, before there is an event loop. Errors are the loader's own. more:
        arguments for `load`."""
        served = self.find(name).root
        self._in_the_way(served, self._bytes_of(served))
        self._load_one(served, **more)

    async def unload(self, served: Served) -> bool:
        """Frees a model that nobody uses; whether it is gone."""
        async with self._changing:
            return await self._unload(served.root)

    async def reap(self) -> None:
        """Unloads what was not asked for in its keep-alive time, for ever; to be run as a task."""
        while True:
            now = time.monotonic()
            for served in self.served.values():
                if served.llm and not served.users and now - served.last_used > served.keep_alive_s:
                    await self.unload(served)
            await asyncio.sleep(LOOKS_S)

    async def close(self) -> None:
        """Ends all texts, and frees all models for good."""
        self._is_closed = True
        for served in self.served.values():  # at once, those that are loaded: texts end within a layer
            await self._free(served)
        async with self._changing:  # what was on its way
            for served in self.served.values():
                await self._free(served)

    async def _bring(self, served: Served) -> None:
        """Loads a model, in place of others where there is no room."""
        async with self._changing:
            if served.llm is not None or self._is_closed:
                return
            try:
                n_bytes = await asyncio.to_thread(self._bytes_of, served)
                while others := self._in_the_way(served, n_bytes):
                    await self._unload(others[0])
                while not await asyncio.to_thread(self._fits_now, served):
                    await self._unload(self._idle(but=served)[0])
            except tinyllm.Error as error:
                log.error("%s: %s", served.name, error)
                raise _told(served, error) from None
            finally:
                if served.llm is None:
                    served.reserved = 0

    def _fits_now(self, served: Served) -> bool:
        """Loads it; False where the machine has too little memory, and others could go."""
        try:
            self._load_one(served)
        except MemoryLimitError:
            if not self._idle(but=served):
                raise
            return False
        return True

    def _load_one(self, served: Served, **more: Any) -> None:
        if self._memory_limit is not None:
            more["free_memory"] = lambda: self._left(served)
        if adapters := self._adapters.get(served.name):
            more["adapters"] = adapters
        llm = self._load(served.path, **more)
        pages = llm.cache_pages
        first_step = min(STEP_BYTES, pages.most * pages.page_bytes)
        drafts = llm.draft.model.weight_bytes if llm.draft is not None else 0
        served.reserved = max(served.reserved, llm.model.weight_bytes + first_step + drafts)
        llm.name = served.name  # what messages call it: no path goes to a client
        served.llm, served.last_used = llm, time.monotonic()
        log.info("loaded %s in %.1f s", served.name, llm.load_s)

    def _left(self, served: Served) -> int:
        """What a model may take beside what it has, under the limit: of the cache's growth whole steps."""
        left = (self._memory_limit or 0) - self._held(but=served) - held_bytes(served.llm)
        is_growing = served.llm is not None and served.llm.cache_pages.allocated > 0
        return left - STEP_BYTES if is_growing else left

    def _bytes_of(self, served: Served) -> int:
        """What it takes at least, as far as anybody asks."""
        if self._memory_limit is None or self._needed is None:
            return 0
        return self._needed(served.path)

    def _in_the_way(self, served: Served, n_bytes: int) -> list[Served]:
        """Idle ones of which the first has to go before `served` is loaded; with none its bytes are kept for
        it. Raises _NoRoom where it does not fit even without them."""
        limit = self._memory_limit
        if limit is None:
            return []
        if n_bytes > limit:
            raise _NoRoom(
                f"{served.name} takes {size_text(n_bytes)} at least, more than the {size_text(limit)} that "
                "this server may hold (--memory-limit)"
            )
        held, idle = self._held(but=served), self._idle(but=served)
        if held + n_bytes <= limit:
            served.reserved = n_bytes
            return []
        in_use = held - sum(other.n_bytes for other in idle)
        if in_use + n_bytes > limit:
            raise _NoRoom(
                f"{served.name} takes {size_text(n_bytes)} at least, and the models that are in use take "
                f"{size_text(in_use)} of the {size_text(limit)} that this server may hold: come back later"
            )
        return idle

    def _held(self, but: Served) -> int:
        return sum(other.n_bytes for other in self.served.values() if other is not but)

    def _idle(self, but: Served) -> list[Served]:
        """Loaded, and used by nobody; the one asked for least recently first."""
        idle = [s for s in self.served.values() if s.llm is not None and not s.users and s is not but]
        return sorted(idle, key=lambda s: s.last_used)

    async def _unload(self, served: Served) -> bool:
        if served.users:
            return False
        if await self._free(served):
            log.info("unloaded %s", served.name)
        return True

    async def _free(self, served: Served) -> bool:
        """Whether there was anything to free. Nobody gets the model from the first step on."""
        llm, served.llm = served.llm, None
        if llm is None:
            return False
        await shielded(asyncio.to_thread(llm.close))
        served.reserved = 0
        return True


def _adapted(llm: LLM, served: Served) -> LLM:
    view = llm.adapted(served.adapter)
    view.name = served.name
    return view


class _NoRoom(MemoryLimitError):
    """Under the limit of this server; says so in words for everybody."""


def _told(served: Served, error: tinyllm.Error) -> Exception:
    """What a client hears of a model that cannot be loaded: its files' names are in the log alone."""
    if isinstance(error, _NoRoom):
        return error
    if isinstance(error, MemoryLimitError):
        return MemoryLimitError(f"{served.name} does not fit into the memory that is free on this server")
    return Refusal(500, f"{served.name} cannot be loaded: the server's log says why", code="model_error")
