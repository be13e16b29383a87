"""What the benchmarks share: the float master of the bundled model, and a closing table in tokens a second.

pytest-benchmark measures; the table only divides. Read next: test_speed.py.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tinyllm

RESULTS = pytest.StashKey[list[tuple[str, str]]]()


@pytest.fixture(scope="session")
def master() -> Path:
    """The float master of the bundled model: F16, so that every format can be made of it while loading."""
    return Path(__file__).parent / "stories-f16.gguf"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """As in tests/conftest.py (tests/data.md), but missing data is always skipped."""
    given = os.environ.get("TINYLLM_TEST_DATA")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (path / "vocab").is_dir():
        pytest.skip(f"test data missing: {path}")
    return path


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """measure(function, n_tokens=..., setup=..., rounds=...): runs it and adds a line to the closing table.

    n_tokens: what one call works through, for a rate; None: the line says the time. setup: untimed, before
    each round; returns the arguments as (args, kwargs).
    """

    def run(
        function: Callable[..., object],
        *,
        n_tokens: int | None = None,
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
        rounds: int = 10,
    ) -> None:
        benchmark.extra_info["n_tokens"] = n_tokens
        benchmark.pedantic(function, setup=setup, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        low, median, high = (benchmark.stats.stats.as_dict()[key] for key in ("min", "median", "max"))
        if n_tokens is None:
            line = f"{median * 1e3:10.3f} ms     ({low * 1e3:.3f} to {high * 1e3:.3f})"
        else:
            line = f"{n_tokens / median:10.1f} tok/s  ({n_tokens / high:.1f} to {n_tokens / low:.1f})"
        request.config.stash.setdefault(RESULTS, []).append((request.node.name, line))

    return run


def pytest_report_header() -> str:
    info = tinyllm.info()
    return (
        f"tinyllm {info['version']}: {info['isa']}, {info['threads']} threads, {_processor()}, "
        f"Python {platform.python_version()}"
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash.get(RESULTS, [])
    if results:
        terminalreporter.section("medians (slowest to fastest round)")
        for name, line in results:
            terminalreporter.write_line(f"{name:<28}{line}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
