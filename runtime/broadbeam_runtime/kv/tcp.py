"""KV transfer over plain TCP sockets: no RDMA, no plugins; chosen explicitly (`connector: tcp`).

A decode rank keeps one connection to each prefill rank, asks for blocks by index and receives them into
its pool; neither side copies in Python. Pools in device memory are staged through host memory.
"""

from __future__ import annotations

import contextlib
import ipaddress
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.leases import Ticket
from broadbeam_runtime.kv.transport import NONSENSE, MayRead, TransferError, Wake
from broadbeam_runtime.settings import family

if TYPE_CHECKING:
    import torch

_LENGTH = struct.Struct("<I")
_ACCEPTED, _REFUSED = b"\x01", b"\x00"
CONNECT_TIMEOUT_S = 5.0
STALL_S = 15.0  # a read whose bytes stop for so long has failed
BUFFER_BYTES = 4 * 2**20
WAKE_BYTES = 2**20
MAX_RUNS = 512  # buffers in one call; Linux takes 1024
MAX_REQUEST_BYTES = 16 * 2**20


class Ask(msgspec.Struct, frozen=True, array_like=True):
    ticket: Ticket
    block_ids: list[int]


class Pool:
    """Blocks as memoryviews; a pool in device memory goes through a host copy of the blocks named."""

    def __init__(self, pool: torch.Tensor, block_bytes: int) -> None:
        self._pool = pool
        self._block_bytes = block_bytes
        self._view = pool.view(-1).numpy().data.cast("B") if pool.device.type == "cpu" else None

    def runs(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The blocks in order, neighbours joined, to be read."""
        if self._view is None:
            return [self._pool[list(block_ids)].cpu().view(-1).numpy().data.cast("B")]
        return self._slices(self._view, block_ids)

    def _slices(self, view: memoryview, block_ids: Sequence[int]) -> list[memoryview]:
        size = self._block_bytes
        return [view[first * size : (last + 1) * size] for first, last in joined(block_ids)]

    def receive(self, sock: socket.socket, block_ids: Sequence[int]) -> None:
        """Fill the blocks in order from `sock`; EOFError when it ends early, TimeoutError when it stalls."""
        if self._view is not None:
            receive_all(sock, self._slices(self._view, block_ids), STALL_S)
            return
        import torch

        host = torch.empty(len(block_ids), self._block_bytes, dtype=torch.uint8)
        receive_all(sock, [host.view(-1).numpy().data.cast("B")], STALL_S)
        self._pool[list(block_ids)] = host.to(self._pool.device)


def joined(block_ids: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive ids, in order."""
    runs: list[tuple[int, int]] = []
    for block in block_ids:
        if runs and runs[-1][1] + 1 == block:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return runs


def receive_all(sock: socket.socket, buffers: Sequence[memoryview], stall_s: float | None = None) -> None:
    """Fill every buffer in order; EOFError when the stream ends early, TimeoutError when nothing comes.

    The kernel wakes the reader only once WAKE_BYTES wait, or all that is left: woken for each packet, it
    takes nearly twice the CPU time per byte (loopback, 64 MiB). It has to wait in `poll`, as a `recv` that
    has taken some bytes would still wait for as many as the mark says.
    """
    readable = select.poll()
    readable.register(sock, select.POLLIN)
    waiting, left, mark = deque(buffers), sum(map(len, buffers)), 1
    while left:
        if mark != (mark := min(WAKE_BYTES, left)):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
        if not readable.poll(None if stall_s is None else round(stall_s * 1000)):
            raise TimeoutError(f"nothing came for {stall_s:g} s")
        count = sock.recvmsg_into(list(islice(waiting, MAX_RUNS)), 0, socket.MSG_DONTWAIT)[0]
        if not count:
            raise EOFError
        left -= count
        _drop(waiting, count)
    if mark != 1:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def send_all(sock: socket.socket, buffers: Sequence[memoryview]) -> None:
    """Every buffer in order, in as few calls as the kernel takes."""
    waiting = deque(buffers)
    while waiting:
        _drop(waiting, sock.sendmsg(list(islice(waiting, MAX_RUNS))))


def _drop(waiting: deque[memoryview], count: int) -> None:
    """Take off the first `count` bytes."""
    while waiting and count >= len(waiting[0]):
        count -= len(waiting.popleft())
    if count:
        waiting[0] = waiting[0][count:]


@dataclass(eq=False, slots=True)
class Read:
    """One pull; `state` is written once by the peer's thread."""

    ticket: Ticket
    remote: tuple[int, ...]
    local: tuple[int, ...]
    done: bool = False
    error: str | None = None


class Peer:
    """A connection to one prefill rank, and the thread that reads from it, one pull after the other."""

    def __init__(self, host: str, port: int, pool: Pool, wake: Wake) -> None:
        try:
            self._socket = socket.create_connection((host, port), CONNECT_TIMEOUT_S)
        except OSError as error:
            raise TransferError(f"no connection to {host}:{port}: {error}") from error
        self._socket.settimeout(None)
        _tune(self._socket)
        self._pool, self._wake = pool, wake
        self._reads: deque[Read] = deque()
        self._waiting = threading.Semaphore(0)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-tcp-read", daemon=True)
        self._thread.start()

    def begin(self, read: Read) -> None:
        if self._closed:
            raise TransferError("the connection is closed")
        self._reads.append(read)
        self._waiting.release()

    def _run(self) -> None:
        while True:
            self._waiting.acquire()
            if self._closed and not self._reads:
                return
            read = self._reads.popleft()
            try:
                read.error = "the connection is closed" if self._closed else self._read(read)
            except (OSError, EOFError) as error:
                self._closed = True
                read.error = f"the connection broke: {error or 'the prefill rank closed it'}"
            read.done = True
            self._wake()

    def _read(self, read: Read) -> str | None:
        ask = msgspec.msgpack.encode(Ask(read.ticket, list(read.remote)))
        self._socket.sendall(_LENGTH.pack(len(ask)) + ask)
        answer = bytearray(1)
        receive_all(self._socket, [memoryview(answer)], STALL_S)
        if answer == _REFUSED:
            return "the prefill rank no longer holds these blocks"
        self._pool.receive(self._socket, read.local)
        return None

    def close(self) -> None:
        """Break the connection; when this returns nothing writes to the pool any more."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._waiting.release()
        self._thread.join(CONNECT_TIMEOUT_S)
        self._socket.close()


class TcpTransport:
    """`transport.Transport` over sockets; listens on the rank's address at a port of the kernel's choice."""

    name = "tcp"
    notifies, wakes = False, True

    def __init__(self, host: str) -> None:
        self._host = host

    def start(self, pool: torch.Tensor | None, layout: PoolLayout, may_read: MayRead, wake: Wake) -> bytes:
        assert pool is not None
        self._pool = Pool(pool, layout.block_bytes)
        self._may_read, self._wake = may_read, wake
        self._listener = socket.create_server((self._host, 0), family=family(self._host))
        threading.Thread(target=self._accept, name="kv-tcp-accept", daemon=True).start()
        return msgspec.msgpack.encode(self._listener.getsockname()[1])

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed by `stop`
            _tune(sock)
            threading.Thread(target=self._serve, args=(sock,), name="kv-tcp-send", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """Answer one decode rank until it hangs up."""
        header = bytearray(_LENGTH.size)
        with sock, contextlib.suppress(OSError, EOFError, *NONSENSE):
            while True:
                receive_all(sock, [memoryview(header)])
                (length,) = _LENGTH.unpack(header)
                if length > MAX_REQUEST_BYTES:
                    return
                body = bytearray(length)
                receive_all(sock, [memoryview(body)])
                ask = msgspec.msgpack.decode(body, type=Ask)
                if self._may_read(ask.ticket, ask.block_ids):
                    send_all(sock, [memoryview(_ACCEPTED), *self._pool.runs(ask.block_ids)])
                else:
                    sock.sendall(_REFUSED)

    def connect(self, reach: bytes, blocks: int, host: str) -> Peer:
        return Peer(host, msgspec.msgpack.decode(reach, type=int), self._pool, self._wake)

    def begin(
        self, peer: Peer, ticket: Ticket, remote: Sequence[int], local: Sequence[int]
    ) -> tuple[Peer, Read]:
        read = Read(ticket, tuple(remote), tuple(local))
        peer.begin(read)
        return peer, read

    def poll(self, read: tuple[Peer, Read]) -> bool:
        if not read[1].done:
            return False
        if (error := read[1].error) is not None:
            raise TransferError(error)
        return True

    def abandon(self, read: tuple[Peer, Read]) -> bool:
        """A stream cannot skip a read, so the connection ends with it; reads behind it fail too."""
        if not read[1].done:
            read[0].close()
        return read[1].done

    def finished(self) -> list[Ticket]:
        return []

    def disconnect(self, peer: Peer) -> None:
        peer.close()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that vanished says nothing
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(STALL_S * 2000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    if ipaddress.ip_address(sock.getpeername()[0]).is_loopback:
        with contextlib.suppress(OSError):  # BBR paces what has no network to share: half the rate
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
