"""OpenAI's /v1/embeddings, and /v1/rerank as Jina, Cohere and others have it.

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
        if dimensions not in (None, llm.embedding_dim):
            why = f"is {dimensions}; vectors of {llm.name} have {llm.embedding_dim} numbers, and are not cut"
            raise Refusal(400, f"dimensions {why}", param="dimensions", code="invalid_value")
        vectors = llm.embed(texts, cancel=call.gone.is_set)
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
    """Scores of texts for a query, the best first; where the model is no reranker, the answer says so."""
    fields = await call.fields()
    model, query = fields.take("model", str), fields.need("query", str)
    given, most = fields.need("documents", list), call.server.limits.prompts
    texts: list[Any] = [one.get("text") if isinstance(one, dict) else one for one in given]
    if not all(isinstance(text, str) for text in texts):
        raise fields.refusal("documents", 'must be texts, or objects with a "text"', code="invalid_type")
    if not 1 <= len(texts) <= most:
        raise fields.refusal("documents", f"are {len(texts)}, expected 1 to {most}")
    top_n, with_texts = fields.take("top_n", int), fields.take("return_documents", bool, False)
    if top_n is not None and top_n < 1:
        raise fields.refusal("top_n", f"is {top_n}, expected 1 or more")
    instruction = fields.take("instruction", str)
    fields.finish()

    def work(llm: LLM) -> dict[str, Any]:
        counted = 0

        def count(done: int, total: int) -> None:
            nonlocal counted
            counted = total

        scores = llm.rerank(query, texts, instruction=instruction, progress=count, cancel=call.gone.is_set)
        best = np.argsort(-scores, kind="stable")[:top_n].tolist()
        results = [
            {"index": i, "relevance_score": float(scores[i])}
            | ({"document": {"text": texts[i]}} if with_texts else {})
            for i in best
        ]
        usage = {"prompt_tokens": counted, "total_tokens": counted}
        return {"object": "list", "model": llm.name, "results": results, "usage": usage}

    return await call.json(call.compute(model, work))
