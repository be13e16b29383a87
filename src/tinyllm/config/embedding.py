"""What a model's files say of vectors of texts and of scores of pairs: GGUF's pooling_type, and what
sentence-transformers writes.

Imports `fields` and `errors`. Read next: engine/embedding.py, which pools, and engine/heads.py, which does
what stands behind that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from tinyllm.config.fields import Fields, brief
from tinyllm.errors import FormatError

Pooling = Literal["mean", "last", "cls", "max", "weightedmean", "mean_sqrt_len_tokens"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

Activation = Literal["identity", "tanh", "relu"]

_NAMES: dict[str, Pooling] = {  # sentence-transformers'
    "lasttoken": "last", **{name: name for name in POOLINGS if name != "last"},
}  # fmt: skip
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # of its older files
_ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
}
_INSTEAD = f"pass pooling= ({', '.join(POOLINGS)}) for vectors without it"
_RERANKER = "it is a reranker, which gives scores of texts (rerank)"


@dataclass(frozen=True)
class DenseStep:
    """A linear layer that stands behind the pooling: its numbers are in the directory `path`."""

    path: str
    n_in: int
    n_out: int
    bias: bool
    activation: Activation


@dataclass(frozen=True)
class EmbeddingDefaults:
    """What a model's makers say of the vectors of texts.

    pooling: of the tokens' vectors, None where nothing is said. dense: what a directory has behind it.
    normalize: to length 1. instruction: what goes before every text that has none of its own; prompts: such
    texts by name. pools_instruction: whether its tokens are pooled too. max_tokens: where their tools cut a
    text. labels: of a reranker, the tokens (ids, or as the vocabulary spells them) whose logits say yes and
    no, or the rows of its head; judges: its prompt, with {query} and {document}, "" where its chat template
    makes it. refused: why vectors cannot be made, "" where they can.
    """

    pooling: Pooling | None = None
    dense: tuple[DenseStep, ...] = ()
    normalize: bool = False
    instruction: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    pools_instruction: bool = True
    max_tokens: int | None = None
    labels: tuple[int | str, int | str] | None = None
    judges: str = ""
    refused: str = ""


WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
# As the makers of Qwen3-Reranker publish it, and as llama.cpp's converter writes it.
_QWEN3_JUDGES = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    f"<Instruct>: {WEB_SEARCH}\n<Query>: {{query}}\n<Document>: {{document}}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
# Of a directory that has nothing of sentence-transformers'.
QWEN3_RERANKER = EmbeddingDefaults(
    labels=("yes", "no"), judges=_QWEN3_JUDGES, refused=f"{_RERANKER}; {_INSTEAD}"
)


def embedding_from_gguf(metadata: Mapping[str, Any]) -> EmbeddingDefaults:
    """From the architecture's pooling_type: llama.cpp's numbers, -1 where nothing is said. Of a reranker the
    labels are the rows of its head, as classifier.output_labels names them."""
    fields = Fields(metadata, f"{metadata.get('general.architecture')}.")
    value = fields.whole("pooling_type", -1)
    known: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}
    refused = {
        0: f"its file says pooling_type 0: a vector a token, where embed gives one a text; {_INSTEAD}",
        4: "its file says pooling_type 4, a reranker, without classifier.output_labels yes and no, which is "
        f"not supported; {_INSTEAD}",
    }
    if value not in (-1, *known, *refused):
        raise FormatError(f"{fields.prefix}pooling_type is {value}; there are 0 to 4")
    names = fields.get("classifier.output_labels") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        fields.wrong("classifier.output_labels", names, "a list of texts")
    is_judge = value == 4 and sorted(names) == ["no", "yes"]
    judges = metadata.get("tokenizer.chat_template.rerank", _QWEN3_JUDGES)
    if not isinstance(judges, str) or not all(f"{{{name}}}" in judges for name in ("query", "document")):
        raise FormatError("tokenizer.chat_template.rerank is no text with {query} and {document}")
    return EmbeddingDefaults(
        pooling=known.get(value),
        labels=(names.index("yes"), names.index("no")) if is_judge else None,
        judges=judges if is_judge else "",
        refused=f"{_RERANKER}; {_INSTEAD}" if is_judge else refused.get(value, ""),
    )


def embedding_to_gguf(defaults: EmbeddingDefaults) -> dict[str, Any]:
    """The keys, without the architecture that opens each, that say as much of it as GGUF can."""
    numbers = {"mean": 1, "cls": 2, "last": 3}
    return {"pooling_type": numbers[defaults.pooling]} if defaults.pooling in numbers else {}


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
        elif steps[-1] == "Dense":
            found = _dense(found, Fields(read(f"{path}/config.json")), path)
        elif steps[-1] == "Normalize":
            found = replace(found, normalize=True)
        elif steps[-1] == "LogitScore":
            found = _labels(found, Fields(read(f"{path}/config.json")), path)
        else:
            found = _refuse(found, f"modules.json has a step {brief(kind)}, which is not supported")
    behind = [step for step in steps[2:] if step != "Dense"]
    in_order = steps[:2] == ["Transformer", "Pooling"] and behind in ([], steps[-1:])
    if steps == ["Transformer", "LogitScore"]:
        found = _refuse(found, _RERANKER)
    elif not in_order or steps.count("Normalize") != len(behind):
        found = replace(
            _refuse(found, f"modules.json has the steps {brief(', '.join(steps))}"), dense=(), labels=None
        )
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


def _dense(found: EmbeddingDefaults, fields: Fields, path: str) -> EmbeddingDefaults:
    name = fields.get("activation_function") or "torch.nn.modules.activation.Tanh"
    reads, writes = fields.get("module_input_name"), fields.get("module_output_name")
    if name not in _ACTIVATIONS:
        return _refuse(found, f"{path}/config.json has activation_function {brief(name)}, not supported")
    if fields.flag("use_residual", False) or {reads, writes} - {None, "sentence_embedding"}:
        return _refuse(
            found, f"{path}/config.json asks for use_residual, or another input or output: not supported"
        )
    n_in, n_out = fields.whole("in_features"), fields.whole("out_features")
    step = DenseStep(path, n_in, n_out, fields.flag("bias", True), _ACTIVATIONS[name])
    return replace(found, dense=(*found.dense, step))


def _labels(found: EmbeddingDefaults, fields: Fields, path: str) -> EmbeddingDefaults:
    """The tokens between whose logits a reranker decides."""
    if fields.get("false_token_id") is None:
        return _refuse(found, f"{path}/config.json has no false_token_id: such scores are not supported")
    return replace(found, labels=(fields.whole("true_token_id"), fields.whole("false_token_id")))


def _prompts(found: EmbeddingDefaults, fields: Fields) -> EmbeddingDefaults:
    prompts, default = fields.get("prompts") or {}, fields.get("default_prompt_name")
    texts = isinstance(prompts, dict) and all(isinstance(text, str) for text in prompts.values())
    if not texts or (default is not None and (not isinstance(default, str) or default not in prompts)):
        raise FormatError(
            f"config_sentence_transformers.json: prompts {brief(prompts)} must be texts by name, and "
            f"default_prompt_name, {brief(default)}, one of the names"
        )
    return replace(found, prompts=prompts, instruction="" if default is None else prompts[default])
