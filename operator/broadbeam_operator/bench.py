"""Figures of the operator on a real API server, as JSON lines: `python -m broadbeam_operator.bench`.

BROADBEAM_E2E_KUBECONFIG names the cluster; it must have the CRD, and its namespace `default` is used. Without
it, a clone starts a control plane of its own (e2e/with_cluster.py). With `--write` the lines take
the place of this bench's lines in operator/baselines.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator import names
from broadbeam_operator.cluster import CHILD_KINDS, SERVING_CLUSTER, STATEFUL_SET, ClusterError
from broadbeam_operator.images import Images
from broadbeam_operator.kubernetes_cluster import KubernetesCluster, connect, credentials
from broadbeam_operator.kv_effect import HttpMeter, KVWatch
from broadbeam_operator.manifests import manifests
from broadbeam_operator.reconcile import Operator, reconcile

KUBECONFIG = "BROADBEAM_E2E_KUBECONFIG"
BASELINES = Path(__file__).parents[1] / "baselines.jsonl"
WITH_CLUSTER = Path(__file__).parents[2] / "e2e" / "with_cluster.py"
NAMESPACE = "default"
CLUSTERS = 20
STEADY_PASSES = 20
START_LIMIT_S = 30.0
APPLY_LIMIT_MS = 300.0
RSS_LIMIT_MB = 150.0
POLL_S = 0.01
# Between two ServingClusters: the controllers make the pods of the last one, and the scheduler finds no node.
QUIET_S = 1.0

Line = dict[str, Any]


def sample(number: int) -> ServingCluster:
    """Six ranks in two groups, one of them over two nodes: 15 children, as examples/tiny-wide-ep.yaml has."""
    pools = [pool("prefill", data=2), pool("decode", data=4, nodes=2)]
    return serving_cluster(f"bench-{number}", pools=pools, engine="sim", namespace=NAMESPACE)


async def measure(kubeconfig: str) -> list[Line]:
    async with connect(await credentials(kubeconfig)) as cluster:
        await cluster.list(SERVING_CLUSTER, NAMESPACE)  # refuses at once where the CRD is missing
        try:
            async with operator_process(kubeconfig) as process:
                await first_pass(cluster)
                times = [await applied_in(cluster, sample(number)) for number in range(CLUSTERS)]
                await asyncio.sleep(QUIET_S)
                rss_mb = resident_mb(process.pid)
            writes = await steady_writes(cluster, sample(0))
        finally:
            await remove(cluster)
    accepted, applied = (sorted(column) for column in zip(*times, strict=True))
    p50, p95 = statistics.median(applied), applied[int(0.95 * len(applied))]
    api_server = round(statistics.median(accepted), 1)
    return [
        line(
            "servingcluster_to_children_p50_ms",
            round(p50, 1),
            APPLY_LIMIT_MS,
            children=children(),
            of_which_validation_ms=api_server,
        ),
        line("servingcluster_to_children_p95_ms", round(p95, 1), None, children=children()),
        line("steady_cluster_writes", writes, 0, passes=STEADY_PASSES),
        line("operator_rss_mb", round(rss_mb, 1), RSS_LIMIT_MB, clusters=CLUSTERS),
    ]


def line(what: str, value: float, limit: float | None, **about: Any) -> Line:
    verdict = {} if limit is None else {"limit": limit, "ok": value <= limit}
    return {
        "bench": "operator",
        "what": what,
        "value": value,
        **verdict,
        **about,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def children() -> int:
    return len(manifests(sample(0), Images()))


@asynccontextmanager
async def operator_process(kubeconfig: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The operator as it runs in a cluster: a process of its own, woken by its watches."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "broadbeam_operator.main", "run", "--kubeconfig", kubeconfig),
        *("--namespace", NAMESPACE, "--health-port", "0", "--metrics-port", "0"),
        *("--log-level", "warning"),
    )
    try:
        yield process
    finally:
        process.terminate()
        await process.wait()


async def first_pass(cluster: KubernetesCluster) -> None:
    """Until the operator has noticed its first ServingCluster: starting is not what is measured."""
    await create(cluster, sample(CLUSTERS))
    await wait_applied(cluster, sample(CLUSTERS), START_LIMIT_S)


class Times(NamedTuple):
    """Milliseconds from sending a ServingCluster."""

    accepted: float  # the API server has checked and stored it
    applied: float  # all of its children are there


async def applied_in(cluster: KubernetesCluster, wanted: ServingCluster) -> Times:
    await asyncio.sleep(QUIET_S)
    started = time.perf_counter()
    await create(cluster, wanted)
    accepted = time.perf_counter()
    await wait_applied(cluster, wanted, START_LIMIT_S)
    return Times((accepted - started) * 1e3, (time.perf_counter() - started) * 1e3)


async def create(cluster: KubernetesCluster, wanted: ServingCluster) -> None:
    meta = {"name": wanted.metadata.name, "namespace": NAMESPACE}
    await cluster.apply({**wanted.wire(), "metadata": meta})


async def wait_applied(cluster: KubernetesCluster, wanted: ServingCluster, limit_s: float) -> None:
    """Workloads are applied last, but several at once: look for them first, and then for everything."""
    labels = names.cluster_labels(wanted.metadata.name)
    groups = sum(each.groups for each in wanted.spec.pools)
    async with asyncio.timeout(limit_s):
        while len(await cluster.list(STATEFUL_SET, NAMESPACE, labels)) < groups:
            await asyncio.sleep(POLL_S)
        while await count(cluster, wanted) < children():
            await asyncio.sleep(POLL_S)


async def count(cluster: KubernetesCluster, wanted: ServingCluster) -> int:
    labels = names.cluster_labels(wanted.metadata.name)
    lists = await asyncio.gather(*(cluster.list(kind, NAMESPACE, labels) for kind in CHILD_KINDS))
    return sum(len(each) for each in lists)


async def steady_writes(cluster: KubernetesCluster, wanted: ServingCluster) -> int:
    """Writes of passes over a cluster where everything is as it should be."""
    async with aiohttp.ClientSession() as scraping:
        operator = Operator(cluster, KVWatch(HttpMeter(scraping)))
        for _ in range(3):  # controllers of a whole cluster may still be reporting
            await reconcile(operator, NAMESPACE, wanted.metadata.name)
        before = cluster.writes
        for _ in range(STEADY_PASSES):
            await reconcile(operator, NAMESPACE, wanted.metadata.name)
        return cluster.writes - before


async def remove(cluster: KubernetesCluster) -> None:
    """Children too: an API server without its controllers collects no garbage."""
    for number in range(CLUSTERS + 1):
        wanted = sample(number)
        await cluster.delete(SERVING_CLUSTER, NAMESPACE, wanted.metadata.name)
        labels = names.cluster_labels(wanted.metadata.name)
        for kind in CHILD_KINDS:
            for obj in await cluster.list(kind, NAMESPACE, labels):
                await cluster.delete(kind, NAMESPACE, obj["metadata"]["name"])


def resident_mb(pid: int) -> float:
    for row in Path(f"/proc/{pid}/status").read_text().splitlines():
        if row.startswith("VmRSS:"):
            return int(row.split()[1]) / 1024
    raise ValueError(f"process {pid} has no VmRSS")


def other_lines() -> str:
    """Of the baselines: those that another bench keeps in the same file."""
    rows = BASELINES.read_text().splitlines(keepends=True) if BASELINES.exists() else []
    return "".join(row for row in rows if json.loads(row)["bench"] != "operator")


def main() -> int:
    parser = argparse.ArgumentParser(prog="broadbeam_operator.bench", description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the lines in operator/baselines.jsonl")
    arguments = parser.parse_args()
    kubeconfig = os.environ.get(KUBECONFIG)
    if not kubeconfig and WITH_CLUSTER.exists():
        command = [sys.executable, str(WITH_CLUSTER), sys.executable, "-m", "broadbeam_operator.bench"]
        return subprocess.run([*command, *sys.argv[1:]]).returncode
    if not kubeconfig:
        print(json.dumps({"bench": "operator", "skipped": f"{KUBECONFIG} names no cluster"}))
        return 0
    try:
        lines = asyncio.run(measure(kubeconfig))
    except ClusterError as error:
        print(json.dumps({"bench": "operator", "skipped": str(error)}))
        return 0
    text = "".join(json.dumps(each) + "\n" for each in lines)
    sys.stdout.write(text)
    if arguments.write:
        BASELINES.write_text(text + other_lines())
    return 0 if all(each.get("ok", True) for each in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
