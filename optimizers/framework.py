"""The seam to the frameworks: all that a replica asks of PyTorch, TensorFlow or anything else that trains a model."""

from collections.abc import Mapping, Sequence, Set
from typing import Protocol, runtime_checkable

from lentando.comm.flat import FlatBuffer, FlatLayout
from lentando.comm.transport import Array
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.weight_watch import WeightWatch

__all__ = ["ChangingFramework", "CoveringFramework", "Framework", "MeasuringFramework"]


class Framework(Protocol):
    """What an adapter supplies: memory and numbers. It holds no algorithm.

    Attributes:
        name: "torch", "tensorflow" or the like.
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
        """See above."""

    def load(self) -> None:
        """Bring ``buffers`` up to date with the framework's tensors; nothing to do where they share memory.

        On a device, from here on CuPy's current stream is one that is in order with the framework's.

        Raises:
            ConfigurationError: if the framework's tensors are no longer those that were wrapped.
        """

    def store(self) -> None:
        """Bring the framework's tensors up to date with ``buffers``."""

    def not_averaged(self) -> Mapping[str, Array]:
        """The rest of the model's state, by name: frozen parameters, counters. No copies, if that can be."""

    def store_not_averaged(self, tensors: Mapping[str, Array]) -> None:
        """Replace some of it."""

    def learning_rates(self) -> Sequence[float]:
        """The learning rate of each parameter group, now; NaN for a group that has none."""

    def describe_optimizer(self) -> OptimizerDescription:
        """Class and hyperparameters of the base optimizer, now. Called once, before anything is sent."""

    def optimizer_buffers(self) -> Mapping[str, Array]:
        """The base optimizer's floating-point buffers of the shape of a parameter (momentum, ...), by name."""

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None:
        """Replace them."""

    def reset_optimizer(self) -> None:
        """Put the base optimizer's state back to that of a new one."""


@runtime_checkable
class CoveringFramework(Framework, Protocol):
    """A framework that knows of a model whose parts may be trained by several optimizers."""

    def left_out(self) -> Sequence[str]:
        """Names of trainable parameters of the model that no wrapped optimizer has: they are never averaged."""


@runtime_checkable
class MeasuringFramework(Framework, Protocol):
    """A framework whose models may hold means and variances that were measured on each rank's own data."""

    def moments(self) -> Sequence[tuple[str, str]]:
        """Names of such a mean and its variance, both of them in ``not_averaged``."""


@runtime_checkable
class ChangingFramework(CoveringFramework, Protocol):
    """A framework where other parameters may be trained later: some are frozen or unfrozen, some added or removed.

    Attributes:
        known: names of the tensors that ``buffers`` and ``not_averaged`` had when the buffers were laid out.
    """

    known: Set[str]

    def has_changed(self) -> bool:
        """Whether other parameters are trained, or in other groups, than ``buffers`` were laid out for.

        Asked whenever ranks communicate between steps, so it must be quick.
        """

    def next_layouts(self) -> Sequence[FlatLayout]:
        """The layouts of the buffers that ``change_layout`` would make.

        Raises:
            ConfigurationError: if there can be none: no parameter is trainable.
        """

    def replaced(self) -> Set[str]:
        """Names of parameters that are others now than those of the same name when the buffers were laid out.

        Such as those of a layer that the program has put in another one's place.
        """

    def change_layout(self) -> None:
        """Make new ``buffers`` and ``gradients`` for what is trained now. No parameter changes its value."""
