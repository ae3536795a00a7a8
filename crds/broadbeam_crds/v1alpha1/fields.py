"""What every model of the API shares: camelCase on the wire, frozen, nothing unknown accepted."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"

DnsLabel = Annotated[str, StringConstraints(pattern=LABEL_PATTERN, min_length=1, max_length=63)]
ObjectName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", min_length=1, max_length=253),
]


class ApiModel(BaseModel):
    """One object of the API; its docstring is the description `kubectl explain` prints."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        frozen=True,
        extra="forbid",
        strict=True,
    )

    def wire(self) -> dict[str, Any]:
        """Plain JSON values under their wire names, unset optional fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def list_map(key: str) -> dict[str, Any]:
    """Schema extension: a list whose items are known by `key`, so that appliers own single items."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


class SecretReference(ApiModel):
    """A Secret in the cluster's own namespace."""

    name: ObjectName = Field(description="Name of the Secret.")
