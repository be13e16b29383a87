"""What a model's files say of vectors of texts: GGUF's pooling_type, and what sentence-transformers writes.

Imports `fields` and `errors`. Read next: engine/embedding.py, which pools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from tinyllm.config.fields import Fields, brief
from tinyllm.errors import FormatError

Pooling = Literal["mean", "last", "cls"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

_NAMES: dict[str, Pooling] = {"mean": "mean", "lasttoken": "last", "cls": "cls"}  # sentence-transformers'
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # of its older files
_INSTEAD = f"pass pooling= ({', '.join(POOLINGS)}) for vectors without it"


@dataclass(frozen=True)
class EmbeddingDefaults:
    """What a model's makers say of the vectors of texts.

    pooling: of the tokens' vectors, None where nothing is said. normalize: to length 1. instruction: what
    goes before every text that has none of its own; prompts: such texts by name. pools_instruction: whether
    its tokens are pooled too. max_tokens: where their tools cut a text. refused: why such vectors cannot be
    made, "" where they can.
    """

    pooling: Pooling | None = None
    normalize: bool = False
    instruction: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    pools_instruction: bool = True
    max_tokens: int | None = None
    refused: str = ""


def embedding_from_gguf(metadata: Mapping[str, Any]) -> EmbeddingDefaults:
    """From the architecture's pooling_type: llama.cpp's numbers, -1 where nothing is said."""
    fields = Fields(metadata, f"{metadata.get('general.architecture')}.")
    value = fields.whole("pooling_type", -1)
    known: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}
    refused = {
        0: f"its file says pooling_type 0: a vector a token, where embed gives one a text; {_INSTEAD}",
        4: "its file says pooling_type 4: a reranker, whose scores of pairs of texts are not supported; "
        + _INSTEAD,
    }
    if value not in (-1, *known, *refused):
        raise FormatError(f"{fields.prefix}pooling_type is {value}; there are 0 to 4")
    return EmbeddingDefaults(pooling=known.get(value), refused=refused.get(value, ""))


def embedding_to_gguf(defaults: EmbeddingDefaults) -> dict[str, Any]:
    """The keys, without the architecture that opens each, that say as much of it as GGUF can."""
    return {"pooling_type": {"mean": 1, "cls": 2, "last": 3}[defaults.pooling]} if defaults.pooling else {}


def embedding_from_modules(modules: Any, read: Callable[[str], Mapping[str, Any]]) -> EmbeddingDefaults:
    """From what modules.json holds, a list of steps; `read` gives a JSON file of the directory by its path,
    {} where there is none. Raises FormatError for what is no such list."""
    found = EmbeddingDefaults()
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise FormatError("modules.json is no list of objects")
    steps: list[str] = []
    for module in modules:
        kind, path = module.get("type"), module.get("path", "")
        if not isinstance(kind, str) or not isinstance(path, str) or {"/", "\\"} & set(path) or ".." in path:
            raise FormatError(f"modules.json: {brief(module)} is no module with a type and a plain path")
        steps.append(kind.rpartition(".")[2])
        if steps[-1] == "Transformer":
            found = _transformer(found, read(f"{path}/sentence_bert_config.json".lstrip("/")))
        elif steps[-1] == "Pooling":
            found = _pooling(found, read(f"{path}/config.json"), path)
        elif steps[-1] == "Normalize":
            found = replace(found, normalize=True)
        else:
            found = _refuse(found, f"modules.json has a step {brief(kind)}, which is not supported")
    if steps[:2] != ["Transformer", "Pooling"] or steps[2:] not in ([], ["Normalize"]):
        found = _refuse(found, f"modules.json has the steps {brief(', '.join(steps))}")
    return _prompts(found, Fields(read("config_sentence_transformers.json")))


def _refuse(found: EmbeddingDefaults, why: str) -> EmbeddingDefaults:
    return found if found.refused else replace(found, refused=f"{why}; {_INSTEAD}")


def _transformer(found: EmbeddingDefaults, settings: Mapping[str, Any]) -> EmbeddingDefaults:
    fields = Fields(settings)
    if fields.flag("do_lower_case", False):
        found = _refuse(found, "sentence_bert_config.json says do_lower_case, which is not supported")
    return replace(found, max_tokens=fields.whole("max_seq_length", 0) or None)


def _pooling(found: EmbeddingDefaults, table: Mapping[str, Any], path: str) -> EmbeddingDefaults:
    """One mode or several, as a name, a list, or flags."""
    modes = table.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in _FLAGS.items() if table.get(key)] or ["mean"]
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in _NAMES:
        shown = brief(", ".join(map(str, modes)))
        return _refuse(found, f"{path}/config.json has the pooling {shown}, which is not supported")
    return replace(
        found, pooling=_NAMES[modes[0]], pools_instruction=table.get("include_prompt") is not False
    )


def _prompts(found: EmbeddingDefaults, fields: Fields) -> EmbeddingDefaults:
    prompts, default = fields.get("prompts") or {}, fields.get("default_prompt_name")
    texts = isinstance(prompts, dict) and all(isinstance(text, str) for text in prompts.values())
    if not texts or (default is not None and (not isinstance(default, str) or default not in prompts)):
        raise FormatError(
            f"config_sentence_transformers.json: prompts {brief(prompts)} must be texts by name, and "
            f"default_prompt_name, {brief(default)}, one of the names"
        )
    return replace(found, prompts=prompts, instruction="" if default is None else prompts[default])
