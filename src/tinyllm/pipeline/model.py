"""The whole model as the driver sees it: what `backends.Model` is to the engine, computed by stages.

Invariant: either a call is computed by all stages, or it raises and counts for nothing. Where a stage was
lost (or a call was broken off, so that nobody knows what is still on its way) all connections end, the pools'
`epoch` is another one, and the engine computes again from tokens what pages held; the next call connects
anew, and waits for a stage that is on its way back. Imports cut.py, wire.py, `backends` and `errors`.
"""

from __future__ import annotations

import logging
import math
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tinyllm import backends, errors
from tinyllm.backends import CacheType
from tinyllm.config import ModelConfig
from tinyllm.errors import ArgumentError, CancelledError, Error, LostError, MemoryLimitError, UnsupportedError
from tinyllm.pipeline.cut import Cut, tables_of
from tinyllm.pipeline.wire import Arrays, Wire, connected

F32 = npt.NDArray[np.float32]
Address = Callable[[float], "tuple[str, int]"]  # of a stage, within so many seconds; raises LostError

PIECE = 32  # tokens that go through the stages together: fewer fill them sooner, more multiply faster
ASK_S = 0.02  # after which `should_stop` is asked again
PING_S = 2.0  # of silence, after which a stage is asked whether it is there
SILENT_S = 12.0  # after which it is not
IDLE_S = 2.0  # after the last answer, from which on no text counts as being computed
PATIENCE_S = 120.0  # that a call waits for stages to come back

log = logging.getLogger(__name__)


