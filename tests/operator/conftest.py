"""A small world for the operator: the in-memory store, its controllers, and a node that says what pods do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from broadbeam_crds.v1alpha1 import Pool, ServingCluster
from broadbeam_operator.cluster import POD, SERVING_CLUSTER, STATEFUL_SET, ClusterError, Kind, Object
from broadbeam_operator.kv_effect import KVWatch, Tokens
from broadbeam_operator.local.controllers import control_once
from broadbeam_operator.local.store import Store
from broadbeam_operator.reconcile import Operator, Pass, reconcile

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


class Meter:
    """Counters as the test sets them."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.asked: Mapping[str, Sequence[str]] = {}

    async def read(self, targets: Mapping[str, Sequence[str]]) -> Mapping[str, Tokens]:
        self.asked = targets
        return dict.fromkeys(list(targets)[:1], self.tokens)


class CountingStore(Store):
    """Counts what is written, and refuses what the test tells it to."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []
        self.refuse: set[tuple[str, str]] = set()

    async def apply(self, obj: Object, new: bool = False) -> Object:
        self.writes.append(f"apply {obj['kind']} {obj['metadata']['name']}")
        if (obj["kind"], obj["metadata"]["name"]) in self.refuse:
            raise ClusterError("admission webhook said no", 403)
        return await super().apply(obj, new)

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str | None = None) -> bool:
        self.writes.append(f"delete {kind.kind} {name}")
        return await super().delete(kind, namespace, name, uid)

    async def apply_status(self, kind: Kind, namespace: str, name: str, status: Object) -> None:
        self.writes.append(f"status {name}")
        await super().apply_status(kind, namespace, name, status)

    async def patch_pod_condition(self, namespace: str, name: str, condition: Mapping[str, str]) -> None:
        self.writes.append(f"gate {name} {condition['status']}")
        await super().patch_pod_condition(namespace, name, condition)


class World:
    def __init__(self) -> None:
        self.store = CountingStore()
        self.meter = Meter()
        self.restart()

    def restart(self) -> None:
        """A new operator that remembers nothing."""
        self.operator = Operator(self.store, KVWatch(self.meter, every_s=0), now=lambda: NOW)

    async def put(self, cluster: ServingCluster) -> None:
        """As kubectl apply does: the spec; uid and generation are the store's."""
        wire = cluster.wire()
        meta = {key: wire["metadata"][key] for key in ("name", "namespace")}
        await Store.apply(self.store, {**wire, "metadata": meta})

    async def once(self, name: str = "demo") -> Pass | None:
        return await reconcile(self.operator, "default", name)

    async def settle(self, broken: Sequence[str] = (), rounds: int = 40) -> None:
        """Operator, controllers and node, until nothing changes any more; pods of `broken` never start."""
        for _ in range(rounds):
            before = self.store.version
            await self.once()
            await control_once(self.store)
            self.run_pods(broken)
            if self.store.version == before:
                return
        raise AssertionError(f"does not settle in {rounds} rounds: {self.store.writes[-10:]}")

    def run_pods(self, broken: Sequence[str] = ()) -> None:
        for pod in self.store.select(POD):
            if "deletionTimestamp" in pod["metadata"]:
                self.store.remove(pod)
            else:
                healthy = not any(pod["metadata"]["name"].startswith(prefix) for prefix in broken)
                self.store.set_status(pod, pod_status(pod, healthy))

    async def status(self) -> Object:
        found = await self.store.get(SERVING_CLUSTER, "default", "demo")
        assert found is not None
        status: Object = found["status"]
        return status

    async def condition(self, kind: str) -> tuple[str, str]:
        return next(
            (each["status"], each["reason"])
            for each in (await self.status())["conditions"]
            if each["type"] == kind
        )

    def pod_names(self) -> list[str]:
        return [pod["metadata"]["name"] for pod in self.store.select(POD)]

    def names(self, kind: Kind) -> list[str]:
        return [obj["metadata"]["name"] for obj in self.store.select(kind)]

    def workload(self, name: str) -> Object:
        return next(obj for obj in self.store.select(STATEFUL_SET) if obj["metadata"]["name"] == name)


def pod_status(pod: Object, healthy: bool, **container: Any) -> Object:
    """What a kubelet reports; Ready takes the readiness gates into account."""
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates") or ()]
    have = {each["type"]: each["status"] for each in pod.get("status", {}).get("conditions") or ()}
    ready = healthy and all(have.get(gate) == "True" for gate in gates)
    words = {True: "True", False: "False"}
    return {
        "phase": "Running",
        "podIP": "10.0.0.1",
        "conditions": [
            {"type": "ContainersReady", "status": words[healthy]},
            {"type": "Ready", "status": words[ready]},
        ],
        "containerStatuses": [{"name": "engine", "ready": healthy, "restartCount": 0, **container}],
    }


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def make_world() -> type[World]:
    return World


def changed(pool: Pool, **fields: Any) -> Pool:
    """The pool with some wire fields changed."""
    return Pool.model_validate(pool.wire() | fields)
