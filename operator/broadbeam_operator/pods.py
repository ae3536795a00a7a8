"""What a pod's status says, in the words the operator uses."""

from __future__ import annotations

from typing import Any

from broadbeam_crds.conventions import ANNOTATION_NODES, LABEL_REVISION
from broadbeam_operator.cluster import Object

# A container that waits for one of these will not start by itself soon.
_STUCK = {
    "CrashLoopBackOff",
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
}


def condition(pod: Object, kind: str) -> Object | None:
    conditions = pod.get("status", {}).get("conditions") or ()
    return next((each for each in conditions if each["type"] == kind), None)


def is_true(pod: Object, kind: str) -> bool:
    found = condition(pod, kind)
    return found is not None and found["status"] == "True"


def leaving(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def is_ready(pod: Object) -> bool:
    """Ready and not on its way out."""
    return is_true(pod, "Ready") and not leaving(pod)


def revision(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get(LABEL_REVISION, ""))


def fits(pod: Object, nodes: int) -> bool:
    """Whether the pod was made for a group of so many pods; one that does not say is taken to be."""
    said = (pod["metadata"].get("annotations") or {}).get(ANNOTATION_NODES)
    return said is None or said == str(nodes)


def trouble(pod: Object) -> str | None:
    """Why the pod is not merely starting, in a few words; None if nothing is known to be wrong."""
    status = pod.get("status", {})
    if status.get("phase") == "Failed":
        return str(status.get("reason") or "Failed")
    if (scheduled := condition(pod, "PodScheduled")) and scheduled.get("reason") == "Unschedulable":
        return f"Unschedulable: {scheduled.get('message', '')}".rstrip(": ")
    if is_true(pod, "Ready"):
        return None
    every = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    return next((found for each in every if (found := _container_trouble(each))), None)


def _container_trouble(container: Object) -> str | None:
    waiting = container.get("state", {}).get("waiting") or {}
    last = container.get("lastState", {}).get("terminated") or container.get("state", {}).get("terminated")
    if waiting.get("reason") in _STUCK:
        return _words(waiting["reason"], _exit(last) or waiting.get("message"))
    if last and last.get("exitCode") and not container.get("ready"):
        return _words("restarted" if container.get("restartCount") else "stopped", _exit(last))
    return None


def _exit(terminated: Any) -> str | None:
    if not terminated:
        return None
    said = (terminated.get("message") or "").strip().splitlines()
    return f"exit code {terminated.get('exitCode')}" + (f", {said[-1][:200]}" if said else "")


def _words(head: str, rest: str | None) -> str:
    return f"{head} ({rest})" if rest else head
