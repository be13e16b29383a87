"""What a model's files say of its arithmetic and of sampling, as two dataclasses.

`ModelConfig` (model.py) is what everything above reads; from_json.py and from_gguf.py make it by the rows of
families.py. `GenerationDefaults` (generation.py) is what a model's makers advise. A feature that a file asks
for and that is not known is refused, never ignored. Imports `errors` alone.
"""

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
from tinyllm.config.model import ModelConfig

__all__ = [
    "ADVISED_COUNTS",
    "ADVISED_RANGES",
    "GGUF_KEYS",
    "GenerationDefaults",
    "ModelConfig",
    "config_from_gguf",
    "config_from_json",
    "config_to_gguf",
    "generation_from_gguf",
    "generation_from_json",
    "generation_to_gguf",
]
