"""Many Python threads on one model, with the core: the same texts as alone, whatever the others do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2.lexer
import numpy as np
import pytest
from helpers_interrupts import handlers_exception_may_be_lost, raise_amid
from helpers_models import golden_spec, random_ids, random_weights, write_hf_directory
from helpers_serve import write_chat_model

import tinyllm
from tinyllm import backends, errors
from tinyllm.chat.templates import ChatTemplate
from tinyllm.files import list_directory, read_small
from tinyllm.files.outfiles import replacing
from tinyllm.modelfiles import BUNDLED
from tinyllm.tokenizer import tokenizer_from_gguf

CONFIG = golden_spec("llama3").config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinyllm.LLM]:
    path = write_hf_directory(tmp_path_factory.mktemp("model"), CONFIG, random_weights(CONFIG, seed=5))
    with tinyllm.load(path, threads=2) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """A shell's background jobs start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def in_threads(n: int, work: Callable[[int], object]) -> None:
    """Runs work(0) ... work(n - 1), each in a thread, and raises what one of them raised."""
    raised: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(i,), daemon=True) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "deadlock"
    if raised:
        raise raised[0]


def forever(work: Callable[[], object]) -> None:
    while True:
        work()


def pages_in_use(model: tinyllm.LLM) -> int:
    with model._cache.lock:
        model._cache.collect()
    return model._cache.n_used


def prompt(i: int) -> list[int]:
    return random_ids(CONFIG, i, 20 + 37 * (i % 5))


def test_threads_get_what_they_get_alone(model: tinyllm.LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "logprobs": True}
    alone = [model(prompt(i), seed=i, **options) for i in range(8)]
    logits = model.logits(prompt(99))

    def work(thread: int) -> None:
        for i in range(thread, 8, 4):
            c = model(prompt(i), seed=i, **options)
            assert (c.tokens, c.logprobs) == (alone[i].tokens, alone[i].logprobs)
            with model.session(seed=i) as session:
                session.append(prompt(i))
                assert session.generate(**options).tokens == alone[i].tokens
            with model.stream(prompt(i), seed=i, **options) as stream:
                assert [next(stream).token for _ in range(3)] == alone[i].tokens[:3]
            np.testing.assert_array_equal(model.logits(prompt(99)), logits)

    in_threads(6, work)
    assert pages_in_use(model) == 0


def test_close_while_threads_use_it(tmp_path: Path) -> None:
    """Each call ends well or with ModelClosedError; nothing is used after it was freed."""
    path = write_hf_directory(tmp_path / "model", CONFIG, random_weights(CONFIG, seed=6))
    model = tinyllm.load(path, threads=2)
    started = threading.Barrier(5)

    def work(i: int) -> None:
        started.wait()
        if i == 4:
            time.sleep(0.05)
            model.close()
            return
        with pytest.raises(errors.ModelClosedError):
            forever(lambda: model(prompt(i), max_tokens=50, temperature=1))

    in_threads(5, work)


def test_interrupt_ends_the_main_threads_call_and_no_other(model: tinyllm.LLM) -> None:
    """As Ctrl-C does: a signal to the process, whose handler raises KeyboardInterrupt in the main thread."""
    assert threading.current_thread() is threading.main_thread()
    expected = model(prompt(1), seed=1, max_tokens=200).tokens
    results: list[list[int]] = []
    go, done = threading.Event(), threading.Event()

    def other() -> None:
        go.wait()
        while not results or not done.is_set():
            results.append(model(prompt(1), seed=1, max_tokens=200).tokens)

    def interrupt(logits: Any, tokens: Any) -> None:
        go.set()
        if len(tokens) == len(prompt(2)) + 20:
            signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            model(prompt(2), max_tokens=400, temperature=1, processors=[interrupt], logit_bias={2: -np.inf})
    finally:
        go.set()
        time.sleep(0.05)
        done.set()
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert results
    assert all(tokens == expected for tokens in results)
    assert pages_in_use(model) == 0


