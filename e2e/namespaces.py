"""A network of our own for the test cluster: pods get addresses, and nothing is seen or touched outside.

EndpointSlices refuse 127.0.0.0/8, so pods need other addresses. In a network namespace the loopback device
can own all of POD_NETWORK, and any address of it binds.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

POD_NETWORK = "10.77.0.0/16"
API_SERVER_ADDRESS = "10.77.0.1"
_NETMASK = "255.255.0.0"

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C
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
    _own_addresses()


def _map_to_root(user: int, group: int) -> None:
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def _own_addresses() -> None:
    """Bring lo up and give it POD_NETWORK; on a loopback device that makes the whole prefix local."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        state = fcntl.ioctl(device, _SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        (up,) = struct.unpack_from("h", state, 16)
        fcntl.ioctl(device, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", up | _IFF_UP))
        for request, address in ((_SIOCSIFADDR, API_SERVER_ADDRESS), (_SIOCSIFNETMASK, _NETMASK)):
            packed = struct.pack("16sH2x4s8x", b"lo:1", socket.AF_INET, socket.inet_aton(address))
            fcntl.ioctl(device, request, packed)
