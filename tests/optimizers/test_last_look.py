"""Parameters that are not finite after the last message of a training are found when the rank leaves the job."""

import gc
import logging
import weakref
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
from numpy_model import Worker

from lentando.comm.errors import NonFiniteError
from lentando.comm.final_checks import check_before_leaving, take_problems
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD

METHODS: dict[str, dict[str, Any]] = {
    "local sgd": {"base": LocalSGD(), "period": 4},
    "allreduce": {"base": AllReduce()},
    "gossip": {"base": SGP()},
    "gossip in flight": {"base": OSGP(), "period": 4},
}


def gradient(rank: int, step: int, x: Any) -> Any:
    return x


def worker(transport: ThreadTransport, **settings: Any) -> Worker:
    return Worker(transport, gradient, np.ones(4), lambda step: 0.1, **settings)


def problems(steps: int, bad: float | None, dropped: bool = False, **settings: Any) -> list[list[str]]:
    """What each of two ranks finds when it leaves after so many steps, if rank 1 has a bad value then."""
    found: list[list[str]] = [[], []]

    def work(transport: ThreadTransport) -> None:
        mine: Worker | None = worker(transport, **settings)
        assert mine is not None
        mine.run(steps)
        if bad is not None and transport.rank == 1:
            mine.model.x[-1] = bad
        if dropped:
            mine = None
            gc.collect()
        found[transport.rank] = take_problems(transport)
        assert take_problems(transport) == []  # reported once

    run_ranks(2, work)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_value_that_is_not_finite_is_found_at_the_end(method: str, bad: float, dropped: bool) -> None:
    stated = "parameter 'part1' is not finite at the end of training, after inner step 6"
    assert problems(6, bad, dropped, **METHODS[method]) == [[], [stated]]


@pytest.mark.parametrize("method", METHODS)
def test_finite_models_are_no_problem(method: str) -> None:
    assert problems(6, None, **METHODS[method]) == [[], []]


def test_what_an_outer_step_has_seen_is_not_looked_at_again() -> None:
    assert problems(8, np.nan, **METHODS["local sgd"]) == [[], []]


def test_what_is_left_out_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lentando"):
        assert problems(6, np.nan, **METHODS["local sgd"], on_nonfinite="skip") == [[], []]
    assert "rank 1: parameter 'part1' is not finite at the end of training" in caplog.text


def test_what_an_error_has_reported_is_not_reported_again() -> None:
    def work(transport: ThreadTransport) -> None:
        mine = worker(transport, **METHODS["local sgd"])
        mine.run(2)
        mine.model.x[0] = np.nan
        with pytest.raises(NonFiniteError):
            mine.run(2)
        assert take_problems(transport) == []

    run_ranks(2, work)


@pytest.mark.slow
def test_owner_is_not_kept_alive() -> None:
    """Many optimizers may be made and dropped in one job."""

    def work(transport: ThreadTransport) -> None:
        made = []
        for _ in range(50):
            mine = worker(transport, **METHODS["local sgd"])
            mine.run(1)
            made.append(weakref.ref(mine.replica))
        del mine
        gc.collect()
        assert not any(replica() for replica in made)

    run_ranks(1, work)


def test_look_leaves_the_variables_of_its_caller_alone() -> None:
    """Garbage collection may call it at any moment, also while its caller sets a ``ContextVar``."""
    looks = ContextVar("looks", default=0)
    seen: list[int] = []

    class Owner:
        pass

    def look() -> None:
        looks.set(looks.get() + 1)
        seen.append(looks.get())

    def work(transport: ThreadTransport) -> None:
        owner = Owner()
        looks.set(1)
        check_before_leaving(transport, owner, look)
        del owner
        assert seen == [2]
        assert looks.get() == 1

    run_ranks(1, work)
