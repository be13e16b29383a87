"""Fixtures that every test file may use, and the settings of the property-based tests."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tinyllm import backends

# No limits of time: the machine that runs the tests may be busy. Reproducible in CI, exploring elsewhere.
settings.register_profile(
    "tinyllm",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tinyllm")


# The tests compare bits of the CPU: they see no GPU but where they ask for one.
CUDA_LIBRARY = os.environ.get("TINYLLM_CUDA_LIBRARY")
os.environ["TINYLLM_CUDA_LIBRARY"] = ""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device to test on, "cuda:0"; the test is skipped where there is none. For tests marked `gpu`."""
    if CUDA_LIBRARY is None:
        monkeypatch.delenv("TINYLLM_CUDA_LIBRARY")
    else:
        monkeypatch.setenv("TINYLLM_CUDA_LIBRARY", CUDA_LIBRARY)
    found, reason = backends.find_gpus()
    if not found:
        pytest.skip(f"no GPU: {reason}")
    return found[0].name


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """c/cuda_stub.c as a library, which pretends to have GPUs."""
    source, library = Path(__file__).parent / "c" / "cuda_stub.c", tmp_path_factory.mktemp("stub") / "stub.so"
    compiler = os.environ.get("CC", "cc").split()
    command = [
        *compiler,
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        library,
        source,
    ]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of test data that others made (tests/data.md lists the public sources).

    TINYLLM_TEST_DATA names it, else it lies at ../shared/data beside the repository. A test that needs it is
    skipped where it is missing, and fails with CI=true.
    """
    given = os.environ.get("TINYLLM_TEST_DATA")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (path / "models").is_dir():
        message = f"test data missing: {path} (set TINYLLM_TEST_DATA; sources in tests/data.md)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="module")
def frozen_heap() -> Iterator[None]:
    """Collections look at what the module's tests make, and not at all that others left, which takes long and
    would change what is counted amid a test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class ReadCount:
    """What os.pread was asked for while the `reads` fixture was in use."""

    def __init__(self) -> None:
        self.calls = 0
        self.n_bytes = 0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> ReadCount:
    """Counts calls of os.pread and the bytes they returned."""
    count = ReadCount()
    pread = os.pread

    def counting(fd: int, n: int, offset: int) -> bytes:
        data = pread(fd, n, offset)
        count.calls += 1
        count.n_bytes += len(data)
        return data

    monkeypatch.setattr(os, "pread", counting)
    return count
