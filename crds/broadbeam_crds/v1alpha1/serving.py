"""What surrounds the pools: KV transfer, gateway, objectives, rollout and recovery."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from broadbeam_crds.conventions import GATEWAY_PORT
from broadbeam_crds.quantity import Duration, PositiveDuration, Quantity, Share
from broadbeam_crds.v1alpha1.fields import ApiModel, DnsLabel, SecretReference, list_map


class KVTransfer(ApiModel):
    """How a decode rank gets the keys and values that a prefill rank computed."""

    connector: Literal["nixl", "tcp"] = Field(
        description="nixl: RDMA, NVLink or shared memory, whatever the nodes have. tcp: plain sockets."
    )
    lease: PositiveDuration = Field(
        PositiveDuration("30s"), description="How long a prefill rank keeps blocks that nobody has fetched."
    )
    load_failure_policy: Literal["fail", "recompute"] = Field(
        "fail", description="When blocks cannot be fetched: fail the request, or compute the prompt again."
    )


class KVOffload(ApiModel):
    """Blocks that no longer fit the device go to host memory."""

    host_memory: Quantity = Field(description="Host memory of one rank.")
    eviction_policy: Literal["lru", "arc"] = Field("lru", description="Which blocks leave host memory first.")


class KV(ApiModel):
    """Keys and values outside the cache of one rank."""

    transfer: KVTransfer | None = Field(None, description="Needed as soon as there is a prefill pool.")
    offload: KVOffload | None = None
    events: bool = Field(False, description="Publish which blocks a rank holds, for prefix-aware routing.")


class GatewayAuth(ApiModel):
    """Clients must show an API key: Authorization: Bearer KEY."""

    secret_ref: SecretReference = Field(description="Secret whose values hold keys, one a line.")


class GatewayLimits(ApiModel):
    """What the gateway refuses before it reaches an engine."""

    max_body: Quantity = Field(Quantity("32Mi"), description="Largest request body; above it 413.")
    max_header: Quantity = Field(Quantity("64Ki"), description="Largest request head; above it 431.")
    max_connections: int = Field(
        4096, ge=1, le=1048576, description="Open client connections of one replica."
    )
    max_in_flight: int = Field(
        1024, ge=1, le=1048576, description="Requests at once in one replica; above it 429."
    )


class GatewayTimeouts(ApiModel):
    """How long the gateway waits for an engine."""

    connect: PositiveDuration = Field(PositiveDuration("2s"), description="For a connection.")
    prefill: PositiveDuration = Field(PositiveDuration("120s"), description="For the whole prefill leg.")
    first_byte: PositiveDuration = Field(
        PositiveDuration("300s"), description="For the start of the decode leg's answer."
    )
    idle: PositiveDuration = Field(PositiveDuration("120s"), description="Between two pieces of an answer.")
    drain: Duration = Field(Duration("30s"), description="For running requests when a replica stops.")


class Listener(ApiModel):
    """A port on which the gateway listens."""

    name: DnsLabel = Field("http", description="Name of the port.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(GATEWAY_PORT, description="Port number.")


class Gateway(ApiModel):
    """The entrance: an OpenAI-compatible server that chooses the ranks for each request."""

    replicas: int = Field(1, ge=0, le=64, description="Gateway pods.")
    policy: Literal["least-loaded", "round-robin", "random"] = Field(
        "least-loaded", description="How a rank is chosen."
    )
    auth: GatewayAuth | None = None
    limits: GatewayLimits = GatewayLimits()
    timeouts: GatewayTimeouts = GatewayTimeouts()
    retries: int = Field(
        2, ge=0, le=16, description="Further ranks tried for a leg, before the client has got a byte."
    )
    ejection: PositiveDuration = Field(
        PositiveDuration("5s"),
        description="How long a rank that failed is left out at first; it doubles up to 60s.",
    )
    listeners: list[Listener] = Field(
        default_factory=lambda: [Listener()],
        min_length=1,
        max_length=8,
        description="Ports on which the gateway listens.",
        json_schema_extra=list_map("name"),
    )
    route_headers: bool = Field(
        False, description="Say in the response headers which ranks answered: x-broadbeam-prefill, -decode."
    )


class Objectives(ApiModel):
    """The speed that clients are promised."""

    ttft: PositiveDuration | None = Field(None, description="Time to first token.")
    tpot: PositiveDuration | None = Field(None, description="Time per output token after the first.")


Weight = Annotated[int, Field(ge=1, le=100)]


class Canary(ApiModel):
    """Give a new revision a growing share of the requests before it takes over."""

    weights: list[Weight] = Field(
        min_length=1,
        max_length=16,
        description="Shares of the requests, in percent, one step after the other: [5, 25, 50].",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    interval: PositiveDuration = Field(PositiveDuration("5m"), description="How long each share is watched.")


class Rollout(ApiModel):
    """How a change reaches the groups of a pool."""

    max_surge: Share = Field(
        Share(0), description="Groups above the wanted number while rolling, or a percentage."
    )
    max_unavailable: Share = Field(
        Share(1), description="Groups that may be missing while rolling, or a percentage."
    )
    canary: Canary | None = None
    revision_history_limit: int = Field(5, ge=0, le=100, description="Old revisions kept for a rollback.")


LadderStep = Literal["quarantine", "retry", "scale-down", "replace-group", "cordon-node"]


class Recovery(ApiModel):
    """What happens when a rank dies."""

    restart_budget: int = Field(5, ge=0, le=1000, description="Restarts of a group within the window.")
    window: PositiveDuration = Field(
        PositiveDuration("10m"), description="Time over which restarts are counted."
    )
    ladder: list[LadderStep] = Field(
        default=["quarantine", "replace-group"],
        min_length=1,
        max_length=5,
        description="Steps taken one after the other until the group serves again.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
