"""What to do next, from what there is and what is wanted. Pure: the same input gives the same plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from broadbeam_crds.gateway_config import FileEndpoints
from broadbeam_crds.v1alpha1 import Rollout, ServingCluster
from broadbeam_operator import pods
from broadbeam_operator.cluster import CONFIG_MAP, STATEFUL_SET, Object
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


@dataclass(frozen=True, slots=True)
class Turns:
    """Which groups stop serving now, and which wait for others to be back."""

    replace: Sequence[Group]  # all their pods are deleted, and come back at the wanted revision
    resize: Sequence[Group]  # their StatefulSets take another number of pods
    held: Collection[str]  # StatefulSets that keep theirs for now


def plan(
    seen: Observed, wanted: ServingCluster, images: Images, endpoints: FileEndpoints | None = None
) -> Plan:
    """`endpoints` is where the gateway finds the ranks without Kubernetes."""
    desired = {reference(obj): obj for obj in manifests(wanted, images, endpoints)}
    live = seen.children
    now = turns(groups(seen), wanted)
    held = {(STATEFUL_SET, name) for name in now.held}
    return Plan(
        create=[obj for key, obj in desired.items() if key not in live],
        apply=[
            obj
            for key, obj in desired.items()
            if key in live and key not in held and must_apply(obj, live[key])
        ],
        prune=prunable(seen, desired),
        replace=[pod for group in now.replace for pod in group.pods],
        gates=gates(seen, closing={group.name for group in now.resize}),
        replacing=[group.name for group in now.replace],
    )


def idle_plan(seen: Observed) -> Plan:
    """For a spec that cannot be built: what runs keeps running, and stays routable or not as it is."""
    return Plan(gates=gates(seen))


def gates(seen: Observed, closing: Collection[str] = ()) -> list[tuple[Object, bool]]:
    return [gate for group in groups(seen) for gate in group.gates(group.name in closing)]


def turns(found: Iterable[Group], wanted: ServingCluster) -> Turns:
    """A group that serves nothing takes its turn at once. One that serves does only while fewer than
    rollout.maxUnavailable groups of its pool are missing.

    Another number of pods breaks a group as soon as its StatefulSet has it, so that waits for the turn; the
    pods then no longer match, and are replaced as those of any group that serves nothing.
    """
    by_pool: dict[str, list[Group]] = defaultdict(list)
    for group in found:
        by_pool[group.pool].append(group)
    replace: list[Group] = []
    resize: list[Group] = []
    held: set[str] = set()
    for pool in wanted.spec.pools:
        members = [group for group in by_pool[pool.name] if group.index < pool.groups]
        resized = {group.name for group in members if group.nodes != pool.parallelism.nodes}
        due = [group for group in members if group.name in resized or (group.outdated and group.settled)]
        serving = [group for group in due if group.ready]
        missing = pool.groups - sum(group.ready for group in members)
        free = max(0, may_be_missing(wanted.spec.rollout, pool.groups) - missing)
        waiting = {group.name for group in serving[free:]}
        taken = [group for group in due if group.name not in waiting]
        replace += [group for group in taken if group.name not in resized]
        resize += [group for group in taken if group.name in resized]
        held |= waiting & resized
    return Turns(replace, resize, held)


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
