"""A lease has one reader and ends exactly once."""

from __future__ import annotations

import pytest

from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.leases import Leases, Ticket
from broadbeam_runtime.kv.side_channel import Hello, hello, mismatch
from broadbeam_runtime.kv.tcp import joined

LAYOUT = PoolLayout("tiny", "float32", 16, 4096, 2, 64)
FIRST, SECOND = Ticket("a", "first"), Ticket("a", "second")


@pytest.fixture
def leases() -> Leases:
    leases = Leases(30)
    leases.hold("a", [1, 2], now=0)
    return leases


def test_a_renewed_lease_lasts_from_then_on(leases: Leases) -> None:
    assert leases.renew([FIRST], now=29) == []
    assert leases.expire(now=58) == []
    assert leases.expire(now=59) == ["a"]
    assert leases.renew([FIRST], now=60) == [FIRST]


def test_the_first_reader_owns_the_lease(leases: Leases) -> None:
    assert leases.blocks(FIRST) == (1, 2)
    assert leases.blocks(SECOND) is None
    assert leases.renew([SECOND], now=1) == [SECOND]
    assert not leases.pulled(SECOND)
    assert not leases.released(SECOND)
    assert leases.pulled(FIRST)


def test_a_heartbeat_behind_the_end_of_its_own_read_is_no_loss(leases: Leases) -> None:
    assert leases.pulled(FIRST)
    assert leases.renew([FIRST, SECOND], now=1) == [SECOND]


def test_a_lease_ends_once(leases: Leases) -> None:
    assert leases.released(FIRST)
    assert not leases.released(FIRST)
    assert not leases.revoke("a")
    assert leases.expire(now=1000) == []
    assert len(leases) == 0


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        pytest.param(hello("tcp", LAYOUT), None, id="equal"),
        pytest.param(
            hello("nixl", LAYOUT), "connector: prefill rank has tcp, decode rank nixl", id="connector"
        ),
        pytest.param(
            Hello(0, "tcp", {}), "side channel version: prefill rank has 1, decode rank 0", id="version"
        ),
        pytest.param(
            hello("tcp", PoolLayout("tiny", "float32", 32, 4096, 2, 64)),
            "block_size: prefill rank has 16, decode rank 32",
            id="block size",
        ),
        pytest.param(
            Hello(1, "tcp", {"model": "tiny"}),
            "dtype: prefill rank has float32, decode rank None",
            id="a field is missing",
        ),
    ],
)
def test_unequal_pools_are_refused_by_the_first_field_that_differs(theirs: Hello, reason: str | None) -> None:
    assert mismatch(LAYOUT, "tcp", theirs) == reason


@pytest.mark.parametrize(
    ("ids", "runs"),
    [
        ([], []),
        ([5], [(5, 5)]),
        ([1, 2, 3, 7, 8, 2], [(1, 3), (7, 8), (2, 2)]),
        ([3, 2, 1], [(3, 3), (2, 2), (1, 1)]),
    ],
)
def test_neighbouring_blocks_travel_together(ids: list[int], runs: list[tuple[int, int]]) -> None:
    assert joined(ids) == runs
