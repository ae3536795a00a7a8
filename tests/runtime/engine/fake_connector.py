"""KV transfer inside one process: a decode engine copies straight from a prefill engine's pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from broadbeam_runtime.kv.connector import PoolLayout, PullResult


class FakeConnector:
    """`kv.connector.KVConnector`; connectors that share `wire` reach each other. `fault` fails every pull,
    `stuck` never finishes one."""

    def __init__(
        self, name: str, wire: dict[str, FakeConnector], fault: str | None = None, stuck: bool = False
    ):
        self.name, self.wire, self.fault, self.stuck = name, wire, fault, stuck
        self.wake: Callable[[], None] = lambda: None
        self.held: dict[str, list[int]] = {}
        self.ended_holds: list[tuple[str, bool]] = []
        self.ended_pulls: list[PullResult] = []
        self.expected: list[str] = []
        self.open: set[str] = set()
        wire[name] = self

    def start(self, pool: torch.Tensor, layout: PoolLayout) -> None:
        assert tuple(pool.shape) == (len(pool), layout.block_bytes)
        assert layout.block_bytes == layout.layers * layout.block_size * layout.width * 4
        self.pool = pool

    def hold(self, request_id: str, block_ids: Sequence[int], num_tokens: int) -> dict[str, Any]:
        self.held[request_id] = list(block_ids)
        return {"remote": self.name, "id": request_id, "remote_num_tokens": num_tokens}

    def expire(self, request_id: str) -> None:
        del self.held[request_id]
        self.ended_holds.append((request_id, False))
        self.wake()

    def released(self) -> list[tuple[str, bool]]:
        ended, self.ended_holds = self.ended_holds, []
        return ended

    def release(self, request_id: str) -> None:
        self.expire(request_id)

    def expect(self, request_id: str, params: dict[str, Any]) -> None:
        self.expected.append(request_id)

    def pull(self, request_id: str, params: dict[str, Any], block_ids: Sequence[int]) -> None:
        self.open.add(request_id)
        if self.stuck:
            return
        if self.fault:
            self.finish(request_id, error=self.fault)
            return
        owner = self.wire[params["remote"]]
        theirs = owner.held.pop(params["id"])
        self.pool[list(block_ids)] = owner.pool[theirs]
        owner.ended_holds.append((params["id"], True))
        owner.wake()
        self.finish(request_id, len(theirs) * self.pool.shape[1])

    def finish(self, request_id: str, moved: int = 0, error: str | None = None) -> None:
        self.open.discard(request_id)
        self.ended_pulls.append(PullResult(request_id, moved, 0.001, error))
        self.wake()

    def cancel(self, request_id: str) -> None:
        if request_id in self.open:
            self.finish(request_id, error="cancelled")

    def pulled(self) -> list[PullResult]:
        ended, self.ended_pulls = self.ended_pulls, []
        return ended

    def stop(self) -> None: ...
