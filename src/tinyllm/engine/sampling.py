"""How the next token is chosen: parameters and their defaults, one sampler a sequence, seeds, stop strings.

The arithmetic is csrc/sample.c, reached through `backends`; docs/sampling.md describes every step to users.
Imports config (ranges of what files may advise), errors, backends and how chat frames tokens. Read engine.py
next: it calls a `Sampler` for each row of logits.
"""

from __future__ import annotations

import hashlib
import inspect
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from tinyllm import backends
from tinyllm.chat.reasoning import HIDDEN_FROM, HIDDEN_TO, shown
from tinyllm.config import ADVISED_RANGES
from tinyllm.errors import ArgumentError, integer, number_text

Candidates = backends.Candidates
Logits = npt.NDArray[np.float32] | Candidates
Processor = Callable[[npt.NDArray[np.float32], Sequence[int]], npt.NDArray[Any] | None]
"""`processor(logits, tokens)`: logits float32 [vocab_size], a writable copy; tokens so far, prompt included,
a copy as well. Change the logits in place and return None, or return a new array [vocab_size] of real
numbers. It must not wait for another thread's call of the same model, which may wait for this text's end."""

_LARGEST_INT = 2**31 - 1
# Field: lowest, highest, what a special value means.
_FLOATS = {
    **{name: bounds for name, bounds in ADVISED_RANGES.items() if name != "top_k"},
    "presence_penalty": (-1000, 1000, "0 turns it off"),
    "frequency_penalty": (-1000, 1000, "0 turns it off"),
}
_INTS: dict[str, tuple[float, float, str]] = {
    "top_k": ADVISED_RANGES["top_k"],
    "penalty_window": (-1, _LARGEST_INT, "-1 is the whole text"),
    "seed": (0, 2**64 - 1, "None draws one"),
    "max_tokens": (1, _LARGEST_INT, "None is until the end of text or context"),
    "top_logprobs": (0, _LARGEST_INT, "0 turns it off"),
}
_DEFAULTS: dict[str, float] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "penalty_window": 64,
}


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks of sampling. None leaves a field to `resolve`.

    Raises ArgumentError for a value out of range (the message names the range), TypeError for a wrong type.

    temperature: divides the logits before the draw; 0 takes the most likely token.
    top_k, top_p, min_p, typical_p: filters, see docs/sampling.md.
    repetition_penalty: divides positive logits of tokens already in the text and multiplies negative ones.
    presence_penalty, frequency_penalty: subtracted from their logits, once and once an occurrence.
    penalty_window: how many of the last tokens (the prompt's included) the penalties look at; -1 for all.
    logit_bias: token id -> number added to its logit; -inf forbids the token.
    seed: of the stream of random numbers, 64 bits.
    stop: a string, or several, that end the text and are not part of it; special tokens may be named.
    max_tokens: how many tokens to generate at most.
    logprobs: whether results carry each token's log probability; top_logprobs: how many alternatives with it.
    processors: called on the logits, in order, before everything else.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_window: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    max_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    processors: Sequence[Processor] = ()

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name, bounds in _FLOATS.items():
            if getattr(self, name) is not None:
                keep(name, _number(name, getattr(self, name), *bounds))
        for name, bounds in _INTS.items():
            if getattr(self, name) is not None:
                keep(name, integer(name, getattr(self, name), *bounds))
        if self.top_logprobs is None:
            raise TypeError("top_logprobs must be an int, not None")
        if not isinstance(self.logprobs, bool):
            raise TypeError(f"logprobs must be a bool, not {type(self.logprobs).__name__}")
        keep("logit_bias", _checked_bias(self.logit_bias))
        keep("stop", _checked_stop(self.stop))
        keep("processors", tuple(self.processors))
        for processor in self.processors:
            if not callable(processor):
                raise TypeError(f"processors must be callables, not {type(processor).__name__}")

    def resolve(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """The same with every None but max_tokens filled: from `defaults`, then tinyllm's own; a random seed.

        defaults: the model's own, by this class's field names (`vars()` of config.GenerationDefaults); other
        names and None are passed over. Raises ArgumentError where one of them is out of range.
        """
        own = defaults or {}
        given = {
            name: own[name] for name in _DEFAULTS if getattr(self, name) is None and own.get(name) is not None
        }
        try:
            filled = replace(self, **given)
        except (ArgumentError, TypeError) as error:
            raise ArgumentError(f"the model's own sampling defaults: {error}; pass the parameter") from error
        missing: dict[str, Any] = {n: v for n, v in _DEFAULTS.items() if getattr(filled, n) is None}
        if self.seed is None:
            missing["seed"] = secrets.randbits(32)  # short enough to type again
        return replace(filled, **missing)


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keywords of a call, for type checkers; tests compare the two."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    penalty_window: int | None
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    max_tokens: int | None
    logprobs: bool
    top_logprobs: int
    processors: Sequence[Processor]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_sampling(function: _Function) -> _Function:
    """Names the fields of SamplingParams in the signature of a function that takes them as **sampling, for
    `help` and for completion at a prompt. Calls are as before."""
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default={} if f.default is MISSING else f.default,
            annotation=f.type,
        )
        for f in fields(SamplingParams)
    ]
    function.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
    return function


