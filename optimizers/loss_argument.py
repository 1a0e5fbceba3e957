"""The training loss of a step as users pass it: one number, or an error that states what was passed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lentando.comm.errors import ConfigurationError

__all__ = ["as_number", "check_closure", "not_one_number"]


def not_one_number(found: Any) -> ConfigurationError:
    """The error about a loss that is not one number.

    Args:
        found: shape of the loss, or the loss itself if it has none.
    """
    is_shape = isinstance(found, Sequence) and not isinstance(found, str)
    what = f"shape {tuple(found)}" if is_shape else f"{type(found).__name__} {found!r}"
    return ConfigurationError(
        f"loss= must be one number, such as the mean over the batch, got {what}. Reduce it first: loss.mean() in "
        "PyTorch, tf.reduce_mean(loss) in TensorFlow"
    )


def as_number(loss: Any) -> float:
    """A loss that is no tensor: a number, or an array with one element.

    Raises:
        ConfigurationError: if it is anything else.
    """
    if isinstance(loss, int | float):
        return float(loss)
    try:
        array = np.asarray(loss, np.float64)
    except (TypeError, ValueError):
        raise not_one_number(loss) from None
    if array.size != 1:
        raise not_one_number(array.shape)
    return float(array.reshape(()))


def check_closure(closure: Any) -> None:
    """Check that what was passed to a step as its closure is a function.

    Raises:
        ConfigurationError: if it is not, such as a loss that was not passed by its name.
    """
    if not callable(closure):
        raise ConfigurationError(
            f"the closure of step() must be a function that returns the loss, got {type(closure).__name__}. A loss is "
            "passed by its name: step(loss=loss)"
        )
