from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broadbeam_operator.cluster import CONFIG_MAP, POD, SERVICE, STATEFUL_SET, ClusterError, Object
from broadbeam_operator.local.store import Store, merge_conditions

NS = "ns"


def stateful_set(name: str = "a", **spec: Any) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "namespace": NS, "labels": {"cluster": "c"}},
        "spec": {"replicas": 1, "serviceName": name, "selector": {}, **spec},
    }


def config_map(name: str, owner: Object | None = None, **fields: Any) -> Object:
    owners = {"ownerReferences": [{"uid": owner["metadata"]["uid"]}]} if owner else {}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": NS, **owners},
        **fields,
    }


def pod(name: str, owner: Object | None = None) -> Object:
    return {**config_map(name, owner), "kind": "Pod", "spec": {}}


async def test_apply_creates_then_changes_and_only_a_changed_spec_bumps_the_generation() -> None:
    store = Store()
    first = await store.apply(stateful_set())
    version = store.version
    again = await store.apply(stateful_set())
    assert (again, store.version) == (first, version)
    labelled = await store.apply(
        stateful_set() | {"metadata": {"name": "a", "namespace": NS, "labels": {"x": "y"}}}
    )
    assert labelled["metadata"]["generation"] == 1
    assert labelled["metadata"]["labels"] == {"x": "y"}
    changed = await store.apply(stateful_set(replicas=2))
    assert changed["metadata"]["generation"] == 2
    assert changed["metadata"]["uid"] == first["metadata"]["uid"]
    assert int(changed["metadata"]["resourceVersion"]) > int(first["metadata"]["resourceVersion"])


async def test_apply_removes_what_it_once_set_and_keeps_what_others_set() -> None:
    store = Store()
    before = await store.apply(stateful_set(template={"a": 1, "b": 2}))
    store.set_status(before, {"readyReplicas": 1})
    after = await store.apply(stateful_set(template={"a": 1}))
    assert after["spec"]["template"] == {"a": 1}
    assert after["status"] == {"readyReplicas": 1}


async def test_a_status_apply_is_the_whole_of_ours_and_leaves_other_conditions_to_their_owners() -> None:
    store = Store()
    obj = await store.apply(stateful_set())
    await store.apply_status(STATEFUL_SET, NS, "a", {"url": "u", "pools": [1]})
    await store.apply_status(STATEFUL_SET, NS, "a", {"pools": [2]})
    stored = await store.get(STATEFUL_SET, NS, "a")
    assert stored is not None
    assert stored["status"] == {"pools": [2]}
    assert stored["metadata"]["generation"] == obj["metadata"]["generation"]
    await store.apply_status(STATEFUL_SET, NS, "gone", {"pools": [2]})


async def test_pod_conditions_of_node_and_operator_live_side_by_side() -> None:
    store = Store()
    made = store.create(pod("p"))
    store.set_status(made, {"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}]})
    await store.patch_pod_condition(NS, "p", {"type": "gate", "status": "True"})
    store.set_status(made, {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]})
    stored = await store.get(POD, NS, "p")
    assert stored is not None
    assert stored["status"]["conditions"] == [
        {"type": "Ready", "status": "True"},
        {"type": "gate", "status": "True"},
    ]
    assert stored["status"]["phase"] == "Running"


def test_conditions_merge_by_type() -> None:
    before = [{"type": "a", "status": "1"}, {"type": "b", "status": "1"}]
    merged = merge_conditions(before, [{"type": "b", "status": "2"}, {"type": "c", "status": "2"}])
    assert [(c["type"], c["status"]) for c in merged] == [("a", "1"), ("b", "2"), ("c", "2")]


async def test_lists_select_by_labels_and_namespace() -> None:
    store = Store()
    await store.apply(stateful_set("b"))
    await store.apply(stateful_set("a"))
    await store.apply({**stateful_set("x"), "metadata": {"name": "x", "namespace": "other"}})
    names = [obj["metadata"]["name"] for obj in await store.list(STATEFUL_SET, None)]
    assert sorted(names) == ["a", "b", "x"]
    assert len(await store.list(STATEFUL_SET, NS, {"cluster": "c"})) == 2
    assert await store.list(STATEFUL_SET, NS, {"cluster": "d"}) == []
    assert await store.list(SERVICE, NS) == []


async def test_deleting_an_owner_deletes_what_it_owns_and_pods_gracefully() -> None:
    store = Store()
    owner = await store.apply(stateful_set())
    child = await store.apply(config_map("child", owner))
    await store.apply(config_map("grandchild", child))
    await store.apply(config_map("stranger"))
    store.create(pod("p", owner))
    assert await store.delete(STATEFUL_SET, NS, "a")
    assert [obj["metadata"]["name"] for obj in await store.list(CONFIG_MAP, NS)] == ["stranger"]
    (going,) = await store.list(POD, NS)
    assert "deletionTimestamp" in going["metadata"]
    store.remove(going)
    assert await store.list(POD, NS) == []
    assert not await store.delete(STATEFUL_SET, NS, "a")


async def test_deleting_by_uid_spares_another_of_that_name() -> None:
    store = Store()
    await store.apply(stateful_set())
    assert not await store.delete(STATEFUL_SET, NS, "a", uid="of an earlier one")
    assert await store.get(STATEFUL_SET, NS, "a")


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        pytest.param(
            config_map("m", immutable=True, data={"a": "1"}),
            config_map("m", immutable=True, data={"a": "2"}),
            "ConfigMap 'm': data is immutable",
            id="immutable ConfigMap",
        ),
        pytest.param(
            stateful_set(serviceName="s"),
            stateful_set(serviceName="t"),
            "StatefulSet 'a': spec.serviceName is immutable",
            id="service of a StatefulSet",
        ),
    ],
)
async def test_what_kubernetes_refuses_to_change_is_refused(
    first: Object, then: Object, message: str
) -> None:
    store = Store()
    await store.apply(first)
    with pytest.raises(ClusterError, match=message) as caught:
        await store.apply(then)
    assert caught.value.status == 422


async def test_a_waiter_wakes_with_the_next_change_and_not_before() -> None:
    store = Store()
    seen = store.version
    waiter = asyncio.create_task(store.changed(seen))
    await asyncio.sleep(0)
    assert not waiter.done()
    await store.apply(stateful_set())
    assert await waiter > seen
    assert await store.changed(store.version, timeout_s=0.01) == store.version


async def test_events_tell_whom_they_regard() -> None:
    store = Store()
    obj = await store.apply(stateful_set())
    await store.emit_event(obj, "Warning", "Crashed", "exit 1")
    (event,) = store.events
    assert (event.regarding, event.reason, event.message) == ("StatefulSet/a", "Crashed", "exit 1")


async def test_what_a_reader_does_to_its_copy_stays_there() -> None:
    store = Store()
    (await store.apply(stateful_set()))["spec"]["replicas"] = 9
    stored = await store.get(STATEFUL_SET, NS, "a")
    assert stored is not None
    assert stored["spec"]["replicas"] == 1
