"""The table of model families in docs/families.md: for each the largest error against transformers' logits.

`python tests/families_table.py` prints it as Markdown; tests/test_families.py checks that the page has it.
The figures are the same on every machine, as the logits' bits are."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from helpers_gguf import write_gguf
from helpers_models import GOLDEN_DIR, Spec, golden_model, golden_specs, random_ids, random_weights

import tinyllm
from tinyllm.config.families import FAMILIES

# The golden models that stand for a family; by its model_type, the others are named by their specs.
FILES = {"specs": "logits.npz", "families": "families.npz"}


def logits(spec: Spec, path: Path) -> npt.NDArray[np.float32]:
    """The golden prompt's logits, float32 [n_tokens, vocab_size], with a float32 cache."""
    with tinyllm.load(path, device="cpu", cache_type="f32", context=spec.context) as llm:
        return llm.logits(random_ids(spec.config, spec.seed, spec.n_tokens))


def relative(values: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Largest difference, relative to the largest expected logit."""
    return float(np.abs(values - expected).max() / np.abs(expected).max())


def error(spec: Spec, path: Path) -> float:
    """Of a model's logits relative to transformers'."""
    for file in FILES.values():
        goldens = np.load(GOLDEN_DIR / file)
        if spec.name + ".logits" in goldens:
            return relative(
                logits(spec, path)[goldens[spec.name + ".positions"]], goldens[spec.name + ".logits"]
            )
    raise KeyError(spec.name)


def errors(spec: Spec) -> tuple[float, float | None]:
    """From safetensors, and from GGUF, where there are such."""
    from_gguf = None
    with tempfile.TemporaryDirectory() as folder:
        from_hf = error(spec, golden_model(spec, Path(folder) / "hf"))
        if spec.in_gguf:
            path = Path(folder) / "model.gguf"
            write_gguf(path, spec.config, random_weights(spec.config, spec.seed))
            from_gguf = error(spec, path)
    return from_hf, from_gguf


def table() -> str:
    found: dict[str, list[tuple[float | None, float | None]]] = {}
    for file in FILES:
        for spec in golden_specs(file):
            found.setdefault(spec.config["model_type"], []).append(errors(spec))
    rows = ["| family | `model_type` | error from safetensors | from GGUF |", "| --- | --- | ---: | ---: |"]
    for kind, family in FAMILIES.items():
        if kind in found:
            columns = [[e for e in column if e is not None] for column in zip(*found[kind], strict=True)]
            hf, gguf = (f"{max(column):.0e}" if column else "" for column in columns)
            rows.append(f"| {family.title} | {kind} | {hf} | {gguf} |")
        elif family.text_of:
            rows.append(f"| {family.title} | {kind} | as {family.text_of} | |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
