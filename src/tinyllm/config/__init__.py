"""What a model's files say of its arithmetic, of sampling and of vectors of texts, as three dataclasses.

`ModelConfig` (model.py) is what everything above reads; from_json.py and from_gguf.py make it by the rows of
families.py. `GenerationDefaults` (generation.py) and `EmbeddingDefaults` (embedding.py) are what a model's
makers advise. A feature that a file asks for and that is not known is refused, never ignored. Imports
`errors` alone.
"""

from tinyllm.config.embedding import (
    POOLINGS,
    QWEN3_RERANKER,
    Activation,
    EmbeddingDefaults,
    Pooling,
    embedding_from_gguf,
    embedding_from_modules,
    embedding_to_gguf,
)
from tinyllm.config.from_gguf import GGUF_KEYS, config_from_gguf, config_to_gguf
from tinyllm.config.from_json import config_from_json
from tinyllm.config.generation import (
    ADVISED_COUNTS,
    ADVISED_RANGES,
    GenerationDefaults,
    generation_from_gguf,
    generation_from_json,
    generation_to_gguf,
)
from tinyllm.config.model import DeltaSizes, ModelConfig

__all__ = [
    "ADVISED_COUNTS",
    "ADVISED_RANGES",
    "GGUF_KEYS",
    "POOLINGS",
    "QWEN3_RERANKER",
    "Activation",
    "DeltaSizes",
    "EmbeddingDefaults",
    "GenerationDefaults",
    "ModelConfig",
    "Pooling",
    "config_from_gguf",
    "config_from_json",
    "config_to_gguf",
    "embedding_from_gguf",
    "embedding_from_modules",
    "embedding_to_gguf",
    "generation_from_gguf",
    "generation_from_json",
    "generation_to_gguf",
]
