"""Ollama's lists of models: those there are, those that are loaded, and what one is.

Imports app.py, facts.py, models.py and streams.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from starlette.responses import Response

import tinyllm
from tinyllm import LLM
from tinyllm.server.app import Call
from tinyllm.server.dialects.ollama.asked import OPTIONS
from tinyllm.server.facts import Facts, can_do, facts_of
from tinyllm.server.models import Served
from tinyllm.server.streams import json_response, rfc3339

FAR = "9999-12-31T00:00:00Z"


async def tags(call: Call) -> Response:
    return json_response({"models": [await _listed(served) for served in _served(call)]})


async def ps(call: Call) -> Response:
    loaded = [(served, _running(served, served.llm)) for served in _served(call) if served.llm is not None]
    return json_response({"models": [await _listed(served) | more for served, more in loaded]})


def _served(call: Call) -> list[Served]:
    return list(call.server.models.served.values())


async def _listed(served: Served) -> dict[str, Any]:
    name = served.name if ":" in served.name else f"{served.name}:latest"
    listed: dict[str, Any] = {"name": name, "model": name}
    try:
        facts = await asyncio.to_thread(facts_of, served.path)
    except tinyllm.Error:  # the list has it all the same; asking for it says what is wrong
        return listed
    return listed | {
        "modified_at": rfc3339(facts.modified),
        "size": facts.n_bytes,
        "digest": facts.digest,
        "details": _details(facts),
    }


def _details(facts: Facts) -> dict[str, Any]:
    family = facts.config.architecture
    return {
        "parent_model": "",
        "format": facts.format,
        "family": family,
        "families": [family],
        "parameter_size": _count(facts.n_parameters),
        "quantization_level": facts.quantization,
    }


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(n)


def _running(served: Served, llm: LLM) -> dict[str, Any]:
    left = served.keep_alive_s - (time.monotonic() - served.last_used)
    return {
        "expires_at": FAR if math.isinf(left) else rfc3339(time.time() + left),
        "size": served.n_bytes,
        "size_vram": 0 if llm.device == "cpu" else served.n_bytes,
        "context_length": llm.context,
    }


async def show(call: Call) -> Response:
    fields = await call.fields()
    name = fields.take("model", str) or fields.need("name", str)
    fields.harmless("verbose", "name")
    fields.finish()
    served = call.server.models.find(name)
    facts = await asyncio.to_thread(facts_of, served.path)
    llm = served.root.llm
    template = llm.chat_template if llm else facts.template
    listed = await _listed(served)
    c, architecture = facts.config, facts.config.architecture
    info = {
        "general.architecture": architecture,
        "general.basename": served.name,
        "general.parameter_count": facts.n_parameters,
        f"{architecture}.context_length": c.context,
        f"{architecture}.embedding_length": c.dim,
        f"{architecture}.block_count": c.n_layers,
        f"{architecture}.feed_forward_length": c.ff_dim,
        f"{architecture}.attention.head_count": c.n_heads,
        f"{architecture}.attention.head_count_kv": c.n_kv_heads,
        f"{architecture}.attention.key_length": c.head_dim,
        f"{architecture}.vocab_size": c.vocab_size,
    }
    return json_response(
        {
            "modelfile": "",
            "parameters": "\n".join(f"{key:<30} {value}" for key, value in _parameters(facts)),
            "template": template.source if template else "",
            "details": listed["details"],
            "model_info": info,
            "capabilities": [*facts.capabilities, *can_do(template)],
            "modified_at": listed["modified_at"],
        }
    )


def _parameters(facts: Facts) -> list[tuple[str, Any]]:
    """What the files advise, in the words of options."""
    words = {field: name for name, field in OPTIONS.items()}
    return [(words[name], value) for name, value in facts.defaults.items() if name in words]
