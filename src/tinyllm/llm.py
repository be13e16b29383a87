"""The interface: call a loaded model, stream from it, chat, score, open a session.

Thin by intent: prompts become sequences here and what comes of them becomes results.py's dataclasses;
engine/ does the work. Imports what stands below: `engine`, `constraints`, `chat`, `tokenizer`, `backends`,
`files`, `config` and `errors`. loading.py makes an `LLM` of files. Read engine/engine.py next.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import operator
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Set
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, Union, cast, overload

import numpy as np
import numpy.typing as npt

from tinyllm import backends
from tinyllm.backends import CacheType
from tinyllm.chat.prompts import Prompts
from tinyllm.chat.reasoning import Plain, Splitter, hidden, opening_ids, splitter, visible_ids
from tinyllm.chat.templates import ChatTemplate, require
from tinyllm.config import POOLINGS, EmbeddingDefaults, GenerationDefaults, Pooling
from tinyllm.engine import reranking, saved
from tinyllm.engine.adapters import AdapterChoice, Adapters
from tinyllm.engine.breakers import breaker_ids
from tinyllm.engine.choosing import choose, require_finite
from tinyllm.engine.embedding import Text, vectors
from tinyllm.engine.engine import CALL_S, CHUNK, Engine, Generation, Job, Piece
from tinyllm.engine.guessers import Called, Draft, Lookup, Propose, Translation, same_vocabulary
from tinyllm.engine.heads import Heads
from tinyllm.engine.kvcache import NOTHING, Applied, KVCache, Sequence, root_key
from tinyllm.engine.loop import Inbox, Loop
from tinyllm.engine.needs import MOST_SLOTS, cache_pages, call_tokens
from tinyllm.engine.sampling import (
    Sampler,
    SamplingOptions,
    SamplingParams,
    StopStrings,
    stream_seed,
    takes_sampling,
)
from tinyllm.engine.speculation import Guesser, Guessing, Record
from tinyllm.engine.states import Slots
from tinyllm.errors import (
    ArgumentError,
    ConstraintError,
    ContextError,
    MemoryLimitError,
    UnsupportedError,
    integer,
    number_text,
    out_of_memory,
    size_text,
)
from tinyllm.files import show
from tinyllm.habits import Habits
from tinyllm.results import AsyncStream, CachePages, Completion, Score, Stream, Timings, brief, of_samples
from tinyllm.tokenizer import Tokenizer

if sys.version_info >= (3, 11):
    from typing import Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack

if TYPE_CHECKING:  # imported where they are used: most calls ask for no tools and no form
    from tinyllm.chat.tools import AnswerSplitter, Calling
    from tinyllm.chat.tools.schema import Tool
    from tinyllm.constraints import Form, Grammar, Vocabulary

MAX_GRAMMARS = 64  # that are kept, compiled

Prompt = str | SequenceOf[int] | npt.NDArray[np.integer[Any]]
Logits = npt.NDArray[np.float32]
Cancel = Callable[[], bool]
Progress = Callable[[int, int], object]
Speculate = Union[Literal["auto", "lookup"], "LLM", Propose, None]

log = logging.getLogger(__name__)


class CallOptions(SamplingOptions, total=False):
    """What every way to call takes, for type checkers; `LLM.__call__` says what they are."""

    special: bool
    reasoning: bool
    adapter: AdapterChoice
    speculate: Speculate


class ChatOptions(SamplingOptions, total=False):
    """What every way to chat takes, for type checkers; `LLM.chat` says what they are."""

    params: SamplingParams | None
    tools: SequenceOf[Tool] | None
    tool_choice: str
    strict: bool
    chat_template: str | None
    template_args: Mapping[str, Any] | None
    special_in_messages: bool
    adapter: AdapterChoice
    speculate: Speculate


class LLM(Habits):
    """A loaded model. Made by `load`; any number of threads may use one.

    model: the layer below, with `model.forward`. tokenizer: None for a model that takes and gives ids only.
    chat_template: None for a base model. formats: {"Q4_K": 10**9, ...}, how many of its numbers each format
    holds, the most first. defaults: the model's own sampling parameters, by name. embedding:
    what its files say of vectors of texts. context: how many tokens a sequence may hold. chunk: tokens of a
    call of the model at most. load_s: seconds of loading.
    """

    def __init__(
        self,
        model: backends.Model,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        defaults: GenerationDefaults | None = None,
        embedding: EmbeddingDefaults | None = None,
        heads: Heads | None = None,
        *,
        name: str = "the model",
        formats: Mapping[str, int] | None = None,
        cache_type: CacheType = "f16",
        max_pages: int | None = None,
        max_slots: int = MOST_SLOTS,
        free_memory: Callable[[], int] | None = None,
        load_s: float = 0.0,
    ) -> None:
        """max_pages: how far the cache may grow; None: one full context. max_slots: likewise of states, where
        the model keeps any. free_memory: asked before it does,
        for bytes; None: what the device has."""
        config = model.config
        self.model, self.tokenizer, self.chat_template, self.config = model, tokenizer, chat_template, config
        if tokenizer is not None:
            tokenizer.bind(self)
        self.name, self.cache_type, self.load_s = name, cache_type, load_s
        self.formats = dict(formats or {})
        self._prompts: dict[bool, Prompts] = {}  # by whether it is the model's own template
        self._said_special = False
        self.device, self.context = model.device, config.context
        self.chunk = call_tokens(config, model.weight_bytes)
        defaults = defaults or GenerationDefaults()
        self.eos_ids = frozenset(defaults.eos_ids) | (tokenizer.eos_ids if tokenizer else frozenset())
        self.defaults = asdict(defaults)
        self.embedding, self._said_long = embedding or EmbeddingDefaults(), False
        self._heads = heads or Heads()
        self._breakers: tuple[SequenceOf[str], list[list[int]]] = ((), [])  # the last strings, and their ids
        n_pages = cache_pages(config)
        max_pages = max_pages or n_pages
        pool = model.cache(cache_type, max_pages, max_slots)
        free_memory = free_memory or model.free_memory
        slots = None
        if pool.slot_bytes:
            most_unused = max(4, n_pages * pool.page_bytes // pool.slot_bytes)
            slots = Slots(pool, max_slots, max_unused=most_unused, free_bytes=free_memory)
        self._cache = KVCache(
            pool,
            max_pages,
            root_key(repr(config), cache_type),
            windows=[group.window for group in model.cache_groups],
            ahead=CHUNK,
            max_unused=n_pages,
            free_bytes=free_memory,
            slots=slots,
        )
        call_s = math.inf if model.device == "cpu" else CALL_S  # the CPU stops between layers
        self._engine = Engine(
            model,
            self._cache,
            vocab_size=config.vocab_size,
            context=config.context,
            chunk=min(self.chunk, CHUNK),
            call_s=call_s,
            threads=model.threads,
        )
        self._loop = Loop(self._engine)
        self._adapters, self._usual = Adapters(model), NOTHING
        self._whole: LLM | None = None  # of a view (`adapted`), what it is of
        self.draft: LLM | None = None  # that `load` loaded for it, and `close` closes
        self.speculate: Speculate = "lookup"
        self._records: dict[str, Record] = {}
        self._is_same: weakref.WeakKeyDictionary[LLM, bool] = weakref.WeakKeyDictionary()
        self._fingerprint: str | None = None
        # Made when the first form is asked for, by what ends a text; the last grammars.
        self._vocabularies: dict[frozenset[int], Vocabulary] = {}
        self._grammars: dict[tuple[str, frozenset[int]], Grammar] = {}

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence too
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        **options: Unpack[CallOptions],
    ) -> Completion: ...

    @overload
    def __call__(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        **options: Unpack[CallOptions],
    ) -> list[Completion]: ...

    @overload
    def __call__(
        self,
        prompt: SequenceOf[Prompt],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        **options: Unpack[CallOptions],
    ) -> list[Any]: ...

    @takes_sampling
    def __call__(
        self,
        prompt: Prompt | SequenceOf[Prompt],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        special: bool = False,
        reasoning: bool = False,
        adapter: AdapterChoice = None,
        speculate: Speculate = "auto",
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Any:
        """Continues a prompt, or several in one batch.

        prompt: a text, a list of ids, or a list of such prompts. n: how many samples of each, sharing what
        is computed for the prompt; sample i has the seed `stream_seed(seed, i)`. special: whether the text
        of special tokens ("<|eot_id|>") means these tokens. reasoning: whether the prompt is a chat's (of
        `chat_ids`), so that reasoning is told from the answer. adapter: the name of one of the model's
        adapters, or several with a strength each, [("a", 0.5), ("b", 1.0)]; []: the model as it is; None:
        as `adapted` says, else as it is. speculate: who guesses tokens, which are computed together where
        that saves time and never change a bit (docs/speculation.md): "lookup" in the text itself, a smaller
        model, a function (tokens, n) -> at most n ids, None for nobody; "auto": as the model was loaded, a
        draft or "lookup". cancel: asked about every 20 ms by the calling thread, while it waits and before a
        layer while it computes; True ends the call with what there is; it must not use the model. progress:
        called with (texts that are over, texts in all) after each step. The rest are fields of
        SamplingParams, in place of `params` or over it.

        Returns a Completion; with `n`, a list of n; for a list of prompts, a list with one of these for
        each, equal to a loop with the same seed. Raises ArgumentError, ContextError (no room for an answer)
        and MemoryLimitError before anything is computed; ModelClosedError. Where other calls hold the pages
        of the cache that it needs, it waits for them; MemoryLimitError says that it would wait for ever: for
        streams and sessions, or in a processor for the text around it.

            llm("Once upon a time", max_tokens=50, temperature=0).text
        """
        requests = self._requests(
            prompt, params, n, special, reasoning, sampling, adapter=adapter, speculate=speculate
        )
        return self._call(prompt, n, requests, cancel, progress)

    def _call(
        self,
        prompt: object,
        n: int | None,
        requests: list[list[_Request]],
        cancel: Cancel | None,
        progress: Progress | None = None,
    ) -> Any:
        groups = [[r.generation for r in group] for group in requests]
        left = [generation for group in groups for generation in group]
        n_pieces, n_all = 0, len(left)
        for _ in self._engine.generate(groups, cancel):
            n_pieces += 1
            if progress is not None and n_pieces >= len(left):  # about one a text: a step of the batch
                n_pieces, left = 0, [generation for generation in left if generation.finish_reason is None]
                progress(n_all - len(left), n_all)
        return self._results(prompt, n, requests)

    @takes_sampling
    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        special: bool = False,
        reasoning: bool = False,
        adapter: AdapterChoice = None,
        speculate: Speculate = "auto",
        cancel: Cancel | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Like a call with one prompt, but yields the text piece by piece, whole characters only. With n the
        samples are made together: `piece.sample` says whose a piece is, `completions` has them all.

        for piece in llm.stream("Once upon a time"): print(piece, end="", flush=True)
        """
        group = self._streamed(
            prompt, params, n, special, reasoning, sampling, adapter=adapter, speculate=speculate
        )
        return self._stream(group, cancel)

    def _stream(self, group: list[_Request], cancel: Cancel | None) -> Stream:
        generations = [request.generation for request in group]
        pieces = self._engine.generate([generations], cancel)
        return Stream(of_samples(generations, pieces), lambda: self._completions(group))

    @overload
    def acall(  # type: ignore[overload-overlap]  # a str is a sequence too
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        **options: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def acall(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int,
        **options: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, list[Completion]]: ...

    @overload
    def acall(
        self,
        prompt: SequenceOf[Prompt],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        **options: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, list[Any]]: ...

    @takes_sampling
    async def acall(
        self,
        prompt: Prompt | SequenceOf[Prompt],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        special: bool = False,
        reasoning: bool = False,
        adapter: AdapterChoice = None,
        speculate: Speculate = "auto",
        **sampling: Unpack[SamplingOptions],
    ) -> Any:
        """A call for a task of asyncio or trio: other tasks go on while it waits, and texts of all tasks and
        threads share the model's calls. Cancelling the task ends the computation within a layer and frees its
        pages. Processors run in a thread of the library's own. The rest is as in a call.

            await llm.acall("Once upon a time", max_tokens=50)
        """
        return await self._acall(
            prompt,
            n,
            lambda: self._requests(
                prompt, params, n, special, reasoning, sampling, adapter=adapter, speculate=speculate
            ),
        )

    async def _acall(self, prompt: object, n: int | None, ask: Callable[[], list[list[_Request]]]) -> Any:
        requests = ask()
        inbox = Inbox(self._loop, [[r.generation for r in group] for group in requests], keeps_pieces=False)
        try:
            await inbox.next()
        except BaseException:
            inbox.request.cancel()
            raise
        return self._results(prompt, n, requests)

    @takes_sampling
    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        special: bool = False,
        reasoning: bool = False,
        adapter: AdapterChoice = None,
        speculate: Speculate = "auto",
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """Like `stream`, for a task of asyncio or trio; see `acall`.

        async for piece in llm.astream("Once upon a time"): print(piece, end="", flush=True)
        """
        return self._astream(
            self._streamed(
                prompt, params, n, special, reasoning, sampling, adapter=adapter, speculate=speculate
            )
        )

    def _astream(self, group: list[_Request]) -> AsyncStream:
        generations = [request.generation for request in group]
        return AsyncStream(
            lambda keeps_pieces: Inbox(self._loop, [generations], keeps_pieces=keeps_pieces),
            lambda: self._completions(group),
        )

    @overload
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        n: None = None,
        cancel: Cancel | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        n: int,
        cancel: Cancel | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[Completion]: ...

    @overload
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        *,
        stream: Literal[True],
        n: int | None = None,
        cancel: Cancel | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream: ...

    @takes_sampling
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        *,
        stream: bool = False,
        n: int | None = None,
        params: SamplingParams | None = None,
        cancel: Cancel | None = None,
        tools: SequenceOf[Tool] | None = None,
        tool_choice: str = "auto",
        strict: bool = False,
        chat_template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        special_in_messages: bool = False,
        adapter: AdapterChoice = None,
        speculate: Speculate = "auto",
        **sampling: Unpack[SamplingOptions],
    ) -> Any:
        """Answers a conversation, as the model's own chat template puts it.

        messages: dicts with "role" and "content", and what else the template reads, as clients of the common
        chat APIs send them: a content may be a list of text parts, or None beside tool calls, whose arguments
        may be JSON. stream: returns a Stream instead of a Completion. n: how many answers, as a list, or in
        one stream. tools: functions, or their JSON schemas as OpenAI writes them, that the model may call;
        its calls come back as `tool_calls`, and the text without them (docs/tools.md). tool_choice: "auto",
        "none", "required" (nothing but calls) or the name of the one tool to call. strict: whether arguments
        have to follow their schema, with "auto" too; this and a forced choice take the package llguidance.
        chat_template: a Jinja template in place of the model's. template_args: further variables for it, such
        as {"enable_thinking": False}. special_in_messages: whether the text of special tokens ("<|eot_id|>")
        in messages, tools and documents means these tokens, as what the template writes does; else it is
        text. The rest is as in a call.

        Raises TemplateError where there is no template, or it refuses; UnsupportedError for images and the
        like; ArgumentError for arguments of tool calls that are no JSON, tools that are none or a tool_choice
        of none of them, and as a call does; ConstraintError for a schema that cannot be enforced. Warns, once
        a template and name, of template_args and tools that the template does not read, and of special tokens
        that cannot be told from the messages' text.

            llm.chat([{"role": "user", "content": "What is 2 + 2?"}]).text
        """
        ids, calling = self._conversation(
            messages, tools, tool_choice, strict, chat_template, template_args, special_in_messages
        )
        asked = (ids, params, n, False, True, sampling, calling, adapter, speculate)
        if not stream:
            return self._call(ids, n, self._requests(*asked), cancel)
        return self._stream(self._streamed(*asked), cancel)

    @overload
    def achat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        n: None = None,
        **options: Unpack[ChatOptions],
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def achat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        n: int,
        **options: Unpack[ChatOptions],
    ) -> Coroutine[Any, Any, list[Completion]]: ...

    @overload
    def achat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        *,
        stream: Literal[True],
        n: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream: ...

    @takes_sampling
    def achat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        *,
        stream: bool = False,
        n: int | None = None,
        params: SamplingParams | None = None,
        tools: SequenceOf[Tool] | None = None,
        tool_choice: str = "auto",
        strict: bool = False,
        chat_template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        special_in_messages: bool = False,
        adapter: AdapterChoice = None,
        speculate: Speculate = "auto",
        **sampling: Unpack[SamplingOptions],
    ) -> Any:
        """Like `chat`, for a task of asyncio or trio: `await` it, or with stream=True go through its pieces
        with `async for`; see `acall`.
        """
        ids, calling = self._conversation(
            messages, tools, tool_choice, strict, chat_template, template_args, special_in_messages
        )
        asked = (ids, params, n, False, True, sampling, calling, adapter, speculate)
        if not stream:
            return self._acall(ids, n, lambda: self._requests(*asked))
        return self._astream(self._streamed(*asked))

    def chat_ids(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        *,
        tools: SequenceOf[Tool] | None = None,
        chat_template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        special_in_messages: bool = False,
    ) -> list[int]:
        """The ids of the prompt that `chat` makes of a conversation; its arguments and errors are those of
        `chat`."""
        prompts, messages, told = self._arranged(messages, tools, chat_template, template_args)
        return prompts.ids(
            messages,
            tools=told,
            special_in_messages=special_in_messages,
            template_args=template_args,
        )

    def chat_text(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        *,
        tools: SequenceOf[Tool] | None = None,
        chat_template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation as the template writes it, special tokens in full; arguments and
        errors are those of `chat`. Its ids are `chat_ids`."""
        prompts, messages, told = self._arranged(messages, tools, chat_template, template_args)
        return prompts.template.render(messages, tools=told, **(template_args or {}))

    def _arranged(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        tools: SequenceOf[Tool] | None,
        chat_template: str | None,
        template_args: Mapping[str, Any] | None,
    ) -> tuple[Prompts, SequenceOf[Mapping[str, Any]], SequenceOf[Mapping[str, Any]] | None]:
        """What a template gets: messages and tools in the form that it shows."""
        prompts = self._prompts_of(chat_template)
        told: SequenceOf[Mapping[str, Any]] | None = _described(tools) or None
        if told or any(map(_is_to_be_completed, _calls_in(messages))):
            from tinyllm.chat.tools import arranged, format_of

            assert self.tokenizer is not None
            template = prompts.template
            source = template.tool_source if told and template.tool_source else template.source
            format = format_of(source, self.tokenizer.special_tokens)
            messages, told = arranged(template, messages, told or [], format, **(template_args or {}))
        return prompts, messages, told

    def _conversation(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        tools: SequenceOf[Tool] | None,
        tool_choice: str,
        strict: bool,
        chat_template: str | None,
        template_args: Mapping[str, Any] | None,
        special_in_messages: bool,
    ) -> tuple[list[int], Calling | None]:
        """The prompt of a conversation, and how calls of tools are read from its answer."""
        described = _described(tools)
        ids = self.chat_ids(
            messages,
            tools=described,
            chat_template=chat_template,
            template_args=template_args,
            special_in_messages=special_in_messages,
        )
        return ids, self._calling(messages, described, tool_choice, strict, chat_template)

    def _calling(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        tools: SequenceOf[Mapping[str, Any]],
        choice: str,
        strict: bool,
        chat_template: str | None,
    ) -> Calling | None:
        """What the answer may call; messages and template are those of a prompt that could be made."""
        if not tools and choice in ("auto", "none"):
            return None
        from tinyllm.chat.tools import calling_of, count_calls

        template, tokenizer = self._prompts_of(chat_template).template, self.tokenizer
        assert tokenizer is not None
        return calling_of(
            template.tool_source or template.source,
            tools,
            choice,
            strict=strict,
            n_before=count_calls(messages),
            special_tokens={
                text: i for text, i in tokenizer.special_tokens.items() if i < self.config.vocab_size
            },
        )

    def _prompts_of(self, source: str | None) -> Prompts:
        """Of the model's own template, or of one of this source; each is kept for the next call."""
        own, tokenizer, last = self.chat_template, self.tokenizer, self._prompts.get(source is None)
        if source is None:
            template = require(own, self.name, tokenizer.special_tokens if tokenizer else ())
        elif last is not None and last.template.source == source:
            return last
        else:
            bos, eos = (own.bos_token, own.eos_token) if own else ("", "")
            template = ChatTemplate(source, bos_token=bos, eos_token=eos)
        if tokenizer is None:
            raise ArgumentError(f"{self.name} has no tokenizer: give token ids instead of messages")
        if last is None or last.template is not template:
            last = self._prompts[source is None] = Prompts(template, tokenizer)
        return last

    def session(
        self, *, seed: int | None = None, adapter: AdapterChoice = None, speculate: Speculate = "auto"
    ) -> Session:
        """A text that grows step by step and can be forked. Close it when done, or use it in `with`.

        seed: for samples that are given none; None draws one. adapter, speculate: as in a call, for all of
        it.
        """
        resolved = SamplingParams(seed=seed).resolve()
        assert resolved.seed is not None
        sequence = self._engine.sequence(applied=self._applied(adapter))
        return Session(self, sequence, resolved.seed, speculate)

    def restore(
        self, path: str | os.PathLike[str], *, adapter: AdapterChoice = None, speculate: Speculate = "auto"
    ) -> Session:
        """The session that `Session.save` wrote, to go on with the very same bits; nothing of it is computed
        again. adapter: that the session had; it is known by its content. speculate: as in a call.

        Raises FormatError for a file that is damaged, or of another model, cache type, device or version,
        which it names; NotFoundError; MemoryLimitError.
        """
        applied = self._applied(adapter)
        facts = self._facts(applied)
        sequence, logits, header = saved.restore(path, self._cache, self.config.vocab_size, facts, applied)
        self._fit(sequence.tokens)
        session = Session(self, sequence, header["seed"], speculate)
        session._n_forks = header["n_forks"]
        session._n_given = len(sequence.tokens)
        session._logits, session._n_logits = logits, 0 if logits is None else session._n_given
        return session

    @property
    def identity(self) -> dict[str, str]:
        """What its answers depend on, beside the prompt and the options of a call. The same on another
        machine with the same files, whatever its threads and instruction set."""
        if not self.model.has_output:
            return {"tinyllm": backends.version, "model": repr(self.config)}
        facts = self._facts()
        del facts["adapters"]
        return facts

    def _facts(self, applied: Applied = NOTHING) -> dict[str, str]:
        """What the numbers in the pages depend on. The model is known by what it computes: a hash of the
        bits of some logits, which every weight has a part in."""
        if self._fingerprint is None:
            ids = [i * 7919 % self.config.vocab_size for i in range(min(16, self.context))]
            hashed = hashlib.blake2b(repr(self.config).encode(), digest_size=16)
            for rows in self._rows(ids):
                hashed.update(rows.tobytes())
            self._fingerprint = hashed.hexdigest()
        return {
            "tinyllm": backends.version,
            "device": self.device.split(":")[0],
            "cache_type": self.cache_type,
            "model": self._fingerprint,
            "adapters": applied.key.hex(),
        }

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that calls can name, and where each comes from."""
        return self._adapters.paths

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapters that calls can name."""
        return self._adapters.n_bytes

    def add_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Loads an adapter beside the model, which stays as it is: a directory that PEFT saved, or a GGUF
        file. Calls then take `adapter=name`; texts with different adapters, or none, share the model's calls.

        name: of printable characters, without a colon, not taken yet. Raises ArgumentError, NotFoundError,
        ReadError, FormatError (broken, or made for another model), UnsupportedError (for what of it is not
        done here, by name), MemoryLimitError.

            llm.add_adapter("pirate", "pirate-lora"); llm("Hello", adapter="pirate")
        """
        with out_of_memory("loading an adapter"):
            self._adapters.add(name, path)

    def remove_adapter(self, name: str) -> None:
        """No call can name it any more; texts that have it keep it until they end. Raises ArgumentError."""
        self._adapters.remove(name)

    def adapted(self, adapter: AdapterChoice) -> LLM:
        """The same model, whose calls use this adapter where they name none: a view, not a copy. What is
        removed later, it keeps. Closing either closes the model. Raises ArgumentError.

            pirate = llm.adapted("pirate"); pirate("Hello")
        """
        view = copy.copy(self)
        view._usual, view._whole = self._adapters.applied(adapter), self  # to which the tokenizer is bound
        return view

    def _applied(self, adapter: AdapterChoice) -> Applied:
        return self._usual if adapter is None else self._adapters.applied(adapter)

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is a sequence too
        self,
        prompt: Prompt,
        *,
        special: bool = False,
        top_logprobs: int = 0,
        adapter: AdapterChoice = None,
        cancel: Cancel | None = None,
    ) -> Score: ...

    @overload
    def score(
        self,
        prompt: SequenceOf[Prompt],
        *,
        special: bool = False,
        top_logprobs: int = 0,
        adapter: AdapterChoice = None,
        cancel: Cancel | None = None,
    ) -> list[Score]: ...

    def score(
        self,
        prompt: Prompt | SequenceOf[Prompt],
        *,
        special: bool = False,
        top_logprobs: int = 0,
        adapter: AdapterChoice = None,
        cancel: Cancel | None = None,
    ) -> Any:
        """How likely a text (or ids) is, token by token. top_logprobs: how many alternatives each token comes
        with. adapter, cancel: as in a call; what there is has fewer logprobs. Of a list of texts, a list of
        scores. Raises ContextError when it is longer than the context, FormatError where a broken model
        computes what is not finite.

        llm.score("The cat sat on the mat.").perplexity
        """
        if not _is_prompt(prompt):
            ask: dict[str, Any] = {
                "special": special, "top_logprobs": top_logprobs, "adapter": adapter, "cancel": cancel,
            }  # fmt: skip
            return [self.score(one, **ask) for one in cast("SequenceOf[Prompt]", prompt)]
        ids = self._fit(self._ids(prompt, special))
        n_top = min(integer("top_logprobs", top_logprobs, 0, backends.MOST_INT), self.config.vocab_size)
        logprobs: list[float] = []
        tops: list[list[tuple[int, float]]] = []
        for rows in self._rows(ids[:-1], cancel, self._applied(adapter)):
            for row in rows:
                logprobs.append(backends.logprob(row, ids[len(logprobs) + 1]))
                if n_top:
                    tokens, values = backends.top_logprobs(row, n_top)
                    tops.append(list(zip(tokens.tolist(), values.tolist(), strict=True)))
        return Score(ids, logprobs, tops if n_top else None)

    @overload
    def logits(  # type: ignore[overload-overlap]
        self, prompt: Prompt, *, special: bool = False, adapter: AdapterChoice = None
    ) -> Logits: ...

    @overload
    def logits(
        self, prompt: SequenceOf[Prompt], *, special: bool = False, adapter: AdapterChoice = None
    ) -> list[Logits]: ...

    def logits(
        self,
        prompt: Prompt | SequenceOf[Prompt],
        *,
        special: bool = False,
        adapter: AdapterChoice = None,
    ) -> Any:
        """The logits after each of n tokens (ids, or a text): float32 [n, vocab_size]. adapter: as in a call.

        Of a list of prompts, a list of these. Raises ContextError when there are more tokens than the context
        holds, MemoryLimitError when the result does not fit into the free memory, FormatError where a broken
        model computes what is not finite (`model.forward` gives it as it is).
        """
        if not _is_prompt(prompt):
            return [
                self.logits(one, special=special, adapter=adapter)
                for one in cast("SequenceOf[Prompt]", prompt)
            ]
        ids = self._fit(self._ids(prompt, special))
        n_bytes, free = 4 * len(ids) * self.config.vocab_size, backends.free_memory()
        if n_bytes > free:
            raise MemoryLimitError(
                f"the logits of {len(ids)} tokens take {size_text(n_bytes)}, {size_text(free)} are free; "
                "ask for fewer tokens at once"
            )
        with out_of_memory(f"making room for the logits of {len(ids)} tokens"):
            out = np.empty((len(ids), self.config.vocab_size), dtype=np.float32)
        end = 0
        for rows in self._rows(ids, applied=self._applied(adapter)):
            start, end = end, end + len(rows)
            out[start:end] = rows
        return out

    def embed(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        instruction: str | None = None,
        special: bool = False,
        adapter: AdapterChoice = None,
        progress: Callable[[int, int], None] | None = None,
        cancel: Cancel | None = None,
    ) -> npt.NDArray[np.float32]:
        """What the model makes of whole texts, as vectors: float32 [n, embedding_dim], or [embedding_dim] for
        one text.

        A text has the ids that the tokenizer gives it with what its files put around (BOS, and EOS where they
        say add_eos_token). Of each token it takes what the output matrix reads, the last layer's activations
        after the final norm. pooling: "mean" of all tokens, "last", "cls" (the first), "max" of each number,
        "weightedmean" (the later, the more) or "mean_sqrt_len_tokens" (the sum over the root of their
        number); None: what the model's files say (GGUF's pooling_type, sentence-transformers' modules.json),
        "mean" where they say nothing. Behind that come the files' dense layers. normalize: to length 1, so
        that a product of two is their cosine; None: whether the files have such a step. prompt: the name of
        one of the makers' instructions, `embedding.prompts`, such as "query"; instruction: a text of one's
        own; it goes in front of every text; None: what the files put there unasked. adapter, cancel: as in a
        call. progress: called with (tokens computed, of how many). Texts share calls; the bits are those of
        each text alone.

        Raises UnsupportedError where the files ask for vectors that are not made here (a reranker's scores, a
        vector a token, ...) and `pooling` does not say otherwise; ArgumentError, ContextError (also for a
        model that attends to both sides and does not take a text in one call), and MemoryLimitError with the
        numbers, before anything is computed; CancelledError; ModelClosedError; FormatError for a broken
        model, which computes what is not finite.

            a, b = llm.embed(["A cat sat.", "A dog ran."], normalize=True); a @ b
        """
        said = self.embedding
        if pooling is None:
            if said.refused:
                raise UnsupportedError(f"{self.name}: {said.refused}")
            pooling = said.pooling or "mean"
        elif pooling not in POOLINGS:
            raise ArgumentError(f"pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
        before = self._instruction(prompt, instruction)
        given = [prompts] if _is_prompt(prompts) else list(cast("SequenceOf[Prompt]", prompts))
        if (prompt or instruction) and not all(isinstance(text, str) for text in given):
            raise ArgumentError(
                "an instruction goes before texts: leave it out for token ids, or put it in them"
            )
        heads = Heads() if said.refused else self._heads
        with out_of_memory(f"computing vectors of {len(given)} texts"):
            texts = [self._embedded(text, before, special) for text in given]
            out = np.empty((len(texts), heads.dim(self.config.dim)), np.float32)
            uses = self._applied(adapter).uses
            for first, pooled in self._pooled(texts, pooling, progress, cancel, uses):
                with np.errstate(over="ignore", invalid="ignore"):  # said in our words
                    out[first : first + len(pooled)] = heads.behind_pooling(pooled)
            require_finite(out)
            if said.normalize if normalize is None else normalize:
                length = np.sqrt((out.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
                out = (out / np.maximum(length, 1e-30)).astype(np.float32)
        return out[0] if _is_prompt(prompts) else out

    def rerank(
        self,
        query: str,
        texts: SequenceOf[str],
        *,
        instruction: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        cancel: Cancel | None = None,
    ) -> npt.NDArray[np.float32]:
        """How well each text answers a query, by a reranker: float32 [n], from 0 to 1, the share of "yes" in
        what it says beside "no". A search by vectors finds many texts fast; this reads each one together with
        the query. instruction: what a good answer is, in place of the makers' words. progress, cancel: as in
        `embed`.

        Raises UnsupportedError for a model whose files do not say that it is a reranker; ArgumentError,
        ContextError, MemoryLimitError, CancelledError, ModelClosedError and FormatError as `embed`.

            scores = llm.rerank("Who wrote it?", texts); best = texts[scores.argmax()]
        """
        said, tokenizer = self.embedding, self.tokenizer
        if self._heads.labels is None:
            why = "its files do not say that it is a reranker; embed makes vectors to compare"
            raise UnsupportedError(f"{self.name}: {said.refused or why}")
        if tokenizer is None:
            raise ArgumentError(f"{self.name} has no tokenizer, which a query and its texts need")
        if isinstance(texts, str) or not all(isinstance(text, str) for text in (query, *texts)):
            raise TypeError("rerank takes a query, a str, and a list of texts")
        asked = [
            reranking.of_template(said.judges, tokenizer, query, text, instruction)
            if said.judges
            else reranking.of_conversation(
                self._prompts_of(None), query, text, said.instruction if instruction is None else instruction
            )
            for text in texts
        ]
        with out_of_memory(f"reading {len(asked)} texts"):
            out = np.empty(len(asked), np.float32)
            given = [Text(self._fit(self._ids(ids, False))) for ids in asked]
            for first, last in self._pooled(given, "last", progress, cancel, self._usual.uses):
                out[first : first + len(last)] = self._heads.scores(last)
            require_finite(out)
        return out

    @property
    def is_reranker(self) -> bool:
        """Whether `rerank` is what it is for."""
        return self._heads.labels is not None

    @property
    def embedding_dim(self) -> int:
        """Numbers of a vector that `embed` makes."""
        return self._heads.dim(self.config.dim)

    def _pooled(
        self,
        texts: SequenceOf[Text],
        pooling: Pooling,
        progress: Callable[[int, int], None] | None,
        cancel: Cancel | None,
        uses: backends.Uses,
    ) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
        """Pooled vectors, [n, dim], and of which text the first of them is."""
        total, first = sum(len(text.ids) for text in texts), 0
        settings: dict[str, Any] = {"cache_type": self.cache_type, "chunk": self.chunk, "uses": uses}
        for done, pooled in vectors(self.model, texts, pooling, should_stop=cancel, **settings):
            yield first, pooled
            first += len(pooled)
            if progress is not None:
                progress(done, total)

    def _instruction(self, prompt: str | None, instruction: str | None) -> str:
        """What goes before texts."""
        named = self.embedding.prompts
        if prompt is not None and instruction is not None:
            raise ArgumentError("prompt= names an instruction and instruction= is one: give one of them")
        if prompt is not None and prompt not in named:
            there = ", ".join(map(show, named)) or "none"
            raise ArgumentError(f"prompt is {prompt!r}; the prompts of {self.name} are: {there}")
        before = named[prompt] if prompt is not None else instruction
        if before is None:
            return "" if self.is_reranker else self.embedding.instruction
        if not isinstance(before, str):
            raise TypeError(f"instruction must be str, not {type(before).__name__}")
        return before

    def _embedded(self, text: Prompt, before: str, special: bool) -> Text:
        """Ids are taken as they are."""
        ids, first = self._ids(before + text if isinstance(text, str) else text, special), 0
        most = self.embedding.max_tokens
        if most and len(ids) > most and not self._said_long:
            self._said_long = True
            log.warning(
                "%s: a text of %d tokens is taken whole; its makers cut texts after %d (max_seq_length)",
                self.name, len(ids), most,
            )  # fmt: skip
        if before and isinstance(text, str) and not self.embedding.pools_instruction and self.tokenizer:
            alone = self._ids(before, special)  # with what ends a text
            first = len(alone) - (alone[-1] in self.tokenizer.special_ids)
            if first >= len(ids):
                raise ArgumentError(f"a text has no token behind the instruction {brief(before)}")
        return Text(self._fit(ids), first)

    @property
    def cache_pages(self) -> CachePages:
        """How full the cache is. Never waits, from any thread."""
        pool = self._cache.pool
        return CachePages(self._cache.n_used, pool.n_pages, self._cache.max_pages, pool.page_bytes)

    def close(self) -> None:
        """Frees the weights and the cache. Waits for a running call; later ones raise ModelClosedError."""
        self._loop.close()
        self._engine.close()
        self._cache.pool.close()
        self.model.close()
        if self.draft is not None:
            self.draft.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LLM {self.name}: {self.config.architecture} on {self.device}, context {self.context}>"

    def _text_ids(self, text: str, *, bos: bool | None, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise ArgumentError(f"{self.name} has no tokenizer: give token ids instead of text")
        return self.tokenizer.encode(text, bos=bos, special=special)

    def _ids(self, prompt: Prompt, special: bool, bos: bool | None = None) -> list[int]:
        """The ids of a text, or ids checked: each is in the vocabulary, and there is at least one."""
        if isinstance(prompt, str):
            ids = self._text_ids(prompt, bos=bos, special=special)
        else:
            _refuse_lookalikes(prompt)
            if bool in set(map(type, prompt)):  # which Python takes for 0 and 1
                raise TypeError("a token id is an int, not bool")
            ids = [operator.index(i) for i in prompt]
        if not ids:
            raise ArgumentError("the prompt is empty: it has no token")
        for i in ids:
            if not 0 <= i < self.config.vocab_size:
                raise ArgumentError(
                    f"token id {number_text(i)} is not in the vocabulary, 0 to {self.config.vocab_size - 1}"
                )
        return ids

    def _fit(self, ids: list[int], room: int = 0) -> list[int]:
        if len(ids) + room > self.context:
            what = " with room for an answer" if room else ""
            raise ContextError(
                f"{len(ids)} tokens do not fit into the context of {self.context}{what}; "
                "shorten the text, or load the model with a larger context="
            )
        return ids

    def _prompt(self, prompt: Prompt, special: bool) -> list[int]:
        self._say_special(prompt, special)
        return self._fit(self._ids(prompt, special), room=1)

    def _say_special(self, prompt: Prompt, special: bool) -> None:
        """Warns once where a prompt holds the text of a special token and takes it for text."""
        if special or self._said_special or self.tokenizer is None or not isinstance(prompt, str):
            return
        if found := self.tokenizer.find_special(prompt):
            self._said_special = True
            log.warning(
                "the prompt holds %s, which is read as text and not as the special token; special=True "
                "(tinyllm-run: --special) reads it as the token",
                show(found[1]),
            )

    def _requests(
        self,
        prompt: Prompt | SequenceOf[Prompt],
        params: SamplingParams | None,
        n: int | None,
        special: bool,
        reasoning: bool,
        sampling: SamplingOptions,
        calling: Calling | None = None,
        adapter: AdapterChoice = None,
        speculate: Speculate = "auto",
    ) -> list[list[_Request]]:
        """What a call asks for, a group a prompt."""
        prompts = [prompt] if _is_prompt(prompt) else list(cast("SequenceOf[Prompt]", prompt))
        given, thread, applied = _merge(params, sampling), threading.get_ident(), self._applied(adapter)
        how = (given, n, special, reasoning, calling, thread, applied, speculate)
        return [self._group(one, *how) for one in prompts]

    def _group(
        self,
        prompt: Prompt,
        params: SamplingParams,
        n: int | None,
        special: bool,
        reasoning: bool,
        calling: Calling | None,
        thread: int | None,
        applied: Applied,
        speculate: Speculate,
    ) -> list[_Request]:
        """The samples of one prompt. thread: whose call computes them; None: a stream, read by any."""
        if n is not None:
            n = integer("n", n, 1, backends.MOST_INT)
        ids, resolved = self._prompt(prompt, special), params.resolve(self.defaults)
        first = self._request(resolved, ids, self._engine.sequence(ids, thread, applied), reasoning, calling)
        others = (_derive(resolved, i) for i in range(1, n or 1))
        group = [first, *(self._request(p, ids, None, reasoning, calling) for p in others)]
        for request in group:
            request.generation.guessing = self._guessing(speculate, request.generation.sampler)
        return group

    def _guessing(self, speculate: Speculate, sampler: Sampler | None) -> Guessing | None:
        """Who guesses for one text; None: nobody. sampler: the text's, where it has one."""
        asked = self.speculate if speculate == "auto" else speculate
        guesser: Guesser
        if asked is None:
            return None
        if asked == "lookup":
            kind, guesser = "lookup", Lookup()
        elif isinstance(asked, str):
            raise ArgumentError(
                f"speculate is {asked!r}, expected 'auto', 'lookup', a model, a function or None"
            )
        elif isinstance(asked, LLM):
            kind, guesser = "draft", self._draft(asked, sampler)
        elif callable(asked):
            kind, guesser = "function", Called(asked)
        else:
            raise TypeError(
                "speculate must be 'auto', 'lookup', a model that `load` returned, a function or None, not "
                f"{type(asked).__name__}"
            )
        record = self._records.setdefault(kind, Record())
        return Guessing(guesser, self._engine.costs, record, self.config.vocab_size)

    def use_draft(self, draft: LLM) -> None:
        """From now on `draft` guesses for calls that say speculate="auto", and is closed with this model.
        Raises ArgumentError where one of them has no tokenizer and the vocabularies differ."""
        self._draft(draft, None).close()
        self.draft = self.speculate = draft

    def _draft(self, draft: LLM, sampler: Sampler | None) -> Draft:
        mine, other = self.tokenizer, draft.tokenizer
        if self._is_same.get(draft) is None:
            if mine is not None and other is not None:
                self._is_same[draft] = mine is other or same_vocabulary(mine, other)
            elif mine is other and self.config.vocab_size == draft.config.vocab_size:
                self._is_same[draft] = True
            else:
                raise ArgumentError(
                    f"{draft.name} cannot guess for {self.name}: one of them has no tokenizer, and their "
                    "vocabularies differ"
                )
        translation = None
        if not self._is_same[draft]:
            assert mine is not None
            assert other is not None
            translation = Translation(mine, other)
        is_like = translation is None and self.config.vocab_size == draft.config.vocab_size
        of_core = sampler is not None and sampler.is_of_core
        return Draft(
            draft._engine,
            draft.context,
            applied=draft._usual,
            sampler=sampler if is_like and of_core else None,
            translation=translation,
        )

    def _results(self, prompt: object, n: int | None, requests: list[list[_Request]]) -> Any:
        """What a call returns, in the shape it asked for."""
        results = [self._completions(group) for group in requests]
        shaped: list[Any] = [group[0] if n is None else group for group in results]
        return shaped[0] if _is_prompt(cast("Prompt", prompt)) else shaped

    def _streamed(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        n: int | None,
        special: bool,
        reasoning: bool,
        sampling: SamplingOptions,
        calling: Calling | None = None,
        adapter: AdapterChoice = None,
        speculate: Speculate = "auto",
    ) -> list[_Request]:
        if not _is_prompt(prompt):
            raise ArgumentError("stream takes one prompt; call the model with a list of them")
        applied = self._applied(adapter)
        given = _merge(params, sampling)
        return self._group(prompt, given, n, special, reasoning, calling, None, applied, speculate)

    def _request(
        self,
        params: SamplingParams,
        prompt: list[int],
        sequence: Sequence | None,
        reasoning: bool = False,
        calling: Calling | None = None,
        forces: bool = True,
    ) -> _Request:
        """params: resolved. sequence: holds the prompt; None: will be forked from the first of its group.
        forces: whether tokens that a form leaves no choice about are taken without one."""
        eos_ids = self.eos_ids | (calling.end_ids if calling else frozenset())
        form, sampler = self._form(params, calling, eos_ids), self._sampler(params, len(prompt), eos_ids)
        shown = calling.visible_ids if calling else frozenset()
        context, end = self.context, self.defaults["max_length"]
        if params.max_tokens is None and end is not None and end < context:
            if len(prompt) >= end:
                raise ContextError(
                    f"the prompt has {len(prompt)} tokens, and the model's own max_length ends texts at "
                    f"{end}; pass max_tokens"
                )
            context = end
        generation = Generation(
            sequence,
            sampler,
            StopStrings(params.stop or ()),
            self._text_stream(prompt[-1], reasoning, shown),
            context=context,
            # The model's likeliest tokens need not be among those that a form allows.
            n_candidates=None if form is not None and params.top_logprobs else sampler.n_candidates,
            max_tokens=params.max_tokens,
            eos_ids=eos_ids,
            split=self._splitter(prompt, calling) if reasoning else Plain(),
        )
        if form is not None:
            generation.constraint = form[1].start(forces=forces)
            if reasoning and self.tokenizer and generation.split.is_answer:
                generation.opening = opening_ids(self.tokenizer.id_of)
        return _Request(generation, params, prompt, form[0] if form and params.has_form else None)

    def _form(
        self, params: SamplingParams, calling: Calling | None, eos_ids: frozenset[int]
    ) -> tuple[Form, Grammar] | None:
        """The form that is asked for and its grammar, which is kept for the next call."""
        asked = {name: getattr(params, name) for name in ("json_schema", "regex", "choices", "grammar")}
        lark = calling.grammar if calling is not None else None
        if lark is None and all(value is None for value in asked.values()):
            return None
        from tinyllm.constraints import Grammar, Vocabulary, form_of, form_of_calls

        form = form_of(**asked)
        if lark is not None:
            if form is not None:
                raise ConstraintError(
                    f"{form.kind} cannot be used with a tool_choice that forces calls, or strict tools: an "
                    "answer has one form"
                )
        elif form is None:
            return None
        if self.tokenizer is None:
            raise ArgumentError(f"{self.name} has no tokenizer, which the form of an answer needs")
        if (vocabulary := self._vocabularies.get(eos_ids)) is None:
            vocabulary = Vocabulary(self.tokenizer, self.config.vocab_size, eos_ids)
            self._vocabularies[eos_ids] = vocabulary
        form = form or form_of_calls(lark or "", vocabulary.core)
        key = (form.grammar, eos_ids)
        grammar = self._grammars.get(key) or Grammar(form, vocabulary)
        while len(self._grammars) >= MAX_GRAMMARS:
            self._grammars.pop(next(iter(self._grammars), key), None)
        self._grammars[key] = grammar
        return form, grammar

    def _sampler(self, params: SamplingParams, start: int, eos_ids: frozenset[int] | None = None) -> Sampler:
        """params: resolved. start: how many tokens are given."""
        breakers: list[list[int]] = []
        if params.dry_multiplier and self.tokenizer and (strings := params.dry_sequence_breakers):
            kept, breakers = self._breakers
            if kept != strings:
                found, n = breaker_ids(self.tokenizer, strings), self.config.vocab_size
                breakers = [ids for ids in found if max(ids) < n]
                self._breakers = strings, breakers
        return Sampler(
            params,
            self.config.vocab_size,
            start=start,
            eos_ids=self.eos_ids if eos_ids is None else eos_ids,
            min_length=self.defaults["min_length"] or 0,
            breakers=breakers,
        )

    def _splitter(self, prompt: list[int], calling: Calling | None) -> Splitter | AnswerSplitter:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return Plain()
        end = [i for i in prompt[-32:] if i < tokenizer.vocab_size]  # a tag or a header is shorter
        text = tokenizer.decode(end, special=True)
        split = splitter(text, tokenizer.special_tokens)
        return split if calling is None else calling.splitter(split, text)

    def _text_stream(self, after: int, reasoning: bool, more: frozenset[int]) -> Callable[[int | None], str]:
        """Turns the ids that follow `after` into text, whole characters at a time, special tokens that are
        not shown as `hidden`; None asks for the rest. more: special tokens to be shown beside those of
        reasoning."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return lambda token: ""
        # A model's vocabulary may be padded beyond its tokenizer's; such ids have no text.
        n = tokenizer.vocab_size
        shown = visible_ids(tokenizer.special_tokens) | more if reasoning else frozenset()
        unseen = tokenizer.special_ids - shown
        stream = tokenizer.stream(shown, after=after if after < n else None)

        def text_of(token: int | None) -> str:
            if token is None:
                return stream.flush()
            if token >= n:
                return hidden("")
            return stream.push(token) + (hidden(tokenizer.token_text(token)) if token in unseen else "")

        return text_of

    def _completions(self, group: list[_Request]) -> list[Completion]:
        return [self._completion(request) for request in group]

    def _completion(self, request: _Request) -> Completion:
        g, params = request.generation, request.params
        now = time.perf_counter()
        prompt_done, ended = g.prompt_done or g.ended or now, g.ended or now
        assert params.seed is not None
        n_adopted = g.sequence.n_adopted if g.sequence is not None else 0
        return Completion(
            g.text,
            list(g.tokens),
            list(g.logprobs) if params.logprobs or params.top_logprobs else None,
            list(g.top_logprobs) if params.top_logprobs else None,
            g.finish_reason or "cancelled",
            g.stop_reason,
            params.seed,
            list(request.prompt),
            Timings(
                self.load_s,
                len(request.prompt),
                prompt_done - g.started,
                len(g.tokens),
                ended - prompt_done,
                min(n_adopted, len(request.prompt)),
                *((g.guessing.drafted, g.guessing.accepted, g.guessing.gain) if g.guessing else ()),
            ),
            self.device,
            g.reasoning if g.split.has_reasoning else None,
            request.form,
            list(g.tool_calls),
            "; ".join(g.call_errors) or None,
        )

    def _rows(
        self, ids: list[int], cancel: Cancel | None = None, applied: Applied = NOTHING
    ) -> Iterator[Logits]:
        """The logits after each token, a chunk at a time, until they are cancelled."""
        if not ids:
            return
        sequence = self._engine.sequence(ids, threading.get_ident(), applied)
        try:
            for rows in self._engine.evaluate(Job(sequence, first_row=0), cancel):
                require_finite(rows)
                yield rows
        finally:
            sequence.close()


class Session:
    """A text that grows step by step. Made by `LLM.session` and `fork`; for one thread at a time.

    tokens so far are in `tokens`, the logits after the last one in `logits`. Forks share what is computed.

        with llm.session() as session:
            session.append("Once upon a time")
            a, b = session.fork(), session.fork()
            print(a.generate(max_tokens=20), b.generate(max_tokens=20))
    """

    def __init__(self, llm: LLM, sequence: Sequence, seed: int, speculate: Speculate = "auto") -> None:
        self.seed = seed
        self._llm, self._sequence = llm, sequence
        self._speculate = speculate
        self._guessing = llm._guessing(speculate, None)  # which learns from request to request
        self._logits: Logits | None = None
        self._n_logits = 0  # how many tokens they follow
        self._n_given = 0  # how many tokens there were after the last `append`
        self._n_forks = 0

    @property
    def tokens(self) -> list[int]:
        """The ids of the whole text (a copy)."""
        return list(self._sequence.tokens)

    @property
    def text(self) -> str:
        """The whole text; empty without a tokenizer."""
        return self._llm.tokenizer.decode(self._sequence.tokens) if self._llm.tokenizer else ""

    @property
    def logits(self) -> Logits:
        """The logits after the last token: float32 [vocab_size]. Raises ArgumentError while there is no
        token, FormatError where a broken model computes what is not finite.
        """
        logits = np.array(self._certain())
        require_finite(logits)
        return logits

    def append(self, prompt: Prompt, *, special: bool = False) -> None:
        """Adds a text or ids and computes them. A text that comes first gets what the tokenizer puts in
        front (BOS).

        Raises ContextError, and adds nothing, when the context is too short. After any other error the
        tokens are there, and the next use computes them.
        """
        tokens = self._sequence.tokens
        bos = False if tokens else None
        self._llm._say_special(prompt, special)
        self._llm._fit(tokens + (ids := self._llm._ids(prompt, special, bos)))
        tokens += ids
        self._n_given = len(tokens)
        self._evaluate()

    @takes_sampling
    def sample(self, params: SamplingParams | None = None, **sampling: Unpack[SamplingOptions]) -> int:
        """Chooses the next token, adds it and returns it. Fields of SamplingParams as in `LLM.__call__`;
        min_tokens and begin_suppress_tokens count from the last `append`."""
        tokens = self._sequence.tokens
        self._llm._fit(tokens, room=1)
        given = self._params(params, sampling)
        if given.has_form:
            raise ArgumentError("sample chooses one token: ask generate or stream for an answer of a form")
        sampler = self._llm._sampler(given, self._n_given)
        token = choose(sampler, self._certain(), tokens).token
        tokens.append(token)
        return token

    @takes_sampling
    def stream(
        self,
        params: SamplingParams | None = None,
        *,
        cancel: Cancel | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Continues the text, as `LLM.stream` does. What was sampled stays in the session, but for an
        end-of-text token.
        """
        prompt = self._llm._fit(self.tokens, room=1)
        if not prompt:
            raise ArgumentError("the session is empty: append something first")
        request = self._llm._request(self._params(params, sampling), prompt, self._sequence, forces=False)
        generation = request.generation
        generation.guessing = self._guessing.again() if self._guessing else None

        def pieces() -> Generator[Piece, None, None]:
            logits = self._evaluate(cancel)
            rows = [] if logits is None else [logits]
            while rows:
                n = len(self._sequence.tokens)
                for news in generation.accept(rows):
                    yield from news
                n_right = self._sequence.n_right if len(rows) > 1 else 0
                self._logits, self._n_logits = np.array(rows[n_right]), n + n_right
                if generation.finish_reason is not None:
                    return
                generation.guess()
                rows = self._rows(generation.guesses, cancel)
            yield from generation.finish("cancelled")

        return Stream(pieces(), lambda: self._llm._completions([request]))

    @takes_sampling
    def generate(
        self,
        params: SamplingParams | None = None,
        *,
        cancel: Cancel | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion:
        """`stream` to its end."""
        stream = self.stream(params, cancel=cancel, **sampling)
        for _ in stream:
            pass
        return stream.completion

    def fork(self) -> Session:
        """A second session that goes on from here. The i-th fork, from 1, gets the seed `stream_seed(seed,
        i)`.
        """
        self._n_forks += 1
        llm = self._llm
        seed = stream_seed(self.seed, self._n_forks)
        child = Session(llm, llm._engine.fork(self._sequence), seed, self._speculate)
        child._logits, child._n_logits, child._n_given = self._logits, self._n_logits, self._n_given
        return child

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the session to a file, tokens and what is computed of them, which `LLM.restore` reads. The
        file appears when it is complete. Raises WriteError.

            session.append(long_prompt); session.save("prompt.session")
        """
        facts = {**self._llm._facts(self._sequence.applied), "seed": self.seed, "n_forks": self._n_forks}
        logits = self._evaluate() if self._sequence.tokens else None
        while (kept := saved.snapshot(self._llm._cache, self._sequence)) is None:
            self._n_logits = 0  # somebody older took its pages meanwhile
            self._evaluate()
        saved.save(path, kept, logits, facts)

    def close(self) -> None:
        """Frees the session's part of the cache."""
        self._sequence.close()
        if self._guessing is not None:
            self._guessing.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Session of {self._llm.name}: {len(self._sequence.tokens)} tokens, {brief(self.text)}>"

    def _params(self, params: SamplingParams | None, sampling: SamplingOptions) -> SamplingParams:
        merged = _merge(params, sampling)
        if merged.seed is None:
            merged = replace(merged, seed=self.seed)
        return merged.resolve(self._llm.defaults)

    def _evaluate(self, cancel: Cancel | None = None) -> Logits | None:
        """The logits after the last token; None when cancelled."""
        tokens = self._sequence.tokens
        if not tokens:
            raise ArgumentError("the session is empty: append something first")
        if self._n_logits != len(tokens):
            rows = self._rows([], cancel)
            if not rows:
                return None
            self._logits, self._n_logits = np.array(rows[-1]), len(tokens)
        return self._logits

    def _rows(self, guesses: list[int], cancel: Cancel | None) -> list[Logits]:
        """The logits after the last token, and after each guess that was computed with it; none when
        cancelled."""
        job = Job(self._sequence)
        job.want(1, guesses)
        rows = [row for part in self._llm._engine.evaluate(job, cancel) for row in part]
        return rows if job.is_done else []

    def _certain(self) -> Logits:
        logits = self._evaluate()
        assert logits is not None, "nothing can cancel this"
        return logits


@dataclass(frozen=True)
class _Request:
    """A text that was asked for: how, after what, and how far it is. params are resolved."""

    generation: Generation
    params: SamplingParams
    prompt: list[int]
    form: Form | None = None


def _is_prompt(prompt: Prompt | SequenceOf[Prompt]) -> TypeGuard[Prompt]:
    """Whether it is one prompt, not a list of them. An empty list is a list of no prompts."""
    _refuse_lookalikes(prompt)
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], (int, np.integer)))


