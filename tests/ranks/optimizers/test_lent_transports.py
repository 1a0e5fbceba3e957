"""Wrappers that overlap communication share few transports among each other, however many are made and dropped."""

import gc

import numpy as np
import pytest

from lentando.comm import world
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.thread_transports import borrow_transports
from lentando.comm.transport import Transport
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gradient_buckets import THREADS, Buckets
from lentando.optimizers.rules.gradient_layout import gradient_layouts
from lentando.optimizers.rules.overlapped_gradients import OverlappedGradients

if world.transport().name != "mpi" or world.size() == 1:
    pytest.skip("only MPI has transports for threads", allow_module_level=True)

from lentando.comm.transports.mpi import MPITransport


def bound(transport: Transport) -> Buckets:
    """The buckets of an ``AllReduce(overlap=True)`` at work on gradients of its own."""
    entries = [Entry("w", (40,), "float32", 0), Entry("b", (3,), "float32", 0)]
    gradients = [FlatBuffer(layout) for layout in gradient_layouts(build_layouts(entries))]
    found = AllReduce(overlap=True, bucket_bytes=64).bind(transport, [], gradients)
    assert isinstance(found, OverlappedGradients)
    assert found.buckets is not None
    return found.buckets


def average(overlapped: Buckets, transport: Transport) -> None:
    overlapped.start_all()
    overlapped.wait(transport.traffic)


def test_transports_are_used_again_by_later_wrappers(own_transport: MPITransport) -> None:
    """MPICH has some 2000 communicators; each wrapper took four of them."""
    for number in range(15):
        overlapped = bound(own_transport)
        if number % 3 == 0:  # the others never communicate
            average(overlapped, own_transport)
    del overlapped
    assert len(own_transport._others) <= 3 * THREADS


def test_wrappers_that_live_together_have_transports_of_their_own(own_transport: MPITransport) -> None:
    together = [bound(own_transport) for _ in range(3)]
    for overlapped in together:
        overlapped.start_all()
    for overlapped in reversed(together) if own_transport.rank % 2 else together:
        overlapped.wait(own_transport.traffic)
    assert len(own_transport._others) == 3 * THREADS


def test_what_one_rank_still_holds_is_lent_to_no_rank(own_transport: MPITransport) -> None:
    first = bound(own_transport)
    kept = first if own_transport.rank == 0 else None
    del first
    gc.collect()
    second = bound(own_transport)
    average(second, own_transport)
    assert len(own_transport._others) == 2 * THREADS
    del kept
    gc.collect()
    third = bound(own_transport)
    average(third, own_transport)
    assert len(own_transport._others) == 2 * THREADS


def test_a_wrapper_that_is_dropped_while_it_averages_gives_back_afterwards(own_transport: MPITransport) -> None:
    overlapped = bound(own_transport)
    overlapped.start_all()
    del overlapped
    gc.collect()
    for _ in range(5):
        average(bound(own_transport), own_transport)
    assert len(own_transport._others) <= 3 * THREADS


def test_a_transport_given_back_carries_other_buffers(own_transport: MPITransport) -> None:
    for number in range(3):
        (loan,) = borrow_transports(own_transport, 1)
        array = np.full(5, float(own_transport.rank + number))
        loan.transport.allreduce(array)
        size = own_transport.size
        assert (array == size * (size - 1) / 2 + size * number).all()
        loan.give_back()
    assert len(own_transport._others) == 1
