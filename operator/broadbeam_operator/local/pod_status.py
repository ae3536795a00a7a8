"""The status of a pod as Kubernetes reports it, from the state of its containers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from broadbeam_operator.cluster import timestamp
from broadbeam_operator.local.container import Container, Running, State, Terminated, Waiting
from broadbeam_operator.local.environment import Manifest


def state_status(state: State | None) -> dict[str, Any]:
    match state:
        case None:
            return {}
        case Waiting(reason, message):
            return {"waiting": {"reason": reason} | ({"message": message} if message else {})}
        case Running(started_at):
            return {"running": {"startedAt": timestamp(started_at)}}
        case Terminated(code, started_at, finished_at, reason, message):
            ended = {"exitCode": code, "reason": reason, "startedAt": timestamp(started_at)}
            ended["finishedAt"] = timestamp(finished_at)
            return {"terminated": ended | ({"message": message} if message else {})}


def container_status(container: Container, init: bool) -> dict[str, Any]:
    done = init and isinstance(container.state, Terminated) and container.state.exit_code == 0
    return {
        "name": container.name,
        "image": str(container.spec.get("image", "")),
        "imageID": "",
        "containerID": f"process://{container.id}" if container.id else "",
        "ready": container.ready or done,
        "started": container.started,
        "restartCount": container.restarts,
        "state": state_status(container.state),
        "lastState": state_status(container.last),
    }


def phase(containers: Sequence[Container], initialized: bool) -> str:
    """Pending, Running, Succeeded or Failed by the rules of the kubelet."""
    if not initialized:
        return "Pending"
    if all(c.over for c in containers):
        codes = [c.state.exit_code for c in containers if isinstance(c.state, Terminated)]
        return "Failed" if any(codes) else "Succeeded"
    if any(isinstance(c.state, Waiting) and c.last is None for c in containers):
        return "Pending"
    return "Running"


def conditions(
    spec: Manifest,
    containers: Sequence[Container],
    initialized: bool,
    gates: Mapping[str, bool],
    before: Sequence[Manifest],
    now: datetime,
) -> list[dict[str, Any]]:
    """The node's own conditions; a transition time stays while the condition's status stays.

    `gates`: readiness gate -> whether whoever owns it has set it True.
    """
    unready = [c.name for c in containers if not c.ready]
    closed = [
        g["conditionType"] for g in spec.get("readinessGates") or () if not gates.get(g["conditionType"])
    ]
    not_ready = ("ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]")
    gated = ("ReadinessGatesNotReady", f"waiting for {', '.join(closed)}")
    found = {
        "PodScheduled": None,
        "Initialized": None
        if initialized
        else ("ContainersNotInitialized", "init containers have not ended"),
        "ContainersReady": not_ready if unready else None,
        "Ready": not_ready if unready else gated if closed else None,
    }
    old = {condition["type"]: condition for condition in before}
    return [_condition(kind, why, old.get(kind), now) for kind, why in found.items()]


def _condition(kind: str, why: tuple[str, str] | None, old: Manifest | None, now: datetime) -> dict[str, Any]:
    status = "True" if why is None else "False"
    same = old is not None and old["status"] == status
    since = str(old["lastTransitionTime"]) if same and old is not None else timestamp(now)
    condition = {"type": kind, "status": status, "lastTransitionTime": since}
    return condition if why is None else condition | {"reason": why[0], "message": why[1]}
