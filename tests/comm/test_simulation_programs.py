"""Programs that know nothing of the simulator run in it unchanged, as in processes of their own."""

# ruff: noqa: NPY002 - the legacy global state is what is tested

import random

import numpy as np
import pytest

from lentando.comm import world
from lentando.comm.errors import (
    MismatchError,
    NotInitializedError,
    SimulationError,
)
from lentando.comm.simulation import (
    ProcessState,
    SimulatedTransport,
    register_process_state,
    simulate,
)


def test_a_program_runs_unchanged() -> None:
    def train(steps: int = 3) -> tuple[int, int, int, int]:
        world.init()
        world.transport().allreduce(np.zeros(steps))
        return world.rank(), world.size(), world.local_rank(), world.local_size()

    assert simulate(train, 3, local_size=2) == [(0, 3, 0, 2), (1, 3, 1, 2), (2, 3, 0, 1)]


def test_the_process_stays_outside() -> None:
    assert not world.is_initialized()

    def worker(transport: SimulatedTransport) -> bool:
        transport.barrier()
        return world.is_initialized() and world.transport() is transport

    assert simulate(worker, 2) == [True, True]
    assert not world.is_initialized()
    with pytest.raises(NotInitializedError):
        world.transport()


def test_a_rank_leaves_and_joins_again() -> None:
    def worker(transport: SimulatedTransport) -> list[bool]:
        seen = [world.is_initialized()]
        world.shutdown()
        seen.append(world.is_initialized())
        with pytest.raises(NotInitializedError):
            world.rank()
        world.init()
        seen.append(world.transport() is transport)
        return seen

    assert simulate(worker, 2) == [[True, False, True]] * 2


def test_the_end_of_a_program_that_called_init_is_a_shutdown() -> None:
    """As at the end of a process: a rank that ends while others continue is named on every rank."""

    def train() -> None:
        from lentando.comm.agreement import Event, Intent, agree

        world.init()
        for step in range(2 + world.rank()):
            agree(world.transport(), Intent(Event.GRADIENTS, step=step), lambda: "is about to average gradients")

    with pytest.raises(SimulationError, match=r"the ranks are not about to do the same.*has ended") as caught:
        simulate(train, 2)
    assert isinstance(caught.value.__cause__, MismatchError)


def test_each_rank_of_a_program_has_its_own_random_state() -> None:
    def train(transport: SimulatedTransport | None = None) -> list[float]:
        random.seed(7)
        np.random.seed(7)
        drawn = []
        for _ in range(5):
            drawn += [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
            if world.is_initialized():
                world.transport().compute(1.0 + world.rank())  # type: ignore[attr-defined]
        return drawn

    alone = train()
    before = random.random(), float(np.random.rand())
    random.seed(3)
    np.random.seed(3)
    before = random.random(), float(np.random.randn())
    random.seed(3)
    np.random.seed(3)
    assert simulate(train, 3) == [alone] * 3
    assert (random.random(), float(np.random.randn())) == before  # and the program around keeps its own

    def draw() -> float:
        world.transport().barrier()
        return float(np.random.rand())

    assert len(set(simulate(draw, 3))) == 3  # as separate processes that were not seeded
    assert simulate(draw, 3) == simulate(draw, 3)
    shared = simulate(train, 3, isolate=False)
    assert shared != [alone] * 3


def test_a_gaussian_kept_for_the_next_call_is_the_rank_s_own() -> None:
    """NumPy draws two at a time and keeps one, so that every other call leaves the bits as they are."""

    def train(transport: SimulatedTransport | None = None) -> list[float]:
        np.random.seed(world.rank() if world.is_initialized() else 1)
        drawn = []
        for _ in range(5):
            drawn.append(float(np.random.randn()))
            if world.is_initialized():
                world.transport().barrier()
        return drawn

    assert simulate(train, 3)[1] == train()


def test_registered_state_is_exchanged_between_ranks() -> None:
    state = {"value": "outside"}

    def start(seed: int, rank: int) -> None:
        state["value"] = f"rank {rank} of seed {seed}"

    register_process_state("test", ProcessState(lambda: state["value"], lambda value: state.update(value=value), start))

    def worker(transport: SimulatedTransport) -> str:
        state["value"] += " was here"
        transport.barrier()
        return state["value"]

    try:
        found = simulate(worker, 2, seed=4, isolate=True)
    finally:
        register_process_state("test", ProcessState(lambda: None, lambda value: None, lambda seed, rank: None))
    assert found == ["rank 0 of seed 4 was here", "rank 1 of seed 4 was here"]
    assert state["value"] == "outside"
