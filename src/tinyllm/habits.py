"""What people who know transformers' models type: `llm.generate(ids, max_new_tokens=...)`.

Names and defaults are those of transformers 5.24; a tensor is a numpy array. docs/transformers.md has them
all. Imports engine (sampling parameters), results and errors. llm.py's `LLM` inherits it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tinyllm.engine.sampling import SamplingParams
from tinyllm.errors import ArgumentError, UnsupportedError
from tinyllm.results import Completion

_NEUTRAL: dict[str, Any] = {  # what transformers takes besides, and at which value it changes nothing here
    "num_beams": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "penalty_alpha": None,
    "encoder_repetition_penalty": 1.0,
    "generation_config": None,
    "assistant_model": None,
    "streamer": None,
}
_INSTEAD = {
    "streamer": "; stream yields the text piece by piece",
    "output_logits": "; logits gives them",
    "output_scores": "; logits gives them",
    "generation_config": "; its fields are arguments here",
    "assistant_model": "",
}
_SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}  # by default
_SAME = (  # fields of SamplingParams under the same name
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "seed",
)  # fmt: skip


class Model(Protocol):
    """What `generate` is made of; `LLM` is one."""

    defaults: Mapping[str, Any]
    context: int
    tokenizer: Any

    def __call__(self, prompt: Any, params: SamplingParams, *, n: int) -> Any: ...


class Habits:
    """The method that `LLM` gets."""

    def generate(
        self: Model,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        min_new_tokens: int | None = None,
        do_sample: bool = False,
        num_return_sequences: int = 1,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        logits_processor: Sequence[Callable[..., Any]] = (),
        **options: Any,
    ) -> Any:
        """The ids of prompts with what the model makes of them, the end-of-text token included.

        input_ids: one prompt's ids or several', as lists or an int array [tokens] or [prompts, tokens].
        attention_mask: of the same shape; where it is 0 there is padding, which no prompt has. Returns lists
        for lists; for an array an int64 array [prompts * num_return_sequences, tokens], whose short rows end
        with pad_token_id (None: the tokenizer's). The rows of one prompt stand together.

        max_new_tokens: None: until max_length (the prompt included), the model's own advice, or the context's
        end. do_sample: False takes the likeliest token each time; True draws with temperature 1.0, top_k 50
        and top_p 1.0 but for what is passed or the model's files advise. options: temperature, top_k, top_p,
        min_p, typical_p, repetition_penalty, no_repeat_ngram_size, bad_words_ids, suppress_tokens,
        begin_suppress_tokens and seed. logits_processor: tinyllm's processors.

        Raises ArgumentError, ContextError, MemoryLimitError as a call does, UnsupportedError for arguments of
        transformers' generate that are not here (beams, ...), TypeError for unknown ones.

            out = llm.generate(llm.tokenizer("Once", return_tensors="np").input_ids, max_new_tokens=20)
        """
        for name, value in options.items():
            if name in _SAME:
                continue
            if name not in _NEUTRAL:
                raise TypeError(f"generate has no argument {name}")
            if value != _NEUTRAL[name]:
                raise UnsupportedError(f"{name}={value!r}: not supported by generate{_INSTEAD.get(name, '')}")
        is_array = isinstance(input_ids, np.ndarray)
        prompts, is_one = _prompts(input_ids, attention_mask)
        longest = max(map(len, prompts), default=0)
        if max_new_tokens is None and max_length is not None:
            if any(len(ids) != longest for ids in prompts):
                raise ArgumentError("max_length with prompts of different lengths: pass max_new_tokens")
            max_new_tokens = max_length - longest
        asked = {name: options[name] for name in _SAME if options.get(name) is not None}
        if not do_sample:
            asked = asked | {"temperature": 0.0}
        else:
            advised = {name for name, value in self.defaults.items() if value is not None}
            asked = {name: value for name, value in _SAMPLED.items() if name not in advised} | asked
        params = SamplingParams(
            max_tokens=max_new_tokens,
            min_tokens=min_new_tokens,
            stop=stop_strings,
            processors=logits_processor,
            **asked,
        )
        groups: list[list[Completion]] = self(prompts, params, n=num_return_sequences)
        rows = [_row(made) for group in groups for made in group]
        if not is_array:
            return rows[0] if is_one and num_return_sequences == 1 else rows
        if pad_token_id is None:
            pad_token_id = self.tokenizer.pad_token_id if self.tokenizer is not None else 0
        out = np.full((len(rows), max(map(len, rows), default=0)), pad_token_id, np.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out[0] if is_one and num_return_sequences == 1 else out


def _row(made: Completion) -> list[int]:
    """A prompt, its answer, and the token that ended it."""
    end = [made.stop_reason] if isinstance(made.stop_reason, int) else []
    return [*made.prompt_tokens, *made.tokens, *end]


def _prompts(input_ids: Any, attention_mask: Any) -> tuple[list[list[int]], bool]:
    """The prompts without their padding, and whether there was one that stood alone."""
    if isinstance(input_ids, str) or not hasattr(input_ids, "__len__"):
        raise TypeError(f"generate takes ids, not {type(input_ids).__name__}: llm.tokenizer(text) makes them")
    if isinstance(input_ids, Mapping):
        raise TypeError("generate takes ids: generate(**encoding), or encoding.input_ids")
    is_one = len(input_ids) > 0 and not hasattr(input_ids[0], "__len__")
    rows = [input_ids] if is_one else list(input_ids)
    masks = [[1] * len(row) for row in rows]
    if attention_mask is not None:
        masks = [attention_mask] if is_one else list(attention_mask)
        if [len(mask) for mask in masks] != [len(row) for row in rows]:
            raise ArgumentError("attention_mask has another shape than input_ids")
    return [
        [i for i, m in zip(row, mask, strict=True) if m] for row, mask in zip(rows, masks, strict=True)
    ], is_one
