"""Base algorithms: what the replicas say to each other around each inner step, between outer steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.flat import FlatBuffer
from lentando.comm.transport import Transport

__all__ = ["AllReduce", "BaseAlgorithm", "InnerSteps", "LocalSGD"]


class InnerSteps:
    """A base algorithm at work in one job. Does nothing at any moment that a subclass does not override."""

    def average_gradients(self) -> None:
        """After the gradients of a step are there, before the base optimizer uses them."""

    def before_step(self) -> None:
        """Before the base optimizer steps."""

    def after_step(self) -> None:
        """After the base optimizer has stepped."""

    def drain(self) -> None:
        """Before an exact average, an evaluation, a checkpoint or the end: bring home what is still under way."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next steps, as numbers, strings, lists, dicts and arrays."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an earlier run."""


class BaseAlgorithm(Protocol):
    """Describes a base algorithm. Describing neither communicates nor starts anything: ``bind`` does.

    Attributes:
        averages_gradients: whether every step begins with ``average_gradients``.
        communicates: whether anything is sent between outer steps.
    """

    averages_gradients: ClassVar[bool]
    communicates: ClassVar[bool]

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> InnerSteps:
        """Plan the messages for these buffers; ``gradients`` is empty unless ``averages_gradients``."""


@dataclass(frozen=True)
class LocalSGD:
    """Nothing: every replica steps on its own. Between outer steps not one message is sent."""

    averages_gradients: ClassVar[bool] = False
    communicates: ClassVar[bool] = False

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> InnerSteps:
        return InnerSteps()


@dataclass(frozen=True)
class AllReduce:
    """Synchronous SGD: gradients are averaged over all replicas before each step, as Horovod and DDP do.

    Args:
        algorithm: how the all-reduce is done; see ``lentando.comm.collectives.plan_reduction``.
    """

    algorithm: Algorithm = "auto"

    averages_gradients: ClassVar[bool] = True
    communicates: ClassVar[bool] = True

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> InnerSteps:
        return _AveragedGradients(transport, gradients, self.algorithm)


class _AveragedGradients(InnerSteps):
    def __init__(self, transport: Transport, gradients: Sequence[FlatBuffer], algorithm: Algorithm) -> None:
        self._reductions = [plan_reduction(transport, buffer.array, algorithm) for buffer in gradients]

    def average_gradients(self) -> None:
        for reduction in self._reductions:
            reduction.all_reduce(mean=True)
