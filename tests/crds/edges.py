"""Values at the edge of a field, and whether they are good: the models and the API server must agree."""

from __future__ import annotations

from typing import Any, NamedTuple


class Edge(NamedTuple):
    """`path` is dotted from the spec, list items by number."""

    path: str
    value: Any
    good: bool


GROUPS = "pools.0.groups"
MEMORY = "pools.0.kvCache.memory"
UNAVAILABLE = "rollout.maxUnavailable"
SURGE = "rollout.maxSurge"
DRAIN = "engine.drain"
SOURCE = "model.source"

EDGES = [
    Edge(GROUPS, 0, True),
    Edge(GROUPS, 256, True),
    Edge(GROUPS, 257, False),
    Edge(GROUPS, -1, False),
    Edge(GROUPS, 1.0, True),  # JSON has one kind of number
    Edge(GROUPS, -0.0, True),
    Edge(GROUPS, 1.5, False),
    Edge(GROUPS, 2**63, False),
    Edge(GROUPS, 1e30, False),
    Edge(GROUPS, "1", False),
    Edge(GROUPS, True, False),
    Edge(GROUPS, None, True),  # null is absent, and takes the default
    Edge("model.name", None, False),  # which this has not
    Edge("model.maxModelLen", 1, False),  # a prompt and an answer
    Edge("model.maxModelLen", None, True),
    Edge("gateway", None, True),
    Edge("engine.env", None, True),
    Edge("engine.env", [None], False),
    Edge("objectives", None, True),
    Edge("pools.0.parallelism", {"data": None}, True),
    Edge(MEMORY, "0.5Gi", True),
    Edge(MEMORY, "1500m", True),
    Edge(MEMORY, 1000.0, True),
    Edge(MEMORY, 2**63 - 1, True),
    Edge(MEMORY, 2**63, False),
    Edge(MEMORY, "1e3", False),
    Edge(MEMORY, "1Ei", False),
    Edge(MEMORY, "-1Gi", False),
    Edge(MEMORY, "0", False),
    Edge(MEMORY, "", False),
    Edge(MEMORY, "٤Gi", False),
    Edge(MEMORY, "1Gi\n", False),
    Edge(UNAVAILABLE, 0, False),
    Edge(UNAVAILABLE, "0%", False),
    Edge(UNAVAILABLE, "100%", True),
    Edge(UNAVAILABLE, "101%", False),
    Edge(UNAVAILABLE, "9999", True),
    Edge(UNAVAILABLE, 9999, True),
    Edge(UNAVAILABLE, 10000, False),
    Edge(UNAVAILABLE, "01", False),
    Edge(UNAVAILABLE, "00", False),
    Edge(SURGE, 0, True),
    Edge(SURGE, "0", True),
    Edge(SURGE, "00", False),
    Edge(SURGE, "1", False),
    Edge(DRAIN, "0s", True),
    Edge(DRAIN, "1h1m1s1ms", True),
    Edge(DRAIN, "999999999h", True),
    Edge(DRAIN, "1000000000h", False),
    Edge(DRAIN, "1e3s", False),
    Edge(DRAIN, "1d", False),
    Edge(DRAIN, 5, False),
    Edge("kv.transfer.lease", "000000001ms", True),
    Edge("kv.transfer.lease", "0.000s", False),
    Edge("pools.0.chunking", {"output": "disabled"}, True),
    Edge("pools.0.chunking", {"output": 1_000_000_000}, False),
    Edge(SOURCE, "file:///modèle", True),
    Edge(SOURCE, "file:///a b", False),
    Edge(SOURCE, "file:///a\u00a0b", False),
    Edge(SOURCE, "file:///a\u2028b", False),
    Edge(SOURCE, "file:///a\x85b", False),
    Edge(SOURCE, "file://", False),
    Edge("pools.0.name", "é", False),
    Edge("pools.0.name", "p\n", False),
    Edge("engine.extraArgs", ["é" * 4096], True),
    Edge("engine.extraArgs", ["é" * 4097], False),
]


def edited(manifest: dict[str, Any], edge: Edge) -> dict[str, Any]:
    """`manifest` with the edge's value in its place."""
    *parents, last = edge.path.split(".")
    node: Any = manifest["spec"]
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    node[last] = edge.value
    return manifest