@handlers_exception_may_be_lost
def test_interrupt_within_a_call_of_the_model(model: tinyllm.LLM) -> None:
    """The signal comes while the core computes. Long enough for that: logits of 400 tokens, over and over."""
    ids = random_ids(CONFIG, 3, 400)
    raise_amid(lambda: model.logits(ids), 0.1, KeyboardInterrupt)
    assert pages_in_use(model) == 0
    assert model(prompt(1), seed=1, max_tokens=5).tokens == model(prompt(1), seed=1, max_tokens=5).tokens


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a forked process that does the work: 0 when it is done, -14 when it never ends."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_fork_while_other_threads_generate(model: tinyllm.LLM) -> None:
    """The child has none of their calls, nor the lock that one of them held; the parent goes on."""
    expected = model(prompt(3), seed=3, max_tokens=9).tokens
    with model.session(seed=3) as session:
        session.append(prompt(3))
        done = threading.Event()

        def work(i: int) -> None:
            if i < 3:
                while not done.is_set():
                    assert model(prompt(3), seed=3, max_tokens=9).tokens == expected
                return

            def child() -> None:
                assert model(prompt(3), seed=3, max_tokens=9).tokens == expected
                assert session.generate(max_tokens=9).tokens == expected

            try:
                for _ in range(12):
                    time.sleep(0.01)
                    assert in_child(child) == 0
            finally:
                done.set()

        in_threads(4, work)
    assert pages_in_use(model) == 0


def test_fork_within_a_call(model: tinyllm.LLM) -> None:
    """In the middle of a call of the model, where `cancel` is asked: both processes finish it."""
    expected = model(prompt(3), seed=3, max_tokens=9).tokens
    statuses: list[int] = []

    def cancel() -> bool:
        if not statuses:
            statuses.append(-1)
            pid = os.fork()
            if pid == 0:
                signal.alarm(120)
                in_the_child.append(True)
            else:
                statuses[0] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return False

    in_the_child: list[bool] = []
    tokens = model(prompt(3), seed=3, max_tokens=9, cancel=cancel).tokens
    if in_the_child:
        again = model(prompt(3), seed=3, max_tokens=9).tokens
        os._exit(0 if tokens == again == expected else 1)
    assert statuses == [0]
    assert tokens == expected


def test_a_handler_that_closes_the_model_ends_the_call(tmp_path: Path) -> None:
    """As a server does on SIGTERM, in the thread that waits for the model."""
    path = write_hf_directory(tmp_path / "model", CONFIG, random_weights(CONFIG, seed=6))
    model = tinyllm.load(path, threads=2)
    before = signal.signal(signal.SIGTERM, lambda *_: model.close())
    timer = threading.Timer(0.1, lambda: signal.raise_signal(signal.SIGTERM))
    timer.start()
    try:
        with pytest.raises(errors.ModelClosedError):
            forever(lambda: model.logits(random_ids(CONFIG, 3, 400)))
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)


def test_cancel_cannot_use_the_model(model: tinyllm.LLM) -> None:
    session = model.session()
    session.append(prompt(1))
    for use in (lambda: model(prompt(1), max_tokens=1), session.fork):
        with pytest.raises(errors.ArgumentError, match="in the middle of a call that this thread makes"):
            model(prompt(1), cancel=lambda use=use: bool(use()))
    session.close()
    assert pages_in_use(model) == 0


def test_a_session_in_many_threads_is_refused_not_broken(model: tinyllm.LLM) -> None:
    session, refused, held = model.session(seed=1), [], threading.Event()

    def work(i: int) -> None:
        if i > 0:
            held.wait()
        else:
            with model._cache.lock:  # as if a call were running: the others wait, and meet
                held.set()
                end = time.monotonic() + 60
                while len(model._engine._calls) < 5 and time.monotonic() < end:
                    time.sleep(0.001)
        for _ in range(20):
            try:
                session.append(prompt(i)[:3])
            except errors.ArgumentError:
                refused.append(i)

    in_threads(6, work)
    assert refused
    session.append(prompt(0)[:1])
    rows = model.logits(session.tokens)
    np.testing.assert_array_equal(session.logits, rows[-1])
    session.close()
    assert pages_in_use(model) == 0


# ---- tokenizers and templates: what they share, and whom they lend the thread to


def bpe() -> tinyllm.Tokenizer:
    """Of bytes alone, as a GGUF describes one."""
    letters = [chr(i) for i in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
    entries = {"model": "gpt2", "pre": "gpt-2", "tokens": letters, "merges": []}
    return tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in entries.items()})


LONG = "Tom saw a cat. " * 1500
MESSAGES = [{"role": "user", "content": "x"}]


