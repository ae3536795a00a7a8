from __future__ import annotations

import socket
from uuid import uuid4

import pytest

from broadbeam_operator.local.addresses import (
    PODS_PER_RANGE,
    AddressError,
    AddressRange,
    claimed,
    port_is_free,
    reserved_range,
)
from broadbeam_operator.local.session import PortInUseError, localhost_is_free


def test_ranges_held_at_once_differ_and_come_back() -> None:
    scope = uuid4().hex
    with reserved_range(scope) as first, reserved_range(scope) as second:
        assert (first.number, second.number) == (0, 1)
    with reserved_range(scope) as third:
        assert third.number == 0


def test_one_of_two_has_a_name() -> None:
    scope = uuid4().hex
    with claimed("127.0.0.1", scope) as first, claimed("127.0.0.1", scope) as second:
        assert (first, second) == (True, False)


def test_the_lowest_free_address_is_given_out() -> None:
    addresses = AddressRange(7)
    assert [addresses.take() for _ in range(3)] == ["127.77.7.1", "127.77.7.2", "127.77.7.3"]
    addresses.give_back("127.77.7.2")
    assert addresses.take() == "127.77.7.2"


def test_a_full_range_says_so() -> None:
    addresses = AddressRange(7)
    for _ in range(PODS_PER_RANGE):
        addresses.take()
    with pytest.raises(AddressError, match=r"127\.77\.7\.0/24 is full: 254 pods are the limit"):
        addresses.take()


def test_a_port_is_free_until_somebody_listens() -> None:
    with socket.create_server(("127.77.250.9", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free("127.77.250.9", port)
        assert port_is_free("127.77.250.8", port)


def test_the_gateway_leaves_localhost_to_another_only_for_its_metrics() -> None:
    assert localhost_is_free(8080, lambda address, port: True)
    assert not localhost_is_free(8080, lambda address, port: port == 8080)
    with pytest.raises(PortInUseError, match=r"port 8080 of 127\.0\.0\.1 is in use"):
        localhost_is_free(8080, lambda address, port: port != 8080)
