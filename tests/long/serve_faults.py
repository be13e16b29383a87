"""tinyllm-serve under requests that end well and badly: whole answers, streams, clients that go at any moment
or do not read, rubbish, bodies that are too large. At the end nothing is held, the memory stays flat, all
good answers were the right ones, and SIGTERM ends it with 0. Prints one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers_listen import post
from helpers_serve import write_chat_model

CLIENTS, PARALLEL, QUEUE = 6, 4, 8
CHAT = "/v1/chat/completions"


def ask(i: int, n_tokens: int, **more: Any) -> bytes:
    """Of a few conversations, so that a good answer can be compared."""
    messages = [{"role": "user", "content": f"Tell me of {i % 5} cats. " * (1 + i % 3)}]
    body = {"messages": messages, "max_tokens": n_tokens, "seed": 1, "temperature": 0}
    return post(CHAT, json.dumps(body | more).encode())


class Client:
    """Makes requests of all kinds, chosen by chance."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.rng = port, random.Random(seed)
        self.ended: Counter[str] = Counter()
        self.texts: dict[tuple[int, int], set[str]] = {}
        self.kinds = (
            self.whole, self.whole, self.streamed, self.several, self.leaves, self.sends_a_part, self.rubbish,
            self.too_large, self.does_not_read, self.leaves_a_long_prompt,
        )  # fmt: skip

    def run(self, n: int) -> None:
        for _ in range(n):
            kind = self.rng.choice(self.kinds)
            with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
                self.ended[f"{kind.__name__}: {kind(connection)}"] += 1

    def whole(self, connection: socket.socket) -> str:
        i, n = self.rng.randrange(30), self.rng.randrange(1, 9)
        connection.sendall(ask(i, n))
        status, body = response(connection)
        if status == 200:
            text = json.loads(body)["choices"][0]["message"]["content"]
            self.texts.setdefault((i % 15, n), set()).add(text)
        return str(status)

    def streamed(self, connection: socket.socket) -> str:
        i, n = self.rng.randrange(30), self.rng.randrange(1, 9)
        connection.sendall(ask(i, n, stream=True))
        status, body = response(connection)
        if status == 200:
            assert body.endswith(b"data: [DONE]\n\n"), body[-300:]
            chunks = [json.loads(line[6:]) for line in body.decode().split("\n\n") if line and "{" in line]
            text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
            self.texts.setdefault((i % 15, n), set()).add(text)
        return str(status)

    def several(self, connection: socket.socket) -> str:
        connection.sendall(ask(self.rng.randrange(30), 5, n=3, stream=True))
        status, body = response(connection)
        assert status != 200 or body.endswith(b"data: [DONE]\n\n"), body[-300:]
        return str(status)

    def leaves(self, connection: socket.socket) -> str:
        connection.sendall(ask(self.rng.randrange(30), 400, stream=True))
        left = self.rng.randrange(2000)
        while left > 0 and (part := connection.recv(left)):
            left -= len(part)
        return self._go(connection)

    def leaves_a_long_prompt(self, connection: socket.socket) -> str:
        body = {"messages": [{"role": "user", "content": "ha " * self.rng.randrange(450)}], "max_tokens": 9}
        connection.sendall(post(CHAT, json.dumps(body).encode()))
        time.sleep(self.rng.random() * 0.05)
        return self._go(connection)

    def sends_a_part(self, connection: socket.socket) -> str:
        request = ask(1, 50)
        connection.sendall(request[: self.rng.randrange(len(request))])
        return self._go(connection)

    def rubbish(self, connection: socket.socket) -> str:
        noise = self.rng.randbytes(self.rng.randrange(1, 400))
        good = ask(1, 2).partition(b"\r\n\r\n")[2]
        at = self.rng.randrange(len(good))
        body = self.rng.choice((noise, good[:at], good[:at] + noise[:2] + good[at:], b"[" * 50_000, b"{}"))
        connection.sendall(post(CHAT, body))
        status = response(connection)[0]
        assert status in (200, 400, 404, 429), (status, body)
        return str(status)

    def too_large(self, connection: socket.socket) -> str:
        connection.sendall(post(CHAT, b"", "Expect: 100-continue", length=1 << 30))
        status = response(connection)[0]
        assert status == 413
        return str(status)

    def does_not_read(self, connection: socket.socket) -> str:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(ask(1, 300, n=2, stream=True))
        time.sleep(0.05)
        return self._go(connection)

    def _go(self, connection: socket.socket) -> str:
        if self.rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return "reset"
        return "closed"


