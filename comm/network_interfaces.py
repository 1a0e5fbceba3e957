"""The addresses of this host's network interfaces."""

import socket
import struct
import sys
from array import array
from ipaddress import IPv4Interface

__all__ = ["ipv4_addresses"]

_SIOCGIFCONF, _SIOCGIFNETMASK = 0x8912, 0x891B  # of Linux
_IFREQ_BYTES = 40


def ipv4_addresses() -> list[tuple[str, IPv4Interface]]:
    """Names of interfaces, and their IPv4 addresses with the networks that these belong to; on Linux only.

    By ioctl, which works in every container.
    """
    if sys.platform != "linux":
        return []
    import fcntl  # available on Unix only

    addresses = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        buffer = array("B", bytes(256 * _IFREQ_BYTES))
        request = struct.pack("iP", len(buffer), buffer.buffer_info()[0])
        length = struct.unpack("iP", fcntl.ioctl(device, _SIOCGIFCONF, request))[0]
        for start in range(0, length, _IFREQ_BYTES):
            entry = buffer[start : start + _IFREQ_BYTES].tobytes()
            label = entry[:16].partition(b"\0")[0]
            answer = fcntl.ioctl(device, _SIOCGIFNETMASK, struct.pack("16s24x", label))
            address = IPv4Interface(f"{socket.inet_ntoa(entry[20:24])}/{socket.inet_ntoa(answer[20:24])}")
            addresses.append((label.decode().partition(":")[0], address))
    return addresses
