"""What the gateway counts, in Prometheus' text format.

Everything is counted in plain dictionaries by the one thread there is, and turned into Prometheus' families
when it is scraped: a request counts five things, and prometheus-client's own counters take a lock for each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from broadbeam_router.fleet import Fleet

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
PREFIX = "broadbeam_gateway_"


class Live(Protocol):
    """What is read at the moment of a scrape, and so costs a request nothing."""

    in_flight: int
    fleet: Fleet


class Times:
    """A histogram of seconds."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and cumulative counts, as Prometheus writes them."""
        bounds = [*map(str, SECONDS), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))


class Metrics:
    def __init__(self) -> None:
        self.requests: defaultdict[tuple[str, int], int] = defaultdict(int)  # (route, status)
        self.legs: defaultdict[tuple[str, str], int] = defaultdict(int)  # (leg, outcome)
        self.paths: defaultdict[str, int] = defaultdict(int)
        self.ejections: defaultdict[str, int] = defaultdict(int)  # by reason
        self.broken_streams = 0
        self.durations: defaultdict[str, Times] = defaultdict(Times)  # by route
        self.first_tokens: defaultdict[str, Times] = defaultdict(Times)
        self._live: Live | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def watch(self, live: Live) -> None:
        self._live = live

    def answered(self, route: str, status: int, duration_s: float) -> None:
        self.requests[route, status] += 1
        self.durations[route].add(duration_s)

    def ejected(self, reason: str) -> None:
        self.ejections[reason] += 1

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing to check for duplicates before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        requests = _counter("requests", "Requests answered; 499: the client left first.", "route", "status")
        for (route, status), count in self.requests.items():
            requests.add_metric([route, str(status)], count)
        yield requests
        legs = _counter("legs", "Legs by outcome: ok, failed, refused (4xx), fallback.", "leg", "outcome")
        for (leg, outcome), count in self.legs.items():
            legs.add_metric([leg, outcome], count)
        yield legs
        paths = _counter("paths", "Answers by way: disaggregated, decode-only, fallback.", "path")
        for path in ("disaggregated", "decode-only", "fallback"):
            paths.add_metric([path], self.paths[path])
        yield paths
        ejections = _counter("ejections", "Times an endpoint was left out for failing.", "reason")
        for reason, count in self.ejections.items():
            ejections.add_metric([reason], count)
        yield ejections
        broken = _counter("broken_streams", "Streams an engine ended early.")
        broken.add_metric([], self.broken_streams)
        yield broken
        yield _histogram(
            "request_duration_seconds", "From the whole request to the whole answer.", self.durations
        )
        yield _histogram(
            "time_to_first_token_seconds", "From the whole request to the first event.", self.first_tokens
        )
        if self._live is not None:
            yield from _gauges(self._live)


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=labels)


def _histogram(name: str, text: str, routes: dict[str, Times]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(PREFIX + name, text, labels=["route"])
    for route, times in routes.items():
        family.add_metric([route], times.buckets(), times.sum_s)
    return family


def _gauges(live: Live) -> Iterator[Metric]:
    requests = GaugeMetricFamily(PREFIX + "in_flight_requests", "Requests admitted and not yet answered.")
    requests.add_metric([], live.in_flight)
    yield requests
    ready = GaugeMetricFamily(PREFIX + "endpoints_ready", "Ready endpoints by role.", labels=["role"])
    ready.add_metric(["prefill"], len(live.fleet.prefill))
    for role in ("decode", "both"):
        ready.add_metric([role], sum(m.endpoint.role == role for m in live.fleet.decode))
    yield ready
    loads = GaugeMetricFamily(
        PREFIX + "endpoint_in_flight", "Requests in flight on an endpoint.", labels=["endpoint", "leg"]
    )
    for member in live.fleet.members():
        loads.add_metric([member.name, "prefill"], member.prefill_in_flight)
        loads.add_metric([member.name, "decode"], member.decode_in_flight)
    yield loads
