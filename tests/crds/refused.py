"""What breaks each rule beyond the types of fields, and the whole line it is refused with."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from broadbeam_crds.testing import TINY_MODEL, pool, serving_cluster
from broadbeam_crds.v1alpha1 import ServingCluster

ARCHITECTURE: dict[str, Any] = {
    "layers": 4,
    "hiddenSize": 64,
    "vocabularySize": 100,
    "attentionHeads": 4,
    "experts": {"count": 16, "perToken": 2, "intermediateSize": 64, "groups": 4},
}
R1 = {"name": "deepseek-ai/DeepSeek-R1", "source": "hf://deepseek-ai/DeepSeek-R1"}
SMOL = {"name": "SmolLM2-135M", "source": "hf://HuggingFaceTB/SmolLM2-135M"}
NIXL = {"transfer": {"connector": "nixl"}}


def unknown(**architecture: Any) -> dict[str, Any]:
    """A model that only the manifest describes, so that the API server can do the arithmetic too."""
    return {"name": "mine", "source": "file:///models/mine", "architecture": ARCHITECTURE | architecture}


def alone(engine: str = "broadbeam", **fields: Any) -> ServingCluster:
    """One pool that does everything; `model` and `kv` belong to the spec, the rest to the pool."""
    spec = {key: fields.pop(key) for key in ("model", "kv") if key in fields}
    if engine == "vllm":
        spec.setdefault("model", unknown())
    return serving_cluster(pools=[pool("main", "both", **fields)], engine=engine, **spec)


def vllm(**fields: Any) -> ServingCluster:
    return alone("vllm", **{"data": 4} | fields)


def ours(field: str, value: str = "", only: str = "") -> str:
    shown = f" {value}" if value else ""
    limit = f" (only {only})" if only else ""
    return f"spec.pools[main].{field}:{shown} not supported yet by engine broadbeam{limit}"


class Row(NamedTuple):
    """`by` says who refuses it in a cluster: the rule's CEL in the same words, the schema in its own, or the
    operator alone, for the API server knows neither models nor devices."""

    name: str
    cluster: ServingCluster
    message: str
    by: Literal["rule", "schema", "operator"] = "rule"


REFUSED: list[Row] = [
    Row(
        "a name that begins with a digit",
        serving_cluster("7b"),
        'metadata.name: "7b" must begin with a letter and hold only a-z, 0-9 and "-"',
    ),
    Row(
        "names that do not fit a label",
        serving_cluster("c" * 41),
        f'spec.pools[prefill].name: with the cluster\'s name "{"c" * 41}" 48 characters; the limit is 47',
    ),
    Row(
        "two pools of one name",
        serving_cluster(pools=[pool("decode"), pool("decode")]),
        "spec.pools: 2 pools are named decode; the limit is 1",
        by="schema",
    ),
    Row(
        "a pool with a name of ours",
        serving_cluster(pools=[pool("gateway", "both")]),
        'spec.pools[gateway].name: "gateway" is kept for the cluster\'s own objects; choose another',
    ),
    Row(
        "nobody decodes",
        serving_cluster(pools=[pool("prefill")]),
        "spec.pools: every pool has role prefill; at least one must be decode or both",
    ),
    Row(
        "prefill without a connector",
        serving_cluster(kv={}),
        'spec.kv.transfer: missing; the KV that pool "prefill" (role prefill) computes needs a connector',
    ),
    Row(
        "block sizes differ",
        serving_cluster(pools=[pool("prefill"), pool("decode", kvCache={"blockSize": 32})]),
        'spec.pools[decode].kvCache.blockSize: 32 differs from unset in pool "prefill"; '
        "KV transfer needs them equal",
    ),
    Row(
        "cache formats differ",
        serving_cluster(pools=[pool("prefill"), pool("decode", precision={"kvCache": "fp16"})]),
        'spec.pools[decode].precision.kvCache: fp16 differs from auto in pool "prefill"; '
        "KV transfer needs them equal",
    ),
    Row(
        "ranks do not fill the nodes",
        alone(data=16, nodes=2, accelerator={"resource": "cpu", "perNode": 4}),
        "spec.pools[main].parallelism: data * tensor = 16 * 1 = 16, but "
        "nodes * accelerator.perNode = 2 * 4 = 8; they must be equal",
    ),
    Row(
        "a rank over two nodes",
        vllm(parallelism={"data": 2, "tensor": 8, "nodes": 4}, accelerator={"perNode": 4}),
        "spec.pools[main].parallelism.tensor: 8 does not divide accelerator.perNode 4; "
        "a data-parallel rank stays within one node",
    ),
    Row(
        "more sequences than tokens",
        alone(scheduling={"maxSequences": 64, "maxBatchedTokens": 32}),
        "spec.pools[main].scheduling.maxSequences: 64 is above maxBatchedTokens 32; "
        "each running sequence takes a token of the step",
    ),
    Row(
        "messages longer than any answer",
        alone(scheduling={"streamInterval": 64}, model=TINY_MODEL | {"maxModelLen": 32}),
        "spec.pools[main].scheduling.streamInterval: 64 is above spec.model.maxModelLen 32; "
        "no answer is that long",
    ),
    Row(
        "more offloaded than there is",
        vllm(weightOffload={"groupSize": 2, "numInGroup": 3}),
        "spec.pools[main].weightOffload.numInGroup: 3 is above groupSize 2",
    ),
    Row(
        "autoscaling upside down",
        alone(autoscaling={"minGroups": 4, "maxGroups": 2}),
        "spec.pools[main].autoscaling.minGroups: 4 is above maxGroups 2",
    ),
    Row(
        "groups outside autoscaling's bounds",
        alone(groups=1, autoscaling={"minGroups": 2, "maxGroups": 4}),
        "spec.pools[main].groups: 1 is not between autoscaling.minGroups 2 and maxGroups 4",
    ),
    Row(
        "experts that do not share out, by the model's name",
        alone(data=3, model=TINY_MODEL | {"name": "tiny-deepseek-v3"}),
        "spec.pools[main].parallelism: (experts + redundantExperts) % EP degree = (16 + 0) % 3 = 1; "
        "it must be 0",
    ),
    Row(
        "copies that do not share out, by the manifest's numbers",
        vllm(expertLoadBalancing={"redundantExperts": 6}),
        "spec.pools[main].parallelism: (experts + redundantExperts) % EP degree = (16 + 6) % 4 = 2; "
        "it must be 0",
    ),
    Row(
        "copies that nothing moves",
        vllm(expertLoadBalancing={"redundantExperts": 4, "strategy": "static"}),
        "spec.pools[main].expertLoadBalancing.redundantExperts: 4 with strategy static; "
        "copies help only a strategy that moves experts, so it must be 0",
    ),
    Row(
        "balancing within one rank",
        vllm(data=1, expertLoadBalancing={}),
        "spec.pools[main].expertLoadBalancing: the EP degree is 1; balancing needs at least 2",
    ),
    Row(
        "balancing a known dense model",
        vllm(expertLoadBalancing={}, model=SMOL),
        'spec.pools[main].expertLoadBalancing: model "SmolLM2-135M" has no experts to balance',
    ),
    Row(
        "balancing a dense model of the manifest",
        vllm(expertLoadBalancing={}, model=unknown(experts=None)),
        'spec.pools[main].expertLoadBalancing: model "mine" has no experts to balance',
    ),
    Row(
        "expert groups over too many nodes",
        vllm(data=8, nodes=8, expertLoadBalancing={"strategy": "hierarchical"}),
        "spec.pools[main].expertLoadBalancing.strategy: hierarchical needs the model's expert groups (4) "
        "to be a multiple of parallelism.nodes 8",
    ),
    Row(
        "a window longer than the interval",
        vllm(expertLoadBalancing={"window": 1000, "interval": 500}),
        "spec.pools[main].expertLoadBalancing.window: 1000 is above interval 500; "
        "load is measured between two rebalancings",
    ),
    Row(
        "overlap without communication",
        vllm(data=1, dualBatchOverlap={}, allToAll="nixl"),
        "spec.pools[main].dualBatchOverlap: the EP degree is 1; there is communication to hide from 2 on",
    ),
    Row(
        "a prefill threshold above every step",
        vllm(dualBatchOverlap={}, allToAll="nixl", scheduling={"maxBatchedTokens": 256}),
        "spec.pools[main].dualBatchOverlap.prefillThreshold: 512 is above scheduling.maxBatchedTokens 256; "
        "no step would be split",
    ),
    Row(
        "a decode threshold above every step",
        vllm(dualBatchOverlap={}, allToAll="nixl", scheduling={"maxSequences": 16}),
        "spec.pools[main].dualBatchOverlap.decodeThreshold: 32 is above scheduling.maxSequences 16; "
        "no step would be split",
    ),
    Row(
        "a rollout that cannot move",
        serving_cluster(rollout={"maxSurge": "0%", "maxUnavailable": 0}),
        "spec.rollout: maxSurge and maxUnavailable are both 0; one must be at least 1, or nothing can roll",
    ),
    Row(
        "canary weights that fall",
        serving_cluster(rollout={"canary": {"weights": [50, 25]}}),
        "spec.rollout.canary.weights: each must be at least the one before",
    ),
    Row(
        "two listeners on one port",
        serving_cluster(gateway={"listeners": [{"name": "a", "port": 80}, {"name": "b", "port": 80}]}),
        "spec.gateway.listeners: 2 listeners have port 80; the limit is 1",
    ),
    Row(
        "two listeners of one name",
        serving_cluster(gateway={"listeners": [{"name": "a", "port": 80}, {"name": "a", "port": 81}]}),
        "spec.gateway.listeners: 2 listeners are named a; the limit is 1",
        by="schema",
    ),
    Row(
        "a listener on the port of the metrics",
        serving_cluster(gateway={"listeners": [{"name": "web", "port": 9090}]}),
        "spec.gateway.listeners[web].port: 9090 is the port of the gateway's metrics; choose another",
    ),
    Row(
        "more listeners than are built",
        serving_cluster(gateway={"listeners": [{"name": "a", "port": 80}, {"name": "b", "port": 81}]}),
        "spec.gateway.listeners: 2 listeners not supported yet by the operator; the limit is 1",
    ),
    Row(
        "a variable without a value",
        serving_cluster(engine={"name": "broadbeam", "env": [{"name": "A"}]}),
        "spec.engine.env[A]: give value or valueFrom, one of the two",
    ),
    Row(
        "a variable of ours",
        serving_cluster(engine={"name": "broadbeam", "env": [{"name": "BROADBEAM_CACHE", "value": "/x"}]}),
        "spec.engine.env[BROADBEAM_CACHE]: names that begin with BROADBEAM_ are set by the operator",
    ),
    Row(
        "a variable given twice",
        serving_cluster(
            engine={"name": "broadbeam", "env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}
        ),
        "spec.engine.env: 2 variables are named A; the limit is 1",
        by="schema",
    ),
    Row(
        "the simulator's timing for another engine",
        serving_cluster(engine={"name": "broadbeam", "sim": {}}),
        'spec.engine.sim: only for engine sim, but spec.engine.name is "broadbeam"',
    ),
    Row(
        "tensor parallelism",
        alone(parallelism={"tensor": 2}, accelerator={"resource": "cpu", "perNode": 2}),
        ours("parallelism.tensor", "2", "1"),
    ),
    Row("an all-to-all", alone(allToAll="nvlink"), ours("allToAll", "nvlink", "auto")),
    Row("overlap", alone(data=2, dualBatchOverlap={}), ours("dualBatchOverlap")),
    Row("balancing", alone(data=2, expertLoadBalancing={}), ours("expertLoadBalancing")),
    Row("weight offload", alone(weightOffload={"groupSize": 2}), ours("weightOffload")),
    Row(
        "MoE chunking",
        alone(chunking={"moeDataParallel": 256}),
        ours("chunking.moeDataParallel", "256", "disabled"),
    ),
    Row(
        "activation chunking",
        alone(chunking={"moeActivation": 256}),
        ours("chunking.moeActivation", "256", "disabled"),
    ),
    Row("output chunking", alone(chunking={"output": 99}), ours("chunking.output", "99", "disabled")),
    Row(
        "asynchronous scheduling",
        alone(scheduling={"async": True}),
        ours("scheduling.async", "true", "false"),
    ),
    Row(
        "CUDA graphs",
        alone(scheduling={"cudaGraph": "full"}),
        ours("scheduling.cudaGraph", "full", "auto or none"),
    ),
    Row(
        "NVFP4 experts",
        alone(precision={"moe": "nvfp4"}),
        ours("precision.moe", "nvfp4", "auto or bf16 or fp32"),
    ),
    Row(
        "FP8 attention",
        alone(precision={"attention": "fp8"}),
        ours("precision.attention", "fp8", "auto or bf16 or fp32"),
    ),
    Row(
        "FP8 dispatch",
        alone(precision={"dispatch": "fp8"}),
        ours("precision.dispatch", "fp8", "auto or bf16 or fp32"),
    ),
    Row(
        "an FP8 cache",
        alone(precision={"kvCache": "fp8"}),
        ours("precision.kvCache", "fp8", "auto or bf16 or fp16 or fp32"),
    ),
    Row(
        "experts in another type than the rest",
        alone(precision={"moe": "bf16"}),
        "spec.pools[main].precision.moe: bf16 needs spec.engine.dtype bfloat16, which is auto; "
        "engine broadbeam computes in one type",
    ),
    Row(
        "attention in another type than the rest",
        alone(precision={"attention": "fp32"}),
        "spec.pools[main].precision.attention: fp32 needs spec.engine.dtype float32, which is auto; "
        "engine broadbeam computes in one type",
    ),
    Row(
        "dispatch in another type than the rest",
        alone("sim", precision={"dispatch": "bf16"}),
        "spec.pools[main].precision.dispatch: bf16 needs spec.engine.dtype bfloat16, which is auto; "
        "engine sim computes in one type",
    ),
    Row(
        "autoscaling",
        alone(autoscaling={"maxGroups": 4}),
        "spec.pools[main].autoscaling: not supported yet by the operator",
    ),
    Row(
        "KV in host memory",
        alone(kv={"offload": {"hostMemory": "1Gi"}}),
        "spec.kv.offload: not supported yet by engine broadbeam",
    ),
    Row(
        "KV events of the simulator",
        alone("sim", kv={"events": True}),
        "spec.kv.events: true not supported yet by engine sim (only false)",
    ),
    Row(
        "objectives",
        serving_cluster(objectives={"ttft": "500ms"}),
        "spec.objectives: not supported yet by the operator",
    ),
    Row(
        "a surge",
        serving_cluster(rollout={"maxSurge": "25%"}),
        "spec.rollout.maxSurge: 25% not supported yet by the operator (only 0)",
    ),
    Row(
        "a longer history",
        serving_cluster(rollout={"revisionHistoryLimit": 9}),
        "spec.rollout.revisionHistoryLimit: 9 not supported yet by the operator (only 5)",
    ),
    Row(
        "a canary",
        serving_cluster(rollout={"canary": {"weights": [25, 50]}}),
        "spec.rollout.canary: not supported yet by the operator",
    ),
    Row(
        "the fault ladder",
        serving_cluster(recovery={}),
        "spec.recovery: not supported yet by the operator",
    ),
    Row(
        "vLLM and a strategy",
        vllm(expertLoadBalancing={"strategy": "global"}),
        "spec.pools[main].expertLoadBalancing.strategy: global not supported yet by engine vllm (only auto); "
        "vLLM chooses by itself",
    ),
    Row(
        "vLLM and a bounded rebalancing",
        vllm(expertLoadBalancing={"maxMovedFraction": 0.1}),
        "spec.pools[main].expertLoadBalancing.maxMovedFraction: not supported yet by engine vllm; "
        "vLLM cannot bound a rebalancing",
    ),
    Row(
        "vLLM and MoE chunking",
        vllm(chunking={"moeDataParallel": 256}),
        "spec.pools[main].chunking.moeDataParallel: 256 not supported yet by engine vllm (only disabled); "
        "vLLM dropped this chunking after 0.17",
    ),
    Row(
        "vLLM and activation chunking",
        vllm(chunking={"moeActivation": 16384}),
        "spec.pools[main].chunking.moeActivation: 16384 not supported yet by engine vllm (only disabled); "
        "vLLM dropped this chunking after 0.17",
    ),
    Row(
        "vLLM and experts in another format",
        vllm(precision={"moe": "fp32"}),
        "spec.pools[main].precision.moe: fp32 not supported yet by engine vllm; "
        "vLLM keeps what the checkpoint holds",
    ),
    Row(
        "vLLM and experts made 16 bits wide",
        vllm(precision={"moe": "bf16"}),
        "spec.pools[main].precision.moe: bf16 not supported yet by engine vllm; "
        "vLLM keeps what the checkpoint holds",
    ),
    Row(
        "vLLM and attention in 32 bits",
        vllm(precision={"attention": "fp32"}),
        "spec.pools[main].precision.attention: fp32 not supported yet by engine vllm",
    ),
    Row(
        "vLLM and a cache in 32 bits",
        vllm(precision={"kvCache": "fp32"}),
        "spec.pools[main].precision.kvCache: fp32 not supported yet by engine vllm",
    ),
    Row(
        "vLLM and dispatch in another format",
        vllm(precision={"dispatch": "fp8"}),
        "spec.pools[main].precision.dispatch: fp8 not supported yet by engine vllm (only auto or nvfp4); "
        "otherwise it follows the experts' format",
    ),
    Row(
        "vLLM and NVFP4 dispatch by other means",
        vllm(precision={"dispatch": "nvfp4"}),
        "spec.pools[main].allToAll: auto cannot carry precision.dispatch nvfp4 on engine vllm; use "
        "nvlink or deepep-low-latency",
    ),
    Row(
        "vLLM and overlap by other means",
        vllm(dualBatchOverlap={}, allToAll="allgather-reducescatter"),
        "spec.pools[main].allToAll: allgather-reducescatter cannot overlap on engine vllm; "
        "dualBatchOverlap needs deepep-low-latency, deepep-high-throughput or nixl",
    ),
    Row(
        "vLLM and plain sockets",
        serving_cluster(engine="vllm", model=unknown()),
        "spec.kv.transfer.connector: tcp not supported yet by engine vllm",
    ),
    Row(
        "vLLM and CPU threads",
        serving_cluster(pools=[pool("both")], engine={"name": "vllm", "threads": 2}, model=unknown()),
        "spec.engine.threads: 2 not supported yet by engine vllm (only 0)",
    ),
    Row(
        "vLLM and a random model",
        vllm(model=TINY_MODEL),
        "spec.model.source: tiny:// not supported by engine vllm; use hf, pvc, oci or file",
    ),
    Row(
        "longer than the model was made for",
        alone(model=TINY_MODEL | {"maxModelLen": 5000}, kvCache={"memory": "1Gi"}),
        'spec.model.maxModelLen: 5000 tokens are above the 4096 that model "tiny" was made for',
        by="operator",
    ),
    Row(
        "a cache smaller than one sequence",
        alone(kvCache={"memory": "1Mi"}, model=TINY_MODEL),
        "spec.pools[main].kvCache.memory: 1Mi holds 112 tokens of 9216 bytes, in blocks of 16; a sequence of "
        "spec.model.maxModelLen needs 1024",
        by="operator",
    ),
    Row(
        "a cache smaller than the model's own length",
        alone(kvCache={"memory": "1Mi"}, model={"name": "tiny", "source": "tiny://deepseek-v3"}),
        "spec.pools[main].kvCache.memory: 1Mi holds 112 tokens of 9216 bytes, in blocks of 16; a sequence of "
        "the model's own limit needs 4096",
        by="operator",
    ),
    Row(
        "a cache that loses a sequence to whole blocks",
        alone(kvCache={"memory": 1000 * 9216, "blockSize": 64}, model=TINY_MODEL | {"maxModelLen": 1000}),
        "spec.pools[main].kvCache.memory: 9216000 holds 960 tokens of 9216 bytes, in blocks of 64; a "
        "sequence of spec.model.maxModelLen needs 1024",
        by="operator",
    ),
    Row(
        "heads that cannot be cut",
        vllm(
            data=1,
            model=SMOL,
            parallelism={"tensor": 2},
            accelerator={"perNode": 2},
        ),
        "spec.pools[main].parallelism.tensor: 2 does not divide the model's 9 attention heads",
    ),
    Row(
        "ranks of a dense model under vLLM",
        vllm(data=2, model=SMOL),
        'spec.pools[main].parallelism.data: 2, but model "SmolLM2-135M" has no experts for engine vllm to '
        "share out; it must be 1, and groups may be more",
    ),
    Row(
        "an uneven split of a model that is known by its repository",
        vllm(data=3, model={"name": "chat", "source": "hf://deepseek-ai/DeepSeek-R1"}),
        "spec.pools[main].parallelism: (experts + redundantExperts) % EP degree = (256 + 0) % 3 = 1; "
        "it must be 0",
    ),
    Row(
        "an uneven split of a random model",
        alone(data=3),
        "spec.pools[main].parallelism: (experts + redundantExperts) % EP degree = (16 + 0) % 3 = 1; "
        "it must be 0",
    ),
    Row(
        "weights beyond the device",
        vllm(data=4, accelerator={"perNode": 4, "product": "NVIDIA-H100-80GB-HBM3"}, model=R1, kvCache={}),
        "spec.pools[main]: does not fit: a rank needs 170.1 GiB of weights + 0.0 MiB of KV cache = "
        "170.1 GiB, and has 79.0 GiB",
        by="operator",
    ),
    Row(
        "weights and cache beyond the pod",
        alone(resources={"memory": "64Mi"}),
        "spec.pools[main]: does not fit: a rank needs 33.9 MiB of weights + 64.0 MiB of KV cache = "
        "97.9 MiB, and has 64.0 MiB",
        by="operator",
    ),
]
