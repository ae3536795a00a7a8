"""A child process of the supervisor: its status pipe, its log lines, its last words, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Callable

from broadbeam_runtime.deathsig import follow_parent
from broadbeam_runtime.status import Status, decode

LAST_WORDS = 20  # lines kept of each child
LOG_LINE_BYTES = 2**16


class Child:
    """`python -m broadbeam_runtime ARGUMENTS --status-fd N`, in a session of its own so that Ctrl-C at a
    terminal reaches only the supervisor, and killed by the kernel when the supervisor dies."""

    def __init__(
        self, name: str, arguments: list[str], on_status: Callable[[Status], None] = lambda _: None
    ) -> None:
        self.name = name
        self.status = Status("starting")
        self.exit_code: int | None = None
        self.exited = asyncio.Event()
        self._arguments = arguments
        self._on_status = on_status
        self._lines: deque[str] = deque(maxlen=LAST_WORDS)
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        ours, theirs = os.pipe()
        command = [sys.executable, "-m", "broadbeam_runtime", *self._arguments, "--status-fd", str(theirs)]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs,),
                start_new_session=True,
                preexec_fn=follow_parent(),
                limit=LOG_LINE_BYTES,
            )
        finally:
            os.close(theirs)
        self._tasks = [
            asyncio.create_task(self._read_status(ours)),
            asyncio.create_task(self._read_lines()),
        ]
        asyncio.create_task(self._wait()).add_done_callback(lambda _: None)

    async def _read_status(self, fd: int) -> None:
        reader = asyncio.StreamReader()
        pipe = os.fdopen(fd, "rb")
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while line := await reader.readline():
                if (status := decode(line)) is not None:
                    self.status = status
                    self._on_status(status)
        finally:
            transport.close()

    async def _read_lines(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        stream = self._process.stdout
        while True:
            try:
                raw = await stream.readline()
            except ValueError:  # a line longer than the limit; what was read of it is dropped
                continue
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip()
            if line:
                self._lines.append(line)
                print(f"[{self.name}] {line}", file=sys.stderr, flush=True)

    async def _wait(self) -> None:
        assert self._process is not None
        code = await self._process.wait()
        # A grandchild may hold the pipes open, so their end is not waited for long.
        await asyncio.wait(self._tasks, timeout=0.5)
        for task in self._tasks:
            task.cancel()
        self.exit_code = code
        self.exited.set()

    def send_signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.exit_code is None:
            try:
                self._process.send_signal(number)
            except ProcessLookupError:
                return

    async def stop(self, grace_s: float) -> None:
        """End it without waiting for its requests; after `grace_s` SIGKILL. Returns when it is gone."""
        if self._process is None:
            return
        # Until its first status it may still be importing: SIGINT would end it with a traceback.
        self.send_signal(signal.SIGTERM if self.status.stage == "starting" else signal.SIGINT)
        try:
            await asyncio.wait_for(self.exited.wait(), grace_s)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            await self.exited.wait()

    @property
    def end(self) -> str:
        """How it ended, in words: its exit code or signal, and its last words."""
        code = self.exit_code
        if code is None:
            return "is still running"
        if code < 0:
            name = signal.Signals(-code).name
            how = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        else:
            how = f"exited with code {code}"
        words = self.status.error or (self._lines[-1] if self._lines else "")
        return f"{how}; last words: {words}" if words else f"{how} without a word"
