"""`broadbeam-router` as a process: its flags, its refusals, its end, its size."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from broadbeam_router.fake_engine import FakeEngine, Script

COMMAND = [sys.executable, "-m", "broadbeam_router"]


def config(directory: Path, **fields: Any) -> Path:
    defaults = {
        "cluster": "c",
        "models": ["m"],
        "endpoints": {"from": "file", "path": str(directory / "endpoints.json")},
        "port": 0,
        "metrics_port": 0,
        "timeouts": {"drain_s": 5.0},
    }
    path = directory / "gateway.json"
    path.write_text(json.dumps(defaults | fields))
    return path


class Process:
    """A gateway process whose ports are read from /proc, because it was given port 0."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0)


def _few_descriptors() -> None:
    """As a shell gives them, or fewer."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))


@pytest.fixture
async def engine():
    engine = await FakeEngine("d").start()
    yield engine
    await engine.stop()


@pytest.fixture
async def gateway(tmp_path, engine, unused_tcp_port_factory):
    rows = [
        {"name": "d/0", "host": engine.host, "port": engine.port, "role": "decode", "pool": "d", "group": "0"}
    ]
    (tmp_path / "endpoints.json").write_text(
        json.dumps({"endpoints": [row | {"revision": "r"} for row in rows]})
    )
    port, metrics_port = unused_tcp_port_factory(), unused_tcp_port_factory()
    flags = ["--host", "127.0.0.1", "--port", str(port), "--metrics-port", str(metrics_port)]
    path = config(tmp_path)
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--config", str(path), *flags, stderr=subprocess.PIPE, preexec_fn=_few_descriptors
    )
    running = Process(process, port)
    for _ in range(3000):
        try:
            if (await running.client._client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200:
                break
        except Exception:
            pass
        await asyncio.sleep(0.02)
    yield running
    await running.client.close()
    if process.returncode is None:
        process.kill()
    await process.communicate()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Input data was truncated"),
        ("{}", "missing required field `cluster`"),
        ('{"cluster":"c","models":[],"endpoints":{"from":"file","path":"x"}}', "models is empty"),
        (
            '{"cluster":"c","models":["m"],"endpoints":{"from":"dns"}}',
            "Invalid value 'dns' - at `$.endpoints.from`",
        ),
        (
            '{"cluster":"c","models":["m"],"endpoints":{"from":"file","path":"x"},"policy":"best"}',
            "Invalid enum value 'best' - at `$.policy`",
        ),
        (
            '{"cluster":"c","models":["m"],"endpoints":{"from":"file","path":"x"},"retries":-1}',
            "retries must be at least 0, got -1",
        ),
        (
            '{"cluster":"c","models":["m"],"endpoints":{"from":"file","path":"x"},"auth":{"keys_dir":"/none"}}',
            "auth.keys_dir: /none is not a directory",
        ),
        (
            '{"cluster":"c","models":["m"],"endpoints":{"from":"kubernetes","namespace":"n","cluster":"c"}}',
            "KUBERNETES_SERVICE_HOST is not set",
        ),
    ],
)
def test_a_wrong_config_is_one_clear_line(tmp_path, text, message) -> None:
    path = tmp_path / "gateway.json"
    path.write_text(text)
    done = subprocess.run(
        [*COMMAND, "--config", str(path)], capture_output=True, text=True, env={}, timeout=60
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("broadbeam-router: ")


def test_a_missing_config_is_one_clear_line(tmp_path) -> None:
    done = subprocess.run([*COMMAND, "--config", "/none"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "broadbeam-router: /none: No such file or directory\n")


async def test_a_port_in_use_is_one_clear_line(tmp_path, engine) -> None:
    path = config(tmp_path, port=engine.port)
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--config", str(path), "--host", "127.0.0.1", stderr=subprocess.PIPE
    )
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert b"Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith(b"broadbeam-router: ")
    assert str(engine.port).encode() in stderr.splitlines()[-1]
    assert b"address already in use" in stderr.splitlines()[-1].lower()


async def _chunks(stream: openai.AsyncStream) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def test_a_stopping_gateway_finishes_its_streams_and_takes_no_more(gateway, engine) -> None:
    engine.script = lambda seen: Script(words=("a",) * 30, gap_s=0.03)
    stream = await gateway.client.chat.completions.create(**ASK, stream=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.readuntil(b"ok\n")
    gateway.process.send_signal(signal.SIGTERM)
    assert await reader.read() == b"", "an idle connection is closed"
    writer.close()
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        await asyncio.open_connection("127.0.0.1", gateway.port)
    assert await _chunks(stream) == "a" * 30
    assert await gateway.process.wait() == 0


async def test_a_second_signal_ends_the_patience(gateway, engine) -> None:
    engine.script = lambda seen: Script(words=("a",) * 1000, gap_s=0.03)
    stream = await gateway.client.chat.completions.create(**ASK, stream=True)
    gateway.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    assert gateway.process.returncode is None
    gateway.process.send_signal(signal.SIGTERM)
    assert await gateway.process.wait() == 0
    with pytest.raises(Exception, match=r"incomplete|peer closed|Connection"):
        await _chunks(stream)


async def test_a_gateway_takes_as_many_connections_as_the_system_allows(gateway) -> None:
    limits = Path(f"/proc/{gateway.process.pid}/limits").read_text()
    allowed = re.search(r"Max open files +(\d+) +(\d+)", limits)
    assert allowed is not None
    assert allowed[1] == allowed[2]


async def test_a_gateway_is_small(gateway) -> None:
    for _ in range(50):
        await gateway.client.chat.completions.create(**ASK)
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    resident_kb = int(status.split("VmRSS:")[1].split()[0])
    assert resident_kb <= 80_000


def test_the_data_plane_loads_no_heavy_library() -> None:
    code = "import sys, broadbeam_router.__main__; print(*[m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["pydantic", "kubernetes", "aiohttp", "torch", "yaml", "numpy"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, timeout=60)
    assert done.stdout == "\n", done.stderr
