"""ServingClusters that the tests apply."""

from __future__ import annotations

from typing import Any

from broadbeam_crds.conventions import API_GROUP, API_VERSION, KIND

Object = dict[str, Any]


def namespace(name: str) -> Object:
    """A namespace that admits only pods of the Pod Security Standard "restricted"."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pool(name: str, ranks: int = 1, groups: int = 1, **fields: Any) -> Object:
    """One pod of `ranks` ranks on CPUs; the role is the name."""
    return {
        "name": name,
        "role": name,
        "groups": groups,
        "parallelism": {"data": ranks},
        "accelerator": {"resource": "cpu", "perNode": ranks},
        "kvCache": {"memory": "64Mi", "blockSize": 16},
        **fields,
    }


def simulated(namespace: str, name: str = "sim", **timing: Any) -> Object:
    """Prefill and decode apart, on the simulator; `timing` is spec.engine.sim."""
    return {
        "apiVersion": f"{API_GROUP}/{API_VERSION}",
        "kind": KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"name": "sim/harbour", "source": "tiny://deepseek-v3?seed=0", "maxModelLen": 2048},
            "engine": {"name": "sim", "drain": "2s", **({"sim": timing} if timing else {})},
            "pools": [pool("prefill"), pool("decode", ranks=2)],
            "kv": {"transfer": {"connector": "tcp"}},
            "gateway": {"routeHeaders": True, "timeouts": {"drain": "2s"}},
        },
    }
