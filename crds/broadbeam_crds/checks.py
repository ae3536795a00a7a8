"""`validate`: everything that is wrong with a ServingCluster beyond the types of its fields.

The API server evaluates the CEL of these rules (written into the CRD by `schema`), the operator and
`broadbeam render|explain` their Python; the words are the same.
"""

from __future__ import annotations

from typing import Final

from broadbeam_crds.rules import experts, fitting, models, names, pools, serving, support
from broadbeam_crds.rules.rule import Rule, Violation
from broadbeam_crds.v1alpha1 import ServingCluster

__all__ = ["RULES", "Violation", "validate"]

RULES: Final[tuple[Rule, ...]] = (
    *names.RULES,
    *pools.RULES,
    *models.RULES,
    *experts.RULES,
    *serving.RULES,
    *support.RULES,
    *fitting.RULES,
)


def validate(cluster: ServingCluster) -> list[Violation]:
    """Every violation, in the order of the rules; empty for a cluster that can be built."""
    return [violation for rule in RULES for violation in rule.check(cluster)]
