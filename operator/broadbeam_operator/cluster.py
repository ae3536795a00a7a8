"""What the operator needs of a cluster: seven verbs over plain objects.

Objects are the dicts that Kubernetes' JSON is. Two clusters exist: `kubernetes_cluster.KubernetesCluster`
(a real API server) and `local.store` (a laptop without one). Each `Kind` the operator touches is listed here,
so that neither has to discover the API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Protocol

from broadbeam_crds.conventions import API_GROUP, API_VERSION, KIND, PLURAL

Object = dict[str, Any]


class Kind(NamedTuple):
    """One namespaced resource type; `plural` is its name in URLs."""

    api_version: str
    kind: str
    plural: str

    def of(self, obj: Object) -> bool:
        return obj.get("kind") == self.kind and obj.get("apiVersion") == self.api_version


SERVING_CLUSTER = Kind(f"{API_GROUP}/{API_VERSION}", KIND, PLURAL)
STATEFUL_SET = Kind("apps/v1", "StatefulSet", "statefulsets")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
POD = Kind("v1", "Pod", "pods")
SERVICE = Kind("v1", "Service", "services")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
SERVICE_ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
EVENT = Kind("v1", "Event", "events")
POD_DISRUPTION_BUDGET = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
ROLE = Kind("rbac.authorization.k8s.io/v1", "Role", "roles")
ROLE_BINDING = Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings")

# Every kind that a ServingCluster owns, in the order in which objects are printed.
CHILD_KINDS = (
    SERVICE_ACCOUNT,
    ROLE,
    ROLE_BINDING,
    CONFIG_MAP,
    SERVICE,
    STATEFUL_SET,
    DEPLOYMENT,
    POD_DISRUPTION_BUDGET,
)
KINDS = (SERVING_CLUSTER, POD, EVENT, *CHILD_KINDS)


def kind_of(obj: Object) -> Kind:
    """The kind of an object that has apiVersion and kind; KeyError for one the operator does not know."""
    wanted = (obj["apiVersion"], obj["kind"])
    for kind in KINDS:
        if kind[:2] == wanted:
            return kind
    raise KeyError(f"{wanted[1]} of {wanted[0]} is not a kind this operator handles")


def timestamp(when: datetime) -> str:
    """RFC 3339 in UTC, to the second, as Kubernetes writes times."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ClusterError(Exception):
    """A cluster that refused or could not be reached; `status` is HTTP's, 0 where no answer came."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class NameTakenError(ClusterError):
    """A child cannot be made, for an object of another owner has its name."""


class Cluster(Protocol):
    """Every method raises ClusterError, and nothing else, when the cluster refuses or cannot be reached."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The object, or None where there is none."""

    async def list(
        self, kind: Kind, namespace: str | None, labels: Mapping[str, str] | None = None
    ) -> Sequence[Object]:
        """Objects with all of `labels`, apiVersion and kind filled in; namespace None means all."""

    async def apply(self, obj: Object, new: bool = False) -> Object:
        """Server-side apply under our field manager, with force; the object as it is stored afterwards.

        What an earlier apply of ours set and this one lacks is removed; what others set stays. `new`: only
        where there is no object of that name, and else ClusterError 409.
        """

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str | None = None) -> bool:
        """Delete in the background; False where there was none (or, with `uid`, another of that name)."""

    async def apply_status(self, kind: Kind, namespace: str, name: str, status: Object) -> None:
        """Make `status` the whole status that we manage of the object; nothing if the object is gone."""

    async def patch_pod_condition(self, namespace: str, name: str, condition: Mapping[str, str]) -> None:
        """Set one condition (by its type) of a pod's status; nothing if the pod is gone."""

    async def emit_event(
        self, regarding: Object, severity: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """Record an Event about an object; `reason` is CamelCase, `message` at most 1024 characters."""
