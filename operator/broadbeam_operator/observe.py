"""What there is: one frozen snapshot of a ServingCluster, its children and its pods."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from broadbeam_operator import names
from broadbeam_operator.cluster import CHILD_KINDS, POD, SERVING_CLUSTER, Cluster, Kind, Object, kind_of

Reference = tuple[Kind, str]  # within the cluster's namespace


@dataclass(frozen=True, slots=True)
class Observed:
    resource: Object  # the ServingCluster as it is stored
    children: Mapping[Reference, Object]  # those whose owner it is
    pods: Sequence[Object]  # of engines and gateway, by name; also those on their way out

    @property
    def namespace(self) -> str:
        return str(self.resource["metadata"]["namespace"])

    @property
    def name(self) -> str:
        return str(self.resource["metadata"]["name"])

    @property
    def status(self) -> Object:
        status: Object = self.resource.get("status") or {}
        return status


async def observe(cluster: Cluster, namespace: str, name: str) -> Observed | None:
    """None where there is no such ServingCluster, or it is being deleted: owner references do the rest."""
    labels = names.cluster_labels(name)
    resource, (pods, *lists) = await asyncio.gather(
        cluster.get(SERVING_CLUSTER, namespace, name),
        asyncio.gather(*(cluster.list(kind, namespace, labels) for kind in (POD, *CHILD_KINDS))),
    )
    if resource is None or "deletionTimestamp" in resource["metadata"]:
        return None
    uid = resource["metadata"]["uid"]
    children = {
        (kind, obj["metadata"]["name"]): obj
        for kind, objects in zip(CHILD_KINDS, lists, strict=True)
        for obj in objects
        if owned_by(obj, uid)
    }
    return Observed(resource, children, sorted(pods, key=lambda pod: str(pod["metadata"]["name"])))


def owned_by(obj: Object, uid: str) -> bool:
    return any(owner.get("uid") == uid for owner in obj["metadata"].get("ownerReferences") or ())


def reference(obj: Object) -> Reference:
    return kind_of(obj), obj["metadata"]["name"]
