"""Prometheus metrics of one rank under vLLM's names, and the supervisor's page of all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from broadbeam_runtime.core import EngineStats, FinishReason, Output
from broadbeam_runtime.distribution import Distribution

LABELS = ("engine", "model_name")
_LATENCY = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_LONG = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_COUNTS = tuple(float(2**power) for power in range(18))

# Name, help, field of EngineStats. Counters get their `_total` from the client.
_GAUGES = (
    ("vllm:num_requests_running", "Number of requests in model execution batches.", "running"),
    ("vllm:num_requests_waiting", "Number of requests waiting to be processed.", "waiting"),
    ("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", "kv_usage"),
    ("broadbeam:held_blocks", "KV blocks kept under a lease for a decode rank.", "held_blocks"),
    ("broadbeam:weight_bytes", "Bytes of weights on this rank.", "weight_bytes"),
    ("broadbeam:kv_bytes", "Bytes of the KV pool on this rank.", "kv_bytes"),
)
_COUNTERS = (
    ("vllm:prefix_cache_queries", "Prefix cache queries, in queried tokens.", "prefix_queries"),
    ("vllm:prefix_cache_hits", "Prefix cache hits, in cached tokens.", "prefix_hits"),
    ("vllm:external_prefix_cache_queries", "Prompt tokens asked of a KV connector.", "external_queries"),
    ("vllm:external_prefix_cache_hits", "Prompt tokens that a KV connector supplied.", "external_hits"),
    ("vllm:num_preemptions", "Cumulative number of preemptions.", "preemptions"),
    ("vllm:generation_tokens", "Number of generation tokens processed.", "generation_tokens"),
    ("broadbeam:steps", "Forward passes with work of this rank.", "steps"),
    ("broadbeam:dummy_steps", "Forward passes that this rank joined with no work of its own.", "dummy_steps"),
    ("broadbeam:kv_leases_expired", "Held requests whose decode rank stayed silent.", "leases_expired"),
)
_SOURCES = (
    ("local_compute", "prompt_tokens_computed"),
    ("local_cache_hit", "prompt_tokens_cached"),
    ("external_kv_transfer", "prompt_tokens_transferred"),
)
_TRANSFERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("bytes", "KV bytes read from prefill ranks.", lambda stats: stats.transfer_bytes.sum),
    ("seconds", "Seconds that KV reads took, summed over reads.", lambda stats: stats.transfer_s.sum),
    ("failures", "KV reads that failed.", lambda stats: stats.transfer_failures),
)


class EngineCollector(Collector):
    """Reads one EngineStats at each scrape, so that a page is consistent in itself."""

    def __init__(
        self, labels: tuple[str, str], connector: str | None, stats: Callable[[], EngineStats]
    ) -> None:
        self._labels = labels
        self._connector = connector
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text, field_name in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(self._labels, getattr(stats, field_name))
            yield gauge
        for name, text, field_name in _COUNTERS:
            yield self._counter(name, text, getattr(stats, field_name))
        yield from self._prompt_tokens(stats)
        yield from self._transfers(stats)
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache.", labels=(*LABELS, "block_size", "num_gpu_blocks")
        )
        info.add_metric((*self._labels, str(stats.block_size), str(stats.kv_blocks)), 1)
        yield info

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _prompt_tokens(self, stats: EngineStats) -> Iterator[Metric]:
        values = {source: getattr(stats, field_name) for source, field_name in _SOURCES}
        yield self._counter("vllm:prompt_tokens", "Number of prefill tokens processed.", sum(values.values()))
        cached = stats.prompt_tokens_cached + stats.prompt_tokens_transferred
        yield self._counter("vllm:prompt_tokens_cached", "Prompt tokens not computed here.", cached)
        family = CounterMetricFamily(
            "vllm:prompt_tokens_by_source", "Number of prompt tokens by source.", labels=(*LABELS, "source")
        )
        for source, value in values.items():
            family.add_metric((*self._labels, source), value)
        yield family

    def _transfers(self, stats: EngineStats) -> Iterator[Metric]:
        if self._connector is None:
            return
        for suffix, text, value in _TRANSFERS:
            family = CounterMetricFamily(
                f"broadbeam:kv_transfer_{suffix}", text, labels=(*LABELS, "connector")
            )
            family.add_metric((*self._labels, self._connector), value(stats))
            yield family
        if self._connector == "nixl":
            yield self._distribution(
                "vllm:nixl_xfer_time_seconds", "Transfer duration of a NIXL read.", stats.transfer_s
            )
            yield self._distribution(
                "vllm:nixl_bytes_transferred", "Bytes of a NIXL read.", stats.transfer_bytes
            )
            yield self._counter(
                "vllm:nixl_num_failed_transfers", "NIXL reads that failed.", stats.transfer_failures
            )
            yield self._counter("vllm:nixl_num_kv_expired_reqs", "Expired leases.", stats.leases_expired)

    def _distribution(self, name: str, text: str, values: Distribution) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, values.buckets(), values.sum)
        return family


@dataclass(slots=True)
class RequestTimes:
    """When one sequence arrived and made tokens (time.monotonic())."""

    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    first_s: float | None = None
    last_s: float = 0.0
    generated: int = 0
    done: bool = field(default=False)


class RankMetrics:
    """The metrics of one rank; `observe` takes every output once, in order."""

    def __init__(
        self, global_rank: int, model: str, connector: str | None, stats: Callable[[], EngineStats]
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        labels = (str(global_rank), model)
        self.registry.register(EngineCollector(labels, connector, stats))
        self._labels = labels
        success = Counter(
            "vllm:request_success",
            "Count of finished requests.",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        reasons: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
        self._success = {reason: success.labels(*labels, reason) for reason in reasons}
        self._ttft = self._histogram("time_to_first_token_seconds", "Time to first token.", _LATENCY)
        self._itl = self._histogram("inter_token_latency_seconds", "Inter-token latency.", _TOKEN)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Time per token of a request.", _TOKEN
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Latency of a request.", _LONG)
        self._queue = self._histogram("request_queue_time_seconds", "Time before a request first ran.", _LONG)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _COUNTS)
        self._generated = self._histogram("request_generation_tokens", "Tokens made for a request.", _COUNTS)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", _COUNTS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(f"vllm:{name}", text, LABELS, registry=self.registry, buckets=buckets)
        return family.labels(*self._labels)

    def observe(self, times: RequestTimes, output: Output) -> None:
        now = time.monotonic()
        tokens = len(output.token_ids)
        if tokens and times.first_s is None:
            times.first_s = times.last_s = now
            self._ttft.observe(now - times.arrival_s)
            self._queue.observe(output.queue_s)
            times.generated, tokens = 1, tokens - 1
        if tokens:
            each = (now - times.last_s) / tokens
            for _ in range(tokens):
                self._itl.observe(each)
            times.generated += tokens
            times.last_s = now
        if output.finish is not None:
            self.finish(times, output.finish)

    def finish(self, times: RequestTimes, reason: FinishReason) -> None:
        """Count the request once; a stop string ends it before the engine says so."""
        if times.done:
            return
        times.done = True
        self._success[reason].inc()
        self._prompt.observe(times.prompt_tokens)
        self._generated.observe(times.generated)
        self._max_tokens.observe(times.max_tokens)
        self._e2e.observe(time.monotonic() - times.arrival_s)
        if times.first_s is not None and times.generated > 1:
            self._tpot.observe((times.last_s - times.first_s) / (times.generated - 1))

    def page(self) -> bytes:
        return generate_latest(self.registry)


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
