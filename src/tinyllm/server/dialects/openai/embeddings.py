"""OpenAI's /v1/embeddings, and what /v1/rerank says.

Imports ask.py and app.py.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from starlette.responses import Response

from tinyllm import LLM
from tinyllm.server.app import Call
from tinyllm.server.ask import Refusal
from tinyllm.server.dialects.openai.common import HARMLESS, prompts_of


async def embeddings(call: Call) -> Response:
    fields = await call.fields()
    fields.harmless(*HARMLESS)
    model, texts = fields.take("model", str), prompts_of(fields, "input", call.server.limits.prompts)
    encoding = fields.word("encoding_format", "float", "base64", default="float")
    dimensions = fields.take("dimensions", int)
    fields.finish()

    def work(llm: LLM) -> dict[str, Any]:
        if dimensions not in (None, llm.config.dim):
            why = f"is {dimensions}; the vectors of {llm.name} have {llm.config.dim} numbers, and are not cut"
            raise Refusal(400, f"dimensions {why}", param="dimensions", code="invalid_value")
        vectors = llm.embed(texts)
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, encoding)}
            for i, vector in enumerate(vectors)
        ]
        n = sum(_count(llm, text) for text in texts)
        usage = {"prompt_tokens": n, "total_tokens": n}
        return {"object": "list", "data": data, "model": llm.name, "usage": usage}

    return await call.json(call.compute(model, work))


def _encoded(vector: Any, encoding: str) -> Any:
    if encoding == "float":
        return [float(x) for x in vector]
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def _count(llm: LLM, text: str | list[int]) -> int:
    """How many tokens were computed for a text."""
    if not isinstance(text, str) or llm.tokenizer is None:
        return len(text)
    return len(llm.tokenizer.encode(llm.embedding.instruction + text))


async def rerank(call: Call) -> Response:
    """No model here scores pairs of texts: the answer says why, for the model that was asked."""
    fields = await call.fields()
    model = fields.take("model", str)
    fields.need("query", str)
    fields.need("documents", list)
    fields.take("top_n", int)
    fields.take("return_documents", bool)
    fields.finish()

    def work(llm: LLM) -> Refusal:
        why = llm.embedding.refused or "it is no reranker; /v1/embeddings makes vectors to compare"
        return Refusal(400, f"{llm.name}: {why}", param="model", code="unsupported_model")

    raise await call.compute(model, work)
