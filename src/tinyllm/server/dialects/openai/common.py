"""What OpenAI's endpoints share: sampling, the form of an answer, tools, log probabilities, usage.

Imports ask.py and app.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields as fields_of
from typing import Any

from tinyllm import LLM, Completion, SamplingParams
from tinyllm.server.app import FORMS
from tinyllm.server.ask import Fields

# A body's member: the field of SamplingParams. All are known by their own names; those left out have other
# types here, and are read one by one.
_OTHERS = {"processors", "logprobs", "top_logprobs", "logit_bias", *FORMS}
SAMPLING = {f.name: f.name for f in fields_of(SamplingParams) if f.name not in _OTHERS}
# The answer is the same with and without.
HARMLESS = (
    *("user", "metadata", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MOST_TOP = 20  # likeliest tokens that are told of each
LEAST = -9999.0  # OpenAI's log probability of what never comes


def sampling_of(fields: Fields, names: Mapping[str, str] = SAMPLING) -> dict[str, Any]:
    """The fields of SamplingParams that a body gives; names as of `Fields.renamed`."""
    sampling = fields.renamed(names)
    if bias := fields.take("logit_bias", dict):
        sampling["logit_bias"] = {}
        for token, value in bias.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise fields.refusal("logit_bias", f"has the key {token[:40]!r}, which is no token id")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not -1000 <= value <= 1000:
                raise fields.refusal("logit_bias", f"of token {token} must be a number from -1000 to 1000")
            sampling["logit_bias"][int(token)] = value
    return sampling


def form_of(form: Fields | None) -> dict[str, Any]:
    """The form of an answer, as the field of SamplingParams, of a `response_format` or a `text.format`."""
    if form is None:
        return {}
    kind = form.word("type", "text", "json_object", "json_schema", default="")
    if not kind:
        raise form.refusal("type", "is missing", code="missing_required_parameter")
    schema: dict[str, Any] | bool | None = None
    if kind == "json_schema":
        described = form.need_object("json_schema") if "json_schema" in form else form
        described.harmless("name", "description", "strict")  # it is enforced in any case
        schema = described.need("schema", dict)
        described.finish()
    elif kind == "json_object":
        schema = True
    form.finish()
    return {} if schema is None else {"json_schema": schema}


def own_form_of(fields: Fields) -> dict[str, Any]:
    """The same by the names of SamplingParams, which OpenAI has not."""
    found: dict[str, Any] = {name: fields.take(name, str) for name in ("regex", "grammar")}
    found["json_schema"], found["choices"] = fields.take("json_schema", dict), fields.take("choices", list)
    for one in found["choices"] or ():
        if not isinstance(one, str):
            raise fields.refusal("choices", "must be a list of strings", code="invalid_type")
    return {name: value for name, value in found.items() if value is not None}


def prompts_of(fields: Fields, name: str, most: int) -> list[str | list[int]]:
    """A text, ids, or a list of at most so many prompts."""
    given = fields.need(name, object)
    prompts: list[Any] = given if isinstance(given, list) and not _is_prompt(given) else [given]
    if not prompts or not all(map(_is_prompt, prompts)):
        what = "must be a text, a list of token ids, or a list of such prompts, and none without an id"
        raise fields.refusal(name, what, code="invalid_type")
    if len(prompts) > most:
        raise fields.refusal(name, f"has {len(prompts)} texts, the most is {most}")
    return prompts


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
    )


def function_of(fields: Fields) -> tuple[dict[str, Any], bool]:
    """A function as `LLM.chat` takes it, and whether it is strict."""
    function: dict[str, Any] = {"name": fields.need("name", str)}
    if (description := fields.take("description", str)) is not None:
        function["description"] = description
    if (parameters := fields.take("parameters", dict)) is not None:
        function["parameters"] = parameters
    strict = fields.take("strict", bool, False)
    fields.finish()
    return {"type": "function", "function": function}, strict


def tool_choice_of(fields: Fields, name_of: Callable[[Fields], str]) -> str:
    """ "auto", "none", "required" or the name of a function, which `name_of` finds in an object of the type
    "function"."""
    given = fields.take("tool_choice", object)
    if given is None:
        return "auto"
    if not isinstance(given, dict):
        if given not in ("auto", "none", "required"):
            raise fields.refusal("tool_choice", "must be 'auto', 'none', 'required' or name a function")
        return str(given)
    named = Fields(given, "tool_choice.")
    named.word("type", "function")
    name = name_of(named)
    named.finish()
    if name in ("auto", "none", "required"):
        raise fields.refusal("tool_choice", f"names a function {name!r}, which means something else here")
    return name


def token_logprob(llm: LLM, token: int, logprob: float) -> dict[str, Any]:
    raw = token_bytes(llm, token)
    text = str(token) if raw is None else raw.decode("utf-8", "replace")
    shown = None if raw is None else list(raw)
    return {"token": text, "bytes": shown, "logprob": max(logprob, LEAST)}


def token_bytes(llm: LLM, token: int) -> bytes | None:
    """None without a tokenizer. A vocabulary may be padded past its tokenizer's; such ids have no text."""
    if llm.tokenizer is None:
        return None
    return llm.tokenizer.token_bytes(token) if token < llm.tokenizer.vocab_size else b""


def chat_logprobs(
    llm: LLM, tokens: Iterable[tuple[int, float, Sequence[tuple[int, float]]]]
) -> list[dict[str, Any]]:
    """Of tokens (id, log probability, the most likely ones): reasoning and calls are among them."""
    return [
        {
            **token_logprob(llm, token, logprob),
            "top_logprobs": [token_logprob(llm, *one) for one in top],
        }
        for token, logprob, top in tokens
    ]


def with_tops(completion: Completion) -> list[tuple[int, float, Sequence[tuple[int, float]]]]:
    """The tokens of a completion that was asked for log probabilities."""
    logprobs = completion.logprobs or []
    tops = completion.top_logprobs or [[]] * len(logprobs)
    return list(zip(completion.tokens, logprobs, tops, strict=True))


def usage_of(groups: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """Of all prompts of a request, each with its answers."""
    prompt = sum(len(group[0].prompt_tokens) for group in groups)
    made = sum(len(c.tokens) for group in groups for c in group)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(g[0].timings.cached_tokens for g in groups)},
    }


def mean_logprob(completion: Completion) -> float:
    """A token's, on average."""
    logprobs = completion.logprobs or []
    return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf
