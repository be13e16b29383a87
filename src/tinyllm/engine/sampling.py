"""How the next token is chosen: parameters and their defaults, one sampler a sequence, seeds, stop strings.

The arithmetic is csrc/sample.c and repetition.c, reached through `backends`; docs/sampling.md describes every
step to users. Imports config (ranges of what files may advise), errors, backends and how chat frames tokens.
Read engine.py next: it calls a `Sampler` for each row of logits.
"""

from __future__ import annotations

import hashlib
import inspect
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from tinyllm import backends
from tinyllm.chat.reasoning import HIDDEN_FROM, HIDDEN_TO, shown
from tinyllm.config import ADVISED_COUNTS, ADVISED_RANGES
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
    **ADVISED_RANGES,
    "presence_penalty": (-1000, 1000, "0 turns it off"),
    "frequency_penalty": (-1000, 1000, "0 turns it off"),
    "dry_multiplier": (0, 1000, "0 turns it off"),
    "dry_base": (1, 1000, "dry_multiplier=0 turns it off"),
}
_INTS: dict[str, tuple[float, float, str]] = {
    **{name: bounds for name, bounds in ADVISED_COUNTS.items() if not name.endswith("_length")},
    "dry_allowed_length": (0, _LARGEST_INT, "in tokens"),
    "dry_penalty_last_n": (-1, _LARGEST_INT, "-1 is the whole text"),
    "seed": (0, 2**64 - 1, "None draws one"),
    "top_logprobs": (0, _LARGEST_INT, "0 turns it off"),
}
_DEFAULTS: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "penalty_window": 64,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "no_repeat_ngram_size": 0,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": 64,
    "dry_sequence_breakers": ("\n", ":", '"', "*"),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "bad_words_ids": (),
    "stop": (),
}
_LENGTHS = ("min_tokens", "max_tokens")  # None where nobody says one


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
    min_tokens: how many tokens come before the first that may end the text; stop strings end it even so.
    suppress_tokens: ids that never come; begin_suppress_tokens: ids that do not come first.
    bad_words_ids: lists of ids, the last of which does not come after the others.
    no_repeat_ngram_size: so many tokens in a row come once only, the prompt's included; 0 for any number.
    dry_multiplier, dry_base, dry_allowed_length: a token that would make a repetition of n tokens longer
        loses dry_multiplier * dry_base^(n - dry_allowed_length), where n is at least the allowed length.
    dry_penalty_last_n: how many of the last tokens are searched for it; -1 for all.
    dry_sequence_breakers: a string, or several, over which no repetition goes.
    json_schema, regex, choices, grammar: the form that the text has to have, one of them at most
        (docs/structured.md). json_schema: a dict, JSON text, True for any object, or a pydantic model's
        class; choices: strings; grammar: Lark or GBNF.
    xtc_probability: how often the likeliest tokens go, all that have at least the probability xtc_threshold
        but the least likely of them.
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
    stop: str | Sequence[str] | None = None
    max_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    processors: Sequence[Processor] = ()
    min_tokens: int | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    no_repeat_ngram_size: int | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: str | Sequence[str] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    json_schema: Any = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    grammar: str | None = None

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
        for name in ("stop", "dry_sequence_breakers"):
            if getattr(self, name) is not None:
                keep(name, _checked_strings(name, getattr(self, name)))
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            if getattr(self, name) is not None:
                keep(name, _checked_ids(name, getattr(self, name)))
        if self.bad_words_ids is not None:
            keep("bad_words_ids", _checked_words(self.bad_words_ids))
        keep("processors", tuple(self.processors))
        for processor in self.processors:
            if not callable(processor):
                raise TypeError(f"processors must be callables, not {type(processor).__name__}")

    @property
    def has_form(self) -> bool:
        """Whether the text has to have a form."""
        asked = (self.json_schema, self.regex, self.choices, self.grammar)
        return any(value is not None and value is not False for value in asked)

    def resolve(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """The same with every None filled: from `defaults`, then tinyllm's own; a random seed. min_tokens and
        max_tokens stay None where neither says one.

        defaults: the model's own, by this class's field names (`vars()` of config.GenerationDefaults); other
        names and None are passed over. Raises ArgumentError where one of them is out of range.
        """
        own = defaults or {}
        names = (*_DEFAULTS, *_LENGTHS)
        given = {n: own[n] for n in names if getattr(self, n) is None and own.get(n) is not None}
        try:
            filled = replace(self, **given) if given else self
        except (ArgumentError, TypeError) as error:
            raise ArgumentError(f"the model's own sampling defaults: {error}; pass the parameter") from error
        missing: dict[str, Any] = {n: v for n, v in _DEFAULTS.items() if getattr(filled, n) is None}
        if self.seed is None:
            missing["seed"] = secrets.randbits(32)  # short enough to type again
        return replace(filled, **missing) if missing else filled


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
    stop: str | Sequence[str] | None
    max_tokens: int | None
    logprobs: bool
    top_logprobs: int
    processors: Sequence[Processor]
    min_tokens: int | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    bad_words_ids: Sequence[Sequence[int]] | None
    no_repeat_ngram_size: int | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: str | Sequence[str] | None
    xtc_probability: float | None
    xtc_threshold: float | None
    json_schema: Any
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None


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
    return {
        _checked_id("logit_bias", token): _number(
            f"logit_bias of token {token}", value, -np.inf, 1000, "-inf forbids the token"
        )
        for token, value in bias.items()
    }


def _checked_id(name: str, token: object) -> int:
    return integer(f"a token id in {name}", token, 0, _LARGEST_INT - 1, "ids below the vocabulary's size")


def _checked_ids(name: str, ids: object) -> tuple[int, ...]:
    if not isinstance(ids, (Sequence, np.ndarray)) or isinstance(ids, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of token ids, not {type(ids).__name__}")
    return tuple(_checked_id(name, token) for token in ids)


def _checked_words(words: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(words, (Sequence, np.ndarray)) or isinstance(words, (str, bytes)):
        raise TypeError(f"bad_words_ids must be sequences of token ids, not {type(words).__name__}")
    checked = tuple(_checked_ids("bad_words_ids", word) for word in words)
    if () in checked:
        raise ArgumentError("bad_words_ids has an empty sequence, which every text contains: leave it out")
    return checked


def _checked_strings(name: str, given: object) -> tuple[str, ...]:
    strings = (given,) if isinstance(given, str) else given
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise TypeError(f"{name} must be a string or a sequence of strings")
    if "" in strings:
        raise ArgumentError(f"{name} has an empty string, which every text contains: leave it out")
    return tuple(strings)


class Sampled(NamedTuple):
    """One choice. Log probabilities are the model's own: natural log of the softmax of unchanged logits."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The top_logprobs most likely (token, log probability), descending, lower ids first among equals."""


_CORE = (  # the parameters that the core takes by these very names
    "temperature", "top_k", "top_p", "min_p", "typical_p", "xtc_probability", "xtc_threshold",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "penalty_window", "no_repeat_ngram_size",
    "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "seed",
)  # fmt: skip
_NOTHING = np.empty(0, dtype=np.int32)


class Sampler:
    """Chooses tokens for one sequence as its parameters say. Holds no state: safe from many threads."""

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        *,
        start: int = 0,
        eos_ids: Collection[int] = (),
        min_length: int = 0,
        breakers: Sequence[Sequence[int]] = (),
    ) -> None:
        """params: what is None is filled with tinyllm's defaults. start: the first position to choose for.
        eos_ids: what ends a text, and min_tokens forbids for a while. min_length: the first position at which
        it is allowed where there is no min_tokens. breakers: `breaker_ids` of the parameters, for DRY.

        Raises ArgumentError for a token among the parameters that the vocabulary lacks.
        """
        self.params = params.resolve()
        self.vocab_size = vocab_size
        p, bias = self.params, self.params.logit_bias
        words = p.bad_words_ids or ()
        named: dict[str, Iterable[int]] = {
            "logit_bias": bias,
            "suppress_tokens": p.suppress_tokens or (),
            "begin_suppress_tokens": p.begin_suppress_tokens or (),
            "bad_words_ids": [token for word in words for token in word],
        }
        for name, tokens in named.items():
            for token in tokens:
                if token >= vocab_size:
                    raise ArgumentError(f"{name} names token {token}, expected 0 to {vocab_size - 1}")
        longer = [list(word) for word in words if len(word) > 1]
        self._core = backends.Sampling(
            **{name: getattr(p, name) for name in _CORE},
            bias_tokens=list(bias),
            bias=list(bias.values()),
            bad_words=longer,
            breakers=breakers,
        )
        self._start = start
        self._may_end = min_length if p.min_tokens is None else start + p.min_tokens
        always = {*(p.suppress_tokens or ()), *(word[0] for word in words if len(word) == 1)}
        ends = {token for token in eos_ids if token < vocab_size} if self._may_end > start else set()
        first = set(p.begin_suppress_tokens or ())
        # By whether a token is the first, and whether it may end the text; None: nothing is banned.
        self._banned: dict[tuple[bool, bool], npt.NDArray[np.int32]] | None = None
        if always or ends or first:
            self._banned = {
                (is_first, may_end): np.array(
                    sorted(always | (first if is_first else set()) | (set() if may_end else ends)), np.int32
                )
                for is_first in (True, False)
                for may_end in (True, False)
            }
        self._n_banned = len(always | ends | first)
        self._reach = self._reaches(longer)

    def _reaches(self, words: list[list[int]]) -> int:
        """How many of the last tokens the steps look at; -1: all of them."""
        p = self.params
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        reaches = [len(word) - 1 for word in words]
        if any(getattr(p, name) != _DEFAULTS[name] for name in penalties):
            reaches.append(p.penalty_window or 0)
        if p.dry_multiplier:
            reaches.append(p.dry_penalty_last_n or 0)
        if p.no_repeat_ngram_size:
            reaches.append(-1)
        return -1 if -1 in reaches else max(reaches, default=0)

    @property
    def is_of_core(self) -> bool:
        """Whether the core alone makes a choice, no Python code."""
        return not self.params.processors

    @property
    def n_candidates(self) -> int | None:
        """How many of the largest logits are enough to choose as from all of them; None: all are needed."""
        params = self.params
        if params.processors or params.logit_bias or self._reach:
            return None
        if params.temperature == 0:
            n = 1
        elif params.top_k and params.top_k < self.vocab_size:
            n = params.top_k + 1  # one more shows the core that top_k is not all
        else:
            return None
        return min(max(n + self._n_banned, params.top_logprobs), self.vocab_size)

    def __call__(
        self,
        logits: Logits,
        history: Sequence[int],
        position: int,
        allowed: npt.NDArray[np.uint32] | None = None,
    ) -> Sampled:
        """The next token.

        logits: float32 [vocab_size], left as they are, or a row's n_candidates largest; history: the tokens
        so far, prompt included; position: the new token's, 0 or more. The random numbers are a function of
        (params.seed, position), nothing else. allowed: a bit a token, the lowest first, [vocab_size / 32,
        rounded up]: those that may come; None: all may. Candidates are the largest of those already.
        Raises ArgumentError for logits of another shape or dtype, for NaN or +inf among them, and where
        nothing is left to choose (all -inf).
        """
        if isinstance(logits, Candidates):
            return self._choose(logits, position, self._banned_at(position))
        core, row, seen, position, banned, allowed = self.row(logits, history, position, allowed)
        processed = self._process(row, history) if self.params.processors else row
        try:
            token, logprob = core.sample(processed, seen, position, banned, None, allowed)
        except ArgumentError as error:
            if processed is row:
                raise
            names = ", ".join(map(_name, self.params.processors))
            raise ArgumentError(f"after the processors ({names}): {error}") from None
        if processed is not row:
            logprob = backends.logprob(row, token)
        return self.sampled(row, token, logprob)

    def row(
        self,
        logits: npt.NDArray[np.float32],
        history: Sequence[int],
        position: int,
        allowed: npt.NDArray[np.uint32] | None,
    ) -> tuple[Any, ...]:
        """What the core takes for a choice, as `backends.sample_rows` wants it; arguments and errors as of a
        call."""
        if logits.shape != (self.vocab_size,) or logits.dtype != np.float32:
            raise ArgumentError(
                f"logits are {logits.dtype} {list(logits.shape)}, expected float32 [{self.vocab_size}]"
            )
        seen = _NOTHING
        if self._reach:
            seen = np.array(history if self._reach < 0 else history[-self._reach :], dtype=np.int32)
        logits = np.ascontiguousarray(logits)
        return self._core, logits, seen, position, self._banned_at(position), allowed

    def sampled(self, logits: npt.NDArray[np.float32], token: int, logprob: float) -> Sampled:
        """A choice of the core with what was asked for beside it."""
        return Sampled(int(token), float(logprob), self._top(logits))

    def _banned_at(self, position: int) -> npt.NDArray[np.int32]:
        if self._banned is None:
            return _NOTHING
        return self._banned[position == self._start, position >= self._may_end]

    def taken(self, logits: Logits, token: int) -> Sampled:
        """What a choice of this token tells; for one that nobody chose. logits: float32 [vocab_size], or
        candidates where this token alone may come."""
        if isinstance(logits, Candidates):
            assert logits.tokens[0] == token
            return Sampled(token, float(backends.top_logprobs(logits.logits, 1, logits.total)[1][0]), [])
        return Sampled(token, float(backends.logprob(logits, token)), self._top(logits))

    def _top(self, logits: npt.NDArray[np.float32]) -> list[tuple[int, float]]:
        if not self.params.top_logprobs:
            return []
        tokens, logprobs = backends.top_logprobs(logits, min(self.params.top_logprobs, self.vocab_size))
        return list(zip(tokens.tolist(), logprobs.tolist(), strict=True))

    def _choose(self, row: Candidates, position: int, banned: npt.NDArray[np.int32]) -> Sampled:
        if len(banned):
            banned = np.flatnonzero(np.isin(row.tokens, banned)).astype(np.int32)
        i, logprob = self._core.sample(row.logits, _NOTHING, position, banned, row.total)
        top: list[tuple[int, float]] = []
        if self.params.top_logprobs:
            n = min(self.params.top_logprobs, self.vocab_size)
            found, logprobs = backends.top_logprobs(row.logits, n, row.total)
            top = list(zip(row.tokens[found].tolist(), logprobs.tolist(), strict=True))
        return Sampled(int(row.tokens[i]), float(logprob), top)

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
        self._stop = _checked_strings("stop", stop)
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
        held, self._held, self._begun = shown(self._held), "", []
        return held
