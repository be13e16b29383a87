"""How good a model is on a text, and how far it is from another: perplexity, KL divergence, agreement.

A text is cut into windows as llama-perplexity cuts it. Several models run in step, a batch of windows at a
time, and every slice of their logits is compared and dropped. Imports llm, engine, backends and errors;
prints nothing. docs/quantization.md is made with it, cli/perplexity.py prints it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.backends import F32, I32, MOST_INT, PAGE, StatePairs, integers
from tinyllm.engine.choosing import require_finite
from tinyllm.errors import ArgumentError, ContextError, integer
from tinyllm.llm import LLM
from tinyllm.results import perplexity_of
from tinyllm.tokenizer import Tokenizer

F64 = npt.NDArray[np.float64]
# called with (windows done, windows, mean nats a token of each model so far)
Progress = Callable[[int, int, Sequence[float]], object]

N_CTX = 512  # tokens of a window, llama-perplexity's default
CALL = 512  # tokens of a call of the model: more is no faster, and takes more memory
LOGITS = 1 << 23  # logits of a model held at once (32 MB), if a row is not more than that
IN_CACHE = 1 << 17  # logits worked on at once: a few copies of them in float64 stay in a core's cache


@dataclass(frozen=True)
class Windows:
    """A text's tokens in windows. ids: int32 [n_windows, n_ctx]; each window's tokens from `first` on are
    scored, every one given those before it in the window.

    Raises ArgumentError and TypeError for ids of another shape or kind and where there is none to score.
    """

    ids: I32
    first: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", integers("ids", self.ids, 2))
        if not self.ids.size:
            raise ArgumentError(f"windows of the shape {self.ids.shape} have no token")
        integer("first", self.first, 1, self.ids.shape[1] - 1, "of a window, the first token that is scored")

    @property
    def n_tokens(self) -> int:
        """Tokens that are scored."""
        n_windows, n_ctx = self.ids.shape
        return int(n_windows * (n_ctx - self.first))


def windows(
    ids: Sequence[int] | I32,
    n_ctx: int = N_CTX,
    *,
    stride: int | None = None,
    bos_id: int | None = None,
    most: int | None = None,
) -> Windows:
    """Cuts a text's ids into windows of n_ctx tokens, as llama-perplexity counts them.

    stride None: one after the other, and of each the tokens after the first n_ctx / 2 + 1 are scored. A
    number: a window starts that many tokens after the one before and its last `stride` tokens are scored, so
    that none is scored twice. (llama-perplexity's --ppl-stride S lengthens its -c by S / 2; its windows are
    ours of that length.) bos_id: replaces every window's first token; None: nothing does. most: windows at
    most, the first ones. A rest at the end that fills no window is left out.

    Raises ArgumentError for sizes that make no sense, and where there is not one whole window; TypeError for
    what are no whole numbers.
    """
    tokens = integers("ids", ids, 1)
    least = 3 if stride is None else 2
    integer("n_ctx", n_ctx, least, MOST_INT, "tokens of a window, of which some are scored")
    if stride is not None:
        integer("stride", stride, 1, n_ctx - 1, "less than a window")
    if most is not None:
        integer("most", most, 1, math.inf, "windows")
    if len(tokens) < n_ctx:
        raise ArgumentError(
            f"the text has {len(tokens)} tokens, a window takes {n_ctx}; give more text or a smaller window"
        )
    starts = np.arange(0, len(tokens) - n_ctx + 1, stride or n_ctx)[:most]
    cut = tokens[starts[:, None] + np.arange(n_ctx)]
    if bos_id is not None:
        cut[:, 0] = integer("bos_id", bos_id, 0, MOST_INT)
    return Windows(cut, n_ctx // 2 + 1 if stride is None else n_ctx - stride)


def text_windows(
    llm: LLM, text: str, n_ctx: int | None = None, *, stride: int | None = None, most: int | None = None
) -> Windows:
    """`windows` of a text in a model's tokens, with the BOS that its files ask for.

    n_ctx None: 512, or the model's context where that is less. Raises ArgumentError, also for a model
    without a tokenizer, and ContextError for windows longer than the context.
    """
    if llm.tokenizer is None:
        raise ArgumentError(f"{llm.name} has no tokenizer, so it cannot read a text")
    n_ctx = min(N_CTX, llm.context) if n_ctx is None else n_ctx
    if n_ctx > llm.context:
        raise ContextError(f"windows of {n_ctx} tokens do not fit into the context of {llm.context}")
    ids = llm.tokenizer.encode(text)
    bos_id = llm.tokenizer.bos_id
    has_bos = bos_id is not None and ids[:1] == [bos_id]
    return windows(ids, n_ctx, stride=stride, bos_id=bos_id if has_bos else None, most=most)


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error, s / sqrt(n); NaN for one token."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """How far a model's distributions are from a reference's, over the scored tokens.

    kl: KL(reference || model) in nats, mean; kl_median, kl_99 (99th percentile), kl_max of the tokens'.
    change: of the correct token's probability, model minus reference, mean; rms_change, the root of the mean
    of its square. same_top: the share of tokens (0 to 1) where both have the same likeliest one. nll: model
    minus reference, nats a token, its error from the differences.
    """

    kl: Estimate
    kl_median: float
    kl_99: float
    kl_max: float
    change: Estimate
    rms_change: Estimate
    same_top: Estimate
    nll: Estimate


@dataclass(frozen=True)
class Quality:
    """What `measure` finds of a model. nll: nats a token. divergence: None for the reference itself."""

    n_tokens: int
    nll: Estimate
    divergence: Divergence | None

    @property
    def perplexity(self) -> Estimate:
        """exp(nll); its error, to the first order, is the perplexity times nll's. Infinite past what float64
        holds."""
        value = perplexity_of(self.nll.value)
        return Estimate(value, value * self.nll.error)


def measure(
    models: Sequence[LLM], on: Windows, *, call: int = CALL, progress: Progress | None = None
) -> list[Quality]:
    """Perplexity of one model or several, and the divergence of all others from the first, the reference.

    All run in step over the same ids, on their own caches; of a model's logits a slice is held, never more
    than a window's. call: tokens of a call of a model; it decides speed and memory, not the result.

    Raises ArgumentError where there is no model, ids are not in a vocabulary or the vocabularies differ in
    size (`require_same_vocabulary` says more), ContextError, MemoryLimitError, ModelClosedError;
    FormatError where a broken model computes what is not finite.
    """
    if not models:
        raise ArgumentError("there is no model to measure")
    integer("call", call, 1, MOST_INT)
    n_windows, n_ctx = on.ids.shape
    for model in models:
        n_vocab, expected = model.config.vocab_size, models[0].config.vocab_size
        if n_vocab != expected:
            raise ArgumentError(
                f"{model.name} has {n_vocab} tokens, {models[0].name} {expected}: models that are compared "
                "token by token must share a vocabulary"
            )
        if on.ids.min() < 0 or on.ids.max() >= n_vocab:
            raise ArgumentError(
                f"an id of the text is not in the vocabulary of {model.name}, 0 to {n_vocab - 1}"
            )
        if n_ctx > model.context:
            raise ContextError(f"{model.name}: windows of {n_ctx} tokens do not fit into {model.context}")
    comparison = Comparison(len(models))
    with ExitStack() as stack:
        call = min(call, *(model.chunk for model in models))
        runs = [_Run(model, n_ctx, call) for model in models]
        for run in runs:
            stack.callback(run.close)
        together = runs[0].n_together
        for start in range(0, n_windows, together):
            group = on.ids[start : start + together]
            for slices in zip(*(run.logits(group, on.first) for run in runs), strict=True):
                comparison.add(slices[0][0], [logits for _, logits in slices])
            if progress is not None:
                progress(start + len(group), n_windows, comparison.nll)
    return comparison.qualities()


def require_same_vocabulary(reference: LLM, model: LLM) -> None:
    """Raises ArgumentError, with the first difference, unless both models' tokens are the same."""
    a, b = reference.tokenizer, model.tokenizer
    names = f"{reference.name} and {model.name} do not share a vocabulary"
    hint = "; compare perplexities of models of one family only, or quantizations of one model"
    if reference.config.vocab_size != model.config.vocab_size:
        sizes = f"{reference.config.vocab_size} and {model.config.vocab_size} tokens"
        raise ArgumentError(f"{names}: they have {sizes}{hint}")
    if a is None or b is None:
        raise ArgumentError(f"{(model if b is None else reference).name} has no tokenizer to compare")
    for i in range(min(a.vocab_size, b.vocab_size)):
        if a.token_bytes(i) != b.token_bytes(i):
            raise ArgumentError(
                f"{names}: token {i} is {_shown(a, i)} in one, {_shown(b, i)} in the other{hint}"
            )


