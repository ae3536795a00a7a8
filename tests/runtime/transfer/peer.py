"""A process with a KV pool and a connector, told what to do by JSON lines on its standard input."""

from __future__ import annotations

import json
import os
import sys
import time

import torch

from broadbeam_crds.engine_config import EngineConfig, KVTransferConfig, ModelConfig
from broadbeam_runtime.kv import connectors
from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.nixl import environment


def main(connector: str, host: str, blocks: int, block_bytes: int, lease_s: float, model: str) -> None:
    os.environ.update(environment(host))
    config = EngineConfig(
        engine="broadbeam",
        role="both",
        model=ModelConfig(name=model, source="none"),
        kv_transfer=KVTransferConfig(connector=connector, lease_s=lease_s),  # type: ignore[arg-type]
    )
    torch.set_num_threads(1)
    pool = torch.zeros(blocks, block_bytes, dtype=torch.uint8)
    peer = connectors.create(config, host, 5600)
    assert peer is not None
    peer.start(pool, PoolLayout(model, "uint8", 16, block_bytes, 1, block_bytes // 16))
    print(json.dumps({"engine_id": peer.engine_id}), flush=True)
    for line in sys.stdin:
        match json.loads(line):
            case {"op": "fill", "seed": seed}:
                generator = torch.Generator().manual_seed(seed)
                pool.copy_(torch.randint(0, 256, pool.shape, dtype=torch.uint8, generator=generator))
                answer: object = None
            case {"op": "hold", "id": name, "blocks": ids}:
                answer = peer.hold(name, ids, 16 * len(ids))
            case {"op": "release", "id": name}:
                answer = peer.release(name)
            case {"op": "expect", "id": name, "params": params}:
                answer = peer.expect(name, params)
            case {"op": "pull", "id": name, "params": params, "blocks": ids}:
                answer = peer.pull(name, params, ids)
            case {"op": "cancel", "id": name}:
                answer = peer.cancel(name)
            case {"op": "bytes", "blocks": ids}:
                answer = pool[ids].numpy().tobytes().hex()
            case {"op": "released" | "pulled" as what, "within_s": within_s}:
                answer = _wait(peer, what, within_s)
            case {"op": "stop"}:
                peer.stop()
                return
            case other:
                raise ValueError(other)
        print(json.dumps(answer), flush=True)


def _wait(peer: connectors.PullConnector, what: str, within_s: float) -> list[object]:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if what == "released" and (released := peer.released()):
            return list(released)
        if what == "pulled" and (pulled := peer.pulled()):
            return [{"id": r.request_id, "bytes": r.bytes, "error": r.error} for r in pulled]
        time.sleep(0.002)
    return []


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), sys.argv[6])
