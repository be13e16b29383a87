"""What a model's files say about it, and what running it would take: read from their headers, no weight
touched.

Imports `modelfiles`, `loading` (which formats and sizes weights would get), `llm` (what a call takes),
`backends`, `reasoning`, `chat`, `config`, `tokenizer`, `files` and `errors`. cli/inspect.py prints it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from tinyllm import backends
from tinyllm.backends import CacheType
from tinyllm.chat import reasoning
from tinyllm.chat.templates import ChatTemplate, turn_tokens, without_template
from tinyllm.config import ModelConfig
from tinyllm.engine.needs import call_bytes, call_tokens
from tinyllm.errors import ArgumentError, TemplateError
from tinyllm.files import FORMATS
from tinyllm.loading import MEMORY_SHARE, cache_bytes, fitting_context, kept_formats
from tinyllm.modelfiles import ModelFiles, read_model
from tinyllm.tokenizer import Tokenizer

MAX_PADDING = 1024  # rows of an embedding beyond its vocabulary that are no reason to wonder
_QUESTION, _ANSWER = "What is 2 + 2?", "The answer is 4."


@dataclass(frozen=True)
class Tensor:
    """name: the file's. weight: this project's, with its layer where it has one. shape: numpy's order."""

    name: str
    weight: str
    layer: int | None
    shape: tuple[int, ...]
    format: str
    n_bytes: int


@dataclass(frozen=True)
class Share:
    """What of a model is in one format. bits: of a number, scales included."""

    format: str
    n_tensors: int
    n_numbers: int
    n_bytes: int

    @property
    def bits(self) -> float:
        return 8 * self.n_bytes / self.n_numbers


@dataclass(frozen=True)
class Memory:
    """Bytes that running takes. cache: of one full context. scratch: an estimate, for the largest call.
    free: on this machine now. fitting_context: the longest that fits; 0 where the weights alone do not."""

    weights: int
    cache: int
    scratch: int
    free: int
    context: int
    cache_type: str
    fitting_context: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.scratch


@dataclass(frozen=True)
class Inspection:
    """A model. n_active_parameters: those that a token meets, so of experts as many as it uses. tokenizer and
    template: facts for people, None where there is none."""

    path: str
    kind: str
    n_files: int
    file_bytes: int
    config: ModelConfig
    n_parameters: int
    n_active_parameters: int
    tensors: list[Tensor]
    formats: list[Share]
    tokenizer: dict[str, Any] | None
    template: dict[str, Any] | None
    memory: Memory
    warnings: list[str]

    def record(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        config = {name: value for name, value in asdict(self.config).items() if name != "rope_factors"}
        formats = [{**asdict(share), "bits": round(share.bits, 4)} for share in self.formats]
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {**asdict(self), "config": config, "formats": formats, "memory": memory}


def inspect_model(
    path: str | os.PathLike[str],
    *,
    context: int | None = None,
    cache_type: CacheType = "f16",
    weights: str | None = None,
) -> Inspection:
    """Reads a model's headers. The arguments and the errors are those of `tinyllm.load`; nothing is refused
    for its size."""
    if cache_type not in backends.CACHE_TYPES:
        expected = ", ".join(backends.CACHE_TYPES)
        raise ArgumentError(f"cache_type is {cache_type!r}, expected one of {expected}")
    files = read_model(path)
    tensors = [
        Tensor(info.name, weight, layer, info.shape, FORMATS[info.format].name, info.n_bytes)
        for (weight, layer), info in files.weights.items()
    ]
    paths = {info.path for info in files.weights.values()}
    formats = kept_formats(files.weights, weights, str(files.path))
    memory = plan_memory(
        files.config,
        sum(backends.packed_bytes(files.weights[key].shape, format) for key, format in formats.items()),
        context or files.config.context,
        cache_type,
    )
    c, n_parameters = files.config, sum(math.prod(tensor.shape) for tensor in tensors)
    n_of_experts = sum(math.prod(tensor.shape) for tensor in tensors if "." in tensor.weight)
    return Inspection(
        path=str(files.path),
        kind="GGUF" if files.path.suffix != ".safetensors" and files.path.is_file() else "safetensors",
        n_files=len(paths),
        file_bytes=sum(path.stat().st_size for path in paths),
        config=files.config,
        n_parameters=n_parameters,
        n_active_parameters=n_parameters
        - n_of_experts
        + n_of_experts * c.n_experts_used // max(c.n_experts, 1),
        tensors=tensors,
        formats=list(_shares(tensors)),
        tokenizer=_tokenizer_facts(files),
        template=_template_facts(files.template),
        memory=memory,
        warnings=[*_tokenizer_warnings(files), *_template_warnings(files), *_memory_warnings(memory, c)],
    )


def _shares(tensors: Iterable[Tensor]) -> Iterator[Share]:
    """By format, the largest share first."""
    shares: dict[str, Share] = {}
    for t in tensors:
        share = shares.get(t.format, Share(t.format, 0, 0, 0))
        shares[t.format] = replace(
            share,
            n_tensors=share.n_tensors + 1,
            n_numbers=share.n_numbers + math.prod(t.shape),
            n_bytes=share.n_bytes + t.n_bytes,
        )
    yield from sorted(shares.values(), key=lambda share: -share.n_bytes)


def plan_memory(config: ModelConfig, weight_bytes: int, context: int, cache_type: CacheType) -> Memory:
    """The memory that a model of these weights takes with one full context."""
    scratch, free = (
        call_bytes(config, min(call_tokens(config, weight_bytes), context)),
        backends.free_memory(),
    )
    left = int(MEMORY_SHARE * free) - weight_bytes - scratch
    return Memory(
        weights=weight_bytes,
        cache=cache_bytes(config, cache_type, context),
        scratch=scratch,
        free=free,
        context=context,
        cache_type=cache_type,
        fitting_context=fitting_context(config, cache_type, left),
    )


def _tokenizer_facts(files: ModelFiles) -> dict[str, Any] | None:
    tokenizer = files.tokenizer
    if tokenizer is None:
        return None

    def names(ids: Iterable[int]) -> dict[str, int]:
        return {tokenizer.token_text(i): i for i in sorted(ids) if i < tokenizer.vocab_size}

    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "bos": names([tokenizer.bos_id] if tokenizer.bos_id is not None else []),
        "ends": names(tokenizer.eos_ids | set(files.defaults.eos_ids)),
        "adds_bos": tokenizer.encode("a")[:1] == [tokenizer.bos_id],
        "special_tokens": dict(tokenizer.special_tokens),
    }


