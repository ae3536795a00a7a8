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
LISTS = (*MERGE_KEYS, "readinessGates")
# Of these an item has one source of its value: another one takes the place of the generated one.
ONE_SOURCE = ("env", "volumes")
MAPPINGS = ("metadata", "spec", "labels", "annotations", "nodeSelector", "affinity", "resources")
TEXTS = ("template.metadata.labels", "template.metadata.annotations")
# Without these there is no pod of ours.
NEEDED = ("template.metadata", "template.spec", "template.spec.containers", "template.spec.volumes")


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
        return _by_key(base, patch, field)
    return _without_nulls(patch)


def _by_key(base: list[Any], patch: list[Any], field: str) -> list[Any]:
    key = MERGE_KEYS[field]
    changes = {item[key]: item for item in patch}
    kept = [_item(item, changes.pop(item[key], {}), field) for item in base]
    return kept + [_without_nulls(item) for item in changes.values()]


def _item(base: Any, patch: Any, field: str) -> Any:
    if field in ONE_SOURCE and patch.keys() - base.keys():
        base = {key: value for key, value in base.items() if key in patch}
    return overlay(base, patch)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def problem(template: Any, path: str = "template") -> str | None:
    """Why `template` cannot be laid over a pod template: one line, or None."""
    for key, value in template.items():
        where, name = f"{path}.{key}", str(key)
        if found := _key_problem(path, name) or _value_problem(where, name, value):
            return found
        if isinstance(value, dict) and (found := problem(value, where)):
            return found
        if isinstance(value, list) and (found := _list_problem(value, where, MERGE_KEYS.get(name))):
            return found
    return None


def _key_problem(path: str, key: str) -> str | None:
    if path == "template" and key not in ("metadata", "spec"):
        return f"{path}.{key}: unknown field; a pod template has metadata and spec"
    if key.startswith("$"):
        return f"{path}.{key}: patch directives are not supported; set a field to null to remove it"
    return None


def _value_problem(where: str, key: str, value: Any) -> str | None:
    if value is None:
        return f"{where}: null would remove what every pod needs" if where in NEEDED else None
    if key in MAPPINGS and not isinstance(value, dict):
        return f"{where}: not a mapping"
    if key in LISTS and not isinstance(value, list):
        return f"{where}: not a list"
    if where.rpartition(".")[0] in TEXTS and not isinstance(value, str):
        return f"{where}: not text; put it in quotes"
    return None


def _list_problem(items: list[Any], path: str, key: str | None) -> str | None:
    seen = set()
    for index, item in enumerate(items):
        where = f"{path}[{index}]"
        if key is not None:
            found = item.get(key) if isinstance(item, dict) else None
            if not isinstance(found, str | int):
                return f"{where}: {key} is missing; it says which item is meant"
            if found in seen:
                return f"{where}: {key} {found} is given twice"
            seen.add(found)
        if isinstance(item, dict) and (wrong := problem(item, where)):
            return wrong
    return None
