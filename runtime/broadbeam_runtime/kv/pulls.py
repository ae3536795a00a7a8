"""What a decode rank knows of its pulls and of the prefill ranks that it reads from; see `readers.py`."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from broadbeam_runtime.kv.leases import Ticket
from broadbeam_runtime.kv.side_channel import Caller, Welcome
from broadbeam_runtime.kv.transport import TransferError

Key = tuple[str, int, str]  # host, port, engine id: an engine that was restarted is another peer


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request's blocks are, as `kv_transfer_params` said."""

    engine_id: str
    host: str
    port: int
    ticket: Ticket
    remote_blocks: tuple[int, ...]

    @property
    def peer(self) -> Key:
        return self.host, self.port, self.engine_id


def target_of(request_id: str, params: dict[str, Any]) -> Target:
    """TransferError says which field cannot be used. vLLM nests block ids by KV group; there is one here."""
    try:
        blocks = params["remote_block_ids"]
        blocks = blocks[0] if len(blocks) == 1 and isinstance(blocks[0], list) else blocks
        return Target(
            str(params["remote_engine_id"]),
            str(params["remote_host"]),
            int(params["remote_port"]),
            Ticket(str(params.get("remote_request_id") or request_id), uuid.uuid4().hex[:12]),
            tuple(int(block) for block in blocks),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TransferError(f"kv_transfer_params cannot be used: {type(error).__name__} {error}") from error


@dataclass(slots=True)
class Pull:
    """A request that waits for, or reads, remote blocks. `local` is None while it only waits."""

    request_id: str
    target: Target
    local: tuple[int, ...] | None = None
    read: Any = None
    started_s: float = 0.0
    arrived: bool = False  # all bytes are here
    bytes_read_s: float = 0.0
    renewed_s: float | None = None  # when the heartbeat was sent that last renewed its lease
    lost: str | None = None  # why what arrives is worth nothing

    @property
    def under_way(self) -> bool:
        """Whether bytes still have to come."""
        return self.read is not None and not self.arrived


@dataclass(slots=True)
class Peer:
    """A prefill rank as seen from here."""

    key: Key
    caller: Caller
    since_s: float
    welcome: Welcome | None = None
    handle: Any = None
    pulls: dict[str, Pull] = field(default_factory=dict)
    heartbeat_s: float = 0.0  # when the last one was sent
    heard_s: float = 0.0
    moved_s: float = 0.0  # when a read last ended, or began where none was under way
    number: int = 0
    sent: dict[int, tuple[float, tuple[str, ...]]] = field(default_factory=dict)  # heartbeats without answer

    @property
    def at(self) -> str:
        host, port, _ = self.key
        return f"{host}:{port}"

    def silence(self, now: float) -> float:
        """Seconds since an unanswered question, or since the last answer if that is later."""
        asked = [self.since_s] if self.welcome is None else [sent_s for sent_s, _ in self.sent.values()]
        return now - max(min(asked), self.heard_s) if asked else 0.0
