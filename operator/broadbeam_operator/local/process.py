"""Local processes that cannot outlive the process that started them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from uuid import uuid4

from broadbeam_operator.local.guard import MARK, kill_marked, marked

LINGER_S = 5.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class StartError(Exception):
    """A command that could not be started; the message names it and says why."""


class Guard:
    """Kills what a node started once the node is gone; see `guard.py`. Started by its first process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def add(self, mark: str) -> None:
        self._tell(f"+{mark}\n")

    def remove(self, mark: str) -> None:
        self._tell(f"-{mark}\n")

    def close(self) -> None:
        """End the guard; whatever is still registered is killed."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _tell(self, line: str) -> None:
        if self._process is None:
            command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody killed the guard: PDEATHSIG is still there
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


@dataclass(slots=True)
class Child:
    """A running process, first of its own session; `mark` is in its environment and its children's."""

    process: asyncio.subprocess.Process
    mark: str
    guard: Guard
    _reaped: bool = field(default=False)

    async def wait(self) -> int:
        """The exit code, 128 + n for signal n, once the process and all its children are gone."""
        code = await self.process.wait()
        if not self._reaped:
            self._reaped = True
            # A container's end is the end of all its processes.
            kill_marked({self.mark})
            # A killed process with gigabytes takes a while to go; one that hangs in the kernel may stay.
            deadline = time.monotonic() + LINGER_S
            while marked({self.mark}) and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            self.guard.remove(self.mark)
        return code if code >= 0 else 128 - code

    def signal(self, signum: int) -> None:
        """Send to the first process only, as a container runtime does."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signum)

    async def terminate(self, grace_s: float) -> int:
        """SIGTERM, then SIGKILL to it and all its children after `grace_s`; the exit code."""
        self.signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(asyncio.shield(self.wait()), grace_s)
        except TimeoutError:
            kill_marked({self.mark})
            return await self.wait()


def _dying_with(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died between fork and prctl
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare


async def start(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: IO[bytes], guard: Guard
) -> Child:
    """Start `command` in a session of its own, both outputs to `log`; StartError when it cannot be."""
    mark = uuid4().hex
    guard.add(mark)
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**environment, MARK: mark},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_dying_with(os.getpid()),
        )
    except OSError as error:
        guard.remove(mark)
        raise StartError(f"{command[0]}: {error.strerror}") from error
    return Child(process, mark, guard)
