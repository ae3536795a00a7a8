"""KV transfer by NIXL over UCX: one-sided reads by RDMA, shared memory or TCP, whichever UCX finds best.

The pool is registered once, and each peer's blocks are prepared once; a pull names blocks by index, and
its notification tells the prefill rank that all bytes have arrived.
"""

from __future__ import annotations

import importlib
import ipaddress
import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.leases import Ticket
from broadbeam_runtime.kv.transport import NONSENSE, MayRead, TransferError, Wake

if TYPE_CHECKING:
    import torch


def environment(host: str) -> dict[str, str]:
    """What NIXL and UCX should be told where nothing else was: on a loopback address only `lo` can be
    reached, and UCX would announce the machine's other addresses."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    local = {"UCX_NET_DEVICES": "lo", "UCX_TLS": "tcp,posix,cma,self"} if loopback else {}
    return {"NIXL_LOG_LEVEL": "WARN", **local}


class Reach(msgspec.Struct, frozen=True, array_like=True):
    """How to read a pool: the agent's own metadata, and where the blocks lie in its memory."""

    agent: bytes
    address: int
    block_bytes: int
    device: int
    memory: str  # "DRAM" or "VRAM"


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    blocks: Any  # nixl_prepped_dlist_handle


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """NIXL's exceptions, which share no base class, as TransferError."""
    bindings = importlib.import_module("nixl_cu13._bindings")  # compiled, and not listed by its package
    names = [name for name in dir(bindings) if name.startswith("nixl") and name.endswith("Error")]
    kinds = tuple(getattr(bindings, name) for name in names)
    try:
        yield
    except kinds as error:
        raise TransferError(f"NIXL could not {what}: {error}") from error


class NixlTransport:
    """`transport.Transport` by a NIXL agent with a fresh name, so that a restarted rank is a new peer."""

    name = "nixl"
    notifies, wakes = True, False

    def start(self, pool: torch.Tensor | None, layout: PoolLayout, may_read: MayRead, wake: Wake) -> bytes:
        assert pool is not None
        from nixl_cu13._api import nixl_agent, nixl_agent_config

        with _errors("register the KV pool"):
            # Its progress thread would spin on a core for ever; `poll` and `finished` make progress too.
            settings = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            self._agent = nixl_agent(uuid.uuid4().hex, settings)
            if "UCX" not in self._agent.backends:
                raise TransferError("NIXL has no UCX plugin here")
            self._registered = self._agent.register_memory(pool)
            self._reach = Reach(
                agent=b"",
                address=pool.data_ptr(),
                block_bytes=layout.block_bytes,
                device=max(pool.get_device(), 0),
                memory="DRAM" if pool.device.type == "cpu" else "VRAM",
            )
            self._local = self._prepare("NIXL_INIT_AGENT", self._reach, len(pool))
            metadata = self._agent.get_agent_metadata()
        return msgspec.msgpack.encode(msgspec.structs.replace(self._reach, agent=metadata))

    def _prepare(self, agent: str, reach: Reach, blocks: int) -> Any:
        """Descriptors of all blocks, as one strided row: address, length, device, stride, count."""
        import numpy as np

        row = [[reach.address, reach.block_bytes, reach.device, reach.block_bytes, blocks]]
        return self._agent.prep_xfer_dlist(agent, np.array(row, dtype=np.uint64), reach.memory)

    def connect(self, reach: bytes, blocks: int, host: str) -> Peer:
        theirs = msgspec.msgpack.decode(reach, type=Reach)
        with _errors("reach the prefill rank"):
            name = self._agent.add_remote_agent(theirs.agent)
            name = name.decode() if isinstance(name, bytes) else str(name)
            return Peer(name, self._prepare(name, theirs, blocks))

    def begin(self, peer: Peer, ticket: Ticket, remote: Sequence[int], local: Sequence[int]) -> Any:
        notification = msgspec.msgpack.encode(ticket)
        with _errors("start a read"):
            read = self._agent.make_prepped_xfer(
                "READ", self._local, list(local), peer.blocks, list(remote), notification, backends=["UCX"]
            )
            if self._agent.transfer(read) == "ERR":
                raise TransferError("NIXL could not start a read")
        return read

    def poll(self, read: Any) -> bool:
        with _errors("read the blocks"):
            state = self._agent.check_xfer_state(read)
            if state == "ERR":
                raise TransferError("NIXL could not read the blocks")
            if state == "DONE":
                read.release()
        return bool(state == "DONE")

    def abandon(self, read: Any) -> bool:
        try:
            with _errors("cancel a read"):
                read.release()  # asks to cancel, and raises until the read has ended
        except TransferError:
            return False
        return True

    def finished(self) -> list[Ticket]:
        with _errors("read notifications"):
            messages = [message for sent in self._agent.get_new_notifs().values() for message in sent]
        tickets = []
        for message in messages:
            with suppress(*NONSENSE):
                tickets.append(msgspec.msgpack.decode(message, type=Ticket))
        return tickets

    def disconnect(self, peer: Peer) -> None:
        try:
            with _errors("forget the prefill rank"):
                peer.blocks.release()
                self._agent.remove_remote_agent(peer.name)
        except TransferError:
            return  # it is gone either way

    def stop(self) -> None:
        try:
            with _errors("release the KV pool"):
                self._local.release()
                self._agent.deregister_memory(self._registered)
        except TransferError as error:
            logging.getLogger("broadbeam.kv").warning("%s", error)
