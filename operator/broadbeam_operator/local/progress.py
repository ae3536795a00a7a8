"""How far a local cluster is: what pods' statuses, supervisors and metrics say, as one frozen snapshot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from broadbeam_crds.conventions import (
    LABEL_COMPONENT,
    LABEL_GROUP,
    LABEL_POOL,
    LABEL_ROLE,
    SUPERVISOR_PORT,
)
from broadbeam_operator import names
from broadbeam_operator.cluster import POD, SERVING_CLUSTER, Object
from broadbeam_operator.local.exposition import Sample, samples, total
from broadbeam_operator.local.store import Store
from broadbeam_operator.pods import is_ready, leaving

TIMEOUT = aiohttp.ClientTimeout(total=2)


@dataclass(frozen=True, slots=True)
class RankProgress:
    """`done` is 0..1 where known."""

    rank: int
    ready: bool
    stage: str
    done: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PodProgress:
    name: str
    component: str  # engine | gateway
    pool: str
    group: str
    role: str
    address: str
    ready: bool
    stage: str  # what it is doing, in few words
    restarts: int
    trouble: str | None  # why it is not running, when something is wrong
    last_exit: int | None = None  # exit code of the run before this one
    done: float | None = None
    detail: str = ""
    ranks: tuple[RankProgress, ...] = ()


@dataclass(frozen=True, slots=True)
class Throughput:
    """Counters of all ranks since they started."""

    generated_tokens: float = 0
    transferred_tokens: float = 0
    computed_tokens: float = 0
    transferred_bytes: float = 0
    running: float = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """One look at a cluster; `at_s` is time.monotonic()."""

    at_s: float
    state: str = ""
    available: bool = False
    refused: str | None = None
    pods: tuple[PodProgress, ...] = ()
    throughput: Throughput = field(default_factory=Throughput)


async def look_at(store: Store, http: aiohttp.ClientSession, namespace: str, name: str) -> Progress:
    """Ask everything there is, all at once; what does not answer is taken as starting."""
    cluster = await store.get(SERVING_CLUSTER, namespace, name)
    pods = store.select(POD)
    engines = [pod for pod in pods if _label(pod, LABEL_COMPONENT) == names.ENGINE]
    states, pages = await asyncio.gather(
        asyncio.gather(*(_state(http, pod) for pod in pods)),
        asyncio.gather(*(metrics(http, pod) for pod in engines)),
    )
    status = (cluster or {}).get("status") or {}
    return Progress(
        at_s=time.monotonic(),
        state=str((status.get("summary") or {}).get("state", "")),
        available=condition(status, "Available") == "True",
        refused=refusal(status),
        pods=tuple(pod_progress(pod, state) for pod, state in zip(pods, states, strict=True)),
        throughput=throughput([sample for page in pages for sample in page]),
    )


def condition(status: Object, kind: str) -> str:
    """The status of a condition, "" where it is not set."""
    found = [c["status"] for c in status.get("conditions") or () if c["type"] == kind]
    return str(found[0]) if found else ""


def refusal(status: Object) -> str | None:
    """Why the operator does not accept the manifest; None if it does."""
    for c in status.get("conditions") or ():
        if c["type"] == "Accepted" and c["status"] == "False":
            return str(c.get("message") or c.get("reason"))
    return None


async def _state(http: aiohttp.ClientSession, pod: Object) -> Object | None:
    """What the supervisor of an engine pod says of its start."""
    ip = (pod.get("status") or {}).get("podIP")
    if _label(pod, LABEL_COMPONENT) != names.ENGINE or not ip:
        return None
    try:
        async with http.get(f"http://{ip}:{SUPERVISOR_PORT}/readyz", timeout=TIMEOUT) as response:
            answer: Any = await response.json(content_type=None)
            return answer if isinstance(answer, dict) else None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None


async def metrics(http: aiohttp.ClientSession, pod: Object) -> list[Sample]:
    """All ranks' metrics of an engine pod; none where it does not answer."""
    ip = (pod.get("status") or {}).get("podIP")
    if not ip:
        return []
    try:
        async with http.get(f"http://{ip}:{SUPERVISOR_PORT}/metrics", timeout=TIMEOUT) as response:
            return samples(await response.text()) if response.status == 200 else []
    except (aiohttp.ClientError, OSError, TimeoutError):
        return []


def throughput(found: Sequence[Sample]) -> Throughput:
    by_source = "vllm:prompt_tokens_by_source_total"
    return Throughput(
        generated_tokens=total(found, "vllm:generation_tokens_total"),
        transferred_tokens=total(found, by_source, source="external_kv_transfer"),
        computed_tokens=total(found, by_source, source="local_compute"),
        transferred_bytes=total(found, "broadbeam:kv_transfer_bytes_total"),
        running=total(found, "vllm:num_requests_running"),
    )


def pod_progress(pod: Object, state: Object | None) -> PodProgress:
    """`state` is the supervisor's answer, None without one."""
    status = pod.get("status") or {}
    containers = status.get("containerStatuses") or ()
    ready, said = is_ready(pod), state or {}
    stage = str(said.get("stage") or "starting")
    if leaving(pod):
        stage = "stopping"
    elif _label(pod, LABEL_COMPONENT) == names.GATEWAY and any("running" in c["state"] for c in containers):
        stage = "waiting for engines"
    return PodProgress(
        name=str(pod["metadata"]["name"]),
        component=_label(pod, LABEL_COMPONENT),
        pool=_label(pod, LABEL_POOL),
        group=_label(pod, LABEL_GROUP),
        role=_label(pod, LABEL_ROLE),
        address=str(status.get("podIP", "")),
        ready=ready,
        stage="ready" if ready else "waiting for its group" if stage == "ready" else stage,
        restarts=sum(c["restartCount"] for c in containers),
        trouble=trouble(containers),
        last_exit=last_exit(containers),
        done=said.get("done"),
        detail=str(said.get("detail") or ""),
        ranks=tuple(_rank(rank) for rank in said.get("ranks") or ()),
    )


def _rank(state: Object) -> RankProgress:
    return RankProgress(
        rank=int(state["rank"]),
        ready=bool(state.get("ready")),
        stage="ready" if state.get("ready") else str(state.get("stage") or "starting"),
        done=state.get("done"),
        detail=str(state.get("detail") or ""),
    )


def trouble(containers: Sequence[Object]) -> str | None:
    """Why a container is not running, if that is not merely that it is starting."""
    for container in containers:
        waiting = container["state"].get("waiting") or {}
        if waiting.get("reason") == "CreateContainerConfigError":
            return str(waiting.get("message"))
        ended = container["state"].get("terminated") or (
            container["lastState"].get("terminated") if waiting.get("reason") == "CrashLoopBackOff" else None
        )
        if ended:
            return f"exited with code {ended['exitCode']}"
    return None


def last_exit(containers: Sequence[Object]) -> int | None:
    codes = [c["lastState"]["terminated"]["exitCode"] for c in containers if "terminated" in c["lastState"]]
    return codes[-1] if codes else None


def _label(pod: Object, key: str) -> str:
    return str(pod["metadata"]["labels"].get(key, ""))
