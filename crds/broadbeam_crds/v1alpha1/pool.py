"""A pool: groups of ranks that do the same part of the work."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from broadbeam_crds.quantity import ChunkSize, Quantity
from broadbeam_crds.v1alpha1.fields import LABEL_PATTERN, ApiModel

Role = Literal["prefill", "decode", "both"]
AllToAll = Literal[
    "auto",
    "allgather-reducescatter",
    "deepep-high-throughput",
    "deepep-low-latency",
    "deepep-v2",
    "mori-high-throughput",
    "mori-low-latency",
    "nixl",
    "nvlink",
    "nvlink-two-sided",
]


class Parallelism(ApiModel):
    """How the model is spread over the accelerators of one group. The expert-parallel degree, over which the
    experts are shared out, is data * tensor, and must equal nodes * accelerator.perNode."""

    data: int = Field(
        1,
        ge=1,
        le=4096,
        description="Data-parallel ranks of a group: each has its own requests and KV cache.",
    )
    tensor: int = Field(
        1, ge=1, le=64, description="Accelerators that share the attention of one data-parallel rank."
    )
    nodes: int = Field(
        1, ge=1, le=512, description="Pods of a group; each fills accelerator.perNode devices."
    )


class Accelerator(ApiModel):
    """The devices of one pod."""

    resource: str = Field(
        "nvidia.com/gpu",
        min_length=1,
        max_length=128,
        pattern=r"^cpu$|^[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$",
        description="Resource a pod asks for: nvidia.com/gpu, amd.com/gpu, or cpu for ranks without a GPU.",
    )
    per_node: int = Field(1, ge=1, le=64, description="Devices, and so ranks, of one pod.")
    product: str | None = Field(
        None,
        min_length=1,
        max_length=63,
        pattern=r"^[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$",
        description="Product to ask for, as the node's label says: NVIDIA-H200, NVIDIA-GB200. It also tells "
        "how much memory there is, so that a model that does not fit is refused.",
    )
    topology_key: str | None = Field(
        None,
        min_length=1,
        max_length=317,
        pattern=r"^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$",
        description="Node label whose value all pods of a group must share, such as an NVLink domain.",
    )


class Precision(ApiModel):
    """Number formats. auto is what the checkpoint and the engine choose."""

    moe: Literal["auto", "fp32", "bf16", "fp8", "mxfp4", "nvfp4"] = Field(
        "auto", description="Expert weights and their matrix products."
    )
    attention: Literal["auto", "fp32", "bf16", "fp8"] = Field(
        "auto", description="Attention weights and their matrix products."
    )
    kv_cache: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto", description="Keys and values in the cache."
    )
    dispatch: Literal["auto", "fp32", "bf16", "fp8", "nvfp4"] = Field(
        "auto", description="Activations on their way to the experts."
    )


class DualBatchOverlap(ApiModel):
    """Split a step in two halves so that one computes while the other communicates."""

    decode_threshold: int = Field(
        32, ge=1, le=1048576, description="Least tokens of a decode step that is split."
    )
    prefill_threshold: int = Field(
        512, ge=1, le=1048576, description="Least tokens of a step with prefill that is split."
    )


class ExpertLoadBalancing(ApiModel):
    """Place copies of busy experts, and move experts, so that all ranks have the same load."""

    redundant_experts: int = Field(
        0, ge=0, le=65536, description="Copies of experts in a layer beyond one each, over the whole group."
    )
    window: int = Field(1000, ge=1, le=1000000, description="Steps over which the load is measured.")
    interval: int = Field(3000, ge=1, le=10000000, description="Steps between two rebalancings.")
    strategy: Literal["auto", "global", "hierarchical", "static"] = Field(
        "auto",
        description="global: any expert on any rank. hierarchical: expert groups stay within a node. "
        "static: never moves an expert. auto: the better one by measured gain.",
    )
    max_moved_fraction: float | None = Field(
        None, gt=0, le=1, description="Most of the expert slots that one rebalancing may move, 0 to 1."
    )


class WeightOffload(ApiModel):
    """Keep the weights of some layers in host memory and fetch them before they are needed."""

    group_size: int = Field(ge=1, le=4096, description="Layers of one offload group.")
    num_in_group: int = Field(1, ge=1, le=4096, description="Layers offloaded in each group, its last ones.")
    prefetch_step: int = Field(1, ge=1, le=64, description="Layers fetched ahead.")
    parameters: list[Annotated[str, StringConstraints(min_length=1, max_length=128)]] = Field(
        default_factory=list,
        max_length=32,
        description="Names of the weights to offload, such as w13_weight; empty: all of the layer.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )


class Chunking(ApiModel):
    """Work cut into pieces to bound memory; a number of tokens, or disabled. Unset: the engine's choice."""

    moe_data_parallel: ChunkSize | None = Field(
        None, description="Tokens a rank dispatches to experts at once."
    )
    moe_activation: ChunkSize | None = Field(
        None, description="Tokens that go through an expert layer at once."
    )
    output: ChunkSize | None = Field(
        None, description="Outputs turned into text before the server may do other work."
    )


