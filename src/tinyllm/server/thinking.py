"""How much a model is to think, put as the variables that its chat template reads.

Invariant: a variable that a request gives and the template does not read is refused, since the answer would
be the same without. Imports ask.py and chat's templates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tinyllm import LLM
from tinyllm.chat.templates import ChatTemplate
from tinyllm.server.ask import Ask, Refusal

SWITCHES = ("enable_thinking", "thinking")  # of templates that know on and off
ENABLED = "enabled"  # an effort: as the model does where it thinks, and nothing where it cannot


def template_args(llm: LLM, ask: Ask) -> Mapping[str, Any]:
    """The variables of a request for its template. Refuses those that it does not read."""
    if not ask.template_args and ask.effort is None:
        return {}
    template = llm.chat_template if ask.chat_template is None else ChatTemplate(ask.chat_template)
    read = template.free_variables() if template is not None else []
    for name in ask.template_args:
        if name not in read:
            raise Refusal(400, _unread(llm, f"the variable {name!r}", read), code="unsupported_parameter")
    return {**_effort(llm, ask, read), **ask.template_args}


def _effort(llm: LLM, ask: Ask, read: Collection[str]) -> dict[str, Any]:
    """A template that knows on and off thinks at every effort but "none"."""
    effort = ask.effort
    if effort is None:
        return {}
    found: dict[str, Any] = {name: effort != "none" for name in SWITCHES if name in read}
    if "reasoning_effort" in read and effort != ENABLED:
        found["reasoning_effort"] = effort
    if not found and effort not in ("none", ENABLED, ask.usual_effort):
        why = _unread(llm, "how much to think", read)
        raise Refusal(400, why, param="reasoning_effort", code="unsupported_parameter")
    return found


def _unread(llm: LLM, what: str, read: Collection[str]) -> str:
    known = ", ".join(read) or "no variable of a request"
    return f"the chat template of {llm.name} does not read {what}; it reads {known}"
