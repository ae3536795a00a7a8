"""The decode side of KV transfer: peers, handshakes, heartbeats and reads; see `pull.py`.

A read starts at once, beside the heartbeat that renews its lease; it counts only if that heartbeat was
answered and the lease still ran when the last byte came. So blocks that were freed and used again under a
read are never taken for the prompt's.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import zmq

from broadbeam_runtime.kv.connector import PoolLayout, PullResult
from broadbeam_runtime.kv.leases import Ticket
from broadbeam_runtime.kv.side_channel import Alive, Caller, Done, Heartbeat, Refused, Release, Welcome, hello
from broadbeam_runtime.kv.transport import TransferError, Transport

HEARTBEAT_S = 5.0  # while requests wait; at most a quarter of the lease
BUSY_HEARTBEAT_S = 1.0  # while blocks are read, to notice a lost peer


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a request's blocks are, as `kv_transfer_params` said."""

    engine_id: str
    host: str
    port: int
    ticket: Ticket
    remote_blocks: tuple[int, ...]

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port


def _target(request_id: str, params: dict[str, Any]) -> _Target:
    """TransferError says which field cannot be used. vLLM nests block ids by KV group; there is one here."""
    try:
        blocks = params["remote_block_ids"]
        blocks = blocks[0] if len(blocks) == 1 and isinstance(blocks[0], list) else blocks
        return _Target(
            str(params["remote_engine_id"]),
            str(params["remote_host"]),
            int(params["remote_port"]),
            Ticket(str(params.get("remote_request_id") or request_id), uuid.uuid4().hex[:12]),
            tuple(int(block) for block in blocks),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TransferError(f"kv_transfer_params cannot be used: {type(error).__name__} {error}") from error


@dataclass(slots=True)
class _Pull:
    """A request that waits for, or reads, remote blocks. `local` is None while it only waits."""

    request_id: str
    target: _Target
    local: tuple[int, ...] | None = None
    read: Any = None
    started_s: float = 0.0
    arrived: bool = False  # all bytes are here
    bytes_read_s: float = 0.0
    renewed_s: float | None = None  # when the heartbeat was sent that last renewed its lease


@dataclass(slots=True)
class _Peer:
    """A prefill rank as seen from here."""

    address: tuple[str, int]
    caller: Caller
    since_s: float
    welcome: Welcome | None = None
    handle: Any = None
    pulls: dict[str, _Pull] = field(default_factory=dict)
    heartbeat_s: float = 0.0  # when the last one was sent
    heard_s: float = 0.0
    number: int = 0
    sent: dict[int, tuple[float, tuple[str, ...]]] = field(default_factory=dict)  # heartbeats without answer


class Readers:
    """All pulls of one rank. Used by the connector's thread only; results go to `pulled`."""

    def __init__(
        self,
        transport: Transport,
        layout: PoolLayout,
        context: zmq.Context[zmq.Socket[bytes]],
        pulled: deque[PullResult],
        peer_timeout_s: float,
    ) -> None:
        self._transport = transport
        self._layout = layout
        self._context = context
        self._pulled = pulled
        self._peer_timeout_s = peer_timeout_s
        self._peers: dict[tuple[str, int], _Peer] = {}

    @property
    def waiting(self) -> bool:
        return any(peer.pulls for peer in self._peers.values())

    @property
    def reading(self) -> bool:
        """Whether bytes are under way; one that has them all may still wait for its heartbeat's answer."""
        pulls = (pull for peer in self._peers.values() for pull in peer.pulls.values())
        return any(pull.read is not None and not pull.arrived for pull in pulls)

    def sockets(self) -> list[zmq.Socket[bytes]]:
        return [peer.caller.socket for peer in self._peers.values()]

    def attend(self, now: float) -> None:
        for peer in list(self._peers.values()):
            self._attend(peer, now)

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer, "the rank is stopping")

    def expect(self, request_id: str, params: dict[str, Any]) -> None:
        try:
            target = _target(request_id, params)
        except TransferError:
            return  # `pull` will say it
        self._peer(target.address).pulls.setdefault(request_id, _Pull(request_id, target))

    def pull(self, request_id: str, params: dict[str, Any], local: tuple[int, ...]) -> None:
        try:
            target = _target(request_id, params)
            if len(target.remote_blocks) != len(local):
                raise TransferError(
                    f"{len(target.remote_blocks)} remote blocks do not fit {len(local)} local ones"
                )
        except TransferError as error:
            self._pulled.append(PullResult(request_id, 0, 0.0, str(error)))
            return
        peer = self._peer(target.address)
        pull = peer.pulls.setdefault(request_id, _Pull(request_id, target))
        pull.local, pull.started_s = local, time.monotonic()
        if peer.welcome is not None:
            self._begin(peer, pull, pull.started_s)

    def cancel(self, request_id: str) -> None:
        for peer in self._peers.values():
            pull = peer.pulls.get(request_id)
            if pull is None or pull.read is not None:
                continue  # a read under way is short: it ends, and is reported, by itself
            self._end(peer, pull, "cancelled")

    def _peer(self, address: tuple[str, int]) -> _Peer:
        if (peer := self._peers.get(address)) is None:
            now = time.monotonic()
            peer = self._peers[address] = _Peer(address, Caller(self._context, *address), now, heard_s=now)
            peer.caller.send(hello(self._transport.name, self._layout))
        return peer

    def _attend(self, peer: _Peer, now: float) -> None:
        for message in peer.caller.receive():
            peer.heard_s = now
            match message:
                case Welcome():
                    self._welcomed(peer, message, now)
                case Refused(reason):
                    self._drop(peer, f"the prefill rank at {_at(peer)} refused: {reason}")
                    return
                case Alive():
                    self._alive(peer, message)
            if self._peers.get(peer.address) is not peer:
                return
        if peer.caller.lost():
            self._drop(peer, f"the prefill rank at {_at(peer)} went away")
            return
        if peer.pulls and (silent_s := _silence(peer, now)) > self._peer_timeout_s:
            self._drop(peer, f"no answer from the prefill rank at {_at(peer)} for {silent_s:.0f} s")
            return
        for pull in list(peer.pulls.values()):
            self._watch(peer, pull, now)
        self._beat(peer, now)

    def _welcomed(self, peer: _Peer, welcome: Welcome, now: float) -> None:
        if peer.welcome is not None:
            return
        try:
            peer.handle = self._transport.connect(welcome.reach, welcome.blocks, peer.address[0])
        except TransferError as error:
            self._drop(peer, f"the prefill rank at {_at(peer)} cannot be reached: {error}")
            return
        peer.welcome = welcome
        for pull in list(peer.pulls.values()):
            if pull.local is not None and pull.request_id in peer.pulls:
                self._begin(peer, pull, now)

    def _begin(self, peer: _Peer, pull: _Pull, now: float) -> None:
        assert peer.welcome is not None
        assert pull.local is not None
        target = pull.target
        if peer.welcome.engine_id != target.engine_id:
            found = peer.welcome.engine_id
            self._begin_anew(peer, pull, f"restarted: engine {target.engine_id} is now {found}")
            return
        blocks = peer.welcome.blocks
        if blocks and not all(0 <= block < blocks for block in target.remote_blocks):
            self._end(peer, pull, f"a remote block is outside 0..{blocks - 1}")
            return
        self._beat(peer, now, force=True)
        try:
            pull.read = self._transport.begin(peer.handle, target.ticket, target.remote_blocks, pull.local)
        except TransferError as error:
            self._begin_anew(peer, pull, f"cannot be read: {error}")

    def _begin_anew(self, peer: _Peer, pull: _Pull, reason: str) -> None:
        """What is known of this peer may be stale: shake hands again, unless that was just done."""
        reason = f"the prefill rank at {_at(peer)} {reason}"
        if peer.since_s >= pull.started_s:
            self._end(peer, pull, reason)
            return
        del peer.pulls[pull.request_id]
        self._drop(peer, reason)
        self._peer(peer.address).pulls[pull.request_id] = pull

    def _watch(self, peer: _Peer, pull: _Pull, now: float) -> None:
        if pull.read is None:
            return
        if not pull.arrived:
            try:
                pull.arrived = self._transport.poll(pull.read)
            except TransferError as error:
                self._end(peer, pull, str(error))
                return
            pull.bytes_read_s = time.monotonic()
        if not pull.arrived or pull.renewed_s is None:
            return
        assert peer.welcome is not None
        if pull.bytes_read_s > pull.renewed_s + peer.welcome.lease_s:
            self._end(peer, pull, f"the lease of {peer.welcome.lease_s:g} s ended while the blocks were read")
            return
        if not self._transport.notifies:
            peer.caller.send(Done(pull.target.ticket))
        del peer.pulls[pull.request_id]
        assert pull.local is not None
        size = len(pull.local) * self._layout.block_bytes
        self._pulled.append(PullResult(pull.request_id, size, pull.bytes_read_s - pull.started_s))

    def _beat(self, peer: _Peer, now: float, force: bool = False) -> None:
        """Renew the leases of all that waits or is read here."""
        if peer.welcome is None or not peer.pulls:
            return
        reading = any(pull.read is not None for pull in peer.pulls.values())
        interval_s = min(BUSY_HEARTBEAT_S if reading else HEARTBEAT_S, peer.welcome.lease_s / 4)
        if not force and now - peer.heartbeat_s < interval_s:
            return
        peer.number += 1
        peer.heartbeat_s = now
        peer.sent[peer.number] = (now, tuple(peer.pulls))
        peer.caller.send(Heartbeat(peer.number, [pull.target.ticket for pull in peer.pulls.values()]))

    def _alive(self, peer: _Peer, alive: Alive) -> None:
        if peer.welcome is not None and alive.engine_id != peer.welcome.engine_id:
            self._drop(peer, f"the prefill rank at {_at(peer)} restarted")
            return
        sent_s, request_ids = peer.sent.pop(alive.number, (0.0, ()))
        gone = set(alive.gone)
        for request_id in request_ids:
            pull = peer.pulls.get(request_id)
            if pull is None:
                continue
            if pull.target.ticket in gone:
                reason = "their lease has ended or is another reader's"
                self._end(peer, pull, f"the prefill rank at {_at(peer)} no longer holds the blocks: {reason}")
            else:
                pull.renewed_s = sent_s

    def _end(self, peer: _Peer, pull: _Pull, error: str) -> None:
        """A pull that failed or was cancelled; its local blocks are quiet afterwards."""
        del peer.pulls[pull.request_id]
        if pull.read is not None:
            self._transport.abandon(pull.read)
        if peer.welcome is not None and peer.welcome.engine_id == pull.target.engine_id:
            peer.caller.send(Release(pull.target.ticket))
        if pull.local is not None:
            self._pulled.append(PullResult(pull.request_id, 0, time.monotonic() - pull.started_s, error))

    def _drop(self, peer: _Peer, reason: str) -> None:
        """Forget a peer: its pulls fail, and the next one shakes hands anew."""
        del self._peers[peer.address]
        for pull in list(peer.pulls.values()):
            self._end(peer, pull, reason)
        if peer.welcome is not None:
            self._transport.disconnect(peer.handle)
        peer.caller.close()


def _silence(peer: _Peer, now: float) -> float:
    """Seconds since an unanswered question, or since the last answer if that is later."""
    asked = [peer.since_s] if peer.welcome is None else [sent_s for sent_s, _ in peer.sent.values()]
    return now - max(min(asked), peer.heard_s) if asked else 0.0


def _at(peer: _Peer) -> str:
    return f"{peer.address[0]}:{peer.address[1]}"
