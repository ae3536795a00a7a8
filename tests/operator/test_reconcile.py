"""Passes over a ServingCluster in a world without a network: what is written, and when it stops."""

from __future__ import annotations

import pytest

from broadbeam_crds.conventions import LABEL_POOL
from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_operator.cluster import CHILD_KINDS, CONFIG_MAP, POD, SERVICE, SERVING_CLUSTER, STATEFUL_SET
from broadbeam_operator.groups import groups
from broadbeam_operator.kv_effect import Tokens
from broadbeam_operator.local.controllers import control_once
from broadbeam_operator.observe import observe
from broadbeam_operator.pods import is_ready

BOTH = {LABEL_POOL: "both"}
KEEPER = {"name": "keeper", "namespace": "default"}


async def test_a_new_cluster_becomes_available(world):
    await world.put(serving_cluster())
    await world.settle()
    assert (await world.status())["summary"] == {"prefill": "1/1", "decode": "1/1", "state": "Available"}
    assert await world.condition("Available") == ("True", "Ready")
    assert await world.condition("Progressing") == ("False", "Complete")
    assert await world.condition("Degraded") == ("False", "Healthy")
    assert await world.condition("GatewayReady") == ("True", "Ready")


async def test_a_steady_cluster_is_left_alone(world):
    await world.put(serving_cluster(pools=[pool("prefill", groups=2), pool("decode", data=4, nodes=2)]))
    await world.settle()
    world.store.writes.clear()
    for _ in range(5):
        await world.once()
    assert world.store.writes == []


async def test_a_restarted_operator_writes_nothing_again(world):
    await world.put(serving_cluster())
    await world.settle()
    world.store.writes.clear()
    events = len(world.store.events)
    world.restart()
    await world.once()
    assert world.store.writes == []
    assert len(world.store.events) == events


async def test_an_unknown_cluster_is_nothing_to_do(world):
    assert await world.once() is None


async def test_deleting_the_cluster_leaves_nothing(world):
    await world.put(serving_cluster())
    await world.settle()
    await world.store.delete(SERVING_CLUSTER, "default", "demo")
    world.run_pods()
    assert await world.once() is None
    left = [name for kind in (*CHILD_KINDS, POD) for name in world.names(kind)]
    assert left == []


async def test_no_finalizer_holds_the_cluster_back(world):
    await world.put(serving_cluster())
    await world.settle()
    for kind in (SERVING_CLUSTER, *CHILD_KINDS):
        assert [obj for obj in world.store.select(kind) if obj["metadata"].get("finalizers")] == []


async def test_a_group_is_routable_only_when_all_its_pods_are(world):
    await world.put(serving_cluster(pools=[pool("both", data=4, nodes=2)]))
    await world.settle(broken=["demo-both-0-1"])
    assert (await world.status())["pools"][0]["readyGroups"] == 0
    ready = [
        each["status"]
        for pod in world.store.select(POD)
        for each in pod["status"]["conditions"]
        if each["type"] == "Ready" and "both" in pod["metadata"]["name"]
    ]
    assert ready == ["False", "False"]
    await world.settle()
    assert (await world.status())["pools"][0]["readyGroups"] == 1


async def test_a_lost_pod_closes_the_gates_of_its_group_only(world):
    await world.put(serving_cluster(pools=[pool("both", groups=2, data=4, nodes=2)]))
    await world.settle()
    world.store.writes.clear()
    await world.settle(broken=["demo-both-1-0"])
    gates = sorted(each for each in world.store.writes if each.startswith("gate"))
    assert gates == ["gate demo-both-1-0 False", "gate demo-both-1-1 False"]
    assert await world.condition("Available") == ("True", "Ready")


async def test_scaling_up_and_down_adds_and_removes_groups(world):
    await world.put(serving_cluster(pools=[pool("both", groups=1)]))
    await world.settle()
    await world.put(serving_cluster(pools=[pool("both", groups=3)]))
    await world.settle()
    assert world.names(STATEFUL_SET) == ["demo-both-0", "demo-both-1", "demo-both-2"]
    await world.put(serving_cluster(pools=[pool("both", groups=2)]))
    await world.settle()
    assert world.names(STATEFUL_SET) == ["demo-both-0", "demo-both-1"]
    assert [name for name in world.pod_names() if "both" in name] == ["demo-both-0-0", "demo-both-1-0"]


