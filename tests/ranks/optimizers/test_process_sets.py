"""Replicas over disjoint process sets train at the same time, each as a job of its own ranks would."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
from backends import needs_process_sets
from forking import succeeds_in_child
from methods import methods
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker

from lentando.comm import operations as ops
from lentando.comm.errors import MismatchError, NonFiniteError, TransportError
from lentando.comm.process_sets import ProcessSet, add_process_set, global_process_set, remove_process_set, transport_of
from lentando.comm.testing import run_ranks
from lentando.comm.transport import Array, Transport
from lentando.comm.world import rank, size
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.slow_momentum import SlowMomentum

pytestmark = [pytest.mark.skipif(size() < 2, reason="one rank has no two sets"), needs_process_sets]

START = np.linspace(-1, 1, 1501)
QUADRATIC = reference.quadratic(START.size)
STEPS = 8


@pytest.fixture(scope="module")
def mine() -> Iterator[ProcessSet]:
    """The even ranks, or the odd ones."""
    both = [add_process_set(range(first, size(), 2)) for first in (0, 1)]
    yield both[rank() % 2]
    assert all(remove_process_set(each) for each in both)


def trained(transport: Transport, parity: int, settings: dict[str, Any]) -> Array:
    """Another model in each set, by another number of steps."""

    def gradient(of_rank: int, step: int, x: Array) -> Array:
        return QUADRATIC(of_rank + 10 * parity, step, x)

    needs_loss = "adaptive" in str(settings.get("period")).lower()
    worker = Worker(
        transport,
        gradient,
        START * (parity + 1),
        lambda step: 0.05,
        0.5,
        (lambda worker: float(np.square(worker.model.x).sum())) if needs_loss else None,
        **settings,
    )
    result: Array = worker.run(STEPS + parity).copy()
    return result


@pytest.mark.parametrize("method", [name for name in methods() if "adacomm" not in name])  # which follows the clock
def test_two_sets_train_as_two_jobs(mine: ProcessSet, method: str) -> None:
    transport, parity = transport_of(mine), rank() % 2
    result = trained(transport, parity, methods()[method])
    ranks_of_job = run_ranks(transport.size, lambda other: trained(other, parity, methods()[method]))
    if transport.size <= 2:
        assert_array_equal(result, ranks_of_job[transport.rank])
    else:  # sums of three are formed in another order by MPI
        assert_allclose(result, ranks_of_job[transport.rank], rtol=1e-11)


def test_one_rank_trains_in_its_set_and_with_all_ranks_in_turn(mine: ProcessSet) -> None:
    """As the two networks of a GAN may: one averaged within a group, the other over all."""
    settings: dict[str, Any] = {"base": LocalSGD(), "outer": SlowMomentum(1.0, 0.5), "period": 2}
    within = Worker(transport_of(mine), QUADRATIC, START, lambda step: 0.1, **settings)
    over_all = Worker(transport_of(global_process_set), QUADRATIC, START, lambda step: 0.1, **settings)
    for _ in range(3):
        within.run(2)
        over_all.run(2)
    sets = ops.allgather_object(within.model.x.tobytes())
    assert len(set(sets[0::2])) == len(set(sets[1::2])) == 1
    assert len(set(ops.allgather_object(over_all.model.x.tobytes()))) == 1
    assert within.replica.transport.traffic is not over_all.replica.transport.traffic


def test_uneven_data_within_a_set_concern_no_other(mine: ProcessSet) -> None:
    worker = Worker(transport_of(mine), QUADRATIC, START, lambda step: 0.1, base=LocalSGD(), period=2)
    worker.run_joined(3 + rank())
    assert worker.replica.inner_steps == 3 + mine.ranks[-1]
    by_member = ops.allgather_object(worker.model.x.tobytes(), process_set=mine)
    assert len(set(by_member)) == 1


def test_an_error_names_the_ranks_of_the_job_and_the_other_set_continues(mine: ProcessSet) -> None:
    def gradient(of_rank: int, step: int, x: Array) -> Array:
        return np.full_like(x, np.nan) if rank() == size() - 1 and step == 2 else QUADRATIC(of_rank, step, x)

    worker = Worker(transport_of(mine), gradient, START, lambda step: 0.1)
    if size() - 1 in mine.ranks:
        with pytest.raises(NonFiniteError, match=f"rank {size() - 1}: "):
            worker.run(4)
    else:
        worker.run(4)
        assert worker.replica.inner_steps == 4
    ops.barrier()


def test_steps_that_differ_within_a_set_are_an_error_there(mine: ProcessSet) -> None:
    settings: dict[str, Any] = {"base": LocalSGD(), "period": 2}
    worker = Worker(transport_of(mine), QUADRATIC, START, lambda step: 0.1, **settings)
    if len(mine.ranks) == 1:
        worker.run(2)
        return
    worker.run(2)
    differs = rank() == mine.ranks[0]
    with pytest.raises(MismatchError, match=rf"of process set \{mine.ranks}.*rank {mine.ranks[0]}: "):
        ops.barrier(mine) if differs else worker.run(2)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_cannot_communicate_in_a_set() -> None:
    everyone_but_one = add_process_set(range(size() - 1)) if size() > 2 else None
    if everyone_but_one is not None and everyone_but_one.included():

        def refused() -> None:
            with pytest.raises(TransportError, match="made by fork"):
                ops.barrier(everyone_but_one)

        assert succeeds_in_child(refused)
        ops.barrier(everyone_but_one)
    if everyone_but_one is not None:
        remove_process_set(everyone_but_one)
