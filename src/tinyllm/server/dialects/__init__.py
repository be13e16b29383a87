"""The dialects that are served, a row each, each in its own file. cli/serve.py hands them to app.py."""

from __future__ import annotations

from tinyllm.server.app import Dialect
from tinyllm.server.dialects.inspect import INSPECT
from tinyllm.server.dialects.openai import OPENAI

DIALECTS: list[Dialect] = [OPENAI, INSPECT]
