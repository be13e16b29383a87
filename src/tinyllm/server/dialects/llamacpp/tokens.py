"""llama.cpp's endpoints of tokens, templates and vectors, and how it reads and writes a text.

Prompts are read as llama-server does: the texts of special tokens are these tokens. Imports ask.py, app.py,
streams.py and thinking.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from tinyllm import LLM, Tokenizer
from tinyllm.server.app import Call
from tinyllm.server.ask import Ask, Fields, Refusal
from tinyllm.server.dialects.openai.messages import messages_of
from tinyllm.server.streams import json_response
from tinyllm.server.thinking import template_args

Prompt = str | list[int | str]


async def tokenize(call: Call) -> Response:
    fields = await call.fields()
    model = fields.take("model", str)
    content: Any = fields.need("content", object)
    parts: list[int | str] = [content] if isinstance(content, str) else content
    if not isinstance(parts, list) or not {*map(type, parts)} <= {int, str}:
        raise fields.refusal("content", "must be a text, or a list of token ids and texts")
    add_special, special = (
        fields.take("add_special", bool, False),
        fields.take("parse_special", bool, True),
    )
    with_pieces = fields.take("with_pieces", bool, False)
    fields.finish()

    def work(llm: LLM) -> list[Any]:
        ids = mixed(tokenizer_of(llm), parts, add_special=add_special, special=special)
        return [{"id": id, "piece": _piece(llm, id)} for id in ids] if with_pieces else ids

    return json_response({"tokens": await call.of_model(model, work)})


def _piece(llm: LLM, id: int) -> str | list[int]:
    """Its text, or its bytes where they are no whole characters."""
    data = bytes_of(llm, id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(call: Call) -> Response:
    fields = await call.fields()
    model, tokens = fields.take("model", str), _ids(fields, "tokens")
    fields.finish()

    def work(llm: LLM) -> str:
        n = tokenizer_of(llm).vocab_size
        if wrong := [id for id in tokens if not 0 <= id < max(n, llm.config.vocab_size)]:
            raise fields.refusal("tokens", f"has {wrong[0]}, expected ids from 0 to {n - 1}")
        return text_of(llm, tokens)

    return json_response({"content": await call.of_model(model, work)})


def _ids(fields: Fields, name: str) -> list[int]:
    ids = fields.need(name, list)
    if not {*map(type, ids)} <= {int}:
        raise fields.refusal(name, "must be token ids", code="invalid_type")
    return ids


async def apply_template(call: Call) -> Response:
    fields = await call.fields()
    ask = Ask(
        fields.take("model", str),
        messages=messages_of(fields),
        tools=[tool.rest() for tool in fields.objects("tools") or ()],
        template_args=fields.take("chat_template_kwargs", dict, {}),
    )
    fields.only("add_generation_prompt", True)
    fields.finish()

    def work(llm: LLM) -> str:
        """Without the BOS that a prompt gets anyway."""
        variables = template_args(llm, ask) or None
        ids = llm.chat_ids(ask.messages or (), tools=ask.tools or None, template_args=variables)
        tokenizer = tokenizer_of(llm)
        if tokenizer.prefix and ids[: len(tokenizer.prefix)] == tokenizer.prefix:
            ids = ids[len(tokenizer.prefix) :]
        return tokenizer.decode(ids, special=True)

    return json_response({"prompt": await call.of_model(ask.model, work)})


async def embedding(call: Call) -> Response:
    fields = await call.fields()
    model = fields.take("model", str)
    name = "input" if "input" in fields else "content"
    given = fields.need(name, object)
    is_one = isinstance(given, str) or (isinstance(given, list) and {*map(type, given)} == {int})
    texts: list[Any] = given if isinstance(given, list) and not is_one else [given]
    if not all(isinstance(t, str) or (isinstance(t, list) and {*map(type, t)} == {int}) for t in texts):
        raise fields.refusal(name, "must be a text, token ids, or a list of such", code="invalid_type")
    normalize = fields.take("embd_normalize", int, 2)
    if normalize not in (2, -1):
        raise fields.refusal("embd_normalize", "must be 2 (to length 1) or -1 (not at all)")
    fields.finish()

    def work(llm: LLM) -> list[dict[str, Any]]:
        vectors = llm.embed(texts, normalize=normalize == 2, cancel=call.gone.is_set).tolist()
        return [{"index": i, "embedding": [vector]} for i, vector in enumerate(vectors)]

    return await call.json(call.compute(model, work))


def tokenizer_of(llm: LLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise Refusal(400, f"{llm.name} has no tokenizer: give token ids")
    return llm.tokenizer


def mixed(tokenizer: Tokenizer, parts: Sequence[int | str], *, add_special: bool, special: bool) -> list[int]:
    ids: list[int] = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            ids += tokenizer.encode(part, bos=None if add_special and i == 0 else False, special=special)
        else:
            ids.append(part)
    return ids


def is_prompt(value: Any) -> bool:
    """Whether it is a text, or a list of ids, or of ids and texts; a list of texts is several."""
    if not isinstance(value, list):
        return isinstance(value, str)
    kinds = {*map(type, value)}
    return int in kinds and kinds <= {int, str}


def bytes_of(llm: LLM, token: int) -> bytes:
    """Of a model's vocabulary, which may be padded beyond its tokenizer's."""
    tokenizer = llm.tokenizer
    return tokenizer.token_bytes(token) if tokenizer and token < tokenizer.vocab_size else b""


def text_of(llm: LLM, ids: Sequence[int]) -> str:
    """Of tokens one after the other, special ones by their names, as llama.cpp puts it."""
    return b"".join(bytes_of(llm, id) for id in ids).decode("utf-8", "replace")
