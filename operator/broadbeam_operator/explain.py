"""A ServingCluster in words: devices, nodes, experts and memory, and the arithmetic behind them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from broadbeam_crds.capacity import Capacity, capacities, devices_per_node
from broadbeam_crds.model_shapes import parameters, shape_of
from broadbeam_crds.rules.fitting import gib
from broadbeam_crds.v1alpha1 import Pool, ServingCluster
from broadbeam_operator.accept import refusals


@dataclass(frozen=True, slots=True)
class Paragraph:
    title: str
    facts: Sequence[tuple[str, str]]  # what, and how much it is with its arithmetic


@dataclass(frozen=True, slots=True)
class Explanation:
    headline: str
    paragraphs: Sequence[Paragraph]
    refusals: Sequence[str]  # empty: the operator would build it


def explain(cluster: ServingCluster) -> Explanation:
    pools = zip(cluster.spec.pools, capacities(cluster), strict=True)
    paragraphs = [
        Paragraph("model", list(_model(cluster))),
        *(Paragraph(f"pool {pool.name}", list(_pool(cluster, pool, sizes))) for pool, sizes in pools),
        Paragraph("gateway", list(_gateway(cluster))),
        Paragraph("in all", list(_total(cluster))),
    ]
    return Explanation(_headline(cluster), paragraphs, refusals(cluster))


def _headline(cluster: ServingCluster) -> str:
    spec = cluster.spec
    engine = {"broadbeam": "Broadbeam's engine", "vllm": "vLLM", "sim": "the simulator"}[spec.engine.name]
    apart = "prefill and decode apart" if spec.disaggregated else "prefill and decode on the same ranks"
    return f"{cluster.metadata.name} serves {spec.model.name} with {engine}, {apart}"


def _model(cluster: ServingCluster) -> Iterator[tuple[str, str]]:
    model = cluster.spec.model
    yield "source", model.source
    shape = shape_of(model)
    if shape is None:
        yield "size", "not known by name; give spec.model.architecture for the memory arithmetic"
        return
    sizes = parameters(shape)
    active = f", {_count(sizes.active)} active for a token" if sizes.active != sizes.total else ""
    yield "parameters", f"{_count(sizes.total)}{active}"
    yield "layers", f"{shape.layers} of width {shape.hidden_size}"
    if shape.experts:
        yield "experts", f"{shape.experts.count} a layer, {shape.experts.per_token} for a token"
    if model.max_model_len:
        yield "longest sequence", f"{model.max_model_len:,} tokens"


def _pool(cluster: ServingCluster, pool: Pool, sizes: Capacity) -> Iterator[tuple[str, str]]:
    yield "role", pool.role
    yield (
        "groups",
        f"{pool.groups} x {_counted(sizes.pods, 'pod')} x {_devices(pool, pool.accelerator.per_node)} = "
        f"{_devices(pool, sizes.total_ranks)} in {_counted(sizes.total_pods, 'pod')}",
    )
    shape = pool.parallelism
    yield "EP degree", f"data {shape.data} x tensor {shape.tensor} = {sizes.expert_parallel} in each group"
    if sizes.experts:
        yield "experts", _experts(sizes)
    yield from _memory(cluster, sizes)


def _experts(sizes: Capacity) -> str:
    copies = f" + {sizes.redundant_experts} copies" if sizes.redundant_experts else ""
    share = (
        f"{sizes.experts_per_rank} a rank" if sizes.experts_per_rank is not None else "does not come out even"
    )
    slots = f"({sizes.experts}{copies})" if copies else str(sizes.experts)
    return f"{slots} / {sizes.expert_parallel} = {share}, in every layer"


def _memory(cluster: ServingCluster, sizes: Capacity) -> Iterator[tuple[str, str]]:
    if sizes.weight_bytes is not None and sizes.replicated_bytes is not None:
        simulated = ", were they not simulated" if cluster.spec.engine.name == "sim" else ""
        yield "weights a rank", f"{_weights(sizes)}{simulated}"
    if sizes.kv_bytes is not None:
        origin = "as given" if sizes.kv_given else "what the weights leave"
        yield "KV cache a rank", f"{gib(sizes.kv_bytes)} ({origin}){_tokens(cluster, sizes)}"
    if sizes.device_bytes is not None:
        verdict = {True: "fits", False: "does not fit", None: "unknown"}[sizes.fits]
        needed = f"{gib(sizes.needed_bytes)} of " if sizes.needed_bytes is not None else ""
        yield "memory a rank", f"{needed}{gib(sizes.device_bytes)}: {verdict}"


def _weights(sizes: Capacity) -> str:
    assert sizes.weight_bytes is not None
    assert sizes.replicated_bytes is not None
    parts = [f"{gib(sizes.replicated_bytes)} on every rank"]
    if sizes.expert_bytes:
        parts.append(f"{gib(sizes.expert_bytes)} of experts")
    words = " + ".join(parts)
    if sizes.offloaded_bytes:
        words += f" - {gib(sizes.offloaded_bytes)} in host memory"
    return words if words == parts[0] else f"{words} = {gib(sizes.weight_bytes)}"


def _tokens(cluster: ServingCluster, sizes: Capacity) -> str:
    if sizes.kv_tokens is None or not sizes.kv_bytes_per_token:
        return ""
    length = cluster.spec.model.max_model_len
    sequences = f", {_counted(sizes.kv_tokens // length, 'sequence')} of {length:,}" if length else ""
    return f" / {sizes.kv_bytes_per_token:,} bytes a token = {sizes.kv_tokens:,} tokens{sequences}"


def _gateway(cluster: ServingCluster) -> Iterator[tuple[str, str]]:
    gateway = cluster.spec.gateway
    yield "replicas", f"{gateway.replicas}, listening on port {gateway.listeners[0].port}"
    yield "routing", gateway.policy
    yield "keys", f"Secret {gateway.auth.secret_ref.name}" if gateway.auth else "none asked for"
    if transfer := cluster.spec.kv.transfer:
        yield "KV transfer", f"{transfer.connector}, blocks held for {transfer.lease}"


def _total(cluster: ServingCluster) -> Iterator[tuple[str, str]]:
    """By kind of device. A pod takes `perNode` devices of a node, so several may share one."""
    found = list(zip(cluster.spec.pools, capacities(cluster), strict=True))
    for kind in sorted({_device(pool) for pool, _ in found}):
        chosen = [(pool, sizes) for pool, sizes in found if _device(pool) == kind]
        devices = sum(sizes.total_ranks for _, sizes in chosen)
        pods = sum(sizes.total_pods for _, sizes in chosen)
        yield kind, f"{devices} in {_counted(pods, 'pod')}{_nodes(chosen)}"


def _nodes(chosen: Sequence[tuple[Pool, Capacity]]) -> str:
    """How few could do, where it is known how many devices one has."""
    each = devices_per_node(chosen[0][0])
    if each is None:
        return ""
    alone = sum(sizes.total_pods for pool, sizes in chosen if 2 * pool.accelerator.per_node > each)
    devices = sum(sizes.total_ranks for _, sizes in chosen)
    return f", on at least {_counted(max(alone, -(-devices // each)), 'node')} of {each}"


def _device(pool: Pool) -> str:
    """NVIDIA-H200, or nvidia.com/gpu where no product is asked for, or CPU ranks."""
    resource = pool.accelerator.resource
    return pool.accelerator.product or ("CPU ranks" if resource == "cpu" else resource)


def _devices(pool: Pool, count: int) -> str:
    return _counted(count, "CPU rank") if pool.accelerator.resource == "cpu" else f"{count} {_device(pool)}"


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def _count(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"
