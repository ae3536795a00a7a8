"""How much memory a pool needs on each rank, and whether it has it. Pure arithmetic on the manifest.

Attention, dense layers, shared experts and embeddings are on every data-parallel rank (cut into `tensor`
parts); routed experts are shared out over all ranks of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from broadbeam_crds.model_shapes import Parameters, kv_width, parameters, shape_of
from broadbeam_crds.v1alpha1 import Architecture, Engine, Pool, ServingCluster, Simulation, WeightOffload

# Bytes of one weight, its share of the scales included.
WEIGHT_BYTES: Final[dict[str, float]] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1 + 4 / (128 * 128),  # a float32 scale for each 128 x 128 block
    "mxfp4": 0.5 + 1 / 32,  # one byte for each 32
    "nvfp4": 0.5 + 1 / 16,  # one byte for each 16
}
CACHE_BYTES: Final[dict[str, int]] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
_OF_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

GIB: Final = 2**30


class _Accelerator(NamedTuple):
    product: str  # part of the node label's value
    gib: int  # that the driver reports, rounded down
    per_node: int | None  # in a usual server; None where servers differ


# Longer names first: GB200 holds "B200".
_ACCELERATORS: Final = (
    _Accelerator("GB300", 277, 4),
    _Accelerator("GB200", 185, 4),
    _Accelerator("GH200", 95, None),
    _Accelerator("B300", 268, 8),
    _Accelerator("B200", 179, 8),
    _Accelerator("H200", 140, 8),
    _Accelerator("H100", 79, 8),
    _Accelerator("H800", 79, 8),
    _Accelerator("H20", 95, 8),
    _Accelerator("A100-SXM4-40GB", 39, 8),
    _Accelerator("A100-PCIE-40GB", 39, None),
    _Accelerator("A100", 79, 8),
    _Accelerator("L40S", 44, None),
    _Accelerator("MI355X", 287, 8),
    _Accelerator("MI350X", 287, 8),
    _Accelerator("MI325X", 255, 8),
    _Accelerator("MI300X", 191, 8),
)


@dataclass(frozen=True, slots=True)
class Capacity:
    """One pool in numbers. Bytes are per rank; None where the model or the device is not known."""

    pool: str
    role: str
    groups: int
    pods: int  # of one group
    ranks: int  # devices of one group
    expert_parallel: int
    experts: int  # routed experts of one layer, without copies; 0 for a dense model
    redundant_experts: int
    experts_per_rank: int | None  # copies included; None for a dense model or an uneven split
    replicated_bytes: int | None
    expert_bytes: int | None
    offloaded_bytes: int | None  # taken off `weight_bytes`, kept in host memory
    weight_bytes: int | None  # what stays on the device
    kv_bytes_per_token: int | None
    kv_bytes: int | None  # given in the manifest, or else what the device has left
    kv_given: bool
    device_bytes: int | None

    @property
    def total_ranks(self) -> int:
        return self.groups * self.ranks

    @property
    def total_pods(self) -> int:
        return self.groups * self.pods

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that fit the cache of one rank."""
        if self.kv_bytes is None or not self.kv_bytes_per_token:
            return None
        return self.kv_bytes // self.kv_bytes_per_token

    @property
    def needed_bytes(self) -> int | None:
        """Weights and the cache that was asked for; what a step needs beside them is not counted."""
        if self.weight_bytes is None:
            return None
        return self.weight_bytes + (self.kv_bytes or 0 if self.kv_given else 0)

    @property
    def fits(self) -> bool | None:
        if self.needed_bytes is None or self.device_bytes is None:
            return None
        return self.needed_bytes < self.device_bytes


def capacities(cluster: ServingCluster) -> list[Capacity]:
    """One for each pool, in the manifest's order."""
    shape = shape_of(cluster.spec.model)
    return [capacity(pool, cluster.spec.engine, shape) for pool in cluster.spec.pools]


