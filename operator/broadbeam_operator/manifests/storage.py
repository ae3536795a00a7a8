"""Volumes of an engine pod: the model where it is one, and the places that may be written."""

from __future__ import annotations

from typing import NamedTuple

from broadbeam_operator.cluster import Object

CACHE_DIR = "/var/cache/broadbeam"
MODEL_DIR = "/models"


class Mounted(NamedTuple):
    volume: Object
    mount: Object


SCRATCH = (
    # Replaced by a claim through the pool's template where models shall outlive pods.
    Mounted({"name": "cache", "emptyDir": {}}, {"name": "cache", "mountPath": CACHE_DIR}),
    Mounted({"name": "tmp", "emptyDir": {}}, {"name": "tmp", "mountPath": "/tmp"}),  # noqa: S108
    # Collectives and KV transfer between ranks of a pod; a container gets 64 MiB otherwise.
    Mounted({"name": "shm", "emptyDir": {"medium": "Memory"}}, {"name": "shm", "mountPath": "/dev/shm"}),  # noqa: S108
)


def model_volume(source: str) -> Mounted | None:
    """The volume that holds the weights, for the sources that are one."""
    scheme, _, rest = source.partition("://")
    mount = {"name": "model", "mountPath": MODEL_DIR, "readOnly": True}
    match scheme:
        case "pvc":
            claim = rest.partition("/")[0]
            volume = {"persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        case "oci":
            volume = {"image": {"reference": rest, "pullPolicy": "IfNotPresent"}}
        case _:
            return None
    return Mounted({"name": "model", **volume}, mount)


def source_in_pod(source: str) -> str:
    """The source as the engine sees it: what is mounted has become a path."""
    scheme, _, rest = source.partition("://")
    match scheme:
        case "pvc":
            path = rest.partition("/")[2].strip("/")
            return f"file://{MODEL_DIR}/{path}" if path else f"file://{MODEL_DIR}"
        case "oci":
            return f"file://{MODEL_DIR}"
        case _:
            return source


def mounted(source: str) -> list[Mounted]:
    model = model_volume(source)
    return [*SCRATCH, *([model] if model else [])]
