"""What every answer carries beside its dialect's own members, so that it can be made again.

`seed` and `timings` always; with the member "replay": true of a request also `replay`, for each of its texts
what `tinyllm-run --replay` reads. Imports app.py, thinking.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from tinyllm import Completion, SamplingParams
from tinyllm.server.app import Answer
from tinyllm.server.thinking import template_args


def extras(answer: Answer, completions: Sequence[Completion]) -> dict[str, Any]:
    """The members for all texts of a request."""
    return several([(answer, completions)])


def several(made: Sequence[tuple[Answer, Sequence[Completion]]]) -> dict[str, Any]:
    """The same of a request with several prompts."""
    firsts = [completions[0] for _, completions in made]
    every = [c.timings for _, completions in made for c in completions]
    found = {
        "seed": firsts[0].seed,
        "timings": {
            **asdict(firsts[0].timings),
            "prompt_tokens": sum(c.timings.prompt_tokens for c in firsts),
            "prompt_s": max(c.timings.prompt_s for c in firsts),
            "cached_tokens": sum(c.timings.cached_tokens for c in firsts),
            "generated_tokens": sum(t.generated_tokens for t in every),
            "generate_s": max(t.generate_s for t in every),
            "drafted_tokens": sum(t.drafted_tokens for t in every),
            "accepted_tokens": sum(t.accepted_tokens for t in every),
        },
    }
    if made[0][0].ask.replay:
        found["replay"] = [replay_of(answer, c) for answer, completions in made for c in completions]
    return found


def replay_of(answer: Answer, completion: Completion) -> dict[str, Any]:
    """All that made one text: the ids of its prompt, its parameters and seed, the settings of the model that
    may change a token, and for calls of tools the conversation that they are read by."""
    llm, ask = answer.llm, answer.ask
    params = SamplingParams(**{**ask.sampling, "seed": completion.seed}).resolve(llm.defaults)
    found: dict[str, Any] = {
        "model": answer.name,
        "chat": ask.messages is not None,
        "prompt_ids": completion.prompt_tokens,
        "tokens": completion.tokens,
        "parameters": {f.name: getattr(params, f.name) for f in fields(params) if f.name != "processors"},
        "settings": {
            "context": llm.context,
            "cache_type": llm.cache_type,
            "device": llm.device,
            "weights": answer.weights,
        },
    }
    if answer.adapter is not None:
        found["settings"]["adapter"] = answer.adapter
    if ask.tools:
        found["conversation"] = {
            "messages": ask.messages,
            "tools": ask.tools,
            "tool_choice": ask.tool_choice,
            "strict": ask.strict,
            "chat_template": ask.chat_template,
            "template_args": template_args(llm, ask),
        }
    return found
