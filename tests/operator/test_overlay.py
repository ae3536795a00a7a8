"""The pod template of a pool, laid over the generated one."""

from __future__ import annotations

import pytest

from broadbeam_operator.manifests.overlay import overlay, problem


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
            {"spec": {"$patch": "replace"}},
            "template.spec.$patch: patch directives are not supported; set a field to null to remove it",
            id="a patch directive",
        ),
    ],
)
def test_a_template_that_cannot_be_laid_over_is_named(template, words):
    assert problem(template) == words
