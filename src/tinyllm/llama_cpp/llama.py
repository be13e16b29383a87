"""Llama: llama-cpp-python's class, as a thin layer over tinyllm's `LLM`, which is there as `llm`.

Like llama.cpp's context it holds one text at a time (state.py). Not for several threads at once; `llm` is.
Arguments become tinyllm's in arguments.py, answers become dicts in completions.py and llama_chat_format.py.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property, wraps
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

import tinyllm
from tinyllm import LLM, Completion, Piece, SamplingParams
from tinyllm.engine.sampling import stream_seed
from tinyllm.errors import ArgumentError, Error, NotFoundError, UnsupportedError
from tinyllm.files.gguf import read_gguf
from tinyllm.llama_cpp import constants, vectors
from tinyllm.llama_cpp.arguments import (
    NoModelError,
    PromptTooLongError,
    cache_type_of,
    check_arguments,
    device_of,
    processors_of,
    sampling_params,
    seed_of,
    strings_of,
    tell,
)
from tinyllm.llama_cpp.completions import Taken, Writer
from tinyllm.llama_cpp.infill import infill_tokens
from tinyllm.llama_cpp.llama_cache import BaseLlamaCache, n_shared
from tinyllm.llama_cpp.llama_chat_format import (
    LlamaChatCompletionHandler,
    get_chat_completion_handler,
    template_handler,
)
from tinyllm.llama_cpp.llama_grammar import LlamaGrammar
from tinyllm.llama_cpp.llama_tokenizer import BaseLlamaTokenizer, LlamaTokenizer
from tinyllm.llama_cpp.pretrained import download
from tinyllm.llama_cpp.state import LlamaState, TextState
from tinyllm.modelfiles import model_path as model_path_of
from tinyllm.tokenizer import Tokenizer, load_tokenizer

Ids = npt.NDArray[np.intc]
Scores = npt.NDArray[np.single]
LogitsProcessor = Callable[[Ids, Scores], Scores]
"""`processor(input_ids, scores)`: int32 [n], float32 [n_vocab], which it may change; returns the scores."""
StoppingCriteria = Callable[[Ids, Scores], bool]
"""`criterion(input_ids, logits)`: the tokens before the next one, and its logits; True ends the text."""


class LogitsProcessorList(list[LogitsProcessor]):
    """Processors, one after another."""

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class StoppingCriteriaList(list[StoppingCriteria]):
    """Criteria, any of which ends the text."""

    def __call__(self, input_ids: Ids, logits: Scores) -> bool:
        met = [criterion(input_ids, logits) for criterion in self]  # each is asked, as it may count
        return any(met)


class MinTokensLogitsProcessor:
    """Forbids the end of text until there are so many new tokens."""

    def __init__(self, min_tokens: int, token_eos: int) -> None:
        self.min_tokens, self.token_eos = min_tokens, token_eos
        self.prompt_tokens: int | None = None

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        if self.prompt_tokens is None:
            self.prompt_tokens = len(input_ids)
        if len(input_ids) - self.prompt_tokens < self.min_tokens:
            scores[self.token_eos] = -np.inf
        return scores


class _Stopper:
    """Criteria as a processor, which is asked before each token."""

    def __init__(self, criteria: Any) -> None:
        self._criteria, self.is_met = processors_of(criteria), False

    def __call__(self, input_ids: Ids, scores: Scores) -> None:
        met = [bool(criterion(input_ids, scores.copy())) for criterion in self._criteria]
        self.is_met = self.is_met or any(met)


def _as_text(value: object) -> str | None:
    """A value of metadata as llama.cpp writes it; None for a list."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:f}"
    return str(value) if isinstance(value, (str, int)) else None