def capacity(pool: Pool, engine: Engine, shape: Architecture | None) -> Capacity:
    balancing = pool.expert_load_balancing
    redundant = balancing.redundant_experts if balancing else 0
    experts = shape.experts.count if shape and shape.experts else 0
    slots, rest = divmod(experts + redundant, pool.expert_parallel)
    weights = _weights(pool, engine, shape, (experts + redundant) / pool.expert_parallel) if shape else None
    # The simulator holds no weights; what is said of them is said of the engine it stands for.
    device = device_bytes(pool) if engine.name != "sim" else None
    on_device = weights.on_device if weights else None
    given = pool.kv_cache.memory
    left = max(0, device - on_device) if device is not None and on_device is not None else None
    return Capacity(
        pool=pool.name,
        role=pool.role,
        groups=pool.groups,
        pods=pool.parallelism.nodes,
        ranks=pool.ranks,
        expert_parallel=pool.expert_parallel,
        experts=experts,
        redundant_experts=redundant,
        experts_per_rank=slots if experts and not rest else None,
        replicated_bytes=weights.replicated if weights else None,
        expert_bytes=weights.experts if weights else None,
        offloaded_bytes=weights.offloaded if weights else None,
        weight_bytes=on_device,
        kv_bytes_per_token=kv_bytes_per_token(pool, engine, shape) if shape else None,
        kv_bytes=given.bytes if given else left,
        kv_given=given is not None,
        device_bytes=device,
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    replicated: int
    experts: int
    offloaded: int

    @property
    def on_device(self) -> int:
        return self.replicated + self.experts - self.offloaded


def _weights(pool: Pool, engine: Engine, shape: Architecture, experts_per_rank: float) -> _Weights:
    counts = parameters(shape)
    formats = weight_formats(pool, engine, shape)
    linear = counts.attention + counts.dense + counts.shared_experts
    replicated = (
        linear * WEIGHT_BYTES[formats.attention] + counts.embeddings * WEIGHT_BYTES[formats.unquantised]
    )
    experts = counts.one_expert * counts.expert_layers * experts_per_rank * WEIGHT_BYTES[formats.moe]
    layers = linear * WEIGHT_BYTES[formats.attention] / pool.parallelism.tensor
    offloaded = (
        _offloaded(pool.weight_offload, shape.layers, layers, experts, counts) if pool.weight_offload else 0
    )
    return _Weights(int(replicated / pool.parallelism.tensor), int(experts), int(offloaded))


def _offloaded(
    offload: WeightOffload, layers: int, linear: float, experts: float, counts: Parameters
) -> float:
    """Bytes that leave the device: the offloaded layers' weights, less the slots they are fetched into."""
    chosen = [i for i in range(layers) if i % offload.group_size >= offload.group_size - offload.num_in_group]
    first_expert_layer = layers - counts.expert_layers
    with_experts = sum(i >= first_expert_layer for i in chosen)
    slots = min(offload.prefetch_step, len(chosen))
    # w13 holds gate and up, w2 down: two thirds and one third of an expert.
    names = {name.partition("_weight")[0] for name in offload.parameters}
    of_experts = (2 * ("w13" in names) + ("w2" in names)) / 3 if names else 1
    one_layer = 0 if names else linear / layers
    one_expert_layer = of_experts * experts / counts.expert_layers if counts.expert_layers else 0
    gained = (len(chosen) - slots) * one_layer + max(0, with_experts - slots) * one_expert_layer
    return max(0, gained)


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """Formats of the expert weights, of attention and dense layers, and of what is never quantised."""

    moe: str
    attention: str
    unquantised: str


def weight_formats(pool: Pool, engine: Engine, shape: Architecture) -> WeightFormats:
    """What `auto` comes to. Engine broadbeam holds all weights in one unquantised type."""
    plain = _unquantised(pool, engine, shape)
    if engine.name == "broadbeam":
        return WeightFormats(plain, plain, plain)
    quantised = shape.weights in ("fp8", "mxfp4", "nvfp4")
    moe = shape.weights if quantised else plain
    attention = "fp8" if shape.weights == "fp8" else plain  # FP4 checkpoints keep attention unquantised
    chosen = pool.precision
    return WeightFormats(
        moe if chosen.moe == "auto" else chosen.moe,
        attention if chosen.attention == "auto" else chosen.attention,
        plain,
    )


def _unquantised(pool: Pool, engine: Engine, shape: Architecture) -> str:
    """What `engine.dtype` comes to; `auto` is float32 for engine broadbeam on CPUs, else the checkpoint's."""
    on_cpus = engine.name == "broadbeam" and pool.accelerator.resource == "cpu"
    return _OF_DTYPE.get(engine.dtype, "fp32" if on_cpus or shape.weights == "fp32" else "bf16")


def kv_bytes_per_token(pool: Pool, engine: Engine, shape: Architecture) -> int:
    """On one rank, all layers. Latent attention is not cut by `tensor`; key-value heads are."""
    if engine.name == "sim":
        return (engine.sim or Simulation()).kv_bytes_per_token
    chosen = pool.precision.kv_cache
    plain = _unquantised(pool, engine, shape)
    width = kv_width(shape)
    if shape.latent_attention is None:
        width //= min(pool.parallelism.tensor, shape.key_value_heads)
    return width * CACHE_BYTES[plain if chosen == "auto" else chosen]


def device_bytes(pool: Pool) -> int | None:
    """Memory of one rank: of a known accelerator, or on CPUs its share of the pod's memory."""
    if pool.accelerator.resource == "cpu":
        memory = pool.resources.memory if pool.resources else None
        return memory.bytes // pool.accelerator.per_node if memory else None
    found = _accelerator(pool)
    return found.gib * GIB if found else None


def devices_per_node(pool: Pool) -> int | None:
    """Of the usual server with such an accelerator; None where it is not known."""
    found = _accelerator(pool)
    return found.per_node if found else None


def _accelerator(pool: Pool) -> _Accelerator | None:
    product = (pool.accelerator.product or "").upper()
    return next((each for each in _ACCELERATORS if each.product in product), None)
