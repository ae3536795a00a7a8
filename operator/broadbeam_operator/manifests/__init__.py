"""What a ServingCluster becomes: pure builders, one literal an object."""

from broadbeam_operator.manifests.cluster import manifests
from broadbeam_operator.manifests.pool import pool_revision

__all__ = ["manifests", "pool_revision"]
