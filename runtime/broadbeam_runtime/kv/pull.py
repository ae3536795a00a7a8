"""The KVConnector behind every transport: one thread that holds leases and pulls blocks."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import zmq

from broadbeam_runtime.kv.connector import PoolLayout, PullResult
from broadbeam_runtime.kv.leases import Leases, Ticket
from broadbeam_runtime.kv.readers import Readers
from broadbeam_runtime.kv.side_channel import (
    Alive,
    Done,
    Heartbeat,
    Hello,
    Listener,
    Refused,
    Release,
    ToPrefill,
    Welcome,
    mismatch,
)
from broadbeam_runtime.kv.transport import Transport

if TYPE_CHECKING:
    import torch

PEER_TIMEOUT_S = 10.0  # a peer that answers nothing for so long is lost
IDLE_POLL_S = 1.0
WAITING_POLL_S = 0.1  # requests wait here: heartbeats and time limits fall due
# Somebody reads from here: notifications of finished reads wake no socket, and some transports need this
# side's help. A reader's heartbeat comes before either.
SERVING_POLL_S = 0.001
SERVING_S = 1.5  # after a heartbeat: a reader whose lease has ended reads on until it hears of it
READING_POLL_S = 0.0002


class PullConnector:
    """`kv.connector.KVConnector` over one Transport; calls `wake` when `released` or `pulled` have news."""

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
        self._heartbeat_s = float("-inf")  # when the last one came
        self._released: deque[tuple[str, bool]] = deque()
        self._pulled: deque[PullResult] = deque()
        self._commands: deque[Callable[[], None]] = deque()
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
        self._reach = self._transport.start(pool, layout, self._may_read, self._interrupt)
        self._readers = Readers(self._transport, layout, self._context, self._pulled, self._peer_timeout_s)
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
        self._command(lambda: self._readers.expect(request_id, params))

    def pull(self, request_id: str, params: dict[str, Any], block_ids: Sequence[int]) -> None:
        local = tuple(block_ids)
        self._command(lambda: self._readers.pull(request_id, params, local))

    def cancel(self, request_id: str) -> None:
        self._command(lambda: self._readers.cancel(request_id))

    def pulled(self) -> list[PullResult]:
        return _drain(self._pulled)

    def stop(self) -> None:
        self._stopping = True
        self._interrupt()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._interrupt()

    def _interrupt(self) -> None:
        """End the thread's wait."""
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            return  # it will wake anyway

    # --- the connector's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wait()
                # What a peer says may rest on a `hold` whose command is younger than the last look: so the
                # messages are taken first, and the commands are carried out before they are answered.
                messages = self._listener.receive()
                while self._commands:
                    self._commands.popleft()()
                now = time.monotonic()
                self._answer(messages, now)
                self._readers.attend(now)
                self._end_leases(now)
                if self._released or self._pulled:
                    self.wake()
        finally:
            self._close()

    def _close(self) -> None:
        self._readers.close()
        self._transport.stop()
        self._listener.close()
        self._context.destroy(linger=0)

    def _wait(self) -> None:
        if self._readers.reading and not self._transport.wakes:
            timeout_s = READING_POLL_S
        elif self._transport.notifies and (self._leases.being_read or self._heard_lately()):
            timeout_s = SERVING_POLL_S
        else:
            timeout_s = self._until_next_event()
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        poller.register(self._listener.socket, zmq.POLLIN)
        for socket in self._readers.sockets():
            poller.register(socket, zmq.POLLIN)
        if timeout_s < 0.001:  # ZeroMQ counts whole milliseconds
            if not poller.poll(0):
                time.sleep(timeout_s)
        else:
            poller.poll(round(timeout_s * 1000))
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return

    def _heard_lately(self) -> bool:
        return time.monotonic() < self._heartbeat_s + SERVING_S

    def _until_next_event(self) -> float:
        limit = WAITING_POLL_S if self._readers.waiting else IDLE_POLL_S
        expiry = self._leases.next_expiry()
        return limit if expiry is None else min(limit, max(0.001, expiry - time.monotonic()))

    # --- prefill side

    def _may_read(self, ticket: Ticket, block_ids: Sequence[int]) -> bool:
        """From a transport's thread; False also when this connector has stopped."""
        answer: Future[bool] = Future()

        def command() -> None:
            held = self._leases.blocks(ticket)
            answer.set_result(held is not None and set(block_ids) <= set(held))

        self._command(command)
        try:
            return answer.result(self._peer_timeout_s)
        except TimeoutError:
            return False

    def _answer(self, messages: list[tuple[bytes, ToPrefill]], now: float) -> None:
        for sender, message in messages:
            match message:
                case Hello():
                    reason = mismatch(self._layout, self._transport.name, message)
                    welcome = Welcome(self.engine_id, self._lease_s, self._blocks, self._reach)
                    self._listener.send(sender, Refused(reason) if reason else welcome)
                case Heartbeat(number, tickets):
                    self._heartbeat_s = now
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


def _drain(queue: deque[Any]) -> list[Any]:
    items: list[Any] = []
    while queue:
        items.append(queue.popleft())
    return items
