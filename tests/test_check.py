"""cuda/check.sh without a GPU: what it says, and that its stages run on a library that pretends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tinyllm

ROOT = Path(__file__).resolve().parents[1]


def check(*options: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the script with this interpreter's packages."""
    package = str(Path(tinyllm.__file__).parents[1])
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": package}
    command = ["bash", ROOT / "cuda" / "check.sh", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_a_line(tmp_path: Path) -> None:
    done = check("--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("check.sh: no GPU: there is no nvidia-smi")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_is_refused() -> None:
    done = check("--only", "build,nosuch")
    assert done.returncode == 2
    assert "there is no stage nosuch; there are build, bandwidth" in done.stderr


def test_every_stage_writes_its_json(stub_library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages = "bandwidth,models,sanitizer,more"
    options = ("--emulate", "--installed", "--seconds", "5000", "--only", stages)
    done = check("--out", out, "--library", stub_library, *options)
    assert done.returncode == 0, done.stdout + done.stderr

    def read(name: str) -> Any:
        return json.loads((out / f"{name}.json").read_text())

    assert [stage["status"] for stage in read("stages")] == ["ok"] * 5
    build, bandwidth, models = read("build"), read("bandwidth"), read("models")
    assert build["emulated"]
    assert build["info"]["cuda_devices"] == ["cuda:0 Stub 0, 80.00 GB"]
    assert (bandwidth["read_gb_s"], bandwidth["data_sheet_gb_s"]) == (4321, 4800)
    alone = ["pp20", "tg3", "llm() greedy", "llm() sampled"]
    further = ["tg2 x 2", "tg2 x 4", "pp9 @ d130", "tg2 @ d130"]
    found = [(row["shape"], row["type"], row["test"]) for row in models]
    expected = [("q4_k_m", alone), ("q4_0", alone), ("q4_k_m", further), ("q4_0", alone)]
    assert found == [("tiny", type, test) for type, tests in expected for test in tests]
    assert all(row["median_ts"] > 0 and row["device"] == "cuda:0" for row in models)
    assert read("tests")["sanitizer"]["status"] == "not run: emulated"
    assert len(list(out.iterdir())) <= 8
    summary = (out / "summary.md").read_text()
    assert summary.startswith("# Emulated on the CPU, the figures mean nothing: cuda:0 Stub 0")
    assert summary.count("| tiny q4_k_m") == 8
    assert "memory read at 4321 GB/s (data sheet 4800)" in summary
    assert "bandwidth: at most" in (out / "log.txt").read_text() + done.stdout


def test_a_stage_out_of_time_leaves_what_it_has(stub_library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--emulate", "--installed", "--seconds", "4", "--only", "models")
    done = check("--out", out, "--library", stub_library, *options)
    assert done.returncode == 1
    statuses = [stage["status"] for stage in json.loads((out / "stages.json").read_text())]
    assert "no time" in statuses
    assert "no time" in (out / "summary.md").read_text()
