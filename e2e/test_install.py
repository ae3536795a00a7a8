"""Installing Broadbeam, and what the API server says about ServingClusters before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from cluster import Cluster
from installation import SYSTEM
from manifests import namespace, simulated

NAMESPACE = "e2e-install"


@pytest.fixture(scope="module")
def home(operator: Cluster) -> Iterator[str]:
    operator.apply(namespace(NAMESPACE))
    yield NAMESPACE
    operator.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def test_the_api_server_validates(cluster: Cluster) -> None:
    """A control plane built with the wrong Go serves a broken OpenAPI document and accepts anything."""
    wrong = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "datas": {"a": "b"}}

    answer = cluster.run("apply", "-f", "-", stdin=json.dumps(wrong))

    assert answer.returncode != 0
    assert 'unknown field "datas"' in answer.stderr


def test_helm_makes_an_operator_that_is_available(operator: Cluster) -> None:
    found = operator.get(f"/apis/apps/v1/namespaces/{SYSTEM}/deployments/broadbeam")

    assert found is not None
    assert found["status"]["readyReplicas"] == 1


def test_the_operator_can_be_scraped(operator: Cluster) -> None:
    selector = "--selector=app.kubernetes.io/component=operator"
    name = operator.kubectl("get", "pods", f"--namespace={SYSTEM}", selector, "--output=name").strip()

    page = operator.http(f"/api/v1/namespaces/{SYSTEM}/pods/{name.removeprefix('pod/')}:8082/proxy/metrics")

    assert page.status == 200
    assert "broadbeam_operator_reconcile_duration_seconds_bucket" in page.body
    assert 'broadbeam_operator_servingclusters{state="Available"}' in page.body


def test_explain_reads_well(operator: Cluster) -> None:
    text = operator.kubectl("explain", "servingcluster.spec.pools.parallelism")

    assert "GROUP:      serving.broadbeam.io" in text
    words = " ".join(text.split())
    assert "How the model is spread over the accelerators of one group" in words
    assert "Data-parallel ranks of a group" in words


def test_a_manifest_without_defaults_gets_them_from_the_server(operator: Cluster, home: str) -> None:
    answer = operator.kubectl(
        "apply", "--dry-run=server", "-o=json", "-f", "-", stdin=json.dumps(simulated(home))
    )

    spec = json.loads(answer)["spec"]
    assert spec["gateway"]["policy"] == "least-loaded"
    assert spec["pools"][0]["parallelism"]["tensor"] == 1
