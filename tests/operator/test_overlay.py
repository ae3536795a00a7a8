"""The pod template of a pool, laid over the generated one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_operator.accept import refusals
from broadbeam_operator.images import Images
from broadbeam_operator.manifests import manifests
from broadbeam_operator.manifests.overlay import MERGE_KEYS, overlay, problem

WORDS = [
    "metadata",
    "spec",
    "labels",
    "annotations",
    "readinessGates",
    "engine",
    *MERGE_KEYS,
    *MERGE_KEYS.values(),
]
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=12,
)
PARTS = st.dictionaries(st.sampled_from(["metadata", "spec"]), VALUES)


@pytest.mark.parametrize(
    ("base", "patch", "result"),
    [
        pytest.param({"a": 1}, {"b": 2}, {"a": 1, "b": 2}, id="mappings merge"),
        pytest.param({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}, id="deeply"),
        pytest.param({"a": 1, "b": 2}, {"a": None}, {"b": 2}, id="null removes"),
        pytest.param({"args": ["x"]}, {"args": ["y"]}, {"args": ["y"]}, id="plain lists are replaced"),
        pytest.param(
            {"containers": [{"name": "a", "image": "1"}, {"name": "b"}]},
            {"containers": [{"name": "a", "image": "2"}, {"name": "c"}]},
            {"containers": [{"name": "a", "image": "2"}, {"name": "b"}, {"name": "c"}]},
            id="containers merge by name",
        ),
        pytest.param(
            {"volumeMounts": [{"mountPath": "/a", "name": "x"}]},
            {"volumeMounts": [{"mountPath": "/a", "name": "y"}]},
            {"volumeMounts": [{"mountPath": "/a", "name": "y"}]},
            id="mounts merge by path",
        ),
        pytest.param(
            {
                "volumes": [
                    {"name": "cache", "emptyDir": {}},
                    {"name": "shm", "emptyDir": {"medium": "Memory"}},
                ]
            },
            {
                "volumes": [
                    {"name": "cache", "persistentVolumeClaim": {"claimName": "models"}},
                    {"name": "shm", "emptyDir": {"sizeLimit": "8Gi"}},
                ]
            },
            {
                "volumes": [
                    {"name": "cache", "persistentVolumeClaim": {"claimName": "models"}},
                    {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
                ]
            },
            id="another kind of volume takes the place of the first",
        ),
        pytest.param(
            {"env": [{"name": "A", "value": "1"}]},
            {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]},
            {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]},
            id="another source of a variable too",
        ),
        pytest.param({}, {"a": {"b": None, "c": 1}}, {"a": {"c": 1}}, id="nulls never arrive"),
    ],
)
def test_a_patch_is_laid_over(base, patch, result):
    assert overlay(base, patch) == result


def test_laying_over_changes_neither_side():
    base, patch = {"a": {"b": [1]}}, {"a": {"c": 2}}
    overlay(base, patch)
    assert (base, patch) == ({"a": {"b": [1]}}, {"a": {"c": 2}})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        pytest.param({"spec": {"priorityClassName": "high"}}, None, id="right"),
        pytest.param(
            {"sepc": {}}, "template.sepc: unknown field; a pod template has metadata and spec", id="typo"
        ),
        pytest.param(
            {"spec": {"containers": [{"image": "x"}]}},
            "template.spec.containers[0]: name is missing; it says which item is meant",
            id="a container without a name",
        ),
        pytest.param(
            {"spec": {"containers": [{"name": None}]}},
            "template.spec.containers[0]: name is missing; it says which item is meant",
            id="a container with nothing for a name",
        ),
        pytest.param(
            {"spec": {"volumes": [{"name": {"a": 1}}]}},
            "template.spec.volumes[0]: name is missing; it says which item is meant",
            id="a mapping for a name",
        ),
        pytest.param(
            {"spec": {"containers": [{"name": "engine", "ports": [{"containerPort": 53}] * 2}]}},
            "template.spec.containers[0].ports[1]: containerPort 53 is given twice",
            id="an item twice, of which one would be lost",
        ),
        pytest.param(
            {"spec": {"containers": {"name": "engine"}}}, "template.spec.containers: not a list", id="no list"
        ),
        pytest.param({"spec": "fast"}, "template.spec: not a mapping", id="no mapping"),
        pytest.param({"metadata": {"labels": []}}, "template.metadata.labels: not a mapping", id="no labels"),
        pytest.param(
            {"metadata": {"labels": {"tier": 1}}},
            "template.metadata.labels.tier: not text; put it in quotes",
            id="a number for a label",
        ),
        pytest.param(
            {"spec": {"containers": None}},
            "template.spec.containers: null would remove what every pod needs",
            id="no containers",
        ),
        pytest.param(
            {"metadata": None}, "template.metadata: null would remove what every pod needs", id="no metadata"
        ),
        pytest.param({"metadata": {"labels": None}}, None, id="no labels but ours"),
        pytest.param(
            {"spec": {"$patch": "replace"}},
            "template.spec.$patch: patch directives are not supported; set a field to null to remove it",
            id="a patch directive",
        ),
    ],
)
def test_a_template_that_cannot_be_laid_over_is_named(template, words):
    assert problem(template) == words


@given(template=PARTS)
def test_any_template_is_refused_in_a_line_or_can_be_laid_over(template: dict[str, Any]) -> None:
    cluster = serving_cluster(pools=[pool("both", template=template)])
    if wrong := refusals(cluster):
        assert all(line.startswith("spec.pools[both].template") for line in wrong)
    else:
        assert manifests(cluster, Images())