async def test_scaling_does_not_touch_the_groups_that_stay(world):
    await world.put(serving_cluster(pools=[pool("both", groups=2)]))
    await world.settle()
    uids = {pod["metadata"]["uid"] for pod in world.store.select(POD)}
    await world.put(serving_cluster(pools=[pool("both", groups=3)]))
    await world.settle()
    assert uids <= {pod["metadata"]["uid"] for pod in world.store.select(POD)}


async def test_a_removed_pool_is_pruned_with_its_config(world):
    await world.put(serving_cluster())
    await world.settle()
    await world.put(serving_cluster(pools=[pool("decode", role="both")]))
    await world.settle()
    left = [name for kind in (*CHILD_KINDS, POD) for name in world.names(kind) if "prefill" in name]
    assert left == []


async def test_a_config_is_kept_while_a_pod_has_it_mounted(world):
    await world.put(serving_cluster(pools=[pool("both")]))
    await world.settle()
    old = [name for name in world.names(CONFIG_MAP) if name.startswith("demo-both")]
    await world.put(serving_cluster(pools=[pool("both", scheduling={"streamInterval": 4})]))
    await world.once()
    assert set(old) < {name for name in world.names(CONFIG_MAP) if name.startswith("demo-both")}
    await world.settle()
    assert not set(old) & set(world.names(CONFIG_MAP))


async def test_a_change_replaces_groups_one_at_a_time(world):
    await world.put(serving_cluster(pools=[pool("both", groups=3, data=4, nodes=2)]))
    await world.settle()
    await world.put(
        serving_cluster(pools=[pool("both", groups=3, data=4, nodes=2, scheduling={"maxSequences": 8})])
    )
    world.store.writes.clear()
    await world.settle()
    deleted = [each.split()[-1] for each in world.store.writes if each.startswith("delete Pod")]
    assert deleted == [f"demo-both-{group}-{node}" for group in range(3) for node in range(2)]
    assert (await world.status())["pools"][0]["updatedGroups"] == 3


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (2, 2), ("75%", 3)], ids=["one", "two", "a share"])
async def test_a_change_takes_as_many_groups_as_it_may_and_no_more(world, limit, most):
    def rolled(**fields):
        return serving_cluster(pools=[pool("both", groups=4, **fields)], rollout={"maxUnavailable": limit})

    await world.put(rolled())
    await world.settle()
    await world.put(rolled(scheduling={"maxSequences": 8}))
    missing = []
    for _ in range(40):
        await world.once()
        await control_once(world.store)
        world.run_pods()
        missing.append(4 - sum(is_ready(each) for each in world.store.select(POD, labels=BOTH)))
    assert max(missing) == most
    assert (await world.status())["pools"][0]["updatedGroups"] == 4
    assert missing[-1] == 0


@pytest.mark.parametrize(("before", "after"), [((2, 1), (2, 2)), ((4, 2), (2, 1))], ids=["wider", "narrower"])
async def test_another_number_of_pods_takes_one_group_at_a_time(world, before, after):
    def sized(data, nodes):
        return serving_cluster(pools=[pool("both", groups=3, data=data, nodes=nodes)])

    await world.put(sized(*before))
    await world.settle()
    await world.put(sized(*after))
    missing = []
    for _ in range(40):
        await world.once()
        await control_once(world.store)
        world.run_pods()
        missing.append(
            3 - sum(group.ready for group in groups(await observe(world.store, "default", "demo")))
        )
    assert max(missing) == 1
    assert missing[-1] == 0
    assert (await world.status())["pools"][0]["updatedGroups"] == 3
    assert len(world.store.select(POD, labels=BOTH)) == 3 * after[1]