def response(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body, of which it is told how long it is, or which comes in chunks."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = {}
    while line := file.readline().strip().decode("latin-1").lower():
        name, _, value = line.partition(":")
        headers[name] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while n := int(file.readline(), 16):
            body += file.read(n)
            file.readline()
        return status, body
    return status, file.read(int(headers.get("content-length", "0")))


def used_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/statm").read_text(encoding="ascii")
    return int(text.split()[1]) * resource.getpagesize()


def values(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[:1] not in "#"}


def at_rest(url: str) -> None:
    """Waits until nothing runs; then one small request must be all that holds pages."""
    end = time.monotonic() + 60
    while (now := values(url))["llamacpp:requests_processing"] or now["llamacpp:requests_deferred"]:
        assert time.monotonic() < end, f"something runs for ever: {now}"
        time.sleep(0.05)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(ask(0, 1))
        assert response(connection)[0] == 200
    pages = values(url)['tinyllm_cache_pages{model="chat",state="used"}']
    assert pages <= 1, f"{pages} pages are held"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    n = parser.parse_args().n
    with tempfile.TemporaryDirectory() as folder:
        model = write_chat_model(Path(folder) / "chat.gguf")
        command = [sys.executable, "-W", "error", "-m", "tinyllm.cli.serve", str(model), "--port", "0"]
        command += ["--parallel", str(PARALLEL), "--queue", str(QUEUE), "--threads", "2"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                result = storm(server, n)
            finally:
                if server.poll() is None:
                    server.kill()
    print(json.dumps(result))


def storm(server: subprocess.Popen[str], n: int) -> dict[str, Any]:
    assert server.stderr is not None
    said: list[str] = []
    while not (match := re.search(r" on (http://\S+)$", line := server.stderr.readline())):
        assert line, said
        said.append(line)
    url, port = match[1], int(match[1].rpartition(":")[2])
    reader = threading.Thread(target=lambda: said.extend(server.stderr or ()))
    reader.start()
    clients = [Client(port, seed) for seed in range(CLIENTS)]
    sizes = []
    for _ in range(10):
        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in [pool.submit(client.run, n // 10 // CLIENTS) for client in clients]:
                done.result()
        at_rest(url)
        sizes.append(used_bytes(server.pid))
    n_files = len(os.listdir(f"/proc/{server.pid}/fd"))
    ended = sum((client.ended for client in clients), Counter())
    texts: dict[tuple[int, int], set[str]] = {}
    for client in clients:
        for key, found in client.texts.items():
            texts.setdefault(key, set()).update(found)
    different = {key: found for key, found in texts.items() if len(found) > 1}
    assert not different, different
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    reader.join()
    faults = [line for line in said if "loaded" not in line and not line.startswith("ending")]
    assert not faults, faults[:5]
    growth = sizes[-1] - sizes[len(sizes) // 2]
    assert growth < 8e6, f"{growth} bytes more in the second half: {sizes}"
    assert n_files < 40, f"{n_files} files are open"
    bad = sum(count for what, count in ended.items() if not what.endswith(": 200"))
    result = {"name": "requests over HTTP, good and bad", "inputs": sum(ended.values()), "faults": bad}
    result |= {"crashes": 0, "leaks": 0, "bytes more in the second half": growth}
    return result | {"by kind": dict(sorted(ended.items()))}


if __name__ == "__main__":
    main()
