"""A stage: a range of a model's layers in this process, and the thread that computes for a driver.

Invariant: a driver's pages live as long as its connection; one that comes anew finds the weights, and no
pages. There is one driver at a time, the last one that came. Imports cut.py, wire.py, `loading`, `backends`.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tinyllm import backends
from tinyllm.backends import CacheType
from tinyllm.errors import ArgumentError, Error
from tinyllm.loading import fit_memory, kept_formats
from tinyllm.modelfiles import ModelFiles, open_model
from tinyllm.pipeline.cut import Cut, bytes_of, config_of, digest, tables_of, weights_of
from tinyllm.pipeline.wire import Arrays, Wire, accepted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spec:
    """What a stage is told. path: of the model's files as this machine sees them. cuts: of all stages;
    number: which one it is. host: the address that it listens at."""

    path: str
    cuts: tuple[Cut, ...]
    number: int
    secret: bytes
    device: str = "cpu"
    threads: int | None = None
    cache_type: CacheType = "f16"
    weights: str | None = None
    host: str = "127.0.0.1"

    @property
    def cut(self) -> Cut:
        return self.cuts[self.number]


class Stage:
    """Reads the files' headers at once, and the weights when it is told the context."""

    def __init__(self, spec: Spec, files: ModelFiles | None = None) -> None:
        """Raises what `tinyllm.load` does of the files."""
        self.spec = spec
        self._files = open_model(spec.path) if files is None else files
        self._formats = kept_formats(self._files.weights, spec.weights, spec.path)
        self._weights = weights_of(self._files.weights, self._formats, spec.cut)
        self._model: backends.Model | None = None
        self._listener: socket.socket | None = None
        self._wire: Wire | None = None
        self._loading = threading.Lock()

    def fit(self, context: int | None) -> tuple[int, int]:
        """(context, most pages) that this stage has room for; context None: its own choice. Raises
        MemoryLimitError, with the numbers."""
        spec = self.spec
        config = config_of(self._files.config, spec.cut)
        device = backends.choose_device(spec.device)
        name = f"stage {spec.number} of {len(spec.cuts)} of {spec.path} ({spec.cut})"
        fitting, n_pages, _ = fit_memory(
            config, spec.cache_type, bytes_of(self._weights), context, name, device, device.free_memory()
        )
        return fitting, n_pages

    def serve(self, context: int) -> tuple[str, int]:
        """Loads the weights, if they are not there, and says where it listens."""
        with self._loading:
            if self._model is None:
                self._model = self._loaded(context)
            elif self._model.config.context != context:
                raise ArgumentError(
                    f"a context of {context} is asked for, it was {self._model.config.context}"
                )
            if self._listener is None:
                self._listener = socket.create_server((self.spec.host, 0))
                threading.Thread(target=self._listen, name="tinyllm-stage", daemon=True).start()
            port: int = self._listener.getsockname()[1]
            return self.spec.host, port

    def close(self) -> None:
        """Frees everything."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        if self._wire is not None:
            self._wire.close()
        if self._model is not None:
            self._model.close()

    def _loaded(self, context: int) -> backends.Model:
        spec, files = self.spec, self._files
        self.fit(context)
        config = config_of(files.config.with_context(context), spec.cut)
        device = backends.choose_device(spec.device)
        model = backends.Model(config, device=device.name, threads=spec.threads)
        try:
            with model.upload(self._weights) as uploads:
                for _ in uploads:
                    pass
            model.tie()
            model.check()
        except BaseException:
            model.close()
            raise
        return model

    def _listen(self) -> None:
        listener = self._listener
        assert listener is not None
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # it was closed
                return
            wire = accepted(connection, self.spec.secret)
            if wire is not None:
                if self._wire is not None:
                    self._wire.close()
                self._wire = wire
                threading.Thread(target=self._talk, args=(wire,), name="tinyllm-talk", daemon=True).start()

    def _talk(self, wire: Wire) -> None:
        assert self._model is not None
        talk = _Talk(self, self._model, wire, self.facts())
        try:
            talk.run()
        except Exception:
            log.debug("a driver's connection ended", exc_info=True)
        finally:
            wire.close()
            talk.close()

    def facts(self) -> dict[str, Any]:
        """What a driver compares, and sums up."""
        assert self._model is not None
        model, files = self._model, self._files
        unread = 0 if self.spec.cut.is_last else _embedding_bytes(self._weights)
        return {
            "tinyllm": backends.version,
            "digest": digest(files.weights, self._formats),
            "number": self.spec.number,
            "context": model.config.context,
            "device": model.device.split(":")[0],
            "isa": model.isa,
            "pid": os.getpid(),
            "weight_bytes": model.weight_bytes,
            "token_bytes": model.token_bytes - unread,
        }


def _embedding_bytes(weights: list[backends.Weight]) -> int:
    return bytes_of([weight for weight in weights if weight.name == "embedding"])


class _Talk:
    """One driver's connection. A thread reads, so that what is sent never waits for what is computed, and the
    end of the connection ends a call within a layer."""

    def __init__(self, stage: Stage, model: backends.Model, wire: Wire, facts: dict[str, Any]) -> None:
        self._model, self._wire, self._facts, self._stage = model, wire, facts, stage
        self._tables = tables_of(stage._files.config.with_context(model.config.context), stage.spec.cuts)
        self._pools: dict[int, backends.PagePool] = {}
        self._asked: queue.SimpleQueue[tuple[dict[str, Any], Arrays] | None] = queue.SimpleQueue()
        self._cancelled = -1  # calls up to this one are not wanted any more
        self._is_over = False

    def run(self) -> None:
        threading.Thread(target=self._read, name="tinyllm-read", daemon=True).start()
        while (asked := self._asked.get()) is not None:
            message, arrays = asked
            try:
                answer, made = self._do(message, arrays)
            except Exception as error:
                kind = type(error).__name__ if isinstance(error, (Error, MemoryError)) else "Error"
                text = str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"
                answer, made = {"error": [kind, text]}, ()
            self._wire.send(answer, made)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _read(self) -> None:
        try:
            while True:
                message, arrays = self._wire.receive()
                if message["op"] == "ping":
                    self._wire.send({"pong": True})
                elif message["op"] == "cancel":
                    self._cancelled = message["call"]
                else:
                    self._asked.put((message, arrays))
        except (Error, OSError, ValueError, KeyError, TypeError):
            self._is_over = True
            self._asked.put(None)

    def _do(self, message: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        op = message["op"]
        if op == "facts":
            return self._facts, ()
        if op == "free":
            return {"bytes": self._model.free_memory()}, ()
        if op == "cache":
            pool = self._model.cache(message["type"], message["max_pages"])
            self._pools[message["cache"]] = pool
            return {"page_bytes": pool.page_bytes}, ()
        pool = self._pools[message["cache"]]
        if op == "forward":
            return {}, self._forward(pool, message, arrays)
        if op == "grow":
            pool.grow(message["n"])
        elif op == "clear":
            pool.clear_page(message["page"])
        elif op == "copy":
            pool.copy_page(message["to"], message["source"], message["n"])
        elif op == "read":
            return {}, (pool.read_page(message["page"]),)
        elif op == "write":
            pool.write_page(message["page"], arrays[0])
        elif op == "close":
            self._pools.pop(message["cache"]).close()
        else:
            raise ArgumentError(f"a stage does not know {op!r}: the driver has another version of tinyllm")
        return {}, ()

    def _forward(self, pool: backends.PagePool, message: dict[str, Any], arrays: Arrays) -> Arrays:
        given, positions, sequences, tables, rows = arrays
        call = message["call"]
        made = self._model.forward(
            given,
            positions,
            sequences,
            tables[:, self._tables.of_stage[self._stage.spec.number]],
            rows=rows,
            layers=tuple(message["layers"]),
            logits=message["logits"],
            cache=pool,
            should_stop=lambda: self._is_over or self._cancelled >= call,
        )
        return (made,) if message["is_wanted"] else ()
