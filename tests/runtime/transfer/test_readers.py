"""Pulls inside one process, over a transport that does what it is told: what readers do with odd reads."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch

from broadbeam_runtime.kv import readers
from broadbeam_runtime.kv.connector import PoolLayout, PullResult
from broadbeam_runtime.kv.leases import Ticket
from broadbeam_runtime.kv.pull import PullConnector
from broadbeam_runtime.kv.simulated import SimulatedTransport
from broadbeam_runtime.kv.tcp import TcpTransport
from broadbeam_runtime.kv.transport import TransferError

LAYOUT = PoolLayout("tiny", "uint8", 16, 64, 1, 4)
_hosts = (f"127.{210 + os.getpid() % 40}.0.{number + 1}" for number in itertools.count())


class StuckTransport(SimulatedTransport):
    """Its reads never end; those that were abandoned write on until `quiet`."""

    def __init__(self) -> None:
        super().__init__("tcp", 1e9)
        self.reads, self.quiet, self.ends = 0, False, False

    def begin(self, peer: None, ticket: Ticket, remote: Sequence[int], local: Sequence[int]) -> float:
        self.reads += 1
        return 0.0 if self.ends else float("inf")

    def abandon(self, read: float) -> bool:
        return self.quiet


Connect = Callable[[SimulatedTransport], PullConnector]
Stuck = tuple[StuckTransport, PullConnector, PullConnector]


@pytest.fixture
def connect() -> Iterator[Connect]:
    connectors: list[PullConnector] = []

    def connect(transport: SimulatedTransport) -> PullConnector:
        connectors.append(PullConnector(transport, next(_hosts), 5600, lease_s=30, peer_timeout_s=3))
        connectors[-1].start(None, LAYOUT)
        return connectors[-1]

    yield connect
    for connector in connectors:
        connector.stop()


@pytest.fixture
def stuck(connect: Connect) -> Stuck:
    """The transport whose reads do not move, a prefill rank, and a decode rank that reads from it."""
    transport = StuckTransport()
    transport.quiet = True
    prefill, decode = connect(SimulatedTransport("tcp", 1e9)), connect(transport)
    decode.pull("a", prefill.hold("a", [1, 2], 32), [3, 4])
    return transport, prefill, decode


def until(ask: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (answer := ask()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return answer


def test_blocks_that_an_abandoned_read_still_writes_to_are_not_given_back(connect: Connect) -> None:
    transport = StuckTransport()
    prefill, decode = connect(SimulatedTransport("tcp", 1e9)), connect(transport)
    decode.pull("a", prefill.hold("a", [1, 2], 32), [3, 4])
    until(lambda: transport.reads)
    prefill.stop()
    # The peer is lost and forgotten; its read is reported as soon as it is over, and no sooner.
    until(lambda: not decode._readers._peers)
    assert decode.pulled() == []
    transport.quiet = True
    (result,) = until(decode.pulled)
    assert isinstance(result, PullResult)
    assert "went away" in (result.error or "")


def test_a_peer_that_refuses_connections_is_not_waited_for(connect: Connect) -> None:
    prefill, decode = connect(SimulatedTransport("tcp", 1e9)), connect(SimulatedTransport("tcp", 1e9))
    held = prefill.hold("a", [1, 2], 32)
    prefill.stop()
    decode.pull("a", held, [3, 4])
    (result,) = until(decode.pulled)
    assert isinstance(result, PullResult)
    # After the time limit it would say that there was no answer.
    assert (result.error or "").endswith("cannot be reached")


def test_reads_that_do_not_move_are_given_up_though_their_peer_answers(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "STALL_S", 0.3)
    transport, prefill, decode = stuck
    (result,) = until(decode.pulled)
    assert isinstance(result, PullResult)
    assert (result.error or "").startswith("no block came from the prefill rank at 127.")
    # The next request shakes hands anew: the peer itself answers.
    decode.pull("b", prefill.hold("b", [1], 16), [3])
    until(lambda: transport.reads == 2)


def test_a_read_among_others_that_end_is_not_given_up(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "STALL_S", 2.0)
    transport, prefill, decode = stuck
    until(lambda: transport.reads)
    began = time.monotonic()
    while time.monotonic() - began < 3:  # each of these ends at once, well within the limit
        time.sleep(0.1)
        transport.ends = True
        decode.pull(f"{began}", prefill.hold(f"{began}", [3], 16), [5])
        assert [result.error for result in until(decode.pulled)] == [None]
        transport.ends = False


def test_nothing_is_read_from_a_connection_that_was_closed() -> None:
    host, pool = next(_hosts), torch.zeros(4, 64, dtype=torch.uint8)
    transport = TcpTransport(host)
    reach = transport.start(pool, LAYOUT, lambda ticket, blocks: True, lambda: None)
    with closing(transport.connect(reach, 4, host)) as peer:
        read = transport.begin(peer, Ticket("a", "r"), [0], [1])
        until(lambda: transport.poll(read))
        peer.close()
        with pytest.raises(TransferError, match="the connection is closed"):
            transport.begin(peer, Ticket("b", "r"), [0], [1])
    transport.stop()
