"""One rank of a group as a process: commands come as JSON lines on stdin, answers go to stdout.

{"start": {"model": DIR, "port": N, "scheduling": {…}, "device": "cpu" or "cuda"}}   -> {"ready": true}
{"run": {"id": [prompt, count], …}}                       -> {"id": [token, …], …}
{"cpu": SECONDS}   -> {"cpu": CPU seconds spent while nothing was asked for that long, "dummy_steps": N}
{"stop": true}     -> {"stopped": true}
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from tests.runtime.engine.conftest import Served, config, greedy

from broadbeam_runtime.core import RankIdentity
from broadbeam_runtime.engine import TorchEngine


def main(rank: int, world: int, host: str) -> None:
    torch.set_num_threads(1)
    served: Served | None = None
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        if start := command.get("start"):
            served = Served(_engine(start, RankIdentity(rank, rank, world, host, host)))
            answer: dict[str, Any] = {"ready": True}
        elif served is None:
            raise SystemExit("not started")
        elif requests := command.get("run"):
            answer = _run(served, requests)
        elif seconds := command.get("cpu"):
            before, dummies = time.process_time(), served.engine.stats().dummy_steps
            time.sleep(seconds)
            dummies = served.engine.stats().dummy_steps - dummies
            answer = {"cpu": time.process_time() - before, "dummy_steps": dummies}
        else:
            served.engine.stop()
            answer = {"stopped": not served.engine.thread or not served.engine.thread.is_alive()}
            served.engine.scheduler.check_integrity()
        print(json.dumps(answer), flush=True)


def _run(served: Served, requests: dict[str, Any]) -> dict[str, Any]:
    try:
        served.run(*(greedy(name, tuple(prompt), count) for name, (prompt, count) in requests.items()))
    except AssertionError:
        # The engine first answers what it lost, then ends this process with a status of its own.
        assert served.engine.thread
        served.engine.thread.join(10)
        raise
    return {name: served.tokens(name) for name in requests}


def _engine(start: dict[str, Any], identity: RankIdentity) -> TorchEngine:
    directory = Path(start["model"])
    made = config(directory, start.get("scheduling"), memory_bytes=32 << 20)
    parallel = {"data": identity.world, "ranks_per_node": identity.world, "coordinator_port": start["port"]}
    made = replace(
        made, parallel=type(made.parallel)(**parallel), threads=1, device=start.get("device", "cpu")
    )
    return TorchEngine(made, rank=identity, model_dir=directory)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
