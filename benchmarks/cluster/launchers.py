"""How the launchers learn of the hosts: through their environment, so that commands stay as they are."""

import os
import subprocess
import time
from collections.abc import Sequence

from hosts import NETWORK, Hosts

PORT = 29500


def environment(hosts: Hosts) -> dict[str, str]:
    """What mpirun of Open MPI and of MPICH, horovodrun, and Gloo read."""
    ssh = str(hosts.commands / "ssh")
    return {
        # Launchers name their folders there by process number, which starts at 1 in each cluster.
        "TMPDIR": str(hosts.temporary),
        "PATH": f"{hosts.commands}:{os.environ['PATH']}",
        # Open MPI: its daemons, then its messages, over TCP between the hosts and shared memory within one.
        "PRTE_MCA_plm_ssh_agent": ssh,
        "PRTE_MCA_prte_if_include": f"{NETWORK}.0/24",
        "PRTE_MCA_prte_default_hostfile": str(hosts.hostfile),
        "PRTE_MCA_rmaps_default_mapping_policy": "node:oversubscribe",
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "tcp,self,sm",
        "OMPI_MCA_btl_tcp_if_include": f"{NETWORK}.0/24",
        # It sees one rank on each host and would spin, while the hosts share this machine's cores.
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        # MPICH. UCX would find that the hosts share memory.
        "UCX_TLS": "tcp,self",
        "UCX_NET_DEVICES": "eth0",
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_LAUNCHER_EXEC": ssh,
        "HYDRA_HOST_FILE": str(hosts.mpich_hostfile),
        "HYDRA_IFACE": "eth0",
        # Gloo, NCCL, Horovod
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "HOROVOD_GLOO_IFACE": "eth0",
    }


def one_process_per_slot(hosts: Hosts, command: Sequence[str]) -> int:
    """Start the command in each slot of each host as torch.distributed expects it. One that fails ends the others.

    Returns:
        The exit status of that one, or 0.
    """
    size = hosts.count * hosts.slots
    shared = {"MASTER_ADDR": hosts.address(hosts.names[0]), "MASTER_PORT": str(PORT), "WORLD_SIZE": str(size)}
    processes = []
    for rank in range(size):
        name = hosts.names[rank // hosts.slots]
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % hosts.slots)}
        processes.append(subprocess.Popen(hosts.on(name, command), env=os.environ | environment(hosts) | shared | own))
    while processes:
        for process in processes:
            if (status := process.poll()) is not None:
                break
        else:
            time.sleep(0.05)
            continue
        processes.remove(process)
        if status:
            for other in processes:
                other.kill()
            return status
    return 0
