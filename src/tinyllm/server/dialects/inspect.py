"""Our own API, for the page and for whoever wants to see inside: models, the tokens of a text, what may come
next. docs/serve.md describes it.

Invariant: every member of a body is taken or refused by its name. `text` is a text; beside `messages` it is
the beginning of the answer to them. Imports ask.py, app.py, streams.py and engine/next_token.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from tinyllm import LLM, SamplingParams, Tokenizer
from tinyllm.engine.next_token import look, record
from tinyllm.server.app import Call, Dialect
from tinyllm.server.ask import Fields, Refusal
from tinyllm.server.models import Served
from tinyllm.server.streams import Gone, event, json_response

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "max_tokens")  # whose defaults the page shows
FILTERS = {name: name for name in ("top_k", "top_p", "min_p")}
MOST_TEMPERATURES, MOST_TOP = 8, 200


async def models(call: Call) -> Response:
    served = call.server.models.served.values()
    return json_response({"models": [_facts(one, one.root.llm) for one in served]})


async def load(call: Call) -> Response:
    """Loads a model that is not loaded, so that its facts are known."""
    fields = await call.fields()
    served = call.server.models.find(fields.take("model", str))
    fields.finish()
    return await call.json(call.compute(served.name, lambda llm: _facts(served, llm)))


def _facts(served: Served, llm: LLM | None) -> dict[str, Any]:
    """None where only the loaded model knows."""
    facts: dict[str, Any] = {"name": served.name, "loaded": llm is not None}
    unknown = ("kind", "architecture", "parameters", "quantization", "context", "device", "sampling")
    if llm is None:
        return facts | dict.fromkeys(unknown)
    writes = "chat" if llm.chat_template else "base"
    kind = "reranker" if llm.is_reranker else writes if llm.model.has_output else "embedding"
    defaults = SamplingParams().resolve(llm.defaults)
    return facts | {
        "kind": kind,
        "architecture": llm.config.architecture,
        "parameters": sum(llm.formats.values()),
        "quantization": next(iter(llm.formats), None),
        "context": llm.context,
        "device": llm.device,
        "sampling": {name: getattr(defaults, name) for name in SAMPLING},
    }


async def tokens(call: Call) -> Response:
    """The tokens of a text, or of a conversation's prompt and an answer; with logprobs, how likely the model
    found each after those before."""
    fields = await call.fields()
    model, ids_of = fields.take("model", str), _ids(fields)
    logprobs = fields.take("logprobs", bool, False)
    fields.finish()

    def work(llm: LLM) -> dict[str, Any]:
        ids, n_prompt = ids_of(llm)
        rows = [_token(llm, i) for i in ids]
        if logprobs and ids:
            found = llm.score(ids, cancel=call.gone.is_set).logprobs
            for row, logprob in zip(rows, [None, *found], strict=False):
                row["logprob"] = logprob
        return {"model": llm.name, "prompt_tokens": n_prompt, "tokens": rows}

    return await call.json(call.compute(model, work))


async def following(call: Call) -> Response:
    """The likeliest tokens after a text or in an answer, at several temperatures, and what sampling's filters
    leave of them."""
    fields = await call.fields()
    model, ids_of = fields.take("model", str), _ids(fields)
    temperatures = _temperatures(fields)
    top = fields.take("top", int, 12)
    if not 1 <= top <= MOST_TOP:
        raise fields.refusal("top", f"must be 1 to {MOST_TOP}")
    params = SamplingParams(**fields.renamed(FILTERS))
    fields.finish()

    def work(llm: LLM) -> dict[str, Any]:
        ids, _ = ids_of(llm)
        kept: list[Any] = []

        def keep(logits: Any, tokens: Any) -> None:
            kept.append(logits.copy())

        llm(ids, max_tokens=1, processors=[keep], cancel=call.gone.is_set)
        if not kept:
            raise Gone
        found = look(kept[0], temperatures, params.resolve(llm.defaults))
        names = [_token(llm, i)["text"] for i in found.ids[:top]]
        rows = record(found, names, top)
        for row in rows["tokens"]:
            row |= _token(llm, row["id"])
        return {"model": llm.name, "n_tokens": len(ids), "vocab_size": len(found.ids), **rows}

    return await call.json(call.compute(model, work))


def _temperatures(fields: Fields) -> list[float]:
    values = fields.take("temperatures", list, [0.5, 1.0, 1.5])
    fits = 1 <= len(values) <= MOST_TEMPERATURES and all(
        isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t <= 1000 for t in values
    )
    if not fits:
        raise fields.refusal("temperatures", f"must be 1 to {MOST_TEMPERATURES} numbers from 0 to 1000")
    return [float(t) for t in values]


def _ids(fields: Fields) -> Callable[[LLM], tuple[list[int], int]]:
    """What makes the ids of a body's text or messages with a model, and how many of them are the prompt."""
    messages, text = fields.take("messages", list), fields.take("text", str)
    if messages is None and text is None:
        raise fields.refusal("text", "is missing: give a text, or messages", "missing_required_parameter")

    def ids_of(llm: LLM) -> tuple[list[int], int]:
        if llm.tokenizer is None:
            raise Refusal(400, f"{llm.name} has no tokenizer: it takes and gives ids, not text")
        if messages is None:
            ids, n_prompt = llm.tokenizer.encode(text or ""), 0
        else:
            ids = _prompt(llm, messages)
            n_prompt = len(ids)
            ids = ids + _after(llm.tokenizer, ids[-1], text or "")
        if len(ids) > llm.context:
            raise Refusal(
                400,
                f"{len(ids)} tokens are more than the context of {llm.context}",
                code="context_length_exceeded",
            )
        return ids, n_prompt

    return ids_of


def _prompt(llm: LLM, messages: list[Any]) -> list[int]:
    try:
        return llm.chat_ids(messages)
    except TypeError as error:  # what is no message
        raise Refusal(400, str(error), param="messages", code="invalid_type") from None


def _after(tokenizer: Tokenizer, last: int, text: str) -> list[int]:
    """The ids of `text` after the id `last`. In the middle of a text a vocabulary of SentencePiece puts no
    space before it, as it does at a text's beginning."""
    begun = tokenizer.encode("\n", bos=False)
    if last in tokenizer.special_ids or not tokenizer.token_bytes(begun[0]).startswith(b" "):
        return tokenizer.encode(text, bos=False)
    return tokenizer.encode("\n" + text, bos=False)[len(begun) :]


def _token(llm: LLM, i: int) -> dict[str, Any]:
    """bytes: hexadecimal, for tokens that hold part of a character. An id that pads the vocabulary has no
    text."""
    tokenizer = llm.tokenizer
    data = tokenizer.token_bytes(i) if tokenizer and i < tokenizer.vocab_size else b""
    special = tokenizer is not None and i in tokenizer.special_ids
    return {"id": i, "text": data.decode("utf-8", "replace"), "bytes": data.hex(), "special": special}


def error(refusal: Refusal) -> dict[str, Any]:
    return {"error": {"message": refusal.message, "param": refusal.param, "code": refusal.code}}


INSPECT = Dialect(
    "inspect",
    [
        ("GET", "/tinyllm/models", models),
        ("POST", "/tinyllm/load", load),
        ("POST", "/tinyllm/tokens", tokens),
        ("POST", "/tinyllm/next", following),
    ],
    error,
    lambda refusal: event(error(refusal)),
)