class Llama:
    """A model, and one text of it."""

    def __init__(
        self,
        model_path: str,
        *,
        n_gpu_layers: int = 0,
        split_mode: int = constants.LLAMA_SPLIT_MODE_LAYER,
        main_gpu: int = 0,
        tensor_split: list[float] | None = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        seed: int = constants.LLAMA_DEFAULT_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        rope_scaling_type: int | None = constants.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
        pooling_type: int = constants.LLAMA_POOLING_TYPE_UNSPECIFIED,
        attention_type: int = constants.LLAMA_ATTENTION_TYPE_UNSPECIFIED,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        yarn_orig_ctx: int = 0,
        logits_all: bool = False,
        embedding: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool = False,
        op_offload: bool | None = None,
        swa_full: bool | None = None,
        no_perf: bool = False,
        last_n_tokens_size: int = 64,
        lora_base: str | None = None,
        lora_scale: float = 1.0,
        lora_path: str | None = None,
        numa: bool | int = False,
        chat_format: str | None = None,
        chat_handler: LlamaChatCompletionHandler | None = None,
        draft_model: Any = None,
        tokenizer: BaseLlamaTokenizer | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        spm_infill: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> None:
        """Loads a model: what `tinyllm.load` reads, so a GGUF file, a Hugging Face directory or "stories".

        n_gpu_layers: 0 for the CPU; any other number lets the whole model onto a GPU that has room for it.
        main_gpu: which. vocab_only: the tokenizer alone. seed: of texts that are given none; -1 and the
        default draw one. n_ctx: how many tokens a text may hold; 0: what the model was trained for.
        n_threads: None for one a physical core. pooling_type: of `embed`. logits_all, embedding: scores, log
        probabilities and vectors can be had without them. last_n_tokens_size: how many tokens the penalties
        look at. chat_format: a name (docs/llama_cpp.md); None: the model's own template. chat_handler: goes
        before it. lora_path, lora_scale: an adapter (docs/adapters.md) and its strength. tokenizer: in place
        of the model's. type_k, type_v: GGML_TYPE_F32, F16 or Q8_0, the same
        for both. spm_infill: with `suffix`, the suffix comes first. verbose: a line on stderr of what was
        loaded, and of each text's speed.

        What chooses how to compute, such as n_batch or flash_attn, is warned of once, by name; what changes
        the model, such as kv_overrides or rope_freq_base, is an UnsupportedError. Raises NoModelError (a
        ValueError and a FileNotFoundError), and what `tinyllm.load` does.
        """
        given = dict(locals())
        self._arguments = {
            name: value for name, value in given.items() if name not in ("self", "kwargs", "tokenizer")
        }
        check_arguments(given, kwargs)
        self.model_path, self.verbose, self.spm_infill = os.fspath(model_path), verbose, spm_infill
        self.last_n_tokens_size, self.context_pooling = last_n_tokens_size, pooling_type
        self.chat_format, self.chat_handler = chat_format, chat_handler
        self.cache: BaseLlamaCache | None = None
        self._seed = seed_of(seed)
        self._llm: LLM | None = None
        try:
            if vocab_only:
                self._vocabulary: Tokenizer | None = load_tokenizer(model_path)
            else:
                loaded = tinyllm.load(
                    model_path,
                    device=device_of(n_gpu_layers, main_gpu),
                    threads=n_threads,
                    context=n_ctx or None,
                    cache_type=cache_type_of(type_k, type_v),  # type: ignore[arg-type]
                    adapters={"lora": lora_path} if lora_path else None,
                )
                self._llm = loaded.adapted([("lora", lora_scale)]) if lora_path else loaded
                self._vocabulary = self._llm.tokenizer
        except NotFoundError as error:
            raise NoModelError(f"Model path does not exist: {model_path}: {error}") from error
        self.tokenizer_ = tokenizer or (LlamaTokenizer(self) if self._vocabulary else None)
        self._state = TextState(self._llm) if self._llm else None
        if self._llm is not None:
            vectors.pooling_of(self._llm, pooling_type)
            self._say(f"{self._llm!r}, {self._llm.model.threads} threads; chat format: {self._format()}")

    # ---- what it is made of

    @property
    def llm(self) -> LLM:
        """tinyllm's own model."""
        if self._llm is None:
            raise ArgumentError("the model was loaded with vocab_only=True: it has a tokenizer, no weights")
        return self._llm

    @property
    def own_tokenizer(self) -> Tokenizer:
        """tinyllm's tokenizer of the model."""
        if self._vocabulary is None:
            raise ArgumentError(f"{self.model_path} has no tokenizer: give token ids instead of text")
        return self._vocabulary

    @property
    def state(self) -> TextState:
        """The text it holds."""
        _ = self.llm
        assert self._state is not None
        return self._state

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The single values of a GGUF file's metadata, as text; {} for a directory."""
        try:
            values = read_gguf(model_path_of(self.model_path)).metadata
        except Error:
            return {}
        return {key: text for key, value in values.items() if (text := _as_text(value)) is not None}

    def n_ctx(self) -> int:
        return self.llm.context

    def n_embd(self) -> int:
        return self.llm.config.dim

    def n_vocab(self) -> int:
        return self.llm.config.vocab_size if self._llm else self.own_tokenizer.vocab_size

    def pooling_type(self) -> int:
        return vectors.pooling_of(self.llm, self.context_pooling)

    def tokenizer(self) -> LlamaTokenizer:
        return LlamaTokenizer(self)

    def token_bos(self) -> int:
        """-1 where there is none."""
        return -1 if (token := self.own_tokenizer.bos_id) is None else token

    def token_eos(self) -> int:
        """-1 where there is none."""
        return -1 if (token := self.own_tokenizer.eos_id) is None else token

    def token_nl(self) -> int:
        """The token of a line feed; -1 where there is none."""
        found = [self.own_tokenizer.id_of(text) for text in ("<0x0A>", "Ċ", "\n")]
        return next((token for token in found if token is not None), -1)

    @property
    def ctx(self) -> NoReturn:
        raise AttributeError("ctx: the low-level interface of llama.cpp is not here; see `llm`")

    @property
    def model(self) -> NoReturn:
        raise AttributeError("model: the low-level interface of llama.cpp is not here; see `llm.model`")

    # ---- text and tokens

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """The ids of a text in UTF-8. add_bos: with what the model's files put around a text. special:
        whether the texts of special tokens mean these tokens."""
        return self._tokenizer.tokenize(text, add_bos, special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """The bytes of ids. special: whether special tokens are shown."""
        return self._tokenizer.detokenize(list(tokens), prev_tokens=prev_tokens, special=special)

    @property
    def _tokenizer(self) -> BaseLlamaTokenizer:
        return self.tokenizer_ or LlamaTokenizer(self)

    def _text_of(self, token: int) -> str:
        return self.detokenize([token]).decode(errors="ignore")

    # ---- the text it holds

    @property
    def n_tokens(self) -> int:
        """How many tokens were evaluated. Set to fewer, it forgets the others."""
        return len(self.state.tokens)

    @n_tokens.setter
    def n_tokens(self, n: int) -> None:
        if not 0 <= n <= len(self.state.tokens):
            raise ArgumentError(f"n_tokens is {n}, expected 0 to {len(self.state.tokens)}")
        self.state.tokens = self.state.tokens[:n]

    @property
    def input_ids(self) -> Ids:
        """int32 [n_ctx]: the tokens, then zeros (a copy)."""
        ids = np.zeros(self.n_ctx(), np.intc)
        ids[: self.n_tokens] = self.state.tokens
        return ids

    @property
    def _input_ids(self) -> Ids:
        return self.input_ids[: self.n_tokens]

    @property
    def scores(self) -> Scores:
        """The logits after each token: float32 [n_tokens, n_vocab], computed when they are asked for."""
        return self.state.logits()

    @property
    def _scores(self) -> Scores:
        return self.scores

    @property
    def eval_tokens(self) -> deque[int]:
        return deque(self.state.tokens, maxlen=self.n_ctx())

    @property
    def eval_logits(self) -> deque[list[float]]:
        return deque(self.scores.tolist(), maxlen=self.n_ctx())

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """Looks texts up in a cache of states, and keeps them there. Prompts that begin alike share what is
        computed without it."""
        self.cache = cache

    def set_seed(self, seed: int) -> None:
        """Of the next texts; -1 draws one."""
        self._seed = seed_of(seed)

    def reset(self) -> None:
        """Forgets the text."""
        self.state.tokens = []

    def eval(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the text and computes them. Raises PromptTooLongError past the context."""
        self.state.evaluate([int(token) for token in tokens])

    def sample(
        self,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_eta: float = 0.1,
        mirostat_tau: float = 5.0,
        penalize_nl: bool = True,
        logits_processor: Any = None,
        grammar: LlamaGrammar | None = None,
        idx: int | None = None,
    ) -> int:
        """The token that follows the text, which is not added to it. idx: after which token, by position.

        With the same seed it is the same each time. A grammar is refused: it needs to know a text from its
        beginning, which `generate` does.
        """
        if grammar is not None:
            raise UnsupportedError("grammar: sample chooses one token; ask generate for a text of a form")
        if not penalize_nl:
            tell(["penalize_nl"], "{} does nothing, as in llama.cpp since 2024")
        params = self._params(
            top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, temperature=temp,
            repeat_penalty=repeat_penalty, frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty, tfs_z=tfs_z, mirostat_mode=mirostat_mode,
            processors=processors_of(logits_processor), grammar=None,
        )  # fmt: skip
        state, tokens = self.state, self.state.tokens
        if not tokens:
            raise ArgumentError("there is no text to go on from: call eval first")
        if idx is None or idx == len(tokens) - 1:
            return state.sample(params)
        if not 0 <= idx < len(tokens):
            raise ArgumentError(f"idx is {idx}, expected 0 to {len(tokens) - 1}")
        state.tokens = tokens[: idx + 1]
        try:
            return state.sample(params)
        finally:
            state.tokens = tokens

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        grammar: LlamaGrammar | None = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Goes on from these tokens, a token at a time: the end of text is one too, and more may follow.

        reset: whether the tokens are the whole text; else they follow what is there. Tokens that are sent
        into the generator are guesses of what follows, as there; the text is the same without. It ends where
        a criterion says so, and at the context's end.
        """
        if not penalize_nl:
            tell(["penalize_nl"], "{} does nothing, as in llama.cpp since 2024")
        stopper = _Stopper(stopping_criteria)
        params = self._params(
            top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, temperature=temp,
            repeat_penalty=repeat_penalty, frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty, tfs_z=tfs_z, mirostat_mode=mirostat_mode,
            processors=[stopper, *processors_of(logits_processor)] if stopping_criteria is not None
            else processors_of(logits_processor),
            grammar=grammar,
        )  # fmt: skip
        text = ([] if reset else self.state.tokens) + [int(token) for token in tokens]
        while len(text) < self.n_ctx():
            for token in self._tokens(text, params):
                if stopper.is_met:
                    return
                yield token
                text.append(token)
            if self.state.ended_with is None:
                return

    def _tokens(self, text: list[int], params: SamplingParams) -> Iterator[int]:
        """The tokens that follow, with the one that ends the text."""
        pieces = self.state.pieces(list(text), params)
        try:
            for piece in pieces:
                if piece.token is not None:
                    yield piece.token
        finally:
            pieces.close()
        if (end := self.state.ended_with) is not None:
            yield end

    def _params(self, **asked: Any) -> SamplingParams:
        return sampling_params(seed=self._seed, penalty_window=self.last_n_tokens_size, **asked)

    def save_state(self) -> LlamaState:
        """The text and what was computed for it, to go on with the very same bits, in another process too."""
        data = self.state.save()
        scores = np.empty((0, self.n_vocab()), np.single)
        return LlamaState(self.input_ids, scores, self.n_tokens, data, len(data), self._seed)

    def load_state(self, state: LlamaState) -> None:
        """Raises FormatError for a state of another model."""
        self.state.restore(state.input_ids[: state.n_tokens].tolist(), state.llama_state)
        self._seed = state.seed

    # ---- completions

    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | list[str] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[Any, float] | None = None,
    ) -> Any:
        """Continues a prompt. Returns the dict of OpenAI's completions, with stream=True an iterator of its
        chunks.

        prompt: a text, in which the texts of special tokens mean these tokens, or ids. suffix: what stands
        behind the gap, for a model with tokens for that; for another, text that goes behind the answer.
        max_tokens: None, 0 or less: to the end of the context. logprobs: how many alternatives come with each
        token. echo: the prompt stands before the answer. seed: None: one that follows from the last.
        stopping_criteria, logits_processor: one or a list. logit_bias: token id -> number added to its logit.

        Raises PromptTooLongError (a ValueError), UnsupportedError for mirostat, ArgumentError (a ValueError)
        for what is out of range; with stream=True when the first chunk is asked for.
        """
        sampling: dict[str, Any] = {
            "temperature": temperature, "top_p": top_p, "min_p": min_p, "typical_p": typical_p,
            "frequency_penalty": frequency_penalty, "presence_penalty": presence_penalty,
            "repeat_penalty": repeat_penalty, "top_k": top_k, "tfs_z": tfs_z, "mirostat_mode": mirostat_mode,
            "logit_bias": logit_bias, "grammar": grammar, "logprobs": logprobs, "stop": strings_of(stop),
        }  # fmt: skip
        chunks = self._complete(
            prompt, suffix, max_tokens, echo, seed, model, stopping_criteria,
            processors_of(logits_processor), sampling, stream=stream,
        )  # fmt: skip
        return chunks if stream else next(chunks)

    @wraps(create_completion)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.create_completion(*args, **kwargs)

    def _complete(
        self,
        prompt: str | list[int],
        suffix: str | None,
        max_tokens: int | None,
        echo: bool,
        seed: int | None,
        model: str | None,
        stopping_criteria: Any,
        processors: list[Any],
        sampling: dict[str, Any],
        *,
        stream: bool,
    ) -> Iterator[dict[str, Any]]:
        """The chunks, or the whole dict as the only one."""
        ids, after = self._prompt_ids(prompt, suffix)
        room = self.n_ctx() - len(ids)
        if room <= 0:
            raise PromptTooLongError(f"Requested tokens ({len(ids)}) exceed context window of {self.n_ctx()}")
        self.set_seed(stream_seed(self._seed, 1) if seed is None else seed)
        stopper = _Stopper(stopping_criteria)
        if stopping_criteria is not None:
            processors = [stopper, *processors]
        n = room if max_tokens is None or max_tokens <= 0 else min(max_tokens, room)
        params = self._params(processors=processors, max_tokens=n, **sampling)
        writer, n_top = self.writer(model), sampling["logprobs"]
        before = prompt if isinstance(prompt, str) else self.detokenize(ids).decode(errors="ignore")
        prompt_logprobs = self._echoed(ids, writer, n_top) if echo and n_top is not None else []
        self._look_up(ids)
        if stream and echo:
            yield writer.chunk(before, writer.logprobs(prompt_logprobs, 0) if prompt_logprobs else None)
        made: list[Taken] = []
        shown, offset = "", len(before)
        pieces = self.state.pieces(ids, params)
        try:
            for piece in pieces:
                if stopper.is_met:
                    break
                if piece.token is not None:
                    made.append(Taken(piece.token, piece.logprob, piece.top_logprobs))
                shown += piece.text
                if stream:
                    beside = None
                    if n_top is not None and piece.token is not None:
                        beside = writer.logprobs(made[-1:], offset)
                        offset += len(self._text_of(piece.token))
                    if piece.text or beside:
                        yield writer.chunk(piece.text, beside)
        finally:
            pieces.close()
        answer = self.state.completion
        assert answer is not None
        reason: str = "stop" if stopper.is_met else answer.finish_reason
        if stopper.is_met:  # with what was held back because a stop string might have begun
            whole = self.detokenize([one.token for one in made], prev_tokens=ids).decode(errors="ignore")
            if stream and whole[len(shown) :]:
                yield writer.chunk(whole[len(shown) :])
            shown = whole
        self._keep(ids + [one.token for one in made])
        self._say_speed(answer)
        if stream:
            if after:
                yield writer.chunk(after)
            yield writer.chunk("", None, reason)
            return
        beside = None
        if n_top is not None:
            beside = writer.logprobs([*prompt_logprobs, *made], 0 if echo else len(before))
        yield writer.whole((before if echo else "") + shown + after, beside, reason, len(ids), len(made))

    def _prompt_ids(self, prompt: str | list[int], suffix: str | None) -> tuple[list[int], str]:
        """The ids to go on from, and what goes behind the answer."""
        own = self._vocabulary
        if not isinstance(prompt, str):
            ids = [int(token) for token in prompt]
        elif self.tokenizer_ is None or isinstance(self.tokenizer_, LlamaTokenizer):
            ids = self.tokenize(prompt.encode(), add_bos=True, special=True)
        else:
            front = own.prefix if own else []
            ids = [*front, *self.tokenize(prompt.encode(), add_bos=False, special=True)]
        if suffix is not None:
            marks = infill_tokens(self.own_tokenizer, self.metadata)
            if marks is None:
                return ids, suffix
            return marks.arrange(ids, self.own_tokenizer, suffix, suffix_first=self.spm_infill), ""
        if own is not None and ids[:2] == [own.bos_id] * 2:
            tell(["the BOS"], "{} begins the prompt twice: leave it out, the model's files say to add it")
        if not ids and own is not None and own.bos_id is not None:
            ids = [own.bos_id]  # an empty prompt
        return ids, ""

    def _echoed(self, ids: list[int], writer: Writer, n_top: int) -> list[Taken]:
        """The prompt's own log probabilities; the first token has none."""
        score = self.llm.score(ids, top_logprobs=n_top)
        tops = score.top_logprobs or [[]] * len(score.logprobs)
        made = [Taken(*one) for one in zip(ids[1:], score.logprobs, tops, strict=True)]
        return [Taken(ids[0]), *made]

    def writer(self, model: str | None) -> Writer:
        """Of a new answer. model: the name that it gives."""
        return Writer(self.model_path if model is None else model, self._text_of, self.token_bos())

    def _look_up(self, ids: list[int]) -> None:
        """Loads the state of a cache that has more of this prompt than there is."""
        if self.cache is None or ids not in self.cache:
            return
        kept: LlamaState = self.cache[ids]
        if n_shared(kept.input_ids[: kept.n_tokens].tolist(), ids) > n_shared(self.state.tokens, ids):
            seed = self._seed
            self.load_state(kept)
            self._seed = seed

    def _keep(self, tokens: list[int]) -> None:
        if self.cache is not None:
            self.cache[tokens] = self.save_state()

    # ---- chats

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        functions: list[Any] | None = None,
        function_call: Any = None,
        tools: list[Any] | None = None,
        tool_choice: Any = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        response_format: dict[str, Any] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: Any = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[Any, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> Any:
        """Answers a conversation. Returns the dict of OpenAI's chats, with stream=True an iterator of its
        chunks.

        The prompt is made by `chat_handler`, else by the format `chat_format` names, else by the model's own
        template, else by "llama-2", which is warned of. response_format: {"type": "json_object"}, with a
        "schema" where it has to follow one. tools: with the model's template, calls come back as
        `tool_calls`; with another format only where tool_choice names the one to call. functions,
        function_call: the same in OpenAI's older words. The rest is as in `create_completion`.
        """
        options = {name: value for name, value in locals().items() if name not in ("self", "messages")}
        return self._handler()(llama=self, messages=messages, **options)

    def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
        """The same as objects of the package openai, which this needs."""
        try:
            from openai.types.chat import ChatCompletion, ChatCompletionChunk
        except ImportError:
            raise ImportError("create_chat_completion_openai_v1 needs openai: pip install openai") from None
        answer = self.create_chat_completion(*args, **kwargs)
        if kwargs.get("stream", False):
            return (ChatCompletionChunk(**chunk) for chunk in answer)
        return ChatCompletion(**answer)

    def _format(self) -> str:
        """The chat format that counts."""
        if self.chat_handler is not None:
            return "chat_handler="
        if self.chat_format is not None:
            return self.chat_format
        return "chat_template.default" if self._llm and self._llm.chat_template else "llama-2"

    def _handler(self) -> LlamaChatCompletionHandler:
        if self.chat_handler is not None:
            return self.chat_handler
        name = self._format()
        if name == "chat_template.default":
            return template_handler()
        if name.startswith("chat_template.") and (source := self.metadata.get(f"tokenizer.{name}")):
            return template_handler(source)
        if self.chat_format is None:
            tell(
                ["chat_format"],
                f"{self.model_path} has no chat template: its prompts are written as llama-2's; {{}}= "
                "chooses another",
            )
        return get_chat_completion_handler(name)

    def chat_params(
        self, options: Mapping[str, Any], grammar: LlamaGrammar | None, stop: list[str], logprobs: int | None
    ) -> SamplingParams:
        """The sampling that a chat's options ask for."""
        seed, most = options["seed"], options["max_tokens"]
        self.set_seed(stream_seed(self._seed, 1) if seed is None else seed)
        names = (
            "temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
            "repeat_penalty", "tfs_z", "mirostat_mode", "logit_bias",
        )  # fmt: skip
        return self._params(
            processors=processors_of(options["logits_processor"]),
            grammar=grammar,
            stop=stop,
            logprobs=logprobs,
            max_tokens=most if most is not None and most > 0 else self.n_ctx(),
            **{name: options[name] for name in names},
        )

    def release(self) -> None:
        """Gives the text's part of the cache back; it is computed again when it is needed."""
        self.state.release()

    def was_written(self, answer: Completion) -> None:
        """The text is now this answer's, which was made without `state`."""
        self.state.tokens = [*answer.prompt_tokens, *answer.tokens[:-1]]
        self._say_speed(answer)

    def logprobs_of(self, answer: Completion, writer: Writer) -> dict[str, Any] | None:
        """Of a whole answer, where they were asked for."""
        if answer.logprobs is None:
            return None
        tops = answer.top_logprobs or [[]] * len(answer.tokens)
        return writer.logprobs([Taken(*t) for t in zip(answer.tokens, answer.logprobs, tops, strict=True)], 0)

    def piece_logprobs(self, piece: Piece, writer: Writer, wanted: Any) -> dict[str, Any] | None:
        """Of one piece."""
        if not wanted or piece.token is None:
            return None
        return writer.logprobs([Taken(piece.token, piece.logprob, piece.top_logprobs)], 0)

    # ---- vectors

    def embed(
        self,
        input: str | list[str],
        normalize: bool = False,
        truncate: bool = True,
        return_count: bool = False,
    ) -> Any:
        """The vector of a text as a list of floats, or a list of those of several texts; without a pooling
        a text has one for each token.

        normalize: to length 1. truncate: a text that is longer than the context is cut; else it is a
        PromptTooLongError (a ValueError). return_count: returns (vectors, number of tokens).
        """
        texts = [self.tokenize(text.encode()) for text in ([input] if isinstance(input, str) else input)]
        longest = max(map(len, texts), default=0)
        if longest > self.n_ctx() and not truncate:
            raise PromptTooLongError(f"Requested tokens ({longest}) exceed context window of {self.n_ctx()}")
        texts = [ids[: self.n_ctx()] for ids in texts]
        found = vectors.vectors(self.llm, texts, self.pooling_type(), normalize)
        self.reset()
        output = found[0] if isinstance(input, str) else found
        return (output, sum(map(len, texts))) if return_count else output

    def create_embedding(self, input: str | list[str], model: str | None = None) -> dict[str, Any]:
        """The same in the dict of OpenAI's embeddings."""
        texts = [input] if isinstance(input, str) else input
        found, n_tokens = self.embed(texts, return_count=True)
        return {
            "object": "list",
            "data": [{"object": "embedding", "embedding": v, "index": i} for i, v in enumerate(found)],
            "model": self.model_path if model is None else model,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }

    # ---- the rest

    @staticmethod
    def logits_to_logprobs(logits: Any, axis: int = -1) -> npt.NDArray[np.single]:
        """Natural logarithms of the softmax, float32."""
        values = np.asarray(logits, np.single)
        most = values.max(axis=axis, keepdims=True)
        shifted = values - np.where(np.isfinite(most), most, np.single(0))
        with np.errstate(divide="ignore"):
            logprobs: npt.NDArray[np.single] = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
        return logprobs

    @staticmethod
    def longest_token_prefix(a: Sequence[int], b: Sequence[int]) -> int:
        """How many tokens two texts have in common at their beginning."""
        return n_shared(a, b)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str,
        additional_files: list[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Llama:
        """Loads a model of the Hugging Face Hub, which the package huggingface_hub fetches.

        filename: a name or a pattern ("*q4_k_m.gguf") that fits one file; of a split model the first.
        additional_files: what else to fetch. local_dir: where to, instead of huggingface_hub's cache
        (cache_dir). The rest are arguments of `Llama`. Raises ArgumentError (a ValueError) where a pattern
        fits none or several files, and what huggingface_hub does.
        """
        if local_dir_use_symlinks != "auto":
            tell(
                ["local_dir_use_symlinks"], "{}: huggingface_hub has no such choice any more; it is not used"
            )
        files = additional_files or ()
        return cls(download(repo_id, filename, files, local_dir=local_dir, cache_dir=cache_dir), **kwargs)

    def close(self) -> None:
        """Frees the weights."""
        if self._llm is not None:
            self.release()
            self._llm.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self._arguments

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"<Llama {self.model_path}: {self._llm!r}>"

    def _say(self, text: str) -> None:
        if self.verbose:
            print(f"tinyllm {tinyllm.__version__}: {text}", file=sys.stderr)

    def _say_speed(self, answer: Completion) -> None:
        t = answer.timings
        self._say(
            f"prompt {t.prompt_tokens} tokens ({t.cached_tokens} of them kept) in {t.prompt_s:.3f} s, "
            f"then {t.generated_tokens} in {t.generate_s:.3f} s"
        )
