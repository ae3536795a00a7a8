"""Gateway, rollout and environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from broadbeam_crds.conventions import GATEWAY_METRICS_PORT
from broadbeam_crds.rules.rule import Cel, Finding, Rule
from broadbeam_crds.v1alpha1 import ServingCluster

_ZERO: Final = ("0", "0%")
_RESERVED: Final = "BROADBEAM_"


def _rollout_stuck(cluster: ServingCluster) -> Iterator[Finding]:
    rollout = cluster.spec.rollout
    if rollout.max_surge in _ZERO and rollout.max_unavailable in _ZERO:
        yield {"value": 0, "limit": 1}


def _canary_weights(cluster: ServingCluster) -> Iterator[Finding]:
    canary = cluster.spec.rollout.canary
    if canary and canary.weights != sorted(canary.weights):
        yield {"value": ", ".join(map(str, canary.weights))}


def _ports_twice(cluster: ServingCluster) -> Iterator[Finding]:
    counts = Counter(listener.port for listener in cluster.spec.gateway.listeners)
    for port, count in counts.items():
        if count > 1:
            yield {"value": port, "n": count, "limit": 1}


def _listeners_twice(cluster: ServingCluster) -> Iterator[Finding]:
    counts = Counter(listener.name for listener in cluster.spec.gateway.listeners)
    yield from ({"value": name, "n": n, "limit": 1} for name, n in counts.items() if n > 1)


def _metrics_port(cluster: ServingCluster) -> Iterator[Finding]:
    for listener in cluster.spec.gateway.listeners:
        if listener.port == GATEWAY_METRICS_PORT:
            yield {"name": listener.name, "value": listener.port}


def _variable_value(cluster: ServingCluster) -> Iterator[Finding]:
    for variable in cluster.spec.engine.env:
        if (variable.value is None) == (variable.value_from is None):
            yield {"name": variable.name}


def _variable_reserved(cluster: ServingCluster) -> Iterator[Finding]:
    for variable in cluster.spec.engine.env:
        if variable.name.startswith(_RESERVED):
            yield {"name": variable.name, "value": variable.name}


def _variables_twice(cluster: ServingCluster) -> Iterator[Finding]:
    counts = Counter(variable.name for variable in cluster.spec.engine.env)
    yield from ({"value": name, "n": n, "limit": 1} for name, n in counts.items() if n > 1)


def _sim_of_another(cluster: ServingCluster) -> Iterator[Finding]:
    engine = cluster.spec.engine
    if engine.sim is not None and engine.name != "sim":
        yield {"value": engine.name, "limit": "sim"}


_LISTENERS: Final = "self.gateway.listeners"
_TWICE: Final = f"{_LISTENERS}.exists_one(y, y.port == x.port)"
_METRICS: Final = f"x.port == {GATEWAY_METRICS_PORT}"
_ONE_VALUE: Final = "has(e.value) != has(e.valueFrom)"
_OWN: Final = f"e.name.startsWith('{_RESERVED}')"

RULES: Final = (
    Rule(
        "spec.rollout: maxSurge and maxUnavailable are both {value}; one must be at least {limit}, or "
        "nothing can roll",
        _rollout_stuck,
        Cel(
            "spec",
            "!(string(self.rollout.maxSurge) in ['0', '0%'] && "
            "string(self.rollout.maxUnavailable) in ['0', '0%'])",
            {"value": "'0'", "limit": "'1'"},
        ),
    ),
    Rule(
        "spec.rollout.canary.weights: each must be at least the one before",
        _canary_weights,
        Cel(
            "spec",
            "!has(self.rollout.canary) || self.rollout.canary.weights.isSorted()",
        ),
    ),
    Rule(
        "spec.gateway.listeners: {n} listeners have port {value}; the limit is {limit}",
        _ports_twice,
        Cel(
            "spec",
            f"{_LISTENERS}.all(x, {_TWICE})",
            {
                "n": f"string(size({_LISTENERS}.filter(y, y.port == p.port)))",
                "value": "string(p.port)",
                "limit": "'1'",
            },
            f"{_LISTENERS}.filter(x, !{_TWICE})",
        ),
    ),
    # As with pools, the API server refuses a second item of one name itself.
    Rule("spec.gateway.listeners: {n} listeners are named {value}; the limit is {limit}", _listeners_twice),
    Rule(
        "spec.gateway.listeners[{name}].port: {value} is the port of the gateway's metrics; choose another",
        _metrics_port,
        Cel(
            "spec",
            f"!{_LISTENERS}.exists(x, {_METRICS})",
            {"name": "p.name", "value": f"'{GATEWAY_METRICS_PORT}'"},
            f"{_LISTENERS}.filter(x, {_METRICS})",
        ),
    ),
    Rule(
        "spec.engine.env[{name}]: give value or valueFrom, one of the two",
        _variable_value,
        Cel(
            "spec",
            f"!has(self.engine.env) || self.engine.env.all(e, {_ONE_VALUE})",
            {"name": "p.name"},
            f"self.engine.env.filter(e, !({_ONE_VALUE}))",
        ),
    ),
    Rule(
        "spec.engine.env[{name}]: names that begin with BROADBEAM_ are set by the operator",
        _variable_reserved,
        Cel(
            "spec",
            f"!has(self.engine.env) || !self.engine.env.exists(e, {_OWN})",
            {"name": "p.name"},
            f"self.engine.env.filter(e, {_OWN})",
        ),
    ),
    Rule("spec.engine.env: {n} variables are named {value}; the limit is {limit}", _variables_twice),
    Rule(
        'spec.engine.sim: only for engine sim, but spec.engine.name is "{value}"',
        _sim_of_another,
        Cel("spec", "!has(self.engine.sim) || self.engine.name == 'sim'", {"value": "self.engine.name"}),
    ),
)
