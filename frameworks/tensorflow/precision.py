"""A warning for Keras optimizers whose hyperparameters do not work in the dtype of the variables."""

import logging
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

__all__ = ["warn_of_rounded_betas"]

_log = logging.getLogger("lentando")

BETAS = {
    "Adam": ("beta_1", "beta_2"),
    "Adamax": ("beta_1",),
    "Lamb": ("beta_1", "beta_2"),
    "Muon": ("adam_beta_1", "adam_beta_2"),
    "Nadam": ("beta_1", "beta_2"),
    "ScheduleFreeAdamW": ("beta_1", "beta_2"),
}
"""Decay rates of optimizer classes and their subclasses that divide by 1 - beta ** step in the dtype of the variable.
Where beta is rounded to 1, the step is zero or NaN."""


def warn_of_rounded_betas(optimizer: Any, variables: Sequence[Any]) -> None:
    """Log a warning if a decay rate is rounded to 1 in the dtype of a variable, as beta_2 = 0.999 in bfloat16.

    Args:
        optimizer: the optimizer that steps.
        variables: the trained variables, as ``tf.Variable``.
    """
    rates = {
        name: getattr(optimizer, name)
        for kind, names in BETAS.items()
        if isinstance(optimizer, getattr(keras.optimizers, kind, ()))
        for name in names
    }
    for dtype in dict.fromkeys(variable.dtype for variable in variables):
        # Eager computation: a graph may be being traced.
        rounded = [name for name, rate in rates.items() if rate < 1 and float(tf.constant(rate, dtype)) == 1]
        if rounded:
            betas = " and ".join(f"{name}={rates[name]:g}" for name in rounded)
            _log.warning(
                "%s computes in the dtype of the variables, and %s is rounded to 1 in %s: variables of that dtype do "
                "not move, or become NaN, whatever the learning rate is. Keep variables in float32 (dtype policy "
                "'mixed_bfloat16'), or lower it (beta_2=0.99)",
                type(optimizer).__name__,
                betas,
                dtype.name,
            )
