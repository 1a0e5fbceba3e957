"""Horovod's questions about how it was built (``nccl_built()`` and others), answered for this library.

Lentando is not compiled against backends but loads them. ``*_built`` therefore says whether a backend is installed, and
``*_enabled`` whether this job uses it.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from lentando.comm.world import transport

__all__ = [
    "ccl_built",
    "cuda_built",
    "ddl_built",
    "gloo_built",
    "gloo_enabled",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rocm_built",
]

NCCL_WHEELS = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


def mpi_built() -> bool:
    """Return whether mpi4py is installed, through which MPI is used."""
    return find_spec("mpi4py") is not None


def mpi_enabled() -> bool:
    """Return whether MPI connects the ranks of this job.

    Raises:
        NotInitializedError: before ``init()``.
    """
    return transport().name in ("mpi", "nccl")


def mpi_threads_supported() -> bool:
    """Return whether several threads may call MPI at the same time in this job (``MPI_THREAD_MULTIPLE``).

    Raises:
        NotInitializedError: before ``init()``.
    """
    module: Any = sys.modules.get("mpi4py.MPI")
    return mpi_enabled() and module is not None and module.Query_thread() == module.THREAD_MULTIPLE


def gloo_built() -> bool:
    """Return False: Gloo is not a backend of this library."""
    return False


def gloo_enabled() -> bool:
    """Return False: Gloo is not a backend of this library."""
    return False


def nccl_built() -> int:
    """Return NCCL's version as a number (22703 for 2.27.3) if CuPy and nccl4py are installed, otherwise 0.

    1 stands for a version that is not known. Jobs use NCCL with ``LENTANDO_TRANSPORT=nccl``.
    """
    if not cuda_built() or find_spec("nccl") is None:
        return 0
    for wheel in NCCL_WHEELS:
        try:
            major, minor, patch, *_ = version(wheel).split(".")
        except PackageNotFoundError:
            continue
        return int(major) * 10000 + int(minor) * 100 + int(patch)
    return 1


def cuda_built() -> bool:
    """Return whether CuPy is installed, through which arrays on GPUs are sent without a copy in host memory.

    Without it, tensors on a GPU are copied to host memory and back.
    """
    return find_spec("cupy") is not None


def rocm_built() -> bool:
    """Return False: GPUs of AMD are not supported."""
    return False


def ddl_built() -> bool:
    """Return False: IBM's DDL is not a backend of this library."""
    return False


def ccl_built() -> bool:
    """Return False: Intel's oneCCL is not a backend of this library."""
    return False
