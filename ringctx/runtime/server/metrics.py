"""Metrics: what Prometheus reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ringctx.runtime.server.desk import Desk, Done


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, desk: Desk, documents: Mapping[str, Mapping[str, Any]]) -> None:
        self.registry = registry = CollectorRegistry()
        self._replies = Counter("ringctx_replies", "Replies by route and status.", ["route", "status"], registry=registry)
        self._tokens = Counter("ringctx_tokens", "Tokens of answered prompts and of answers.", ["kind"], registry=registry)
        self._seconds = Histogram("ringctx_job_seconds", "From a job's arrival to its end.", registry=registry)
        for name, says, value in (
            ("waiting", "Jobs that wait for the ring.", lambda: desk.num_waiting),
            ("working", "1 while the ring works on a job.", lambda: int(desk.is_working)),
            ("documents", "Documents that were read.", lambda: len(documents)),
            ("document_tokens", "Their tokens.", lambda: sum(one["tokens"] for one in list(documents.values()))),
        ):
            Gauge(f"ringctx_{name}", says, registry=registry).set_function(value)

    def replied(self, route: str, status: int) -> None:
        """A reply was sent; of a stream, begun."""
        self._replies.labels(route, str(status)).inc()

    def answered(self, done: Done, seconds: float) -> None:
        """A job was done for a client who waited so long."""
        self._seconds.observe(seconds)
        if done.answer is not None:
            self._tokens.labels("prompt").inc(done.answer.prompt_tokens)
            self._tokens.labels("cached").inc(done.num_cached)
            self._tokens.labels("completion").inc(len(done.answer.tokens))

    def text(self) -> bytes:
        """All of it in Prometheus' text form."""
        return generate_latest(self.registry)
