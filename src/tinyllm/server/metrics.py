"""GET /metrics: what the server does, in the format of Prometheus.

Invariant: no label holds what a client wrote: routes are those of the dialects, models those of the command
line. Names are llama-server's where they mean the same ("llamacpp:..."), else ours. Counters are told of
things when they happen; whatever can be looked up (places, pages, models) is looked up when it is asked for.
Imports turns.py, models.py and prometheus_client, with a registry of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyllm import Completion
from tinyllm.server.models import Models
from tinyllm.server.turns import Turns

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ROUTE = "tinyllm.route"  # in a scope: (dialect, path as the dialect writes it)
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
EACH_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class Metrics:
    """Of one server."""

    def __init__(self, turns: Turns, models: Models) -> None:
        self.open_requests = 0  # whose response is not all sent
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "tinyllm_requests",
            "Requests that were answered.",
            ("dialect", "route", "status"),
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "llamacpp:prompt_tokens",
            "Tokens of prompts, those known from earlier ones too.",
            registry=registry,
        )
        self._prompt_s = Counter(
            "llamacpp:prompt_seconds", "Seconds until the first token.", registry=registry
        )
        self._tokens = Counter("llamacpp:tokens_predicted", "Tokens that were generated.", registry=registry)
        self._generate_s = Counter(
            "llamacpp:tokens_predicted_seconds",
            "Seconds after the first token, of all texts.",
            registry=registry,
        )
        self._drafted = Counter(
            "tinyllm_drafted_tokens", "Guessed tokens that were computed.", registry=registry
        )
        self._accepted = Counter(
            "tinyllm_accepted_tokens", "Guessed tokens that were right.", registry=registry
        )
        self._saved_s = Counter(
            "tinyllm_speculation_saved_seconds",
            "Seconds by which texts came sooner for guesses, by the measured times of calls.",
            registry=registry,
        )
        self._first_token_s = Histogram(
            "tinyllm_time_to_first_token_seconds",
            "From the request to its first token, its wait for a place and its model in it.",
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self._each_token_s = Histogram(
            "tinyllm_time_per_output_token_seconds",
            "From a token to the next, as the mean of each text.",
            buckets=EACH_TOKEN_S,
            registry=registry,
        )
        self._totals = [0.0, 0.0, 0.0, 0.0]  # tokens and seconds of prompts, and of what was generated
        registry.register(_Now(turns, models, self._totals))

    def answered(self, dialect: str, route: str, status: int) -> None:
        """A response began."""
        self._requests.labels(dialect, route, str(status)).inc()

    def ended(self, waited_s: float, completions: Iterable[Completion]) -> None:
        """The texts of a request are over, however they ended. waited_s: before their prompt was begun."""
        for i, completion in enumerate(completions):
            timings, n = completion.timings, len(completion.tokens)
            if n == 0 and completion.finish_reason == "cancelled":
                continue
            prompt = (timings.prompt_tokens, timings.prompt_s) if i == 0 else (0, 0.0)  # which they share
            self._prompt_tokens.inc(prompt[0])
            self._prompt_s.inc(prompt[1])
            self._tokens.inc(n)
            self._generate_s.inc(timings.generate_s)
            self._drafted.inc(timings.drafted_tokens)
            self._accepted.inc(timings.accepted_tokens)
            self._saved_s.inc(max(0.0, timings.gain - 1) * timings.generate_s)
            for k, value in enumerate((*prompt, n, timings.generate_s)):
                self._totals[k] += value
            if i == 0:
                self._first_token_s.observe(waited_s + timings.prompt_s)
            if n > 1:
                self._each_token_s.observe(timings.generate_s / (n - 1))

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


class _Now(Collector):
    """What can be looked up."""

    def __init__(self, turns: Turns, models: Models, totals: list[float]) -> None:
        self._turns, self._models, self._totals = turns, models, totals

    def collect(self) -> Iterator[Metric]:
        prompt, prompt_s, tokens, tokens_s = self._totals
        for name, text, value in (
            ("llamacpp:requests_processing", "Texts that are computed.", self._turns.running),
            ("llamacpp:requests_deferred", "Requests that wait for a place.", self._turns.waiting),
            (
                "llamacpp:prompt_tokens_seconds",
                "Tokens of prompts a second, on average.",
                _rate(prompt, prompt_s),
            ),
            (
                "llamacpp:predicted_tokens_seconds",
                "Tokens a second of a text, on average.",
                _rate(tokens, tokens_s),
            ),
            ("tinyllm_places", "Texts that are computed at once, at most.", self._turns.parallel),
        ):
            yield GaugeMetricFamily(name, text, value)
        loaded = [(s, s.llm) for s in self._models.served.values() if s.llm is not None]
        yield GaugeMetricFamily("tinyllm_models", "Models that may be asked for.", len(self._models.served))
        yield GaugeMetricFamily("tinyllm_models_loaded", "Models that are loaded.", len(loaded))
        held = GaugeMetricFamily("tinyllm_model_bytes", "Weights and pages of a model.", labels=["model"])
        pages = GaugeMetricFamily(
            "tinyllm_cache_pages",
            "Pages of the cache: used by texts, allocated, and the most that may be.",
            labels=["model", "state"],
        )
        for served, llm in loaded:
            held.add_metric([served.name], served.n_bytes)
            now = llm.cache_pages
            for state, n in (("used", now.used), ("allocated", now.allocated), ("most", now.most)):
                pages.add_metric([served.name, state], n)
        yield held
        yield pages


def _rate(n: float, seconds: float) -> float:
    return n / seconds if seconds > 0 else 0.0


class Counted:
    """The middleware that counts responses, those of the guard, too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                dialect, route = scope.get(ROUTE, ("", "other"))
                self._metrics.answered(dialect, route, message["status"])
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._metrics.open_requests += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            self._metrics.open_requests -= 1
