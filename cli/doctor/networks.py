"""Network interfaces of a host, and the variables that choose among them for MPI, NCCL and Gloo."""

import ipaddress
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from lentando.cli.doctor.findings import Finding, note, ok, problem
from lentando.comm.network_interfaces import ipv4_addresses

__all__ = ["Interface", "check_interfaces", "first_outward", "interfaces", "same_address_on_two_hosts"]

SECTION = "network"


class Interface(TypedDict):
    """A network interface: addresses with the length of their network's prefix, 10.0.0.2/24."""

    name: str
    is_up: bool
    addresses: list[str]


@dataclass(frozen=True)
class _Choice:
    """A variable that chooses interfaces.

    Attributes:
        variable: name of the variable.
        reader: software that reads it.
        written: format of its value: names and networks; names; beginnings of names, with ``=`` before a complete name;
            or names of interfaces and RDMA devices, followed by a port (``mlx5_0:1``).
        excludes: whether the value lists interfaces that are not used.
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
    """Return the interfaces of this host; their addresses are known on Linux only."""
    names = [name for _, name in socket.if_nameindex()]
    if sys.platform != "linux":
        return [Interface(name=name, is_up=True, addresses=[]) for name in names]
    addresses = [(name, address.with_prefixlen) for name, address in ipv4_addresses()] + _addresses_of_version_6()
    return [
        Interface(name=name, is_up=_is_up(name), addresses=[address for owner, address in addresses if owner == name])
        for name in names
    ]


def first_outward(available: Sequence[Interface]) -> str | None:
    """Return the first interface that is up and not loopback, preferably not the bridge of a container."""
    outward = [interface["name"] for interface in available if _leads_out(interface)]
    return next((name for name in outward if not name.startswith(("docker", "virbr", "br-", "veth"))), None) or next(
        iter(outward), None
    )


def check_interfaces(environment: dict[str, str], available: Sequence[Interface], vendor: str | None) -> list[Finding]:
    """Return findings on the interfaces, and on the variables that choose among them.

    Args:
        environment: variables of the rank.
        available: interfaces of the host.
        vendor: vendor of the MPI library, or None without MPI.
    """
    described = ", ".join(map(_described, available)) or "none"
    findings = [ok(SECTION, f"interfaces: {described}")]
    chosen = [choice for choice in _CHOICES if environment.get(choice.variable)]
    for choice in chosen:
        findings += _check_choice(choice, environment[choice.variable], available)
    if {"OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"} <= environment.keys():
        findings.append(
            problem(
                SECTION,
                "OMPI_MCA_btl_tcp_if_include and OMPI_MCA_btl_tcp_if_exclude are both set: Open MPI uses only one",
                "unset OMPI_MCA_btl_tcp_if_exclude",
            )
        )
    if vendor is not None and not any(vendor.split()[0] in choice.reader for choice in chosen):
        outward = ", ".join(interface["name"] for interface in available if _leads_out(interface)) or "none"
        chooser = "OMPI_MCA_btl_tcp_if_include" if vendor == "Open MPI" else "FI_TCP_IFACE or UCX_NET_DEVICES"
        findings.append(ok(SECTION, f"between hosts, {vendor} chooses among all that are up: {outward} ({chooser})"))
    return findings


def same_address_on_two_hosts(by_host: dict[str, Sequence[Interface]]) -> list[Finding]:
    """Return findings on bridges of containers, whose address is the same on all hosts but connects none of them."""
    owners: dict[str, dict[str, str]] = {}
    for host, available in by_host.items():
        for interface in available:
            for address in interface["addresses"] if _leads_out(interface) else []:
                if not ipaddress.ip_interface(address).is_link_local:
                    owners.setdefault(address, {})[host] = interface["name"]
    findings = []
    for address, names in owners.items():
        if len(names) > 1:
            name = next(iter(names.values()))
            findings.append(
                note(
                    SECTION,
                    f"{address} ({name}) is an address of {len(names)} hosts: it connects none, but MPI may try it",
                    f"export OMPI_MCA_btl_tcp_if_exclude=lo,{name} PRTE_MCA_prte_if_exclude=lo,{name}",
                )
            )
    return findings


def _check_choice(choice: _Choice, value: str, available: Sequence[Interface]) -> list[Finding]:
    text = f"{choice.variable}={value} ({choice.reader})"
    if choice.written == "beginnings" and value.startswith("^"):
        return [ok(SECTION, f"{text} excludes interfaces")]
    tokens = [token.strip() for token in value.split(",") if token.strip()]
    if choice.written == "devices":
        tokens = [token for token in tokens if not _is_rdma(token)]
    matches = {
        token: [interface["name"] for interface in available if _names(token, interface, choice)] for token in tokens
    }
    if choice.excludes:
        if any("lo" in names for names in matches.values()):
            return [ok(SECTION, f"{text} excludes interfaces")]
        return [
            note(SECTION, f"{text} does not exclude lo, as the default does", f"export {choice.variable}=lo,{value}")
        ]
    suggested = first_outward(available) or "lo"
    findings = [
        problem(
            SECTION,
            f"{choice.variable}={value} ({choice.reader}): this host has no interface"
            f"{' or network' if choice.written == 'names and networks' else ''} {token}; it has "
            f"{', '.join(map(_described, available))}",
            f"export {choice.variable}={suggested}",
        )
        for token in tokens
        if not matches[token]
    ]
    up = {interface["name"] for interface in available if interface["is_up"]}
    down = [names for names in matches.values() if names and not up & {*names}]
    findings += [
        problem(SECTION, f"{text}: {', '.join(names)} is down", f"export {choice.variable}={suggested}")
        for names in down
    ]
    names = sorted({name for names in matches.values() for name in names})
    return findings or [ok(SECTION, f"{text} chooses {', '.join(names) or 'devices for RDMA'}")]


def _names(token: str, interface: Interface, choice: _Choice) -> bool:
    """Return whether an entry of the variable denotes this interface."""
    name = interface["name"]
    if choice.written == "names and networks" and "/" in token:
        try:
            network = ipaddress.ip_network(token, strict=False)
        except ValueError:
            return False
        return any(ipaddress.ip_interface(address).ip in network for address in interface["addresses"])
    if choice.written == "beginnings":
        return (
            name == token[1:].partition(":")[0] if token.startswith("=") else name.startswith(token.partition(":")[0])
        )
    if choice.written == "devices":
        return token == "all" or name == token.partition(":")[0]
    return name == token


def _is_rdma(token: str) -> bool:
    return Path("/sys/class/infiniband", token.partition(":")[0]).exists()


def _described(interface: Interface) -> str:
    return f"{interface['name']} ({', '.join(interface['addresses']) or ('up' if interface['is_up'] else 'down')})"


def _leads_out(interface: Interface) -> bool:
    addresses = map(ipaddress.ip_interface, interface["addresses"])
    return interface["is_up"] and any(not address.is_loopback for address in addresses)


def _is_up(name: str) -> bool:
    folder = Path("/sys/class/net", name)
    try:
        return (
            bool(int((folder / "flags").read_text(), 16) & 1) and (folder / "operstate").read_text().strip() != "down"
        )
    except OSError:  # /sys may be hidden from a container
        return True


def _addresses_of_version_6() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [(name, f"{ipaddress.IPv6Address(int(number, 16))}/{int(bits, 16)}") for number, _, bits, *_, name in fields]
