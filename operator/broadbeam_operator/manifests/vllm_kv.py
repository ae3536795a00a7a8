"""vLLM's --kv-transfer-config and --kv-events-config (names as in 0.32)."""

from __future__ import annotations

from broadbeam_crds.conventions import KV_EVENTS_PORT, KV_REPLAY_PORT
from broadbeam_crds.v1alpha1 import KVOffload, KVTransfer, Role
from broadbeam_operator.cluster import Object
from broadbeam_operator.manifests.group import Group

KV_ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}


def kv_transfer(group: Group) -> Object | None:
    """One connector as it is, both under vLLM's MultiConnector."""
    kv = group.cluster.spec.kv
    connectors = []
    if kv.transfer:
        connectors.append(_nixl(kv.transfer, group.pool.role))
    if kv.offload:
        connectors.append(_offloading(kv.offload, group.pool.parallelism.tensor))
    if len(connectors) < 2:
        return connectors[0] if connectors else None
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": connectors},
    }


def _nixl(transfer: KVTransfer, role: Role) -> Object:
    return {
        "kv_connector": "NixlConnector",
        "kv_role": KV_ROLES[role],
        "kv_load_failure_policy": transfer.load_failure_policy,
        "kv_connector_extra_config": {"kv_lease_duration": max(1, round(transfer.lease.seconds))},
    }


def _offloading(offload: KVOffload, tensor: int) -> Object:
    extra = {
        "cpu_bytes_to_use": offload.host_memory.bytes * tensor,  # over the devices of one API server
        "eviction_policy": offload.eviction_policy,
    }
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def kv_events() -> Object:
    """vLLM adds the data-parallel rank to both ports."""
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{KV_EVENTS_PORT}",
        "replay_endpoint": f"tcp://*:{KV_REPLAY_PORT}",
    }
