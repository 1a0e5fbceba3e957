"""``check_transport``: the conformance suite of the ``Transport`` protocol, with arrays in host memory."""

import time
from typing import cast

import numpy as np

from lentando.comm.capabilities import Notices, TimedRequest
from lentando.comm.errors import TransportError
from lentando.comm.testing.checks import LARGEST_TAG, LATE_SECONDS
from lentando.comm.testing.collectives import CollectiveChecks
from lentando.comm.testing.exchanges import ExchangeChecks
from lentando.comm.testing.subsets import SubsetChecks
from lentando.comm.transport import Traffic, Transport

__all__ = ["TransportSuite", "check_transport"]


def check_transport(transport: Transport, *, timeout_seconds: float = 30.0) -> None:
    """Check that a transport keeps every promise of the ``Transport`` protocol. All ranks call it together.

    It takes about a second. A rank that finds a broken promise raises an error at once, and others may be waiting for
    it then, so the caller must end the job.

    Args:
        transport: open transport without an exchange in flight. It is left open.
        timeout_seconds: limit for an exchange that should take milliseconds.

    Raises:
        AssertionError: if a promise is broken; names the promise and the rank.

    Example:
        >>> from lentando.comm.testing import check_transport, run_ranks
        >>> run_ranks(3, check_transport)  # the transport of three threads keeps all promises
        [None, None, None]
        >>> from lentando.comm.transports.single import SingleTransport
        >>> class WithoutCopy(SingleTransport):
        ...     def allgather(self, array):
        ...         self.traffic.count_collective(0)
        ...         return array[None]
        >>> check_transport(WithoutCopy())
        Traceback (most recent call last):
            ...
        AssertionError: transport 'single' on rank 0: the array given to allgather: expected ...
    """
    TransportSuite(transport, timeout_seconds).run()


