"""SIGINT at random moments while a model loads, answers, streams, forks and scores, with SIGUSR1 every
millisecond on top, or SIGALRM, whose handler raises, and half of the time beside a thread that
has a cancel=: each ends in that exception or with its result, the model answers as before, and nothing stays
allocated. Then whole processes that get SIGINT end by it. Prints one JSON object."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import tinyllm
from tinyllm import backends

PROMPT = "One day, Lily and Tom went to the park. " * 12


def answer(llm: tinyllm.LLM) -> object:
    return llm([PROMPT, "Tom"], n=2, max_tokens=20, seed=1)


def stream(llm: tinyllm.LLM) -> object:
    return list(llm.stream(PROMPT, max_tokens=20, seed=1))


def fork(llm: tinyllm.LLM) -> object:
    with llm.session(seed=1) as session:
        session.append(PROMPT)
        for _ in range(3):
            with session.fork() as other:
                other.generate(max_tokens=4)
        return session.generate(max_tokens=4)


def score(llm: tinyllm.LLM) -> object:
    return llm.score(PROMPT).total


def load(_: tinyllm.LLM) -> object:
    with tinyllm.load("stories", threads=2) as llm:
        return llm("Tom", max_tokens=1).tokens


WORKS: tuple[Callable[[tinyllm.LLM], object], ...] = (answer, stream, fork, score, load)
AN_INTERRUPTED_PROCESS = f"""
import tinyllm
tinyllm.load("stories").close()  # imports of other packages turn an interrupt into errors of their own
print("ready", flush=True)
while True:
    with tinyllm.load("stories", threads=2) as llm:
        for _ in range(3):
            for piece in llm.stream({PROMPT!r}, max_tokens=9):
                pass
"""


class TimeIsUp(Exception):
    """No TimeoutError, which is an OSError: os.path.exists and its like take it for a missing file."""


def time_is_up(*_: object) -> None:
    global n_alarms
    n_alarms += 1
    raise TimeIsUp


n_alarms = 0
SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGALRM: TimeIsUp}


def interrupt(
    llm: tinyllm.LLM,
    work: Callable[[tinyllm.LLM], object],
    seconds: float,
    number: signal.Signals = signal.SIGINT,
) -> bool:
    """Whether the work ended by a signal that comes after so many seconds."""
    main, is_over = threading.main_thread().ident, threading.Event()
    assert main is not None

    def send() -> None:
        is_over.wait(seconds)
        if not is_over.is_set():
            signal.pthread_kill(main, number)

    sender = threading.Thread(target=send)
    try:
        try:
            sender.start()
            work(llm)
            is_over.set()
            sender.join()
            return False
        finally:
            is_over.set()
    except SIGNALS[number]:
        return True
    finally:
        sender.join()


def beside(llm: tinyllm.LLM, right: list[int], work: Callable[[], bool]) -> bool:
    """The work's result; another thread has answers meanwhile, and gets them."""
    is_over, failed = threading.Event(), []

    def cancel() -> bool:
        time.sleep(0.001)
        return False

    def answers() -> None:
        try:
            while not is_over.is_set():
                assert llm(PROMPT, max_tokens=5, seed=1, cancel=cancel).tokens == right, "another text"
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=answers)
    other.start()
    try:
        return work()
    finally:
        is_over.set()
        other.join()
        assert not failed, failed


def whole_process(seconds: float) -> int:
    """Interrupts that Python lost, where it runs what can raise nothing; it says so."""
    child = subprocess.Popen(
        [sys.executable, "-c", AN_INTERRUPTED_PROCESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(seconds)
    n_lost, errors = -1, None
    while errors is None and n_lost < 2:
        n_lost += 1
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            _, errors = child.communicate(timeout=60)
    if errors is None:
        child.kill()
        raise AssertionError(f"interrupts are lost: {child.communicate()[1]}")
    assert child.returncode == -signal.SIGINT, (child.returncode, errors)
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors
    assert errors.count("Exception ignored") >= n_lost, errors
    return n_lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupts", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    faulthandler.dump_traceback_later(given.seconds + 200, exit=True)
    end = time.monotonic() + given.seconds
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGALRM, time_is_up)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    ended: Counter[str] = Counter()
    unraisable: list[object] = []
    sys.unraisablehook = unraisable.append
    storming = threading.Event()

    def storm() -> None:
        while not storming.wait(0.001):
            os.kill(os.getpid(), signal.SIGUSR1)

    stormer = threading.Thread(target=storm)
    stormer.start()
    try:
        with tinyllm.load("stories", threads=2) as llm:
            right = llm(PROMPT, max_tokens=5, seed=1).tokens
            usual = {}
            for work in WORKS * 2:  # the second time counts, when prefixes are known
                start = time.monotonic()
                work(llm)
                usual[work] = time.monotonic() - start
            for i in range(given.interrupts):
                work, number = rng.choice(WORKS), rng.choice(list(SIGNALS))
                start, before = time.monotonic(), n_alarms - len(unraisable)
                once = partial(interrupt, llm, work, rng.random() * usual[work], number)
                is_alone = rng.random() < 0.5
                is_hit = once() if is_alone else beside(llm, right, once)
                if not is_hit and is_alone:  # a busy machine becomes faster and slower
                    usual[work] = time.monotonic() - start
                raised = n_alarms - len(unraisable) - before  # but what Python could not raise
                assert is_hit or raised <= 0, f"{work.__name__}: an alarm is lost"
                ended[f"{work.__name__}: {'interrupted' if is_hit else 'too late'}"] += 1
                is_last = time.monotonic() > end or i == given.interrupts - 1
                if i % 10 == 9 or is_last:
                    gc.collect()
                    with llm._cache.lock:
                        llm._cache.collect()
                    assert llm._cache.n_used == 0, f"{llm._cache.n_used} pages in use after {ended}"
                    assert llm(PROMPT, max_tokens=5, seed=1).tokens == right, "another text"
                if is_last:
                    break
    finally:
        storming.set()
        stormer.join()
    gc.collect()
    assert backends.live_allocations() == (0, 0), backends.live_allocations()
    lost = [str(entry) for entry in unraisable if "KeyboardInterrupt" in str(entry)]
    n_processes = 2 + (i + 1) // 100
    n_lost = sum(whole_process(rng.random() * 0.3) for _ in range(n_processes))
    n = sum(count for what, count in ended.items() if "interrupted" in what)
    assert n > i // 5, ended
    result: dict[str, object] = {
        "name": "SIGINT at random moments",
        "inputs": i + 1 + n_processes,
        "faults": n + n_processes,
    }
    result |= {"crashes": 0, "leaks": 0, "interrupts lost by Python": len(lost) + n_lost}
    print(json.dumps(result | {"by work": dict(ended)}))


if __name__ == "__main__":
    main()
