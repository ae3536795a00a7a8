"""Every object of a ServingCluster, in the order in which they are printed."""

from __future__ import annotations

from broadbeam_crds.gateway_config import FileEndpoints
from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator import names
from broadbeam_operator.cluster import CHILD_KINDS, Object, kind_of
from broadbeam_operator.images import Images
from broadbeam_operator.manifests import accounts, gateway, pool


def manifests(
    cluster: ServingCluster, images: Images, endpoints: FileEndpoints | None = None
) -> list[Object]:
    """The desired children, each carrying the hash of itself; the same input gives the same bytes."""
    objects = [
        *accounts.accounts(cluster),
        *gateway.gateway(cluster, images, endpoints),
        *(obj for each in cluster.spec.pools for obj in pool.pool_objects(cluster, each, images)),
    ]
    return sorted((_stamped(obj) for obj in objects), key=_order)


def _stamped(obj: Object) -> Object:
    meta = obj["metadata"]
    annotations = {**meta.get("annotations", {}), names.ANNOTATION_APPLIED_HASH: names.digest(obj)}
    return {**obj, "metadata": {**meta, "annotations": annotations}}


def _order(obj: Object) -> tuple[int, str]:
    return CHILD_KINDS.index(kind_of(obj)), obj["metadata"]["name"]