def _template_facts(template: ChatTemplate | None) -> dict[str, Any] | None:
    if template is None:
        return None
    marks = [tag for tag in (*reasoning.TAGS, reasoning.CHANNEL) if tag in template.source]
    try:
        variables, example = template.free_variables(), _render(template)
    except TemplateError:
        variables, example = [], None
    return {
        "name": template.name,
        "source": template.source,
        "example": example,
        "variables": variables,
        "takes_tools": bool(template.tool_source) or re.search(r"\btools\b", template.source) is not None,
        "reasoning": marks,
    }


def _render(template: ChatTemplate, *, with_answer: bool = False) -> str:
    messages = [{"role": "user", "content": _QUESTION}]
    if with_answer:
        messages.append({"role": "assistant", "content": _ANSWER})
    return template.render(messages, add_generation_prompt=not with_answer)


def _tokenizer_warnings(files: ModelFiles) -> Iterator[str]:
    tokenizer, rows = files.tokenizer, files.config.vocab_size
    if tokenizer is None:
        yield "no tokenizer: this model takes and gives ids, not text"
        return
    n = tokenizer.vocab_size
    if n > rows:
        yield f"the tokenizer has {n} tokens, the model {rows}: ids from {rows} on cannot be used"
    elif rows - n > MAX_PADDING:
        yield f"the model has {rows} tokens, its tokenizer only {n}: is it another model's?"
    if tokenizer.bos_id is not None and tokenizer.encode("a")[:2] == [tokenizer.bos_id] * 2:
        yield f"texts begin with {tokenizer.token_text(tokenizer.bos_id)} twice, as the files have it"
    if not tokenizer.eos_ids and not files.defaults.eos_ids:
        yield "no token ends a text: generation goes on until max_tokens or the context is full"


def _template_warnings(files: ModelFiles) -> Iterator[str]:
    tokenizer, template = files.tokenizer, files.template
    if tokenizer is None:
        return
    if template is None:
        if turn_tokens(tokenizer.special_tokens):
            yield (
                f"no chat template: {without_template(tokenizer.special_tokens)}; where its makers publish a "
                "template, pass it with --chat-template"
            )
        return
    try:
        prompt = _render(template)
    except TemplateError as error:
        yield f"a plain question does not render: {error}"
        return
    bos = tokenizer.bos_id
    if bos is not None:
        begins = tokenizer.encode(prompt, bos=False, special=True)[:2]
        if begins == [bos, bos]:
            yield f"the chat template writes {tokenizer.token_text(bos)} twice"
    end = _end_of_turn(template, tokenizer)
    if end is not None and end not in tokenizer.eos_ids | set(files.defaults.eos_ids):
        yield (
            f"the chat template ends an answer with {tokenizer.token_text(end)}, which does not end "
            f"generation here; pass --stop {tokenizer.token_text(end)!r}"
        )


def _end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The special token that the template puts right after an answer, if it does."""
    try:
        _, found, rest = _render(template, with_answer=True).rpartition(_ANSWER)
    except TemplateError:
        return None
    ids = tokenizer.encode(rest.lstrip(), bos=False, special=True)[:1] if found and rest.strip() else []
    return ids[0] if ids and ids[0] in tokenizer.special_ids else None


def _memory_warnings(memory: Memory, config: ModelConfig) -> Iterator[str]:
    if memory.context > config.covered_context:
        yield f"a context of {memory.context} is more than the {config.covered_context} it was trained for"
    if memory.fitting_context == 0:
        yield "the weights do not fit into this machine's free memory"
    elif memory.fitting_context < memory.context:
        yield f"a context of {memory.context} does not fit into this machine's free memory"
