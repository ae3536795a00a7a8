from __future__ import annotations

import copy
from typing import Any

import pytest

from broadbeam_operator.cluster import POD, STATEFUL_SET, Object
from broadbeam_operator.local.controllers import (
    Decision,
    control_once,
    decide_deployment,
    decide_stateful_set,
    is_ready,
)
from broadbeam_operator.local.store import Store


def workload(kind: str, replicas: int, image: str = "v1", **spec: Any) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": "w", "namespace": "ns", "uid": "u", "generation": 4},
        "spec": {
            "replicas": replicas,
            "serviceName": "w",
            "podManagementPolicy": "Parallel",
            "template": {
                "metadata": {"labels": {"app": "w"}, "annotations": {"n": "2"}},
                "spec": {"image": image},
            },
            **spec,
        },
    }


def made(pod: Object, ready: bool = True, phase: str = "Running", going: bool = False) -> Object:
    pod = copy.deepcopy(pod)
    if going:
        pod["metadata"]["deletionTimestamp"] = "now"
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {**pod, "status": {"phase": phase, "conditions": conditions}}


def set_pods(owner: Object, *ordinals: int, **state: Any) -> list[Object]:
    every = decide_stateful_set({**owner, "spec": {**owner["spec"], "replicas": 10}}, []).create
    return [made(every[i], **state) for i in ordinals]


def names(pods: Any) -> list[str]:
    return [pod["metadata"]["name"] for pod in pods]


STS = workload("StatefulSet", 3, updateStrategy={"type": "OnDelete"})
NEW = workload("StatefulSet", 3, "v2", updateStrategy={"type": "OnDelete"})
ROLLING = workload("StatefulSet", 3, "v2")
ORDERED = workload("StatefulSet", 3, podManagementPolicy="OrderedReady")


@pytest.mark.parametrize(
    ("owner", "pods", "create", "delete"),
    [
        pytest.param(STS, [], ["w-0", "w-1", "w-2"], [], id="parallel makes all at once"),
        pytest.param(ORDERED, [], ["w-0"], [], id="ordered makes one"),
        pytest.param(ORDERED, set_pods(STS, 0, ready=False), [], [], id="ordered waits"),
        pytest.param(ORDERED, set_pods(STS, 0), ["w-1"], [], id="ordered goes on"),
        pytest.param(STS, set_pods(STS, 0, 2), ["w-1"], [], id="a hole is filled"),
        pytest.param(STS, set_pods(STS, 0, 1, 2, 3, 4), [], ["w-4", "w-3"], id="scaling down from the top"),
        pytest.param(
            STS,
            set_pods(STS, 0, 1) + set_pods(STS, 2, going=True),
            [],
            [],
            id="one that is going is not replaced before it is gone",
        ),
        pytest.param(
            STS, set_pods(STS, 0, 1) + set_pods(STS, 2, phase="Failed"), [], ["w-2"], id="an ended one goes"
        ),
        pytest.param(NEW, set_pods(STS, 0, 1, 2), [], [], id="OnDelete leaves old revisions alone"),
        pytest.param(ROLLING, set_pods(STS, 0, 1, 2), [], ["w-2"], id="rolling replaces the highest"),
        pytest.param(
            ROLLING,
            set_pods(STS, 0, 1) + set_pods(ROLLING, 2, ready=False),
            [],
            [],
            id="rolling waits for it to be ready",
        ),
        pytest.param(
            ROLLING, set_pods(STS, 0, 1) + set_pods(ROLLING, 2), [], ["w-1"], id="then takes the next"
        ),
        pytest.param(
            workload("StatefulSet", 2, ordinals={"start": 5}),
            [],
            ["w-5", "w-6"],
            [],
            id="ordinals may start higher",
        ),
    ],
)
def test_a_stateful_set_has_its_ordinals(
    owner: Object, pods: list[Object], create: list[str], delete: list[str]
) -> None:
    decision = decide_stateful_set(owner, pods)
    assert (names(decision.create), names(decision.delete)) == (create, delete)


