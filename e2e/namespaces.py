"""A network of our own for the test cluster: pods get addresses, and nothing is seen or touched outside.

EndpointSlices refuse 127.0.0.0/8, so pods need other addresses: those of the loopback device of a network
namespace, one alias each. (That device could own the whole network at once, and any address of it would
bind; but gloo wants to find its own among the addresses of an interface.)
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

API_SERVER_ADDRESS = "10.77.0.1"

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_IFF_UP = 1


class IsolationError(RuntimeError):
    """This machine does not let us make a network namespace."""


def isolate() -> None:
    """Move this thread, and every thread and process it starts, into a new network namespace.

    Root needs CAP_SYS_ADMIN; anybody else gets a user namespace too, in which they are root. Raises
    IsolationError, in one line, where the machine allows neither.
    """
    flags = _CLONE_NEWNET if os.geteuid() == 0 else _CLONE_NEWUSER | _CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise IsolationError(
            f"the e2e cluster needs a network namespace, and unshare says: {os.strerror(ctypes.get_errno())} "
            "(run as root with CAP_SYS_ADMIN, allow user namespaces, or set BROADBEAM_E2E_KUBECONFIG)"
        )
    if flags & _CLONE_NEWUSER:
        _map_to_root(user, group)
    _up()


def _map_to_root(user: int, group: int) -> None:
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def set_address(alias: int, address: str) -> None:
    """Give the loopback device one more address, or alias number `alias` another one."""
    name = f"lo:{alias}".encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        # In this order: without a netmask the first call makes it a /8, which is local as a whole.
        for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.255")):
            packed = struct.pack("16sH2x4s8x", name, socket.AF_INET, socket.inet_aton(value))
            fcntl.ioctl(device, request, packed)


def _up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        fcntl.ioctl(device, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
    set_address(0, API_SERVER_ADDRESS)
