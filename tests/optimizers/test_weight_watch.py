"""What counts as a correction of the last step, and what as weights that the program has set."""

from collections.abc import Callable

import numpy as np
import pytest

from lentando.comm.transport import Array
from lentando.optimizers.weight_watch import is_jump

SIZE = 64


def clipped(x: Array) -> Array:
    return x.clip(-0.3, 0.3)


def masked(x: Array) -> Array:
    return np.where(np.arange(SIZE) % 2, x, 0)


def shortened(x: Array) -> Array:
    return x * min(1.0, 1.5 / float(np.linalg.norm(x)))


def of_unit_length(x: Array) -> Array:
    return x / np.linalg.norm(x)


def rounded(x: Array) -> Array:
    return np.round(x * 8) / 8


@pytest.mark.parametrize("project", [clipped, masked, shortened, of_unit_length, rounded])
@pytest.mark.parametrize("length", [1e-3, 0.1, 10.0])
def test_projections_are_part_of_the_step(project: Callable[[Array], Array], length: float) -> None:
    for seed in range(200):
        numbers = np.random.default_rng(seed)
        before = project(numbers.normal(0, 0.3, SIZE))
        after = before + numbers.normal(0, length, SIZE)
        assert not is_jump(before, after, project(after))


@pytest.mark.parametrize("length", [1e-3, 0.3, 0.75])
def test_unrelated_weights_are_noticed_up_to_steps_as_long_as_the_weights(length: float) -> None:
    for seed in range(200):
        numbers = np.random.default_rng(seed)
        before, other = numbers.normal(0, 1, (2, SIZE))
        assert is_jump(before, before + numbers.normal(0, length, SIZE), other)


def test_values_that_are_not_finite_are_no_jump() -> None:
    before = np.zeros(SIZE)
    assert not is_jump(before, before + np.nan, before)
    assert is_jump(before, before, before + 1.0)
