"""Who the pods are: engines may ask the API nothing, the gateway may watch pods of its namespace."""

from __future__ import annotations

from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator import names
from broadbeam_operator.cluster import ROLE, ROLE_BINDING, SERVICE_ACCOUNT, Object
from broadbeam_operator.manifests.objects import child, namespace_of


def accounts(cluster: ServingCluster) -> list[Object]:
    gateway = names.gateway_name(cluster.metadata.name)
    labels = names.gateway_labels(cluster.metadata.name)
    return [
        child(
            cluster,
            SERVICE_ACCOUNT,
            names.engine_account(cluster.metadata.name),
            {"automountServiceAccountToken": False},
        ),
        child(cluster, SERVICE_ACCOUNT, gateway, {"automountServiceAccountToken": False}, labels),
        child(
            cluster,
            ROLE,
            gateway,
            {"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]},
            labels,
        ),
        child(
            cluster,
            ROLE_BINDING,
            gateway,
            {
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": gateway},
                "subjects": [{"kind": "ServiceAccount", "name": gateway, "namespace": namespace_of(cluster)}],
            },
            labels,
        ),
    ]
