"""Errors that are Lentando's and TensorFlow's at the same time, so that programs that expect either catch them."""

from collections.abc import Iterator
from contextlib import contextmanager

import tensorflow as tf

from lentando.comm.errors import ConfigurationError, MismatchError, UnsupportedOperationError

__all__ = ["with_status_codes"]


class _FailedPreconditionError(MismatchError, tf.errors.FailedPreconditionError):  # type: ignore[misc]
    """A ``MismatchError`` under the status code with which Horovod's operations fail."""

    def __init__(self, message: str) -> None:
        tf.errors.FailedPreconditionError.__init__(self, None, None, message)


class _InvalidArgumentError(ConfigurationError, tf.errors.InvalidArgumentError):  # type: ignore[misc]
    """A ``ConfigurationError`` under the status code that TensorFlow's operations use for invalid arguments."""

    def __init__(self, message: str) -> None:
        tf.errors.InvalidArgumentError.__init__(self, None, None, message)


class _UnsupportedOperationError(UnsupportedOperationError, tf.errors.InvalidArgumentError):  # type: ignore[misc]
    """An ``UnsupportedOperationError``, which Horovod raises as RuntimeError, under the same status code."""

    def __init__(self, message: str) -> None:
        tf.errors.InvalidArgumentError.__init__(self, None, None, message)


for _class in (_FailedPreconditionError, _InvalidArgumentError, _UnsupportedOperationError):
    _class.__name__ = _class.__qualname__ = _class.__bases__[0].__name__


@contextmanager
def with_status_codes() -> Iterator[None]:
    """Give the errors of a block the status codes of TensorFlow's errors."""
    try:
        yield
    except MismatchError as error:
        raise _FailedPreconditionError(str(error)) from error
    except UnsupportedOperationError as error:
        raise _UnsupportedOperationError(str(error)) from error
    except ConfigurationError as error:
        raise _InvalidArgumentError(str(error)) from error
