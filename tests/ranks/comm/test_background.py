"""Background threads communicate in the order of their work, report errors, and return their transports."""

import gc
import threading
import time
from typing import Any
from weakref import finalize

import numpy as np
import pytest

from lentando.comm import world
from lentando.comm.background import BackgroundThreads, start_background_threads
from lentando.comm.transport import Array, Traffic

if world.transport().name != "mpi":
    pytest.skip("only MPI has transports for threads", allow_module_level=True)

from lentando.comm.transports.mpi import MPITransport


def started(transport: MPITransport, count: int) -> BackgroundThreads:
    threads = start_background_threads(transport, count, "lentando-test")
    assert threads is not None
    return threads


def summed(transport: Any, array: Array) -> Array:
    transport.allreduce(array)
    return array


def test_each_thread_works_in_the_order_of_submission(own_transport: MPITransport) -> None:
    threads, rank, size = started(own_transport, 2), own_transport.rank, own_transport.size
    futures = []
    for number in range(20):
        transport = threads.transports[number % 2]
        array = np.full(3, rank + number * size, np.int64)
        futures.append(threads.submit(number % 2, lambda transport=transport, array=array: summed(transport, array)))
    for number, future in reversed(list(enumerate(futures))):  # results may be asked for in any order
        assert (future.result(60) == size * (size - 1) // 2 + number * size * size).all()
    traffic = Traffic()
    threads.count_traffic(traffic)
    assert traffic.collectives == 20 or size == 1
    assert threads.transports[0].traffic.collectives == 0


def test_an_error_is_raised_where_the_result_is_asked_for(own_transport: MPITransport) -> None:
    threads = started(own_transport, 1)

    def fails() -> None:
        raise ZeroDivisionError("as asked")

    failed, later = threads.submit(0, fails), threads.submit(0, lambda: threading.current_thread().name)
    with pytest.raises(ZeroDivisionError, match="as asked"):
        failed.result(60)
    assert later.result(60) == "lentando-test"


def test_threads_finish_their_work_before_they_return_their_transports(own_transport: MPITransport) -> None:
    threads, transport = started(own_transport, 1), own_transport
    lent = threads.transports[0]

    def late() -> Array:
        time.sleep(0.05)
        return summed(lent, np.ones(1))

    future = threads.submit(0, late)
    del threads
    gc.collect()
    again = started(own_transport, 1)
    assert (future.result(60) == transport.size).all()
    lent_again = again.transports[0]
    assert (again.submit(0, lambda: summed(lent_again, np.ones(1))).result(60) == transport.size).all()
    assert len(own_transport._others) <= 2


def test_finished_work_keeps_nothing_alive(own_transport: MPITransport) -> None:
    threads = started(own_transport, 1)

    class Watched:
        pass

    watched = Watched()
    dropped = threading.Event()
    finalize(watched, dropped.set)
    threads.submit(0, lambda kept=watched: None).result(60)
    del watched
    gc.collect()
    assert dropped.wait(5)
