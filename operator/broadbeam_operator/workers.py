"""One task a ServingCluster: woken by events and by a timer, never two passes of one cluster at once."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field

from broadbeam_operator.cluster import ClusterError
from broadbeam_operator.metrics import Metrics, Outcome
from broadbeam_operator.reconcile import Operator, reconcile

log = logging.getLogger(__name__)

MOST_DOUBLINGS = 32  # of the time between retries: beyond any limit, and within a float

Key = tuple[str, str]  # namespace, name


@dataclass(frozen=True, slots=True)
class Pace:
    """All in seconds."""

    resync_s: float = 30.0  # a pass without an event: what no watch shows, and lost events
    spacing_s: float = 0.1  # between two passes of one cluster; a burst of events makes one pass
    retry_s: float = 1.0  # after an error, doubling; with an event, this
    retry_limit_s: float = 60.0


@dataclass(slots=True)
class Workers:
    operator: Operator
    pace: Pace = field(default_factory=Pace)
    metrics: Metrics = field(default_factory=Metrics)
    states: dict[Key, str] = field(default_factory=dict)  # of each cluster at its last pass
    _tasks: dict[Key, asyncio.Task[None]] = field(default_factory=dict)
    _wakes: dict[Key, asyncio.Event] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """Clusters that were woken and have not had their pass."""
        return sum(wake.is_set() for wake in self._wakes.values())

    def wake(self, namespace: str, name: str) -> None:
        """Something about this cluster has changed; it may also have begun or ended."""
        key = (namespace, name)
        if key not in self._tasks:
            self._wakes[key] = asyncio.Event()
            self._tasks[key] = asyncio.create_task(self._run(key), name=f"{namespace}/{name}")
        self._wakes[key].set()

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, key: Key) -> None:
        """Until the cluster is gone and no new event has come meanwhile."""
        wake, failures = self._wakes[key], 0
        try:
            while True:
                wake.clear()
                outcome = await self._pass(key)
                if outcome == "gone" and not wake.is_set():
                    return
                failures = failures + 1 if outcome == "failed" else 0
                await self._rest(wake, failures)
        finally:
            del self._tasks[key], self._wakes[key]

    async def _rest(self, wake: asyncio.Event, failures: int) -> None:
        """Until the next pass is due; an event brings it forward, but never without a pause."""
        pause_s, due_s = self.pace.spacing_s, self.pace.resync_s
        if failures:
            doubled = 2.0 ** min(failures - 1, MOST_DOUBLINGS)
            pause_s, due_s = self.pace.retry_s, min(self.pace.retry_s * doubled, self.pace.retry_limit_s)
        await asyncio.sleep(pause_s)
        with suppress(TimeoutError):
            await asyncio.wait_for(wake.wait(), due_s - pause_s)

    async def _pass(self, key: Key) -> Outcome:
        begun = time.perf_counter()
        outcome = await self._outcome(key)
        self.metrics.passed(outcome, time.perf_counter() - begun)
        return outcome

    async def _outcome(self, key: Key) -> Outcome:
        """This is the outermost loop of the process: one cluster's fault must not stop the others."""
        try:
            done = await reconcile(self.operator, *key)
        except ClusterError as error:
            log.warning("%s/%s: %s", *key, error)
            return "failed"
        except Exception:
            log.exception("%s/%s: a fault in the operator; trying again later", *key)
            return "failed"
        if done is None:
            self.states.pop(key, None)
            return "gone"
        self.states[key] = done.status["summary"]["state"]
        if done.error is not None:
            log.warning("%s/%s: %s", *key, done.error)
            return "failed"
        if done.plan.changes:
            log.info(
                "%s/%s: applied %d, pruned %d, replaced %d pods",
                *key,
                len(done.plan.create) + len(done.plan.apply),
                len(done.plan.prune),
                len(done.plan.replace),
            )
        return "done"
