"""What a transport needs of its container beyond the restricted profile."""

from __future__ import annotations

from broadbeam_operator.manifests.group import Group

# Back ends that register memory with a network card, which pins it.
RDMA_ALL_TO_ALL = {
    "deepep-high-throughput",
    "deepep-low-latency",
    "deepep-v2",
    "mori-high-throughput",
    "mori-low-latency",
    "nixl",
}


def capabilities(group: Group) -> list[str]:
    transfer = group.cluster.spec.kv.transfer
    pins = group.pool.all_to_all in RDMA_ALL_TO_ALL or (transfer is not None and transfer.connector == "nixl")
    return ["IPC_LOCK"] if pins and group.on_gpu else []
