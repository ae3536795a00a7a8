"""A cross-field rule, said once: a message with gaps, Python that finds what breaks it, and the same in CEL.

The message's gaps are filled from Python values here and from CEL expressions in the API server, so both
refuse in the same words. A message begins with the field's path and a colon.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from broadbeam_crds.v1alpha1 import Pool, ServingCluster

Finding = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a manifest. `message` is the whole line, field and limit included."""

    field: str
    value: str
    limit: str
    message: str


@dataclass(frozen=True, slots=True)
class Cel:
    """`rule` must be true. `values` are string expressions for the message's gaps, over `self` or over the
    variable of `first`, such as self.pools.filter(p, ...), which finds what the message is about."""

    scope: Literal["cluster", "spec", "pool"]
    rule: str
    values: Mapping[str, str] = field(default_factory=dict)
    first: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """`find` gives a finding for each violation: the message's gaps, and `value` and `limit` for programs."""

    message: str
    find: Callable[[ServingCluster], Iterable[Finding]]
    cel: Cel | None = None

    def check(self, cluster: ServingCluster) -> list[Violation]:
        return [self._violation(finding) for finding in self.find(cluster)]

    def _violation(self, finding: Finding) -> Violation:
        message = self.message.format(**finding)
        path = message.partition(": ")[0]
        return Violation(path, str(finding.get("value", "")), str(finding.get("limit", "")), message)

    def cel_message(self) -> str:
        """The message as a CEL expression: 'text %s text'.format([expression, ...]).

        Not a sum of strings: the API server takes string(integer) to be of unbounded length, so every sum
        of one is beyond the cost it allows, and format is not (it needs Kubernetes 1.30).
        """
        assert self.cel is not None
        text, *rest = re.split(r"\{(\w+)\}", self.message.replace("%", "%%"))
        gaps = [self.cel.values[gap] for gap in rest[::2]]
        told = f"{cel_text('%s'.join((text, *rest[1::2])))}.format([{', '.join(gaps)}])"
        return f"{self.cel.first}.map(p, {told})[0]" if self.cel.first else told


def pool_rule(
    message: str,
    find: Callable[[Pool, ServingCluster], Finding | None],
    cel: str | None = None,
    values: Mapping[str, str] | None = None,
) -> Rule:
    """A rule about one pool, of which CEL sees nothing else: `self` is the pool, {pool} its name."""
    places = {"pool": "self.name"} | dict(values or {})
    return Rule(message, _for_each_pool(find), Cel("pool", cel, places) if cel else None)


def pool_in_spec_rule(
    message: str,
    find: Callable[[Pool, ServingCluster], Finding | None],
    broken: str,
    values: Mapping[str, str] | None = None,
) -> Rule:
    """A rule about one pool `p` beside the rest of the spec: `broken` is CEL that must hold for none."""
    places = {"pool": "p.name"} | dict(values or {})
    first = f"self.pools.filter(p, {broken})"
    return Rule(message, _for_each_pool(find), Cel("spec", f"!self.pools.exists(p, {broken})", places, first))


def _for_each_pool(
    find: Callable[[Pool, ServingCluster], Finding | None],
) -> Callable[[ServingCluster], Iterable[Finding]]:
    def found(cluster: ServingCluster) -> Iterable[Finding]:
        for pool in cluster.spec.pools:
            finding = find(pool, cluster)
            if finding is not None:
                yield {"pool": pool.name} | dict(finding)

    return found


def cel_text(text: str) -> str:
    """`text` as a CEL string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def cel_list(values: Iterable[object]) -> str:
    """Values of one type as a CEL list literal."""
    return "[" + ", ".join(cel_literal(value) for value in values) + "]"


def cel_literal(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case _:
            return cel_text(str(value))
