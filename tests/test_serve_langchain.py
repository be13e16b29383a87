"""LangChain's client of OpenAI against the server: what its users call, streaming and not."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from helpers_serve import Running, Says, serving, write_chat_model

import tinyllm

langchain_openai = pytest.importorskip("langchain_openai")

QUESTION = "Will it rain in Paris?"
WRITTEN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CALL = {"name": "get_weather", "args": {"city": "Paris"}, "id": "call_0", "type": "tool_call"}


def get_weather(city: str) -> str:
    """The weather.

    Args:
        city: Name of the city.
    """
    return f"Rain in {city}."


class Pet(pydantic.BaseModel):
    """A pet."""

    name: str
    legs: int


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("serve") / "chat.gguf")


@pytest.fixture(scope="module")
def model() -> Says:
    return Says()


@pytest.fixture(scope="module")
def running(path: Path, model: Says) -> Iterator[Running]:
    with serving({"chat": path}, model) as running:
        yield running


@pytest.fixture
def says(model: Says) -> Iterator[Says]:
    yield model
    model.text = None


@pytest.fixture(scope="module")
def where(running: Running) -> Iterator[dict[str, Any]]:
    where = {"base_url": f"{running.url}/v1", "api_key": "none", "model": "chat", "max_retries": 0}
    yield where
    langchain_openai.ChatOpenAI(**where).root_client.close()  # one is shared by all models of a URL


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def chat(request: pytest.FixtureRequest, where: dict[str, Any]) -> Any:
    return functools.partial(
        langchain_openai.ChatOpenAI, **where, use_responses_api=request.param, temperature=0, max_tokens=150
    )


def test_invoke_and_stream(chat: Any, path: Path) -> None:
    with tinyllm.load(path, context=2048) as llm:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once"}]
        same = llm.chat(messages, temperature=0, max_tokens=10)
    asked = [("system", "Be brief."), ("human", "Once")]
    chat = chat(max_tokens=10)
    whole = chat.invoke(asked)
    assert whole.text == same.text
    assert whole.usage_metadata["input_tokens"] == len(same.prompt_tokens)
    assert whole.usage_metadata["output_tokens"] == 10
    parts = list(chat.stream(asked))
    assert len(parts) > 5
    assert "".join(part.text for part in parts) == same.text


def test_tasks(where: dict[str, Any]) -> None:
    async def main() -> None:
        models = [
            langchain_openai.ChatOpenAI(**where, use_responses_api=use, temperature=0, max_tokens=10)
            for use in (False, True)
        ]
        texts = [(await model.ainvoke("Once")).text for model in models]
        for model in models:
            texts.append("".join([part.text async for part in model.astream("Once")]))
        assert len(set(texts)) == 1
        await models[0].root_async_client.close()

    asyncio.run(main())


def test_tools_and_their_results(chat: Any, says: Says) -> None:
    says.text = f"Let me look.\n{WRITTEN}"
    bound = chat().bind_tools([get_weather])
    answer = bound.invoke(QUESTION)
    assert answer.tool_calls == [CALL]
    assert answer.text == "Let me look."
    total: Any = None
    for part in bound.stream(QUESTION):
        total = part if total is None else total + part
    assert [(c["name"], c["args"], c["id"]) for c in total.tool_calls] == [
        ("get_weather", {"city": "Paris"}, "call_0")
    ]
    says.text = "Rain."
    result = {"role": "tool", "tool_call_id": "call_0", "content": get_weather("Paris")}
    assert bound.invoke([("human", QUESTION), answer, result]).text == "Rain."


def test_forced_tools(chat: Any) -> None:
    for choice in ("any", "get_weather"):
        answer = chat().bind_tools([get_weather], tool_choice=choice, strict=True).invoke(QUESTION)
        assert {call["name"] for call in answer.tool_calls} == {"get_weather"}
        assert isinstance(answer.tool_calls[0]["args"]["city"], str)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(chat: Any, method: str, says: Says) -> None:
    if method == "json_mode":  # where the schema is the model's own business
        says.text = '{"name": "Tom", "legs": 4}'
    strict = {"strict": True} if method == "function_calling" else {}
    structured = chat().with_structured_output(Pet, method=method, **strict)
    assert isinstance(structured.invoke("A pet"), Pet)


def test_embeddings(where: dict[str, Any], path: Path) -> None:
    texts = ["A cat sat.", "A dog ran away."]
    with tinyllm.load(path, context=2048) as llm:
        same = llm.embed(texts)
    embeddings = langchain_openai.OpenAIEmbeddings(**where, check_embedding_ctx_length=False)
    assert np.array_equal(np.array(embeddings.embed_documents(texts), np.float32), same)
    assert np.array_equal(np.array(embeddings.embed_query(texts[0]), np.float32), same[0])
    embeddings.client._client.close()


def test_completions(where: dict[str, Any]) -> None:
    llm = langchain_openai.OpenAI(**where, temperature=0, max_tokens=6)
    whole = llm.invoke("Once upon")
    assert "".join(llm.stream("Once upon")) == whole != ""
    assert llm.batch(["Once upon", "Once upon"]) == [whole, whole]
    llm.client._client.close()
