"""What the API server refuses, and in which words: each row of the rules' table, and the schema's part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.crds.edges import EDGES, edited
from tests.crds.refused import REFUSED, Row

from broadbeam_crds.testing import serving_cluster
from cluster import Answer, Cluster, Object
from manifests import namespace, simulated

NAMESPACE = "e2e-refusals"
DRY_RUN = "?dryRun=All&fieldValidation=Strict&fieldManager=e2e"


@pytest.fixture(scope="module")
def home(operator: Cluster) -> Iterator[Cluster]:
    operator.apply(namespace(NAMESPACE))
    yield operator
    operator.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def tried(home: Cluster, manifest: Object) -> Answer:
    """What the API server says to an object that it is not to keep."""
    manifest["metadata"] = {"name": manifest["metadata"]["name"], "namespace": NAMESPACE}
    path = home.serving(NAMESPACE, "").path.rstrip("/")
    return home.http(path + DRY_RUN, manifest)


def differs(home: Cluster, row: Row) -> str | None:
    """How the API server's answer to a row is not what the row says; None if it is."""
    answer = tried(home, row.cluster.wire())
    if row.by == "operator":
        return None if answer.status == 201 else f"{row.name}: {answer.status} {answer.body}"
    words = row.message if row.by == "rule" else "Duplicate value"
    if answer.status == 422 and words in answer.json["message"]:
        return None
    return f"{row.name}: {answer.status}, without {words!r}: {answer.json['message']}"


def test_every_rule_is_refused_in_the_words_of_the_models(home: Cluster) -> None:
    wrong = [found for row in REFUSED if (found := differs(home, row))]

    assert wrong == []


def test_values_at_the_edge_are_taken_or_refused_as_the_models_say(home: Cluster) -> None:
    statuses = [tried(home, edited(serving_cluster().wire(), edge)).status for edge in EDGES]

    good = [status == 201 for status in statuses]
    assert [edge for edge, taken in zip(EDGES, good, strict=True) if taken is not edge.good] == []


def test_only_model_sizes_and_device_memory_are_left_to_the_operator() -> None:
    assert [row.name for row in REFUSED if row.by == "operator"] == [
        "longer than the model was made for",
        "a cache smaller than one sequence",
        "a cache smaller than the model's own length",
        "a cache that loses a sequence to whole blocks",
        "weights beyond the device",
        "weights and cache beyond the pod",
    ]


def changed(path: str, value: Any) -> Object:
    """The simulated cluster with one field set: `pools.0.groups`."""
    manifest = simulated(NAMESPACE)
    *parents, last = path.split(".")
    node: Any = manifest["spec"]
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    node[last] = value
    return manifest


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        pytest.param("pools.0.group", 2, 'unknown field "spec.pools[0].group"', id="a misspelt field"),
        pytest.param("gateway.tls", {}, 'unknown field "spec.gateway.tls"', id="an unknown part"),
        pytest.param("pools.0.groups", -1, "spec.pools[0].groups: Invalid value: -1", id="a negative number"),
        pytest.param("pools.0.groups", "two", "must be of type integer", id="text for a number"),
        pytest.param("pools.0.groups", 1.5, "must be of type integer", id="half a group"),
        pytest.param("pools", {}, "must be of type array", id="a mapping for a list"),
        pytest.param("pools", [], "spec.pools", id="no pools"),
        pytest.param("model.name", 7, "must be of type string", id="a number for a name"),
        pytest.param("kv.events", "yes", "must be of type boolean", id="text for a switch"),
        pytest.param("engine.drain", "soon", "spec.engine.drain", id="no duration"),
        pytest.param("pools.0.kvCache.memory", "64Q", "spec.pools[0].kvCache.memory", id="no quantity"),
        pytest.param("engine.name", "trt", "Unsupported value", id="an unknown engine"),
        pytest.param("model.source", "s3://x", "spec.model.source", id="an unknown source"),
    ],
)
def test_the_schema_refuses_by_name(home: Cluster, path: str, value: Any, words: str) -> None:
    answer = tried(home, changed(path, value))

    assert answer.status in (400, 422), answer.body
    assert words in answer.json["message"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("apiVersion: [", "error converting YAML to JSON", id="no YAML"),
        pytest.param(
            json.dumps(changed("gateway.replica", 2)), 'unknown field "spec.gateway.replica"', id="kubectl"
        ),
    ],
)
def test_kubectl_says_it_in_one_line(home: Cluster, text: str, words: str) -> None:
    answer = home.run("apply", "-f", "-", stdin=text)

    assert answer.returncode != 0, answer.stdout
    assert words in answer.stderr
    assert answer.stderr.count("\n") == 1
