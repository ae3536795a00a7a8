"""Pods as local processes: what a kubelet does, without containers.

A pod has an address of its own, so its ports stay what they are in a cluster; files of ConfigMaps and the
like lie in the pod's folder (the rule for paths is in `volumes.py`). Images, security contexts, resource
limits and namespaces of any kind are not applied: the programs are those of this machine. A command
without a slash is looked for beside the running Python first, so `broadbeam-runtime` is this installation's.

    async with open_runner(node) as runner:
        pod = runner.start(manifest, ip="127.77.1.2", changed=print)
        …
        await pod.stop()
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from broadbeam_operator.cluster import timestamp
from broadbeam_operator.local import pod_status, volumes
from broadbeam_operator.local.container import Backoff, Container, Launch, Machine, Terminated, last_words
from broadbeam_operator.local.environment import (
    Manifest,
    PodConfigError,
    PodFacts,
    Sources,
    environment,
    expand,
)
from broadbeam_operator.local.probes import check_probes
from broadbeam_operator.local.process import Guard

DEFAULT_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class Node:
    """Where pods run: the same for all pods of a runner.

    `inherited` is the environment under every container's own, `imposed` the one over it (what only this
    node knows, such as a hosts file). `bin_dir` is searched before PATH for commands without a slash.
    """

    name: str
    root: Path  # pods live in root/NAMESPACE/NAME.UID
    sources: Sources
    bin_dir: Path
    inherited: Mapping[str, str] = field(default_factory=dict)
    imposed: Mapping[str, str] = field(default_factory=dict)
    backoff: Backoff = field(default_factory=Backoff)


class PodProcess:
    """One pod: init containers in turn, then its containers. Made by `PodRunner.start`."""

    def __init__(
        self,
        node: Node,
        machine: Machine,
        manifest: Manifest,
        ip: str,
        token: Path | None,
        imposed: Mapping[str, str],
        changed: Callable[[PodProcess], None],
    ) -> None:
        self.node = node
        self.facts = PodFacts(manifest, ip, node.name)
        self.root = node.root / self.facts.namespace / f"{self.facts.name}.{self._uid(manifest)}"
        self.initialized = False
        self._token = token
        self._imposed = {**node.imposed, **imposed}
        self._changed = changed
        self._stopping = False
        self._gates: dict[str, bool] = {}
        self._conditions: list[dict[str, Any]] = []
        self._started_at = datetime.now(UTC)
        self._sidecars: list[asyncio.Task[None]] = []
        policy = str(self.spec.get("restartPolicy") or "Always")

        def containers(key: str, policy: str) -> list[Container]:
            return [
                Container(
                    c,
                    self._policy(c, policy),
                    self.root / "logs" / c["name"],
                    machine,
                    self._launch,
                    self._tell,
                )
                for c in self.spec.get(key) or ()
            ]

        self.init_containers = containers("initContainers", "OnFailure" if policy == "Always" else policy)
        self.containers = containers("containers", policy)
        self._task = asyncio.create_task(self._run(), name=f"pod {self.facts.name}")

    @staticmethod
    def _uid(manifest: Manifest) -> str:
        return str(manifest["metadata"].get("uid") or "0")

    @staticmethod
    def _policy(container: Manifest, policy: str) -> str:
        return str(container.get("restartPolicy") or policy)  # of its own: a sidecar

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.facts.manifest["spec"]
        return spec

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def ip(self) -> str:
        return self.facts.ip

    def status(self) -> dict[str, Any]:
        """`status` of the pod with the node's own conditions; those of others are not in it."""
        now = datetime.now(UTC)
        self._conditions = pod_status.conditions(
            self.spec, self.containers, self.initialized, self._gates, self._conditions, now
        )
        status: dict[str, Any] = {
            "phase": pod_status.phase(self.containers, self.initialized),
            "hostIP": self.ip,
            "podIP": self.ip,
            "podIPs": [{"ip": self.ip}],
            "startTime": timestamp(self._started_at),
            "conditions": self._conditions,
            "containerStatuses": [pod_status.container_status(c, init=False) for c in self.containers],
        }
        if self.init_containers:
            status["initContainerStatuses"] = [
                pod_status.container_status(c, init=True) for c in self.init_containers
            ]
        return status

    def set_gates(self, conditions: Mapping[str, bool]) -> None:
        """Tell what others have written into the pod's conditions, by type; only readiness gates matter."""
        if dict(conditions) != self._gates:
            self._gates = dict(conditions)
            self._tell()

    def ended_logs(self) -> dict[str, Path]:
        """Container -> the file that its latest ended run wrote; the current one's while none has ended."""
        return {c.name: c.ended_log for c in (*self.init_containers, *self.containers)}

    def last_words(self, container: str) -> list[str]:
        """What the latest run of a container that has ended said last; else what the current one says."""
        return last_words(self.ended_logs()[container])

    async def wait(self) -> None:
        """Until every container is over or the pod was stopped."""
        await asyncio.shield(self._task)

    async def stop(self, grace_s: float | None = None) -> None:
        """Stop all containers at once, gracefully; returns when no process is left. May be called again
        with a shorter grace, which then holds."""
        self._stopping = True
        if grace_s is None:
            grace_s = float(self.spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE_S))
        await asyncio.gather(*(c.stop(grace_s) for c in (*self.containers, *self.init_containers)))
        await asyncio.gather(self._task, *self._sidecars)
        self._tell()

    def _tell(self) -> None:
        self._changed(self)

    async def _run(self) -> None:
        self._tell()
        if not await self._initialize() or self._stopping:
            return
        self.initialized = True
        self._tell()
        await asyncio.gather(*(container.run() for container in self.containers))

    async def _initialize(self) -> bool:
        """Run init containers in turn; whether all succeeded. A sidecar has only to start."""
        for container in self.init_containers:
            if self._stopping:
                return False
            if container.spec.get("restartPolicy") == "Always":
                self._sidecars.append(asyncio.create_task(container.run()))
                while not container.started and not self._stopping:
                    await asyncio.sleep(0.05)
                continue
            await container.run()
            if not (isinstance(container.state, Terminated) and container.state.exit_code == 0):
                return False
        return True

    async def _launch(self, container: Manifest) -> Launch:
        """Resolve a container against what exists now; PodConfigError while something is missing."""
        check_probes(container)
        folders = await volumes.materialise(self.facts, self.root / "volumes", self.node.sources, self._token)
        own = await environment(container, self.facts, self.node.sources)
        mounts = volumes.mounts(container, folders, own, self._token)
        words = [*(container.get("command") or ()), *(container.get("args") or ())]
        if not container.get("command"):
            raise PodConfigError("a process needs a command: there is no image to take it from")
        inherited = {"HOSTNAME": self.name, **self.node.inherited}
        seen = inherited | {name: mounts.rewrite(value) for name, value in own.items()} | self._imposed
        command = [mounts.rewrite(expand(word, own | self._imposed)) for word in words]
        command[0] = self._executable(command[0], seen)
        cwd = Path(mounts.rewrite(container["workingDir"])) if container.get("workingDir") else self.root
        return Launch(command, seen, cwd, self.ip, mounts)

    def _executable(self, word: str, variables: Mapping[str, str]) -> str:
        if "/" in word:
            return word
        beside = self.node.bin_dir / word
        return str(beside) if beside.exists() else shutil.which(word, path=variables.get("PATH")) or word


