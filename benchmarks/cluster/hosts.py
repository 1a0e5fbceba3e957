"""The hosts: network namespaces on a bridge, each behind a link of limited speed."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
DIE_WITH_PARENT = ("setpriv", "--pdeathsig=KILL")
FOLDER = Path("/run/lentando-hosts")
"""Exists only in the cluster's own mount namespace."""


@dataclass(frozen=True)
class Hosts:
    """What a cluster consists of.

    Attributes:
        count: number of hosts.
        rate: speed of each host's link, in each direction, as tc writes it.
        slots: ranks that a host takes.
    """

    count: int
    rate: str
    slots: int

    @property
    def names(self) -> list[str]:
        return [f"h{number}" for number in range(self.count)]

    def address(self, name: str) -> str:
        return f"{NETWORK}.{int(name.removeprefix('h')) + 1}"

    @property
    def hostfile(self) -> Path:
        return FOLDER / "hostfile"

    @property
    def mpich_hostfile(self) -> Path:
        return FOLDER / "mpich_hostfile"

    @property
    def temporary(self) -> Path:
        return FOLDER / "tmp"

    @property
    def commands(self) -> Path:
        """A folder for PATH, with an ssh that enters a namespace."""
        return FOLDER / "bin"

    def exist(self) -> bool:
        return self.hostfile.exists()

    def on(self, name: str, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on a host, with that host's name."""
        script = 'hostname "$0" && exec "$@"'
        return [*DIE_WITH_PARENT, "ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", script, name, *command]


def build(hosts: Hosts) -> None:
    """Make the hosts in the namespaces of this process, which must be new ones."""
    _private_folders(hosts)
    _call("ip link add name bridge0 type bridge")
    _call("ip link set bridge0 up")
    for name in hosts.names:
        _call(f"ip netns add {name}")
        _call(f"ip link add name to-{name} type veth peer name eth0 netns {name}")
        _call(f"ip link set to-{name} master bridge0 up")
        _call(f"ip -n {name} addr add {hosts.address(name)}/24 dev eth0")
        _call(f"ip -n {name} link set eth0 up")
        _call(f"ip -n {name} link set lo up")
        _call(f"ip netns exec {name} cp {FOLDER / 'tcp_retries'} /proc/sys/net/ipv4/tcp_retries2")
        limit = f"root tbf rate {hosts.rate} burst 128k latency 100ms"
        _call(f"tc qdisc add dev to-{name} {limit}")
        _call(f"tc -n {name} qdisc add dev eth0 {limit}")


def _private_folders(hosts: Hosts) -> None:
    """Places to write that only this mount namespace sees: for ip, for the names of the hosts, for our files."""
    for folder in (Path("/run/netns"), FOLDER):
        folder.mkdir(exist_ok=True)
        _call(f"mount -t tmpfs none {folder}")
    names = "".join(f"{hosts.address(name)} {name}\n" for name in hosts.names)
    # A launcher that has lost a host then learns of it within seconds, where Linux would try for a quarter of an hour.
    (FOLDER / "tcp_retries").write_text("5\n")
    (FOLDER / "names").write_text(f"127.0.0.1 localhost\n{names}")
    _call(f"mount --bind {FOLDER / 'names'} /etc/hosts")
    hosts.commands.mkdir()
    hosts.temporary.mkdir()
    ssh = hosts.commands / "ssh"
    shutil.copy(Path(__file__).parent / "ssh.sh", ssh)
    ssh.chmod(0o755)
    hosts.mpich_hostfile.write_text("".join(f"{name}:{hosts.slots}\n" for name in hosts.names))
    hosts.hostfile.write_text("".join(f"{name} slots={hosts.slots}\n" for name in hosts.names))


def _call(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"cluster: `{command}` failed: {done.stderr.strip()}")
