"""What a server has seen of its requests' routing, for Prometheus, in vLLM's own `/metrics`.

Histograms and counters only, which add up over API server processes (`--api-server-count`), as
vLLM's own do.
"""

from functools import cache

from moesteer.monitoring.reference import Verdict

DRIFT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Borders of the histogram's buckets, in nats a layer."""
LINKED = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


class PrometheusMetrics:
    """A process has them once."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram

        self._drift = Histogram(
            "moesteer_routing_drift",
            "KL of a prompt's expert use from the reference's, in nats a layer.",
            buckets=DRIFT,
        )
        self._linked = Histogram(
            "moesteer_linked_share",
            "Share of the linked experts that was active on a prompt's tokens.",
            buckets=LINKED,
        )
        self._alarms = Counter(
            "moesteer_watch_alarms", "Requests whose routing was far from the reference's."
        )
        self._unknown = Counter(
            "moesteer_watch_unknown", "Requests whose routing could not be counted whole."
        )

    def add(self, verdict: Verdict) -> None:
        if verdict.drift is not None:
            self._drift.observe(verdict.drift)
        if verdict.linked is not None:
            self._linked.observe(verdict.linked)
        self._alarms.inc(verdict.word == "alarm")
        self._unknown.inc(verdict.word == "unknown")


@cache
def metrics() -> PrometheusMetrics:
    """Those of this process: Prometheus takes each name once."""
    return PrometheusMetrics()
