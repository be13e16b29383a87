"""The dicts that completions and chats are: whole ones, chunks of streams, and their log probabilities.

Imports nothing of ours. llama.py makes completions with a `Writer`; llama_chat_format.py makes chats of them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Dict = dict[str, Any]


class Taken(NamedTuple):
    """A token of a text with what was asked for beside it. logprob None: nothing came before it."""

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Writer:
    """Writes one completion. text_of: a token's text, "" for special tokens. skipped: the BOS, which log
    probabilities leave out."""

    def __init__(self, model: str, text_of: Callable[[int], str], skipped: int) -> None:
        self.id, self.created, self.model = f"cmpl-{uuid.uuid4()}", int(time.time()), model
        self._text_of, self._skipped = text_of, skipped

    def chunk(self, text: str, logprobs: Dict | None = None, finish_reason: str | None = None) -> Dict:
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }

    def whole(
        self, text: str, logprobs: Dict | None, finish_reason: str, n_prompt: int, n_tokens: int
    ) -> Dict:
        usage = {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_tokens,
            "total_tokens": n_prompt + n_tokens,
        }
        return {**self.chunk(text, logprobs, finish_reason), "usage": usage}

    def logprobs(self, taken: Sequence[Taken], offset: int) -> Dict:
        """offset: of the first token in the text, in characters."""
        texts, offsets = [], []
        taken = [one for one in taken if one.token != self._skipped]
        for one in taken:
            texts.append(self._text_of(one.token))
            offsets.append(offset)
            offset += len(texts[-1])
        return {
            "tokens": texts,
            "text_offset": offsets,
            "token_logprobs": [one.logprob for one in taken],
            "top_logprobs": [
                None
                if one.logprob is None
                else {self._text_of(i): logprob for i, logprob in one.top} | {text: one.logprob}
                for one, text in zip(taken, texts, strict=True)
            ],
        }


def chat_logprobs(logprobs: Dict | None) -> Dict | None:
    """A completion's log probabilities as a chat has them."""
    if logprobs is None:
        return None
    lists = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    return {
        "content": [
            {
                "token": token,
                "bytes": None,
                "logprob": logprob,
                "top_logprobs": [{"token": t, "logprob": p, "bytes": None} for t, p in top.items()],
            }
            for token, logprob, top in zip(*lists, strict=True)
        ],
        "refusal": None,
    }


def chat_of(completion: Dict, message: Dict, finish_reason: str) -> Dict:
    """A whole answer. completion: gives the id, the time, the model, log probabilities and the usage."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", **message},
        "logprobs": chat_logprobs(completion["choices"][0]["logprobs"]),
        "finish_reason": finish_reason,
    }
    return {
        "id": "chat" + completion["id"],
        "object": "chat.completion",
        "created": completion["created"],
        "model": completion["model"],
        "choices": [choice],
        "usage": completion["usage"],
    }


def chat_chunk(chunk: Dict, delta: Dict, finish_reason: str | None = None) -> Dict:
    """A part of a streamed answer, of the completion's part that it is made of."""
    choice = {
        "index": 0,
        "delta": delta,
        "logprobs": chat_logprobs(chunk["choices"][0]["logprobs"]),
        "finish_reason": finish_reason,
    }
    return {
        "id": "chat" + chunk["id"],
        "model": chunk["model"],
        "created": chunk["created"],
        "object": "chat.completion.chunk",
        "choices": [choice],
    }


def text_to_chat(answer: Any, stream: bool) -> Any:
    """A completion, or its chunks, as a chat's."""
    if stream:
        return _chunks_to_chat(answer)
    choice = answer["choices"][0]
    return chat_of(answer, {"content": choice["text"]}, choice["finish_reason"])


def _chunks_to_chat(chunks: Iterator[Dict]) -> Iterator[Dict]:
    is_first = True
    for chunk in chunks:
        if is_first:
            bare = {**chunk, "choices": [{"logprobs": None}]}
            yield chat_chunk(bare, {"role": "assistant"})
            is_first = False
        choice = chunk["choices"][0]
        reason = choice["finish_reason"]
        yield chat_chunk(chunk, {"content": choice["text"]} if reason is None else {}, reason)


def text_to_call(answer: Any, name: str, stream: bool) -> Any:
    """A completion whose text is the arguments of one call, or its chunks, as a chat's."""
    if stream:
        return _chunks_to_call(answer, name)
    text = answer["choices"][0]["text"]
    return chat_of(answer, calls_message([(call_id(0, name, answer["id"]), name, text)]), "tool_calls")


def _chunks_to_call(chunks: Iterator[Dict], name: str) -> Iterator[Dict]:
    last: Dict | None = None
    for chunk in chunks:
        if last is None:
            yield chat_chunk({**chunk, "choices": [{"logprobs": None}]}, call_delta(role="assistant"))
        last = chunk
        if chunk["choices"][0]["finish_reason"] is None:
            call = (0, call_id(0, name, chunk["id"]), name, chunk["choices"][0]["text"])
            yield chat_chunk(chunk, call_delta(call))
    if last is not None:
        yield chat_chunk(last, call_delta(), "tool_calls")


def call_id(index: int, name: str, completion_id: str) -> str:
    return f"call__{index}_{name}_{completion_id}"


def calls_message(calls: Sequence[tuple[str, str, str]], content: str | None = None) -> Dict:
    """The message of (id, name, arguments as JSON), with the old `function_call` where there is one call."""
    functions = [{"name": name, "arguments": arguments} for _, name, arguments in calls]
    message: Dict = {
        "content": content,
        "tool_calls": [
            {"id": id, "type": "function", "function": dict(function)}
            for (id, *_), function in zip(calls, functions, strict=True)
        ],
    }
    return message | ({"function_call": functions[0]} if len(functions) == 1 else {})


def call_delta(call: tuple[int, str, str, str] | None = None, role: str | None = None) -> Dict:
    """The delta of (index, id, name, further text of the arguments)."""
    delta: Dict = {"role": role, "content": None, "function_call": None, "tool_calls": None}
    if call is not None:
        index, id, name, arguments = call
        function = {"name": name, "arguments": arguments}
        delta["function_call"] = function
        delta["tool_calls"] = [{"index": index, "id": id, "type": "function", "function": dict(function)}]
    return delta
