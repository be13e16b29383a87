"""llama-cpp-python's high-level interface over tinyllm: a program changes its import and nothing else.

    from tinyllm.llama_cpp import Llama, LlamaGrammar  # was: from llama_cpp import ...

Names, arguments, defaults and the dicts that come back are those of llama-cpp-python 0.3.36; its submodules
have the same names here (llama_chat_format, llama_grammar, llama_tokenizer, ...). The low level, ctypes over
llama.h, is not here. docs/llama_cpp.md says what differs. Invariant: what an argument asks for is done, or
refused or warned of by its name. Imports `tinyllm` alone. Read next: llama.py.
"""

from __future__ import annotations

from tinyllm.llama_cpp import constants
from tinyllm.llama_cpp.constants import *  # noqa: F403
from tinyllm.llama_cpp.llama import (
    Llama,
    LogitsProcessor,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from tinyllm.llama_cpp.llama_cache import BaseLlamaCache, LlamaCache, LlamaRAMCache
from tinyllm.llama_cpp.llama_grammar import LlamaGrammar
from tinyllm.llama_cpp.llama_tokenizer import BaseLlamaTokenizer, LlamaHFTokenizer, LlamaTokenizer
from tinyllm.llama_cpp.state import LlamaState

__all__ = [
    "BaseLlamaCache",
    "BaseLlamaTokenizer",
    "Llama",
    "LlamaCache",
    "LlamaGrammar",
    "LlamaHFTokenizer",
    "LlamaRAMCache",
    "LlamaState",
    "LlamaTokenizer",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "StoppingCriteria",
    "StoppingCriteriaList",
]
__all__ += constants.__all__

__version__ = "0.3.36"  # of the interface that this one follows
