"""Calls of Python from graphs: in program order, and never two at the same time."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time
from collections.abc import Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
import tensorflow as tf

import lentando.tensorflow as lt
from lentando.tensorflow.python_calls import call_python


@pytest.fixture(autouse=True)
def _job() -> Iterator[None]:
    lt.init()
    yield
    lt.shutdown()


class Calls:
    """Records the calls of Python that a graph makes, of which earlier ones take longer."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._seconds = 0.05
        self._variables = [tf.Variable(0.0) for _ in range(16)]  # TensorFlow may trace a function twice

    def add(self, name: str, number: Any = 0) -> None:
        """A call that uses a variable that no other call uses."""
        seconds, self._seconds = self._seconds, self._seconds / 2

        def call(number: Any) -> None:
            time.sleep(seconds)
            self.names.append(f"{name} {int(number)}")

        call_python(call, [self._variables.pop()], inputs=[tf.convert_to_tensor(number)])


def traced(body: Any) -> list[str]:
    """The calls of one run of a function that is given the recorder and a tensor with the value 3."""
    calls = Calls()

    @tf.function(autograph=False)
    def function(count: Any) -> None:
        body(calls, count)

    function.get_concrete_function(tf.TensorSpec([], tf.int32))(tf.constant(3))
    return calls.names


def test_calls_without_a_variable_in_common() -> None:
    assert traced(lambda calls, _: [calls.add(name) for name in "abcd"]) == ["a 0", "b 0", "c 0", "d 0"]


def test_calls_in_nested_functions_and_branches() -> None:
    def body(calls: Calls, count: Any) -> None:
        inner = tf.function(lambda: calls.add("inner"), autograph=False)
        calls.add("first")
        inner()
        tf.cond(count > 2, lambda: calls.add("then"), lambda: calls.add("else"))
        calls.add("last")

    assert traced(body) == ["first 0", "inner 0", "then 0", "last 0"]


def test_calls_in_loops() -> None:
    def body(calls: Calls, count: Any) -> None:
        def step(number: Any) -> Any:
            calls.add("a", number)
            calls.add("b", number)
            return [number + 1]

        calls.add("first")
        tf.while_loop(lambda number: number < count, step, [0], parallel_iterations=8)
        tf.map_fn(lambda number: (calls.add("mapped", number), number)[1], tf.range(3), parallel_iterations=8)
        calls.add("last")

    steps = [f"{name} {number}" for number in range(3) for name in "ab"]
    assert traced(body) == ["first 0", *steps, *(f"mapped {n}" for n in range(3)), "last 0"]


@pytest.mark.parametrize("in_branch", [False, True])
def test_variables_that_a_call_touches(in_branch: bool) -> None:
    """Earlier operations on them are complete when the function is called, and later ones wait for it."""
    read, changed = tf.Variable(1.0), tf.Variable(0.0)
    seen: list[float] = []

    def touch() -> None:
        time.sleep(0.2)
        seen.append(float(read.read_value()))
        changed.assign(5.0)

    @tf.function(autograph=False)
    def function(number: Any) -> Any:
        read.assign(number)

        def call() -> Any:
            call_python(touch, [read, changed])
            return tf.constant(0)

        if in_branch:
            tf.cond(number > 0.0, call, lambda: tf.constant(0))
        else:
            call()
        found = changed.read_value()
        read.assign(9.0)
        return found

    assert float(function(tf.constant(2.0))) == 5.0
    assert seen == [2.0]


def test_threads_whose_calls_meet_are_an_error() -> None:
    meeting = Barrier(2)
    errors: list[str] = []

    def call() -> None:
        meeting.wait(10)
        time.sleep(0.2)

    def run() -> None:
        step = tf.function(lambda: call_python(call) and None, autograph=False).get_concrete_function()
        try:
            step()
        except tf.errors.OpError as error:
            errors.append(str(error))
            meeting.abort()

    threads = [Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert any("two threads communicate at the same time" in error for error in errors)


def test_collective_in_a_data_pipeline_next_to_training_is_an_error() -> None:
    """The pipeline runs in threads of its own, ahead of the step that uses its batch."""

    def slow(value: Any) -> Any:
        call_python(lambda _: time.sleep(0.3), inputs=[value])
        return value

    data = tf.data.Dataset.range(8).map(slow, num_parallel_calls=4, deterministic=False)
    with pytest.raises(tf.errors.OpError, match="two threads communicate at the same time"):
        list(data)
