"""Faults: clients that go, stall, or send rubbish, memory and models that go away, and the server's end.

Each ends in a status, in the last words of a stream, or in a closed connection; what it held is free again,
and others do not notice. tests/long/serve_faults.py does the same for minutes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_listen import Listening, listening, post, read_all
from helpers_serve import write_chat_model

import tinyllm
from tinyllm.engine.engine import Batch
from tinyllm.engine.kvcache import KVCache
from tinyllm.server import app, listen
from tinyllm.server.app import Limits

pytestmark = pytest.mark.usefixtures("frozen_heap")
CHAT = "/v1/chat/completions"


def ask(n_tokens: int = 4, words: str = "Once upon a time", **more: Any) -> dict[str, Any]:
    """A request whose texts have that many tokens each."""
    members = {"messages": [{"role": "user", "content": words}], "max_tokens": n_tokens, "seed": 1}
    return members | {"min_tokens": n_tokens, "temperature": 0} | more


def wire(**request: Any) -> bytes:
    return post(CHAT, json.dumps(ask(**request)).encode())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("serve") / "chat.gguf")


@pytest.fixture(scope="module")
def common(model: Path, http: httpx.Client) -> Iterator[Listening]:
    with listening({"m": model}, parallel=4, queue=2, load=load) as it:
        assert http.post(it.url + CHAT, json=ask()).status_code == 200, "and the model is loaded"
        yield it


def load(path: str) -> tinyllm.LLM:
    return tinyllm.load(path, context=2048)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(verify=False, timeout=60) as client:
        yield client


@pytest.fixture
def running(common: Listening, http: httpx.Client) -> Iterator[Listening]:
    """A server of four places. After each test nothing is held, and it answers as before."""
    yield common
    settled(common)
    answer = http.post(common.url + CHAT, json=ask())
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 4
    settled(common)


def settled(it: Listening) -> None:
    """Waits until nobody computes or waits; then no text may hold a page."""
    turns = it.server.turns
    until(lambda: turns.running == turns.waiting == 0)
    until(lambda: it.server.metrics.open_requests == 0)
    for served in it.server.models.served.values():
        assert served.users == 0
        if served.llm is not None:
            until(lambda cache=served.llm._cache: is_empty(cache))


def unused(cache: KVCache) -> bool:
    """No text holds a page."""
    with cache.lock:
        cache.collect()
        return cache.n_used == 0


def is_empty(cache: KVCache) -> bool:
    """Nor is there a sequence that somebody could hold."""
    if unused(cache):
        gc.collect()
    return unused(cache) and not cache._tables_of


def until(is_so: Callable[[], object], most_s: float = 20.0) -> None:
    end = time.monotonic() + most_s
    while not is_so():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


# --- clients that go


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localho",
        post(CHAT, b"", length=1000),
        post(CHAT, b'{"messages": [', length=1000),
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
        wire(),
        wire(n_tokens=400),
        wire(n_tokens=400, stream=True),
        wire(n_tokens=400, words="ha " * 1500, stream=True),
        wire(n_tokens=400, n=4, stream=True),
    ],
    ids=lambda sent: f"{len(sent)}-bytes",
)
@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_client_goes_before_its_answer(running: Listening, sent: bytes, how: str) -> None:
    client = running.connect()
    client.sendall(sent)
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()


def test_a_client_goes_while_its_prompt_is_computed(running: Listening) -> None:
    engine, begun = running.llm()._engine, threading.Event()
    forward = engine.model.forward

    def slow(*args: Any, **options: Any) -> Any:
        begun.set()
        time.sleep(0.02)
        return forward(*args, **options)

    engine.model.forward = engine.model.candidates = slow  # type: ignore[method-assign, assignment]
    try:
        with running.connect() as client:
            client.sendall(wire(n_tokens=4, words="ha " * 1200))
            assert begun.wait(20)
        until(lambda: running.server.turns.running == 0)
    finally:
        del engine.model.forward, engine.model.candidates


def test_who_goes_before_the_first_token_leaves_nothing_while_others_go_on(running: Listening) -> None:
    """The thread that computes goes on, too; what it knew of them is gone."""
    cache = running.llm()._cache
    with running.connect() as stays:
        stays.sendall(wire(n_tokens=1500, stream=True))
        assert stays.recv(100).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            with running.connect() as goes:
                goes.sendall(wire(n=2, words="ha " * 1200))
                until(lambda: running.server.turns.running == 3)
                until(lambda: len(cache._tables_of) > 1)

        def is_alone() -> bool:
            gc.collect()
            with cache.lock:
                cache.collect()
                return len(cache._tables_of) == 1

        until(is_alone, 10)
        assert running.server.turns.running == 1, "the other one still runs"


@pytest.mark.parametrize("n", [1, 4])
def test_a_client_goes_amid_its_stream(running: Listening, n: int) -> None:
    with running.connect() as client:
        client.sendall(wire(n_tokens=1500 // n, n=n, stream=True))
        data = b""
        while data.count(b"data:") < 6:
            data += client.recv(100)
        assert running.server.turns.running == n


def test_a_client_goes_while_it_waits(running: Listening, http: httpx.Client) -> None:
    with running.connect() as first, running.connect() as second, running.connect() as third:
        first.sendall(wire(n_tokens=300, n=4, stream=True))
        until(lambda: running.server.turns.running == 4)
        second.sendall(wire(n=2))
        until(lambda: running.server.turns.waiting == 1)
        third.sendall(wire(n_tokens=2))
        until(lambda: running.server.turns.waiting == 2)
        second.close()
        until(lambda: running.server.turns.waiting == 1)
        assert b"200 OK" in third.recv(100), "it moved up"


def test_a_client_goes_while_its_prompt_is_made(running: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is its own until the thread that works for it has ended."""
    entered, go_on, begin = threading.Event(), threading.Event(), app._begin

    def slow(*args: Any) -> Any:
        entered.set()
        assert go_on.wait(20)
        return begin(*args)

    monkeypatch.setattr(app, "_begin", slow)
    with running.connect() as client:
        client.sendall(wire())
        assert entered.wait(20)
    time.sleep(0.1)
    assert running.server.turns.running == 1
    go_on.set()
    until(lambda: running.server.turns.running == 0)


