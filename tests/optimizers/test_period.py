"""Communication periods."""

from typing import Any

import pytest
from numpy_model import Worker

from lentando.comm.errors import ConfigurationError
from lentando.comm.transports.single import SingleTransport
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.period import FixedPeriod, Period, PostLocal, RoundSummary, as_period


def rounds(period: Any, steps: int) -> list[int]:
    """The steps after which a replica with this period averages."""
    import numpy as np

    worker = Worker(
        SingleTransport(), lambda *_: np.zeros(2), np.zeros(2), lambda _: 0.1, base=LocalSGD(), period=period
    )
    ends = []
    for step in range(1, steps + 1):
        before = worker.replica.rounds
        worker.run(1)
        if worker.replica.rounds > before:
            ends.append(step)
    return ends


class Growing:
    """A third party's schedule: 1, 2, 3, ... steps."""

    def __init__(self) -> None:
        self.seen: list[RoundSummary] = []

    def steps(self) -> int:
        return len(self.seen) + 1

    def update(self, summary: RoundSummary) -> None:
        self.seen.append(summary)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": len(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = [None] * state["seen"]  # type: ignore[list-item]


def test_fixed_period() -> None:
    assert rounds(4, 13) == [4, 8, 12]
    assert as_period(4) == FixedPeriod(4)


def test_schedule_of_a_third_party_drives_the_rounds() -> None:
    assert isinstance(Growing(), Period)
    assert rounds(Growing(), 16) == [1, 3, 6, 10, 15]


def test_schedule_given_to_two_optimizers_is_not_shared() -> None:
    schedule = Growing()
    assert rounds(schedule, 6) == rounds(schedule, 6) == [1, 3, 6]
    assert not schedule.seen


@pytest.mark.parametrize("start", [0, 1, 5])
def test_post_local_averages_every_step_until_start_and_then_by_the_period(start: int) -> None:
    """O72's schedule: the first round of the period begins right at the switch."""
    assert rounds(PostLocal(start, 4), start + 9) == [*range(1, start + 1), start + 4, start + 8]


def test_post_local_hands_over_to_any_schedule_as_if_it_began_there() -> None:
    assert rounds(PostLocal(2, Growing()), 9) == [1, 2, 3, 5, 8]


def test_post_local_resumes_on_either_side_of_the_switch() -> None:
    for taken in range(1, 7):
        original, resumed = PostLocal(3, Growing()), PostLocal(3, Growing())
        for step in range(1, taken + 1):
            original.update(RoundSummary(step, step, 0.0, 0.1, 0.0))
        resumed.load_state_dict(original.state_dict())
        assert resumed.steps() == original.steps()


@pytest.mark.parametrize("bad", [0, -1, 1.0, "12", None, True])
def test_impossible_periods_are_refused(bad: Any) -> None:
    """O26."""
    with pytest.raises(ConfigurationError, match="period must be an integer >= 1"):
        as_period(bad)
    with pytest.raises(ConfigurationError, match="period must be an integer >= 1"):
        PostLocal(5, bad)


def test_impossible_start_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="start of PostLocal must be an integer >= 0"):
        PostLocal(-1, 4)
