"""MPI and arrays on a device: a CUDA-aware MPI is given an address; this one reads what is at it, in host memory."""

import time
from collections.abc import Iterator
from typing import Any

import device_arrays
import numpy as np
import pytest
from mpi4py import MPI
from numpy_model import Worker

from lentando.comm.array_module import to_host
from lentando.comm.capabilities import takes_device_arrays
from lentando.comm.errors import ConfigurationError
from lentando.comm.testing import check_device_arrays
from lentando.comm.transports.mpi import MPITransport
from lentando.optimizers.rules.gossip import OSGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.slow_momentum import SlowMomentum


@pytest.fixture
def device_transport(monkeypatch: pytest.MonkeyPatch) -> Iterator[MPITransport]:
    """Of an MPI that claims to be CUDA-aware. The stand-in's addresses are in host memory, where any MPI reads."""
    monkeypatch.setenv("LENTANDO_CUDA_AWARE_MPI", "1")
    opened = MPITransport()
    device_arrays.events.clear()
    yield opened
    opened.close()


def test_mpi_takes_device_arrays_by_their_address(device_transport: MPITransport) -> None:
    check_device_arrays(device_transport, device_arrays.asarray)


def test_stream_is_waited_for_before_mpi_reads_a_device(device_transport: MPITransport) -> None:
    array, size, rank = device_arrays.zeros(3), device_transport.size, device_transport.rank
    for operation in (
        lambda: device_transport.exchange([((rank + 1) % size, array)], [((rank - 1) % size, array.copy())]).wait(),
        lambda: device_transport.broadcast(array),
        lambda: device_transport.allgather(array),
        lambda: device_transport.allreduce(array),
    ):
        before = device_arrays.events.count("stream")
        operation()
        assert device_arrays.events.count("stream") == before + 1
    deadline = time.perf_counter() + 10
    while "device 0 in lentando-progress" not in device_arrays.events:  # where it may come after the exchange
        assert time.perf_counter() < deadline
        time.sleep(0.001)
    host = np.zeros(3)
    device_transport.allreduce(host)
    device_transport.exchange([((rank + 1) % size, host)], [((rank - 1) % size, host.copy())]).wait()
    assert device_arrays.events.count("stream") == 4


def test_mpi_without_cuda_takes_no_device_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LENTANDO_CUDA_AWARE_MPI", raising=False)
    opened = MPITransport()
    is_cuda_aware = takes_device_arrays(opened)
    opened.close()
    if is_cuda_aware:
        pytest.skip("this MPI is CUDA-aware")
    # As if CuPy were there.
    monkeypatch.setattr("lentando.comm.transports.mpi.device_memory.find_spec", lambda name: object())
    asked = MPITransport()
    assert not takes_device_arrays(asked)
    asked.close()


def test_one_rank_that_cannot_is_enough_to_keep_models_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENTANDO_CUDA_AWARE_MPI", "0" if MPI.COMM_WORLD.Get_rank() == 0 else "1")
    opened = MPITransport()
    assert not takes_device_arrays(opened)
    opened.close()


def test_answer_that_is_neither_yes_nor_no_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENTANDO_CUDA_AWARE_MPI", "maybe")
    with pytest.raises(ConfigurationError, match="LENTANDO_CUDA_AWARE_MPI='maybe': expected 0 or 1"):
        MPITransport()


@pytest.mark.parametrize(
    "method", [{"base": LocalSGD(), "period": 3, "outer": SlowMomentum()}, {"base": OSGP(deterministic=True)}]
)
def test_replica_on_a_device_trains_over_mpi_as_in_host_memory(
    device_transport: MPITransport, method: dict[str, Any]
) -> None:
    def trained(place: Any) -> bytes:
        own = Worker(
            device_transport,
            lambda rank, step, x: 0.3 * x + rank + step,
            np.linspace(-1, 1, 13),
            lambda step: 0.1,
            place=place,
            **method,
        )
        return to_host(own.run(10)).tobytes()

    assert trained(device_arrays.asarray) == trained(np.asarray)
