"""What Anthropic's clients are answered: a message, or the events of one.

A call of a tool goes out when it is whole, so that a malformed one never does, but for tools that ask for
`eager_input_streaming`. Imports app.py, answers.py, streams.py and asked.py.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from tinyllm import Completion, Piece
from tinyllm.server.answers import extras
from tinyllm.server.app import Answer
from tinyllm.server.ask import Ask
from tinyllm.server.dialects.anthropic.asked import Wanted
from tinyllm.server.streams import dumps, event


def _head(answer: Answer, completion: Completion, n_made: int) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": answer.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": len(completion.prompt_tokens), "output_tokens": n_made},
    }


def message_of(answer: Answer, completion: Completion, wanted: Wanted) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if completion.reasoning and wanted.shows_thinking:
        content.append({"type": "thinking", "thinking": completion.reasoning, "signature": ""})
    if completion.text:
        content.append({"type": "text", "text": completion.text})
    for made in completion.tool_calls:
        content.append({"type": "tool_use", "id": made.id, "name": made.name, "input": made.arguments})
    head = _head(answer, completion, len(completion.tokens))
    return head | {"content": content} | _stop(completion, wanted.ask) | extras(answer, [completion])


def _stop(completion: Completion, ask: Ask) -> dict[str, Any]:
    """Why the answer ends, in its clients' words."""
    reason, sequence = "end_turn", None
    if completion.finish_reason == "length":
        is_most = len(completion.tokens) >= ask.sampling["max_tokens"]
        reason = "max_tokens" if is_most else "model_context_window_exceeded"
    elif isinstance(completion.stop_reason, str):
        reason, sequence = "stop_sequence", completion.stop_reason
    elif completion.tool_calls:
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _named(kind: str, **members: Any) -> str:
    return event({"type": kind, **members}, kind)


async def events_of(answer: Answer, wanted: Wanted) -> AsyncIterator[str]:
    yield _named("message_start", message=_head(answer, answer.completions[0], 0))
    index, current = -1, None
    parts = _Parts(wanted)
    async for piece in answer.pieces():
        for part in parts.of(piece):
            if part.block != current:
                if current is not None:
                    yield _named("content_block_stop", index=index)
                index, current = index + 1, part.block
                yield _named("content_block_start", index=index, content_block=part.start)
            if part.delta is not None:
                yield _named("content_block_delta", index=index, delta=part.delta)
    if current is not None:
        yield _named("content_block_stop", index=index)
    completion = answer.completions[0]
    usage = {"input_tokens": len(completion.prompt_tokens), "output_tokens": len(completion.tokens)}
    delta = _stop(completion, wanted.ask)
    yield _named("message_delta", delta=delta, usage=usage, **extras(answer, [completion]))
    yield _named("message_stop")


@dataclass(frozen=True)
class _Part:
    """What goes out of a piece. block: which one it is part of; start: what opens it."""

    block: tuple[str, int | None]
    start: dict[str, Any]
    delta: dict[str, Any] | None


class _Parts:
    """Pieces as parts of blocks."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._names: dict[int, tuple[str, str]] = {}  # of eager calls: id and name

    def of(self, piece: Piece) -> Iterator[_Part]:
        if piece.kind == "tool_call" and piece.index is not None:
            yield from self._of_call(piece, piece.index)
        elif piece.kind == "text" and piece.text:
            delta = {"type": "text_delta", "text": piece.text}
            yield _Part(("text", None), {"type": "text", "text": ""}, delta)
        elif piece.kind == "reasoning" and piece.text and self._wanted.shows_thinking:
            start = {"type": "thinking", "thinking": "", "signature": ""}
            yield _Part(("thinking", None), start, {"type": "thinking_delta", "thinking": piece.text})

    def _of_call(self, piece: Piece, index: int) -> Iterator[_Part]:
        call = piece.tool_call
        if piece.name in self._wanted.eager and piece.call_id:
            self._names[index] = piece.call_id, piece.name
        if index in self._names:
            yield self._call(index, *self._names[index], piece.text)
        elif call is not None:
            yield self._call(index, call.id, call.name, dumps(call.arguments))

    def _call(self, index: int, id: str, name: str, arguments: str) -> _Part:
        start = {"type": "tool_use", "id": id, "name": name, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": arguments}
        return _Part(("tool_use", index), start, delta if arguments else None)
