"""Network interfaces of this host, and the variables by which MPI, NCCL and Gloo choose among them."""

import ipaddress
import socket
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from lentando.cli.doctor.findings import Finding, note, ok, problem

__all__ = ["Interface", "check_interfaces", "first_outward", "interfaces", "same_address_on_two_hosts"]

SECTION = "network"

_SIOCGIFCONF, _SIOCGIFNETMASK = 0x8912, 0x891B  # of Linux
_IFREQ_BYTES = 40


class Interface(TypedDict):
    """A network interface: addresses with the length of their network's prefix, 10.0.0.2/24."""

    name: str
    is_up: bool
    addresses: list[str]


@dataclass(frozen=True)
class _Choice:
    """A variable that chooses interfaces.

    Attributes:
        variable: its name.
        reader: who obeys it.
        written: what it holds: names and networks; names alone; beginnings of names, ``=`` before a whole one; or
            names, those of RDMA devices too, with a port behind (``mlx5_0:1``).
        excludes: whether it names those that are not used.
    """

    variable: str
    reader: str
    written: Literal["names and networks", "names", "beginnings", "devices"]
    excludes: bool = False


_CHOICES = (
    _Choice("OMPI_MCA_btl_tcp_if_include", "Open MPI", "names and networks"),
    _Choice("OMPI_MCA_btl_tcp_if_exclude", "Open MPI", "names and networks", excludes=True),
    _Choice("OMPI_MCA_oob_tcp_if_include", "Open MPI 4", "names and networks"),
    _Choice("PRTE_MCA_prte_if_include", "mpirun of Open MPI 5", "names and networks"),
    _Choice("PRTE_MCA_oob_tcp_if_include", "mpirun of Open MPI 5", "names and networks"),
    _Choice("FI_TCP_IFACE", "MPICH over libfabric", "names"),
    _Choice("FI_SOCKETS_IFACE", "MPICH over libfabric", "names"),
    _Choice("UCX_NET_DEVICES", "UCX of MPICH or Open MPI", "devices"),
    _Choice("HYDRA_IFACE", "mpiexec of MPICH", "names"),
    _Choice("NCCL_SOCKET_IFNAME", "NCCL", "beginnings"),
    _Choice("GLOO_SOCKET_IFNAME", "Gloo", "names"),
    _Choice("HOROVOD_GLOO_IFACE", "horovodrun --gloo", "names"),
)


def interfaces() -> list[Interface]:
    """Of this host. Addresses are told on Linux only."""
    names = [name for _, name in socket.if_nameindex()]
    if sys.platform != "linux":
        return [Interface(name=name, is_up=True, addresses=[]) for name in names]
    addresses = [*_addresses_of_version_4(), *_addresses_of_version_6()]
    return [
        Interface(name=name, is_up=_is_up(name), addresses=[address for owner, address in addresses if owner == name])
        for name in names
    ]


def first_outward(found: Sequence[Interface]) -> str | None:
    """The first that is up and leads to other hosts, as far as can be told; not a container's bridge if possible."""
    outward = [one["name"] for one in found if _leads_out(one)]
    return next((name for name in outward if not name.startswith(("docker", "virbr", "br-", "veth"))), None) or next(
        iter(outward), None
    )


def check_interfaces(environment: dict[str, str], found: Sequence[Interface], vendor: str | None) -> list[Finding]:
    """Which there are, which the MPI here will use between hosts, and who says so."""
    described = ", ".join(_described(one) for one in found) or "none"
    findings = [ok(SECTION, f"interfaces: {described}")]
    chosen = [choice for choice in _CHOICES if environment.get(choice.variable)]
    for choice in chosen:
        findings += _check_choice(choice, environment[choice.variable], found)
    if {"OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"} <= environment.keys():
        findings.append(
            problem(
                SECTION,
                "OMPI_MCA_btl_tcp_if_include and OMPI_MCA_btl_tcp_if_exclude are both set: Open MPI takes one of them",
                "unset OMPI_MCA_btl_tcp_if_exclude",
            )
        )
    if vendor is not None and not any(vendor.split()[0] in choice.reader for choice in chosen):
        outward = ", ".join(one["name"] for one in found if _leads_out(one)) or "none"
        chooser = "OMPI_MCA_btl_tcp_if_include" if vendor == "Open MPI" else "FI_TCP_IFACE or UCX_NET_DEVICES"
        findings.append(ok(SECTION, f"between hosts, {vendor} chooses among all that lead out: {outward} ({chooser})"))
    return findings


