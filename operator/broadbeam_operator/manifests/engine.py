"""Engines `broadbeam` and `sim`: one supervisor a pod, configured by a file."""

from __future__ import annotations

from broadbeam_crds.conventions import COORDINATOR_PORT, ENGINE_CONFIG_FILE, SUPERVISOR_PORT
from broadbeam_crds.engine_config import (
    CacheConfig,
    EngineConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulingConfig,
    SimConfig,
    encode,
)
from broadbeam_crds.v1alpha1 import KVTransfer, Simulation
from broadbeam_operator.cluster import Object
from broadbeam_operator.manifests.group import Group
from broadbeam_operator.manifests.objects import container_security, http_probe
from broadbeam_operator.manifests.storage import source_in_pod
from broadbeam_operator.manifests.transport import capabilities

CACHE_DTYPES = {
    "auto": "auto",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "fp8",
}


def container(group: Group) -> Object:
    engine = group.cluster.spec.engine
    return {
        "image": engine.image or group.images.runtime,
        "command": ["broadbeam-runtime"],
        "args": ["serve", "--config", ENGINE_CONFIG_FILE, *engine.extra_args],
        "env": [{"name": "DO_NOT_TRACK", "value": "1"}],
        "securityContext": container_security(read_only_root=True, capabilities=capabilities(group)),
        # Loading a model may take as long as it needs: /health fails only when something is broken.
        "startupProbe": http_probe(SUPERVISOR_PORT, "/health", period_s=1, failures=120),
        "livenessProbe": http_probe(SUPERVISOR_PORT, "/health", period_s=5, failures=3),
        "readinessProbe": http_probe(SUPERVISOR_PORT, "/readyz", period_s=1, failures=2),
    }


def files(group: Group) -> dict[str, str]:
    return {"engine.json": encode(engine_config(group))}


def engine_config(group: Group) -> EngineConfig:
    spec, pool = group.cluster.spec, group.pool
    assert spec.engine.name != "vllm"
    sim = spec.engine.sim or Simulation()
    return EngineConfig(
        engine=spec.engine.name,
        # Without a way for KV to travel a decode pool computes its prompts itself.
        role=pool.role if spec.kv.transfer else "both",
        model=ModelConfig(
            name=spec.model.name,
            source=source_in_pod(spec.model.source),
            max_model_len=spec.model.max_model_len,
        ),
        parallel=ParallelConfig(
            data=pool.parallelism.data,
            tensor=pool.parallelism.tensor,
            nodes=pool.parallelism.nodes,
            ranks_per_node=group.ranks_per_pod,
            coordinator=group.coordinator,
            coordinator_port=COORDINATOR_PORT,
        ),
        cache=CacheConfig(
            block_size=pool.kv_cache.block_size or CacheConfig().block_size,
            memory_bytes=pool.kv_cache.memory.bytes if pool.kv_cache.memory else None,
            dtype=CACHE_DTYPES[pool.precision.kv_cache],  # type: ignore[arg-type]
            prefix_reuse=pool.kv_cache.prefix_reuse,
        ),
        scheduling=_scheduling(group),
        kv_transfer=_transfer(spec.kv.transfer) if spec.kv.transfer else None,
        # float: a default is read as the int it is written as, and 100 is not the text 100.0.
        sim=SimConfig(
            prefill_base_ms=sim.prefill_base.seconds * 1e3,
            prefill_per_token_us=float(sim.prefill_per_token_us),
            decode_base_ms=sim.decode_base.seconds * 1e3,
            decode_per_sequence_us=float(sim.decode_per_sequence_us),
            load_s=sim.load.seconds,
            kv_bytes_per_token=sim.kv_bytes_per_token,
            seed=sim.seed,
            stall_s=sim.stall.seconds,
            transfer_gbit_s=float(sim.transfer_gbit_s),
        ),
        device="cuda" if group.on_gpu else "cpu",
        dtype=spec.engine.dtype,
        threads=spec.engine.threads,
        drain_s=spec.engine.drain.seconds,
    )


def _transfer(asked: KVTransfer) -> KVTransferConfig:
    return KVTransferConfig(
        connector=asked.connector,
        lease_s=asked.lease.seconds,
        load_failure_policy=asked.load_failure_policy,
    )


def _scheduling(group: Group) -> SchedulingConfig:
    asked = group.pool.scheduling
    default = SchedulingConfig()
    return SchedulingConfig(
        max_batched_tokens=asked.max_batched_tokens or default.max_batched_tokens,
        max_sequences=asked.max_sequences or default.max_sequences,
        stream_interval=asked.stream_interval,
    )
