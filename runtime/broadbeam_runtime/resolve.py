"""Names to addresses: the hosts file of a node without cluster DNS first, then DNS."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable


class ResolveError(OSError):
    """A name that neither the hosts file nor DNS knows."""


def from_hosts_file(name: str, path: str | None) -> str | None:
    """The address that the lines "address name…" of `path` give `name`; a missing file knows nothing."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except FileNotFoundError:
        return None
    for line in lines:
        address, *names = line.partition("#")[0].split() or [""]
        if name in names:
            return address
    return None


def from_dns(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror:
        return None


def resolve(name: str, hosts_file: str | None) -> str | None:
    """The address of `name` now, or None. An address is its own answer."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return from_hosts_file(name, hosts_file) or from_dns(name)


def wait_for(
    name: str,
    hosts_file: str | None,
    timeout_s: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """The address of `name` once it has one; peers start together, so a record may lag. ResolveError after
    `timeout_s`."""
    deadline = clock() + timeout_s
    while (address := resolve(name, hosts_file)) is None:
        if clock() >= deadline:
            raise ResolveError(
                f"{name}: no address in {hosts_file or 'a hosts file'} or DNS after {timeout_s:g} s"
            )
        sleep(0.2)
    return address
