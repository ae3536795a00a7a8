"""The decode side of KV transfer: peers, handshakes, heartbeats and reads; see `pull.py`.

A read starts at once, beside the heartbeat that renews its lease; it counts only if that heartbeat was
answered and the lease still ran when the last byte came. So blocks that were freed and used again under a
read are never taken for the prompt's.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import zmq

from broadbeam_runtime.kv.connector import PoolLayout, PullResult
from broadbeam_runtime.kv.pulls import Key, Peer, Pull, target_of
from broadbeam_runtime.kv.side_channel import (
    Alive,
    Caller,
    Done,
    Heartbeat,
    Refused,
    Release,
    SideChannelError,
    Welcome,
    hello,
)
from broadbeam_runtime.kv.transport import TransferError, Transport

HEARTBEAT_S = 5.0  # while requests wait; at most a quarter of the lease
BUSY_HEARTBEAT_S = 1.0  # while blocks are read, to notice a lost peer
# Reads none of which ends for so long, beside the time that their bytes may take, are given up.
STALL_S = 30.0
SLOWEST_BYTES_S = 100e6  # a tenth of what TCP moves on one core


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
        self._peers: dict[Key, Peer] = {}
        self._ending: list[tuple[Any, PullResult]] = []  # abandoned reads that may still write

    @property
    def waiting(self) -> bool:
        return bool(self._ending) or any(peer.pulls for peer in self._peers.values())

    @property
    def reading(self) -> bool:
        """Whether bytes are under way; one that has them all may still wait for its heartbeat's answer."""
        return any(pull.under_way for peer in self._peers.values() for pull in peer.pulls.values())

    def sockets(self) -> list[zmq.Socket[bytes]]:
        return [peer.caller.socket for peer in self._peers.values()]

    def attend(self, now: float) -> None:
        for peer in list(self._peers.values()):
            self._attend(peer, now)
        for ending in list(self._ending):
            if self._transport.abandon(ending[0]):
                self._ending.remove(ending)
                self._pulled.append(ending[1])

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer, "the rank is stopping")

    def expect(self, request_id: str, params: dict[str, Any]) -> None:
        try:
            target = target_of(request_id, params)
            self._peer(target.peer).pulls.setdefault(request_id, Pull(request_id, target))
        except TransferError:
            return  # `pull` will say it

    def pull(self, request_id: str, params: dict[str, Any], local: tuple[int, ...]) -> None:
        try:
            target = target_of(request_id, params)
            peer = self._peer(target.peer)
        except TransferError as error:
            self._pulled.append(PullResult(request_id, 0, 0.0, str(error)))
            return
        pull = peer.pulls.setdefault(request_id, Pull(request_id, target))
        pull.local, pull.started_s = local, time.monotonic()
        if len(target.remote_blocks) != len(local):
            self._end(
                peer, pull, f"{len(target.remote_blocks)} remote blocks do not fit {len(local)} local ones"
            )
        elif peer.welcome is not None:
            self._begin(peer, pull, pull.started_s)

    def cancel(self, request_id: str) -> None:
        for peer in self._peers.values():
            pull = peer.pulls.get(request_id)
            if pull is None or pull.read is not None:
                continue  # a read under way is short: it ends, and is reported, by itself
            self._end(peer, pull, "cancelled")

    def _peer(self, key: Key) -> Peer:
        if (peer := self._peers.get(key)) is None:
            host, port, _ = key
            try:
                caller = Caller(self._context, host, port)
            except SideChannelError as error:
                raise TransferError(f"the prefill rank's address cannot be used: {error}") from error
            now = time.monotonic()
            peer = self._peers[key] = Peer(key, caller, now, heard_s=now)
            peer.caller.send(hello(self._transport.name, self._layout))
        return peer

    def _attend(self, peer: Peer, now: float) -> None:
        for message in peer.caller.receive():
            peer.heard_s = now
            match message:
                case Welcome():
                    self._welcomed(peer, message, now)
                case Refused(reason):
                    self._drop(peer, f"the prefill rank at {peer.at} refused: {reason}")
                    return
                case Alive():
                    self._alive(peer, message)
            if self._peers.get(peer.key) is not peer:
                return
        if (fate := peer.caller.lost()) is not None:
            self._drop(peer, f"the prefill rank at {peer.at} {fate}")
            return
        if (peer.pulls or peer.welcome is None) and (silent_s := peer.silence(now)) > self._peer_timeout_s:
            self._drop(peer, f"no answer from the prefill rank at {peer.at} for {silent_s:.0f} s")
            return
        for pull in list(peer.pulls.values()):
            self._watch(peer, pull, now)
        under_way = sum(self._size(pull) for pull in peer.pulls.values() if pull.under_way)
        if under_way and (still_s := now - peer.moved_s) > STALL_S + under_way / SLOWEST_BYTES_S:
            self._drop(peer, f"no block came from the prefill rank at {peer.at} for {still_s:.0f} s")
            return
        self._beat(peer, now)

    def _welcomed(self, peer: Peer, welcome: Welcome, now: float) -> None:
        if peer.welcome is not None:
            return
        host, _, engine_id = peer.key
        if welcome.engine_id != engine_id:
            restarted = f"restarted: engine {engine_id} is now {welcome.engine_id}"
            self._drop(peer, f"the prefill rank at {peer.at} {restarted}")
            return
        try:
            peer.handle = self._transport.connect(welcome.reach, welcome.blocks, host)
        except TransferError as error:
            self._drop(peer, f"the prefill rank at {peer.at} cannot be reached: {error}")
            return
        peer.welcome = welcome
        for pull in list(peer.pulls.values()):
            if pull.local is not None and pull.request_id in peer.pulls:
                self._begin(peer, pull, now)

    def _begin(self, peer: Peer, pull: Pull, now: float) -> None:
        assert peer.welcome is not None
        assert pull.local is not None
        target = pull.target
        blocks = peer.welcome.blocks
        if blocks and not all(0 <= block < blocks for block in target.remote_blocks):
            self._end(peer, pull, f"a remote block is outside 0..{blocks - 1}")
            return
        self._beat(peer, now, force=True)
        if not any(other.under_way for other in peer.pulls.values()):
            peer.moved_s = now
        try:
            pull.read = self._transport.begin(peer.handle, target.ticket, target.remote_blocks, pull.local)
        except TransferError as error:
            self._begin_anew(peer, pull, f"cannot be read: {error}")

    def _begin_anew(self, peer: Peer, pull: Pull, reason: str) -> None:
        """What is known of this peer may be stale: shake hands again, unless that was just done."""
        reason = f"the prefill rank at {peer.at} {reason}"
        if peer.since_s >= pull.started_s:
            self._end(peer, pull, reason)
            return
        del peer.pulls[pull.request_id]
        self._drop(peer, reason)
        self._peer(peer.key).pulls[pull.request_id] = pull

    def _watch(self, peer: Peer, pull: Pull, now: float) -> None:
        if pull.read is None:
            return
        if not pull.arrived:
            try:
                pull.arrived = self._transport.poll(pull.read)
            except TransferError as error:
                self._end(peer, pull, pull.lost or str(error))
                return
            pull.bytes_read_s = time.monotonic()
            if pull.arrived:
                peer.moved_s = now
        if pull.arrived and pull.lost:
            self._end(peer, pull, pull.lost)
            return
        if not pull.arrived or pull.renewed_s is None:
            return
        assert peer.welcome is not None
        if pull.bytes_read_s > pull.renewed_s + peer.welcome.lease_s:
            self._end(peer, pull, f"the lease of {peer.welcome.lease_s:g} s ended while the blocks were read")
            return
        if not self._transport.notifies:
            peer.caller.send(Done(pull.target.ticket))
        del peer.pulls[pull.request_id]
        self._pulled.append(PullResult(pull.request_id, self._size(pull), pull.bytes_read_s - pull.started_s))

    def _size(self, pull: Pull) -> int:
        return len(pull.local or ()) * self._layout.block_bytes

    def _beat(self, peer: Peer, now: float, force: bool = False) -> None:
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

    def _alive(self, peer: Peer, alive: Alive) -> None:
        if peer.welcome is not None and alive.engine_id != peer.welcome.engine_id:
            self._drop(peer, f"the prefill rank at {peer.at} restarted")
            return
        sent_s, request_ids = peer.sent.pop(alive.number, (0.0, ()))
        gone = set(alive.gone)
        for request_id in request_ids:
            pull = peer.pulls.get(request_id)
            if pull is None:
                continue
            if pull.target.ticket in gone:
                self._lose(peer, pull)
            else:
                pull.renewed_s = sent_s

    def _lose(self, peer: Peer, pull: Pull) -> None:
        """Its lease is gone. A read under way ends first: it is short, and to break it off would break off
        the reads behind it."""
        reason = "their lease has ended or is another reader's"
        pull.lost = f"the prefill rank at {peer.at} no longer holds the blocks: {reason}"
        if pull.read is None or pull.arrived:
            self._end(peer, pull, pull.lost)

    def _end(self, peer: Peer, pull: Pull, error: str) -> None:
        """A pull that failed or was cancelled; it is reported once its local blocks are quiet."""
        del peer.pulls[pull.request_id]
        peer.caller.send(Release(pull.target.ticket))
        if pull.local is None:
            return
        result = PullResult(pull.request_id, 0, time.monotonic() - pull.started_s, error)
        if pull.read is None or self._transport.abandon(pull.read):
            self._pulled.append(result)
        else:
            self._ending.append((pull.read, result))

    def _drop(self, peer: Peer, reason: str) -> None:
        """Forget a peer: its pulls fail, and the next one shakes hands anew."""
        del self._peers[peer.key]
        for pull in list(peer.pulls.values()):
            self._end(peer, pull, reason)
        if peer.welcome is not None:
            self._transport.disconnect(peer.handle)
        peer.caller.close()
