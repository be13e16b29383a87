"""llama.cpp's completion: a text after a prompt, whole or in events.

Imports ask.py, app.py, answers.py, streams.py and tokens.py.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from starlette.responses import Response

from tinyllm import LLM, Completion, SamplingParams
from tinyllm.server.answers import extras
from tinyllm.server.app import Answer, Call
from tinyllm.server.ask import Ask, Fields
from tinyllm.server.dialects.llamacpp.tokens import Prompt, bytes_of, is_prompt, mixed, text_of, tokenizer_of
from tinyllm.server.streams import event, gathered, merged

SAMPLING = {  # of a body: the field of SamplingParams
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_window",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "dry_multiplier": "dry_multiplier",
    "dry_base": "dry_base",
    "dry_allowed_length": "dry_allowed_length",
    "dry_penalty_last_n": "dry_penalty_last_n",
    "dry_sequence_breakers": "dry_sequence_breakers",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "stop": "stop",
    "seed": "seed",
    "top_k": "top_k",
    "n_predict": "max_tokens",
    "max_tokens": "max_tokens",
    "json_schema": "json_schema",
}
NONE = (("n_predict", -2), ("n_predict", -1), ("max_tokens", -1), ("seed", -1))  # no limit, any seed
HARMLESS = (  # prefixes are always shared, texts never shifted, slots nobody's
    *("cache_prompt", "n_cache_reuse", "id_slot", "n_keep", "n_discard"),
    *("mirostat_tau", "mirostat_eta", "dynatemp_exponent"),
)
OFF: dict[str, tuple[Any, ...]] = {  # what is not done here, and the values that do not ask for it
    "mirostat": (0,),
    "dynatemp_range": (0, 0.0),
    "top_n_sigma": (-1, -1.0),
    "penalize_nl": (True,),
    "min_keep": (0,),
    "n_indent": (0,),
    "n": (1,),
    "n_cmpl": (1,),
    "t_max_predict_ms": (-1, 0),
    "post_sampling_probs": (False,),
    "timings_per_token": (False,),
    "return_progress": (False,),
    "lora": ([],),
    "image_data": ([],),
}
CHAIN: dict[str, Mapping[str, Any]] = {  # the samplers in our order, and the fields that leave one out
    "penalties": {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "dry": {"dry_multiplier": 0.0},
    "top_n_sigma": {},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0},
}
LETTERS = dict(zip("edskypmxt", CHAIN, strict=True))  # of `samplers` as a text


@dataclass(frozen=True)
class Wanted:
    """A request, but for what takes the model's vocabulary to say."""

    model: str | None
    prompts: Sequence[Prompt]
    sampling: Mapping[str, Any]
    biases: Sequence[tuple[int | str, float]]
    ignores_eos: bool
    n_probs: int
    returns_tokens: bool
    samplers: Sequence[str]
    replay: bool

    def asks(self, llm: LLM) -> list[Ask]:
        sampling = dict(self.sampling)
        if self.biases:
            sampling["logit_bias"] = _bias(llm, self.biases)
        if self.ignores_eos:
            sampling["suppress_tokens"] = sorted(i for i in llm.eos_ids if i < llm.config.vocab_size)
        ask = Ask(self.model, sampling=sampling, special=True, replay=self.replay)
        return [replace(ask, prompt=_read(llm, prompt)) for prompt in self.prompts]


async def completion(call: Call) -> Response:
    fields = await call.fields()
    streams = fields.take("stream", bool, False)
    wanted = _wanted(fields, call.server.limits.prompts)
    fields.finish()
    async with call.server.models.use(wanted.model) as llm:
        asks = wanted.asks(llm)
        at_once = call.server.at_once(asks)
        if streams:
            return await call.parts(asks, lambda answers: _all_chunks(answers, wanted, at_once))

        async def work() -> Any:
            async with call.server.answers(asks) as answers:
                made = await gathered([answer.whole for answer in answers], at_once)
                pairs = zip(answers, made, strict=True)
                bodies = [_whole(answer, i, one[0], wanted) for i, (answer, one) in enumerate(pairs)]
                return bodies if len(bodies) > 1 else bodies[0]

        return await call.json(work())


