"""The objects of a pool: a StatefulSet, a headless Service and an immutable config a group, and one PDB."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broadbeam_crds.conventions import (
    ANNOTATION_CONFIG_HASH,
    ANNOTATION_NODES,
    ANNOTATION_RANKS,
    CONFIG_DIR,
    ENV_CACHE,
    ENV_NAMESPACE,
    ENV_NODE_INDEX,
    ENV_POD_IP,
    ENV_POD_NAME,
    GROUP_READY_GATE,
    LABEL_REVISION,
    RANK_HTTP_PORT,
    SUPERVISOR_PORT,
)
from broadbeam_crds.v1alpha1 import Pool, ServingCluster
from broadbeam_operator import names
from broadbeam_operator.cluster import (
    CONFIG_MAP,
    POD_DISRUPTION_BUDGET,
    SERVICE,
    STATEFUL_SET,
    Object,
)
from broadbeam_operator.images import Images
from broadbeam_operator.manifests import engine, vllm
from broadbeam_operator.manifests.group import Group
from broadbeam_operator.manifests.objects import POD_SECURITY, child, field_env
from broadbeam_operator.manifests.overlay import overlay
from broadbeam_operator.manifests.placement import placement, resources
from broadbeam_operator.manifests.storage import CACHE_DIR, mounted

READINESS_GATES = [{"conditionType": GROUP_READY_GATE}]
STOP_MARGIN_S = 15  # after the drain: closing sockets, freeing memory, the supervisor's own exit


def pool_objects(cluster: ServingCluster, pool: Pool, images: Images) -> list[Object]:
    groups = [Group(cluster, pool, index, images) for index in range(pool.groups)]
    revision = pool_revision(cluster, pool, images)
    # Groups whose config is the same share it.
    configs = {config["metadata"]["name"]: config for config in map(engine_config, groups)}
    return [
        *configs.values(),
        *map(headless_service, groups),
        *(stateful_set(group, revision) for group in groups),
        disruption_budget(cluster, pool),
    ]


def pool_revision(cluster: ServingCluster, pool: Pool, images: Images) -> str:
    """Changes exactly when the pods of the pool must be replaced; the same for all of its groups."""
    return names.digest(pod_template(Group(cluster, pool, 0, images), revision=""))


def stateful_set(group: Group, revision: str) -> Object:
    return child(
        group.cluster,
        STATEFUL_SET,
        group.name,
        {
            "spec": {
                "serviceName": group.name,
                "replicas": group.pool.parallelism.nodes,
                "podManagementPolicy": "Parallel",
                # The operator deletes all pods of a group together; see plan.py.
                "updateStrategy": {"type": "OnDelete"},
                "selector": {"matchLabels": group.selector},
                "template": pod_template(group, revision),
            }
        },
        group.labels,
    )


def headless_service(group: Group) -> Object:
    """Gives every pod a name before it is ready, for the ranks must find each other to become so."""
    return child(
        group.cluster,
        SERVICE,
        group.name,
        {
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": group.selector,
                "ports": [{"name": "supervisor", "port": SUPERVISOR_PORT, "protocol": "TCP"}],
            }
        },
        group.labels,
    )


def engine_config(group: Group) -> Object:
    files = engine_shape(group.cluster).files(group)
    cluster, pool = group.cluster.metadata.name, group.pool
    name = names.engine_config_name(cluster, pool.name, names.digest(files))
    labels = names.pool_labels(cluster, pool.name, pool.role)
    return child(group.cluster, CONFIG_MAP, name, {"immutable": True, "data": files}, labels)


def disruption_budget(cluster: ServingCluster, pool: Pool) -> Object:
    """One evicted pod makes its whole group unready, and so stops further evictions until it is back; the
    group's other pods, unready by then, may go with it. A node can always be drained."""
    return child(
        cluster,
        POD_DISRUPTION_BUDGET,
        f"{cluster.metadata.name}-{pool.name}",
        {
            "spec": {
                "maxUnavailable": 1,
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": names.pool_selector(cluster.metadata.name, pool.name)},
            }
        },
        names.pool_labels(cluster.metadata.name, pool.name, pool.role),
    )


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What an engine adds: its container, and the files of its config."""

    container: Callable[[Group], Object]
    files: Callable[[Group], Mapping[str, str]]


_OURS = EngineShape(engine.container, engine.files)
_SHAPES = {"broadbeam": _OURS, "sim": _OURS, "vllm": EngineShape(vllm.container, vllm.files)}


def engine_shape(cluster: ServingCluster) -> EngineShape:
    return _SHAPES[cluster.spec.engine.name]


def pod_template(group: Group, revision: str) -> Object:
    """The generated template with the spec's own laid over it. Our labels and annotations win, for selectors
    and gateways rely on them; and our readiness gate stays beside any other."""
    generated = _generated_template(group)
    merged: Object = overlay(generated, group.pool.template or {})
    meta, spec = merged["metadata"], merged["spec"]
    labels = {**meta.get("labels", {}), **group.labels, LABEL_REVISION: revision}
    annotations = {**meta.get("annotations", {}), **generated["metadata"]["annotations"]}
    others = [gate for gate in spec.get("readinessGates", ()) if gate not in READINESS_GATES]
    return {
        **merged,
        "metadata": {**meta, "labels": labels, "annotations": annotations},
        "spec": {**spec, "readinessGates": [*READINESS_GATES, *others]},
    }


def _generated_template(group: Group) -> Object:
    spec, pool = group.cluster.spec, group.pool
    config = engine_config(group)
    return {
        "metadata": {
            "labels": {**names.MANAGED_BY, **group.labels},
            "annotations": {
                ANNOTATION_RANKS: str(group.ranks_per_pod),
                ANNOTATION_NODES: str(pool.parallelism.nodes),
                ANNOTATION_CONFIG_HASH: names.digest(config["data"]),
            },
        },
        "spec": {
            "serviceAccountName": names.engine_account(group.cluster.metadata.name),
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": int(spec.engine.drain.seconds) + STOP_MARGIN_S,
            "securityContext": POD_SECURITY,
            "readinessGates": READINESS_GATES,
            **placement(pool, group.selector),
            "containers": [_container(group)],
            "volumes": [
                {"name": "config", "configMap": {"name": config["metadata"]["name"]}},
                *(each.volume for each in mounted(spec.model.source)),
            ],
        },
    }


def _container(group: Group) -> Object:
    spec, pool = group.cluster.spec, group.pool
    container = engine_shape(group.cluster).container(group)
    given = [each.wire() for each in spec.engine.env]
    own = {entry["name"] for entry in given}
    return {
        "name": names.ENGINE,
        **container,
        "env": [
            field_env(ENV_POD_NAME, "metadata.name"),
            field_env(ENV_POD_IP, "status.podIP"),
            field_env(ENV_NAMESPACE, "metadata.namespace"),
            field_env(ENV_NODE_INDEX, "metadata.labels['apps.kubernetes.io/pod-index']"),
            {"name": ENV_CACHE, "value": CACHE_DIR},
            *(entry for entry in container["env"] if entry["name"] not in own),
            *given,
        ],
        "ports": [
            *(
                {"name": f"rank-{rank}", "containerPort": RANK_HTTP_PORT + rank, "protocol": "TCP"}
                for rank in range(group.ranks_per_pod)
            ),
            {"name": "supervisor", "containerPort": SUPERVISOR_PORT, "protocol": "TCP"},
        ],
        "resources": resources(pool),
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
            *(each.mount for each in mounted(spec.model.source)),
        ],
    }
