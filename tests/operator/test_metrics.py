"""What Prometheus is told: counted passes, clusters by their state, and where it is asked for."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping

import aiohttp
import pytest
from typer.testing import CliRunner

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_operator import main
from broadbeam_operator.cluster import SERVING_CLUSTER, ClusterError
from broadbeam_operator.local.exposition import samples
from broadbeam_operator.metrics import Metrics, Snapshot, served
from broadbeam_operator.workers import Pace, Workers


async def scraped(metrics: Metrics) -> Mapping[str, float]:
    """Sample -> value, `name{label}` where there is one label."""
    async with (
        served(metrics.registry, 0) as port,
        aiohttp.ClientSession() as http,
        http.get(f"http://127.0.0.1:{port}/metrics") as response,
    ):
        assert response.content_type == "text/plain"
        page = await response.text()
    return {f"{s.name}{{{','.join(s.labels.values())}}}": s.value for s in samples(page)}


@pytest.fixture
async def workers(world):
    found = Workers(world.operator, Pace(resync_s=60, spacing_s=0, retry_s=60))
    snapshot = Snapshot(found.states.values, lambda: found.waiting, lambda: 7)
    found.metrics.registry.register(snapshot)
    yield found
    await found.stop()


async def passes(workers: Workers) -> float:
    found = await scraped(workers.metrics)
    return found["broadbeam_operator_reconcile_duration_seconds_count{}"]


async def until_passes(workers: Workers, count: int) -> Mapping[str, float]:
    async with asyncio.timeout(10):
        while await passes(workers) < count:
            await asyncio.sleep(0.01)
    return await scraped(workers.metrics)


async def test_everything_is_there_before_anything_has_happened(workers):
    found = await scraped(workers.metrics)
    assert found["broadbeam_operator_reconciles_total{failed}"] == 0
    assert found["broadbeam_operator_servingclusters{Available}"] == 0
    assert found["broadbeam_operator_waiting{}"] == 0
    assert found["broadbeam_operator_api_writes_total{}"] == 7


async def test_a_pass_is_counted_with_its_time_and_the_state_it_found(world, workers):
    await world.put(serving_cluster(pools=[pool("both")]))
    workers.wake("default", "demo")
    found = await until_passes(workers, 1)
    assert found["broadbeam_operator_reconciles_total{done}"] == 1
    assert found["broadbeam_operator_servingclusters{Progressing}"] == 1
    assert found["broadbeam_operator_reconcile_duration_seconds_sum{}"] > 0


async def test_a_failed_pass_is_counted_as_one(world, workers, monkeypatch):
    async def fails(*_):
        raise ClusterError("gone away")

    await world.put(serving_cluster())
    monkeypatch.setattr(world.store, "list", fails)
    workers.wake("default", "demo")
    assert (await until_passes(workers, 1))["broadbeam_operator_reconciles_total{failed}"] == 1


async def test_a_cluster_that_is_gone_is_no_longer_counted(world, workers):
    await world.put(serving_cluster(pools=[pool("both")]))
    workers.wake("default", "demo")
    await until_passes(workers, 1)
    await world.store.delete(SERVING_CLUSTER, "default", "demo")
    workers.wake("default", "demo")
    found = await until_passes(workers, 2)
    assert found["broadbeam_operator_reconciles_total{gone}"] == 1
    assert found["broadbeam_operator_servingclusters{Progressing}"] == 0


async def test_what_was_woken_waits_for_its_pass(world, workers):
    workers.wake("default", "one")
    workers.wake("default", "two")
    assert workers.waiting == 2
    await until_passes(workers, 2)
    assert workers.waiting == 0


def test_a_port_in_use_is_one_line(tmp_path):
    kubeconfig = tmp_path / "config"
    user = {"name": "u", "user": {"token": "t"}}
    clusters = [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}]
    contexts = [{"name": "x", "context": {"cluster": "c", "user": "u"}}]
    config = {"current-context": "x", "clusters": clusters, "users": [user], "contexts": contexts}
    kubeconfig.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **config}))
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = ["run", "--kubeconfig", str(kubeconfig), "--metrics-port", port]
        result = CliRunner().invoke(main.app, arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert f"('0.0.0.0', {port})" in result.stderr
    assert "address already in use" in result.stderr
