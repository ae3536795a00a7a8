"""Nothing is ignored: every field of the spec changes what is rendered, or is refused, for every engine.

The test walks the models, so a new field is covered as soon as it exists.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from broadbeam_crds.quantity import ChunkSize, Duration, Quantity, Share
from broadbeam_crds.testing import serving_cluster
from broadbeam_crds.v1alpha1 import ManifestError, ServingClusterSpec, cluster_from
from broadbeam_crds.v1alpha1.fields import ApiModel
from broadbeam_operator.accept import refusals
from broadbeam_operator.explain import explain
from broadbeam_operator.images import Images
from broadbeam_operator.manifests import manifests
from broadbeam_operator.plan import may_be_missing

Wire = dict[str, Any]
Path = tuple[str | int, ...]

# Another value for the fields whose type does not say what is sensible. Paths have no list indexes.
TEXT: dict[str, Any] = {
    "model.name": "other/model",
    "model.source": "hf://other/model",
    "engine.image": "example/engine:1",
    "engine.extraArgs": ["--some-flag"],
    "engine.env": [{"name": "A", "value": "1"}],
    "pools.name": "other",
    "pools.accelerator.resource": "example.com/gpu",
    "pools.accelerator.product": "NVIDIA-H100",
    "pools.accelerator.topologyKey": "rack",
    "pools.template": {"spec": {"priorityClassName": "high"}},
    "pools.weightOffload.parameters": ["w13_weight"],
    "gateway.listeners.name": "api",
    "gateway.auth.secretRef.name": "keys",
    "rollout.canary.weights": [5, 50],
    "recovery.ladder": ["retry"],
}
# Optional parts that need more than their defaults.
PARTS: dict[str, Wire] = {
    "kv.transfer": {"connector": "nixl"},
    "kv.offload": {"hostMemory": "1Gi"},
    "pools.weightOffload": {"groupSize": 4},
    "pools.autoscaling": {"maxGroups": 4},
    "rollout.canary": {"weights": [10]},
    "gateway.auth": {"secretRef": {"name": "a"}},
    "pools.dualBatchOverlap": {},
    "pools.chunking": {},
}
AMOUNTS: dict[type, list[Any]] = {
    Duration: ["11s", "12s"],
    Quantity: ["3Gi", "5Gi"],
    Share: [2, "50%"],
    ChunkSize: ["disabled", 512],
}
# What our engines do in any case: the field may say so, and it changes nothing.
TRUE_ANYWAY: dict[str, Any] = {
    "pools.chunking.moeDataParallel": "disabled",
    "pools.chunking.moeActivation": "disabled",
    "pools.chunking.output": "disabled",
    "pools.scheduling.async": False,
    "pools.scheduling.cudaGraph": "none",
}
# Only for the arithmetic of `explain` and of the checks, as its description says.
FOR_ARITHMETIC = "model.architecture"
GROUPS = 8  # of a pool that is rolled: `rollout` decides about time, which no object shows


def base(engine: str) -> Wire:
    """A valid cluster in which optional parts can be varied."""
    device = {"resource": "nvidia.com/gpu" if engine == "vllm" else "cpu", "perNode": 4}
    pools = [
        {"name": role, "role": role, "parallelism": {"data": 4}, "accelerator": device, "groups": 1}
        for role in ("prefill", "decode")
    ]
    if engine == "vllm":
        pools[1]["allToAll"] = "nixl"
        pools[1]["expertLoadBalancing"] = {"redundantExperts": 8}
    source = "hf://some/model" if engine == "vllm" else "tiny://deepseek-v3?seed=0"
    model = {"name": "some/model", "source": source, "maxModelLen": 1024}
    connector = "nixl" if engine == "vllm" else "tcp"
    found: Wire = serving_cluster(
        pools=pools, engine=engine, model=model, kv={"transfer": {"connector": connector}}
    ).wire()
    return found


def variants(engine: str) -> Iterator[tuple[Path, Wire, Wire]]:
    """(path, a cluster, the same with another value at the path)."""
    yield from _walk(ServingClusterSpec, base(engine), ("spec",))


def _walk(model: type[ApiModel], document: Wire, path: Path) -> Iterator[tuple[Path, Wire, Wire]]:
    for name, field in model.model_fields.items():
        key = field.alias or name
        default = field.get_default(call_default_factory=True)
        yield from _field(field.annotation, default, document, (*path, key))


def _field(annotation: Any, default: Any, document: Wire, path: Path) -> Iterator[tuple[Path, Wire, Wire]]:
    kind = _bare(annotation)
    name = dotted(path)
    if name in TEXT:
        yield path, document, put(document, path, TEXT[name])
    elif isinstance(kind, type) and issubclass(kind, ApiModel):
        if get(document, path) is None:
            with_part = put(document, path, PARTS.get(name, {}))
            if not accepted(with_part):
                yield path, document, with_part
                return
            if PARTS.get(name):
                yield path, document, with_part
            document = with_part
        yield from _walk(kind, document, path)
    elif get_origin(kind) is list:
        # The last item: the decode pool, the only listener.
        items = get(document, path)
        yield from _walk(_bare(get_args(kind)[0]), document, (*path, len(items) - 1))
    else:
        current = get(document, path)
        for other in others(kind, default if current is None else current):
            yield path, document, put(document, path, other)


def others(kind: Any, current: Any) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, tuple(AMOUNTS)):
        choices = next(values for amount, values in AMOUNTS.items() if issubclass(kind, amount))
    elif get_origin(kind) is Literal:
        choices = list(get_args(kind))
    elif kind is bool:
        choices = [True, False]
    elif kind in (int, float):
        choices = [(current or 0) + 1, (current or 1) * 2]
    else:
        raise AssertionError(f"no other value known for {kind}: add one to TEXT")
    return [each for each in choices if each != current]


def _bare(annotation: Any) -> Any:
    """Without Annotated and None."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        (only,) = [each for each in get_args(annotation) if each is not type(None)]
        return _bare(only)
    return annotation


