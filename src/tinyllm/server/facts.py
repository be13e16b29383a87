"""What the files of a served model say of it, for clients that list and show models.

Invariant: headers are read and no weight, once a path; nothing that comes out holds a path. Imports
modelfiles, config, chat and files.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tinyllm.chat.reasoning import CHANNEL, TAGS
from tinyllm.chat.templates import ChatTemplate
from tinyllm.config import ModelConfig
from tinyllm.errors import TemplateError
from tinyllm.files import FORMATS
from tinyllm.modelfiles import read_model

THINKING = ("enable_thinking", "reasoning_effort", "thinking")  # variables of templates


@dataclass(frozen=True)
class Facts:
    """format: "gguf" or "safetensors". quantization: the format that most of the numbers are in. modified:
    seconds since 1970. digest: of all that the headers say, in hexadecimal.
    defaults: sampling parameters that the files advise. capabilities: "completion", "embedding"."""

    format: str
    config: ModelConfig
    n_parameters: int
    quantization: str
    n_bytes: int
    modified: float
    digest: str
    template: ChatTemplate | None
    defaults: Mapping[str, Any]
    capabilities: tuple[str, ...]


@functools.lru_cache(maxsize=1024)
def facts_of(path: str) -> Facts:
    """Of a path that `tinyllm.load` takes, whose errors it raises. It takes a moment the first time."""
    files = read_model(path)
    sizes: Counter[str] = Counter()
    for info in files.weights.values():
        sizes[FORMATS[info.format].name] += math.prod(info.shape)
    stats = [path.stat() for path in sorted({info.path for info in files.weights.values()})]
    tensors = [(info.name, info.shape, info.format) for info in files.weights.values()]
    capabilities = ["completion"] if files.has_output else []
    embeds = files.embedding.pooling or not (files.has_output or files.heads.labels)
    capabilities += ["embedding"] if embeds else []
    source = files.template and (files.template.source, files.template.tool_source)
    said = repr((files.config, tensors, source, [stat.st_size for stat in stats]))
    defaults = {name: value for name, value in asdict(files.defaults).items() if value not in (None, ())}
    return Facts(
        format="gguf" if files.path.is_file() and files.path.suffix != ".safetensors" else "safetensors",
        config=files.config,
        n_parameters=sizes.total(),
        quantization=sizes.most_common(1)[0][0],
        n_bytes=sum(stat.st_size for stat in stats),
        modified=max(stat.st_mtime for stat in stats),
        digest=hashlib.sha256(said.encode()).hexdigest(),
        template=files.template,
        defaults={name: value for name, value in defaults.items() if name != "eos_ids"},
        capabilities=tuple(capabilities),
    )


def can_do(template: ChatTemplate | None) -> list[str]:
    """What a chat template is good for: "tools", "thinking"."""
    if template is None:
        return []
    source = template.source + (template.tool_source or "")
    try:
        names = template.names(template.source)
    except TemplateError:  # a broken one refuses every conversation anyway
        names = frozenset()
    has_tools = template.tool_source is not None or "tools" in names
    thinks = any(name in names for name in THINKING) or any(tag in source for tag in (*TAGS, CHANNEL))
    return ["tools"] * has_tools + ["thinking"] * thinks
