"""`broadbeam up`: run a cluster here until Ctrl-C, and say how it is."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from broadbeam_operator.local.pods import PodProcess
from broadbeam_operator.local.progress import Progress
from broadbeam_operator.local.reload import ManifestFile
from broadbeam_operator.local.session import Session
from broadbeam_operator.local.view import View

POLL_S = 0.25  # while it starts
STEADY_POLL_S = 1.0  # once it is available: 1 % of a core for two pods
STOP_GRACE_S = 10.0  # running requests may finish; a second Ctrl-C does not wait
GIVE_UP_RESTARTS = 3  # of one pod, before the cluster was ever Available
EXIT_OK = 0
EXIT_FAILED = 1


class CannotServeError(Exception):
    """The cluster will not become Available; `details` are lines worth reading after the message."""

    def __init__(self, message: str, details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.details = details


@dataclass(slots=True)
class Interrupt:
    """SIGINT or SIGTERM: the first asks for a stop, the second for one at once."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    insisted: asyncio.Event = field(default_factory=asyncio.Event)
    signum: int = 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signum

    def on_signal(self, signum: int) -> None:
        if self.asked.is_set():
            self.insisted.set()
        self.signum = signum
        self.asked.set()


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Signals become events for the length of the body, after which the process is about to end.

    One that is ignored stays so: under nohup a terminal that goes takes nothing with it.
    """
    loop, interrupt = asyncio.get_running_loop(), Interrupt()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [signum for signum in signals if signal.getsignal(signum) is not signal.SIG_IGN]
    for signum in heeded:
        loop.add_signal_handler(signum, interrupt.on_signal, signum)
    try:
        yield interrupt
    finally:
        for signum in heeded:
            loop.remove_signal_handler(signum)
            signal.signal(signum, signal.SIG_IGN)  # all is stopped; one more Ctrl-C changes nothing


@dataclass(slots=True)
class Watch:
    """Looks at a session again and again, shows it, and tells of every container that ended."""

    session: Session
    view: View
    restarts: dict[str, int] = field(default_factory=dict)  # pod -> those already told of

    async def look(self) -> Progress:
        now = await self.session.progress()
        self.view.show(now)
        for pod in now.pods:
            if pod.restarts > self.restarts.get(pod.name, 0):
                self.view.say(f"{pod.name} was restarted; it said last:")
                for line in self.last_words(pod.name, lines=5):
                    self.view.plain(f"    {line}")
            self.restarts[pod.name] = pod.restarts
        return now

    async def until_available(self, interrupt: Interrupt, timeout_s: float) -> bool:
        """True once Available, False when interrupted first; CannotServeError when it will not be."""
        deadline = time.monotonic() + timeout_s
        while not interrupt.asked.is_set():
            now = await self.look()
            if now.available:
                return True
            self._give_up_on(now, timeout_s if time.monotonic() > deadline else None)
            await pause(interrupt, POLL_S)
        return False

    async def until_interrupted(self, interrupt: Interrupt, file: ManifestFile) -> None:
        """Show what happens for as long as the cluster is wanted, as its manifest says by then."""
        available = True
        while not interrupt.asked.is_set():
            await file.look(self.session, self.view)
            now = await self.look()
            if now.available != available:
                available = now.available
                self.view.say("available again" if available else f"not available: {now.state}")
            await pause(interrupt, STEADY_POLL_S if available else POLL_S)

    def _give_up_on(self, now: Progress, timed_out_s: float | None) -> None:
        if now.refused:
            raise CannotServeError(f"the manifest is refused: {now.refused}")
        for pod in now.pods:
            if pod.restarts >= GIVE_UP_RESTARTS:
                words = self.last_words(pod.name)
                why = words[-1] if words else pod.trouble or f"exited with code {pod.last_exit}"
                message = f"{pod.name} keeps failing (restarted {pod.restarts} times): {why}"
                raise CannotServeError(message, self.epitaph(pod.name, told=1))
        if timed_out_s is not None:
            late = next((pod for pod in now.pods if not pod.ready), None)
            where = f": {late.name} is at: {late.trouble or late.stage}" if late else ""
            details = self.epitaph(late.name) if late else ()
            raise CannotServeError(f"not available after {timed_out_s:g} s (--timeout){where}", details)

    def epitaph(self, pod_name: str, told: int = 0) -> tuple[str, ...]:
        """What a pod's process said last, if that is more than was `told`, and where the rest of it is."""
        pod = self.session.pod(pod_name)
        if pod is None:
            return ()
        words = self.last_words(pod_name)
        words = words if len(words) > told else []
        head = (f"the last words of {pod_name}:",) if words else ()
        return (*head, *(f"    {line}" for line in words), f"its log: {log_of(pod)}")

    def last_words(self, pod_name: str, lines: int = 20) -> list[str]:
        pod = self.session.pod(pod_name)
        return [line for name in pod.ended_logs() for line in pod.last_words(name)][-lines:] if pod else []


def log_of(pod: PodProcess) -> Path:
    return list(pod.ended_logs().values())[-1]


async def pause(interrupt: Interrupt, seconds: float) -> None:
    """Sleep, but not past an interrupt."""
    with suppress(TimeoutError):
        await asyncio.wait_for(interrupt.asked.wait(), seconds)


async def stop(session: Session, interrupt: Interrupt, view: View) -> None:
    """End every process gracefully; at once when interrupted again."""
    view.say("stopping; Ctrl-C again to stop at once" if interrupt.asked.is_set() else "stopping")
    stopping = asyncio.create_task(session.stop(STOP_GRACE_S))
    insisted = asyncio.create_task(interrupt.insisted.wait())
    await asyncio.wait([stopping, insisted], return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        await session.stop(0)
    insisted.cancel()
    await stopping


async def up(
    session: Session,
    view: View,
    interrupt: Interrupt,
    timeout_s: float,
    key: str | None,
    file: ManifestFile,
) -> int:
    """Until interrupted; the exit status. CannotServeError when the cluster does not become Available."""
    watch = Watch(session, view)
    available = await watch.until_available(interrupt, timeout_s)
    if available:
        view.say(f"available at {session.url}")
        view.plain(curl(session.url, session.cluster.spec.model.name, key))
        view.say(f"Ctrl-C stops it; a change of {file.path} is applied")
        await watch.until_interrupted(interrupt, file)
    await stop(session, interrupt, view)
    return EXIT_OK if available else interrupt.exit_code


def curl(url: str, model: str, key: str | None) -> str:
    """One line that asks the gateway something."""
    body = {"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": True}
    headers = ["Content-Type: application/json", *([f"Authorization: Bearer {key}"] if key else [])]
    words = ["curl", "-N", f"{url}/v1/chat/completions"]
    words += [word for header in headers for word in ("-H", header)]
    return shlex.join([*words, "-d", json.dumps(body)])
