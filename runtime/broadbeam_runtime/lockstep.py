"""Lock-step of simulated ranks over plain TCP: a step takes as long as the slowest rank of the group.

Rank 0 coordinates. A rank with work proposes a step; the coordinator calls the others, which join with a
dummy step; when all have answered, it sends the longest duration to all. A rank that died answers nothing,
so the group stalls, as NCCL would, until `stall_s` has passed.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from broadbeam_runtime.settings import family


class GroupError(RuntimeError):
    """The group could not form, or lost a rank."""


class Join(msgspec.Struct, frozen=True, tag=True):
    rank: int


class Propose(msgspec.Struct, frozen=True, tag=True):
    """A rank is ready for the next step; 0 ms is a dummy step."""

    duration_ms: float


class Leave(msgspec.Struct, frozen=True, tag=True):
    """A rank that stops on purpose; the others go on without it."""


class Joined(msgspec.Struct, frozen=True, tag=True):
    """All ranks are there."""


class Restarted(msgspec.Struct, frozen=True, tag=True):
    """A rank of a formed group came back alone; the others hold nothing of it, so all have to start again."""

    rank: int


class Call(msgspec.Struct, frozen=True, tag=True):
    """Another rank wants a step."""


class Go(msgspec.Struct, frozen=True, tag=True):
    duration_ms: float


ToCoordinator = Join | Propose | Leave
ToRank = Joined | Restarted | Call | Go


class _Lines:
    """JSON messages, one a line, on one socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: ToCoordinator | ToRank) -> None:
        self.sock.sendall(msgspec.json.encode(message) + b"\n")

    def receive(self) -> list[bytes]:
        """The lines that one read completes; EOFError when the other side is gone."""
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return lines


@dataclass(slots=True)
class _Member:
    lines: _Lines
    rank: int = -1
    proposed_ms: float | None = None


