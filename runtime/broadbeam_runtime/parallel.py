"""One expert-parallel group: its ranks meet at a store, exchange rows, and step or sleep together.

Every rank is data-parallel for attention and owns an equal share of each layer's experts, so all ranks
run the same collectives in the same order; a rank without requests runs a pass of no tokens. While no
rank has work, all sleep at the store and cost nothing; the first to get work rings.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from broadbeam_runtime.core import RankIdentity

MEET_TIMEOUT = timedelta(minutes=15)  # ranks load at different speeds
# A peer that died resets its connections at once; a peer whose machine vanished is noticed after this.
STEP_TIMEOUT = timedelta(seconds=30)
FOREVER = timedelta(days=365)
KEPT_BELLS = 1000  # rung keys left in the store; far more than a watcher can be behind


class GroupError(RuntimeError):
    """The group cannot form or has lost a rank; the process must end and the group start again."""


class Collectives(Protocol):
    """What we use of a torch.distributed process group; made directly, so there is no global one."""

    def barrier(self) -> dist.Work: ...

    def allreduce(self, tensors: list[Tensor]) -> dist.Work: ...

    def alltoall_base(
        self, output: Tensor, given: Tensor, output_split: list[int], input_split: list[int]
    ) -> dist.Work: ...


class Group:
    """A rank's membership. Alone (world 1) it needs no store and every exchange is the identity."""

    def __init__(self, identity: RankIdentity, port: int, device: torch.device):
        self.identity, self.port, self.device = identity, port, device
        self.rank, self.world = identity.global_rank, identity.world
        self.store = self._store(server=self.rank == 0) if self.world > 1 else None

    def join(self) -> None:
        """Wait until every rank has loaded, then connect them; GroupError if one never comes."""
        if self.store is None:
            return
        if self.store.check(["formed"]):
            Bell.ring_last(self.store)  # a sleeping group must notice that one of its ranks is new
            raise GroupError(
                f"rank {self.rank} was restarted alone; its group of {self.world} has to start again"
            )
        try:
            self.store.set(f"loaded/{self.rank}", "1")
            self.store.wait([f"loaded/{rank}" for rank in range(self.world)], MEET_TIMEOUT)
            self.control = self._gloo(self.store, "control")
            cuda = self.device.type == "cuda"
            self.data = self._nccl(self.store) if cuda else self._gloo(self.store, "data")
            self.control.barrier().wait()
        except (dist.DistError, RuntimeError) as error:
            raise GroupError(f"rank {self.rank} could not join its group of {self.world}: {error}") from error
        self.store.set("formed", "1")

    def count(self, flags: Sequence[bool]) -> list[int]:
        """How many ranks say yes to each question; every rank calls this equally often."""
        votes = torch.tensor(flags, dtype=torch.int32)
        if self.world > 1:
            self._run(lambda: self.control.allreduce([votes]))
        return [int(vote) for vote in votes]

    def exchange_counts(self, send: list[int]) -> list[int]:
        """What every rank will send here, for what this rank will send to each."""
        if self.world == 1:
            return send
        mine = torch.tensor(send, dtype=torch.int64, device=self.device)
        theirs = torch.empty_like(mine)
        ones = [1] * self.world
        self._run(lambda: self.data.alltoall_base(theirs, mine, ones, ones))
        return [int(count) for count in theirs.tolist()]

    def exchange_rows(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Rows (sum of send, n), ordered by destination, for rows (sum of receive, n), ordered by source."""
        if self.world == 1:
            return rows
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        self._run(lambda: self.data.alltoall_base(out, rows.contiguous(), receive, send))
        return out

    def connect(self) -> TCPStore:
        """A second client of the store, for a thread that waits in it."""
        return self._store(server=False)

    def _run(self, collective: Callable[[], dist.Work]) -> None:
        try:
            collective().wait()
        except RuntimeError as error:
            raise GroupError(f"rank {self.rank} lost a rank of its group: {error}") from error

    def _store(self, server: bool) -> TCPStore:
        # Bound to this pod's own address: several groups may share a machine, and the port.
        address = self.identity.host if server else self.identity.coordinator
        try:
            listening = {"master_listen_fd": _listen(address, self.port)} if server else {}
            options: dict[str, Any] = {"wait_for_workers": False, **listening}
            return TCPStore(address, self.port, None, server, MEET_TIMEOUT, **options)
        except (OSError, dist.DistError, RuntimeError) as error:
            raise GroupError(f"rank {self.rank}: rendezvous at {address}:{self.port}: {error}") from error

    def _gloo(self, store: TCPStore, name: str) -> Collectives:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = STEP_TIMEOUT
        options._devices = [gloo.create_device(hostname=self.identity.host)]
        made: Collectives = gloo(PrefixStore(name, store), self.rank, self.world, options)
        return made

    def _nccl(self, store: TCPStore) -> Collectives:
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = STEP_TIMEOUT
        made: Collectives = nccl(PrefixStore("nccl", store), self.rank, self.world, options)
        return made


def _listen(host: str, port: int) -> int:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(1024)
    except OSError:
        sock.close()
        raise
    return sock.detach()


class Bell:
    """How a sleeping group is woken: one key per sleep in the store, waited for by a thread of its own."""

    def __init__(self, store: TCPStore, on_ring: Callable[[], None]):
        self.store, self.on_ring = store, on_ring
        self.rung = -1  # the last sleep that was ended
        self.armed: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="group-bell", daemon=True).start()

    def arm(self, sleep: int) -> None:
        self.armed.put(sleep)

    @staticmethod
    def ring(store: TCPStore, sleep: int) -> None:
        store.set(f"bell/{sleep}", "1")

    @staticmethod
    def ring_last(store: TCPStore) -> None:
        if store.check(["asleep"]):
            Bell.ring(store, int(store.get("asleep")))

    def _watch(self) -> None:
        while True:
            sleep = self.armed.get()
            # An error means that the coordinator is gone: wake, and let the next collective say so.
            with suppress(dist.DistError, RuntimeError):
                self.store.wait([f"bell/{sleep}"], FOREVER)
            self.rung = sleep
            self.on_ring()


class Lockstep:
    """Whether this rank must step now, agreed with the others; `on_ring` is called from another thread."""

    def __init__(self, group: Group, on_ring: Callable[[], None]):
        self.group, self.sleep, self.asleep = group, 0, False
        self.bell = Bell(group.connect(), on_ring) if group.store is not None else None
        self.finished = False  # every rank asked to stop

    def must_step(self, has_work: bool, stopping: bool) -> bool:
        """True if any rank has work. False puts the group to sleep until one has, or all stop."""
        if self.group.store is None or self.bell is None:
            self.finished = stopping and not has_work
            return has_work
        if self.asleep:
            if self.bell.rung < self.sleep:
                if not (has_work or stopping):
                    return False
                Bell.ring(self.group.store, self.sleep)
            self.asleep = False
            self._forget_old_bells()
        working, stops = self.group.count([has_work, stopping])
        self.finished = stops == self.group.world and not working
        if not working and not self.finished:  # a thread that waits in the store would die with rank 0, aloud
            self._fall_asleep()
        return bool(working)

    def _fall_asleep(self) -> None:
        assert self.bell
        assert self.group.store
        self.sleep, self.asleep = self.sleep + 1, True
        if self.group.rank == 0:
            self.group.store.set("asleep", str(self.sleep))
        self.bell.arm(self.sleep)

    def _forget_old_bells(self) -> None:
        if self.group.rank == 0 and self.sleep > KEPT_BELLS and self.group.store:
            self.group.store.delete_key(f"bell/{self.sleep - KEPT_BELLS}")
