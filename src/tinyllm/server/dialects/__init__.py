"""The dialects that are served, a row each, each in its own folder or file. cli/serve.py hands them on."""

from __future__ import annotations

from tinyllm.server.app import Dialect
from tinyllm.server.dialects.anthropic import ANTHROPIC, ANTHROPIC_MODELS
from tinyllm.server.dialects.inspect import INSPECT
from tinyllm.server.dialects.llamacpp import LLAMACPP
from tinyllm.server.dialects.ollama import OLLAMA
from tinyllm.server.dialects.openai import OPENAI

DIALECTS: list[Dialect] = [OPENAI, ANTHROPIC, ANTHROPIC_MODELS, OLLAMA, LLAMACPP, INSPECT]
