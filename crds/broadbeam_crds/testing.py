"""Builders for tests: a small valid ServingCluster, and ways to change one thing about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from broadbeam_crds.v1alpha1 import Pool, Role, ServingCluster, cluster_from

TINY_MODEL: dict[str, Any] = {"name": "tiny", "source": "tiny://deepseek-v3?seed=0", "maxModelLen": 1024}


def pool(
    name: str = "decode",
    role: Role | None = None,
    groups: int = 1,
    data: int = 1,
    nodes: int = 1,
    **fields: Any,
) -> Pool:
    """A pool on CPUs; the role follows from the name where it is one, and perNode from data and nodes.

    `fields` are wire names (camelCase) and win over everything else.
    """
    given: dict[str, Any] = {
        "name": name,
        "role": role or (name if name in ("prefill", "decode", "both") else "both"),
        "groups": groups,
        "parallelism": {"data": data, "nodes": nodes},
        "accelerator": {"resource": "cpu", "perNode": max(1, data // nodes)},
        "kvCache": {"memory": "64Mi"},
    }
    return Pool.model_validate(given | fields)


def serving_cluster(
    name: str = "demo",
    pools: Sequence[Pool | Mapping[str, Any]] | None = None,
    engine: str | Mapping[str, Any] = "broadbeam",
    namespace: str = "default",
    **spec: Any,
) -> ServingCluster:
    """A cluster of a tiny random model, with one prefill and one decode group unless `pools` says otherwise.

    A cluster with a prefill pool gets a TCP connector unless `kv` is given; `spec` are wire names.
    """
    chosen = [pool("prefill"), pool("decode")] if pools is None else pools
    plain = [each.wire() if isinstance(each, Pool) else dict(each) for each in chosen]
    fields: dict[str, Any] = {
        "model": TINY_MODEL,
        "engine": {"name": engine} if isinstance(engine, str) else dict(engine),
        "pools": plain,
    }
    if any(each.get("role") == "prefill" for each in plain):
        fields["kv"] = {"transfer": {"connector": "tcp"}}
    return cluster_from(
        {
            "apiVersion": "serving.broadbeam.io/v1alpha1",
            "kind": "ServingCluster",
            "metadata": {"name": name, "namespace": namespace, "uid": f"uid-{name}", "generation": 1},
            "spec": fields | spec,
        }
    )
