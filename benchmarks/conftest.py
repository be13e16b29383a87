"""What the benchmarks share: models, a closing table of rates, and what is kept of a run and compared.

pytest-benchmark measures; the table only divides. Read next: test_speed.py, test_kernels.py, regressions.py.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import regressions
import synthetic

import tinyllm

LINES = pytest.StashKey[list[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tinyllm")
    group.addoption("--results", metavar="FILE", help="keep the quartiles of every benchmark there")
    group.addoption(
        "--against", metavar="FILE", help="say what is slower than in this earlier --results, or gone"
    )


def pytest_configure(config: pytest.Config) -> None:
    """What could not be kept or compared is said before ten minutes of measuring."""
    results, against = config.getoption("--results"), config.getoption("--against")
    if results is not None and not Path(results).absolute().parent.is_dir():
        raise pytest.UsageError(f"--results {results}: there is no such folder")
    if against is not None:
        try:
            regressions.read(against)
        except (OSError, ValueError) as error:
            raise pytest.UsageError(f"--against: {error}") from None


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
    """measure(function, n=..., unit=..., setup=..., rounds=...): runs it, adds a line to the closing table.

    n: what one call works through, for a rate in `unit`; None: the line says the time. setup: untimed,
    before each round; returns the arguments as (args, kwargs).
    """

    def run(
        function: Callable[..., object],
        *,
        n: float | None = None,
        unit: str = "tok/s",
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
        rounds: int = 10,
    ) -> None:
        benchmark.pedantic(function, setup=setup, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        low, median, high = (benchmark.stats.stats.as_dict()[key] for key in ("min", "median", "max"))
        if n is None:
            line = f"{median * 1e3:10.3f} ms        ({low * 1e3:.3f} to {high * 1e3:.3f})"
        else:
            line = f"{n / median:10.1f} {unit:<9} ({n / high:.1f} to {n / low:.1f})"
        request.config.stash.setdefault(LINES, []).append((request.node.name, line))

    return run


@pytest.fixture(scope="session")
def synthetic_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[synthetic.Shape, str], Path]:
    """synthetic_model(shape, type): a file with random weights, written once."""
    folder, written = tmp_path_factory.mktemp("synthetic"), dict[tuple[str, str], Path]()

    def write(shape: synthetic.Shape, type: str) -> Path:
        path = folder / f"{shape.name}-{type}.gguf"
        if (shape.name, type) not in written:
            synthetic.write(path, shape, synthetic.TYPES[type])
            written[shape.name, type] = path
        return path

    return write


def run_of(config: pytest.Config) -> dict[str, Any]:
    """What --results keeps: the machine, and each benchmark's quartiles in seconds."""
    info = tinyllm.info()
    session = getattr(config, "_benchmarksession", None)
    of_each = {} if session is None else {b.name: b.stats for b in session.benchmarks if b.stats.data}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": _processor(),
        "isa": info["isa"],
        "threads": info["threads"],
        "version": info["version"],
        "benchmarks": {
            name: {
                "median_s": stats.median, "q1_s": stats.q1, "q3_s": stats.q3,
                "min_s": stats.min, "max_s": stats.max, "rounds": stats.rounds,
            }
            for name, stats in of_each.items()
        },
    }  # fmt: skip


def pytest_report_header() -> str:
    info = tinyllm.info()
    return (
        f"tinyllm {info['version']}: {info['isa']}, {info['threads']} threads, {_processor()}, "
        f"Python {platform.python_version()}"
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash.get(LINES, [])
    if lines:
        terminalreporter.section("medians (slowest to fastest round)")
        for name, line in lines:
            terminalreporter.write_line(f"{name:<40}{line}")
    against = config.getoption("--against")
    if against is not None:
        terminalreporter.section(f"against {Path(against).name}")
        for line in regressions.report(regressions.read(against), run_of(config)):
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if config.getoption("--results") is not None:
        text = json.dumps(run_of(config), indent=1, ensure_ascii=False)
        Path(config.getoption("--results")).write_text(text + "\n", encoding="utf-8")
    against = config.getoption("--against")
    if against is not None and exitstatus == 0:
        session.exitstatus = regressions.exit_code(regressions.read(against), run_of(config))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
