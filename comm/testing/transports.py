"""What every transport must pass: the promises of ``Transport``, kept with arrays in host memory."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike

from lentando.comm.array_module import to_host
from lentando.comm.capabilities import Notices, SharedNode, TimedRequest
from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, ReduceOp, Request, Traffic, Transport

__all__ = ["DTYPES", "LARGE_ELEMENTS", "LATE_SECONDS", "check_transport"]

DTYPES: tuple[DTypeLike, ...] = (
    np.float32, np.float64, np.float16, bfloat16, np.int64, np.int32, np.uint8, np.bool_,
)  # fmt: skip
LARGE_ELEMENTS = 1024 * 1024
"""More than any engine copies aside for a receiver that is not there yet."""
LARGEST_TAG = 32767
LATE_SECONDS = 0.02


def check_transport(transport: Transport, *, patience_seconds: float = 30.0) -> None:
    """Check that ``transport`` keeps every promise of the ``Transport`` protocol. Called by all ranks together.

    It takes about a second. A rank that finds a promise broken raises at once, so the caller has to end the job: the
    others may be waiting for it.

    Args:
        transport: open, with no exchange under way. It is left open.
        patience_seconds: how long an exchange may take that should take milliseconds.

    Raises:
        AssertionError: says which promise is broken, on which rank.
    """
    _TransportCheck(transport, patience_seconds).run()


class _TransportCheck:
    """The checks of ``check_transport``, one a method; see there for the arguments."""

    def __init__(self, transport: Transport, patience_seconds: float) -> None:
        self.transport = transport
        self.patience_seconds = patience_seconds

    def run(self) -> None:
        self.attributes()
        self.next = (self.transport.rank + 1) % self.transport.size
        self.previous = (self.transport.rank - 1) % self.transport.size
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
            self.accepts(check)

    def accepts(self, check: Callable[[], None]) -> None:
        """Run a check in which no error of the transport's is expected."""
        try:
            check()
        except TransportError as error:
            words = check.__name__.replace("_", " ")
            raise AssertionError(f"{self.who()}: {words}: {error}") from error

    def attributes(self) -> None:
        transport = self.transport
        self.holds(isinstance(transport, Transport), "it lacks a method or attribute of the protocol")
        self.holds(isinstance(transport.name, str) and bool(transport.name), f"its name is {transport.name!r}")
        self.holds(isinstance(transport.traffic, Traffic), "its traffic is not a Traffic")
        self.holds(0 <= transport.rank < transport.size, f"rank {transport.rank} of {transport.size}")
        self.holds(
            0 <= transport.local_rank < transport.local_size <= transport.size,
            f"local rank {transport.local_rank} of {transport.local_size} on the node, {transport.size} in all",
        )

    def test_becomes_true(self) -> None:
        sent, received = self.numbers(self.transport.rank), self.empty()
        self.becomes_complete(
            self.transport.exchange([(self.next, sent)], [(self.previous, received)]), "test() of an exchange"
        )
        self.same(received, self.numbers(self.previous), "an exchange that was only tested")

    def exchange_in_both_directions(self) -> None:
        # In a world of 2 both neighbours are the same rank: then the order of the messages tells them apart.
        to_next, to_previous = (self.numbers(self.transport.rank, number) for number in (1, 2))
        from_previous, from_next = self.empty(), self.empty()
        for overlap in (True, False):
            from_previous.fill(-1)
            from_next.fill(-1)
            self.transport.exchange(
                [(self.next, to_next), (self.previous, to_previous)],
                [(self.previous, from_previous), (self.next, from_next)],
                overlap=overlap,
            ).wait()
            self.same(from_previous, self.numbers(self.previous, 1), f"from the previous rank, overlap={overlap}")
            self.same(from_next, self.numbers(self.next, 2), f"from the next rank, overlap={overlap}")
        self.same(to_next, self.numbers(self.transport.rank, 1), "the array that was sent")

    def exchange_over_every_distance(self) -> None:
        rank, size = self.transport.rank, self.transport.size
        for distance in range(size):
            to, source = (rank + distance) % size, (rank - distance) % size
            received = self.empty()
            # The receiver knows nothing of the temporary that is sent: the request must keep it alive.
            request = self.transport.exchange([(to, self.numbers(rank, distance))], [(source, received)])
            self.empty().fill(-1)
            request.wait()
            self.same(received, self.numbers(source, distance), f"from {distance} ranks away")

    def exchange_with_oneself(self) -> None:
        rank = self.transport.rank
        received = self.empty(LARGE_ELEMENTS)
        sent = self.numbers(rank, 3, LARGE_ELEMENTS)
        self.transport.exchange([(rank, sent)], [(rank, received)]).wait()
        self.same(received, sent, "a message to oneself")

    def exchange_of_nothing(self) -> None:
        self.transport.exchange([], []).wait()
        nothing = np.empty(0, np.float32)
        received = self.empty()
        self.transport.exchange([(self.next, nothing)], [(self.previous, nothing)]).wait()
        self.transport.exchange([(self.next, self.numbers(self.transport.rank))], [(self.previous, received)]).wait()
        self.same(received, self.numbers(self.previous), "the message after one without elements")

    def exchange_of_every_dtype(self) -> None:
        for dtype in DTYPES:
            received = np.zeros((3, 7), dtype)
            sent = self.numbers(self.transport.rank, 4, 21, dtype).reshape(3, 7)
            self.transport.exchange([(self.next, sent)], [(self.previous, received)]).wait()
            expected = self.numbers(self.previous, 4, 21, dtype).reshape(3, 7)
            self.same(received, expected, f"an exchange of {np.dtype(dtype)}")

    def exchange_of_large_messages(self) -> None:
        # Sent before the receives are there, in both directions: whoever sends blindly would wait forever.
        sent, received = self.numbers(self.transport.rank, 5, LARGE_ELEMENTS), self.empty(LARGE_ELEMENTS)
        sending = self.transport.exchange([(self.next, sent)], [])
        receiving = self.transport.exchange([], [(self.previous, received)])
        self.becomes_complete(sending, "sending a large message")
        receiving.wait()
        self.same(received, self.numbers(self.previous, 5, LARGE_ELEMENTS), "a large message")

    def several_in_flight(self) -> None:
        received = [self.empty() for _ in range(8)]
        requests = [
            self.transport.exchange([(self.next, self.numbers(self.transport.rank, number))], [(self.previous, array)])
            for number, array in enumerate(received)
        ]
        for number in reversed(range(8)):
            requests[number].wait()
            self.same(received[number], self.numbers(self.previous, number), f"exchange {number} of 8 in flight")
        requests[0].wait()
        self.holds(requests[0].test(), "an exchange that was waited for is not complete")

    def order_between_two_ranks(self) -> None:
        sizes = (LARGE_ELEMENTS, 1, 4096, 1)  # a small message must not overtake a large one
        received = [self.empty(elements) for elements in sizes]
        sent = [self.numbers(self.transport.rank, number, elements) for number, elements in enumerate(sizes)]
        sending = self.transport.exchange([(self.next, array) for array in sent], [])
        self.transport.exchange([], [(self.previous, array) for array in received]).wait()
        sending.wait()
        for number, elements in enumerate(sizes):
            self.same(received[number], self.numbers(self.previous, number, elements), f"message {number} of 4")

    def receives_before_sends(self) -> None:
        first, second = self.empty(), self.empty()
        receiving = [self.transport.exchange([], [(self.previous, array)]) for array in (first, second)]
        sending = [
            self.transport.exchange([(self.next, self.numbers(self.transport.rank, number))], []) for number in (1, 2)
        ]
        receiving[1].wait()
        receiving[0].wait()
        self.same(first, self.numbers(self.previous, 1), "the first of two receives that came before their messages")
        self.same(second, self.numbers(self.previous, 2), "the second of two receives that came before their messages")
        for request in sending:
            request.wait()

    def tags_apart(self) -> None:
        tags = (LARGEST_TAG, 0, 7)
        sending = [
            self.transport.exchange([(self.next, self.numbers(self.transport.rank, tag))], [], tag) for tag in tags
        ]
        for tag in sorted(tags):
            received = self.empty()
            self.becomes_complete(
                self.transport.exchange([], [(self.previous, received)], tag), f"a message that was sent with tag {tag}"
            )
            self.same(received, self.numbers(self.previous, tag), f"a message received with tag {tag}")
        for request in sending:
            request.wait()

    def progress_while_computing(self) -> None:
        sent, received = self.numbers(self.transport.rank, 6, LARGE_ELEMENTS), self.empty(LARGE_ELEMENTS)
        received.fill(-1)  # no message holds it
        request = self.transport.exchange([(self.next, sent)], [(self.previous, received)])
        deadline = time.perf_counter() + self.patience_seconds
        while np.any(received == -1):  # computing: no call of the transport's
            self.holds(
                time.perf_counter() < deadline,
                f"a started exchange made no progress while the caller computed for {self.patience_seconds} s",
            )
        request.wait()
        self.same(received, self.numbers(self.previous, 6, LARGE_ELEMENTS), "an exchange beside computation")

    def broadcast_from_every_root(self) -> None:
        for root in range(self.transport.size):
            for dtype in DTYPES:
                array = self.numbers(self.transport.rank, root, 6, dtype).reshape(2, 3)
                self.transport.broadcast(array, root)
                expected = self.numbers(root, root, 6, dtype).reshape(2, 3)
                self.same(array, expected, f"a broadcast of {np.dtype(dtype)} from rank {root}")
        for shape in ((), (0,), (LARGE_ELEMENTS,)):
            array = np.full(shape, self.transport.rank + 1, np.float32)
            self.transport.broadcast(array)
            self.same(array, np.ones(shape, np.float32), f"a broadcast of shape {shape}")

    def allgather(self) -> None:
        for dtype in DTYPES:
            for shape in ((5,), (2, 3), (), (0,)):
                elements = int(np.prod(shape))
                array = self.numbers(self.transport.rank, 0, elements, dtype).reshape(shape)
                gathered = self.transport.allgather(array)
                expected = [
                    self.numbers(rank, 0, elements, dtype).reshape(shape) for rank in range(self.transport.size)
                ]
                self.same(gathered, np.stack(expected), f"an allgather of {np.dtype(dtype)}, shape {shape}")
                gathered[...] = 0
                self.same(array, expected[self.transport.rank], "the array given to allgather")

    def allreduce(self) -> None:
        functions: dict[ReduceOp, Any] = {"sum": np.add, "min": np.minimum, "max": np.maximum}
        size = self.transport.size
        for op, function in functions.items():
            for dtype in (np.float32, np.float64, np.int64, np.int32):
                for shape in ((7,), (2, 3), (0,)):
                    elements = int(np.prod(shape))
                    array = self.numbers(self.transport.rank, 0, elements, dtype).reshape(shape)
                    self.transport.allreduce(array, op)
                    by_rank = [self.numbers(rank, 0, elements, dtype) for rank in range(self.transport.size)]
                    expected = function.reduce(by_rank).astype(dtype).reshape(shape)
                    self.same(array, expected, f"an allreduce ({op}) of {np.dtype(dtype)}, shape {shape}")
        for op in ("min", "max"):
            self.extremes(op)
        for integers in (np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.int32)):
            largest = np.full((size, 100), np.iinfo(integers).max, integers)
            array = self.put(largest[0].copy())
            self.transport.allreduce(array)
            expected = largest.sum(axis=0, dtype=integers)
            self.same(to_host(array), expected, f"an allreduce (sum) of {integers} beyond its largest number")
        total = self.numbers(self.transport.rank)
        self.transport.allreduce(total)
        expected = np.sum([self.numbers(rank) for rank in range(self.transport.size)], axis=0, dtype=np.float32)
        self.same(total, expected, "an allreduce without an op, which is a sum")

    def extremes(self, op: ReduceOp) -> None:
        """NaN on any rank wins on all of them, beside infinities and zeros of both signs, with the same bits."""
        rank, size = self.transport.rank, self.transport.size
        for dtype in (np.float32, np.float64):
            for with_nan in range(size):
                own = np.array([rank, -rank, np.nan if rank == with_nan else rank, -0.0 if rank % 2 else 0.0], dtype)
                if rank == with_nan:
                    own = np.append(own, [-np.nan, np.inf, -np.inf]).astype(dtype)
                else:
                    own = np.append(own, np.full(3, rank)).astype(dtype)
                array = self.put(own)
                self.transport.allreduce(array, op)
                found = to_host(array)
                what = f"an allreduce ({op}) of {np.dtype(dtype)} with NaN on rank {with_nan}"
                self.holds(bool(np.isnan(found[[2, 4]]).all()), f"{what}: expected NaN, got {found[[2, 4]].tolist()}")
                largest = float(size - 1)
                expected = [largest, 0.0] if op == "max" else [0.0, -largest]
                self.holds(found[:2].tolist() == expected, f"{what}: expected {expected}, got {found[:2].tolist()}")
                is_negative = size > 1 and op == "min"
                self.holds(bool(np.signbit(found[3])) == is_negative, f"{what}: a zero has the wrong sign")
                others = self.transport.allgather(found.view(np.uint8))
                self.holds(bool((others == others[0]).all()), f"{what}: the ranks ended with different bits")

    def barrier(self) -> None:
        self.nobody_leaves_early("barrier", self.transport.barrier, range(self.transport.size))

    def node_barrier(self) -> None:
        if isinstance(self.transport, SharedNode):
            self.nobody_leaves_early("node_barrier", self.transport.node_barrier, self.transport.same_node)

    def notices(self) -> None:
        transport = self.transport
        if not isinstance(transport, Notices):
            return
        before = transport.traffic.copy()
        for number in (7, -1, 2**40):
            for peer in range(transport.size):
                if peer != transport.rank:
                    transport.leave_notice(peer, number + transport.rank)
        self.holds(transport.traffic.copy() == before, "notices were counted as traffic")
        never = cast(TimedRequest, transport.exchange([], [(self.next, self.empty())], LARGEST_TAG))
        if transport.size > 1:
            self.holds(not never.wait_for(LATE_SECONDS), "wait_for() of an exchange that nobody has joined is True")
        transport.barrier()
        transport.exchange([(self.previous, self.empty())], [], LARGEST_TAG)
        for peer in range(transport.size):
            if peer != transport.rank:
                taken = [transport.take_notice(peer), transport.take_notice(peer)]
                deadline = time.perf_counter() + self.patience_seconds
                while (last := transport.read_notice(peer)) is None:
                    self.holds(time.perf_counter() < deadline, f"read_notice() has not found what rank {peer} left")
                expected = [number + peer for number in (7, -1, 2**40)]
                self.holds([*taken, last] == expected, f"notices {[*taken, last]} of rank {peer}, expected {expected}")
                self.holds(transport.read_notice(peer) is None, f"a notice that rank {peer} has not left")
        deadline = time.perf_counter() + self.patience_seconds
        while not never.wait_for(LATE_SECONDS):
            self.holds(time.perf_counter() < deadline, "wait_for() of a complete exchange is False")
        transport.barrier()

    def nobody_leaves_early(self, name: str, wait: Callable[[], None], ranks: Sequence[int]) -> None:
        rank = self.transport.rank
        token = np.zeros(1, np.uint8)
        for late in ranks:
            others = [other for other in ranks if other != late]
            if rank == late:
                self.transport.exchange([], [(other, np.zeros(1, np.uint8)) for other in others]).wait()
                time.sleep(LATE_SECONDS)  # begins after every other rank has looked at its clock
                wait()
            else:
                started = time.perf_counter()
                self.transport.exchange([(late, token)], []).wait()
                wait()
                waited = time.perf_counter() - started
                self.holds(waited >= LATE_SECONDS, f"{name} returned before rank {late} had come to it")

    def clock(self) -> None:
        readings = [self.transport.clock()]
        for _ in range(3):
            self.transport.barrier()
            readings.append(self.transport.clock())
        self.holds(all(isinstance(reading, float) for reading in readings), f"clock() gave {readings}: not floats")
        self.holds(readings == sorted(readings), f"clock() ran backwards: {readings}")

    def traffic(self) -> None:
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
            self.holds(counted == expected, f"{name} was counted as {counted}, expected {expected}")

    def ranks_that_do_not_exist(self) -> None:
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
            self.holds(False, f"{name} of rank {size} in a world of {size} raised no TransportError")

    def numbers(self, rank: int, number: int = 0, elements: int = 33, dtype: DTypeLike = np.float32) -> Array:
        """What ``rank`` sends as its message ``number``: integers that the dtype, and their sum in it, hold exactly."""
        small = (np.arange(elements) + 5 * rank + 3 * number) % 11
        beyond_other_dtypes = {"int64": 2**54, "float64": 2**40}
        return (small + beyond_other_dtypes.get(np.dtype(dtype).name, 0)).astype(dtype)

    def put(self, array: Array) -> Array:
        """The array where this check wants it."""
        return array

    def empty(self, elements: int = 33) -> Array:
        return np.full(elements, -1, np.float32)

    def becomes_complete(self, request: Request, what: str) -> None:
        deadline = time.perf_counter() + self.patience_seconds
        while not request.test():
            self.holds(time.perf_counter() < deadline, f"{what} was not complete after {self.patience_seconds} s")
            time.sleep(0)

    def same(self, found: Array, expected: Array, what: str) -> None:
        alike = found.shape == expected.shape and found.dtype == expected.dtype and np.array_equal(found, expected)
        self.holds(alike, f"{what}: expected {_shown(expected)}, got {_shown(found)}")

    def holds(self, claim: bool, otherwise: str) -> None:
        if not claim:
            raise AssertionError(f"{self.who()}: {otherwise}")

    def who(self) -> str:
        return f"transport {getattr(self.transport, 'name', '?')!r} on rank {getattr(self.transport, 'rank', '?')}"


def _shown(array: Array) -> str:
    first: Iterable[Any] = array.reshape(-1)[:6].tolist()
    return f"{array.dtype} {array.shape} {', '.join(map(str, first))}{', ...' if array.size > 6 else ''}"
