"""The arithmetic of expert parallelism: even shares, copies of experts, overlap."""

from __future__ import annotations

from typing import Final

from broadbeam_crds.model_shapes import shape_of
from broadbeam_crds.rules.models import DENSE, EXPERT_GROUPS, EXPERTS
from broadbeam_crds.rules.rule import Finding, pool_in_spec_rule, pool_rule
from broadbeam_crds.v1alpha1 import Pool, ServingCluster


def _uneven(pool: Pool, cluster: ServingCluster) -> Finding | None:
    shape, balancing = shape_of(cluster.spec.model), pool.expert_load_balancing
    experts = shape.experts.count if shape and shape.experts else 0
    redundant = balancing.redundant_experts if balancing else 0
    rest = (experts + redundant) % pool.expert_parallel
    if not experts or not rest:
        return None
    degree = pool.expert_parallel
    return {"experts": experts, "redundant": redundant, "degree": degree, "value": rest, "limit": 0}


def _redundant_static(pool: Pool, _: ServingCluster) -> Finding | None:
    balancing = pool.expert_load_balancing
    if balancing is None or balancing.strategy != "static" or not balancing.redundant_experts:
        return None
    return {"value": balancing.redundant_experts, "limit": 0}


def _balancing_one_rank(pool: Pool, _: ServingCluster) -> Finding | None:
    return {"value": 1, "limit": 2} if pool.expert_load_balancing and pool.expert_parallel == 1 else None


def _balancing_dense(pool: Pool, cluster: ServingCluster) -> Finding | None:
    shape = shape_of(cluster.spec.model)
    if pool.expert_load_balancing is None or shape is None or shape.experts is not None:
        return None
    return {"model": cluster.spec.model.name}


def _hierarchical(pool: Pool, cluster: ServingCluster) -> Finding | None:
    shape, balancing, nodes = shape_of(cluster.spec.model), pool.expert_load_balancing, pool.parallelism.nodes
    groups = shape.experts.groups if shape and shape.experts else 0
    if balancing is None or balancing.strategy != "hierarchical" or not groups % nodes:
        return None
    return {"value": groups, "limit": nodes}


def _window(pool: Pool, _: ServingCluster) -> Finding | None:
    balancing = pool.expert_load_balancing
    if balancing is None or balancing.window <= balancing.interval:
        return None
    return {"value": balancing.window, "limit": balancing.interval}


def _overlap_one_rank(pool: Pool, _: ServingCluster) -> Finding | None:
    return {"value": 1, "limit": 2} if pool.dual_batch_overlap and pool.expert_parallel == 1 else None


def _prefill_threshold(pool: Pool, _: ServingCluster) -> Finding | None:
    overlap, limit = pool.dual_batch_overlap, pool.scheduling.max_batched_tokens
    if overlap is None or limit is None or overlap.prefill_threshold <= limit:
        return None
    return {"value": overlap.prefill_threshold, "limit": limit}


def _decode_threshold(pool: Pool, _: ServingCluster) -> Finding | None:
    overlap, limit = pool.dual_batch_overlap, pool.scheduling.max_sequences
    if overlap is None or limit is None or overlap.decode_threshold <= limit:
        return None
    return {"value": overlap.decode_threshold, "limit": limit}


_REDUNDANT: Final = "(has(p.expertLoadBalancing) ? p.expertLoadBalancing.redundantExperts : 0)"
_DEGREE: Final = "(p.parallelism.data * p.parallelism.tensor)"
_ONE_RANK: Final = "self.parallelism.data * self.parallelism.tensor == 1"
_BALANCED: Final = "!has(self.expertLoadBalancing)"

