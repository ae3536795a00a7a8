"""The resource itself."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from broadbeam_crds.conventions import API_GROUP, API_VERSION
from broadbeam_crds.v1alpha1.fields import ApiModel, list_map
from broadbeam_crds.v1alpha1.model import Engine, Model
from broadbeam_crds.v1alpha1.pool import Pool
from broadbeam_crds.v1alpha1.serving import KV, Gateway, Objectives, Recovery, Rollout
from broadbeam_crds.v1alpha1.status import ServingClusterStatus


class ServingClusterSpec(ApiModel):
    """What is wanted."""

    model: Model
    engine: Engine = Engine()
    pools: list[Pool] = Field(
        min_length=1,
        max_length=16,
        description="Groups of ranks, by name. At least one pool must decode.",
        json_schema_extra=list_map("name"),
    )
    kv: KV = KV()
    gateway: Gateway = Gateway()
    objectives: Objectives | None = None
    rollout: Rollout = Rollout()
    recovery: Recovery | None = None

    @property
    def disaggregated(self) -> bool:
        """Whether prompts are computed on other ranks than the answers."""
        return any(pool.role == "prefill" for pool in self.pools)

    def pool(self, name: str) -> Pool | None:
        return next((pool for pool in self.pools if pool.name == name), None)


class ObjectMeta(ApiModel):
    """Kubernetes' own part of the object; fields not named here are kept as they are."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=63)
    namespace: str | None = None
    uid: str | None = None
    generation: int | None = None
    resource_version: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    finalizers: list[str] = Field(default_factory=list)
    owner_references: list[dict[str, Any]] = Field(default_factory=list)
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


class ServingCluster(ApiModel):
    """Pools of engine ranks that serve one model, and the gateway in front of them."""

    api_version: Literal["serving.broadbeam.io/v1alpha1"] = Field(default="serving.broadbeam.io/v1alpha1")
    kind: Literal["ServingCluster"] = "ServingCluster"
    metadata: ObjectMeta
    spec: ServingClusterSpec = Field(description="What is wanted.")
    status: ServingClusterStatus | None = Field(
        None, description="What is there, as the operator last saw it."
    )


assert ServingCluster.model_fields["api_version"].default == f"{API_GROUP}/{API_VERSION}"