class PodRunner:
    """Starts pods on one node; `open` one, and leave nothing behind."""

    def __init__(self, node: Node, machine: Machine) -> None:
        self.node = node
        self._machine = machine
        self.pods: dict[str, PodProcess] = {}

    def start(
        self,
        manifest: Manifest,
        ip: str,
        changed: Callable[[PodProcess], None],
        token: Path | None = None,
        imposed: Mapping[str, str] | None = None,
    ) -> PodProcess:
        """Run a pod at `ip`; `changed` is called in the event loop whenever its status may have changed.

        `token` is a folder with `token`, `ca.crt` and `namespace`, mounted where Kubernetes mounts a
        service account; `imposed` is environment over the node's own.
        """
        pod = PodProcess(self.node, self._machine, manifest, ip, token, imposed or {}, changed)
        self.pods[pod.root.name] = pod
        return pod

    async def stop(self, pod: PodProcess, grace_s: float | None = None) -> None:
        """Stop a pod and remove its folder, logs included."""
        await pod.stop(grace_s)
        self.pods.pop(pod.root.name, None)
        shutil.rmtree(pod.root, ignore_errors=True)

    async def stop_all(self, grace_s: float | None = None) -> None:
        """Stop every pod, and leave their folders."""
        await asyncio.gather(*(pod.stop(grace_s) for pod in self.pods.values()))


@asynccontextmanager
async def open_runner(node: Node) -> AsyncIterator[PodRunner]:
    """A runner whose processes are all gone at the end; those still running get SIGKILL."""
    guard = Guard()
    connector = aiohttp.TCPConnector(force_close=True, limit=0)  # a probe is a fresh connection
    try:
        async with aiohttp.ClientSession(connector=connector) as http:
            runner = PodRunner(node, Machine(guard, http, node.backoff))
            try:
                yield runner
            finally:
                await runner.stop_all(grace_s=0)
    finally:
        guard.close()
