"""Engine `vllm`: an unmodified vLLM image, all of it said in flags.

Each flag was checked against `vllm serve --help=all` of 0.32. With several ranks in a pod, vLLM's own
supervisor starts one API server a rank on consecutive ports and answers for all of them; with one rank there
is no supervisor, and its API server answers itself. Nothing runs through a shell: what differs between nodes
is a file a node, named by `$(BROADBEAM_NODE_INDEX)`.
"""

from __future__ import annotations

import json
from typing import Any

from broadbeam_crds.conventions import (
    CONFIG_DIR,
    COORDINATOR_PORT,
    ENV_NODE_INDEX,
    ENV_POD_IP,
    KV_SIDE_CHANNEL_PORT,
    RANK_HTTP_PORT,
    SUPERVISOR_PORT,
)
from broadbeam_crds.model_shapes import shape_of
from broadbeam_crds.v1alpha1 import DualBatchOverlap, WeightOffload
from broadbeam_operator.cluster import Object
from broadbeam_operator.manifests.group import Group
from broadbeam_operator.manifests.objects import container_security, http_probe
from broadbeam_operator.manifests.storage import CACHE_DIR, source_in_pod
from broadbeam_operator.manifests.transport import capabilities
from broadbeam_operator.manifests.vllm_kv import kv_events, kv_transfer

ALL_TO_ALL = {
    "allgather-reducescatter": "allgather_reducescatter",
    "deepep-high-throughput": "deepep_high_throughput",
    "deepep-low-latency": "deepep_low_latency",
    "deepep-v2": "deepep_v2",
    "mori-high-throughput": "mori_high_throughput",
    "mori-low-latency": "mori_low_latency",
    "nixl": "nixl_ep",
    "nvlink": "flashinfer_nvlink_one_sided",
    "nvlink-two-sided": "flashinfer_nvlink_two_sided",
}
QUANTIZATION = {"fp8": "fp8", "mxfp4": "mxfp4", "nvfp4": "modelopt_fp4"}
CACHE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp8": "fp8"}
CUDA_GRAPHS = {
    "none": "NONE",
    "piecewise": "PIECEWISE",
    "full": "FULL",
    "full-decode-only": "FULL_DECODE_ONLY",
    "full-and-piecewise": "FULL_AND_PIECEWISE",
}
UNCHUNKED_OUTPUTS = 2**31 - 1  # more than any step has
START_LIMIT_S = 3600  # loading 700 GB from a shared disk, capturing graphs, tuning kernels
PROBE_PERIOD_S = 10


