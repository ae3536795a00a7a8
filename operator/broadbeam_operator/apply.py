"""Doing what the plan says: the only writer of children and pods."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from datetime import datetime
from typing import Any

from broadbeam_crds.conventions import GROUP_READY_GATE
from broadbeam_operator.cluster import DEPLOYMENT, POD, STATEFUL_SET, Cluster, Object, kind_of
from broadbeam_operator.plan import Plan

WORKLOADS = (STATEFUL_SET, DEPLOYMENT)


async def apply(cluster: Cluster, plan: Plan, now: datetime) -> None:
    """Everything at once, save that pods' configs and accounts are there before the pods are asked for.

    Raises ClusterError of the first write that failed; the others are still done, and the next pass
    sees what is left.
    """
    workloads = [obj for obj in plan.apply if kind_of(obj) in WORKLOADS]
    others = [obj for obj in plan.apply if kind_of(obj) not in WORKLOADS]
    await _all([cluster.apply(obj) for obj in others])
    await _all(
        [
            *(cluster.apply(obj) for obj in workloads),
            *(_delete(cluster, obj) for obj in (*plan.prune, *plan.replace)),
            *(_set_gate(cluster, pod, open_, now) for pod, open_ in plan.gates),
        ]
    )


async def _all(writes: Sequence[Awaitable[Any]]) -> None:
    results = await asyncio.gather(*writes, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def _delete(cluster: Cluster, obj: Object) -> None:
    meta = obj["metadata"]
    await cluster.delete(kind_of(obj), meta["namespace"], meta["name"], uid=meta["uid"])


async def _set_gate(cluster: Cluster, pod: Object, open_: bool, now: datetime) -> None:
    assert kind_of(pod) == POD
    meta = pod["metadata"]
    condition = {
        "type": GROUP_READY_GATE,
        "status": "True" if open_ else "False",
        "reason": "GroupComplete" if open_ else "GroupIncomplete",
        "message": "" if open_ else "not every rank of the group can serve",
        "lastTransitionTime": timestamp(now),
    }
    await cluster.patch_pod_condition(meta["namespace"], meta["name"], condition)


def timestamp(now: datetime) -> str:
    """RFC 3339 in UTC, to the second, as Kubernetes writes times."""
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")
