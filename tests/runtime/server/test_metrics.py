"""The metrics page of a rank: vLLM's names and types where it has the same thing."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broadbeam_runtime.core import TRANSFER_BYTES, TRANSFER_S, EngineStats
from broadbeam_runtime.distribution import Distribution
from broadbeam_runtime.metrics import RankMetrics

# As the page of a vLLM server has them; counters without their `_total`.
VLLM = {
    "vllm:cache_config_info": "gauge",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:external_prefix_cache_hits": "counter",
    "vllm:external_prefix_cache_queries": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:nixl_bytes_transferred": "histogram",
    "vllm:nixl_num_descriptors": "histogram",
    "vllm:nixl_num_failed_notifications": "counter",
    "vllm:nixl_num_failed_transfers": "counter",
    "vllm:nixl_num_kv_expired_reqs": "counter",
    "vllm:nixl_post_time_seconds": "histogram",
    "vllm:nixl_xfer_time_seconds": "histogram",
    "vllm:num_preemptions": "counter",
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:prefix_cache_hits": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:prompt_tokens_by_source": "counter",
    "vllm:prompt_tokens_cached": "counter",
    "vllm:request_generation_tokens": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_success": "counter",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:time_to_first_token_seconds": "histogram",
}


def page(stats: EngineStats, connector: str | None) -> str:
    return RankMetrics(0, "m", connector, lambda: stats).page().decode()


@pytest.mark.parametrize("connector", ["nixl", "tcp", None])
def test_what_is_named_as_in_vllm_has_its_type(connector: str | None) -> None:
    families = text_string_to_metric_families(page(EngineStats(), connector))
    ours = {family.name: family.type for family in families if family.name.startswith("vllm:")}
    assert ours == {name: VLLM[name] for name in ours}
    assert ("vllm:nixl_xfer_time_seconds" in ours) == (connector == "nixl")


def test_reads_are_counted_by_size_and_duration() -> None:
    stats = EngineStats(
        transfer_bytes=TRANSFER_BYTES.with_value(2048).with_value(1 << 30),
        transfer_s=TRANSFER_S.with_value(0.02).with_value(9.0),
    )
    lines = page(stats, "nixl").splitlines()
    labels = 'engine="0",model_name="m"'
    assert 'vllm:nixl_xfer_time_seconds_bucket{engine="0",le="0.01",model_name="m"} 0.0' in lines
    assert 'vllm:nixl_xfer_time_seconds_bucket{engine="0",le="0.025",model_name="m"} 1.0' in lines
    assert 'vllm:nixl_xfer_time_seconds_bucket{engine="0",le="+Inf",model_name="m"} 2.0' in lines
    assert f"vllm:nixl_xfer_time_seconds_sum{{{labels}}} 9.02" in lines
    assert 'vllm:nixl_bytes_transferred_bucket{engine="0",le="2048.0",model_name="m"} 1.0' in lines
    assert f"vllm:nixl_bytes_transferred_count{{{labels}}} 2.0" in lines
    assert f'broadbeam:kv_transfer_seconds_total{{connector="nixl",{labels}}} 9.02' in lines


@pytest.mark.parametrize(
    ("values", "buckets"),
    [
        pytest.param([], [0, 0, 0], id="none"),
        pytest.param([1.0], [1, 1, 1], id="a bound is in its bucket"),
        pytest.param([1.5, 9.0], [0, 1, 2], id="above all bounds"),
    ],
)
def test_buckets_count_what_is_at_most_their_bound(values: list[float], buckets: list[int]) -> None:
    distribution = Distribution((1.0, 2.0))
    for value in values:
        distribution = distribution.with_value(value)
    assert distribution.buckets() == list(zip(["1.0", "2.0", "+Inf"], map(float, buckets), strict=True))