def _number(name: str, value: object, low: float, high: float, hint: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not low <= value <= high:
        raise ArgumentError(f"{name} is {number_text(value)}, expected {low:g} to {high:g} ({hint})")
    return float(value)


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, not be a {type(bias).__name__}")
    highest = _LARGEST_INT - 1
    return {
        integer("a token id in logit_bias", token, 0, highest, "ids below the vocabulary's size"): _number(
            f"logit_bias of token {token}", value, -np.inf, 1000, "-inf forbids the token"
        )
        for token, value in bias.items()
    }


def _checked_stop(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise TypeError("stop must be a string or a sequence of strings")
    if "" in strings:
        raise ArgumentError("stop has an empty string, which every text contains: leave it out")
    return tuple(strings)


class Sampled(NamedTuple):
    """One choice. Log probabilities are the model's own: natural log of the softmax of unchanged logits."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The top_logprobs most likely (token, log probability), descending, lower ids first among equals."""


class Sampler:
    """Chooses tokens for one sequence as its parameters say. Holds no state: safe from many threads."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        """params: what is None is filled with tinyllm's defaults.

        Raises ArgumentError for a biased token that the vocabulary lacks.
        """
        self.params = params.resolve()
        self.vocab_size = vocab_size
        for token in self.params.logit_bias:
            if token >= vocab_size:
                raise ArgumentError(f"logit_bias names token {token}, expected 0 to {vocab_size - 1}")
        settings: dict[str, Any] = {name: getattr(self.params, name) for name in _DEFAULTS}
        self._window: int = settings.pop("penalty_window")
        settings["seed"] = self.params.seed
        self._settings = settings  # what backends.sample takes by these very names
        self._bias_tokens = np.array(list(self.params.logit_bias), dtype=np.int32)
        self._bias = np.array(list(self.params.logit_bias.values()), dtype=np.float32)
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        self._penalizes = self._window != 0 and any(settings[name] != _DEFAULTS[name] for name in penalties)

    @property
    def n_candidates(self) -> int | None:
        """How many of the largest logits are enough to choose as from all of them; None: all are needed."""
        params = self.params
        if params.processors or params.logit_bias or self._penalizes:
            return None
        if params.temperature == 0:
            n = 1
        elif params.top_k and params.top_k < self.vocab_size:
            n = params.top_k + 1  # one more shows the core that top_k is not all
        else:
            return None
        return min(max(n, params.top_logprobs), self.vocab_size)

    def __call__(self, logits: Logits, history: Sequence[int], position: int) -> Sampled:
        """The next token.

        logits: float32 [vocab_size], left as they are, or a row's n_candidates largest; history: the tokens
        so far, prompt included; position: the new token's, 0 or more. The random number is a function of
        (params.seed, position), nothing else.
        Raises ArgumentError for logits of another shape or dtype, for NaN or +inf among them, and where
        nothing is left to choose (all -inf).
        """
        if isinstance(logits, Candidates):
            return self._choose(logits, position)
        if logits.shape != (self.vocab_size,) or logits.dtype != np.float32:
            raise ArgumentError(
                f"logits are {logits.dtype} {list(logits.shape)}, expected float32 [{self.vocab_size}]"
            )
        logits = np.ascontiguousarray(logits)
        processed = self._process(logits, history) if self.params.processors else logits
        try:
            token, logprob = backends.sample(
                processed,
                **self._settings,
                bias_tokens=self._bias_tokens,
                bias=self._bias,
                history=self._penalized(history),
                position=position,
            )
        except ArgumentError as error:
            if processed is logits:
                raise
            names = ", ".join(map(_name, self.params.processors))
            raise ArgumentError(f"after the processors ({names}): {error}") from None
        if processed is not logits:
            logprob = backends.logprob(logits, token)
        top: list[tuple[int, float]] = []
        if self.params.top_logprobs:
            tokens, logprobs = backends.top_logprobs(logits, min(self.params.top_logprobs, self.vocab_size))
            top = list(zip(tokens.tolist(), logprobs.tolist(), strict=True))
        return Sampled(int(token), float(logprob), top)

    def _choose(self, row: Candidates, position: int) -> Sampled:
        total = float(row.totals)
        none = np.empty(0, dtype=np.int32)
        i, logprob = backends.sample(
            row.logits,
            **self._settings,
            bias_tokens=none,
            bias=self._bias,
            history=none,
            position=position,
            total=total,
        )
        top: list[tuple[int, float]] = []
        if self.params.top_logprobs:
            n = min(self.params.top_logprobs, self.vocab_size)
            found, logprobs = backends.top_logprobs(row.logits, n, total)
            top = list(zip(row.tokens[found].tolist(), logprobs.tolist(), strict=True))
        return Sampled(int(row.tokens[i]), float(logprob), top)

    def _penalized(self, history: Sequence[int]) -> npt.NDArray[np.int32]:
        if not self._penalizes:
            return np.empty(0, dtype=np.int32)
        return np.array(history if self._window < 0 else history[-self._window :], dtype=np.int32)

    def _process(self, logits: npt.NDArray[np.float32], history: Sequence[int]) -> npt.NDArray[np.float32]:
        processed: npt.NDArray[np.float32] = logits.copy()
        tokens = list(history)
        for processor in self.params.processors:
            result = processor(processed[:], tokens)  # a view, whose size, shape and type are its own
            if result is not None:
                processed = self._checked(result, f"processor {_name(processor)}")
        return processed

    def _checked(self, result: object, who: str) -> npt.NDArray[np.float32]:
        """A copy of what a processor returned."""
        try:
            array = np.asarray(result)
        except (ValueError, OverflowError) as error:  # rows of different lengths
            raise ArgumentError(f"{who} returned no array: {error}") from None
        if array.shape != (self.vocab_size,):
            shape = list(array.shape)
            raise ArgumentError(
                f"{who} returned shape {shape}, expected [{self.vocab_size}], a logit a token"
            )
        if array.dtype.kind not in "fiu":
            raise ArgumentError(f"{who} returned {array.dtype}, expected real numbers")
        with np.errstate(over="ignore"):  # what is too large becomes infinite, which is looked for later
            copy: npt.NDArray[np.float32] = np.array(array, np.float32)
        return copy


def _name(processor: Processor) -> str:
    return str(getattr(processor, "__name__", type(processor).__name__))


def stream_seed(seed: int, i: int) -> int:
    """The seed of stream i of a request: the seed itself for stream 0, else a hash (blake2b) of (seed, i).

    Derived seeds have 53 bits, so that JSON readers that use doubles keep them.
    """
    if i == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + i.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 11


class StopStrings:
    """Finds stop strings in text that comes in pieces, and passes on what cannot belong to one.

    A stop string may hold the text of special tokens. Those in the output that are hidden come framed (see
    chat's `hidden`), each within one piece: they match their own text, as a whole, and nothing else; they are
    not passed on.

    The match that is complete first wins, of those that end together the longest; so the result does not
    depend on where the pieces are cut. `found` is the stop string, or None so far.
    """

    def __init__(self, stop: str | Sequence[str]) -> None:
        self._stop = _checked_stop(stop)
        self._held = ""
        # What has begun: a stop string, how much of it is there, and where in `_held` it begins.
        self._begun: list[tuple[str, int, int]] = []
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """The text that is now certain to come before any stop string. After a match: nothing."""
        if self.found is not None:
            return ""
        text, at = self._held + piece, len(self._held)
        while self._stop and at < len(text):
            end = text.index(HIDDEN_TO, at) + 1 if text[at] == HIDDEN_FROM else at + 1
            part = text[at:end].strip(HIDDEN_FROM + HIDDEN_TO)
            begun = [*self._begun, *((stop, 0, at) for stop in self._stop)]
            self._begun = [
                (stop, n + len(part), start) for stop, n, start in begun if part and stop.startswith(part, n)
            ]
            done = [(start, stop) for stop, n, start in self._begun if n == len(stop)]
            if done:
                start, self.found = min(done)
                self._held, self._begun = "", []
                return shown(text[:start])
            at = end
        safe = min((start for _, _, start in self._begun), default=len(text))
        self._held = text[safe:]
        self._begun = [(stop, n, start - safe) for stop, n, start in self._begun]
        return shown(text[:safe])

    def flush(self) -> str:
        """The text ends here: what was held back and turned out to be no stop string."""
        held, self._held = shown(self._held), ""
        return held
