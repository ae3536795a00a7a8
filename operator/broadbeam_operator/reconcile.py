"""One pass over one ServingCluster: see, decide, do, report. Nothing is remembered between passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from broadbeam_crds.gateway_config import FileEndpoints
from broadbeam_operator.accept import Refused, accept
from broadbeam_operator.apply import apply
from broadbeam_operator.cluster import SERVING_CLUSTER, Cluster, ClusterError, Object
from broadbeam_operator.images import Images
from broadbeam_operator.kv_effect import KVWatch
from broadbeam_operator.observe import Observed, observe
from broadbeam_operator.plan import Plan, idle_plan, plan
from broadbeam_operator.status import not_applied, refused, status
from broadbeam_operator.transitions import transitions


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Operator:
    """What a pass needs of the world."""

    cluster: Cluster
    kv: KVWatch
    images: Images = field(default_factory=Images)
    endpoints: FileEndpoints | None = None  # where gateways find ranks without Kubernetes
    now: Callable[[], datetime] = utc_now


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass has done, for logs, tests and benchmarks."""

    plan: Plan
    status: Object
    error: str | None = None  # the cluster stood in the way; the next pass tries again


async def reconcile(operator: Operator, namespace: str, name: str) -> Pass | None:
    """None where there is nothing to do: no such ServingCluster, or it is on its way out."""
    seen = await observe(operator.cluster, namespace, name)
    if seen is None:
        operator.kv.forget(namespace, name)
        return None
    wanted = accept(seen.resource)
    if isinstance(wanted, Refused):
        report = refused(seen, "Refused", wanted.messages, operator.now())
        return await _carry_out(operator, seen, idle_plan(seen), report)  # what runs keeps running
    steps = plan(seen, wanted, operator.images, operator.endpoints)
    effect = await operator.kv.look(seen, wanted.spec.engine.name) if wanted.spec.disaggregated else None
    report = status(seen, wanted, steps, operator.images, effect, operator.now())
    return await _carry_out(operator, seen, steps, report)


async def _carry_out(operator: Operator, seen: Observed, steps: Plan, report: Object) -> Pass:
    error = await _try(operator, steps)
    if error is not None:
        report = not_applied(report, seen, error, operator.now())
    await tell(operator.cluster, seen, report)
    return Pass(steps, report, None if error is None else str(error))


async def _try(operator: Operator, steps: Plan) -> ClusterError | None:
    try:
        await apply(operator.cluster, steps, operator.now())
    except ClusterError as error:
        return error
    return None


async def tell(cluster: Cluster, seen: Observed, report: Object) -> None:
    """Write the status if it differs from what is stored, and Events for what has changed."""
    if same_status(report, seen.status):
        return
    await cluster.apply_status(SERVING_CLUSTER, seen.namespace, seen.name, report)
    for told in transitions(seen.status, report):
        await cluster.emit_event(seen.resource, *told)


def same_status(report: Object, stored: Object) -> bool:
    """Keyed lists are compared by key: merging, the API server may have put their items in another order."""
    return _keyed(report) == _keyed(stored)


def _keyed(status: Object) -> Object:
    keys = {"conditions": "type", "pools": "name"}
    return {
        name: {item[keys[name]]: item for item in value} if name in keys else value
        for name, value in status.items()
    }
