"""Whether model and cache fit the devices. Python only: it needs model sizes and device memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from broadbeam_crds.capacity import GIB, Capacity, capacities
from broadbeam_crds.engine_config import CacheConfig
from broadbeam_crds.model_shapes import shape_of
from broadbeam_crds.rules.rule import Finding, Rule
from broadbeam_crds.v1alpha1 import ServingCluster


def _too_long(cluster: ServingCluster) -> Iterator[Finding]:
    shape, length = shape_of(cluster.spec.model), cluster.spec.model.max_model_len
    if shape and shape.max_model_len and length and length > shape.max_model_len:
        yield {"value": length, "limit": shape.max_model_len, "model": cluster.spec.model.name}


def _does_not_fit(cluster: ServingCluster) -> Iterator[Finding]:
    for pool in capacities(cluster):
        if pool.fits is False:
            yield _shortage(pool)


def _shortage(pool: Capacity) -> Finding:
    assert pool.weight_bytes is not None
    assert pool.needed_bytes is not None
    assert pool.device_bytes is not None
    return {
        "pool": pool.pool,
        "weights": gib(pool.weight_bytes),
        "kv": gib(pool.needed_bytes - pool.weight_bytes),
        "value": gib(pool.needed_bytes),
        "limit": gib(pool.device_bytes),
    }


def _cache_too_small(cluster: ServingCluster) -> Iterator[Finding]:
    """No engine starts with a cache that cannot hold one sequence of the greatest length."""
    shape, asked = shape_of(cluster.spec.model), cluster.spec.model.max_model_len
    length = asked or (shape.max_model_len if shape else None)
    # The simulator counts blocks and keeps none, so its cache may be any size.
    if length is None or cluster.spec.engine.name == "sim":
        return
    for pool, spec in zip(capacities(cluster), cluster.spec.pools, strict=True):
        if not pool.kv_given or pool.kv_tokens is None:
            continue
        block = spec.kv_cache.block_size or CacheConfig().block_size
        held, needed = pool.kv_tokens // block * block, -(-length // block) * block
        if held < needed:
            yield {
                "pool": pool.pool,
                "memory": spec.kv_cache.memory,
                "per_token": pool.kv_bytes_per_token,
                "value": held,
                "block": block,
                "whose": "spec.model.maxModelLen" if asked else "the model's own limit",
                "limit": needed,
            }


def gib(count: int) -> str:
    """Bytes for people: 61.3 GiB, 256.0 MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


RULES: Final = (
    Rule(
        'spec.model.maxModelLen: {value} tokens are above the {limit} that model "{model}" was made for',
        _too_long,
    ),
    Rule(
        "spec.pools[{pool}]: does not fit: a rank needs {weights} of weights + {kv} of KV cache = {value}, "
        "and has {limit}",
        _does_not_fit,
    ),
    Rule(
        "spec.pools[{pool}].kvCache.memory: {memory} holds {value} tokens of {per_token} bytes, in blocks of "
        "{block}; a sequence of {whose} needs {limit}",
        _cache_too_small,
    ),
)