class Scheduling(ApiModel):
    """How a rank fills its steps. Unset: the engine's choice."""

    async_: bool | None = Field(
        None, alias="async", description="Prepare the next step while the device runs this one."
    )
    stream_interval: int = Field(
        1,
        ge=1,
        le=1024,
        description="Tokens in one streamed message; the first token is always sent at once.",
    )
    max_batched_tokens: int | None = Field(
        None, ge=1, le=1048576, description="Most tokens of one step; longer prompts are cut."
    )
    max_sequences: int | None = Field(None, ge=1, le=65536, description="Most sequences running on one rank.")
    cuda_graph: Literal["auto", "none", "piecewise", "full", "full-decode-only", "full-and-piecewise"] = (
        Field("auto", description="Which steps are captured as CUDA graphs.")
    )


class Autoscaling(ApiModel):
    """Bounds between which the number of groups follows the load."""

    min_groups: int = Field(1, ge=0, le=256, description="Fewest groups.")
    max_groups: int = Field(ge=1, le=256, description="Most groups.")


class KVCache(ApiModel):
    """The paged KV cache of one rank."""

    memory: Quantity | None = Field(
        None,
        description="Memory of each rank's cache. Unset: a share of what is free when the engine starts.",
    )
    block_size: int | None = Field(
        None, ge=1, le=1024, description="Tokens of one block. Unset: the engine's choice; broadbeam's is 16."
    )
    prefix_reuse: bool = Field(True, description="Use the blocks of an earlier prompt that began alike.")


class Resources(ApiModel):
    """What one pod of the pool asks for beside its accelerators."""

    cpu: Quantity | None = Field(None, description="CPU cores.")
    memory: Quantity | None = Field(None, description="Host memory.")


class Pool(ApiModel):
    """Groups of ranks that do the same part of the work. A group is one expert-parallel world: it starts, is
    ready, fails and is replaced as a whole."""

    name: str = Field(
        min_length=1,
        max_length=24,
        pattern=LABEL_PATTERN,
        description="Name of the pool, unique in the cluster.",
    )
    role: Role = Field(
        "both",
        description="prefill: computes prompts. decode: generates tokens. both: does both on one rank.",
    )
    groups: int = Field(1, ge=0, le=256, description="Expert-parallel groups to run.")
    parallelism: Parallelism = Parallelism()
    accelerator: Accelerator = Accelerator()
    resources: Resources | None = None
    precision: Precision = Precision()
    all_to_all: AllToAll = Field("auto", description="How activations reach the experts on other ranks.")
    dual_batch_overlap: DualBatchOverlap | None = None
    expert_load_balancing: ExpertLoadBalancing | None = None
    weight_offload: WeightOffload | None = None
    chunking: Chunking | None = None
    scheduling: Scheduling = Scheduling()
    autoscaling: Autoscaling | None = None
    kv_cache: KVCache = KVCache()
    template: dict[str, Any] | None = Field(
        None,
        description="Pod template laid over the generated one (metadata and spec), as kubectl patch "
        "--type=strategic would: the way to set what has no field here.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )

    @property
    def ranks(self) -> int:
        """Devices of one group; equal to `expert_parallel` in a valid pool."""
        return self.parallelism.nodes * self.accelerator.per_node

    @property
    def expert_parallel(self) -> int:
        return self.parallelism.data * self.parallelism.tensor

    @property
    def decodes(self) -> bool:
        return self.role in ("decode", "both")
