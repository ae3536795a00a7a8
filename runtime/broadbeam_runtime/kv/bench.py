"""`python -m broadbeam_runtime.kv.bench`: KV transfer between two local ranks beside a plain copy of the same
bytes, and the resident memory of the processes that hold no model.

A transfer is timed from `pull` to its report by `pulled`, as an engine sees it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from torch import Tensor

from broadbeam_crds.conventions import SUPERVISOR_PORT
from broadbeam_crds.engine_config import Connector, EngineConfig, KVTransferConfig, ModelConfig
from broadbeam_runtime.figures import Figure, measuring, report
from broadbeam_runtime.kv import connectors
from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.memory import host_memory
from broadbeam_runtime.kv.nixl import environment

ROUNDS = 15  # transfers and copies alternate; medians are taken
PREFILL_HOST, DECODE_HOST, POD_HOST = "127.76.0.1", "127.76.0.2", "127.76.0.3"
PORT = 5600
MB = 1_000_000
RANK_BAR_MB, SUPERVISOR_BAR_MB = 60, 60


@dataclass(frozen=True, slots=True)
class Load:
    """`blocks` blocks of `block_bytes` are moved at once."""

    name: str
    blocks: int
    block_bytes: int


LOADS = (
    Load("smollm2-512-tokens", 512 // 16, 16 * 30 * 2 * 3 * 64 * 4),  # 30 layers, 3 heads of 64, float32
    Load("64-mib", 64, 1 << 20),
)


def memory(load: Load) -> Tensor:
    """(blocks, block_bytes), of the kind that the engine keeps its cache in."""
    return host_memory(load.blocks * load.block_bytes).view(load.blocks, load.block_bytes)


class _Rank:
    """A pool and its connector."""

    def __init__(self, connector: Connector, load: Load, host: str) -> None:
        os.environ.update(environment(host))
        config = EngineConfig(
            engine="broadbeam",
            role="both",
            model=ModelConfig("bench", "none"),
            kv_transfer=KVTransferConfig(connector),
        )
        self.pool = memory(load).fill_(1)
        made = connectors.create(config, host, PORT)
        assert made is not None
        self.connector = made
        made.start(self.pool, PoolLayout("bench", "uint8", 16, load.block_bytes, 1, load.block_bytes // 16))


def _prefill(pipe: Connection, connector: Connector, load: Load) -> None:
    """The other process: holds all its blocks under the name it is told, until the pipe closes."""
    rank = _Rank(connector, load, PREFILL_HOST)
    blocks = list(range(load.blocks))
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            rank.connector.stop()
            return
        pipe.send(rank.connector.hold(name, blocks, 16 * load.blocks))
        while not rank.connector.released():
            time.sleep(0.001)


def _transfer(connector: Connector, load: Load) -> Figure:
    measuring(f"KV transfer by {connector}: {load.name}")
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_prefill, args=(theirs, connector, load), daemon=True)
    process.start()
    theirs.close()
    rank = _Rank(connector, load, DECODE_HOST)
    source, target = memory(load).fill_(1), memory(load)
    moves, copies = [], []
    for index in range(ROUNDS + 1):  # the first shakes hands
        moves.append(_pull(rank, pipe, f"{index}"))
        start = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - start)
    assert bool((rank.pool == 1).all())
    pipe.close()
    process.join(10)
    rank.connector.stop()
    moved, copied = statistics.median(moves[1:]), statistics.median(copies[1:])
    size = rank.pool.nbytes
    return Figure(
        name=f"kv/{connector}-{load.name}",
        value=size / moved / 1e9,
        unit="GB/s",
        ratio=copied / moved,
        reference=f"memory copy {size / copied / 1e9:.2f} GB/s; the first pull {moves[0] * 1e3:.0f} ms",
        machine=platform.processor() or platform.machine(),
    )


def _pull(rank: _Rank, pipe: Connection, name: str) -> float:
    rank.pool.zero_()
    pipe.send(name)
    params = pipe.recv()
    start = time.perf_counter()
    rank.connector.pull(name, params, range(len(rank.pool)))
    while not (results := rank.connector.pulled()):
        time.sleep(0.0001)
    seconds = time.perf_counter() - start
    if (error := results[0].error) is not None:
        raise RuntimeError(error)
    return seconds


def _memory() -> Iterator[Figure]:
    """A simulated rank and its supervisor, after a few requests."""
    measuring("memory of a simulated rank")
    config = {
        "engine": "sim",
        "role": "both",
        "model": {"name": "demo", "source": "sim://"},
        "kv_transfer": {"connector": "nixl"},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "engine.json")
        path.write_text(json.dumps(config))
        command = [
            sys.executable,
            "-m",
            "broadbeam_runtime",
            "serve",
            "--config",
            str(path),
            "--host",
            POD_HOST,
        ]
        pod = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            rank = _ready()
            for _ in range(20):
                _ask()
            yield _resident("memory/sim-rank", rank, RANK_BAR_MB)
            yield _resident("memory/supervisor", pod.pid, SUPERVISOR_BAR_MB)
        finally:
            pod.terminate()
            pod.wait()


def _ready() -> int:
    """The pid of the pod's rank, once it serves."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://{POD_HOST}:{SUPERVISOR_PORT}/readyz", timeout=5) as answer:
                return int(json.load(answer)["ranks"][0]["pid"])
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError("the simulator was not ready within 30 s")


def _ask() -> None:
    body = json.dumps({"model": "demo", "prompt": "the sea " * 50, "max_tokens": 4}).encode()
    with urllib.request.urlopen(f"http://{POD_HOST}:8000/v1/completions", body, timeout=10) as answer:
        answer.read()


def _resident(name: str, pid: int, bar_mb: int) -> Figure:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / MB
    return Figure(name, megabytes, "MB", bar_mb / megabytes, 1.0, f"at most {bar_mb} MB")


def figures() -> Iterator[Figure]:
    """KV transfer by each connector and load, then memory."""
    for connector in ("nixl", "tcp"):
        for load in LOADS:
            yield _transfer(connector, load)
    yield from _memory()


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m broadbeam_runtime.kv.bench",
        description="Measure KV transfer beside a memory copy, and memory.",
    )
    parser.add_argument("--write", action="store_true", help="keep the figures in baselines.jsonl")
    sys.exit(report(figures(), parser.parse_args().write) > 0)


if __name__ == "__main__":
    main()
