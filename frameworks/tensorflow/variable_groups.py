"""Horovod's argument ``groups``: which variables' gradients are sent together."""

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from lentando.optimizers.horovod_arguments import check_groups
from lentando.tensorflow.state_variables import native

__all__ = ["check_variable_groups"]


def check_variable_groups(
    backward_passes_per_step: int, num_groups: int, groups: int | Sequence[Iterable[Any]] | None
) -> None:
    """Check arguments that have no other effect, because all gradients are sent together.

    Args:
        backward_passes_per_step: backward passes before each step.
        num_groups: older name of ``groups``.
        groups: number of groups, or lists of variables.

    Raises:
        ConfigurationError: for values that Horovod refuses, too.
    """
    if isinstance(groups, list | tuple):
        groups = [[native(variable) for variable in group] for group in groups]
    check_groups(backward_passes_per_step, num_groups, groups, tf.Variable)
