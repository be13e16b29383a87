"""Ollama's chat and generate: an answer whole or in lines, or a model loaded or unloaded.

Imports ask.py, app.py, answers.py, facts.py, streams.py and asked.py.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from starlette.responses import Response

from tinyllm import LLM, Completion
from tinyllm.chat.tools import ToolCall
from tinyllm.server.answers import extras
from tinyllm.server.app import Answer, Call
from tinyllm.server.ask import Ask, Refusal
from tinyllm.server.dialects.ollama.asked import Wanted, message_of, typed, wanted_of
from tinyllm.server.facts import can_do
from tinyllm.server.streams import json_response, line, rfc3339

LINES = "application/x-ndjson"

# How a part of an answer is put: of its text, what it thought, its calls, its log probabilities.
Part = Callable[[str, str, Sequence[ToolCall]], dict[str, Any]]


async def chat(call: Call) -> Response:
    fields = await call.fields()
    wanted = wanted_of(call, fields)
    tools = [typed(tool.rest()) for tool in fields.objects("tools") or ()]
    messages = [message_of(message) for message in fields.objects("messages") or ()]
    fields.finish()
    if not messages:
        return await _load(call, wanted, _in_message)
    return await _answer(call, wanted, lambda llm: Ask(messages=messages, tools=tools), _in_message)


async def generate(call: Call) -> Response:
    fields = await call.fields()
    wanted = wanted_of(call, fields)
    prompt, system = fields.take("prompt", str, ""), fields.take("system", str, "")
    template, is_raw = fields.take("template", str), fields.take("raw", bool, False)
    fields.only("suffix", "", why="is not supported: no model here fills a gap in a text")
    fields.only("context", [], why="is not supported: send the conversation's messages to /api/chat")
    fields.only("images", [], why="are not supported: this server reads text")
    fields.finish()
    if is_raw and (system or template):
        raise fields.refusal("raw", "does not go with system and template")

    def ask_of(llm: LLM) -> Ask:
        if is_raw:
            return Ask(prompt=prompt, special=True)
        if llm.chat_template is None and not template:
            if system:
                raise fields.refusal("system", "needs a chat template, and the model has none")
            return Ask(prompt=prompt)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        return Ask(messages=messages, chat_template=template or None)

    if not prompt:
        return await _load(call, wanted, _in_response)
    return await _answer(call, wanted, ask_of, _in_response)


async def _answer(call: Call, wanted: Wanted, ask_of: Callable[[LLM], Ask], part: Part) -> Response:
    async with call.server.models.use(wanted.served.name) as llm:
        load_ns = time.perf_counter_ns() - wanted.started
        _keep(call, wanted)
        if wanted.num_ctx > llm.context:
            raise Refusal(400, f"options.num_ctx is {wanted.num_ctx}, the model is loaded with {llm.context}")
        if wanted.effort not in (None, "none") and "thinking" not in can_do(llm.chat_template):
            raise Refusal(400, f"{wanted.served.name} does not support thinking", param="think")
        asked = replace(
            ask_of(llm),
            model=wanted.served.name,
            sampling=wanted.sampling,
            effort=wanted.effort,
            replay=wanted.replay,
        )
        reply = _Reply(wanted, part, load_ns)
        if wanted.streams:
            return await call.events(asked, reply.lines, LINES)
        return await call.whole(asked, reply.whole)


async def _load(call: Call, wanted: Wanted, part: Part) -> Response:
    """Nothing to say: the model is loaded, or unloaded where it is to be kept for no time."""
    if wanted.keep_alive_s == 0:
        reason = "unload"
        if not await call.server.models.unload(wanted.served):
            _keep(call, wanted)  # in use: it goes afterwards
    else:
        reason = "load"
        async with call.server.models.use(wanted.served.name):
            _keep(call, wanted)
    head = {"model": wanted.served.name, "created_at": rfc3339(time.time())}
    body = head | part("", "", ()) | {"done": True, "done_reason": reason}
    return json_response(body) if not wanted.streams else Response(line(body), media_type=LINES)


def _keep(call: Call, wanted: Wanted) -> None:
    usual, asked = call.server.models.keep_alive_s, wanted.keep_alive_s
    wanted.served.root.keep_alive_s = usual if asked is None else asked


class _Reply:
    """One answer, whole or in lines."""

    def __init__(self, wanted: Wanted, part: Part, load_ns: int) -> None:
        self._wanted, self._part, self._load_ns = wanted, part, load_ns

    def whole(self, answer: Answer, completions: list[Completion]) -> dict[str, Any]:
        completion = completions[0]
        thought = completion.reasoning if self._wanted.shows_thinking else None
        body = self._head(answer) | self._part(completion.text, thought or "", completion.tool_calls)
        if self._wanted.logprobs:
            tops = completion.top_logprobs or [[]] * len(completion.tokens)
            each = zip(completion.tokens, completion.logprobs or (), tops, strict=True)
            body["logprobs"] = [_logprob(answer.llm, *one) for one in each]
        return body | self._end(answer, completion)

    async def lines(self, answer: Answer) -> AsyncIterator[str]:
        async for piece in answer.pieces():
            text = piece.text if piece.kind == "text" else ""
            thought = piece.text if piece.kind == "reasoning" and self._wanted.shows_thinking else ""
            calls = (piece.tool_call,) if piece.tool_call else ()
            body = self._head(answer) | self._part(text, thought, calls) | {"done": False}
            if self._wanted.logprobs and piece.token is not None and piece.logprob is not None:
                body["logprobs"] = [_logprob(answer.llm, piece.token, piece.logprob, piece.top_logprobs)]
            elif not (text or thought or calls):
                continue
            yield line(body)
        yield line(self._head(answer) | self._part("", "", ()) | self._end(answer, answer.completions[0]))

    def _head(self, answer: Answer) -> dict[str, Any]:
        return {"model": answer.name, "created_at": rfc3339(time.time())}

    def _end(self, answer: Answer, completion: Completion) -> dict[str, Any]:
        timings = completion.timings
        return {
            "done": True,
            "done_reason": "length" if completion.finish_reason == "length" else "stop",
            "total_duration": time.perf_counter_ns() - self._wanted.started,
            "load_duration": self._load_ns,
            "prompt_eval_count": timings.prompt_tokens,
            "prompt_eval_duration": int(timings.prompt_s * 1e9),
            "eval_count": timings.generated_tokens,
            "eval_duration": int(timings.generate_s * 1e9),
            **extras(answer, [completion]),
        }


def _in_message(text: str, thought: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["thinking"] = thought
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    return {"message": message}


def _in_response(text: str, thought: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    return {"response": text} | ({"thinking": thought} if thought else {})


def _logprob(llm: LLM, token: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> dict[str, Any]:
    def shown(token: int, logprob: float) -> dict[str, Any]:
        tokenizer = llm.tokenizer
        data = tokenizer.token_bytes(token) if tokenizer and token < tokenizer.vocab_size else b""
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    return shown(token, logprob) | {"top_logprobs": [shown(*one) for one in top]}
