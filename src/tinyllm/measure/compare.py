"""Which quantization should I use? Size, memory, speed and quality of several models, a row each.

Speed is benchmark.py's, quality is quality.py's; here is what brings them together: which model is the
reference, and how many are in memory at once. Imports benchmark, quality, loading, mixes, llm, backends
and errors; prints nothing. cli/compare.py prints the rows, cli/plot.py draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tinyllm import backends
from tinyllm.errors import ArgumentError
from tinyllm.llm import LLM
from tinyllm.loading import load
from tinyllm.measure import benchmark
from tinyllm.measure.benchmark import Case, Facts, Progress, Result
from tinyllm.measure.quality import Quality, require_same_vocabulary, text_windows
from tinyllm.measure.quality import measure as measure_quality
from tinyllm.quantization.mixes import key_of

MEMORY_SHARE = 0.5  # of the free memory, that models which are measured in turns may take


@dataclass(frozen=True)
class Candidate:
    """A model to compare: a path, and what its float weights are quantized to while loading, or None."""

    path: str
    weights: str | None = None

    @property
    def label(self) -> str:
        """A short name: the format, or the file's."""
        return self.weights or Path(self.path).name


def candidates(paths: Sequence[str], types: Sequence[str] = ()) -> list[Candidate]:
    """The models at `paths`, each once; with `types`, the one model there as it is and quantized to each.
    Types go by their keys in MIXES, so one that has two names is one.

    Raises ArgumentError for types with several models, unknown ones, and for nothing to compare.
    """
    if types and len(paths) != 1:
        raise ArgumentError(f"types are made of one float model; there are {len(paths)} models")
    found = [*(Candidate(path) for path in paths), *(Candidate(paths[0], key_of(type)) for type in types)]
    found = list(dict.fromkeys(found))
    if len(found) < 2:
        raise ArgumentError("one model alone has nothing to be compared with; give more models, or types")
    return found


@dataclass(frozen=True)
class Row:
    """What is known of a candidate. results: of each case, in their order. quality: None without a text.
    is_reference: the others are compared with it.
    """

    candidate: Candidate
    facts: Facts
    results: list[Result]
    quality: Quality | None
    is_reference: bool

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors, norms and what stays float included."""
        return 8 * self.facts.size_bytes / self.facts.n_params

    def record(self) -> dict[str, Any]:
        """The row as plain values: prefill and decode are `Result.record`s, quality `Quality` as a dict."""
        records = [result.record() for result in self.results]
        perplexity = self.quality and asdict(self.quality.perplexity)
        return {
            "model": self.candidate.label,
            "path": self.candidate.path,
            "weights": self.candidate.weights,
            "is_reference": self.is_reference,
            "kind": self.facts.kind,
            "size_bytes": self.facts.size_bytes,
            "n_params": self.facts.n_params,
            "bits_per_weight": self.bits_per_weight,
            "load_s": self.results[0].load_s,
            "peak_memory_bytes": self.results[0].peak_memory_bytes,
            "prefill": next((r for r in records if r["n_prompt"]), None),
            "decode": next((r for r in records if r["n_gen"]), None),
            "perplexity": perplexity,
            "quality": self.quality and asdict(self.quality),
        }


def compare(
    of: Sequence[Candidate],
    cases: Sequence[Case],
    text: str | None = None,
    *,
    n_ctx: int | None = None,
    most_windows: int | None = None,
    repetitions: int = 5,
    read_bytes: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Row]:
    """Measures every candidate: a row each, in their order.

    cases: what to time (`benchmark.cases`). text: what to measure quality on; None: no quality. n_ctx,
    most_windows: as `text_windows` takes them. repetitions, read_bytes, device: as `benchmark.measure` takes
    them; quality is measured on the same device.
    progress: (what, done, total). The reference is the largest model, the first of several: of quantizations
    of one model, the float one. Models take turns where all fit into half of the free memory; else each is
    loaded for itself, and for quality beside the reference.

    Raises what `benchmark.measure` and `quality.measure` do, and ArgumentError for models that do not share
    a vocabulary.
    """
    facts = [benchmark.read_facts(c.path, c.weights) for c in of]
    reference = max(range(len(of)), key=lambda i: facts[i].size_bytes)
    fits = sum(fact.size_bytes for fact in facts) < MEMORY_SHARE * backends.free_memory()
    results: dict[Candidate, list[Result]] = {}
    for group in [list(of)] if fits else [[c] for c in of]:
        measured = benchmark.measure(
            [c.path for c in group],
            cases,
            weights=[c.weights for c in group],
            device=device,
            repetitions=repetitions,
            read_bytes=read_bytes,
            progress=progress,
        )
        for i, candidate in enumerate(group):
            results[candidate] = measured[i :: len(group)]
    qualities: Mapping[Candidate, Quality] = {}
    if text is not None:
        others = [c for i, c in enumerate(of) if i != reference]
        first = cases[0]
        settings: dict[str, Any] = {
            "threads": first.threads,
            "cache_type": first.cache_type,
            "device": device,
        }
        on = _Text(text, n_ctx, most_windows)
        qualities = _qualities(
            of[reference], [others] if fits else [[c] for c in others], on, settings, progress
        )
    return [
        Row(c, fact, results[c], qualities.get(c), is_reference=i == reference)
        for i, (c, fact) in enumerate(zip(of, facts, strict=True))
    ]


@dataclass(frozen=True)
class _Text:
    text: str
    n_ctx: int | None
    most: int | None


def _qualities(
    reference: Candidate,
    groups: Sequence[Sequence[Candidate]],
    on: _Text,
    settings: Mapping[str, Any],
    progress: Progress | None,
) -> dict[Candidate, Quality]:
    """Of the reference, which is loaded once, and the candidates, a group in memory at a time."""
    found: dict[Candidate, Quality] = {}
    with ExitStack() as stack:

        def tell(what: str, done: int, total: int) -> None:
            if progress is not None:
                progress(what, done, total)

        def open(candidate: Candidate, on_stack: ExitStack) -> LLM:
            llm = load(
                candidate.path,
                weights=candidate.weights,
                context=on.n_ctx,
                progress=partial(tell, f"loading {candidate.label}"),
                **settings,
            )
            return on_stack.enter_context(llm)

        best = open(reference, stack)
        windows = text_windows(best, on.text, on.n_ctx, most=on.most)
        for group in groups:
            with ExitStack() as for_group:
                models = [best]
                for candidate in group:
                    models.append(open(candidate, for_group))
                    require_same_vocabulary(best, models[-1])
                qualities = measure_quality(
                    models, windows, progress=lambda done, total, nll: tell("quality", done, total)
                )
                found |= zip([reference, *group], qualities, strict=True)
    return found
