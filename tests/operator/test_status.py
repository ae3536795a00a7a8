"""What is reported, as a function of what there is: conditions, counts and columns."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator.cluster import DEPLOYMENT, Object, kind_of
from broadbeam_operator.images import Images
from broadbeam_operator.manifests import manifests
from broadbeam_operator.observe import Observed
from broadbeam_operator.plan import Plan, plan
from broadbeam_operator.reconcile import same_status
from broadbeam_operator.status import refused, status, url

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
LATER = datetime(2026, 11, 24, 13, 0, 0, tzinfo=UTC)
TWO = serving_cluster(pools=[pool("prefill", groups=2, data=2), pool("decode", data=4, nodes=2)])


def seen(
    cluster: ServingCluster,
    ready: set[str] | None = None,
    missing: set[str] = frozenset(),
    gateway: int = 1,
    before: Object | None = None,
    **trouble: Object,
) -> Observed:
    """The cluster with all its children; pods whose name begins with one of `ready` are (None: all)."""
    children = {
        (kind_of(obj), obj["metadata"]["name"]): copy.deepcopy(obj) for obj in manifests(cluster, Images())
    }
    pods = []
    for (kind, name), obj in children.items():
        obj["metadata"]["uid"] = f"{kind.kind}-{name}"
        if kind == DEPLOYMENT:
            obj["status"] = {"readyReplicas": gateway}
        elif obj["kind"] == "StatefulSet":
            obj["status"] = {"observedGeneration": 1}
            for node in range(obj["spec"]["replicas"]):
                pods.append(_pod(f"{name}-{node}", obj, ready, trouble))
    kept = [each for each in pods if each["metadata"]["name"] not in missing]
    resource = {**cluster.wire(), "status": before or {}}
    return Observed(resource, children, kept)


def _pod(name: str, workload: Object, ready: set[str] | None, trouble: dict[str, Object]) -> Object:
    good = ready is None or any(name.startswith(prefix) for prefix in ready)
    states = {"ContainersReady": good, "Ready": good, "serving.broadbeam.io/group-ready": good}
    template = workload["spec"]["template"]
    container = {"name": "engine", "ready": good, **trouble.get(name.replace("-", "_"), {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "uid": name,
            "namespace": "default",
            "ownerReferences": [{"kind": "StatefulSet", "uid": workload["metadata"]["uid"]}],
            **copy.deepcopy(template["metadata"]),
        },
        "spec": template["spec"],
        "status": {
            "conditions": [{"type": kind, "status": str(state)} for kind, state in states.items()],
            "containerStatuses": [container],
        },
    }


def report(cluster: ServingCluster, observed: Observed, steps: Plan | None = None, **kwargs: Any) -> Object:
    found = plan(observed, cluster, Images()) if steps is None else steps
    result: Object = status(observed, cluster, found, Images(), kwargs.get("kv"), kwargs.get("now", NOW))
    return result


def conditions(result: Object) -> dict[str, tuple[str, str]]:
    return {each["type"]: (each["status"], each["reason"]) for each in result["conditions"]}


CRASHED = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": {"exitCode": 9}}}


@pytest.mark.parametrize(
    ("world", "columns", "wanted"),
    [
        pytest.param(
            {},
            {"prefill": "2/2", "decode": "1/1", "state": "Available"},
            {"Available": ("True", "Ready"), "Progressing": ("False", "Complete")},
            id="all is well",
        ),
        pytest.param(
            {"ready": set()},
            {"prefill": "0/2", "decode": "0/1", "state": "Progressing"},
            {"Available": ("False", "NoReadyGroup"), "Progressing": ("True", "WaitingForGroups")},
            id="starting",
        ),
        pytest.param(
            {"ready": {"demo-prefill-0", "demo-decode"}},
            {"prefill": "1/2", "decode": "1/1", "state": "Progressing"},
            {"Available": ("True", "Ready"), "Progressing": ("True", "WaitingForGroups")},
            id="one group of two",
        ),
        pytest.param(
            {"ready": {"demo-prefill", "demo-decode-0-0"}},
            {"prefill": "2/2", "decode": "0/1", "state": "Progressing"},
            {"Available": ("False", "NoReadyGroup")},
            id="half a group serves nothing",
        ),
        pytest.param(
            {"missing": {"demo-decode-0-1"}},
            {"prefill": "2/2", "decode": "0/1", "state": "Progressing"},
            {"Available": ("False", "NoReadyGroup")},
            id="a pod is missing",
        ),
        pytest.param(
            {"gateway": 0},
            {"prefill": "2/2", "decode": "1/1", "state": "Progressing"},
            {
                "Available": ("False", "GatewayNotReady"),
                "GatewayReady": ("False", "NoReplicaReady"),
                "Progressing": ("True", "WaitingForGateway"),
            },
            id="no gateway",
        ),
        pytest.param(
            {"ready": {"demo-prefill-0", "demo-decode"}, "demo_prefill_1_0": CRASHED},
            {"prefill": "1/2", "decode": "1/1", "state": "Degraded"},
            {"Available": ("True", "Ready"), "Degraded": ("True", "PodsFailing")},
            id="a group crashes, the others serve",
        ),
    ],
)
def test_conditions_and_columns_follow_from_the_pods(world, columns, wanted):
    result = report(TWO, seen(TWO, **world))
    assert result["summary"] == columns
    assert wanted.items() <= conditions(result).items()


def test_pools_are_counted_in_groups_and_ranks():
    result = report(TWO, seen(TWO, ready={"demo-prefill-0", "demo-decode"}))
    counted = [
        (
            each["name"],
            each["groups"],
            each["readyGroups"],
            each["ranks"],
            each["readyRanks"],
            each["updatedGroups"],
        )
        for each in result["pools"]
    ]
    assert counted == [("prefill", 2, 1, 4, 2, 2), ("decode", 1, 1, 4, 4, 1)]


def test_a_message_names_what_is_waited_for_and_why():
    world = seen(TWO, ready={"demo-prefill-0"}, demo_prefill_1_0=CRASHED)
    found = {each["type"]: each["message"] for each in report(TWO, world)["conditions"]}
    assert found["Progressing"] == (
        "demo-prefill-1-0: CrashLoopBackOff (exit code 9); decode-0: 0 of 2 pods ready"
    )
    assert found["Degraded"] == "demo-prefill-1-0: CrashLoopBackOff (exit code 9)"
    assert found["Available"] == "no ready group in decode"


def test_a_change_in_hand_is_progress():
    result = report(TWO, Observed({**TWO.wire(), "status": {}}, {}, []))
    assert conditions(result)["Progressing"] == ("True", "Applying")


def test_groups_that_start_anew_are_named():
    steps = Plan(replacing=["demo-decode-0"])
    found = {each["type"]: each for each in report(TWO, seen(TWO), steps)["conditions"]}
    assert found["Progressing"]["reason"] == "ReplacingGroups"
    assert found["Progressing"]["message"] == "starting anew: demo-decode-0"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        pytest.param({"pools": [pool("both", groups=0)]}, "ScaledToZero", id="no groups"),
        pytest.param(
            {"pools": [pool("both")], "gateway": {"replicas": 0}}, "GatewayNotReady", id="no gateway"
        ),
    ],
)
def test_scaled_to_zero_is_not_available_but_complete(spec, reason):
    cluster = serving_cluster(**spec)
    found = conditions(report(cluster, seen(cluster, gateway=cluster.spec.gateway.replicas)))
    assert found["Available"] == ("False", reason)
    assert found["Progressing"] == ("False", "Complete")


def test_a_condition_keeps_its_time_while_it_keeps_its_status():
    first = report(TWO, seen(TWO, ready={"demo-prefill"}))
    second = report(TWO, seen(TWO, before=first), now=LATER)
    times = {each["type"]: each["lastTransitionTime"] for each in second["conditions"]}
    assert times["Accepted"] == "2026-11-24T12:00:00Z"
    assert times["Available"] == "2026-11-24T13:00:00Z"


def test_a_refusal_keeps_what_was_known():
    before = report(TWO, seen(TWO))
    result = refused(seen(TWO, before=before), "Refused", ["spec.a: wrong", "spec.b: wrong"], LATER)
    assert result["pools"] == before["pools"]
    assert result["summary"] == {"prefill": "2/2", "decode": "1/1", "state": "Refused"}
    assert conditions(result)["Accepted"] == ("False", "Refused")
    assert conditions(result)["Available"] == ("True", "Ready")
    assert result["conditions"][0]["message"] == "spec.a: wrong; spec.b: wrong"


def test_the_url_is_the_gateways_service():
    cluster = serving_cluster(namespace="team", gateway={"listeners": [{"name": "http", "port": 8443}]})
    assert url(cluster) == "http://demo-gateway.team.svc:8443"


def test_the_order_of_keyed_lists_does_not_matter():
    first = report(TWO, seen(TWO))
    other = {**first, "conditions": first["conditions"][::-1], "pools": first["pools"][::-1]}
    assert same_status(first, other)
    assert not same_status(first, {**first, "url": "http://elsewhere"})
