"""Arguments of Horovod's ``DistributedOptimizer`` as settings of a base algorithm, the same in every framework."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lentando.comm.checks import check_integer
from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Average, Op
from lentando.optimizers.rules.adasum import AdasumDeltas
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.rounding import SixteenBits
from lentando.optimizers.rules.settings import Settings

__all__ = ["check_groups", "op_of", "wire_dtype_of", "with_reduction"]

T = TypeVar("T")


def op_of(op: Op | None, average: bool | None) -> Op:
    """Return the op that a call asks for by ``op``, or by Horovod's older argument ``average``.

    Raises:
        ConfigurationError: if both are given, or ``op`` is no op.

    Example:
        >>> op_of(None, None), op_of(None, False)
        (<Op.Average: 'average'>, <Op.Sum: 'sum'>)
    """
    if average is not None and op is not None:
        raise ConfigurationError("give op= or average=, not both")
    if op is None:
        return Average if average is None or average else Op.Sum
    if not isinstance(op, Op):
        raise ConfigurationError(f"op must be {', '.join(op.name for op in Op)}, got {op!r}")
    return op


def wire_dtype_of(compression: Any) -> SixteenBits | None:
    """Return the dtype in which gradients are sent with one of the framework's ``Compression``.

    Raises:
        ConfigurationError: for another compressor.
    """
    if not hasattr(compression, "wire_dtype"):
        raise ConfigurationError(
            "compression must be Compression.none, Compression.fp16 or Compression.bf16: all gradients are sent "
            f"together, and no other compressor can be applied to them, got {compression!r}"
        )
    dtype: SixteenBits | None = compression.wire_dtype
    return dtype


def with_reduction(
    settings: Settings, op: Op = Average, wire_dtype: SixteenBits | None = None, predivide_factor: float = 1.0
) -> Settings:
    """Return settings whose base algorithm reduces gradients as Horovod's arguments ask for.

    Args:
        settings: settings with ``AllReduce`` as base algorithm, or any settings if all arguments are the defaults.
        op: ``Average``, ``Sum``, or ``Adasum``, which combines the steps of the ranks instead of their gradients.
        wire_dtype: 16-bit dtype to which gradients (with ``Adasum``, steps) are rounded before they are sent, or None.
        predivide_factor: Horovod's ``gradient_predivide_factor``.

    Raises:
        ConfigurationError: for another base algorithm, another op, and combinations that Horovod refuses, too.

    Example:
        >>> with_reduction(Settings(), Op.Sum).base.op
        <Op.Sum: 'sum'>
    """
    if (op, wire_dtype, predivide_factor) == (Average, None, 1):
        return settings
    base = settings.base
    if not isinstance(base, AllReduce):
        raise ConfigurationError(
            f"op=, compression= and gradient_predivide_factor= say how gradients are averaged, and {base!r} averages "
            "none: leave them out, or leave out base="
        )
    if op is Op.Adasum:
        if predivide_factor != 1:
            raise ConfigurationError("gradient_predivide_factor divides an average: leave it out with op=Adasum")
        return replace(settings, base=AdasumDeltas(wire_dtype))
    return replace(settings, base=replace(base, op=op, wire_dtype=wire_dtype, predivide_factor=float(predivide_factor)))


def check_groups(
    backward_passes_per_step: int, num_groups: int, groups: int | Sequence[Iterable[T]] | None, kind: type[T]
) -> None:
    """Check Horovod's arguments about when and together with which others a gradient is sent.

    They have no other effect: all gradients are sent together, when the step is taken.

    Args:
        backward_passes_per_step: backward passes before each step.
        num_groups: older name of ``groups``.
        groups: number of groups, or lists of tensors.
        kind: class of the tensors.

    Raises:
        ConfigurationError: for values that Horovod refuses, too.
    """
    check_integer("backward_passes_per_step", backward_passes_per_step, 1, "backward passes")
    if num_groups != 0:
        warnings.warn("num_groups has been replaced by groups in Horovod", DeprecationWarning, stacklevel=4)
        groups = num_groups if groups is None else groups
    if groups is None:
        return
    if isinstance(groups, int) and not isinstance(groups, bool):
        check_integer("groups", groups, 1, "groups of tensors")
        return
    if not isinstance(groups, list | tuple):
        raise ConfigurationError(f"groups must be a number of groups or a list of lists of tensors, got {groups!r}")
    seen: set[int] = set()
    for tensor in (tensor for group in groups for tensor in group):
        if not isinstance(tensor, kind):
            raise ConfigurationError(f"groups must contain {kind.__name__}s, got {type(tensor).__name__}")
        if id(tensor) in seen:
            raise ConfigurationError("a parameter can be in one group only, and groups= contains one twice")
        seen.add(id(tensor))
