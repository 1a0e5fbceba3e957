"""NumPy's memory as TensorFlow tensors, which is what ``horovod.tensorflow`` takes. Imported only when it is chosen."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from lentando.comm.transport import Array, ReduceOp
from lentando.comm.transports.horovod.engine import Engine, HorovodWorld, as_ours

__all__ = ["TensorFlowEngine", "open_engine"]

if not hasattr(hvd, "init"):  # its Python part imports without the compiled one
    raise ImportError("Horovod is installed, but was not built for TensorFlow")


def open_engine() -> Engine:
    """Join Horovod's job, unless the program has."""
    return TensorFlowEngine()


class TensorFlowEngine(HorovodWorld):
    """Horovod as built for TensorFlow.

    An operation of TensorFlow's returns when it is done, and Horovod sees a name only within a ``tf.function``. So each
    name and dtype has a function of its own, which runs in a thread.
    """

    binding = "horovod.tensorflow"

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
        """The graph of an operation on one-dimensional tensors, traced once."""
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
    """An operation under way.

    Args:
        call: performs it; returns its tensor.
        in_place: the array that it works on; None if the result is a new one.
        idle: where its thread goes when it is done.
    """

    def __init__(self, call: Callable[[], Any], in_place: Array | None, idle: "list[_Thread]") -> None:
        self._call = call
        self._in_place = in_place
        self._idle = idle
        self._done = threading.Event()
        self._found: Array | None = None
        self._error: Exception | None = None

    def perform(self, thread: "_Thread") -> None:
        """In the thread."""
        try:
            self._found = self._call().numpy()
        except Exception as error:  # noqa: BLE001 - raised again by result()
            self._error = error
        self._idle.append(thread)
        self._done.set()

    def done(self) -> bool:
        return self._done.is_set()

    def result(self) -> Array:
        if self._error is not None or self._found is None:
            raise as_ours(self._error) from self._error
        if self._in_place is None:
            return self._found
        self._in_place[...] = self._found
        return self._in_place


class _Thread:
    """Performs one operation after the other. There are as many as operations under way: one per rank, and a few."""

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