# --- clients that stall


def test_who_does_not_read_is_cut_off_and_stops_nobody(
    model: Path, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "STALLED_S", 0.5)
    with listening({"m": model}, load, parallel=4, send_buffer=4096) as it, it.connect() as staller:
        staller.sendall(wire(n_tokens=600, n=3, stream=True))
        until(lambda: it.server.turns.running == 3)
        for _ in range(3):
            assert http.post(it.url + CHAT, json=ask(20)).status_code == 200
        until(lambda: it.server.turns.running == 0)
        assert not read_all(staller).endswith(b"0\r\n\r\n"), "it is told that this was not all"
        settled(it)


def is_paused(it: Listening) -> bool:
    return any(connection.flow.write_paused for connection in list(it.listener.server_state.connections))


def test_what_waits_for_a_slow_reader_is_bounded(model: Path) -> None:
    limits = Limits(unread_pieces=100)
    with listening({"m": model}, load, limits=limits, send_buffer=4096) as it:
        with it.connect() as client:
            client.sendall(wire(n_tokens=200, n=8, stream=True))
            until(lambda: is_paused(it))
            until(lambda: unused(it.llm()._cache))  # all is made, and not taken
            text = b""
            while not text.endswith(b"0\r\n\r\n"):
                text += client.recv(1 << 16)
        assert b'"code":"slow_reader"' in text, "the last event says why"
        assert b"the most is 100" in text
        settled(it)


def test_a_request_that_does_not_come_on_is_cut_off(
    running: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "ARRIVING_S", 0.3)
    starts = (b"", b"GET / HT", post(CHAT, b'{"mess', length=100))
    clients = [running.connect() for _ in starts]
    for client, start in zip(clients, starts, strict=True):
        client.sendall(start)
    for client in clients:
        with client:
            client.settimeout(10)
            with suppress(ConnectionResetError):
                assert client.recv(100) == b""


