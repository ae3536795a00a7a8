"""What to do next, from what there is and what is wanted. Pure: the same input gives the same plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from broadbeam_crds.gateway_config import FileEndpoints
from broadbeam_crds.v1alpha1 import Rollout, ServingCluster
from broadbeam_operator import pods
from broadbeam_operator.cluster import CONFIG_MAP, Object
from broadbeam_operator.drift import must_apply
from broadbeam_operator.groups import Group, groups
from broadbeam_operator.images import Images
from broadbeam_operator.manifests import manifests
from broadbeam_operator.observe import Observed, Reference, reference


@dataclass(frozen=True, slots=True)
class Plan:
    create: Sequence[Object] = ()  # children that there are not
    apply: Sequence[Object] = ()  # changed children
    prune: Sequence[Object] = ()  # children that are no longer wanted
    replace: Sequence[Object] = ()  # pods of groups that are to start anew
    gates: Sequence[tuple[Object, bool]] = ()  # pods and the readiness gate to set
    replacing: Sequence[str] = field(default=())  # names of the groups whose pods are in `replace`

    @property
    def changes(self) -> int:
        return len(self.create) + len(self.apply) + len(self.prune) + len(self.replace)


def plan(
    seen: Observed, wanted: ServingCluster, images: Images, endpoints: FileEndpoints | None = None
) -> Plan:
    """`endpoints` is where the gateway finds the ranks without Kubernetes."""
    desired = {reference(obj): obj for obj in manifests(wanted, images, endpoints)}
    live = seen.children
    replaced = replacements(groups(seen), wanted)
    return Plan(
        create=[obj for key, obj in desired.items() if key not in live],
        apply=[obj for key, obj in desired.items() if key in live and must_apply(obj, live[key])],
        prune=prunable(seen, desired),
        replace=[pod for group in replaced for pod in group.pods],
        gates=gates(seen),
        replacing=[group.name for group in replaced],
    )


def idle_plan(seen: Observed) -> Plan:
    """For a spec that cannot be built: what runs keeps running, and stays routable or not as it is."""
    return Plan(gates=gates(seen))


def gates(seen: Observed) -> list[tuple[Object, bool]]:
    return [gate for group in groups(seen) for gate in group.gates]


def replacements(found: Iterable[Group], wanted: ServingCluster) -> list[Group]:
    """Groups whose pods are all to be deleted, so that they come back at the wanted revision.

    A group that serves nothing goes at once. One that serves goes only while fewer than
    rollout.maxUnavailable groups of its pool are missing.
    """
    by_pool: dict[str, list[Group]] = defaultdict(list)
    for group in found:
        by_pool[group.pool].append(group)
    chosen: list[Group] = []
    for pool in wanted.spec.pools:
        members = [group for group in by_pool[pool.name] if group.index < pool.groups]
        outdated = [group for group in members if group.outdated and group.settled]
        idle = [group for group in outdated if not group.ready]
        serving = [group for group in outdated if group.ready]
        missing = pool.groups - sum(group.ready for group in members)
        allowed = may_be_missing(wanted.spec.rollout, pool.groups)
        chosen += idle + serving[: max(0, allowed - missing)]
    return chosen


def may_be_missing(rollout: Rollout, groups: int) -> int:
    """Groups of a pool of `groups` that may serve nothing during a change: at least one, or none could."""
    return max(1, rollout.max_unavailable.of(groups, round_up=False))


def prunable(seen: Observed, desired: Mapping[Reference, Object]) -> list[Object]:
    """Children that are not wanted, save configs that a pod still has mounted."""
    mounted = mounted_configs(seen.pods)
    return [
        obj
        for key, obj in seen.children.items()
        if key not in desired and not pods.leaving(obj) and not (key[0] == CONFIG_MAP and key[1] in mounted)
    ]


def mounted_configs(found: Iterable[Object]) -> set[str]:
    return {
        volume["configMap"]["name"]
        for pod in found
        for volume in pod["spec"].get("volumes") or ()
        if "configMap" in volume
    }
