"""tinyllm: run open language models (Llama family, quantized or not) from GGUF and safetensors files.

    import tinyllm
    llm = tinyllm.load("stories")
    print(llm("Once upon a time", max_tokens=100))

What users import is here; loading.py and llm.py are the interface behind it. Importing opens no file and no
connection; only names that begin with "hf:" ever open one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tinyllm.errors import (
    ArgumentError,
    CancelledError,
    ConstraintError,
    ContextError,
    Error,
    FormatError,
    LostError,
    MemoryLimitError,
    ModelClosedError,
    NotFoundError,
    ReadError,
    TemplateError,
    UnsupportedError,
    WriteError,
)

if TYPE_CHECKING:
    from tinyllm.backends import info
    from tinyllm.backends import version as __version__
    from tinyllm.engine.engine import Piece
    from tinyllm.engine.sampling import SamplingParams
    from tinyllm.hub import pull
    from tinyllm.llm import LLM, Session
    from tinyllm.loading import load
    from tinyllm.quantization import quantize
    from tinyllm.results import Completion, Score
    from tinyllm.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "LLM",
    "ArgumentError",
    "CancelledError",
    "Completion",
    "ConstraintError",
    "ContextError",
    "Error",
    "FormatError",
    "LostError",
    "MemoryLimitError",
    "ModelClosedError",
    "NotFoundError",
    "Piece",
    "ReadError",
    "SamplingParams",
    "Score",
    "Session",
    "TemplateError",
    "Tokenizer",
    "UnsupportedError",
    "WriteError",
    "__version__",
    "info",
    "load",
    "load_tokenizer",
    "pull",
    "quantize",
]

# Where the other names live: imported when first used, so that `import tinyllm` is quick.
_HOMES = {
    "LLM": "llm",
    "Completion": "results",
    "Piece": "engine.engine",
    "SamplingParams": "engine.sampling",
    "Score": "results",
    "Session": "llm",
    "Tokenizer": "tokenizer",
    "info": "backends",
    "load": "loading",
    "load_tokenizer": "tokenizer",
    "pull": "hub",
    "quantize": "quantization",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())  # else Python prints what nobody listens to


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        return import_module(".backends", __name__).version
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
