"""The operator may be killed between any two writes: the next one goes on from what it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator.cluster import CHILD_KINDS, POD, Object
from broadbeam_operator.groups import groups
from broadbeam_operator.kv_effect import KVWatch
from broadbeam_operator.local.controllers import control_once
from broadbeam_operator.observe import observe
from broadbeam_operator.pods import revision
from broadbeam_operator.reconcile import Operator

pytestmark = pytest.mark.slow

WRITES = ("apply", "delete", "apply_status", "patch_pod_condition", "emit_event")
ROUNDS = 40


class KilledError(Exception):
    """Nothing of the operator catches this."""


class Mortal:
    """The cluster as an operator sees it that is killed before the write after the first `left`."""

    def __init__(self, store: Any, left: int) -> None:
        self._store = store
        self._left = left

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return self._counted(found) if name in WRITES else found

    def _counted(self, write: Callable[..., Any]) -> Callable[..., Any]:
        async def counted(*args: Any, **kwargs: Any) -> Any:
            if self._left == 0:
                raise KilledError
            self._left -= 1
            return await write(*args, **kwargs)

        return counted


def cluster(**fields: Any) -> ServingCluster:
    return serving_cluster(pools=[pool("both", **({"groups": 2, "data": 2} | fields))])


async def become(world: Any, wanted: ServingCluster, serving: int, killed_after: int | None = None) -> bool:
    """Until nothing changes any more; never do fewer than `serving` groups serve. Whether it was killed."""
    await world.put(wanted)
    killed = False
    if killed_after is not None:
        mortal: Any = Mortal(world.store, killed_after)
        world.operator = Operator(mortal, KVWatch(world.meter, every_s=0), now=world.operator.now)
    for _ in range(ROUNDS):
        before = world.store.version
        try:
            await world.once()
        except KilledError:
            killed = True
            world.restart()
            continue
        await control_once(world.store)
        world.run_pods()
        seen = await observe(world.store, "default", "demo")
        assert sum(group.ready for group in groups(seen)) >= serving
        if world.store.version == before:
            return killed
    raise AssertionError(f"does not settle in {ROUNDS} rounds")


def shown(world: Any) -> Object:
    """What there is, without what differs from run to run."""
    found: Object = {kind.kind: sorted(world.names(kind)) for kind in CHILD_KINDS}
    pods = sorted((pod["metadata"]["name"], revision(pod)) for pod in world.store.select(POD))
    return {**found, "pods": pods}


@pytest.mark.parametrize(
    ("before", "after", "serving"),
    [
        pytest.param(None, cluster(), 0, id="made"),
        pytest.param(cluster(nodes=2), cluster(), 1, id="put into fewer pods"),
        pytest.param(serving_cluster(), cluster(), 0, id="of other pools"),
    ],
)
async def test_a_change_survives_a_kill_before_any_write(before, after, serving, make_world):
    found: list[Object] = []
    killed = True
    while killed:
        world = make_world()
        if before is not None:
            await become(world, before, serving=0)
        killed = await become(world, after, serving, killed_after=len(found))
        assert (await world.status())["summary"]["state"] == "Available"
        found.append(shown(world))
    assert len(found) > 5
    # The last one was not killed.
    assert [each for each in found if each != found[-1]] == []
