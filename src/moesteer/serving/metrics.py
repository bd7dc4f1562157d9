"""What a server has seen of its requests' routing, for Prometheus, in vLLM's own `/metrics`.

What ran under a profile is counted apart: the reference's rate of alarms is of what did not.
Histograms and counters only, which add up over API server processes (`--api-server-count`), as
vLLM's own do.
"""

from functools import cache

from moesteer.monitoring.reference import Verdict

DRIFT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Borders of the histogram's buckets, in nats a layer."""
LINKED = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)

LABELS = ("steered",)
"""`true` of a request that ran under a profile, else `false`; behind a shut gate it ran without."""


class PrometheusMetrics:
    """A process has them once."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram

        self._drift = Histogram(
            "moesteer_routing_drift",
            "KL of a prompt's expert use from the reference's, in nats a layer.",
            LABELS,
            buckets=DRIFT,
        )
        self._linked = Histogram(
            "moesteer_linked_share",
            "Share of the linked experts that was active on a prompt's tokens.",
            LABELS,
            buckets=LINKED,
        )
        self._alarms = Counter(
            "moesteer_watch_alarms", "Requests whose routing was far from the reference's.", LABELS
        )
        self._unknown = Counter(
            "moesteer_watch_unknown", "Requests whose routing could not be counted whole.", LABELS
        )
        for metric in (self._drift, self._linked, self._alarms, self._unknown):
            for steered in ("false", "true"):
                metric.labels(steered)  # there from the beginning, at 0

    def add(self, verdict: Verdict, steered: bool) -> None:
        label = str(steered).lower()
        if verdict.drift is not None:
            self._drift.labels(label).observe(verdict.drift)
        if verdict.linked is not None:
            self._linked.labels(label).observe(verdict.linked)
        self._alarms.labels(label).inc(verdict.word == "alarm")
        self._unknown.labels(label).inc(verdict.word == "unknown")


@cache
def metrics() -> PrometheusMetrics:
    """Those of this process: Prometheus takes each name once."""
    return PrometheusMetrics()
