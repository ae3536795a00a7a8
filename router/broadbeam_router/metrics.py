"""What the gateway counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from broadbeam_router.fleet import Fleet

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
PREFIX = "broadbeam_gateway_"


class Live(Protocol):
    """What is read at the moment of a scrape, and so costs a request nothing."""

    in_flight: int
    fleet: Fleet


class _LiveCollector:
    def __init__(self, live: Live) -> None:
        self._live = live

    def collect(self) -> Iterator[Metric]:
        fleet = self._live.fleet
        requests = GaugeMetricFamily(PREFIX + "in_flight_requests", "Requests admitted and not yet answered.")
        requests.add_metric([], self._live.in_flight)
        yield requests
        ready = GaugeMetricFamily(PREFIX + "endpoints_ready", "Ready endpoints by role.", labels=["role"])
        ready.add_metric(["prefill"], len(fleet.prefill))
        for role in ("decode", "both"):
            ready.add_metric([role], sum(m.endpoint.role == role for m in fleet.decode))
        yield ready
        loads = GaugeMetricFamily(
            PREFIX + "endpoint_in_flight", "Requests in flight on an endpoint.", labels=["endpoint", "leg"]
        )
        for member in fleet.members():
            loads.add_metric([member.name, "prefill"], member.prefill_in_flight)
            loads.add_metric([member.name, "decode"], member.decode_in_flight)
        yield loads


class Metrics:
    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._requests = Counter(
            PREFIX + "requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self._legs = Counter(
            PREFIX + "legs",
            "Legs by outcome: ok, failed (another was tried if any was left), refused (4xx), fallback.",
            ["leg", "outcome"],
            registry=self.registry,
        )
        self._paths = Counter(
            PREFIX + "paths",
            "Answers by way: disaggregated, decode-only, fallback (no prefill could be had).",
            ["path"],
            registry=self.registry,
        )
        self._ejections = Counter(
            PREFIX + "ejections",
            "Times an endpoint was left out for failing.",
            ["reason"],
            registry=self.registry,
        )
        self._broken = Counter(
            PREFIX + "broken_streams", "Streams an engine ended early.", registry=self.registry
        )
        self._duration = Histogram(
            PREFIX + "request_duration_seconds",
            "From the request's last byte in to the answer's last byte out.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._first = Histogram(
            PREFIX + "time_to_first_token_seconds",
            "From the request's last byte in to the first streamed bytes out.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        # labels() costs more than the increment itself; the few children are kept.
        self._request_children: dict[tuple[str, int], Counter] = {}
        self._leg_children: dict[tuple[str, str], Counter] = {}
        self._path_children = {
            path: self._paths.labels(path) for path in ("disaggregated", "decode-only", "fallback")
        }
        self._duration_children: dict[str, Histogram] = {}
        self._first_children: dict[str, Histogram] = {}

    def watch(self, live: Live) -> None:
        self.registry.register(_LiveCollector(live))

    def answered(self, route: str, status: int, duration_s: float) -> None:
        child = self._request_children.get((route, status))
        if child is None:
            child = self._request_children[route, status] = self._requests.labels(route, str(status))
            self._duration_children.setdefault(route, self._duration.labels(route))
        child.inc()
        self._duration_children[route].observe(duration_s)

    def first_token(self, route: str, elapsed_s: float) -> None:
        child = self._first_children.get(route)
        if child is None:
            child = self._first_children[route] = self._first.labels(route)
        child.observe(elapsed_s)

    def leg(self, leg: str, outcome: str) -> None:
        child = self._leg_children.get((leg, outcome))
        if child is None:
            child = self._leg_children[leg, outcome] = self._legs.labels(leg, outcome)
        child.inc()

    def path(self, path: str) -> None:
        self._path_children[path].inc()

    def ejected(self, reason: str) -> None:
        self._ejections.labels(reason).inc()

    def broken_stream(self) -> None:
        self._broken.inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)
