"""One expert-parallel group of a pool, and all that its objects are made from."""

from __future__ import annotations

from dataclasses import dataclass

from broadbeam_crds.conventions import LABEL_GROUP
from broadbeam_crds.v1alpha1 import Pool, ServingCluster
from broadbeam_operator import names
from broadbeam_operator.images import Images
from broadbeam_operator.manifests.objects import namespace_of


@dataclass(frozen=True, slots=True)
class Group:
    cluster: ServingCluster
    pool: Pool
    index: int
    images: Images

    @property
    def name(self) -> str:
        return names.group_name(self.cluster.metadata.name, self.pool.name, self.index)

    @property
    def labels(self) -> dict[str, str]:
        cluster, pool = self.cluster.metadata.name, self.pool
        return {**names.pool_labels(cluster, pool.name, pool.role), LABEL_GROUP: str(self.index)}

    @property
    def selector(self) -> dict[str, str]:
        return names.group_selector(self.cluster.metadata.name, self.pool.name, self.index)

    @property
    def coordinator(self) -> str:
        """Where the ranks of all nodes meet: the first node's name."""
        return names.pod_host(
            self.cluster.metadata.name, namespace_of(self.cluster), self.pool.name, self.index, 0
        )

    @property
    def ranks_per_pod(self) -> int:
        return ranks_per_pod(self.pool)

    @property
    def on_gpu(self) -> bool:
        return self.pool.accelerator.resource != "cpu"


def ranks_per_pod(pool: Pool) -> int:
    """HTTP endpoints of one pod: data-parallel ranks, each of `tensor` devices."""
    return pool.parallelism.data // pool.parallelism.nodes
