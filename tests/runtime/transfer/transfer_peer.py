"""A process with a KV pool and a connector, told what to do over a pipe."""

from __future__ import annotations

import os
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from broadbeam_crds.engine_config import EngineConfig, KVTransferConfig, ModelConfig
from broadbeam_runtime.kv import connectors
from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.nixl import environment

PEER_TIMEOUT_S = 3.0


def main(
    pipe: Connection, connector: str, host: str, blocks: int, block_bytes: int, lease_s: float, model: str
) -> None:
    os.environ.update(environment(host))
    config = EngineConfig(
        engine="broadbeam",
        role="both",
        model=ModelConfig(name=model, source="none"),
        kv_transfer=KVTransferConfig(connector=connector, lease_s=lease_s),  # type: ignore[arg-type]
    )
    torch.set_num_threads(1)
    threading.excepthook = lambda args: os._exit(1)  # as a rank ends by it
    pool = torch.zeros(blocks, block_bytes, dtype=torch.uint8)
    peer = connectors.create(config, host, 5600, PEER_TIMEOUT_S)
    assert peer is not None
    peer.start(pool, PoolLayout(model, "uint8", 16, block_bytes, 1, block_bytes // 16))
    while True:
        try:
            op, arguments = pipe.recv()
        except EOFError:
            peer.stop()
            return
        pipe.send(_do(peer, pool, op, arguments))


def _do(peer: connectors.PullConnector, pool: torch.Tensor, op: str, given: dict[str, Any]) -> Any:
    match op:
        case "fill":
            generator = torch.Generator().manual_seed(given["seed"])
            pool.copy_(torch.randint(0, 256, pool.shape, dtype=torch.uint8, generator=generator))
            return None
        case "hold":
            return peer.hold(given["id"], given["blocks"], 16 * len(given["blocks"]))
        case "release":
            return peer.release(given["id"])
        case "expect":
            return peer.expect(given["id"], given["params"])
        case "pull":
            return peer.pull(given["id"], given["params"], given["blocks"])
        case "cancel":
            return peer.cancel(given["id"])
        case "bytes":
            return pool[given["blocks"]].numpy().tobytes()
        case "released":
            return _wait(peer.released, given["within_s"])
        case "pulled":
            results = _wait(peer.pulled, given["within_s"])
            return [{"id": item.request_id, "bytes": item.bytes, "error": item.error} for item in results]
    raise ValueError(op)


def _wait(ask: Any, within_s: float) -> list[Any]:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if found := ask():
            return list(found)
        time.sleep(0.002)
    return []
