"""The arithmetic of pools: roles, ranks, steps and bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from broadbeam_crds.rules.rule import Cel, Finding, Rule, pool_in_spec_rule, pool_rule
from broadbeam_crds.v1alpha1 import Pool, ServingCluster


def _no_decode(cluster: ServingCluster) -> Iterator[Finding]:
    if not any(pool.decodes for pool in cluster.spec.pools):
        yield {"value": "prefill", "limit": "decode or both"}


def _no_transfer(cluster: ServingCluster) -> Iterator[Finding]:
    if cluster.spec.disaggregated and cluster.spec.kv.transfer is None:
        name = next(pool.name for pool in cluster.spec.pools if pool.role == "prefill")
        yield {"prefill": name, "value": "nothing", "limit": "a connector"}


def _block_size(pool: Pool, cluster: ServingCluster) -> Finding | None:
    first = cluster.spec.pools[0]
    mine, wanted = (each.kv_cache.block_size or 0 for each in (pool, first))
    if not cluster.spec.disaggregated or mine == wanted:
        return None
    return {"first": first.name, "value": mine or "unset", "limit": wanted or "unset"}


def _cache_format(pool: Pool, cluster: ServingCluster) -> Finding | None:
    first = cluster.spec.pools[0]
    mine, wanted = pool.precision.kv_cache, first.precision.kv_cache
    if not cluster.spec.disaggregated or mine == wanted:
        return None
    return {"first": first.name, "value": mine, "limit": wanted}


def _world(pool: Pool, _: ServingCluster) -> Finding | None:
    if pool.expert_parallel == pool.ranks:
        return None
    sizes = pool.parallelism
    return {
        "data": sizes.data,
        "tensor": sizes.tensor,
        "value": pool.expert_parallel,
        "nodes": sizes.nodes,
        "per_node": pool.accelerator.per_node,
        "limit": pool.ranks,
    }


def _tensor_in_node(pool: Pool, _: ServingCluster) -> Finding | None:
    tensor, per_node = pool.parallelism.tensor, pool.accelerator.per_node
    return {"value": tensor, "limit": per_node} if per_node % tensor else None


def _sequences(pool: Pool, _: ServingCluster) -> Finding | None:
    sequences, tokens = pool.scheduling.max_sequences, pool.scheduling.max_batched_tokens
    return {"value": sequences, "limit": tokens} if sequences and tokens and sequences > tokens else None


def _stream_interval(pool: Pool, cluster: ServingCluster) -> Finding | None:
    interval, limit = pool.scheduling.stream_interval, cluster.spec.model.max_model_len
    return {"value": interval, "limit": limit} if limit and interval > limit else None


def _offload_group(pool: Pool, _: ServingCluster) -> Finding | None:
    offload = pool.weight_offload
    if offload is None or offload.num_in_group <= offload.group_size:
        return None
    return {"value": offload.num_in_group, "limit": offload.group_size}


def _autoscaling_bounds(pool: Pool, _: ServingCluster) -> Finding | None:
    scaling = pool.autoscaling
    if scaling is None or scaling.min_groups <= scaling.max_groups:
        return None
    return {"value": scaling.min_groups, "limit": scaling.max_groups}


def _groups_in_bounds(pool: Pool, _: ServingCluster) -> Finding | None:
    scaling = pool.autoscaling
    if scaling is None or scaling.min_groups <= pool.groups <= scaling.max_groups:
        return None
    return {
        "value": pool.groups,
        "limit": f"{scaling.min_groups} to {scaling.max_groups}",
        "low": scaling.min_groups,
        "high": scaling.max_groups,
    }


_PREFILL: Final = "self.pools.exists(x, x.role == 'prefill')"
_BLOCK: Final = "(has({0}.kvCache.blockSize) ? {0}.kvCache.blockSize : 0)"
_BLOCK_SHOWN: Final = "(has({0}.kvCache.blockSize) ? string({0}.kvCache.blockSize) : 'unset')"
_FIRST: Final = "self.pools[0]"

RULES: Final = (
    Rule(
        "spec.pools: every pool has role prefill; at least one must be decode or both",
        _no_decode,
        Cel("spec", "self.pools.exists(p, p.role != 'prefill')"),
    ),
    Rule(
        'spec.kv.transfer: missing; the KV that pool "{prefill}" (role prefill) computes needs a connector',
        _no_transfer,
        Cel(
            "spec",
            f"!{_PREFILL} || has(self.kv.transfer)",
            {"prefill": "p.name"},
            "self.pools.filter(p, p.role == 'prefill')",
        ),
    ),
    pool_in_spec_rule(
        'spec.pools[{pool}].kvCache.blockSize: {value} differs from {limit} in pool "{first}"; '
        "KV transfer needs them equal",
        _block_size,
        f"{_PREFILL} && {_BLOCK.format('p')} != {_BLOCK.format(_FIRST)}",
        {"value": _BLOCK_SHOWN.format("p"), "limit": _BLOCK_SHOWN.format(_FIRST), "first": f"{_FIRST}.name"},
    ),
    pool_in_spec_rule(
        'spec.pools[{pool}].precision.kvCache: {value} differs from {limit} in pool "{first}"; '
        "KV transfer needs them equal",
        _cache_format,
        f"{_PREFILL} && p.precision.kvCache != {_FIRST}.precision.kvCache",
        {
            "value": "p.precision.kvCache",
            "limit": f"{_FIRST}.precision.kvCache",
            "first": f"{_FIRST}.name",
        },
    ),
    pool_rule(
        "spec.pools[{pool}].parallelism: data * tensor = {data} * {tensor} = {value}, but "
        "nodes * accelerator.perNode = {nodes} * {per_node} = {limit}; they must be equal",
        _world,
        "self.parallelism.data * self.parallelism.tensor == "
        "self.parallelism.nodes * self.accelerator.perNode",
        {
            "data": "string(self.parallelism.data)",
            "tensor": "string(self.parallelism.tensor)",
            "value": "string(self.parallelism.data * self.parallelism.tensor)",
            "nodes": "string(self.parallelism.nodes)",
            "per_node": "string(self.accelerator.perNode)",
            "limit": "string(self.parallelism.nodes * self.accelerator.perNode)",
        },
    ),
    pool_rule(
        "spec.pools[{pool}].parallelism.tensor: {value} does not divide accelerator.perNode {limit}; "
        "a data-parallel rank stays within one node",
        _tensor_in_node,
        "self.accelerator.perNode % self.parallelism.tensor == 0",
        {"value": "string(self.parallelism.tensor)", "limit": "string(self.accelerator.perNode)"},
    ),
    pool_rule(
        "spec.pools[{pool}].scheduling.maxSequences: {value} is above maxBatchedTokens {limit}; "
        "each running sequence takes a token of the step",
        _sequences,
        "!has(self.scheduling.maxSequences) || !has(self.scheduling.maxBatchedTokens) || "
        "self.scheduling.maxSequences <= self.scheduling.maxBatchedTokens",
        {
            "value": "string(self.scheduling.maxSequences)",
            "limit": "string(self.scheduling.maxBatchedTokens)",
        },
    ),
    pool_in_spec_rule(
        "spec.pools[{pool}].scheduling.streamInterval: {value} is above spec.model.maxModelLen {limit}; "
        "no answer is that long",
        _stream_interval,
        "has(self.model.maxModelLen) && p.scheduling.streamInterval > self.model.maxModelLen",
        {"value": "string(p.scheduling.streamInterval)", "limit": "string(self.model.maxModelLen)"},
    ),
    pool_rule(
        "spec.pools[{pool}].weightOffload.numInGroup: {value} is above groupSize {limit}",
        _offload_group,
        "!has(self.weightOffload) || self.weightOffload.numInGroup <= self.weightOffload.groupSize",
        {
            "value": "string(self.weightOffload.numInGroup)",
            "limit": "string(self.weightOffload.groupSize)",
        },
    ),
    pool_rule(
        "spec.pools[{pool}].autoscaling.minGroups: {value} is above maxGroups {limit}",
        _autoscaling_bounds,
        "!has(self.autoscaling) || self.autoscaling.minGroups <= self.autoscaling.maxGroups",
        {"value": "string(self.autoscaling.minGroups)", "limit": "string(self.autoscaling.maxGroups)"},
    ),
    pool_rule(
        "spec.pools[{pool}].groups: {value} is not between autoscaling.minGroups {low} and maxGroups {high}",
        _groups_in_bounds,
        "!has(self.autoscaling) || self.autoscaling.minGroups <= self.groups && "
        "self.groups <= self.autoscaling.maxGroups",
        {
            "value": "string(self.groups)",
            "low": "string(self.autoscaling.minGroups)",
            "high": "string(self.autoscaling.maxGroups)",
        },
    ),
)
