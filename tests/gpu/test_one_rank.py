"""NCCL with one rank, and the numerics on CuPy arrays: what one GPU can show."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from matching_nccl import MatchingBinding, MatchingNCCL
from numpy_model import Worker

from lentando.comm.array_module import array_module, copy_into, is_on_host, to_host
from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import TransportError
from lentando.comm.reductions.backend import BackendReduction, BackendShardedReduction
from lentando.comm.reductions.ring import RingReduction
from lentando.comm.testing import check_device_arrays, check_transport
from lentando.comm.transport import Array
from lentando.comm.transports.nccl import NCCLTransport
from lentando.comm.transports.single import SingleTransport
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.slow_momentum import SlowMomentum

METHODS: dict[str, dict[str, Any]] = {
    "synchronous SGD": {"base": AllReduce()},
    "SlowMo": {"base": LocalSGD(), "period": 3, "outer": SlowMomentum(0.7, 0.6)},
    "DiLoCo": {"base": LocalSGD(), "period": 3, "outer": SlowMomentum(0.7, 0.9, nesterov=True)},
    "SGP": {"base": SGP(), "period": 4, "outer": SlowMomentum()},
    "OSGP": {"base": OSGP(staleness=2, deterministic=True)},
}


@pytest.fixture
def open_nccl(dry_run: bool) -> Callable[[], NCCLTransport]:
    """Opens NCCL for one rank, or its stand-in."""
    if dry_run:
        return lambda: NCCLTransport(SingleTransport(), MatchingBinding(MatchingNCCL(1, 10.0, 0.0), 0))
    return lambda: NCCLTransport(SingleTransport())


@pytest.fixture
def nccl(open_nccl: Callable[[], NCCLTransport]) -> Iterator[NCCLTransport]:
    transport = open_nccl()
    yield transport
    transport.close()


def on_device(array: Array) -> Array:
    import cupy

    found: Array = cupy.asarray(array)
    return found


def test_array_module_is_cupy(nccl: NCCLTransport) -> None:
    import cupy

    array = on_device(np.arange(3.0))
    assert array_module(array) is cupy
    assert not is_on_host(array)
    assert to_host(array).tolist() == [0, 1, 2]
    copy_into(array, np.ones(3))
    assert to_host(array).tolist() == [1, 1, 1]


def test_nccl_of_one_rank_keeps_the_promises(nccl: NCCLTransport) -> None:
    check_transport(nccl)
    check_device_arrays(nccl, on_device)


def test_nccl_can_be_opened_again(open_nccl: Callable[[], NCCLTransport]) -> None:
    for _ in range(2):
        transport = open_nccl()
        transport.broadcast(on_device(np.ones(3)))
        transport.close()


@pytest.mark.usefixtures("only_on_a_gpu")
def test_error_of_nccl_is_a_transport_error(nccl: NCCLTransport) -> None:
    nccl.broadcast(on_device(np.ones(3)))
    with pytest.raises(TransportError, match="NCCL failed"):
        nccl.allreduce(on_device(np.ones(3, np.complex64)))


@pytest.mark.parametrize("kind", [RingReduction, BackendReduction, BackendShardedReduction])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16, np.int64])
def test_reductions_of_one_rank_leave_what_was_there(nccl: NCCLTransport, kind: Any, dtype: Any) -> None:
    values = np.arange(11).astype(dtype)
    buffer = on_device(values)
    nccl.broadcast(buffer)
    reduction = kind(nccl, buffer)
    assert to_host(reduction.reduce_scatter()).astype(np.float64).tolist() == list(range(11))
    reduction.all_reduce(mean=np.dtype(dtype).kind != "i")
    assert to_host(buffer).tobytes() == values.tobytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16])
def test_training_equals_that_of_host_memory(nccl: NCCLTransport, method: str, dtype: Any) -> None:
    def gradient(rank: int, step: int, x: Array) -> Array:
        found: Array = (0.3 * x.astype(np.float64) + 0.1 * np.sin(step)).astype(dtype)
        return found

    def trained(transport: Any, place: Callable[[Array], Array]) -> Array:
        start = np.linspace(-1, 1, 1000).astype(dtype)
        own = Worker(transport, gradient, start, lambda step: 0.05, momentum=0.9, place=place, **METHODS[method])
        return to_host(own.run(11)).astype(np.float64)

    digits = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}[np.dtype(dtype).name]
    expected = trained(SingleTransport(), np.asarray)
    np.testing.assert_allclose(trained(nccl, on_device), expected, rtol=digits, atol=digits)


@pytest.mark.usefixtures("only_on_a_gpu")
def test_stream_that_is_not_the_default_one(nccl: NCCLTransport) -> None:
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        array = cupy.zeros(4_000_000, np.float32)
        for _ in range(200):
            array += 1
        nccl.allreduce(array)
        array += 1
        assert to_host(array).tolist()[:2] == [201, 201]
