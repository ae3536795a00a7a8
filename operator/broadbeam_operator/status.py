"""What the operator reports: conditions with reasons, counts of groups and ranks, columns. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from broadbeam_crds.v1alpha1 import (
    Condition,
    ConditionType,
    Pool,
    PoolStatus,
    ServingCluster,
    ServingClusterStatus,
    Summary,
)
from broadbeam_operator import names, pods
from broadbeam_operator.cluster import DEPLOYMENT, ClusterError, NameTakenError, Object, timestamp
from broadbeam_operator.groups import Group, gateway_pods, groups
from broadbeam_operator.images import Images
from broadbeam_operator.kv_effect import Verdict
from broadbeam_operator.manifests import pool_revision
from broadbeam_operator.manifests.objects import namespace_of
from broadbeam_operator.observe import Observed
from broadbeam_operator.plan import Plan

State = Literal["Available", "Progressing", "Degraded", "Unavailable", "Refused"]  # what kubectl get shows

MAX_MESSAGE = 1024
MOST_REFUSALS = 16  # of a spec, each a line: who mends these sees the rest
SHOWN = 3  # problems in one message; the rest is a number


@dataclass(frozen=True, slots=True)
class Finding:
    """A condition before it is known since when it holds."""

    type: ConditionType
    status: bool | None
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class PoolView:
    """A wanted pool and the groups of it that exist."""

    pool: Pool
    groups: Sequence[Group]
    revision: str

    @property
    def ready(self) -> int:
        return sum(group.ready for group in self.groups)

    @property
    def updated(self) -> int:
        return sum(
            len(group.pods) == group.nodes and not group.outdated and group.revision == self.revision
            for group in self.groups
        )

    @property
    def unfinished(self) -> list[str]:
        """What each group that is not ready at the wanted revision waits for."""
        known = {group.index: group for group in self.groups}
        return [
            words
            for index in range(self.pool.groups)
            if (words := _waits(self.pool, index, known.get(index), self.revision))
        ]


def status(
    seen: Observed, wanted: ServingCluster, plan: Plan, images: Images, kv: Verdict | None, now: datetime
) -> Object:
    """The whole status of a cluster whose spec was accepted."""
    views = pool_views(seen, wanted, images)
    findings = [
        Finding("Accepted", True, "Valid", "the manifest can be built"),
        _gateway(seen, wanted),
        *_kv_transfer(seen, wanted, kv),
    ]
    gateway_ready = findings[1].status is True
    findings += [
        _available(views, gateway_ready),
        _progressing(views, plan, gateway_ready, wanted),
        _degraded(seen, views),
    ]
    return ServingClusterStatus(
        observed_generation=seen.resource["metadata"].get("generation"),
        url=url(wanted),
        summary=_summary(views, findings),
        conditions=_dated(findings, seen, now),
        pools=[_pool_status(view) for view in views],
    ).wire()


def refused(seen: Observed, reason: str, messages: Sequence[str], now: datetime) -> Object:
    """The status of a cluster whose spec cannot be built: as before, but for one condition."""
    kept = {key: value for key, value in seen.status.items() if key != "conditions"}
    finding = Finding("Accepted", False, reason, _listed(messages, "; ", shown=MOST_REFUSALS))
    others = [each for each in seen.status.get("conditions") or () if each["type"] != "Accepted"]
    return {
        **kept,
        "observedGeneration": seen.resource["metadata"].get("generation"),
        "summary": {**(kept.get("summary") or {}), "state": "Refused"},
        "conditions": [*(each.wire() for each in _dated([finding], seen, now)), *others],
    }


def not_applied(report: Object, seen: Observed, error: ClusterError, now: datetime) -> Object:
    """`report` with the reason why the cluster did not take what we sent."""
    reason = "NameTaken" if isinstance(error, NameTakenError) else "ApplyFailed"
    finding = Finding("Progressing", True, reason, str(error)[:MAX_MESSAGE])
    dated = _dated([finding], seen, now)[0].wire()
    conditions = [dated if each["type"] == "Progressing" else each for each in report["conditions"]]
    return {**report, "conditions": conditions}


def url(wanted: ServingCluster) -> str:
    host = f"{names.gateway_name(wanted.metadata.name)}.{namespace_of(wanted)}.svc"
    return f"http://{host}:{wanted.spec.gateway.listeners[0].port}"


def pool_views(seen: Observed, wanted: ServingCluster, images: Images) -> list[PoolView]:
    found = groups(seen)
    return [
        PoolView(
            pool,
            [group for group in found if group.pool == pool.name and group.index < pool.groups],
            pool_revision(wanted, pool, images),
        )
        for pool in wanted.spec.pools
    ]


def _waits(pool: Pool, index: int, group: Group | None, revision: str) -> str | None:
    name = f"{pool.name}-{index}"
    if group is None:
        return f"{name}: not created yet"
    if group.trouble:
        return group.trouble
    if group.revision != revision or group.outdated:
        return f"{name}: runs revision {_old_revision(group)}, {revision} is wanted"
    if not group.complete:
        return f"{name}: {group.ready_nodes} of {group.nodes} pods ready"
    return None if group.ready else f"{name}: about to be routable"


def _old_revision(group: Group) -> str:
    return next((pods.revision(pod) for pod in group.pods), group.revision) or "unknown"


def _gateway(seen: Observed, wanted: ServingCluster) -> Finding:
    replicas = wanted.spec.gateway.replicas
    live = seen.children.get((DEPLOYMENT, names.gateway_name(wanted.metadata.name)), {})
    ready = (live.get("status") or {}).get("readyReplicas", 0)
    if replicas == 0:
        return Finding("GatewayReady", False, "ScaledToZero", "spec.gateway.replicas is 0")
    if ready == 0:
        wrong = _gateway_trouble(seen)
        return Finding("GatewayReady", False, "NoReplicaReady", wrong or f"0 of {replicas} replicas ready")
    return Finding("GatewayReady", True, "Ready", f"{min(ready, replicas)} of {replicas} replicas ready")


def _gateway_trouble(seen: Observed) -> str | None:
    for pod in gateway_pods(seen):
        if found := pods.trouble(pod):
            return f"{pod['metadata']['name']}: {found}"
    return None


def _kv_transfer(seen: Observed, wanted: ServingCluster, kv: Verdict | None) -> list[Finding]:
    if not wanted.spec.disaggregated:
        return []
    match kv:
        case "effective":
            text = "decode ranks fetch the keys and values that prefill ranks computed"
            return [Finding("KVTransferEffective", True, "Transferred", text)]
        case "recomputed":
            text = "decode ranks compute most prompt tokens themselves instead of fetching them"
            return [Finding("KVTransferEffective", False, "Recomputed", text)]
        case None:
            return [_as_before(seen)]


def _as_before(seen: Observed) -> Finding:
    """Without new traffic, what was last known still holds."""
    for each in seen.status.get("conditions") or ():
        if each["type"] == "KVTransferEffective" and each["status"] != "Unknown":
            return Finding("KVTransferEffective", each["status"] == "True", each["reason"], each["message"])
    return Finding("KVTransferEffective", None, "NoTraffic", "no request has shown it yet")


def _available(views: Sequence[PoolView], gateway_ready: bool) -> Finding:
    if not any(view.pool.decodes and view.pool.groups for view in views):
        return Finding("Available", False, "ScaledToZero", "no pool that decodes has a group")
    empty = [view.pool.name for view in views if view.pool.groups and not view.ready]
    if empty:
        return Finding("Available", False, "NoReadyGroup", f"no ready group in {_listed(empty)}")
    if not gateway_ready:
        return Finding("Available", False, "GatewayNotReady", "no gateway replica is ready")
    return Finding("Available", True, "Ready", "every pool has a ready group and the gateway answers")


def _progressing(
    views: Sequence[PoolView], plan: Plan, gateway_ready: bool, wanted: ServingCluster
) -> Finding:
    if plan.replacing:
        return Finding("Progressing", True, "ReplacingGroups", f"starting anew: {_listed(plan.replacing)}")
    if plan.changes:
        return Finding("Progressing", True, "Applying", f"{plan.changes} objects to bring up to date")
    waiting = [words for view in views for words in view.unfinished]
    if waiting:
        return Finding("Progressing", True, "WaitingForGroups", _listed(waiting, "; "))
    if not gateway_ready and wanted.spec.gateway.replicas:
        return Finding("Progressing", True, "WaitingForGateway", "no gateway replica is ready")
    return Finding("Progressing", False, "Complete", "all groups run the wanted revision")


def _degraded(seen: Observed, views: Sequence[PoolView]) -> Finding:
    wrong = [group.trouble for view in views for group in view.groups if group.trouble]
    if found := _gateway_trouble(seen):
        wrong.append(found)
    if wrong:
        return Finding("Degraded", True, "PodsFailing", _listed(wrong, "; "))
    return Finding("Degraded", False, "Healthy", "no pod is known to fail")


def _listed(words: Sequence[str], separator: str = ", ", shown: int = SHOWN) -> str:
    rest = len(words) - shown
    text = separator.join(word[:MAX_MESSAGE] for word in words[:shown])
    return text + (f" and {rest} more" if rest > 0 else "")


def _summary(views: Sequence[PoolView], findings: Sequence[Finding]) -> Summary:
    return Summary(
        prefill=_ratio([view for view in views if view.pool.role == "prefill"]),
        decode=_ratio([view for view in views if view.pool.decodes]),
        state=_state({finding.type: finding.status for finding in findings}),
    )


def _ratio(views: Sequence[PoolView]) -> str:
    if not views:
        return "-"
    return f"{sum(view.ready for view in views)}/{sum(view.pool.groups for view in views)}"


def _state(found: dict[ConditionType, bool | None]) -> State:
    if found["Degraded"]:
        return "Degraded"
    if found["Progressing"]:
        return "Progressing"
    return "Available" if found["Available"] else "Unavailable"


def _pool_status(view: PoolView) -> PoolStatus:
    pool = view.pool
    per_group = pool.parallelism.data * pool.parallelism.tensor
    return PoolStatus(
        name=pool.name,
        role=pool.role,
        groups=pool.groups,
        ready_groups=view.ready,
        ranks=pool.groups * per_group,
        ready_ranks=view.ready * per_group,
        updated_groups=view.updated,
        revision=view.revision,
    )


def _dated(findings: Sequence[Finding], seen: Observed, now: datetime) -> list[Condition]:
    """A condition that keeps its status keeps its time."""
    before = {each["type"]: each for each in seen.status.get("conditions") or ()}
    generation = seen.resource["metadata"].get("generation")
    dated = []
    for finding in findings:
        word = "Unknown" if finding.status is None else str(finding.status)
        old = before.get(finding.type)
        since = old["lastTransitionTime"] if old and old["status"] == word else timestamp(now)
        dated.append(
            Condition(
                type=finding.type,
                status=word,  # type: ignore[arg-type]
                reason=finding.reason,
                message=finding.message,
                last_transition_time=since,
                observed_generation=generation,
            )
        )
    return dated
