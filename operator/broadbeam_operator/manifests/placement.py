"""Which nodes a pool's pods may run on, and what they ask of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from broadbeam_crds.quantity import SUFFIXES, Quantity
from broadbeam_crds.v1alpha1 import Pool, Resources
from broadbeam_operator.cluster import Object

# Where each vendor's node labeller writes the product.
PRODUCT_LABELS = {"nvidia.com/gpu": "nvidia.com/gpu.product", "amd.com/gpu": "amd.com/gpu.product-name"}


def placement(pool: Pool, selector: Mapping[str, str]) -> Object:
    """nodeSelector, affinity and tolerations; only those that the pool needs."""
    device = pool.accelerator
    fields: Object = {}
    if device.product is not None:
        label = PRODUCT_LABELS.get(device.resource, f"{device.resource}.product")
        fields["nodeSelector"] = {label: device.product}
    if device.topology_key is not None:
        term = {"topologyKey": device.topology_key, "labelSelector": {"matchLabels": dict(selector)}}
        fields["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    if device.resource != "cpu":
        # Clusters keep other work off their GPU nodes by a taint of the resource's name.
        fields["tolerations"] = [{"key": device.resource, "operator": "Exists"}]
    return fields


def resources(pool: Pool) -> Object:
    """Devices and memory are limits too; CPU is not, for a throttled engine stalls its whole group."""
    asked, device = pool.resources or Resources(), pool.accelerator
    devices = {} if device.resource == "cpu" else {device.resource: str(device.per_node)}
    cpu = {"cpu": _whole(asked.cpu, "m")} if asked.cpu else {}
    limits = ({"memory": _whole(asked.memory, "")} if asked.memory else {}) | devices
    requests = cpu | limits
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _whole(quantity: Quantity, suffix: str) -> str:
    """A part of a byte or of a thousandth of a core counts as one: the API server would write it so, and then
    no two looks at the object would agree."""
    parts = quantity.amount / SUFFIXES[suffix]
    return str(quantity) if parts == int(parts) else f"{math.ceil(parts)}{suffix}"
