"""Whether a stored ServingCluster can be built: the same checks as at admission and in `broadbeam render`."""

from __future__ import annotations

from dataclasses import dataclass

from broadbeam_crds.checks import validate
from broadbeam_crds.v1alpha1 import ManifestError, ServingCluster, cluster_from
from broadbeam_operator.cluster import Object
from broadbeam_operator.manifests import overlay


@dataclass(frozen=True, slots=True)
class Refused:
    """Why not: one line for each mistake, each naming field, value and limit."""

    messages: tuple[str, ...]


def accept(resource: Object) -> ServingCluster | Refused:
    try:
        cluster = cluster_from(resource)
    except ManifestError as error:
        return Refused((str(error).removeprefix("ServingCluster: "),))
    messages = refusals(cluster)
    return Refused(tuple(messages)) if messages else cluster


def refusals(cluster: ServingCluster) -> list[str]:
    """Everything that is wrong with a well-formed cluster, `field: what` a line."""
    return [
        *(violation.message for violation in validate(cluster)),
        *_templates(cluster),
    ]


def _templates(cluster: ServingCluster) -> list[str]:
    return [
        f"spec.pools[{pool.name}].{problem}"
        for pool in cluster.spec.pools
        if pool.template is not None and (problem := overlay.problem(pool.template))
    ]
