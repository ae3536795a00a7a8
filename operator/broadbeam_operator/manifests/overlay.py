"""Laying a pod template over a generated one, as `kubectl patch --type=strategic` would."""

from __future__ import annotations

from typing import Any

# Lists whose items are known by a key; every other list is replaced as a whole (Kubernetes' patchMergeKey).
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "schedulingGates": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}


def overlay(base: Any, patch: Any, field: str = "") -> Any:
    """`patch` over `base`: mappings merge, null removes, keyed lists merge by key, the rest is replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = {**base}
        for key, value in patch.items():
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = overlay(base.get(key), value, key)
        return merged
    if isinstance(base, list) and isinstance(patch, list) and field in MERGE_KEYS:
        return _by_key(base, patch, MERGE_KEYS[field])
    return _without_nulls(patch)


def _by_key(base: list[Any], patch: list[Any], key: str) -> list[Any]:
    changes = {item[key]: item for item in patch}
    kept = [overlay(item, changes.pop(item[key], {})) for item in base]
    return kept + [_without_nulls(item) for item in changes.values()]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def problem(template: Any, path: str = "template") -> str | None:
    """Why `template` cannot be laid over a pod template: one line, or None."""
    if not isinstance(template, dict):
        return f"{path}: not a mapping"
    for key in template:
        if path == "template" and key not in ("metadata", "spec"):
            return f"{path}.{key}: unknown field; a pod template has metadata and spec"
        if key.startswith("$"):
            return f"{path}.{key}: patch directives are not supported; set a field to null to remove it"
    for key, value in template.items():
        where = f"{path}.{key}"
        if isinstance(value, dict) and (found := problem(value, where)):
            return found
        if isinstance(value, list) and (found := _list_problem(value, where, MERGE_KEYS.get(key))):
            return found
    return None


def _list_problem(items: list[Any], path: str, key: str | None) -> str | None:
    for index, item in enumerate(items):
        where = f"{path}[{index}]"
        if key is not None and not (isinstance(item, dict) and key in item):
            return f"{where}: {key} is missing; it says which item is meant"
        if isinstance(item, dict) and (found := problem(item, where)):
            return found
    return None
