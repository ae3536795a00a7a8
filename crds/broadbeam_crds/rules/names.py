"""Names that Kubernetes and the cluster's own objects allow."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Final

from broadbeam_crds.rules.rule import Cel, Finding, Rule, cel_list, pool_rule
from broadbeam_crds.v1alpha1 import Pool, ServingCluster

# A StatefulSet labels its pods with its name, a hyphen and a hash of 10; a label holds 63. That leaves 52
# for cluster-pool-group, of which the hyphens take 2 and the group's number up to 3.
NAMES_LIMIT: Final = 47
CLUSTER_NAME: Final = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
RESERVED_POOL_NAMES: Final = ("engine", "gateway")  # C-engine and C-gateway are the cluster's own objects


def _cluster_name(cluster: ServingCluster) -> Iterator[Finding]:
    if not re.fullmatch(CLUSTER_NAME, cluster.metadata.name):
        yield {"value": cluster.metadata.name, "limit": CLUSTER_NAME}


def _lengths(pool: Pool, cluster: ServingCluster) -> Finding | None:
    length = len(cluster.metadata.name) + len(pool.name)
    if length <= NAMES_LIMIT:
        return None
    return {"cluster": cluster.metadata.name, "value": length, "limit": NAMES_LIMIT}


def _for_each_long(cluster: ServingCluster) -> Iterator[Finding]:
    for pool in cluster.spec.pools:
        finding = _lengths(pool, cluster)
        if finding:
            yield {"pool": pool.name} | dict(finding)


def _twice(cluster: ServingCluster) -> Iterator[Finding]:
    counts = Counter(pool.name for pool in cluster.spec.pools)
    yield from ({"value": name, "n": n, "limit": 1} for name, n in counts.items() if n > 1)


def _reserved(pool: Pool, _: ServingCluster) -> Finding | None:
    return {"value": pool.name} if pool.name in RESERVED_POOL_NAMES else None


_LENGTH: Final = "(size(self.metadata.name) + size(p.name))"

RULES: Final = (
    Rule(
        'metadata.name: "{value}" must begin with a letter and hold only a-z, 0-9 and "-"',
        _cluster_name,
        Cel("cluster", f"self.metadata.name.matches('{CLUSTER_NAME}')", {"value": "self.metadata.name"}),
    ),
    Rule(
        'spec.pools[{pool}].name: with the cluster\'s name "{cluster}" {value} characters; '
        "the limit is {limit}",
        _for_each_long,
        Cel(
            "cluster",
            f"self.spec.pools.all(p, {_LENGTH} <= {NAMES_LIMIT})",
            {
                "pool": "p.name",
                "cluster": "self.metadata.name",
                "value": f"string({_LENGTH})",
                "limit": f"'{NAMES_LIMIT}'",
            },
            f"self.spec.pools.filter(p, {_LENGTH} > {NAMES_LIMIT})",
        ),
    ),
    # The API server knows pools by name and refuses a second one itself ("Duplicate value").
    Rule("spec.pools: {n} pools are named {value}; the limit is {limit}", _twice),
    pool_rule(
        'spec.pools[{pool}].name: "{value}" is kept for the cluster\'s own objects; choose another',
        _reserved,
        f"!(self.name in {cel_list(RESERVED_POOL_NAMES)})",
        {"value": "self.name"},
    ),
)
