"""A manifest that cannot be used gives one line with field, value and limit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import ManifestError, ServingCluster, cluster_from, load_manifest, to_yaml


def changed(path: str, value: Any) -> str:
    """The default cluster as YAML with one field set; `path` is dotted, list items by number."""
    manifest = serving_cluster().wire()
    *parents, last = path.split(".")
    node: Any = manifest
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return yaml.safe_dump(manifest)


def refusal(text: str) -> str:
    with pytest.raises(ManifestError) as caught:
        load_manifest(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param(
            "kind",
            "InferenceService",
            'kind: "InferenceService" is not ServingCluster',
            id="another kind",
        ),
        pytest.param(
            "apiVersion",
            "serving.broadbeam.io/v2",
            'apiVersion: "serving.broadbeam.io/v2" is not serving.broadbeam.io/v1alpha1',
            id="another version",
        ),
        pytest.param("spec", None, "spec: missing; it is required", id="no spec"),
        pytest.param("spec.model.source", None, "spec.model.source: missing; it is required", id="no source"),
        pytest.param(
            "spec.model.source",
            "s3://bucket",
            'spec.model.source: "s3://bucket" does not match ^(hf|pvc|oci|file|pypi|tiny)://[^\\p{Z}\\p{Cc}]+$',
            id="an unknown source",
        ),
        pytest.param(
            "spec.pools.1.paralellism",
            {"data": 2},
            'spec.pools[decode].paralellism: unknown field; did you mean "parallelism"?',
            id="a misspelt field",
        ),
        pytest.param("spec.zzz", 1, "spec.zzz: unknown field", id="an unknown field"),
        pytest.param(
            "spec.pools.0.parallelism.dataParallel",
            2,
            "spec.pools[prefill].parallelism.dataParallel: unknown field",
            id="an unknown field of a pool",
        ),
        pytest.param(
            "spec.pools.0.groups", -1, "spec.pools[prefill].groups: -1 is below the limit 0", id="below"
        ),
        pytest.param(
            "spec.pools.0.groups", 300, "spec.pools[prefill].groups: 300 is above the limit 256", id="above"
        ),
        pytest.param(
            "spec.pools.0.groups", "2", 'spec.pools[prefill].groups: "2" is not an integer', id="text"
        ),
        pytest.param(
            "spec.pools.0.groups", 1.5, "spec.pools[prefill].groups: 1.5 is not an integer", id="a fraction"
        ),
        pytest.param(
            "spec.pools.0.groups", True, "spec.pools[prefill].groups: true is not an integer", id="true"
        ),
        pytest.param("spec.kv.events", "yes", 'spec.kv.events: "yes" is not true or false', id="no boolean"),
        pytest.param(
            "spec.engine.name", "trt", 'spec.engine.name: "trt" is not one of vllm, broadbeam, sim', id="enum"
        ),
        pytest.param("spec.pools", [], "spec.pools: has 0 items; at least 1 needed", id="no pools"),
        pytest.param(
            "spec.pools",
            [{"name": f"p{i}"} for i in range(17)],
            "spec.pools: a list has 17 items; the limit is 16",
            id="too many pools",
        ),
        pytest.param("spec.pools", "decode", 'spec.pools: "decode" is not a list', id="no list"),
        pytest.param("spec.gateway", 3, "spec.gateway: 3 is not a mapping", id="no mapping"),
        pytest.param("spec.engine.image", 3, "spec.engine.image: 3 is not text", id="no text"),
        pytest.param(
            "spec.pools.0.name",
            "p" * 25,
            f'spec.pools[{"p" * 25}].name: "{"p" * 25}" has 25 characters; the limit is 24',
            id="a long name",
        ),
        pytest.param(
            "spec.pools.0.kvCache.memory",
            "64MB",
            'spec.pools[prefill].kvCache.memory: "64MB" is not a quantity above zero such as 64Gi, 256Mi, '
            '500m, 2 or "1.5"',
            id="no quantity",
        ),
        pytest.param(
            "spec.kv.transfer.lease",
            "0s",
            'spec.kv.transfer.lease: "0s" is not a duration above zero such as 500ms, 30s, 1m30s or 2h',
            id="no lease",
        ),
        pytest.param(
            "spec.rollout.canary.weights",
            [0],
            "spec.rollout.canary.weights[0]: 0 is below the limit 1",
            id="a canary out of range",
        ),
        pytest.param(
            "spec.pools.1.expertLoadBalancing.maxMovedFraction",
            0,
            "spec.pools[decode].expertLoadBalancing.maxMovedFraction: 0 is not above the limit 0",
            id="a fraction of nothing",
        ),
        pytest.param(
            "spec.pools.1.chunking.output",
            -5,
            'spec.pools[decode].chunking.output: "-5" is not a positive number of tokens, or "disabled"',
            id="a negative chunk",
        ),
        pytest.param(
            "spec.gateway.auth.secretRef.name",
            "My Keys",
            'spec.gateway.auth.secretRef.name: "My Keys" does not match ^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$',
            id="no name of a Secret",
        ),
        pytest.param("metadata", {}, "metadata.name: missing; it is required", id="no name"),
    ],
)
def test_a_wrong_field_is_named_with_value_and_limit(path: str, value: Any, message: str) -> None:
    assert refusal(changed(path, value)) == f"manifest: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "a: [1\nb: 2\n", "manifest: line 2: not YAML: expected ',' or ']', but got ':'", id="torn"
        ),
        pytest.param("\ta: 1\n", "manifest: line 1: not YAML: found character", id="a tab"),
        pytest.param("a: \x00\n", "manifest: not YAML: unacceptable character", id="bytes"),
        pytest.param(
            "- 1\n- 2\n", "manifest: not a mapping but a list; expected a ServingCluster", id="a list"
        ),
        pytest.param("\n\n", "manifest: 0 documents; the limit is one ServingCluster", id="nothing"),
        pytest.param("a: 1\n---\nb: 1\n", "manifest: 2 documents; the limit is one", id="two documents"),
        pytest.param("a: 1\nb: 2\na: 3\n", 'manifest: line 3: the key "a" is given twice', id="a key twice"),
        pytest.param("[" * 9999 + "\n", "manifest: nested too deeply to be a manifest", id="too deep"),
        pytest.param(f"a: {'1' * 5000}\n", "manifest: not YAML: Exceeds the limit", id="a long number"),
        pytest.param("a: *b\n", "manifest: line 1: not YAML: found undefined alias 'b'", id="no such anchor"),
        pytest.param("a: !!python/name:os.system x\n", "manifest: line 1: not YAML: could not", id="a tag"),
        pytest.param("a: &a\n  b: *a\n", "manifest: nested too deeply to be a manifest", id="within itself"),
        pytest.param(
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefghi")),
            "manifest: more than 100,000 values, too many for a manifest",
            id="a billion aliases",
        ),
        pytest.param("a: !!binary aGVsbG8=\n", "manifest: line 1: not YAML: could not", id="raw bytes"),
        pytest.param("a: !!set {b, c}\n", "manifest: line 1: not YAML: could not", id="a set"),
        pytest.param(
            "a:\n- .nan\n", 'manifest: line 2: not YAML: ".nan" is no number that JSON has', id="no number"
        ),
        pytest.param(
            "? [1, 2]\n: x\n", "manifest: line 1: not YAML: found unhashable key", id="a list as key"
        ),
    ],
)
def test_what_is_no_manifest_is_refused_in_one_line(text: str, message: str) -> None:
    found = refusal(text)

    assert found.startswith(message)
    assert "\n" not in found


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    torn = tmp_path / "torn.yaml"
    torn.write_bytes(b"kind: \xff\n")

    with pytest.raises(ManifestError, match=r"absent\.yaml: No such file or directory"):
        load_manifest(tmp_path / "absent.yaml")
    with pytest.raises(ManifestError, match=r"Is a directory"):
        load_manifest(str(tmp_path))
    with pytest.raises(ManifestError, match=r"torn\.yaml: not text in UTF-8 \(byte 6\)"):
        load_manifest(torn)


def test_a_mistake_in_a_file_is_reported_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(changed("spec.engine.name", "trt"))

    with pytest.raises(ManifestError, match=r"wrong\.yaml: spec\.engine\.name: "):
        load_manifest(path)


def test_more_than_one_mistake_is_counted() -> None:
    manifest = serving_cluster().wire()
    manifest["spec"]["pools"][0]["groups"] = -1
    manifest["spec"]["gateway"]["retries"] = 99

    assert refusal(yaml.safe_dump(manifest)) == (
        "manifest: spec.pools[prefill].groups: -1 is below the limit 0 (and 1 more)"
    )


FULL = serving_cluster(
    "full",
    pools=[
        pool(
            "both",
            data=2,
            chunking={"moeDataParallel": "disabled", "output": 256},
            autoscaling={"minGroups": 0, "maxGroups": 3},
            expertLoadBalancing={"maxMovedFraction": 0.25},
            weightOffload={"groupSize": 2, "parameters": ["w13_weight"]},
            dualBatchOverlap={},
            resources={"cpu": 2, "memory": "1.5Gi"},
            template={"metadata": {"labels": {"team": "a"}}, "spec": {"hostNetwork": True}},
        )
    ],
    engine={
        "name": "sim",
        "sim": {"load": "0s"},
        "env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}],
        "extraArgs": ["--verbose"],
    },
    kv={"transfer": {"connector": "tcp"}, "offload": {"hostMemory": "64Gi"}, "events": True},
    gateway={"auth": {"secretRef": {"name": "keys"}}, "listeners": [{"name": "web", "port": 80}]},
    objectives={"ttft": "500ms"},
    rollout={"maxSurge": "25%", "canary": {"weights": [5, 50]}},
    recovery={},
    model={
        "name": "mine",
        "source": "pvc://models/mine",
        "architecture": {
            "layers": 2,
            "hiddenSize": 64,
            "vocabularySize": 100,
            "attentionHeads": 2,
            "latentAttention": {"kvRank": 8, "nopeHeadSize": 8, "ropeHeadSize": 8, "valueHeadSize": 8},
        },
    },
)


@pytest.mark.parametrize(
    "cluster", [pytest.param(serving_cluster(), id="default"), pytest.param(FULL, id="every field")]
)
def test_a_cluster_survives_being_written_and_read(cluster: ServingCluster) -> None:
    assert load_manifest(to_yaml(cluster)) == cluster


def test_amounts_are_written_as_the_api_server_stores_them() -> None:
    spec = FULL.wire()["spec"]

    assert spec["pools"][0]["resources"] == {"cpu": "2", "memory": "1.5Gi"}
    assert spec["pools"][0]["chunking"] == {"moeDataParallel": "disabled", "output": 256}
    assert spec["rollout"]["maxUnavailable"] == 1
    assert spec["pools"][0]["scheduling"] == {"streamInterval": 1, "cudaGraph": "auto"}


def test_what_kubernetes_adds_to_an_object_is_kept() -> None:
    stored = serving_cluster().wire()
    stored["metadata"] |= {
        "managedFields": [{"manager": "kubectl"}],
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }

    assert cluster_from(stored).wire()["metadata"]["managedFields"] == [{"manager": "kubectl"}]


def test_yaml_is_read_as_kubectl_reads_it() -> None:
    text = """
      apiVersion: serving.broadbeam.io/v1alpha1
      kind: ServingCluster
      metadata: {name: demo, creationTimestamp: null}
      spec:
        model: {name: a, source: "hf://a", maxModelLen: 1e3}
        engine: {env: [{name: AT, value: 12:30}], extraArgs: [1_x]}
        gateway: null
        pools:
        - name: main
          groups: 0x10
          kvCache: {memory: 1.5e9}
          template: {metadata: {annotations: {1: a, true: b}}, spec: {hostname: null}}
    """

    spec = load_manifest(text).spec

    assert spec.model.max_model_len == 1000
    assert (spec.engine.env[0].value, spec.engine.extra_args) == ("12:30", ["1_x"])
    assert spec.gateway.replicas == 1
    assert (spec.pools[0].groups, spec.pools[0].kv_cache.memory) == (16, "1500000000")
    assert spec.pools[0].template == {
        "metadata": {"annotations": {"1": "a", "true": "b"}},
        "spec": {"hostname": None},  # in a template null removes
    }


def test_a_time_in_yaml_stays_text() -> None:
    text = to_yaml(serving_cluster()).replace(
        "  name: demo", "  name: demo\n  creationTimestamp: 2026-01-01T00:00:00Z", 1
    )

    assert load_manifest(text).metadata.creation_timestamp == "2026-01-01T00:00:00Z"


def test_a_cluster_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        serving_cluster().spec.gateway.replicas = 3  # type: ignore[misc]
