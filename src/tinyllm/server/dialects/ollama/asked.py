"""What Ollama's clients ask: options, formats, how long a model is kept, messages and tools.

Imports ask.py, app.py, models.py and thinking.py.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyllm.server.app import Call
from tinyllm.server.ask import Fields
from tinyllm.server.models import Served
from tinyllm.server.thinking import ENABLED

OPTIONS = {  # of a body's options: the field of SamplingParams
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_window",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop": "stop",
    "seed": "seed",
    "num_predict": "max_tokens",
}
NONE = (("num_predict", -2), ("num_predict", -1), ("num_predict", 0), ("seed", -1))  # no limit, any seed
HARMLESS_OPTIONS = (  # how a model is loaded and computed, which the command line says
    *("numa", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "use_mmap", "use_mlock"),
    *("num_thread", "num_keep", "mirostat_tau", "mirostat_eta"),
)
EFFORTS = ("low", "medium", "high")
FOR_EVER_S = 1e9
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}  # Go's


@dataclass(frozen=True)
class Wanted:
    """What chat and generate have in common. started: of time.perf_counter_ns. num_ctx: the context that the
    client counts on. keep_alive_s: None where it says none."""

    started: int
    served: Served
    streams: bool
    sampling: Mapping[str, Any]
    num_ctx: int
    keep_alive_s: float | None
    effort: str | None
    logprobs: bool
    replay: bool

    @property
    def shows_thinking(self) -> bool:
        return self.effort != "none"


def wanted_of(call: Call, fields: Fields) -> Wanted:
    served = call.server.models.find(fields.need("model", str))
    sampling, num_ctx = options_of(fields)
    logprobs, n_top = fields.take("logprobs", bool, False), fields.take("top_logprobs", int, 0)
    if logprobs:
        sampling |= {"logprobs": True, "top_logprobs": n_top}
    elif n_top:
        raise fields.refusal("top_logprobs", "needs logprobs: true")
    return Wanted(
        started=time.perf_counter_ns(),
        served=served,
        streams=fields.take("stream", bool, True),
        sampling=sampling | _format(fields),
        num_ctx=num_ctx,
        keep_alive_s=keep_alive_of(fields),
        effort=_effort(fields),
        logprobs=logprobs,
        replay=fields.take("replay", bool, False),
    )


def options_of(fields: Fields) -> tuple[dict[str, Any], int]:
    """Fields of SamplingParams, and the context that is asked for."""
    options = fields.object("options")
    if options is None:
        return {}, 0
    for name, value in NONE:
        options.drop(name, value)
    sampling = options.renamed(OPTIONS)
    options.harmless(*HARMLESS_OPTIONS)
    options.only("mirostat", 0)
    options.only("tfs_z", 1, 1.0)
    options.only("penalize_newline", True)
    for name in ("vocab_only", "logits_all", "embedding_only"):
        options.only(name, False)
    num_ctx = options.take("num_ctx", int, 0)
    options.finish()
    return sampling, num_ctx


def _format(fields: Fields) -> dict[str, Any]:
    form = fields.take("format", object, "")
    if not isinstance(form, dict) and form not in ("", "json"):
        raise fields.refusal("format", 'must be "json" or a JSON schema')
    return {"json_schema": form if isinstance(form, dict) else True} if form else {}


def _effort(fields: Fields) -> str | None:
    thinks = fields.take("think", object)
    if thinks is None or thinks in EFFORTS:
        return None if thinks is None else str(thinks)
    if not isinstance(thinks, bool):
        raise fields.refusal("think", f"must be true, false or one of {', '.join(EFFORTS)}")
    return ENABLED if thinks else "none"


def keep_alive_of(fields: Fields) -> float | None:
    """In seconds, infinite for a negative one."""
    given = fields.take("keep_alive", object)
    if given is None:
        return None
    seconds = _seconds(given) if isinstance(given, str) else given
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        seconds = None
    if seconds is None:
        what = f'is {str(given)[:32]!r}, expected a number of seconds or as in "5m", "1h30m"'
        raise fields.refusal("keep_alive", what)
    return math.inf if seconds < 0 or seconds > FOR_EVER_S else float(seconds)


def _seconds(text: str) -> float | None:
    """Of a duration as Go writes it, or of a plain number."""
    number = r"[0-9]+(?:\.[0-9]*)?"
    found = re.fullmatch(rf"([+-]?)({number}|(?:{number}(?:{'|'.join(UNITS)}))+)", text.strip())
    if found is None:
        return None
    parts = re.findall(rf"({number})({'|'.join(sorted(UNITS, key=len, reverse=True))})?", found[2])
    seconds = sum(float(value) * UNITS.get(unit, 1.0) for value, unit in parts)
    return -seconds if found[1] == "-" else seconds


def message_of(fields: Fields) -> dict[str, Any]:
    fields.only("images", [], why="are not supported: this server reads text")
    message: dict[str, Any] = {"role": _role(fields), "content": fields.take("content", str, "")}
    calls = [_call(one) for one in fields.objects("tool_calls") or ()]
    names = {"thinking": "reasoning_content", "tool_name": "name", "tool_call_id": "tool_call_id"}
    message |= {name: value for key, name in names.items() if (value := fields.take(key, str))}
    fields.finish()
    return message | ({"tool_calls": calls} if calls else {})


def _role(fields: Fields) -> str:
    if "role" not in fields:
        raise fields.refusal("role", "is missing", code="missing_required_parameter")
    return fields.word("role", "system", "user", "assistant", "tool", default="")


def _call(fields: Fields) -> dict[str, Any]:
    """Clients mostly drop the id; `LLM.chat` gives one then, and to results by name and order."""
    id = fields.take("id", str)
    fields.word("type", "function")
    function = fields.need_object("function")
    made = {"name": function.need("name", str), "arguments": function.take("arguments", dict, {})}
    function.harmless("index", "description")
    function.finish()
    fields.finish()
    return {**({"id": id} if id else {}), "type": "function", "function": made}


def typed(schema: Any) -> Any:
    """A tool whose types are JSON schema's: the `ollama` package writes "integer, string" for int | str."""
    if isinstance(schema, list):
        return [typed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    given = {"type": kind.split(", ")} if isinstance(kind, str) and ", " in kind else {}
    return {key: typed(value) for key, value in schema.items()} | given
