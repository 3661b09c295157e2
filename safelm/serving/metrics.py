"""Metrics for Prometheus: requests, tokens, times, P(tag), the engines' load, the process's memory and files."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_PROBABILITIES = (1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9, 1.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """A registry per server, so that several servers can live in one process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("safelm_requests", "Requests answered", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "safelm_request_seconds",
            "From a request to the end of its reply",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "safelm_first_token_seconds",
            "From a request to its first text",
            ["model", "method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter("safelm_prompt_tokens", "Tokens read", ["model"], registry=registry)
        self.new_tokens = Counter("safelm_new_tokens", "Tokens generated", ["model", "method"], registry=registry)
        self.ended = Counter(
            "safelm_generations",
            "Generations by what ended them",
            ["model", "method", "stopped_by"],
            registry=registry,
        )
        self.max_tag_prob = Histogram(
            "safelm_max_tag_probability",
            "Highest P(tag) in a generation",
            ["model", "method"],
            buckets=_PROBABILITIES,
            registry=registry,
        )
        self._open = Gauge("safelm_open_requests", "Requests being answered", registry=registry)
        self._load = {
            name: Gauge(f"safelm_engine_{name}", help_text, ["model"], registry=registry)
            for name, help_text in (
                ("waiting", "Requests waiting for a slot"),
                ("active", "Requests being decoded"),
                ("tokens_reserved", "Cache positions promised to requests"),
                ("prefix_asked", "Prompts that looked for a kept beginning since the start"),
                ("prefix_found", "Prompts that found one"),
                ("prefix_tokens", "Tokens of prompts that were not read again"),
                ("prefix_kept", "Cache positions kept for prompts that begin as earlier ones"),
            )
        }
        ProcessCollector(registry=registry)

    def expose(self, *, num_open: int, load: Mapping[str, Mapping[str, int]]) -> bytes:
        """The metrics in Prometheus's text format.

        Args:
          num_open: requests being answered.
          load: "waiting", "active", "tokens_reserved" and "prefix_*", each by model.
        """
        self._open.set(num_open)
        for name, by_model in load.items():
            for model, value in by_model.items():
                self._load[name].labels(model).set(value)
        return generate_latest(self._registry)
