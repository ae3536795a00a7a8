"""What kopf watches. Every event only says which ServingCluster to look at again; nothing is decided here.

kopf's own daemons and timers would put a finalizer on each ServingCluster, and then `kubectl delete` would
hang while the operator is down. Events need none: owner references clean up.
"""

from __future__ import annotations

from typing import Any

import kopf
from kubernetes.aio.client.configuration import Configuration

from broadbeam_crds.conventions import API_GROUP, API_VERSION, LABEL_CLUSTER, PLURAL
from broadbeam_operator.workers import Workers

CHILDREN = (("apps", "v1", "statefulsets"), ("apps", "v1", "deployments"), ("", "v1", "pods"))


def register(registry: kopf.OperatorRegistry, workers: Workers, credentials: Configuration) -> None:
    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await connection(credentials)

    @kopf.on.event(API_GROUP, API_VERSION, PLURAL, registry=registry)
    async def cluster_changed(namespace: str | None, name: str, **_: Any) -> None:
        workers.wake(namespace or "default", name)

    for group, version, plural in CHILDREN:

        @kopf.on.event(group, version, plural, registry=registry, id=f"{plural}-changed")
        async def child_changed(namespace: str | None, labels: kopf.Labels, **_: Any) -> None:
            if name := labels.get(LABEL_CLUSTER):
                workers.wake(namespace or "default", name)


def settings() -> kopf.OperatorSettings:
    """Watch no more than what is ours, and write nothing: Events and status are reconcile's."""
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False
    chosen.scanning.disabled = True  # needs no right to list CRDs and namespaces
    chosen.watching.server_timeout = 300
    chosen.watching.reconnect_backoff = 0.5
    for group, version, plural in CHILDREN:
        chosen.watching.label_selectors[group, version, plural] = LABEL_CLUSTER
    return chosen


async def connection(found: Configuration) -> kopf.ConnectionInfo:
    """The same credentials for kopf's watches as for our writes, a rotated token included."""
    token = await found.get_api_key_with_prefix("BearerToken")
    scheme, _, secret = (token or "").partition(" ")
    return kopf.ConnectionInfo(
        server=found.host,
        ca_path=found.ssl_ca_cert,
        insecure=not found.verify_ssl,
        certificate_path=found.cert_file,
        private_key_path=found.key_file,
        scheme=scheme.capitalize() or None,
        token=secret or None,
    )
