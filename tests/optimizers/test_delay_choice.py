"""The choice of a delay from measured times."""

from math import nan

import numpy as np
import pytest

from lentando.optimizers.rules.delay_choice import MEASURED, DelayChoice, hiding_delay


@pytest.mark.parametrize(
    ("average_seconds", "step_seconds", "expected"),
    [
        (0.0, 0.1, 0), (1e-9, 0.1, 1), (0.5, 0.5, 1), (0.75, 0.25, 3), (0.76, 0.25, 4), (9.0, 0.25, 8), (1.0, 0.0, 8),
        (0.0, 0.0, 0),
    ],
)  # fmt: skip
def test_the_smallest_delay_that_hides_the_average(average_seconds: float, step_seconds: float, expected: int) -> None:
    found = hiding_delay(average_seconds, step_seconds, longest=8)
    assert found == expected
    hides = [delay for delay in range(9) if average_seconds <= delay * step_seconds]
    assert found == min(hides, default=8)


@pytest.mark.parametrize("fragments", [1, 2])
def test_the_first_average_of_each_fragment_is_left_out(fragments: int) -> None:
    choice = DelayChoice(fragments)
    times = [9.0] * fragments + [1.0, 3.0, 2.0] * fragments
    for number, seconds in enumerate(times):
        assert np.isnan(choice.longest_seconds()), number
        choice.add(seconds)
    assert len(times) == fragments * (1 + MEASURED)
    assert choice.longest_seconds() == 3.0


def test_the_slowest_average_and_the_fastest_steps_decide() -> None:
    choice = DelayChoice(1)
    assert choice.choose(np.array([1.0, 1.0]), np.array([0.1, nan]), longest=12) is None
    assert choice.choose(np.array([0.5, 1.0]), np.array([0.3, 0.25]), longest=12) == 4
    assert choice.choose(np.array([9.0, 9.0]), np.array([0.3, 0.25]), longest=12) == 4  # for the rest of the run


def test_a_resumed_choice_is_that_of_the_run_before() -> None:
    """Whatever the steps take now, and while their time is not known."""
    choice = DelayChoice(1)
    assert choice.choose(np.array([nan, 1.0]), np.array([0.5, 0.25]), longest=12) is None
    state = choice.state_dict()
    for steps in ([0.25, 0.3], [0.01, 0.01], [nan, 0.2]):
        resumed = DelayChoice(1)
        resumed.load_state_dict(state)
        assert resumed.choose(np.array([0.5, 1.0]), np.array(steps), longest=12) == 4
        assert resumed.step_seconds == 0.25
    assert choice.choose(np.array([0.5, 1.0]), np.array([0.01, 0.01]), longest=12) == 4


def test_a_state_of_an_earlier_version_has_no_time_of_a_step() -> None:
    choice = DelayChoice(1)
    choice.load_state_dict({"chosen": None, "seconds": [9.0, 1.0, 1.0, 1.0]})
    assert choice.choose(np.array([choice.longest_seconds()]), np.array([nan]), longest=12) is None
    assert choice.choose(np.array([choice.longest_seconds()]), np.array([0.5]), longest=12) == 2
