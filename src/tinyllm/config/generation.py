"""What a model's makers advise of sampling, and the ids that end its texts.

Every key of generation_config.json and of GGUF's general.sampling is obeyed, or named in one warning when it
is set to what would change a text, or harmless (the tables below; docs/keys.md shows them to users). Imports
`fields` and `errors`. Read next: engine/sampling.py, which fills a request's parameters from it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllm.config.fields import Fields, brief
from tinyllm.errors import FormatError

log = logging.getLogger(__name__)

_MOST = 2**31 - 1

# What sampling takes of the settings that a model may advise: lowest, highest, what a special value means.
ADVISED_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 1000, "0 is greedy"),
    "top_p": (0, 1, "1 turns it off"),
    "min_p": (0, 1, "0 turns it off"),
    "typical_p": (0, 1, "1 turns it off"),
    "repetition_penalty": (0.001, 1000, "1 turns it off"),
    "xtc_probability": (0, 1, "0 turns it off"),
    "xtc_threshold": (0, 1, "more than 0.5 turns it off"),
}
ADVISED_COUNTS: dict[str, tuple[int, int, str]] = {
    "top_k": (0, _MOST, "0 turns it off"),
    "penalty_window": (-1, _MOST, "-1 is the whole text"),
    "no_repeat_ngram_size": (0, _MOST, "0 turns it off"),
    "min_tokens": (0, _MOST, "0 turns it off"),
    "max_tokens": (1, _MOST, "None is what the model advises, else until the end of text or context"),
    "min_length": (0, _MOST, "0 turns it off"),
    "max_length": (1, _MOST, "the prompt included"),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model's makers advise: the ids that end a text, and sampling settings (None: nothing said).

    The fields are SamplingParams', but for eos_ids and the lengths of whole texts in tokens, the prompt
    included: min_length, before which none of eos_ids may come, and max_length, where a text ends. They count
    where neither a request nor the model says min_tokens or max_tokens.
    """

    eos_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None  # 0: off
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    penalty_window: int | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    no_repeat_ngram_size: int | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    stop: tuple[str, ...] | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    min_length: int | None = None
    max_length: int | None = None


# ---- GGUF

# llama.cpp's names of steps in general.sampling.sequence, in the order of its own chain, which is tinyllm's;
# for each the parameters that leave it out.
_STEPS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.0},
    "dry": {},
    "top_n_sigma": {},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0},
}
_NEVER_ON = ("dry", "top_n_sigma", "typ_p")  # by a key of a file, so their place does not matter
_STEP_ALIASES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"}


