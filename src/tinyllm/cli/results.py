"""Results as JSON, batches of prompts, and the replay of earlier results.

A result carries all that made it: the exact ids of its prompt, its parameters and seed, and the settings of
the model that may change a token (threads are not among them). Imports common.py and answers.py.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.cli.answers import as_prompt, chat_options, is_chat, messages_of
from tinyllm.cli.common import (
    EXIT_ERROR,
    EXIT_OK,
    UsageError,
    counted,
    json_text,
    load_model,
    note,
    peak_memory_bytes,
    progress_bar,
    put,
    rate,
    sampling_fields,
    seconds,
)

if TYPE_CHECKING:
    from tinyllm import LLM, Completion, SamplingParams

SETTINGS = ("context", "cache_type", "device")


def as_json(llm: LLM, prompt: str, completion: Completion, args: argparse.Namespace) -> str:
    """One line of JSON."""
    result: dict[str, Any] = {
        "model": args.model,
        "prompt": prompt,
        "chat": is_chat(llm, args),
        "text": completion.text,
        "reasoning": completion.reasoning,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
        "timings": {**asdict(completion.timings), "peak_memory_bytes": peak_memory_bytes()},
        "parameters": {**sampling_fields(args), "seed": completion.seed},
        "settings": {name: getattr(llm, name) for name in SETTINGS}
        | {"weights": args.weights, "lora": args.lora},
        "prompt_ids": completion.prompt_tokens,
    }
    if args.tools is not None:
        result["tool_calls"] = [asdict(call) for call in completion.tool_calls]
        options = {name: value for name, value in chat_options(args).items() if value}
        result["conversation"] = {"messages": messages_of(prompt, args), **options}
    if args.logprobs is not None:
        result["logprobs"] = completion.logprobs
        result["top_logprobs"] = completion.top_logprobs
    return json_text(result)


def run_batch(args: argparse.Namespace, prompts: list[str], params: SamplingParams) -> int:
    """Continues all prompts in one batch and prints a JSON line for each, in their order."""
    with load_model(args.model, args) as llm:
        start = time.perf_counter()
        chats = is_chat(llm, args)
        ready = [as_prompt(llm, prompt, args) for prompt in prompts]
        with progress_bar("prompts") as progress:
            completions = llm(ready, params, special=args.special, reasoning=chats, progress=progress)
        elapsed = time.perf_counter() - start
        for prompt, completion in zip(prompts, completions, strict=True):
            put(as_json(llm, prompt, completion, args))
        n = sum(completion.timings.generated_tokens for completion in completions)
        work = f"{counted(len(prompts), 'prompt')}, {counted(n, 'token')} in {seconds(elapsed)}"
        note(f"{work}: {rate(n, elapsed):.1f} tok/s in all")
    return EXIT_OK


def replay(args: argparse.Namespace) -> int:
    """Generates the results in a file of --json or --prompts, or the answers of a served request, again; says
    of each whether every token is the same."""
    results = _read_results(Path(args.replay).expanduser())
    first = results[0]
    settings = {name: first["settings"].get(name) for name in ("context", "cache_type", "weights")}
    if args.lora is None:
        args.lora = _loras(first["settings"])
    n_same = 0
    with load_model(args.model or first["model"], args, **settings) as llm:
        for number, result in enumerate(results, 1):
            completion = _again(llm, result)
            verdict = _compare(llm, result["tokens"], completion.tokens)
            if completion.prompt_tokens != result["prompt_ids"]:
                verdict = "different: the conversation makes another prompt"
            n_same += verdict.startswith("same")
            put(f"result {number}: {verdict}" if len(results) > 1 else verdict)
    return EXIT_OK if n_same == len(results) else EXIT_ERROR


def _loras(settings: Mapping[str, Any]) -> list[tuple[str, float]] | None:
    """The adapters that a result was made with; of a served one only their name is known."""
    if name := settings.get("adapter"):
        raise UsageError(f"the result was made with the adapter {name!r}: give --lora PATH")
    loras = settings.get("lora") or []
    try:
        return [(str(path), float(scale)) for path, scale in loras] or None
    except (TypeError, ValueError):
        raise UsageError("the result's settings.lora is not what --json writes") from None


def _again(llm: LLM, result: Mapping[str, Any]) -> Completion:
    parameters, conversation = dict(result["parameters"]), result.get("conversation")
    if bias := parameters.get("logit_bias"):
        # JSON has texts as keys, and no infinity.
        parameters["logit_bias"] = {int(t): -math.inf if x is None else x for t, x in bias.items()}
    completion: Completion
    if conversation:
        completion = llm.chat(**conversation, **parameters)
    else:
        completion = llm(result["prompt_ids"], **parameters, reasoning=bool(result.get("chat")))
    return completion


def _compare(llm: LLM, before: list[int], now: list[int]) -> str:
    if before == now:
        return f"same: all {counted(len(now), 'token')}" if len(now) != 1 else "same: the one token"

    def name(tokens: list[int], i: int) -> str:
        if i >= len(tokens):
            return "the end"
        return f"{tokens[i]} ({llm.tokenizer.token_text(tokens[i])!r})" if llm.tokenizer else str(tokens[i])

    i = next(
        (i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now))
    )
    return f"different: token {i + 1} of {len(before)} was {name(before, i)} and is {name(now, i)}"


_KINDS: dict[str, type] = {
    "model": str,
    "prompt_ids": list,
    "tokens": list,
    "parameters": dict,
    "settings": dict,
}


def _read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file: one object, or one a line; of a served answer those that its "replay" has."""
    from tinyllm.errors import FormatError

    try:
        found = _json_values(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise FormatError(f"{path} is not what --json writes: {e}") from None
    results: list[Any] = []
    for value in found:
        served = value.get("replay") if isinstance(value, dict) else None
        results += served if isinstance(served, list) else [value]
    for result in results or [None]:
        missing = [
            key
            for key, kind in _KINDS.items()
            if not isinstance(result, dict) or not isinstance(result.get(key), kind)
        ]
        if missing:
            raise FormatError(f"{path} is not what --json writes: it has no {', '.join(missing)}")
    return results


def _json_values(text: str) -> list[Any]:
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        if lines[0].strip() == "{":  # one object, over many lines
            return [json.loads(text)]
        raise
