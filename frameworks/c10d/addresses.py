"""The address under which the other nodes of a job reach this one."""

from collections.abc import Sequence
from ipaddress import IPv4Interface

from lentando.comm.network_interfaces import ipv4_addresses

__all__ = ["common_address", "own_interfaces"]


def own_interfaces() -> list[str]:
    """The IPv4 addresses of this node with their networks, such as ``"10.0.0.1/24"``; without the loopback's."""
    return [str(address) for _, address in ipv4_addresses() if not address.is_loopback]


def common_address(own: Sequence[str], others: Sequence[Sequence[str]]) -> str | None:
    """The first address of a node in a network of which each other node has an address, too; None without one.

    An address that another node has as well is that of a container's bridge, which connects none. It comes last.

    Args:
        own: interfaces of the node, as ``own_interfaces`` returns them.
        others: interfaces of each other node.

    Example:
        >>> common_address(["172.17.0.1/16", "10.0.0.1/24"], [["172.18.0.1/16", "10.0.0.2/24"]])
        '10.0.0.1'
        >>> common_address(["172.17.0.1/16", "10.0.0.1/24"], [["172.17.0.1/16", "10.0.0.2/24"]])
        '10.0.0.1'
    """
    elsewhere = [[IPv4Interface(each).ip for each in node] for node in others]
    for interface in sorted(map(IPv4Interface, own), key=lambda each: any(each.ip in node for node in elsewhere)):
        if all(any(ip in interface.network for ip in node) for node in elsewhere):
            return str(interface.ip)
    return None