RULES: Final = (
    pool_in_spec_rule(
        "spec.pools[{pool}].parallelism: (experts + redundantExperts) % EP degree = "
        "({experts} + {redundant}) % {degree} = {value}; it must be {limit}",
        _uneven,
        f"{EXPERTS} > 0 && ({EXPERTS} + {_REDUNDANT}) % {_DEGREE} != 0",
        {
            "experts": f"string({EXPERTS})",
            "redundant": f"string({_REDUNDANT})",
            "degree": f"string({_DEGREE})",
            "value": f"string(({EXPERTS} + {_REDUNDANT}) % {_DEGREE})",
            "limit": "'0'",
        },
    ),
    pool_rule(
        "spec.pools[{pool}].expertLoadBalancing.redundantExperts: {value} with strategy static; "
        "copies help only a strategy that moves experts, so it must be {limit}",
        _redundant_static,
        f"{_BALANCED} || self.expertLoadBalancing.strategy != 'static' || "
        "self.expertLoadBalancing.redundantExperts == 0",
        {"value": "string(self.expertLoadBalancing.redundantExperts)", "limit": "'0'"},
    ),
    pool_rule(
        "spec.pools[{pool}].expertLoadBalancing: the EP degree is {value}; balancing needs at least {limit}",
        _balancing_one_rank,
        f"{_BALANCED} || !({_ONE_RANK})",
        {"value": "'1'", "limit": "'2'"},
    ),
    pool_in_spec_rule(
        'spec.pools[{pool}].expertLoadBalancing: model "{model}" has no experts to balance',
        _balancing_dense,
        f"has(p.expertLoadBalancing) && {DENSE}",
        {"model": "self.model.name"},
    ),
    pool_in_spec_rule(
        "spec.pools[{pool}].expertLoadBalancing.strategy: hierarchical needs the model's expert groups "
        "({value}) to be a multiple of parallelism.nodes {limit}",
        _hierarchical,
        "has(p.expertLoadBalancing) && p.expertLoadBalancing.strategy == 'hierarchical' && "
        f"{EXPERT_GROUPS} % p.parallelism.nodes != 0",
        {"value": f"string({EXPERT_GROUPS})", "limit": "string(p.parallelism.nodes)"},
    ),
    pool_rule(
        "spec.pools[{pool}].expertLoadBalancing.window: {value} is above interval {limit}; "
        "load is measured between two rebalancings",
        _window,
        f"{_BALANCED} || self.expertLoadBalancing.window <= self.expertLoadBalancing.interval",
        {
            "value": "string(self.expertLoadBalancing.window)",
            "limit": "string(self.expertLoadBalancing.interval)",
        },
    ),
    pool_rule(
        "spec.pools[{pool}].dualBatchOverlap: the EP degree is {value}; there is communication to hide from "
        "{limit} on",
        _overlap_one_rank,
        f"!has(self.dualBatchOverlap) || !({_ONE_RANK})",
        {"value": "'1'", "limit": "'2'"},
    ),
    pool_rule(
        "spec.pools[{pool}].dualBatchOverlap.prefillThreshold: {value} is above scheduling.maxBatchedTokens "
        "{limit}; no step would be split",
        _prefill_threshold,
        "!has(self.dualBatchOverlap) || !has(self.scheduling.maxBatchedTokens) || "
        "self.dualBatchOverlap.prefillThreshold <= self.scheduling.maxBatchedTokens",
        {
            "value": "string(self.dualBatchOverlap.prefillThreshold)",
            "limit": "string(self.scheduling.maxBatchedTokens)",
        },
    ),
    pool_rule(
        "spec.pools[{pool}].dualBatchOverlap.decodeThreshold: {value} is above scheduling.maxSequences "
        "{limit}; no step would be split",
        _decode_threshold,
        "!has(self.dualBatchOverlap) || !has(self.scheduling.maxSequences) || "
        "self.dualBatchOverlap.decodeThreshold <= self.scheduling.maxSequences",
        {
            "value": "string(self.dualBatchOverlap.decodeThreshold)",
            "limit": "string(self.scheduling.maxSequences)",
        },
    ),
)
