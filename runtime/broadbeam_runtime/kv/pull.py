"""The KVConnector behind every transport: one thread that holds leases, shakes hands and watches reads.

A read starts at once, beside the heartbeat that renews its lease; it counts only if that heartbeat was
answered and the lease still ran when the last byte came. So blocks that were freed and used again under a
read are never taken for the prompt's.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import zmq

from broadbeam_runtime.kv.connector import PoolLayout, PullResult
from broadbeam_runtime.kv.leases import Leases, Ticket
from broadbeam_runtime.kv.side_channel import (
    Alive,
    Caller,
    Done,
    Heartbeat,
    Hello,
    Listener,
    Refused,
    Release,
    Welcome,
    hello,
    mismatch,
)
from broadbeam_runtime.kv.transport import TransferError, Transport

if TYPE_CHECKING:
    import torch

HEARTBEAT_S = 5.0  # while requests wait
BUSY_HEARTBEAT_S = 1.0  # while blocks are read, to notice a lost peer
PEER_TIMEOUT_S = 10.0  # a peer that answers nothing for so long is lost
IDLE_POLL_S = 1.0
HOLDING_POLL_S = 0.002  # notifications of finished reads wake no socket
READING_POLL_S = 0.0002


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


class PullConnector:
    """`kv.connector.KVConnector` over one Transport. `wake` is called when `released` or `pulled` have news."""

    def __init__(
        self,
        transport: Transport,
        host: str,
        port: int,
        lease_s: float,
        wake: Callable[[], None] = lambda: None,
        peer_timeout_s: float = PEER_TIMEOUT_S,
    ) -> None:
        self.wake = wake
        self.engine_id = uuid.uuid4().hex
        self._transport = transport
        self._host, self._port = host, port
        self._lease_s = lease_s
        self._peer_timeout_s = peer_timeout_s
        self._leases = Leases(lease_s)
        self._released: deque[tuple[str, bool]] = deque()
        self._pulled: deque[PullResult] = deque()
        self._commands: deque[Callable[[], None]] = deque()
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._stopping = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._thread: threading.Thread | None = None

    # --- KVConnector, the engine thread

    def start(self, pool: torch.Tensor | None, layout: PoolLayout) -> None:
        self._layout = layout
        self._blocks = len(pool) if pool is not None else 0
        self._listener = Listener(self._context, self._host, self._port)
        self._reach = self._transport.start(pool, layout, self._may_read)
        self._thread = threading.Thread(target=self._run, name=f"kv-{self._transport.name}", daemon=True)
        self._thread.start()

    def hold(self, request_id: str, block_ids: Sequence[int], num_tokens: int) -> dict[str, Any]:
        blocks = tuple(block_ids)
        self._command(lambda: self._leases.hold(request_id, blocks, time.monotonic()))
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_request_id": request_id,
            "remote_host": self._host,
            "remote_port": self._port,
            "remote_block_ids": list(blocks),
            "remote_num_tokens": num_tokens,
            "remote_blocks_expiry_time": time.time() + self._lease_s,
            "tp_size": 1,
            "transfer_mode": "pull",
        }

    def released(self) -> list[tuple[str, bool]]:
        return _drain(self._released)

    def release(self, request_id: str) -> None:
        def command() -> None:
            if self._leases.revoke(request_id):
                self._released.append((request_id, False))

        self._command(command)

    def expect(self, request_id: str, params: dict[str, Any]) -> None:
        self._command(lambda: self._expect(request_id, params))

    def pull(self, request_id: str, params: dict[str, Any], block_ids: Sequence[int]) -> None:
        local = tuple(block_ids)
        self._command(lambda: self._pull(request_id, params, local))

    def cancel(self, request_id: str) -> None:
        self._command(lambda: self._cancel(request_id))

    def pulled(self) -> list[PullResult]:
        return _drain(self._pulled)

    def stop(self) -> None:
        self._stopping = True
        self._command(lambda: None)
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            return  # it will wake anyway

    # --- the connector's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wait()
                while self._commands:
                    self._commands.popleft()()
                now = time.monotonic()
                self._answer(now)
                for peer in list(self._peers.values()):
                    self._attend(peer, now)
                self._end_leases(now)
                if self._released or self._pulled:
                    self.wake()
        finally:
            self._close()

    def _close(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer, "the rank is stopping")
        self._transport.stop()
        self._listener.close()
        self._context.destroy(linger=0)

    def _wait(self) -> None:
        reading = any(pull.read is not None for peer in self._peers.values() for pull in peer.pulls.values())
        if reading:
            timeout_s = READING_POLL_S
        elif len(self._leases) and self._transport.notifies:
            timeout_s = HOLDING_POLL_S
        else:
            timeout_s = self._until_next_event()
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        poller.register(self._listener.socket, zmq.POLLIN)
        for peer in self._peers.values():
            poller.register(peer.caller.socket, zmq.POLLIN)
        if timeout_s < 0.001:  # ZeroMQ counts whole milliseconds
            if not poller.poll(0):
                time.sleep(timeout_s)
        else:
            poller.poll(timeout_s * 1000)
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return

    def _until_next_event(self) -> float:
        busy = any(peer.pulls for peer in self._peers.values())
        limit = 0.1 if busy else IDLE_POLL_S
        expiry = self._leases.next_expiry()
        return limit if expiry is None else min(limit, max(0.001, expiry - time.monotonic()))

    # --- prefill side

    def _may_read(self, ticket: Ticket, block_ids: Sequence[int]) -> bool:
        held = self._leases.blocks(ticket)
        return held is not None and set(block_ids) <= set(held)

    def _answer(self, now: float) -> None:
        for sender, message in self._listener.receive():
            match message:
                case Hello():
                    reason = mismatch(self._layout, self._transport.name, message)
                    welcome = Welcome(self.engine_id, self._lease_s, self._blocks, self._reach)
                    self._listener.send(sender, Refused(reason) if reason else welcome)
                case Heartbeat(number, tickets):
                    gone = self._leases.renew(tickets, now)
                    self._listener.send(sender, Alive(number, self.engine_id, gone))
                case Done(ticket):
                    self._finish(ticket)
                case Release(ticket):
                    if self._leases.released(ticket):
                        self._released.append((ticket.request_id, False))

    def _finish(self, ticket: Ticket) -> None:
        if self._leases.pulled(ticket):
            self._released.append((ticket.request_id, True))

    def _end_leases(self, now: float) -> None:
        for ticket in self._transport.finished():
            self._finish(ticket)
        for request_id in self._leases.expire(now):
            self._released.append((request_id, False))

    # --- decode side: commands

    def _expect(self, request_id: str, params: dict[str, Any]) -> None:
        try:
            target = _target(request_id, params)
        except TransferError:
            return  # `pull` will say it
        self._peer(target.address).pulls.setdefault(request_id, _Pull(request_id, target))

    def _pull(self, request_id: str, params: dict[str, Any], local: tuple[int, ...]) -> None:
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

    def _cancel(self, request_id: str) -> None:
        for peer in self._peers.values():
            pull = peer.pulls.get(request_id)
            if pull is None or pull.read is not None:
                continue  # a read under way is short: it ends, and is reported, by itself
            self._end(peer, pull, "cancelled")

    # --- decode side: peers

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
            if pull.local is not None:
                self._begin(peer, pull, now)

    def _begin(self, peer: _Peer, pull: _Pull, now: float) -> None:
        assert peer.welcome is not None
        assert pull.local is not None
        target = pull.target
        if peer.welcome.engine_id != target.engine_id:
            self._other_engine(peer, pull)
            return
        if (
            any(not 0 <= block < peer.welcome.blocks for block in target.remote_blocks)
            and peer.welcome.blocks
        ):
            self._end(peer, pull, f"a remote block is outside 0..{peer.welcome.blocks - 1}")
            return
        self._beat(peer, now, force=True)
        try:
            pull.read = self._transport.begin(peer.handle, target.ticket, target.remote_blocks, pull.local)
        except TransferError as error:
            self._end(peer, pull, str(error))

    def _other_engine(self, peer: _Peer, pull: _Pull) -> None:
        """The rank at this address is not the one that holds the blocks: ask again, unless that was just done."""
        assert peer.welcome is not None
        if peer.since_s >= pull.started_s:
            wanted, found = pull.target.engine_id, peer.welcome.engine_id
            self._end(
                peer, pull, f"the prefill rank at {_at(peer)} restarted: engine {wanted} is now {found}"
            )
            return
        del peer.pulls[pull.request_id]
        self._drop(peer, f"the prefill rank at {_at(peer)} restarted")
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
                self._end(
                    peer,
                    pull,
                    f"the prefill rank at {_at(peer)} no longer holds the blocks: their lease has ended or is another reader's",
                )
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


def _drain(queue: deque[Any]) -> list[Any]:
    items: list[Any] = []
    while queue:
        items.append(queue.popleft())
    return items
