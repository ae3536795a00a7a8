"""When an object is applied again, and when it is left alone."""

from __future__ import annotations

import pytest

from broadbeam_operator import names
from broadbeam_operator.drift import holds, must_apply


@pytest.mark.parametrize(
    ("live", "wanted", "same"),
    [
        pytest.param({"a": 1, "b": 2}, {"a": 1}, True, id="a field more"),
        pytest.param({"a": 2}, {"a": 1}, False, id="another value"),
        pytest.param({}, {"a": 1}, False, id="a field less"),
        pytest.param({}, {"a": {}}, True, id="an empty mapping dropped"),
        pytest.param({}, {"a": []}, True, id="an empty list dropped"),
        pytest.param({}, {"a": ""}, True, id="an empty text dropped"),
        pytest.param({}, {"a": 0}, False, id="zero is a value"),
        pytest.param({}, {"a": False}, False, id="false is a value"),
        pytest.param({"a": "1"}, {"a": "1000m"}, True, id="cores written shorter"),
        pytest.param({"a": "1Gi"}, {"a": "1024Mi"}, True, id="memory written shorter"),
        pytest.param({"a": "2Gi"}, {"a": "1024Mi"}, False, id="more memory"),
        pytest.param({"a": "v1"}, {"a": "v2"}, False, id="text is no quantity"),
        pytest.param({"a": True}, {"a": 1}, True, id="Python thinks true is 1"),
        pytest.param({"a": ["x", "y"]}, {"a": ["x"]}, False, id="arguments are compared whole"),
        pytest.param(
            {"a": [{"name": "x", "d": 1}, {"name": "y"}]}, {"a": [{"name": "y"}]}, True, id="an item more"
        ),
        pytest.param({"a": [{"name": "x"}]}, {"a": [{"name": "y"}]}, False, id="another item"),
        pytest.param({"a": None}, {"a": {"b": 1}}, False, id="nothing where a mapping is wanted"),
    ],
)
def test_an_object_holds_what_is_wanted(live, wanted, same):
    assert holds(live, wanted) is same


def stamped(digest: str, **fields: object) -> dict[str, object]:
    return {"metadata": {"annotations": {names.ANNOTATION_APPLIED_HASH: digest}}, **fields}


@pytest.mark.parametrize(
    ("live", "apply"),
    [
        pytest.param(stamped("one", spec=1), False, id="the same"),
        pytest.param(stamped("two", spec=1), True, id="a field was dropped since"),
        pytest.param(stamped("one", spec=2), True, id="somebody changed it"),
        pytest.param({"metadata": {}, "spec": 1}, True, id="never applied by us"),
    ],
)
def test_an_object_is_applied_when_changed_or_rendered_otherwise(live, apply):
    assert must_apply(stamped("one", spec=1), live) is apply