def test_pods_of_a_stateful_set_know_their_place() -> None:
    pod = decide_stateful_set(STS, []).create[1]
    labels = pod["metadata"]["labels"]
    assert labels["apps.kubernetes.io/pod-index"] == "1"
    assert labels["statefulset.kubernetes.io/pod-name"] == "w-1"
    assert labels["app"] == "w"
    assert pod["metadata"]["annotations"] == {"n": "2"}
    assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == ("w-1", "w")
    assert pod["metadata"]["ownerReferences"][0]["uid"] == "u"


def test_a_stateful_set_counts_what_is_ready_and_what_is_of_the_new_revision() -> None:
    status = decide_stateful_set(NEW, set_pods(STS, 0, 1) + set_pods(NEW, 2, ready=False)).status
    assert status["observedGeneration"] == 4
    assert (status["replicas"], status["readyReplicas"], status["updatedReplicas"]) == (3, 2, 1)


V1 = workload("Deployment", 2)
V2 = workload("Deployment", 2, "v2", strategy={"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}})
RECREATE = workload("Deployment", 2, "v2", strategy={"type": "Recreate"})


def copies(owner: Object, count: int, **state: Any) -> list[Object]:
    pods = decide_deployment({**owner, "spec": {**owner["spec"], "replicas": 10}}, []).create
    return [made(pod, **state) for pod in pods[:count]]


@pytest.mark.parametrize(
    ("owner", "pods", "created", "deleted"),
    [
        pytest.param(V1, [], 2, [], id="from nothing"),
        pytest.param(V1, copies(V1, 2), 0, [], id="at rest"),
        pytest.param(V1, copies(V1, 3), 0, copies(V1, 1), id="one too many"),
        pytest.param(V1, [*copies(V1, 2)[:1], *copies(V1, 2, ready=False)[1:]], 0, [], id="unready stays"),
        pytest.param(V2, copies(V1, 2), 1, [], id="a new one beside the old"),
        pytest.param(
            V2, copies(V1, 2) + copies(V2, 1, ready=False), 0, [], id="old ones stay until it is ready"
        ),
        pytest.param(V2, copies(V1, 2) + copies(V2, 1), 0, copies(V1, 1), id="then one old one goes"),
        pytest.param(V2, copies(V1, 2, ready=False), 1, copies(V1, 2), id="unready old ones go at once"),
        pytest.param(RECREATE, copies(V1, 2), 0, copies(V1, 2), id="recreate ends the old ones"),
        pytest.param(RECREATE, copies(V1, 2, going=True), 0, [], id="recreate waits until they are gone"),
        pytest.param(RECREATE, [], 2, [], id="and starts new ones"),
        pytest.param(V1, copies(V1, 1) + copies(V1, 2, phase="Failed")[1:], 1, copies(V1, 2)[1:], id="ended"),
    ],
)
def test_a_deployment_replaces_pods_of_other_templates(
    owner: Object, pods: list[Object], created: int, deleted: list[Object]
) -> None:
    decision = decide_deployment(owner, pods)
    assert len(decision.create) == created
    assert names(decision.delete) == names(deleted)
    assert not set(names(decision.create)) & set(names(pods))


def test_a_deployment_says_whether_it_is_available() -> None:
    def available(decision: Decision) -> str:
        return str(decision.status["conditions"][0]["status"])

    assert available(decide_deployment(V2, copies(V2, 2))) == "True"
    assert available(decide_deployment(V2, copies(V2, 1))) == "False"


async def test_workloads_in_the_store_get_their_pods_and_lose_them_again() -> None:
    store = Store()
    obj = workload("StatefulSet", 2)
    del obj["metadata"]["uid"]
    await store.apply(obj)
    await control_once(store)
    pods = await store.list(POD, "ns")
    assert names(pods) == ["w-0", "w-1"]
    for pod in pods:
        store.set_status(pod, {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]})
    await control_once(store)
    stored = await store.get(STATEFUL_SET, "ns", "w")
    assert stored is not None
    assert stored["status"]["readyReplicas"] == 2
    version = store.version
    await control_once(store)
    assert store.version == version
    await store.apply({**obj, "spec": {**obj["spec"], "replicas": 1}})
    await control_once(store)
    assert [is_ready(pod) for pod in await store.list(POD, "ns")] == [True, False]
