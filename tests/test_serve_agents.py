"""What Claude Code and Codex always say, over HTTP as they do: none of it keeps a model from answering that
does not know of it, and what would change an answer is still refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers_serve import TEMPLATE, Running, serving, write_chat_model

THINKS = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
MESSAGES = "/v1/messages?beta=true"
CLAUDE: dict[str, Any] = {
    "model": "chat",
    "max_tokens": 8,
    "system": [{"type": "text", "text": "You run things.", "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Once upon a time"}]}],
    "tools": [{"name": "Bash", "description": "Runs it.", "input_schema": SCHEMA}],
    "metadata": {"user_id": "somebody"},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}
CODEX: dict[str, Any] = {
    "model": "chat",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "You run."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Once"}]},
    ],
    "tools": [{"type": "function", "name": "run", "strict": False, "parameters": SCHEMA}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "a-key",
    "client_metadata": {"session_id": "an-id"},
    "max_output_tokens": 8,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    assert THINKS in TEMPLATE
    template = TEMPLATE.replace(THINKS, "")
    path = write_chat_model(tmp_path_factory.mktemp("agents") / "chat.gguf", template)
    with serving({"chat": path}) as running:
        yield running


def post(running: Running, path: str, **body: Any) -> httpx.Response:
    return httpx.post(running.url + path, json=body, timeout=60)


def test_claude_code(running: Running) -> None:
    assert httpx.head(f"{running.url}/").status_code == 200
    answer = post(running, MESSAGES, **CLAUDE)
    assert answer.status_code == 200, answer.text
    assert answer.text.rstrip().endswith('{"type":"message_stop"}')


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"output_config": {"effort": "low"}}, "does not read how much to think"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "takes clear_thinking"),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}, "keep is missing"),
        (
            {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": {"value": 1}}]}},
            r"context_management.edits[0].keep must be 'all'",
        ),
        ({"context_management": {"edits": [], "more": 1}}, "context_management.more is not known"),
    ],
)
def test_what_would_change_its_answers(running: Running, body: dict[str, Any], message: str) -> None:
    answer = post(running, MESSAGES, **{**CLAUDE, **body})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_claude_code_knows_what_is_too_long_by_its_words(running: Running) -> None:
    text = "once " * 1000
    answer = post(running, MESSAGES, **{**CLAUDE, "messages": [{"role": "user", "content": text}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("prompt is too long: ")


def test_codex(running: Running) -> None:
    answer = post(running, "/v1/responses", **CODEX)
    assert answer.status_code == 200, answer.text
    assert "event: response.incomplete" in answer.text  # of 8 tokens
    tools = [*CODEX["tools"], {"type": "web_search"}]
    answer = post(running, "/v1/responses", **{**CODEX, "tools": tools})
    assert answer.status_code == 400
    assert "tools[1].type is 'web_search'" in answer.json()["error"]["message"]
