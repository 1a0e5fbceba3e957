"""The address under which the other nodes of a job reach this one."""

import fcntl
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Interface

__all__ = ["common_address", "own_interfaces"]

SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B
"""Linux's requests for the address and the mask of a network interface."""


def own_interfaces() -> list[str]:
    """The IPv4 addresses of this node with their networks, such as ``"10.0.0.1/24"``; without the loopback's."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                address, mask = (
                    socket.inet_ntoa(fcntl.ioctl(probe.fileno(), code, request)[20:24])
                    for code in (SIOCGIFADDR, SIOCGIFNETMASK)
                )
            except OSError:  # an interface without an address
                continue
            if not IPv4Address(address).is_loopback:
                found.append(str(IPv4Interface(f"{address}/{mask}")))
    return found


def common_address(own: Sequence[str], others: Sequence[Sequence[str]]) -> str | None:
    """The first address of a node in a network of which each other node has an address, too; None without one.

    Args:
        own: interfaces of the node, as ``own_interfaces`` returns them.
        others: interfaces of each other node.

    Example:
        >>> common_address(["172.17.0.1/16", "10.0.0.1/24"], [["172.18.0.1/16", "10.0.0.2/24"]])
        '10.0.0.1'
    """
    for interface in map(IPv4Interface, own):
        if all(any(IPv4Interface(each).ip in interface.network for each in node) for node in others):
            return str(interface.ip)
    return None
