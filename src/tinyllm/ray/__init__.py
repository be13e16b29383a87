"""More than one machine: Ray places, restarts and feeds; tinyllm computes, the same bits as on one.

Three needs, a file each: many prompts (data.py), one model larger than a machine (stages.py), many users
(replicas.py). cluster.py is what they share. Nothing here schedules, discovers or watches by itself. Imports
`batch`, `pipeline`, `server`; Ray (the extra `ray`) when it is first used.

    answers = tinyllm.ray.generate(ray.data.read_json("prompts.jsonl"), "model.gguf", workers=8)
    llm = tinyllm.ray.load("model.gguf", stages=4)
    serve.run(tinyllm.ray.application("model.gguf", replicas=(2, 8)))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllm.ray.data import Generator, generate, generate_file
    from tinyllm.ray.replicas import application
    from tinyllm.ray.stages import load

__all__ = ["Generator", "application", "generate", "generate_file", "load"]

_HOMES = {
    "Generator": "data",
    "application": "replicas",
    "generate": "data",
    "generate_file": "data",
    "load": "stages",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
