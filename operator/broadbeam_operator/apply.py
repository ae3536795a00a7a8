"""Doing what the plan says: the only writer of children and pods."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any

from broadbeam_crds.conventions import GROUP_READY_GATE
from broadbeam_operator.cluster import (
    CONFIG_MAP,
    DEPLOYMENT,
    POD,
    ROLE,
    ROLE_BINDING,
    SERVICE_ACCOUNT,
    STATEFUL_SET,
    Cluster,
    ClusterError,
    Kind,
    NameTakenError,
    Object,
    kind_of,
    timestamp,
)
from broadbeam_operator.observe import owned_by
from broadbeam_operator.plan import Plan

CONFLICT = 409

# Each from left to right: pods need their configs and accounts, and who may not bind every role must show
# the API server the one that is bound.
CHAINS = (
    ((SERVICE_ACCOUNT, CONFIG_MAP), (STATEFUL_SET, DEPLOYMENT)),
    ((ROLE,), (ROLE_BINDING,)),
)
CHAINED = {kind for chain in CHAINS for kinds in chain for kind in kinds}


async def apply(cluster: Cluster, plan: Plan, now: datetime) -> None:
    """Everything at once, save what must be there before something else (`CHAINS`).

    Raises ClusterError of the first write that failed, after the others that do not hang on it are done;
    the next pass sees what is left.
    """
    await _all(
        [
            *(_in_order(cluster, plan, chain) for chain in CHAINS),
            *_writes(cluster, plan, lambda kind: kind not in CHAINED),
            *(_delete(cluster, obj) for obj in (*plan.prune, *plan.replace)),
            *(_set_gate(cluster, pod, open_, now) for pod, open_ in plan.gates),
        ]
    )


async def _in_order(cluster: Cluster, plan: Plan, chain: Sequence[Sequence[Kind]]) -> None:
    for kinds in chain:
        await _all(_writes(cluster, plan, kinds.__contains__))


def _writes(cluster: Cluster, plan: Plan, chosen: Callable[[Kind], bool]) -> list[Awaitable[Any]]:
    return [
        *(_create(cluster, obj) for obj in plan.create if chosen(kind_of(obj))),
        *(cluster.apply(obj) for obj in plan.apply if chosen(kind_of(obj))),
    ]


async def _create(cluster: Cluster, obj: Object) -> None:
    """Never over what is there: cluster a with pool b-c wants the names that cluster a-b with pool c has.

    Raises NameTakenError, save for an object of our own that somebody took our label from.
    """
    try:
        await cluster.apply(obj, new=True)
    except ClusterError as error:
        if error.status != CONFLICT:
            raise
        meta = obj["metadata"]
        found = await cluster.get(kind_of(obj), meta["namespace"], meta["name"])
        if found is not None and not owned_by(found, meta["ownerReferences"][0]["uid"]):
            raise NameTakenError(_whose(found, obj), CONFLICT) from error
        await cluster.apply(obj)


def _whose(found: Object, wanted: Object) -> str:
    head = f'metadata.name: {found["kind"]} "{found["metadata"]["name"]}" of this cluster'
    owners = found["metadata"].get("ownerReferences") or ()
    if not owners:
        return f"{head} is there already and not ours; delete it, or rename the cluster"
    kind, name = owners[0]["kind"], owners[0]["name"]
    if name == wanted["metadata"]["ownerReferences"][0]["name"]:
        return f"{head} is still that of an earlier one of its name, and will go"
    return f'{head} belongs to {kind} "{name}"; rename the cluster or its pool'


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
