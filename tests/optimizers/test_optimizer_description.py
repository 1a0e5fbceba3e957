"""Base optimizers in plain words: equal where the settings are, whatever type, address or framework they come in."""

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import pytest

from lentando.comm.errors import MismatchError
from lentando.optimizers.optimizer_description import OptimizerDescription, check_same_optimizer, in_plain_words


class Opaque:
    """Python's repr of it holds its address in memory."""


@dataclass
class Warmup:
    steps: int
    then: Any


class Mode(Enum):
    FAST = 1


def module_function(step: int) -> float:
    return 0.1 * step


@pytest.mark.parametrize(
    "equal",
    [
        (0.1, np.float64(0.1), np.float32(0.1), np.array(0.1, np.float32), np.array([0.1])),
        (1, 1.0, np.int64(1), np.array(1.0)),
        ((0.9, 0.999), [0.9, 0.999], (np.float32(0.9), np.float64(0.999)), np.array([0.9, 0.999])),
        ({"a": 1, "b": (2, None)}, {"b": [2.0, None], "a": 1.0}),
        ({1, 2, 3}, frozenset([3, 2, 1])),
        (Opaque(), Opaque()),
        (Warmup(3, Opaque()), Warmup(3, Opaque())),
        (partial(module_function, 3), partial(module_function, 3)),
        (lambda: 1, lambda: 1),
        (float("inf"), np.float32("inf")),
    ],
)
def test_equal_settings_read_the_same(equal: tuple[Any, ...]) -> None:
    words = {in_plain_words(value) for value in equal}
    assert len(words) == 1
    assert "0x" not in words.pop()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.9, 0.90001),
        (0.999, 1.0),
        (True, None),
        ("0.1", 0.1),
        ((0.9, 0.999), (0.9, 0.99)),
        (Warmup(3, 0.1), Warmup(4, 0.1)),
        (module_function, Opaque),
        (partial(module_function, 3), partial(module_function, 4)),
        (np.arange(1000.0), np.arange(1000.0) + 1),
        (np.arange(4.0), np.arange(4.0) + 1),
        (Mode.FAST, 1),
        (2**60, 2**60 + 1),
        (1j, 2j),
    ],
)
def test_different_settings_read_differently(one: Any, other: Any) -> None:
    assert in_plain_words(one) != in_plain_words(other)


def test_a_value_that_holds_itself_comes_to_an_end() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    assert in_plain_words(ring).startswith("(1, (1, (1, ")


def described(kind: str = "SGD", lr: str = "0.1", **hyperparameters: str) -> dict[str, Any]:
    return OptimizerDescription(kind, hyperparameters, {"lr": lr}).as_plain(with_rates=True)


def test_difference_names_hyperparameters_and_ranks() -> None:
    ranks = [described(momentum="0.9"), described(momentum="0.5"), described(momentum="0.9", nesterov="True")]
    with pytest.raises(MismatchError) as error:
        check_same_optimizer(["torch"] * 3, ranks)
    assert "momentum: ranks 0 and 2: 0.9; rank 1: 0.5" in str(error.value)
    assert "nesterov: ranks 0 and 1: not there; rank 2: True" in str(error.value)


def test_many_differences_are_counted() -> None:
    with pytest.raises(MismatchError, match="a: rank 0: 1; rank 1: 2.*; and 2 more. Give"):
        check_same_optimizer(["torch"] * 2, [described(**dict.fromkeys("abcdef", value)) for value in "12"])


def test_only_ranks_of_one_framework_are_compared() -> None:
    ranks = [described(), described("Keras's SGD", nesterov="False"), described(), described("Keras's SGD")]
    with pytest.raises(MismatchError, match="nesterov: rank 1: False; rank 3: not there"):
        check_same_optimizer(["torch", "tensorflow"] * 2, ranks)
    check_same_optimizer(["torch", "tensorflow"], ranks[:2])


def test_learning_rates_can_be_left_out() -> None:
    description = OptimizerDescription("SGD", {}, {"lr": "0.1"})
    without = {"kind": "SGD", "hyperparameters": {}, "learning_rates": {}, "attributes": {}}
    assert description.as_plain(with_rates=False) == without
