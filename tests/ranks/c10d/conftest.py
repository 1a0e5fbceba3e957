"""The group of all ranks, which torch.distributed makes over MPI."""

from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist

from lentando.comm.transport import Transport


@pytest.fixture(scope="session", autouse=True)
def group(transport: Transport) -> Iterator[None]:
    """``init_process_group`` with no further arguments; left at the end."""
    if transport.name != "mpi":
        pytest.skip("backend lentando needs ranks of MPI")
    import lentando.c10d  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("lentando")
    yield
    dist.destroy_process_group()
