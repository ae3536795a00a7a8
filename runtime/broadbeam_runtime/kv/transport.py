"""What moves the bytes of a pull; `pull.py` and `readers.py` do the rest: leases, handshakes, time limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.leases import Ticket

if TYPE_CHECKING:
    import torch

# Whether the ticket's reader may read these blocks now.
MayRead = Callable[[Ticket, Sequence[int]], bool]
Wake = Callable[[], None]


# What msgspec raises for bytes that are no message of ours. Ports are open to strangers, and an exception
# on a connector's thread ends the rank.
NONSENSE = (msgspec.MsgspecError, ValueError, RecursionError)


class TransferError(Exception):
    """A read that failed, or a peer that cannot be reached; the message is for an operator."""


class Transport(Protocol):
    """Used by the connector's thread only. No method blocks for long; errors are TransferError."""

    name: str
    notifies: bool  # whether a finished read tells the prefill rank by itself (see `finished`)
    wakes: bool  # whether `wake` is called when a read has ended; otherwise only `poll` finds out

    def start(self, pool: torch.Tensor | None, layout: PoolLayout, may_read: MayRead, wake: Wake) -> bytes:
        """Register the pool (None in the simulator alone); `reach`, which lets other ranks read it. Both
        callbacks may be called from any thread."""

    def connect(self, reach: bytes, blocks: int, host: str) -> Any:
        """A handle of a peer with `blocks` blocks."""

    def begin(self, peer: Any, ticket: Ticket, remote: Sequence[int], local: Sequence[int]) -> Any:
        """Start reading; a handle for `poll`."""

    def poll(self, read: Any) -> bool:
        """True once all bytes are in place."""

    def abandon(self, read: Any) -> bool:
        """Stop a read; whether it has stopped, so that nothing writes to its local blocks any more. If not,
        ask again later."""

    def finished(self) -> list[Ticket]:
        """Reads that other ranks have reported as complete since the last call."""

    def disconnect(self, peer: Any) -> None: ...

    def stop(self) -> None: ...