def generation_from_gguf(metadata: Mapping[str, Any], vocab_size: int) -> GenerationDefaults:
    """From the tokenizer's eos, eot and eom ids and suppress_tokens, and the `general.sampling.*` keys."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    fields = Fields(metadata, "general.sampling.")
    said = {
        "temperature": _number(fields, "temp", "temperature", negative_is_0=True),  # greedy
        "top_k": _count(fields, "top_k", negative_is_0=True),  # off
        "top_p": _number(fields, "top_p"),
        "min_p": _number(fields, "min_p"),
        "repetition_penalty": _number(fields, "penalty_repeat", "repetition_penalty"),
        "penalty_window": _count(fields, "penalty_last_n", "penalty_window"),
        "xtc_probability": _number(fields, "xtc_probability"),
        "xtc_threshold": _number(fields, "xtc_threshold"),
    }
    ignored: dict[str, str] = {}
    off = _left_out(fields.get("sequence"), ignored)
    if fields.whole("mirostat", 0):
        ignored["mirostat"] = "tinyllm draws by the other settings instead"
    for key in ("mirostat_tau", "mirostat_eta"):
        fields.get(key)  # without mirostat they mean nothing
    for key in metadata:
        if key.startswith(fields.prefix) and key not in fields.seen:
            ignored[key.removeprefix(fields.prefix)] = "tinyllm does not know it"
    if ignored:
        told = [f"{fields.prefix}{key} ({brief(fields.get(key))}): {why}" for key, why in ignored.items()]
        log.warning("the file asks of sampling what is not done: %s", "; ".join(told))
    return GenerationDefaults(
        eos_ids=_eos_ids(ids, vocab_size),
        suppress_tokens=_tokens(Fields(metadata, "tokenizer.ggml."), "suppress_tokens", vocab_size),
        **(said | off),
    )


def _left_out(sequence: Any, ignored: dict[str, str]) -> dict[str, Any]:
    """The parameters that turn off what a sequence such as "top_k;temperature" leaves out: llama.cpp runs the
    steps that it names, in its order, and no other. What cannot be followed is told in `ignored`."""
    if sequence is None:
        return {}
    if not isinstance(sequence, str):
        raise FormatError(f"general.sampling.sequence must be a string, not {brief(sequence)}")
    if not sequence:
        return {}
    plain = {step.replace("_", ""): step for step in _STEPS}
    found = {
        name: _STEP_ALIASES.get(name, plain.get(name.replace("_", "").replace("-", "")))
        for name in sequence.lower().split(";")
    }
    steps = [step for name in sequence.lower().split(";") if (step := found[name]) is not None]
    if None in found.values():
        unknown = ", ".join(brief(name) for name, step in found.items() if step is None)
        ignored["sequence"] = f"tinyllm has no step {unknown}"
    elif not _is_own_order([step for step in steps if step not in _NEVER_ON]):
        ignored["sequence"] = "tinyllm does these steps in its own order"
    return {name: value for step in _STEPS if step not in steps for name, value in _STEPS[step].items()}


def _is_own_order(steps: list[str]) -> bool:
    order = list(_STEPS)
    return all(
        # Whatever the temperature, the k most likely tokens are the same.
        order.index(step) < order.index(later) or {step, later} == {"top_k", "temperature"}
        for i, step in enumerate(steps)
        for later in steps[i + 1 :]
    )


def generation_to_gguf(defaults: GenerationDefaults, context: int) -> dict[str, Any]:
    """The keys of a GGUF file that say the same, but for eos_ids. context: the model's, in tokens. What GGUF
    has no key for is warned of by name."""
    window = defaults.penalty_window
    values = {
        "temp": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
        "xtc_probability": defaults.xtc_probability,
        "xtc_threshold": defaults.xtc_threshold,
        "penalty_repeat": defaults.repetition_penalty,
        "penalty_last_n": context if window == -1 else window,  # no text is longer
    }
    keys: dict[str, Any] = {f"general.sampling.{key}": v for key, v in values.items() if v is not None}
    if defaults.suppress_tokens:
        keys["tokenizer.ggml.suppress_tokens"] = np.array(defaults.suppress_tokens, np.int32)
    off = {"typical_p": 1.0, "no_repeat_ngram_size": 0, "min_tokens": 0, "min_length": 0}
    names = (*off, "begin_suppress_tokens", "bad_words_ids", "stop", "max_tokens", "max_length")
    lost = [name for name in names if getattr(defaults, name) not in (None, (), off.get(name))]
    if lost:
        log.warning("GGUF has no keys for these of the model's own settings: %s", ", ".join(lost))
    return keys


# ---- Hugging Face

_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty")
_COUNTS = {  # transformers' name, ours
    "top_k": "top_k",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "min_new_tokens": "min_tokens",
    "max_new_tokens": "max_tokens",
    "min_length": "min_length",
    "max_length": "max_length",
}
JSON_OBEYED = frozenset(
    (*_NUMBERS, *_COUNTS, "do_sample", "eos_token_id", "suppress_tokens", "begin_suppress_tokens",
     "bad_words_ids", "stop_strings")
)  # fmt: skip

# What changes texts in transformers and is not done here, with the values that leave it off, beside null.
JSON_WARNED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "sequence_bias": ([], {}),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "watermarking_config": (),
    "token_healing": (False,),
    "max_time": (),
}

# What leaves every text as it is, and why.
JSON_HARMLESS_BECAUSE: dict[str, tuple[str, ...]] = {
    "the tokenizer says what goes around a text, and nothing is padded": (
        "bos_token_id", "pad_token_id", "decoder_start_token_id",
    ),
    "means something to beam search only, which is warned of": (
        "early_stopping", "length_penalty", "diversity_penalty", "low_memory",
    ),
    "a softmax and a maximum are the same after it": ("renormalize_logits",),
    "a logit that is not finite is an error": ("remove_invalid_values",),
    "guesses tokens to be faster, and keeps those that the model would have chosen": (
        "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
        "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
        "speculation_type",
    ),
    "how transformers computes, not what": (
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size",
        "compile_config", "disable_compile", "continuous_batching_config",
    ),
    "what a call returns beside the text; ask for it in the call": (
        "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
        "return_dict_in_generate",
    ),
    "says something of the file": (
        "transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash",
    ),
}  # fmt: skip
_JSON_HARMLESS = frozenset(key for keys in JSON_HARMLESS_BECAUSE.values() for key in keys)

# Keys that config.json may hold in place of a generation_config.json, and the values that say nothing: older
# files list them all, with transformers' defaults.
_LEGACY_DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "temperature": 1,
    "top_k": 50,
    "top_p": 1,
    "typical_p": 1,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
}
LEGACY_KEYS = (JSON_OBEYED | set(JSON_WARNED)) - {"eos_token_id"}


def generation_from_json(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None, vocab_size: int
) -> GenerationDefaults:
    """From generation_config.json, or where there is none from config.json, as transformers takes them; the
    ids that end a text are those of both."""
    if generation_config is None:
        table = {key: config[key] for key in config if key in LEGACY_KEYS}
        table = {key: value for key, value in table.items() if value != _LEGACY_DEFAULTS.get(key)}
        name = "config.json"
    else:
        table, name = dict(generation_config), "generation_config.json"
    fields = Fields(table)
    said: dict[str, Any] = {key: _number(fields, key) for key in _NUMBERS}
    said |= {ours: _count(fields, key, ours) for key, ours in _COUNTS.items()}
    if said["repetition_penalty"] not in (None, 1):
        said["penalty_window"] = -1  # transformers' looks at the whole text
    is_sampled = None if fields.get("do_sample") is None else fields.flag("do_sample", False)
    if is_sampled is False:
        said["temperature"] = 0.0
    ends = [table.get("eos_token_id"), config.get("eos_token_id")]
    own_ends = [end for end in ends if end is not None][:1]
    _warn(table, name, is_sampled)
    return GenerationDefaults(
        eos_ids=_eos_ids(_flat(ends), vocab_size),
        suppress_tokens=_tokens(fields, "suppress_tokens", vocab_size),
        begin_suppress_tokens=_tokens(fields, "begin_suppress_tokens", vocab_size),
        bad_words_ids=_words(fields, "bad_words_ids", vocab_size, _flat(own_ends)),
        stop=_strings(fields, "stop_strings"),
        **said,
    )


def _warn(table: Mapping[str, Any], name: str, is_sampled: bool | None) -> None:
    """Names once what the table sets and is not done."""
    ignored = [
        f"{key} ({brief(table[key])})"
        for key, off in JSON_WARNED.items()
        if table.get(key) is not None and table[key] not in off
    ]
    if ignored:
        told = ", ".join(ignored)
        log.warning("%s asks for what is not done, so texts may differ from transformers': %s", name, told)
    advised = [key for key in ("temperature", "top_k", "top_p", "min_p", "typical_p") if key in table]
    if advised and is_sampled is None and any(table[key] is not None for key in advised):
        log.warning(
            "%s sets %s and not do_sample: tinyllm samples; transformers would take the most likely token, "
            "as temperature=0 does",
            name,
            ", ".join(advised),
        )
    known = JSON_OBEYED | set(JSON_WARNED) | _JSON_HARMLESS
    if unknown := [brief(key) for key in table if key not in known and table[key] is not None]:
        log.warning("%s sets what tinyllm does not know, without effect: %s", name, ", ".join(unknown))


# ---- values


def _number(
    fields: Fields, key: str, name: str | None = None, *, negative_is_0: bool = False
) -> float | None:
    """The file's `key`, as SamplingParams takes it in the field `name` (None: of the same name); None where
    it is absent."""
    if fields.get(key) is None:
        return None
    value = max(fields.number(key), 0.0) if negative_is_0 else fields.number(key)
    _check_range(fields, key, value, ADVISED_RANGES[name or key])
    return value


def _count(fields: Fields, key: str, name: str | None = None, *, negative_is_0: bool = False) -> int | None:
    """As _number, of a whole number. Files spell it 5 and 5.0."""
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, float) and not value.is_integer():
        fields.wrong(key, value, "a whole number")
    number = max(fields.number(key), 0.0) if negative_is_0 else fields.number(key)
    _check_range(fields, key, number, ADVISED_COUNTS[name or key])
    return int(number)


def _check_range(fields: Fields, key: str, value: float, bounds: tuple[float, float, str]) -> None:
    least, most, _ = bounds
    if not least <= value <= most:
        raise FormatError(
            f"the sampling default {fields.prefix}{key} is {value:g}, outside {least:g} to {most:g}"
        )


def _tokens(fields: Fields, key: str, vocab_size: int) -> tuple[int, ...] | None:
    """A list of ids. Those outside the vocabulary are left out: such a token cannot come anyway."""
    value = fields.get(key)
    if value is None:
        return None
    ids = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        fields.wrong(key, value, "a list of token ids")
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))


def _words(fields: Fields, key: str, vocab_size: int, ends: list[Any]) -> tuple[tuple[int, ...], ...] | None:
    """Lists of ids. Left out are those with ids outside the vocabulary, which cannot come anyway, and as in
    transformers those that are no more than one of `ends`, as without it no text would end."""
    value = fields.get(key)
    if value is None:
        return None
    words: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(word, list) and word and all(type(i) is int for i in word) for word in words):
        fields.wrong(key, value, "a list of lists of token ids")
    possible = (tuple(word) for word in words if all(0 <= i < vocab_size for i in word))
    return tuple(word for word in possible if not (len(word) == 1 and word[0] in ends))


def _strings(fields: Fields, key: str) -> tuple[str, ...] | None:
    value = fields.get(key)
    if value is None:
        return None
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        fields.wrong(key, value, "a string or a list of strings, none of them empty")
    return tuple(strings)


def _flat(values: Iterable[Any]) -> list[Any]:
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


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
