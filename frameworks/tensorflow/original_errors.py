"""Errors that Python raises inside a graph, for which TensorFlow raises one of its own with their text in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import keras
import tensorflow as tf

from lentando.comm.errors import LentandoError

__all__ = ["convert_errors_of", "note_error", "original_errors"]


class _Noted:
    """The last error in a graph's call of Python."""

    error: Exception | None = None


def note_error(error: Exception) -> None:
    """Remember an error that TensorFlow is about to replace by one of its own."""
    _Noted.error = error


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise Lentando's own error where a graph has failed of it, in place of TensorFlow's ``UnknownError``.

    ``fit`` of a model that the optimizer was given (``model=``) does so by itself. For other graphs, use it round the
    call, ``with lt.original_errors(): step(x, y)``, or as a decorator above ``@tf.function``.
    """
    _Noted.error = None
    try:
        yield
    except tf.errors.OpError as error:
        original, _Noted.error = _Noted.error, None
        if original is None or str(original) not in error.message:
            raise
        raise (original.with_traceback(None) if isinstance(original, LentandoError) else original) from None


class _Converting:
    """A compiled step that raises original errors.

    Args:
        function: the step.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        with original_errors():
            return self._function(*arguments)


def convert_errors_of(model: keras.Model) -> None:
    """Let ``fit`` and ``train_on_batch`` of a model raise original errors."""
    if "make_train_function" in vars(model):
        return  # the model has been given to an optimizer before
    make: Callable[..., Any] = model.make_train_function

    @wraps(make)
    def make_train_function(force: bool = False) -> Any:
        make(force)
        if not isinstance(model.train_function, _Converting):
            model.train_function = _Converting(model.train_function)
        return model.train_function

    model.make_train_function = make_train_function
