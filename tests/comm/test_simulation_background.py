"""What a virtual rank does in the background: in virtual time, while its program continues."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lentando.comm.errors import DeadlockError, SimulationError
from lentando.comm.simulation import Compute, Death, Network, Pause, SimulatedTransport, simulate

# Powers of two, so that sums and quotients of times are exact.
LATENCY, BANDWIDTH = 2.0**-14, 2.0**20
NETWORK = Network(LATENCY, BANDWIDTH)
SECOND = 2**17
"""Elements of float64 that a message carries in a second."""
STEP = Compute(1.0)


def send_to_next(transport: object, seconds: float) -> float:
    """Exchange data with both neighbours that travel for so long; return the time afterwards."""
    assert isinstance(transport, SimulatedTransport)
    data, received = np.full(int(seconds * SECOND), float(transport.rank)), np.empty(int(seconds * SECOND))
    before, after = (transport.rank - 1) % transport.size, (transport.rank + 1) % transport.size
    transport.exchange([(after, data)], [(before, received)]).wait()
    assert_array_equal(received, float(before))
    return transport.clock()


def test_work_begins_when_it_is_given_or_after_the_work_before() -> None:
    def worker(transport: SimulatedTransport) -> list[float]:
        background = transport.start_background()
        over = background.transports[0]
        transport.compute(0.5)
        first, second = (background.submit(0, lambda: send_to_next(over, 2.0)) for _ in range(2))
        transport.compute(3.0)
        assert (first.done(), second.done()) == (True, False)
        found = [first.result(), transport.clock(), second.result(), transport.clock()]
        transport.compute(1.0)
        later = background.submit(0, lambda: send_to_next(over, 1.0))
        return [*found, later.result(), transport.clock()]

    ends = [0.5 + 2 + LATENCY, 3.5, 4.5 + 2 * LATENCY, 4.5 + 2 * LATENCY, 6.5 + 3 * LATENCY, 6.5 + 3 * LATENCY]
    assert simulate(worker, 3, network=NETWORK) == [ends] * 3


def test_messages_of_the_program_share_the_links() -> None:
    def worker(transport: SimulatedTransport) -> tuple[float, float]:
        background = transport.start_background()
        over = background.transports[0]
        given = background.submit(0, lambda: send_to_next(over, 2.0))
        transport.compute(1.0)
        return send_to_next(transport, 1.0), given.result()  # behind the other message

    assert simulate(worker, 2, network=NETWORK) == [(3.0 + LATENCY, 2.0 + LATENCY)] * 2


def test_collectives_are_matched_with_those_of_other_backgrounds() -> None:
    def worker(transport: SimulatedTransport) -> list[float]:
        background = transport.start_background()
        over = background.transports[0]
        own, program = np.array([transport.rank + 1.0]), np.array([10.0 * (transport.rank + 1)])

        def work() -> None:
            over.allreduce(own)
            over.broadcast(own, root=1)

        given = background.submit(0, work)
        transport.allreduce(program)
        given.result()
        assert over.allgather(own).tolist() == [[own[0]]] * transport.size  # by the program, when nothing is given
        return [own[0], program[0]]

    assert simulate(worker, 3, network=NETWORK) == [[6.0, 60.0]] * 3


def test_an_exception_is_raised_where_the_result_is_taken() -> None:
    def worker(transport: SimulatedTransport) -> str:
        def fail() -> None:
            raise ValueError("no")

        given = transport.start_background().submit(0, fail)
        transport.compute(1.0)
        assert isinstance(given.exception(), ValueError)
        given.result()
        return ""

    with pytest.raises(SimulationError, match=r"rank 0 failed at 1 s: ValueError: no"):
        simulate(worker, 1)


def test_a_rank_that_dies_in_the_background_is_dead() -> None:
    def worker(transport: SimulatedTransport) -> float:
        background = transport.start_background()
        over = background.transports[0]
        given = background.submit(0, lambda: send_to_next(over, 1.0) if transport.rank < 2 else 0.0)
        transport.compute(5.0)
        return 0.0 if transport.rank == 1 else float(given.done())

    # Rank 1's only message is that of the background. Rank 0 neither gets it, nor waits for it at its end.
    assert simulate(worker, 3, network=NETWORK, faults=[Death(1, at_message=0)]) == [0.0, None, 1.0]
    assert simulate(worker, 3, network=NETWORK, faults=[Death(1, at_seconds=0.5)]) == [0.0, None, 1.0]


def test_a_deadlock_says_what_the_background_waits_for() -> None:
    def worker(transport: SimulatedTransport) -> None:
        background = transport.start_background()
        over = background.transports[0]
        received = np.empty(1)
        background.submit(0, lambda: over.exchange([], [(1 - transport.rank, received)]).wait()).result()

    with pytest.raises(DeadlockError, match=r"rank 0 waits for its own background, which waits for 8 bytes from"):
        simulate(worker, 2)


def test_a_pause_stops_program_and_background() -> None:
    def worker(transport: SimulatedTransport) -> tuple[float, float]:
        background = transport.start_background()
        over = background.transports[0]
        transport.compute(1.0)
        given = background.submit(0, lambda: send_to_next(over, 1.0))
        transport.compute(1.0)
        return given.result(), transport.clock()

    found = simulate(worker, 2, network=NETWORK, faults=[Pause(0, 1.0, 4.0)])
    assert found == [(6.0, 6.0), (6.0 + LATENCY, 6.0 + LATENCY)]  # rank 0 has received before it has sent