def container(group: Group) -> Object:
    spec = group.cluster.spec
    port = SUPERVISOR_PORT if supervised(group) else RANK_HTTP_PORT
    ready = "/readyz" if supervised(group) else "/health"
    return {
        "image": spec.engine.image or group.images.vllm,
        "command": ["vllm"],
        "args": [*arguments(group), *spec.engine.extra_args],
        "env": environment(group),
        # vLLM compiles kernels into places of its own choosing.
        "securityContext": container_security(read_only_root=False, capabilities=capabilities(group)),
        "startupProbe": http_probe(port, "/health", PROBE_PERIOD_S, START_LIMIT_S // PROBE_PERIOD_S),
        "livenessProbe": http_probe(port, "/health", PROBE_PERIOD_S, failures=3),
        "readinessProbe": http_probe(port, ready, period_s=5, failures=2),
    }


def supervised(group: Group) -> bool:
    """vLLM's supervisor wants at least two ranks in its pod."""
    return group.ranks_per_pod > 1


def files(group: Group) -> dict[str, str]:
    """What differs between nodes: the first rank of each, read by --config. YAML, as vLLM wants it."""
    first = range(0, group.pool.parallelism.data, group.ranks_per_pod)
    key = "data-parallel-start-rank" if supervised(group) else "data-parallel-rank"
    if group.pool.parallelism.data == 1:
        return {"node-0.yaml": "{}\n"}
    return {f"node-{node}.yaml": f"{key}: {rank}\n" for node, rank in enumerate(first)}


def arguments(group: Group) -> list[str]:
    spec, pool = group.cluster.spec, group.pool
    return [
        "serve",
        model_in_pod(spec.model.source),
        *_flag(
            "--config", f"{CONFIG_DIR}/node-$({ENV_NODE_INDEX}).yaml" if pool.parallelism.data > 1 else None
        ),
        *_flag("--served-model-name", spec.model.name),
        *_flag("--host", "0.0.0.0"),
        *_flag("--port", RANK_HTTP_PORT),
        *_flag("--shutdown-timeout", int(spec.engine.drain.seconds)),
        *_flag("--max-model-len", spec.model.max_model_len),
        *_flag("--dtype", None if spec.engine.dtype == "auto" else spec.engine.dtype),
        *_parallel(group),
        *_experts(group),
        *_formats(group),
        *_memory(group),
        *_scheduling(group),
        *_json("--kv-transfer-config", kv_transfer(group)),
        *_json("--kv-events-config", kv_events() if spec.kv.events else None),
    ]


def _parallel(group: Group) -> list[str]:
    shape = group.pool.parallelism
    if shape.data == 1:
        return [*_flag("--tensor-parallel-size", shape.tensor)]
    local = group.ranks_per_pod
    return [
        *_flag("--tensor-parallel-size", shape.tensor),
        *_flag("--data-parallel-size", shape.data),
        *_flag("--data-parallel-size-local", local),
        *_flag("--data-parallel-address", group.coordinator),
        *_flag("--data-parallel-rpc-port", COORDINATOR_PORT),
        *(
            [
                "--data-parallel-multi-port-external-lb",
                *_flag("--data-parallel-supervisor-port", SUPERVISOR_PORT),
            ]
            if supervised(group)
            else []
        ),
    ]


def _experts(group: Group) -> list[str]:
    pool = group.pool
    balancing, overlap = pool.expert_load_balancing, pool.dual_batch_overlap
    eplb = balancing and {
        "window_size": balancing.window,
        "step_interval": balancing.interval,
        "num_redundant_experts": balancing.redundant_experts,
    }
    return [
        *(["--enable-expert-parallel"] if shards_experts(group) else []),
        *_flag("--all2all-backend", ALL_TO_ALL.get(pool.all_to_all)),
        *(["--enable-eplb"] if eplb else []),
        *_json("--eplb-config", eplb),
        *(_overlap(overlap) if overlap else []),
    ]


def shards_experts(group: Group) -> bool:
    """vLLM refuses the flag for a dense model; a model nobody knows is taken for one with experts."""
    shape = shape_of(group.cluster.spec.model)
    return group.pool.expert_parallel > 1 and (shape is None or shape.experts is not None)


def _overlap(overlap: DualBatchOverlap) -> list[str]:
    return [
        "--enable-dbo",
        *_flag("--dbo-decode-token-threshold", overlap.decode_threshold),
        *_flag("--dbo-prefill-token-threshold", overlap.prefill_threshold),
    ]


def _formats(group: Group) -> list[str]:
    precision = group.pool.precision
    attention = {"fp8": True, "bf16": False}.get(precision.attention)
    return [
        # vLLM refuses to start when the checkpoint holds another format, so this is checked, not hoped.
        *_flag("--quantization", QUANTIZATION.get(precision.moe)),
        *_json(
            "--attention-config",
            None if attention is None else {"use_prefill_query_quantization": attention},
        ),
        *_flag("--kv-cache-dtype", CACHE_DTYPES.get(precision.kv_cache)),
    ]


def _memory(group: Group) -> list[str]:
    cache, offload = group.pool.kv_cache, group.pool.weight_offload
    return [
        *_flag("--block-size", cache.block_size),
        *_flag("--kv-cache-memory-bytes", cache.memory.bytes if cache.memory else None),
        "--enable-prefix-caching" if cache.prefix_reuse else "--no-enable-prefix-caching",
        *(_offload(offload) if offload else []),
    ]


def _offload(offload: WeightOffload) -> list[str]:
    return [
        *_flag("--offload-backend", "prefetch"),
        *_flag("--offload-group-size", offload.group_size),
        *_flag("--offload-num-in-group", offload.num_in_group),
        *_flag("--offload-prefetch-step", offload.prefetch_step),
        *(["--offload-params", *offload.parameters] if offload.parameters else []),
    ]


def _scheduling(group: Group) -> list[str]:
    asked = group.pool.scheduling
    graphs = CUDA_GRAPHS.get(asked.cuda_graph)
    overlapped = {True: ["--async-scheduling"], False: ["--no-async-scheduling"], None: []}
    return [
        *overlapped[asked.async_],
        *_flag("--stream-interval", asked.stream_interval),
        *_flag("--max-num-batched-tokens", asked.max_batched_tokens),
        *_flag("--max-num-seqs", asked.max_sequences),
        *_json("--compilation-config", graphs and {"cudagraph_mode": graphs}),
    ]


def environment(group: Group) -> list[Object]:
    spec, pool = group.cluster.spec, group.pool
    chunking = pool.chunking
    variables: dict[str, str | int | None] = {
        "VLLM_NO_USAGE_STATS": 1,
        "DO_NOT_TRACK": 1,
        "HOME": CACHE_DIR,
        "USER": "broadbeam",  # the image knows no name for our user id, and torch asks for one
        "HF_HOME": f"{CACHE_DIR}/huggingface",
        "VLLM_CACHE_ROOT": f"{CACHE_DIR}/vllm",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": f"$({ENV_POD_IP})" if spec.kv.transfer else None,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": KV_SIDE_CHANNEL_PORT if spec.kv.transfer else None,
        # Quantised for the wire where the all-to-all leaves the choice; the one-sided NVLink one always is.
        "VLLM_DEEPEPLL_NVFP4_DISPATCH": 1 if pool.precision.dispatch == "nvfp4" else None,
    }
    if chunking:
        variables |= {
            # vLLM after 0.17 knows neither and never chunks; before, they were on.
            "VLLM_ENABLE_MOE_DP_CHUNK": 0 if chunking.moe_data_parallel else None,
            "VLLM_ENABLE_FUSED_MOE_ACTIVATION_CHUNKING": 0 if chunking.moe_activation else None,
            "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": chunking.output and (chunking.output.size or UNCHUNKED_OUTPUTS),
        }
    return [{"name": key, "value": str(value)} for key, value in variables.items() if value is not None]


def model_in_pod(source: str) -> str:
    """A repository name or a path: what `vllm serve` takes."""
    return source_in_pod(source).partition("://")[2]


def _flag(name: str, value: str | int | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def _json(name: str, value: Any) -> list[str]:
    return [] if value is None else [name, json.dumps(value, separators=(",", ":"))]
