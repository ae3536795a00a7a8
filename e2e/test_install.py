"""Installing Broadbeam, and what the API server says about ServingClusters before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from broadbeam_crds.checks import validate
from broadbeam_crds.v1alpha1 import cluster_from
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


def changed(path: str, value: Any) -> dict[str, Any]:
    """The simulated cluster with one field set: `pools.0.groups`."""
    manifest = simulated(NAMESPACE)
    *parents, last = path.split(".")
    node: Any = manifest["spec"]
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return manifest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param("pools.1.parallelism.data", 3, id="ranks do not fill the nodes"),
        pytest.param("pools.1.parallelism.tensor", 2, id="tensor parallelism adds ranks"),
        pytest.param("kv", {}, id="prefill and decode without a connector"),
        pytest.param("pools.1.role", "prefill", id="nobody decodes"),
        pytest.param("pools.1.name", "gateway", id="a reserved name"),
        pytest.param("pools.1.kvCache.blockSize", 32, id="block sizes differ"),
        pytest.param(
            "pools.1.weightOffload", {"groupSize": 1, "numInGroup": 2}, id="offload more than a group"
        ),
        pytest.param("pools.1.dualBatchOverlap", {}, id="overlap is not built for sim"),
        pytest.param("pools.1.autoscaling", {"maxGroups": 4}, id="autoscaling is not built"),
    ],
)
def test_the_api_server_refuses_in_the_words_of_the_models(
    operator: Cluster, home: str, path: str, value: Any
) -> None:
    manifest = changed(path, value)
    wanted = validate(cluster_from(manifest))
    assert wanted, "the models accept it"

    answer = operator.run("apply", "-f", "-", stdin=json.dumps(manifest))

    assert answer.returncode != 0, answer.stdout
    assert any(violation.message in answer.stderr for violation in wanted), f"{wanted}\n{answer.stderr}"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        pytest.param("pools.0.group", 2, 'unknown field "spec.pools[0].group"', id="a misspelt field"),
        pytest.param("pools.0.groups", -1, "spec.pools[0].groups", id="a negative number"),
        pytest.param("engine.name", "trt", "Unsupported value", id="an unknown engine"),
        pytest.param("model.source", "s3://x", "spec.model.source", id="an unknown source"),
        pytest.param("pools.1.name", "prefill", "Duplicate value", id="two pools of one name"),
    ],
)
def test_the_api_server_refuses_by_the_schema(
    operator: Cluster, home: str, path: str, value: Any, words: str
) -> None:
    answer = operator.run("apply", "-f", "-", stdin=json.dumps(changed(path, value)))

    assert answer.returncode != 0, answer.stdout
    assert words in answer.stderr