def _shown(tokenizer: Tokenizer, token: int) -> str:
    return repr(tokenizer.token_text(token))


class _Run:
    """A model on groups of windows, with a cache of its own: from ids to slices of logits."""

    def __init__(self, llm: LLM, n_ctx: int, call: int) -> None:
        self._model = llm.model
        self.n_together = max(1, call // n_ctx)  # windows
        self._step = max(1, call // self.n_together)  # positions of each in a call
        self._n_rows = max(1, min(n_ctx, LOGITS // llm.config.vocab_size))  # of logits
        shape = (self.n_together, len(self._model.cache_groups), -(-n_ctx // PAGE))
        self._pool = self._model.cache(llm.cache_type, math.prod(shape), 2 * self.n_together)
        self._pool.grow(math.prod(shape))
        self._states = StatePairs(self._pool)
        self._tables = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)

    def logits(self, group: I32, first: int) -> Iterator[tuple[I32, F32]]:
        """Slices (targets int32 [n], logits float32 [n, vocab_size] that predict them) for every token of the
        windows `group` [n_windows, n_ctx] from `first` on, in an order that depends on the sizes only."""
        n_windows, n_ctx = group.shape
        n_layers = self._model.config.n_layers
        for start in range(0, n_ctx - 1, self._step):
            end = min(start + self._step, n_ctx - 1)  # the last token predicts nothing here
            x = self._forward(group[:, start:end].ravel(), n_windows, start, end, layers=(0, n_layers))
            scored = slice(max(first - 1, start), end)
            if scored.start >= end:
                continue
            x = x.reshape(n_windows, end - start, -1)[:, scored.start - start :]
            x = np.ascontiguousarray(x).reshape(-1, x.shape[2])
            targets = group[:, scored.start + 1 : end + 1].ravel()
            for row in range(0, len(x), self._n_rows):
                part = x[row : row + self._n_rows]
                logits = self._forward(part, 1, 0, len(part), logits=True)
                require_finite(logits)
                yield targets[row : row + self._n_rows], logits

    def _forward(
        self, given: npt.NDArray[Any], n_windows: int, start: int, end: int, *, logits: bool = False,
        layers: tuple[int, int] | None = None,
    ) -> F32:  # fmt: skip
        n_layers = self._model.config.n_layers
        return self._model.forward(
            given,
            np.tile(np.arange(start, end, dtype=np.int32), n_windows),
            np.repeat(np.arange(n_windows, dtype=np.int32), end - start),
            self._tables[:n_windows],
            layers=layers or (n_layers, n_layers),
            logits=logits,
            states=self._states.next(range(n_windows), [end - start] * n_windows) if layers else None,
            cache=self._pool,
        )

    def close(self) -> None:
        self._pool.close()


class Comparison:
    """Perplexity of each of n models, and of all but the first the divergence from it, slice by slice.

    add what the models say of the same tokens; `qualities` is the result.
    """

    def __init__(self, n_models: int) -> None:
        # float64 [n] parts in the order they came: of each model, and of each but the first
        self._nll: list[list[F64]] = [[] for _ in range(n_models)]
        self._kl: list[list[F64]] = [[] for _ in range(n_models - 1)]
        self._same: list[list[F64]] = [[] for _ in range(n_models - 1)]

    def add(self, targets: I32, logits: Sequence[F32]) -> None:
        """targets: int32 [n], the correct tokens. logits: float32 [n, vocab_size] of each model in their
        place."""
        n_rows = max(1, IN_CACHE // logits[0].shape[1])
        for row in range(0, len(targets), n_rows):
            correct = targets[row : row + n_rows]
            log_p = [_log_softmax(each[row : row + n_rows]) for each in logits]
            for nll, x in zip(self._nll, log_p, strict=True):
                nll.append(-x[np.arange(len(correct)), correct])
            if len(log_p) == 1:
                continue
            p, top = np.exp(log_p[0]), log_p[0].argmax(axis=1)
            for kl, same, x in zip(self._kl, self._same, log_p[1:], strict=True):
                # Never negative (Gibbs): what rounding leaves below zero is zero.
                kl.append(np.maximum((p * (log_p[0] - x)).sum(axis=1), 0.0))
                same.append((x.argmax(axis=1) == top).astype(np.float64))

    @property
    def nll(self) -> list[float]:
        """Nats a token so far, of each model."""
        return [float(np.concatenate(parts).mean()) for parts in self._nll]

    @property
    def kl(self) -> list[F64]:
        """Each token's KL divergence from the first model, float64 [n], of each but the first."""
        return [np.concatenate(parts) for parts in self._kl]

    def qualities(self) -> list[Quality]:
        """One a model, in their order."""
        nll = [np.concatenate(parts) for parts in self._nll]
        divergences = [
            _divergence(nll[0], x, kl, np.concatenate(same))
            for x, kl, same in zip(nll[1:], self.kl, self._same, strict=True)
        ]
        return [Quality(len(x), estimate(x), d) for x, d in zip(nll, [None, *divergences], strict=True)]


def _divergence(reference: F64, nll: F64, kl: F64, same: F64) -> Divergence:
    change = np.exp(-nll) - np.exp(-reference)
    squares = estimate(change**2)
    rms = math.sqrt(squares.value)
    return Divergence(
        kl=estimate(kl),
        kl_median=float(np.median(kl)),
        kl_99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        change=estimate(change),
        rms_change=Estimate(rms, squares.error / (2 * rms) if rms else 0.0),
        same_top=estimate(same),
        nll=estimate(nll - reference),
    )


def estimate(x: F64) -> Estimate:
    """The mean of float64 [n] and its standard error."""
    error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return Estimate(float(x.mean()), float(error))


def _log_softmax(logits: F32) -> F64:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x
