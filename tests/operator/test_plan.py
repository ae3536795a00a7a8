"""What is to be done next, as a function of what there is."""

from __future__ import annotations

from typing import Any

import pytest

from broadbeam_crds.conventions import (
    ANNOTATION_NODES,
    GROUP_READY_GATE,
    LABEL_GROUP,
    LABEL_POOL,
    LABEL_REVISION,
)
from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_operator import names
from broadbeam_operator.cluster import CONFIG_MAP, STATEFUL_SET, Object, kind_of
from broadbeam_operator.groups import Group, groups
from broadbeam_operator.images import Images
from broadbeam_operator.manifests import manifests
from broadbeam_operator.observe import Observed
from broadbeam_operator.plan import plan, turns

NEW, OLD = "new", "old"


def workload(index: int, nodes: int = 1, revision: str = NEW, generation: int = 1, seen: int = 1) -> Object:
    labels = {LABEL_POOL: "both", LABEL_GROUP: str(index)}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {
            "name": f"demo-both-{index}",
            "uid": f"set-{index}",
            "labels": labels,
            "generation": generation,
        },
        "spec": {
            "replicas": nodes,
            "template": {"metadata": {"labels": labels | {LABEL_REVISION: revision}}},
        },
        "status": {"observedGeneration": seen},
    }


def pod(
    group: int, node: int = 0, revision: str = NEW, ready: bool = True, gate: bool = True, **meta: Any
) -> Object:
    """`ready`: its containers are; `gate`: we have said that its group is."""
    states = {"ContainersReady": ready, GROUP_READY_GATE: gate, "Ready": ready and gate}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"demo-both-{group}-{node}",
            "uid": f"{group}-{node}",
            "ownerReferences": [{"kind": "StatefulSet", "uid": f"set-{group}"}],
            "labels": {LABEL_POOL: "both", LABEL_GROUP: str(group), LABEL_REVISION: revision},
            **meta,
        },
        "spec": {},
        "status": {"conditions": [{"type": kind, "status": str(state)} for kind, state in states.items()]},
    }


def observed(workloads: list[Object], pods: list[Object]) -> Observed:
    children = {(STATEFUL_SET, each["metadata"]["name"]): each for each in workloads}
    return Observed({"metadata": {"name": "demo", "namespace": "default", "uid": "u"}}, children, pods)


LEAVING = {"deletionTimestamp": "2026-11-24T12:00:00Z"}


@pytest.mark.parametrize(
    ("workloads", "pods", "replaced"),
    [
        pytest.param([workload(0), workload(1)], [pod(0), pod(1)], [], id="all as wanted"),
        pytest.param(
            [workload(0), workload(1)], [pod(0, revision=OLD), pod(1, revision=OLD)], [0], id="one at a time"
        ),
        pytest.param(
            [workload(0), workload(1)],
            [pod(0), pod(1, revision=OLD)],
            [1],
            id="the next once the first is ready again",
        ),
        pytest.param(
            [workload(0), workload(1)],
            [pod(0, ready=False), pod(1, revision=OLD)],
            [],
            id="not while the first is starting",
        ),
        pytest.param(
            [workload(0), workload(1)], [pod(1, revision=OLD)], [], id="not while the first is gone"
        ),
        pytest.param(
            [workload(0), workload(1)],
            [pod(0, revision=OLD, ready=False), pod(1, revision=OLD)],
            [0],
            id="first what serves nothing",
        ),
        pytest.param(
            [workload(0), workload(1)],
            [pod(0, revision=OLD, ready=False), pod(1, revision=OLD, ready=False)],
            [0, 1],
            id="all when none is ready",
        ),
        pytest.param(
            [workload(0, generation=2, seen=1), workload(1)],
            [pod(0, revision=OLD), pod(1)],
            [],
            id="not before the controller has seen the change",
        ),
        pytest.param(
            [workload(0), workload(1)],
            [pod(0, revision=OLD, **LEAVING), pod(1, revision=OLD)],
            [],
            id="not while the old pods are leaving",
        ),
        pytest.param(
            [workload(0), workload(1), workload(7)],
            [pod(0), pod(1), pod(7, revision=OLD)],
            [],
            id="never a group that goes away",
        ),
    ],
)
def test_groups_are_replaced_as_a_whole_and_one_at_a_time(workloads, pods, replaced):
    wanted = serving_cluster(pools=[pool("both", groups=2)])
    found = turns(groups(observed(workloads, pods)), wanted).replace
    assert [group.index for group in found] == replaced


def test_a_group_of_two_revisions_is_replaced():
    wanted = serving_cluster(pools=[pool("both", groups=2, data=4, nodes=2)])
    pods = [pod(0, 0), pod(0, 1, revision=OLD), pod(1, 0), pod(1, 1)]
    found = turns(groups(observed([workload(0, nodes=2), workload(1, nodes=2)], pods)), wanted)
    assert [group.index for group in found.replace] == [0]


def test_what_is_left_of_a_group_that_was_made_narrower_serves_nothing():
    left = [pod(0, annotations={ANNOTATION_NODES: "2"}, revision=OLD)]
    (group,) = groups(observed([workload(0, nodes=1)], left))
    assert not group.complete
    assert [open_ for _, open_ in group.gates()] == [False]


def test_a_pod_that_is_a_copy_of_ours_is_nobodys():
    copy = pod(0, revision=OLD, name="debug", ownerReferences=[])
    (group,) = groups(observed([workload(0)], [pod(0), copy]))
    assert group.complete
    assert [each["metadata"]["name"] for each in group.pods] == ["demo-both-0-0"]


