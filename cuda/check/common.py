"""What the stages share: where they write, and how much time they have."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT, SCRATCH = Path(os.environ["CHECK_OUT"]), Path(os.environ["CHECK_SCRATCH"])
EMULATE = bool(os.environ["CHECK_EMULATE"])
_END = time.monotonic() + float(os.environ["CHECK_SECONDS"])


def seconds_left() -> float:
    """Of this stage."""
    return _END - time.monotonic()


def write(name: str, value: Any) -> None:
    """OUT/name.json, whole or not at all."""
    path = OUT / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def read(name: str, otherwise: Any) -> Any:
    """What a stage wrote."""
    path = OUT / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else otherwise
