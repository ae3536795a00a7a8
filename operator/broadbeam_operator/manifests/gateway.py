"""The gateway: its config, Deployment, Service and disruption budget."""

from __future__ import annotations

from broadbeam_crds.conventions import (
    ANNOTATION_CONFIG_HASH,
    API_KEYS_DIR,
    CONFIG_DIR,
    ENV_NAMESPACE,
    ENV_POD_IP,
    ENV_POD_NAME,
    GATEWAY_CONFIG_FILE,
    GATEWAY_METRICS_PORT,
)
from broadbeam_crds.engine_config import encode
from broadbeam_crds.gateway_config import (
    AuthConfig,
    FileEndpoints,
    GatewayConfig,
    KubernetesEndpoints,
    LimitsConfig,
    TimeoutsConfig,
)
from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator import names
from broadbeam_operator.cluster import CONFIG_MAP, DEPLOYMENT, POD_DISRUPTION_BUDGET, SERVICE, Object
from broadbeam_operator.images import Images
from broadbeam_operator.manifests.objects import (
    POD_SECURITY,
    child,
    container_security,
    field_env,
    http_probe,
    namespace_of,
)

STOP_MARGIN_S = 10


def gateway(cluster: ServingCluster, images: Images, endpoints: FileEndpoints | None = None) -> list[Object]:
    """`endpoints` is where it finds the ranks without Kubernetes; None: it watches their pods."""
    return [
        config_map(cluster, endpoints),
        deployment(cluster, images, endpoints),
        service(cluster),
        *([disruption_budget(cluster)] if cluster.spec.gateway.replicas > 1 else []),
    ]


def gateway_config(cluster: ServingCluster, endpoints: FileEndpoints | None = None) -> GatewayConfig:
    spec = cluster.spec
    asked, limits, timeouts = spec.gateway, spec.gateway.limits, spec.gateway.timeouts
    return GatewayConfig(
        cluster=cluster.metadata.name,
        models=[spec.model.name],
        endpoints=endpoints
        or KubernetesEndpoints(namespace=namespace_of(cluster), cluster=cluster.metadata.name),
        disaggregated=spec.disaggregated,
        policy=asked.policy,
        port=asked.listeners[0].port,
        metrics_port=GATEWAY_METRICS_PORT,
        auth=AuthConfig(keys_dir=API_KEYS_DIR) if asked.auth else None,
        limits=LimitsConfig(
            max_body_bytes=limits.max_body.bytes,
            max_header_bytes=limits.max_header.bytes,
            max_connections=limits.max_connections,
            max_in_flight=limits.max_in_flight,
        ),
        timeouts=TimeoutsConfig(
            connect_s=timeouts.connect.seconds,
            prefill_s=timeouts.prefill.seconds,
            first_byte_s=timeouts.first_byte.seconds,
            idle_s=timeouts.idle.seconds,
            drain_s=timeouts.drain.seconds,
        ),
        retries=asked.retries,
        ejection_s=asked.ejection.seconds,
        route_headers=asked.route_headers,
    )


def config_map(cluster: ServingCluster, endpoints: FileEndpoints | None = None) -> Object:
    files = {"gateway.json": encode(gateway_config(cluster, endpoints))}
    name = names.gateway_config_name(cluster.metadata.name, names.digest(files))
    return child(cluster, CONFIG_MAP, name, {"immutable": True, "data": files}, _labels(cluster))


def deployment(cluster: ServingCluster, images: Images, endpoints: FileEndpoints | None = None) -> Object:
    name = names.gateway_name(cluster.metadata.name)
    config = config_map(cluster, endpoints)
    template = {
        "metadata": {
            "labels": {**names.MANAGED_BY, **_labels(cluster)},
            "annotations": {ANNOTATION_CONFIG_HASH: names.digest(config["data"])},
        },
        "spec": {
            "serviceAccountName": name,
            "automountServiceAccountToken": True,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": int(cluster.spec.gateway.timeouts.drain.seconds) + STOP_MARGIN_S,
            "securityContext": POD_SECURITY,
            "containers": [_container(cluster, images)],
            "volumes": [
                {"name": "config", "configMap": {"name": config["metadata"]["name"]}},
                {"name": "tmp", "emptyDir": {}},
                *_key_volumes(cluster),
            ],
        },
    }
    return child(
        cluster,
        DEPLOYMENT,
        name,
        {
            "spec": {
                "replicas": cluster.spec.gateway.replicas,
                "selector": {"matchLabels": _labels(cluster)},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
                "template": template,
            }
        },
        _labels(cluster),
    )


def service(cluster: ServingCluster) -> Object:
    listener = cluster.spec.gateway.listeners[0]
    return child(
        cluster,
        SERVICE,
        names.gateway_name(cluster.metadata.name),
        {
            "spec": {
                "type": "ClusterIP",
                "selector": _labels(cluster),
                "ports": [
                    {
                        "name": listener.name,
                        "port": listener.port,
                        "targetPort": listener.port,
                        "protocol": "TCP",
                    }
                ],
            }
        },
        _labels(cluster),
    )


def disruption_budget(cluster: ServingCluster) -> Object:
    return child(
        cluster,
        POD_DISRUPTION_BUDGET,
        names.gateway_name(cluster.metadata.name),
        {"spec": {"maxUnavailable": 1, "selector": {"matchLabels": _labels(cluster)}}},
        _labels(cluster),
    )


def _container(cluster: ServingCluster, images: Images) -> Object:
    port = cluster.spec.gateway.listeners[0].port
    return {
        "name": names.GATEWAY,
        "image": images.router,
        "command": ["broadbeam-router"],
        # The keys' folder is an argument too: where processes have no mounts, only arguments are rewritten.
        "args": [
            "--config",
            GATEWAY_CONFIG_FILE,
            *(["--keys-dir", API_KEYS_DIR] if cluster.spec.gateway.auth else []),
        ],
        "env": [
            field_env(ENV_POD_NAME, "metadata.name"),
            field_env(ENV_POD_IP, "status.podIP"),
            field_env(ENV_NAMESPACE, "metadata.namespace"),
        ],
        "ports": [
            {"name": "http", "containerPort": port, "protocol": "TCP"},
            {"name": "metrics", "containerPort": GATEWAY_METRICS_PORT, "protocol": "TCP"},
        ],
        "livenessProbe": http_probe(port, "/health", period_s=10, failures=3),
        "readinessProbe": http_probe(port, "/readyz", period_s=1, failures=3),
        "resources": {"requests": {"cpu": "500m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": container_security(read_only_root=True),
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            *(
                [{"name": "keys", "mountPath": API_KEYS_DIR, "readOnly": True}]
                if cluster.spec.gateway.auth
                else []
            ),
        ],
    }


def _key_volumes(cluster: ServingCluster) -> list[Object]:
    auth = cluster.spec.gateway.auth
    return [{"name": "keys", "secret": {"secretName": auth.secret_ref.name}}] if auth else []


def _labels(cluster: ServingCluster) -> dict[str, str]:
    return names.gateway_labels(cluster.metadata.name)
