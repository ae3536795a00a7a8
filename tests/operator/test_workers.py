"""One task a ServingCluster: woken by events, one pass at a time, never ended by a fault."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import generate_latest

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_operator.cluster import SERVING_CLUSTER, STATEFUL_SET, ClusterError
from broadbeam_operator.local.exposition import samples
from broadbeam_operator.workers import Pace, Workers

QUICK = Pace(resync_s=0.05, spacing_s=0, retry_s=0.01, retry_limit_s=0.05)


@pytest.fixture
async def workers(world):
    found = Workers(world.operator, QUICK)
    yield found
    await found.stop()


async def until(true) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


async def test_a_wake_brings_the_children(world, workers):
    await world.put(serving_cluster(pools=[pool("both")]))
    workers.wake("default", "demo")
    await until(lambda: world.names(STATEFUL_SET) == ["demo-both-0"])


async def test_without_events_the_timer_brings_a_pass(world, workers):
    await world.put(serving_cluster(pools=[pool("both")]))
    workers.wake("default", "demo")
    await until(lambda: world.names(STATEFUL_SET))
    await world.store.delete(STATEFUL_SET, "default", "demo-both-0")
    await until(lambda: world.names(STATEFUL_SET) == ["demo-both-0"])


async def test_the_task_ends_with_its_cluster(world, workers):
    await world.put(serving_cluster(pools=[pool("both")]))
    workers.wake("default", "demo")
    await until(lambda: world.names(STATEFUL_SET))
    await world.store.delete(SERVING_CLUSTER, "default", "demo")
    workers.wake("default", "demo")
    await until(lambda: not workers._tasks)


async def test_many_wakes_make_few_passes(world):
    workers = Workers(world.operator, Pace(resync_s=60, spacing_s=0.05))
    await world.put(serving_cluster(pools=[pool("both")]))
    for _ in range(100):
        workers.wake("default", "demo")
        await asyncio.sleep(0)
    await until(lambda: world.names(STATEFUL_SET))
    await workers.stop()
    passes = [each.value for each in samples(page(workers)) if each.name.endswith("reconciles_total")]
    assert 1 <= sum(passes) <= 3


def page(workers: Workers) -> str:
    return generate_latest(workers.metrics.registry).decode()


@pytest.mark.parametrize(
    "fault", [ClusterError("gone away"), RuntimeError("a bug")], ids=["cluster", "a fault of ours"]
)
async def test_a_failed_pass_is_tried_again(world, workers, fault, monkeypatch):
    await world.put(serving_cluster(pools=[pool("both")]))
    listing, failures = world.store.list, [fault, fault]

    async def fails_twice(*arguments):
        if failures:
            raise failures.pop()
        return await listing(*arguments)

    monkeypatch.setattr(world.store, "list", fails_twice)
    workers.wake("default", "demo")
    await until(lambda: world.names(STATEFUL_SET) == ["demo-both-0"])


async def test_after_many_failures_an_event_still_brings_a_pass(world):
    workers = Workers(world.operator, Pace(retry_s=0.01, retry_limit_s=3600))
    wake = asyncio.Event()
    resting = asyncio.create_task(workers._rest(wake, failures=5000))
    done, _ = await asyncio.wait([resting], timeout=0.1)
    assert not done
    wake.set()
    await asyncio.wait_for(resting, 10)
