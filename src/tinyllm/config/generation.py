"""What a model's makers advise of sampling, and the ids that end its texts.

Imports `fields` and `errors`. Read next: engine/sampling.py, which fills a request's parameters from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tinyllm.config.fields import Fields, brief
from tinyllm.errors import FormatError

# What sampling takes of the settings that a model may advise: lowest, highest, what a special value means.
ADVISED_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 1000, "0 is greedy"),
    "top_k": (0, 2**31 - 1, "0 turns it off"),
    "top_p": (0, 1, "1 turns it off"),
    "min_p": (0, 1, "0 turns it off"),
    "typical_p": (0, 1, "1 turns it off"),
    "repetition_penalty": (0.001, 1000, "1 turns it off"),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model's makers advise: the ids that end a text, and sampling settings (None: nothing said)."""

    eos_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None  # 0: off
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None


def generation_from_gguf(metadata: Mapping[str, Any], vocab_size: int) -> GenerationDefaults:
    """From the tokenizer's eos, eot and eom ids and the `general.sampling.*` keys."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    fields = Fields(metadata, "general.sampling.")
    return GenerationDefaults(
        eos_ids=_eos_ids(ids, vocab_size),
        temperature=_setting(fields, "temp", "temperature", negative_is_0=True),  # greedy
        top_k=_top_k(fields, negative_is_0=True),  # off
        top_p=_setting(fields, "top_p"),
        min_p=_setting(fields, "min_p"),
        repetition_penalty=_setting(fields, "penalty_repeat", "repetition_penalty"),
    )


def generation_from_json(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None, vocab_size: int
) -> GenerationDefaults:
    """From config.json and, where there is one, generation_config.json; ids of both count."""
    table = generation_config or {}
    ids: list[Any] = []
    for source in (table, config):
        value = source.get("eos_token_id")
        ids.extend(value if isinstance(value, list) else [value])
    fields = Fields(table)
    return GenerationDefaults(
        eos_ids=_eos_ids(ids, vocab_size),
        temperature=0.0 if table.get("do_sample") is False else _setting(fields, "temperature"),
        top_k=_top_k(fields),
        top_p=_setting(fields, "top_p"),
        min_p=_setting(fields, "min_p"),
        typical_p=_setting(fields, "typical_p"),
        repetition_penalty=_setting(fields, "repetition_penalty"),
    )


def _setting(
    fields: Fields, key: str, name: str | None = None, *, negative_is_0: bool = False
) -> float | None:
    """The file's `key`, as SamplingParams takes it in the field `name` (None: of the same name); None where
    it is absent."""
    if fields.get(key) is None:
        return None
    value = max(fields.number(key), 0.0) if negative_is_0 else fields.number(key)
    least, most, _ = ADVISED_RANGES[name or key]
    if not least <= value <= most:
        raise FormatError(
            f"the sampling default {fields.prefix}{key} is {value:g}, outside {least:g} to {most:g}"
        )
    return value


def _top_k(fields: Fields, *, negative_is_0: bool = False) -> int | None:
    """Files spell it 5 and 5.0."""
    value = fields.get("top_k")
    if isinstance(value, float) and not value.is_integer():
        fields.wrong("top_k", value, "a whole number")
    setting = _setting(fields, "top_k", negative_is_0=negative_is_0)
    return None if setting is None else int(setting)


def _eos_ids(ids: Iterable[Any], vocab_size: int) -> tuple[int, ...]:
    found: list[int] = []
    for value in ids:
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < vocab_size:
            raise FormatError(
                f"{brief(value)} is not the id of a token that ends a text (vocabulary {vocab_size})"
            )
        found.append(value)
    return tuple(dict.fromkeys(found))