class Coordinator:
    """Rank 0's side thread: gathers proposals, sends the common duration."""

    def __init__(self, host: str, port: int, size: int) -> None:
        self._size = size
        try:
            self._listener = socket.create_server((host, port), family=family(host))
        except OSError as error:
            raise GroupError(f"cannot listen for the group on {host}:{port}: {error.strerror}") from error
        self._members: dict[socket.socket, _Member] = {}
        self._expected = size  # shrinks when ranks leave on purpose, not when they die
        self._formed = self._called = False
        self._thread = threading.Thread(target=self._run, name="sim-coordinator", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._listener:
                    accepted, _ = sock.accept()
                    self._members[accepted] = _Member(_Lines(accepted))
                    selector.register(accepted, selectors.EVENT_READ)
                elif not self._read(sock):
                    selector.unregister(sock)
                    sock.close()

    def _read(self, sock: socket.socket) -> bool:
        """Handle what one rank sent; False when it is gone."""
        member = self._members[sock]
        try:
            for line in member.lines.receive():
                self._handle(member, msgspec.json.decode(line, type=ToCoordinator))
        except (EOFError, OSError, msgspec.MsgspecError):
            # A dead rank still counts in `_expected`: no step ends without it.
            del self._members[sock]
            return False
        return True

    def _handle(self, member: _Member, message: ToCoordinator) -> None:
        match message:
            case Join(rank):
                member.rank = rank
                if self._formed:
                    self._broadcast(Restarted(rank))
                elif len({other.rank for other in self._members.values()} - {-1}) == self._size:
                    self._formed = True
                    self._broadcast(Joined())
            case Propose(duration_ms):
                member.proposed_ms = duration_ms
                self._advance()
            case Leave():
                self._expected -= 1
                member.proposed_ms = None
                member.rank = -1
                self._advance()

    def _advance(self) -> None:
        ranks = [member for member in self._members.values() if member.rank >= 0]
        proposals = [member.proposed_ms for member in ranks if member.proposed_ms is not None]
        if not proposals:
            return
        if len(proposals) == self._expected:
            for member in ranks:
                member.proposed_ms = None
            self._called = False
            self._broadcast(Go(max(proposals)))
        elif not self._called:
            self._called = True
            self._broadcast(Call(), [member for member in ranks if member.proposed_ms is None])

    def _broadcast(self, message: ToRank, members: list[_Member] | None = None) -> None:
        for member in list(self._members.values()) if members is None else members:
            try:
                member.lines.send(message)
            except OSError:
                continue  # its socket reports the end on the next read


class Group:
    """One rank's place in the group. `join` first; then `step` by the engine thread only."""

    def __init__(self, rank: int, size: int, host: str, port: int, stall_s: float) -> None:
        self._rank = rank
        self._size = size
        self._address = (host, port)
        self._stall_s = stall_s
        self._lines: _Lines | None = None
        self._changed = threading.Condition()
        self._joined = False
        self._called = False
        self._go_ms: float | None = None
        self._lost: str | None = None  # why no step will ever end again
        self.on_call: Callable[[], None] = lambda: None  # wakes the engine thread of an idle rank

    def join(self, timeout_s: float) -> None:
        """Returns when all ranks have joined; GroupError names how many did not."""
        if self._size == 1:
            return
        deadline = time.monotonic() + timeout_s
        self._lines = _Lines(self._connect(deadline))
        threading.Thread(target=self._read, name="sim-group", daemon=True).start()
        self._lines.send(Join(self._rank))
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._joined or self._lost, max(deadline - time.monotonic(), 0)
            )
            if not done or self._lost:
                late = f"not all {self._size} ranks joined within {timeout_s:g} s"
                raise GroupError(f"rank {self._rank}: {self._lost or late}")

    def _connect(self, deadline: float) -> socket.socket:
        while True:
            try:
                sock = socket.create_connection(self._address, timeout=1.0)
                sock.settimeout(None)
                return sock
            except OSError as error:
                if time.monotonic() > deadline:
                    host, port = self._address
                    raise GroupError(
                        f"rank {self._rank}: no coordinator at {host}:{port}: {error}"
                    ) from error
                time.sleep(0.1)

    def _read(self) -> None:
        assert self._lines is not None
        try:
            while True:
                for line in self._lines.receive():
                    self._handle(msgspec.json.decode(line, type=ToRank))
        except (EOFError, OSError):
            self._lose("the group's rank 0 is gone")

    def _handle(self, message: ToRank) -> None:
        with self._changed:
            match message:
                case Joined():
                    self._joined = True
                case Call():
                    self._called = True
                case Go(duration_ms):
                    self._go_ms, self._called = duration_ms, False
                case Restarted(rank):
                    again = f"its group of {self._size} has to start again"
                    self._lost = f"rank {rank} was restarted alone; {again}"
            self._changed.notify_all()
        if isinstance(message, Call | Restarted):
            self.on_call()

    def _lose(self, reason: str) -> None:
        with self._changed:
            self._lost = self._lost or reason
            self._changed.notify_all()
        self.on_call()

    @property
    def called(self) -> bool:
        """Another rank wants a step that this rank has not joined yet, or none will ever end."""
        return self._called or self._lost is not None

    def step(self, duration_ms: float) -> float:
        """Join one step and return its common duration; GroupError after a stall."""
        if self._lines is None:
            return duration_ms
        with self._changed:
            self._go_ms = None
        try:
            self._lines.send(Propose(duration_ms))
        except OSError:
            self._lost = self._lost or "the group's rank 0 is gone"
        with self._changed:
            self._changed.wait_for(lambda: self._go_ms is not None or self._lost, self._stall_s)
            if self._go_ms is None:
                stalled = f"a rank of the group did not join a step within {self._stall_s:g} s"
                raise GroupError(f"rank {self._rank}: {self._lost or stalled}")
            return self._go_ms

    def leave(self) -> None:
        if self._lines is None:
            return
        try:
            self._lines.send(Leave())
            self._lines.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return
