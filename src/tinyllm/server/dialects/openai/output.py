"""The items of an answer of /v1/responses, and the events that tell of them while they are made.

Invariant: an item is added, goes on and is done before the next is added, and its events say together what
`items` has in the end. A call that turns out malformed is done as "incomplete" and is not among the items;
its text follows as a message. Imports common.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from tinyllm import LLM, Piece
from tinyllm.server.dialects.openai.common import chat_logprobs

Event = dict[str, Any]


class Output:
    """Of one answer. has_logprobs: whether texts come with those of their tokens."""

    def __init__(self, llm: LLM, has_logprobs: bool) -> None:
        self._llm, self._has_logprobs = llm, has_logprobs
        self._items: dict[int, dict[str, Any]] = {}  # by their index in the events
        self._n = 0
        self._now: int | None = None  # the item that goes on
        self._call: dict[str, Any] | None = None  # that goes on; its item is there once its id is known
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is not out yet
        self.reasoning_tokens = 0

    @property
    def items(self) -> list[dict[str, Any]]:
        return list(self._items.values())

    def take(self, piece: Piece) -> Iterator[Event]:
        """What there is to tell of a piece."""
        self.reasoning_tokens += piece.token is not None and piece.kind == "reasoning"
        if self._has_logprobs and piece.token is not None and piece.kind == "text":
            token = (piece.token, piece.logprob or 0.0, piece.top_logprobs)
            self._logprobs += chat_logprobs(self._llm, [token])
        if piece.kind == "tool_call":
            if piece.index is not None:  # else it is a token of what may become one
                yield from self._call_goes_on(piece)
            return
        if piece.index is not None:
            yield from self._take_back()
        if piece.text:
            yield from self._goes_on(piece)

    def end(self, status: str = "completed") -> Iterator[Event]:
        """The answer is over."""
        yield from self._close(status)

    # ---- messages and reasoning

    def _goes_on(self, piece: Piece) -> Iterator[Event]:
        kind = "reasoning" if piece.kind == "reasoning" else "message"
        if self._now is None or self._items[self._now]["type"] != kind:
            yield from self._close()
            yield from self._begin_text(kind)
        assert self._now is not None
        item, here = self._items[self._now], self._here()
        item["content"][0]["text"] += piece.text
        if kind == "reasoning":
            yield {"type": "response.reasoning_text.delta", **here, "content_index": 0, "delta": piece.text}
            return
        logprobs, self._logprobs = self._logprobs, []
        item["content"][0]["logprobs"] += logprobs
        yield {
            "type": "response.output_text.delta",
            **here,
            "content_index": 0,
            "delta": piece.text,
            "logprobs": logprobs,
        }

    def _begin_text(self, kind: str) -> Iterator[Event]:
        item: dict[str, Any] = {"id": _id("rs"), "type": "reasoning", "summary": []}
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            item = {"id": _id("msg"), "type": "message", "role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield from self._add({**item, "status": "in_progress", "content": []})
        assert self._now is not None
        self._items[self._now]["content"] = [part]
        added = {"type": "response.content_part.added", **self._here(), "content_index": 0}
        yield {**added, "part": dict(part)}

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """Ends a message or reasoning that goes on."""
        if self._now is None:
            return
        item = self._items[self._now]
        part, here = item["content"][0], {**self._here(), "content_index": 0}
        if item["type"] == "message":
            part["logprobs"] += self._logprobs
            self._logprobs = []
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield {"type": "response.output_text.done", **here, **done}
        else:
            yield {"type": "response.reasoning_text.done", **here, "text": part["text"]}
        yield {"type": "response.content_part.done", **here, "part": dict(part)}
        yield from self._done(status)

    # ---- calls

    def _call_goes_on(self, piece: Piece) -> Iterator[Event]:
        """A call whose id the model writes late is told of when it is there."""
        if piece.name:
            yield from self._close()
            call = {"id": _id("fc"), "type": "function_call", "status": "in_progress"}
            self._call = {**call, "call_id": piece.call_id, "name": piece.name, "arguments": ""}
            if piece.call_id:
                yield from self._add(self._call)
        assert self._call is not None, "the first piece of a call has its name"
        self._call["arguments"] += piece.text
        if piece.text and self._now is not None:
            yield {"type": "response.function_call_arguments.delta", **self._here(), "delta": piece.text}
        if piece.tool_call is None:
            return
        arguments = self._call["arguments"]
        if self._now is None:
            yield from self._add({**self._call, "call_id": piece.tool_call.id, "arguments": ""})
            assert self._now is not None
            self._items[self._now]["arguments"] = arguments
            yield {"type": "response.function_call_arguments.delta", **self._here(), "delta": arguments}
        self._call = None
        name = piece.tool_call.name
        done = {"type": "response.function_call_arguments.done", **self._here()}
        yield {**done, "name": name, "arguments": arguments}
        yield from self._done("completed")

    def _take_back(self) -> Iterator[Event]:
        """The call that goes on is none."""
        self._call, now = None, self._now
        if now is not None:
            yield from self._done("incomplete")
            del self._items[now]

    # ---- items

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        self._now = self._n
        self._n += 1
        self._items[self._now] = item
        yield {"type": "response.output_item.added", "output_index": self._now, "item": deepcopy(item)}

    def _done(self, status: str) -> Iterator[Event]:
        assert self._now is not None
        item, now = self._items[self._now], self._now
        item["status"], self._now = status, None
        yield {"type": "response.output_item.done", "output_index": now, "item": deepcopy(item)}

    def _here(self) -> dict[str, Any]:
        assert self._now is not None
        return {"item_id": self._items[self._now]["id"], "output_index": self._now}


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