async def _all_chunks(answers: Sequence[Answer], wanted: Wanted, at_once: int) -> AsyncIterator[str]:
    streams = [_chunks(answer, i, wanted) for i, answer in enumerate(answers)]
    async for _, chunk in merged(streams, at_once):
        yield chunk


# ---- what is asked


def _wanted(fields: Fields, most_prompts: int) -> Wanted:
    model = fields.take("model", str)
    fields.harmless(*HARMLESS)
    for name, values in OFF.items():
        fields.only(name, *values)
    samplers = _samplers(fields)
    for name, value in NONE:
        fields.drop(name, value)
    sampling = ({"top_k": 0} if fields.drop("top_k", -1) else {}) | fields.renamed(SAMPLING)
    for name, neutral in CHAIN.items():
        sampling |= {} if name in samplers else neutral
    if grammar := fields.take("grammar", str):
        sampling["grammar"] = grammar
    n_probs = fields.take("n_probs", int, 0)
    if n_probs < 0:
        raise fields.refusal("n_probs", f"is {n_probs}, expected 0 or more")
    if n_probs:
        sampling |= {"logprobs": True, "top_logprobs": n_probs}
    return Wanted(
        model,
        _prompts(fields, most_prompts),
        sampling,
        _biases(fields),
        fields.take("ignore_eos", bool, False),
        n_probs,
        fields.take("return_tokens", bool, False),
        samplers,
        fields.take("replay", bool, False),
    )


def _samplers(fields: Fields) -> Sequence[str]:
    """Those that are used. Refuses another order than ours."""
    given, order = fields.take("samplers", object), list(CHAIN)
    if given is None:
        return order
    if not isinstance(given, (str, list)):
        raise fields.refusal("samplers", "must be a list of names", code="invalid_type")
    names = [LETTERS.get(one, one) for one in given] if isinstance(given, str) else given
    if names != [name for name in order if name in names]:
        raise fields.refusal("samplers", f"must be of these, in this order: {', '.join(order)}")
    return names


def _biases(fields: Fields) -> list[tuple[int | str, float]]:
    """Of a token or a text each: [[15043, 1.0], ["text", false]] or {"15043": 1.0}."""
    given = fields.take("logit_bias", object, [])
    if isinstance(given, dict):
        given = [[int(key) if _is_id(key) else key, bias] for key, bias in given.items()]
    pairs = [_pair(pair) for pair in given] if isinstance(given, list) else [None]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        what = "must be pairs of a token or a text and a number to 1000, or false to forbid it"
        raise fields.refusal("logit_bias", what, code="invalid_type")
    return found


def _pair(pair: Any) -> tuple[int | str, float] | None:
    if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (int, str):
        return None
    token, bias = pair
    if bias is False:
        return token, -math.inf
    return (token, float(bias)) if type(bias) in (int, float) and -1000 <= bias <= 1000 else None


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _bias(llm: LLM, biases: Sequence[tuple[int | str, float]]) -> dict[int, float]:
    found: dict[int, float] = {}
    for token, bias in biases:
        ids = [token] if isinstance(token, int) else tokenizer_of(llm).encode(token, bos=False)
        found |= dict.fromkeys(ids, bias)
    return found


def _prompts(fields: Fields, most: int) -> list[Prompt]:
    """One prompt, or a list of them."""
    given: Any = fields.need("prompt", object)
    prompts = given if isinstance(given, list) and not is_prompt(given) else [given]
    if not prompts or not all(map(is_prompt, prompts)):
        what = "must be a text, a list of token ids and texts, or a list of such prompts"
        raise fields.refusal("prompt", what, code="invalid_type")
    if len(prompts) > most:
        raise fields.refusal("prompt", f"has {len(prompts)} prompts, the most is {most}")
    return prompts


def _read(llm: LLM, prompt: Prompt) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if any(isinstance(part, str) for part in prompt):
        return mixed(tokenizer_of(llm), prompt, add_special=True, special=True)
    return [part for part in prompt if isinstance(part, int)]


# ---- what is answered