def get(document: Any, path: Path) -> Any:
    for key in path:
        if document is None:
            return None
        document = document[key] if isinstance(key, int) else document.get(key)
    return document


def put(document: Wire, path: Path, value: Any) -> Wire:
    changed = copy.deepcopy(document)
    holder: Any = changed
    for key in path[:-1]:
        holder = holder[key] if isinstance(key, int) else holder.setdefault(key, {})
    holder[path[-1]] = copy.deepcopy(value)
    return changed


def dotted(path: Path) -> str:
    return ".".join(str(key) for key in path[1:] if isinstance(key, str))


def accepted(document: Wire) -> bool:
    try:
        return not refusals(cluster_from(document))
    except ManifestError:
        return False


def outcome(document: Wire, path: Path) -> Any:
    """What a user gets of a cluster: its objects, or the reasons against it."""
    try:
        cluster = cluster_from(document)
    except ManifestError as error:
        return str(error)
    wrong = refusals(cluster)
    if wrong:
        return wrong
    objects = manifests(cluster, Images())
    if dotted(path).startswith(FOR_ARITHMETIC):
        return objects, explain(cluster)
    return objects, may_be_missing(cluster.spec.rollout, GROUPS)


@pytest.mark.parametrize("engine", ["broadbeam", "sim", "vllm"])
def test_every_field_changes_the_rendering_or_is_refused(engine):
    ignored = [
        f"{dotted(path)} = {get(after, path)!r}"
        for path, before, after in variants(engine)
        if outcome(before, path) == outcome(after, path) and not true_anyway(engine, path, after)
    ]
    assert ignored == []


def true_anyway(engine: str, path: Path, document: Wire) -> bool:
    name = dotted(path)
    return engine != "vllm" and name in TRUE_ANYWAY and get(document, path) == TRUE_ANYWAY[name]


@pytest.mark.parametrize("engine", ["broadbeam", "sim", "vllm"])
def test_the_base_cluster_is_accepted(engine):
    assert refusals(cluster_from(base(engine))) == []


@pytest.mark.parametrize("engine", ["broadbeam", "sim", "vllm"])
def test_the_walk_reaches_fields_of_every_part(engine):
    seen = {dotted(path).partition(".")[0] for path, _, _ in variants(engine)}
    assert seen == {field.alias or name for name, field in ServingClusterSpec.model_fields.items()}