def _described(tools: SequenceOf[Tool] | None) -> list[dict[str, Any]]:
    """As OpenAI's dicts."""
    if not tools:
        return []
    from tinyllm.chat.tools import as_tools

    return as_tools(tools)


def _calls_in(messages: SequenceOf[Mapping[str, Any]]) -> Iterator[Any]:
    for message in messages if isinstance(messages, SequenceOf) else ():
        if isinstance(message, Mapping):
            yield from message.get("tool_calls") or ()


def _is_to_be_completed(call: object) -> bool:
    """Whether no template knows such a call of a conversation: a completion's own, or one without an id."""
    from tinyllm.chat.tools import ToolCall

    return isinstance(call, ToolCall) or (isinstance(call, Mapping) and not call.get("id"))


def _refuse_lookalikes(prompt: object) -> None:
    """What Python would take for a sequence of ids, and what is no sequence."""
    lookalike = isinstance(prompt, (bytes, bytearray, memoryview, Mapping, Set))
    if lookalike or not hasattr(prompt, "__len__"):
        raise TypeError(f"a prompt is a str or a sequence of token ids, not {type(prompt).__name__}")


def _merge(params: SamplingParams | None, sampling: SamplingOptions) -> SamplingParams:
    return SamplingParams(**sampling) if params is None else replace(params, **sampling)


def _derive(params: SamplingParams, i: int) -> SamplingParams:
    """The parameters of sample i."""
    assert params.seed is not None, "params are resolved"
    return replace(params, seed=stream_seed(params.seed, i))
