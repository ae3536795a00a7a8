"""What the operator tells Prometheus of itself: passes with their time and outcome, clusters, writes."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from broadbeam_operator.status import State

Outcome = Literal["done", "failed", "gone"]
# A pass that finds nothing to do takes some 20 ms, one that makes a cluster 200 ms.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PREFIX = "broadbeam_operator"


class Metrics:
    """What is counted as it happens; `registry` may hold collectors beside it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._passes = Counter(
            f"{PREFIX}_reconciles",
            "Passes over a ServingCluster. done; failed: to be tried again; gone: there is none any more.",
            ["outcome"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            f"{PREFIX}_reconcile_duration_seconds",
            "Time of a pass, whatever its outcome.",
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        for outcome in get_args(Outcome):
            self._passes.labels(outcome)  # so that each begins at 0

    def passed(self, outcome: Outcome, seconds: float) -> None:
        self._passes.labels(outcome).inc()
        self._seconds.observe(seconds)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A collector of what is asked for at each scrape instead of being counted."""

    states: Callable[[], Iterable[str]]  # one for each ServingCluster
    waiting: Callable[[], int]
    writes: Callable[[], int]

    def collect(self) -> Iterable[Metric]:
        clusters = GaugeMetricFamily(
            f"{PREFIX}_servingclusters",
            "ServingClusters by the word that kubectl get shows as their status.",
            labels=["state"],
        )
        counts = Tally(self.states())
        for state in get_args(State):
            clusters.add_metric([state], counts[state])
        yield clusters
        yield GaugeMetricFamily(
            f"{PREFIX}_waiting", "ServingClusters of which an event has come and no pass yet.", self.waiting()
        )
        yield CounterMetricFamily(
            f"{PREFIX}_api_writes", "Requests to the API server that could change something.", self.writes()
        )


@asynccontextmanager
async def served(registry: CollectorRegistry, port: int) -> AsyncIterator[int]:
    """GET /metrics on all addresses for the length of the body; the port. OSError if it is taken."""

    async def page(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", page)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "0.0.0.0", port).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
