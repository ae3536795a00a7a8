"""What the gateway costs: CPU microseconds per request and per streamed chunk, beside a bare forwarder.

    python -m broadbeam_router.bench [--rounds N] [--save]

Both run at the same time in front of the same engines and are asked in turns, so what else the machine does
hits both alike; medians over the rounds, after one to warm up. CPU time is the process's own, from the
scheduler, in user and kernel. The gateway runs as in production, with API keys and metrics on. Both get the
same bytes over the same number of connections: the head that the openai client sends, bodies of about 2 KB,
and answers with vLLM's head.

`saturated` sends as many requests as will go, the other cases the same number per second to both, well below
what either could take. Saturated, the cheaper of two finds its peers awake, and the kernel's work of waking
them is not charged to it. `new heads` gives every request an id of its own, so that none has a known head.

One JSON line per figure: `ratio` is gateway over forwarder and must not exceed `bar`; --save appends them to
baselines.jsonl.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

KEY = "sk-benchmark-key"
BAR = 2.0
BASELINES = Path(__file__).parent.parent / "baselines.jsonl"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    stream: bool
    requests: int
    concurrency: int
    rate: int = 0  # requests per second in all; 0: as many as will go
    chunks: int = 1  # events of a stream, [DONE] included
    legs: int = 1
    new_heads: bool = False
    bar: float | None = BAR


CASES = (
    Case("whole", stream=False, requests=1500, concurrency=16, rate=500),
    Case("whole, two legs", stream=False, requests=1500, concurrency=16, rate=500, legs=2),
    Case("streaming", stream=True, requests=160, concurrency=16, chunks=101),
    Case("whole, saturated", stream=False, requests=4000, concurrency=16),
    Case(
        "whole, saturated, new heads", stream=False, requests=4000, concurrency=16, new_heads=True, bar=None
    ),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU microseconds."""

    per_request: float
    per_chunk: float


class Target:
    """A process in front of the engines."""

    def __init__(self, stack: ExitStack, arguments: list[str], port: int) -> None:
        self.process = start(stack, arguments, port)
        self.port = port

    def cpu_us(self) -> float:
        return sum(_on_cpu_ns(task) for task in Path(f"/proc/{self.process.pid}/task").iterdir()) / 1e3

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1e3

    def round(self, case: Case) -> Cost:
        """What one run of `case` cost this process."""
        before = self.cpu_us()
        kind = "stream" if case.stream else "new-heads" if case.new_heads else "whole"
        numbers = [str(n) for n in (self.port, case.requests, case.concurrency, case.rate)]
        command = [sys.executable, "-m", "broadbeam_router.bench_load", "clients", *numbers, kind, KEY]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=300).stdout)
        used = self.cpu_us() - before
        return Cost(used / done["requests"], used / max(done["chunks"], 1))


def _on_cpu_ns(task: Path) -> int:
    return int((task / "schedstat").read_text().split()[0])


def start(stack: ExitStack, arguments: list[str], port: int) -> subprocess.Popen[bytes]:
    """Start `python -m …` and wait until it listens on `port`."""
    process = subprocess.Popen([sys.executable, "-m", *arguments])
    stack.callback(process.wait)
    stack.callback(process.terminate)
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise SystemExit(f"{arguments[0]} does not listen on port {port}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def gateway(stack: ExitStack, directory: Path, engines: list[int], case: Case) -> Target:
    (directory / "keys").mkdir()
    (directory / "keys" / "bench").write_text(KEY + "\n")
    rows = [_endpoint("decode", port) for port in engines]
    if case.legs == 2:
        rows += [_endpoint("prefill", port) for port in engines]
    (directory / "endpoints.json").write_text(json.dumps({"endpoints": rows}))
    port, metrics_port = free_port(), free_port()
    config = {
        "cluster": "bench",
        "models": ["m"],
        "endpoints": {"from": "file", "path": str(directory / "endpoints.json")},
        "disaggregated": case.legs == 2,
        "auth": {"keys_dir": str(directory / "keys")},
        "port": port,
        "metrics_port": metrics_port,
    }
    (directory / "gateway.json").write_text(json.dumps(config))
    flags = ["--config", str(directory / "gateway.json"), "--host", "127.0.0.1", "--log-level", "warning"]
    return Target(stack, ["broadbeam_router", *flags], port)


def _endpoint(role: str, port: int) -> dict[str, object]:
    place = {"host": "127.0.0.1", "port": port, "role": role, "pool": role, "group": "0", "revision": "r"}
    return {"name": f"{role}-{port}", **place}


def measure(case: Case, rounds: int) -> list[dict[str, object]]:
    """The figures of one case."""
    with ExitStack() as stack:
        engines = [free_port() for _ in range(2)]
        for port in engines:
            start(stack, ["broadbeam_router.bench_load", "engine", str(port), str(case.chunks - 1)], port)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = free_port()
        floor = Target(
            stack, ["broadbeam_router.bench_forwarder", *map(str, (port, case.legs, *engines))], port
        )
        ours = gateway(stack, directory, engines, case)
        costs: dict[str, list[Cost]] = {"ours": [], "floor": []}
        ours.round(case)  # connections are made and code is warm
        floor.round(case)
        for _ in range(rounds):
            costs["floor"].append(floor.round(case))
            costs["ours"].append(ours.round(case))
        figures = [
            _figure(
                case,
                "request",
                [c.per_request for c in costs["ours"]],
                [c.per_request for c in costs["floor"]],
            )
        ]
        if case.stream:
            per_chunk = [c.per_chunk for c in costs["ours"]], [c.per_chunk for c in costs["floor"]]
            figures.append(_figure(case, "chunk", *per_chunk))
        figures.append(
            {"bench": f"gateway resident memory, {case.name}", "mb": round(ours.resident_mb(), 1), "bar": 80}
        )
        return figures


def _figure(case: Case, unit: str, ours: list[float], floor: list[float]) -> dict[str, object]:
    ours_us, floor_us = statistics.median(ours), statistics.median(floor)
    return {
        "bench": f"gateway CPU per {unit}, {case.name}",
        "us": round(ours_us, 2),
        "forwarder_us": round(floor_us, 2),
        "ratio": round(ours_us / floor_us, 3),
        "bar": case.bar,
        "rounds": len(ours),
    }


def main() -> int:
    parser = argparse.ArgumentParser("python -m broadbeam_router.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--save", action="store_true", help=f"append to {BASELINES.name}")
    flags = parser.parse_args()
    missed = False
    for case in CASES:
        if flags.only is not None and flags.only not in case.name:
            continue
        for figure in measure(case, flags.rounds):
            line = json.dumps(figure)
            print(line, flush=True)
            value = figure.get("ratio", figure.get("mb"))
            missed |= figure["bar"] is not None and float(str(value)) > float(str(figure["bar"]))
            if flags.save:
                with BASELINES.open("a") as file:
                    file.write(line + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
