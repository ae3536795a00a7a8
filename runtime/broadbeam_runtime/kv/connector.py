"""The seam between the scheduler and KV transfer: a prefill rank holds blocks, a decode rank pulls them.

A block is one contiguous run of bytes in the pool (all layers of `block_size` tokens), so a transfer is a
list of equal-sized reads. Implementations: `nixl.py` (UCX, RDMA) and `tcp.py`; both speak the same
handshake on the side channel and use vLLM's `kv_transfer_params` field names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the simulator's connector runs without torch
    import torch


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """What both sides must agree on before a byte moves; unequal layouts are refused by name."""

    model: str
    dtype: str
    block_size: int  # tokens
    block_bytes: int
    layers: int
    width: int  # elements per token and layer


@dataclass(frozen=True, slots=True)
class PullResult:
    request_id: str
    bytes: int
    seconds: float
    error: str | None = None


class KVConnector(Protocol):
    """Owned and called by the engine thread only; no method blocks for longer than a few microseconds,
    network work happens on the connector's own thread."""

    wake: Callable[
        [], None
    ]  # set by the engine; called, from any thread, when `released` or `pulled` have news

    def start(self, pool: torch.Tensor, layout: PoolLayout) -> None:
        """Register `pool`, (blocks, block_bytes) uint8, and listen on the side channel."""

    def hold(self, request_id: str, block_ids: Sequence[int], num_tokens: int) -> dict[str, Any]:
        """Promise the blocks for the lease; the kv_transfer_params that let a decode rank pull them."""

    def released(self) -> list[tuple[str, bool]]:
        """Requests whose blocks may be freed since the last call: (id, True if pulled, False if expired)."""

    def release(self, request_id: str) -> None:
        """Give up a lease early (the request was aborted)."""

    def expect(self, request_id: str, params: dict[str, Any]) -> None:
        """The request waits here for local blocks: keep its lease alive until `pull` or `cancel`."""

    def pull(self, request_id: str, params: dict[str, Any], block_ids: Sequence[int]) -> None:
        """Start reading the remote blocks into the local `block_ids` (same count and order)."""

    def cancel(self, request_id: str) -> None:
        """Stop caring about a pull; its local blocks stay in use until it is reported by `pulled`."""

    def pulled(self) -> list[PullResult]:
        """Pulls that ended since the last call."""

    def stop(self) -> None: ...
