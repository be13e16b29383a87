"""Text to token ids and back, with the vocabulary that a model's own files hold.

`load_tokenizer(path)` is what users call. core.py has `Tokenizer` itself, from_gguf.py and from_directory.py
build one from what people have, pretokenizers.py is the table of BPE splitting rules, markers.py knows which
tokens end a turn, patterns.py bounds the rules that files bring, spm.py is the SentencePiece side. Imports
errors and the GGUF reader; the `tokenizers` and `sentencepiece` packages do the merging.
"""

from __future__ import annotations

import os

from tinyllm.errors import NotFoundError, located, out_of_memory
from tinyllm.files import user_path
from tinyllm.files.gguf import read_gguf
from tinyllm.tokenizer.core import Tokenizer, TokenStream
from tinyllm.tokenizer.from_gguf import tokenizer_from_gguf

__all__ = ["TokenStream", "Tokenizer", "load_tokenizer", "tokenizer_from_directory", "tokenizer_from_gguf"]


def tokenizer_from_directory(path: str | os.PathLike[str]) -> Tokenizer | None:
    """from_directory.py's, which is imported here: the package `tokenizers` takes long."""
    from tinyllm.tokenizer import from_directory

    return from_directory.tokenizer_from_directory(path)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a GGUF file (also one that holds only a vocabulary) or of a Hugging Face directory.

    Raises NotFoundError when `path` does not exist or is a directory without a tokenizer, FormatError when a
    file is broken or of another kind, UnsupportedError for a kind of tokenizer that tinyllm does not know,
    MemoryLimitError.
    """
    path = user_path(path)
    with out_of_memory(f"loading the tokenizer of {path}"):
        if os.path.isdir(path):
            tokenizer = tokenizer_from_directory(path)
            if tokenizer is None:
                raise NotFoundError(f"{path}: no tokenizer.json and no tokenizer.model in this directory")
            return tokenizer
        metadata = read_gguf(path).metadata
        with located(path):
            return tokenizer_from_gguf(metadata)
