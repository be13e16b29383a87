"""What guessed tokens cost and save: calls of several tokens, kinds of tasks, how often guesses are right.

    python benchmarks/speculation.py costs MODEL.gguf...           a call of n tokens relative to one of 1
    python benchmarks/speculation.py tasks CHAT_MODEL.gguf         each kind of task with and without lookup
    python benchmarks/speculation.py tasks CHAT_MODEL.gguf --llama-server PATH     the same there
    python benchmarks/speculation.py scripted MODEL.gguf           guesses that are right with a chance
    python benchmarks/speculation.py plot scripted.json docs/speculation.png

In alternating turns in one run, medians; every text is compared with the one without guesses. --json FILE
keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

import tinyllm
from tinyllm.engine.engine import Job

CODE = '''def load_settings(path):
    """Reads the settings of a program from a file."""
    settings = {}
    with open(path) as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, sign, value = line.partition("=")
            if not sign:
                raise ValueError(f"{path}:{number}: no = in {line!r}")
            settings[name.strip()] = value.strip()
    return settings


def save_settings(path, settings):
    """Writes the settings of a program to a file."""
    with open(path, "w") as file:
        for name, value in sorted(settings.items()):
            file.write(f"{name} = {value}\\n")
'''
DATA = json.dumps(
    {
        "stations": [
            {"name": name, "line": line, "opened": year, "platforms": 2, "accessible": True}
            for name, line, year in (
                ("Harbour Street", "blue", 1931),
                ("Old Mill", "blue", 1934),
                ("University", "green", 1958),
                ("Botanical Garden", "green", 1961),
                ("Airport North", "red", 1994),
            )
        ]
    },
    indent=2,
)
DOCUMENT = """\
The lighthouse at Cape Merrow was built in 1847 by the engineer Ada Holloway. It stands 38 metres
tall and is made of grey granite that was quarried on the island of Senn, eleven kilometres to the
west. Until 1923 its lamp burned rapeseed oil; after that it was lit by electricity. The keepers
lived in three cottages beside the tower, and the last of them, Thomas Brandt, left in 1986 when the
light was automated. In 2004 the cottages were restored by volunteers, and today they house a small
museum about the history of seafaring."""

TASKS = {  # name: (kind, what is asked)
    "repeat": ("repeating", f"Repeat this text exactly:\n\n{DOCUMENT}"),
    "code": ("repeating", f"Write this code again, with `settings` renamed to `options`:\n\n```\n{CODE}```"),
    "json": ("repeating", f"Write this JSON again with platforms set to 4:\n\n{DATA}"),
    "quote": ("repeating", f"Quote every sentence that has a year in it, word for word:\n\n{DOCUMENT}"),
    "summary": ("summary", f"Summarize this text and quote its most important sentences:\n\n{DOCUMENT}"),
    "summary2": ("summary", f"What does this text say about the keepers? Quote it.\n\n{DOCUMENT}"),
    "story": ("free", "Write a short story about a fox that finds a clock in the forest."),
    "essay": ("free", "Explain why the sky is blue to somebody who has never thought about it."),
}


def costs(args: argparse.Namespace) -> dict[str, Any]:
    """Medians of calls of 1 to 16 tokens of one text after args.past others, in alternating turns."""
    sizes, found = [1, 2, 3, 4, 6, 8, 12, 16], {}
    for path in args.models:
        with tinyllm.load(path, threads=args.threads, context=args.past + 64) as llm:
            ids = [(i * 7919 + 5) % llm.config.vocab_size for i in range(args.past + 16)]
            seconds: dict[int, list[float]] = {n: [] for n in sizes}
            sequence = llm._engine.sequence(ids[: args.past])
            for rows in llm._engine.evaluate(Job(sequence)):
                del rows
            llm._cache.reserve(sequence, 16)
            tables = np.array([sequence.tables], dtype=np.int32)
            for turn in range(args.turns + 1):
                for n in sizes:
                    positions = np.arange(args.past, args.past + n, dtype=np.int32)
                    started = time.perf_counter()
                    llm.model.forward(
                        np.array(ids[args.past : args.past + n], np.int32),
                        positions,
                        np.zeros(n, np.int32),
                        tables,
                        rows=np.arange(n, dtype=np.int32),
                        cache=llm._cache.pool,
                    )
                    if turn:
                        seconds[n].append(time.perf_counter() - started)
            medians = {n: statistics.median(s) for n, s in seconds.items()}
            found[Path(path).name] = {str(n): s for n, s in medians.items()}
            told = "  ".join(f"{n}: {s / medians[1]:.2f}" for n, s in medians.items())
            print(f"{Path(path).name}: {1000 * medians[1]:.1f} ms a token; relative  {told}", flush=True)
    return {"costs": found, **about()}


def tasks(args: argparse.Namespace) -> dict[str, Any]:
    chosen = {k: v for k, v in TASKS.items() if not args.only or k in args.only.split(",")}
    found: dict[str, Any] = {}
    draft = tinyllm.load(args.draft, threads=args.threads, context=2048) if args.draft else None
    ways: dict[str, Any] = {"plain": None, "lookup": "lookup"} | ({"draft": draft} if draft else {})
    with tinyllm.load(args.models[0], threads=args.threads, context=2048) as llm:
        for temperature in map(float, args.temperatures.split(",")):
            for name, (kind, words) in chosen.items():
                ids = llm.chat_ids([{"role": "user", "content": words}])
                rates: dict[str, list[float]] = {way: [] for way in ways}
                last: dict[str, tinyllm.Completion] = {}
                for turn in range(args.turns + 1):
                    for way, speculate in ways.items():
                        made = llm(
                            ids,
                            max_tokens=args.n,
                            temperature=temperature,
                            seed=1,
                            reasoning=True,
                            speculate=speculate,
                        )
                        if turn:
                            rates[way].append((len(made.tokens) - 1) / made.timings.generate_s)
                        last[way] = made
                assert len({tuple(made.tokens) for made in last.values()}) == 1, name
                medians = {way: statistics.median(r) for way, r in rates.items()}
                t = last["lookup"].timings
                found[f"{name} {temperature:g}"] = {
                    "kind": kind,
                    "n": len(last["plain"].tokens),
                    **medians,
                    "drafted": t.drafted_tokens,
                    "accepted": t.accepted_tokens,
                    "said": t.gain,
                }
                told = "  ".join(
                    f"{w} {r:.1f} ({r / medians['plain']:.2f}x)" for w, r in medians.items() if w != "plain"
                )
                print(
                    f"{kind:<10}{name:<10} T={temperature:g}: {len(last['plain'].tokens)} tokens, plain "
                    f"{medians['plain']:.1f} tok/s, {told}; {t.accepted_tokens} of {t.drafted_tokens} right",
                    flush=True,
                )
    return {"tasks": found, **about()}


def scripted(args: argparse.Namespace) -> dict[str, Any]:
    """A guesser that knows the text, with each token right with a chance; at most args.guesses at a time."""
    shares, found = [float(x) for x in args.shares.split(",")], {}
    with tinyllm.load(args.models[0], threads=args.threads, context=1024) as llm:
        prompt = [(i * 7919 + 5) % llm.config.vocab_size for i in range(64)]
        options: dict[str, Any] = {"max_tokens": args.n, "temperature": 0, "min_tokens": args.n}
        known = prompt + llm(prompt, speculate=None, **options).tokens
        rates: dict[float, list[float]] = {share: [] for share in (-1.0, *shares)}
        for turn in range(args.turns + 1):
            for share in rates:
                luck = random.Random(turn)

                def propose(tokens: list[int], n: int, share: float = share, luck: Any = luck) -> list[int]:
                    said = known[len(tokens) : len(tokens) + min(n, args.guesses)]
                    return [t if luck.random() < share else (t + 1) % llm.config.vocab_size for t in said]

                made = llm(prompt, speculate=None if share < 0 else propose, **options)
                assert made.tokens == known[len(prompt) :]
                if turn:
                    rates[share].append((args.n - 1) / made.timings.generate_s)
        medians = {share: statistics.median(r) for share, r in rates.items()}
        for share in shares:
            found[str(share)] = medians[share] / medians[-1.0]
            print(
                f"{Path(args.models[0]).name}: {share:.0%} of {args.guesses} right: {medians[share]:.2f}, "
                f"{found[str(share)]:.2f}x of {medians[-1.0]:.2f} tok/s",
                flush=True,
            )
    return {"model": Path(args.models[0]).name, "guesses": args.guesses, "scripted": found, **about()}


def peers(args: argparse.Namespace) -> dict[str, Any]:
    """The tasks on llama-server: without, and with its ways to look up. A server a way, all up at once, asked
    in turns."""
    ways: dict[str, list[str]] = {"plain": [], **{w: ["--spec-type", w] for w in args.ways.split(",")}}
    servers, found = {}, {}
    with tinyllm.load(args.models[0], threads=1, context=64) as llm:
        prompts = {k: llm.chat_ids([{"role": "user", "content": v[1]}]) for k, v in TASKS.items()}
    try:
        for i, (way, options) in enumerate(ways.items()):
            port = 18080 + i
            command = [args.llama_server, "-m", args.models[0], "--port", str(port), "-c", "2048", "-np", "1"]
            command += ["-t", str(args.threads or 2), *options]
            servers[way] = (
                port,
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
            )
        for port, _ in servers.values():
            for _ in range(200):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                    break
                except OSError:
                    time.sleep(0.1)
        chosen = [k for k in TASKS if not args.only or k in args.only.split(",")]
        for temperature in map(float, args.temperatures.split(",")):
            for name in chosen:
                rates: dict[str, list[float]] = {way: [] for way in ways}
                for turn in range(args.turns + 1):
                    for way, (port, _) in servers.items():
                        body = {"prompt": prompts[name], "n_predict": args.n, "temperature": temperature}
                        body |= {"seed": 1, "cache_prompt": False}
                        request = urllib.request.Request(
                            f"http://127.0.0.1:{port}/completion",
                            json.dumps(body).encode(),
                            {"Content-Type": "application/json"},
                        )
                        made = json.load(urllib.request.urlopen(request, timeout=600))
                        if turn:
                            rates[way].append(made["timings"]["predicted_per_second"])
                medians = {way: statistics.median(r) for way, r in rates.items()}
                found[f"{name} {temperature:g}"] = medians
                told = "  ".join(f"{w} {r:.1f} ({r / medians['plain']:.2f}x)" for w, r in medians.items())
                print(f"llama-server {name:<10} T={temperature:g}: {told}", flush=True)
    finally:
        for _, process in servers.values():
            process.terminate()
            process.wait()
    return {"llama-server": found, **about()}


def plot(args: argparse.Namespace) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    *sources, out = args.models
    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=140)
    for path in sources:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        shares = sorted(map(float, found["scripted"]))
        gains = [found["scripted"][str(share)] for share in shares]
        axes.plot(
            [100 * s for s in shares], gains, "o-", label=f"{found['model']}, {found['guesses']} at a time"
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="guesses that are right, %", ylabel="tokens a second, relative to none", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out)


def about() -> dict[str, Any]:
    info = tinyllm.info()
    return {name: info[name] for name in ("version", "isa", "threads")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["costs", "tasks", "scripted", "plot"])
    parser.add_argument("models", nargs="+")
    parser.add_argument("-n", type=int, default=160, help="tokens of a text")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--temperatures", default="0,0.8")
    parser.add_argument("--only", default="", help="names of tasks")
    parser.add_argument("--shares", default="0,0.2,0.4,0.6,0.7,0.8,0.9,1")
    parser.add_argument("--guesses", type=int, default=4)
    parser.add_argument("--draft")
    parser.add_argument("--llama-server")
    parser.add_argument("--ways", default="ngram-cache,ngram-simple")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.what == "plot":
        plot(args)
        return
    made = {"costs": costs, "tasks": peers if args.llama_server else tasks, "scripted": scripted}[args.what](
        args
    )
    if args.json:
        Path(args.json).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
