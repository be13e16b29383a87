"""How much tinyllm-serve serves, beside llama-server and beside calls in one process.

    python benchmarks/serve.py MODEL.gguf [--llama-server PATH] [--streams 8,32] [--only load,prefix]

One load generator for both, in alternating turns: raw sockets and llama.cpp's POST /completion, which both
speak; prompts are ids, all of different beginnings, and texts do not end early. Parts: load (N streams at
once, and the same texts as one batch in this process), prefix (the second request with the same long
beginning), pauses (of a stream while another's long prompt is computed), idle (streams that are open and
wait).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import tinyllm

SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "seed": 1}


@dataclass
class Streamed:
    """What came of a request: when each piece did, by time.perf_counter."""

    asked: float
    at: list[float] = field(default_factory=list)
    status: int = 0

    @property
    def first_s(self) -> float:
        return self.at[0] - self.asked


async def ask(
    port: int, prompt: list[int], n: int, began: asyncio.Event | None = None, out: Streamed | None = None
) -> Streamed:
    """One streamed completion of n tokens. began: set with the first piece. out: what is filled, for those
    who break it off."""
    asked = {"prompt": prompt, "n_predict": n, "stream": True, "ignore_eos": True, **SAMPLING}
    body = json.dumps(asked).encode()
    out = out or Streamed(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    head = f"POST /completion HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    try:
        out.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if line.startswith(b"data: ") and b'"stop":true' not in line.replace(b" ", b""):
                out.at.append(time.perf_counter())
                if began is not None:
                    began.set()
    finally:
        writer.close()
    if out.status != 200 or not out.at:
        raise SystemExit(f"the server answered {out.status}")
    return out


def prompts(n: int, length: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[1, *(draw.randrange(1000, 30000) for _ in range(length - 1))] for _ in range(n)]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(command: list[str], port: int) -> Iterator[int]:
    """A server, once it answers."""
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(command, stdout=nowhere, stderr=nowhere)
        try:
            for _ in range(1200):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    if process.poll() is not None:
                        raise SystemExit(f"{command[0]} ended: {process.returncode}") from None
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def server(kind: str, args: argparse.Namespace, parallel: int, context: int) -> Iterator[int]:
    port = free_port()
    if kind == "tinyllm-serve":
        code = "import sys; from tinyllm.cli.serve import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, args.model, "--parallel", str(parallel), "--queue", "400"]
        command += ["--context", str(context), "--port", str(port)]
    else:
        command = [args.llama_server, "-m", args.model, "--parallel", str(parallel), "--port", str(port)]
        command += ["-c", str(parallel * context), "-t", str(args.threads), "-tb", str(args.threads)]
        command += ["--no-webui", "--no-warmup"] if args.no_webui else []
    with running(command, port) as ready:
        yield ready


async def loaded(port: int, n: int, args: argparse.Namespace, seed: int) -> float:
    """Tokens a second of n streams that come at once, prompts and answers of 128."""
    start = time.perf_counter()
    texts = await asyncio.gather(*(ask(port, p, args.n) for p in prompts(n, args.length, seed)))
    took = time.perf_counter() - start
    made = sum(len(text.at) for text in texts)
    if made < 0.9 * n * args.n:
        print(f"  only {made} pieces of {n * args.n} came", file=sys.stderr)
    return n * (args.n + args.length) / took


def load(args: argparse.Namespace) -> None:
    for n in map(int, args.streams.split(",")):
        rates: dict[str, list[float]] = {kind: [] for kind in (*args.kinds, "in process")}
        for turn in range(args.turns):
            for kind in args.kinds:
                with server(kind, args, n, args.length + args.n + 64) as port:
                    asyncio.run(loaded(port, 2, argparse.Namespace(n=4, length=16), 999))  # warms up
                    rates[kind].append(asyncio.run(loaded(port, n, args, turn)))
            with tinyllm.load(args.model, context=args.length + args.n + 64) as llm:
                llm(prompts(2, 16, 999), max_tokens=4)
                start = time.perf_counter()
                banned = sorted(llm.eos_ids)
                llm(prompts(n, args.length, turn), max_tokens=args.n, suppress_tokens=banned, **SAMPLING)
                rates["in process"].append(n * (args.n + args.length) / (time.perf_counter() - start))
        told = ", ".join(f"{kind} {statistics.median(r):.1f}" for kind, r in rates.items())
        ours = statistics.median(rates["tinyllm-serve"])
        against = {kind: ours / statistics.median(r) for kind, r in rates.items() if kind != "tinyllm-serve"}
        ratios = ", ".join(f"{ratio:.2f} x {kind}" for kind, ratio in against.items())
        print(f"{n} streams, tokens a second, prompts and answers: {told}; {ratios}", flush=True)


def prefix(args: argparse.Namespace) -> None:
    for kind in args.kinds:
        with server(kind, args, 4, 4096) as port:
            system = prompts(1, 2000, 5)[0]
            asyncio.run(ask(port, prompts(1, 16, 999)[0], 4))
            firsts = [asyncio.run(ask(port, [*system, 2000 + i, 2001, 2002], 4)).first_s for i in range(4)]
        again = statistics.median(firsts[1:])
        print(
            f"{kind}: 2000 tokens before: first {firsts[0]:.2f} s, again {1e3 * again:.0f} ms: "
            f"{firsts[0] / again:.1f} times sooner",
            flush=True,
        )


def pauses(args: argparse.Namespace) -> None:
    for kind in args.kinds:
        with server(kind, args, 4, 4096 + 2048) as port:
            alone, beside = asyncio.run(_pauses(port, 4096))
        median, beside = statistics.median(alone), sorted(beside)
        p99 = beside[int(0.99 * (len(beside) - 1))]
        print(
            f"{kind}: {1e3 * median:.0f} ms between tokens; beside a prompt of 4096, {len(beside)} pauses: "
            f"median {1e3 * statistics.median(beside):.0f}, p99 {1e3 * p99:.0f} ms, {p99 / median:.2f} times",
            flush=True,
        )


async def _pauses(port: int, length: int) -> tuple[list[float], list[float]]:
    """Seconds between two pieces, alone and beside a foreign prompt."""
    alone = await ask(port, prompts(1, 16, 1)[0], 60)
    began = asyncio.Event()
    text = Streamed(0)
    reading = asyncio.ensure_future(ask(port, prompts(1, 16, 2)[0], 1500, began, text))
    await began.wait()
    await asyncio.sleep(0.5)
    start = time.perf_counter()
    await ask(port, prompts(1, length, 3)[0], 1)
    end = time.perf_counter()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    inside = [t for t in text.at if start <= t <= end]
    gaps = [b - a for a, b in pairwise(inside)]
    return [b - a for a, b in pairwise(alone.at)], gaps or [end - start]


def idle(args: argparse.Namespace) -> None:
    """8 streams, alone and with 200 more that are open and wait for their turn."""

    async def with_waiting(port: int, n_waiting: int, seed: int) -> float:
        began = asyncio.Event()
        start = time.perf_counter()
        first = prompts(8, args.length, seed)
        running = [asyncio.ensure_future(ask(port, p, args.n, began)) for p in first]
        await began.wait()
        waiting = [asyncio.ensure_future(ask(port, [1, 5, 9], 1)) for _ in range(n_waiting)]
        await asyncio.gather(*running)
        took = time.perf_counter() - start
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return took

    ratios = []
    with server("tinyllm-serve", args, 8, args.length + args.n + 64) as port:
        asyncio.run(with_waiting(port, 0, 99))
        for turn in range(args.turns):
            alone = asyncio.run(with_waiting(port, 0, 2 * turn))
            ratios.append(alone / asyncio.run(with_waiting(port, 200, 2 * turn + 1)))
    print(f"8 streams beside 200 that wait: {statistics.median(ratios):.3f} of their speed alone", flush=True)


PARTS = {"load": load, "prefix": prefix, "pauses": pauses, "idle": idle}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--no-webui", action="store_true", help="llama-server knows --no-webui, --no-warmup")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("-n", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--streams", default="8,32")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    args = parser.parse_args()
    args.kinds = ["tinyllm-serve"] + (["llama-server"] if args.llama_server else [])
    for part in args.only.split(","):
        PARTS[part](args)


if __name__ == "__main__":
    main()
