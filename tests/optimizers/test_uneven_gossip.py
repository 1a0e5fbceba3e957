"""A rank that gossips with one that has ended, or waits for it elsewhere, gets an error, and so do all others."""

import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
from numpy_model import Worker
from thread_binding import Coordinator, ThreadBinding

from lentando.comm import neighbor_exchanges, world
from lentando.comm.errors import MismatchError, SimulationError
from lentando.comm.simulation import Compute, simulate
from lentando.comm.testing import run_ranks
from lentando.comm.topology import Complete, Ring
from lentando.comm.transport import Transport
from lentando.comm.transports.horovod import HorovodTransport
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD

GOSSIP = {
    "sgp": SGP(),
    "ring": SGP(Ring()),
    "complete": DPSGD(Complete()),
    "dpsgd": DPSGD(),
    "osgp": OSGP(),
    "osgp 2": OSGP(staleness=2, deterministic=True),
    "osgp 4": OSGP(staleness=4),
}
SAME = "the ranks are not about to do the same thing"


def worker(transport: Transport, **settings: Any) -> Worker:
    return Worker(transport, lambda rank, step, x: x + rank, np.ones(5), lambda step: 0.1, **settings)


def program(transport: Transport, steps: Callable[[int], int], then: str = "", **settings: Any) -> None:
    """Trains for as many steps as this rank is to, and ends."""
    world.init()
    trained = worker(transport, **settings)
    trained.run(steps(transport.rank))
    if transport.rank == transport.size - 1 and then == "evaluate":
        with trained.replica.averaged():
            pass
    if transport.rank == transport.size - 1 and then == "another optimizer":
        worker(transport, base=LocalSGD(), period=2)


def errors(transport: Transport, **settings: Any) -> str:
    """What the program ends with on this rank."""
    with pytest.raises(MismatchError, match=SAME) as error, world.simulated_rank(transport):
        program(transport, **settings)
    return str(error.value)


def last_has_fewer(rank: int, size: int) -> int:
    return 6 if rank == size - 1 else 9


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("period", [None, 4])
@pytest.mark.parametrize("name", GOSSIP)
def test_simulated_rank_that_ends_early_is_named(name: str, period: int | None, size: int) -> None:
    run = partial(program, steps=partial(last_has_fewer, size=size), base=GOSSIP[name], period=period)
    texts = []
    for _ in range(2):
        with pytest.raises(SimulationError, match=SAME) as error:
            simulate(run, size, compute=Compute(1e-3, "exponential"))
        assert isinstance(error.value.__cause__, MismatchError)
        texts.append(str(error.value))
    assert f"rank {size - 1}: has ended (shutdown, or the end of the program) after 6 gossip steps" in texts[0]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("then", ["evaluate", "another optimizer"])
@pytest.mark.parametrize("name", GOSSIP)
def test_simulated_rank_that_proceeds_to_something_else_is_named(name: str, then: str) -> None:
    run = partial(program, steps=partial(last_has_fewer, size=3), then=then, base=GOSSIP[name])
    doing = {"evaluate": "evaluates the average of its model", "another optimizer": "wraps an optimizer"}[then]
    with pytest.raises(SimulationError, match=f"rank 2: {doing}"):
        simulate(run, 3)


@pytest.mark.parametrize("name", GOSSIP)
def test_time_in_a_simulation_is_what_it_was(name: str) -> None:
    """Notices take none: programs whose ranks do the same end at the same moment with them and without."""

    def run(transport: Transport) -> float:
        trained = worker(transport, base=GOSSIP[name], period=4)
        trained.run(9)
        with trained.replica.averaged():
            trained.model.load()
        trained.run(3)
        return transport.clock()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbor_exchanges, "watch_neighbors", lambda *_: None)
        expected = simulate(run, 4, compute=Compute(1e-3, "exponential"))
    assert simulate(run, 4, compute=Compute(1e-3, "exponential")) == expected


@pytest.mark.parametrize("name", ["sgp", "dpsgd", "osgp", "osgp 4"])
def test_threads_all_get_the_same_error(name: str) -> None:
    settings = {"base": GOSSIP[name], "steps": partial(last_has_fewer, size=3)}
    texts = run_ranks(3, partial(errors, **settings))
    assert len(set(texts)) == 1
    assert "rank 2: has ended" in texts[0]


@pytest.mark.parametrize("then", ["", "evaluate"])
def test_ranks_over_horovod_all_get_the_same_error(then: str) -> None:
    coordinator = Coordinator(3)
    texts = [""] * 3

    def run(rank: int) -> None:
        transport = HorovodTransport(ThreadBinding(coordinator, rank))
        texts[rank] = errors(transport, steps=partial(last_has_fewer, size=3), then=then, base=SGP())

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # In step 7 for one of rank 2, unless a rank has been so slow before that another has asked what all do.
    assert re.search(r"rank 0: waits in gossip step \d for a message of rank [12]", texts[0]), texts
    assert len(set(texts)) == 1


