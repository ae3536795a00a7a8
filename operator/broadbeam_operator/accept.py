"""Whether a stored ServingCluster can be built: the same checks as at admission and in `broadbeam render`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from broadbeam_crds.checks import validate
from broadbeam_crds.v1alpha1 import ManifestError, ServingCluster, cluster_from
from broadbeam_operator.cluster import Object
from broadbeam_operator.manifests import overlay

NAMESPACE: Final = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"


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
        *_namespace(cluster),
        *_templates(cluster),
    ]


def _namespace(cluster: ServingCluster) -> list[str]:
    """Where no API server has looked, it may be anything; local mode names a folder after it."""
    name = cluster.metadata.namespace
    if name is None or re.fullmatch(NAMESPACE, name):
        return []
    return [
        f'metadata.namespace: "{name}" must be at most 63 of a-z, 0-9 and "-", and begin and end with no "-"'
    ]


def _templates(cluster: ServingCluster) -> list[str]:
    return [
        f"spec.pools[{pool.name}].{problem}"
        for pool in cluster.spec.pools
        if pool.template is not None and (problem := overlay.problem(pool.template))
    ]
