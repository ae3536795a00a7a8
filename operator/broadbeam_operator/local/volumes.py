"""The volumes of a pod as folders of this machine, and container paths rewritten to them.

Processes have no mount namespace, so a file that the manifest mounts at /etc/broadbeam/engine.json lies in
the pod's own folder. The rule: wherever `command`, `args`, `workingDir`, an exec probe or the value of an
environment variable holds a mount path as a whole path or as the start of one, that part is replaced by
the volume's folder; the longest mount path wins. "/etc/broadbeam" is replaced in "--config=/etc/broadbeam/x"
and in "/a:/etc/broadbeam", not in "/etc/broadbeam-keys" or "/opt/etc/broadbeam". A program that has such a
path written into it does not see the volume.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from broadbeam_operator.local.environment import (
    Manifest,
    PodConfigError,
    PodFacts,
    Sources,
    blobs,
    expand,
    look_up,
    resource,
)

TOKEN_DIR = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a path


@dataclass(frozen=True, slots=True)
class Mounts:
    """Container path -> path of this machine."""

    paths: Mapping[str, Path]

    def rewrite(self, text: str) -> str:
        """`text` with every mount path in it replaced; see the module for the rule."""
        if not self.paths:
            return text
        longest_first = sorted(self.paths, key=len, reverse=True)
        pattern = "|".join(re.escape(path) for path in longest_first)
        return re.sub(rf"(?<![\w./-])({pattern})(?![\w.-])", lambda match: str(self.paths[match[1]]), text)


async def materialise(pod: PodFacts, root: Path, sources: Sources, token: Path | None) -> dict[str, Path]:
    """Write every volume under `root`/NAME; volume name -> folder. Safe to repeat: emptyDirs are kept."""
    folders = {}
    for volume in pod.manifest["spec"].get("volumes") or ():
        folders[volume["name"]] = await _folder(volume, pod, root / volume["name"], sources, token)
    return folders


async def _folder(
    volume: Manifest, pod: PodFacts, folder: Path, sources: Sources, token: Path | None
) -> Path:
    if "hostPath" in volume:
        return _host_path(volume["hostPath"])
    if "emptyDir" in volume:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if "projected" in volume:
        parts = volume["projected"].get("sources") or ()
        written = {
            path: data for part in parts for path, data in (await _files(part, pod, sources, token)).items()
        }
    else:
        written = await _files(volume, pod, sources, token)
    _write(folder, written)
    return folder


def _host_path(volume: Manifest) -> Path:
    path, kind = Path(volume["path"]), volume.get("type") or ""
    if kind == "DirectoryOrCreate":
        path.mkdir(parents=True, exist_ok=True)
    elif kind == "Directory" and not path.is_dir():
        raise PodConfigError(f"hostPath {path}: no such folder")
    elif kind == "File" and not path.is_file():
        raise PodConfigError(f"hostPath {path}: no such file")
    return path


async def _files(source: Manifest, pod: PodFacts, sources: Sources, token: Path | None) -> dict[str, bytes]:
    """Relative path -> content of one volume source or one projection."""
    for field, kind in (("configMap", "configmap"), ("secret", "secret")):
        if (ref := source.get(field)) is not None:
            found = await look_up(sources, kind, pod.namespace, ref)
            return _chosen(blobs(found or {}), ref)
    if (ref := source.get("downwardAPI")) is not None:
        return {item["path"]: _downward(item, pod).encode() for item in ref.get("items") or ()}
    if (ref := source.get("serviceAccountToken")) is not None:
        if token is None:
            raise PodConfigError("serviceAccountToken volumes need an API server")
        return {ref["path"]: token.joinpath("token").read_bytes()}
    raise PodConfigError(f"volume {sorted(set(source) - {'name'})} is not supported by this node")


def _downward(item: Manifest, pod: PodFacts) -> str:
    if "fieldRef" in item:
        return pod.items(item["fieldRef"]["fieldPath"])
    ref = item["resourceFieldRef"]
    containers = {c["name"]: c for c in pod.manifest["spec"]["containers"]}
    return resource(containers[ref["containerName"]], ref)


def _chosen(values: Mapping[str, bytes], ref: Manifest) -> dict[str, bytes]:
    if not ref.get("items"):
        return dict(values)
    missing = [item["key"] for item in ref["items"] if item["key"] not in values]
    if missing and not ref.get("optional"):
        raise PodConfigError(f"references non-existent config key: {missing[0]}")
    return {item["path"]: values[item["key"]] for item in ref["items"] if item["key"] in values}


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make `folder` hold exactly `files`; each appears whole or not at all to a reader."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.rglob("*"):
        if old.is_file() and str(old.relative_to(folder)) not in files:
            old.unlink()
    for name, data in files.items():
        path = folder / name
        if path.is_file() and path.read_bytes() == data:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(data)
        partial.chmod(0o600)
        os.replace(partial, path)


def mounts(
    container: Manifest, folders: Mapping[str, Path], variables: Mapping[str, str], token: Path | None
) -> Mounts:
    """Where the mount paths of `container` lie on this machine."""
    paths: dict[str, Path] = {TOKEN_DIR: token} if token is not None else {}
    for mount in container.get("volumeMounts") or ():
        if mount["name"] not in folders:
            raise PodConfigError(f"volumeMount {mount['name']!r}: the pod has no such volume")
        sub_path = mount.get("subPath") or expand(mount.get("subPathExpr") or "", variables)
        folder = folders[mount["name"]] / sub_path
        if sub_path and not folder.exists():
            folder.mkdir(parents=True)
        paths[mount["mountPath"].rstrip("/")] = folder
    return Mounts(paths)
