"""OpenAI's /v1/completions: texts after one prompt or several, with the log probabilities of old.

Imports common.py, old_logprobs.py and the server's rooms.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.responses import Response

from tinyllm import Completion, Score
from tinyllm.server.answers import several
from tinyllm.server.app import Answer, Call
from tinyllm.server.ask import Ask, Fields
from tinyllm.server.dialects.openai.chat import stream_options
from tinyllm.server.dialects.openai.common import (
    HARMLESS,
    form_of,
    mean_logprob,
    own_form_of,
    prompts_of,
    sampling_of,
    usage_of,
    with_tops,
)
from tinyllm.server.dialects.openai.old_logprobs import OldLogprobs
from tinyllm.server.streams import event, gathered, merged, shielded

MOST_TOP = 5


@dataclass(frozen=True)
class _Wishes:
    """What a request says beside its asks. top: likeliest tokens that are told of each, None for no log
    probabilities. generates: whether there is anything to be written (max_tokens is not 0)."""

    n: int
    top: int | None
    echo: bool
    generates: bool
    has_usage: bool


async def completions(call: Call) -> Response:
    fields = await call.fields()
    streams = fields.take("stream", bool, False)
    wishes, ask = _ask(fields, stream_options(fields, streams))
    prompts = prompts_of(fields, "prompt", call.server.limits.prompts)
    asks = [replace(ask, prompt=prompt) for prompt in prompts]
    if streams and ask.n != wishes.n:
        raise fields.refusal("best_of", "chooses at the end: it cannot be used with stream")
    fields.finish()
    server = call.server
    if streams:
        return await call.parts(asks, lambda answers: _chunks(answers, wishes, server.at_once(asks)))

    async def work() -> dict[str, Any]:
        async with server.answers(asks) as answers:
            return await _whole(answers, wishes, server.at_once(asks))

    return await call.json(work())


def _ask(fields: Fields, has_usage: bool) -> tuple[_Wishes, Ask]:
    """All but the prompts."""
    fields.harmless(*HARMLESS)
    fields.only("suffix", "", why="is not supported: texts are continued, not filled in")
    n, echo = fields.take("n", int, 1), fields.take("echo", bool, False)
    best_of = fields.take("best_of", int, n)
    if best_of < n:
        raise fields.refusal("best_of", f"is {best_of}, fewer than n ({n})")
    top = fields.take("logprobs", int)
    if top is not None and not 0 <= top <= MOST_TOP:
        raise fields.refusal("logprobs", f"is {top}, expected 0 to {MOST_TOP}")
    generates = not fields.drop("max_tokens", 0)
    sampling = {**sampling_of(fields), **form_of(fields.object("response_format")), **own_form_of(fields)}
    if not generates:
        sampling["max_tokens"] = 1
    sampling.setdefault("seed", secrets.randbits(32))  # one for all prompts
    sampling["logprobs"], sampling["top_logprobs"] = top is not None or best_of > n, top or 0
    ask = Ask(
        model=fields.take("model", str),
        n=best_of,
        sampling=sampling,
        special=fields.take("special", bool, False),
        replay=fields.take("replay", bool, False),
    )
    return _Wishes(n, top, echo, generates, has_usage), ask


async def _whole(answers: Sequence[Answer], wishes: _Wishes, at_once: int) -> dict[str, Any]:
    async def one(answer: Answer) -> tuple[str, Score | None, list[Completion]]:
        scored = await _scored(answer, wishes)
        return *scored, await answer.whole() if wishes.generates else _nothing(answer)

    made = await gathered([partial(one, answer) for answer in answers], at_once)
    choices: list[dict[str, Any]] = []
    chosen: list[tuple[Answer, list[Completion]]] = []
    for answer, (before, score, group) in zip(answers, made, strict=True):
        best = group
        if len(group) > wishes.n:
            best = sorted(group, key=mean_logprob, reverse=True)[: wishes.n]
        chosen.append((answer, best))
        for c in best:
            shown = _old_logprobs(answer, wishes, before, score, c) if wishes.top is not None else None
            choice = {"index": len(choices), "text": before + c.text, "logprobs": shown}
            choices.append({**choice, "finish_reason": _reason(c)})
    usage = usage_of([group for _, _, group in made])
    seed = {"seed": made[0][2][0].seed}  # best_of may have chosen another
    return {**_head(answers[0]), "choices": choices, "usage": usage, **several(chosen), **seed}


async def _scored(answer: Answer, wishes: _Wishes) -> tuple[str, Score | None]:
    """The text that an echo begins with, and how likely it is where that is asked for."""
    if not wishes.echo:
        return "", None
    llm, prompt, ids = answer.llm, answer.ask.prompt, answer.completions[0].prompt_tokens
    text = prompt if isinstance(prompt, str) else llm.tokenizer.decode(ids) if llm.tokenizer else ""
    if wishes.top is None:
        return text, None
    return text, await shielded(asyncio.to_thread(llm.score, ids, top_logprobs=wishes.top))


def _nothing(answer: Answer) -> list[Completion]:
    """What a request for no token gets."""
    return [replace(one, finish_reason="length") for one in answer.completions]


def _old_logprobs(
    answer: Answer, wishes: _Wishes, before: str, score: Score | None, completion: Completion
) -> dict[str, Any]:
    old = OldLogprobs(answer.llm, completion.prompt_tokens, before, wishes.top or 0)
    old.add_prompt(score)
    for token in with_tops(completion):
        old.add(*token)
    return old.take(len(before) + len(completion.text))


def _reason(completion: Completion) -> str:
    return "length" if completion.finish_reason == "length" else "stop"


async def _chunks(answers: Sequence[Answer], wishes: _Wishes, at_once: int) -> AsyncIterator[str]:
    head = _head(answers[0]) | ({"usage": None} if wishes.has_usage else {})

    def chunk(i: int, text: str, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": i, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    async def one(p: int) -> AsyncIterator[dict[str, Any]]:
        """The chunks of one prompt, whose choices have the numbers from p * n on."""
        answer = answers[p]
        before, score = await _scored(answer, wishes)
        old: list[OldLogprobs] = []
        for i in range(wishes.n):
            old.append(OldLogprobs(answer.llm, answer.completions[0].prompt_tokens, before, wishes.top or 0))
            old[i].add_prompt(score)
            if before:
                yield chunk(p * wishes.n + i, before, old[i].take() if wishes.top is not None else None)
        if not wishes.generates:
            return
        async for piece in answer.pieces():
            logprobs = None
            if wishes.top is not None and piece.token is not None:
                i = piece.sample
                old[i].add(piece.token, piece.logprob or 0.0, piece.top_logprobs)
                logprobs = old[i].take()
            if piece.text or logprobs:
                yield chunk(p * wishes.n + piece.sample, piece.text, logprobs)

    async for _, value in merged([one(p) for p in range(len(answers))], at_once):
        yield event(value)
    groups = [answer.completions if wishes.generates else _nothing(answer) for answer in answers]
    made = [c for group in groups for c in group]
    for i, c in enumerate(made):
        more = several(list(zip(answers, groups, strict=True))) if i == len(made) - 1 else {}
        yield event({**chunk(i, "", None, _reason(c)), **more})
    if wishes.has_usage:
        yield event({**head, "choices": [], "usage": usage_of(groups)})
    yield event("[DONE]")


def _head(answer: Answer) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": answer.name,
    }
