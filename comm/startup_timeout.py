"""An end to the wait for ranks that never come: the first messages between ranks may have no way to each other."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lentando.comm.errors import ConfigurationError

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "startup_timeout", "startup_timeout_seconds"]

DEFAULT_TIMEOUT_SECONDS = 120.0
"""How long a rank waits for the others unless LENTANDO_JOIN_SECONDS says otherwise."""

INTERFACES = (
    "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude", "OMPI_MCA_btl", "OMPI_MCA_pml",
    "UCX_NET_DEVICES", "UCX_TLS", "FI_PROVIDER", "FI_TCP_IFACE", "HYDRA_IFACE", "MPIR_CVAR_CH4_NETMOD",
    "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME",
)  # fmt: skip
"""Variables that choose the network between ranks."""


def startup_timeout_seconds() -> float:
    """What ``LENTANDO_JOIN_SECONDS`` says.

    Raises:
        ConfigurationError: if it is no positive number.
    """
    text = os.environ.get("LENTANDO_JOIN_SECONDS", str(DEFAULT_TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigurationError(f"LENTANDO_JOIN_SECONDS={text!r}: expected seconds > 0, or inf to wait for ever")
    return min(seconds, threading.TIMEOUT_MAX)


@contextmanager
def startup_timeout(rank: int, size: int) -> Iterator[None]:
    """Around the first communication of the ranks: if it lasts too long, say what to check and end this process.

    No exception could: the engine waits inside a call that does not return. The launcher ends the other ranks.

    Args:
        rank: this process.
        size: number of ranks that are to come together.
    """
    seconds = startup_timeout_seconds()
    timer = threading.Timer(seconds, _give_up, (rank, size, seconds))
    timer.daemon = True
    if size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(rank: int, size: int, seconds: float) -> None:
    chosen = ", ".join(f"{name}={os.environ[name]}" for name in INTERFACES if name in os.environ) or "none"
    sys.stderr.write(
        f"Lentando: rank {rank} on {os.uname().nodename} has waited {seconds:g} s for the other ranks to join "
        f"({size} in all) and ends the job. Either a rank has not come to init(), or messages between the ranks find "
        "no way: then name the network interface that joins the hosts, for Open MPI by "
        "OMPI_MCA_btl_tcp_if_include=eth0 (mpirun --mca btl_tcp_if_include eth0), for MPICH by UCX_NET_DEVICES or "
        f"FI_TCP_IFACE, for Horovod by HOROVOD_GLOO_IFACE. Variables that choose one here: {chosen}. "
        "LENTANDO_JOIN_SECONDS sets how long to wait\n"
    )
    sys.stderr.flush()
    os._exit(1)
