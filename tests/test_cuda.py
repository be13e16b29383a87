"""The CUDA library from outside: how it is opened, which device is chosen, what is said where it is missing.

All of it on any machine, with a library that pretends to have GPUs (c/cuda_stub.c)."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tinyllm
from tinyllm import backends, errors
from tinyllm.backends import cuda
from tinyllm.measure import benchmark

Look = Callable[..., tuple[list[cuda.Gpu], str]]
MODEL_BYTES = 20_000_000  # more than "stories" takes with its context


@pytest.fixture
def look(stub_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Look]:
    """Opens the stub with settings (c/cuda_stub.c) and says what is found."""

    def find(**settings: object) -> tuple[list[cuda.Gpu], str]:
        monkeypatch.setenv("TINYLLM_CUDA_LIBRARY", str(stub_library))
        for name, value in settings.items():
            monkeypatch.setenv(f"STUB_{name.upper()}", str(value))
        cuda.look.cache_clear()
        return backends.find_gpus()

    yield find
    cuda.look.cache_clear()


# ---- opening


def test_a_library_with_devices(look: Look) -> None:
    gpus, reason = look(devices=2)
    assert reason == ""
    assert [gpu.name for gpu in gpus] == ["cuda:0", "cuda:1"]
    first = gpus[0]
    assert (first.title, first.capability) == ("Stub 0", (9, 0))
    assert (first.total_bytes, first.free_memory(), first.bandwidth_gb_s) == (80e9, 70e9, 4800)
    assert first.table != 0
    assert backends.read_bandwidth(1 << 20, 1, 1, first) == 4321
    with pytest.raises(errors.ArgumentError, match="too few bytes"):
        first.read_bandwidth(1, 1)


def test_it_is_opened_once(look: Look) -> None:
    assert backends.find_gpus() is not None
    first, _ = look()
    assert backends.find_gpus()[0][0] is first[0]


REASONS = [
    ({"devices": 0, "why": "there is no NVIDIA driver"}, "there is no NVIDIA driver"),
    ({"abi": 7}, "is of another build of tinyllm: install tinyllm again"),
    ({"devices": 2, "old": 2}, "cuda:0 cannot be used: compute capability 7.0 is too old; cuda:1 cannot"),
]


@pytest.mark.parametrize(("settings", "words"), REASONS)
def test_why_there_is_none(look: Look, settings: dict[str, object], words: str) -> None:
    gpus, reason = look(**settings)
    assert gpus == []
    assert words in reason
    info = tinyllm.info()
    assert (info["cuda"], info["cuda_reason"], info["cuda_devices"]) == (False, reason, [])
    with pytest.raises(errors.UnsupportedError, match=re.escape(f"'cuda' asked for, but {reason}")):
        tinyllm.load("stories", device="cuda")
    with tinyllm.load("stories") as llm:
        assert llm.device == "cpu"


def test_an_old_card_beside_a_new_one_is_left_out(look: Look) -> None:
    gpus, reason = look(devices=2, old=1)
    assert [gpu.name for gpu in gpus] == ["cuda:1"]
    assert reason == ""
    with tinyllm.load("stories") as llm:
        assert llm.device == "cuda:1"


def test_a_library_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, words in ((tmp_path / "missing.so", "there is no"), (Path(__file__), "invalid ELF header")):
        monkeypatch.setenv("TINYLLM_CUDA_LIBRARY", str(path))
        gpus, reason = backends.find_gpus()
        assert gpus == []
        assert words in reason
        assert str(path) in reason
        assert "Additionally" not in reason
        assert "\n" not in reason


def test_a_library_without_our_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLLM_CUDA_LIBRARY", backends._core.__file__)
    assert "tl_cuda_abi" in backends.find_gpus()[1]


def test_what_the_build_said_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYLLM_CUDA_LIBRARY")
    monkeypatch.setattr(backends._core, "cuda_build", "no nvcc was found")
    assert backends.find_gpus() == ([], "tinyllm was built without it: no nvcc was found")
    monkeypatch.setattr(backends._core, "cuda_build", "")
    monkeypatch.setattr(backends._core, "__file__", "/no/such/_core.so")
    assert backends.find_gpus() == ([], "there is no /no/such/libtinyllm_cuda.so")


def test_an_empty_name_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLLM_CUDA_LIBRARY", "")
    assert backends.find_gpus() == ([], "TINYLLM_CUDA_LIBRARY is empty")


def test_nothing_is_opened_before_it_is_needed() -> None:
    """cffi takes longer to import than the rest."""
    code = "import sys, tinyllm, tinyllm.llm; sys.exit('cffi' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- choosing


def test_auto_takes_the_first_gpu_with_room(look: Look, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    look(devices=3, free=MODEL_BYTES // 2)  # the n-th has n + 1 times as much
    assert backends.choose_device("auto", MODEL_BYTES).name == "cuda:1"
    assert backends.choose_device("cuda", MODEL_BYTES).name == "cuda:1"
    assert backends.choose_device("cuda:0", MODEL_BYTES).name == "cuda:0"
    assert backends.choose_device("cuda:02", MODEL_BYTES).name == "cuda:2"
    assert backends.choose_device("cpu", MODEL_BYTES).name == "cpu"
    assert caplog.text == ""
    assert backends.choose_device("auto", 2 * MODEL_BYTES).name == "cpu"
    numbers = "needs 40.00 MB, cuda:0 has 10.00 MB free, cuda:1 has 20.00 MB free, cuda:2 has 30.00 MB free"
    assert f"device cpu: the model {numbers}" in caplog.text
    assert backends.choose_device("cuda", 2 * MODEL_BYTES).name == "cuda:2"


def test_auto_logs_why_it_is_the_cpu(look: Look, caplog: pytest.LogCaptureFixture) -> None:
    look(devices=0, why="there is no NVIDIA driver")
    caplog.set_level(logging.INFO)
    tinyllm.load("stories").close()
    assert "device cpu: there is no NVIDIA driver" in caplog.text


def test_auto_is_the_cpu_where_the_gpu_cannot_compute_the_model(
    look: Look, caplog: pytest.LogCaptureFixture
) -> None:
    look(refuses=1)
    caplog.set_level(logging.INFO)
    before = backends.live_allocations()
    with tinyllm.load("stories", context=100) as llm:
        assert (llm.device, llm.context) == ("cpu", 100)
        assert len(llm("Once", max_tokens=3).tokens) == 3
    assert "device cpu: experts cannot be computed yet" in caplog.text
    assert backends.live_allocations() == before
    with (
        tinyllm.load("stories", device="cuda") as llm,
        pytest.raises(errors.UnsupportedError, match="experts cannot"),
    ):
        llm("Once", max_tokens=3)


@pytest.mark.parametrize("device", ["tpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:²", "", "cpu:0"])
def test_other_names_are_refused(look: Look, device: str) -> None:
    look()
    with pytest.raises(errors.ArgumentError, match=r"'auto', 'cpu', 'cuda' or 'cuda:N'"):
        backends.choose_device(device)


def test_a_number_that_is_not_there(look: Look) -> None:
    look(devices=2)
    words = "device 'cuda:2' asked for, but the GPUs here are cuda:0, cuda:1; use device='cpu'"
    with pytest.raises(errors.UnsupportedError, match=words):
        tinyllm.load("stories", device="cuda:2")


def test_a_model_that_does_not_fit_names_the_numbers(look: Look) -> None:
    look(free=1_000_000)
    words = r"the memory of cuda:0 \(Stub 0\): its weights take 3\.\d\d MB.*, 1\.00 MB are free"
    for device in ("cuda", "cuda:0"):
        with pytest.raises(errors.MemoryLimitError, match=words):
            tinyllm.load("stories", device=device)
    with tinyllm.load("stories") as llm:
        assert llm.device == "cpu"


def test_a_long_context_goes_where_it_fits(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    look(free=MODEL_BYTES)
    with tinyllm.load("stories") as llm:
        assert llm.device == "cuda:0"
    with tinyllm.load("stories", context=100_000) as llm:
        assert llm.device == "cpu"
    monkeypatch.setattr(backends, "free_memory", lambda: 1)  # of the CPU: it does not matter here
    with tinyllm.load("stories", device="cuda") as llm:
        assert llm.model.free_memory() == MODEL_BYTES


# ---- the operations are the library's, and results say so


def test_the_librarys_operations_run(look: Look) -> None:
    look()
    with tinyllm.load("stories") as llm:
        prompt = llm.tokenizer.encode("Once")
        answer = llm(prompt, max_tokens=4, temperature=0)
        assert answer.tokens == [prompt[-1] + i for i in range(1, 5)]
        assert answer.device == llm.device == llm.model.device == "cuda:0"
        assert "on cuda:0" in repr(llm)


def test_results_name_the_device(look: Look, stub_library: Path) -> None:
    look()
    env = os.environ | {"TINYLLM_CUDA_LIBRARY": str(stub_library)}

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"tinyllm.cli.{module}", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True)

    done = run("run", "stories", "Once", "-n", "3", "--json")
    assert json.loads(done.stdout)["settings"]["device"] == "cuda:0"
    assert ", cuda:0; peak memory" in done.stderr
    done = run("run", "stories", "Once", "-n", "3", "--json", "--device", "cpu")
    assert json.loads(done.stdout)["settings"]["device"] == "cpu"
    assert "cuda:0 Stub 0, 80.00 GB" in run("run", "--info").stdout
    assert "CUDA)" in run("run", "--version").stdout
    bench = ("bench", "stories", "-p", "2", "-n", "2", "-r", "1", "-o")
    for row in json.loads(run(*bench, "json").stdout):
        assert (row["device"], row["gpu_info"], row["backends"]) == ("cuda:0", "Stub 0", "CUDA")
        assert row["read_gb_s"] == 4321
    assert "cuda:0 Stub 0, f16 cache, tinyllm" in run(*bench, "md").stdout
    for row in json.loads(run(*bench, "json", "--device", "cpu", "--buffer", "1").stdout):
        assert (row["device"], row["gpu_info"], row["backends"]) == ("cpu", "", "CPU")


def test_one_run_measures_one_device(look: Look) -> None:

    look(devices=2)
    of = benchmark.cases(n_prompt=[2], n_gen=[], threads=[1])
    results = benchmark.measure(["stories", "stories"], of, device="cuda:1", repetitions=1)
    assert [result.device.name for result in results] == ["cuda:1", "cuda:1"]
