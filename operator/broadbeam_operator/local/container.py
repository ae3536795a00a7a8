"""One container of a pod: started, probed, restarted with back-off and stopped as the kubelet would."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import aiohttp

from broadbeam_operator.local.environment import Manifest, PodConfigError
from broadbeam_operator.local.probes import Probe, Prober, named_ports
from broadbeam_operator.local.process import Child, Guard, StartError, start
from broadbeam_operator.local.volumes import Mounts

LAST_WORDS_LINES = 20
KEPT_LOGS = 5
LEAST_GRACE_AFTER_HOOK_S = 2.0  # what the kubelet grants when a preStop hook used up the grace


@dataclass(frozen=True, slots=True)
class Waiting:
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Running:
    started_at: datetime


@dataclass(frozen=True, slots=True)
class Terminated:
    exit_code: int
    started_at: datetime
    finished_at: datetime
    reason: str
    message: str = ""


State = Waiting | Running | Terminated


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds before a container that keeps ending is started again.

    The first restart is immediate, then `first_s` doubling up to `limit_s`; a container that ran for
    `healthy_s` starts over. Kubernetes: 10, 300 and 600.
    """

    first_s: float = 1.0
    limit_s: float = 300.0
    healthy_s: float = 60.0

    def delay_s(self, ends: int) -> float:
        """Before the restart after `ends` ends in a row (1: the first)."""
        return 0.0 if ends <= 1 else min(self.limit_s, self.first_s * 2.0 ** min(ends - 2, 32))


@dataclass(frozen=True, slots=True)
class Machine:
    """What all containers of a node share."""

    guard: Guard
    http: aiohttp.ClientSession
    backoff: Backoff


@dataclass(frozen=True, slots=True)
class Launch:
    """What one start of a container needs; paths are those of this machine already."""

    command: list[str]
    environment: Mapping[str, str]
    cwd: Path
    ip: str
    mounts: Mounts


