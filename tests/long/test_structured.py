"""Forms and tool calls on a small model that was trained, in the folder that TINYLLM_REAL_MODELS names.

tests/data.md says where it comes from. Skipped by name without. `pytest tests/long/test_structured.py`
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pydantic
import pytest

import tinyllm

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    country: str = pydantic.Field(max_length=20)
    population: int = pydantic.Field(ge=0)
    is_capital: bool


def get_weather(city: str, days: int = 1) -> str:
    """The weather of the next days.

    Args:
        city: where
        days: how many
    """
    return f"rain in {city} for {days} days"


@pytest.fixture(scope="module")
def llm() -> Iterator[tinyllm.LLM]:
    path = Path(os.environ.get("TINYLLM_REAL_MODELS", "")) / NAME
    if not path.is_file():
        pytest.skip(f"no {NAME} in the folder TINYLLM_REAL_MODELS")
    with tinyllm.load(path) as llm:
        yield llm


ASK = [{"role": "user", "content": "Tell me about Paris in JSON: name, country, population, is_capital."}]


@pytest.mark.parametrize("seed", range(8))
def test_a_city(llm: tinyllm.LLM, seed: int) -> None:
    made = llm.chat(ASK, json_schema=City, seed=seed, temperature=1.0, max_tokens=200)
    assert isinstance(made.parsed, City)
    again = llm.chat(ASK, n=3, json_schema=City, seed=seed, temperature=1.0, max_tokens=200)
    assert again[0].tokens == made.tokens
    assert asyncio.run(llm.achat(ASK, json_schema=City, seed=seed, temperature=1.0)).tokens == made.tokens


@pytest.mark.parametrize("seed", range(4))
def test_a_call_of_a_tool(llm: tinyllm.LLM, seed: int) -> None:
    ask = [{"role": "user", "content": "What will the weather be in Lyon for the next 3 days?"}]
    force = {"tools": [get_weather], "tool_choice": "get_weather", "strict": True}
    made = llm.chat(ask, **force, seed=seed, max_tokens=200)
    (call,) = made.tool_calls
    assert call.name == "get_weather"
    assert isinstance(call.arguments["city"], str)
    assert isinstance(call.arguments.get("days", 1), int)
    get_weather(**call.arguments)
    stream = llm.chat(ask, **force, seed=seed, max_tokens=200, stream=True)
    assert [piece.kind for piece in stream if piece.text].count("text") == 0
    assert stream.completion.tool_calls == made.tool_calls
