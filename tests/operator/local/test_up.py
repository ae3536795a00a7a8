"""`broadbeam up` and `demo` as a person runs them: real processes, the simulator as the engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
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

    async def start(self, *arguments: str | Path, port: int | None = None) -> Command:
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


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    for command in desk.commands:
        if command.process.returncode is None:
            command.process.kill()
        await command.end()
    await until(lambda: not desk.left())


async def test_a_demo_answers_over_prefill_and_decode_and_leaves_nothing(desk: Desk) -> None:
    command = await desk.start("demo", desk.manifest(), "--prompt", PROMPT, "--max-tokens", "8")
    assert await command.end() == 0, command.text
    assert re.search(r"prefilled by +demo-prefill-0-0/0", command.text)
    assert re.search(r"decoded by +demo-decode-0-0/0", command.text)
    tokens = re.search(r"prompt tokens +(\d+)", command.text)
    assert tokens is not None
    assert re.search(rf"moved by KV transfer +{tokens[1]} tokens", command.text)
    assert re.search(r"generated +8 tokens", command.text)
    assert desk.left() == []
    assert list((desk.cache / "run").glob("demo-*")) == []


async def test_up_serves_until_ctrl_c_and_leaves_nothing(desk: Desk) -> None:
    command = await desk.start("up", desk.manifest())
    url = (await command.until(r"available at (http://\S+)"))[1]
    curl = (await command.until(r"curl -N (\S+) .* -d '(.*)'"))[2]
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=json.loads(curl)) as response,
    ):
        assert response.status == 200
        assert "[DONE]" in await response.text()
    assert desk.left()
    command.process.send_signal(signal.SIGINT)
    assert await command.end() == 0
    assert desk.left() == []
    assert "Traceback" not in command.text


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(r"starting demo", id="at once"),
        pytest.param(r"decode-0-0: starting", id="while pods start"),
        pytest.param(r"decode-0-0 rank 0: loading", id="while ranks load"),
    ],
)
async def test_ctrl_c_before_the_cluster_is_available_exits_130(desk: Desk, moment: str) -> None:
    slow = {"name": "sim", "sim": {"load": "60s"}}
    command = await desk.start("up", desk.manifest(engine=slow))
    await command.until(moment)
    command.process.send_signal(signal.SIGINT)
    assert await command.end() == 130
    assert desk.left() == []
    assert "Traceback" not in command.text


async def test_ctrl_c_during_the_answer_ends_the_demo(desk: Desk) -> None:
    slow = {"name": "sim", "sim": {"decodeBase": "2s"}}
    command = await desk.start("demo", desk.manifest(engine=slow), "--prompt", PROMPT)
    await command.until(r"asking: ")
    command.process.send_signal(signal.SIGINT)
    command.process.send_signal(signal.SIGINT)
    assert await command.end() == 130
    assert desk.left() == []
    assert "Traceback" not in command.text


async def test_kill_9_of_up_leaves_no_process_and_the_next_up_cleans_the_folder(desk: Desk) -> None:
    command = await desk.start("up", desk.manifest())
    await command.until(r"available at")
    assert len(desk.left()) >= 5  # two supervisors, two ranks, the gateway
    command.process.kill()
    await command.end()
    await until(lambda: not desk.left())
    (stale,) = (desk.cache / "run").glob("demo-*")
    other = await desk.start("up", desk.manifest("other"))
    await other.until(r"starting other")
    assert not stale.exists()


async def test_a_killed_rank_comes_back_with_its_group(desk: Desk) -> None:
    command = await desk.start("up", desk.manifest())
    await command.until(r"Ctrl-C stops it")
    os.kill(desk.pid_of(r"broadbeam_runtime rank .*decode"), signal.SIGKILL)
    await command.until(r"(?s)decode-0-0 was restarted; it said last:.*rank 0 was killed by SIGKILL")
    await command.until(r"decode-0-0: ready \(restarts: 1\)")
    command.process.send_signal(signal.SIGINT)
    assert await command.end() == 0


async def test_two_clusters_at_once_keep_apart(desk: Desk) -> None:
    first = await desk.start("up", desk.manifest("one"))
    await first.until(r"available at http://127.0.0.1:")
    second = await desk.start("up", desk.manifest("two"), port=free_port())
    # The first gateway's metrics port is on 127.0.0.1, so the second has an address of its own.
    await second.until(r"available at http://127\.77\.\d+\.\d+:")
    for command in (first, second):
        command.process.send_signal(signal.SIGINT)
    assert [await first.end(), await second.end()] == [0, 0]


async def test_a_port_in_use_is_one_line_that_says_what_to_do(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", desk.port)):
        command = await desk.start("up", desk.manifest())
        assert await command.end() == 1
    assert command.lines == [
        f"broadbeam: port {desk.port} of 127.0.0.1 is in use or not ours to use: choose another with --port, "
        "or set spec.gateway.listeners[0].port"
    ]


async def test_an_engine_that_keeps_crashing_shows_its_last_words_and_its_log(desk: Desk) -> None:
    model = {"name": "m", "source": "file:///no/such/model", "maxModelLen": 128}
    command = await desk.start("up", desk.manifest(engine={"name": "broadbeam"}, model=model))
    assert await command.end() == 1
    assert re.search(
        r"broadbeam: demo-\w+-0-0 keeps failing: exited with code 1, restarted 3 times", command.text
    )
    assert "/no/such/model" in command.text.split("the last words of")[1]
    log = re.search(r"its log: (\S+)", command.text)
    assert log is not None
    assert "/no/such/model" in Path(log[1]).read_text()
    assert "Traceback" not in command.text


async def test_a_start_that_takes_too_long_ends_with_where_it_was(desk: Desk) -> None:
    slow = {"name": "sim", "sim": {"load": "300s"}}
    command = await desk.start("up", desk.manifest(engine=slow), "--timeout", "4")
    assert await command.end() == 1
    assert re.search(r"broadbeam: not available after 4 s \(--timeout\): demo-\S+ is at: \w+", command.text)
    assert desk.left() == []


@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        pytest.param(
            {"model": {"name": "m", "source": "pvc://claim/m", "maxModelLen": 128}},
            1,
            "spec.model.source: pvc://claim/m needs a cluster; here use file://, hf:// or pypi://",
            id="a model in a claim",
        ),
        pytest.param({"pools": []}, 2, "spec.pools: has 0 items; at least 1 needed", id="no pools"),
        pytest.param(
            {"gateway": {"auth": {"secretRef": {"name": "keys"}}}},
            1,
            "spec.gateway.auth.secretRef.name: keys: no such Secret here; give its keys with "
            "--secret keys=FOLDER",
            id="a Secret that is not there",
        ),
    ],
)
async def test_what_cannot_run_here_is_one_line(
    desk: Desk, spec: dict[str, Any], code: int, message: str
) -> None:
    path = desk.manifest(**spec)
    command = await desk.start("up", path)
    assert await command.end() == code
    assert command.lines == [f"broadbeam: {path}: {message}"]


async def test_a_cache_that_cannot_be_written_is_one_line(desk: Desk) -> None:
    desk.cache.touch()
    command = await desk.start("up", desk.manifest())
    assert await command.end() == 1
    assert command.lines == [f"broadbeam: {desk.cache}/run/addresses: Not a directory"]


async def test_on_a_terminal_a_table_shows_every_rank(desk: Desk) -> None:
    ours, theirs = os.openpty()
    words = [BROADBEAM, "up", str(desk.manifest()), "--cache", str(desk.cache), "--port", str(desk.port)]
    terminal = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"}
    process = await asyncio.create_subprocess_exec(
        *words, stdin=theirs, stdout=theirs, stderr=theirs, env=terminal
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    shown, told = b"", False
    async with asyncio.timeout(60):
        while process.returncode is None:
            await asyncio.sleep(0.05)
            with contextlib.suppress(BlockingIOError, OSError):
                shown += os.read(ours, 2**16)
            if b"Ctrl-C stops it" in shown and not told:
                process.send_signal(signal.SIGINT)
                told = True
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert re.search(r"POOL +GROUP +POD +RANK +ADDRESS +PHASE +RESTARTS", text)
    assert re.search(r"decode +0 +demo-decode-0-0 +0 +127\.77\.\d+\.\d+ +ready +0", text)
    assert b"\x1b[?25h" in shown  # the cursor is back


async def test_api_keys_come_from_a_folder(desk: Desk) -> None:
    keys = desk.folder / "keys"
    keys.mkdir()
    (keys / "first").write_text("sesame\n")
    manifest = desk.manifest(gateway={"auth": {"secretRef": {"name": "keys"}}})
    command = await desk.start("up", manifest, "--secret", f"keys={keys}")
    url = (await command.until(r"available at (http://\S+)"))[1]
    await command.until(r"Authorization: Bearer sesame")
    async with aiohttp.ClientSession() as http:
        for headers, status in (({}, 401), ({"Authorization": "Bearer sesame"}, 200)):
            async with http.get(f"{url}/v1/models", headers=headers) as response:
                assert response.status == status
