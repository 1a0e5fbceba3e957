"""A timeout for the start-up of a job: the first messages between ranks may not be able to reach each other."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lentando.comm.errors import ConfigurationError

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "startup_timeout", "startup_timeout_seconds"]

DEFAULT_TIMEOUT_SECONDS = 120.0
"""Default of ``LENTANDO_JOIN_SECONDS``, the time that a rank waits for the others at start-up."""

INTERFACES = (
    "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude", "OMPI_MCA_btl", "OMPI_MCA_pml",
    "UCX_NET_DEVICES", "UCX_TLS", "FI_PROVIDER", "FI_TCP_IFACE", "HYDRA_IFACE", "MPIR_CVAR_CH4_NETMOD",
    "HOROVOD_GLOO_IFACE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
)  # fmt: skip
"""Environment variables that choose the network between ranks."""


def startup_timeout_seconds() -> float:
    """The value of ``LENTANDO_JOIN_SECONDS``, or its default.

    Raises:
        ConfigurationError: if it is not a positive number.
    """
    text = os.environ.get("LENTANDO_JOIN_SECONDS", str(DEFAULT_TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigurationError(f"LENTANDO_JOIN_SECONDS={text!r}: expected seconds > 0, or inf to wait forever")
    return min(seconds, threading.TIMEOUT_MAX)


@contextmanager
def startup_timeout(rank: int, size: int) -> Iterator[None]:
    """Limit the duration of the ranks' first communication: after the timeout, print advice and end this process.

    An exception is not possible, because the backend waits inside a call that does not return. The launcher ends the
    other ranks.

    Args:
        rank: number of this process.
        size: number of ranks of the job.
    """
    seconds = startup_timeout_seconds()
    timer = threading.Timer(seconds, _end_process, (rank, size, seconds))
    timer.daemon = True
    if size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_process(rank: int, size: int, seconds: float) -> None:
    variables = ", ".join(f"{name}={os.environ[name]}" for name in INTERFACES if name in os.environ) or "none"
    sys.stderr.write(
        f"Lentando: rank {rank} on {os.uname().nodename} has waited {seconds:g} s for the other ranks to join "
        f"({size} in all) and ends the job. Either a rank has not called init(), or messages between the ranks do "
        "not arrive: in that case, name the network interface that connects the hosts, for Open MPI by "
        "OMPI_MCA_btl_tcp_if_include=eth0 (mpirun --mca btl_tcp_if_include eth0), for MPICH by UCX_NET_DEVICES or "
        "FI_TCP_IFACE, for Horovod by HOROVOD_GLOO_IFACE, for torchrun by GLOO_SOCKET_IFNAME. "
        f"Variables that choose one here: {variables}. LENTANDO_JOIN_SECONDS sets how long to wait\n"
    )
    sys.stderr.flush()
    os._exit(1)
