"""Fixtures that every test file may use, and the settings of the property-based tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No deadline: the machine that runs the tests may be busy. Reproducible in CI, exploring elsewhere.
settings.register_profile(
    "tinyllm",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tinyllm")


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
