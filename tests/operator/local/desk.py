"""A desk to run `broadbeam` at: commands as processes, and a view of everything that they leave."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

BROADBEAM = str(Path(sys.executable).parent / "broadbeam")
PROMPT = "Where does the wind come from?"


@dataclass
class Command:
    """A running `broadbeam`, and everything it has printed."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    reading: asyncio.Task[None] | None = None

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode().rstrip())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    async def until(self, pattern: str) -> re.Match[str]:
        for _ in range(3000):
            if found := re.search(pattern, self.text):
                return found
            assert self.process.returncode is None, self.text
            await asyncio.sleep(0.02)
        raise AssertionError(f"{pattern!r} did not come: {self.text}")

    async def end(self) -> int:
        async with asyncio.timeout(60):
            code = await self.process.wait()
            assert self.reading is not None
            await self.reading
        return code


class Desk:
    """Starts commands with a cache of their own, and knows every process that they leave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.port = free_port()
        self.commands: list[Command] = []

    def manifest(self, name: str = "demo", **spec: Any) -> Path:
        pools = [
            {"name": role, "role": role, "accelerator": {"resource": "cpu"}, "kvCache": {"memory": "64Mi"}}
            for role in ("prefill", "decode")
        ]
        body = {
            "apiVersion": "serving.broadbeam.io/v1alpha1",
            "kind": "ServingCluster",
            "metadata": {"name": name},
            "spec": {
                "model": {"name": "m", "source": "tiny://deepseek-v3?seed=0", "maxModelLen": 1024},
                "engine": {"name": "sim"},
                "pools": pools,
                "kv": {"transfer": {"connector": "tcp"}},
            }
            | spec,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(body))
        return path

    async def start(
        self,
        *arguments: str | Path,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> Command:
        """`before` is run in the new process."""
        words = [
            BROADBEAM,
            *map(str, arguments),
            "--cache",
            str(self.cache),
            "--port",
            str(port or self.port),
        ]
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            preexec_fn=before,
        )
        command = Command(process)
        command.reading = asyncio.create_task(command.read())
        self.commands.append(command)
        return command

    def pid_of(self, pattern: str) -> int:
        (pid,) = [pid for pid, line in self.processes() if re.search(pattern, line)]
        return pid

    def left(self) -> list[str]:
        """Command lines of processes that were started for pods and are still there."""
        return [line for _, line in self.processes()]

    def processes(self) -> list[tuple[int, str]]:
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and str(self.cache).encode() in (folder / "environ").read_bytes():
                    found.append((int(folder.name), (folder / "cmdline").read_text().replace("\0", " ")))
            except OSError:
                continue  # ended meanwhile
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)
