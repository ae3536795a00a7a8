"""The Node object, its capacity and its heartbeat."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from api import Api, ApiError

NODE_NAME = "e2e-node"
NODE_ADDRESS = "10.77.0.2"
MANAGER = "e2e-node"  # of the fields that the node applies
LEASE_RENEWAL_S = 10.0
LEASE_PATH = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


async def register(api: Api, gpus: int) -> None:
    """Make the Node object and say that it is ready."""
    capacity = {"cpu": "64", "memory": "512Gi", "ephemeral-storage": "1Ti", "pods": "500"}
    if gpus:
        capacity["nvidia.com/gpu"] = str(gpus)
    labels = {"kubernetes.io/hostname": NODE_NAME, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE_NAME, "labels": labels}}
    await api.call("POST", "/api/v1/nodes", node)
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "runs pods as processes"}
    ready |= {"lastHeartbeatTime": now(), "lastTransitionTime": now()}
    status = {
        "capacity": capacity,
        "allocatable": capacity,
        "conditions": [ready],
        "addresses": [
            {"type": "InternalIP", "address": NODE_ADDRESS},
            {"type": "Hostname", "address": NODE_NAME},
        ],
        "nodeInfo": {"kubeletVersion": "v1.36.3"},
    }
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE_NAME}, "status": status}
    await api.apply(f"/api/v1/nodes/{NODE_NAME}/status", body, MANAGER)


async def renew_lease(api: Api) -> None:
    """Say for ever that the node lives."""
    while True:
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": NODE_NAME, "namespace": "kube-node-lease"},
            "spec": {"holderIdentity": NODE_NAME, "leaseDurationSeconds": 40, "renewTime": now()},
        }
        try:
            await api.apply(f"{LEASE_PATH}/{NODE_NAME}", body, MANAGER)
        except ApiError as error:
            if error.status != 404:  # the namespace is not there in the first second
                raise
            await asyncio.sleep(0.2)
            continue
        await asyncio.sleep(LEASE_RENEWAL_S)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
