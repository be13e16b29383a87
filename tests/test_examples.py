"""Every example runs offline on the bundled model and prints what it says it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHOWS = {
    "async_many": r"The dog.+6 stories in [\d.]+ s; .+ True\n.+ \.\.\. and so on",
    "structured": r"parsed: {\"colour.+choice:  (red|blue|green)\nregex:  \d+:\d\d\ngrammar: \d+\+\d+=\d+\n",
    "stream": r"Once upon a time.{20,}\n\n\d+ tokens a second",
    "batch": r"Tom had a dog.*In the garden there was.*the same tokens: True",
    "chat": r"> Tell me a story about a dog.+\n\n> Then Max saw a bird.+",
    "majority_vote": r"ate a big red \.\.\.\n +\d+ of 32  \w+",
    "fork_session": r"Once upon a time, .*\.\.\. Lily was happy because .+\.\.\. Lily was scared because .+",
    "tools": r"paint\({'color': 'blue', 'number': \d+}\) returned 'Now \d+ balls are blue.'\n.+",
    "rag": r"(\[\d+\] \d\.\d{3} « .+? »\n\n){2}Que mange le lama \?\n.+",
    "own_sampler": r"without_e: Tom had a dog[^eE]+\n\nsurprising: Tom had a dog.+",
}


@pytest.mark.parametrize("name", SHOWS)
def test_example(name: str) -> None:
    path = EXAMPLES / f"{name}.py"
    assert path.read_text(encoding="utf-8").startswith('"""'), "its first lines say what it shows"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, timeout=300, cwd=EXAMPLES
    )
    assert done.returncode == 0, done.stderr
    assert re.search(SHOWS[name], done.stdout, re.DOTALL), done.stdout
    assert done.stderr == ""


def test_every_example_is_here() -> None:
    # train_stories.py needs PyTorch and many minutes.
    # Those of machines start a Ray cluster each; tests/test_ray.py tests what they call.
    machines = {"machines_batch", "machines_stages", "machines_serve"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SHOWS.keys() | {"train_stories"} | machines
