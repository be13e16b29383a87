"""One row: what it may say, the seed it gets, and its answer as plain values.

Invariant: `answer` returns a result for every row, with "error" None or a sentence; it raises for what is the
machine's fault and no row's. Imports `tinyllm`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from tinyllm import LLM, ModelClosedError, SamplingParams
from tinyllm.batch.openai import OpenAIRows, is_openai
from tinyllm.errors import ArgumentError, ConstraintError, LostError, integer

AT_ONCE = 32  # rows that are computed together
MOST_AT_ONCE = 4096

_SAMPLING = frozenset(field.name for field in fields(SamplingParams)) - {"processors"}
_OF_PROMPT = frozenset({"special"})
_OF_CHAT = frozenset({"tools", "tool_choice", "strict", "chat_template", "template_args"})
_OWN = frozenset({"id", "prompt", "messages"})


def row_seed(seed: int, key: str) -> int:
    """The seed of a row that names none: of 53 bits, so that readers of JSON that use doubles keep it."""
    start = integer("seed", seed, 0, 2**64 - 1).to_bytes(8, "little")
    digest = hashlib.blake2b(start + key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 11


class Rows:
    """Answers rows with one model, `at_once` of them together.

    seed: that rows' own are made from. options: fields of SamplingParams for rows that do not say otherwise.
    name: of the model, which rows in OpenAI's format must ask for.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        seed: int = 0,
        at_once: int = AT_ONCE,
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        """Raises ArgumentError for options that are no fields of SamplingParams, or out of range."""
        self.llm, self.seed = llm, integer("seed", seed, 0, 2**64 - 1)
        self.at_once = integer("at_once", at_once, 1, MOST_AT_ONCE)
        self.options = dict(options or {})
        if unknown := sorted(self.options.keys() - _SAMPLING):
            raise ArgumentError(f"{', '.join(unknown)}: no such option of sampling; a row has its own seed")
        SamplingParams(**self.options)
        self._openai = OpenAIRows(llm, name, self.at_once, self.options)

    async def answer(self, key: str, row: Any) -> dict[str, Any]:
        """The result of one row, of values that JSON has. Raises ModelClosedError and LostError."""
        if is_openai(row):
            return await self._openai.answer(key, row, row_seed(self.seed, key))
        try:
            return await self._plain(key, row)
        except (ModelClosedError, LostError):
            raise
        except Exception as error:  # whatever it is: a row must not end the others
            return failed(key, error)

    async def answers(self, rows: Iterable[tuple[str, Any]]) -> AsyncGenerator[dict[str, Any], None]:
        """Results as they come, not in order; rows are taken from the iterable as there is room for them."""
        left, running = iter(rows), set[asyncio.Task[dict[str, Any]]]()
        try:
            while True:
                while len(running) < self.at_once and (pair := next(left, None)) is not None:
                    running.add(asyncio.ensure_future(self.answer(*pair)))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def results(self, rows: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
        """`answers` for callers that have no event loop."""
        loop, answers = asyncio.new_event_loop(), self.answers(rows)
        try:
            while (result := loop.run_until_complete(_next(answers))) is not None:
                yield result
        finally:
            loop.run_until_complete(answers.aclose())
            loop.close()

    async def _plain(self, key: str, row: Any) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            raise ArgumentError(f"a row is an object with a prompt or messages, not {type(row).__name__}")
        given = {name: value for name, value in row.items() if value is not None}
        if ("prompt" in given) == ("messages" in given):
            raise ArgumentError("a row has a prompt (a text or ids) or messages, one of the two")
        of_kind = _OF_CHAT if "messages" in given else _OF_PROMPT
        if unknown := sorted(str(name) for name in given.keys() - _SAMPLING - _OWN - of_kind):
            kind = "messages" if "messages" in given else "a prompt"
            raise ArgumentError(f"{', '.join(unknown)}: no such option of a row with {kind}")
        asked = {**self.options, **{name: value for name, value in given.items() if name not in _OWN}}
        asked.setdefault("seed", row_seed(self.seed, key))
        if "messages" in given:
            made = await self.llm.achat(given["messages"], **asked)
        else:
            prompt = given["prompt"]
            if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
                raise ArgumentError("a prompt is a text or a list of ids; several prompts are several rows")
            made = await self.llm.acall(prompt, **asked)
        result: dict[str, Any] = {
            "id": key,
            "text": made.text,
            "tokens": made.tokens,
            "prompt_tokens": len(made.prompt_tokens),
            "finish_reason": made.finish_reason,
            "seed": made.seed,
            "logprobs": made.logprobs,
            "reasoning": made.reasoning,
            "tool_calls": [asdict(call) for call in made.tool_calls] or None,
            "parsed": None,
            "error": None,
        }
        if made.form is not None:
            try:
                result["parsed"] = made.parsed
            except ConstraintError as error:
                result["error"] = f"ConstraintError: {error}"
        return result


async def _next(answers: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any] | None:
    return await anext(answers, None)


def failed(key: str, error: Exception) -> dict[str, Any]:
    """The result of a row that has none: the same columns."""
    columns = ("text", "tokens", "prompt_tokens", "finish_reason", "seed", "logprobs", "reasoning")
    empty = dict.fromkeys((*columns, "tool_calls", "parsed"))
    return {"id": key, **empty, "error": f"{type(error).__name__}: {error}"}
