"""Two ServingClusters whose joined names are the same: neither takes what the other has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from broadbeam_crds.conventions import API_GROUP
from cluster import Cluster, Object, Serving, eventually
from manifests import namespace, pool, simulated

NAMESPACE = "e2e-names"


@pytest.fixture(scope="module")
def home(operator: Cluster) -> Iterator[Cluster]:
    operator.apply(namespace(NAMESPACE))
    yield operator
    operator.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def small(name: str, pool_name: str) -> Object:
    """One rank and no gateway."""
    manifest = simulated(NAMESPACE, name)
    spec: dict[str, Any] = manifest["spec"]
    spec["pools"] = [pool(pool_name) | {"role": "both"}]
    spec["kv"] = {}
    spec["gateway"] = {"replicas": 0}
    return manifest


def taken(serving: Serving) -> str | None:
    """What the operator says of a name that it cannot have."""
    found = serving.condition("Progressing") or {}
    return str(found["message"]) if found.get("reason") == "NameTaken" else None


def owner(home: Cluster, workload: str) -> str | None:
    found = home.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/statefulsets/{workload}")
    return found["metadata"]["ownerReferences"][0]["name"] if found else None


def test_the_second_cluster_waits_for_the_name_and_says_whose_it_is(home: Cluster) -> None:
    first, second = home.serving(NAMESPACE, "a"), home.serving(NAMESPACE, "a-b")
    home.apply(small("a", "b-c"))
    eventually(lambda: owner(home, "a-b-c-0") == "a", 30, "the first has its group")

    home.apply(small("a-b", "c"))
    message = eventually(lambda: taken(second), 30, "the operator has tried")

    assert 'of this cluster belongs to ServingCluster "a"; rename the cluster or its pool' in message
    assert owner(home, "a-b-c-0") == "a"
    assert second.pods() == []

    first.delete()
    # A young control plane's garbage collector learns of a new CRD after up to 30 s, and the operator has
    # backed off meanwhile: alone this takes 65 s.
    eventually(lambda: owner(home, "a-b-c-0") == "a-b", 180, "the second has the name")
    second.delete()


def test_a_service_that_a_person_made_stays_as_it_is(home: Cluster) -> None:
    labels, ports = {"app": "theirs"}, [{"port": 80}]
    meta = {"name": "mine-gateway", "namespace": NAMESPACE, "labels": labels}
    home.apply({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"ports": ports}})
    mine = home.serving(NAMESPACE, "mine")

    home.apply(small("mine", "both"))
    message = eventually(lambda: taken(mine), 30, "the operator has tried")

    assert 'Service "mine-gateway" of this cluster is there already and not ours' in message
    service = home.get(f"/api/v1/namespaces/{NAMESPACE}/services/mine-gateway")
    assert service is not None
    assert f"{API_GROUP}/cluster" not in service["metadata"]["labels"]
    mine.delete()
