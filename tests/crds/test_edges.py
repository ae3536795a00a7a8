"""The models say of values at the edge what the API server says; e2e/test_refusals.py asks it."""

from __future__ import annotations

import pytest
from tests.crds.edges import EDGES, Edge, edited

from broadbeam_crds.checks import RULES
from broadbeam_crds.testing import serving_cluster
from broadbeam_crds.v1alpha1 import ManifestError, cluster_from


def accepted(edge: Edge) -> bool:
    """By types and by those rules that the API server has too."""
    try:
        cluster = cluster_from(edited(serving_cluster().wire(), edge))
    except ManifestError:
        return False
    return not [found for rule in RULES if rule.cel for found in rule.check(cluster)]


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: ascii(f"{edge.path}={edge.value}")[:48])
def test_a_value_at_the_edge_is_taken_or_refused(edge: Edge) -> None:
    assert accepted(edge) is edge.good