def last_words(log: Path, lines: int = LAST_WORDS_LINES) -> list[str]:
    """The last lines that a container wrote, blank ones left out."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-lines:]
    return []


class Container:
    """Runs until its restart policy says it is over or `stop` is called; `state` says where it is."""

    def __init__(
        self,
        spec: Manifest,
        restart_policy: str,
        logs: Path,
        machine: Machine,
        prepare: Callable[[Manifest], Awaitable[Launch]],
        changed: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.restart_policy = restart_policy
        self.state: State = Waiting("PodInitializing")
        self.last: Terminated | None = None
        self.restarts = 0
        self.started = False
        self.ready = False
        self._logs = logs
        self._machine = machine
        self._prepare = prepare
        self._changed = changed
        self._child: Child | None = None
        self._launch: Launch | None = None
        self._stopping = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def log(self) -> Path:
        """Of the current or latest run."""
        return self._logs / f"{self.restarts}.log"

    @property
    def ended_log(self) -> Path:
        """Of the latest run that has ended; of the current one while none has."""
        running = isinstance(self.state, Running)
        return self._logs / f"{max(0, self.restarts - 1) if running else self.restarts}.log"

    @property
    def id(self) -> str:
        """Of the running process; "" between runs."""
        return self._child.mark if self._child else ""

    @property
    def over(self) -> bool:
        """It has ended and will not be started again."""
        return isinstance(self.state, Terminated) and (
            self._stopping.is_set() or not self._restarts_after(self.state.exit_code)
        )

    async def run(self) -> None:
        """Start, and start again as the restart policy says; returns when it is over or stopped."""
        ends = 0
        while not self._stopping.is_set():
            self._launch = await self._wait_until_preparable()
            if self._launch is None:
                return
            begun = time.monotonic()
            end = await self._run_once(self._launch)
            self._set(end)
            if self._stopping.is_set() or not self._restarts_after(end.exit_code):
                return
            ends = 1 if time.monotonic() - begun >= self._machine.backoff.healthy_s else ends + 1
            await self._back_off(end, self._machine.backoff.delay_s(ends))
            self.restarts += 1

    async def stop(self, grace_s: float) -> None:
        """preStop hook, SIGTERM, and SIGKILL once `grace_s` have passed; no restart follows."""
        self._stopping.set()
        await self._end(grace_s)

    async def _wait_until_preparable(self) -> Launch | None:
        """What to start; waits while something it names is missing. None: stopped meanwhile."""
        while not self._stopping.is_set():
            try:
                return await self._prepare(self.spec)
            except PodConfigError as error:
                self._set(Waiting("CreateContainerConfigError", str(error)))
                await self._pause(self._machine.backoff.first_s)
        return None

    async def _run_once(self, launch: Launch) -> Terminated:
        begun = datetime.now(UTC)
        self._logs.mkdir(parents=True, exist_ok=True)
        (self._logs / f"{self.restarts - KEPT_LOGS}.log").unlink(missing_ok=True)
        try:
            child = self._child = await self._start(launch.command, launch)
        except StartError as error:
            return Terminated(128, begun, datetime.now(UTC), "StartError", str(error))
        self.started = self.spec.get("startupProbe") is None
        self.ready = self.started and self.spec.get("readinessProbe") is None
        self._set(Running(begun))
        watching = asyncio.create_task(self._watch(launch))
        try:
            if self._stopping.is_set():  # `stop` came while the process was being made
                child.signal(signal.SIGTERM)
            code = await child.wait()
        finally:
            watching.cancel()
            self._child, self.started, self.ready, self._ending = None, False, False, None
        reason = "Completed" if code == 0 else "Error"
        return Terminated(code, begun, datetime.now(UTC), reason, self._message(code))

    async def _start(self, command: list[str], launch: Launch) -> Child:
        with self.log.open("ab") as log:
            try:
                return await start(command, launch.environment, launch.cwd, log, self._machine.guard)
            except StartError as error:
                log.write(f"{error}\n".encode())
                raise

    def _message(self, code: int) -> str:
        if code == 0 or self.spec.get("terminationMessagePolicy") != "FallbackToLogsOnError":
            return ""
        return "\n".join(last_words(self.log))[-2048:]

    def _prober(self, launch: Launch) -> Prober:
        async def run_command(command: list[str]) -> int:
            return await self._run_beside(command, launch)

        return Prober(self._machine.http, launch.ip, named_ports(self.spec), run_command)

    async def _run_beside(self, command: list[str], launch: Launch) -> int:
        """An exec probe or hook; its exit code. Killed when the caller gives up."""
        try:
            child = await self._start([launch.mounts.rewrite(word) for word in command], launch)
        except StartError:
            return 127
        try:
            return await child.wait()
        except asyncio.CancelledError:
            await child.terminate(0)
            raise

    async def _watch(self, launch: Launch) -> None:
        """postStart hook, start-up probe, then liveness and readiness side by side."""
        prober = self._prober(launch)
        hook = (self.spec.get("lifecycle") or {}).get("postStart")
        if hook and (why := await prober.check(hook, 60.0)):
            return self._kill(None, f"postStart hook failed: {why}")
        startup = Probe.of(self.spec.get("startupProbe"))
        if startup is not None:
            if why := await prober.succeed_once(startup):
                return self._kill(startup, f"startup probe failed: {why}")
            self.started = True
            self.ready = self.spec.get("readinessProbe") is None
            self._changed()
        await asyncio.gather(self._watch_liveness(prober), self._watch_readiness(prober))

    async def _watch_liveness(self, prober: Prober) -> None:
        if probe := Probe.of(self.spec.get("livenessProbe")):
            async for why in prober.verdicts(probe):
                if why is not None:
                    return self._kill(probe, f"liveness probe failed: {why}")

    async def _watch_readiness(self, prober: Prober) -> None:
        if probe := Probe.of(self.spec.get("readinessProbe")):
            async for why in prober.verdicts(probe):
                if self.ready != (why is None):
                    self.ready = why is None
                    self._changed()

    def _kill(self, probe: Probe | None, why: str) -> None:
        """End this run; the restart policy decides what follows."""
        self._note(f"stopping {self.name}: {why}")
        grace_s = probe.grace_s if probe is not None and probe.grace_s is not None else 30.0
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(grace_s))

    async def _end(self, grace_s: float) -> None:
        child, launch, deadline = self._child, self._launch, time.monotonic() + grace_s
        if child is None or launch is None:
            return
        hook = (self.spec.get("lifecycle") or {}).get("preStop")
        if hook and grace_s > 0:
            if why := await self._prober(launch).check(hook, grace_s):
                self._note(f"preStop hook failed: {why}")
            deadline = max(deadline, time.monotonic() + LEAST_GRACE_AFTER_HOOK_S)
        await child.terminate(max(0.0, deadline - time.monotonic()))

    def _note(self, text: str) -> None:
        with self.log.open("ab") as log:
            log.write(f"broadbeam node: {text}\n".encode())

    async def _back_off(self, end: Terminated, delay_s: float) -> None:
        self.last = end
        if delay_s > 0:
            message = f"back-off {delay_s:g}s restarting failed container={self.name}"
            self._set(Waiting("CrashLoopBackOff", message))
            await self._pause(delay_s)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _restarts_after(self, exit_code: int) -> bool:
        return self.restart_policy == "Always" or (self.restart_policy == "OnFailure" and exit_code != 0)

    def _set(self, state: State) -> None:
        self.state = state
        self._changed()
