"""A `Cluster` in memory: what an API server and its garbage collector do for the objects of one laptop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import uuid4

import msgspec

from broadbeam_operator.cluster import POD, ClusterError, Kind, Object, kind_of, timestamp

Key = tuple[str, str, str]  # plural, namespace, name
SECRET = Kind("v1", "Secret", "secrets")  # the operator itself never touches one
MAX_EVENTS = 500
CONFLICT, INVALID = 409, 422


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an object, as `kubectl get events` would show it."""

    at: datetime
    severity: Literal["Normal", "Warning"]
    regarding: str  # KIND/NAME
    reason: str
    message: str


@dataclass(slots=True)
class _Entry:
    obj: Object
    applied: Object = field(default_factory=dict)  # what our last apply said
    applied_status: Object = field(default_factory=dict)


class Store:
    """All writes are at once visible; readers get copies. For one event loop."""

    def __init__(self) -> None:
        self.version = 0  # counts changes; every object's resourceVersion is one of its values
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._entries: dict[Key, _Entry] = {}
        self._waiters: list[asyncio.Future[None]] = []

    # What the operator uses: `cluster.Cluster`.

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        entry = self._entries.get((kind.plural, namespace, name))
        return None if entry is None else _copy(entry.obj)

    async def list(
        self, kind: Kind, namespace: str | None, labels: Mapping[str, str] | None = None
    ) -> Sequence[Object]:
        return self.select(kind, namespace, labels)

    async def apply(self, obj: Object, new: bool = False) -> Object:
        """Merge `obj`; what our last apply had and this one lacks goes, lists are replaced whole."""
        wanted = _copy(obj)
        wanted.pop("status", None)
        key = _key(obj)
        entry = self._entries.get(key)
        if entry is None:
            return self._create(key, wanted, applied=wanted)
        if new:
            raise _exists(key)
        merged = merge(without(entry.obj, entry.applied, wanted), wanted)
        _refuse_immutable(entry.obj, merged)
        entry.applied = wanted
        return self._replace(key, merged)

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str | None = None) -> bool:
        entry = self._entries.get((kind.plural, namespace, name))
        if entry is None or (uid is not None and entry.obj["metadata"]["uid"] != uid):
            return False
        meta = entry.obj["metadata"]
        if kind == POD or meta.get("finalizers"):
            if "deletionTimestamp" not in meta:
                meta["deletionTimestamp"] = _now()
                self._touch(entry.obj)
            return True
        self.remove(entry.obj)
        return True

    async def apply_status(self, kind: Kind, namespace: str, name: str, status: Object) -> None:
        key = (kind.plural, namespace, name)
        if (entry := self._entries.get(key)) is None:
            return
        before = entry.obj.get("status") or {}
        merged = merge(without(before, entry.applied_status, status), _copy(status))
        entry.applied_status = _copy(status)
        self._replace(key, {**entry.obj, "status": merged})

    async def patch_pod_condition(self, namespace: str, name: str, condition: Mapping[str, str]) -> None:
        if entry := self._entries.get((POD.plural, namespace, name)):
            status = entry.obj.get("status") or {}
            self.set_status(entry.obj, {**status, "conditions": [dict(condition)]})

    async def emit_event(
        self, regarding: Object, severity: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        name = f"{regarding['kind']}/{regarding['metadata']['name']}"
        self.events.append(Event(datetime.now(UTC), severity, name, reason, message))
        self._wake()

    # What controllers and the node use beside it.

    def select(
        self, kind: Kind, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> Sequence[Object]:
        """Objects with all of `labels`, by name."""
        wanted = (labels or {}).items()
        found = [
            _copy(entry.obj)
            for (plural, within, _), entry in self._entries.items()
            if plural == kind.plural
            and namespace in (None, within)
            and wanted <= (entry.obj["metadata"].get("labels") or {}).items()
        ]
        return sorted(found, key=lambda obj: str(obj["metadata"]["name"]))

    def create(self, obj: Object) -> Object:
        """ClusterError 409 if there is one of that name."""
        key = _key(obj)
        if key in self._entries:
            raise _exists(key)
        return self._create(key, _copy(obj))

    def set_status(self, obj: Object, status: Object) -> None:
        """Replace the status of what is still there of `obj`; conditions of other types are kept."""
        key = _key(obj)
        entry = self._entries.get(key)
        if entry is None or entry.obj["metadata"]["uid"] != obj["metadata"]["uid"]:
            return
        before = (entry.obj.get("status") or {}).get("conditions") or []
        status = _copy(status)
        if before or "conditions" in status:
            status["conditions"] = merge_conditions(before, status.get("conditions") or [])
        self._replace(key, {**entry.obj, "status": status})

    def remove(self, obj: Object) -> None:
        """Take an object away for good, and with it everything that it alone owns."""
        key = _key(obj)
        entry = self._entries.get(key)
        if entry is None or entry.obj["metadata"]["uid"] != obj["metadata"]["uid"]:
            return
        del self._entries[key]
        self._wake()
        self._collect()

    async def changed(self, since: int, timeout_s: float | None = None) -> int:
        """The version, once it is above `since` or `timeout_s` have passed."""
        if self.version <= since:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            with suppress(TimeoutError):
                await asyncio.wait_for(waiter, timeout_s)
        return self.version

    def _create(self, key: Key, obj: Object, applied: Object | None = None) -> Object:
        meta = {**obj["metadata"], "uid": str(uuid4()), "creationTimestamp": _now(), "generation": 1}
        entry = self._entries[key] = _Entry({**obj, "metadata": meta}, _copy(applied or {}))
        self._touch(entry.obj)
        self._collect()  # its owner may be gone already
        return _copy(entry.obj)

    def _replace(self, key: Key, obj: Object) -> Object:
        entry = self._entries[key]
        if obj != entry.obj:
            meta = dict(obj["metadata"])
            if _content(obj) != _content(entry.obj):
                meta["generation"] = meta["generation"] + 1
            entry.obj = _copy({**obj, "metadata": meta})
            self._touch(entry.obj)
        return _copy(entry.obj)

    def _touch(self, obj: Object) -> None:
        self._wake()
        obj["metadata"]["resourceVersion"] = str(self.version)

    def _wake(self) -> None:
        self.version += 1
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _collect(self) -> None:
        """Delete what has owners of which none is left."""
        uids = {entry.obj["metadata"]["uid"] for entry in self._entries.values()}
        for entry in list(self._entries.values()):
            owners = entry.obj["metadata"].get("ownerReferences") or ()
            if not owners or any(owner["uid"] in uids for owner in owners):
                continue
            if not POD.of(entry.obj):
                self.remove(entry.obj)
            elif "deletionTimestamp" not in entry.obj["metadata"]:
                entry.obj["metadata"]["deletionTimestamp"] = _now()
                self._touch(entry.obj)


def _copy(obj: Mapping[str, Any]) -> Object:
    """Through JSON, as an API server makes one; in less than half the time of copy.deepcopy."""
    copied: Object = msgspec.json.decode(msgspec.json.encode(obj))
    return copied


def merge(into: Mapping[str, Any], patch: Mapping[str, Any]) -> Object:
    """`patch` over `into`, mappings member by member, everything else whole."""
    merged = dict(into)
    for key, value in patch.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def without(obj: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> Object:
    """`obj` less the fields that `before` had and `now` has not."""
    kept = dict(obj)
    for key, value in before.items():
        if key not in now:
            kept.pop(key, None)
        elif (
            isinstance(value, Mapping)
            and isinstance(now[key], Mapping)
            and isinstance(kept.get(key), Mapping)
        ):
            kept[key] = without(kept[key], value, now[key])
    return kept


def merge_conditions(before: Sequence[Object], now: Sequence[Object]) -> list[Object]:
    """Conditions by type: those of `now` win, others of `before` stay where they are."""
    new = {condition["type"]: condition for condition in now}
    kept = [new.pop(condition["type"], condition) for condition in before]
    return kept + list(new.values())


def _refuse_immutable(before: Object, after: Object) -> None:
    name = f"{before['kind']} {before['metadata']['name']!r}"
    if before.get("immutable") and _content(before) != _content(after):
        raise ClusterError(f"{name}: data is immutable", INVALID)
    if before["kind"] == "StatefulSet":
        for fixed in ("selector", "serviceName", "podManagementPolicy"):
            if before["spec"].get(fixed) != after["spec"].get(fixed):
                raise ClusterError(f"{name}: spec.{fixed} is immutable", INVALID)


def _exists(key: Key) -> ClusterError:
    return ClusterError(f"{key[0]} {key[2]!r} already exists", CONFLICT)


def _content(obj: Object) -> Object:
    return {key: value for key, value in obj.items() if key not in ("metadata", "status")}


def _key(obj: Object) -> Key:
    kind = SECRET if SECRET.of(obj) else kind_of(obj)
    return kind.plural, obj["metadata"]["namespace"], obj["metadata"]["name"]


def _now() -> str:
    return timestamp(datetime.now(UTC))
