"""The simulator keeps every promise of the seam, as MPI does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lentando.comm.errors import RankLostError, SimulationError
from lentando.comm.simulation import Compute, Network, SimulatedTransport, simulate
from lentando.comm.testing import check_elastic, check_transport


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("network", [Network(), Network(1e-3, 1e6, 1e-2)], ids=["plain", "jitter"])
def test_keeps_every_promise_of_the_transport_protocol(size: int, network: Network) -> None:
    simulate(check_transport, size, network=network, compute=Compute(1e-3, "exponential"), local_size=2)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("notice_seconds", [0.0, 0.5])
@pytest.mark.parametrize("network", [Network(), Network(1e-3, 1e6, 1e-2)], ids=["plain", "jitter"])
def test_keeps_every_promise_of_the_elastic_protocol(size: int, notice_seconds: float, network: Network) -> None:
    finished: list[int] = []

    def worker(transport: Any) -> None:
        check_elastic(transport, transport.die)
        finished.append(transport.size)

    for seed in range(5):
        simulate(worker, size, network=network, notice_seconds=notice_seconds, seed=seed, local_size=2)
    assert finished == [1] * 5


# The suite must find out who does not keep them.


def always(answer: bool) -> Callable[[Any], None]:
    def spoil(transport: Any) -> None:
        vote = transport.vote
        transport.vote = lambda yes: (vote(yes), answer)[1]

    return spoil


def receives_from_itself_alone(transport: Any) -> None:
    vote = transport.vote
    transport.vote = lambda yes: (vote(yes), yes)[1]


def does_not_mind_the_dead(transport: Any) -> None:
    vote, size = transport.vote, transport.size
    transport.vote = lambda yes: vote(yes) or (yes and transport.size == size)


def other_survivors(change: Callable[[list[int]], list[int]]) -> Callable[[Any], None]:
    def spoil(transport: Any) -> None:
        repair = transport.repair
        transport.repair = lambda: change(repair())

    return spoil


def keeps_its_number(transport: Any) -> None:
    renumber = transport.renumber

    def corrupted() -> None:
        rank = transport.rank
        renumber()
        transport.rank = rank

    transport.renumber = corrupted


def swallows(name: str, error: type[Exception] | None = None) -> Callable[[Any], None]:
    def spoil(transport: Any) -> None:
        operation = getattr(transport, name)

        def corrupted(*arguments: Any, **options: Any) -> Any:
            try:
                return operation(*arguments, **options)
            except RankLostError:
                if error is not None:
                    raise error from None
                return np.zeros((transport.size, 1))

        setattr(transport, name, corrupted)

    return spoil


def waits_for_nothing(transport: Any) -> None:
    class Done:
        def wait(self) -> None:
            pass

    exchange = transport.exchange
    transport.exchange = lambda *arguments, **options: Done() if options.get("tag") == 7 else exchange(*arguments)


def keeps_messages(transport: Any) -> None:
    mail = transport._mail
    if getattr(mail, "corrupted", False):
        return
    fail_all, mail.corrupted = mail.fail_all, True

    def corrupted(why: str, now: float) -> None:
        channels = mail._channels
        fail_all(why, now)
        mail._channels = channels

    mail.fail_all = corrupted


def wakes_no_rank(transport: Any) -> None:
    transport._membership._end = lambda *arguments: None


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (always(True), "voted no, but the vote is yes"),
        (always(False), "all voted yes, but the vote is no|all vote yes, but the vote is no"),
        (receives_from_itself_alone, "voted no, but the vote is yes"),
        (does_not_mind_the_dead, "but the vote is yes"),
        (other_survivors(lambda ranks: ranks[::-1]), "not in the previous order"),
        (other_survivors(lambda ranks: [rank + 1 for rank in ranks]), "IndexError|but this is rank"),
        (other_survivors(lambda ranks: list(range(len(ranks)))), "but this is rank|a rank died in"),
        (keeps_its_number, "but this is rank"),
        (swallows("barrier"), "a barrier, while rank 0 repairs: expected RankLostError, nothing was raised"),
        (swallows("barrier", TypeError("dead")), "TypeError"),
        (waits_for_nothing, "a receive without a message, while rank 0 repairs: .* nothing was raised"),
        (swallows("allreduce"), "but no rank got a RankLostError"),
        (swallows("broadcast"), "but no rank got a RankLostError"),
        (swallows("allgather"), "but no rank got a RankLostError"),
        (keeps_messages, "sent before the repair"),
        (wakes_no_rank, "wait forever"),
    ],
)
def test_suite_finds_a_broken_promise_of_the_elastic_protocol(spoil: Callable[[Any], None], found: str) -> None:
    def worker(transport: Any) -> None:
        spoil(transport)
        check_elastic(transport, transport.die)

    with pytest.raises(SimulationError, match=found):
        simulate(worker, 7, network=Network(1e-3, 1e6), notice_seconds=0.1)


def test_a_transport_that_is_not_elastic_is_no_elastic_one() -> None:
    def worker(transport: SimulatedTransport) -> None:
        check_elastic(transport, transport.die)  # type: ignore[arg-type]

    with pytest.raises(SimulationError, match="it lacks a method of the protocol"):
        simulate(worker, 2)
