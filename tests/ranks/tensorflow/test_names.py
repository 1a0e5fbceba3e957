"""Names are compared: ranks that list the same variables in another order never exchange values silently."""

from typing import Any

import pytest
import tensorflow as tf

import lentando.tensorflow as lt

NAMES = ["accuracy", "loss", "speed"]


def in_own_order() -> list[str]:
    """Rank 0 begins with the first name, rank 1 with the second, and so on."""
    start = lt.rank() % len(NAMES)
    return NAMES[start:] + NAMES[:start]


@pytest.mark.parametrize(
    "call",
    [
        lambda name: lt.allreduce(tf.constant(1.0), name=name),
        lambda name: lt.allgather(tf.ones([2, 2]), name=name),
        lambda name: lt.broadcast(tf.ones([2]), 0, name=name),
        lambda name: lt.broadcast_object({"a": 1}, 0, name=name),
    ],
)
def test_calls_by_other_names_are_an_error_on_every_rank(call: Any) -> None:
    if lt.size() == 1:
        return
    with pytest.raises(lt.MismatchError, match=r"rank 0: .* named 'accuracy'.*rank 1: .* named 'loss'"):
        call(in_own_order()[0])
    call("the same")


@pytest.mark.parametrize("in_graph", [False, True])
def test_variables_in_another_order_take_over_the_root_s_of_their_name(in_graph: bool) -> None:
    root = lt.size() - 1
    values = {name: number + 1.0 for number, name in enumerate(NAMES)}
    variables = {name: tf.Variable(values[name] if lt.rank() == root else 0.0) for name in in_own_order()}

    def take_over() -> None:
        lt.broadcast_variables(variables, root)

    (tf.function(take_over) if in_graph else take_over)()
    assert {name: float(variable) for name, variable in variables.items()} == values


def test_several_variables_of_one_name_are_all_sent() -> None:
    variables = [tf.Variable(float(number) if lt.rank() == 0 else -1.0) for number in range(3)]
    lt.broadcast_variables(variables, 0)
    assert [float(variable) for variable in variables] == [0.0, 1.0, 2.0]


def test_variables_that_differ_are_an_error_that_says_what_each_rank_lacks() -> None:
    if lt.size() == 1:
        return
    variables = {"shared": tf.Variable(1.0), "head.a" if lt.rank() == 0 else "head.b": tf.Variable(1.0)}
    with pytest.raises(lt.MismatchError, match=r"'head.b' not on rank 0.*'head.a' not on rank"):
        lt.broadcast_variables(variables, 0)
