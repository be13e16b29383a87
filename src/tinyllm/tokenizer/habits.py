"""What people who know transformers' tokenizers type: `tokenizer(texts)`, `batch_decode`,
`apply_chat_template` and their like, on tinyllm's tokenizer. docs/transformers.md has them all.

Names and defaults are those of transformers 5.24; a tensor is a numpy array. Imports errors. core.py's
`Tokenizer` inherits them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tinyllm.errors import ArgumentError, UnsupportedError, integer


class BatchEncoding(dict[str, Any]):
    """input_ids and attention_mask (1 for a token, 0 for padding), under these keys and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r}, only {', '.join(self)}") from None


class Vocabulary(Protocol):
    """What the habits are made of; `Tokenizer` is one."""

    special_tokens: dict[str, int]
    special_ids: frozenset[int]
    eos_id: int | None
    _tokens: Sequence[str]
    _prefix: list[int]
    _suffix: list[int]
    _model: weakref.ref[Any] | None

    def encode(self, text: str, bos: bool | None = None, special: bool = False) -> list[int]: ...

    def decode(self, ids: Any, special: bool = False, *, skip_special_tokens: bool | None = None) -> str: ...

    def id_of(self, text: str) -> int | None: ...

    def _index(self, token: int) -> int: ...

    @property
    def pad_token_id(self) -> int: ...


class Habits:
    """The methods that `Tokenizer` gets. A model binds itself, for its chat template."""

    _model: weakref.ref[Any] | None = None

    def bind(self, model: Any) -> None:
        """`apply_chat_template` is this model's from now on; it is not kept alive."""
        self._model = weakref.ref(model)

    @property
    def pad_token_id(self: Vocabulary) -> int:
        """What fills short rows: the vocabulary's padding token, else its end of text, else 0."""
        found = [self.special_tokens.get(text) for text in ("<pad>", "<|pad|>", "[PAD]", "<|endoftext|>")]
        known = [*found[:3], self.eos_id, found[3]]
        return next((token for token in known if token is not None), 0)

    def __call__(
        self: Vocabulary,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        padding_side: str = "right",
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """The ids of a text, or of several: {"input_ids": ..., "attention_mask": ...}, lists of ints.

        As with transformers the texts of special tokens mean these tokens (`encode` takes them for text).
        add_special_tokens: with what the files put around a text. padding: True or "longest", "max_length".
        truncation: a text of more than max_length tokens is cut. return_tensors: "np" for int64 arrays
        [texts, tokens]. Raises ArgumentError for rows of different lengths then, and unknown choices.
        """
        texts = [text] if isinstance(text, str) else list(text)
        around = len(self._prefix) + len(self._suffix) if add_special_tokens else 0
        rows = []
        for one in texts:
            ids = self.encode(one, bos=False, special=True)
            if truncation and max_length is not None:
                ids = ids[: max(0, integer("max_length", max_length, 0, 2**31) - around)]
            rows.append([*self._prefix, *ids, *self._suffix] if add_special_tokens else ids)
        encoding = padded(rows, self.pad_token_id, padding, max_length, padding_side, return_tensors)
        if isinstance(text, str) and return_tensors is None:
            return BatchEncoding({name: value[0] for name, value in encoding.items()})
        return encoding

    def batch_decode(
        self: Vocabulary, sequences: Iterable[Any], skip_special_tokens: bool = False
    ) -> list[str]:
        """The text of each of several rows of ids. skip_special_tokens: leaves special tokens out."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in sequences]

    def convert_ids_to_tokens(self: Vocabulary, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Tokens as the vocabulary spells them ("Ġthe", "▁the"): of one id, or of several as a list."""
        if isinstance(ids, (int, np.integer)):
            return self._tokens[self._index(int(ids))]
        kept = [self._index(i) for i in ids]
        return [self._tokens[i] for i in kept if not (skip_special_tokens and i in self.special_ids)]

    def convert_tokens_to_ids(self: Vocabulary, tokens: str | Iterable[str]) -> Any:
        """The id of a token as the vocabulary spells it, None where it has no such token; of several a
        list."""
        return self.id_of(tokens) if isinstance(tokens, str) else [self.id_of(token) for token in tokens]

    def apply_chat_template(
        self: Vocabulary,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **template_args: Any,
    ) -> Any:
        """The prompt of a conversation (or of several): the ids as a BatchEncoding, with return_dict=False
        alone; with tokenize=False the text.

        The ids are those of `LLM.chat_ids`: they begin with exactly one BOS where the files ask for it, and
        special tokens in messages are text. template_args: further variables of the template. Raises
        TemplateError, ArgumentError where the tokenizer belongs to no loaded model.
        """
        if continue_final_message:
            raise UnsupportedError("continue_final_message: not supported; add the beginning to the prompt")
        model = self._model() if self._model is not None else None
        if model is None:
            raise ArgumentError(
                "apply_chat_template needs the model's template: use tinyllm.load(...).tokenizer"
            )
        many = len(conversation) > 0 and not isinstance(conversation[0], Mapping)
        ask: dict[str, Any] = {
            "tools": tools,
            "chat_template": chat_template,
            "template_args": template_args
            | {"add_generation_prompt": add_generation_prompt}
            | ({"documents": documents} if documents is not None else {}),
        }
        conversations = list(conversation) if many else [conversation]
        if not tokenize:
            texts = [model.chat_text(one, **ask) for one in conversations]
            return texts if many else texts[0]
        rows = [model.chat_ids(one, **ask) for one in conversations]
        encoding = padded(rows, self.pad_token_id, padding, None, "right", return_tensors)
        if not many and return_tensors is None:
            encoding = BatchEncoding({name: value[0] for name, value in encoding.items()})
        return encoding if return_dict else encoding["input_ids"]


def padded(
    rows: Sequence[list[int]],
    pad: int,
    padding: bool | str,
    max_length: int | None,
    side: str,
    return_tensors: str | None,
) -> BatchEncoding:
    """Rows of ids brought to one length where that is asked for, and their masks."""
    if padding not in (False, True, "longest", "max_length", "do_not_pad"):
        raise ArgumentError(f"padding is {padding!r}, expected True, False, 'longest' or 'max_length'")
    if side not in ("left", "right"):
        raise ArgumentError(f"padding_side is {side!r}, expected 'left' or 'right'")
    if return_tensors not in (None, "np"):
        raise ArgumentError(
            f"return_tensors is {return_tensors!r}, expected 'np': numpy arrays, which torch.from_numpy takes"
        )
    if padding == "max_length" and max_length is None:
        raise ArgumentError("padding='max_length' needs max_length")
    length = 0
    if padding not in (False, "do_not_pad"):
        length = int(max_length or 0) if padding == "max_length" else max(map(len, rows), default=0)
    ids, masks = [], []
    for row in rows:
        fill = length - len(row)
        ones = [1] * len(row)
        ids.append([*row, *[pad] * fill] if side == "right" else [*[pad] * fill, *row])
        masks.append([*ones, *[0] * fill] if side == "right" else [*[0] * fill, *ones])
    if return_tensors is None:
        return BatchEncoding(input_ids=ids, attention_mask=masks)
    if len(set(map(len, ids))) > 1:
        raise ArgumentError("the rows have different lengths: padding=True makes an array of them")
    return BatchEncoding(input_ids=np.array(ids, np.int64), attention_mask=np.array(masks, np.int64))
