"""What of the CUDA source takes a minute to check: races between the kernels' threads, and the real compiler.

`pytest tests/long/cuda_checks.py`: pytest does not collect it by itself. The
rest is tests/test_cuda_kernels.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cuda_kernels import ROOT, compiled

import tinyllm

RACES = """
import sys
from pathlib import Path
import numpy as np
import tinyllm
from test_cuda_kernels import MIXTURE, VARIED, load_varied, one_layer
from helpers_models import random_weights
from helpers_gguf import write_gguf

path = Path(sys.argv[1])
llama = one_layer(max_position_embeddings=384, vocab_size=1100)
mixture = one_layer(max_position_embeddings=384, **MIXTURE)
varied = {**llama, **VARIED, "vocab_size": 310}
for config, format, cache, calls in (
    (llama, "Q4_0", "f16", PIECES),
    (llama, "F16", "q8_0", PIECES[1::2]),
    (mixture, "Q4_0", "f16", [[(0, 1)], [(1, 1), (0, 36)]]),
    (varied, "F32", "f16", PIECES[1::2]),
):
    write_gguf(path, config, random_weights(config, seed=1), format=format)
    with (load_varied if config is varied else tinyllm.load)(path, device="cuda", cache_type=cache) as llm:
        n_tables = len(llm.model.cache_groups)
        pool = llm.model.cache(cache, 12 * n_tables)
        pool.grow(12 * n_tables)
        tables = np.arange(12 * n_tables).reshape(2, n_tables, 6)
        for pieces in calls:
            positions = np.concatenate([np.arange(first, first + n) for first, n in pieces])
            sequences = np.repeat(np.arange(len(pieces)), [n for _, n in pieces])
            call = (positions, positions, sequences, tables)
            llm.model.forward(*call, rows=[len(positions) - 1], cache=pool)
        if config is llama and cache == "f16":
            masks = np.full((2, 35), 0x10101010, np.uint32)
            llm.model.candidates(*call, rows=[0, len(positions) - 1], n=5, allowed=masks, cache=pool)
        pool.close()
print("ran")
"""
# (first position, tokens) of each sequence, a call each: one token; two, one of them in a second segment;
# more than one of a sequence; many.
PIECES = [[(0, 1)], [(299, 1), (0, 1)], [(300, 3)], [(303, 1), (1, 36)]]


def test_races(tmp_path: Path) -> None:
    """ThreadSanitizer takes each thread of the kernels for a thread and knows what orders them on a GPU
    (host/primitives.h): without any one of the kernels' barriers, fences and waits it reports a race."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++")
    sanitizer = subprocess.run(
        [compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(sanitizer):
        pytest.skip("g++ has no ThreadSanitizer")
    options = ("-O1", "-g1", "-fsanitize=thread", "-Wno-tsan")
    env = os.environ | {
        "TINYLLM_CUDA_LIBRARY": str(compiled(tmp_path, compiler, *options)),
        "LD_PRELOAD": os.path.realpath(sanitizer),
        "TSAN_OPTIONS": "exitcode=66 halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(Path(tinyllm.__file__).parents[1])]),
    }
    code = f"PIECES = {PIECES}\n{RACES}"
    command = [sys.executable, "-c", code, str(tmp_path / "model.gguf")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not start here")
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr[:4000]


# ---- the real compiler


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_no_kernel_spills() -> None:
    """The kernels compile, and no hot one keeps anything in local memory. One architecture here, since each
    takes 20 s; all of them: cuda/spills.py --all."""
    done = subprocess.run(
        ["python3", ROOT / "cuda" / "spills.py", "80"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
