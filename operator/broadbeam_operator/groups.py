"""Groups as they are: which pods each has, and what may be said about it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from broadbeam_crds.conventions import GROUP_READY_GATE, LABEL_COMPONENT, LABEL_GROUP, LABEL_POOL
from broadbeam_operator import names, pods
from broadbeam_operator.cluster import STATEFUL_SET, Object
from broadbeam_operator.observe import Observed, owned_by


@dataclass(frozen=True, slots=True)
class Group:
    """One StatefulSet that exists, and its pods that are not on their way out."""

    pool: str
    index: int
    workload: Object
    pods: Sequence[Object]
    leaving: int  # pods on their way out

    @property
    def name(self) -> str:
        return str(self.workload["metadata"]["name"])

    @property
    def nodes(self) -> int:
        return int(self.workload["spec"]["replicas"])

    @property
    def revision(self) -> str:
        """What its pods are to be."""
        return pods.revision(self.workload["spec"]["template"])

    @property
    def settled(self) -> bool:
        """The StatefulSet's controller has seen the template, so that new pods will be of it."""
        seen = self.workload.get("status", {}).get("observedGeneration", 0)
        return bool(seen >= self.workload["metadata"].get("generation", 0))

    @property
    def outdated(self) -> bool:
        return any(pods.revision(pod) != self.revision for pod in self.pods)

    @property
    def complete(self) -> bool:
        """All pods are there, of one revision and for a group of this size, and every rank of each has passed
        its canary."""
        return (
            len(self.pods) == self.nodes
            and self.leaving == 0
            and len({pods.revision(pod) for pod in self.pods}) == 1
            and all(pods.fits(pod, self.nodes) for pod in self.pods)
            and all(pods.is_true(pod, "ContainersReady") for pod in self.pods)
        )

    @property
    def ready(self) -> bool:
        """Routable: complete, and Kubernetes has taken our readiness gate into account."""
        return self.complete and all(pods.is_true(pod, "Ready") for pod in self.pods)

    @property
    def ready_nodes(self) -> int:
        return sum(pods.is_true(pod, "ContainersReady") for pod in self.pods)

    @property
    def trouble(self) -> str | None:
        """The first pod that is not merely starting: `NAME: what is wrong`."""
        for pod in self.pods:
            if found := pods.trouble(pod):
                return f"{pod['metadata']['name']}: {found}"
        return None

    def gates(self, closing: bool = False) -> list[tuple[Object, bool]]:
        """Pods whose readiness gate is not what it must be, with what it must be. `closing`: the group is
        about to serve no longer."""
        wanted = self.complete and not closing
        return [
            (pod, wanted)
            for pod in self.pods
            if pods.condition(pod, GROUP_READY_GATE) is None or pods.is_true(pod, GROUP_READY_GATE) != wanted
        ]


def groups(seen: Observed) -> list[Group]:
    """Every group that exists, by pool and index; wanted or not."""
    found = []
    for (kind, _), workload in seen.children.items():
        labels = workload["metadata"].get("labels") or {}
        if kind == STATEFUL_SET and LABEL_GROUP in labels:
            pool, index = labels[LABEL_POOL], labels[LABEL_GROUP]
            # By the owner: a copy that somebody made of a pod has its labels too.
            members = [pod for pod in seen.pods if owned_by(pod, workload["metadata"]["uid"])]
            staying = [pod for pod in members if not pods.leaving(pod)]
            found.append(Group(pool, int(index), workload, staying, len(members) - len(staying)))
    return sorted(found, key=lambda group: (group.pool, group.index))


def gateway_pods(seen: Observed) -> list[Object]:
    return [
        pod
        for pod in seen.pods
        if pod["metadata"]["labels"].get(LABEL_COMPONENT) == names.GATEWAY and not pods.leaving(pod)
    ]