def test_a_body_may_come_slowly_where_it_comes(running: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "ARRIVING_S", 0.4)
    monkeypatch.setattr(listen, "ARRIVING_BYTES", 1000)
    request = wire(words="ha " * 1000)
    with running.connect() as client:
        for start in range(0, len(request), 1000):
            client.sendall(request[start : start + 1000])
            time.sleep(0.2)
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_idle_connections_and_open_streams_cost_others_nothing(
    running: Listening, http: httpx.Client
) -> None:
    idle = [running.connect() for _ in range(200)]
    try:
        for client in idle[:100]:
            client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for client in idle[:100]:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        for client in idle[100:104]:
            client.sendall(wire(n_tokens=100, stream=True))
        assert http.post(running.url + CHAT, json=ask()).status_code == 200
        for client in idle[100:104]:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
    finally:
        for client in idle:
            client.close()
    until(lambda: len(running.listener.server_state.connections) <= 2)


# --- rubbish


def test_random_bytes(running: Listening) -> None:
    rng = random.Random(7)
    heads = (b"", b"GET ", b"POST " + CHAT.encode() + b" HTTP/1.1\r\n", wire()[:80], b"\x16\x03\x01")
    for i in range(60):
        with running.connect() as client:
            client.sendall(heads[i % len(heads)] + rng.randbytes(rng.randrange(1, 3000)) + b"\r\n\r\n")
            client.shutdown(socket.SHUT_WR)
            got = read_all(client)
            assert got[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 403"), got[:200]


NESTED = b'{"messages":' + b"[" * 100_000
BODIES = {
    "nothing": b"",
    "no JSON": b"hello",
    "cut off": b'{"messages": [{"role": "user"',
    "invalid UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "UTF-16": json.dumps(ask()).encode("utf-16"),
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "NaN": b'{"messages": [], "temperature": NaN}',
    "a number with too many digits": b'{"messages": [], "max_tokens": ' + b"9" * 5000 + b"}",
    "nested too deeply": NESTED,
    "nested too deeply and closed": NESTED + b"]" * 100_000 + b"}",
    "a deep message": json.dumps({"messages": [{"role": "user", "content": "x", "deep": 0}]})
    .replace("0", "[" * 900 + "]" * 900)
    .encode(),
    "messages of numbers": b'{"messages": [1, 2]}',
    "a message without a role": b'{"messages": [{"content": "x"}]}',
    "a huge number": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400}',
    "a negative number": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
    "true for a number": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": true}',
}


@pytest.mark.parametrize("what", BODIES)
def test_a_body_that_is_no_request_is_400(running: Listening, http: httpx.Client, what: str) -> None:
    answer = http.post(running.url + CHAT, content=BODIES[what])
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert len(answer.text) < 2000
    assert "internal" not in error["message"]


@pytest.mark.parametrize("text", ["\\ud800", "\\udfff x", "a\\ud83d", "\\u0000"])
@pytest.mark.parametrize("member", ["content", "role", "stop", "unknown", "model"])
def test_halves_of_characters(running: Listening, http: httpx.Client, text: str, member: str) -> None:
    message = '"role": "user", "content": "Hello"'
    body = f'{{"messages": [{{{message}}}], "max_tokens": 4, "{member}": "{text}"}}'
    if member in ("content", "role"):
        other = '"content": "x"' if member == "role" else '"role": "user"'
        body = f'{{"messages": [{{{other}, "{member}": "{text}"}}], "max_tokens": 4}}'
    answer = http.post(running.url + CHAT, content=body.encode())
    assert answer.status_code in (200, 400, 404), answer.text
    assert answer.json()


# --- what runs out


