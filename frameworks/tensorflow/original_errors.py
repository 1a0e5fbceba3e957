"""Recovery of errors that Python raised inside a graph, which TensorFlow replaces by its own errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import keras
import tensorflow as tf

from lentando.comm.errors import LentandoError

__all__ = ["convert_errors_of", "note_error", "original_errors"]


class _LastError:
    """The last error that a graph's call of Python raised."""

    error: Exception | None = None


def note_error(error: Exception) -> None:
    """Remember an error that TensorFlow is about to replace by its own."""
    _LastError.error = error


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise Lentando's error that made a graph fail, in place of TensorFlow's ``UnknownError``.

    ``fit`` does so without it, if the model was passed to the optimizer (``model=``). For other graphs, use it around
    the call, ``with lt.original_errors(): step(x, y)``, or as a decorator above ``@tf.function``.
    """
    _LastError.error = None
    try:
        yield
    except tf.errors.OpError as error:
        original, _LastError.error = _LastError.error, None
        if original is None or str(original) not in error.message:
            raise
        raise (original.with_traceback(None) if isinstance(original, LentandoError) else original) from None


class _Converting:
    """A compiled training step that raises original errors.

    Args:
        function: the compiled training step.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        with original_errors():
            return self._function(*arguments)


def convert_errors_of(model: keras.Model) -> None:
    """Make ``fit`` and ``train_on_batch`` of a model raise original errors."""
    if "make_train_function" in vars(model):
        return  # done already, for an earlier optimizer
    make: Callable[..., Any] = model.make_train_function

    @wraps(make)
    def make_train_function(force: bool = False) -> Any:
        make(force)
        if not isinstance(model.train_function, _Converting):
            model.train_function = _Converting(model.train_function)
        return model.train_function

    model.make_train_function = make_train_function