async def test_a_change_that_does_not_start_stops_at_the_first_group(world):
    await world.put(serving_cluster(pools=[pool("both", groups=3)]))
    await world.settle()
    await world.put(serving_cluster(pools=[pool("both", groups=3, scheduling={"maxSequences": 8})]))
    world.store.writes.clear()
    await world.settle(broken=["demo-both-0"])
    assert [each for each in world.store.writes if each.startswith("delete Pod")] == [
        "delete Pod demo-both-0-0"
    ]
    assert (await world.status())["pools"][0]["readyGroups"] == 2
    assert await world.condition("Available") == ("True", "Ready")


async def test_a_corrected_change_replaces_the_broken_group_at_once(world):
    await world.put(serving_cluster(pools=[pool("both", groups=2)]))
    await world.settle()
    await world.put(serving_cluster(pools=[pool("both", groups=2, scheduling={"maxSequences": 8})]))
    await world.settle(broken=["demo-both-0"])
    await world.put(serving_cluster(pools=[pool("both", groups=2, scheduling={"maxSequences": 9})]))
    await world.settle()
    assert (await world.status())["summary"]["state"] == "Available"


async def test_drift_is_repaired(world):
    await world.put(serving_cluster(pools=[pool("both")]))
    await world.settle()
    live = world.workload("demo-both-0")
    live["spec"]["replicas"] = 5
    world.store._replace(("statefulsets", "default", "demo-both-0"), live)
    await world.settle()
    assert world.workload("demo-both-0")["spec"]["replicas"] == 1


async def test_a_refused_change_touches_no_child(world):
    await world.put(serving_cluster(pools=[pool("both")]))
    await world.settle()
    world.store.writes.clear()
    await world.put(serving_cluster(pools=[pool("both", autoscaling={"minGroups": 1, "maxGroups": 4})]))
    await world.settle()
    assert await world.condition("Accepted") == ("False", "Refused")
    assert (await world.status())["summary"]["state"] == "Refused"
    assert (await world.status())["pools"][0]["readyGroups"] == 1
    assert [each for each in world.store.writes if not each.startswith("status")] == []


async def test_a_refused_cluster_says_everything_that_is_wrong(world):
    await world.put(
        serving_cluster(
            pools=[pool("both", autoscaling={"minGroups": 1, "maxGroups": 4}, template={"specs": {}})]
        )
    )
    await world.settle()
    message = next(each for each in (await world.status())["conditions"] if each["type"] == "Accepted")[
        "message"
    ]
    assert "spec.pools[both].autoscaling" in message
    assert "spec.pools[both].template.specs: unknown field" in message


async def test_a_refusal_fits_its_condition_however_much_is_wrong(world):
    pools = [
        pool(f"p{i}", "both", autoscaling={"maxGroups": 9}, template={"z" * 9999: {}}) for i in range(16)
    ]
    await world.put(serving_cluster(pools=pools))
    await world.once()
    assert await world.condition("Accepted") == ("False", "Refused")
    message = next(each for each in (await world.status())["conditions"] if each["type"] == "Accepted")[
        "message"
    ]
    assert "spec.pools[p0].autoscaling" in message
    assert message.endswith(" and 16 more")


async def test_a_spec_of_another_version_is_refused_in_one_line(world):
    wire = serving_cluster().wire()
    wire["spec"]["pools"][0]["future"] = 1
    meta = {"name": "demo", "namespace": "default"}
    await world.store.apply({**wire, "metadata": meta})
    await world.once()
    condition = next(each for each in (await world.status())["conditions"] if each["type"] == "Accepted")
    assert condition["message"] == "spec.pools[prefill].future: unknown field"


async def test_a_refused_write_is_reported_and_tried_again(world):
    world.store.refuse = {("StatefulSet", "demo-both-0")}
    await world.put(serving_cluster(pools=[pool("both")]))
    done = await world.once()
    assert done is not None
    assert done.error == "admission webhook said no"
    assert await world.condition("Progressing") == ("True", "ApplyFailed")
    world.store.refuse = set()
    await world.settle()
    assert (await world.status())["summary"]["state"] == "Available"


async def progressing(world, name="demo"):
    found = await world.store.get(SERVING_CLUSTER, "default", name)
    return next(each for each in found["status"]["conditions"] if each["type"] == "Progressing")