def test_a_full_queue_is_429_and_says_when(running: Listening, http: httpx.Client) -> None:
    with running.connect() as first, running.connect() as second, running.connect() as third:
        first.sendall(wire(n_tokens=400, n=4, stream=True))
        until(lambda: running.server.turns.running == 4)
        second.sendall(wire())
        third.sendall(wire(stream=True))
        until(lambda: running.server.turns.waiting == 2)
        answer = http.post(running.url + CHAT, json=ask())
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 600
        assert answer.json()["error"]["code"] == "queue_full"
        assert http.post(running.url + CHAT, json=ask(stream=True)).status_code == 429, "no event"


def with_pages(n: int) -> Callable[[str], tinyllm.LLM]:
    def load_small(path: str) -> tinyllm.LLM:
        llm = load(path)
        llm._cache.max_pages = n
        return llm

    return load_small


def test_more_requests_than_pages_wait_for_each_other(model: Path, http: httpx.Client) -> None:
    """32 texts that need five pages each, where there are twelve."""
    words = [f"Tom and Lily {i} " + "went to the park. " * 40 for i in range(32)]
    with listening({"m": model}, with_pages(12), parallel=32) as it:

        def one(text: str) -> str:
            answer = http.post(it.url + CHAT, json=ask(20, text))
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])

        with ThreadPoolExecutor(32) as pool:
            texts = list(pool.map(one, words))
        assert it.llm().cache_pages.most == 12
        assert texts[5] == one(words[5]), "the same bits as alone"
        settled(it)


def test_no_page_left_is_503(model: Path, http: httpx.Client) -> None:
    with listening({"m": model}, with_pages(6)) as it:
        for body in (ask(8, "ha " * 500), ask(8, "ha " * 500, stream=True)):
            answer = http.post(it.url + CHAT, json=body)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "out_of_memory"
            assert int(answer.headers["retry-after"]) >= 1
        amid = http.post(it.url + CHAT, json=ask(500, stream=True))
        assert amid.status_code == 200
        assert '"code":"out_of_memory"' in amid.text.splitlines()[-2]
        settled(it)
        assert http.post(it.url + CHAT, json=ask()).status_code == 200


def test_many_prompts_are_made_at_once(model: Path, http: httpx.Client) -> None:
    """More than there are threads for; other requests are answered meanwhile."""
    with listening({"m": model}, load, parallel=32) as it:
        http.post(it.url + CHAT, json=ask())

        def one(i: int) -> int:
            turns = [{"role": "user", "content": f"hello {i}"}] * 300
            return http.post(it.url + CHAT, json=ask(2) | {"messages": turns, "max_tokens": 2}).status_code

        with ThreadPoolExecutor(32) as pool:
            answers = [pool.submit(one, i) for i in range(32)]
            assert http.get(it.url + "/v1/models").status_code == 200
            assert {answer.result() for answer in answers} <= {200, 400}
        settled(it)


# --- what breaks


class Broken(Exception):
    pass


