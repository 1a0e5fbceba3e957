"""What a framework adapter implements: all that a replica needs of PyTorch, TensorFlow or another framework."""

from collections.abc import Mapping, Sequence, Set
from typing import Protocol, runtime_checkable

from lentando.comm.flat import FlatBuffer, FlatLayout
from lentando.comm.transport import Array
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.weight_watch import WeightWatch

__all__ = [
    "ChangingFramework",
    "CoveringFramework",
    "Framework",
    "LeavingFramework",
    "MeasuringFramework",
    "OverlappingFramework",
]


class Framework(Protocol):
    """A framework adapter: it provides memory and numbers, and contains no algorithm.

    Attributes:
        name: name of the framework, such as "torch" or "tensorflow".
        buffers: parameters, then statistics, flat, one buffer per dtype: in host memory, or all on the rank's device if
            the transport takes device arrays (``lentando.comm.capabilities.DeviceArrays``).
        gradients: gradients of the parameters, flat, one buffer per dtype; asked for only by base algorithms that
            average gradients.
        watch: notices parameters that the program sets between steps.
    """

    name: str
    buffers: Sequence[FlatBuffer]
    watch: WeightWatch

    @property
    def gradients(self) -> Sequence[FlatBuffer]:
        """Flat buffers of the gradients, one per dtype; used only by base algorithms that average gradients."""

    def load(self) -> None:
        """Copy the framework's tensors into ``buffers``, unless they share memory.

        On a device, CuPy's current stream is from then on one that is in order with the framework's.

        Raises:
            ConfigurationError: if the framework's tensors are no longer those that were wrapped.
        """

    def store(self) -> None:
        """Copy ``buffers`` into the framework's tensors, unless they share memory."""

    def not_averaged(self) -> Mapping[str, Array]:
        """The rest of the model's state by name: frozen parameters and counters. Without copies, if possible."""

    def store_not_averaged(self, tensors: Mapping[str, Array]) -> None:
        """Replace some of the tensors that ``not_averaged`` returns."""

    def learning_rates(self) -> Sequence[float]:
        """The present learning rate of each parameter group; NaN for a group that has none."""

    def describe_optimizer(self) -> OptimizerDescription:
        """Class and present hyperparameters of the base optimizer. Called once, before anything is sent."""

    def optimizer_buffers(self) -> Mapping[str, Array]:
        """The base optimizer's floating-point buffers of the shape of a parameter (momentum, ...), by name."""

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None:
        """Replace the buffers that ``optimizer_buffers`` returns."""

    def reset_optimizer(self) -> None:
        """Reset the base optimizer's state to that of a new one."""


@runtime_checkable
class CoveringFramework(Framework, Protocol):
    """A framework adapter that knows the whole model, parts of which may be trained by other optimizers."""

    def left_out(self) -> Sequence[str]:
        """Names of the model's trainable parameters that no wrapped optimizer has: they are never averaged."""


@runtime_checkable
class LeavingFramework(Protocol):
    """An optional protocol of adapters, which can leave large gradients where the backward pass has put them."""

    def gradient_parts(self) -> Sequence[Sequence[Array]]:
        """For each of ``gradients``, arrays which hold its elements, one after the other.

        They are parts of the flat buffer, and gradients in memory of their own, which may be changed there.
        """


@runtime_checkable
class OverlappingFramework(Protocol):
    """An optional protocol of adapters, which can average gradients while the backward pass computes others.

    Such an adapter fills the buckets of ``lentando.optimizers.rules.gradient_buckets.OverlapsGradients``.
    """

    @property
    def fills_buckets(self) -> bool:
        """Whether it does so where its parameters are stored."""


@runtime_checkable
class MeasuringFramework(Framework, Protocol):
    """A framework adapter whose models may contain means and variances measured on each rank's own data."""

    def moments(self) -> Sequence[tuple[str, str]]:
        """Names of each such mean and its variance, both of which ``not_averaged`` returns."""


@runtime_checkable
class ChangingFramework(CoveringFramework, Protocol):
    """A framework adapter whose trained parameters may change: they are frozen, unfrozen, added or removed.

    Attributes:
        known: names of the tensors in ``buffers`` and ``not_averaged`` when the buffers were laid out.
    """

    known: Set[str]

    def has_changed(self) -> bool:
        """Whether other parameters are trained than those in ``buffers``, or in other groups.

        Called whenever ranks communicate between steps, so it must be fast.
        """

    def next_layouts(self) -> Sequence[FlatLayout]:
        """The layouts of the buffers that ``change_layout`` would make.

        Raises:
            ConfigurationError: if no parameter is trainable.
        """

    def replaced(self) -> Set[str]:
        """Names of parameters that have been replaced by others of the same name since the buffers were laid out.

        For example those of a layer that the program has replaced by another.
        """

    def change_layout(self) -> None:
        """Make new ``buffers`` and ``gradients`` for the parameters that are trained now. Values do not change."""
