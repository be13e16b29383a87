"""Log probabilities as /v1/completions has them: four lists of the same length.

text_offset counts characters of the choice's own text: with an echo from the prompt's first one. A token
whose bytes are no whole characters is named by its bytes, as OpenAI does, so that names tell tokens apart.
Imports common.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinyllm import LLM, Score
from tinyllm.server.dialects.openai.common import LEAST, token_bytes


class OldLogprobs:
    """Of one choice, as it is made. prompt: its ids; before: its text where it is echoed. n_top: likeliest
    tokens that are told of each."""

    def __init__(self, llm: LLM, prompt: Sequence[int], before: str, n_top: int) -> None:
        self._llm, self._prompt, self._before, self._n_top = llm, prompt, before, n_top
        self._at = len(before)
        self._rows: list[tuple[str, float | None, dict[str, float] | None, int]] = []
        tokenizer, last = llm.tokenizer, prompt[-1]
        self._texts = None
        if tokenizer is not None:
            self._texts = tokenizer.stream(after=last if last < tokenizer.vocab_size else None)

    def add_prompt(self, score: Score | None) -> None:
        """The prompt's own tokens, of which the first has no probability; None: they are not shown."""
        if score is None:
            return
        tokenizer, at = self._llm.tokenizer, 0
        texts = tokenizer.stream() if tokenizer is not None else None
        tops = score.top_logprobs or [[]] * len(score.logprobs)
        self._rows.append((self._name(score.tokens[0]), None, None, 0))
        at += len(texts.push(score.tokens[0])) if texts else 0
        for token, logprob, top in zip(score.tokens[1:], score.logprobs, tops, strict=True):
            self._rows.append(self._row(token, logprob, top, at))
            at += len(texts.push(token)) if texts else 0

    def add(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> None:
        self._rows.append(self._row(token, logprob, top, self._at))
        if self._texts is not None and token < self._llm.tokenizer.vocab_size:  # type: ignore[union-attr]
            self._at += len(self._texts.push(token))

    def take(self, end: int | None = None) -> dict[str, Any]:
        """What was added since the last time. end: the length of the whole text, which a stop string may have
        cut before its last tokens."""
        rows, self._rows = self._rows, []
        return {
            "tokens": [name for name, _, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _, _ in rows],
            "top_logprobs": [top for _, _, top, _ in rows] if self._n_top else None,
            "text_offset": [at if end is None else min(at, end) for _, _, _, at in rows],
        }

    def _row(
        self, token: int, logprob: float, top: Sequence[tuple[int, float]], at: int
    ) -> tuple[str, float | None, dict[str, float] | None, int]:
        tops: dict[str, float] = {}
        for one, value in top:  # the likeliest first; a name that comes twice keeps the first
            tops.setdefault(self._name(one), max(value, LEAST))
        tops.setdefault(self._name(token), max(logprob, LEAST))  # the chosen one is always there
        return self._name(token), max(logprob, LEAST), tops, at

    def _name(self, token: int) -> str:
        raw = token_bytes(self._llm, token)
        if raw is None:
            return str(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