@pytest.mark.parametrize("streams", [False, True])
def test_an_exception_in_the_engine_is_500_for_who_waits(
    running: Listening, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise Broken("secret")

    for where, name in ((Batch, "step"), (Batch, "add")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, broken)
            answer = http.post(running.url + CHAT, json=ask(stream=streams))
            assert answer.status_code == 500, "before the first token, so that it is no event"
            assert answer.json()["error"]["code"] == "internal_error"
            assert "secret" not in answer.text
        assert http.post(running.url + CHAT, json=ask()).status_code == 200


def test_an_exception_outside_of_a_step_is_heard_by_all(
    running: Listening, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread ends with it; the next request starts another."""

    def broken(*args: Any) -> None:
        raise Broken("secret")

    monkeypatch.setattr(type(running.llm()._loop), "_drop_cancelled", broken)
    assert http.post(running.url + CHAT, json=ask()).status_code == 500
    monkeypatch.undo()
    assert http.post(running.url + CHAT, json=ask()).status_code == 200


def test_an_exception_amid_a_stream_is_its_last_event(
    running: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running.connect() as client:
        client.sendall(wire(n_tokens=1500, stream=True))
        data = client.recv(2000)
        assert data.startswith(b"HTTP/1.1 200")

        def broken(*args: Any, **options: Any) -> None:
            raise Broken("secret")

        monkeypatch.setattr(Batch, "step", broken)
        while not data.endswith(b"0\r\n\r\n"):
            data += client.recv(1 << 16)
        monkeypatch.undo()
    assert b'"code":"internal_error"' in data
    assert b"secret" not in data


def test_models_close_under_requests(model: Path, http: httpx.Client) -> None:
    with listening({"m": model}, load) as it, it.connect() as stream:
        stream.sendall(wire(n_tokens=1500, stream=True))
        data = stream.recv(2000)
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(http.post, it.url + CHAT, json=ask(1500))
            until(lambda: it.server.turns.running == 2)
            loop = it.listener._loop
            assert loop is not None
            asyncio.run_coroutine_threadsafe(it.server.models.close(), loop).result(20)
            assert whole.result().status_code == 503
        while not data.endswith(b"0\r\n\r\n"):
            data += stream.recv(1 << 16)
        assert b'"code":"closing"' in data
        assert http.post(it.url + CHAT, json=ask()).status_code == 503
        settled(it)


# --- the end


def test_the_end_lets_answers_finish_and_takes_nothing_new(model: Path) -> None:
    with listening({"m": model}, load, parallel=1, grace_s=20) as it:
        with it.connect() as stream, it.connect() as waiting, it.connect() as idle:
            idle.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not idle.recv(4096).endswith(b"}"):
                pass
            stream.sendall(wire(n_tokens=700, stream=True))
            until(lambda: it.server.turns.running == 1)
            waiting.sendall(wire(stream=True))
            until(lambda: it.server.turns.waiting == 1)
            it.listener.end()
            refused = waiting.recv(4096)
            assert refused.startswith(b"HTTP/1.1 503")
            assert b"retry-after" in refused.lower()
            idle.sendall(wire())
            assert idle.recv(4096).startswith(b"HTTP/1.1 503")
            text = read_all(stream)
        assert b'"finish_reason":"length"' in text
        assert text.endswith(b"0\r\n\r\n")
    assert it.server.models.find(None).llm is None


def test_the_end_cuts_off_what_takes_too_long(model: Path, http: httpx.Client) -> None:
    with listening({"m": model}, load, grace_s=0.05) as it:
        with it.connect() as stream, it.connect() as staller, ThreadPoolExecutor(1) as pool:
            whole = pool.submit(http.post, it.url + CHAT, json=ask(1800))
            stream.sendall(wire(n_tokens=1800, stream=True))
            staller.sendall(wire(n_tokens=1000, n=6, stream=True))
            until(lambda: it.server.turns.running == 8)
            text = stream.recv(4096)
            it.listener.end()
            text += read_all(stream)
            assert whole.result().status_code == 503
        assert b'"code":"closing"' in text
        assert text.endswith(b"0\r\n\r\n"), "in the dialect's words, and in order"


# --- many


def test_some_hundred_requests_leave_nothing(model: Path) -> None:
    with listening({"m": model}, load) as it:
        rng = random.Random(3)
        for i in range(120):
            with it.connect() as client:
                streams = i % 2 == 0
                client.sendall(wire(n_tokens=1 + i % 5, stream=streams, words=f"hello {i % 7}"))
                if i % 5 == 4:
                    client.recv(rng.randrange(1, 400))  # and goes
                    continue
                data = b""
                while not (data.endswith(b"0\r\n\r\n") or (not streams and b"}}" in data)):
                    data += client.recv(1 << 16)
        settled(it)
        until(lambda: not it.listener.server_state.connections)
        assert not it.listener.server_state.tasks
        loop = it.listener._loop
        assert loop is not None
        left = asyncio.run_coroutine_threadsafe(_n_tasks(), loop).result(10)
        assert left <= 6, "uvicorn's own, the reaper, this"


async def _n_tasks() -> int:
    return len(asyncio.all_tasks())