def joins_apart(transport: Transport, joined: Callable[[int], bool], **settings: Any) -> None:
    """After two steps of all ranks, some take three more inside join, and the others as many outside it."""
    world.init()
    trained = worker(transport, **settings)
    trained.run(2)
    if joined(transport.rank):
        trained.run_joined(3)
    else:
        trained.run(3)


def joins_apart_errors(transport: Transport, joined: Callable[[int], bool], **settings: Any) -> str:
    with pytest.raises(MismatchError, match=SAME) as error, world.simulated_rank(transport):
        joins_apart(transport, joined, **settings)
    return str(error.value)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("joined", ["first", "last", "all but the first"])
@pytest.mark.parametrize("period", [None, 2, 4])
@pytest.mark.parametrize("name", ["sgp", "ring", "dpsgd", "osgp", "osgp 4"])
def test_ranks_of_which_some_are_inside_join_all_get_the_same_error(
    name: str, period: int | None, joined: str, size: int
) -> None:
    """Inside join a control message precedes each gossip step, to which the ranks outside do not come."""

    def is_joined(rank: int) -> bool:
        return {"first": rank == 0, "last": rank == size - 1, "all but the first": rank > 0}[joined]

    run = partial(joins_apart_errors, joined=is_joined, base=GOSSIP[name], period=period)
    texts = run_ranks(size, run)
    assert len(set(texts)) == 1
    assert "gossips about its model inside join, after 2 steps" in texts[0]
    with pytest.raises(SimulationError, match="inside join, after 2 steps"):
        simulate(partial(joins_apart, joined=is_joined, base=GOSSIP[name], period=period), size)


class Stop:
    """Stands for a handle of save_on_signal that looks every two steps."""

    every, is_requested, automatic = 2, False, True

    def agree(self, ranks: object) -> None:
        pass

    def check(self) -> None:
        pass


@pytest.mark.parametrize("which", ["made", "closed"])
@pytest.mark.parametrize("name", ["sgp", "dpsgd", "osgp", "osgp 4"])
def test_error_comes_where_one_rank_alone_saves_on_signals_or_ceases_to(name: str, which: str) -> None:
    def train(transport: Transport) -> None:
        world.init()
        trained, stop = worker(transport, base=GOSSIP[name]), cast(Any, Stop())
        trained.run(2)
        if which == "closed" or transport.rank == 0:
            trained.replica.stopping.expect(stop)
        if which == "closed" and transport.rank == 0:
            trained.replica.stopping.handle = None
        trained.run(5)

    def run(transport: Transport) -> str:
        with pytest.raises(MismatchError, match=SAME) as error, world.simulated_rank(transport):
            train(transport)
        return str(error.value)

    texts = run_ranks(2, run)
    assert texts[0] == texts[1]
    assert {
        "made": "rank 0: prepares to save on signals",
        "closed": "rank 1: checks whether a rank has received a signal",
    }[which] in texts[0]


def test_error_comes_where_another_optimizer_takes_its_steps() -> None:
    """One rank is in the next average of gradients of one optimizer, another in gossip of the other."""

    def two_models(transport: Transport) -> None:
        averaging, gossiping = worker(transport, base=AllReduce()), worker(transport, base=SGP())
        for step in range(9):
            averaging.run(1)
            gossiping.run(2 if transport.rank == 0 and step == 4 else 1)

    with pytest.raises(MismatchError, match=f"{SAME}.* rank 1: averages the gradients"):
        run_ranks(2, two_models)


@pytest.mark.slow
def test_ranks_that_do_the_same_are_left_alone_however_late_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read each other's notices all the time, and none of them is one that concerns them."""
    monkeypatch.setattr(neighbor_exchanges, "NOTICE_SECONDS", 0.0)

    def run(transport: Transport) -> float:
        with world.simulated_rank(transport):
            trained, other = worker(transport, base=OSGP(), period=4), worker(transport, base=DPSGD(Ring()))
            for epoch in range(4):
                trained.run(5 + epoch)
                with trained.replica.averaged():
                    threading.Event().wait(0.003 * transport.rank)
                other.run(3)
                trained.replica.consensus_distance()
            world.shutdown()
        return float(trained.model.x.sum())

    first = run_ranks(4, run)
    assert np.isfinite(first).all()


def test_join_still_takes_uneven_data() -> None:
    def run(transport: Transport) -> None:
        with world.simulated_rank(transport):
            world.init()
            trained = worker(transport, base=SGP())
            trained.run_joined(last_has_fewer(transport.rank, transport.size))

    run_ranks(3, run)
    simulate(run, 3)
