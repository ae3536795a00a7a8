"""Loopback addresses for the pods of one `up`: a range of 127.77.0.0/16 to itself, one address a pod."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

RANGES = 240  # 127.77.0 to 127.77.239; the rest is left to tests
PODS_PER_RANGE = 254
SCOPE = "broadbeam"
NOBODYS = "127.77.255.254"  # no pod's: a port that is taken there is taken everywhere


class AddressError(Exception):
    """No address is left; the message says how many there are."""


@dataclass(slots=True)
class AddressRange:
    """127.77.`number`.1 to .254; the lowest free address is given out."""

    number: int
    used: set[int] = field(default_factory=set)

    def take(self) -> str:
        free = next((host for host in range(1, PODS_PER_RANGE + 1) if host not in self.used), None)
        if free is None:
            raise AddressError(f"127.77.{self.number}.0/24 is full: {PODS_PER_RANGE} pods are the limit")
        self.used.add(free)
        return f"127.77.{self.number}.{free}"

    def give_back(self, address: str) -> None:
        self.used.discard(int(address.rpartition(".")[2]))


@contextmanager
def claimed(name: str, scope: str = SCOPE) -> Iterator[bool]:
    """Whether `name` is ours alone for the length of the body, or until this process ends, however it does.

    An abstract socket, not a file: like loopback addresses it is seen by every user and whatever their cache,
    and it is another one in another network namespace.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0{scope}/{name}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            yield False
        else:
            yield True


@contextmanager
def reserved_range(scope: str = SCOPE) -> Iterator[AddressRange]:
    """The first range that no other process holds."""
    for number in range(RANGES):
        with claimed(f"127.77.{number}", scope) as ours:
            if ours:
                yield AddressRange(number)
                return
    raise AddressError(f"all {RANGES} ranges of 127.77.0.0/16 are in use by other clusters")


def port_is_free(address: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
