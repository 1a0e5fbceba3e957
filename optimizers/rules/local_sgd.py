"""Local SGD: no communication between outer steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lentando.comm.flat import FlatBuffer
from lentando.comm.transport import Transport
from lentando.optimizers.rules.base_algorithm import BoundAlgorithm

__all__ = ["LocalSGD"]


@dataclass(frozen=True)
class LocalSGD:
    """Every replica steps without the others. Between outer steps not one message is sent.

    Example:
        >>> from lentando.optimizers.rules.settings import Settings
        >>> Settings(LocalSGD(), period=12).make_period().steps()
        12
        >>> Settings(LocalSGD())
        Traceback (most recent call last):
        lentando.comm.errors.ConfigurationError: LocalSGD() sends nothing ...
    """

    averages_gradients: ClassVar[bool] = False
    communicates: ClassVar[bool] = False
    mixes_parameters: ClassVar[bool] = False

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        return _LocalSteps()


class _LocalSteps(BoundAlgorithm):
    """Inherits hooks that do nothing."""
