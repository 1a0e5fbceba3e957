"""Arrays on a GPU and MPI: whether this MPI accepts them, and the synchronisation that it needs."""

import ctypes
import os
from importlib.util import find_spec
from typing import Any

from mpi4py import MPI

from lentando.comm.array_module import array_module, is_on_host
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array

__all__ = ["is_cuda_aware", "synchronize"]


def is_cuda_aware() -> bool:
    """Whether device arrays can be passed to MPI directly: MPI is CUDA-aware, and CuPy is installed.

    MPI is queried in the standard's way (4.1) and in Open MPI's older one. ``LENTANDO_CUDA_AWARE_MPI=0|1`` overrides
    both. Tested with addresses in host memory; never run on a GPU.

    Raises:
        ConfigurationError: if ``LENTANDO_CUDA_AWARE_MPI`` has another value.
    """
    override = os.environ.get("LENTANDO_CUDA_AWARE_MPI")
    if override not in (None, "0", "1"):
        raise ConfigurationError(f"LENTANDO_CUDA_AWARE_MPI={override!r}: expected 0 or 1")
    if override is not None:
        return override == "1"
    if find_spec("cupy") is None:
        return False
    info = MPI.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds")
    info.Free()
    if kinds is not None and "cuda" in kinds:
        return True
    try:
        query = ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support
    except (AttributeError, OSError):  # not Open MPI, or not among the libraries that the module was linked with
        return False
    return bool(query())


def synchronize(*arrays: Array) -> Any:
    """Wait for the work that is enqueued on the current stream, if any array is on a device: MPI knows no streams.

    Returns:
        the device of the arrays; None for host memory.
    """
    for array in arrays:
        if not is_on_host(array):
            on_device: Any = array
            array_module(array).cuda.get_current_stream().synchronize()
            return on_device.device
    return None
