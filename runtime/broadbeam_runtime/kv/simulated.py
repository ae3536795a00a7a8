"""The simulator's transport: the whole protocol of a pull, but the bytes only take their time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.leases import Ticket
from broadbeam_runtime.kv.transport import MayRead, Wake

if TYPE_CHECKING:
    import torch


class SimulatedTransport:
    """Reads end after bytes / `bytes_per_s`. It takes the name of the connector it stands for."""

    notifies, wakes = False, False

    def __init__(self, name: str, bytes_per_s: float) -> None:
        self.name = name
        self._bytes_per_s = bytes_per_s
        self._block_bytes = 0

    def start(self, pool: torch.Tensor | None, layout: PoolLayout, may_read: MayRead, wake: Wake) -> bytes:
        self._block_bytes = layout.block_bytes
        return b""

    def connect(self, reach: bytes, blocks: int, host: str) -> None:
        return None

    def begin(self, peer: None, ticket: Ticket, remote: Sequence[int], local: Sequence[int]) -> float:
        """When the read will have ended."""
        return time.monotonic() + len(local) * self._block_bytes / self._bytes_per_s

    def poll(self, read: float) -> bool:
        return time.monotonic() >= read

    def abandon(self, read: float) -> bool:
        return True

    def finished(self) -> list[Ticket]:
        return []

    def disconnect(self, peer: None) -> None:
        return None

    def stop(self) -> None:
        return None