async def test_a_cluster_never_takes_what_another_one_has(world):
    await world.put(serving_cluster("a", pools=[pool("b-c", "both")]))
    await world.once("a")
    before = world.store.select(STATEFUL_SET)
    await world.put(serving_cluster("a-b", pools=[pool("c", "both")]))
    done = await world.once("a-b")
    assert done is not None
    assert world.store.select(STATEFUL_SET) == before
    found = await progressing(world, "a-b")
    assert (found["status"], found["reason"]) == ("True", "NameTaken")
    assert found["message"] == done.error
    assert "a-b-c" in done.error
    assert 'of this cluster belongs to ServingCluster "a"; rename the cluster or its pool' in done.error
    await world.store.delete(SERVING_CLUSTER, "default", "a")
    await world.once("a-b")
    assert (await progressing(world, "a-b"))["reason"] != "NameTaken"
    assert world.names(STATEFUL_SET) == ["a-b-c-0"]


async def test_an_object_that_a_person_made_is_not_taken_over(world):
    meta = {"name": "demo-gateway", "namespace": "default"}
    theirs = world.store.create({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {}})
    await world.put(serving_cluster())
    await world.once()
    assert (await progressing(world))["message"] == (
        'metadata.name: Service "demo-gateway" of this cluster is there already and not ours; delete it, or '
        "rename the cluster"
    )
    assert theirs in world.store.select(SERVICE)


async def test_a_cluster_waits_for_the_objects_of_an_earlier_one_of_its_name_to_go(world):
    await world.put(serving_cluster())
    await world.once()
    keeper = world.store.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": KEEPER})
    old = world.store.select(STATEFUL_SET)[0]
    old["metadata"]["ownerReferences"].append({"uid": keeper["metadata"]["uid"]})  # so that it stays a while
    world.store._replace(("statefulsets", "default", old["metadata"]["name"]), old)
    await world.store.delete(SERVING_CLUSTER, "default", "demo")
    await world.put(serving_cluster())
    await world.once()
    assert "is still that of an earlier one of its name" in (await progressing(world))["message"]
    world.store.remove(keeper)
    await world.settle()
    assert (await world.status())["summary"]["state"] == "Available"


async def test_what_has_lost_its_label_is_still_ours(world):
    await world.put(serving_cluster())
    await world.settle()
    live = world.workload("demo-decode-0")
    live["metadata"]["labels"] = {}
    world.store._replace(("statefulsets", "default", "demo-decode-0"), live)
    await world.settle()
    assert world.workload("demo-decode-0")["metadata"]["labels"]


async def test_events_tell_the_story_once(world):
    await world.put(serving_cluster(pools=[pool("both")]))
    await world.settle()
    assert [event.reason for event in world.store.events] == [
        "Accepted",
        "Progressing",
        "Available",
        "Complete",
    ]


@pytest.mark.parametrize(
    ("tokens", "outcome"),
    [
        pytest.param(Tokens(0, 0), ("Unknown", "NoTraffic"), id="no traffic"),
        pytest.param(Tokens(500, 12), ("True", "Transferred"), id="transferred"),
        pytest.param(Tokens(0, 500), ("False", "Recomputed"), id="silent recompute"),
        pytest.param(Tokens(0, 5), ("Unknown", "NoTraffic"), id="too little to say"),
    ],
)
async def test_kv_transfer_is_judged_by_the_decode_ranks_counters(world, tokens, outcome):
    world.meter.tokens = tokens
    await world.put(serving_cluster())
    await world.settle()
    await world.once()
    assert await world.condition("KVTransferEffective") == outcome


async def test_without_new_traffic_the_verdict_stays(world):
    world.meter.tokens = Tokens(500, 0)
    await world.put(serving_cluster())
    await world.settle()
    world.restart()
    world.meter.tokens = Tokens()
    await world.once()
    assert await world.condition("KVTransferEffective") == ("True", "Transferred")


async def test_a_cluster_that_is_not_disaggregated_has_no_kv_condition(world):
    await world.put(serving_cluster(pools=[pool("both")]))
    await world.settle()
    assert "KVTransferEffective" not in [each["type"] for each in (await world.status())["conditions"]]
