"""The KV side channel: msgpack over ZeroMQ between a decode rank (DEALER) and a prefill rank (ROUTER).

A decode rank says Hello with the layout of its pool; the prefill rank answers Welcome with what is needed
to read its blocks, or Refused naming the field that differs. Heartbeats keep leases alive while a request
waits or is read; Done and Release end them.
"""

from __future__ import annotations

from dataclasses import asdict, fields

import msgspec
import zmq
import zmq.utils.monitor

from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.leases import Ticket
from broadbeam_runtime.kv.transport import NONSENSE

VERSION = 1
MAX_MESSAGE_BYTES = 16 * 2**20
MOST_REFUSALS = 5  # in a row, a tenth of a second apart: the peer answered the gateway a moment ago


class SideChannelError(RuntimeError):
    """The side channel cannot listen, or an address cannot be called."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    version: int
    connector: str
    layout: dict[str, str | int]


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """`engine_id` is fresh for every process; `reach` is the transport's own: an agent's metadata, a port."""

    engine_id: str
    lease_s: float
    blocks: int
    reach: bytes


class Refused(msgspec.Struct, frozen=True, tag=True):
    reason: str


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Keep these leases. `number` comes back in the answer."""

    number: int
    tickets: list[Ticket]


class Alive(msgspec.Struct, frozen=True, tag=True):
    """`gone` are those whose blocks are no longer held, or are held for another reader."""

    number: int
    engine_id: str
    gone: list[Ticket]


class Done(msgspec.Struct, frozen=True, tag=True):
    """All blocks were read (transports whose reads carry no notification)."""

    ticket: Ticket


class Release(msgspec.Struct, frozen=True, tag=True):
    """The decode rank gave up; the blocks may be freed."""

    ticket: Ticket


ToPrefill = Hello | Heartbeat | Done | Release
ToDecode = Welcome | Refused | Alive


def hello(connector: str, layout: PoolLayout) -> Hello:
    return Hello(VERSION, connector, asdict(layout))


def mismatch(ours: PoolLayout, connector: str, theirs: Hello) -> str | None:
    """Why these ranks must not exchange blocks: the first unequal field and both values; None if they may."""
    if theirs.version != VERSION:
        return f"side channel version: prefill rank has {VERSION}, decode rank {theirs.version}"
    if theirs.connector != connector:
        return f"connector: prefill rank has {connector}, decode rank {theirs.connector}"
    for field in fields(ours):
        here, there = getattr(ours, field.name), theirs.layout.get(field.name)
        if here != there:
            return f"{field.name}: prefill rank has {here}, decode rank {there}"
    return None


class Listener:
    """The prefill side's socket. Used by one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, port: int) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.maxmsgsize = MAX_MESSAGE_BYTES
        self.socket.ipv6 = ":" in host
        try:
            self.socket.bind(endpoint(host, port))
        except zmq.ZMQError as error:
            self.socket.close()
            raise SideChannelError(
                f"cannot listen for KV transfer on {host}:{port}: {error.strerror}"
            ) from error

    def receive(self) -> list[tuple[bytes, ToPrefill]]:
        """Every waiting message with its sender; what cannot be understood is dropped."""
        messages: list[tuple[bytes, ToPrefill]] = []
        while True:
            try:
                sender, body = self.socket.recv_multipart(zmq.NOBLOCK)
                messages.append((sender, msgspec.msgpack.decode(body, type=ToPrefill)))
            except zmq.Again:
                return messages
            except NONSENSE:
                continue

    def send(self, to: bytes, message: ToDecode) -> None:
        try:
            self.socket.send_multipart([to, msgspec.msgpack.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return  # that decode rank is gone

    def close(self) -> None:
        self.socket.close()


class Caller:
    """The decode side's socket to one prefill rank. Used by one thread.

    `lost` says so as soon as the kernel reports the connection closed, or refused again and again: long
    before an answer is missed.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, port: int) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.maxmsgsize = MAX_MESSAGE_BYTES
        self.socket.ipv6 = ":" in host
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
        self._closed, self._refusals = False, 0
        try:
            self.socket.connect(endpoint(host, port))
        except zmq.ZMQError as error:
            self.close()
            raise SideChannelError(f"{host!r}, port {port}: {error.strerror}") from error

    def send(self, message: ToPrefill) -> None:
        try:
            self.socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return  # the queue of a dead peer is full

    def receive(self) -> list[ToDecode]:
        messages: list[ToDecode] = []
        while True:
            try:
                messages.append(msgspec.msgpack.decode(self.socket.recv(zmq.NOBLOCK), type=ToDecode))
            except zmq.Again:
                return messages
            except NONSENSE:
                continue

    def lost(self) -> str | None:
        """What became of the peer, if it can no longer be expected to answer."""
        while self._monitor.poll(0):
            closed = zmq.utils.monitor.recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED
            self._closed |= closed
            self._refusals += not closed
        if self._closed:
            return "went away"
        return "cannot be reached" if self._refusals >= MOST_REFUSALS else None

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()


def endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
