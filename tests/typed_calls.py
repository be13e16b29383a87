"""How calls look to a type checker. Never run: `mypy tests/typed_calls.py`, which .ci/run does.

A line with `type: ignore` must be an error: mypy says so where one is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import tinyllm

llm = tinyllm.load("stories")
messages = [{"role": "user", "content": "Hello"}]

assert_type(llm("x"), tinyllm.Completion)
assert_type(llm("x", n=2, temperature=0.5), list[tinyllm.Completion])
assert_type(llm.chat(messages, top_k=5, stop=["."]), tinyllm.Completion)
assert_type(llm.chat(messages, n=2), list[tinyllm.Completion])
assert_type(llm.chat(messages, tools=[len], tool_choice="len").tool_calls[0].arguments, dict[str, Any])
assert_type(llm.score("x"), tinyllm.Score)
assert_type(llm.score(["x", "y"], top_logprobs=2), list[tinyllm.Score])
for piece in llm.chat(messages, stream=True, seed=1):
    assert_type(piece, tinyllm.Piece)
for piece in llm.stream("x", max_tokens=3):
    assert_type(piece, tinyllm.Piece)
llm("x", speculate=lambda tokens, n: tokens[:n])
llm.chat(messages, speculate=llm).text.upper()
llm.session(speculate=None).generate(max_tokens=3)
llm(["x", "y"], params=tinyllm.SamplingParams(seed=1), n=2)
llm.session().sample(logit_bias={1: -5.0})
llm.session().generate(top_p=0.5).text.upper()
assert_type(llm.embed(["x", "y"], prompt="query"), npt.NDArray[np.float32])
assert_type(llm.rerank("x", ["y"]), npt.NDArray[np.float32])

llm("x", speculate="loockup")  # type: ignore[call-overload]
llm("x", temprature=1)  # type: ignore[call-overload]
llm("x", temperature="hot")  # type: ignore[call-overload]
llm.chat(messages, max_token=3)  # type: ignore[call-overload]
llm.chat(messages, stream=True, n="2")  # type: ignore[call-overload]
llm.stream("x", maxtokens=3)  # type: ignore[call-arg]
llm.session().sample(topk=3)  # type: ignore[call-arg]
llm.embed("x", pooling="first")  # type: ignore[arg-type]
