"""StatefulSets and Deployments to pods, as the controller-manager does it: pure decisions, one thin loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from broadbeam_operator.cluster import DEPLOYMENT, POD, STATEFUL_SET, Object
from broadbeam_operator.local.store import Store
from broadbeam_operator.pods import is_ready, leaving

POD_INDEX = "apps.kubernetes.io/pod-index"
POD_NAME = "statefulset.kubernetes.io/pod-name"
REVISION = "controller-revision-hash"
TEMPLATE_HASH = "pod-template-hash"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do for one workload, and the status to report."""

    create: Sequence[Object] = ()
    delete: Sequence[Object] = ()
    status: Mapping[str, Any] = field(default_factory=dict)


def decide_stateful_set(workload: Object, pods: Sequence[Object]) -> Decision:
    """`pods`: those it owns, also the ones on their way out."""
    spec = workload["spec"]
    first = (spec.get("ordinals") or {}).get("start", 0)
    wanted = range(first, first + spec.get("replicas", 1))
    revision = f"{workload['metadata']['name']}-{template_hash(spec['template'])}"
    by_ordinal = {int(pod["metadata"]["labels"][POD_INDEX]): pod for pod in pods}
    missing = [_ordinal_pod(workload, i, revision) for i in wanted if i not in by_ordinal]
    surplus = [pod for i, pod in sorted(by_ordinal.items(), reverse=True) if i not in wanted]
    delete = _alive(surplus) + _ended(pods) + _outdated(spec, by_ordinal, wanted, revision)
    if spec.get("podManagementPolicy") != "Parallel":
        # In order: a pod is made once all before it are ready.
        settled = all(is_ready(by_ordinal[i]) for i in wanted if i in by_ordinal)
        missing = missing[:1] if settled else []
    return Decision(missing, _unique(delete), _stateful_set_status(workload, pods, revision))


def _outdated(
    spec: Mapping[str, Any], pods: Mapping[int, Object], wanted: range, revision: str
) -> list[Object]:
    """The next pod that a rolling update replaces: the highest of an old revision, when all are ready."""
    if (spec.get("updateStrategy") or {}).get("type", "RollingUpdate") == "OnDelete":
        return []
    if any(i not in pods or not is_ready(pods[i]) for i in wanted):
        return []
    old = [i for i in wanted if pods[i]["metadata"]["labels"].get(REVISION) != revision]
    return [pods[max(old)]] if old else []


def _ordinal_pod(workload: Object, ordinal: int, revision: str) -> Object:
    name = f"{workload['metadata']['name']}-{ordinal}"
    labels = {POD_INDEX: str(ordinal), POD_NAME: name, REVISION: revision}
    spec = {"hostname": name, "subdomain": workload["spec"].get("serviceName", "")}
    return _pod(workload, name, labels, spec)


def _stateful_set_status(workload: Object, pods: Sequence[Object], revision: str) -> Object:
    ready = [pod for pod in pods if is_ready(pod)]
    updated = [pod for pod in pods if pod["metadata"]["labels"].get(REVISION) == revision]
    before = (workload.get("status") or {}).get("currentRevision", revision)
    current = revision if len(updated) == len(pods) else before
    return {
        "observedGeneration": workload["metadata"]["generation"],
        "replicas": len(pods),
        "readyReplicas": len(ready),
        "availableReplicas": len(ready),
        "updatedReplicas": len(updated),
        "currentReplicas": sum(pod["metadata"]["labels"].get(REVISION) == current for pod in pods),
        "currentRevision": current,
        "updateRevision": revision,
    }


def decide_deployment(workload: Object, pods: Sequence[Object]) -> Decision:
    """Rolling: new pods up to the surge, old ones go as new ones become ready. Recreate: old ones first."""
    spec = workload["spec"]
    replicas = spec.get("replicas", 1)
    digest = template_hash(spec["template"])
    alive = _alive(pods)
    new = [pod for pod in alive if pod["metadata"]["labels"].get(TEMPLATE_HASH) == digest]
    old = [pod for pod in alive if pod not in new]
    surge, unavailable = _rolling_limits(spec, replicas)
    recreate = (spec.get("strategy") or {}).get("type") == "Recreate"
    room = (replicas - len(pods)) if recreate else (replicas + surge - len(alive))
    count = max(0, min(replicas - len(new), room))
    taken = {pod["metadata"]["name"] for pod in pods}
    create = _replicas(workload, digest, count, taken)
    ready = sum(is_ready(pod) for pod in alive)
    delete = old if recreate else _removable(old, ready - (replicas - unavailable))
    delete = [*delete, *_by_readiness(new)[: max(0, len(new) - replicas)], *_ended(pods)]
    return Decision(create, _unique(delete), _deployment_status(workload, alive, new, unavailable))


