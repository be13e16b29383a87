"""What was evaluated: the tokens of one text, and a session that holds what was computed for them.

Invariant: `tokens` are those that were evaluated; the session is made to hold just these (or these and one
that was only sampled) when it is next needed, from pages that the model's cache still has. Imports `tinyllm`.
llama.py owns one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinyllm import LLM, Completion, Piece, SamplingParams, Session
from tinyllm.llama_cpp.arguments import PromptTooLongError


@dataclass
class LlamaState:
    """A state that `Llama.save_state` took. It can be pickled. llama_state: tinyllm's own session file.

    input_ids: int32 [n_ctx], of which n_tokens count; scores: float32 [0, n_vocab], since they are computed
    when they are asked for.
    """

    input_ids: npt.NDArray[np.intc]
    scores: npt.NDArray[np.single]
    n_tokens: int
    llama_state: bytes
    llama_state_size: int
    seed: int


class TextState:
    """One text of a model, for one thread at a time."""

    def __init__(self, llm: LLM) -> None:
        self.tokens: list[int] = []
        self.ended_with: int | None = None  # the token that ended the last text, if one did
        self.completion: Completion | None = None  # of the last text
        self._llm = llm
        self._session: Session | None = None

    def session_of(self, tokens: list[int]) -> Session:
        """A session of just these tokens, evaluated."""
        if len(tokens) > self._llm.context:
            raise PromptTooLongError(
                f"Requested tokens ({len(tokens)}) exceed context window of {self._llm.context}"
            )
        session = self._session
        held = session.tokens if session is not None else []
        if session is None or tokens[: len(held)] != held:
            self.release()
            session, held = self._llm.session(seed=0), []
            self._session = session
        if rest := tokens[len(held) :]:
            session.append(rest)
        return session

    def evaluate(self, tokens: list[int]) -> None:
        """Adds tokens to the text and computes them."""
        if tokens:
            self.session_of(self.tokens + tokens)
            self.tokens = self.tokens + tokens

    def sample(self, params: SamplingParams) -> int:
        """The next token, which is not added."""
        with self.session_of(self.tokens).fork() as fork:
            return fork.sample(params)

    def pieces(self, tokens: list[int], params: SamplingParams) -> Generator[Piece, None, None]:
        """A text that goes on from these tokens. Leaving early is as good as its end."""
        session = self.session_of(tokens)
        self.tokens, last = list(tokens), None
        stream = session.stream(params)
        try:
            for piece in stream:
                if piece.token is not None:
                    if last is not None:
                        self.tokens.append(last)
                    last = piece.token
                yield piece
        finally:
            stream.close()
            self.completion = stream.completion
            reason = self.completion.stop_reason
            self.ended_with = reason if isinstance(reason, int) else None

    def logits(self) -> npt.NDArray[np.float32]:
        """After each token: float32 [n_tokens, n_vocab]."""
        if not self.tokens:
            return np.empty((0, self._llm.config.vocab_size), np.float32)
        return self._llm.logits(self.tokens)

    def save(self) -> bytes:
        """The text as a session file; b"" where it has no tokens."""
        if not self.tokens:
            return b""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "state")
            self.session_of(self.tokens).save(path)
            with open(path, "rb") as file:
                return file.read()

    def restore(self, tokens: list[int], data: bytes) -> None:
        """The text that `save` gave. Raises FormatError for one of another model."""
        self.release()
        self.tokens = list(tokens)
        if data:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "state")
                with open(path, "wb") as file:
                    file.write(data)
                self._session = self._llm.restore(path)

    def release(self) -> None:
        """Gives the session's part of the cache back; the tokens stay."""
        if self._session is not None:
            self._session.close()
            self._session = None
