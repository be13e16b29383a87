"""What the machine does to a process: no memory, signals at any moment, an end amid work, files that change
while they are read. tests/long repeats these for hours."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_models import golden_spec, random_ids, random_weights, write_hf_directory

import tinyllm
from tinyllm import backends, errors, modelfiles
from tinyllm.files import FileReader
from tinyllm.files.names import Weights

HERE = Path(__file__).parent
CONFIG = golden_spec("llama3").config
BIG = CONFIG | {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 2048, "num_attention_heads": 8}


def run_script(name: str, *arguments: object) -> str:
    """The output of a script of tests/long that ended well."""
    command = [sys.executable, "-W", "error", HERE / "long" / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


SHUTDOWN = """
import sys, threading, time, tinyllm
sys.setswitchinterval(float(sys.argv[2]))
llm = tinyllm.load("stories", threads=2)
def work():
    while True:
        llm("Once upon a time", max_tokens=50, cancel=lambda: False)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "switch", [0.005, 1e-5]
)  # seconds a thread keeps the interpreter; the first is the usual
@pytest.mark.parametrize("seconds", [0, 0.03, 0.1, 0.2])
def test_the_interpreter_ends_amid_generation(seconds: float, switch: float) -> None:
    command = [sys.executable, "-c", SHUTDOWN, str(seconds), str(switch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


AT_EXIT = """
import atexit, contextlib, sys, threading, time, tinyllm
stop = threading.Event()
def at_exit():  # known before the core is, which the first model opens: runs after what the core does
    stop.set()
    if sys.argv[1] == "use":
        assert len(llm("Tom", max_tokens=3, seed=1).tokens) == 3
    elif sys.argv[1] == "in a thread":
        other = threading.Thread(target=lambda: llm("Tom", max_tokens=3))
        other.start()
        other.join()
    elif sys.argv[1] == "join":
        thread.join()
    else:
        llm.close()
atexit.register(at_exit)
llm = tinyllm.load("stories", threads=2)
def work():
    with contextlib.suppress(tinyllm.errors.ModelClosedError):
        while not stop.is_set():
            llm("Once upon a time", max_tokens=50)
thread = threading.Thread(target=work, daemon=True)
thread.start()
time.sleep(0.1)
"""


@pytest.mark.parametrize("what", ["use", "in a thread", "join", "close"])
def test_what_runs_at_exit_may_use_the_model(what: str) -> None:
    """While another thread is amid a call, whose locks it must not take along."""
    command = [sys.executable, "-c", AT_EXIT, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_interrupts_at_random_moments() -> None:
    """SIGINT while loading, generating, streaming and forking; the model is usable after each."""
    run_script("signals", "--interrupts", 60, "--seed", 1)


def test_interrupts_anywhere() -> None:
    run_script("anywhere", "--seconds", 3)


def test_address_space_runs_out() -> None:
    """Loading, growing the cache and calling under RLIMIT_AS, which leaves a little more each time."""
    run_script("memory", "--step-kb", 2048)


def test_many_threads_for_some_seconds() -> None:
    run_script("threads", "--threads", 64, "--seconds", 2)


def test_many_short_requests_leave_nothing() -> None:
    run_script("requests", "--n", 300)


def directory(path: Path, seed: int) -> Path:
    return write_hf_directory(path, CONFIG, random_weights(CONFIG, seed))


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    os.utime(path, (1, 1))  # a clock that is too coarse must not hide it


def replace(path: Path) -> None:
    other = directory(path.parent / "other", 7) / path.name
    os.replace(other, path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: list[tuple[Callable[[Path], object], type[errors.Error], str]] = [
    (truncate, errors.FormatError, "the file changed while it was read"),
    (overwrite, errors.FormatError, "the file changed while it was read"),
    (replace, errors.FormatError, "the file changed while it was read"),
    (lambda path: path.unlink(), errors.NotFoundError, "no such file"),
    (pipe, errors.Error, "(could not be read|not a regular file)"),
]


@pytest.mark.parametrize("when", [0, 1, 8])
@pytest.mark.parametrize(
    ("change", "error", "message"), CHANGES, ids=["truncate", "overwrite", "replace", "unlink", "pipe"]
)
def test_a_file_changes_while_it_is_read(
    change: Callable[[Path], object], error: type[errors.Error], message: str, when: int, tmp_path: Path
) -> None:
    path = directory(tmp_path / "model", 6)
    before, n_calls = backends.live_allocations(), 0
    n_open = len(os.listdir("/proc/self/fd"))

    def progress(done: int, total: int) -> None:
        nonlocal n_calls
        if n_calls == when:
            change(path / "model.safetensors")
        n_calls += 1

    with pytest.raises(error, match="model.safetensors.*" + message):
        tinyllm.load(path, threads=2, progress=progress)
    assert backends.live_allocations() == before
    assert len(os.listdir("/proc/self/fd")) == n_open


@pytest.mark.parametrize("change", [truncate, overwrite, replace])
def test_a_file_changes_between_its_header_and_its_weights(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    path = directory(tmp_path / "model", 6)
    files = modelfiles.read_model(path)
    change(path / "model.safetensors")
    with pytest.raises(errors.FormatError, match=r"model\.safetensors: the file changed while it was read"):
        tinyllm.load(files, threads=2)


@pytest.mark.parametrize("change", [truncate, overwrite, replace])
def test_a_file_changes_while_it_is_quantized(change: Callable[[Path], object], tmp_path: Path) -> None:
    path, n_calls = directory(tmp_path / "model", 6), 0

    def progress(done: int, total: int) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            change(path / "model.safetensors")

    with pytest.raises(errors.FormatError, match=r"model\.safetensors: the file changed while it was read"):
        tinyllm.quantize(path, tmp_path / "out.gguf", "q8_0", progress=progress)
    assert n_calls >= 3
    assert not list(tmp_path.glob("out*"))


def test_a_file_changes_while_its_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(b"{}" * 100)

    def read() -> None:
        with FileReader(path) as file:
            file.read_at(0, 2)
            overwrite(path)

    with pytest.raises(errors.FormatError, match="the file changed while it was read"):
        read()


def test_a_model_that_is_loaded_needs_its_file_no_more(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", 6)
    ids = random_ids(CONFIG, 1, 70)
    with tinyllm.load(path, threads=2) as llm:
        right = llm.logits(ids)
        truncate(path / "model.safetensors")
        np.testing.assert_array_equal(llm.logits(ids), right)


def test_a_progress_callback_that_raises(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", 6)
    before = backends.live_allocations()
    for error in (ZeroDivisionError, KeyboardInterrupt):

        def progress(done: int, total: int, error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            tinyllm.load(path, progress=progress)
        assert backends.live_allocations() == before


# ---- weights that are packed while the vocabulary is read


def held() -> tuple[object, int, int]:
    """The core's memory, threads and open files of this process."""
    threads, files = (len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd"))
    return backends.live_allocations(), threads, files


def read_by(read: Callable[[], Any], path: Path) -> modelfiles.ModelFiles:
    """A model whose vocabulary is read by this function, while its weights are packed."""
    return dataclasses.replace(modelfiles.open_model(directory(path, 6)), read_tokenizer=read)


def with_a_hole(files: modelfiles.ModelFiles) -> modelfiles.ModelFiles:
    """The same with a matrix that lies behind the end of its file."""
    tensors = dict(files.weights)
    tensors["wq", 1] = dataclasses.replace(tensors["wq", 1], offset=1 << 40)
    return dataclasses.replace(files, weights=Weights(files.config, tensors, {}))


def failing(error: BaseException, seconds: float) -> Callable[[], None]:
    def read() -> None:
        time.sleep(seconds)
        raise error

    return read


@pytest.mark.parametrize("seconds", [0, 0.05])  # nothing is packed, or all is
@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (errors.FormatError("the vocabulary is broken"), errors.FormatError),
        (MemoryError(), errors.MemoryLimitError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["broken", "memory", "interrupt"],
)
def test_a_vocabulary_that_fails_while_weights_are_packed(
    error: BaseException, wanted: type[BaseException], seconds: float, tmp_path: Path
) -> None:
    files = read_by(failing(error, seconds), tmp_path / "model")
    tinyllm.load("stories", threads=2).close()  # its threads stay
    before = held()
    with pytest.raises(wanted) as raised:
        tinyllm.load(files, threads=2)
    assert held() == before
    if wanted is errors.FormatError:
        assert str(raised.value) == f"{files.path}: the vocabulary is broken"


def test_weights_that_fail_while_the_vocabulary_is_read(tmp_path: Path) -> None:
    files = with_a_hole(read_by(lambda: time.sleep(0.05), tmp_path / "model"))
    tinyllm.load("stories", threads=2).close()
    before = held()
    done: list[int] = []
    with pytest.raises(
        errors.FormatError, match=r"model\.safetensors: row \d+ of \d+, \d+ bytes from offset 10995"
    ):
        tinyllm.load(files, threads=2, progress=lambda now, total: done.append(now))
    assert held() == before
    weights = list(files.weights.items())
    end = [key for key, _ in weights].index(("wq", 1))
    assert done == list(itertools.accumulate(info.n_bytes for _, info in weights[:end]))


def test_of_two_errors_the_vocabularys_is_told(tmp_path: Path) -> None:
    broken = read_by(failing(errors.FormatError("the vocabulary is broken"), 0.05), tmp_path / "model")
    for files, options in (
        (with_a_hole(broken), {}),
        (broken, {"free_memory": lambda: 1000}),
        (broken, {"weights": "q9_9"}),
    ):
        with pytest.raises(errors.FormatError, match="the vocabulary is broken"):
            tinyllm.load(files, threads=2, **options)  # type: ignore[arg-type]


def test_a_signal_while_weights_are_packed(tmp_path: Path) -> None:
    """Where loading waits for them."""

    def load(files: modelfiles.ModelFiles) -> None:
        tinyllm.load(files, threads=1, weights="q4_k_m").close()
        for _ in range(300):  # where all was packed before the signal came
            time.sleep(0.01)

    def is_raised(files: modelfiles.ModelFiles) -> bool:
        try:
            load(files)
        except KeyboardInterrupt:
            return True
        return False  # what is raised within a finalizer, Python can only report

    path = write_hf_directory(tmp_path / "model", BIG, random_weights(BIG, 6))
    tinyllm.load("stories", threads=2).close()
    before = held()
    for n in range(5):
        raised = []
        while len(raised) < 3 and not any(raised):
            timer = threading.Timer(0.004 * n, lambda: os.kill(os.getpid(), signal.SIGINT))
            files = dataclasses.replace(modelfiles.open_model(path), read_tokenizer=timer.start)
            raised.append(is_raised(files))
            timer.join()
            assert held() == before
        assert any(raised)


def test_a_fork_while_weights_are_packed(tmp_path: Path) -> None:
    """The child does not have the thread that packs: its call ends, and it can load for itself."""
    path = directory(tmp_path / "model", 6)
    pids: list[int] = []
    files = dataclasses.replace(modelfiles.open_model(path), read_tokenizer=lambda: pids.append(os.fork()))
    ids = random_ids(CONFIG, 1, 20)
    try:
        llm = tinyllm.load(files, threads=2)
        right = llm.logits(ids)
    except errors.CancelledError:
        signal.alarm(120)
        with tinyllm.load(path, threads=2) as own:
            os._exit(0 if own.logits(ids).any() else 1)
    finally:
        if pids == [0]:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
    with llm, tinyllm.load(path, threads=1) as again:
        np.testing.assert_array_equal(again.logits(ids), right)


LOADING_AT_EXIT = """
import sys, threading, time, tinyllm
tinyllm.load("stories", threads=2).close()
def work():
    while True:
        tinyllm.load("stories", threads=2).close()
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("seconds", [0.02, 0.05, 0.1])
def test_the_interpreter_ends_amid_loading(seconds: float) -> None:
    command = [sys.executable, "-c", LOADING_AT_EXIT, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_weights_are_packed_and_told_in_order(tmp_path: Path) -> None:
    """Each that is asked for is packed; the weights of a model may come in several calls."""
    files = modelfiles.open_model(directory(tmp_path / "model", 6))
    given = [backends.Weight(name, layer, info) for (name, layer), info in files.weights.items()]
    model = backends.Model(files.config, device="cpu", threads=2)
    assert list(model.upload(given)) == given
    model.check()
    with pytest.raises(errors.ArgumentError, match="is there already"):
        list(model.upload(given[-1:]))
    assert list(model.upload([])) == []
    model.close()
    with pytest.raises(errors.ModelClosedError):
        model.upload(given[:1])


def test_a_full_pool_under_many_texts(tmp_path: Path) -> None:
    """Texts that together need many times the pages there are: each comes out as alone, or is refused."""
    with tinyllm.load(directory(tmp_path / "model", 6), threads=2, context=320) as llm:
        llm._cache.max_pages = 5  # one full context
        prompts = [random_ids(CONFIG, i, 60 + 11 * i) for i in range(12)]
        alone = [llm(prompt, seed=1, max_tokens=30).tokens for prompt in prompts]
        together = llm(prompts, seed=1, max_tokens=30)
        assert [completion.tokens for completion in together] == alone
        held = llm.session()
        held.append(random_ids(CONFIG, 50, 300))
        with pytest.raises(errors.MemoryLimitError, match="the KV cache is full"):
            llm(prompts[0], max_tokens=5)
        held.close()
        assert llm(prompts[0], seed=1, max_tokens=30).tokens == alone[0]
