"""Process sets of thread ranks and of virtual ranks: who is in them, what is refused, and how they end."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lentando.comm.errors as errors
from lentando.comm import operations as ops
from lentando.comm import world
from lentando.comm.agreement import Event, Intent, agree
from lentando.comm.final_checks import check_before_leaving
from lentando.comm.process_sets import (
    ProcessSet,
    add_process_set,
    global_process_set,
    remove_process_set,
    transport_of,
)
from lentando.comm.simulation import simulate
from lentando.comm.testing import run_ranks
from lentando.comm.transports.single import SingleTransport


def on_ranks(size: int, program: Callable[[], Any]) -> list[Any]:
    def run(transport: Any) -> Any:
        with world.simulated_rank(transport):
            return program()

    return run_ranks(size, run)


def test_a_set_knows_its_members() -> None:
    shared = ProcessSet([2, 0])  # one object, which all thread ranks use

    def program() -> None:
        assert (shared.process_set_id, shared.rank(), shared.size()) == (None, None, None)
        odd = add_process_set(np.array([1]))
        assert add_process_set(shared) is shared
        assert [shared.process_set_id, odd.process_set_id, global_process_set.process_set_id] == [2, 1, 0]
        assert shared.ranks == [0, 2]
        assert shared.size() == 2
        assert shared.included() == (world.rank() != 1)
        if shared.included():
            assert shared.rank() == world.rank() // 2
        else:
            with pytest.raises(errors.ConfigurationError, match=r"rank 1 is not a member of process set \[0, 2\]"):
                shared.rank()
        assert ProcessSet([0, 2]) == shared  # sets of the same ranks are equal
        assert hash(ProcessSet([0, 2])) == hash(shared)
        assert global_process_set.ranks == [0, 1, 2]
        assert (global_process_set.rank(), global_process_set.size()) == (world.rank(), 3)
        assert transport_of(global_process_set) is world.transport()
        assert repr(odd) == "ProcessSet(process_set_id=1, ranks=[1])"

    on_ranks(3, program)


def test_outside_a_job_a_set_is_none() -> None:
    assert ProcessSet([0]).process_set_id is None
    assert global_process_set.ranks == []
    with pytest.raises(errors.NotInitializedError):
        add_process_set([0])


def test_sets_that_cannot_be_added_are_errors_on_every_rank() -> None:
    def program() -> None:
        add_process_set([0])
        for ranks, reason in (
            ([0], r"process set \[0\] is a process set of this job already"),
            ([1, 0], r"process set \[0, 1\] is the global process set already"),
            ([2], r"process set \[2\]: expected ranks of this job, from 0 to 1"),
            ([-1], r"expected ranks of this job"),
            ([], r"expected ranks of this job, from 0 to 1, and at least one"),
            ([1, 1], "a rank is in it more than once"),
        ):
            with pytest.raises(errors.ConfigurationError, match=reason):
                add_process_set(ranks)
        with pytest.raises(errors.MismatchError, match=r"rank 0: calls add_process_set\(\[0\]\), which is refused"):
            add_process_set([world.rank()])
        for wrong in ("ranks", 3, [1.5], [True]):
            with pytest.raises(errors.ConfigurationError, match="a ProcessSet is made from a list of ranks"):
                add_process_set(wrong)  # type: ignore[arg-type]
        ops.barrier()

    on_ranks(2, program)


def test_a_removed_set_cannot_be_used_and_can_be_added_again() -> None:
    def program() -> None:
        removed = add_process_set([0, 1])
        before = transport_of(removed) if removed.included() else None
        assert remove_process_set(removed)
        assert removed.process_set_id is None
        assert not remove_process_set(removed)
        assert not remove_process_set(global_process_set)
        with pytest.raises(errors.ConfigurationError, match=r"process set \[0, 1\] does not exist in this job"):
            ops.barrier(removed)
        add_process_set(removed)
        assert removed.process_set_id == 2
        if removed.included():
            assert transport_of(removed) is not before
            ops.barrier(removed)

    on_ranks(3, program)


def test_an_operation_is_for_members_only_and_names_ranks_as_the_job_does() -> None:
    def program() -> None:
        pair = add_process_set([1, 3])
        if not pair.included():
            with pytest.raises(errors.ConfigurationError, match=f"rank {world.rank()} is not a member"):
                ops.allreduce(np.zeros(1), process_set=pair)
            return
        with pytest.raises(errors.ConfigurationError, match=r"one of process set \[1, 3\], got 0"):
            ops.broadcast(np.zeros(1), 0, process_set=pair)
        with pytest.raises(
            errors.MismatchError,
            match=r"the ranks of process set \[1, 3\] are not about.*rank 1: calls allreduce\(\[1\].*rank 3: calls ",
        ):
            ops.allreduce(np.zeros(world.rank()), process_set=pair)
        with pytest.raises(errors.ConfigurationError, match="on rank 3: the object is a object"):
            ops.broadcast_object(object(), 3, process_set=pair)

    on_ranks(4, program)


def test_init_adds_sets_or_joins_nothing() -> None:
    def program() -> None:
        world.shutdown()
        world.init(process_sets=[ProcessSet([0]), ProcessSet([2, 1])])
        assert ProcessSet([1, 2]).process_set_id == 2
        world.shutdown()
        world.init(process_sets="dynamic")
        assert ProcessSet([0]).process_set_id is None
        add_process_set([0])

    on_ranks(3, program)


def test_init_of_a_program_with_a_set_that_is_refused_leaves_no_job() -> None:
    with pytest.raises(errors.ConfigurationError, match="expected ranks of this job"):
        world.init(SingleTransport(), process_sets=[ProcessSet([1])])
    assert not world.is_initialized()
    world.init(SingleTransport())
    world.shutdown()


def test_a_member_that_leaves_while_another_trains_is_an_error_on_both() -> None:
    def program() -> None:
        pair = add_process_set([0, 1])
        if world.rank() == 0:
            with pytest.raises(errors.MismatchError, match="rank 0: has ended.*rank 1: trains on"):
                world.shutdown()
        elif world.rank() == 1:
            with pytest.raises(errors.MismatchError, match="rank 0: has ended"):
                agree(transport_of(pair), Intent(Event.ROUND), lambda: "trains on")

    on_ranks(3, program)


def test_final_checks_of_a_set_are_reported_to_all_ranks() -> None:
    class Model:
        pass

    def program() -> None:
        pair, model = add_process_set([1, 2]), Model()
        if pair.included():
            check_before_leaving(transport_of(pair), model, lambda: "'w' is nan" if world.rank() == 2 else None)
        with pytest.raises(errors.NonFiniteError, match="ranks 0 and 1: all is finite; rank 2: 'w' is nan"):
            world.shutdown()
        world.shutdown()
        assert not world.is_initialized()

    on_ranks(3, program)


def test_a_set_whose_final_checks_find_problems_is_removed_on_all_ranks() -> None:
    class Model:
        pass

    def program() -> None:
        pair, model = add_process_set([1, 2]), Model()
        if pair.included():
            check_before_leaving(transport_of(pair), model, lambda: "'w' is nan" if world.rank() == 2 else None)
            with pytest.raises(errors.NonFiniteError, match="rank 1: all is finite; rank 2: 'w' is nan"):
                remove_process_set(pair)
        else:
            assert remove_process_set(pair)
        assert pair.process_set_id is None
        assert not remove_process_set(pair)
        add_process_set(pair)
        if pair.included():
            ops.barrier(pair)

    on_ranks(3, program)


def test_jobs_without_sets_refuse_them() -> None:
    def elastic() -> None:
        with pytest.raises(errors.ConfigurationError, match="an elastic job has no process sets"):
            add_process_set([0])

    simulate(elastic, 2, notice_seconds=0.1)

    class WithoutSubsets(SingleTransport):
        name, for_ranks = "own", None  # type: ignore[assignment]
        size = 2

        def allgather(self, array: Any) -> Any:
            return np.stack([array, array])

    with (
        world.simulated_rank(WithoutSubsets()),
        pytest.raises(errors.ConfigurationError, match="transport 'own' has no process sets"),
    ):
        add_process_set([0])


def test_a_failing_rank_ends_the_waits_of_others_in_a_set() -> None:
    def program() -> None:
        pair = add_process_set([0, 1])
        if world.rank() == 2:
            raise ZeroDivisionError("on purpose")
        if world.rank() == 1:
            ops.barrier(pair)

    with pytest.raises(ZeroDivisionError):
        on_ranks(3, program)


def test_virtual_time_of_a_set_is_that_of_its_size() -> None:
    def program() -> float:
        pair = add_process_set([0, 1])
        ops.barrier()
        began = world.transport().clock()
        if pair.included():
            transport_of(pair).allreduce(np.zeros(1_000_000))
        return world.transport().clock() - began

    times = simulate(program, 4)
    assert times[2:] == [0, 0]
    assert times[0] == times[1] == pytest.approx(2 * 50e-6 + 8e6 / 1.25e9, rel=0.5)