def same_address_on_two_hosts(by_host: dict[str, Sequence[Interface]]) -> list[Finding]:
    """A bridge for containers or virtual machines has the same address everywhere: MPI may take it for a way."""
    owners: dict[str, dict[str, str]] = {}
    for host, found in by_host.items():
        for one in found:
            for address in one["addresses"] if _leads_out(one) else []:
                if not ipaddress.ip_interface(address).is_link_local:
                    owners.setdefault(address, {})[host] = one["name"]
    findings = []
    for address, names in owners.items():
        if len(names) > 1:
            name = next(iter(names.values()))
            findings.append(
                note(
                    SECTION,
                    f"{address} ({name}) is an address of {len(names)} hosts: it joins none of them, but MPI may try",
                    f"export OMPI_MCA_btl_tcp_if_exclude=lo,{name} PRTE_MCA_prte_if_exclude=lo,{name}",
                )
            )
    return findings


def _check_choice(choice: _Choice, value: str, found: Sequence[Interface]) -> list[Finding]:
    text = f"{choice.variable}={value} ({choice.reader})"
    if choice.written == "beginnings" and value.startswith("^"):
        return [ok(SECTION, f"{text} excludes interfaces")]
    tokens = [token.strip() for token in value.split(",") if token.strip()]
    if choice.written == "devices":
        tokens = [token for token in tokens if not _is_rdma(token)]
    matches = {token: [one["name"] for one in found if _names(token, one, choice)] for token in tokens}
    if choice.excludes:
        if any("lo" in names for names in matches.values()):
            return [ok(SECTION, f"{text} excludes interfaces")]
        return [
            note(SECTION, f"{text} does not exclude lo, as the default does", f"export {choice.variable}=lo,{value}")
        ]
    suggested = first_outward(found) or "lo"
    findings = [
        problem(
            SECTION,
            f"{choice.variable}={value} ({choice.reader}): this host has no interface"
            f"{' or network' if choice.written == 'names and networks' else ''} {token}; it has "
            f"{', '.join(_described(one) for one in found)}",
            f"export {choice.variable}={suggested}",
        )
        for token in tokens
        if not matches[token]
    ]
    up = {one["name"] for one in found if one["is_up"]}
    down = [names for names in matches.values() if names and not up & {*names}]
    findings += [
        problem(SECTION, f"{text}: {', '.join(names)} is down", f"export {choice.variable}={suggested}")
        for names in down
    ]
    names = sorted({name for names in matches.values() for name in names})
    return findings or [ok(SECTION, f"{text} chooses {', '.join(names) or 'devices for RDMA'}")]


def _names(token: str, one: Interface, choice: _Choice) -> bool:
    """Whether a word of such a variable means this interface."""
    name = one["name"]
    if choice.written == "names and networks" and "/" in token:
        try:
            network = ipaddress.ip_network(token, strict=False)
        except ValueError:
            return False
        return any(ipaddress.ip_interface(address).ip in network for address in one["addresses"])
    if choice.written == "beginnings":
        return (
            name == token[1:].partition(":")[0] if token.startswith("=") else name.startswith(token.partition(":")[0])
        )
    if choice.written == "devices":
        return token == "all" or name == token.partition(":")[0]
    return name == token


def _is_rdma(token: str) -> bool:
    return Path("/sys/class/infiniband", token.partition(":")[0]).exists()


def _described(one: Interface) -> str:
    return f"{one['name']} ({', '.join(one['addresses']) or ('up' if one['is_up'] else 'down')})"


def _leads_out(one: Interface) -> bool:
    return one["is_up"] and any(not ipaddress.ip_interface(address).is_loopback for address in one["addresses"])


def _is_up(name: str) -> bool:
    folder = Path("/sys/class/net", name)
    try:
        return (
            bool(int((folder / "flags").read_text(), 16) & 1) and (folder / "operstate").read_text().strip() != "down"
        )
    except OSError:  # /sys may be hidden from a container
        return True


def _addresses_of_version_4() -> list[tuple[str, str]]:
    """By the kernel's oldest interface, which any container grants."""
    import fcntl  # Unix alone has it

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        buffer = array("B", bytes(256 * _IFREQ_BYTES))
        request = struct.pack("iP", len(buffer), buffer.buffer_info()[0])
        length = struct.unpack("iP", fcntl.ioctl(asked, _SIOCGIFCONF, request))[0]
        for start in range(0, length, _IFREQ_BYTES):
            entry = buffer[start : start + _IFREQ_BYTES].tobytes()
            label = entry[:16].partition(b"\0")[0]
            answer = fcntl.ioctl(asked, _SIOCGIFNETMASK, struct.pack("16s24x", label))
            network = f"{socket.inet_ntoa(entry[20:24])}/{socket.inet_ntoa(answer[20:24])}"
            found.append((label.decode().partition(":")[0], ipaddress.ip_interface(network).with_prefixlen))
    return found


def _addresses_of_version_6() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [(name, f"{ipaddress.IPv6Address(int(number, 16))}/{int(bits, 16)}") for number, _, bits, *_, name in fields]
