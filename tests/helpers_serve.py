"""A server under uvicorn on a free loopback port, with a model that chats, for the tests of its dialects.

The model is the bundled `stories` with a chat template, so its texts are real ones; as it follows no
instructions, `Says` makes it write a given text where a test needs a call of a tool or reasoning.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

import tinyllm
from tinyllm.files.gguf import read_gguf
from tinyllm.files.gguf_writer import OutTensor, write_gguf
from tinyllm.server.app import Dialect, Server, application
from tinyllm.server.dialects import DIALECTS
from tinyllm.server.models import Models
from tinyllm.server.turns import Turns

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "Write <tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def write_chat_model(
    path: Path, template: str = TEMPLATE, *, metadata: Mapping[str, Any] | None = None
) -> Path:
    """`stories` with a chat template, as a GGUF file. metadata: further keys."""
    source = read_gguf(Path(tinyllm.__file__).parent / "data" / "stories.gguf")
    metadata = {**source.metadata, "tokenizer.chat_template": template, **(metadata or {})}
    raw = source.files[0].read_bytes()
    tensors = [
        OutTensor(info.name, info.shape, info.format, partial(_part, raw, info.offset, info.n_bytes))
        for info in source.tensors.values()
    ]
    write_gguf(path, metadata, tensors, types=source.types)
    return path


def _part(raw: bytes, start: int, n_bytes: int) -> list[bytes]:
    return [raw[start : start + n_bytes]]


class Says:
    """A model's `load` whose answers begin with `text` and end after it; None: what the model likes."""

    def __init__(self, context: int = 2048) -> None:
        self.text: str | None = None
        self.pause_s = 0.0  # before each token, for tests that do something meanwhile
        self.loaded: list[tinyllm.LLM] = []
        self._context = context

    def __call__(self, path: str) -> tinyllm.LLM:
        llm = tinyllm.load(path, context=self._context, speculate=None)  # a token a step, as tests count them
        for name in ("achat", "astream"):
            setattr(llm, name, self._steered(llm, getattr(llm, name)))
        self.loaded.append(llm)
        return llm

    def _steered(self, llm: tinyllm.LLM, ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **options: Any) -> Any:
            if self.text is None:
                return ask(*args, **options)
            steer = self._steer(llm, self.text)
            if "params" in options:
                options["params"] = replace(options["params"], processors=[steer])
                return ask(*args, **options)
            prompt, params = args
            return ask(prompt, replace(params, processors=[steer]), **options)

        return asked

    def _steer(self, llm: tinyllm.LLM, text: str) -> Callable[[Any, Sequence[int]], None]:
        assert llm.tokenizer is not None
        ids = [*llm.tokenizer.encode("\n" + text, bos=False), min(llm.eos_ids)]
        ids = ids[len(llm.tokenizer.encode("\n", bos=False)) :]
        starts: list[int] = []

        def steer(logits: Any, tokens: Sequence[int]) -> None:
            time.sleep(self.pause_s)
            starts.append(len(tokens))
            token = ids[min(len(tokens) - starts[0], len(ids) - 1)]
            kept = max(float(logits[token]), 0.0)
            logits[:] = -np.inf
            logits[token] = kept

        return steer


class Running:
    """A server that runs: `url` without a slash at its end, `server` to look into."""

    def __init__(self, url: str, server: Server) -> None:
        self.url, self.server = url, server

    def wait_until_idle(self) -> None:
        """Until no text is computed and nobody waits; fails after some seconds."""
        for _ in range(500):
            if self.server.turns.running == self.server.turns.waiting == 0:
                return
            time.sleep(0.01)
        raise AssertionError(f"{self.server.turns.running} texts are still computed")


@contextmanager
def serving(
    paths: Mapping[str, Path | str],
    load: Callable[[str], tinyllm.LLM] = tinyllm.load,
    *,
    dialects: Sequence[Dialect] = tuple(DIALECTS),
    parallel: int = 8,
    queue: int = 64,
    adapters: Mapping[str, Mapping[str, str]] | None = None,
    **options: Any,
) -> Iterator[Running]:
    """Runs a server in a thread. options: of `Server`."""
    models = Models({name: str(path) for name, path in paths.items()}, load, adapters=adapters)
    server = Server(models, Turns(parallel, queue), **options)
    app = application(server, dialects)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on")
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, name="uvicorn")
    thread.start()
    try:
        while not runner.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        port = runner.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", server)
    finally:
        runner.should_exit = True
        thread.join()