def _whole(answer: Answer, index: int, made: Completion, wanted: Wanted) -> dict[str, Any]:
    body = {"index": index, "content": made.text, "tokens": made.tokens if wanted.returns_tokens else []}
    if wanted.n_probs:
        each = zip(made.tokens, made.logprobs or (), made.top_logprobs or (), strict=True)
        body["completion_probabilities"] = [_probability(answer.llm, *one) for one in each]
    return body | _end(answer, made, wanted)


async def _chunks(answer: Answer, index: int, wanted: Wanted) -> AsyncIterator[str]:
    n, n_prompt = 0, len(answer.completions[0].prompt_tokens)
    async for piece in answer.pieces():
        n += piece.token is not None
        chunk: dict[str, Any] = {
            "index": index,
            "content": piece.text,
            "tokens": [] if piece.token is None else [piece.token],
            "stop": False,
            "tokens_predicted": n,
            "tokens_evaluated": n_prompt,
        }
        if wanted.n_probs and piece.token is not None and piece.logprob is not None:
            one = _probability(answer.llm, piece.token, piece.logprob, piece.top_logprobs)
            chunk["completion_probabilities"] = [one]
        yield event(chunk)
    yield event({"index": index, "content": "", "tokens": [], **_end(answer, answer.completions[0], wanted)})


def _end(answer: Answer, made: Completion, wanted: Wanted) -> dict[str, Any]:
    is_word = isinstance(made.stop_reason, str)
    why = "limit" if made.finish_reason == "length" else "word" if is_word else "eos"
    body = {
        "stop": True,
        "model": answer.name,
        "tokens_predicted": len(made.tokens),
        "tokens_evaluated": len(made.prompt_tokens),
        "generation_settings": settings_of(answer.llm, answer.ask.sampling, wanted, made.seed),
        "prompt": text_of(answer.llm, made.prompt_tokens),
        "has_new_line": "\n" in made.text,
        "truncated": False,
        "stop_type": why,
        "stopping_word": made.stop_reason if is_word else "",
        "tokens_cached": len(made.prompt_tokens) + len(made.tokens) - 1,
    }
    return body | extras(answer, [made]) | {"timings": _timings(made)}


def settings_of(
    llm: LLM, sampling: Mapping[str, Any], wanted: Wanted | None, seed: int | None
) -> dict[str, Any]:
    """All parameters of an answer, in llama.cpp's words; those that bias tokens are left out."""
    params = SamplingParams(**sampling).resolve(llm.defaults)
    values = {f.name: getattr(params, f.name) for f in fields(params)}
    found = {name: values[field] for name, field in SAMPLING.items() if name != "json_schema"}
    return found | {
        "n_predict": -1 if params.max_tokens is None else params.max_tokens,
        "max_tokens": -1 if params.max_tokens is None else params.max_tokens,
        "seed": -1 if seed is None else seed,
        "grammar": params.grammar or "",
        "ignore_eos": wanted is not None and wanted.ignores_eos,
        "n_probs": params.top_logprobs,
        "samplers": list(CHAIN if wanted is None else wanted.samplers),
    }


def _timings(made: Completion) -> dict[str, Any]:
    t = made.timings
    found: dict[str, Any] = {}
    for name, n, seconds in (
        ("prompt", t.prompt_tokens, t.prompt_s),
        ("predicted", t.generated_tokens, t.generate_s),
    ):
        found[f"{name}_n"], found[f"{name}_ms"] = n, 1000 * seconds
        found[f"{name}_per_token_ms"] = 1000 * seconds / n if n else 0.0
        found[f"{name}_per_second"] = n / seconds if seconds else 0.0
    if t.drafted_tokens:
        found["draft_n"], found["draft_n_accepted"] = t.drafted_tokens, t.accepted_tokens
    return found


def _probability(
    llm: LLM, token: int, logprob: float, top: Sequence[tuple[int, float]] = ()
) -> dict[str, Any]:
    def shown(token: int, logprob: float) -> dict[str, Any]:
        data = bytes_of(llm, token)
        text = data.decode("utf-8", "replace")
        return {"id": token, "token": text, "bytes": list(data), "logprob": logprob}

    return shown(token, logprob) | {"top_logprobs": [shown(*one) for one in top]}
