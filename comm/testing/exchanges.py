"""Checks of ``Transport.exchange`` with arrays in host memory."""

import time

import numpy as np

from lentando.comm.testing.checks import DTYPES, LARGE_ELEMENTS, LARGEST_TAG, TransportChecks

__all__ = ["ExchangeChecks"]


class ExchangeChecks(TransportChecks):
    """Checks of messages between two ranks."""

    def test_becomes_true(self) -> None:
        """An exchange becomes complete by calls of ``test`` only."""
        sent, received = self.numbers(self.transport.rank), self.empty()
        self.require_complete(
            self.transport.exchange([(self.next, sent)], [(self.previous, received)]), "test() of an exchange"
        )
        self.require_equal(received, self.numbers(self.previous), "an exchange completed by test() alone")

    def exchange_in_both_directions(self) -> None:
        """Messages to and from both neighbours arrive unchanged, with and without overlap."""
        # In a world of 2, both neighbours are the same rank, and only the order of the messages distinguishes them.
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
            self.require_equal(
                from_previous, self.numbers(self.previous, 1), f"from the previous rank, overlap={overlap}"
            )
            self.require_equal(from_next, self.numbers(self.next, 2), f"from the next rank, overlap={overlap}")
        self.require_equal(to_next, self.numbers(self.transport.rank, 1), "the array that was sent")

    def exchange_over_every_distance(self) -> None:
        """Messages arrive from every other rank, and the request keeps sent arrays alive."""
        rank, size = self.transport.rank, self.transport.size
        for distance in range(size):
            to, source = (rank + distance) % size, (rank - distance) % size
            received = self.empty()
            # Only the request refers to the temporary array that is sent, and must keep it alive.
            request = self.transport.exchange([(to, self.numbers(rank, distance))], [(source, received)])
            self.empty().fill(-1)
            request.wait()
            self.require_equal(received, self.numbers(source, distance), f"from {distance} ranks away")

    def exchange_with_oneself(self) -> None:
        """A rank receives the message that it sends to itself."""
        rank = self.transport.rank
        received = self.empty(LARGE_ELEMENTS)
        sent = self.numbers(rank, 3, LARGE_ELEMENTS)
        self.transport.exchange([(rank, sent)], [(rank, received)]).wait()
        self.require_equal(received, sent, "a message to oneself")

    def exchange_of_nothing(self) -> None:
        """Exchanges without messages and messages without elements are complete."""
        self.transport.exchange([], []).wait()
        nothing = np.empty(0, np.float32)
        received = self.empty()
        self.transport.exchange([(self.next, nothing)], [(self.previous, nothing)]).wait()
        self.transport.exchange([(self.next, self.numbers(self.transport.rank))], [(self.previous, received)]).wait()
        self.require_equal(received, self.numbers(self.previous), "the message after one without elements")

    def exchange_of_every_dtype(self) -> None:
        """Arrays of every dtype and of two dimensions arrive unchanged."""
        for dtype in DTYPES:
            received = np.zeros((3, 7), dtype)
            sent = self.numbers(self.transport.rank, 4, 21, dtype).reshape(3, 7)
            self.transport.exchange([(self.next, sent)], [(self.previous, received)]).wait()
            expected = self.numbers(self.previous, 4, 21, dtype).reshape(3, 7)
            self.require_equal(received, expected, f"an exchange of {np.dtype(dtype)}")

    def exchange_of_large_messages(self) -> None:
        """Large sends become complete even if all ranks send before they receive."""
        # All ranks send before they receive: a transport whose sends block until then would wait forever.
        sent, received = self.numbers(self.transport.rank, 5, LARGE_ELEMENTS), self.empty(LARGE_ELEMENTS)
        sending = self.transport.exchange([(self.next, sent)], [])
        receiving = self.transport.exchange([], [(self.previous, received)])
        self.require_complete(sending, "sending a large message")
        receiving.wait()
        self.require_equal(received, self.numbers(self.previous, 5, LARGE_ELEMENTS), "a large message")

    def several_in_flight(self) -> None:
        """Several exchanges may be in flight, and may be waited for in any order."""
        received = [self.empty() for _ in range(8)]
        requests = [
            self.transport.exchange([(self.next, self.numbers(self.transport.rank, number))], [(self.previous, array)])
            for number, array in enumerate(received)
        ]
        for number in reversed(range(8)):
            requests[number].wait()
            self.require_equal(
                received[number], self.numbers(self.previous, number), f"exchange {number} of 8 in flight"
            )
        requests[0].wait()
        self.require(requests[0].test(), "an exchange that was waited for is not complete")

    def order_between_two_ranks(self) -> None:
        """Messages between two ranks arrive in the order in which they were sent."""
        sizes = (LARGE_ELEMENTS, 1, 4096, 1)  # a small message must not overtake a large one
        received = [self.empty(elements) for elements in sizes]
        sent = [self.numbers(self.transport.rank, number, elements) for number, elements in enumerate(sizes)]
        sending = self.transport.exchange([(self.next, array) for array in sent], [])
        self.transport.exchange([], [(self.previous, array) for array in received]).wait()
        sending.wait()
        for number, elements in enumerate(sizes):
            self.require_equal(
                received[number], self.numbers(self.previous, number, elements), f"message {number} of 4"
            )

    def receives_before_sends(self) -> None:
        """Receives that were started before their messages are filled in order."""
        first, second = self.empty(), self.empty()
        receiving = [self.transport.exchange([], [(self.previous, array)]) for array in (first, second)]
        sending = [
            self.transport.exchange([(self.next, self.numbers(self.transport.rank, number))], []) for number in (1, 2)
        ]
        receiving[1].wait()
        receiving[0].wait()
        self.require_equal(
            first, self.numbers(self.previous, 1), "the first of two receives that came before their messages"
        )
        self.require_equal(
            second, self.numbers(self.previous, 2), "the second of two receives that came before their messages"
        )
        for request in sending:
            request.wait()

    def tags_apart(self) -> None:
        """Messages with different tags do not overtake or block each other."""
        tags = (LARGEST_TAG, 0, 7)
        sending = [
            self.transport.exchange([(self.next, self.numbers(self.transport.rank, tag))], [], tag) for tag in tags
        ]
        for tag in sorted(tags):
            received = self.empty()
            self.require_complete(
                self.transport.exchange([], [(self.previous, received)], tag), f"a message that was sent with tag {tag}"
            )
            self.require_equal(received, self.numbers(self.previous, tag), f"a message received with tag {tag}")
        for request in sending:
            request.wait()

    def progress_while_computing(self) -> None:
        """An exchange makes progress while the caller computes."""
        sent, received = self.numbers(self.transport.rank, 6, LARGE_ELEMENTS), self.empty(LARGE_ELEMENTS)
        received.fill(-1)  # a value that no message contains
        request = self.transport.exchange([(self.next, sent)], [(self.previous, received)])
        deadline = time.perf_counter() + self.timeout_seconds
        while np.any(received == -1):  # computing, without a call of the transport
            self.require(
                time.perf_counter() < deadline,
                f"a started exchange made no progress while the caller computed for {self.timeout_seconds} s",
            )
        request.wait()
        self.require_equal(received, self.numbers(self.previous, 6, LARGE_ELEMENTS), "an exchange during computation")