def _rolling_limits(spec: Mapping[str, Any], replicas: int) -> tuple[int, int]:
    """(surge, unavailable) in pods; a percentage of surge is rounded up, one of unavailability down."""
    rolling = (spec.get("strategy") or {}).get("rollingUpdate") or {}
    surge, unavailable = rolling.get("maxSurge", "25%"), rolling.get("maxUnavailable", "25%")

    def pods(limit: int | str, up: bool) -> int:
        if isinstance(limit, int):
            return limit
        hundredths = int(limit.rstrip("%")) * replicas
        return -(-hundredths // 100) if up else hundredths // 100

    return pods(surge, up=True), pods(unavailable, up=False)


def _removable(old: Sequence[Object], spare: int) -> list[Object]:
    """Old pods that may go: all that are not ready, and as many ready ones as are to spare."""
    unready = [pod for pod in old if not is_ready(pod)]
    return unready + [pod for pod in old if is_ready(pod)][: max(0, spare)]


def _by_readiness(pods: Sequence[Object]) -> list[Object]:
    return sorted(pods, key=is_ready)


def _replicas(workload: Object, digest: str, count: int, taken: set[str]) -> list[Object]:
    stem = f"{workload['metadata']['name']}-{digest}"
    free = (name for i in range(len(taken) + count) if (name := f"{stem}-{i}") not in taken)
    return [_pod(workload, next(free), {TEMPLATE_HASH: digest}, {}) for _ in range(count)]


def _deployment_status(
    workload: Object, alive: Sequence[Object], new: Sequence[Object], unavailable: int
) -> Object:
    replicas = workload["spec"].get("replicas", 1)
    ready = sum(is_ready(pod) for pod in alive)
    available = ready >= replicas - unavailable
    return {
        "observedGeneration": workload["metadata"]["generation"],
        "replicas": len(alive),
        "updatedReplicas": len(new),
        "readyReplicas": ready,
        "availableReplicas": ready,
        "unavailableReplicas": max(0, replicas - ready),
        "conditions": [
            {
                "type": "Available",
                "status": "True" if available else "False",
                "reason": "MinimumReplicasAvailable" if available else "MinimumReplicasUnavailable",
            }
        ],
    }


def _pod(workload: Object, name: str, labels: Mapping[str, str], spec: Mapping[str, Any]) -> Object:
    template, meta = workload["spec"]["template"], workload["metadata"]
    template_meta = template.get("metadata") or {}
    owner = {
        "apiVersion": workload["apiVersion"],
        "kind": workload["kind"],
        "name": meta["name"],
        "uid": meta["uid"],
        "controller": True,
    }
    return {
        "apiVersion": POD.api_version,
        "kind": POD.kind,
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": {**(template_meta.get("labels") or {}), **labels},
            "annotations": dict(template_meta.get("annotations") or {}),
            "ownerReferences": [owner],
        },
        "spec": {**template["spec"], **spec},
    }


def template_hash(template: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]


def _alive(pods: Sequence[Object]) -> list[Object]:
    ended = ("Failed", "Succeeded")
    return [pod for pod in pods if not leaving(pod) and (pod.get("status") or {}).get("phase") not in ended]


def _ended(pods: Sequence[Object]) -> list[Object]:
    """Pods whose processes ended for good: a workload replaces them."""
    return [pod for pod in pods if (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")]


def _unique(pods: Sequence[Object]) -> list[Object]:
    by_name = {pod["metadata"]["name"]: pod for pod in pods if not leaving(pod)}
    return list(by_name.values())


DECIDE = {STATEFUL_SET: decide_stateful_set, DEPLOYMENT: decide_deployment}


async def control_once(store: Store) -> None:
    """One pass over all workloads."""
    for kind, decide in DECIDE.items():
        for workload in store.select(kind):
            meta = workload["metadata"]
            owned = [
                pod
                for pod in store.select(POD, meta["namespace"])
                if any(o["uid"] == meta["uid"] for o in pod["metadata"].get("ownerReferences") or ())
            ]
            decision = decide(workload, owned)
            for pod in decision.delete:
                await store.delete(POD, pod["metadata"]["namespace"], pod["metadata"]["name"])
            for pod in decision.create:
                store.create(pod)
            store.set_status(workload, dict(decision.status))


async def control(store: Store) -> None:
    """Keep pods as the workloads want them, for ever."""
    seen = -1
    while True:
        seen = await store.changed(seen)
        await control_once(store)