@pytest.mark.parametrize(
    ("workloads", "pods", "resized", "held"),
    [
        pytest.param([workload(0), workload(1)], [pod(0), pod(1)], [0], ["demo-both-1"], id="one at a time"),
        pytest.param(
            [workload(0, nodes=2), workload(1)],
            [pod(0), pod(1)],
            [],
            ["demo-both-1"],
            id="not while the first is incomplete",
        ),
        pytest.param(
            [workload(0, nodes=2), workload(1)],
            [pod(0, 0), pod(0, 1), pod(1)],
            [1],
            [],
            id="the next once the first is ready again",
        ),
        pytest.param(
            [workload(0), workload(1)],
            [pod(0, ready=False), pod(1)],
            [0],
            ["demo-both-1"],
            id="first what serves nothing",
        ),
        pytest.param(
            [workload(0), workload(1)],
            [pod(0, ready=False), pod(1, ready=False)],
            [0, 1],
            [],
            id="all when none is ready",
        ),
    ],
)
def test_groups_take_another_number_of_pods_one_at_a_time(workloads, pods, resized, held):
    wanted = serving_cluster(pools=[pool("both", groups=2, data=2, nodes=2)])
    found = turns(groups(observed(workloads, pods)), wanted)
    assert [group.index for group in found.resize] == resized
    assert sorted(found.held) == held
    assert list(found.replace) == []


@pytest.mark.parametrize(
    ("limit", "groups", "ready", "replaced"),
    [
        pytest.param(2, 5, 5, 2, id="a number"),
        pytest.param(2, 5, 4, 1, id="one is missing already"),
        pytest.param(2, 5, 3, 0, id="two are missing already"),
        pytest.param("50%", 5, 5, 2, id="a share is rounded down"),
        pytest.param("10%", 5, 5, 1, id="but not to nothing"),
        pytest.param("100%", 5, 5, 5, id="all at once"),
        pytest.param(9, 3, 3, 3, id="more than there are"),
    ],
)
def test_no_more_groups_are_missing_than_the_rollout_allows(limit, groups, ready, replaced):
    wanted = serving_cluster(pools=[pool("both", groups=groups)], rollout={"maxUnavailable": limit})
    pods = [pod(each, revision=OLD if each < ready else NEW, ready=each < ready) for each in range(groups)]
    found = turns(groups_of(pods), wanted).replace
    assert len(found) == replaced
    assert all(group.ready for group in found)


def groups_of(pods: list[Object]) -> list[Group]:
    return groups(observed([workload(each) for each in range(len(pods))], pods))


@pytest.mark.parametrize(
    ("pods", "gates"),
    [
        pytest.param([pod(0, 0, gate=False), pod(0, 1, gate=False)], [True, True], id="complete: open"),
        pytest.param([pod(0, 0), pod(0, 1)], [], id="complete and open: nothing to do"),
        pytest.param([pod(0, 0), pod(0, 1, ready=False)], [False, False], id="a rank is lost: close"),
        pytest.param([pod(0, 0)], [False], id="a pod is missing: close"),
        pytest.param([pod(0, 0), pod(0, 1, **LEAVING)], [False], id="a pod is leaving: close the other"),
        pytest.param([pod(0, 0), pod(0, 1, revision=OLD)], [False, False], id="two revisions: close"),
        pytest.param(
            [pod(0, 0, ready=False, gate=False), pod(0, 1, gate=False)], [], id="starting: as it is"
        ),
    ],
)
def test_gates_open_and_close_for_the_whole_group(pods, gates):
    (group,) = groups(observed([workload(0, nodes=2)], pods))
    assert [open_ for _, open_ in group.gates()] == gates


def test_a_pod_that_has_no_gate_yet_gets_a_closed_one():
    new = pod(0, ready=False)
    new["status"]["conditions"] = []
    (group,) = groups(observed([workload(0)], [new]))
    assert [open_ for _, open_ in group.gates()] == [False]


def live(wanted: list[Object]) -> dict[Any, Object]:
    """The objects as the API server holds them."""
    return {
        (kind_of(each), each["metadata"]["name"]): {**each, "metadata": {**each["metadata"], "uid": "u"}}
        for each in wanted
    }


def test_a_fresh_cluster_applies_everything():
    cluster = serving_cluster()
    wanted = manifests(cluster, Images())
    steps = plan(observed([], []), cluster, Images())
    assert list(steps.create) == wanted
    assert (list(steps.apply), list(steps.prune), list(steps.replace)) == ([], [], [])


def test_only_what_has_changed_is_applied():
    before, after = (serving_cluster(gateway={"replicas": count}) for count in (2, 3))
    seen = observed([], [])
    seen = Observed(seen.resource, live(manifests(before, Images())), [])
    steps = plan(seen, after, Images())
    assert [(each["kind"], each["metadata"]["name"]) for each in steps.apply] == [
        ("Deployment", "demo-gateway")
    ]


def test_what_is_no_longer_wanted_is_pruned_save_mounted_configs():
    before, after = serving_cluster(), serving_cluster(pools=[pool("decode", role="both")])
    children = live(manifests(before, Images()))
    mounted = next(name for kind, name in children if kind == CONFIG_MAP and name.startswith("demo-prefill"))
    using = pod(0, **LEAVING)
    using["metadata"]["labels"] |= names.cluster_labels("demo")
    using["spec"] = {"volumes": [{"name": "config", "configMap": {"name": mounted}}]}
    steps = plan(Observed(observed([], []).resource, children, [using]), after, Images())
    pruned = {each["metadata"]["name"] for each in steps.prune}
    assert {"demo-prefill-0", "demo-prefill"} <= pruned
    assert mounted not in pruned
