"""The environment and command line of a container, as Kubernetes builds them from a pod's manifest."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from broadbeam_crds.quantity import SUFFIXES

Manifest = Mapping[str, Any]
Lookup = Callable[[str, str], Awaitable[Manifest | None]]  # (namespace, name) -> the object, None: no such

_REFERENCE = re.compile(r"\$(\$|\(([-._a-zA-Z][-._a-zA-Z0-9]*)\))")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


class PodConfigError(Exception):
    """A container cannot be made from its manifest: what Kubernetes calls CreateContainerConfigError."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where ConfigMaps and Secrets come from."""

    config_map: Lookup
    secret: Lookup


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What the downward API may ask about a pod."""

    manifest: Manifest
    ip: str
    node_name: str

    @property
    def namespace(self) -> str:
        return str(self.manifest["metadata"].get("namespace", "default"))

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    def field(self, path: str) -> str:
        """The value of `fieldRef.fieldPath`; PodConfigError for a path Kubernetes has no value for."""
        metadata, spec = self.manifest["metadata"], self.manifest["spec"]
        known = {
            "metadata.name": self.name,
            "metadata.namespace": self.namespace,
            "metadata.uid": metadata.get("uid", ""),
            "spec.nodeName": self.node_name,
            "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
            "status.podIP": self.ip,
            "status.podIPs": self.ip,
            "status.hostIP": self.ip,
            "status.hostIPs": self.ip,
        }
        if path in known:
            return str(known[path])
        if match := _SUBSCRIPT.fullmatch(path):
            return str((metadata.get(match[1]) or {}).get(match[2], ""))
        raise PodConfigError(f"fieldRef {path!r} is not a field of a pod")

    def items(self, path: str) -> str:
        """Like `field`; whole labels or annotations are given as a downward API volume writes them."""
        if path in ("metadata.labels", "metadata.annotations"):
            values = self.manifest["metadata"].get(path.partition(".")[2]) or {}
            return "\n".join(f'{key}="{value}"' for key, value in sorted(values.items()))
        return self.field(path)


def quantity(text: str | int | float) -> Decimal:
    """A Kubernetes quantity ("500m", "64Gi") as a number; PodConfigError when it is none."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([a-zA-Z]*)", str(text))
    if match is None or match[2] not in SUFFIXES:
        raise PodConfigError(f"{text!r} is not a quantity")
    return Decimal(match[1]) * SUFFIXES[match[2]]


def resource(container: Manifest, ref: Manifest) -> str:
    """The value of `resourceFieldRef`: a limit or request over its divisor, rounded up."""
    kind, _, name = str(ref["resource"]).partition(".")
    resources = container.get("resources") or {}
    value = (resources.get(kind) or {}).get(name)
    if value is None:
        raise PodConfigError(f"resourceFieldRef {ref['resource']!r}: the container sets no such resource")
    return str(math.ceil(quantity(value) / quantity(ref.get("divisor") or "1")))


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` replaced where NAME is known, `$$` by `$`; the rest stays as it is."""
    return _REFERENCE.sub(lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]), text)


def texts(manifest: Manifest) -> dict[str, str]:
    """The values of a ConfigMap or Secret as text."""
    return {key: value.decode(errors="replace") for key, value in blobs(manifest).items()}


def blobs(manifest: Manifest) -> dict[str, bytes]:
    """The values of a ConfigMap or Secret as bytes; base64 where the kind says so."""
    is_secret = manifest.get("kind") == "Secret" or "type" in manifest
    plain = manifest.get("stringData" if is_secret else "data") or {}
    encoded = manifest.get("data" if is_secret else "binaryData") or {}
    decoded = {key: base64.b64decode(value) for key, value in encoded.items()}
    return decoded | {key: str(value).encode() for key, value in plain.items()}


async def look_up(sources: Sources, kind: str, namespace: str, ref: Manifest) -> Manifest | None:
    """The ConfigMap or Secret that `ref` names; None if absent and optional, PodConfigError if absent."""
    name = str(ref.get("name") or ref.get("secretName") or "")
    found = await (sources.secret if kind == "secret" else sources.config_map)(namespace, name)
    if found is None and not ref.get("optional"):
        raise PodConfigError(f'{kind} "{name}" not found')
    # The kind may be missing from list items; `blobs` needs it to know what is base64.
    return None if found is None else {**found, "kind": "Secret" if kind == "secret" else "ConfigMap"}


async def _value_from(container: Manifest, entry: Manifest, pod: PodFacts, sources: Sources) -> str | None:
    for field, kind in (("configMapKeyRef", "configmap"), ("secretKeyRef", "secret")):
        if ref := entry.get(field):
            found = await look_up(sources, kind, pod.namespace, ref)
            value = None if found is None else texts(found).get(ref["key"])
            if value is None and not ref.get("optional"):
                raise PodConfigError(
                    f"couldn't find key {ref['key']} in {kind} {pod.namespace}/{ref['name']}"
                )
            return value
    if ref := entry.get("fieldRef"):
        return pod.field(ref["fieldPath"])
    if ref := entry.get("resourceFieldRef"):
        return resource(container, ref)
    raise PodConfigError(f"env valueFrom {sorted(entry)} is not supported by this node")


async def environment(container: Manifest, pod: PodFacts, sources: Sources) -> dict[str, str]:
    """`envFrom`, then `env` in order, each value expanded with those before it."""
    variables: dict[str, str] = {}
    for entry in container.get("envFrom") or ():
        kind, ref = (
            ("secret", entry["secretRef"]) if "secretRef" in entry else ("configmap", entry["configMapRef"])
        )
        found = await look_up(sources, kind, pod.namespace, ref)
        for key, value in texts(found or {}).items():
            variables[str(entry.get("prefix") or "") + key] = value
    for entry in container.get("env") or ():
        if source := entry.get("valueFrom"):
            found_value = await _value_from(container, source, pod, sources)
            if found_value is not None:
                variables[entry["name"]] = found_value
        else:
            variables[entry["name"]] = expand(str(entry.get("value") or ""), variables)
    return variables
