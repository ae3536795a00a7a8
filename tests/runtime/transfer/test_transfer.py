"""Blocks move between two real processes by every connector; what goes wrong ends in an error, not a hang."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.side_channel import ToDecode, Welcome, hello

# The peers are forked from a server that has imported torch once.
sys.path.insert(0, str(Path(__file__).parent))
import transfer_peer

pytestmark = pytest.mark.slow

BLOCK_BYTES = 4096
BLOCKS = 64
LAYOUT = PoolLayout("tiny", "uint8", 16, BLOCK_BYTES, 1, BLOCK_BYTES // 16)
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["torch", "nixl_cu13._api", "broadbeam_runtime.kv.connectors", "broadbeam_runtime.kv.tcp"]
CONTEXT.set_forkserver_preload(["pytest", *PRELOAD])  # modules that are found without this folder
_hosts = (f"127.{90 + os.getpid() % 60}.{number // 250}.{number % 250 + 1}" for number in itertools.count())


class Peer:
    """A handle on one peer process: call it with an operation and its arguments."""

    def __init__(
        self, connector: str, host: str, lease_s: float, model: str, block_bytes: int, blocks: int
    ) -> None:
        self.host, self.connector = host, connector
        self._pipe, theirs = CONTEXT.Pipe()
        arguments = (theirs, connector, host, blocks, block_bytes, lease_s, model)
        self._process = CONTEXT.Process(target=transfer_peer.main, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, op: str, **arguments: Any) -> Any:
        self._pipe.send((op, arguments))
        return self._pipe.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5)
        self.kill()


Start = Callable[..., Peer]


@pytest.fixture(params=["nixl", "tcp"])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    peers: list[Peer] = []

    def start(
        lease_s: float = 30.0,
        model: str = "tiny",
        block_bytes: int = BLOCK_BYTES,
        host: str | None = None,
        blocks: int = BLOCKS,
    ) -> Peer:
        peer = Peer(request.param, host or next(_hosts), lease_s, model, block_bytes, blocks)
        peers.append(peer)
        return peer

    yield start
    for peer in peers:
        peer.close()


def test_the_blocks_arrive_byte_for_byte_and_the_reader_frees_them(start: Start) -> None:
    prefill, decode = start(), start()
    prefill("fill", seed=1)
    remote, local = [3, 4, 5, 40, 2], [10, 11, 30, 12, 13]
    params = prefill("hold", id="a", blocks=remote)
    decode("pull", id="x", params=params, blocks=local)
    assert decode("pulled", within_s=20) == [{"id": "x", "bytes": 5 * BLOCK_BYTES, "error": None}]
    assert decode("bytes", blocks=local) == prefill("bytes", blocks=remote)
    assert prefill("released", within_s=20) == [("a", True)]


def test_many_pulls_at_once_all_arrive(start: Start) -> None:
    prefill, decode = start(), start()
    prefill("fill", seed=2)
    for index in range(20):
        params = prefill("hold", id=f"r{index}", blocks=[index, 63 - index])
        decode("pull", id=f"r{index}", params=params, blocks=[2 * index, 2 * index + 1])
    ended: list[dict[str, Any]] = []
    while len(ended) < 20:
        more = decode("pulled", within_s=20)
        assert more
        ended += more
    assert {result["id"] for result in ended if result["error"] is None} == {
        f"r{index}" for index in range(20)
    }
    wanted = [block for index in range(20) for block in (index, 63 - index)]
    assert decode("bytes", blocks=list(range(40))) == prefill("bytes", blocks=wanted)


def test_a_lease_that_nobody_renews_expires(start: Start) -> None:
    prefill, decode = start(lease_s=0.5), start()
    params = prefill("hold", id="a", blocks=[1])
    assert prefill("released", within_s=20) == [("a", False)]
    decode("pull", id="x", params=params, blocks=[1])
    (result,) = decode("pulled", within_s=20)
    assert "lease" in result["error"] or "no longer holds" in result["error"]


def test_a_request_that_waits_keeps_its_lease(start: Start) -> None:
    prefill, decode = start(lease_s=2), start(lease_s=2)
    prefill("fill", seed=3)
    params = prefill("hold", id="a", blocks=[7])
    decode("expect", id="x", params=params)
    assert prefill("released", within_s=3) == []
    decode("pull", id="x", params=params, blocks=[9])
    assert decode("pulled", within_s=20)[0]["error"] is None
    assert decode("bytes", blocks=[9]) == prefill("bytes", blocks=[7])


def test_giving_up_a_waiting_request_frees_its_blocks(start: Start) -> None:
    prefill, decode = start(), start()
    params = prefill("hold", id="a", blocks=[7])
    decode("expect", id="x", params=params)
    decode("cancel", id="x")
    assert prefill("released", within_s=20) == [("a", False)]


def test_blocks_are_read_once(start: Start) -> None:
    prefill, decode, late = start(), start(), start()
    params = prefill("hold", id="a", blocks=[7])
    decode("pull", id="x", params=params, blocks=[1])
    assert decode("pulled", within_s=20)[0]["error"] is None
    for reader in (decode, late):
        reader("pull", id="y", params=params, blocks=[2])
        assert reader("pulled", within_s=20)[0]["error"] is not None


def test_unequal_layouts_are_refused_by_the_field_that_differs(start: Start) -> None:
    prefill, decode = start(), start(model="other")
    params = prefill("hold", id="a", blocks=[1])
    decode("pull", id="x", params=params, blocks=[1])
    (result,) = decode("pulled", within_s=20)
    assert "refused: model: prefill rank has tiny, decode rank other" in result["error"]


def test_a_peer_that_is_killed_while_it_is_read_gives_an_error(start: Start) -> None:
    prefill, decode = start(block_bytes=2**20, blocks=256), start(block_bytes=2**20, blocks=256)
    for index in range(8):
        params = prefill("hold", id=f"r{index}", blocks=list(range(256)))
        decode("pull", id=f"r{index}", params=params, blocks=list(range(256)))
    prefill.kill()
    ended: list[dict[str, Any]] = []
    while len(ended) < 8:
        more = decode("pulled", within_s=30)
        assert more, f"only {len(ended)} of 8 pulls ended"
        ended += more
    assert any(result["error"] for result in ended)


def test_a_peer_that_restarted_is_a_new_engine(start: Start) -> None:
    prefill, decode = start(), start()
    stale = prefill("hold", id="a", blocks=[1])
    decode("pull", id="x", params=stale, blocks=[1])
    assert decode("pulled", within_s=20)[0]["error"] is None
    prefill.kill()
    again = start(host=prefill.host)
    again("fill", seed=4)
    decode("pull", id="y", params=stale, blocks=[1])
    # Which is seen first, the closed connection or the new engine, is a matter of milliseconds.
    error = decode("pulled", within_s=30)[0]["error"]
    assert "restarted" in error or "went away" in error
    decode("pull", id="z", params=again("hold", id="b", blocks=[5]), blocks=[2])
    assert decode("pulled", within_s=30)[0]["error"] is None
    assert decode("bytes", blocks=[2]) == again("bytes", blocks=[5])


def test_a_request_for_an_engine_that_is_no_more_leaves_the_others_alone(start: Start) -> None:
    prefill, decode = start(), start()
    params = prefill("hold", id="a", blocks=[7])
    decode("expect", id="x", params=params)
    decode("pull", id="stale", params=params | {"remote_engine_id": "before"}, blocks=[1])
    assert "restarted: engine before is now" in decode("pulled", within_s=20)[0]["error"]
    decode("pull", id="x", params=params, blocks=[9])
    assert decode("pulled", within_s=20)[0]["error"] is None


def test_a_read_that_came_too_late_leaves_the_next_ones_alone(start: Start) -> None:
    prefill, first, second = start(), start(), start()
    for index in range(3):
        params = prefill("hold", id=f"{index}", blocks=[7])
        first("pull", id="x", params=params, blocks=[1])
        assert first("pulled", within_s=20)[0]["error"] is None
        second("pull", id="x", params=params, blocks=[1])
        assert second("pulled", within_s=20)[0]["error"] is not None
    second("pull", id="y", params=prefill("hold", id="y", blocks=[7]), blocks=[1])
    assert second("pulled", within_s=20)[0]["error"] is None


def test_blocks_that_do_not_fit_are_released(start: Start) -> None:
    prefill, decode = start(), start()
    params = prefill("hold", id="a", blocks=[7, 8])
    decode("expect", id="x", params=params)
    decode("pull", id="x", params=params, blocks=[1])
    assert decode("pulled", within_s=20)[0]["error"] == "2 remote blocks do not fit 1 local ones"
    assert prefill("released", within_s=20) == [("a", False)]


@pytest.mark.parametrize("address", [("no such host", 5600), ("127.0.0.1", 10**6)], ids=str)
def test_an_address_that_is_none_is_an_error(start: Start, address: tuple[str, int]) -> None:
    prefill, decode = start(), start()
    params = prefill("hold", id="a", blocks=[1])
    nowhere = params | {"remote_host": address[0], "remote_port": address[1]}
    for op in ({"op": "expect"}, {"op": "pull", "blocks": [1]}):
        decode(**op, id="x", params=nowhere)
    assert decode("pulled", within_s=20)[0]["error"] is not None
    decode("pull", id="y", params=params, blocks=[1])
    assert decode("pulled", within_s=20)[0]["error"] is None


NONSENSE = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x81\xa1a" * 10**5,
    b"\x92\x92\xa1\xff\xa1a\x90",
    msgspec.msgpack.encode({"type": "Heartbeat", "number": 1, "tickets": [["z", "b"]]}),
    msgspec.msgpack.encode({"type": "Hello", "version": 1, "connector": "tcp", "layout": {}}),
]


def test_nonsense_at_its_ports_does_not_stop_a_rank(start: Start) -> None:
    prefill, decode = start(), start()
    params = prefill("hold", id="a", blocks=[7])
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 1000
        stranger.connect(f"tcp://{prefill.host}:5600")
        for message in NONSENSE:
            stranger.send(message)
        stranger.send_multipart([b"", b"", b""])
        stranger.send(msgspec.msgpack.encode(hello(prefill.connector, LAYOUT)))
        answers = []
        while not isinstance(answers[-1] if answers else None, Welcome):
            assert stranger.poll(20_000)
            answers.append(msgspec.msgpack.decode(stranger.recv(), type=ToDecode))
    if prefill.connector == "tcp":
        port = msgspec.msgpack.decode(answers[-1].reach)
        for message in NONSENSE:
            with socket.create_connection((prefill.host, port)) as stream:
                stream.sendall(struct.pack("<I", len(message)) + message)
                stream.shutdown(socket.SHUT_WR)
                assert stream.recv(1) in (b"", b"\0")
    decode("pull", id="x", params=params, blocks=[9])
    assert decode("pulled", within_s=20)[0]["error"] is None


@pytest.mark.parametrize(
    ("listening", "said"), [(False, "cannot be reached"), (True, "no answer")], ids=["nobody", "silence"]
)
def test_nobody_who_answers_at_the_address_is_an_error_within_the_bound(
    start: Start, listening: bool, said: str
) -> None:
    decode, host = start(), next(_hosts)
    params = {"remote_engine_id": "gone", "remote_host": host, "remote_port": 5600, "remote_block_ids": [1]}
    with socket.create_server((host, 5600 if listening else 0)):
        decode("pull", id="x", params=params, blocks=[1])
        (result,) = decode("pulled", within_s=30)
    assert said in result["error"]
