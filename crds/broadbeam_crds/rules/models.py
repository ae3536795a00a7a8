"""What CEL knows of models, and what a model's sizes ask of a pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from broadbeam_crds.model_shapes import SHAPES, shape_of
from broadbeam_crds.rules.rule import Finding, cel_text, pool_in_spec_rule
from broadbeam_crds.v1alpha1 import Architecture, Pool, ServingCluster


def _known(number: Callable[[Architecture], int]) -> str:
    """CEL map: a number of each known model by its key in SHAPES."""
    pairs = (f"{cel_text(name)}: {number(shape)}" for name, shape in SHAPES.items())
    return "{" + ", ".join(pairs) + "}"


_COUNTS: Final = _known(lambda shape: shape.experts.count if shape.experts else 0)
_GROUPS: Final = _known(lambda shape: shape.experts.groups if shape.experts else 0)
_HEADS: Final = _known(lambda shape: shape.attention_heads)
# As `shape_of`: by the name, and else by where the weights are.
_LAST: Final = "{0}.lowerAscii().substring({0}.lastIndexOf('/') + 1)"
_NAME: Final = _LAST.format("self.model.name")
_PLACE: Final = f"{_LAST.format('self.model.source')}.split('?')[0]"
_SCHEME: Final = "self.model.source.startsWith('{0}://')"
_KEY: Final = (
    f"({_SCHEME.format('tiny')} ? 'tiny-' + {_PLACE} : "
    f"({_SCHEME.format('hf')} && !({_NAME} in {_COUNTS}) ? {_PLACE} : {_NAME}))"
)


def _looked_up(numbers: str) -> str:
    """CEL: the model's number, 0 where it is not known. A list of one, for CEL has no other way to name a
    value that is used twice."""
    return f"[{_KEY}].map(k, k in {numbers} ? {numbers}[k] : 0)[0]"


GIVEN: Final = "has(self.model.architecture)"
EXPERTS: Final = (
    f"({GIVEN} ? (has(self.model.architecture.experts) ? self.model.architecture.experts.count : 0) : "
    f"{_looked_up(_COUNTS)})"
)
EXPERT_GROUPS: Final = (
    f"({GIVEN} ? (has(self.model.architecture.experts) ? self.model.architecture.experts.groups : 0) : "
    f"{_looked_up(_GROUPS)})"
)
DENSE: Final = (
    f"({GIVEN} ? !has(self.model.architecture.experts) : "
    f"[{_KEY}].exists(k, k in {_COUNTS} && {_COUNTS}[k] == 0))"
)
_ATTENTION_HEADS: Final = f"({GIVEN} ? self.model.architecture.attentionHeads : {_looked_up(_HEADS)})"


def _heads(pool: Pool, cluster: ServingCluster) -> Finding | None:
    shape, tensor = shape_of(cluster.spec.model), pool.parallelism.tensor
    if shape is None or shape.attention_heads % tensor == 0:
        return None
    return {"value": tensor, "limit": shape.attention_heads}


def _dense_ranks(pool: Pool, cluster: ServingCluster) -> Finding | None:
    shape, data = shape_of(cluster.spec.model), pool.parallelism.data
    if cluster.spec.engine.name != "vllm" or data == 1 or shape is None or shape.experts is not None:
        return None
    return {"value": data, "limit": 1, "model": cluster.spec.model.name}


RULES: Final = (
    pool_in_spec_rule(
        "spec.pools[{pool}].parallelism.tensor: {value} does not divide the model's {limit} attention heads",
        _heads,
        f"{_ATTENTION_HEADS} % p.parallelism.tensor != 0",
        {"value": "string(p.parallelism.tensor)", "limit": f"string({_ATTENTION_HEADS})"},
    ),
    # vLLM's ranks of one group are there for its experts; without any it refuses to start them.
    pool_in_spec_rule(
        'spec.pools[{pool}].parallelism.data: {value}, but model "{model}" has no experts for engine vllm to '
        "share out; it must be {limit}, and groups may be more",
        _dense_ranks,
        f"self.engine.name == 'vllm' && p.parallelism.data > 1 && {DENSE}",
        {"value": "string(p.parallelism.data)", "limit": "'1'", "model": "self.model.name"},
    ),
)