class PipelineModel:
    """Stages, in order. addresses: where each is, asked for whenever it has to be found."""

    has_output = True
    most_candidates = 0

    def __init__(
        self,
        config: ModelConfig,
        cuts: Sequence[Cut],
        addresses: Sequence[Address],
        secret: bytes,
        *,
        digest: str,
        output_norm: tuple[F32, F32],
        patience_s: float = PATIENCE_S,
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        """config: with its context. Connects. Raises LostError, UnsupportedError for stages that do not go
        together."""
        self.config, self.cuts, self.patience_s = config, list(cuts), patience_s
        self._tables = tables_of(config, self.cuts)
        self.cache_groups = self._tables.groups
        self.threads = backends.default_threads()  # that choose tokens, here
        self.epoch = 0
        self._addresses, self._secret, self._digest = list(addresses), secret, digest
        self._output_norm, self._on_close = output_norm, on_close
        self._lock = threading.RLock()
        self._wires: list[Wire] = []
        self._selector: selectors.BaseSelector | None = None
        self._pools: list[PipelinePool] = []
        self._n_calls = self._n_pools = 0
        self._is_closed = False
        self._free: list[int] = []
        self._heard_at = -math.inf  # when the last answer came
        self.facts: list[dict[str, Any]] = []
        with self._lock:
            self._connect(None)
        self.weight_bytes = sum(fact["weight_bytes"] for fact in self.facts)
        self.token_bytes = sum(fact["token_bytes"] for fact in self.facts)
        self.device: str = self.facts[0]["device"]

    @property
    def isa(self) -> str:
        """The instruction sets in use, which give the same bits."""
        return ", ".join(sorted({fact["isa"] for fact in self.facts}))

    def free_memory(self) -> int:
        """Bytes that pages may still take on all stages together, as the fullest one has room for."""
        with self._lock:
            if self._wires or not self._free:  # what is away has as much as it had
                with self._whole():
                    self._free = [answer["bytes"] for answer, _ in self._ask_all({"op": "free"})]
            free = self._free
        shares = [max(1, len(range(cut.first, cut.last))) for cut in self.cuts]
        return min(n * sum(shares) // share for n, share in zip(free, shares, strict=True))

    def cache(
        self, type: CacheType = "f16", max_pages: int | None = None, max_slots: int = 0
    ) -> PipelinePool:
        """A page pool on every stage; max_pages None: all pages of one sequence of the whole context.
        max_slots: no model in stages has states (load.py)."""
        usual = -(-self.config.context // backends.PAGE) * len(self.cache_groups)
        with self._whole():
            self._n_pools += 1
            pool = PipelinePool(self, self._n_pools, type, usual if max_pages is None else max_pages)
            self._make(pool)
            self._pools.append(pool)
            return pool

    def forward(
        self,
        tokens_or_x: npt.ArrayLike,
        positions: npt.ArrayLike,
        sequences: npt.ArrayLike,
        page_tables: npt.ArrayLike,
        *,
        rows: npt.ArrayLike | None = None,
        layers: tuple[int, int] | None = None,
        logits: bool | None = None,
        adapters: Any = None,
        states: None = None,
        cache: PipelinePool,
        should_stop: Callable[[], bool] | None = None,
    ) -> F32:
        """As `backends.Model.forward`, to the same bits. states: None, as no model in stages has any. Raises
        what that does, and LostError."""
        if adapters is not None and any(adapters):
            raise UnsupportedError("adapters do not run on a model in stages yet; load it in one process")
        position = backends.integers("positions", positions, 1)
        given = np.asarray(tokens_or_x)
        is_x = given.ndim == 2
        given = np.ascontiguousarray(given, np.float32) if is_x else backends.integers("tokens", given, 1)
        if is_x and given.shape != (len(position), self.config.dim):
            raise ArgumentError(
                f"activations are {list(given.shape)}, expected [{len(position)}, {self.config.dim}]"
            )
        chosen = (
            np.arange(len(position), dtype=np.int32) if rows is None else backends.integers("rows", rows, 1)
        )
        n_layers = self.config.n_layers
        first, last = (0, n_layers) if layers is None else layers
        if not 0 <= first <= last <= n_layers:
            raise ArgumentError(f"layers {first} to {last} are not in 0..{n_layers}")
        wants_logits = last == n_layers if logits is None else bool(logits)
        if wants_logits and not self.has_output:
            raise UnsupportedError("this model gives vectors of texts (embed), no logits")
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(position):
            raise ArgumentError(f"a row is not one of the {len(position)} tokens")
        tables = backends.integers("page_tables", page_tables)
        if tables.ndim == 2:
            tables = tables[:, None, :]
        call = _Call(
            given,
            position,
            backends.integers("sequences", sequences, 1),
            np.ascontiguousarray(tables),
            chosen,
            self._route(first, last, wants_logits, is_x),
            wants_logits,
            PIECE if not self.config.bidirectional else max(1, len(position)),
        )
        with self._whole(should_stop):
            self._n_calls += 1
            return self._run(call, self._n_calls, cache, should_stop)

    def candidates(self, *_: Any, **__: Any) -> NoReturn:
        """The engine asks for none where `most_candidates` is 0."""
        raise ArgumentError("a model in stages finds no candidates by itself")

    def output_norm(self, x: F32) -> npt.NDArray[np.float64]:
        """As `backends.Model.output_norm`."""
        return backends.output_norm(x, *self._output_norm, self.config)

    def adapter(self, pairs: object) -> NoReturn:
        raise UnsupportedError("adapters do not run on a model in stages yet; load it in one process")

    def observe(self, name: str, layer: int | None = None) -> NoReturn:
        raise UnsupportedError("inputs are observed in one process only; load the model without stages")

    def unpack(self, name: str, layer: int | None = None) -> NoReturn:
        raise UnsupportedError("weights are unpacked in one process only; load the model without stages")

    def close(self) -> None:
        """Ends the connections, and the stages where they are its own."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._lose()
                self._on_close()

    def __repr__(self) -> str:
        return f"<PipelineModel {self.config.architecture}: {', '.join(map(str, self.cuts))}>"

    def __reduce__(self) -> Any:
        raise TypeError("a loaded model cannot be pickled or copied")

    # Connections

    @contextmanager
    def _whole(self, should_stop: Callable[[], bool] | None = None) -> Iterator[None]:
        """Connected. Whatever breaks off what the block does, an interrupt too, ends the connections, unless
        it is an answer of the stages'."""
        with self._lock:
            if self._is_closed:
                raise errors.ModelClosedError("the model is closed")
            try:
                if not self._wires:
                    self._connect(should_stop)
                yield
            except (_Told, CancelledError, UnsupportedError) as error:
                raise error.error if isinstance(error, _Told) else error from None
            except LostError:
                self._lose()
                raise
            except BaseException:
                self._lose()
                raise

    def _lose(self) -> None:
        if self._wires:
            self.epoch += 1
        for wire in self._wires:
            wire.close()
        self._wires = []
        if self._selector is not None:
            self._selector.close()
            self._selector = None

    def look(self) -> None:
        """Notices a stage that ended its connection while nobody asked it anything. Raises LostError where
        that was between two calls of texts in the making, which are told as if it had been within one."""
        with self._lock:
            ready = self._selector.select(0) if self._wires and self._selector is not None else []
            if ready:
                self._lose()
                if time.monotonic() - self._heard_at < IDLE_S:
                    raise self._gone(ready[0][0].data, "between two calls")

    def _connect(self, should_stop: Callable[[], bool] | None) -> None:
        """Finds all stages, waiting for those that are on their way back. Raises LostError."""
        end = time.monotonic() + self.patience_s
        wires: list[Wire] = []
        facts: list[dict[str, Any]] = []
        selector = selectors.DefaultSelector()
        try:
            for number, address in enumerate(self._addresses):
                wire = self._find(number, address, end, should_stop)
                wires.append(wire)
                selector.register(wire, selectors.EVENT_READ, number)
            for number, wire in enumerate(wires):
                wire.send({"op": "facts"})
                fact, _ = wire.receive()
                self._check(number, fact)
                facts.append(fact)
            if len({fact["device"] for fact in facts}) > 1:
                kinds = ", ".join(fact["device"] for fact in facts)
                raise UnsupportedError(f"the stages are on {kinds}, which compute other bits: use one kind")
            self._wires, self._selector, self.facts = wires, selector, facts
            for pool in self._pools:
                self._make(pool)
        except BaseException as error:
            self._wires, self._selector = [], None
            selector.close()
            for wire in wires:
                wire.close()
            if isinstance(error, OSError) and not isinstance(error, Error):
                raise LostError(f"a stage went while the driver met it: {error}") from None
            raise

    def _find(
        self, number: int, address: Address, end: float, should_stop: Callable[[], bool] | None
    ) -> Wire:
        why: Exception | None = None
        while (left := end - time.monotonic()) > 0:
            if should_stop is not None and should_stop():
                raise CancelledError("cancelled while a stage was on its way back")
            try:
                host, port = address(min(left, 5.0))
                return connected(host, port, self._secret)
            except (LostError, OSError) as error:
                why = error
            time.sleep(min(0.1, max(0.0, left)))
        raise LostError(
            f"{self._name(number)} did not come back within {self.patience_s:g} s: {why}. What it held is "
            "computed again once it does"
        ) from None

    def _check(self, number: int, fact: dict[str, Any]) -> None:
        """Raises UnsupportedError for a stage that is not of this model."""
        expected = {"tinyllm": backends.version, "digest": self._digest, "number": number}
        expected["context"] = self.config.context
        for name, value in expected.items():
            if fact.get(name) != value:
                what = "other weights" if name == "digest" else f"{name} {fact.get(name)}, not {value}"
                raise UnsupportedError(f"{self._name(number)} has {what}: all stages load the same files")

    def _name(self, number: int) -> str:
        return f"stage {number} of {len(self.cuts)} ({self.cuts[number]})"

    # Asking

    def _make(self, pool: PipelinePool) -> None:
        asked = {"op": "cache", "cache": pool.number, "type": pool.type, "max_pages": pool.max_pages}
        pool.of_stage = [answer["page_bytes"] for answer, _ in self._ask_all(asked)]
        if pool.n_pages:
            self._ask_all({"op": "grow", "cache": pool.number, "n": pool.n_pages})

    def _ask_all(
        self, message: dict[str, Any], arrays: Sequence[Arrays] | None = None
    ) -> list[tuple[dict[str, Any], list[npt.NDArray[Any]]]]:
        """What every stage answers."""
        for number, wire in enumerate(self._wires):
            self._send(number, wire, message, arrays[number] if arrays else ())
        found: list[Any] = [None] * len(self._wires)
        error: _Told | None = None
        for number, answer, made in self._answers([1] * len(self._wires), None):
            if "error" in answer:
                error = error or _Told(self._error(number, answer["error"]))
            found[number] = answer, made
        if error is not None:
            raise error
        return found

    def _send(self, number: int, wire: Wire, message: dict[str, Any], arrays: Arrays = ()) -> None:
        try:
            wire.send(message, arrays)
        except OSError as error:
            raise self._gone(number, error) from None

    def _gone(self, number: int, why: object) -> LostError:
        return LostError(
            f"{self._name(number)} is gone ({why}), and with it the texts that were computed just now. The "
            "next call waits for it to come back, and computes again what it held"
        )

    def _error(self, number: int, told: Sequence[str]) -> Exception:
        kind = getattr(errors, told[0], None)
        if told[0] == "MemoryError":
            kind = MemoryLimitError
        if not (isinstance(kind, type) and issubclass(kind, Error)):
            kind = Error
        return kind(f"{self._name(number)}: {told[1]}")

    def _answers(
        self,
        n_open: list[int],
        should_stop: Callable[[], bool] | None,
        on_stop: Callable[[], object] = lambda: None,
    ) -> Iterator[tuple[int, dict[str, Any], list[npt.NDArray[Any]]]]:
        """Answers as they come, until n_open, by stage, are all 0; it counts down, the caller may count up. A
        stage that says nothing for long is asked whether it lives. Raises LostError."""
        assert self._selector is not None
        heard = [time.monotonic()] * len(self._wires)
        asked = list(heard)
        while any(n_open):
            ready = self._selector.select(PING_S if should_stop is None else ASK_S)
            now = time.monotonic()
            for key, _ in ready:
                number = key.data
                try:
                    answer, made = self._wires[number].receive()
                except (OSError, ValueError, KeyError, Error) as error:
                    raise self._gone(number, error) from None
                heard[number] = self._heard_at = now
                if "pong" not in answer:
                    n_open[number] -= 1
                    yield number, answer, made
            for number, wire in enumerate(self._wires):
                if n_open[number] and now - heard[number] > SILENT_S:
                    raise self._gone(number, f"it has said nothing for {SILENT_S:g} s")
                if n_open[number] and now - max(heard[number], asked[number]) > PING_S:
                    asked[number] = now
                    self._send(number, wire, {"op": "ping"})
            if should_stop is not None and should_stop():
                should_stop = None
                on_stop()

    # The call

    def _route(self, first: int, last: int, wants_logits: bool, is_x: bool) -> list[tuple[int, int, int]]:
        """(stage, its first layer, its last one) of those that have a part in it."""
        route = []
        for number, cut in enumerate(self.cuts):
            a, b = max(first, cut.first), min(last, cut.last)
            embeds = cut.is_first and not is_x and first == 0
            if a < b or (cut.is_last and wants_logits) or embeds:
                a, b = (a, b) if a < b else (cut.last, cut.last) if wants_logits and cut.is_last else (0, 0)
                route.append((number, a - cut.first, b - cut.first))
        return route

    def _run(self, call: _Call, id: int, cache: PipelinePool, should_stop: Callable[[], bool] | None) -> F32:
        made: list[F32 | None] = [None] * len(call.pieces)
        if not call.route:  # no layers, and activations: they stay as they are
            return np.array(call.given, np.float32)
        n_open = [0] * len(self.cuts)
        at = {number: place for place, (number, _, _) in enumerate(call.route)}
        in_stage: list[deque[int]] = [deque() for _ in self.cuts]  # pieces, in the order of their answers
        failure: Exception | None = None
        is_over = False

        def give(place: int, piece: int, given: npt.NDArray[Any]) -> None:
            number, first, last = call.route[place]
            is_end = place == len(call.route) - 1
            message = {"op": "forward", "call": id, "cache": cache.number, "layers": [first, last]}
            message["logits"] = call.wants_logits and is_end
            message["is_wanted"] = not is_end or call.is_wanted(piece)
            rows = call.rows_of(piece) if is_end else np.empty(0, np.int32)
            n_open[number] += 1
            in_stage[number].append(piece)
            self._send(number, self._wires[number], message, (given, *call.facts_of(piece), rows))

        def stop() -> None:
            nonlocal is_over
            is_over = True
            for number, wire in enumerate(self._wires):
                self._send(number, wire, {"op": "cancel", "call": id})

        for piece, given in enumerate(call.pieces):
            give(0, piece, call.given[given])
        for number, answer, arrays in self._answers(n_open, should_stop, stop):
            piece = in_stage[number].popleft()
            if "error" in answer:
                failure = failure or self._error(number, answer["error"])
                if not is_over:
                    stop()
            elif not is_over and at[number] + 1 < len(call.route):
                give(at[number] + 1, piece, arrays[0])
            elif arrays:
                made[piece] = arrays[0]
        if failure is not None:
            raise CancelledError("cancelled") if isinstance(failure, CancelledError) else _Told(failure)
        if is_over:
            raise CancelledError("cancelled")
        return call.joined([part for part in made if part is not None], self.config)


class _Call:
    """The arrays of a call, and the pieces that it is cut into: slices of its tokens."""

    def __init__(
        self,
        given: npt.NDArray[Any],
        positions: backends.I32,
        sequences: backends.I32,
        tables: backends.I32,
        rows: backends.I32,
        route: list[tuple[int, int, int]],
        wants_logits: bool,
        piece: int,
    ) -> None:
        n = len(positions)
        if len(given) != n or len(sequences) != n:
            raise ArgumentError(f"{len(given)} tokens, {n} positions and {len(sequences)} sequences")
        self.given, self.route, self.wants_logits = given, route, wants_logits
        self._positions, self._sequences, self._tables, self._rows = positions, sequences, tables, rows
        n_pieces = max(1, n // piece) if len(route) > 1 else 1  # a short rest goes with the last one
        ends = [n * (i + 1) // n_pieces for i in range(n_pieces)]
        self.pieces = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]

    def facts_of(self, piece: int) -> tuple[backends.I32, backends.I32, backends.I32]:
        here = self.pieces[piece]
        return self._positions[here], self._sequences[here], self._tables

    def rows_of(self, piece: int) -> backends.I32:
        here = self.pieces[piece]
        mine = self._rows[(self._rows >= here.start) & (self._rows < here.stop)]
        return np.asarray(mine - here.start, np.int32)

    def is_wanted(self, piece: int) -> bool:
        return not self.wants_logits or len(self.rows_of(piece)) > 0

    def joined(self, made: list[F32], config: ModelConfig) -> F32:
        """What the pieces gave, in the order that `rows` asks for."""
        if not made:
            return np.empty((0, config.vocab_size if self.wants_logits else config.dim), np.float32)
        whole: F32 = np.concatenate(made) if len(made) > 1 else np.array(made[0])
        if not self.wants_logits or len(self._rows) < 2:
            return whole
        piece_of = np.searchsorted([piece.stop for piece in self.pieces], self._rows, side="right")
        ordered = np.empty_like(whole)
        ordered[np.argsort(piece_of, kind="stable")] = whole
        return ordered


class PipelinePool:
    """A pool with the same pages on every stage. epoch: another number where all of them were lost."""

    slot_bytes = 0  # of states, which no model in stages has

    def __init__(self, model: PipelineModel, number: int, type: CacheType, max_pages: int) -> None:
        self._model, self.number, self.type, self.max_pages = model, number, type, max_pages
        self.n_pages = 0
        self.of_stage: list[int] = []  # bytes of a page, by stage

    @property
    def page_bytes(self) -> int:
        return sum(self.of_stage)

    @property
    def epoch(self) -> int:
        """Raises LostError, as `PipelineModel.look` does."""
        self._model.look()
        return self._model.epoch

    def grow(self, n_pages: int) -> None:
        """At least n_pages exist on every stage. Raises MemoryLimitError, ArgumentError."""
        if n_pages > self.n_pages:
            self._ask({"op": "grow", "n": n_pages})
            self.n_pages = n_pages

    def clear_page(self, page: int) -> None:
        self._ask({"op": "clear", "page": page})

    def copy_page(self, to: int, source: int, n_tokens: int) -> None:
        self._ask({"op": "copy", "to": to, "source": source, "n": n_tokens})

    def read_page(self, page: int) -> npt.NDArray[np.uint8]:
        """The bytes of a page, the stages' one after another."""
        with self._model._whole():
            found = self._model._ask_all({"op": "read", "cache": self.number, "page": page})
        return np.concatenate([arrays[0] for _, arrays in found])

    def write_page(self, page: int, content: npt.NDArray[np.uint8]) -> None:
        """Raises ArgumentError for another number of bytes."""
        if len(content) != self.page_bytes:
            raise ArgumentError(f"a page has {self.page_bytes} bytes, not {len(content)}")
        ends = np.cumsum(self.of_stage)[:-1]
        parts = [(part,) for part in np.split(np.ascontiguousarray(content, np.uint8), ends)]
        with self._model._whole():
            self._model._ask_all({"op": "write", "cache": self.number, "page": page}, parts)

    def close(self) -> None:
        """Frees the pages."""
        model = self._model
        with model._lock:
            if self in model._pools:
                model._pools.remove(self)
                if model._wires and not model._is_closed:
                    with suppress(Error):
                        self._ask({"op": "close"})

    def _ask(self, message: dict[str, Any]) -> None:
        with self._model._lock:
            if not self._model._wires and not self._model._is_closed:
                return  # there are no pages now; `forward` connects, and makes so many empty ones
            with self._model._whole():
                self._model._ask_all({**message, "cache": self.number})


class _Told(Exception):
    """What a stage answered in place of a result: nothing is wrong with the connections."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