def many_turns() -> Callable[[], object]:
    """A template that takes some milliseconds."""
    turns = "{% for i in range(1000) %}{% for m in messages %}{{ m.content|trim }}{% endfor %}{% endfor %}"
    return lambda: ChatTemplate(turns).render(MESSAGES)


def encoding(tokenizer: tinyllm.Tokenizer) -> Callable[[], object]:
    return lambda: tokenizer.encode(LONG)


WORK: dict[str, Callable[[], Callable[[], object]]] = {
    "BPE": lambda: encoding(bpe()),
    "SentencePiece": lambda: encoding(tinyllm.load_tokenizer(BUNDLED["stories"])),
    "template": many_turns,
}


@pytest.mark.parametrize("name", WORK)
def test_a_fork_while_another_thread_encodes(name: str) -> None:
    work, done = WORK[name](), threading.Event()

    def other() -> None:
        while not done.is_set():
            work()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    try:
        for _ in range(5):
            time.sleep(0.01)
            assert in_child(work) == 0
    finally:
        done.set()
        thread.join(timeout=60)


def test_a_template_needs_no_lock_of_jinjas() -> None:
    """As a forked process finds it that another thread of its parent holds."""
    lock = jinja2.lexer._lexer_cache._wlock  # type: ignore[attr-defined]
    with lock:
        assert in_child(many_turns()) == 0


@pytest.mark.parametrize("name", WORK)
def test_a_handler_may_encode_amid_encoding(name: str) -> None:
    def child() -> None:
        work, n_calls = WORK[name](), 0
        right = work()

        def handler(*_: object) -> None:
            nonlocal n_calls
            n_calls += 1
            assert work() == right

        signal.signal(signal.SIGUSR1, handler)
        timer = threading.Thread(target=lambda: [os.kill(os.getpid(), signal.SIGUSR1) for _ in pauses(5)])
        timer.start()
        while timer.is_alive():
            assert work() == right
        assert n_calls

    assert in_child(child) == 0


def pauses(n: int) -> Iterator[None]:
    for _ in range(n):
        time.sleep(0.01)
        yield


@handlers_exception_may_be_lost
@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("error", [TimeoutError, RuntimeError])
def test_what_a_handler_raises_stays_what_it_is(name: str, error: type[Exception]) -> None:
    """It is no fault of the model's files that the program's own time is up."""
    work = WORK[name]()
    work()
    for i in range(4):
        raise_amid(work, 0.001 + 0.0013 * i, error)


def test_what_a_handler_raises_while_the_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", handler_raises)
    for look in (backends.free_memory, backends.default_threads):
        with pytest.raises(TimeoutError, match=r"^of the handler$"):
            look()


@pytest.mark.parametrize("call", ["open", "pread", "listdir", "stat", "fsync"])
def test_what_a_handler_raises_amid_the_systems_calls(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TimeoutError is an OSError, and still no fault of the file's."""
    (tmp_path / "there").write_bytes(b"GGUF")
    works: dict[str, list[Callable[[], object]]] = {
        "open": [lambda: write_small(tmp_path / "new")],
        "pread": [lambda: read_small(tmp_path / "there")],
        "listdir": [lambda: list_directory(tmp_path)],
        "stat": [lambda: read_small(tmp_path / "there"), lambda: write_small(tmp_path / "new")],
        "fsync": [lambda: write_small(tmp_path / "new")],
    }
    monkeypatch.setattr(os, call, handler_raises)
    for work in works[call]:
        with pytest.raises(TimeoutError, match=r"^of the handler$"):
            work()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["there"]


def handler_raises(*_: object, **__: object) -> None:
    raise TimeoutError("of the handler")


def write_small(path: Path) -> None:
    with replacing(path, 3) as file:
        file.write(b"new")


NO_IMPORTS = """
import sys, tinyllm
llm = tinyllm.load(sys.argv[1], threads=2)
known = set(sys.modules)
llm.chat([{"role": "user", "content": "x"}], max_tokens=2)
with llm.session() as session:
    session.append("Tom")
    session.generate(max_tokens=2)
assert not set(sys.modules) - known, set(sys.modules) - known
"""


def test_calls_import_nothing(tmp_path: Path) -> None:
    """A process that is forked while another thread imports a module waits for ever for that module."""
    model = str(write_chat_model(tmp_path / "chat.gguf"))
    done = subprocess.run(
        [sys.executable, "-c", NO_IMPORTS, model], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