class TransportSuite(ExchangeChecks, CollectiveChecks, SubsetChecks):
    """The checks of ``check_transport``, one per method."""

    def run(self) -> None:
        """Run all checks of the suite."""
        self.run_without_subsets()
        self.run_check(self.of_subsets)

    def of_subsets(self) -> None:
        """Subsets of the ranks keep the same promises."""
        self.subsets(lambda subset: type(self)(subset, self.timeout_seconds).run_without_subsets())

    def run_without_subsets(self) -> None:
        """Run all checks of these ranks, and none of subsets of them."""
        self.attributes()
        for check in (
            self.test_becomes_true,
            self.exchange_in_both_directions,
            self.exchange_over_every_distance,
            self.exchange_with_oneself,
            self.exchange_of_nothing,
            self.exchange_of_every_dtype,
            self.exchange_of_large_messages,
            self.several_in_flight,
            self.order_between_two_ranks,
            self.receives_before_sends,
            self.tags_apart,
            self.progress_while_computing,
            self.broadcast_from_every_root,
            self.allgather,
            self.allreduce,
            self.barrier,
            self.node_barrier,
            self.notices,
            self.clock,
            self.traffic,
            self.ranks_that_do_not_exist,
        ):
            self.run_check(check)

    def attributes(self) -> None:
        """Names, ranks and sizes are present and consistent."""
        transport = self.transport
        self.require(isinstance(transport, Transport), "it lacks a method or attribute of the protocol")
        self.require(isinstance(transport.name, str) and bool(transport.name), f"its name is {transport.name!r}")
        self.require(isinstance(transport.traffic, Traffic), "its traffic is not a Traffic")
        self.require(0 <= transport.rank < transport.size, f"rank {transport.rank} of {transport.size}")
        self.require(
            0 <= transport.local_rank < transport.local_size <= transport.size,
            f"local rank {transport.local_rank} of {transport.local_size} on the node, {transport.size} in all",
        )

    def notices(self) -> None:
        """Notices arrive in order, are not counted as traffic, and end waits."""
        transport = self.transport
        if not isinstance(transport, Notices):
            return
        before = transport.traffic.copy()
        for number in (7, -1, 2**40):
            for peer in range(transport.size):
                if peer != transport.rank:
                    transport.leave_notice(peer, number + transport.rank)
        self.require(transport.traffic.copy() == before, "notices were counted as traffic")
        never = cast(TimedRequest, transport.exchange([], [(self.next, self.empty())], LARGEST_TAG))
        if transport.size > 1:
            self.require(not never.wait_for(LATE_SECONDS), "wait_for() of an exchange that no rank has joined is True")
        transport.barrier()
        transport.exchange([(self.previous, self.empty())], [], LARGEST_TAG)
        for peer in range(transport.size):
            if peer != transport.rank:
                taken = [transport.take_notice(peer), transport.take_notice(peer)]
                deadline = time.perf_counter() + self.timeout_seconds
                while (last := transport.read_notice(peer)) is None:
                    self.require(
                        time.perf_counter() < deadline, f"read_notice() has not returned what rank {peer} left"
                    )
                expected = [number + peer for number in (7, -1, 2**40)]
                self.require(
                    [*taken, last] == expected, f"notices {[*taken, last]} of rank {peer}, expected {expected}"
                )
                self.require(transport.read_notice(peer) is None, f"a notice that rank {peer} has not left")
        deadline = time.perf_counter() + self.timeout_seconds
        while not never.wait_for(LATE_SECONDS):
            self.require(time.perf_counter() < deadline, "wait_for() of a complete exchange is False")
        transport.barrier()

    def clock(self) -> None:
        """The clock returns floats that never decrease."""
        readings = [self.transport.clock()]
        for _ in range(3):
            self.transport.barrier()
            readings.append(self.transport.clock())
        self.require(
            all(isinstance(reading, float) for reading in readings), f"clock() returned {readings}: expected floats"
        )
        self.require(readings == sorted(readings), f"clock() ran backwards: {readings}")

    def traffic(self) -> None:
        """Messages, collectives and bytes are counted."""
        transport, size = self.transport, self.transport.size
        array = self.put(self.numbers(transport.rank, 0, 10, np.float64))  # 80 bytes
        received = array.copy(), array.copy()
        two_sent = [(self.next, array), (self.next, array)], [(self.previous, a) for a in received]
        cases = (
            ("an exchange of two messages", Traffic(2, 0, 160), lambda: transport.exchange(*two_sent).wait()),
            ("an exchange of no message", Traffic(0, 0, 0), lambda: transport.exchange([], []).wait()),
            ("an allreduce", Traffic(0, 1, 160 * (size - 1) // size), lambda: transport.allreduce(array)),
            ("an allgather", Traffic(0, 1, 80 * (size - 1)), lambda: transport.allgather(array)),
            (
                "a broadcast",
                Traffic(0, 1, 80 if transport.rank == 0 and size > 1 else 0),
                lambda: transport.broadcast(array),
            ),
            ("a barrier", Traffic(0, 1, 0), transport.barrier),
        )
        for name, expected, action in cases:
            before = transport.traffic.copy()
            action()
            after = transport.traffic
            counted = Traffic(
                after.messages - before.messages,
                after.collectives - before.collectives,
                after.bytes_sent - before.bytes_sent,
            )
            self.require(counted == expected, f"{name} was counted as {counted}, expected {expected}")

    def ranks_that_do_not_exist(self) -> None:
        """Ranks outside of the job raise ``TransportError``."""
        array, size = self.put(self.empty()), self.transport.size
        for name, action in (
            ("a send", lambda: self.transport.exchange([(size, array)], [])),
            ("a receive", lambda: self.transport.exchange([], [(size, array)])),
            ("a broadcast", lambda: self.transport.broadcast(array, size)),
        ):
            try:
                action()
            except TransportError:
                continue
            self.require(False, f"{name} of rank {size} in a world of {size} raised no TransportError")
