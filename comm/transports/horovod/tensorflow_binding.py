"""The binding for ``horovod.tensorflow``, which accepts TensorFlow tensors. Imported only when it is chosen."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from lentando.comm.transport import Array, ReduceOp
from lentando.comm.transports.horovod.binding import HorovodBinding, HorovodWorld, translated_error

__all__ = ["TensorFlowBinding", "open_binding"]

if not hasattr(hvd, "init"):  # the Python part can be imported without the compiled one
    raise ImportError("Horovod is installed, but was not built for TensorFlow")


def open_binding() -> HorovodBinding:
    """Return the binding, and join Horovod's job, unless the program has."""
    return TensorFlowBinding()


class TensorFlowBinding(HorovodWorld):
    """Horovod, built for TensorFlow.

    An operation of TensorFlow blocks until it is complete, and Horovod uses a given name only within a ``tf.function``.
    So there is one function per name and dtype, which runs in a thread.
    """

    module = "horovod.tensorflow"

    def __init__(self) -> None:
        super().__init__(hvd)
        self._functions: dict[tuple[object, ...], Any] = {}
        self._idle: list[_Thread] = []

    def allreduce(self, name: str, array: Array, op: ReduceOp) -> "_Collective":
        operation = self._operations[op]
        reduce = self._function(
            (name, op, array.dtype), lambda tensor: hvd.allreduce(tensor, op=operation, name=name), array.dtype
        )
        return self._start(lambda: reduce(tf.constant(array)), array)

    def broadcast(self, name: str, memory: Array, root: int) -> "_Collective":
        broadcast = self._function(
            (name, "broadcast", root), lambda tensor: hvd.broadcast(tensor, root, name=name), memory.dtype
        )
        return self._start(lambda: broadcast(tf.constant(memory)), memory)

    def allgather(self, name: str, memory: Array) -> "_Collective":
        gather = self._function((name, "allgather"), lambda tensor: hvd.allgather(tensor, name=name), memory.dtype)
        return self._start(lambda: gather(tf.constant(memory)))

    def alltoall(self, name: str, words: Array, splits: Sequence[int]) -> "_Collective":
        exchange = self._function(
            (name, "alltoall"),
            lambda tensor, lengths: hvd.alltoall(tensor, lengths, name=name)[0],
            *(words.dtype, np.dtype(np.int32)),
        )
        return self._start(lambda: exchange(tf.constant(words), tf.constant(splits, tf.int32)))

    def _function(self, key: tuple[object, ...], body: Callable[..., Any], *dtypes: np.dtype[Any]) -> Any:
        """Return the function of an operation on one-dimensional tensors, traced once."""
        if key not in self._functions:
            signature = [tf.TensorSpec([None], dtype) for dtype in dtypes]
            self._functions[key] = tf.function(body, autograph=False).get_concrete_function(*signature)
        return self._functions[key]

    def _start(self, call: Callable[[], Any], in_place: Array | None = None) -> "_Collective":
        collective = _Collective(call, in_place, self._idle)
        try:
            thread = self._idle.pop()
        except IndexError:
            thread = _Thread()
        thread.run(collective)
        return collective


class _Collective:
    """A collective in flight.

    Args:
        call: function that performs the collective and returns its tensor.
        in_place: array that holds the result; None if the result is a new array.
        idle: list of idle threads, to which the thread is added when the collective is complete.
    """

    def __init__(self, call: Callable[[], Any], in_place: Array | None, idle: "list[_Thread]") -> None:
        self._call = call
        self._in_place = in_place
        self._idle = idle
        self._done = threading.Event()
        self._output: Array | None = None
        self._error: Exception | None = None

    def perform(self, thread: "_Thread") -> None:
        """Perform the collective. Called in the thread."""
        try:
            self._output = self._call().numpy()
        except Exception as error:  # noqa: BLE001 - raised again by result()
            self._error = error
        self._idle.append(thread)
        self._done.set()

    def done(self) -> bool:
        return self._done.is_set()

    def result(self) -> Array:
        if self._error is not None or self._output is None:
            raise translated_error(self._error) from self._error
        if self._in_place is None:
            return self._output
        self._in_place[...] = self._output
        return self._in_place


class _Thread:
    """A thread that performs one collective at a time. There is one per collective in flight, about one per rank."""

    def __init__(self) -> None:
        self._wanted = threading.Semaphore(0)
        self._next: _Collective | None = None
        threading.Thread(target=self._run, name="lentando-horovod", daemon=True).start()

    def run(self, collective: _Collective) -> None:
        self._next = collective
        self._wanted.release()

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            assert self._next is not None
            self._next.perform(self)
