"""What the operator reports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from broadbeam_crds.v1alpha1.fields import ApiModel, list_map

ConditionType = Literal[
    "Accepted", "Progressing", "Available", "Degraded", "GatewayReady", "KVTransferEffective"
]


class Condition(ApiModel):
    """One aspect of the cluster's state."""

    type: ConditionType = Field(
        description="Accepted: the manifest can be built. Progressing: something is being changed. "
        "Available: every pool has a ready group and the gateway answers. Degraded: a group or rank is "
        "missing. GatewayReady: a gateway replica is ready. KVTransferEffective: decode ranks really fetch "
        "what prefill ranks computed."
    )
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: str = Field(min_length=1, max_length=128, description="One CamelCase word, for programs.")
    message: str = Field("", max_length=32768, description="One sentence, for people.")
    last_transition_time: str = Field(
        max_length=64, description="When status last changed.", json_schema_extra={"format": "date-time"}
    )
    observed_generation: int | None = Field(None, ge=0, description="Generation of the spec this is about.")


class PoolStatus(ApiModel):
    """Groups and ranks of one pool."""

    name: str = Field(max_length=63, description="Name of the pool.")
    role: Literal["prefill", "decode", "both"] = Field(description="Role of the pool.")
    groups: int = Field(0, ge=0, description="Groups wanted.")
    ready_groups: int = Field(0, ge=0, description="Groups in which every rank can serve.")
    ranks: int = Field(0, ge=0, description="Ranks of all groups wanted.")
    ready_ranks: int = Field(0, ge=0, description="Ranks in ready groups.")
    updated_groups: int = Field(0, ge=0, description="Groups of the wanted revision.")
    revision: str = Field("", max_length=64, description="Revision the pool is to run.")


class Operation(ApiModel):
    """A step the operator has begun; kept so that a restarted operator does not repeat it."""

    id: str = Field(min_length=1, max_length=128, description="Unique name of the operation.")
    kind: str = Field(min_length=1, max_length=64, description="What is done: replace-group, ...")
    target: str = Field(max_length=253, description="Object it is done to.")
    phase: Literal["Running", "Succeeded", "Failed"] = Field("Running", description="How far it is.")
    message: str = Field("", max_length=4096, description="Why, or how it ended.")
    started_at: str = Field(
        max_length=64, description="When it began.", json_schema_extra={"format": "date-time"}
    )
    finished_at: str | None = Field(
        None, max_length=64, description="When it ended.", json_schema_extra={"format": "date-time"}
    )


class RevisionStatus(ApiModel):
    """A version of engine and gateway that belong together."""

    name: str = Field(min_length=1, max_length=64, description="Hash of what was rendered.")
    number: int = Field(ge=1, description="Counts up with each new revision.")
    created_at: str = Field(
        max_length=64, description="When it was first wanted.", json_schema_extra={"format": "date-time"}
    )
    active: bool = Field(False, description="Whether it is the wanted revision.")


class Summary(ApiModel):
    """What kubectl get prints."""

    prefill: str = Field("", max_length=32, description="Ready and wanted groups of prefill pools: 1/1.")
    decode: str = Field("", max_length=32, description="Ready and wanted groups of decode pools: 1/1.")
    state: str = Field("", max_length=64, description="Available, Progressing, Degraded, Refused, ...")


class ServingClusterStatus(ApiModel):
    """What is there, as the operator last saw it."""

    observed_generation: int | None = Field(None, ge=0, description="Generation of the spec that was seen.")
    url: str | None = Field(None, max_length=512, description="Where clients reach the gateway.")
    summary: Summary = Field(default_factory=Summary, description="What kubectl get prints.")
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Aspects of the cluster's state.",
        json_schema_extra=list_map("type"),
    )
    pools: list[PoolStatus] = Field(
        default_factory=list,
        max_length=64,
        description="Groups and ranks of each pool.",
        json_schema_extra=list_map("name"),
    )
    operations: list[Operation] = Field(
        default_factory=list,
        max_length=256,
        description="Steps begun and not long ended. Reserved for the fault ladder: not written yet.",
        json_schema_extra=list_map("id"),
    )
    revisions: list[RevisionStatus] = Field(
        default_factory=list,
        max_length=128,
        description="Revisions that are running or kept for a rollback. Reserved: not written yet; pools "
        "say which revision each is to run.",
        json_schema_extra=list_map("name"),
    )

    def condition(self, type_: ConditionType) -> Condition | None:
        return next((c for c in self.conditions if c.type == type_), None)
