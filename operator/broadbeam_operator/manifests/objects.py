"""What all children share: metadata with the owner, and the restricted security of their pods."""

from __future__ import annotations

from collections.abc import Mapping

from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator import names
from broadbeam_operator.cluster import SERVING_CLUSTER, Kind, Object

USER = 10001  # any number but 0: the images hold nothing that belongs to it
POD_SECURITY: Object = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def namespace_of(cluster: ServingCluster) -> str:
    return cluster.metadata.namespace or "default"


def child(
    cluster: ServingCluster, kind: Kind, name: str, body: Object, labels: Mapping[str, str] | None = None
) -> Object:
    """An object that goes away with the cluster; without a uid (a file never applied) it has no owner."""
    own = {**names.MANAGED_BY, **names.cluster_labels(cluster.metadata.name), **(labels or {})}
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {
            "name": name,
            "namespace": namespace_of(cluster),
            "labels": own,
            **({"ownerReferences": [owner(cluster)]} if cluster.metadata.uid else {}),
        },
        **body,
    }


def owner(cluster: ServingCluster) -> Object:
    return {
        "apiVersion": SERVING_CLUSTER.api_version,
        "kind": SERVING_CLUSTER.kind,
        "name": cluster.metadata.name,
        "uid": cluster.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def container_security(read_only_root: bool, capabilities: list[str] | None = None) -> Object:
    """The restricted profile; `capabilities` are what a transport needs on top."""
    added = {"add": capabilities} if capabilities else {}
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"], **added},
        "readOnlyRootFilesystem": read_only_root,
    }


def http_probe(port: int | str, path: str, period_s: int, failures: int, timeout_s: int = 5) -> Object:
    return {
        "httpGet": {"port": port, "path": path},
        "periodSeconds": period_s,
        "failureThreshold": failures,
        "timeoutSeconds": timeout_s,
    }


def field_env(name: str, path: str) -> Object:
    """An environment variable from the pod's own fields (the downward API)."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
