"""Names, labels and hashes of what a ServingCluster owns."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from broadbeam_crds.conventions import (
    API_GROUP,
    LABEL_CLUSTER,
    LABEL_COMPONENT,
    LABEL_GROUP,
    LABEL_LLMD_ROLE,
    LABEL_POOL,
    LABEL_ROLE,
)

ENGINE = "engine"
GATEWAY = "gateway"
MANAGED_BY = {"app.kubernetes.io/managed-by": "broadbeam"}
# Of the whole desired object; equal means that no earlier field is to be removed.
ANNOTATION_APPLIED_HASH = f"{API_GROUP}/applied-hash"


def group_name(cluster: str, pool: str, group: int) -> str:
    """Of the StatefulSet and of the headless Service."""
    return f"{cluster}-{pool}-{group}"


def pod_host(cluster: str, namespace: str, pool: str, group: int, node: int) -> str:
    """The DNS name that the group's headless Service gives a pod; resolves before the pod is ready."""
    service = group_name(cluster, pool, group)
    return f"{service}-{node}.{service}.{namespace}.svc"


def engine_config_name(cluster: str, pool: str, digest: str) -> str:
    return f"{cluster}-{pool}-{digest}"


def gateway_name(cluster: str) -> str:
    return f"{cluster}-{GATEWAY}"


def gateway_config_name(cluster: str, digest: str) -> str:
    return f"{cluster}-{GATEWAY}-{digest}"


def engine_account(cluster: str) -> str:
    return f"{cluster}-{ENGINE}"


def cluster_labels(cluster: str) -> dict[str, str]:
    """What every child carries, and what pruning selects by."""
    return {LABEL_CLUSTER: cluster}


def pool_labels(cluster: str, pool: str, role: str) -> dict[str, str]:
    return {
        **cluster_labels(cluster),
        LABEL_COMPONENT: ENGINE,
        LABEL_POOL: pool,
        LABEL_ROLE: role,
        LABEL_LLMD_ROLE: role,
    }


def group_selector(cluster: str, pool: str, group: int) -> dict[str, str]:
    """Picks the pods of one group, of whatever revision; immutable in a StatefulSet."""
    return {**cluster_labels(cluster), LABEL_POOL: pool, LABEL_GROUP: str(group)}


def pool_selector(cluster: str, pool: str) -> dict[str, str]:
    return {**cluster_labels(cluster), LABEL_POOL: pool, LABEL_COMPONENT: ENGINE}


def gateway_labels(cluster: str) -> dict[str, str]:
    return {**cluster_labels(cluster), LABEL_COMPONENT: GATEWAY}


def digest(content: Any) -> str:
    """Eight hex digits of any JSON content, the same whatever the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
