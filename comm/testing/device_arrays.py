"""Checks of a transport that takes arrays on a GPU: what ``DeviceArrays`` and ``BackendReduceScatter`` promise."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lentando.comm.array_module import copy_into, to_host
from lentando.comm.capabilities import BackendReduceScatter, takes_device_arrays
from lentando.comm.testing.checks import DTYPES, LARGE_ELEMENTS, LATE_SECONDS
from lentando.comm.testing.transports import TransportSuite
from lentando.comm.transport import Array, ReduceOp, Transport

__all__ = ["check_device_arrays"]


def check_device_arrays(
    transport: Transport, on_device: Callable[[Array], Array], *, timeout_seconds: float = 30.0
) -> None:
    """Check that ``transport`` keeps what ``DeviceArrays``, and ``BackendReduceScatter`` if it has it, promise.

    All ranks call it together, in addition to ``check_transport``, which checks the promises about host memory.

    Args:
        transport: open transport without an exchange in flight. It is left open.
        on_device: function that copies an array from host memory to this rank's device: ``cupy.asarray``.
        timeout_seconds: limit for an exchange that should take milliseconds.

    Raises:
        AssertionError: if a promise is broken; names the promise and the rank.
    """
    _DeviceSuite(transport, on_device, timeout_seconds).run()


class _DeviceSuite(TransportSuite):
    """The checks of ``check_device_arrays``, one per method. Each exchange is one round (``DeviceArrays``)."""

    def __init__(self, transport: Transport, on_device: Callable[[Array], Array], timeout_seconds: float) -> None:
        super().__init__(transport, timeout_seconds)
        self.on_device = on_device

    def run(self) -> None:
        self.require(takes_device_arrays(self.transport), "it does not take device arrays")
        for check in (
            self.broadcast_from_every_root,  # a collective comes first, because it may connect the devices
            self.round_in_both_directions,
            self.rounds_over_every_distance,
            self.rounds_of_every_dtype,
            self.rounds_in_which_not_all_take_part,
            self.rounds_apart,
            self.round_with_host_memory,
            self.round_after_one_without_elements,
            self.computations_enqueued_around_a_round,
            self.allgather,
            self.allreduce,
            self.reduce_scatter_and_allgather,
            self.traffic,
            self.ranks_that_do_not_exist,
        ):
            self.run_check(check)

    def round_in_both_directions(self) -> None:
        sent = [self.put(self.numbers(self.transport.rank, number, LARGE_ELEMENTS)) for number in (1, 2)]
        received = [self.blank(LARGE_ELEMENTS) for _ in range(2)]
        request = self.transport.exchange(
            [(self.next, sent[0]), (self.previous, sent[1])], [(self.previous, received[0]), (self.next, received[1])]
        )
        self.require_complete(request, "test() of a round")
        request.wait()
        for number, source in ((1, self.previous), (2, self.next)):
            self.require_equal(
                to_host(received[number - 1]), self.numbers(source, number, LARGE_ELEMENTS), "a round's message"
            )

    def rounds_over_every_distance(self) -> None:
        rank, size = self.transport.rank, self.transport.size
        for distance in range(size):  # 0: to oneself
            received = self.blank()
            request = self.transport.exchange(
                [((rank + distance) % size, self.put(self.numbers(rank, distance)))],
                [((rank - distance) % size, received)],
            )
            self.blank().fill(-1)  # the request must keep what was sent alive
            request.wait()
            self.require_equal(
                to_host(received), self.numbers((rank - distance) % size, distance), f"from {distance} away"
            )

    def rounds_of_every_dtype(self) -> None:
        for dtype in DTYPES:
            received = self.put(np.zeros((3, 7), dtype))
            sent = self.put(self.numbers(self.transport.rank, 4, 21, dtype).reshape(3, 7))
            self.transport.exchange([(self.next, sent)], [(self.previous, received)]).wait()
            expected = self.numbers(self.previous, 4, 21, dtype).reshape(3, 7)
            self.require_equal(to_host(received), expected, f"a round of {np.dtype(dtype)}")

    def rounds_in_which_not_all_take_part(self) -> None:
        rank, size = self.transport.rank, self.transport.size
        for first in range(size - 1):  # a chain: only two ranks at a time
            received = self.blank()
            sends = [(first + 1, self.put(self.numbers(rank, first)))] if rank == first else []
            receives = [(first, received)] if rank == first + 1 else []
            self.transport.exchange(sends, receives).wait()
            if receives:
                self.require_equal(to_host(received), self.numbers(first, first), "a round of two ranks")

    def rounds_apart(self) -> None:
        # Rank 0 may be any number of rounds ahead. Messages are matched by their order, whatever their tags.
        if self.transport.rank:
            time.sleep(LATE_SECONDS)
        received = [self.blank(1 + 1000 * number) for number in range(8)]
        requests = [
            self.transport.exchange(
                [(self.next, self.put(self.numbers(self.transport.rank, number, array.size)))],
                [(self.previous, array)],
                tag=number % 2,
            )
            for number, array in enumerate(received)
        ]
        for number in reversed(range(8)):
            requests[number].wait()
            expected = self.numbers(self.previous, number, received[number].size)
            self.require_equal(to_host(received[number]), expected, f"round {number} of 8 in flight")

    def round_with_host_memory(self) -> None:
        rank = self.transport.rank
        header, body = self.empty(), self.blank()
        self.transport.exchange(
            [(self.next, self.numbers(rank, 1)), (self.next, self.put(self.numbers(rank, 2)))],
            [(self.previous, header), (self.previous, body)],
        ).wait()
        self.require_equal(header, self.numbers(self.previous, 1), "the part of a round in host memory")
        self.require_equal(
            to_host(body),
            self.numbers(self.previous, 2),
            "the part of a round on the device, next to one in host memory",
        )

    def round_after_one_without_elements(self) -> None:
        nothing, received = self.put(np.empty(0, np.float32)), self.blank()
        self.transport.exchange([(self.next, nothing)], [(self.previous, nothing)]).wait()
        self.transport.exchange(
            [(self.next, self.put(self.numbers(self.transport.rank)))], [(self.previous, received)]
        ).wait()
        self.require_equal(to_host(received), self.numbers(self.previous), "the round after one without elements")

    def computations_enqueued_around_a_round(self) -> None:
        sent, received = self.put(np.zeros(LARGE_ELEMENTS, np.float32)), self.blank(LARGE_ELEMENTS)
        for _ in range(50):
            sent += 1
        self.transport.exchange([(self.next, sent)], [(self.previous, received)]).wait()
        received += 1
        expected = np.full(LARGE_ELEMENTS, 51, np.float32)
        self.require_equal(to_host(received), expected, "a message between enqueued computations")

    def broadcast_from_every_root(self) -> None:
        for root in range(self.transport.size):
            for dtype in DTYPES:
                array = self.put(self.numbers(self.transport.rank, root, 6, dtype).reshape(2, 3))
                self.transport.broadcast(array, root)
                expected = self.numbers(root, root, 6, dtype).reshape(2, 3)
                self.require_equal(to_host(array), expected, f"a broadcast of {np.dtype(dtype)} from rank {root}")

    def allgather(self) -> None:
        for dtype in DTYPES:
            for shape in ((5,), (2, 3), (0,)):
                elements = int(np.prod(shape))
                array = self.put(self.numbers(self.transport.rank, 0, elements, dtype).reshape(shape))
                expected = [
                    self.numbers(rank, 0, elements, dtype).reshape(shape) for rank in range(self.transport.size)
                ]
                gathered = to_host(self.transport.allgather(array))
                self.require_equal(gathered, np.stack(expected), f"an allgather of {np.dtype(dtype)}, shape {shape}")

    def allreduce(self) -> None:
        functions: dict[ReduceOp, Any] = {"sum": np.add, "min": np.minimum, "max": np.maximum}
        for op, function in functions.items():
            for dtype in (np.float32, np.float64, np.int64, np.int32):
                array = self.put(self.numbers(self.transport.rank, 0, 7, dtype))
                self.transport.allreduce(array, op)
                by_rank = [self.numbers(rank, 0, 7, dtype) for rank in range(self.transport.size)]
                expected = function.reduce(by_rank).astype(dtype)
                self.require_equal(to_host(array), expected, f"an allreduce ({op}) of {np.dtype(dtype)}")
        for op in ("min", "max"):
            self.extremes(op)

    def reduce_scatter_and_allgather(self) -> None:
        transport, rank, size = self.transport, self.transport.rank, self.transport.size
        if not isinstance(transport, BackendReduceScatter):
            return
        for dtype in (np.float32, np.float64, np.int64):
            whole, part = self.put(self.numbers(rank, 0, 5 * size, dtype)), self.put(np.zeros(5, dtype))
            transport.reduce_scatter(whole, part)
            total = np.add.reduce([self.numbers(r, 0, 5 * size, dtype) for r in range(size)])
            shard = total[5 * rank : 5 * (rank + 1)]
            self.require_equal(to_host(part), shard, f"this rank's shard of a reduce_scatter of {np.dtype(dtype)}")
            self.require_equal(
                to_host(whole), self.numbers(rank, 0, 5 * size, dtype), "the array given to reduce_scatter"
            )
            for given in (part, whole[5 * rank : 5 * (rank + 1)]):
                copy_into(given, shard)
                transport.allgather_into(given, whole)
                self.require_equal(to_host(whole), total, f"an allgather_into of {np.dtype(dtype)}")

    def put(self, array: Array) -> Array:
        return self.on_device(array)

    def blank(self, elements: int = 33) -> Array:
        return self.on_device(self.empty(elements))
