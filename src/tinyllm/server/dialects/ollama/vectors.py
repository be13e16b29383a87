"""Ollama's vectors of texts, under the newer and the older path.

Imports ask.py, app.py, models.py, streams.py and asked.py.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from starlette.responses import Response

from tinyllm import LLM
from tinyllm.server.app import Call
from tinyllm.server.ask import Fields
from tinyllm.server.dialects.ollama.asked import keep_alive_of, options_of
from tinyllm.server.models import Served


async def embed(call: Call) -> Response:
    started = time.perf_counter_ns()
    fields = await call.fields()
    wanted = _embedding(call, fields)
    given: Any = fields.need("input", object)
    texts: list[str] = given if isinstance(given, list) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise fields.refusal("input", "must be a string or a list of strings", code="invalid_type")
    truncates, dimensions = fields.take("truncate", bool, False), fields.take("dimensions", int)
    fields.finish()

    def work(llm: LLM) -> dict[str, Any]:
        load_ns = time.perf_counter_ns() - started
        if dimensions is not None and not 1 <= dimensions <= llm.embedding_dim:
            raise fields.refusal("dimensions", f"is {dimensions}, expected 1 to {llm.embedding_dim}")
        prompts: list[str | list[int]] = [_cut(llm, text) if truncates else text for text in texts]
        vectors = llm.embed(prompts, normalize=True, cancel=call.gone.is_set)[:, :dimensions]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
        return {
            "model": wanted.name,
            "embeddings": vectors.tolist(),
            "total_duration": time.perf_counter_ns() - started,
            "load_duration": load_ns,
            "prompt_eval_count": sum(len(_ids(llm, prompt)) for prompt in prompts),
        }

    return await call.json(call.compute(wanted.name, work))


async def embeddings(call: Call) -> Response:
    """The older one, of one text, whose vector is as the model's files want it."""
    fields = await call.fields()
    wanted, prompt = _embedding(call, fields), fields.need("prompt", str)
    fields.finish()

    def work(llm: LLM) -> dict[str, Any]:
        return {"embedding": llm.embed(prompt, cancel=call.gone.is_set).tolist()}

    return await call.json(call.compute(wanted.name, work))


def _embedding(call: Call, fields: Fields) -> Served:
    served = call.server.models.find(fields.need("model", str))
    options_of(fields)
    keep_alive_s = keep_alive_of(fields)
    served.root.keep_alive_s = call.server.models.keep_alive_s if keep_alive_s is None else keep_alive_s
    return served


def _ids(llm: LLM, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    return llm.tokenizer.encode(prompt) if llm.tokenizer else []


def _cut(llm: LLM, text: str) -> str | list[int]:
    """A text that fits into the context, or the ids of its beginning."""
    ids = _ids(llm, llm.embedding.instruction + text)
    return text if len(ids) <= llm.context else ids[: llm.context]
