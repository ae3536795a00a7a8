"""Pods as processes: `start_pod(config)` runs `broadbeam-runtime serve` on a loopback address of its own."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_network = 150 + (8 * os.getppid() + _worker) % 56  # not that of another of up to eight workers
_hosts = (f"127.{_network}.{number // 250}.{number % 250 + 1}" for number in itertools.count())
SIM: dict[str, Any] = {
    "engine": "sim",
    "role": "both",
    "model": {"name": "demo", "source": "sim://", "max_model_len": 2048},
    "sim": {"decode_base_ms": 1, "prefill_base_ms": 1},
    "drain_s": 5,
}


def children(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Pod:
    """One `broadbeam-runtime serve`."""

    def __init__(self, folder: Path, config: dict[str, Any], host: str, *flags: str) -> None:
        self.host = host
        self.log = folder / f"{host}.log"
        path = folder / f"{host}.json"
        path.write_text(json.dumps(config))
        command = [
            sys.executable,
            "-m",
            "broadbeam_runtime",
            "serve",
            "--config",
            str(path),
            "--host",
            host,
            *flags,
        ]
        self.command = command
        self.start()

    def start(self) -> None:
        """Run it, again if it has ended; its log starts anew."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def rank_states(self) -> list[dict[str, Any]]:
        return list(json.loads(self.get("/readyz")[1])["ranks"])

    def url(self, path: str, rank: int = 0) -> str:
        return f"http://{self.host}:{8000 + rank}{path}"

    def get(self, path: str, port: int = 9000) -> tuple[int, str]:
        """Status and text; (0, reason) while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://{self.host}:{port}{path}", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def post(self, path: str, body: Any = None, rank: int = 0, port: int | None = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = self.url(path, rank) if port is None else f"http://{self.host}:{port}{path}"
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def metric(self, name: str, port: int = 9000, **labels: str) -> float:
        """The sum of the samples of `name` that carry `labels`."""
        total = 0.0
        for line in self.get("/metrics", port)[1].splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(
                f'{key}="{text}"' in head for key, text in labels.items()
            ):
                total += float(value)
        return total

    def wait(self, what: Callable[[], Any], within_s: float = 60.0) -> Any:
        """The first true answer of `what`; fails with the pod's log."""
        deadline = time.monotonic() + within_s
        while not (answer := what()):
            assert time.monotonic() < deadline, f"not within {within_s} s; log:\n{self.log.read_text()}"
            time.sleep(0.02)
        return answer

    def ready(self) -> Pod:
        self.wait(lambda: self.process.poll() is not None or self.get("/readyz")[0] == 200, 120)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()


@contextmanager
def hung_up(pod: Pod, body: dict[str, Any]) -> Iterator[None]:
    """Ask for a completion, and hang up after the body of the `with`."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {pod.host}\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((pod.host, 8000)) as stream:
        stream.sendall(head.encode() + data)
        yield


StartPod = Callable[..., Pod]


def _starter(folder: Path) -> Iterator[StartPod]:
    pods: list[Pod] = []

    def start(config: dict[str, Any] | None = None, *flags: str, host: str | None = None) -> Pod:
        pods.append(Pod(folder, SIM if config is None else config, host or next(_hosts), *flags))
        return pods[-1]

    yield start
    for pod in pods:
        pod.stop(signal.SIGKILL)


@pytest.fixture
def start_pod(tmp_path: Path) -> Iterator[StartPod]:
    yield from _starter(tmp_path)


@pytest.fixture(scope="module")
def start_shared_pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartPod]:
    yield from _starter(tmp_path_factory.mktemp("pods"))
